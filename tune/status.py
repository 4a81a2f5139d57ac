"""How a sweep stands: who works on it, what ran, what failed, what it took; asks nobody but its folder."""

import platform
from collections import Counter
from pathlib import Path
from typing import Any

from richkd.files import read_record
from richkd.record import is_tested
from tune.best import called
from tune.display import describe
from tune.driver import busy, owner_of
from tune.spool import Spool
from tune.study import MAIN, settings_of
from tune.sweep import Sweep, asked_of, budget_of, going_on, open_searches, trials_of

WORDS = {"complete": "finished", "fail": "failed"}  # as the summary and MLflow call it


def status(folder: Path) -> dict[str, Any]:
    """Return how a sweep stands, as plain JSON.

    Returns:
        `sweep`, `folder`, `grid` (whether it is one), `state` (`running`, `finished` or `stopped`), `driver` (of its lock; one on another machine may
        have died, and counts as running), `trials` and `refits` (each how many in which
        state, and `of` how many), `epochs` of the runs under way, `best`, `failures` (class and text by run), `hours`,
        `gpu_hours` and their `limits`, `go_on` (the line that does, if it is stopped), and `unsent`: how many messages MLflow has not got.

    Raises:
        CorruptError: If the record or the study cannot be read.
    """
    asked, layers = asked_of(folder)
    sweep = Sweep(folder, layers)
    wanted = sweep.settings.sweep
    driver, finished = owner_of(folder), (folder / "summary.json").exists()
    running = busy(folder)
    budget = budget_of(sweep, asked)
    found: dict[str, Any] = {
        "sweep": folder.name,
        "folder": str(folder),
        "state": "running" if running else "finished" if finished else "stopped",
        "driver": driver,
        "grid": sweep.grid,
        "trials": {},
        "epochs": {},
        "best": None,
        "failures": {},
        "hours": budget.seconds / 3600,
        "gpu_hours": budget.gpu_seconds / 3600,
        "limits": {"hours": budget.hours, "gpu_hours": budget.gpu_hours},
        "go_on": None if running or finished else going_on(folder, budget),
        "unsent": unsent(folder / "spool.jsonl"),
    }
    states: Counter[str] = Counter()
    if (folder / "study.db").exists() or wanted.study is not None:
        for search in open_searches(sweep, trials_of(sweep, asked)):
            states.update(search.states())
            found["trials"]["of"] = found["trials"].get("of", 0) + search.trials
            for number, why in search.failures().items():
                found["failures"][f"trial-{search.label(number)}"] = list(why)
            for trial in search.left_over:
                label = search.label(trial.number)
                found["epochs"][f"trial-{label}"] = max(trial.intermediate_values, default=0)
            best = search.best()
            if search.name == MAIN and best is not None:
                found["best"] = {
                    "trial": f"trial-{search.label(best.number)}",
                    "val_top1": best.values[0],
                    "judged": sweep.base.judged,
                    "settings": settings_of(best),
                }
    if finished:  # of refits nobody else keeps why
        recorded = read_record(folder / "summary.json", "failures", "failure_kinds")
        for run, text in recorded["failures"].items():
            found["failures"].setdefault(run, [recorded["failure_kinds"][run], text])
    words = WORDS | ({} if running else {"running": "begun"})
    named = {words.get(name.lower(), name.lower()): count for name, count in states.items()}
    found["trials"] = named | found["trials"]
    refits = [path.parent for path in sweep.runs.glob("refits/*-seed*/run.json")]
    done = sum(map(is_tested, refits))
    found["refits"] = {
        "finished": done,
        "begun": len(refits) - done,
        "of": len(sweep.students) * sweep.settings.refit.seeds,
    }
    return found


def unsent(spool: Path) -> int:
    """Return how many messages wait for MLflow."""
    return len(Spool(spool).waiting()) if spool.exists() else 0


def lines(found: dict[str, Any]) -> list[str]:
    """Return a status as lines for the terminal."""

    def line(what: str, text: str) -> str:
        return f"{what:<11}{text}"

    def counts(of: dict[str, int]) -> str:
        each = [f"{n} {state}" for state, n in sorted(of.items()) if n and state != "of"]
        return f"{', '.join(each) or 'none'} of {of.get('of', 0)}"

    driver, best = found["driver"], found["best"]
    said = [line("sweep", f"{found['sweep']}, {found['state']}")]
    if driver:
        there = ", which died" if found["state"] != "running" else ""
        if driver["host"] != platform.node():
            there = ", which cannot be looked at from here"
        said.append(
            line(
                "driver", f"pid {driver['pid']} on {driver['host']}, since {driver['since']}{there}"
            )
        )
    if not found["grid"]:
        said.append(line("trials", counts(found["trials"])))
    said.append(line("refits", counts(found["refits"])))
    if found["epochs"]:
        each = ", ".join(f"{run} at epoch {epoch}" for run, epoch in found["epochs"].items())
        said.append(line("under way", each))
    if best:
        said.append(
            line(
                "best",
                f"{best['trial']}, {best['val_top1']:.2f} % on {best['judged']}: {describe(best['settings'])}",
            )
        )
    for run, (kind, text) in found["failures"].items():
        said.append(line(kind, f"{run}: {text}"))
    for name, used in (("hours", found["hours"]), ("gpu hours", found["gpu_hours"])):
        limit = found["limits"][name.replace(" ", "_")]
        if used or limit:
            said.append(line(name, f"{used:.3g}" + (f" of {limit:.3g}" if limit else "")))
    if found["unsent"] and found["state"] != "running":
        said.append(
            line(
                "MLflow",
                f"lacks {found['unsent']} messages; send them: python -m tune sync {called(Path(found['folder']))}",
            )
        )
    if found["go_on"]:
        said.append(line("go on", found["go_on"]))
    return said
