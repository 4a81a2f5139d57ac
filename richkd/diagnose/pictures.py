"""Pictures of a diagnosis, each with the table behind it: the task teacher green, CLIP pink, the fused teacher dark."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes

from richkd.diagnose import called
from richkd.draw import (
    COLOURS,
    GREY,
    INK,
    NARROW,
    WIDE,
    Picture,
    canvas,
    cut,
    drawable,
    save,
)
from richkd.evaluate.calibration import Bin, Calibration
from richkd.evaluate.pictures import reliability

RIGHT, HALF_RIGHT, HALF_WRONG, WRONG = "#1c5f9e", "#9cc3e0", "#f0c3a8", "#b5482a"
BAND = "#d8e6f3"  # weights that are about as good as the best
DASHED = (0, (4, 2))
FEW = 30  # rows below which a share is not said
ENDS = 10  # classes at either end that are shown
ROOM = 5  # percent of a bar that has room for its number
CELLS = {  # of Figure 1
    "right_certain": ("right, certain", RIGHT),
    "right_uncertain": ("right, uncertain", HALF_RIGHT),
    "wrong_uncertain": ("wrong, uncertain", HALF_WRONG),
    "wrong_certain": ("wrong, certain", WRONG),
}
WHO = {"teacher": "task teacher", "clip": "CLIP", "fused": "fused"}


def pictures(found: Mapping[str, Any]) -> list[Picture]:
    """Return the pictures of a diagnosis, as `diagnose` returns it."""
    draw = (along, prompts, outcomes, figure1, error, target, reliable, classes)
    return [one(found) for one in draw]


def named(found: Mapping[str, Any]) -> dict[str, str]:
    """Return what each prompt set is called; all of its name where two would be called alike."""
    short = {each["prompts"]: called(each["prompts"]) for each in found["clip"]}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


def chosen(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what was found of CLIP with the prompt set that fuses best."""
    return next(each for each in found["clip"] if each["prompts"] == found["prompts"])


def share(count: int, total: int) -> float | None:
    """Return a share in percent, None where too few rows are counted."""
    return 100 * count / total if count >= FEW else None


def weight(found: Mapping[str, Any]) -> str:
    """Return what a weight is, on which scale."""
    return f"alpha, the task teacher's weight, at clip.scale {drawable(found['scale'])}"


def along(found: Mapping[str, Any]) -> Picture:
    """Draw the accuracy of the fused teacher along alpha, and below it the weight that each rule gives."""
    title, fused, best = "Fused teacher along alpha", found["fused"], found["best"]
    rules = found["rules"] if found["helps"] is not None else {}
    x, y = ([each[key] for each in found["curve"]] for key in ("alpha", "top1"))
    flat = {
        "teacher": ("task teacher", found["teacher"]["top1"]),
        "clip": (f"CLIP, {drawable(named(found)[found['prompts']], 16)}", chosen(found)["top1"]),
    }
    options = {"squeeze": False, "sharex": True, "nrows": 1 + bool(rules)}
    if rules:
        options["height_ratios"] = (4, 0.3 + 0.27 * len(rules))
    with canvas(NARROW, 5.2 if rules else 4.2, **options) as (figure, both):
        axes = both[0, 0]
        low = cut(axes, y, [flat["teacher"][1], best["top1"]])
        if found["plateau"] is not None:
            for one in both[:, 0]:
                one.axvspan(*found["plateau"], facecolor=BAND, edgecolor=BAND, lw=3, zorder=0)
        for who, (label, top1) in flat.items():
            style = {"color": COLOURS[who], "lw": 1.6, "ls": DASHED}
            axes.plot((0, 1), (top1, top1), label=f"{label} {top1:.2f}", **style)
        axes.plot(x, y, "o-", color=COLOURS["fused"], lw=2, ms=4.5, label="fused")
        at = best["alpha"], best["top1"]
        label = f"best {at[1]:.2f} at {at[0]:g}"
        axes.plot(*at, "o", color=COLOURS["fused"], ms=8.5, label=label)
        if fused["top1"] >= low:
            axes.plot(
                *(fused["alpha"], fused["top1"]), "D", color="white", mec=COLOURS["fused"], mew=1.6, ms=7,
                label=f"fusion.alpha {fused['alpha']:g}: {fused['top1']:.2f}",
            )  # fmt: skip
        axes.set_ylabel("top-1, %")
        axes.set_title(title)
        if rules:
            _rules(both[1, 0], rules)
        both[-1, 0].set_xlim(-0.02, 1.02)
        both[-1, 0].set_xlabel(weight(found))
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.8)
        drawn = save(figure)
    text = "Alpha 1 is the task teacher alone, alpha 0 CLIP alone; the dashed lines are these two."
    if flat["clip"][1] < low:
        text += " CLIP alone lies below the picture."
    if found["plateau"] is not None:
        text += " Weights within half a point of the best are shaded."
    if rules:
        text += " Below, the weight that each rule gives, and beside it top-1 on rows that the rule was not fitted on."
    return Picture(
        name="diagnosis-alpha",
        title=title,
        text=text,
        header=("what", "alpha", "top1"),
        rows=[
            *(("curve", each["alpha"], each["top1"]) for each in found["curve"]),
            ("configured", fused["alpha"], fused["top1"]),
            *((f"rule {name}", each["alpha"], each["top1"]) for name, each in rules.items()),
        ],
        **drawn,
    )


