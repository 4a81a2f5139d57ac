"""One distillation on Ray, over one or several workers, logged to MLflow.

    python -m tune train resources.workers=2
    python -m tune train my.yaml resources.workers=4 --name first
    python -m tune train my.yaml resources.workers=4 --name first --resume

A run folder is what `python -m richkd distill` leaves; the driver's `mlflow.json` and `lock` lie beside, and
`spool.jsonl` while there is something that MLflow has not taken.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from richkd import checkpoint, distill
from richkd.command import Stop
from richkd.config import Config
from richkd.errors import RichkdError
from richkd.files import make_folder
from richkd.layers import Layers, build, digest, dump, flatten, to_dict
from richkd.progress import epoch_line, stoppable
from richkd.record import Metrics, Record, result_of, rows_of
from tune.agenda import Agenda, Job, Refits
from tune.display import Display
from tune.driver import locked, resumable, work
from tune.environment import environment
from tune.first import look_at_all
from tune.logbook import CLOSE_SECONDS, STATUS, ending, opening, shown, tested
from tune.places import machines_of
from tune.settings import Settings, fit, for_workers
from tune.tracking import Tracker


class RunLog:
    """Listens to the one job of an agenda: prints its epochs and writes them to MLflow.

    Args:
        folder: Run folder.
        settings: Where MLflow is, and what the run takes of the cluster.
        display: Where lines go.
        before: Metrics of the epochs that lie behind, of which a killed driver may not have sent all.
    """

    def __init__(
        self, folder: Path, settings: Settings, display: Display, before: Sequence[Metrics] = ()
    ) -> None:
        self.before = before
        self.folder, self.settings, self.display = folder, settings, display
        self.tracker = Tracker(folder, settings.tracking.uri, settings.tracking.experiment)
        self.closed = False

    def started(self, job: Job) -> None:
        """Begin, or go on with, the run."""
        resources = {"resources": to_dict(self.settings.resources)}
        params = shown(flatten(to_dict(job.config)) | flatten(resources))
        found = environment()
        tags = opening("train", digest(job.config), found)
        self.tracker.start()
        self.tracker.sweep(job.id, params, tags | {"richkd.method": job.config.method.name})
        for metrics in self.before:
            self._log(metrics)
        self.tracker.text(job.id, dump(job.config), "config.yaml")
        self.tracker.text(job.id, json.dumps(found, indent=2), "environment.json")

    def epoch(self, job: Job, metrics: dict[str, Any]) -> None:
        """Print an epoch and keep its metrics."""
        self.display.line(epoch_line(metrics, job.config.train.epochs, job.config.part))
        self._log(metrics)

    def ended(self, job: Job, state: str, metrics: dict[str, Any]) -> None:
        """Keep how it ended; a finished run leaves its checkpoint and its test accuracy there."""
        if state == "finished":
            self.tracker.log(job.id, tested(metrics), job.config.train.epochs)
            self.tracker.artifacts(job.id, job.folder / "best", "checkpoint")
        self.tracker.tag(job.id, ending(state, metrics))
        self.close(STATUS[state])

    def close(self, status: str) -> None:
        """End the run in MLflow and wait until it has everything; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        try:
            self.tracker.finish(self.folder.name, status)
        finally:
            self.tracker.close(CLOSE_SECONDS)

    def _log(self, metrics: Metrics) -> None:
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        self.tracker.log(self.folder.name, values, int(metrics["epoch"]))


def train(
    layers: Layers,
    folder: Path,
    *,
    command: str,
    resume: bool = False,
    address: str | None = None,
    dashboard: str | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Distil one student over `resources.workers` workers and return what came of it.

    Args:
        layers: Explicit settings.
        folder: Run folder; its name is that of the run in MLflow.
        command: What began the run, and begins it anew; with ` --resume` it goes on.
        resume: Whether the folder may hold this run already, which then goes on.
        address: Of a Ray cluster.
        dashboard: As `runner.run` takes it.
        stop: Says whether a signal came.

    Raises:
        ConfigError: If something does not fit together, or the folder holds another run; before Ray starts.
        CorruptError: If the checkpoint to go on from is damaged.
        RichkdError: If the run failed.
        Stopped: If it was interrupted; resumable.
    """
    settings, stop = build(layers, Settings), stop or Stop()
    config = for_workers(layers)
    fit(settings.resources, machines_of(address), gpu=config.device != "cpu")
    Tracker.address(settings.tracking.uri)  # refused now, if at all
    folder = folder.resolve()
    with Display(folder.name, stop=stop) as display:
        workers = settings.resources.workers
        display.line(
            f"{config.method.name} on {config.data.source} over {workers} worker{'s' * (workers > 1)}, into {folder}"
        )
        if config.caution:
            display.line(config.caution)
        progress = stoppable(display.progress, stop)
        # what all workers share is made once, and what cannot be used is refused here
        task = distill.open_task(config, progress)
        distill.initial_student(config, task.dataset)
        look_at_all(config, task, progress, stop=stop, address=address, dashboard=dashboard)
        teacher = distill.open_teacher(config, task, progress)
        make_folder(folder, "storage")
        with locked(folder):
            # in the lock, since another driver may have begun it a moment ago; before MLflow hears of it
            Record(folder, config, resume=resume).check(task.dataset, teacher)
            before = []
            if checkpoint.exists(folder / "last"):
                before = rows_of(folder, checkpoint.verify(folder / "last")["meta"])
            del task, teacher  # of which the workers have their own
            log = RunLog(folder, settings, display, before)
            agenda = _agenda(config, folder, log)

            def go_on() -> str:
                begun = (folder / "run.json").exists()
                return f"{command} --resume" if begun else command

            with resumable(log.close, go_on):
                scratch = folder / ".ray"
                work(
                    agenda,
                    stop,
                    settings.resources,
                    scratch,
                    gpu=config.device != "cpu",
                    address=address,
                    dashboard=dashboard,
                )
                if agenda.failed:
                    raise RichkdError(f"{folder.name} failed: {agenda.failed[folder.name].text}")
    return _answer(folder, log)


def _agenda(config: Config, folder: Path, log: RunLog) -> Agenda:
    """Return the agenda with one run on it."""
    job = Job(
        id=folder.name,
        kind="train",
        method=config.method.name,
        number=config.seed,
        folder=folder,
        config=config,
    )
    return Agenda(
        [],
        [Refits(method=job.method, settings={})],
        1,
        trial_of=lambda *_: job,
        refit_of=lambda *_: job,
        finished=lambda _: False,
        listeners=[log],
    )


def _answer(folder: Path, log: RunLog) -> dict[str, Any]:
    """Return the result, and where it is to be seen."""
    titles = {"command": "MLflow UI", "sweep": "this run"}
    mlflow = log.tracker.place(folder.name, titles=titles)
    return result_of(folder) | {"workers": log.settings.resources.workers, "mlflow": mlflow}
