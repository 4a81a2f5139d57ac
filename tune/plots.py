"""Pictures of a sweep, each with the table behind it: of the rows that the sweep chooses on, unless the title says test."""

import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.ticker import MaxNLocator

from richkd.draw import (
    COLOURS,
    EMPTY,
    GREY,
    NARROW,
    SCALE,
    WIDE,
    Picture,
    beside,
    canvas,
    cut,
    dots,
    drawable,
    nothing,
    number,
    parameter,
    save,
    shades,
)
from tune.findings import FEW, Findings, Trial, comparable, importance
from tune.study import MAIN
from tune.summary import TEACHERS, spread

ALPHA, TEMPERATURE, PROMPTS = "fusion.alpha", "loss.temperature", "clip.prompts"
STUDENT = "student.name"
LABELS = 12  # of points on a front; half as many have room for the name of a student
TOGETHER = 4  # trials that a point names
LOGITS = {"task": "the task teacher's logits", "fused": "the fused logits"}
COSTS = {"parameters": "parameters of the student", "latency": "latency, ms an image"}


def pictures(found: Findings) -> list[Picture]:
    """Return all pictures of a sweep, in the order of a report."""
    if found.grid:
        return [students(found)]
    draw = [students, alpha, heat, importances, prompts]
    draw += [pareto] if len(found.objectives) > 1 else []
    draw += [parallel, history, curves]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a layout in which a very long name leaves no room
        return [one(found) for one in draw]


def judged(found: Findings, epoch: int | None = None) -> str:
    """Return what trials are judged by; `comparable` says at which epoch."""
    after = "" if epoch is None else f", after epoch {epoch}"
    return f"{found.base.judged} top-1, %{after}"


def why(epoch: int | None) -> str:
    """Return why trials are judged at an epoch, as the sentence of a picture."""
    if epoch is None:
        return "All trials ran to their end."
    return f"Trials are compared after epoch {epoch}, which all of them reached, since some were stopped early."


def students(found: Findings) -> Picture:
    """Draw test accuracy of each student: the seeds, their mean and deviation."""
    title, name = "Test accuracy of each student", "students"
    rows = [
        (student, seed, metrics["test/top1"])
        for student, runs in found.refits.items()
        for seed, metrics in runs.items()
    ]
    if not rows:
        return nothing(name, title, "No refit has read its test rows yet.")
    drawn = [student for student in found.students if student in found.refits][::-1]
    with canvas(NARROW, 1.5 + 0.48 * len(drawn)) as (figure, axes):
        for place, student in enumerate(drawn):
            values = [value for one, _, value in rows if one == student]
            both = spread(values)
            colour = COLOURS.get(student, COLOURS[MAIN])
            axes.errorbar(
                both["mean"], place, xerr=both["sd"], fmt="o", ms=8, color=colour, lw=2, capsize=4
            )
            jitter = place + 0.24 + 0.03 * (np.arange(len(values)) % 4)
            axes.scatter(values, jitter, s=14, color=colour, alpha=0.55, lw=0)
        for teacher, label in TEACHERS.items():
            if teacher in found.summary:
                top1 = found.summary[teacher]["top1"]
                axes.axvline(
                    top1,
                    color=COLOURS[teacher],
                    lw=1.6,
                    ls=(0, (4, 2)),
                    label=f"{label} {top1:.1f}",
                )
        axes.set_yticks(range(len(drawn)), [found.students[student].title for student in drawn])
        axes.set_ylim(-0.5, len(drawn) - 0.3)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("test top-1, %")
        axes.set_title(title)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.6)
        return Picture(
            name=name,
            title=title,
            text="Large dots and bars are mean and standard deviation over seeds, small dots the seeds; a seed varies "
            "the labelled subset, teacher, initial weights and order. Dashed lines are the teachers.",
            header=("student", "seed", "test_top1"),
            rows=rows,
            **save(figure),
        )


