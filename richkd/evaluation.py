"""What `appraise` found, as it is shown: lines for the terminal, and a page with its pictures and tables."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from richkd import escape, page
from richkd.appraise import Appraisal
from richkd.draw import Picture
from richkd.evaluate import corruption, pictures
from richkd.evaluate.calibration import Bin, Calibration
from richkd.files import make_folder, write_json

SAID = {
    "right_certain": "right and certain",
    "right_uncertain": "right and uncertain",
    "wrong": "wrong",
}
WIDTH = 80  # columns
DRAWN = (
    *(f"{name}.{kind}" for name in ("corruption", "attack") for kind in ("svg", "png", "csv")),
    "every_corruption.csv",
)
KINDS = {"published": "published images", "computed": "computed here, not the published images"}


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield what `appraise` found as lines for the terminal, without what `record.result_lines` says of it."""
    for line in _lines(found):
        parts = textwrap.wrap(
            line, WIDTH, subsequent_indent=" " * 11, drop_whitespace=False, break_on_hyphens=False
        )
        yield from (part.rstrip() for part in parts)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    for title, key, form in (("ECE", "ece", ".2f"), ("NLL", "nll", ".3f")):
        unit = " %" if key == "ece" else ""
        each = (f"{who} {own[key]:{form}}{unit}" for who, own in found["calibration"].items())
        yield f"{title:<10} {', '.join(each)}"
    if found["agreement"]:
        each = (f"with {who} {value:.2f} %" for who, value in found["agreement"].items())
        yield f"{'agrees':<10} {', '.join(each)}"
    for name, group in found.get("categories", {}).items():
        value = f"{group['top1']:6.2f} %" if "top1" in group else "     -  "
        yield f"{'':<10} test top1 {value}  of {group['n']} rows, teacher {SAID[name]}"
    ranked = sorted(found["classes"], key=lambda each: each["top1"])
    worst = ", ".join(f"{each['name']} {each['top1']:.1f} %" for each in ranked[:4])
    yield f"{'classes':<10} weakest: {worst}"
    if "corruption" in found:
        yield from _robust_lines(found["corruption"], found["attack"])
    costs = found["costs"]
    yield (
        f"{'costs':<10} {costs['parameters']:,} parameters, {costs['macs'] / 1e6:.2f} M multiply-adds (two FLOPs each), "
        f"{costs['latency_ms']:.2f} ms an image on {_place(costs)}"
    )
    yield from found["notes"]


def _place(costs: dict[str, Any]) -> str:
    return "one thread of the CPU" if costs["device"] == "cpu" else "the GPU"


def _robust_lines(corrupted: dict[str, Any], attacked: dict[str, Any]) -> Iterator[str]:
    rows = f"{corrupted['rows']} test rows"
    yield (
        f"{'corrupted':<10} mean {corrupted['mean']:.2f} % (clean {corrupted['clean']:.2f} %) of {rows}; "
        f"{KINDS[corrupted['kind']]}"
    )
    for group, values in corruption.by_group(corrupted["top1"]).items():
        yield f"{'':<10} {group:<8}{''.join(f'{value:8.2f}' for value in values)} %"
    sizes = "".join(f"{eps:8d}" for eps in attacked["eps"])
    yield f"{'attacked':<10} by /255 {sizes}    of {rows}"
    for name in ("fgsm", "pgd"):
        yield f"{'':<10} {name.upper():<8}{''.join(f'{value:8.2f}' for value in attacked[name])} %"


def write(appraisal: Appraisal, folder: Path, name: str) -> Path:
    """Write `evaluation.json`, a page in HTML and Markdown, its pictures, and the tables behind them.

    Args:
        appraisal: What is written.
        folder: Where to; what lies there of an earlier one is replaced.
        name: What the student is called.

    Returns:
        The HTML file.
    """
    found, calibrations = appraisal.found, appraisal.calibrations
    make_folder(folder, "--to")
    for file in DRAWN if "corruption" not in found else ():  # of an earlier look that went further
        (folder / file).unlink(missing_ok=True)
    bins = {who: [asdict(each) for each in own.bins] for who, own in calibrations.items()}
    write_json(folder / "evaluation.json", found | {"bins": bins})
    blocks = [
        *_overview(found),
        *_models(found, pictures.reliability(calibrations)),
        *_rows_right(found),
        *(_robustness(found) if "corruption" in found else ()),
        *_costs(found),
    ]
    return page.write(folder, "evaluation", f"Evaluation of {name}", blocks)


def calibration_of(kept: dict[str, Any]) -> Calibration:
    """Return how sure the student of an `evaluation.json` is."""
    own = kept["calibration"]["student"]
    bins = tuple(Bin(**each) for each in kept["bins"]["student"])
    return Calibration(own["ece"], own["confidence"], bins)


