"""The report of a sweep: one HTML file that needs nothing else, the same as Markdown, and the table behind each picture.

    runs/SWEEP/report/     report.html  report.md  NAME.svg  NAME.png  NAME.csv

It is made of the sweep's own files, whether the sweep has ended or not; MLflow is not asked.
"""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from richkd import escape, page
from richkd.diagnose.document import in_short
from richkd.draw import Picture, number, parameter, stored
from richkd.evaluate.pictures import reliability
from richkd.evaluation import calibration_of
from richkd.layers import brief, command_of, dump, flatten, to_dict
from richkd.page import (
    Beside,
    Block,
    Code,
    Details,
    Heading,
    Pictures,
    Table,
    Text,
    Tiles,
)
from tune import plots
from tune.best import called
from tune.display import describe, duration, short
from tune.findings import Findings, Trial, ranked
from tune.students import of_preset
from tune.study import MAIN
from tune.summary import TEACHERS, columns, top1_of
from tune.warmstart import PAPER, THEORY

LEADING = 20  # trials of the leaderboard; the table behind it has all
BESIDE = 5  # reliability diagrams that have room beside each other
EXPLAIN = "explain"  # folder of what `tune evaluate` drew of students and images
DIGITS = 4  # of settings in tables
FAILURES = 20  # that are shown, likewise
SECTIONS = (
    "sweep",
    "refit",
    "warmstart",
    "resources",
)  # of the settings; an address may hold a password


def write(found: Findings) -> Path:
    """Write the report of a sweep into its folder, and return the HTML file."""
    blocks = document(found, plots.pictures(found))
    return page.write(found.folder / "report", "report", found.name, blocks)


def document(found: Findings, drawn: Sequence[Picture]) -> list[Block]:
    """Return a report as blocks."""
    if found.grid:
        return [
            Text(about_grid(found), "soft"),
            *unfinished(found),
            Tiles(tiles(found)),
            *summary(found),
            Pictures(drawn),
            *evaluated(found),
            *failures(found),
            Heading("What was run"),
            *constants(found),
        ]
    return [
        Text(about(found), "soft"),
        *unfinished(found),
        Tiles(tiles(found)),
        Text(verdict(found), "lead"),
        Beside(summary(found), [Pictures(drawn[:1])]),
        Heading("Best setting"),
        *best(found),
        *diagnosed(found),
        *evaluated(found),
        Heading("Pictures"),
        Pictures(drawn[1:]),
        Heading("Leaderboard"),
        *leaderboard(found),
        *failures(found),
        Heading("What was run"),
        *constants(found),
    ]


def about(found: Findings) -> str:
    """Return in a sentence what the sweep is."""
    base, seeds = found.base, found.settings.sweep.seeds_per_trial
    each = f", each of {seeds} seeds" if seeds > 1 else ""
    choices = getattr(found.space.get("student.name"), "choices", (base.student.name,))
    students = f"student{'s' * (len(choices) > 1)} {', '.join(choices)}"
    trials = found.asked.get(MAIN, found.settings.sweep.trials)
    return (
        f"A sweep of {base.method.name} on {base.data.source}: {students}, {base.train.epochs} epochs, "
        f"{trials} trials and as many of kd{each}, refits over {found.settings.refit.seeds} seeds. "
        + (
            f"{found.base.caution}."
            if found.base.caution
            else "Settings are chosen on validation rows; test rows are read once, by the refits."
        )
    )


def about_grid(found: Findings) -> str:
    """Return in a sentence what a grid is."""
    grid = found.settings.sweep.grid
    caution = found.base.caution or "nothing is searched; test rows are read once, by each run"
    return (
        f"A grid on {found.base.data.source}: {', '.join(grid.rows)}, each with {', '.join(grid.methods)}, over "
        f"{found.settings.refit.seeds} seeds; {caution}."
    )


def unfinished(found: Findings) -> list[Block]:
    """Return what is missing of a sweep that has not finished."""
    if found.state == "finished":
        return []
    ended = sum(t.state != "running" for trials in found.trials.values() for t in trials)
    refits = sum(map(len, found.refits.values()))
    trials = f"{ended} of {sum(found.asked.values()) or '?'} trials have ended and "
    missing = "" if found.grid else trials
    missing += (
        f"{refits} of {len(found.students) * found.settings.refit.seeds} refits have finished"
    )
    said = f"This sweep is {found.state}: {missing}; what is said here may change."
    if found.state == "stopped":
        said += f" Go on with it: python -m tune resume {called(found.folder)}"
    if found.stale:
        said += " Refits as found ran an earlier best setting."
    return [Text(said, "note")]


