"""What a sweep costs: runs, time and disk, reckoned from what a few steps cost here."""

import os
import random
import shutil
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from richkd import estimate
from richkd.bench import of_method
from richkd.config import Config
from richkd.distill import Task, open_task
from richkd.estimate import Pace
from richkd.files import nearest
from richkd.progress import Progress
from tune.scheduler import pruner
from tune.settings import Sweep as Wanted
from tune.settings import fit
from tune.sweep import Sweep, state_of
from tune.warmstart import printed

# seconds, as measured: before the first run and after the last one; around each run; around one of several workers
STARTING, AROUND, AROUND_WORKERS = 12.0, 1.0, 25.0
MEASURE = 6.0  # seconds of steps, in all
SIMULATED = 1000  # trials, at least, of which early stopping is simulated
HEADROOM = 1.5  # of what is kept: a checkpoint that is replaced lies beside the new one
STATE, STATE_RUN = 2**20, 2**15  # bytes of a sweep's own files, and what a run adds to them


def measured(
    sweep: Sweep,
    task: Task,
    slots: int,
    each: dict[str, float],
    slower: float,
    progress: Progress,
) -> dict[str, Any]:
    """Return runs, time and disk of a sweep, from some steps that are taken here.

    Args:
        sweep: The sweep.
        task: Its data.
        slots: Runs side by side.
        each: What a worker takes of the cluster.
        slower: By how much a step takes longer beside the other runs of its GPU.
        progress: Told how far the measurement is.
    """
    workers, runs = sweep.settings.resources.workers, runs_of(sweep, slots)
    disk = nearest(next(iter(folders_of(sweep).values())))  # where checkpoints will lie
    place = disk if os.access(disk, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".richkd-plan-", dir=place) as folder:
        lacks = lacks_of(sweep, task, runs, Path(folder))
        paces = {
            name: {kind: replace(pace, step=slower * pace.step) for kind, pace in one.items()}
            for name, one in paces_of(sweep, task, Path(folder), progress).items()
        }
    around = AROUND if workers == 1 else AROUND_WORKERS
    seconds = seconds_of(runs, paces, lacks, slots, around)
    held = {what: workers * share for what, share in each.items()}  # of the cluster, by a run
    return {
        "runs": asdict(runs) | {"total": runs.total},
        "side_by_side": slots,
        "each": {"workers": workers} | each,
        "device": task.device.type,
        "pace": {
            name: {kind: asdict(pace) | {"epoch": pace.epoch} for kind, pace in one.items()}
            for name, one in paces.items()
        },
        "lacks": asdict(lacks),
        "seconds": seconds,
        "hours": {what: count * seconds["work"] / 3600 for what, count in held.items()},
        "budget": within(sweep.settings.sweep, runs, seconds, slots, held.get("GPU", 0)),
        "disk": disk_of(sweep, runs, paces, lacks),
    }


def side_by_side(sweep: Sweep, machines: list[dict[str, float]]) -> tuple[int, dict[str, float]]:
    """Return how many runs go on at once, and what each of their workers takes.

    Raises:
        ConfigError: If not even one fits.
    """
    resources = sweep.settings.resources
    slots, each = fit(resources, machines, gpu=sweep.base.device != "cpu")
    return min(slots, resources.max_concurrent or slots), each


def expected_epochs(wanted: Wanted, trials: int, epochs: int, slots: int) -> float:
    """Return how many of its `epochs` a trial gets on average, if which trial is better is chance.

    Optuna's own pruner decides, on studies in memory whose trials each have a random accuracy of their own; `slots`
    of them advance side by side.
    """
    from optuna import create_study
    from optuna.pruners import NopPruner

    rule = pruner(wanted)
    if isinstance(rule, NopPruner) or epochs <= wanted.min_epochs:
        return float(epochs)
    trials = min(trials, SIMULATED)  # of more the share hardly changes
    rng, spent, count = random.Random(0), 0, 0
    while count < SIMULATED:
        study = create_study(direction="maximize", pruner=rule)
        waiting = [[study.ask(), rng.random(), 0] for _ in range(trials)]
        running: list[list] = []
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(waiting.pop(0))
            for each in list(running):
                trial, value, epoch = each
                each[2] = epoch = epoch + 1
                spent += 1
                trial.report(value, epoch)
                if epoch == epochs:
                    study.tell(trial, value)
                    running.remove(each)
                elif trial.should_prune():
                    running.remove(each)
        count += trials
    return spent / count


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """What a sweep runs.

    Attributes:
        trials: Of each search, by method.
        epochs: Of a run that nothing stops.
        expected: Epochs that a trial of each search gets on average.
        seeds: That a trial runs.
        students: Method of each that is refitted, by name.
        refits: Seeds of each of them.
    """

    trials: dict[str, int]
    epochs: int
    expected: dict[str, float]
    seeds: int
    students: dict[str, str]
    refits: int

    @property
    def total(self) -> int:
        """Number of run folders."""
        return sum(self.trials.values()) * self.seeds + len(self.students) * self.refits


