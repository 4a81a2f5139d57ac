"""What a sweep found so far, as plain rows read from its own files: for pictures, the report and comparisons.

Nobody else is asked: trials come from the study, refits from their run folders, whether the sweep has ended or not.
"""

import contextlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState, create_trial

from richkd.config import Config
from richkd.files import read_record
from richkd.layers import build, digest, read_layer
from richkd.record import seed_folders
from tune.agenda import STATES
from tune.budget import spent
from tune.driver import busy
from tune.settings import Settings
from tune.students import Student
from tune.study import MAIN, Failure, Search, settings_of
from tune.summary import read_refits, summarise, winner
from tune.sweep import DIAGNOSIS, Sweep, asked_of, open_searches, trials_of
from tune.warmstart import THEORY, is_own, plain

ENVIRONMENT = "environment.json"
EVALUATION = "evaluation"  # folder, and file in it, of what `tune evaluate` found of a refit
TOP1 = "top1"  # the objective that every sweep has
FEW = 10  # trials below which nothing can be said about importance
LEAST = 5  # trials that count as the best ones, where importance is asked for: PED-ANOVA's advice

State = Literal["finished", "pruned", "failed", "infeasible", "running"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial of a search.

    Attributes:
        label: How it is called in the sweep.
        number: In its study.
        state: How it ended.
        params: Where it lies in the search space, by dotted key; without what its branch of the space has not.
        space: From what each of its parameters was drawn.
        settings: What it ran, in dotted keys; of a setting as printed, with T of the fused logits.
        values: Of a finished one, by the sweep's objectives; top-1 is in percent of the validation rows.
        curve: Validation top-1 by epoch, %; of several seeds their mean.
        seeds: Validation top-1 of each of several seeds at its own best epoch, whose mean is the trial's value, %.
        loss: Validation loss at its best epoch, which decides between trials of the same accuracy.
        front: Whether no other trial betters it in every objective; of several objectives, in the main search, each setting once.
        duplicate_of: Number of the trial whose result it was given, since the settings are the same.
        source: Where one of the first trials is from, such as `paper`, or a trial of another sweep.
        seconds: It took.
    """

    label: str
    number: int
    state: State
    params: dict[str, Any]
    space: dict[str, BaseDistribution] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    values: tuple[float, ...] = ()
    curve: dict[int, float] = field(default_factory=dict)
    seeds: tuple[float, ...] = ()
    loss: float | None = None
    front: bool = False
    duplicate_of: int | None = None
    source: str | None = None
    seconds: float | None = None

    @property
    def top1(self) -> float | None:
        """Validation top-1 of its best epoch so far, %."""
        return self.values[0] if self.values else max(self.curve.values(), default=None)

    @property
    def epochs(self) -> int:
        """The newest epoch heard of, 0 if none."""
        return max(self.curve, default=0)

    def shown(self) -> dict[str, Any]:
        """Return its searched parameters as it ran them."""
        return {key: self.settings.get(key, value) for key, value in self.params.items()}

    def told(self) -> dict[str, Any]:
        """Return `shown`, and what T is relative to where that is not what the sweep's other trials have."""
        own = {key: value for key, value in self.settings.items() if key == "loss.temperature_of"}
        return self.shown() | (own if self.settings.get("fusion.alpha", 1) != 1 else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What a sweep was asked for, and what it has found.

    Attributes:
        folder: Of the sweep; its name is the sweep's.
        state: `finished`, `running` or `stopped`.
        base: Config beneath all runs.
        settings: Of the sweep.
        objectives: What trials are judged by, top-1 first.
        students: That are compared, by name.
        asked: Trials of each search.
        trials: Of the main search, and of plain distillation's.
        refits: Metrics of the finished ones, by student and seed.
        curves: Validation top-1 by epoch of all refits, by student and seed, %.
        runs: `run.json` of the refits that have begun, by student and seed.
        configs: What the refits of a student ran, but for their seed.
        summary: As `summary.summarise` returns it.
        best: The best trial of the main search.
        stale: Whether the refits ran a setting that was the best one, before there were more trials.
        seed: Of the best refit of its setting, None before there is one.
        config: Of that refit, or that the best trial ran.
        failures: Why runs failed, by job.
        diagnosis: What was told of the teachers before the search, as `richkd.diagnose` returns it; None if it was not asked.
        evaluations: What `tune evaluate` found of a refit of each student, by name, as far as it was asked.
        environment: Code, packages and machine, as `environment.environment` returns them; empty of an older sweep.
        seconds: Of wall time over all drivers.
        gpu_seconds: Of GPUs held.
    """

    folder: Path
    state: str
    base: Config
    settings: Settings
    objectives: tuple[str, ...]
    students: dict[str, Student]
    asked: dict[str, int]
    trials: dict[str, list[Trial]]
    refits: dict[str, dict[int, dict[str, Any]]]
    curves: dict[str, dict[int, dict[int, float]]]
    runs: dict[str, dict[int, dict[str, Any]]]
    configs: dict[str, Config]
    summary: dict[str, Any]
    best: Trial | None
    stale: bool
    seed: int | None
    config: Config | None
    failures: dict[str, Failure]
    diagnosis: dict[str, Any] | None
    evaluations: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    seconds: float
    gpu_seconds: float

    @property
    def name(self) -> str:
        """What the sweep is called."""
        return self.folder.name

    @property
    def grid(self) -> bool:
        """Whether it is a grid, which searches nothing and has no best."""
        return bool(self.settings.sweep.grid.rows)

    @property
    def main(self) -> list[Trial]:
        """Trials of the method's own search."""
        return self.trials.get(MAIN, [])

    @property
    def origin(self) -> str | None:
        """What the best setting is, if the search did not find it but was given it."""
        if self.best is None:
            return None
        if self.best.source == THEORY:
            return "the theory's own start; nothing that was tried is better"
        return origin(self.base.method.name, self.best.settings)

    @property
    def temperature_of(self) -> str:
        """To which logits the searched temperature is relative: `task` or `fused`."""
        of = self.settings.sweep.settings.get("loss.temperature_of")
        return of or self.base.loss.temperature_of

    @property
    def front(self) -> list[Trial]:
        """Trials of the main search that no other one betters in every objective, most accurate first."""
        return [trial for trial in ranked(self.main) if trial.front]

    @property
    def space(self) -> dict[str, BaseDistribution]:
        """What the main search drew from, as far as its trials have drawn it; of a range that changed the newest."""
        return {key: where for trial in self.main for key, where in trial.space.items()}


def gather(
    sweep: Sweep, searches: Sequence[Search], *, state: str, failures: dict[str, Failure]
) -> Findings:
    """Read what a sweep has found.

    Args:
        sweep: What was asked for.
        searches: Its searches, the main one first; none if none has begun.
        state: `finished`, `running` or `stopped`.
        failures: Why runs failed, by job.

    Raises:
        CorruptError: If a record cannot be read.
    """
    wanted = sweep.settings.sweep
    labels = {name: student.label for name, student in sweep.students.items()}
    refits, runs, curves = read_refits(sweep.runs / "refits", labels), {}, {}
    configs = {}
    for name, label in labels.items():
        for path in sorted((sweep.runs / "refits").glob(f"{label}-seed*/run.json")):
            seed = int(path.parent.name.removeprefix(f"{label}-seed"))
            runs.setdefault(name, {})[seed] = read_record(path)
            curves.setdefault(name, {})[seed] = curve_of(path.parent)
            if name not in configs:
                configs[name] = build(read_layer(path.with_name("config.yaml")))
    best, seed = searches[0].best() if searches else None, winner(refits.get(MAIN, {}))
    config, stale = None, False
    if best is not None:
        settings = wanted.settings | settings_of(best)
        settings |= {} if seed is None else {"seed": seed}
        config = sweep.resolve(settings, sweep.base.method.name)  # as the refits are
        stale = seed is not None and digest(config) != runs[MAIN][seed]["digest"]
        seed = None if stale else seed
    front: set[int] = set()
    if searches and len(wanted.objectives) > 1:
        front = {trial.number for trial in searches[0].front()}
    found = {
        search.name: [
            read_trial(
                trial,
                search.label(trial.number),
                sweep.runs,
                wanted.seeds_per_trial,
                front=search.name == MAIN and trial.number in front,
            )
            for trial in search.study.get_trials(deepcopy=False)
            if trial.state != TrialState.WAITING
        ]
        for search in searches
    }
    summary = summarise(refits, sweep.students)
    return Findings(
        folder=sweep.folder,
        state=state,
        base=sweep.base,
        settings=sweep.settings,
        objectives=wanted.objectives,
        students=sweep.students,
        asked={search.name: search.trials for search in searches},
        trials=found,
        refits=refits,
        curves=curves,
        runs=runs,
        configs=configs,
        summary=summary if sweep.grid else _with_students(summary, configs),
        best=next((t for t in found.get(MAIN, []) if best and t.number == best.number), None),
        stale=stale,
        seed=seed,
        config=config,
        failures=failures,
        diagnosis=read_record(before) if (before := sweep.folder / DIAGNOSIS).exists() else None,
        evaluations=evaluations(sweep, labels),
        environment=read_record(told) if (told := sweep.folder / ENVIRONMENT).exists() else {},
        **spent(sweep.folder / "spent.json"),
    )


def evaluations(sweep: Sweep, labels: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the newest evaluation of each student that has one, by name."""
    found = {}
    for name, label in labels.items():
        pattern = f"{label}-seed*/{EVALUATION}/{EVALUATION}.json"
        files = sorted((sweep.runs / "refits").glob(pattern), key=lambda file: file.stat().st_mtime)
        if files:
            found[name] = read_record(files[-1], "test", "calibration", "agreement", "bins")
    return found


def _with_students(summary: dict[str, Any], configs: dict[str, Config]) -> dict[str, Any]:
    """Return a summary that names the students where methods were refitted with different ones."""
    names = {method: config.student.name for method, config in configs.items()}
    if len(set(names.values())) > 1:
        for method in names.keys() & summary.keys():
            summary[method]["student"] = names[method]
    return summary


def found_in(folder: Path) -> Findings:
    """Return what a sweep has found so far, whether it is finished, under way or stopped.

    Raises:
        CorruptError: If a record or the study cannot be read.
    """
    asked, layers = asked_of(folder)
    sweep = Sweep(folder, layers)
    wanted, searches, failures = sweep.settings.sweep, [], {}
    if (folder / "study.db").exists() or wanted.study is not None:
        searches = open_searches(sweep, trials_of(sweep, asked))
    for search in searches:
        failures |= {f"trial-{search.label(n)}": why for n, why in search.failures().items()}
    state = "running" if busy(folder) else "stopped"
    if state == "stopped" and (folder / "summary.json").exists():
        state = "finished"
        recorded = read_record(folder / "summary.json")  # of refits, too
        kinds = recorded.get("failure_kinds", {})
        failures = {
            job: Failure(kinds.get(job, "error"), text)
            for job, text in recorded.get("failures", {}).items()
        }
    return gather(sweep, searches, state=state, failures=failures)


def read_trial(
    trial: FrozenTrial, label: str, runs: Path, seeds: int, *, front: bool = False
) -> Trial:
    """Return a trial of a study as a plain row; its seeds are read from its run folders, where those lie here."""
    state = STATES.get(trial.state, "running")
    if trial.user_attrs.get("failure") == "memory":
        state = "infeasible"
    each = [curve_of(folder) for folder in seed_folders(runs / "trials" / label, seeds)]
    return Trial(
        label=label,
        number=trial.number,
        state=state,
        params=dict(trial.params),
        space=dict(trial.distributions),
        settings=settings_of(trial),
        values=tuple(trial.values) if state == "finished" else (),
        curve=dict(sorted(trial.intermediate_values.items())),
        seeds=tuple(max(curve.values()) for curve in each) if seeds > 1 and all(each) else (),
        loss=trial.user_attrs.get("val_loss"),
        front=front,
        duplicate_of=trial.user_attrs.get("duplicate_of"),
        source=trial.user_attrs.get("source"),
        seconds=trial.duration.total_seconds() if trial.duration else None,
    )


def curve_of(folder: Path) -> dict[int, float]:
    """Return validation top-1 by epoch of a run, %: up to a line that is torn, none if there is no such file."""
    found: dict[int, float] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        for line in (folder / "metrics.jsonl").read_bytes().splitlines():
            row = json.loads(line)
            found[int(row["epoch"])] = float(row["val/top1"])
    return found


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that have a validation accuracy: finished ones first, then the others by their best epoch.

    Ties go to the lower loss, as where the best trial is chosen.
    """
    return sorted(
        (trial for trial in trials if trial.top1 is not None),
        key=lambda trial: (
            trial.state != "finished",
            -trial.top1,
            math.inf if trial.loss is None else trial.loss,
            trial.number,
        ),
    )


def comparable(trials: Sequence[Trial]) -> tuple[int | None, list[tuple[Trial, float]]]:
    """Return trials with what can be compared between them, since those stopped early have not been trained as long.

    Returns:
        An epoch that all have reached, None where none was stopped early; and each trial with its validation top-1
        there, or of its best epoch. A result that was given twice counts once.
    """
    ended = [t for t in trials if t.state in ("finished", "pruned") and t.duplicate_of is None]
    if all(trial.state == "finished" for trial in ended):
        return None, [(trial, trial.values[0]) for trial in ended]
    ended = [trial for trial in ended if trial.curve]
    epoch = min((trial.epochs for trial in ended), default=0)
    return epoch, [(trial, trial.curve[epoch]) for trial in ended if epoch in trial.curve]


def importance(values: Sequence[tuple[Trial, float]]) -> dict[str, float] | None:
    """Return each parameter's share in what makes the best of these trials the best, by Optuna's PED-ANOVA.

    Args:
        values: Trials with what they are judged by; some may lack a parameter, as in a branch of the space.

    Returns:
        Shares that sum to 1, the highest first; None of fewer than `FEW` trials, or where nothing differs.
    """
    if len(values) < FEW or len({value for _, value in values}) == 1:
        return None
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            create_trial(params=trial.params, distributions=trial.space, value=value)
            for trial, value in values
        ]
    )
    evaluator = PedAnovaImportanceEvaluator(target_quantile=max(0.1, LEAST / len(values)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of branches that few trials took
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def origin(method: str, settings: dict[str, Any]) -> str | None:
    """Return what a best setting is, if the search did not find it but was given it."""
    if is_own(method, settings):
        return "the paper's own setting; nothing that was tried is better"
    if plain().items() <= settings.items():
        return "plain distillation; nothing that was tried is better"
    return None
