"""Run a sweep, or go on with one: a single path.

    python -m tune sweep                         # the embedded default
    python -m tune sweep my.yaml sweep.trials=50
    python -m tune resume                        # go on with the latest

A sweep folder holds `sweep.json` (what was asked for), `config.yaml` (the base config), `study.db` (both
searches), `spent.json` (the time it took), `trials/` and `refits/` (run folders), and at the end `summary.json`.
What is finished is read from the study and from the run folders, never from Ray's own state.
"""

import contextlib
import itertools
import json
import os
import platform
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from richkd import cache, distill, estimate, fusion
from richkd.command import Stop
from richkd.config import (
    UNHASHED,
    Config,
    Layers,
    build,
    digest,
    dump,
    flatten,
    in_range,
    is_url,
    one_of,
    to_dict,
)
from richkd.data import load
from richkd.errors import ConfigError, CorruptError, RichkdError, Stopped
from richkd.files import (
    check_writable,
    make_folder,
    read_record,
    write_atomic,
    write_json,
)
from richkd.methods import METHODS
from richkd.progress import Progress, stoppable
from richkd.record import is_tested
from richkd.teachers import FusedTeacher
from tune.agenda import OF_A_METHOD, Agenda, Job, Refits
from tune.best import called, find_sweep
from tune.budget import Budget
from tune.display import Display, short, show
from tune.driver import is_full, locked, resumable, work
from tune.environment import differences, environment, fingerprint
from tune.logbook import Logbook
from tune.places import check, machines_of
from tune.scheduler import pruner
from tune.settings import MANY, Settings, fit
from tune.settings import UNHASHED as UNHASHED_SWEEP
from tune.settings import Sweep as SweepSettings
from tune.settings import digest as sweep_digest
from tune.space import read_space
from tune.store import Store, bring
from tune.study import MAIN, Kind, Search, settings_of
from tune.summary import STUDENTS, columns, read_refits, summarise, winner
from tune.tracking import Tracker, public
from tune.warmstart import PAPER, Outside, Point, place, printed, within

# names that are looked up when a run starts: each choice is tried before any trial
NAMED = ("student.name", "teacher.name", "clip.prompts", "clip.logits")
WARM = 5  # trials of each search that a sweep takes from one before it
LEADING = 5  # trials that the link to MLflow's comparison shows; more would make it very long
STUDENTS_FILE = "students.json"  # what each student costs, where a search looks at that
# what `show` reads of a summary
SUMMARY = (
    "best",
    "summary",
    "mlflow",
    "failed",
    "failures",
    "failures_by_class",
    "front",
    "seconds",
    "machine",
)


