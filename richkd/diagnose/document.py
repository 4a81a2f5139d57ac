"""A diagnosis as a document: of its plain JSON alone, so that a sweep can show one that was made before it."""

import shlex
from collections.abc import Mapping
from typing import Any

from richkd.diagnose import of_target
from richkd.diagnose.pictures import CELLS, FEW, along, chosen, error, named, pictures, share
from richkd.layers import scalar
from richkd.page import Beside, Block, Code, Details, Heading, Pictures, Table, Text, Tiles

LAYER = "my.yaml"  # as commands in texts call the user's
DOUBT = (
    "All that follows is of these rows and shares the doubt; no weight is recommended from them."
)
RULES = {
    "full": "the least squared error, bias and all",
    "printed": "as the paper's supplement prints it, the bias dropped",
    "independent": "as printed, the correlation taken for 0",
    "nll": "the most likely labels, after calibration",
    "best": "right most often, on a grid of 0.05",
}


def document(found: Mapping[str, Any]) -> list[Block]:
    """Return a diagnosis, as `diagnose` returns it, as blocks."""
    drawn = {one.name.removeprefix("diagnosis-"): one for one in pictures(found)}

    def side(*names: str) -> Pictures:
        return Pictures([drawn[name] for name in names])

    alpha = f"{found['fused']['alpha']:g}"
    rows = found["rows"]
    return [
        Text(found["verdict"], "lead"),
        *([Text(DOUBT, "note")] if found["caution"] is not None else []),
        Tiles(tiles(found)),
        Text(
            f"On {rows['n']:,} rows ({rows['of']}) of {found['classes']:,} classes. A weight, alpha, is the task teacher's, CLIP has "
            f"the rest; it means something only together with the scale of CLIP's logits, here clip.scale {found['scale']}. "
            "It is the teachers that are judged here: what a student learns from them is for a run to show.",
            "soft",
        ),
        *start(found),
        Heading("Does fusing help?"),
        side("alpha", "prompts"),
        accuracies(found),
        Heading(f"What fusing changes, at alpha {alpha}"),
        Text(
            f"Rows are followed at fusion.alpha, {alpha} here; to follow them at another weight, give it: fusion.alpha=A.",
            "soft",
        ),
        side("outcomes", "certain"),
        table10(found),
        agreement(found),
        cells(found),
        Heading(f"Classes, at alpha {alpha}"),
        *(
            [side("classes"), Details(f"All {len(found['by_class']):,} classes", [by_class(found)])]
            if drawn["classes"].wide
            else [Beside([side("classes")], [by_class(found)])]
        ),
        Heading("Why, and which weight"),
        Text(
            "Averaging two teachers pays where their errors differ: little bias, and a low correlation. Errors are told in "
            "standardised units: rows of logits are centred, each teacher divided by the spread of its logits, and compared with "
            "the labels in the same form."
        ),
        Beside([side("error")], errors(found)),
        *weights(found),
        Heading("The target that a student would learn"),
        *target(found),
        side("target"),
        Heading("Calibration"),
        side("reliability"),
        calibrated(found),
    ]


def in_short(found: Mapping[str, Any]) -> list[Block]:
    """Return what a diagnosis is for as blocks of another document: does fusing help, and with which weight."""
    doubt = [] if found["caution"] is None else [Text(DOUBT, "note")]
    drawn = Pictures([along(found), error(found)])
    return [*doubt, drawn, accuracies(found), *weights(found)]


def points(gain: Mapping[str, float]) -> str:
    """Return the 95 % interval of a gain."""
    return f"{gain['low']:+.2f} to {gain['high']:+.2f}"


def span(plateau: list[float]) -> str:
    """Return from which to which weight a plateau reaches."""
    low, high = plateau
    return f"{low:g} to {high:g}" if low < high else f"{low:g}"


