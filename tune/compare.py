"""Sweeps beside each other: what each was asked for, what it found, and the paired difference between them."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from richkd import escape
from richkd.errors import ConfigError
from richkd.files import make_folder, write_atomic
from richkd.layers import UNHASHED, brief, flatten, to_dict
from tune.display import duration, short
from tune.findings import Findings, found_in
from tune.study import MAIN
from tune.summary import difference

GAPS = ("richkd - kd_tuned", "to the first")  # what the columns of a paired difference begin with
EXACT = 12  # digits of a setting, where sweeps may differ in the last of them
ASIDE = 4  # sweeps that stand side by side; more of them are rows
NAMED = (
    "data.source",
    "student.name",
    "train.epochs",
    "refit.seeds",
    "clip.scale",
    "selection",
)  # in a column of their own
DECISIVE = (
    "data.",
    "train.epochs",
    "selection",
)  # with other values of these, accuracies cannot be compared


def compare(folders: list[Path], csv: Path | None = None) -> dict[str, Any]:
    """Compare sweeps, and write the table.

    Args:
        folders: Of the sweeps; the first is what the others are compared with.
        csv: Where the table goes; None: `comparison.csv` beside the first sweep.

    Returns:
        `sweeps` (what is known of each, by column), `titles` (of the students, by name), `warnings` (what does not compare, a
        line each) and `csv`.

    Raises:
        ConfigError: If there are not two sweeps.
        CorruptError: If a record cannot be read.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    if len(folders) < 2:
        got = ", ".join(folder.name for folder in folders) or "none"
        raise ConfigError(
            f"compare needs two sweeps or more but got {got}; name them: SWEEP SWEEP."
        )
    found = [found_in(folder) for folder in folders]
    titles = titles_of(folders)
    rows = [row_of(one, title) for one, title in zip(found, titles, strict=True)]
    differing, warnings = settings_that_differ(found), []
    for row, one, title in zip(rows, found, titles, strict=True):
        gap = None
        if one is not found[0]:
            warnings += incomparable(found[0], one, (titles[0], title))
            if not _other_data(found[0], one):
                gap = difference(_tested(one), _tested(found[0]))
        row |= {f"{GAPS[1]} {key}": (gap or {}).get(key) for key in ("mean", "low", "high", "n")}
        row |= {key: _settings(one).get(key) for key in differing if key not in NAMED}
    path = csv or folders[0].parent / "comparison.csv"
    make_folder(path.parent, "--csv")
    write_atomic(path, to_csv(rows))
    told = {"titles": students_of(found), "warnings": warnings, "csv": str(path)}
    return {"sweeps": rows} | told


def students_of(found: list[Findings]) -> dict[str, str]:
    """Return the titles of the students that sweeps compare, without the method that each has searched."""
    return {
        name: student.title.removeprefix(f"{one.base.method.name}, ")
        for one in found
        for name, student in one.students.items()
    }


def titles_of(folders: list[Path]) -> list[str]:
    """Return what sweeps are called beside each other: their names, and where others have the same their folders."""
    names = Counter(folder.name for folder in folders)
    return [folder.name if names[folder.name] == 1 else short(folder) for folder in folders]


def row_of(found: Findings, title: str) -> dict[str, Any]:
    """Return what is known of a sweep, by column."""
    own = found.summary.get("difference_tuned") or {}
    ended = sum(t.state != "running" for trials in found.trials.values() for t in trials)
    row = {
        "sweep": title,
        "folder": str(found.folder),
        "state": found.state,
        "data": found.base.data.source,
        "data digest": (_digest(found) or "")[:12],
        "student": "a grid"
        if found.grid
        else "searched"
        if "student.name" in found.space
        else found.base.student.name,
        "epochs": found.base.train.epochs,
        "trials": ended,
        "refit seeds": found.settings.refit.seeds,
        "selection": found.base.selection,
        "best val top-1": found.best.top1 if found.best else None,
        "clip.scale": found.base.clip.scale,
    }
    row |= {
        f"found {key}": value for key, value in (found.best.shown() if found.best else {}).items()
    }
    for student in reversed(found.students):
        entry = found.summary.get(student, {})
        row |= {f"test {student}": entry.get("mean"), f"test {student} sd": entry.get("sd")}
        row |= {f"test {student} n": entry.get("n")}
    row |= {f"{GAPS[0]} {key}": own.get(key) for key in ("mean", "low", "high", "n")}
    return row | {"hours": found.seconds / 3600, "gpu hours": found.gpu_seconds / 3600}


def _settings(found: Findings) -> dict[str, Any]:
    """Return what a sweep was asked for and what decides its result, by dotted key."""
    asked = {"sweep": to_dict(found.settings.sweep), "refit": to_dict(found.settings.refit)}
    every = flatten(to_dict(found.base)) | flatten(asked)
    hidden = (
        *UNHASHED,
        "sweep.name",
        "sweep.state",
        "sweep.study",
        "sweep.hours",
        "sweep.gpu_hours",
    )
    return {key: value for key, value in every.items() if key not in hidden}


def settings_that_differ(found: list[Findings]) -> list[str]:
    """Return the keys whose values are not the same in all sweeps."""
    every = [_settings(one) for one in found]
    keys = dict.fromkeys(key for settings in every for key in settings)
    return [key for key in keys if any(one.get(key) != every[0].get(key) for one in every)]


