"""What a sweep found: each method over the seeds, its paired difference to kd, and one setting.

A seed varies the labelled subset, the teacher, the initial weights and the order; test rows are the same
for all. Differences are paired by seed, their standard error is that of the mean difference.
"""

import statistics
from pathlib import Path
from typing import Any

from richkd.files import read_record
from tune.students import Student

LAST_EPOCH = "last epoch"
LAST = "test/last_top1"  # of the student after its last epoch, where another one is kept
TEACHERS = {"teacher": "task teacher", "clip": "zero-shot CLIP", "fused": "fused teacher, as found"}


def spread(values: list[float]) -> dict[str, Any]:
    """Return mean, standard deviation (None for one value) and n."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def difference(values: dict[int, float], others: dict[int, float]) -> dict[str, Any] | None:
    """Return the paired difference over the seeds that both have.

    Returns:
        `mean`, `se` (standard error), `low` and `high` (95 % t interval), `wins`, `n`; None without a common
        seed, and no error and no interval with a single one.
    """
    seeds = sorted(values.keys() & others.keys())
    if not seeds:
        return None
    gaps = [values[seed] - others[seed] for seed in seeds]
    mean = statistics.fmean(gaps)
    se = half = None
    if len(gaps) > 1:
        from scipy.stats import t

        se = statistics.stdev(gaps) / len(gaps) ** 0.5
        half = float(t.ppf(0.975, len(gaps) - 1)) * se
    return {
        "mean": mean,
        "se": se,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "wins": sum(g > 0 for g in gaps),
        "n": len(gaps),
    }


def read_refits(folder: Path, labels: dict[str, str]) -> dict[str, dict[int, dict[str, Any]]]:
    """Return the metrics of each finished refit under `folder`, by student and seed.

    Args:
        folder: `refits/` of a sweep.
        labels: Student to the name that its folders begin with.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for student, label in labels.items():
        for path in folder.glob(f"{label}-seed*/run.json"):
            state = read_record(path, "state")
            if state["state"] == "finished" and "test/top1" in state["metrics"]:
                seed = int(path.parent.name.removeprefix(f"{label}-seed"))
                found.setdefault(student, {})[seed] = state["metrics"]
    return {student: dict(sorted(runs.items())) for student, runs in found.items()}


def teachers(refits: dict[str, dict[int, dict[str, Any]]]) -> dict[str, list[float]]:
    """Return the test accuracy of each teacher over the seeds, at the setting found.

    Where that setting gives one teacher no weight, the fused teacher is the other one alone, and the one
    left out is taken from the refits of the paper's setting, which has both.
    """
    found: dict[str, list[float]] = {}
    for seed, metrics in refits.get("richkd", {}).items():
        own = {n: metrics[f"{n}/top1"] for n in TEACHERS if f"{n}/top1" in metrics}
        if len(own) == 1:
            own["fused"] = next(iter(own.values()))
        both = refits.get("richkd_paper", {}).get(seed, {})
        for name in TEACHERS:
            if (top1 := own.get(name, both.get(f"{name}/top1"))) is not None:
                found.setdefault(name, []).append(top1)
    return found


def summarise(
    refits: dict[str, dict[int, dict[str, Any]]], students: dict[str, Student]
) -> dict[str, Any]:
    """Return the summary: `teacher`, `clip`, `fused` and each student in percent of the test rows."""
    summary: dict[str, Any] = {}
    found = teachers(refits)
    for name, title in TEACHERS.items():
        if name in found:
            each = spread(found[name])
            summary[name] = {"title": title, "top1": each["mean"], "sd": each["sd"], "n": each["n"]}
    top1 = {m: {seed: v["test/top1"] for seed, v in runs.items()} for m, runs in refits.items()}
    for name, student in students.items():
        if name in top1:
            summary[name] = {"title": student.title} | spread(list(top1[name].values()))
            last = [v[LAST] for v in refits[name].values() if LAST in v]
            if student.params and last:  # a cell of a grid
                summary[name]["last"] = spread(last)
            if student.against is not None:
                other = top1.get(student.against, {})
                summary[name]["difference"] = difference(top1[name], other)
    summary["difference"] = difference(top1.get("richkd", {}), top1.get("kd", {}))
    summary["difference_tuned"] = difference(top1.get("richkd", {}), top1.get("kd_tuned", {}))
    return summary


def top1_of(entry: dict[str, Any]) -> float:
    """Return the test top-1 of an entry of the summary, which is a student or a teacher, %."""
    return entry["mean"] if "mean" in entry else entry["top1"]


def winner(runs: dict[int, dict[str, Any]]) -> int | None:
    """Return the seed of the best refit of a student, None of none: highest validation accuracy, never test."""
    return max(
        runs,
        key=lambda seed: (runs[seed]["best_val_top1"], -runs[seed]["best_val_loss"], -seed),
        default=None,
    )


def columns(summary: dict[str, Any], selection: str = "validation") -> dict[str, list]:
    """Return the summary as columns of text, for the terminal and for MLflow; `selection` is the sweep's."""
    rows: list[tuple[str, ...]] = []
    for entry in (one for one in summary.values() if one and "title" in one):
        label = entry["title"] + (f", {entry['student']}" if "student" in entry else "")
        gap = entry.get("difference")
        accuracy = said(top1_of(entry), entry["sd"])
        last = said(entry["last"]["mean"], entry["last"]["sd"]) if "last" in entry else ""
        against = wins = ""
        if gap:
            against = f"{gap['mean']:+.2f}" + (
                "" if gap["se"] is None else f" (s.e. {gap['se']:.2f})"
            )
            wins = f"{gap['wins']} of {gap['n']}"
        rows.append((label, accuracy, last, against, wins))
    test = "test top-1, %" if selection == "validation" else "best epoch's test top-1, %"
    names = ("", test, LAST_EPOCH, "against kd", "wins")
    found = {name: [row[k] for row in rows] for k, name in enumerate(names)}
    if not any(found[LAST_EPOCH]):
        del found[LAST_EPOCH]
    return found


def said(mean: float, sd: float | None, digits: int = 2) -> str:
    """Return a mean with its standard deviation, if there is one."""
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")
