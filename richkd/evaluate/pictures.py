"""What evaluations look like; this is the one module here that draws, and so the one that needs matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

from richkd.draw import COLOURS, GREY, INK, NARROW, WIDE, Picture, canvas, drawable, save
from richkd.evaluate.calibration import Calibration
from richkd.evaluate.corruption import by_group

COLOUR_OF = {"noise": "#d55e00", "blur": "#0072b2", "weather": "#009e73", "digital": "#cc79a7"}
FEW = 24  # classes: of more the weakest and the strongest are drawn


def reliability(
    found: Mapping[str, Calibration],
    name: str = "reliability",
    titles: Mapping[str, str] | None = None,
) -> Picture:
    """Draw how right the rows of each confidence are, of several models beside each other.

    Args:
        found: By the model's name, one to four; those in `COLOURS` have their own colour.
        name: Of the picture's files.
        titles: What models are called, where that is not their name.
    """
    n = len(found)
    width = NARROW if n == 1 else min(WIDE, 3.3 * n + 0.6)
    options = {"nrows": 2, "ncols": n, "squeeze": False, "sharex": True, "sharey": "row"}
    with canvas(width, 4.6, height_ratios=(4, 1), **options) as (figure, axes):
        for (who, own), (curve, counts) in zip(found.items(), axes.T, strict=True):
            colour = COLOURS.get(who, COLOURS["richkd"])
            total = sum(each.n for each in own.bins)
            for each in own.bins:
                place, wide = (each.low + each.high) / 2, 0.92 * (each.high - each.low)
                curve.bar(place, each.accuracy, wide, color=colour, alpha=0.75, zorder=2)
                counts.bar(place, 100 * each.n / total, wide, color=GREY, alpha=0.6, zorder=2)
            curve.plot((0, 100), (0, 100), color=INK, lw=1, ls=(0, (4, 3)), zorder=4)
            for each in own.bins:
                curve.plot(
                    (each.confidence, each.confidence), (each.confidence, each.accuracy),
                    color=INK, lw=1.2, zorder=5,
                )  # fmt: skip
            title = (titles or {}).get(who, who)
            curve.set_title(f"{drawable(title, 17)}\nECE {own.ece:.1f} %")
            curve.set(xlim=(0, 100), ylim=(0, 100), aspect="auto")
            counts.set(
                xlabel="confidence, %", ylim=(0, 100), xticks=range(0, 100, 20), yticks=(0, 50, 100)
            )
        axes[0, 0].set_ylabel("top-1, %")
        axes[1, 0].set_ylabel("rows, %")
        drawn = save(figure)
    return Picture(
        name=name,
        title="Reliability",
        text="Top-1 of the test rows of each confidence; a bar that ends on the dashed line is as often right as it is sure, and "
        "one that ends below it is too sure. The dark stroke is the gap, of which ECE is the mean over rows. Below, how many "
        "rows have that confidence.",
        header=("model", "low", "high", "n", "confidence", "accuracy"),
        rows=[
            (who, each.low, each.high, each.n, each.confidence, each.accuracy)
            for who, own in found.items()
            for each in own.bins
        ],
        wide=n > 1,
        **drawn,
    )


def corruption(found: Mapping[str, Any], kind: str) -> Picture:
    """Draw the accuracy of each group of corruptions by severity.

    Args:
        found: `corruption` of `appraise`.
        kind: In words, which images they are.
    """
    groups = by_group(found["top1"])
    with canvas() as (figure, axes):
        for group, values in groups.items():
            line = [found["clean"], *values]
            axes.plot(
                range(len(line)), line, color=COLOUR_OF[group], marker="o", ms=4, lw=2, label=group
            )
        axes.set(xlabel="severity", ylabel="top-1, %", title="Corrupted images")
        axes.set_ylim(0, 1.05 * max(found["clean"], *map(max, groups.values())) or 1)
        axes.set_xticks(range(6), ["clean", *map(str, range(1, 6))])
        axes.legend(loc="lower left", ncols=2)
        drawn = save(figure)
    return Picture(
        name="corruption",
        title="Corrupted images",
        text=f"Top-1 of {found['rows']} test rows, {kind}: the mean over the families of each group, by severity.",
        header=("group", "severity", "top1"),
        rows=[
            (group, severity, value)
            for group, values in groups.items()
            for severity, value in enumerate(values, start=1)
        ],
        **drawn,
    )


def attack(found: Mapping[str, Any]) -> Picture:
    """Draw the accuracy under FGSM and PGD by their size; `found` is `attack` of `appraise`."""
    eps = [0, *found["eps"]]
    lines = {name: [found["clean"], *found[name]] for name in ("fgsm", "pgd")}
    with canvas() as (figure, axes):
        for (name, values), colour in zip(lines.items(), ("#56b4e9", "#0072b2"), strict=True):
            axes.plot(eps, values, color=colour, marker="o", ms=4, lw=2, label=name.upper())
        axes.set(xlabel="largest change of a pixel, grey levels", ylabel="top-1, %", xticks=eps)
        axes.set_title("Attacked images")
        axes.set_ylim(0, 1.05 * max(map(max, lines.values())) or 1)
        axes.legend(loc="upper right")
        drawn = save(figure)
    return Picture(
        name="attack",
        title="Attacked images",
        text=f"Top-1 of {found['rows']} test rows that were changed so that this student errs: in one step up its loss (FGSM), and "
        "in ten from a random start (PGD).",
        header=("attack", "eps", "top1"),
        rows=[
            (name, each, value)
            for name, values in lines.items()
            for each, value in zip(eps, values, strict=True)
        ],
        **drawn,
    )


def classes(found: Sequence[Mapping[str, Any]]) -> Picture:
    """Draw the accuracy of classes, of many the weakest and the strongest; `found` is `classes` of `appraise`."""
    ranked = sorted(found, key=lambda each: each["top1"])
    shown = ranked if len(ranked) <= FEW else [*ranked[: FEW // 2], *ranked[-FEW // 2 :]]
    with canvas(height=max(3.9, 0.2 * len(shown) + 1)) as (figure, axes):
        names = [drawable(each["name"]) for each in shown]
        places = [k + (k >= FEW // 2 and len(ranked) > FEW) for k in range(len(shown))]
        axes.barh(places, [each["top1"] for each in shown], color=COLOURS["richkd"], alpha=0.75)
        axes.set_yticks(places, names, fontsize=9)
        axes.set(xlabel="top-1, %", xlim=(0, 100), title="Classes")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        drawn = save(figure)
    which = (
        ""
        if len(shown) == len(found)
        else f", the {FEW // 2} weakest and strongest of {len(found)}"
    )
    return Picture(
        name="classes",
        title="Classes",
        text=f"Top-1 of the test rows of each class{which}.",
        header=("class", "n", "top1"),
        rows=[(each["name"], each["n"], each["top1"]) for each in shown],
        **drawn,
    )