class Sweep:
    """What was asked for, resolved: the base config, the settings, and the config of every run.

    Args:
        folder: Sweep folder, with its study, lock and spool.
        layers: Explicit settings, as given.
    """

    def __init__(self, folder: Path, layers: Layers) -> None:
        self.folder, self.layers = folder.resolve(), layers
        self.settings = build(layers, Settings)
        self.base = build(layers)
        self.runs, self.store = self.folder, None  # where run folders lie, as the driver sees them
        if is_url(self.base.storage):
            self.store = Store(f"{self.base.storage.rstrip('/')}/{folder.name}")
        elif self.settings.sweep.state is not None:
            self.runs = Path(self.base.storage).resolve() / folder.name
        self.cache = str(cache.root(self.base.cache))
        if "fusion.alpha" in METHODS[self.base.method.name].fixed:
            raise ConfigError(
                f"method.name={self.base.method.name} has no fusion to search; use method.name=richkd-l "
                "(kd is tuned beside it), or `python -m richkd distill` for a single run."
            )
        self.space = read_space(self.settings.sweep.space, self.resolve)
        self.costs: dict[str, dict[str, float]] = {}  # of each student, by objective
        if not self.space:
            raise ConfigError(
                "sweep.space is empty but a sweep searches something; name keys as conf/digits.yaml does, or run "
                "`python -m richkd distill` for a single run."
            )
        beside = self.settings.sweep.objectives[1:]
        if beside and not any(key.startswith("student.") for key in self.space):
            raise ConfigError(
                f"sweep.objectives has {', '.join(beside)} but no student is searched, and so all trials cost the same; add "
                "sweep.space.student.name={choice: [...]}, or leave them out."
            )
        for key in self.settings.sweep.settings:
            if not key.startswith(OF_A_METHOD):
                raise ConfigError(
                    f"sweep.settings may hold keys of {', '.join(OF_A_METHOD)} but holds {key}, and then trials would "
                    "differ from the refits that they are compared with; set it for the whole sweep."
                )
        for method in (None, "kd"):
            self.resolve(self.settings.sweep.settings, method)
        if "?" in str(self.folder):
            raise ConfigError(
                f"storage and sweep.name must not hold a question mark, which SQLite cannot take, but got "
                f"{self.folder}; choose another."
            )
        own = self.base.method.name
        self.labels = {name: student.label(own) for name, student in STUDENTS.items()}

    def resolve(self, settings: dict[str, Any], method: str | None = None) -> Config:
        """Return the config of a run: the base, a method, and dotted keys on top."""
        layers = self.layers
        if method is not None:
            preset = METHODS[method]
            layers = layers.over(
                method,
                {"method.name": method} | {key: preset.settings[key] for key in preset.fixed},
            )
        # absolute, for workers that have another environment
        return build(layers.over("trial", settings).over("", {"cache": self.cache}))

    def trial(
        self, search: Search, number: int, params: dict[str, Any], settings: dict[str, Any]
    ) -> Job:
        """Return the job of a trial."""
        method = self.base.method.name if search.name == MAIN else search.name
        config = self.resolve(self.settings.sweep.settings | settings, method)
        shown = flatten(to_dict(config))
        return Job(
            id=f"trial-{search.label(number)}",
            kind="trial",
            method=search.name,
            number=number,
            folder=self.runs / "trials" / search.label(number),
            config=config,
            params={key: shown[key] for key in params},
            store=self._address("trials", search.label(number)),
            costs=self.costs.get(student_of(config), {}),
        )

    @property
    def shared(self) -> dict[str, Path]:
        """Folders that all machines must see, by key."""
        found = {} if self.store is not None else {"storage": self.runs.parent}
        if not self.base.teacher.brought:  # it is trained into the cache, by whoever needs it first
            found["cache"] = Path(self.cache)
        return found

    def _address(self, kind: str, name: str) -> str | None:
        return None if self.store is None else f"{self.store.url}/{kind}/{name}"

    def refit(self, refits: Refits, seed: int, settings: dict[str, Any]) -> Job:
        """Return the job of a refit."""
        student, label = STUDENTS[refits.method], self.labels[refits.method]
        config = self.resolve(settings | {"seed": seed}, student.method or self.base.method.name)
        shown = flatten(to_dict(config))
        space = self.space if student.method is None else self.space.of_baseline()
        keys = [key for key in space.active(shown) if key in settings or student.method is None]
        return Job(
            id=f"refit-{label}-seed{seed}",
            kind="refit",
            method=refits.method,
            number=seed,
            folder=self.runs / "refits" / f"{label}-seed{seed}",
            config=config,
            params={key: shown[key] for key in keys} | {"seed": seed},
            # with the settings, since nobody sets aside what lies on a store
            store=self._address("refits", f"{label}-seed{seed}-{digest(config)}"),
        )


