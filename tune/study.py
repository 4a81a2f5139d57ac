"""One Optuna study as the memory of one search: points asked for, epochs heard of, results told.

The study is the truth of a sweep: it lies in `study.db`, and a sweep that is resumed asks it what is
finished (never asked again), what was running (given out again under its number) and what is left.
"""

import logging
import math
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from tune.space import Space
from tune.warmstart import Point

logging.getLogger("optuna").setLevel(logging.ERROR)
MAIN = "richkd"  # the search of the method itself
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Search:
    """A study of `trials` trials in all, over `space`, the `points` first.

    Args:
        name: Study name, which is also the label of its trials.
        storage: Database of the sweep's studies.
        space: What is searched.
        points: Trials to begin with.
        trials: Trials in all, pruned and failed ones counted.
        startup: Random trials before the sampler learns.
        pruner: Early stopping.
        seed: Of the sampler; a resumed search draws anew, not the same points again.
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
    ) -> None:
        self.name, self.space, self.trials = name, space, trials
        self.study = optuna.create_study(
            study_name=name,
            storage=storage,
            load_if_exists=True,
            direction="maximize",
            pruner=pruner,
        )
        known = self.study.get_trials(deepcopy=False)
        self.study.sampler = optuna.samplers.TPESampler(
            seed=seed + len(known), n_startup_trials=startup
        )
        for point in points[len(known) : trials]:  # all of them, unless a start was cut short
            self.study.enqueue_trial(point.params, user_attrs={"settings": point.settings})
        self.left_over = [trial for trial in known if trial.state == TrialState.RUNNING]
        self.heard = {trial.number: set(trial.intermediate_values) for trial in self.left_over}
        self.running: dict[int, Trial] = {}

    def label(self, number: int) -> str:
        """Return how a trial is called in the sweep: its number, after the name of a search beside the main one."""
        return f"{number:03d}" if self.name == MAIN else f"{self.name}-{number:03d}"

    def ask(self) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """Return number, place in the space and settings of the next trial, None if all were given out."""
        if self.left_over:
            trial = Trial(self.study, self.left_over.pop(0)._trial_id)
            for key, distribution in self.space.items():
                trial._suggest(
                    key, distribution
                )  # gives what it has; a kill can leave a few undrawn
        elif self.given < self.trials:
            trial = self.study.ask(self.space)
        else:
            return None
        self.running[trial.number] = trial
        return trial.number, dict(trial.params), settings_of(trial)

    @property
    def given(self) -> int:
        """Trials that were given out or have ended."""
        states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
        return sum(state != TrialState.WAITING for state in states)

    def epoch(self, number: int, epoch: int, value: float) -> bool:
        """Hear of an epoch's validation accuracy; return whether the trial should stop here."""
        trial = self.running[number]
        if epoch not in self.heard.get(number, ()):  # it goes on from a checkpoint before it
            trial.report(value, epoch)
        return trial.should_prune()

    def tell(
        self, number: int, state: TrialState, metrics: dict[str, Any], error: str | None = None
    ) -> None:
        """End a trial. A value that is not finite makes it a failed one.

        Args:
            number: Of the trial.
            state: How it ended.
            metrics: Its last ones.
            error: Why it failed, if it did; kept for `failures`.
        """
        trial = self.running.pop(number)
        value = metrics.get("best_val_top1", math.nan)
        if state == TrialState.COMPLETE and not math.isfinite(value):
            state, error = TrialState.FAIL, f"best_val_top1 is {value}"
        trial.set_user_attr("val_loss", metrics.get("best_val_loss"))
        if error is not None:
            trial.set_user_attr("error", error)
        self.study.tell(trial, value if state == TrialState.COMPLETE else None, state)

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
        return sorted(complete, key=lambda t: (-t.value, t.user_attrs["val_loss"], t.number))

    def best(self) -> FrozenTrial | None:
        """Return the first of `ranked`, None if no trial is complete."""
        return next(iter(self.ranked()), None)

    def failures(self) -> dict[int, str]:
        """Return why trials failed, by number."""
        failed = self.study.get_trials(deepcopy=False, states=[TrialState.FAIL])
        return {trial.number: trial.user_attrs.get("error", "unknown") for trial in failed}

    def leading(self, count: int) -> list[int]:
        """Return the numbers of the best trials, complete ones first, then by the last accuracy heard of."""
        stopped = [
            (-trial.intermediate_values[max(trial.intermediate_values)], trial.number)
            for trial in self.study.get_trials(deepcopy=False, states=[TrialState.PRUNED])
            if trial.intermediate_values
        ]
        numbers = [trial.number for trial in self.ranked()]
        return (numbers + [number for _, number in sorted(stopped)])[:count]

    def states(self) -> dict[str, int]:
        """Return how many trials ended in which state."""
        names = [trial.state.name for trial in self.study.get_trials(deepcopy=False)]
        return {name: names.count(name) for name in sorted(set(names))}


def settings_of(trial: FrozenTrial | Trial) -> dict[str, Any]:
    """Return what a trial ran, in dotted keys."""
    return dict(trial.user_attrs.get("settings", trial.params))