def tiles(found: Findings) -> list[tuple[str, str, str]]:
    """Return the numbers to be seen first."""
    shown = []
    if own := found.summary.get(MAIN):
        spread = "one seed" if own["sd"] is None else f"± {own['sd']:.2f} over {own['n']} seeds"
        shown.append(("Test top-1, as found", f"{own['mean']:.2f} %", spread))
    if gap := found.summary.get("difference_tuned"):
        sure = (
            f"95 % interval {gap['low']:+.2f} to {gap['high']:+.2f}"
            if gap["se"] is not None
            else "one seed"
        )
        shown.append(("Against kd, tuned", f"{gap['mean']:+.2f} points", sure))
    if found.best is not None:
        shown.append(
            (
                "Best trial",
                f"{found.best.top1:.2f} %",
                f"{found.base.judged}, trial {found.best.label}",
            )
        )
    if found.grid:
        total = len(found.students) * found.settings.refit.seeds
        done = sum(map(len, found.refits.values()))
        shown.append(("Runs", f"{done} of {total}", f"of {len(found.students)} cells"))
    ended = [trial for trials in found.trials.values() for trial in trials]
    counts = Counter(trial.state for trial in ended)
    each = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    if not found.grid:
        shown.append(("Trials", str(len(ended)), each or "none has begun"))
    gpu = f"{found.gpu_seconds / 3600:.2g} GPU hours" if found.gpu_seconds else "no GPU"
    shown.append(("Time", duration(found.seconds), gpu))
    return shown


def verdict(found: Findings) -> str:
    """Return in one sentence whether the search was worth it: the paired difference to plain distillation, tuned as well."""
    gap, own = found.summary.get("difference_tuned"), f"{found.students[MAIN].label} as found"
    other = "kd tuned by as many trials"
    if gap is None:
        return (
            f"No seed has refits of both {own} and kd tuned yet, so that they cannot be compared."
        )
    if gap["se"] is None:
        return f"On a single seed {own} differs from {other} by {gap['mean']:+.2f} points of test top-1, which can mislead."
    said = f"{gap['mean']:+.2f} points of test top-1, 95 % interval {gap['low']:+.2f} to {gap['high']:+.2f}, paired over "
    said += f"{gap['n']} seeds, {gap['wins']} of {gap['n']} wins"
    if gap["low"] == gap["high"] == 0:
        return f"Both are the same: {own}, and {other}."
    if gap["low"] <= 0 <= gap["high"]:
        return f"These seeds do not tell {own} from {other}: {said}."
    return f"With {own} the student is {'better' if gap['mean'] > 0 else 'worse'} than with {other}: {said}."


def summary(found: Findings) -> list[Block]:
    """Return the table that the terminal shows at the end."""
    cells = columns(found.summary, found.base.selection)
    rows = list(zip(*cells.values(), strict=True))
    if not rows:
        return [Text("No refit has read its test rows yet, so that there is no summary.", "soft")]
    seeds = max(entry.get("n", 0) for entry in found.summary.values() if entry)
    numbers = []
    for name in (name for name in (*TEACHERS, *found.students) if name in found.summary):
        entry, gap = found.summary[name], found.summary[name].get("difference") or {}
        numbers.append(
            (
                name,
                top1_of(entry),
                entry["sd"],
                entry["n"],
                *(gap.get(k) for k in ("mean", "low", "high", "wins")),
            )
        )
    own = None if found.grid else found.students[MAIN].title
    return [
        Table(
            header=["", *list(cells)[1:]],
            rows=rows,
            right=range(1, len(cells)),
            strong=next((k for k, row in enumerate(rows) if row[0] == own), None),
            name="summary",
            csv=escape.to_csv(
                ("model", "test_top1", "sd", "seeds", "against_kd", "low", "high", "wins"), numbers
            ),
        ),
        Text(
            f"Mean ± standard deviation over {seeds} seeds; differences are paired by seed."
            if seeds > 1
            else "A single seed can mislead by points; see refit.seeds.",
            "soft",
        ),
    ]