def alpha(found: Findings) -> Picture:
    """Draw validation accuracy along alpha: the trials, and what ran over several seeds with its deviation."""
    title, name = "Accuracy along alpha", "alpha"
    tried = [t for t in found.main if t.top1 is not None and number(t.shown().get(ALPHA))]
    repeated = {
        student: (
            found.configs[student].fusion.alpha,
            spread([metrics["best_val_top1"] for metrics in runs.values()]),
        )
        for student, runs in found.refits.items()
        if student != "ce"  # without a target
    }
    if not tried and not repeated:
        return nothing(name, title, "No trial has reported an accuracy yet.")
    rows: list[tuple] = []
    strong = [t.top1 for t in tried if t.state == "finished"]
    strong += [
        both["mean"] + sign * (both["sd"] or 0) for _, both in repeated.values() for sign in (-1, 1)
    ]
    with canvas() as (figure, axes):
        low = cut(axes, [t.top1 for t in tried], strong)
        for state, label in (
            ("pruned", "stopped early, at its best epoch"),
            ("running", "under way"),
            ("finished", "finished, at its best epoch"),
        ):
            those = [t for t in tried if t.state == state]
            dots(
                axes,
                [(t.shown()[ALPHA], t.top1) for t in those],
                low,
                strong=state == "finished",
                label=label,
            )
            for t in those:
                sd = spread(list(t.seeds))["sd"] if t.seeds and state == "finished" else None
                if sd is not None:
                    axes.errorbar(t.shown()[ALPHA], t.top1, yerr=sd, color=GREY, lw=1, capsize=2)
                n = len(t.seeds) or found.settings.sweep.seeds_per_trial
                rows.append((f"trial-{t.label}", state, t.shown()[ALPHA], t.top1, sd, n, t.epochs))
        places = beside([at for at, _ in repeated.values()])
        for (student, (at, both)), place in zip(repeated.items(), places, strict=True):
            axes.errorbar(
                place,
                both["mean"],
                yerr=both["sd"],
                fmt="D",
                ms=7,
                color=COLOURS[student],
                lw=2,
                capsize=4,
                zorder=4,
                label=f"{found.students[student].title}, {seeds(both['n'])}",
            )
            n, sd = both["n"], both["sd"]
            rows.append((student, "refit", at, both["mean"], sd, n, found.base.train.epochs))
        axes.set_xlim(-0.03, max(1.03, *places, 0) + 0.02)
        axes.set_xlabel(f"alpha, the task teacher's weight, at {scale_of(found)}")
        axes.set_ylabel(judged(found))
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, handlelength=1.4)
        return Picture(
            name=name,
            title=title,
            text="Round dots are trials, in which the other parameters vary, too; triangles lie below the picture. "
            "Diamonds ran over several seeds, mean ± standard deviation, beside each other where their alphas are close. "
            "CLIP has the weight 1 - alpha; an alpha means something only together with the scale of its logits.",
            header=("run", "state", "alpha", "val_top1", "sd", "seeds", "epochs"),
            rows=rows,
            **save(figure),
        )


def seeds(count: int) -> str:
    """Return a number of seeds in words."""
    return f"{count} seed{'s' * (count != 1)}"


def scale_of(found: Findings) -> str:
    """Return at which scale of CLIP's logits a weight is meant, without which it means nothing."""
    if "clip.scale" in found.space:
        return "each trial's own clip.scale"
    return f"clip.scale {drawable(found.base.clip.scale)}"


