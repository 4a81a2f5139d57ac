"""What a sweep would take, before anything starts: mistakes, runs, time, disk, and whether all that it needs answers.

    python -m tune plan my.yaml sweep.trials=50

Nothing stays behind but what the cache keeps of what was looked at.
"""

import contextlib
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from richkd import distill, estimate
from richkd.bench import of_method
from richkd.command import Stop
from richkd.config import Config, Layers, build, mistakes, read
from richkd.distill import Task
from richkd.errors import ConfigError, Interrupted, RichkdError
from richkd.estimate import Pace
from richkd.files import NO_SPACE, check_writable
from richkd.progress import Progress, stoppable
from tune.display import Display
from tune.environment import PROJECT
from tune.places import mounts, unsafe
from tune.scheduler import pruner
from tune.settings import Settings
from tune.settings import Sweep as Wanted
from tune.space import of_baseline
from tune.summary import STUDENTS
from tune.sweep import NAMED, Sweep, state_of
from tune.tracking import Tracker, public
from tune.warmstart import printed

# seconds, as measured: before the first run and after the last one; around each run; around one of several workers
STARTING, AROUND, AROUND_WORKERS = 12.0, 1.0, 25.0
MEASURE = 6.0  # seconds of steps, in all
REACH, ASK = 5.0, 30.0  # seconds that a cluster may take to be reached, and to be asked
PATIENCE = 60.0  # seconds that the machines of a cluster may take to look at a folder
ASKED = """
import json, sys, ray
from pathlib import Path
from tune import nodes
from tune.runner import runtime_env
ray.init(address=sys.argv[1], runtime_env=runtime_env(), log_to_driver=False, logging_level="ERROR")
print(json.dumps({}))
"""
SIMULATED = 1000  # trials, at least, of which early stopping is simulated
HEADROOM = 1.5  # of what is kept: a checkpoint that is replaced lies beside the new one
STATE, STATE_RUN = 2**20, 2**15  # bytes of a sweep's own files, and what a run adds to them
WIDTH = 80


