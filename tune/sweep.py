"""Run a sweep, or go on with one: a single path.

    python -m tune sweep                         # the embedded default
    python -m tune sweep my.yaml sweep.trials=50
    python -m tune resume                        # go on with the latest

A sweep folder holds `sweep.json` (what was asked for), `config.yaml` (the base config), `study.db` (both
searches), `trials/` and `refits/` (run folders), and at the end `summary.json`. What is finished is read
from the study and from the run folders, never from Ray's own state.
"""

import contextlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from richkd import cache, distill, fusion
from richkd.command import Stop
from richkd.config import Config, Layers, build, digest, dump, flatten, to_dict
from richkd.data import load
from richkd.errors import ConfigError, CorruptError, RichkdError
from richkd.files import (
    check_writable,
    make_folder,
    read_record,
    write_atomic,
    write_json,
)
from richkd.methods import METHODS
from richkd.progress import Progress, stoppable
from tune.agenda import Agenda, Job, Refits
from tune.best import called
from tune.display import Display, Terminal, describe
from tune.driver import is_full, locked, resumable, work
from tune.environment import environment
from tune.logbook import Logbook
from tune.scheduler import pruner
from tune.settings import Settings, check_fits
from tune.settings import digest as sweep_digest
from tune.space import of_baseline, read_space
from tune.study import MAIN, Search, settings_of
from tune.summary import STUDENTS, columns, read_refits, summarise, winner
from tune.tracking import Tracker, public
from tune.warmstart import Point, place, printed

# names that are looked up when a run starts: each choice is tried before any trial
NAMED = ("student.name", "teacher.name", "clip.prompts", "clip.logits")
OF_A_METHOD = ("loss.", "fusion.", "clip.")
LEADING = 5  # trials that the link to MLflow's comparison shows; more would make it very long
# what `show` reads of a summary
SUMMARY = ("best", "summary", "mlflow", "failed", "failures", "seconds", "machine")


class Sweep:
    """What was asked for, resolved: the base config, the settings, and the config of every run.

    Args:
        folder: Sweep folder.
        layers: Explicit settings, as given.
    """

    def __init__(self, folder: Path, layers: Layers) -> None:
        self.folder, self.layers = folder.resolve(), layers
        self.settings = build(layers, Settings)
        self.base = build(layers)
        self.cache = str(cache.root(self.base.cache))
        if "fusion.alpha" in METHODS[self.base.method.name].fixed:
            raise ConfigError(
                f"method.name={self.base.method.name} has no fusion to search; use method.name=richkd-l "
                "(kd is tuned beside it), or `python -m richkd distill` for a single run."
            )
        self.space = read_space(self.settings.sweep.space, self.resolve)
        if not self.space:
            raise ConfigError(
                "sweep.space is empty but a sweep searches something; name keys as conf/digits.yaml does, or run "
                "`python -m richkd distill` for a single run."
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
            folder=self.folder / "trials" / search.label(number),
            config=config,
            params={key: shown[key] for key in params},
        )

    def refit(self, refits: Refits, seed: int, settings: dict[str, Any]) -> Job:
        """Return the job of a refit."""
        student, label = STUDENTS[refits.method], self.labels[refits.method]
        config = self.resolve(settings | {"seed": seed}, student.method or self.base.method.name)
        shown = flatten(to_dict(config))
        keys = [key for key in self.space if key in settings or student.method is None]
        return Job(
            id=f"refit-{label}-seed{seed}",
            kind="refit",
            method=refits.method,
            number=seed,
            folder=self.folder / "refits" / f"{label}-seed{seed}",
            config=config,
            params={key: shown[key] for key in keys} | {"seed": seed},
        )


