"""A diagnosis on the terminal, and where it is kept."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from richkd import escape
from richkd.diagnose import of_target
from richkd.diagnose.document import document, points, span
from richkd.diagnose.pictures import named, share
from richkd.files import make_folder, write_atomic, write_json
from richkd.layers import scalar
from richkd.page import write as write_page

NAME = "diagnosis"  # of its files
START = "start.yaml"
WIDTH, LEFT = 80, 12  # columns, of a line and of what it is about
SHOWN = ("right_certain", "wrong_certain")  # cells of Figure 1; the page has all
MOST = 6  # prompt sets, of which the others are on the page


def write(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write a diagnosis into a folder: JSON, a page, its pictures and tables and, if fusing helps, where a sweep may start.

    Returns:
        The diagnosis, whose verdict says where that is, and which names its `files`.
    """
    make_folder(folder, "--to")
    told = found | {"files": {"page": str(folder / f"{NAME}.html")}}
    if found["start"] is not None:
        start = folder / START
        text = "".join(f"{key}: {scalar(value)}\n" for key, value in found["start"].items())
        write_atomic(start, f"# {escape.line(found['verdict'])}\n{text}".encode())
        told["files"]["start"] = str(start)
        told["verdict"] = (
            f"{found['verdict'].removesuffix('.')}; starting point for the sweep written to {start}."
        )
    write_json(folder / f"{NAME}.json", told)
    write_page(folder, NAME, f"Diagnosis of {found['data']}", document(told))
    return told


def lines(found: Mapping[str, Any]) -> list[str]:
    """Return a diagnosis as lines of at most WIDTH characters, names of files aside; its verdict at the end."""
    rows = found["rows"]
    head = (
        f"{found['data']}: {rows['n']:,} rows ({rows['of']}), {found['classes']:,} classes; alpha: the task teacher's weight, "
        f"clip.scale {found['scale']}"
    )
    return [
        *_wrapped(head),
        "",
        *accuracies(found),
        "",
        *curve(found),
        *rules(found),
        *(part for line in reasons(found) for part in _wrapped(line, " " * LEFT)),
        "",
        *_wrapped(found["verdict"]),
        "",
        _about("page", found["files"]["page"]),
    ]


def accuracies(found: Mapping[str, Any]) -> list[str]:
    """Return how right and how sure each teacher is."""
    names, fused = named(found), found["fused"]
    sets = sorted(found["clip"], key=lambda each: -each["best"]["top1"])
    said = [
        f"{'':<23}{'top-1':>7}{'entropy':>9}{'ECE':>7}{'calibrated':>12}{'best fused':>15}{'gain':>7}",
        _teacher("task teacher", found["teacher"]),
    ]
    for each in sets[:MOST]:
        best = f"{each['best']['top1']:.2f} at {each['best']['alpha']:.2f}"
        own = _teacher(f"CLIP, {names[each['prompts']]}", each)
        said.append(f"{own}{best:>15}{each['gain']['mean']:>+7.2f}")
    if len(sets) > MOST:
        said.append(f"CLIP, {len(sets) - MOST} more prompt sets: on the page")
    return [*said, _teacher(f"fused, alpha {fused['alpha']:g}", fused)]


def _teacher(name: str, each: Mapping[str, Any]) -> str:
    name = escape.line(name)
    name = name if len(name) <= 22 else f"{name[:19]}..."
    calibrated = each["ece_calibrated"]
    shown = "-" if calibrated is None else f"{calibrated:.2f}"
    return f"{name:<23}{each['top1']:>7.2f}{each['entropy']:>9.3f}{each['ece']:>7.2f}{shown:>12}"


def curve(found: Mapping[str, Any]) -> list[str]:
    """Return the accuracy along alpha, its best part, and what is gained."""
    along = [each for each in found["curve"] if round(10 * each["alpha"]) == 10 * each["alpha"]]
    best, gain, plateau = found["best"], found["gain"], found["plateau"]
    near = "" if plateau is None else f"; within 0.5 points: alpha {span(plateau)}"
    return [
        _about("alpha", "".join(f"{each['alpha']:>6.1f}" for each in along)),
        _about("fused top-1", "".join(f"{each['top1']:>6.1f}" for each in along)),
        _about("best", f"{best['top1']:.2f} at alpha {best['alpha']:g}{near}"),
        _about(
            "out of bag",
            f"{gain['mean']:+.2f} points over the task teacher, 95 % interval {points(gain)}",
        ),
        "",
    ]


def rules(found: Mapping[str, Any]) -> list[str]:
    """Return the weight that each rule gives, and its accuracy on rows that it was not fitted on."""
    if found["helps"] is None:
        return []
    each = found["rules"]
    return [
        _about("rule", "".join(f"{name:>13}" for name in each)),
        _about("alpha", "".join(f"{own['alpha']:>13.2f}" for own in each.values())),
        _about("cross-fitted", "".join(f"{own['top1']:>13.2f}" for own in each.values())),
        "",
    ]


def reasons(found: Mapping[str, Any]) -> list[str]:
    """Return why: errors, outcomes as in Table 10 of the paper's supplement, certainty, and the target."""
    own, what, total = found["errors"], found["outcomes"], found["rows"]["n"]
    cells = found["figure1"]["as_is"]

    counts = {cell: (cells["teacher"][cell], cells["fused"][cell]) for cell in SHOWN}
    few = any(share(n, total) is None for pair in counts.values() for n in pair)

    def change(cell: str) -> str:
        before, after = counts[cell]
        if few:
            return f"{before:,} -> {after:,} rows"
        return f"{share(before, total):.1f} -> {share(after, total):.1f} %"

    alpha, wanted = found["fused"]["alpha"], found["start"]
    weight = alpha if wanted is None else wanted["fusion.alpha"]
    kept = of_target(found, "kept", weight)
    return [
        _about(
            "errors",
            f"bias {own['bias_t']:.2f} and {own['bias_c']:.2f} (CLIP), sigma {own['sigma_t']:.2f} and {own['sigma_c']:.2f}, "
            f"correlation {own['rho']:.2f}",
        ),
        _about(
            f"alpha {alpha:.4g}",
            f"repairs {what['fixed']:,} of {what['teacher_wrong']:,} errors, {what['top5_fixed']:,} of {what['top5_base']:,} from "
            "outside the top 5",
        ),
        _about(
            "",
            f"harms {what['harmed']:,} of {what['teacher_right']:,} right answers, {what['top5_lost']:,} to outside the top 5",
        ),
        _about(
            "",
            f"right and certain {change('right_certain')}, wrong and certain {change('wrong_certain')}",
        ),
        _about(
            "target",
            f"at alpha {weight:.2f} T {kept:.2f} keeps it as sharp as plain distillation's at {found['temperature']:g}",
        ),
    ]


def _about(what: str, text: str) -> str:
    return escape.line(f"{what:<{LEFT}}{text}")


def _wrapped(text: str, indent: str = "") -> list[str]:
    whole = {"break_long_words": False, "break_on_hyphens": False}  # a path can be copied
    kept = escape.line(text).replace(" %", "\u00a0%")
    return [
        line.replace("\u00a0", " ")
        for line in textwrap.wrap(kept, WIDTH, subsequent_indent=indent, **whole)
    ]