def runs_of(sweep: Sweep, slots: int) -> Runs:
    """Return what a sweep runs, where `slots` runs go on at once; searched epochs count as the most there can be."""
    wanted = sweep.settings.sweep
    longest = max(config.train.epochs for config in sweep.configs())
    epochs = int(sweep.space.high("train.epochs", longest))
    trials = {}
    if not sweep.grid:
        trials = {sweep.base.method.name: wanted.trials}
        trials["kd"] = wanted.trials if sweep.space.of_baseline() else 1
    return Runs(
        trials=trials,
        epochs=epochs,
        expected={
            name: expected_epochs(wanted, count, epochs, slots) for name, count in trials.items()
        },
        seeds=wanted.seeds_per_trial,
        students={name: student.method for name, student in sweep.students.items()},
        refits=sweep.settings.refit.seeds,
    )


def paces_of(
    sweep: Sweep, task: Task, folder: Path, progress: Progress
) -> dict[str, dict[str, Pace]]:
    """Return what a run costs here, `taught` and from `labels`, by student; of several the smallest and the largest."""
    every = sweep.configs()
    taught = [config for config in every if config.method.name != "ce"]
    configs = {config.student.name: config for config in taught or every}
    if names := sweep.space.choices("student.name"):
        base = printed(sweep.base.method.name)
        configs = {name: sweep.resolve(base | {"student.name": name}) for name in names}
    sizes = {name: estimate.size(config, task) for name, config in configs.items()}
    chosen = dict.fromkeys((min(sizes, key=sizes.get), max(sizes, key=sizes.get)))
    resources = sweep.settings.resources
    given = {"workers": resources.workers, "each": resources.cpus_per_worker}
    given["seconds"] = MEASURE / (2 * len(chosen))
    found = {}
    for k, name in enumerate(chosen):
        progress("measurement", k, len(chosen))
        config, place = configs[name], folder / str(k)
        teacher = estimate.stand_in(config, task)
        labels = of_method(config, "ce")
        found[name] = {
            "taught": estimate.pace(config, task, teacher, place / "taught", **given),
            "labels": estimate.pace(labels, task, None, place / "labels", **given),
        }
    progress("measurement", 1, 1)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Lacks:
    """What the cache has not got: what teachers say of images, and trained teachers by seed, before the runs and in them."""

    outputs: list[estimate.Lack]
    first: list[int]
    later: list[int]
    teacher: float  # seconds to train one
    crops: estimate.Lack | None  # what runs make of them as they go
    bytes: int  # of all of it


def lacks_of(sweep: Sweep, task: Task, runs: Runs, folder: Path) -> Lacks:
    """Return what has to be made, beside the students, and what that costs here; of a grid for all that its cells ask."""
    if not sweep.grid:
        return _lacks_of(sweep.typical, task, runs, folder)
    asked = {(each.data, each.teacher): each for each in sweep.configs()}
    found = []
    for config in asked.values():
        other = task if config.data == sweep.typical.data else open_task(config)
        found.append(_lacks_of(config, other, runs, folder))
    crops = [each.crops for each in found if each.crops is not None]
    return Lacks(
        outputs=list({lack.what: lack for each in found for lack in each.outputs}.values()),
        first=[],  # the runs train them
        later=[seed for each in found for seed in each.first + each.later],
        teacher=max(each.teacher for each in found),
        crops=replace(
            crops[0], bytes=sum(c.bytes for c in crops), seconds=sum(c.seconds for c in crops)
        )
        if crops
        else None,
        bytes=sum(each.bytes for each in found),
    )


def _lacks_of(config: Config, task: Task, runs: Runs, folder: Path) -> Lacks:
    seeds = {*range(config.seed, config.seed + runs.seeds), *range(runs.refits)}
    # runs of one seed meet the same crops, and ask a teacher that is trained here for theirs alone
    asked = dict.fromkeys(seeds, runs.epochs)
    if config.teacher.brought:
        asked = {config.seed: sum(asked.values())}
    first = estimate.untrained(config, task, [config.seed])
    later = estimate.untrained(config, task, sorted(seeds - {config.seed}))
    outputs = estimate.unseen(config, task) + estimate.unjudged(config, task)
    training, kept = 0.0, 0
    if first or later:
        pace = estimate.teacher_pace(config, task, folder / "teacher", seconds=MEASURE / 6)
        training, kept = pace.run(config.teacher.epochs), pace.kept * len(first + later)
    crops = estimate.untold(config, task, asked)
    return Lacks(
        outputs=outputs,
        crops=crops,
        first=first,
        later=later,
        teacher=training,
        bytes=kept + sum(lack.bytes for lack in outputs) + (crops.bytes if crops else 0),
    )