def prepare(sweep: Sweep, progress: Progress) -> dict[str, list[Point]]:
    """Make what all trials share, and return the first trials of each search.

    Whatever cannot be used, such as a prompt set without a placeholder, is refused here and not in the trials.
    The paper's setting is run as printed, with T of the fused logits; where the search's T is relative to the
    task teacher's, its place in the space depends on how wide both spread here.
    """
    paper = printed(sweep.base.method.name)
    plain = printed("kd") | {"fusion.alpha": 1.0}
    config = sweep.resolve(paper)
    task = distill.open_task(config)
    distill.initial_student(config, task.dataset)
    teacher = distill.open_teacher(config, task, progress)
    for key in NAMED:
        for choice in getattr(sweep.space.get(key), "choices", ()):
            each = sweep.resolve({key: choice})
            distill.initial_student(each, task.dataset)
            distill.open_teacher(each, task, progress)
    if "paper" not in sweep.settings.warmstart.sources:
        return {MAIN: [], "kd": []}
    ratio = 1.0
    if sweep.resolve(sweep.settings.sweep.settings).loss.temperature_of == "task":
        rows = task.split.transfer
        fused, alone = teacher.fused("train")[rows], teacher.task.train[rows]
        ratio = fusion.spread(fused) / fusion.spread(alone)
    base = flatten(to_dict(sweep.base))
    kd_space = of_baseline(sweep.space)
    return {
        MAIN: [
            Point(params=place(paper, sweep.space, base, ratio), settings=paper),
            Point(params=place(plain, sweep.space, base, 1.0), settings=plain),
        ],
        "kd": [Point(params=place(plain, kd_space, base, 1.0), settings=printed("kd"))],
    }


def start(
    layers: Layers, *, address: str | None = None, stop: Stop | None = None
) -> dict[str, Any]:
    """Start the sweep that `layers` describe and carry it out.

    Nothing is written before all that is asked for is known to be usable.
    """
    settings, base = build(layers, Settings), build(layers)
    name = settings.sweep.name or time.strftime(
        f"{base.data.source}-{base.student.name}-%y%m%d-%H%M%S"
    )
    folder = Path(base.storage).resolve() / name
    sweep, tracking = Sweep(folder, layers), Tracker.address(settings.tracking.uri)
    asked = {
        "name": name,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "digest": sweep_digest(settings, base),
        "layers": [
            [key, public(value) if key == "tracking.uri" else value, origin]
            for key, value, origin in layers.to_list()
        ],
        "tracking": public(tracking),
    }
    if (folder / "sweep.json").exists():
        raise _exists(folder)
    if address is None and "RAY_ADDRESS" not in os.environ:
        check_fits(settings.resources, {"CPU": os.cpu_count() or 1})
    return carry_out(sweep, asked, tracking, new=True, address=address, stop=stop or Stop())


def resume(folder: Path, *, address: str | None = None, stop: Stop | None = None) -> dict[str, Any]:
    """Go on with an interrupted sweep; a finished one gives its summary again."""
    if (folder / "summary.json").exists():
        result = located(folder, read_record(folder / "summary.json", *SUMMARY))
        show(result)
        return result
    asked = read_record(folder / "sweep.json", "layers", "tracking")
    try:
        layers = Layers.from_list(asked["layers"])
    except TypeError as error:
        raise CorruptError(
            f"{folder / 'sweep.json'} holds no layers that can be read; restore it, or start a new sweep."
        ) from error
    sweep = Sweep(folder, layers)
    tracking = Tracker.recall(asked["tracking"])
    return carry_out(sweep, asked, tracking, new=False, address=address, stop=stop or Stop())


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
    address: str | None,
    stop: Stop,
) -> dict[str, Any]:
    """Do what is left of a sweep and summarise it.

    Args:
        sweep: The sweep.
        asked: What `sweep.json` says, or will say.
        tracking: Address of MLflow, with its credentials.
        new: Whether the folder is made here.
        address: Of a Ray cluster.
        stop: Says whether a signal came.

    Raises:
        Interrupted: On SIGINT or SIGTERM, after the running trials have stopped at a checkpoint.
        Stopped: If the disk is full.
        RichkdError: If no trial succeeded.
    """
    began = time.monotonic()
    folder = sweep.folder
    check_writable(folder, "storage")

    def seconds() -> float:
        return asked.get("seconds", 0.0) + time.monotonic() - began

    with Display(folder.name) as display:
        display.line(f"sweep {folder.name} in {_short(folder)}")
        first = prepare(sweep, stoppable(display.progress, stop))
        make_folder(folder, "storage")
        with locked(folder):
            if asked.get("open"):
                display.line(
                    "the driver before this one was killed: what it had not sent yet is missing in MLflow, and only there"
                )
            if new:
                if (folder / "sweep.json").exists():  # of another start, a moment ago
                    raise _exists(folder)
                write_atomic(folder / "config.yaml", dump(sweep.base).encode())
            write_json(folder / "sweep.json", asked | {"open": True})
            logbook = Logbook(folder, tracking, sweep.settings.tracking.experiment)
            try:
                result = search_and_refit(sweep, logbook, first, stop, display, address, seconds)
            finally:
                with contextlib.suppress(OSError):  # a full disk
                    done = {"seconds": seconds(), "open": False}
                    write_json(folder / "sweep.json", asked | done)
    show(result)
    return result