def _rules(axes: Axes, rules: Mapping[str, Mapping[str, float]]) -> None:
    """Draw the weight of each rule in a line of its own, so that equal ones are told apart."""
    for place, each in enumerate(rules.values()):
        axes.plot(each["alpha"], place, "o", color=RIGHT, ms=6)
        left = each["alpha"] > 0.8
        axes.annotate(
            f"{each['top1']:.2f}", (each["alpha"], place), (-8 if left else 8, 0), textcoords="offset points",
            va="center", ha="right" if left else "left", fontsize=9, color=GREY,
        )  # fmt: skip
    axes.set_yticks(range(len(rules)), list(rules))
    axes.set_ylim(len(rules) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def prompts(found: Mapping[str, Any]) -> Picture:
    """Draw of each prompt set CLIP alone, the best fused teacher, and what it gains out of the bag."""
    title, names = "Prompt sets", named(found)
    order = sorted(found["clip"], key=lambda each: each["best"]["top1"])
    gains = [each["gain"] for each in order]
    labels = [drawable(names[each["prompts"]], 20) for each in order]
    if len(order) > 1:
        gains, labels = [found["gain"], *gains], ["chosen by fusion", *labels]
    first, top1 = len(labels) - len(order), found["teacher"]["top1"]
    with canvas(NARROW, 2.0 + 0.42 * len(labels), ncols=2, sharey=True) as (figure, axes):
        left, right = axes
        for place, each in enumerate(order, first):
            ends = each["top1"], each["best"]["top1"]
            left.plot(ends, (place, place), color="#c9ced4", lw=2, zorder=2)
            for who, value in zip(("clip", "fused"), ends, strict=True):
                label = {"clip": "CLIP alone", "fused": "fused at its best weight"}[who]
                left.plot(
                    *(value, place), "o", color=COLOURS[who], ms=8, zorder=3,
                    label=label if place == first else None,
                )  # fmt: skip
        left.axvline(
            top1, color=COLOURS["teacher"], lw=1.6, ls=DASHED, label=f"task teacher {top1:.2f}"
        )
        for place, gain in enumerate(gains):
            own = RIGHT if gain["low"] > 0 else GREY
            right.plot((gain["low"], gain["high"]), (place, place), color=own, lw=2)
            right.plot(gain["mean"], place, "o" if place >= first else "D", color=own, ms=7)
        right.axvline(0, color=INK, lw=1)
        ends = [gain[key] for gain in gains for key in ("low", "high")]
        low, high = min(*ends, -0.5), max(*ends, 0.5)
        right.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        left.set_yticks(range(len(labels)), labels)
        left.set_ylim(-0.6, len(labels) - 0.4)
        left.set_xlabel("top-1, %")
        left.set_title(title)
        right.set_xlabel("gain, points")
        for one in axes:
            one.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.6)
        drawn = save(figure)
    return Picture(
        name="diagnosis-prompts",
        title=title,
        text="On the right, what the fused teacher gains over the task teacher, with its 95 % interval: the weight is chosen in a "
        "bootstrap sample and scored on the rows outside it. Blue where the interval lies above 0; of the diamond, the prompt set is chosen in the sample, too. How good CLIP is alone does "
        "not decide what it adds.",
        header=("prompts", "clip_top1", "alpha", "fused_top1", "gain", "gain_low", "gain_high"),
        rows=[
            (
                *(each["prompts"], each["top1"], each["best"]["alpha"], each["best"]["top1"]),
                *(each["gain"][key] for key in ("mean", "low", "high")),
            )
            for each in order[::-1]
        ],
        **drawn,
    )