def heat(found: Findings) -> Picture:
    """Draw validation accuracy over alpha and temperature: means of cells, the trials over them."""
    title, name = "Temperature and alpha", "heat"
    epoch, values = comparable(found.main)
    those = [
        (trial, value)
        for trial, value in values
        if number(trial.params.get(ALPHA)) and number(trial.params.get(TEMPERATURE))
    ]
    if (
        len({t.params[ALPHA] for t, _ in those}) < 2
        or len({t.params[TEMPERATURE] for t, _ in those}) < 2
    ):
        return nothing(name, title, f"Needs trials that differ in both {ALPHA} and {TEMPERATURE}.")
    x = np.array([trial.params[ALPHA] for trial, _ in those])
    y = np.log2([trial.params[TEMPERATURE] for trial, _ in those])
    z = np.array([value for _, value in those])
    bounds = np.log2(_range(TEMPERATURE, found.space[TEMPERATURE], those))
    bins = min(max(round(len(those) ** 0.5), 4), 10)
    sides = [np.linspace(0, 1, bins + 1), np.linspace(*bounds, bins + 1)]
    total, _, _ = np.histogram2d(x, y, bins=sides, weights=z)
    count, _, _ = np.histogram2d(x, y, bins=sides)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    norm = shades(z)
    with canvas() as (figure, axes):
        axes.pcolormesh(*sides, mean.T, cmap=SCALE, norm=norm, edgecolors="white", linewidth=1)
        axes.scatter(
            *(x, y),
            c=z,
            cmap=SCALE,
            norm=norm,
            s=30,
            edgecolors="white",
            lw=1,
            zorder=3,
            clip_on=False,
        )
        axes.set_facecolor(EMPTY)
        star = {
            "marker": "*",
            "s": 190,
            "color": COLOURS["richkd"],
            "edgecolors": "white",
            "zorder": 4,
        }
        for one in (trial for trial, _ in those if trial is found.best):
            at = one.params[ALPHA], math.log2(one.params[TEMPERATURE])
            axes.scatter(*at, clip_on=False, **star)
        ticks = np.arange(math.ceil(bounds[0]), math.floor(bounds[1]) + 1)
        axes.set_yticks(ticks, [f"{2.0**tick:g}" for tick in ticks])
        axes.set_ylim(*bounds)
        axes.set_xlim(0, 1)
        axes.grid(visible=False)
        axes.set_xlabel(f"alpha at {scale_of(found)}")
        axes.set_ylabel(f"T, of {LOGITS[found.temperature_of]}")
        axes.set_title(title)
        bar = figure.colorbar(ScalarMappable(norm, SCALE), ax=axes, label=judged(found, epoch))
        bar.outline.set_visible(False)
        return Picture(
            name=name,
            title=title,
            text="A cell is the mean of the trials in it, which are the dots; grey was not tried. The star is the best trial. "
            + why(epoch),
            header=("trial", "alpha", "temperature", "epoch", "val_top1"),
            rows=[
                (t.label, t.params[ALPHA], t.params[TEMPERATURE], epoch or t.epochs, value)
                for t, value in those
            ],
            **save(figure),
        )