def search_and_refit(
    sweep: Sweep,
    logbook: Logbook,
    first: dict[str, list[Point]],
    stop: Stop,
    display: Display,
    address: str | None,
    seconds: Callable[[], float],
) -> dict[str, Any]:
    """Run what the agenda says and return the result; MLflow hears of the end, whatever it is."""
    with resumable(logbook.close, lambda: f"python -m tune resume {called(sweep.folder)}"):
        dataset = load(sweep.base.data, cache.root(sweep.base.cache))
        logbook.open(sweep.settings, sweep.base, sweep.space, environment(), dataset)
        agenda = plan(sweep, first, [display, logbook])
        display.follow(agenda)
        work(
            agenda,
            stop,
            sweep.settings.resources,
            sweep.folder / ".ray",
            gpu=sweep.base.device != "cpu",
            address=address,
        )
        return conclude(sweep, agenda, logbook, seconds())


def open_searches(sweep: Sweep, first: dict[str, list[Point]]) -> list[Search]:
    """Return the search of the method and that of plain distillation, as far as `study.db` knows them.

    Raises:
        CorruptError: If the database is damaged, or is gone though trials ran.
    """
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import DatabaseError

    wanted, database = sweep.settings.sweep, sweep.folder / "study.db"
    advice = "restore it, or start a new sweep"
    if (sweep.folder / "trials").exists() and not database.exists():
        raise CorruptError(f"{database} is missing, and with it which trials ran; {advice}.")
    try:
        storage = RDBStorage(f"sqlite:///{database}")
        return [
            Search(
                label,
                storage,
                space,
                first[label],
                wanted.trials if space else 1,  # nothing to search: one trial says it all
                wanted.startup,
                pruner(wanted),
                sweep.base.seed,
            )
            for label, space in ((MAIN, sweep.space), ("kd", of_baseline(sweep.space)))
        ]
    except (DatabaseError, StorageInternalError) as error:
        if is_full(error):
            raise
        reason = str(error.__cause__ or error).splitlines()[0]
        raise CorruptError(f"{database} cannot be read ({reason}); {advice}.") from error


def plan(sweep: Sweep, first: dict[str, list[Point]], listeners: list) -> Agenda:
    """Return the agenda: both searches, then the refits of the five students that are compared."""
    searches = {search.name: search for search in open_searches(sweep, first)}
    refits = [
        Refits(
            method=name,
            settings=printed(student.method or sweep.base.method.name)
            if student.search is None
            else sweep.settings.sweep.settings,
            search=searches.get(student.search),
        )
        for name, student in STUDENTS.items()
    ]

    def finished(job: Job) -> bool:
        path = job.folder / "run.json"
        known = read_record(path, "digest") if path.exists() else {"digest": None}
        same = known["digest"] == digest(job.config)
        return same and "test/top1" in known.get("metrics", {})

    return Agenda(
        list(searches.values()),
        refits,
        sweep.settings.refit.seeds,
        trial_of=sweep.trial,
        refit_of=sweep.refit,
        finished=finished,
        listeners=listeners,
    )