def best(found: Findings) -> list[Block]:
    """Return the best setting, and the lines that reproduce it and hand it over."""
    if found.best is None or found.config is None:
        return [Text("No trial has finished yet.", "soft")]
    ran = flatten(to_dict(found.config))
    keys = dict.fromkeys((*found.best.params, "loss.temperature_of", "clip.scale"))
    blocks: list[Block] = [
        Table(
            header=("key", "value"),
            rows=[(key, brief(ran[key], DIGITS)) for key in keys if key in ran],
        )
    ]
    if found.origin is not None:
        blocks.append(Text(f"This is {found.origin}.", "soft"))
    blocks.append(
        Text(
            f"Trial {found.best.label} reached {found.best.top1:.2f} % on {found.base.judged} rows with it."
        )
    )
    run: dict[str, Any] = {}
    if found.seed is not None:
        run = found.runs[MAIN][found.seed]
        tested = run["metrics"]["test/top1"], run["metrics"]["best_val_top1"]
        blocks.append(
            Text(
                f"Of its refits that of seed {found.seed} is the best on {found.base.judged} rows: {tested[1]:.2f} %, and "
                f"{tested[0]:.2f} % on test rows. This distils it again, to the same bits on a processor of the same kind:"
            )
        )
    else:
        blocks.append(Text("No refit of it has finished yet. This distils it:"))
    command = command_of(found.config, threads=run.get("threads"), workers=run.get("workers", 1))
    blocks.append(Code(command, wrap=True))
    if found.state == "finished":
        blocks.append(Text("This verifies its checkpoint, and hands over a copy:"))
        blocks.append(Code(f"python -m tune best {called(found.folder)} --copy-to student"))
    return blocks


def diagnosed(found: Findings) -> list[Block]:
    """Return what was told of the teachers before the search, and how close it came."""
    if found.diagnosis is None:
        return []
    return [
        Heading("What was told before"),
        Text(found.diagnosis["verdict"]),
        *(Text(line) for line in closeness(found)),
        Details("The teachers, alone and fused", in_short(found.diagnosis)),
        Text("All that can be told of them, as a page of its own:"),
        Code(f"python -m richkd diagnose {shlex.quote(short(found.folder / 'config.yaml'))}"),
    ]


def evaluated(found: Findings) -> list[Block]:
    """Return what the students are like beyond their accuracy, as far as `tune evaluate` has looked at them."""
    blocks: list[Block] = []
    rows, numbers, calibrations, note = [], [], {}, ""
    for name, own in found.evaluations.items():
        title, sure, rest = found.students[name].title, own["calibration"]["student"], [""] * 3
        values = [own["test"]["top1"], sure["ece"], sure["nll"]]
        if "corruption" in own:
            attacked = own["attack"]
            values += [own["corruption"]["mean"], attacked["fgsm"][-1], attacked["pgd"][-1]]
            rest = [f"{value:.2f}" for value in values[3:]]
            note = (
                f" Corrupted: mean over families and severities of {own['corruption']['rows']} rows, "
                f"{own['corruption']['kind']} images; attacks at {attacked['eps'][-1]}/255."
            )
        agrees = own["agreement"].get("teacher")
        first = [title, f"{values[0]:.2f}", f"{values[1]:.2f}", f"{values[2]:.3f}"]
        rows.append([*first, *rest, "" if agrees is None else f"{agrees:.2f}"])
        numbers.append((name, *values, *[None] * (6 - len(values)), agrees))
        calibrations[name] = calibration_of(own)
    header = ("", "top-1, %", "ECE, %", "NLL", "corrupted", "FGSM", "PGD", "agrees with teacher")
    if rows:
        blocks += [
            Heading("Beyond accuracy"),
            Table(
                header=header,
                rows=rows,
                right=range(1, len(header)),
                name="evaluations",
                csv=escape.to_csv(
                    ("model", "top1", "ece", "nll", "corrupted", "fgsm", "pgd", "agreement"),
                    numbers,
                ),
            ),
            Text(
                f"Test rows, looked at again after all was chosen; one seed each, which can mislead by points.{note}",
                "soft",
            ),
        ]
    if 0 < len(calibrations) <= BESIDE:
        titles = {name: found.students[name].title for name in calibrations}
        blocks.append(Pictures([reliability(calibrations, titles=titles)]))
    if drawn := stored(found.folder / EXPLAIN):
        blocks += [Heading("Where they look, and what fusing did"), Pictures(drawn)]
    return blocks


