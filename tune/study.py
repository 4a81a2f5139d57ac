"""One Optuna study as the memory of one search: points asked for, epochs heard of, results told.

The study is the truth of a sweep: it lies in `study.db`, and a sweep that is resumed asks it what is
finished (never asked again), what was running (given out again under its number) and what is left.
"""

import logging
import warnings
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

import optuna
from optuna.distributions import check_distribution_compatibility
from optuna.trial import FrozenTrial, Trial, TrialState

from richkd.errors import ConfigError
from tune.space import Space
from tune.warmstart import Point, said

logging.getLogger("optuna").setLevel(logging.ERROR)
MAIN = "richkd"  # the search of the method itself
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
# of failures: a mistake of settings, data or code; NaN; does not fit into memory; process or machine died again and
# again; no step for too long; a report lacks what is compared
Kind = Literal["error", "nan", "memory", "lost", "hung", "metric"]


class Failure(NamedTuple):
    """Why a run failed: the class of it, and what happened, in a line."""

    kind: Kind
    text: str


class Search:
    """A study of `trials` trials in all, over `space`, the `points` first.

    With several objectives there is no best trial but a front of them; `best` is the most accurate.

    Args:
        name: Study name, which is also the label of its trials.
        storage: Database of the sweep's studies.
        space: What is searched.
        points: Trials to begin with.
        trials: Trials in all, pruned and failed ones counted, but none that tries a failed one again.
        startup: Random trials before the sampler learns.
        pruner: Early stopping.
        seed: Of the sampler; a resumed search draws anew, not the same points again.
        prefix: Of its name in a database that several sweeps share.
        objectives: Of OBJECTIVES, top1 first.
    """

    def __init__(
        self,
        name: str,
        storage: optuna.storages.BaseStorage,
        space: Space,
        points: list[Point],
        trials: int,
        startup: int,
        pruner: optuna.pruners.BasePruner,
        seed: int,
        prefix: str = "",
        objectives: Sequence[str] = ("top1",),
    ) -> None:
        self.name, self.space, self.objectives = name, space, tuple(objectives)
        self.study = optuna.create_study(
            study_name=prefix + name,
            storage=storage,
            load_if_exists=True,
            directions=["maximize", *["minimize"] * (len(self.objectives) - 1)],
            pruner=pruner,
        )
        self.storage = storage
        known = self.study.get_trials(deepcopy=False)
        self._check_same(known)
        self.trials = trials + sum("retry_of" in trial.user_attrs for trial in known)
        self.study.sampler = optuna.samplers.TPESampler(
            seed=seed + len(known), n_startup_trials=startup
        )
        for point in points[len(known) : trials]:  # all of them, unless a start was cut short
            attrs = {"settings": point.settings, "source": point.source}
            self.study.enqueue_trial(point.params, user_attrs=attrs)
        self.left_over = [trial for trial in known if trial.state == TrialState.RUNNING]
        self.heard = {trial.number: set(trial.intermediate_values) for trial in self.left_over}
        self.doomed = {trial.number for trial in self.left_over if "pruned_at" in trial.user_attrs}
        self.running: dict[int, Trial] = {}

    def _check_same(self, known: list[FrozenTrial]) -> None:
        """Raise ConfigError if the study was made for other objectives, or drew from what cannot be one with the space."""
        new = "start a new sweep with warmstart.sources=[paper, SWEEP]"
        before = tuple(self.study.user_attrs.get("objectives", ("top1",)))
        if not known:
            self.study.set_user_attr("objectives", self.objectives)
        elif before != self.objectives:
            raise ConfigError(
                f"sweep.objectives must stay {', '.join(before)} but are {', '.join(self.objectives)}; {new}."
            )
        drawn = {key: where for trial in known for key, where in trial.distributions.items()}
        for key in (key for key in self.space if key in drawn):
            there, here = drawn[key], self.space.distributions[key]
            try:
                check_distribution_compatibility(there, here)
            except ValueError as error:
                raise ConfigError(
                    f"sweep.space: {key} must stay of its kind, with its choices, but was {said(there)} and is {said(here)}; {new}."
                ) from error

    def label(self, number: int) -> str:
        """Return how a trial is called in the sweep: its number, after the name of a search beside the main one."""
        return f"{number:03d}" if self.name == MAIN else f"{self.name}-{number:03d}"

    def ask(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Return number, place in the space and settings of the next trial, None if all were given out."""
        if self.left_over:
            trial = Trial(self.study, self.left_over.pop(0)._trial_id)
        elif self.given < self.trials:
            trial = self.study.ask()
        else:
            return None
        self.space.draw(trial)  # of one that was left over, what a kill left undrawn
        self.running[trial.number] = trial
        return trial.number, dict(trial.params), settings_of(trial)

    @property
    def given(self) -> int:
        """Trials that were given out or have ended."""
        states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
        return sum(state != TrialState.WAITING for state in states)

    def newest(self, number: int) -> int:
        """Return the newest epoch that an earlier driver heard of a trial, 0 if none."""
        return max(self.heard.get(number, ()), default=0)

    def stops_here(self, number: int) -> bool:
        """Whether a trial that an earlier driver left should stop where it is: that driver had no time to say so."""
        return number in self.doomed or self._should_prune(self.running[number])

    def epoch(self, number: int, epoch: int, value: float) -> bool:
        """Hear of an epoch's validation accuracy; return whether the trial should stop here."""
        trial = self.running[number]
        if epoch not in self.heard.get(number, ()):  # it goes on from a checkpoint before it
            self._report(trial, epoch, value)
        if self._should_prune(trial):
            trial.set_user_attr("pruned_at", epoch)  # asked again, the pruner would let it pass
            return True
        return False

    def _report(self, trial: Trial, epoch: int, value: float) -> None:
        if len(self.objectives) == 1:
            trial.report(value, epoch)
        else:  # where Optuna's own way refuses, since it serves early stopping alone
            self.storage.set_trial_intermediate_value(trial._trial_id, epoch, value)

    def _should_prune(self, trial: Trial) -> bool:
        return len(self.objectives) == 1 and trial.should_prune()

    def tell(
        self, number: int, state: TrialState, metrics: dict[str, Any], why: Failure | None = None
    ) -> None:
        """End a trial.

        One that did not fit into memory is told as pruned and infeasible, from which the sampler learns to keep away;
        of a failed one it learns nothing.

        Args:
            number: Of the trial.
            state: How it ended.
            metrics: Its last ones, and of a complete one what it costs, by objective.
            why: Why it failed, if it did; kept for `failures`.
        """
        trial = self.running.pop(number)
        trial.set_user_attr("val_loss", metrics.get("best_val_loss"))
        if why is not None:
            trial.set_user_attr("error", why.text)
            trial.set_user_attr("failure", why.kind)
            if why.kind == "memory":
                # a driver that was killed then may have set it
                with warnings.catch_warnings(action="ignore"):
                    trial.set_constraint("memory", 1.0)
                state = TrialState.PRUNED
        values = None
        if state == TrialState.COMPLETE:
            costs = self.objectives[1:]
            values = [metrics["best_val_top1"], *[metrics[each] for each in costs]]
        self.study.tell(trial, values, state)

    def known(self, number: int, stamp: str) -> FrozenTrial | None:
        """Return the trial that has ended with the settings of the digest `stamp`, None if this one is the first.

        A failed one does not count: it says nothing, and may be tried again.
        """
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        for trial in self.study.get_trials(deepcopy=False, states=states):
            same = trial.user_attrs.get("stamp") == stamp and trial.number != number
            if same and not trial.user_attrs.keys() & {"failure", "duplicate_of"}:
                return trial
        return None

    def answer(self, number: int, known: FrozenTrial) -> dict[str, Any]:
        """End a trial as one with the same settings has ended, and return what it would have reported last."""
        trial = self.running[number]
        trial.set_user_attr("duplicate_of", known.number)
        for epoch, value in known.intermediate_values.items():
            if epoch not in self.heard.get(number, ()):
                self._report(trial, epoch, value)
        complete = known.state == TrialState.COMPLETE
        heard = known.intermediate_values.values()
        metrics = {
            "duplicate_of": known.number,
            "epoch": max(known.intermediate_values, default=0),
            "best_val_top1": known.values[0] if complete else max(heard, default=None),
            "best_val_loss": known.user_attrs["val_loss"],
            **dict(zip(self.objectives[1:], known.values[1:] if complete else (), strict=False)),
        }
        self.tell(number, known.state, metrics)
        return metrics

    @property
    def over(self) -> bool:
        """Whether every trial has ended."""
        return self.ended >= self.trials and not self.running

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return sum(trial.state in ENDED for trial in self.study.get_trials(deepcopy=False))

    def ranked(self) -> list[FrozenTrial]:
        """Return the complete trials, highest validation accuracy first, ties by lower loss."""
        complete = self.study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        return sorted(complete, key=lambda t: (-t.values[0], t.user_attrs["val_loss"], t.number))

    def front(self) -> list[FrozenTrial]:
        """Return the trials that no other one betters in every objective, each setting once, most accurate first."""
        best = {trial.number for trial in self.study.best_trials}
        return [t for t in self.distinct() if t.number in best]

    @property
    def duplicates(self) -> int:
        """Number of trials that were answered from another one's result."""
        trials = self.study.get_trials(deepcopy=False, states=ENDED)
        return sum("duplicate_of" in trial.user_attrs for trial in trials)

    def distinct(self) -> list[FrozenTrial]:
        """Return `ranked` without those that were answered from another one's result."""
        return [trial for trial in self.ranked() if "duplicate_of" not in trial.user_attrs]

    def best(self) -> FrozenTrial | None:
        """Return the first of `ranked`, None if no trial is complete."""
        return next(iter(self.ranked()), None)

    def failures(self) -> dict[int, Failure]:
        """Return why trials failed, by number; those that were tried again are no failures any more."""
        trials = self.study.get_trials(deepcopy=False)
        again = {trial.user_attrs.get("retry_of") for trial in trials}
        return {
            trial.number: why
            for trial in trials
            if (why := failure_of(trial)) is not None and trial.number not in again
        }

    def failed(self, number: int) -> Failure | None:
        """Return why a trial failed, of which a driver was killed before it could end it; None if it did not."""
        return failure_of(self.running[number])

    def stale(self, number: int, stamp: str) -> bool:
        """Whether a trial has run with other settings than those of the digest `stamp`, which it is to run with now.

        If so it is put on the list again, as a new one; the caller has to end it.
        """
        trial = self.running[number]
        before = trial.user_attrs.get("stamp")
        if before is None:
            trial.set_user_attr("stamp", stamp)
        if before in (None, stamp):
            return False
        self._again(
            trial
        )  # before it is ended: a kill in between makes one trial too many, and none is lost
        return True

    def _again(self, trial: FrozenTrial | Trial) -> None:
        attrs = {"settings": settings_of(trial), "retry_of": trial.number}
        self.study.enqueue_trial(trial.params, user_attrs=attrs)
        self.trials += 1

    def retry(self, kinds: Collection[str]) -> int:
        """Put failed trials of these kinds on the list again, as new ones; return how many."""
        trials = self.study.get_trials(deepcopy=False)
        failed = [number for number, why in self.failures().items() if why.kind in kinds]
        for number in failed:
            self._again(trials[number])
        return len(failed)

    def leading(self, count: int) -> list[int]:
        """Return the numbers of the best trials, complete ones first, then by the best accuracy heard of."""
        stopped = [
            (-max(trial.intermediate_values.values()), trial.number)
            for trial in self.study.get_trials(deepcopy=False, states=[TrialState.PRUNED])
            if trial.intermediate_values
            and not trial.user_attrs.keys() & {"failure", "duplicate_of"}
        ]
        numbers = [trial.number for trial in self.distinct()]
        return (numbers + [number for _, number in sorted(stopped)])[:count]

    def states(self) -> dict[str, int]:
        """Return how many trials are in which state."""
        names = [
            "INFEASIBLE" if trial.user_attrs.get("failure") == "memory" else trial.state.name
            for trial in self.study.get_trials(deepcopy=False)
        ]
        return {name: names.count(name) for name in sorted(set(names))}


def failure_of(trial: FrozenTrial | Trial) -> Failure | None:
    """Return why a trial failed, None if it did not."""
    told = trial.user_attrs
    return Failure(told["failure"], told["error"]) if "failure" in told else None


def settings_of(trial: FrozenTrial | Trial) -> dict[str, Any]:
    """Return what a trial ran, in dotted keys."""
    return dict(trial.user_attrs.get("settings", trial.params))
