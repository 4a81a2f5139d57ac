"""A table of the paper: ours beside what is printed there, as far as there is any, and what is missing.

    python -m tune sweep paper/table13
    python -m tune table conf/paper/table13.yaml

A layer under conf/paper holds both: the grid that makes ours and, under `paper`, the figures as printed. The table is made
of the newest sweep that was started from it, or of the sweeps that are named.
"""

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Rows

from richkd import escape
from richkd.command import Stop
from richkd.config import one_of
from richkd.errors import ConfigError, CorruptError, RichkdError
from richkd.files import read_json, read_record, write_atomic
from richkd.layers import UNHASHED, Layers, build, flatten, to_dict
from richkd.page import Block, Table, Text, to_markdown
from richkd.progress import stoppable
from tune.attach import attach
from tune.best import called, find_sweep
from tune.display import Display, short
from tune.findings import Findings, found_in
from tune.launch import start
from tune.settings import Settings
from tune.study import MAIN
from tune.summary import difference, said, spread
from tune.sweep import asked_of, state_of
from tune.tiny import SCALES, TINY, scaled

SOURCES = ("grid", "bench", "diagnose")
HEADER = ("", "ours", "last epoch", "n", "paper", "to kd (s.e.)", "paper's")
LEGEND = "Ours are of the best epoch on {}: mean ± standard deviation over n seeds; differences to kd are paired by seed."
COUNTS = "/n"  # how the key of a number of images ends
VARIANTS = "variants"  # the row of figures that has those of a benchmark
FUSION = "fusion"  # and those of a diagnosis
OUTCOMES = {  # by the names of Table 10, and of what a share is taken
    "teacher wrong, fused right": ("fixed", "teacher_wrong"),
    "target outside the teacher's top 5, fused right": ("top5_fixed", "top5_base"),
    "teacher right, fused wrong": ("harmed", "teacher_right"),
    "teacher right, target outside the fused top 5": ("top5_lost", "teacher_right"),
}
DIAGNOSED = ("outcomes", "fused", "rows", "teacher", "data", "scale")  # what is read of one
UNITS = {"memory": 2**30}  # bytes of what the paper gives in GiB
OF_A_METHOD = ("method.", "loss.", "fusion.", "contrast.")
WIDTH = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """A table as the paper has it."""

    title: str = ""
    source: str = "grid"  # of ours: grid | bench | diagnose
    metrics: dict[str, Any] = field(default_factory=dict)  # what is compared: name: key in a run
    # row: {method: a number, or one a metric}; null where nothing is printed
    figures: dict[str, Any] = field(default_factory=dict)
    remark: str | None = None  # what is to be known of them
    scale: str = "full"  # in which ours are made: full | tiny

    def __post_init__(self) -> None:
        one_of("paper.source", self.source, SOURCES)
        one_of("paper.scale", self.scale, SCALES)
        for row, methods in self.figures.items():
            given = methods.values() if isinstance(methods, dict) else [None]
            if any(len(_listed(values)) != len(self.metrics) for values in given):
                raise ConfigError(
                    f"paper.figures.{row} must have a number of each of {', '.join(self.metrics)} for each method but has "
                    f"{methods!r}; write null for what is not printed."
                )

    def printed(self, row: str, method: str, metric: str) -> float | None:
        """Return a number of the paper, None if it has none."""
        values = self.figures.get(row, {}).get(method)
        return None if values is None else _listed(values)[list(self.metrics).index(metric)]


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [values]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The section of a layer that holds a table."""

    paper: Paper = field(default_factory=Paper)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One number of a table.

    Attributes:
        row: Of the table.
        metric: What is compared.
        method: By which the student was trained, or what was measured.
        ours: By seed.
        last: Likewise of the last epoch, where another one is kept.
        n: Runs that there are.
        of: Runs that are asked for.
        counts: Whether it is a number of images.
        paper: As printed.
        gap: Paired difference of ours to kd of the row, as `summary.difference`.
        paper_gap: The difference of the printed numbers.
    """

    row: str
    metric: str
    method: str
    ours: dict[int, float]
    last: dict[int, float] = field(default_factory=dict)
    n: int = 0
    of: int = 1
    counts: bool = False
    paper: float | None = None
    gap: dict[str, Any] | None = None
    paper_gap: float | None = None


