"""What the students of a sweep are like beyond their accuracy: evaluated from all sides, explained, sent to MLflow, in the report.

    python -m tune evaluate                 # the latest sweep
    python -m tune evaluate first evaluate.rows=2000
    python -m tune evaluate RUN             # or of a run of `tune train`

    SWEEP/refits/METHOD-seedK/evaluation/   of each student that is compared, one refit: the pages of `richkd evaluate`
    SWEEP/explain/                          where they look, and what fusing did: those of `richkd explain`

It is a verb of its own, since on large images it takes minutes and a GPU, which the machine of a driver may not have.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from richkd.appraise import appraise
from richkd.command import Stop
from richkd.errors import ConfigError, RichkdError
from richkd.evaluation import lines as lines_of
from richkd.evaluation import write
from richkd.explain import config_of, explain, together
from richkd.progress import stoppable
from richkd.student import find_checkpoint
from tune import report
from tune.attach import find
from tune.display import Display, short
from tune.findings import EVALUATION, Findings, found_in
from tune.report import EXPLAIN
from tune.study import MAIN
from tune.summary import winner
from tune.sweep import Sweep, asked_of
from tune.tracking import Client, Tracker

# students whose maps are laid beside each other, as `richkd explain SWEEP` does
LOOKED_AT = ("ce", "kd", MAIN)
CELLS = 6  # of a grid, likewise


class Sent(NamedTuple):
    """What MLflow is sent of a run or a sweep: folders, and numbers."""

    of: Path
    folders: tuple[Path, ...]
    metrics: dict[str, float]


def evaluate(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    uri: str | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Evaluate and explain the students of a sweep, send it to MLflow, and write the report anew.

    Of each student the refit is taken whose seed is that of the best one, so that all are compared on one seed; of a grid, of
    each cell the one that is best on the rows it was chosen on.

    Args:
        folder: Sweep folder.
        changes: Dotted keys that say where its data lie now, and how students are looked at.
        uri: Address of MLflow; None: that of the sweep, or the usual one.
        stop: Says whether a signal came.

    Returns:
        `sweep`, `students` (by name what `appraise` found), `explained`, `report`, and `untold`, why MLflow has not got it, None
        if it has.

    Raises:
        ConfigError: If no refit has finished.
    """
    found, stop = found_in(folder), stop or Stop()
    refits = refits_of(found, folder)
    if not refits:
        raise ConfigError(
            f"{folder.name} has no student yet, since no refit has finished; go on with it, or wait."
        )
    answer: dict[str, Any] = {"sweep": str(folder), "students": {}, "explained": None}
    with Display("evaluate", stop=stop) as display:
        progress = stoppable(display.progress, stop)
        for name, refit in refits.items():
            display.line(f"{found.students[name].title}: {short(refit)}")
            appraisal = appraise(refit / "best", changes, progress)
            write(appraisal, refit / EVALUATION, f"{folder.name}, {refit.name}")
            answer["students"][name] = appraisal.found
        chosen = [name for name in refits if found.grid or name in LOOKED_AT][:CELLS]
        shown = {found.students[name].label: refits[name] / "best" for name in chosen}
        config = together([config_of(path, changes) for path in shown.values()])
        answer["explained"] = explain(
            shown, config, folder / EXPLAIN, stop=stop, progress=progress
        )["page"]
    answer["report"] = str(report.write(found_in(folder)))
    sent = [Sent(folder, (folder / EXPLAIN, folder / "report"), {})]
    sent += [
        Sent(refit, (refit / EVALUATION,), metrics(answer["students"][name]))
        for name, refit in refits.items()
    ]
    answer["untold"] = told(sent, folder.parent, uri)
    return answer


