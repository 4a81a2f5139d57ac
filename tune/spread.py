"""What a cache lacks, computed over all workers of a cluster by Ray Data.

Each worker opens what it needs from the run's config, once, and computes ranges of rows. The driver holds the table's lock
and alone writes what comes back, shard by shard, so that a kill loses the shards in flight and the next one goes on.
"""

import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError, RayTaskError

from richkd import cache, distill, errors, estimate, teachers, zeroshot
from richkd.command import Stop
from richkd.config import Config
from richkd.data import load
from richkd.distill import Task
from richkd.errors import RichkdError, Stopped
from richkd.layers import from_dict, to_dict
from richkd.progress import Progress, stoppable
from richkd.threads import one_thread
from tune.nodes import alive, on, share
from tune.runner import connect
from tune.settings import Resources, fit

PIECE = 256  # rows that a worker computes at once: whole batches of every model, so that its sums are those of one process
PATIENCE = 1800.0  # seconds without a piece after which nobody computes any more

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


@ray.remote(num_cpus=0)
class Asker:
    """Asks Ray Data, in a process of its own that keeps what that says to its log, and with which its workers end."""

    def rows(
        self,
        make: Make,
        arguments: tuple,
        workers: int,
        each: dict[str, float],
        pieces: list[dict[str, int]],
    ) -> Iterator[dict[str, Any]]:
        """Yield what workers return of pieces, in order."""
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.execution_no_progress_timeout_s = PATIENCE
        context.raise_original_map_exception = True
        computed = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
            Worker,
            fn_constructor_args=(make, arguments),
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(pieces))),
            num_cpus=each["CPU"],
            num_gpus=each.get("GPU", 0),
        )
        yield from computed.iter_rows()


def spread(
    make: Make,
    arguments: tuple,
    workers: int,
    each: dict[str, float],
    beat: Callable[[], None],
    missing: list[cache.Range],
    piece: int = PIECE,
) -> Iterator[np.ndarray]:
    """Yield rows that are computed by several workers at once, a block a range, in order.

    Args:
        make: Given `arguments` returns, in a worker, what computes rows; a function of a module.
        arguments: Plain data.
        workers: How many there are.
        each: CPUs and GPUs of a worker.
        beat: Called once a second; may raise to stop.
        missing: Ranges of rows.
        piece: Rows that a worker computes at once.

    Raises:
        RichkdError: What a worker raised.
        Stopped: If the cluster is gone, or computes nothing any more: of a worker that died Ray Data computes anew what it
            had, for as long as something comes.
    """
    pieces = [
        {"start": at, "stop": min(at + piece, stop)}
        for start, stop in missing
        for at in range(start, stop, piece)
    ]
    asker = on(Asker, ray.get_runtime_context().get_node_id()).remote()
    rows = asker.rows.remote(make, arguments, workers, each, pieces)
    try:
        for start, stop in missing:
            yield np.concatenate([_next(rows, beat) for _ in range(start, stop, piece)])
    except ExecutionTimeoutError as error:
        raise Stopped(f"the workers have given no row for {PATIENCE:g} s") from error
    except RayTaskError:  # of our own code, with its traceback
        raise
    except RayError as error:
        raise Stopped(f"the cluster computes no more ({type(error).__name__})") from error
    finally:
        ray.kill(asker)


def _next(rows: ray.ObjectRefGenerator, beat: Callable[[], None]) -> np.ndarray:
    """Return the rows of the next piece, or raise what its worker says."""
    while not ray.wait([rows], timeout=1)[0]:
        beat()
    row = ray.get(next(rows))
    if row["error"]:
        raise getattr(errors, row["error"])(row["told"])
    return row["rows"]


def image_features_of(config: dict[str, Any], teacher: int, at: int) -> cache.Compute:
    """Return, in a worker, what computes the features of a zero-shot teacher of `config`.

    Args:
        config: The run, as plain data.
        teacher: Which of its zero-shot teachers.
        at: Which of all that this one looks at.
    """
    run = from_dict(config)
    root = cache.root(run.cache)
    dataset = load(run.data, root)
    _, given, _ = teachers.shares(run.clip)[teacher]
    clip = teachers.model_of(given, distill.device_of(run), root)
    return zeroshot.looking(clip, zeroshot.looks(given.views, dataset)[at])


def crop_logits_of(config: dict[str, Any]) -> cache.Compute:
    """Return, in a worker, what computes what the task teacher of `config` says of crops, by their rows in its table."""
    run = from_dict(config)
    teacher = distill.open_teacher(
        estimate.online(estimate.alone(run)), distill.open_task(run)
    ).task
    return lambda start, stop: teacher.of_numbers(np.arange(start, stop))


def workers_of(
    config: Config, progress: Progress, *, stop: Stop, address: str | None, dashboard: str | None
) -> tuple[int, dict[str, float], Callable[[], None]] | None:
    """Return how many workers a cluster has room for, what each takes, and what hears a signal while they compute.

    What this process has made so far, such as pixels, is given to all machines. None if there is but one worker, here.

    Args:
        config: The run, with an absolute cache.
        progress: Told how far it is; may raise to stop.
        stop: As `runner.run` takes it, like the others.
        address: Of a running cluster.
        dashboard: Of one that is started.
    """
    connect(stop, address, dashboard)
    nodes = [node.resources for node in alive()]
    count, each = fit(Resources(), nodes, gpu=config.device != "cpu")
    if count == len(nodes) == 1:
        return None
    share(cache.used(), progress=progress)
    return count, each, partial(stoppable(None, stop), "rows of the workers", 0, 1)


def features(config: Config, task: Task, progress: Progress, **launch: Any) -> None:
    """Put CLIP's features into the cache, by all workers of a cluster if there are several.

    Args:
        config: The run, with an absolute cache.
        task: Its data.
        progress: Told how far it is; may raise to stop, and what is finished stays.
        launch: As `workers_of` takes it.
    """
    workers = workers_of(config, progress, **launch)
    if workers is None:
        return
    for k, (_, given, _) in enumerate(teachers.shares(config.clip)):
        if given.logits is not None:
            continue
        clip = teachers.model_of(given, task.device, task.cache)
        for at, images in enumerate(zeroshot.looks(given.views, task.dataset)):
            by_all = partial(spread, image_features_of, (to_dict(config), k, at), *workers)
            zeroshot.image_features(clip, images, task.cache, progress, by_all)


def crops(config: Config, teacher: teachers.TaskTeacher, progress: Progress, **launch: Any) -> None:
    """Fill the table of a task teacher, by all workers of a cluster if there are several.

    It is given to each machine that has not begun one of its own.

    Args:
        config: The run, with an absolute cache.
        teacher: Its own, with a table.
        progress: Told how far it is; may raise to stop, and what is finished stays.
        launch: As `workers_of` takes it.
    """
    workers, by_all = workers_of(config, progress, **launch), None
    if workers is not None:
        whole = partial(spread, piece=len(teacher.table))  # each range is one piece
        by_all = partial(whole, crop_logits_of, (to_dict(config),), *workers)
    teacher.fill(progress, by_all)
    share([teacher.table.folder], progress=progress)