def prepare(sweep: Sweep, progress: Progress, *, new: bool) -> dict[str, list[Point]]:
    """Make what all trials share, and return the first trials of each search.

    Whatever cannot be used, such as a prompt set without a placeholder, is refused here and not in the trials.

    Args:
        sweep: The sweep; what its students cost is noted in it, where that is looked at.
        progress: Told how far it is.
        new: Whether it begins; one that goes on has its first trials, and does without the sweeps that they came from.
    """
    earlier = {
        source: earlier_points(sweep, source)
        for source in sweep.settings.warmstart.sources
        if new and source != PAPER
    }
    config = sweep.resolve(printed(sweep.base.method.name))
    task = distill.open_task(config)
    distill.initial_student(config, task.dataset)
    teacher = distill.open_teacher(config, task, progress)
    for key in NAMED:
        for choice in sweep.space.choices(key):
            each = sweep.resolve({key: choice})
            distill.initial_student(each, task.dataset)
            distill.open_teacher(each, task, progress)
    sweep.costs = costs_of(sweep, task, progress)
    first: dict[str, list[Point]] = {MAIN: [], "kd": []}
    for source in sweep.settings.warmstart.sources:
        found = paper_points(sweep, task, teacher) if source == PAPER else earlier.get(source, {})
        for label, points in found.items():
            known = [point.settings for point in first[label]]
            first[label] += [point for point in points if point.settings not in known]
    return first


def paper_points(sweep: Sweep, task: distill.Task, teacher: FusedTeacher) -> dict[str, list[Point]]:
    """Return the paper's setting and plain distillation, run as printed, with T of the fused logits.

    Where the search's T is relative to the task teacher's, its place in the space depends on how wide both spread here.
    """
    paper = printed(sweep.base.method.name)
    plain = printed("kd") | {"fusion.alpha": 1.0}
    ratio = 1.0
    if sweep.resolve(sweep.settings.sweep.settings).loss.temperature_of == "task":
        rows = task.split.transfer
        fused, alone = teacher.fused("train")[rows], teacher.task.train[rows]
        ratio = fusion.spread(fused) / fusion.spread(alone)
    base = flatten(to_dict(sweep.base))
    kd_space = sweep.space.of_baseline()
    return {
        MAIN: [
            Point(params=place(paper, sweep.space, base, ratio), settings=paper),
            Point(params=place(plain, sweep.space, base, 1.0), settings=plain),
        ],
        "kd": [Point(params=place(plain, kd_space, base, 1.0), settings=printed("kd"))],
    }


def earlier_points(sweep: Sweep, source: str) -> dict[str, list[Point]]:
    """Return the best trials of an earlier sweep as far as they lie in the space of this one; the others are named.

    Settings alone are taken over, no results: they are run again.

    Args:
        sweep: The sweep that begins.
        source: Name, folder or MLflow run id of the earlier one.

    Raises:
        ConfigError: If there is no such sweep, or it has no trial that lies in the space.
    """
    try:
        folder = find_sweep(source, sweep.folder.parent)
    except ConfigError as error:
        raise ConfigError(f"warmstart.sources={source}: {error}") from error
    asked, layers = asked_of(folder)
    before = Sweep(folder, layers)
    trials = before.settings.sweep.trials + asked.get("more_trials", 0)
    paper = PAPER in sweep.settings.warmstart.sources
    points: dict[str, list[Point]] = {MAIN: [], "kd": []}
    outside = []
    for search in open_searches(before, trials):
        method = before.base.method.name if search.name == MAIN else search.name
        space = sweep.space if search.name == MAIN else sweep.space.of_baseline()
        asked_for = sweep.settings.sweep.settings
        fixed = flatten(to_dict(sweep.resolve(asked_for, None if search.name == MAIN else "kd")))
        for trial in search.distinct()[:WARM]:
            settings = settings_of(trial)
            if paper and settings in (printed(method), printed("kd") | {"fusion.alpha": 1.0}):
                continue  # it is among the first trials already
            job = before.trial(search, trial.number, trial.params, settings)
            ran, name = flatten(to_dict(job.config)), f"{folder.name}/{job.id}"
            searched = {**before.settings.sweep.settings, **settings}
            try:
                found = within(space, fixed, ran, searched)
            except Outside as error:
                outside.append(f"{name} ({error})")
            else:
                points[search.name].append(Point(params=found, settings=found, source=name))
    if outside:
        left_out = f"outside the space of this sweep, and left out: {'; '.join(outside)}"
        warnings.warn(f"warmstart.sources={source}: {left_out}.", stacklevel=2)
    if not points[MAIN]:
        raise ConfigError(
            f"warmstart.sources={source} must have a finished trial inside the space of this sweep but has none; widen "
            "sweep.space, or leave it out."
        )
    return points


