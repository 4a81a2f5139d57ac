"""How fast one distillation is over 1, 2, ... workers, and what a trial takes beside its epochs.

    python -m tune scale my.yaml resources.workers=1,2,4
    python -m tune scale my.yaml resources.workers=1,2,4 --address HEAD:6379 --json

The runs go the way of `python -m tune train` and of a sweep's trials, a few epochs each. Nothing is kept: no folder, no
record in MLflow.
"""

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from richkd import distill
from richkd.command import Stop
from richkd.config import Config, is_url
from richkd.errors import RichkdError
from richkd.files import make_folder
from richkd.layers import Layers, build
from richkd.progress import stoppable
from tune.agenda import Agenda, Job, Refits
from tune.display import Display
from tune.driver import work
from tune.places import machines_of
from tune.settings import Resources, Settings, fit, for_workers

EPOCHS = 6  # of each number of workers, of which the first one warms up
TRIALS = 6  # one after the other in a process, of which the first one starts it
SHORT = 2  # epochs of each of them
HEAD = f"{'workers':>7}{'images/s':>12}{'speed-up':>12}{'efficiency':>13}{'start-up':>12}"


class Clock:
    """Listens to an agenda whose jobs run one after the other.

    Attributes:
        given: When each job was given out; seconds of the monotonic clock, as all times.
        ended_at: When each ended.
        heard: When the newest job's first epoch was heard of.
        epochs: What each job said of its epochs.
    """

    def __init__(self) -> None:
        self.given: list[float] = []
        self.ended_at: list[float] = []
        self.heard = 0.0
        self.epochs: list[list[dict[str, Any]]] = []

    def started(self, job: Job) -> None:
        """Note when."""
        self.given.append(time.monotonic())
        self.epochs.append([])

    def epoch(self, job: Job, metrics: dict[str, Any]) -> None:
        """Note what it says."""
        if not self.epochs[-1]:
            self.heard = time.monotonic()
        self.epochs[-1].append(metrics)

    def ended(self, job: Job, state: str, metrics: dict[str, Any]) -> None:
        """Note when."""
        self.ended_at.append(time.monotonic())