def closeness(found: Findings) -> list[str]:
    """Return how close the theory's weight came to what the search found; nothing where no weight was recommended."""
    told = found.diagnosis or {}
    weight = told.get("alpha_star", {}).get("full")
    if weight is None or found.best is None:
        return []
    own, scale = flatten(to_dict(found.config)), told["scale"]
    said = (
        f"The theory's weight is alpha {weight:.2f} at clip.scale {scale}, of the fused teacher's errors; the search found "
        f"{own['fusion.alpha']:.2f}, of the student's accuracy."
    )
    for key in ("clip.prompts", "clip.logits"):
        if key in found.best.params and own[key] != told["prompts"]:
            said += f" It found other prompts, too: {own[key]}."
    start = next((trial for trial in found.main if trial.source == THEORY), None)
    if start is None or start.top1 is None:
        return [said]
    reached = f"{start.top1:.2f} % on {found.base.judged} rows"
    if start.state != "finished":
        reached += f" until it was stopped after {start.epochs} epochs"
    gap = found.best.top1 - start.top1
    best = (
        "that is the best trial"
        if start.number == found.best.number
        else f"the best trial {gap:.2f} points more"
    )
    return [said, f"The trial that began there reached {reached}, {best}."]


def leaderboard(found: Findings) -> list[Block]:
    """Return the best trials of each search."""
    blocks: list[Block] = []
    for search, trials in found.trials.items():
        leading = ranked(trials)
        if not leading:
            blocks.append(
                Text(f"No trial of {found.students[search].label} has reported yet.", "soft")
            )
            continue
        keys = list(dict.fromkeys(key for trial in trials for key in trial.params))
        costs = found.objectives[1:] if search == MAIN else ()
        header = [
            "trial",
            "state",
            f"{found.base.part} top-1, %",
            *costs,
            *map(parameter, keys),
            "epochs",
            "remark",
        ]
        rows = [
            [
                trial.label,
                trial.state,
                f"{trial.top1:.2f}",
                *(
                    brief(v, DIGITS)
                    for v in (*trial.values[1:], *[None] * len(costs))[: len(costs)]
                ),
                *(brief(trial.shown().get(key), DIGITS) for key in keys),
                str(trial.epochs),
                remark(found, trial),
            ]
            for trial in leading[:LEADING]
        ]
        numbers = [
            3 + len(costs) + place
            for place, key in enumerate(keys)
            if all(number(trial.params.get(key, 0)) for trial in trials)
        ]
        table = Table(
            header=header,
            rows=rows,
            right=[2, *range(3, 3 + len(costs)), *numbers, len(header) - 2],
            strong=0 if search == MAIN and leading[0].state == "finished" else None,
            name="leaderboard" if search == MAIN else f"leaderboard-{search}",
            csv=escape.to_csv(
                ("trial", "state", "val_top1", *costs, *keys, "epochs", "seconds", "duplicate_of"),
                [
                    (
                        *(trial.label, trial.state, trial.top1),
                        *(*trial.values[1:], *[""] * len(costs))[: len(costs)],
                        *(trial.shown().get(key, "") for key in keys),
                        *(trial.epochs, trial.seconds, trial.duplicate_of),
                    )
                    for trial in leading
                ],
            ),
        )
        if search == MAIN:
            blocks.append(table)
            more = (
                f"The best {len(rows)} of {len(leading)} trials. "
                if len(leading) > len(rows)
                else ""
            )
            blocks.append(
                Text(
                    f"{more}Finished ones come first; pruned ones were stopped early, and show the best epoch until then. "
                    f"T is relative to {plots.LOGITS[found.temperature_of]}.",
                    "soft",
                )
            )
        else:
            blocks.append(Details(f"Trials of {found.students[search].label}", [table]))
    return blocks


def remark(found: Findings, trial: Trial) -> str:
    """Return what is to be known of a trial."""
    said = []
    if trial.duplicate_of is not None:
        said.append(f"the result of {trial.duplicate_of:03d}, whose settings are the same")
    if trial.settings.get("loss.temperature_of") == "fused" and found.temperature_of == "task":
        own = of_preset(found.base.method.name)
        said.append(own if trial.shown().get("fusion.alpha") != 1 else "plain kd")
        if trial.shown().get("fusion.alpha", 1) != 1:
            said.append("T of the fused logits")
    if trial.source not in (None, PAPER):
        said.append(f"from {trial.source}")
    return ", ".join(said)