def seconds_of(
    runs: Runs, paces: dict[str, dict[str, Pace]], lacks: Lacks, slots: int, around: float
) -> dict[str, Any]:
    """Return where the time goes, in seconds; what a run costs is a mean over the students.

    Args:
        runs: What is run.
        paces: What that costs.
        lacks: What is made first, or by the first run that needs it.
        slots: Runs side by side.
        around: What Ray takes around each run.
    """

    def run(kind: str, epochs: float, *, tested: bool = False) -> float:
        return statistics.fmean(one[kind].run(epochs, tested=tested) for one in paces.values())

    trial = {
        name: around + runs.seeds * run("taught", epochs) for name, epochs in runs.expected.items()
    }
    refit = {
        name: around + run("labels" if method == "ce" else "taught", runs.epochs, tested=True)
        for name, method in runs.students.items()
    }
    work = sum(runs.trials[name] * trial[name] for name in trial)
    work += runs.refits * sum(refit.values()) + len(lacks.later) * lacks.teacher
    work += lacks.crops.seconds if lacks.crops else 0
    # no run is faster for the others: at least a trial that nothing stops, and the refit that waits for it
    longest = max(refit.values())
    if runs.trials:
        longest = around + runs.seeds * run("taught", runs.epochs) + refit["richkd"]
    prepare = sum(lack.seconds for lack in lacks.outputs) + len(lacks.first) * lacks.teacher
    side_by_side = max(work / slots, longest)
    return {
        "trial": trial,
        "refit": refit,
        "teacher": lacks.teacher,
        "start": STARTING,
        "prepare": prepare,
        "work": work,
        "runs": side_by_side,
        "wall": STARTING + prepare + side_by_side,
    }


def within(
    wanted: Wanted, runs: Runs, seconds: dict[str, Any], slots: int, gpus: float
) -> dict[str, Any] | None:
    """Return whether a sweep fits into its budgets, and how many of its trials do; None without a budget.

    Args:
        wanted: Has the budgets.
        runs: What is run.
        seconds: As `seconds_of` returns it.
        slots: Runs side by side.
        gpus: GPUs that a run holds.
    """
    budgets = []  # seconds of runs: what there is of them, and what is needed
    if wanted.hours is not None:
        left = 3600 * wanted.hours - seconds["start"] - seconds["prepare"]
        budgets.append((left * slots, seconds["runs"] * slots))
    if wanted.gpu_hours is not None and gpus:
        budgets.append((3600 * wanted.gpu_hours / gpus, seconds["work"]))
    if not budgets:
        return None
    left, trials = min(there for there, _ in budgets), 0
    for name, count in runs.trials.items():
        fit = max(0, min(count, int(left / seconds["trial"][name])))
        trials, left = trials + fit, left - fit * seconds["trial"][name]
    return {"fits": all(there >= needed for there, needed in budgets), "trials": trials}


def disk_of(
    sweep: Sweep, runs: Runs, paces: dict[str, dict[str, Pace]], lacks: Lacks
) -> list[dict[str, Any]]:
    """Return what is needed and what is free where a sweep writes, in bytes."""
    kept = max(one["taught"].kept for one in paces.values())
    needed = {
        "storage": HEADROOM * runs.total * kept,
        "sweep.state": STATE + STATE_RUN * runs.total,
        "cache": HEADROOM * lacks.bytes,
    }
    if sweep.store is not None:  # from which refits are brought
        needed["sweep.state"] += HEADROOM * len(runs.students) * runs.refits * kept
    return [
        {
            "field": field,
            "path": str(path),
            "needed": round(needed[field]),
            "free": shutil.disk_usage(nearest(path)).free,
            "disk": nearest(path).stat().st_dev,
        }
        for field, path in folders_of(sweep).items()
    ]


def cramped(disk: list[dict[str, Any]]) -> list[str]:
    """Return which disks are too small for what is to lie on them, as `disk_of` returns it, a line each."""
    told = []
    for each in {one["disk"]: one for one in disk}.values():
        mine = [one for one in disk if one["disk"] == each["disk"] and one["needed"]]
        needed = sum(one["needed"] for one in mine)
        if needed > each["free"]:
            fields = " and ".join(one["field"] for one in mine)
            told.append(
                f"{fields} must have {in_bytes(needed)} free but {mine[0]['path']} has {in_bytes(each['free'])}; free some "
                "space, choose another disk, or ask for fewer trials or seeds."
            )
    return told


def folders_of(sweep: Sweep) -> dict[str, Path]:
    """Return the folders in which a sweep writes, by key; that of checkpoints comes first."""
    found = {"sweep.state": state_of(sweep.settings, sweep.base), "cache": Path(sweep.cache)}
    if sweep.store is None:
        found = {"storage": Path(sweep.base.storage).absolute()} | found
    return found


def in_bytes(count: float) -> str:
    """Return a number of bytes for a person."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
