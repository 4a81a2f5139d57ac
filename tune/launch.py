"""Run a sweep, or go on with one: a single path.

python -m tune sweep                         # the embedded default
python -m tune sweep my.yaml sweep.trials=50
python -m tune resume                        # go on with the latest
"""

import contextlib
import os
import platform
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

from richkd import cache
from richkd.command import Stop, say
from richkd.config import Config, in_range, one_of
from richkd.data import load
from richkd.errors import ConfigError, RichkdError, Stopped
from richkd.files import check_writable, make_folder, read_record, write_atomic, write_json
from richkd.layers import UNHASHED, Layers, build, digest, dump, flatten, to_dict
from richkd.progress import stoppable
from richkd.record import is_tested, seed_folders
from tune.agenda import OF_A_METHOD, Agenda, Job, Refits
from tune.best import called
from tune.budget import Budget
from tune.display import Display, short, show
from tune.driver import locked, resumable, work
from tune.environment import differences, environment, fingerprint
from tune.findings import ENVIRONMENT, Findings, gather
from tune.first import STUDENTS_FILE, prepare
from tune.logbook import Logbook
from tune.places import check, machines_of
from tune.settings import MANY, Settings, fit
from tune.settings import UNHASHED as UNHASHED_SWEEP
from tune.settings import digest as sweep_digest
from tune.sharing import SHARING_FILE, settled
from tune.store import bring
from tune.study import MAIN, Kind, Search
from tune.summary import columns, winner
from tune.sweep import (
    DIAGNOSIS,
    Sweep,
    asked_of,
    budget_of,
    going_on,
    open_searches,
    state_of,
    trials_of,
)
from tune.tracking import Tracker, public

LEADING = 5  # trials that the link to MLflow's comparison shows; more would make it very long
# what `show` reads of a summary
SUMMARY = (
    "best",
    "summary",
    "mlflow",
    "failed",
    "failures",
    "failures_by_class",
    "seconds",
    "machine",
)


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
    name = settings.sweep.name or named(layers, settings, base)
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


def named(layers: Layers, settings: Settings, base: Config) -> str:
    """Return the name of a sweep that is given none: its data, its student, or the layer that holds its table, and the time."""
    tables = [entry.origin for entry in layers.entries if entry.key == "paper.title"]
    grid = Path(tables[-1].rpartition(":")[0]).stem if tables else ""
    what = (grid or "grid") if settings.sweep.grid.rows else base.student.name
    return time.strftime(f"{base.data.source}-{what}-%y%m%d-%H%M%S")


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
        advice = f"give it more: python -m tune resume {called(folder)} --add-trials 16"
        if Sweep(folder, layers).grid:
            advice = f"what failed is tried again by: python -m tune retry {called(folder)}"
        say(f"nothing was left to do; {advice}")
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
    _check_more(sweep, more)
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


def _check_more(sweep: Sweep, more: More) -> None:
    if sweep.grid and more.trials:
        raise ConfigError(
            "--add-trials adds to a search but the sweep is a grid; give it more seeds: the line that started it, with another "
            "refit.seeds, --resume and --changed."
        )
    for name, added in (("hours", more.hours), ("gpu_hours", more.gpu_hours)):
        if added and getattr(sweep.settings.sweep, name) is None:
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
    budget = budget_of(sweep, asked)
    if not new and budget.used_up():
        raise Stopped(f"the budget is used up; go on with: {going_on(folder, budget)}")
    with Display(folder.name, stop=stop) as display:
        display.line(f"sweep {folder.name} in {short(folder)}")
        if len(wanted.objectives) > 1 and wanted.scheduler != "none":
            display.line(f"nothing stops early for {', '.join(wanted.objectives)} together")
        first = prepare(
            sweep,
            stoppable(display.progress, stop),
            new=new,
            stop=stop,
            address=address,
            dashboard=dashboard,
        )
        make_folder(folder, "storage")
        with locked(folder):
            if new:
                if (folder / "sweep.json").exists():  # of another start, a moment ago
                    raise _exists(folder)
                if (folder / "run.json").exists():
                    raise ConfigError(
                        f"sweep.name={folder.name} is taken: {folder} holds a run; choose another."
                    )
                (folder / "study.db").unlink(missing_ok=True)  # of a start that was cut short
            elif read_record(folder / "sweep.json") != known:
                raise ConfigError(
                    f"{folder.name} was gone on with by another driver meanwhile; run the same command again."
                )
            # before the sweep is there: one that goes on has no first trials to give
            searches = open_searches(sweep, trials_of(sweep, asked), first)
            if new and any(search.ended or search.left_over for search in searches):
                raise ConfigError(
                    f"sweep.name={folder.name} is taken: sweep.study has trials of that name; choose another."
                )
            if sweep.costs:
                write_json(folder / STUDENTS_FILE, sweep.costs)
            if sweep.diagnosis:
                write_json(folder / DIAGNOSIS, sweep.diagnosis)
            write_atomic(folder / "config.yaml", dump(sweep.base).encode())
            write_json(folder / "sweep.json", asked)
            (folder / "summary.json").unlink(missing_ok=True)
            logbook = Logbook(folder, tracking, sweep.settings.tracking.experiment)
            try:
                with resumable(logbook.close, lambda: going_on(folder, budget)):
                    dataset = load(sweep.base.data, cache.root(sweep.base.cache))
                    code = environment()
                    write_json(folder / ENVIRONMENT, code)
                    logbook.open(sweep.settings, sweep.base, sweep.space, code, dataset)
                    for search in searches:
                        search.retry(retry)
                    agenda = agenda_of(sweep, searches, display, logbook)
                    display.follow(agenda)
                    progress = stoppable(display.progress, stop)
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
                        progress=progress,
                        settle=partial(
                            settled,
                            config=sweep.typical,
                            path=folder / SHARING_FILE,
                            told=display.line,
                            progress=progress,
                        ),
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


