"""The pictures of `explain`: Grad-CAM maps over images, and what the teachers say of an image as bars.

Shapes: N images of H x W pixels, a map of h x w places.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from richkd.data.pictures import picture
from richkd.draw import COLOURS, DPI, GREY, INK, WIDE, Picture, canvas, drawable, save
from richkd.explain.samples import Sample

RIGHT, WRONG = "#1a7f37", "#c62828"
SIGNS = {True: "✓", False: "✗"}  # colour alone would not reach everybody
TITLES = {"teacher": "Task teacher", "clip": "CLIP", "fused": "Fused teacher"}
SMALL = 16  # pixels of a side up to which an image is drawn as squares
SIDE = 168  # pixels to which others are brought, as many as a PNG has for them
LEVELS = 64  # of a channel of what is drawn, by which an SVG becomes half as large
ACROSS = 8  # images beside each other
LEFT, GAP, LINE = 44, 14, 32  # pixels ahead of them, between them, and for the line below each
CENTRED = {"ha": "center", "va": "center"}
# from nothing to a glow: where there is no evidence the image itself is seen
HEAT = LinearSegmentedColormap.from_list(
    "heat", ["#3b0f70", "#b5367a", "#f1605d", "#feb078", "#fcfdbf"]
)


def colour_of(who: str) -> str:
    """Return the colour of a teacher or a student, as in every picture; behind a space it may say of which run."""
    who = who.partition(" ")[0]
    name = who.replace("-", "_")
    if name in COLOURS:
        return COLOURS[name]
    own = who.startswith("richkd")
    return COLOURS["richkd_paper" if who.endswith("-paper") else "richkd"] if own else INK


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """Return uint8 `(H, W, C)` as RGB at the size at which it is drawn: few pixels as squares, more of them smoothly."""
    image = picture(pixels).convert("RGB")
    longer = max(image.size)
    if longer <= SMALL:
        factor, how = SIDE // longer, Image.Resampling.NEAREST
    else:
        factor, how = SIDE / longer, Image.Resampling.BICUBIC
    size = [max(round(side * factor), 1) for side in image.size]
    return np.array(image.resize(size, how))


def _coarse(image: np.ndarray) -> np.ndarray:
    """Return an RGB image with LEVELS values of each channel."""
    step = 256 // LEVELS
    return (image // step * step + step // 2).astype(np.uint8)


def overlaid(image: np.ndarray, seen: Tensor) -> np.ndarray:
    """Return an RGB image with a map `(h, w)` in 0 to 1 over it, uint8: the more evidence, the more it glows."""
    values = F.interpolate(seen[None, None], image.shape[:2], mode="bilinear")[0, 0].numpy()
    grey = np.repeat(image.mean(2, keepdims=True), 3, 2)
    cover = (0.8 * values**0.7)[..., None]
    mixed = (1 - cover) * (0.5 * grey + 0.35 * image) + cover * 255 * HEAT(values)[..., :3]
    return np.rint(mixed).clip(0, 255).astype(np.uint8)


def said(name: str, share: float, right: bool) -> str:
    """Return what a network says of an image, as it is drawn: its first class, with its probability."""
    return f"{SIGNS[right]} {drawable(name, 12)} {share:.2f}"


def maps(
    pixels: Sequence[np.ndarray],
    labels: Sequence[int],
    names: Sequence[str],
    seen: dict[str, tuple[Tensor, Tensor]],
) -> dict[str, bytes]:
    """Draw images and, below each, where each network sees evidence for its true class.

    Args:
        pixels: Of each of N images, uint8 `(H, W, C)`.
        labels: Their true classes.
        names: Of all classes.
        seen: By network its maps `(N, h, w)` and its probabilities `(N, K)`.

    Returns:
        The picture as `svg` and `png`.
    """
    blocks = -(-len(pixels) // ACROSS)
    across, rows = -(-len(pixels) // blocks), 1 + len(seen)
    step = SIDE + LINE, SIDE + GAP  # in pixels, of which each is one of the PNG
    height, width = blocks * rows * step[0], LEFT + across * step[1]
    # one image: as many axes would take seconds to lay out
    whole = np.full((height, width, 3), 255, np.uint8)
    with canvas(width / DPI, height / DPI) as (figure, axes):
        figure.set_layout_engine("none")
        axes.set_position((0, 0, 1, 1))
        for k, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            block, column = divmod(k, across)
            large, left = enlarged(image), LEFT + column * step[1]
            cells = [("image", large, drawable(names[label], 20), INK)]
            for who, (found, shares) in seen.items():
                first = int(shares[k].argmax())
                text = said(names[first], shares[k, first].item(), first == label)
                tint = RIGHT if first == label else WRONG
                cells.append((who, overlaid(large, found[k]), text, tint))
            for row, (who, view, text, tint) in enumerate(cells, start=block * rows):
                top, bold = row * step[0], "bold" if who == "image" else "normal"
                whole[top : top + SIDE, left : left + SIDE] = _centred(_coarse(view))
                middle, below = left + SIDE / 2, top + SIDE + LINE / 2 - 3
                axes.text(middle, below, text, color=tint, weight=bold, size=9, **CENTRED)
        for row in range(blocks * rows):
            who = ["image", *seen][row % rows]
            title = {"image": "Image", **TITLES}.get(who, drawable(who, 16))
            tint, middle = INK if who == "image" else colour_of(who), row * step[0] + SIDE / 2
            style = dict(CENTRED, color=tint, weight="bold", rotation=90, size=10)
            axes.text(LEFT / 2, middle, title, **style)
        axes.imshow(whole, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
        axes.axis("off")
        return save(figure)


def _centred(image: np.ndarray) -> np.ndarray:
    """Return an RGB image in the middle of a white square of SIDE pixels."""
    square = np.full((SIDE, SIDE, 3), 255, np.uint8)
    height, width = image.shape[:2]
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    square[top : top + height, left : left + width] = image
    return square


def bars(
    title: str,
    pixels: Sequence[np.ndarray],
    samples: Sequence[Sample],
    names: Sequence[str],
    fused: str,
) -> dict[str, bytes]:
    """Draw images and, beside each, how probable its classes are to the teachers.

    Args:
        title: What they have in common.
        pixels: Of each image, uint8 `(H, W, C)`.
        samples: What the teachers say of it.
        names: Of all classes.
        fused: What to say of how they were fused.

    Returns:
        The picture as `svg` and `png`.
    """
    who = list(samples[0].shares)
    tall = [len(each.classes) for each in samples]
    height = 0.9 + sum(0.27 * count + 0.42 for count in tall)
    ratios = {"width_ratios": [1.02, *[3.0] * len(who)], "height_ratios": [c + 1.2 for c in tall]}
    with canvas(
        WIDE, height, nrows=len(samples), ncols=1 + len(who), squeeze=False, gridspec_kw=ratios
    ) as (figure, axes):
        figure.suptitle(title, x=0.004, ha="left", fontsize=12.5, weight="bold")
        for row, (image, one) in enumerate(zip(pixels, samples, strict=True)):
            _image(axes[row, 0], image, names[one.label])
            for column, teacher in enumerate(who, start=1):
                cell = axes[row, column]
                _shares(cell, one, teacher, names, labelled=column == 1)
                if row == 0:
                    heading = TITLES[teacher] + f", {fused}" * (teacher == "fused")
                    cell.set_title(heading, color=colour_of(teacher))
        return save(figure)


def _image(axes: Axes, pixels: np.ndarray, name: str) -> None:
    """Draw an image with its class below."""
    axes.imshow(_coarse(enlarged(pixels)), interpolation="nearest")
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(drawable(name, 20), color=INK, weight="bold", fontsize=10, labelpad=5)


def _shares(axes: Axes, one: Sample, teacher: str, names: Sequence[str], *, labelled: bool) -> None:
    """Draw how probable the classes of an image are to a teacher, the true one on a pale band."""
    shares = [one.shares[teacher][k].item() for k in one.classes]
    first = int(one.shares[teacher].argmax())
    places = range(len(shares))
    for place, k, share in zip(places, one.classes, shares, strict=True):
        strong = k == first
        axes.barh(place, share, 0.66, color=colour_of(teacher), alpha=1 if strong else 0.35)
        sign = f"{SIGNS[k == one.label]} " if strong else ""
        tint = (RIGHT if k == one.label else WRONG) if strong else GREY
        axes.text(
            share + 0.015,
            place,
            f"{sign}{share:.2f}",
            va="center",
            color=tint,
            fontsize=9.5,
            weight="bold" if strong else "normal",
        )
    true = one.classes.index(one.label)
    axes.axhspan(true - 0.5, true + 0.5, color="#eef6ee", zorder=0)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.set_xlim(0, 1.22)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_yticks(list(places), [drawable(names[k], 20) if labelled else "" for k in one.classes])
    if labelled:
        for place, tick in zip(places, axes.get_yticklabels(), strict=True):
            tick.set_weight("bold" if place == true else "normal")


def grid_text(seen: Tensor) -> str:
    """Return a map `(h, w)` as a cell of a table: numbers of a line apart by spaces, lines by semicolons."""
    return "; ".join(" ".join(f"{value:.2f}" for value in line) for line in seen.tolist())


def maps_picture(
    pixels: Sequence[np.ndarray],
    rows: Sequence[int],
    labels: Sequence[int],
    names: Sequence[str],
    seen: dict[str, tuple[Tensor, Tensor]],
    layers: dict[str, str],
) -> Picture:
    """Return the Grad-CAM panel with its table.

    Args:
        pixels: As `maps` takes them, like `labels`, `names` and `seen`.
        rows: Of the images, among the test rows.
        labels: Their true classes.
        names: Of all classes.
        seen: By network its maps and probabilities.
        layers: By network where it was looked at.
    """
    table: list[tuple[Any, ...]] = []
    for k, (row, label) in enumerate(zip(rows, labels, strict=True)):
        for who, (found, shares) in seen.items():
            first = int(shares[k].argmax())
            values = (round(shares[k, each].item(), 6) for each in (first, label))
            table.append((row, names[label], who, names[first], *values, grid_text(found[k])))
    where = ", ".join(f"{who} {layer}" for who, layer in layers.items())
    return Picture(
        name="grad-cam",
        title="Where the networks look",
        text="Test images and, below each, where a network sees evidence for its true class (Grad-CAM of that class, "
        "whatever the network says; brighter is more, each map is scaled by its own maximum, and without a glow "
        "nothing speaks for the class), with what it says and how sure "
        f"it is. The layers: {where}.",
        header=(
            "row",
            "label",
            "network",
            "prediction",
            "probability",
            "probability of label",
            "map",
        ),
        rows=table,
        wide=True,
        **maps(pixels, labels, names, seen),
    )


def bars_picture(
    name: str,
    title: str,
    meaning: str,
    text: str,
    pixels: Sequence[np.ndarray],
    samples: Sequence[Sample],
    names: Sequence[str],
    fused: str,
) -> Picture:
    """Return the samples of one outcome with their table.

    Args:
        name: Of its files.
        title: What happened.
        meaning: What that means.
        text: How it is read.
        pixels: As `bars` takes them, like all that follow.
        samples: What the teachers say.
        names: Of all classes.
        fused: What to say of how they were fused.
    """
    table = [
        (one.row, names[one.label], teacher, names[k], round(shares[k].item(), 6))
        for one in samples
        for teacher, shares in one.shares.items()
        for k in one.classes
    ]
    return Picture(
        name=name,
        title=title,
        text=text,
        header=("row", "label", "teacher", "class", "probability"),
        rows=table,
        wide=True,
        **bars(f"{title}: {meaning}", pixels, samples, names, fused),
    )
