"""A diagnosis on the terminal, and where it is kept."""

from pathlib import Path
from typing import Any

from richkd import escape
from richkd.diagnose import called
from richkd.diagnose.document import document
from richkd.files import write_atomic, write_json
from richkd.layers import scalar
from richkd.page import write as write_page

NAME = "diagnosis"  # of its files
START = "start.yaml"


def write(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write a diagnosis into a folder: JSON, a page, its pictures and tables and, if fusing helps, where a sweep may start.

    Returns:
        The diagnosis, whose verdict says where that is, and which names its `files`.
    """
    told = found | {"files": {"page": str(folder / f"{NAME}.html")}}
    if found["start"] is not None:
        start = folder / START
        text = "".join(f"{key}: {scalar(value)}\n" for key, value in found["start"].items())
        write_atomic(start, f"# {found['verdict']}\n{text}".encode())
        told["files"]["start"] = str(start)
        told["verdict"] = (
            f"{found['verdict'].removesuffix('.')}; starting point for the sweep written to {start}."
        )
    write_json(folder / f"{NAME}.json", told)
    write_page(folder, NAME, f"Diagnosis of {found['data']}", document(told))
    return told


def lines(found: dict[str, Any]) -> list[str]:
    """Return a diagnosis as lines of at most 90 characters."""
    rows, best = found["rows"], found["best"]
    said = [
        f"{found['data']}: {rows['n']:,} rows ({rows['of']}), {found['classes']} classes; alpha is the task teacher's weight, "
        f"at clip.scale {found['scale']}",
        "",
        f"{'':<26}{'top-1':>8}{'top-5':>8}{'ECE':>8}{'calibrated':>12}{'entropy':>9}",
        _row("task teacher", found["teacher"]),
        *(_row(f"CLIP, {called(each['prompts'])}", each) for each in found["clip"]),
        _row(f"fused, alpha {found['fused']['alpha']:g}", found["fused"]),
        "",
    ]
    along = [each for each in found["curve"] if round(10 * each["alpha"]) == 10 * each["alpha"]]
    said += [
        "alpha      " + "".join(f"{each['alpha']:>7.1f}" for each in along),
        "fused top-1"
        + "".join(f"{each['top1']:>7.2f}" for each in along)
        + f"   best {best['top1']:.2f} at {best['alpha']:g}, {called(found['prompts'])}",
    ]
    gain = found["gain"]
    said.append(
        f"out of bag  {gain['mean']:+.2f} points over the task teacher, 95 % interval {gain['low']:+.2f} to {gain['high']:+.2f}"
    )
    if found["plateau"] is not None:
        said.append(
            f"plateau     alpha {found['plateau'][0]:g} to {found['plateau'][1]:g} within 0.5 points"
        )
        said.append(
            "weights     "
            + ", ".join(
                f"{name} {each['alpha']:.2f} ({each['top1']:.2f})"
                for name, each in found["rules"].items()
            )
            + "; in brackets top-1, cross-fitted"
        )
    errors, what = found["errors"], found["outcomes"]
    said += [
        f"errors      bias {errors['bias_t']:.2f} and {errors['bias_c']:.2f}, sigma {errors['sigma_t']:.2f} and "
        f"{errors['sigma_c']:.2f}, correlation {errors['rho']:.2f}",
        f"outcomes    {what['fixed']} of {what['teacher_wrong']} errors repaired, {what['harmed']} of "
        f"{what['teacher_right']} right answers harmed, at alpha {found['fused']['alpha']:g}",
        "",
    ]
    return [escape.line(line) for line in said]


def _row(name: str, each: dict[str, Any]) -> str:
    calibrated = each["ece_calibrated"]
    shown = "-" if calibrated is None else f"{calibrated:.2f}"
    return f"{name:<26}{each['top1']:>8.2f}{each['top5']:>8.2f}{each['ece']:>8.2f}{shown:>12}{each['entropy']:>9.3f}"