def conclude(sweep: Sweep, agenda: Agenda, logbook: Logbook, seconds: float) -> dict[str, Any]:
    """Choose the best, summarise, and write it down: `summary.json` and MLflow."""
    refits = read_refits(sweep.folder / "refits", sweep.labels)
    search = agenda.searches[0]
    trial, seed = search.best(), winner(refits)
    if trial is None or seed is None:
        reasons = "; ".join(sorted(set(agenda.failed.values()))[:3])
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
        "failures": agenda.failed,
        "best": {
            "trial": trial.number,
            "val_top1": trial.value,
            "params": best.params,
            "settings": {key: shown[key] for key in (*sweep.space, "loss.temperature_of")},
            "origin": origin(sweep, settings_of(trial)),
            "scale": sweep.base.clip.scale,
            "seed": seed,
            "checkpoint": f"refits/{sweep.labels['richkd']}-seed{seed}/best",
            "recorded": {"val_top1": metrics["best_val_top1"], "test_top1": metrics["test/top1"]},
        },
        "leading": [f"trial-{search.label(number)}" for number in search.leading(LEADING)],
        "summary": summary,
        "seconds": seconds,
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
    }
    result["mlflow"] = logbook.conclude(result, columns(summary))
    write_json(sweep.folder / "summary.json", result)
    return located(sweep.folder, result)


def origin(sweep: Sweep, settings: dict[str, Any]) -> str | None:
    """Return what the best setting is, if the search did not find it but was given it."""
    if settings == printed(sweep.base.method.name):
        return "the paper's own setting; nothing that was tried is better"
    if settings == printed("kd") | {"fusion.alpha": 1.0}:
        return "plain distillation; no fusion that was tried is better"
    return None


def located(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return a summary as its reader finds things: `summary.json` itself survives a move of the folder."""
    best = result["best"] | {"checkpoint": str(folder / result["best"]["checkpoint"])}
    return result | {"sweep": str(folder), "best": best}


def show(result: dict[str, Any]) -> None:
    """Print the summary that a person reads."""
    from rich.table import Table

    console = Terminal(highlight=False, soft_wrap=True)
    console.width = max(
        console.width, 80
    )  # a narrower one wraps lines, where a table would lose its end

    def line(what: str, text: str = "", style: str | None = None) -> None:
        console.print(f"{what:<14}{text}" if text else what, style=style, markup=False)

    table = Table(box=None, pad_edge=False)
    found = columns(result["summary"])
    for name in found:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in zip(*found.values(), strict=True):
        table.add_row(*row)
    best, summary = result["best"], result["summary"]
    n = summary["richkd"]["n"]
    line("")
    console.print(table)
    if n > 1:
        line(f"mean ± standard deviation over {n} seeds; differences paired by seed")
    else:
        line("a single seed: it can mislead by points; see refit.seeds")
    gap = summary.get("difference_tuned")
    if gap and gap["se"] is not None:
        line(
            f"as found against kd tuned by as many trials: {gap['mean']:+.2f} (95 % interval {gap['low']:+.2f} to "
            f"{gap['high']:+.2f}), {gap['wins']} of {gap['n']} wins"
        )
    line("")
    line("best setting", f"{describe(best['settings'])} at clip.scale {best['scale']}")
    line("", f"trial {best['trial']}, {best['val_top1']:.2f} % on validation")
    if best["origin"]:
        line("", best["origin"])
    line("checkpoint", _short(best["checkpoint"]))
    line("restore it", f"python -m tune best {called(Path(result['sweep']))} --copy-to student")
    for what, text in result["mlflow"]["lines"].items():
        line(what, text)
    if result["failed"]:
        line("failed", f"{result['failed']}: {next(iter(result['failures'].values()))}", "red")
    line(f"{result['seconds']:.0f} s on {result['machine']['cores']} cores")


def _short(path: str | Path) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return str(path)