def plan(
    words: Sequence[str],
    *,
    address: str | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Return what the sweep of a command line would take, as plain JSON; it can start if `mistakes` is empty.

    Nothing is measured where settings, data or teachers are not sound, or the cluster has no place for a run.

    Args:
        words: Layers and overrides.
        address: Of a Ray cluster; without it, and without RAY_ADDRESS, it would be this machine.
        stop: Says whether a signal came.

    Raises:
        Interrupted: If `stop` said so.
    """
    sweep, told = understood(words)
    if sweep is None:
        return {"mistakes": told}
    typos, machines, task, found = list(told), [], None, {}
    address = address or os.environ.get("RAY_ADDRESS")
    with Display("plan") as display:
        progress = stoppable(display.progress, stop or Stop())
        with _into(told):
            machines = machines_of(address)
            slots, each = side_by_side(sweep, machines)
        with _into(told):
            task = distill.open_task(sweep.base, progress)
            for config in choices(sweep):
                told += estimate.mistakes(config, task, progress)
        told = _without_consequences(told, typos)
        if not told:
            with _into(told):
                found = measured(sweep, task, slots, each, progress)
    found["cluster"] = {"machines": len(machines)} | {
        what: sum(node.get(what, 0) for node in machines) for what in ("CPU", "GPU")
    }
    storage, tracking = sweep.base.storage, Tracker.address(sweep.settings.tracking.uri)
    told += unanswered(sweep, tracking) + cramped(found.get("disk", []))
    blind: list[str] = []
    with _into(told):
        if len(machines) > 1 and sweep.store is None:
            blind = unseen(address, Path(storage))
    home = state_of(sweep.settings, sweep.base)
    told += unsafe(len(machines), home, tracking, mounts(), storage, blind)
    return found | {"mistakes": list(dict.fromkeys(told))}


def measured(
    sweep: Sweep, task: Task, slots: int, each: dict[str, float], progress: Progress
) -> dict[str, Any]:
    """Return runs, time and disk of a sweep, from some steps that are taken here.

    Args:
        sweep: The sweep.
        task: Its data.
        slots: Runs side by side.
        each: What a worker takes of the cluster.
        progress: Told how far the measurement is.
    """
    workers, runs = sweep.settings.resources.workers, runs_of(sweep, slots)
    disk = there(next(iter(folders_of(sweep).values())))  # where checkpoints will lie
    place = disk if os.access(disk, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".richkd-plan-", dir=place) as folder:
        lacks = lacks_of(sweep, task, Path(folder))
        paces = paces_of(sweep, task, Path(folder), progress)
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


@contextlib.contextmanager
def _into(told: list[str]) -> Iterator[None]:
    """Tell of what is refused inside, and go on."""
    try:
        yield
    except Interrupted:
        raise
    except RichkdError as error:
        told.append(str(error))
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        told.append(f"the disk is full ({error.filename}); free some space.")


def understood(words: Sequence[str]) -> tuple[Sweep | None, list[str]]:
    """Return the sweep of a command line without its mistakes, and these; None if nothing can be made of it."""
    told: list[str] = []
    sound = []
    for word in words:
        with _into(told):
            read([word])
            sound.append(word)

    def make(layers: Layers) -> Sweep:
        settings, base = build(layers, Settings), build(layers)
        Tracker.address(settings.tracking.uri)
        return Sweep(state_of(settings, base) / (settings.sweep.name or "plan"), layers)

    layers, more = mistakes(read(sound), make)
    told += more
    try:
        return make(layers), told
    except ConfigError:  # for a reason that is told already
        return None, told


def _without_consequences(told: list[str], typos: list[str]) -> list[str]:
    """Leave out what is missing only because a mistake was taken out: the key that it begins with was told of."""
    own = " ".join(line for line in typos if "sweep.space:" not in line)
    known = set(re.findall(r"\w+\.[\w.]*\w", own))
    later = [line for line in told if line not in typos]
    return typos + [line for line in later if re.match(r"[\w.]*", line)[0] not in known]


def choices(sweep: Sweep) -> list[Config]:
    """Return the configs that differ in what is looked up by name: the base, and one of each searched choice."""
    wanted = [
        {key: choice} for key in NAMED for choice in getattr(sweep.space.get(key), "choices", ())
    ]
    return [sweep.resolve(settings) for settings in (printed(sweep.base.method.name), *wanted)]


def machines_of(address: str | None) -> list[dict[str, float]]:
    """Return CPUs and GPUs of each living machine of a cluster, or of this machine where there is no address.

    Raises:
        ConfigError: If the cluster cannot be reached: in REACH seconds a port, in ASK seconds what is behind it.
    """
    if address in (None, "local"):
        return [{"CPU": os.cpu_count() or 1, "GPU": estimate.gpus()}]
    return _asked(address, "[node.resources for node in nodes.alive()]", ASK)


def unseen(address: str, folder: Path) -> list[str]:
    """Return the names of the machines of a cluster that do not see the nearest folder to `folder` that exists.

    Raises:
        ConfigError: If the cluster does not answer.
    """
    return _asked(address, "nodes.probe(Path(sys.argv[2]))", 2 * PATIENCE, str(there(folder)))


def _asked(address: str, question: str, seconds: float, *arguments: str) -> Any:
    """Return what a cluster answers.

    A process of its own asks, since Ray itself would wait more than a minute for a cluster that does not answer.
    """
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), REACH).close()
        asked = subprocess.run(
            [sys.executable, "-c", ASKED.format(question), address, *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
        )
        return json.loads(asked.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()
        reason = " ".join((said[-1] if said else str(error)).split())[:200]
        if isinstance(error, subprocess.TimeoutExpired):
            reason = f"it did not answer within {seconds:g} s"
        raise ConfigError(
            f"--address {address} cannot be used ({reason}); give HOST:PORT of a running Ray cluster, or none."
        ) from error


def side_by_side(sweep: Sweep, machines: list[dict[str, float]]) -> tuple[int, dict[str, float]]:
    """Return how many runs go on at once, and what each of their workers takes.

    Raises:
        ConfigError: If not even one fits.
    """
    from tune.runner import fit  # Ray takes seconds to import

    resources = sweep.settings.resources
    slots, each = fit(resources, machines, gpu=sweep.base.device != "cpu")
    return min(slots, resources.max_concurrent or slots), each


def expected_epochs(wanted: Wanted, trials: int, epochs: int, slots: int) -> float:
    """Return how many of its `epochs` a trial gets on average, if which trial is better is chance.

    Optuna's own pruner decides, on studies in memory whose trials each have a random accuracy of their own; `slots`
    of them advance side by side.
    """
    if wanted.scheduler == "none" or epochs <= wanted.min_epochs:
        return float(epochs)
    from optuna import create_study

    decisions = {wanted.min_epochs * wanted.reduction**k for k in range(epochs.bit_length())}
    trials = min(trials, SIMULATED)  # of more the share hardly changes
    rng, spent, count = random.Random(0), 0, 0
    while count < SIMULATED:
        study = create_study(direction="maximize", pruner=pruner(wanted))
        waiting = [[study.ask(), rng.random(), 0] for _ in range(trials)]
        running: list[list] = []
        while waiting or running:
            while waiting and len(running) < slots:
                running.append(waiting.pop(0))
            for each in list(running):
                trial, value, epoch = each
                each[2] = epoch = epoch + 1
                spent += 1
                if epoch in decisions:
                    trial.report(value, epoch)
                if epoch == epochs or (epoch in decisions and trial.should_prune()):
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
        refits: Seeds of each of STUDENTS.
    """

    trials: dict[str, int]
    epochs: int
    expected: dict[str, float]
    seeds: int
    refits: int

    @property
    def total(self) -> int:
        """Number of run folders."""
        return sum(self.trials.values()) * self.seeds + len(STUDENTS) * self.refits


def runs_of(sweep: Sweep, slots: int) -> Runs:
    """Return what a sweep runs, where `slots` runs go on at once; searched epochs count as the most there can be."""
    wanted = sweep.settings.sweep
    epochs = getattr(sweep.space.get("train.epochs"), "high", sweep.base.train.epochs)
    trials = {sweep.base.method.name: wanted.trials}
    trials["kd"] = wanted.trials if of_baseline(sweep.space) else 1
    return Runs(
        trials=trials,
        epochs=epochs,
        expected={
            name: expected_epochs(wanted, count, epochs, slots) for name, count in trials.items()
        },
        seeds=wanted.seeds_per_trial,
        refits=sweep.settings.refit.seeds,
    )


def paces_of(
    sweep: Sweep, task: Task, folder: Path, progress: Progress
) -> dict[str, dict[str, Pace]]:
    """Return what a run costs here, `taught` and from `labels`, by student; of several the smallest and the largest."""
    names = getattr(sweep.space.get("student.name"), "choices", (sweep.base.student.name,))
    configs = {
        name: sweep.resolve(printed(sweep.base.method.name) | {"student.name": name})
        for name in names
    }
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
    bytes: int  # of all of it


def lacks_of(sweep: Sweep, task: Task, folder: Path) -> Lacks:
    """Return what has to be made, beside the students, and what that costs here."""
    config, runs = sweep.resolve(printed(sweep.base.method.name)), sweep.settings
    seeds = {
        *range(runs.refit.seeds),
        *range(config.seed, config.seed + runs.sweep.seeds_per_trial),
    }
    first = estimate.untrained(config, task, [config.seed])
    later = estimate.untrained(config, task, sorted(seeds - {config.seed}))
    outputs = estimate.unseen(config, task) + estimate.unjudged(config, task)
    training, kept = 0.0, 0
    if first or later:
        pace = estimate.teacher_pace(config, task, folder / "teacher", seconds=MEASURE / 6)
        training, kept = pace.run(config.teacher.epochs), pace.kept * len(first + later)
    return Lacks(
        outputs=outputs,
        first=first,
        later=later,
        teacher=training,
        bytes=kept + sum(lack.bytes for lack in outputs),
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
        name: around + run("labels" if one.method == "ce" else "taught", runs.epochs, tested=True)
        for name, one in STUDENTS.items()
    }
    work = sum(runs.trials[name] * trial[name] for name in trial)
    work += runs.refits * sum(refit.values()) + len(lacks.later) * lacks.teacher
    # no run is faster for the others: at least a trial that nothing stops, and the refit that waits for it
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
        needed["sweep.state"] += HEADROOM * len(STUDENTS) * runs.refits * kept
    return [
        {
            "field": field,
            "path": str(path),
            "needed": round(needed[field]),
            "free": shutil.disk_usage(there(path)).free,
            "disk": there(path).stat().st_dev,
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


def there(path: Path) -> Path:
    """Return the nearest folder above `path`, or `path` itself, that exists."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.is_dir())


def folders_of(sweep: Sweep) -> dict[str, Path]:
    """Return the folders in which a sweep writes, by key; that of checkpoints comes first."""
    found = {"sweep.state": state_of(sweep.settings, sweep.base), "cache": Path(sweep.cache)}
    if sweep.store is None:
        found = {"storage": Path(sweep.base.storage).absolute()} | found
    return found


def unanswered(sweep: Sweep, tracking: str) -> list[str]:
    """Return what of a sweep's folders and its tracker cannot be used, a line each; a few bytes are written and removed."""
    told: list[str] = []
    name = sweep.settings.sweep.name
    if name is not None and (sweep.folder / "sweep.json").exists():
        told.append(
            f"sweep.name={name} is taken: {sweep.folder} holds a sweep; go on with it (python -m tune resume {name}), "
            "or choose another."
        )
    for field, path in folders_of(sweep).items():
        with _into(told):
            check_writable(path, field)
            try:
                with tempfile.TemporaryFile(dir=there(path)) as file:
                    file.write(b"richkd")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise ConfigError(
                    f"{field} must lead to a folder that can be written but {path} cannot ({error.strerror}); choose another."
                ) from error
    if sweep.store is not None:
        with _into(told):
            sweep.store.probe()
    if (why := Tracker.probe(tracking)) is not None:
        told.append(
            f"tracking.uri={public(tracking)} cannot be used ({why}); start that server, or give another."
        )
    return told


def in_bytes(count: float) -> str:
    """Return a number of bytes for a person."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def in_time(seconds: float) -> str:
    """Return a time for a person."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def table(found: dict[str, Any]) -> list[str]:
    """Return the lines that show what `plan` returned, none wider than WIDTH."""
    if "cluster" not in found:
        return []
    rows: list[tuple[str, str]] = []
    cluster = found["cluster"]
    where = f"{cluster['machines']} machine{'s' * (cluster['machines'] != 1)}"
    where += f", {cluster['CPU']:g} CPUs, {cluster['GPU']:g} GPUs"
    if "runs" not in found:
        return _lines([("cluster", where)])
    runs, seconds, hours = found["runs"], found["seconds"], found["hours"]
    for name, count in runs["trials"].items():
        each = f"{runs['expected'][name]:.1f} of {runs['epochs']} epochs"
        seeds = f", {runs['seeds']} seeds side by side" if runs["seeds"] > 1 else ""
        rows.append(
            (
                f"trials of {name}",
                f"{count}, {each} expected{seeds}, {in_time(seconds['trial'][name])}",
            )
        )
    longest = max(seconds["refit"].values())
    rows.append(
        (
            "refits",
            f"{len(STUDENTS)} students x {runs['refits']} seeds, {runs['epochs']} epochs, up to {in_time(longest)}",
        )
    )
    each = found["each"]
    takes = ", ".join(f"{each[what]:g} {what}" for what in ("CPU", "GPU") if what in each)
    rows += [
        ("cluster", where),
        ("side by side", f"{found['side_by_side']} runs of {each['workers']} x {takes}"),
    ]
    faster = (
        "; runs will have GPUs, and be faster" if "GPU" in each and found["device"] == "cpu" else ""
    )
    rows.append(("measured", f"on the {found['device']} of this machine, others differ{faster}"))
    for name, kinds in found["pace"].items():
        pace = kinds["taught"]
        rows.append(
            (
                f"  {name}",
                f"{1000 * pace['step']:.3g} ms a step, {pace['steps']} steps and {in_time(pace['epoch'])} an epoch",
            )
        )
    lacks = found["lacks"]
    for lack in lacks["outputs"]:
        rows.append(
            ("to be made", f"{lack['what']}, {in_time(lack['seconds'])}, {in_bytes(lack['bytes'])}")
        )
    if count := len(lacks["first"] + lacks["later"]):
        rows.append(
            ("to be made", f"task teachers of {count} seeds, {in_time(lacks['teacher'])} each")
        )
    if not (lacks["outputs"] or count):
        rows.append(("in the cache", "the task teachers and CLIP's features"))
    rows.append(
        ("device time", ", ".join(f"{value:.3g} {what} hours" for what, value in hours.items()))
    )
    rows.append(
        (
            "wall time",
            f"{in_time(seconds['wall'])}: {in_time(seconds['start'])} to start, {in_time(seconds['prepare'])} to prepare, "
            f"{in_time(seconds['runs'])} of runs",
        )
    )
    if (budget := found["budget"]) is not None:
        total = sum(runs["trials"].values())
        rows.append(
            (
                "budget",
                "is enough"
                if budget["fits"]
                else f"is not enough: {budget['trials']} of {total} trials",
            )
        )
    for each in found["disk"]:
        rows.append(
            (
                each["field"],
                f"{in_bytes(each['needed'])} of {in_bytes(each['free'])} free in {each['path']}",
            )
        )
    return _lines(rows)


def _lines(rows: list[tuple[str, str]]) -> list[str]:
    """Return rows of two columns, the second wrapped."""
    left = 2 + max(len(name) for name, _ in rows)
    found = []
    for name, text in rows:
        first, *more = textwrap.wrap(text, WIDTH - left)
        found += [f"{name:<{left}}{first}", *(" " * left + line for line in more)]
    return found