def failures(found: Findings) -> list[Block]:
    """Return what failed, by class."""
    if not found.failures:
        return []
    classes: dict[str, list[tuple[str, str]]] = {}
    for job, why in found.failures.items():
        classes.setdefault(why.kind, []).append((job, why.text))
    rows = [
        (kind, str(len(those)), job, text)
        for kind, those in sorted(classes.items())
        for job, text in those[:1]
    ]
    each = [(kind, job, text) for kind, those in sorted(classes.items()) for job, text in those]
    return [
        Heading("Failures"),
        Table(
            header=("class", "runs", "the first", "what happened"),
            rows=rows,
            right=(1,),
            name="failures",
            csv=escape.to_csv(("class", "run", "what_happened"), each),
        ),
        Details(
            f"Each of {len(each)}"
            if len(each) <= FAILURES
            else f"The first {FAILURES} of {len(each)}",
            [Table(header=("class", "run", "what happened"), rows=each[:FAILURES])],
        ),
    ]


def constants(found: Findings) -> list[Block]:
    """Return config, code, packages and machine, and how to look further."""
    code = found.environment
    run = next((run for runs in found.runs.values() for run in runs.values()), {})
    facts = [
        (
            "data",
            f"{found.base.data.source}, digest {run['data'][:12]}"
            if "data" in run
            else found.base.data.source,
        ),
        ("code", code.get("commit") or "not in a repository"),
        ("python", code.get("python", run.get("python", "-"))),
        ("machine", f"{code['platform']}, {code['cores']} cores" if "platform" in code else "-"),
        ("threads of a run", str(run.get("threads", "-"))),
    ]
    packages = code.get("packages", {})
    settings = "".join(
        f"{name}:\n"
        + "".join(f"  {line}\n" for line in dump(getattr(found.settings, name)).splitlines())
        for name in SECTIONS
    )
    blocks: list[Block] = [Table(header=("what", "value"), rows=facts)]
    if packages:
        blocks.append(
            Details("Packages", [Table(header=("package", "version"), rows=list(packages.items()))])
        )
    return [
        *blocks,
        Details("Settings of the sweep", [Code(settings.rstrip())]),
        Details("Config beneath all runs", [Code(dump(found.base).rstrip())]),
        *again(found),
    ]


def again(found: Findings) -> list[Block]:
    """Return how to look further."""
    line = f"python -m tune report {called(found.folder)}"
    if found.grid:
        return [Text("This writes the report anew:"), Code(line)]
    study = found.settings.sweep.study or f"sqlite:///{short(found.folder / 'study.db')}"
    return [
        Text(
            "This writes the report anew, and this shows the trials while they run, at 127.0.0.1:8080:"
        ),
        Code(f"{line}\noptuna-dashboard {study}"),
    ]


def lines(found: Findings, file: Path) -> list[str]:
    """Return what the terminal says of a report: where it is, and the leaders."""
    said = [
        f"report     {short(file)}",
        *(block.text for block in unfinished(found)),
        *([] if found.grid else [verdict(found)]),
        *([found.base.caution] if found.base.caution else []),
        *closeness(found)[:1],
    ]
    for trial in ranked(found.main)[:5]:
        shown = escape.line(describe(trial.told()))
        part = found.base.part
        said.append(f"trial {trial.label}  {trial.state:<9} {part} {trial.top1:6.2f}  {shown}")
    if found.grid:
        return said
    study = found.settings.sweep.study or f"sqlite:///{short(found.folder / 'study.db')}"
    return [*said, f"live       optuna-dashboard {study}"]


def answer(found: Findings, file: Path) -> dict[str, Any]:
    """Return what `--json` says of a report: its files, and the leaders."""
    return {
        "sweep": found.name,
        "state": found.state,
        "selection": found.base.selection,
        "html": str(file),
        "markdown": str(file.with_suffix(".md")),
        "csv": sorted(map(str, file.parent.glob("*.csv"))),
        "verdict": None if found.grid else verdict(found),
        "leading": [
            {
                "trial": trial.label,
                "state": trial.state,
                "val_top1": trial.top1,
                "params": trial.shown(),
            }
            for trial in ranked(found.main)[:5]
        ],
    }