def _digest(found: Findings) -> str | None:
    """Return the digest of the data that the refits read, None before there is one."""
    return next((run.get("data") for runs in found.runs.values() for run in runs.values()), None)


def _tested(found: Findings) -> dict[int, float]:
    """Return test top-1 of the setting found, by seed, %."""
    return {seed: metrics["test/top1"] for seed, metrics in found.refits.get(MAIN, {}).items()}


def _other_data(one: Findings, other: Findings) -> list[str]:
    """Return why the rows of two sweeps are not the same, if so: then no seed of one pairs with one of the other."""
    said = []
    if None not in (_digest(one), _digest(other)) and _digest(one) != _digest(other):
        said.append(f"other data (digest {_digest(one)[:12]} and {_digest(other)[:12]})")
    said += [why for why in _values(one, other) if why.startswith("data.")]
    return said


def _values(one: Findings, other: Findings) -> list[str]:
    ours, theirs = _settings(one), _settings(other)
    return [
        f"{key} {brief(ours.get(key), EXACT)} and {brief(theirs.get(key), EXACT)}"
        for key in settings_that_differ([one, other])
        if key.startswith(DECISIVE)
    ]


def incomparable(one: Findings, other: Findings, titles: tuple[str, str]) -> list[str]:
    """Return what keeps the accuracies of two sweeps, which are called by their titles, from being compared, a line each."""
    said = _other_data(one, other)
    said += [why for why in _values(one, other) if why not in said]
    states = zip(titles, (one.state, other.state), strict=True)
    said += [f"{title} is {state}" for title, state in states if state != "finished"]
    return [f"{' and '.join(titles)}: {why}" for why in said]


def to_csv(rows: list[dict[str, Any]]) -> bytes:
    """Return the comparison as CSV, a row a sweep."""
    header = list(dict.fromkeys(key for row in rows for key in row))
    return escape.to_csv(header, [[row.get(key) for key in header] for row in rows])


def lines(found: dict[str, Any], width: int | None = None) -> list[str]:
    """Return a comparison as lines for a terminal: up to `ASIDE` sweeps are columns, more are rows."""
    width = max(80, width or shutil.get_terminal_size((100, 24)).columns)
    rows = found["sweeps"]
    shown = [_shown(row, found["titles"]) for row in rows]
    keys = list(dict.fromkeys(key for one in shown for key in one))
    wide = len(rows) > ASIDE
    if wide:
        keys = [
            key
            for key in keys
            if key in ("best val", "as found", "kd, tuned", "to kd, tuned", "to the first", "took")
        ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    if wide:
        for key in ("sweep", *keys):
            table.add_column(key, justify="left" if key == "sweep" else "right", overflow="fold")
        for row, one in zip(rows, shown, strict=True):
            table.add_row(
                Text(escape.line(row["sweep"])), *(Text(one.get(key, "")) for key in keys)
            )
    else:
        for key in ("", *(escape.line(row["sweep"]) for row in rows)):
            table.add_column(
                Text(key), justify="right" if key else "left", no_wrap=not key, overflow="fold"
            )
        for key in keys:
            if any(one.get(key) for one in shown):
                table.add_row(Text(escape.line(key)), *(Text(one.get(key, "")) for one in shown))
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(table)
    said = [line.rstrip() for line in captured.get().splitlines()]
    said += [
        "",
        "test top-1, %, mean ± standard deviation; differences paired by seed, with their 95 % interval",
    ]
    said += [f"careful    {escape.line(line)}" for line in found["warnings"]]
    return [*said, f"table      {found['csv']}"]


def _shown(row: dict[str, Any], titles: dict[str, str]) -> dict[str, str]:
    """Return a row as a person reads it."""
    kept = ("state", "data", "student", "epochs", "trials", "refit seeds", "clip.scale")
    shown = {key: str(row[key]) for key in kept}
    if row["best val top-1"] is not None:
        shown["best val"] = f"{row['best val top-1']:.2f}"
        if row["selection"] == "paper":
            shown["best val"] += " (test rows)"
    for key, value in row.items():
        if key.startswith("found "):
            shown[key] = escape.line(brief(value))
    for student in reversed(titles):
        if (mean := row.get(f"test {student}")) is not None:
            sd, n = row[f"test {student} sd"], row[f"test {student} n"]
            shown[titles[student]] = (
                f"{mean:.2f}" + ("" if sd is None else f" ± {sd:.2f}") + f" ({n})"
            )
    shown["to kd, tuned"] = _gap(row, GAPS[0])
    shown["to the first"] = _gap(row, GAPS[1])
    shown["took"] = duration(3600 * row["hours"])
    if row["gpu hours"]:
        shown["GPU hours"] = f"{row['gpu hours']:.3g}"
    known = (
        "sweep",
        "folder",
        "selection",
        "data digest",
        "best val top-1",
        "hours",
        "gpu hours",
        *kept,
    )
    for key, value in row.items():
        if key not in known and not key.startswith(("found ", "test ", *GAPS)):
            shown[key] = escape.line(brief(value, EXACT))
    return shown


def _gap(row: dict[str, Any], name: str) -> str:
    """Return a difference of a row with its interval, nothing if there is none."""
    mean, low, high = (row[f"{name} {key}"] for key in ("mean", "low", "high"))
    if mean is None:
        return ""
    return f"{mean:+.2f}" + ("" if low is None else f" ({low:+.2f} to {high:+.2f})")