def evaluate_run(
    folder: Path,
    changes: dict[str, Any] | None = None,
    *,
    uri: str | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Evaluate and explain the student of a single run, such as one of `tune train`, and send it to the run in MLflow.

    Args:
        folder: Run folder.
        changes: As in `evaluate`.
        uri: Likewise.
        stop: Says whether a signal came.

    Returns:
        `run`, `student` (what `appraise` found), `page`, `explained`, and `untold`, as `evaluate`.
    """
    source, stop = find_checkpoint(folder), stop or Stop()
    with Display("evaluate", stop=stop) as display:
        progress = stoppable(display.progress, stop)
        appraisal = appraise(source, changes, progress)
        page = write(appraisal, folder / EVALUATION, folder.name)
        config = config_of(source, changes)
        students = {config.method.name: source}
        explained = explain(students, config, folder / EXPLAIN, stop=stop, progress=progress)
    sent = [Sent(folder, (folder / EVALUATION, folder / EXPLAIN), metrics(appraisal.found))]
    return {
        "run": str(folder),
        "student": appraisal.found,
        "page": str(page),
        "explained": explained["page"],
        "untold": told(sent, folder.parent, uri),
    }


def refits_of(found: Findings, folder: Path) -> dict[str, Path]:
    """Return by student the run folder of the refit that is looked at."""
    runs = Sweep(folder, asked_of(folder)[1]).runs / "refits"
    best = found.seed if found.seed is not None else winner(found.refits.get(MAIN, {}))
    chosen = {}
    for name, student in found.students.items():
        own = found.refits.get(name, {})
        seed = best if best in own else winner(own)
        if seed is not None:
            chosen[name] = runs / f"{student.label}-seed{seed}"
    return chosen


def told(sent: Sequence[Sent], storage: Path, uri: str | None = None) -> str | None:
    """Send what was found to the runs in MLflow that it is of; return why it could not be, None if it was."""
    try:
        for of, folders, numbers in sent:
            run, address = find(str(of), storage)
            client = Client(uri or address or Tracker.address(None))
            for folder in folders:
                client.attach(run, folder)
            client.log(run, numbers)
    except RichkdError as error:  # it is down, or has not heard of the run
        return str(error)
    return None


def metrics(found: dict[str, Any]) -> dict[str, float]:
    """Return what MLflow keeps as numbers of an evaluation; beside the images that were corrupted here it says so."""
    kept = {
        "evaluation/nll": found["calibration"]["student"]["nll"],
        "evaluation/ece": found["calibration"]["student"]["ece"],
        "evaluation/latency_ms": found["costs"]["latency_ms"],
        "evaluation/flops": found["costs"]["flops"],
        "evaluation/parameters": found["costs"]["parameters"],
    }
    if "corruption" in found:
        own, attacked = found["corruption"], found["attack"]
        kept[f"evaluation/corrupted_{own['kind']}_top1"] = own["mean"]
        for name in ("fgsm", "pgd"):
            each = zip(attacked["eps"], attacked[name], strict=True)
            kept |= {f"evaluation/{name}_{eps}_top1": top1 for eps, top1 in each}
    return kept


def lines_of_run(answer: dict[str, Any]) -> list[str]:
    """Return what was found of a single run as lines for the terminal."""
    own = answer["student"]
    said = [f"{'student':<10} test top1 {own['test']['top1']:6.2f} %", *lines_of(own)]
    said += [f"{what:<10} {short(Path(answer[what]))}" for what in ("page", "explained")]
    return [*said, *untold(answer)]


def untold(answer: dict[str, Any]) -> list[str]:
    """Return the line that says why MLflow has not got it, none if it has."""
    return [] if answer["untold"] is None else [f"MLflow has not got it: {answer['untold']}"]


def lines(answer: dict[str, Any], found: Findings) -> list[str]:
    """Return what was found as lines for the terminal."""
    titles = {name: found.students[name].title for name in answer["students"]}
    wide = max(map(len, titles.values()), default=0) + 1
    head = f"{'':<{wide}}{'top-1':>8}{'ECE':>8}{'NLL':>8}{'corrupted':>11}{'FGSM':>8}{'PGD':>8}"
    said = [head]
    eps = kind = None
    for name, own in answer["students"].items():
        sure = own["calibration"]["student"]
        row = f"{titles[name]:<{wide}}{own['test']['top1']:>8.2f}{sure['ece']:>8.2f}{sure['nll']:>8.3f}"
        if "corruption" in own:
            attacked, kind = own["attack"], own["corruption"]["kind"]
            eps = attacked["eps"][-1]
            row += f"{own['corruption']['mean']:>11.2f}{attacked['fgsm'][-1]:>8.2f}{attacked['pgd'][-1]:>8.2f}"
        said.append(row)
    said.append("test rows, %, NLL in nats; one seed each, which can mislead by points")
    if eps is not None:
        images = "the published images" if kind == "published" else "computed here"
        said.append(f"corrupted: mean over families and severities, {images}; attacks at {eps}/255")
    said += [
        f"explained  {short(Path(answer['explained']))}",
        f"report     {short(Path(answer['report']))}",
    ]
    return [*said, *untold(answer)]