def _overview(found: dict[str, Any]) -> Iterator[page.Block]:
    """Yield what is seen at a glance."""
    costs, test = found["costs"], found["test"]
    whose = f"{found['student']} by {found['method']} on {found['data']}"
    yield page.Text(f"{whose}, from {found['checkpoint']}.", "soft")
    rows = f"top-5 {test['top5']:.2f} %, {found['rows']:,} rows"
    ece = f"{found['calibration']['student']['ece']:.2f} %"
    tiles = [("test top-1", f"{test['top1']:.2f} %", rows), ("calibration error", ece, "ECE")]
    if "corruption" in found:
        own, attacked = found["corruption"], found["attack"]
        images = KINDS[own["kind"]].split(",")[0]
        size = f"top-1, PGD at {attacked['eps'][-1]}/255"
        tiles.append(("corrupted", f"{own['mean']:.2f} %", f"mean top-1, {images}"))
        tiles.append(("attacked", f"{attacked['pgd'][-1]:.2f} %", size))
    each = f"{costs['macs'] / 1e6:.2f} M multiply-adds, {costs['latency_ms']:.2f} ms an image"
    tiles.append(("parameters", f"{costs['parameters']:,}", each))
    yield page.Tiles(tiles)
    for note in found["notes"]:
        yield page.Text(note, "note")


def _models(found: dict[str, Any], drawn: Picture) -> Iterator[page.Block]:
    """Yield the student beside its teachers."""
    top1 = {who: found["test" if who == "student" else who]["top1"] for who in found["calibration"]}
    agrees = {who: f"{value:.2f}" for who, value in found["agreement"].items()}
    yield page.Heading("Student and teachers")
    yield page.Table(
        header=("", "top-1, %", "ECE, %", "NLL", "confidence, %", "agrees with the student, %"),
        rows=[
            (
                who,
                *(f"{top1[who]:.2f}", f"{own['ece']:.2f}", f"{own['nll']:.3f}"),
                *(f"{own['confidence']:.2f}", agrees.get(who, "")),
            )
            for who, own in found["calibration"].items()
        ],
        right=range(1, 6),
        strong=0,
    )
    yield page.Text(
        "On test rows, un-augmented. Confidence is the mean probability of the first class: above top-1 a model is too sure. "
        "NLL is in nats.",
        "soft",
    )
    yield page.Pictures([drawn])


def _rows_right(found: dict[str, Any]) -> Iterator[page.Block]:
    """Yield the student's accuracy by groups of rows and by class."""
    groups = [
        *((f"teacher {SAID[name]}", own) for name, own in found.get("categories", {}).items()),
        *((f"{name} classes", own) for name, own in found.get("groups", {}).items()),
    ]
    every = [(each["name"], each["n"], each["top1"]) for each in found["classes"]]
    tables = [
        page.Table(
            header=("test rows", "n", "top-1, %"),
            rows=[
                (text, str(own["n"]), f"{own['top1']:.2f}" if "top1" in own else "too few")
                for text, own in groups
            ],
            right=(1, 2),
        )
    ]
    classes = page.Table(
        header=("class", "rows", "top-1, %"),
        rows=[(name, str(n), f"{top1:.2f}") for name, n, top1 in every],
        right=(1, 2),
        name="every_class",
        csv=escape.to_csv(("class", "n", "top1"), every),
    )
    yield page.Heading("Which rows it gets right")
    yield page.Beside(
        [*(tables if groups else ()), page.Details("Every class", [classes])],
        [page.Pictures([pictures.classes(found["classes"])])],
    )


def _robustness(found: dict[str, Any]) -> Iterator[page.Block]:
    """Yield what becomes of the accuracy where images are corrupted or attacked."""
    own, kind = found["corruption"], KINDS[found["corruption"]["kind"]]
    group_of = {name: group for group, names in corruption.GROUPS.items() for name in names}
    every = [
        (group_of[name], name, *values, sum(values) / len(values))
        for name, values in own["top1"].items()
    ]
    header = ("group", "family", *map(str, corruption.SEVERITIES), "mean")
    missing = ", ".join(sorted(group_of.keys() - own["top1"].keys()))
    yield page.Heading("Corrupted and attacked images")
    yield page.Pictures([pictures.corruption(own, kind), pictures.attack(found["attack"])])
    table = page.Table(
        header=header,
        rows=[
            (
                group,
                f"{name} *" if name in corruption.EXTRA else name,
                *(f"{v:.2f}" for v in values),
            )
            for group, name, *values in every
        ],
        right=range(2, len(header)),
        name="every_corruption",
        csv=escape.to_csv(header, every),
    )
    text = (
        f"Top-1, %, of {own['rows']} test rows by severity; {kind}. Those with a star are in no mean."
        + (f" Not there: {missing}." if missing else "")
    )
    yield page.Details("Every corruption", [table, page.Text(text, "soft")])


def _costs(found: dict[str, Any]) -> Iterator[page.Block]:
    """Yield size and speed."""
    costs = found["costs"]
    yield page.Heading("Costs")
    yield page.Text(
        f"{costs['parameters']:,} parameters. An answer takes {costs['macs']:,} multiply-adds, {costs['flops']:,} FLOPs at two "
        "each, of convolutions, matrix products and attention; what is done element by element is not counted. It takes "
        f"{costs['latency_ms']:.2f} ms on {_place(costs)}, the median of one image at a time, and in batches, on all threads of "
        f"this process, {found['images_per_second']:,.0f} images go by in a second."
    )