def importances(found: Findings) -> Picture:
    """Draw which parameters decide whether a trial is among the best."""
    title, name = "Parameter importance", "importance"
    epoch, values = comparable(found.main)
    shares = importance(values)
    if shares is None:
        text = f"Needs at least {FEW} trials that differ; this sweep has {len(values)}."
        return nothing(name, title, text)
    keys = list(shares)[::-1]
    with canvas(NARROW, 1.3 + 0.42 * len(keys)) as (figure, axes):
        axes.barh(
            range(len(keys)), [100 * shares[key] for key in keys], color="#4f94c8", height=0.62
        )
        for place, key in enumerate(keys):
            axes.annotate(
                f"{100 * shares[key]:.0f} %",
                (100 * shares[key], place),
                (4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_yticks(range(len(keys)), [parameter(key) for key in keys])
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 112 * max(shares.values()))
        axes.set_xlabel("share in what makes the best trials the best, %")
        axes.set_title(title)
        return Picture(
            name=name,
            title=title,
            text=f"By Optuna's PED-ANOVA over {len(values)} trials; of few trials it is a hint, no proof. {why(epoch)}",
            header=("parameter", "share", "trials", "epoch"),
            rows=[(key, share, len(values), epoch or "last") for key, share in shares.items()],
            **save(figure),
        )


def prompts(found: Findings) -> Picture:
    """Draw validation accuracy by prompt set, as boxes."""
    title, name = "Prompt sets", "prompts"
    epoch, values = comparable(found.main)
    sets: dict[str, list[tuple[Trial, float]]] = {}
    for trial, value in values:
        if (which := trial.params.get(PROMPTS)) is not None:
            sets.setdefault(str(which), []).append((trial, value))
    if len(sets) < 2:
        return nothing(name, title, f"Needs trials with different {PROMPTS}.")
    order = sorted(sets, key=lambda one: statistics.median(value for _, value in sets[one]))
    with canvas(NARROW, 1.5 + 0.5 * len(order)) as (figure, axes):
        groups = [[value for _, value in sets[one]] for one in order]
        axes.boxplot(
            groups,
            orientation="horizontal",
            positions=range(len(order)),
            widths=0.5,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": "#d8e6f3", "edgecolor": "#4f94c8"},
            medianprops={"color": "#0a2f5c", "lw": 2},
            whiskerprops={"color": "#4f94c8"},
            capprops={"color": "#4f94c8"},
        )
        for place, group in enumerate(groups):
            jitter = place + 0.1 * (np.arange(len(group)) % 3 - 1)
            axes.scatter(group, jitter, s=16, color="#1c5f9e", alpha=0.6, lw=0, zorder=3)
        names = [f"{drawable(one)} ({len(sets[one])})" for one in order]
        axes.set_yticks(range(len(order)), names)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(judged(found, epoch))
        axes.set_title(title)
        return Picture(
            name=name,
            title=title,
            text=f"A dot is a trial, in brackets how many; box and line are quartiles and median. {why(epoch)}",
            header=("prompts", "trial", "epoch", "val_top1"),
            rows=[
                (one, t.label, epoch or t.epochs, value) for one in order for t, value in sets[one]
            ],
            **save(figure),
        )


def parallel(found: Findings) -> Picture:
    """Draw each trial as a line through its parameters to its accuracy."""
    title, name = "Parallel coordinates", "parallel"
    epoch, values = comparable(found.main)
    space = found.space
    if not values or not space:
        return nothing(name, title, "No trial has reported an accuracy yet.")
    values = sorted(values, key=lambda one: one[1])  # the best are drawn last
    norm = shades([value for _, value in values])
    with canvas(WIDE, 4.6) as (figure, axes):
        lines, missing = np.full((len(values), len(space) + 1), -0.12), False
        for place, (key, where) in enumerate(space.items()):
            for line, (trial, _) in enumerate(values):
                if key in trial.params:
                    lines[line, place] = _position(trial.params[key], key, where, values)
            missing = missing or bool((lines[:, place] < 0).any())
        accuracies = np.array([value for _, value in values])
        low, high = accuracies.min(), accuracies.max()
        lines[:, -1] = (accuracies - low) / (high - low) if high > low else 0.5
        smooth = np.linspace(0, 1, 24)
        leading = np.quantile(accuracies, 0.9)
        ease = smooth * smooth * (3 - 2 * smooth)
        for line, value in zip(lines, accuracies, strict=True):
            x = (np.arange(len(space))[:, None] + smooth).ravel()
            y = (line[:-1, None] + np.diff(line)[:, None] * ease).ravel()
            strong = norm(value)
            crowd = 0.85 if value >= leading else 0.85 * min(1, 30 / len(values))
            # of many trials the better ones stand out
            axes.plot(x, y, color=SCALE(strong), lw=1 + 1.2 * max(strong, 0), alpha=crowd)
        for place, (key, where) in enumerate(space.items()):
            _scale(axes, place, key, where, values)
        _ticks(axes, len(space), [(0, f"{low:.1f}"), (1, f"{high:.1f}")])
        axes.set_xticks(range(len(space) + 1), [*map(parameter, space), "top-1, %"])
        axes.set_xlim(-0.15, len(space) + 0.3)
        axes.set_ylim(-0.2 if missing else -0.05, 1.05)
        axes.set_yticks([-0.12] if missing else [], ["not there"] if missing else [])
        axes.grid(visible=False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_title(title)
        keys = list(space)
        return Picture(
            name=name,
            title=title,
            text=f"A line is a trial; the darker, the better. {why(epoch)}",
            wide=True,
            header=("trial", *keys, "epoch", "val_top1"),
            rows=[
                (t.label, *(t.params.get(key, "") for key in keys), epoch or t.epochs, value)
                for t, value in values
            ],
            **save(figure),
        )


def _range(key: str, where: Any, values: Sequence[tuple[Trial, float]]) -> tuple[float, float]:
    """Return the bounds of a number, widened to what was tried, as under a range that has changed."""
    tried = [t.params[key] for t, _ in values if number(t.params.get(key))]
    bounds = [where.low, where.high] if hasattr(where, "low") else []  # of choices what was tried
    return min([*bounds, *tried]), max([*bounds, *tried])


def _position(value: Any, key: str, where: Any, values: Sequence[tuple[Trial, float]]) -> float:
    """Return where a value lies on its axis, from 0 to 1."""
    if (choices := getattr(where, "choices", None)) is not None:
        place = choices.index(value) if value in choices else 0
        return place / (len(choices) - 1) if len(choices) > 1 else 0.5
    low, high = _range(key, where, values)
    if where.log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5


def _scale(
    axes: Axes, place: int, key: str, where: Any, values: Sequence[tuple[Trial, float]]
) -> None:
    """Draw the axis of a parameter."""
    if (choices := getattr(where, "choices", None)) is not None:
        shown = choices if len(choices) <= 8 else (choices[0], choices[-1])
        ticks = [(_position(one, key, where, values), drawable(one, 16)) for one in shown]
    else:
        low, high = _range(key, where, values)
        middle = math.sqrt(low * high) if where.log else (low + high) / 2
        ticks = [
            (_position(one, key, where, values), drawable(float(one)))
            for one in (low, middle, high)
        ]
    _ticks(axes, place, ticks)


def _ticks(axes: Axes, place: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.axvline(place, color=GREY, lw=1, zorder=4)
    for at, text in ticks:
        axes.annotate(
            text,
            (place, at),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            zorder=5,
            bbox={"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 0.8},
        )


def history(found: Findings) -> Picture:
    """Draw what each search had found after how many trials."""
    title, name = "How the search went", "history"
    drawn = {
        search: [t for t in found.trials.get(search, []) if t.top1 is not None]
        for search in (MAIN, "kd")
    }
    every = [trial for those in drawn.values() for trial in those]
    if not every:
        return nothing(name, title, "No trial has reported an accuracy yet.")
    rows: list[tuple] = []
    with canvas(WIDE, 3.8) as (figure, axes):
        low = cut(axes, [t.top1 for t in every], [t.top1 for t in every if t.state == "finished"])
        step = 0.03 * (axes.get_ylim()[1] - low)
        for rank, (search, those) in enumerate(drawn.items()):
            label, colour = (
                found.students[search].label,
                COLOURS[MAIN if search == MAIN else "kd_tuned"],
            )
            for strong in (False, True):
                points = [(t.number, t.top1) for t in those if (t.state == "finished") == strong]
                dots(axes, points, low, strong=strong, colour=colour, floor=low - rank * step)
            best: list[float] = []
            for trial in those:
                before = best[-1] if best else math.nan
                best.append(np.fmax(before, trial.top1) if trial.state == "finished" else before)
                shown = "" if math.isnan(best[-1]) else best[-1]
                rows.append((search, trial.label, trial.state, trial.top1, shown, trial.seconds))
            axes.step(
                [t.number for t in those], best, where="post", color=colour, lw=2, label=label
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("trial")
        axes.set_ylabel(judged(found))
        axes.set_title(title)
        figure.legend(loc="outside lower center", title="best so far", ncols=2)
        return Picture(
            name=name,
            title=title,
            text="Lines are the best finished trial so far; dots are trials, pale where stopped early, triangles where below "
            "the picture. A line that still climbs at its end asks for more trials.",
            wide=True,
            header=("search", "trial", "state", "val_top1", "best_so_far", "seconds"),
            rows=rows,
            **save(figure),
        )


def curves(found: Findings) -> Picture:
    """Draw how accuracy grew: the trials of the main search, and each student's refits."""
    title, name = "Learning curves", "curves"
    rows = [
        (f"trial-{t.label}", "", epoch, value)
        for t in found.main
        for epoch, value in t.curve.items()
    ]
    rows += [
        (student, seed, epoch, value)
        for student, runs in found.curves.items()
        for seed, curve in runs.items()
        for epoch, value in curve.items()
    ]
    if not rows:
        return nothing(name, title, "No run has reported an epoch yet.")
    with canvas(WIDE, 4.4, ncols=2, sharey=True) as (figure, (left, right)):
        for trial in found.main:
            best = found.best is not None and trial.number == found.best.number
            style = {
                "color": COLOURS["richkd"],
                "lw": 2.2,
                "zorder": 4,
                "label": f"trial-{trial.label}, best",
            }
            plain = {"color": GREY, "lw": 0.9, "alpha": 0.45}
            left.plot(*_steps(trial.curve), **(style if best else plain))
            if trial.state == "pruned" and trial.curve:
                left.scatter(trial.epochs, trial.top1, s=9, color=GREY, alpha=0.7, lw=0)
        for student, runs in found.curves.items():
            each = [curve for curve in runs.values() if curve]
            epochs = sorted(set.intersection(*map(set, each))) if each else []
            if not epochs:
                continue
            values = np.array([[curve[epoch] for epoch in epochs] for curve in each])
            colour, label = COLOURS[student], found.students[student].title
            right.plot(epochs, values.mean(0), color=colour, lw=2, label=label)
            if len(each) > 1:
                sd = values.std(0, ddof=1)
                right.fill_between(
                    epochs, values.mean(0) - sd, values.mean(0) + sd, color=colour, alpha=0.13, lw=0
                )
        for axes, what in (
            (left, f"Trials of {found.students[MAIN].label}"),
            (right, "Refits, mean ± sd over seeds"),
        ):
            axes.set_title(what)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc="lower right")
        last = [
            curve[max(curve)] for runs in found.curves.values() for curve in runs.values() if curve
        ]
        last += [trial.top1 for trial in found.main if trial.curve]
        left.set_ylim(
            max(0, min(np.percentile(last, 10) - 25, max(last) - 10)), min(100.5, max(last) + 3)
        )
        left.set_ylabel(judged(found))
        return Picture(
            name=name,
            title=title,
            text="Left each trial, with a dot where it was stopped early; right each student's refits. The first epochs "
            "may lie below the picture.",
            wide=True,
            header=("run", "seed", "epoch", "val_top1"),
            rows=rows,
            **save(figure),
        )


def _steps(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def pareto(found: Findings) -> Picture:
    """Draw accuracy against each cost, and the trials that are the best at theirs."""
    title, name = "Accuracy against cost", "pareto"
    finished = [trial for trial in found.main if trial.state == "finished"]
    those = [trial for trial in finished if trial.duplicate_of is None]
    if not those:
        return nothing(name, title, "No trial has finished yet.")
    costs = found.objectives[1:]
    with canvas(WIDE, 3.9, ncols=len(costs), sharey=True, squeeze=False) as (
        figure,
        panels,
    ):
        for place, (axes, cost) in enumerate(zip(panels[0], costs, strict=True), 1):
            points = [(t.values[place], t.values[0]) for t in those if not t.front]
            if points:
                axes.scatter(
                    *zip(*points, strict=True),
                    s=28,
                    color=GREY,
                    alpha=0.4,
                    lw=0,
                    label="beaten",
                )
            texts = labels(found, place)
            x, y = zip(*texts, strict=True)
            if len(costs) == 1:
                axes.step(x, y, where="post", color=COLOURS["richkd"], lw=1.4, zorder=2)
            axes.scatter(
                x, y, s=46, color=COLOURS["richkd"], lw=0, zorder=3, label="front: nothing beats it"
            )
            for at, text in list(texts.items())[:LABELS]:
                axes.annotate(text, at, (5, -11), textcoords="offset points", fontsize=8.5)
            axes.set_xlabel(COSTS.get(cost, drawable(cost)))
            if min(x) > 0 and max(t.values[place] for t in those) > 8 * min(
                t.values[place] for t in those
            ):
                axes.set_xscale("log")
        panels[0][0].set_ylabel(judged(found))
        panels[0][0].set_title(title)
        panels[0][0].margins(y=0.12)  # for a label below the lowest point
        figure.legend(
            *panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2
        )
        return Picture(
            name=name,
            title=title,
            text="A trial on the front has no other that is better in one of these and as good in the rest; above and to the "
            "left is better. Numbers are those of the trials.",
            wide=True,
            header=("trial", "front", *found.objectives),
            rows=[(t.label, "yes" if t.front else "no", *t.values) for t in those],
            **save(figure),
        )


def labels(found: Findings, place: int) -> dict[tuple[float, float], str]:
    """Return what stands beside each point of the front, by cost and top-1: its trials, and their student if there is room.

    Args:
        found: Of several objectives.
        place: Of the cost among them.
    """
    points: dict[tuple[float, float], list[Trial]] = {}
    for trial in sorted(found.front, key=lambda trial: (trial.values[place], trial.values[0])):
        points.setdefault((trial.values[place], trial.values[0]), []).append(trial)
    texts = {}
    for at, those in points.items():
        numbers = [trial.label for trial in sorted(those, key=lambda trial: trial.number)]
        texts[at] = ", ".join(numbers[:TOGETHER]) + " …" * (len(numbers) > TOGETHER)
        names = {trial.params.get(STUDENT) for trial in those}
        if len(names) == 1 and None not in names and len(points) <= LABELS / 2:
            texts[at] = f"{drawable(names.pop())}: {texts[at]}"
    return texts
