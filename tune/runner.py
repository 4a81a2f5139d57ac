"""The agenda as Ray Tune sees it: a searcher that hands out jobs and a scheduler that hears of them.

Both are thin: every decision is the agenda's. Tune snapshots what it is given; nothing of ours is in its
snapshots, since a sweep goes on from its study and its folders.
"""

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from richkd.command import Stop
from richkd.config import to_dict
from richkd.errors import Interrupted
from tune.agenda import Agenda, Job


class JobSearcher(Searcher):
    """Gives Tune the agenda's next job."""

    def __init__(self, agenda: Agenda, stop: Stop, threads: int) -> None:
        super().__init__()
        self.agenda, self.stop, self.threads = agenda, stop, threads

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next job, None if it has to wait for others, FINISHED at the end."""
        if self.stop.signum is not None:
            self.agenda.stop()
        try:
            job = self.agenda.next()
        except Interrupted:  # a second signal: at once
            raise
        except Exception as error:  # Tune would end in a traceback of its own
            self.agenda.broke(error)
            job = None
        if job is None:
            return Searcher.FINISHED if self.agenda.over else None
        return {
            "id": job.id,
            "config": to_dict(job.config),
            "folder": str(job.folder),
            "test": job.kind == "refit",
            "threads": self.threads,
        }

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """Nothing: the scheduler has heard already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def __getstate__(self) -> dict:
        return {}


class JobScheduler(FIFOScheduler):
    """Tells the agenda what Tune hears of a job."""

    def __init__(self, agenda: Agenda, stop: Stop) -> None:
        super().__init__()
        self.agenda, self.stop = agenda, stop
        self.latest: dict[str, dict[str, Any]] = {}

    def __getstate__(self) -> dict:
        return {}

    def _job(self, trial: Trial) -> Job:
        return self.agenda.running[trial.config["id"]]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Pass an epoch on and return whether the trial goes on."""
        prefix = "run/"
        metrics = {k.removeprefix(prefix): v for k, v in result.items() if k.startswith(prefix)}
        job = self._job(trial)
        self.latest[job.id] = metrics
        if self.stop.signum is not None:
            self.agenda.stop()
        if "stopped" in metrics:
            self.agenda.stop(metrics["stopped"])
        if metrics.keys() & {"failed", "finished", "stopped"}:
            return TrialScheduler.CONTINUE
        try:
            goes_on = self.agenda.epoch(job, metrics)
        except Interrupted:
            raise
        except Exception as error:
            self.agenda.broke(error)
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Pass the end on."""
        self._ended(trial, None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Pass the end on, with the last line of the exception."""
        with open(trial.error_file) as file:
            lines = file.read().strip().splitlines()
        self._ended(trial, lines[-1] if lines else "the trial's process died")

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A trial that Tune takes away before it ran is left to a resume."""
        self._ended(trial, None)

    def _ended(self, trial: Trial, error: str | None) -> None:
        job = self._job(trial)
        metrics = self.latest.pop(job.id, {})
        try:
            self.agenda.ended(job, metrics, error or metrics.get("failed"))
        except Interrupted:
            raise
        except Exception as problem:
            self.agenda.broke(problem)
