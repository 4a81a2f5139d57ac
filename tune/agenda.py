"""What a sweep has to do, in order: the trials of both searches, then the refits that they decide.

Plain Python, so that its rules can be tested on scripted metrics; `sweep` connects it to Ray.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from optuna.trial import FrozenTrial, TrialState

from richkd.config import Config
from richkd.errors import ConfigError
from richkd.layers import digest
from tune.study import Failure, Search, settings_of

OF_A_METHOD = ("loss.", "fusion.", "clip.", "contrast.")  # keys in which methods differ
STATES = {  # what Optuna's states are called here
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """One run of the sweep.

    Attributes:
        id: Unique in the sweep, such as `trial-007` or `refit-kd-seed3`; the name of its MLflow run.
        kind: `trial` or `refit`.
        method: Label of the search or of the refitted setting.
        number: Number in the study, or the seed of a refit.
        folder: Run folder.
        config: What is run.
        params: What distinguishes it: the searched parameters, or those found.
        heard: The newest epoch that the driver knows of; 0 if none.
        store: Address of its run folder on an object store; None: `folder` is where the run writes.
        costs: What its student costs, by objective, where a search looks at that.
    """

    id: str
    kind: str
    method: str
    number: int
    folder: Path
    config: Config
    params: dict[str, Any] = field(default_factory=dict)
    heard: int = 0
    store: str | None = None
    costs: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Refits:
    """The refits of one setting: of `search`'s best if there is one, else of fixed `settings`.

    Attributes:
        method: Name of a student of the sweep.
        settings: Dotted keys; laid under what a search found.
        search: Whose best setting is refitted.
        shared: Of another search's best what is no matter of a method, such as the student, where that is searched: methods
            are compared on one student.
    """

    method: str
    settings: dict[str, Any]
    search: Search | None = None
    shared: Search | None = None


class Listener(Protocol):
    """Somebody who wants to know: the live table, the tracker."""

    def started(self, job: Job) -> None:
        """Hear of a start."""

    def epoch(self, job: Job, metrics: dict[str, Any]) -> None:
        """Hear of an epoch."""

    def ended(self, job: Job, state: str, metrics: dict[str, Any]) -> None:
        """Hear of an end: `finished`, `pruned`, `failed` (then `metrics` has `error` and `failure`) or `stopped`."""


class Agenda:
    """Gives out jobs and hears of them.

    Args:
        searches: In order of their trials.
        refits: In order; one that waits for a search lets later ones pass.
        seeds: Seeds of each refit.
        trial_of: Makes the job of a trial from label, number, params and settings.
        refit_of: Makes the job of a refit from label, seed and settings.
        finished: Whether a refit's folder holds a finished run already.
        listeners: Told of every start, epoch and end.
    """

    def __init__(
        self,
        searches: list[Search],
        refits: list[Refits],
        seeds: int,
        *,
        trial_of: Callable[[Search, int, dict[str, Any], dict[str, Any]], Job],
        refit_of: Callable[[Refits, int, dict[str, Any]], Job],
        finished: Callable[[Job], bool],
        listeners: Iterable[Listener] = (),
    ) -> None:
        self.searches, self.seeds = searches, seeds
        self.trial_of, self.refit_of, self.finished = trial_of, refit_of, finished
        self.listeners = list(listeners)
        self.waiting = list(refits)
        self.ready: list[Job] = []
        self.running: dict[str, Job] = {}
        self.pruned: set[str] = set()
        self.unusable: dict[str, Failure] = {}  # jobs that run, but report what cannot be compared
        self.failed = {  # by job id
            f"trial-{search.label(number)}": why
            for search in searches
            for number, why in search.failures().items()
        }
        self.stopping = False
        self.error: Exception | None = None  # why it is stopping, if not by a signal
        self.before = sum(search.ended for search in searches)  # jobs done by an earlier driver
        self.total = sum(search.trials for search in searches) + len(refits) * seeds
        self._collect()

    def next(self) -> Job | None:
        """Return the next job, None if there is none now."""
        if self.stopping:
            return None
        job = self._next_trial() or self._next_refit()
        if job is not None:
            self.running[job.id] = job
            for listener in self.listeners:
                listener.started(job)
        return job

    def stop(self) -> None:
        """Give out nothing more, and let what runs end at its next epoch."""
        self.stopping = True

    def broke(self, error: Exception) -> None:
        """Stop because of an error that is no trial's own, which is raised when what runs has ended."""
        self.error = self.error or error
        self.stop()

    def _next_trial(self) -> Job | None:
        for search in self.searches:
            while (asked := search.ask()) is not None:
                number = asked[0]
                try:
                    job = self.trial_of(search, *asked)
                except ConfigError as error:  # takes each value, but not all together
                    why = Failure("error", str(error))
                    search.tell(number, TrialState.FAIL, {}, why)
                    self.failed[f"trial-{search.label(number)}"] = why
                    continue
                if search.stale(number, digest(job.config)):
                    self._over(job, search, Failure("error", "the settings changed while it ran"))
                    continue
                if (why := search.failed(number)) is not None:
                    self._over(job, search, why)
                    continue
                if (known := search.known(number, digest(job.config))) is not None:
                    self._answer(job, search, known)
                    continue
                job = replace(job, heard=search.newest(number))
                if 0 < job.heard < job.config.train.epochs and search.stops_here(number):
                    self._over(job, search, None)
                    continue
                return job
        return None

    def _answer(self, job: Job, search: Search, known: FrozenTrial) -> None:
        """End a trial that has run already, under another number, without running it again."""
        metrics = search.answer(job.number, known)
        for listener in self.listeners:
            listener.started(job)
            listener.ended(job, STATES[known.state], metrics)

    def _over(self, job: Job, search: Search, why: Failure | None) -> None:
        """End a trial that an earlier driver left, where it is: pruned, or failed and tried again."""
        state, name, metrics = TrialState.PRUNED, "pruned", {}
        if why is not None:
            state, name = TrialState.FAIL, "failed"
            metrics = {"error": why.text, "failure": why.kind}
        search.tell(job.number, state, metrics, why)
        for listener in self.listeners:
            listener.started(job)
            listener.ended(job, name, metrics)

    def _next_refit(self) -> Job | None:
        self._collect()
        return self.ready.pop(0) if self.ready else None

    def _collect(self) -> None:
        """Make ready the refits whose search is over, but for those that are finished already."""
        for refits in [r for r in self.waiting if all(s.over for s in (r.search, r.shared) if s)]:
            self.waiting.remove(refits)
            settings = self.settings_of(refits)
            if settings is None:  # no trial of its search succeeded
                why = Failure("error", "its search has no finished trial")
                self.failed[f"refit-{refits.method}"] = why
                continue
            jobs = (self.refit_of(refits, seed, settings) for seed in range(self.seeds))
            left = [job for job in jobs if not self.finished(job)]
            self.before += self.seeds - len(left)
            self.ready += left

    @staticmethod
    def settings_of(refits: Refits) -> dict[str, Any] | None:
        """Return what a refit runs, None if its search found nothing."""
        found = dict(refits.settings)
        if refits.shared is not None:
            best = refits.shared.best()
            if best is None:
                return None
            own = settings_of(best)
            found |= {key: own[key] for key in own if not key.startswith(OF_A_METHOD)}
        if refits.search is not None:
            best = refits.search.best()
            if best is None:
                return None
            found |= settings_of(best)
        return found

    @property
    def over(self) -> bool:
        """Whether there is nothing left to give out, now or later."""
        if self.stopping:
            return True
        return not (self.running or self.ready or self.waiting) and all(
            s.over for s in self.searches
        )

    def epoch(self, job: Job, metrics: dict[str, Any]) -> bool:
        """Hear of an epoch; return whether the job goes on."""
        if not finite(metrics, "val/top1") or not finite(metrics, "best_val_top1"):
            missing = "val/top1 and best_val_top1 must be reported as finite numbers"
            why = Failure("metric", f"{missing} but are not in epoch {metrics['epoch']}")
            self.unusable[job.id] = why
            return False
        for listener in self.listeners:
            listener.epoch(job, metrics)
        if job.kind == "trial":
            search = self._search(job)
            last = metrics["epoch"] >= job.config.train.epochs
            if search.epoch(job.number, metrics["epoch"], metrics["val/top1"]) and not last:
                self.pruned.add(job.id)
                return False
        return not self.stopping

    def ended(self, job: Job, metrics: dict[str, Any], why: Failure | None) -> None:
        """Hear of the end of a job: pruned, failed, stopped with the sweep, or finished."""
        self.running.pop(job.id, None)
        finished = metrics.get("finished", False)
        if why is None:
            why = self.unusable.pop(job.id, None)
        if why is None and finished and not finite(metrics, "best_val_top1"):
            why = Failure("metric", "best_val_top1 must be a finite number but is not")
        if why is not None:
            state = "failed"
            self.failed[job.id] = why
            metrics = metrics | {"error": why.text, "failure": why.kind}
        elif job.id in self.pruned:
            state = "pruned"
        elif not finished:
            state = "stopped"
        else:
            state = "finished"
        if state == "finished":
            metrics = metrics | job.costs
        if job.kind == "trial" and state != "stopped":  # a stopped one is given out again on resume
            ended = next(key for key, name in STATES.items() if name == state)
            self._search(job).tell(job.number, ended, metrics, why)
        for listener in self.listeners:
            listener.ended(job, state, metrics)

    def _search(self, job: Job) -> Search:
        return next(search for search in self.searches if search.name == job.method)


def finite(metrics: dict[str, Any], name: str) -> bool:
    """Whether a metric is there, and a finite number."""
    value = metrics.get(name)
    return isinstance(value, int | float) and math.isfinite(value)