def scale(
    layers: Layers,
    counts: Sequence[int],
    *,
    epochs: int = EPOCHS,
    address: str | None = None,
    dashboard: str | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Measure a distillation over each number of workers, print a table, and return it.

    Args:
        layers: Explicit settings; `train.epochs` and `resources.workers` are passed over.
        counts: Numbers of workers; the lowest one is what the others are compared with.
        epochs: Epochs of each, two or more.
        address: Of a Ray cluster.
        dashboard: As `runner.run` takes it.
        stop: Says whether a signal came.

    Returns:
        `workers`: for each number, `workers`, `images_per_second` (median over the epochs but the first), `speed_up`,
        `efficiency` (percent) and `startup_seconds` (until training begins); `trial_overhead_seconds` (median over
        one-worker trials of a process that has started: what lies between the ends of two, less the second one's
        epochs, and so with what it opens and writes); `epochs`; `cores`.

    Raises:
        ConfigError: If something does not fit together; before Ray starts.
        RichkdError: If a run failed.
        Interrupted: On a signal.
    """
    settings, stop = build(layers, Settings), stop or Stop()
    config = for_workers(layers)
    shares = {count: share(settings.resources, count) for count in sorted(counts)}
    machines = machines_of(address)
    for resources in shares.values():
        fit(resources, machines, gpu=config.device != "cpu")
    found: list[dict[str, Any]] = []
    with Display("scale", stop=stop) as display, temporary(config.storage) as folder:
        progress = stoppable(display.progress, stop)
        task = distill.open_task(config, progress)
        distill.initial_student(config, task.dataset)
        distill.open_teacher(config, task, progress)
        del task

        def measure(name: str, epochs: int, jobs: int, resources: Resources) -> Clock:
            clock = Clock()
            agenda = agenda_of(config, folder / name, epochs, jobs, clock)
            work(
                agenda,
                stop,
                resources,
                folder / ".ray",
                gpu=config.device != "cpu",
                address=address,
                dashboard=dashboard,
            )
            for why in agenda.failed.values():
                raise RichkdError(f"the run of {name} failed: {why.text}")
            return clock

        display.line(HEAD)
        for count, resources in shares.items():
            clock = measure(f"{count}-workers", epochs, 1, resources)
            found.append(row(count, clock, found[0] if found else None))
            display.line(line(found[-1]))
        alone = replace(share(settings.resources, 1), max_concurrent=1)
        overhead = overhead_of(measure("trials", SHORT, TRIALS, alone))
        display.line(f"a trial takes {overhead:.2f} s beside its epochs, in a process that runs")
    return {
        "workers": found,
        "trial_overhead_seconds": overhead,
        "epochs": epochs,
        "cores": os.cpu_count(),
    }


def share(resources: Resources, workers: int) -> Resources:
    """Return what a trial of so many workers takes; several have a GPU each."""
    shared = resources.trials_per_gpu if workers == 1 else 1
    return replace(resources, workers=workers, trials_per_gpu=shared)


@contextlib.contextmanager
def temporary(storage: str) -> Iterator[Path]:
    """Make a folder that is removed in the end: where all machines of a cluster see it, beside their runs.

    On an object store there is no such place; a distillation over workers of several machines needs one in `storage`.
    """
    beside = Path(tempfile.gettempdir() if is_url(storage) else storage).resolve()
    made = not beside.exists()
    make_folder(beside, "storage")
    try:
        with tempfile.TemporaryDirectory(prefix=".scale-", dir=beside) as folder:
            yield Path(folder)
    finally:
        if made:
            with contextlib.suppress(OSError):  # somebody else uses it now
                beside.rmdir()


def agenda_of(config: Config, folder: Path, epochs: int, jobs: int, clock: Clock) -> Agenda:
    """Return an agenda of runs that differ in nothing but their folder."""
    # a warm-up may be longer than these epochs, and takes no other time
    train = replace(config.train, epochs=epochs, warmup=0, warmup_lr=0.0)
    config = replace(config, train=train)

    def job_of(refits: Refits, number: int, _: dict[str, Any]) -> Job:
        return Job(
            id=f"{folder.name}-{number}",
            kind="probe",
            method=refits.method,
            number=number,
            folder=folder / str(number),
            config=config,
        )

    return Agenda(
        [],
        [Refits(method=config.method.name, settings={})],
        jobs,
        trial_of=lambda *_: None,
        refit_of=job_of,
        finished=lambda _: False,
        listeners=[clock],
    )


def row(workers: int, clock: Clock, base: dict[str, Any] | None) -> dict[str, Any]:
    """Return what was measured of one number of workers, compared with the lowest one, `base`, if that is another."""
    (epochs,) = clock.epochs
    speed = statistics.median(each["images_per_second"] for each in epochs[1:])
    speed_up = 1.0 if base is None else speed / base["images_per_second"]
    more = 1.0 if base is None else workers / base["workers"]
    return {
        "workers": workers,
        "images_per_second": speed,
        "speed_up": speed_up,
        "efficiency": 100 * speed_up / more,
        "startup_seconds": clock.heard - epochs[0]["seconds"] - clock.given[0],
    }


def line(found: dict[str, Any]) -> str:
    """Return a line of the table under HEAD."""
    return (
        f"{found['workers']:>7}{found['images_per_second']:>12.0f}{found['speed_up']:>11.2f}x"
        f"{found['efficiency']:>11.0f} %{found['startup_seconds']:>10.1f} s"
    )


def overhead_of(clock: Clock) -> float:
    """Return the median time between the ends of two trials, less the epochs of the second one."""
    between = zip(clock.ended_at[:-1], clock.ended_at[1:], clock.epochs[1:], strict=True)
    return statistics.median(
        after - before - sum(epoch["seconds"] for epoch in epochs)
        for before, after, epochs in between
    )
