"""What a cache lacks, computed over all workers of a cluster by Ray Data.

Each worker opens what it needs from the run's config, once, and computes ranges of rows. The driver holds the table's lock
and alone writes what comes back, shard by shard, so that a kill loses the shards in flight and the next one goes on.
"""

import contextlib
import logging
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.exceptions import RayActorError

from richkd import cache, distill, errors, teachers, zeroshot
from richkd.command import Stop
from richkd.config import Config, from_dict, to_dict
from richkd.data import load
from richkd.distill import Task
from richkd.errors import RichkdError
from richkd.progress import Progress
from richkd.threads import one_thread
from tune.nodes import alive, share
from tune.runner import connect
from tune.settings import Resources, fit

PIECE = 256  # rows that a worker computes at once: whole batches of every model, so that its sums are those of one process
RETRIES = 3  # of a piece whose worker died

Make = Callable[..., cache.Compute]


class Worker:
    """Computes rows in a process of its own.

    Args:
        make: Opens what computes them, when the first are asked for.
        arguments: Its arguments.
    """

    def __init__(self, make: Make, arguments: tuple) -> None:
        self.make, self.arguments = make, arguments
        self.compute: cache.Compute | None = None

    def __call__(self, piece: dict[str, np.ndarray]) -> dict[str, list]:
        """Return the rows of a piece, or the error that its user is told: Ray would turn it into a traceback."""
        try:
            with one_thread():
                self.compute = self.compute or self.make(*self.arguments)
                rows = self.compute(int(piece["start"][0]), int(piece["stop"][0]))
        except RichkdError as error:
            return {
                "rows": [np.empty((0, 0), np.float32)],
                "error": [type(error).__name__],
                "told": [f"{platform.node()}: {error}"],
            }
        return {"rows": [rows], "error": [""], "told": [""]}


def spread(
    make: Make, arguments: tuple, workers: int, each: dict[str, float], missing: list[cache.Range]
) -> Iterator[np.ndarray]:
    """Yield rows that are computed by several workers at once, a block a range, in order.

    Args:
        make: Given `arguments` returns, in a worker, what computes rows; a function of a module.
        arguments: Plain data.
        workers: How many there are.
        each: CPUs and GPUs of a worker.
        missing: Ranges of rows.

    Raises:
        RichkdError: What a worker raised of it, or that workers die again and again.
    """
    pieces = [
        {"start": at, "stop": min(at + PIECE, stop)}
        for start, stop in missing
        for at in range(start, stop, PIECE)
    ]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # there is one of ours
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    pool = ray.data.ActorPoolStrategy(
        size=min(workers, len(pieces)), max_tasks_in_flight_per_actor=2
    )
    computed = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
        Worker,
        fn_constructor_args=(make, arguments),
        batch_size=1,
        batch_format="numpy",
        compute=pool,
        num_cpus=each["CPU"],
        num_gpus=each.get("GPU", 0),
        max_task_retries=RETRIES,
    )
    try:
        with contextlib.closing(iter(computed.iter_rows())) as rows:
            for start, stop in missing:
                block = [_told(next(rows)) for _ in range(start, stop, PIECE)]
                yield np.concatenate(block)
    except RayActorError as error:
        raise RichkdError(
            f"the workers that compute rows died {1 + RETRIES} times at the same ones; look at their memory, and start again."
        ) from error


def _told(row: dict[str, Any]) -> np.ndarray:
    """Return the rows of a piece, or raise what its worker says."""
    if row["error"]:
        raise getattr(errors, row["error"])(row["told"])
    return row["rows"]


def look(config: dict[str, Any], teacher: int, at: int) -> cache.Compute:
    """Return, in a worker, what computes the features of a zero-shot teacher of `config`.

    Args:
        config: The run, as plain data.
        teacher: Which of its zero-shot teachers.
        at: Which of all that this one looks at.
    """
    run = from_dict(config)
    dataset, root = load(run.data, cache.root(run.cache)), cache.root(run.cache)
    _, given, _ = teachers.shares(run.clip)[teacher]
    clip = zeroshot.load(
        given.model, given.pretrained, given.file, device=distill.device_of(run), root=root
    )
    return zeroshot.looking(clip, zeroshot.looks(given.views, dataset)[at])


def features(
    config: Config,
    task: Task,
    progress: Progress,
    *,
    stop: Stop,
    address: str | None,
    dashboard: str | None,
) -> None:
    """Put CLIP's features into the cache, by all workers of a cluster if there are several.

    Args:
        config: The run, with an absolute cache.
        task: Its data.
        progress: Told how far it is; may raise to stop, and what is finished stays.
        stop: As `runner.run` takes it, like the others.
        address: Of a running cluster.
        dashboard: Of one that is started.
    """
    connect(stop, address, dashboard)
    nodes = [node.resources for node in alive()]
    workers, each = fit(Resources(), nodes, gpu=config.device != "cpu")
    if workers == 1:
        return
    share(cache.used(), progress=progress)  # pixels, and the miniature
    for k, (_, given, _) in enumerate(teachers.shares(config.clip)):
        if given.logits is not None:
            continue
        clip = zeroshot.load(
            given.model, given.pretrained, given.file, device=task.device, root=task.cache
        )
        for at, images in enumerate(zeroshot.looks(given.views, task.dataset)):
            by_all = partial(spread, look, (to_dict(config), k, at), workers, each)
            zeroshot.image_features(clip, images, task.cache, progress, by_all)