def outcomes(found: Mapping[str, Any]) -> Picture:
    """Draw what CLIP says of the task teacher's errors and right answers, and what becomes of them when both are fused."""
    title, what, how = "Repaired and harmed", found["outcomes"], found["agreement"]
    alpha = f"fused, alpha {found['fused']['alpha']:g}"
    sides = (
        ("errors", "teacher_wrong", "fixed", "only_clip", "neither"),
        ("right answers", "teacher_right", "harmed", "both_right", "only_teacher"),
    )
    shown: list[tuple[str, list[tuple[str, float]]]] = []
    for name, base, changed, right, wrong in sides:
        if count := what[base]:
            turned = 100 * what[changed] / count
            clip = 100 * how[right] / (how[right] + how[wrong])
            right_after = turned if changed == "fixed" else 100 - turned
            shown.append(
                (
                    f"Of the task teacher's {count:,} {name}",
                    [("CLIP alone", clip), (alpha, right_after)],
                )
            )
    with canvas(NARROW, 1.0 + 1.45 * len(shown), nrows=len(shown), squeeze=False, sharex=True) as (
        figure,
        grid,
    ):
        for axes, (heading, bars) in zip(grid[:, 0], shown, strict=True):
            for place, (_, right) in enumerate(bars):
                stack(axes, place, [(right, RIGHT), (100 - right, WRONG)])
            axes.set_yticks(range(len(bars)), [label for label, _ in bars])
            axes.set_ylim(1.5, -0.5)
            axes.grid(visible=False)
            axes.set_title(heading)
        grid[-1, 0].set_xlim(0, 100)
        grid[-1, 0].set_xlabel("rows, %")
        _legend(figure, {"right": RIGHT, "wrong": WRONG})
        drawn = save(figure)
    return Picture(
        name="diagnosis-outcomes",
        title=title,
        text="Above, how often CLIP alone is right on these rows, below, how often the fused teacher is: which part of the errors it "
        "repairs, and which part of the right answers it leaves unharmed.",
        header=("of", "rows", "who", "right_percent"),
        rows=[
            (name, what[base], label, right)
            for (name, base, *_), (_, bars) in zip(
                [side for side in sides if what[side[1]]], shown, strict=True
            )
            for label, right in bars
        ],
        **drawn,
    )


def stack(axes: Axes, place: int, parts: Sequence[tuple[float, str]]) -> None:
    """Draw the parts of a bar, in percent, with their numbers where there is room."""
    left = 0.0
    for width, colour in parts:
        axes.barh(place, width, 0.62, left=left, color=colour, edgecolor="white", lw=0.8)
        if width >= ROOM:
            ink = "white" if colour in (RIGHT, WRONG) else INK
            middle = left + width / 2
            axes.text(
                middle, place, f"{width:.1f}", ha="center", va="center", color=ink, fontsize=9
            )
        left += width


def _legend(figure: Any, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=4,
        columnspacing=1.2,
        handlelength=1.0,
        handletextpad=0.5,
    )


def figure1(found: Mapping[str, Any]) -> Picture:
    """Draw the shares of right and wrong, certain and uncertain rows, before and after fusing."""
    title = "Right and certain, before and after"
    alpha, total = found["fused"]["alpha"], found["rows"]["n"]
    bars = [
        (f"{label}\ncalibrated" if kind == "calibrated" else label, kind, who, counts[who])
        for kind, counts in found["figure1"].items()
        for who, label in (("teacher", "task teacher"), ("fused", f"fused, alpha {alpha:g}"))
        if who in counts
    ]
    with canvas(NARROW, 1.4 + 0.55 * len(bars)) as (figure, axes):
        for place, (_, _, _, counts) in enumerate(bars):
            parts = [(100 * counts[cell] / total, colour) for cell, (_, colour) in CELLS.items()]
            stack(axes, place, parts)
        axes.set_yticks(range(len(bars)), [bar[0] for bar in bars])
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.grid(visible=False)
        axes.set_xlabel("rows, %")
        axes.set_title(title)
        _legend(figure, dict(CELLS.values()))
        drawn = save(figure)
    return Picture(
        name="diagnosis-certain",
        title=title,
        text=f"{certain(found)} Calibrated: after its logits are divided by the temperature that calibrates each teacher. "
        f"Fused at fusion.alpha {alpha:g}.",
        header=("probabilities", "teacher", "what", "n", "share"),
        rows=[
            (kind, who, cell, counts[cell], "" if part is None else part)
            for _, kind, who, counts in bars
            for cell in CELLS
            for part in [share(counts[cell], total)]
        ],
        **drawn,
    )


