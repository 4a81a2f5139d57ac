"""What pictures are drawn with: the canvas and its style, names that the font has, and what several pictures share."""

import base64
import csv
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from richkd import escape
from richkd.errors import CorruptError
from richkd.files import read_record, write_json
from richkd.layers import brief

# Okabe and Ito's colours, which people with any colour vision tell apart; a student has the same in every picture
COLOURS = {
    "ce": "#7f7f7f",
    "kd": "#56b4e9",
    "kd_tuned": "#0072b2",
    "richkd_paper": "#e69f00",
    "richkd": "#d55e00",
    "teacher": "#009e73",
    "clip": "#cc79a7",
    "fused": "#4d4d4d",
}
INK, GREY, GRID, EMPTY = "#222222", "#5f6b7a", "#e3e5e8", "#f3f4f6"
# from a pale to a dark blue, so that low values show on white, too
SCALE = LinearSegmentedColormap.from_list(
    "top1", ["#d8e6f3", "#9cc3e0", "#4f94c8", "#1c5f9e", "#0a2f5c"]
)
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.edgecolor": "#b8bcc2",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold $
    "figure.facecolor": "white",
    "svg.fonttype": "path",  # looks the same without the font
    "svg.hashsalt": "richkd",  # and is the same file each time
}
PARAMETERS = {
    "fusion.alpha": "alpha",
    "loss.temperature": "T",
    "loss.logit": "weight",
    "clip.prompts": "prompts",
}
DPI = 130
LISTED = "pictures.json"
NARROW, WIDE = 6.2, 12.8  # inches, of half a page and of all of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One picture and what is behind it.

    Attributes:
        name: Of its files.
        title: What is seen.
        text: How it is read, in a sentence or two.
        header: Of the table behind it.
        rows: Of that table.
        wide: Whether it takes the width of the page.
        svg: The picture; None where there is nothing to draw, which `text` then says.
        png: The same in pixels.
    """

    name: str
    title: str
    text: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    wide: bool = False
    svg: bytes | None = None
    png: bytes | None = None

    @property
    def csv(self) -> bytes:
        """The table as a CSV file."""
        return escape.to_csv(self.header, self.rows)

    @property
    def link(self) -> str:
        """The picture as an address that a page holds within itself; as an image, in which no script runs."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg or b'').decode()}"


def kept(folder: Path, drawn: Sequence[Picture]) -> None:
    """Say in a folder which pictures were written there, for `stored`; those that could not be drawn are left out."""
    keys = ("name", "title", "text", "wide")
    listed = [{key: getattr(one, key) for key in keys} for one in drawn if one.svg is not None]
    write_json(folder / LISTED, {"pictures": listed})


def stored(folder: Path) -> list[Picture]:
    """Return the pictures that `kept` says a folder holds, none if it says nothing; their tables hold text.

    Raises:
        CorruptError: If it says what is not so.
    """
    if not (folder / LISTED).exists():
        return []
    found = []
    for one in read_record(folder / LISTED, "pictures")["pictures"]:
        try:
            with open(folder / f"{one['name']}.csv", encoding="utf-8", newline="") as file:
                header, *rows = csv.reader(file)
            drawn = {
                kind: (folder / f"{one['name']}.{kind}").read_bytes() for kind in ("svg", "png")
            }
            found.append(Picture(header=header, rows=rows, **one, **drawn))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CorruptError(
                f"{folder / LISTED} names a picture that cannot be read ({error}); draw it anew."
            ) from error
    return found


def nothing(name: str, title: str, text: str) -> Picture:
    """Return a picture that cannot be drawn yet."""
    return Picture(name=name, title=title, text=text)


@contextmanager
def canvas(width: float = NARROW, height: float = 3.9, **more: Any) -> Iterator[tuple[Figure, Any]]:
    """Give a figure and its axes, in inches, without the state that pyplot keeps for a process."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**more)


def save(figure: Figure) -> dict[str, bytes]:
    """Return a figure as `svg` and `png`, the same bytes for the same figure."""
    found = {}
    for kind, metadata in (("svg", {"Date": None, "Creator": None}), ("png", {"Software": None})):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
        figure.set_layout_engine("none")  # it is laid out
        found[kind] = file.getvalue()
    return found


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import fontManager
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(fontManager.findfont(STYLE["font.family"])).get_charmap())


def drawable(value: Any, most: int = 24) -> str:
    r"""Return a name as it can be drawn: on one line, short, and a sign that the font lacks as in Python, `\u6f22`."""
    text = "".join(
        each if ord(each) in _glyphs() else each.encode("unicode_escape").decode()
        for each in escape.line(brief(value))
    )
    return text if len(text) <= most else f"{text[: most - 9]}…{text[-8:]}"


def parameter(key: str) -> str:
    """Return the name of a searched parameter as it is drawn."""
    return PARAMETERS.get(key) or drawable(key.removeprefix("train."), 20)


def number(value: Any) -> bool:
    """Whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def cut(axes: Axes, values: Sequence[float], strong: Sequence[float]) -> float:
    """Set where the y axis begins, so that what matters is not flattened by trials that learnt little, and return it.

    Args:
        axes: Of validation top-1, %.
        values: All that is drawn.
        strong: What matters, such as trials that have finished.
    """
    strong = strong or values
    room = max(max(strong) - min(strong), 3.0)
    low = max(min([*values, *strong]) - 0.1 * room, min(strong) - 2.5 * room)
    high = max([*values, *strong])
    axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))
    return low


def dots(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    low: float,
    *,
    strong: bool,
    label: str | None = None,
    colour: str = GREY,
    floor: float | None = None,
) -> None:
    """Draw trials: dark ones and pale ones, and as a triangle at `floor` what lies below `low`."""
    style = {"color": colour, "lw": 0, "alpha": 1 if strong else 0.38, "zorder": 5 if strong else 3}
    inside = [point for point in points if point[1] >= low]
    below = [(x, low if floor is None else floor) for x, y in points if y < low]
    if points:  # also if all of them lie below: the legend has one for each state
        axes.scatter(*_parts(inside), s=32 if strong else 26, label=label, **style)
    if below:
        axes.scatter(*_parts(below), s=26, marker="v", **style)


def _parts(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the first and the second parts of points."""
    return [point[0] for point in points], [point[1] for point in points]


def beside(places: Sequence[float], apart: float = 0.026) -> list[float]:
    """Return places along an axis, each moved to the right so far that it does not coincide with those before it."""
    found, last = list(places), -math.inf
    for k in sorted(range(len(places)), key=lambda k: places[k]):
        last = found[k] = max(places[k], last + apart)
    return found


def shades(values: Sequence[float]) -> Normalize:
    """Return what maps accuracies to shades: the best get the room, the worst tenth shares the palest."""
    low, high = np.percentile(values, [10, 100])
    return Normalize(low, high if high > low else low + 1)