def optional(value: float | None, digits: int = 2) -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def tiles(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the numbers that a reader looks for first."""
    best, gain, plateau, first = (found[key] for key in ("best", "gain", "plateau", "start"))
    shown = [
        ("task teacher", f"{found['teacher']['top1']:.2f} %", "top-1, alone"),
        (
            f"CLIP, {named(found)[found['prompts']]}",
            f"{chosen(found)['top1']:.2f} %",
            "top-1, alone, zero-shot",
        ),
        (
            "fused, at its best",
            f"{best['top1']:.2f} %",
            f"at alpha {best['alpha']:g}, in sample",
        ),
        (
            "gain, out of bag",
            f"{gain['mean']:+.2f} points",
            f"95 %: {points(gain)}",
        ),
    ]
    if first is None:
        said = "cannot be told" if found["helps"] is None else "not shown to help"
        return [*shown, ("weight", "none", said)]
    more = f"plateau {span(plateau)}, T {first['loss.temperature']:.2g}"
    return [*shown, ("weight", f"alpha {first['fusion.alpha']:.2f}", more)]


def start(found: Mapping[str, Any]) -> list[Block]:
    """Return where a sweep or a run may start, and what to do where fusing does not help."""
    if (first := found["start"]) is not None:
        path = found.get("files", {}).get("start", "start.yaml")
        sources = shlex.quote(f"warmstart.sources=[paper, {scalar(path)}]")
        text = "".join(f"{key}: {scalar(value)}\n" for key, value in first.items())
        return [
            Heading("Starting point"),
            Text(
                "The weight with the least squared error, and the temperature at which the target stays as sharp as plain "
                f"distillation's at T {found['temperature']:g}. As a layer over your own it trains one student; a sweep begins with "
                "it beside the setting as printed:"
            ),
            Code(
                f"{text}\npython -m richkd distill {LAYER} {shlex.quote(path)}\npython -m tune sweep {LAYER} {sources}"
            ),
        ]
    if found["helps"] is None:
        return []
    return [
        Heading("What to do instead"),
        Text("Distil from the task teacher alone:"),
        Code(f"python -m richkd distill {LAYER} method.name=kd"),
    ]


def accuracies(found: Mapping[str, Any]) -> Table:
    """Return the accuracy of the task teacher, of CLIP by prompt set, and of both fused."""
    names, fused = named(found), found["fused"]
    empty = ["", "", "", ""]

    def row(name: str, each: Mapping[str, Any], more: list[str]) -> list[str]:
        return [name, f"{each['top1']:.2f}", f"{each['top5']:.2f}", *more]

    sets = [
        row(
            f"CLIP, {names[each['prompts']]}",
            each,
            [
                f"{each['best']['alpha']:g}",
                f"{each['best']['top1']:.2f}",
                f"{each['gain']['mean']:+.2f}",
                points(each["gain"]),
            ],
        )
        for each in found["clip"]
    ]
    which = next(
        k for k, each in enumerate(found["clip"], 1) if each["prompts"] == found["prompts"]
    )
    return Table(
        header=(
            *("teacher", "top-1, %", "top-5, %", "best alpha", "fused there, %"),
            *("gain out of bag", "95 % interval"),
        ),
        rows=[
            row("task teacher", found["teacher"], empty),
            *sets,
            row(f"fused, alpha {fused['alpha']:g}", fused, empty),
        ],
        right=(1, 2, 3, 4, 5, 6),
        strong=which,
    )


def table10(found: Mapping[str, Any]) -> Table:
    """Return the outcomes of fusion as Table 10 of the supplement has them, also at the theory's weight if one is recommended."""
    columns = [(f"alpha {found['fused']['alpha']:g}", found["outcomes"])]
    weight = found["alpha_star"]["full"]
    if weight is not None:
        columns.append((f"alpha {weight:.2f}, by theory", found["outcomes_weighted"]))

    def row(name: str, count: str, base: str) -> list[str]:
        cells = [name, f"{found['outcomes'][base]:,}"]
        for _, what in columns:
            part = f"{100 * what[count] / what[base]:.1f} %" if what[base] else "-"
            cells += [f"{what[count]:,}", part]
        return cells

    heads = [each for title, _ in columns for each in (title, "share")]
    return Table(
        header=("outcome of fusing (as Table 10 of the supplement)", "of rows", *heads),
        rows=[
            row("task teacher wrong, fused right", "fixed", "teacher_wrong"),
            row("target outside the task teacher's top 5, fused right", "top5_fixed", "top5_base"),
            row("task teacher right, fused wrong", "harmed", "teacher_right"),
            row("task teacher right, target outside the fused top 5", "top5_lost", "teacher_right"),
        ],
        right=range(1, 2 + len(heads)),
    )


def cells(found: Mapping[str, Any]) -> Table:
    """Return how many rows are right or wrong, certain or not, before and after fusing."""
    total = found["rows"]["n"]
    columns = [
        (f"{label}{', calibrated' * (kind == 'calibrated')}", counts[who])
        for kind, counts in found["figure1"].items()
        for who, label in (("teacher", "task teacher"), ("fused", "fused"))
        if who in counts
    ]

    def both(count: int) -> list[str]:
        part = share(count, total)
        return [f"{count:,}", "" if part is None else f"{part:.2f}"]

    return Table(
        header=(
            f"rows (a share of fewer than {FEW} is not given)",
            *(each for name, _ in columns for each in (f"{name}, n", "%")),
        ),
        rows=[
            [name, *(each for _, counts in columns for each in both(counts[cell]))]
            for cell, (name, _) in CELLS.items()
        ],
        right=tuple(range(1, 1 + 2 * len(columns))),
    )


def agreement(found: Mapping[str, Any]) -> Text:
    """Return how often both teachers agree, as sentences."""
    how = found["agreement"]
    return Text(
        f"Task teacher and CLIP name the same class in {how['same_class']:.1f} % of the rows. Both are right in "
        f"{how['both_right']:.1f} %, only the task teacher in {how['only_teacher']:.1f} %, only CLIP in {how['only_clip']:.1f} %, "
        f"neither in {how['neither']:.1f} %."
    )


def by_class(found: Mapping[str, Any]) -> Table:
    """Return the accuracy of each teacher on each class."""
    return Table(
        header=("class", "rows", "task teacher, %", "CLIP, %", "fused, %", "gain, points"),
        rows=[
            [
                *(each["name"], f"{each['n']:,}"),
                *(f"{each[who]:.1f}" for who in ("teacher", "clip", "fused")),
                f"{each['gain']:+.1f}",
            ]
            for each in found["by_class"]
        ],
        right=(1, 2, 3, 4, 5),
    )


def errors(found: Mapping[str, Any]) -> list[Block]:
    """Return how both teachers err, by their logits and, where both can be calibrated, by their probabilities."""
    clip = f"CLIP, {named(found)[found['prompts']]}"
    blocks: list[Block] = [
        _errors("errors of standardised logits", clip, found["errors"], logits=True)
    ]
    if found["probabilities"] is not None:
        blocks.append(
            _errors(
                "errors of calibrated probabilities", clip, found["probabilities"], logits=False
            )
        )
    return blocks


def _errors(title: str, clip: str, own: Mapping[str, float], *, logits: bool) -> Table:
    rows = [
        ["bias, root mean square over classes", *_pair(own, "bias")],
        ["variance around it", f"{own['sigma_t'] ** 2:.3f}", f"{own['sigma_c'] ** 2:.3f}"],
        ["standard deviation, sigma", *_pair(own, "sigma")],
        ["correlation of both, rho", f"{own['rho']:.3f}", ""],
    ]
    if logits:
        rows.append(["spread of the logits, as they are fused", *_pair(own, "spread")])
    return Table(header=(title, "task teacher", clip), rows=rows, right=(1, 2))


def weights(found: Mapping[str, Any]) -> list[Block]:
    """Return the weight that each rule gives, and how right it is."""
    if found["helps"] is None:
        return []
    table = Table(
        header=("rule", "seeks", "standardised", f"alpha at {found['scale']}", "top-1, %"),
        rows=[
            [
                *(name, RULES.get(name, "")),
                f"{found['standardised'][name]:.2f}" if name in found["standardised"] else "",
                *(f"{each['alpha']:.2f}", f"{each['top1']:.2f}"),
            ]
            for name, each in found["rules"].items()
        ],
        right=(2, 3, 4),
        strong=list(found["rules"]).index("full"),
    )
    text = (
        "Top-1 is cross-fitted: the weight comes from other rows than those that it is judged on. Standardised weights are the "
        "theory's; only alpha can be used, and only at this scale."
    )
    weight, (low, high) = found["alpha_star"]["full"], found["plateau"]
    if not low <= weight <= high:
        text += (
            f" The theory's {weight:.2g} lies outside of the plateau: the least squared error is not the most rows right, and what "
            "is best on these rows is partly chance, which cross-fitting shows."
        )
    if found["balanced"]:
        text += " Accuracies are means over classes here, while errors and their weights count each row alike."
    probabilities = found["alpha_star"]["probabilities"]
    if probabilities is not None:
        text += (
            f" On calibrated probabilities instead of logits the full form is {probabilities:.2f}."
        )
    return [table, Text(text, "soft"), *several(found), *weightings(found)]


def several(found: Mapping[str, Any]) -> list[Block]:
    """Return the share that the theory gives each of several zero-shot teachers; nothing where there is one."""
    if not found["several"]:
        return []
    return [
        Text("Of several zero-shot teachers the theory gives each a share, none below 0:"),
        Table(
            header=("teacher", "standardised", f"share at {found['scale']}"),
            rows=[
                [each["teacher"], f"{each['standardised']:.2f}", f"{each['share']:.2f}"]
                for each in found["several"]
            ],
            right=(1, 2),
        ),
    ]


def weightings(found: Mapping[str, Any]) -> list[Block]:
    """Return whether a weight of its own for each row is more often right than one weight for all."""
    names = {
        "class": "by the class that the task teacher predicts",
        "confidence": "by the task teacher's confidence",
    }
    one, others = found["weighting"]["one"], []
    for by, name in names.items():
        if (own := found["weighting"][by]) is not None:
            others.append(
                [by, name, f"{own['top1']:.2f}", f"{own['gain']:+.2f}", f"{own['se']:.2f}"]
            )
    return [
        Text(
            "Does each row deserve its own weight? One weight for all is fusion.weighting=one, the default; another is worth it "
            "where its gain, cross-fitted and paired by image, is more than twice the standard error:"
        ),
        Table(
            header=("fusion.weighting", "a weight", "top-1, %", "gain, points", "s.e."),
            rows=[["one", "for all rows, the likeliest", f"{one['top1']:.2f}", "", ""], *others],
            right=(2, 3, 4),
        ),
    ]


def _pair(own: Mapping[str, float], what: str) -> list[str]:
    return [f"{own[f'{what}_{who}']:.3f}" for who in ("t", "c")]


def target(found: Mapping[str, Any]) -> list[Block]:
    """Return what the student would receive on the rows that it learns from."""
    own, plain = found["target"], found["temperature"]
    said = f"Over {own['rows']:,} transfer rows, un-augmented"
    if own["teacher_error"] is not None:
        said += f", of which the task teacher gets {own['teacher_error']:.1f} % wrong where labels are known"
    text = Text(f"{said}. A better teacher at the wrong temperature can be a worse target.")
    alphas = {"plain distillation": 1.0, "fusion.alpha": found["fused"]["alpha"]}
    if found["start"] is not None:
        alphas["starting point"] = found["start"]["fusion.alpha"]
    table = Table(
        header=(
            *("target", "alpha", "sharpness", f"entropy at T {plain:g}", "T that keeps it"),
            *("entropy there", "KL to plain"),
        ),
        rows=[
            [
                *(name, f"{alpha:.2f}", f"{of_target(found, 'sharpness', alpha):.2f}"),
                f"{of_target(found, 'entropy', alpha):.3f}",
                f"{of_target(found, 'kept', alpha):.2f}",
                *(f"{of_target(found, key, alpha):.3f}" for key in ("entropy_kept", "kl")),
            ]
            for name, alpha in alphas.items()
        ],
        right=(1, 2, 3, 4, 5, 6),
        strong=2 if found["start"] is not None else None,
    )
    return [text, table]


def calibrated(found: Mapping[str, Any]) -> Table:
    """Return how sure each teacher is, and how calibrated."""
    names, fused = named(found), found["fused"]
    every = [
        ("task teacher", found["teacher"]),
        *((f"CLIP, {names[each['prompts']]}", each) for each in found["clip"]),
        (f"fused, alpha {fused['alpha']:g}", fused),
    ]
    return Table(
        header=(
            *("teacher", "entropy, nats", "NLL, nats", "ECE, %"),
            *("T that calibrates", "ECE there, %"),
        ),
        rows=[
            [
                *(name, f"{each['entropy']:.3f}", f"{each['nll']:.3f}", f"{each['ece']:.2f}"),
                *(optional(each["temperature"]), optional(each["ece_calibrated"])),
            ]
            for name, each in every
        ],
        right=(1, 2, 3, 4, 5),
    )