def certain(found: Mapping[str, Any]) -> str:
    """Return which rows a teacher is certain of, as a sentence."""
    asked = found["certain"]
    if isinstance(asked, str):
        return (
            f"A teacher is certain of the rows whose top probability lies above its own quantile {asked.removeprefix('q')} "
            f"(evaluate.certain {asked})."
        )
    return f"A teacher is certain of a row if its top probability lies above {asked:g} (evaluate.certain)."


def error(found: Mapping[str, Any]) -> Picture:
    """Draw the mean squared error along alpha: measured, and predicted with and without bias."""
    title, along = "Error along alpha", found["errors_along"]
    x = [each["alpha"] for each in along]
    lines = {
        "predicted": ("predicted", "-", RIGHT),
        "unbiased": ("predicted without bias", "--", "#4f94c8"),
    }
    with canvas(NARROW, 4.0) as (figure, axes):
        for key, (label, style, colour) in lines.items():
            y = [each[key] for each in along]
            axes.plot(x, y, style, color=colour, lw=2, label=label)
            lowest = min(range(len(y)), key=y.__getitem__)
            axes.plot(x[lowest], y[lowest], "v", color=colour, ms=8, zorder=4)
        measured = [each["measured"] for each in along]
        axes.plot(x, measured, "o", color=COLOURS["fused"], ms=4.5, label="measured")
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(weight(found))
        axes.set_ylabel("mean squared error, standardised")
        axes.set_title(title)
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2, handlelength=1.8)
        drawn = save(figure)
    return Picture(
        name="diagnosis-error",
        title=title,
        text="Of the fused logits in standardised units, predicted from bias, variance and correlation of one half of the rows and "
        "measured on the other half. Triangles are the lowest points: the full form of the weight seeks the one, the printed "
        "form the other, which drops the bias.",
        header=("alpha", "predicted", "without_bias", "measured"),
        rows=[
            tuple(each[key] for key in ("alpha", "predicted", "unbiased", "measured"))
            for each in along
        ],
        **drawn,
    )


def target(found: Mapping[str, Any]) -> Picture:
    """Draw what the student is to learn along alpha: how sharp it is, and at which temperature it stays as sharp."""
    title, along, plain = "Target along alpha", found["target"]["curve"], found["temperature"]
    x = [each["alpha"] for each in along]
    fixed = f"at T {plain:g}"
    with canvas(WIDE, 3.9, ncols=2, sharex=True) as (figure, (left, right)):
        left.plot(x, [each["kept"] for each in along], "o-", color=COLOURS["fused"], lw=2, ms=4.5)
        left.axhline(
            plain, color=COLOURS["teacher"], lw=1.6, ls=DASHED, label=f"plain distillation, T {plain:g}"
        )  # fmt: skip
        if (start := found["start"]) is not None:
            at = start["fusion.alpha"], start["loss.temperature"]
            label = f"starting point, alpha {at[0]:.2f}, T {at[1]:.2f}"
            left.plot(*at, "o", color=RIGHT, ms=9, zorder=4, label=label)
        left.legend(loc="lower right")
        left.set_ylim(0, 1.15 * max(plain, *(each["kept"] for each in along)))
        left.set_ylabel("temperature that keeps the sharpness")
        left.set_title("Temperature that keeps the target as sharp")
        second = left.secondary_yaxis(
            "right", functions=(lambda kept: kept / plain, lambda sharp: sharp * plain)
        )
        second.set_ylabel("spread of the fused logits / teacher's")
        for key, label, colour in (
            ("entropy", fixed, HALF_RIGHT),
            ("entropy_kept", "at the temperature on the left", RIGHT),
        ):
            right.plot(
                x, [each[key] for each in along], "o-", color=colour, lw=2, ms=4.5, label=label
            )
        right.axhline(
            along[-1]["entropy"], color=COLOURS["teacher"], lw=1.6, ls=DASHED, label="plain distillation"
        )  # fmt: skip
        right.set_ylabel("entropy of the target, nats")
        right.set_title("How soft the target is")
        right.set_ylim(
            0, 1.1 * max(each[key] for each in along for key in ("entropy", "entropy_kept"))
        )
        right.legend(loc="best")
        for axes in (left, right):
            axes.set_xlabel(weight(found))
        left.set_xlim(-0.02, 1.02)
        drawn = save(figure)
    keys = ("alpha", "sharpness", "kept", "entropy", "entropy_kept", "kl")
    return Picture(
        name="diagnosis-target",
        title=title,
        text=f"On {found['target']['rows']:,} rows that the student learns from. Mixing logits changes how much they spread, so at a "
        "fixed temperature the target softens or sharpens as alpha moves; divided by the temperature on the left it stays "
        "as sharp as plain distillation's, and what is left of the change in entropy is what CLIP says.",
        header=keys,
        rows=[tuple(each[key] for key in keys) for each in along],
        wide=True,
        **drawn,
    )