def student_of(config: Config) -> str:
    """Return what tells students of different cost apart."""
    return json.dumps(asdict(config.student), sort_keys=True)


def costs_of(sweep: Sweep, task: distill.Task, progress: Progress) -> dict[str, dict[str, float]]:
    """Return what each student that can be drawn costs, by the sweep's objectives; nothing if it looks at accuracy alone.

    Latency is measured here, before anything else runs, and once: trials of one student have one latency, and a sweep
    that goes on compares with what it measured first.
    """
    beside, path = sweep.settings.sweep.objectives[1:], sweep.folder / STUDENTS_FILE
    if not beside or path.exists():
        return read_record(path) if beside else {}
    keys = [key for key in sweep.space if key.startswith("student.")]
    drawn = list(itertools.product(*(sweep.space.choices(key) for key in keys)))
    found = {}
    for k, values in enumerate(drawn):
        progress("students", k, len(drawn))
        config = sweep.resolve(dict(zip(keys, values, strict=True)))
        costs = {"parameters": estimate.size, "latency": estimate.latency}
        found[student_of(config)] = {name: costs[name](config, task) for name in beside}
    return found


def state_of(settings: Settings, base: Config) -> Path:
    """Return the folder in which sweeps keep their study, lock and spool."""
    folder = Config().storage if is_url(base.storage) else base.storage
    return Path(settings.sweep.state or folder).resolve()


def start(
    layers: Layers, *, resume: bool = False, changed: bool = False, **launch: Any
) -> dict[str, Any]:
    """Start the sweep that `layers` describe and carry it out.

    Nothing is written before all that is asked for is known to be usable.

    Args:
        layers: Explicit settings.
        resume: Whether a sweep of that name may be there, which then goes on.
        changed: Whether it may go on though code or settings have changed.
        launch: `address`, `stop` and what else `carry_out` takes of one invocation.
    """
    settings, base = build(layers, Settings), build(layers)
    if resume and settings.sweep.name is None:
        raise ConfigError("--resume goes on with a sweep by its name but sweep.name is not given.")
    name = settings.sweep.name or time.strftime(
        f"{base.data.source}-{base.student.name}-%y%m%d-%H%M%S"
    )
    folder = state_of(settings, base) / name
    if (folder / "sweep.json").exists():
        if resume:
            return go_on(folder, layers=layers, changed=changed, **launch)
        raise _exists(folder)
    sweep, tracking = Sweep(folder, layers), Tracker.address(settings.tracking.uri)
    asked = {
        "name": name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "digest": sweep_digest(settings, base),
        "layers": _written(layers),
        "tracking": public(tracking),
        "fingerprint": fingerprint(),
    }
    return carry_out(sweep, asked, tracking, new=True, **launch)