def table(
    words: Sequence[str],
    *,
    scale: str | None = None,
    bench: Path | None = None,
    diagnosis: Path | None = None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Return a table of the paper with what there is of ours, as plain JSON; beside its sweep and in MLflow it is Markdown.

    A grid at scale `tiny` that was never run is run first.

    Args:
        words: The layer, sweeps, and overrides of the layer.
        scale: In which ours were made.
        bench: File with what `richkd bench --table12 --json` printed; None: a table of times is measured now.
        diagnosis: File that `richkd diagnose` wrote; None: a table of what fusing does is measured now.
        stop: Says whether a signal came.

    Returns:
        `title`, `heading` (what warns of a tiny scale, else None), `cells`, `missing` and `notes` (lines), `sweeps`, `file` and
        `link` (None without a sweep), and `go_on` (the line that makes what is missing, None if nothing is).

    Raises:
        ConfigError: If the layer holds no table, or there is no such sweep.
        CorruptError: If a record cannot be read.
    """
    names = [word for word in words if "=" not in word]
    own = [*names[:1], *(word for word in words if "=" in word)]
    layers = scaled(own, scale)
    paper = build(layers, Layer).paper
    if not (paper.title and paper.metrics):
        raise ConfigError(
            f"table takes a layer with paper.title and paper.metrics but got {' '.join(names[:1]) or 'none'}; give one of "
            "conf/paper, such as conf/paper/table13.yaml, or add to yours what a table compares, such as "
            "paper.metrics={top-1: test/top1}; paper.figures, as printed, may be left out."
        )
    if paper.source != "grid" and names[1:]:
        raise ConfigError(
            f"{names[0]} is a table of no sweep but got {', '.join(names[1:])}; leave them out."
        )
    found: list[Findings] = []
    notes = [] if paper.remark is None else [" ".join(paper.remark.split())]
    match paper.source:
        case "grid":
            folders = sweeps_of(paper, layers, names[1:])
            if not folders and paper.scale == "tiny":
                folders = [Path(start(layers, stop=stop)["sweep"])]
            found = [found_in(folder) for folder in folders]
            cells = of_grid(paper, layers, found)
            notes += [note for one in found if (note := differing(one, layers))]
            notes.insert(0, LEGEND.format(rows_judged(layers, found)))
        case "bench":
            cells = of_bench(paper, read_json(bench) if bench else measured(layers, stop or Stop()))
        case "diagnose":
            own = (
                read_record(diagnosis, *DIAGNOSED)
                if diagnosis
                else diagnosed(layers, stop or Stop())
            )
            cells = of_diagnosis(paper, own)
            fused, rows = own["fused"], own["rows"]
            notes.insert(
                0,
                f"Ours are of {rows['n']:,} rows ({rows['of']}) of {own['data']}, at alpha {fused['alpha']:g} and clip.scale "
                f"{own['scale']}; the task teacher is right on {own['teacher']['top1']:.2f} %, the fused one on {fused['top1']:.2f} %.",
            )
    answer = {
        "title": paper.title,
        "heading": TINY if paper.scale == "tiny" and any(cell.ours for cell in cells) else None,
        "cells": [asdict(cell) for cell in cells],
        "missing": missing(cells),
        "notes": notes,
        "sweeps": [one.name for one in found],
    }
    place = kept(document(answer, cells), paper.title, found, Path(names[0]).stem)
    answer |= place | {"go_on": None}
    if paper.source == "grid":
        answer["go_on"] = go_on(own, scale, found, answer["missing"])
    return answer


def sweeps_of(paper: Paper, layers: Layers, names: Sequence[str]) -> list[Path]:
    """Return the folders of the sweeps that a table is made of: those named, else the newest of its title and scale."""
    storage = state_of(build(layers, Settings), build(layers))
    if names:
        return [find_sweep(name, storage) for name in names]
    same = []
    for path in storage.glob("*/sweep.json"):
        asked, before = asked_of(path.parent)
        other = build(before, Layer).paper
        if (other.title, other.scale) == (paper.title, paper.scale):
            same.append((asked["started"], path.parent))
    return [max(same)[1]] if same else []


def of_grid(paper: Paper, layers: Layers, found: Sequence[Findings]) -> list[Cell]:
    """Return the cells of the layer's grid, and those that only the paper has, with what sweeps have of them."""
    wanted = build(layers, Settings)
    grid, seeds = wanted.sweep.grid, wanted.refit.seeds
    cells = []
    for row, settings in grid.rows.items():
        methods = dict.fromkeys((*paper.figures.get(row, {}), *grid.methods))
        runs = {method: refits_of(found, row, method, settings) for method in methods}
        for metric, key in paper.metrics.items():
            counts = key.endswith(COUNTS)
            theirs = by_seed(runs.get("kd", {}), key)
            for method in methods:
                ours, compared = by_seed(runs[method], key), method != "kd" and not counts
                printed, other = (paper.printed(row, name, metric) for name in (method, "kd"))
                both = compared and None not in (printed, other)
                cell = Cell(
                    row=row,
                    metric=metric,
                    method=method,
                    ours=ours,
                    last=by_seed(runs[method], key.replace("test/", "test/last_", 1)),
                    n=len(runs[method]),
                    of=seeds if method in grid.methods else 1,
                    counts=counts,
                    paper=printed,
                    gap=difference(ours, theirs) if compared else None,
                    paper_gap=printed - other if both else None,
                )
                cells.append(cell)
    return cells


def refits_of(
    found: Sequence[Findings], row: str, method: str, settings: dict[str, Any]
) -> dict[int, dict[str, Any]]:
    """Return the metrics of a cell by seed, of the first sweep that has it.

    A method that needs a search, such as autokd, is in no grid: its cell is what a sweep of it found, with the row's settings.
    """
    for one in found:
        base = flatten(to_dict(one.base))
        same = all(base.get(key) == value for key, value in settings.items())
        searched = not one.grid and one.base.method.name == method and same
        if runs := one.refits.get(MAIN if searched else f"{row}-{method}"):
            return runs
    return {}


def by_seed(runs: dict[int, dict[str, Any]], key: str) -> dict[int, float]:
    """Return a metric of those runs that have it."""
    return {seed: metrics[key] for seed, metrics in runs.items() if key in metrics}


def rows_judged(layers: Layers, found: Sequence[Findings]) -> str:
    """Return on which rows sweeps chose their epochs, and which did where they differ; without any, where the layer's would."""
    sweeps: dict[str, list[str]] = {}
    for one in found:
        sweeps.setdefault(one.base.judged, []).append(one.name)
    if len(sweeps) > 1:
        return " or ".join(f"{rows} rows ({', '.join(names)})" for rows, names in sweeps.items())
    return f"{next(iter(sweeps), build(layers).judged)} rows"


def differing(found: Findings, layers: Layers) -> str | None:
    """Return in which settings a grid differs from the layer, if so: then its numbers are of something else."""
    if not found.grid:
        return None
    ours, wanted = flatten(to_dict(found.base)), flatten(to_dict(build(layers)))
    free = (*UNHASHED, "teacher.shared")
    keys = [k for k in wanted if ours.get(k) != wanted[k] and not k.startswith(free)]
    told = ", ".join(f"{key}={ours.get(key)}, not {wanted[key]}" for key in keys)
    return f"{found.name} ran with {told}." if told else None


def measured(layers: Layers, stop: Stop) -> dict[str, Any]:
    """Return what a benchmark of the layer's config finds on this machine, with CLIP live and cached."""
    from richkd import bench
    from richkd.bench import variants

    config = build(layers)
    with Display("bench", stop=stop) as display:
        wanted = variants.wanted(config, None, live=True)
        progress = stoppable(display.progress, stop)
        return bench.measure(config, wanted, progress=progress, stop=stop)


def of_bench(paper: Paper, found: dict[str, Any]) -> list[Cell]:
    """Return times and memory of what was measured beside the paper's, metric by metric."""
    cells = []
    for metric, key in paper.metrics.items():
        for variant in dict.fromkeys((*paper.figures.get(VARIANTS, {}), *found["variants"])):
            own = found["variants"].get(variant)
            cell = Cell(
                row="",
                metric=metric,
                method=variant,
                ours={} if own is None else {0: own[key] / UNITS.get(key, 1)},
                n=int(own is not None),
                paper=paper.printed(VARIANTS, variant, metric),
            )
            cells.append(cell)
    return cells


def diagnosed(layers: Layers, stop: Stop) -> dict[str, Any]:
    """Return the diagnosis of the layer's teachers on this machine."""
    from richkd.diagnose import diagnose

    with Display("diagnose", stop=stop) as display:
        return diagnose(build(layers), progress=stoppable(display.progress, stop))


def of_diagnosis(paper: Paper, found: dict[str, Any]) -> list[Cell]:
    """Return counts of what fusing does to rows beside the paper's, outcome by outcome."""
    cells, counted = [], found["outcomes"]
    if lacks := {key for pair in OUTCOMES.values() for key in pair} - counted.keys():
        raise CorruptError(
            f"the outcomes of a diagnosis must have {', '.join(sorted(lacks))} but have not; diagnose anew."
        )
    for metric, key in paper.metrics.items():
        for name, (part, whole) in OUTCOMES.items():
            count, total = counted[part], counted[whole]
            values = {
                "count": count,
                "total": total,
                "share": 100 * count / total if total else None,
            }
            cell = Cell(
                row="",
                metric=metric,
                method=name,
                ours={} if values[key] is None else {0: values[key]},
                n=1,
                counts=key != "share",
                paper=paper.printed(FUSION, name, metric),
            )
            cells.append(cell)
    return cells


def missing(cells: Sequence[Cell]) -> list[str]:
    """Return which runs are missing, in words."""
    short_of = {
        f"{cell.row} {cell.method}".strip(): (cell.n, cell.of) for cell in cells if cell.n < cell.of
    }
    return [f"{name} ({n} of {of})" if n else name for name, (n, of) in short_of.items()]


def go_on(
    words: Sequence[str], scale: str | None, found: Sequence[Findings], lacks: Sequence[str]
) -> str | None:
    """Return the line that makes what is missing of a grid, None if no line does."""
    stopped = [one for one in found if one.grid and one.state == "stopped"]
    if lacks and stopped:
        return f"python -m tune resume {called(stopped[0].folder)}"
    if not lacks or found:
        return None
    again = [
        "python",
        "-m",
        "tune",
        "sweep",
        *words,
        *([] if scale is None else ["--scale", scale]),
    ]
    return shlex.join(again)


def rows_of(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """Return cells as rows of text below HEADER, those of one row and metric under a line of their own."""
    rows, above = [], ""
    several = len({cell.metric for cell in cells}) > 1
    for cell in cells:
        group = ", ".join(filter(None, (cell.row, cell.metric if several else "")))
        if group != above:
            rows.append((group, *[""] * (len(HEADER) - 1)))
            above = group
        rows.append((f"  {cell.method}", *texts_of(cell)))
    return rows


def texts_of(cell: Cell) -> tuple[str, ...]:
    """Return a cell in the order of HEADER."""
    gap, digits = cell.gap or {}, 0 if cell.counts else 2
    se = "" if gap.get("se") is None else f" ({gap['se']:.2f})"
    return (
        _mean(cell.ours, digits) or ("-" if cell.n else "missing"),
        _mean(cell.last, digits),
        str(cell.n or "") if cell.row else "",
        "" if cell.paper is None else _exact(cell.paper),
        f"{gap['mean']:+.2f}{se}" if gap else "",
        "" if cell.paper_gap is None else f"{cell.paper_gap:+.2f}",
    )


def _mean(values: dict[int, float], digits: int) -> str:
    if not values:
        return ""
    found = spread(list(values.values()))
    return said(found["mean"], found["sd"], digits)


def _exact(value: float) -> str:
    """Return a printed number with its digits, at least two behind the point."""
    return str(value) if isinstance(value, int) or round(value, 2) != value else f"{value:.2f}"


def shown(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a table without the columns in which nothing stands."""
    rows = rows_of(cells)
    kept = [k for k in range(len(HEADER)) if k < 2 or any(row[k] for row in rows)]
    return [HEADER[k] for k in kept], [[row[k] for k in kept] for row in rows]


def document(answer: dict[str, Any], cells: Sequence[Cell]) -> list[Block]:
    """Return a table as blocks."""
    header, rows = shown(cells)
    blocks: list[Block] = [] if answer["heading"] is None else [Text(answer["heading"], "note")]
    blocks.append(Table(header=header, rows=rows, right=range(1, len(header))))
    blocks += [Text(text) for text in answer["notes"]]
    if answer["missing"]:
        blocks.append(Text(f"Missing: {'; '.join(answer['missing'])}."))
    return blocks


def kept(
    blocks: Sequence[Block], title: str, found: Sequence[Findings], name: str
) -> dict[str, Any]:
    """Write a table beside the first of its sweeps, and into its run in MLflow; return `markdown`, `file`, `link`, and `untold`.

    `untold` is why MLflow has not got it, None if it has.
    """
    text = to_markdown(title, blocks)
    place: dict[str, Any] = {"markdown": text, "file": None, "link": None, "untold": None}
    if not found:
        return place
    folder = found[0].folder / "table"
    write_atomic(folder / f"{name}.md", text.encode())
    place["file"] = str(folder / f"{name}.md")
    try:
        place["link"] = attach(str(found[0].folder), folder, found[0].folder.parent)["link"]
    except RichkdError as error:  # it is down, or has not heard of the sweep
        place["untold"] = str(error)
    return place


def lines(answer: dict[str, Any]) -> list[str]:
    """Return a table as lines for the terminal."""
    header, rows = shown([Cell(**cell) for cell in answer["cells"]])
    drawn = Rows(box=None, pad_edge=False)
    for name in header:
        drawn.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(escape.line, row))
    console = Console(width=2 * WIDTH, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(drawn, markup=False)
    head = [answer["title"], *([answer["heading"]] if answer["heading"] else [])]
    told = [*answer["notes"]]
    if answer["missing"]:
        told.append(f"missing: {'; '.join(answer['missing'])}")
    if answer["untold"] is not None:
        told.append(f"MLflow has not got it: {answer['untold']}")
    below = [line for text in told for line in textwrap.wrap(escape.line(text), WIDTH)]
    file = None if answer["file"] is None else short(answer["file"])
    places = {"go on": answer["go_on"], "table": file, "in MLflow": answer["link"]}
    table_ = [line.rstrip() for line in captured.get().splitlines()]
    ends = [f"{what:<11}{text}" for what, text in places.items() if text is not None]
    return [*head, "", *table_, "", *below, *ends]
