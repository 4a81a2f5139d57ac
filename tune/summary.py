"""What a sweep found: each method over the seeds, its paired difference to kd, and one setting.

A seed varies the labelled subset, the teacher, the initial weights and the order; test rows are the same
for all. Differences are paired by seed, their standard error is that of the mean difference.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from richkd.files import read_record

TEACHERS = {"teacher": "task teacher", "clip": "zero-shot CLIP", "fused": "fused teacher, as found"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """One of the students that a sweep compares.

    Attributes:
        title: Its row in the table.
        method: None is the sweep's own.
        suffix: After the method in the names of its runs.
        search: Whose best setting it runs; None: the setting as printed.
    """

    title: str
    method: str | None
    suffix: str = ""
    search: str | None = None

    def label(self, own: str) -> str:
        """Return how its runs are called, where `own` is the sweep's method."""
        return f"{self.method or own}{self.suffix}"


STUDENTS = {
    "ce": Student(title="labels only", method="ce"),
    "kd": Student(title="kd, T 3, weight 3", method="kd"),
    "kd_tuned": Student(title="kd, tuned", method="kd", suffix="-tuned", search="kd"),
    "richkd_paper": Student(title="richkd-l, as printed", method=None, suffix="-paper"),
    "richkd": Student(title="richkd-l, as found", method=None, search="richkd"),
}


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
    """Return the metrics of each finished refit under `folder`, by method and seed.

    Args:
        folder: `refits/` of a sweep.
        labels: Method to the name that its folders begin with.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for method, label in labels.items():
        for path in folder.glob(f"{label}-seed*/run.json"):
            state = read_record(path, "state")
            if state["state"] == "finished" and "test/top1" in state["metrics"]:
                seed = int(path.parent.name.removeprefix(f"{label}-seed"))
                found.setdefault(method, {})[seed] = state["metrics"]
    return {method: dict(sorted(runs.items())) for method, runs in found.items()}


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


def summarise(refits: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Return the summary: `teacher`, `clip`, `fused` and each student in percent of the test rows."""
    summary: dict[str, Any] = {}
    for name, values in teachers(refits).items():
        found = spread(values)
        summary[name] = {"top1": found["mean"], "sd": found["sd"], "n": found["n"]}
    top1 = {m: {seed: v["test/top1"] for seed, v in runs.items()} for m, runs in refits.items()}
    for name in STUDENTS:
        if name in top1:
            summary[name] = spread(list(top1[name].values()))
            if name != "kd":
                summary[name]["difference"] = difference(top1[name], top1.get("kd", {}))
    summary["difference"] = difference(top1.get("richkd", {}), top1.get("kd", {}))
    summary["difference_tuned"] = difference(top1.get("richkd", {}), top1.get("kd_tuned", {}))
    return summary


def top1_of(entry: dict[str, Any]) -> float:
    """Return the test top-1 of an entry of the summary, which is a student or a teacher, %."""
    return entry["mean"] if "mean" in entry else entry["top1"]


def winner(refits: dict[str, dict[int, dict[str, Any]]]) -> int | None:
    """Return the seed of the best refit of the setting found: highest validation accuracy, never test."""
    runs = refits.get("richkd", {})
    return max(
        runs,
        key=lambda seed: (runs[seed]["best_val_top1"], -runs[seed]["best_val_loss"], -seed),
        default=None,
    )


def columns(summary: dict[str, Any], selection: str = "validation") -> dict[str, list]:
    """Return the summary as columns of text, for the terminal and for MLflow; `selection` is the sweep's."""
    rows: list[tuple[str, str, str, str]] = []
    titles = TEACHERS | {name: student.title for name, student in STUDENTS.items()}
    for name, label in titles.items():
        if name not in summary:
            continue
        entry = summary[name]
        label += f", {entry['student']}" if "student" in entry else ""
        gap = entry.get("difference")
        accuracy = f"{top1_of(entry):.2f}" + (
            "" if entry["sd"] is None else f" ± {entry['sd']:.2f}"
        )
        against = wins = ""
        if gap:
            against = f"{gap['mean']:+.2f}" + (
                "" if gap["se"] is None else f" (s.e. {gap['se']:.2f})"
            )
            wins = f"{gap['wins']} of {gap['n']}"
        rows.append((label, accuracy, against, wins))
    test = "test top-1, %" if selection == "validation" else "best epoch's test top-1, %"
    names = ("", test, "against kd", "wins")
    return {name: [row[k] for row in rows] for k, name in enumerate(names)}