def _written(layers: Layers) -> list[list]:
    """Return layers as `sweep.json` keeps them, without passwords."""
    return [
        [key, public(value) if key == "tracking.uri" else value, origin]
        for key, value, origin in layers.to_list()
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class More:
    """What a sweep is given beyond what it was started with.

    Attributes:
        trials: Of each search.
        hours: Of wall time, over `sweep.hours`.
        gpu_hours: Likewise.
        retry: Kinds of failed trials that are tried again.
    """

    trials: int = 0
    hours: float = 0.0
    gpu_hours: float = 0.0
    retry: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        in_range("--add-trials", self.trials, 0, MANY)
        in_range("--add-hours", self.hours, 0, 1e6)
        in_range("--add-gpu-hours", self.gpu_hours, 0, 1e6)
        for kind in self.retry:
            one_of("--class", kind, get_args(Kind))


def asked_of(folder: Path) -> tuple[dict[str, Any], Layers]:
    """Return what `sweep.json` says, and the layers in it; a CorruptError if it cannot be read."""
    asked = read_record(folder / "sweep.json", "layers", "tracking")
    try:
        return asked, Layers.from_list(asked["layers"])
    except TypeError as error:
        raise CorruptError(
            f"{folder / 'sweep.json'} holds no layers that can be read; restore it, or start a new sweep."
        ) from error


def go_on(
    folder: Path,
    *,
    layers: Layers | None = None,
    more: More | None = None,
    changed: bool = False,
    **launch: Any,
) -> dict[str, Any]:
    """Go on with a sweep: interrupted, out of budget, or finished and given more to do.

    A finished one that gets nothing more gives its summary again.

    Args:
        folder: Sweep folder.
        layers: What is asked for now; None: what it was started with.
        more: What it is given beyond that.
        changed: Whether code or settings may have changed.
        launch: As in `start`.

    Raises:
        ConfigError: If code or settings have changed without leave; says what.
    """
    (known, before), more = asked_of(folder), more or More()
    asked, given = known, layers
    layers = layers or before
    resettled = differences(_decisive(before), _decisive(layers))
    longer = build(layers, Settings).sweep.trials > build(before, Settings).sweep.trials
    if (folder / "summary.json").exists() and not (resettled or longer) and more == More():
        result = located(folder, read_record(folder / "summary.json", *SUMMARY))
        show(result)
        return result
    now = fingerprint()
    found = resettled + differences(asked.get("fingerprint", now), now)
    if found and not changed:
        rest = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ConfigError(
            f"{folder.name} must go on as it began but {'; '.join(found[:5])}{rest}; go back to that, or say --changed."
        )
    if found:
        entry = {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "found": found}
        asked = asked | {"changes": [*asked.get("changes", []), entry]}
    asked = asked | {"layers": _written(layers), "fingerprint": now}
    sweep = Sweep(folder, layers)
    _check_more(sweep.settings.sweep, more)
    asked |= {
        "more_trials": asked.get("more_trials", 0) + more.trials,
        "more_hours": asked.get("more_hours", 0.0) + more.hours,
        "more_gpu_hours": asked.get("more_gpu_hours", 0.0) + more.gpu_hours,
    }
    tracking = Tracker.recall(asked["tracking"])
    if given is not None and (uri := sweep.settings.tracking.uri) is not None:
        tracking = Tracker.address(uri)
        asked |= {"tracking": public(tracking)}
    return carry_out(sweep, asked, tracking, new=False, retry=more.retry, known=known, **launch)


def _decisive(layers: Layers) -> dict[str, Any]:
    """Return the settings that a result depends on, by dotted key."""
    both = flatten(to_dict(build(layers))) | flatten(to_dict(build(layers, Settings)))
    free = (*UNHASHED, *UNHASHED_SWEEP)
    return {key: value for key, value in both.items() if not key.startswith(free)}


def _check_more(settings: SweepSettings, more: More) -> None:
    for name, added in (("hours", more.hours), ("gpu_hours", more.gpu_hours)):
        if added and getattr(settings, name) is None:
            raise ConfigError(
                f"--add-{name.replace('_', '-')} adds to sweep.{name} but the sweep has no such limit; leave it out."
            )


def _exists(folder: Path) -> ConfigError:
    return ConfigError(
        f"sweep {folder.name} exists already; go on with it (python -m tune resume {called(folder)}), or choose "
        "another sweep.name."
    )


def carry_out(
    sweep: Sweep,
    asked: dict[str, Any],
    tracking: str,
    *,
    new: bool,
    known: dict[str, Any] | None = None,
    retry: tuple[str, ...] = (),
    address: str | None = None,
    dashboard: str | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Do what is left of a sweep and summarise it.

    Args:
        sweep: The sweep.
        asked: What `sweep.json` says, or will say.
        tracking: Address of MLflow, with its credentials.
        new: Whether the folder is made here.
        known: What `sweep.json` said when `asked` was made of it; None if there was none.
        retry: Kinds of failed trials that are tried again.
        address: Of a Ray cluster.
        dashboard: As `runner.run` takes it.
        stop: Says whether a signal came.

    Raises:
        Interrupted: On SIGINT or SIGTERM, after the running trials have stopped at a checkpoint.
        Stopped: If the disk is full, or the budget is used up.
        RichkdError: If no trial succeeded.
    """
    folder, stop = sweep.folder, stop or Stop()
    check_writable(folder, "storage" if sweep.settings.sweep.state is None else "sweep.state")
    if sweep.store is None:
        check_writable(sweep.runs, "storage")
    else:
        sweep.store.probe()
    check_place(sweep, tracking, address)
    wanted = sweep.settings.sweep
    trials, budget = wanted.trials + asked.get("more_trials", 0), budget_of(sweep, asked)
    if not new and budget.used_up():
        raise Stopped(f"the budget is used up; go on with: {going_on(folder, budget)}")
    with Display(folder.name) as display:
        display.line(f"sweep {folder.name} in {short(folder)}")
        first = prepare(sweep, stoppable(display.progress, stop), new=new)
        make_folder(folder, "storage")
        with locked(folder):
            if new:
                if (folder / "sweep.json").exists():  # of another start, a moment ago
                    raise _exists(folder)
                if (folder / "run.json").exists():
                    raise ConfigError(
                        f"sweep.name={folder.name} is taken: {folder} holds a run; choose another."
                    )
                if wanted.study is not None and any(
                    search.ended or search.left_over
                    for search in open_searches(sweep, trials, first)
                ):
                    raise ConfigError(
                        f"sweep.name={folder.name} is taken: sweep.study has trials of that name; choose another."
                    )
                write_atomic(folder / "config.yaml", dump(sweep.base).encode())
            elif read_record(folder / "sweep.json") != known:
                raise ConfigError(
                    f"{folder.name} was gone on with by another driver meanwhile; run the same command again."
                )
            write_json(folder / "sweep.json", asked)
            if sweep.costs:
                write_json(folder / STUDENTS_FILE, sweep.costs)
            (folder / "summary.json").unlink(missing_ok=True)
            logbook = Logbook(folder, tracking, sweep.settings.tracking.experiment)
            try:
                with resumable(logbook.close, lambda: going_on(folder, budget)):
                    dataset = load(sweep.base.data, cache.root(sweep.base.cache))
                    logbook.open(sweep.settings, sweep.base, sweep.space, environment(), dataset)
                    searches = open_searches(sweep, trials, first)
                    for search in searches:
                        search.retry(retry)
                    agenda = agenda_of(sweep, searches, display, logbook)
                    display.follow(agenda)
                    work(
                        agenda,
                        stop,
                        sweep.settings.resources,
                        folder / ".ray",
                        gpu=sweep.base.device != "cpu",
                        address=address,
                        dashboard=dashboard,
                        budget=budget,
                        seeds=wanted.seeds_per_trial,
                        store=sweep.store,
                        progress=stoppable(display.progress, stop),
                    )
                    result = conclude(sweep, agenda, logbook, budget)
            finally:
                with contextlib.suppress(OSError):  # a full disk
                    budget.tick()
                    budget.save()
    show(result)
    return result


def check_place(sweep: Sweep, tracking: str, address: str | None) -> None:
    """Raise ConfigError if a run fits nowhere, or where several machines would lose the sweep's state or not share it."""
    machines = machines_of(address)
    fit(sweep.settings.resources, machines, gpu=sweep.base.device != "cpu")
    if told := check(len(machines), address, sweep.folder, tracking, sweep.shared):
        raise ConfigError(" ".join(told))


def budget_of(sweep: Sweep, asked: dict[str, Any]) -> Budget:
    """Return what a sweep may take: what its settings say, and what `sweep.json` says that it was given since."""
    wanted = sweep.settings.sweep
    limits = {
        name: None if limit is None else limit + asked.get(f"more_{name}", 0.0)
        for name, limit in (("hours", wanted.hours), ("gpu_hours", wanted.gpu_hours))
    }
    return Budget(sweep.folder / "spent.json", **limits)


def going_on(folder: Path, budget: Budget) -> str:
    """Return the line that goes on with a sweep; one whose time is up needs more of it."""
    line = f"python -m tune resume {called(folder)}"
    for name in budget.used_up():
        line += f" --add-{name.replace('_', '-')} 1"
    return line


def open_searches(
    sweep: Sweep, trials: int, first: dict[str, list[Point]] | None = None
) -> list[Search]:
    """Return the search of the method and that of plain distillation, as far as the study's database knows them.

    Args:
        sweep: The sweep.
        trials: Of each.
        first: The first trials of each, which may be in the study already; None: they are.

    Raises:
        CorruptError: If the database is damaged, or is gone though trials ran.
    """
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import DatabaseError

    wanted, database = sweep.settings.sweep, sweep.folder / "study.db"
    advice = "restore it, or start a new sweep"
    address, prefix = wanted.study, f"{sweep.folder.name}/"
    if address is None:
        address, prefix = f"sqlite:///{database}", ""
        if (sweep.runs / "trials").exists() and not database.exists():
            raise CorruptError(f"{database} is missing, and with it which trials ran; {advice}.")
    try:
        storage = RDBStorage(address)
        return [
            Search(
                label,
                storage,
                space,
                first[label] if first else [],
                trials if space else 1,  # nothing to search: one trial says it all
                wanted.startup,
                pruner(wanted),
                sweep.base.seed,
                prefix=prefix,
                objectives=wanted.objectives,
            )
            for label, space in ((MAIN, sweep.space), ("kd", sweep.space.of_baseline()))
        ]
    except (DatabaseError, StorageInternalError) as error:
        if is_full(error):
            raise
        reason = str(error.__cause__ or error).splitlines()[0]
        raise CorruptError(f"{address} cannot be read ({reason}); {advice}.") from error


def agenda_of(sweep: Sweep, searches: list[Search], display: Display, logbook: Logbook) -> Agenda:
    """Return the agenda: both searches, then the refits of the five students that are compared."""
    by_name = {search.name: search for search in searches}
    shared = any(not key.startswith(OF_A_METHOD) for key in sweep.space)
    refits = [
        Refits(
            method=name,
            settings=printed(student.method or sweep.base.method.name)
            if student.search is None
            else sweep.settings.sweep.settings,
            search=by_name.get(student.search),
            shared=by_name[MAIN] if shared and student.search is None else None,
        )
        for name, student in STUDENTS.items()
    ]

    def refit(of: Refits, seed: int, settings: dict[str, Any]) -> Job:
        job = sweep.refit(of, seed, settings)
        path = job.folder / "run.json"
        if path.exists() and read_record(path, "digest")["digest"] != digest(job.config):
            set_aside(job.folder)  # of a setting that was the best one, before there was more
            logbook.retire(job)
        return job

    return Agenda(
        searches,
        refits,
        sweep.settings.refit.seeds,
        trial_of=sweep.trial,
        refit_of=refit,
        finished=lambda job: is_tested(job.folder),
        listeners=[Brought(), display, logbook],
    )


class Brought:
    """Listens to an agenda, and brings the refits that end on an object store to where the others look for them."""

    def started(self, job: Job) -> None:
        """Nothing."""

    def epoch(self, job: Job, metrics: dict[str, Any]) -> None:
        """Nothing."""

    def ended(self, job: Job, state: str, metrics: dict[str, Any]) -> None:
        """Bring a refit that has finished."""
        if job.store is not None and job.kind == "refit" and state == "finished":
            bring(job.store, "", job.folder)


def set_aside(folder: Path) -> None:
    """Move a run folder that is superseded to where nobody looks for one."""
    aside = folder.parent / "superseded"
    aside.mkdir(exist_ok=True)
    count = len(list(aside.glob(f"{folder.name}-*")))
    folder.rename(aside / f"{folder.name}-{count}")


def conclude(sweep: Sweep, agenda: Agenda, logbook: Logbook, budget: Budget) -> dict[str, Any]:
    """Choose the best, summarise, and write it down: `summary.json` and MLflow."""
    refits = read_refits(sweep.runs / "refits", sweep.labels)
    search = agenda.searches[0]
    trial, seed = search.best(), winner(refits)
    if trial is None or seed is None:
        reasons = "; ".join(sorted({why.text for why in agenda.failed.values()})[:3])
        raise RichkdError(
            f"no trial of {sweep.folder.name} gave a student: {reasons or 'all were stopped early'}."
        )
    best = sweep.trial(search, trial.number, trial.params, settings_of(trial))
    shown = flatten(to_dict(best.config))
    metrics = refits["richkd"][seed]
    summary = summarise(refits)
    result = {
        "sweep": str(sweep.folder),
        "trials": sum(s.trials for s in agenda.searches),
        "states": {search.name: search.states() for search in agenda.searches},
        "failed": len(agenda.failed),
        "failures": {job: why.text for job, why in agenda.failed.items()},
        "failures_by_class": Counter(why.kind for why in agenda.failed.values()),
        "best": {
            "trial": trial.number,
            "val_top1": trial.values[0],
            "params": best.params,
            "settings": {key: shown[key] for key in (*best.params, "loss.temperature_of")},
            "origin": origin(sweep, settings_of(trial)),
            "scale": best.config.clip.scale,
            "seed": seed,
            "checkpoint": _within(
                sweep.runs / "refits" / f"{sweep.labels['richkd']}-seed{seed}" / "best",
                sweep.folder,
            ),
            "recorded": {"val_top1": metrics["best_val_top1"], "test_top1": metrics["test/top1"]},
        },
        "front": front(sweep, search),
        "leading": [f"trial-{search.label(number)}" for number in search.leading(LEADING)],
        "summary": summary,
        "seconds": budget.seconds,
        "gpu_seconds": budget.gpu_seconds,
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
    }
    result["mlflow"] = logbook.conclude(result, columns(summary))
    write_json(sweep.folder / "summary.json", result)
    return located(sweep.folder, result)


def front(sweep: Sweep, search: Search) -> list[dict[str, Any]]:
    """Return the trials that none betters in every objective, as plain JSON; nothing with accuracy alone."""
    if len(search.objectives) == 1:
        return []
    found = []
    for trial in search.front():
        job = sweep.trial(search, trial.number, trial.params, settings_of(trial))
        values = dict(zip(search.objectives, trial.values, strict=True))
        place = {} if job.store else {"checkpoint": _within(job.folder / "best", sweep.folder)}
        found.append({"trial": job.id, **values, "params": job.params, **place})
    return found


def origin(sweep: Sweep, settings: dict[str, Any]) -> str | None:
    """Return what the best setting is, if the search did not find it but was given it."""
    if settings == printed(sweep.base.method.name):
        return "the paper's own setting; nothing that was tried is better"
    if settings == printed("kd") | {"fusion.alpha": 1.0}:
        return "plain distillation; no fusion that was tried is better"
    return None


def _within(path: Path, folder: Path) -> str:
    """Return a path as seen from a folder that it lies in, absolute if it lies elsewhere."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def located(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return a summary as its reader finds things: `summary.json` itself survives a move of the folder."""
    best = result["best"] | {"checkpoint": str(folder / result["best"]["checkpoint"])}
    return result | {"sweep": str(folder), "best": best}