def agenda_of(sweep: Sweep, searches: list[Search], display: Display, logbook: Logbook) -> Agenda:
    """Return the agenda: the searches, then the refits of the students that are compared."""
    by_name = {search.name: search for search in searches}
    shared = any(not key.startswith(OF_A_METHOD) for key in sweep.space)
    refits = [
        Refits(
            method=name,
            settings=student.settings,
            search=by_name.get(student.search),
            shared=by_name[MAIN] if shared and student.search is None else None,
        )
        for name, student in sweep.students.items()
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
    """Choose the best, summarise, and write it down: the report, `summary.json` and MLflow."""
    budget.save()
    found = gather(sweep, agenda.searches, state="finished", failures=agenda.failed)
    if not found.refits or (not sweep.grid and (found.best is None or found.seed is None)):
        reasons = "; ".join(sorted({why.text for why in found.failures.values()})[:3])
        raise RichkdError(
            f"no run of {found.name} gave a student: {reasons or 'all were stopped early'}."
        )
    result = {
        "sweep": str(found.folder),
        "trials": sum(found.asked.values()),
        "states": {search.name: search.states() for search in agenda.searches},
        "duplicates": sum(search.duplicates for search in agenda.searches),
        "failed": len(found.failures),
        "failures": {job: why.text for job, why in found.failures.items()},
        "failure_kinds": {job: why.kind for job, why in found.failures.items()},
        "failures_by_class": Counter(why.kind for why in found.failures.values()),
        "best": None if sweep.grid else best_of(sweep, found),
        "cells": {
            name: handed_over(sweep, found, name, winner(runs))
            for name, runs in (found.refits.items() if sweep.grid else ())
        },
        "front": front(sweep, found),
        "leading": [
            f"trial-{search.label(number)}"
            for search in agenda.searches[:1]
            for number in search.leading(LEADING)
        ],
        "summary": found.summary,
        "selection": found.base.selection,
        "seconds": found.seconds,
        "gpu_seconds": found.gpu_seconds,
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
        "report": report_of(found),
    }
    cells = columns(found.summary, found.base.selection)
    result["mlflow"] = logbook.conclude(result, cells)
    write_json(sweep.folder / "summary.json", result)
    return located(sweep.folder, result)


def best_of(sweep: Sweep, found: Findings) -> dict[str, Any]:
    """Return the best setting, as plain JSON, and the refit of it that is handed over."""
    ran = flatten(to_dict(found.config))
    params = {key: ran[key] for key in found.best.params}
    return {
        "trial": found.best.number,
        "val_top1": found.best.top1,
        "params": params,
        "settings": params | {"loss.temperature_of": ran["loss.temperature_of"]},
        "origin": found.origin,
        "scale": found.config.clip.scale,
        **handed_over(sweep, found, MAIN, found.seed),
    }


def handed_over(sweep: Sweep, found: Findings, student: str, seed: int) -> dict[str, Any]:
    """Return which refit of a student is handed over: its seed, checkpoint and recorded accuracies."""
    metrics = found.refits[student][seed]
    refit = sweep.runs / "refits" / f"{found.students[student].label}-seed{seed}"
    return {
        "seed": seed,
        "checkpoint": _within(refit / "best", sweep.folder),
        "recorded": {"val_top1": metrics["best_val_top1"], "test_top1": metrics["test/top1"]},
    }


def front(sweep: Sweep, found: Findings) -> list[dict[str, Any]]:
    """Return the trials that none betters in every objective, as plain JSON; nothing with accuracy alone."""
    shown = []
    for trial in found.front:
        values = dict(zip(found.objectives, trial.values, strict=True))
        folder = sweep.runs / "trials" / trial.label
        best = seed_folders(folder, found.settings.sweep.seeds_per_trial)[0] / "best"
        place = {} if sweep.store else {"checkpoint": _within(best, sweep.folder)}
        shown.append({"trial": f"trial-{trial.label}", **values, "params": trial.told(), **place})
    return shown


def report_of(found: Findings) -> str | None:
    """Write the report of a sweep that has ended, and return where; a report that fails is a warning, and None."""
    try:
        from tune.report import write  # with what draws

        return _within(write(found), found.folder)
    except Stopped:  # a second signal
        raise
    except Exception as error:
        warnings.warn(
            f"the report could not be written ({type(error).__name__}: {error}); once that is mended: python -m tune "
            f"report {called(found.folder)}",
            stacklevel=2,
        )
        return None


def _within(path: Path, folder: Path) -> str:
    """Return a path as seen from a folder that it lies in, absolute if it lies elsewhere."""
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def located(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return a summary as its reader finds things: `summary.json` itself survives a move of the folder."""
    best, report = result["best"], result.get("report")
    if best is not None:
        best = best | {"checkpoint": str(folder / best["checkpoint"])}
    return result | {
        "sweep": str(folder),
        "best": best,
        "report": None if report is None else str(folder / report),
    }