def reliable(found: Mapping[str, Any]) -> Picture:
    """Draw how right each teacher is where it is how sure."""
    shown = {"teacher": found["teacher"], "clip": chosen(found), "fused": found["fused"]}
    drawn = reliability({who: binned(each) for who, each in shown.items()}, "diagnosis-reliability")
    return replace(
        drawn,
        text="Top-1 of the rows of each confidence at T 1: a bar that ends below the dashed line is too sure, one that ends above it "
        "not sure enough. The dark stroke is the gap, whose mean over rows is the ECE; below, how many rows are that sure. "
        f"CLIP with prompts {named(found)[found['prompts']]}, fused at alpha {found['fused']['alpha']:g}.",
    )


def binned(own: Mapping[str, Any]) -> Calibration:
    """Return the calibration of a teacher, as `measure.teacher` kept it."""
    bins = tuple(Bin(**each) for each in own["bins"])
    total = sum(each.n for each in bins)
    return Calibration(own["ece"], sum(each.n * each.confidence for each in bins) / total, bins)


def classes(found: Mapping[str, Any]) -> Picture:
    """Draw the classes that fusing helps most and least: the task teacher, CLIP and the fused teacher."""
    title, every = "Classes", found["by_class"]
    ends = ends_of(every)
    height = 1.5 + 0.3 * max(len(end) for end in ends)
    alone = len(ends) == 1
    options = {"ncols": len(ends), "squeeze": False, "sharex": True}
    with canvas(NARROW if alone else WIDE, height, **options) as (figure, grid):
        headings = ("Classes, by gain",) if alone else ("Gain most", "Gain least, or lose")
        for axes, end, heading in zip(grid[0], ends, headings, strict=True):
            for place, each in enumerate(end):
                axes.plot(
                    (each["teacher"], each["fused"]), (place, place), color="#c9ced4", lw=2.5, zorder=2
                )  # fmt: skip
                for who, size in (("clip", 5), ("teacher", 7), ("fused", 7)):
                    axes.plot(each[who], place, "o", color=COLOURS[who], ms=size, zorder=3)
                axes.annotate(
                    f"{each['gain']:+.1f}", (1.0, place), (6, 0), xycoords=("axes fraction", "data"),
                    textcoords="offset points", va="center", fontsize=9, color=RIGHT if each["gain"] > 0 else WRONG
                    if each["gain"] < 0 else GREY,
                )  # fmt: skip
            axes.set_yticks(range(len(end)), [drawable(each["name"], 20) for each in end])
            axes.set_ylim(len(end) - 0.4, -0.6)
            axes.set_xlabel("top-1 of the class, %")
            axes.set_title(heading)
        _legend(figure, {WHO[who]: COLOURS[who] for who in ("teacher", "clip", "fused")})
        drawn = save(figure)
    shown = sum(map(len, ends))
    part = f" {shown} of {len(every)} classes are shown." * (shown < len(every))
    return Picture(
        name="diagnosis-classes",
        title=title,
        text="The number at the right is what the fused teacher, at fusion.alpha "
        f"{found['fused']['alpha']:g}, gains over the task teacher, in points.{part}",
        header=("class", "n", "teacher", "clip", "fused", "gain"),
        rows=[
            tuple(each[key] for key in ("name", "n", "teacher", "clip", "fused", "gain"))
            for each in every
        ],
        wide=not alone,
        **drawn,
    )


def ends_of(every: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """Return the classes at either end of a list by gain, or all of a short one."""
    if len(every) <= ENDS:
        return [every]
    first = min(ENDS, (len(every) + 1) // 2)
    return [every[:first], every[first:][-ENDS:]]
