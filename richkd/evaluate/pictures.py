"""What evaluations look like; this is the one module here that draws, and so the one that needs matplotlib."""

from collections.abc import Mapping

from richkd.draw import COLOURS, GREY, INK, NARROW, WIDE, Picture, canvas, drawable, save
from richkd.evaluate.calibration import Calibration


def reliability(found: Mapping[str, Calibration], name: str = "reliability") -> Picture:
    """Draw how right the rows of each confidence are, of several models beside each other.

    Args:
        found: By the model's name, one to four; those in `COLOURS` have their own colour.
        name: Of the picture's files.
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
            curve.set_title(f"{drawable(who)}   ECE {own.ece:.1f} %")
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
