"""The model card of a student: what it is, how good, from what, under which terms, and how to make it again."""

import re
import statistics
import textwrap
from pathlib import Path
from typing import Any

import yaml

from richkd.checkpoint import Checkpoint
from richkd.config import Config
from richkd.escape import markdown
from richkd.files import read_record
from richkd.layers import command_of, dump, from_dict
from richkd.student import best_of

CONTROLS = {
    "zeros": "CLIP's logits are 0 for all images",
    "permuted": "CLIP's answers are permuted over the images",
    "permuted-in-class": "CLIP's answers are permuted within each class",
}
UNKNOWN = "unknown"  # the value that model hubs have for it; a licence is its owner's to state


def card(
    name: str, saved: Checkpoint, about: dict[str, Any], difference: dict[str, dict[str, float]]
) -> str:
    """Return the model card as Markdown with a YAML head, as model hubs read it.

    Args:
        name: Of the student.
        saved: Its checkpoint; what its run folder says is told, too, where it lies in one.
        about: As `export.config_of` returns it.
        difference: By exported file and number of images, how far its logits are from the student's.
    """
    meta = saved.meta
    config, run = from_dict(meta["config"]), run_of(saved)
    rows, tested = meta.get("rows", {}), run.get("metrics", {})
    again = command_of(config, threads=run.get("threads"), workers=run.get("workers", 1))
    accuracy = {config.judged: [meta["metrics"].get(f"val/top{k}") for k in (1, 5)]}
    if "test/top1" in tested or not config.caution:  # else the epoch's own are of test rows
        accuracy["test"] = [tested.get(f"test/top{k}") for k in (1, 5)]
    height, width = about["input"]["shape"][2:]
    parts = [
        head(name, config, accuracy["test"][0]),
        f"# {markdown(name)}",
        f"{markdown(config.student.name)} with {about['parameters']:,} parameters: tells {len(about['names'])} classes apart in "
        f"{about['input']['channels']} images of {height} x {width} pixels. Made by richkd with the method "
        f"{markdown(config.method.name)}.",
        "## Accuracy",
        _table(
            ("", "top-1, %", "top-5, %", "rows"),
            [
                (part, *map(_percent, values), str(rows.get(part, UNKNOWN)))
                for part, values in accuracy.items()
            ],
        ),
        f"Epochs and settings were chosen by {config.judged} rows"
        + (
            ", which flatters."
            if config.caution
            else ", test rows were read once, afterwards."
            if tested
            else "."
        ),
        *_seeds(saved.folder, config.judged),
        "## Use",
        f"`student.onnx` and `student.pt2` take uint8 `({', '.join(map(str, about['input']['shape']))})` and return logits; "
        "normalisation is inside. Decoding, turning upright, cutting to the centre and scaling lie outside, and "
        "`config.json` states them; each file holds a copy of it. With ONNX Runtime and Pillow:",
        textwrap.indent(_example(about), "    "),
        _compared(difference),
        "`student.pt2` holds its copy as an extra file of `torch.export.load`, which can run code that is in a file: load those "
        "that you trust. `model.safetensors` holds the weights of the network alone and runs nothing.",
        "## Classes",
        _table(("logit", "class"), [(str(k), name) for k, name in enumerate(about["names"])]),
        "## Origin",
        _table(("", ""), _origin(saved, config, run, rows)),
        "The same again, on a machine like that one:",
        textwrap.indent(again, "    "),
        "All settings:",
        textwrap.indent(dump(config).rstrip("\n"), "    "),
        "## Licences",
        "Nothing here states one; whoever publishes this fills in what holds.",
        _table(("of", "licence"), [(what, UNKNOWN) for what in _licensed(config, run)]),
    ]
    return "\n\n".join(parts) + "\n"


def head(name: str, config: Config, test_top1: float | None) -> str:
    """Return the YAML head."""
    found: dict[str, Any] = {
        "license": UNKNOWN,
        "pipeline_tag": "image-classification",
        "tags": ["knowledge-distillation", "onnx", "richkd"],
    }
    if test_top1 is not None:
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": config.data.source, "type": config.data.source, "split": "test"},
            "metrics": [{"type": "accuracy", "name": "top-1, %", "value": test_top1}],
        }
        found["model-index"] = [{"name": name, "results": [result]}]
    return f"---\n{yaml.safe_dump(found, sort_keys=False, allow_unicode=True)}---"


def run_of(saved: Checkpoint) -> dict[str, Any]:
    """Return what the run folder around a checkpoint says, {} where there is none; of tests only this epoch's."""
    path = saved.folder.absolute().parent / "run.json"
    if not path.exists():
        return {}
    state = read_record(path, "digest")
    if state["digest"] != saved.meta.get("digest"):
        return {}
    if state.get("metrics", {}).get("best_epoch") != saved.meta.get("epoch"):
        state["metrics"] = {}
    return state


def over_seeds(folder: Path) -> list[float]:
    """Return the test accuracies of a sweep's refits of one setting, given the checkpoint of one of them; else none."""
    run = folder.absolute().parent
    label = re.fullmatch(r"(.+)-seed\d+", run.name)
    if run.parent.name != "refits" or label is None:
        return []
    found = []
    for path in run.parent.iterdir():
        if (
            re.fullmatch(rf"{re.escape(label[1])}-seed\d+", path.name)
            and (path / "run.json").exists()
        ):
            metrics = read_record(path / "run.json").get("metrics", {})
            found += [metrics["test/top1"]] if "test/top1" in metrics else []
    return found


def _seeds(folder: Path, judged: str) -> list[str]:
    top1 = over_seeds(folder)
    if len(top1) < 2:
        return []
    sweep = folder.absolute().parents[2]
    best = (sweep / "summary.json").exists() and best_of(sweep).resolve() == folder.resolve()
    return [
        f"One of {len(top1)} students of this setting, each with another seed; of all of them the test top-1 is "
        f"{statistics.fmean(top1):.2f} ± {statistics.stdev(top1):.2f} % (mean ± standard deviation)."
        + f" This one has the highest {judged} accuracy."
        * best
    ]


def _compared(difference: dict[str, dict[str, float]]) -> str:
    counts = " and ".join(next(iter(difference.values())))
    gaps = ", ".join(
        f"those of `{file}` by {max(g.values()):.1e}" for file, g in difference.items()
    )
    return (
        f"Read back from the disk and given batches of {counts} random images, their logits differ from the student's by at "
        f"most: {gaps}."
    )


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}"


def _table(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a table of Markdown; cells are text, and inert."""
    ruled = [titles, ("---",) * len(titles), *(tuple(map(markdown, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def _example(about: dict[str, Any]) -> str:
    channels, height, width = about["input"]["shape"][1:]
    grey = '.convert("L")' if channels == 1 else ""
    resample = about["outside"]["resample"].partition(",")[0].upper()
    border = f", {about['outside']['border']}" if about["outside"]["border"] else ""
    return f"""\
import json
import numpy
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("student.onnx")
names = json.loads(session.get_modelmeta().custom_metadata_map["config.json"])["names"]
image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
image = ImageOps.fit(image, ({width}, {height}), Image.Resampling.{resample}{border}){grey}
images = numpy.array(image).reshape(1, {height}, {width}, {channels}).transpose(0, 3, 1, 2)
(logits,) = session.run(None, {{"images": images}})
print(names[logits[0].argmax()])"""


def _teachers(config: Config, run: dict[str, Any]) -> dict[str, str]:
    """Return the teachers that took part, by what they are called in `run.json`, and what the config says of them."""
    own, clip = config.teacher, config.clip
    told = {
        "checkpoint": f"of {own.checkpoint}",
        "pretrained": f"{own.name}, published weights {own.pretrained}",
        "logits": f"logits of {own.logits}",
    }
    texts = {
        "teacher": told[own.brought[0]]
        if own.brought
        else f"{own.name}, trained on {'the labelled rows' if own.trained_on == 'same' else 'all rows but held-out ones'}"
    }
    for k, each in enumerate((clip, *clip.extra)):
        texts["clip" if k == 0 else f"clip {k + 1}"] = (
            f"logits of {each.logits}"
            if each.logits
            else f"{each.model}, weights {each.pretrained}, prompts {each.prompts}"
        )
    return {who: texts[who] for who in run.get("teachers", {}) if who in texts}


def _origin(
    saved: Checkpoint, config: Config, run: dict[str, Any], rows: dict[str, int]
) -> list[tuple[str, str]]:
    meta, loss = saved.meta, config.loss
    learnt = (
        f", {rows['train']} rows to learn from, {rows['labelled']} of them labelled" if rows else ""
    )
    found = [("data", f"{config.data.source}{learnt}; digest {meta['data']}")]
    for who, text in _teachers(config, run).items():
        title = who.replace("teacher", "task teacher").replace("clip", "zero-shot teacher")
        found.append((title, f"{text}; identity {run['teachers'][who]}"))
    how = [f"{config.method.name}, labels {loss.ce:g}", *terms(config)]
    found.append(
        (
            "method",
            f"{'; '.join(how)}; epoch {meta['epoch']} of {config.train.epochs}, seed {config.seed}",
        )
    )
    if run:
        found.append(
            (
                "made with",
                f"torch {run.get('torch')}, Python {run.get('python')}; threads of the CPU: {run.get('threads')}, workers: "
                f"{run.get('workers')}",
            )
        )
    found.append(("settings", f"digest {meta.get('digest')}"))
    found.append(("weights", f"SHA-256 {saved.sha256}"))
    return found


def terms(config: Config) -> list[str]:
    """Return what a loss has beside plain labels, and what its teachers are: a line of a terminal each."""
    loss, fusion, found = config.loss, config.fusion, []
    if loss.smoothing:
        found.append(f"labels smoothed by {loss.smoothing:g}")
    if loss.logit:
        fused = f"alpha {fusion.alpha:g} at clip.scale {config.clip.scale}, "
        found.append(
            f"{fused if fusion.alpha < 1 else ''}T {loss.temperature:g} of the {loss.temperature_of} logits, "
            f"weight {loss.logit:g}"
        )
        dkd = f"decoupled (dkd), alpha {loss.dkd_alpha:g} and beta {loss.dkd_beta:g}"
        kinds = {
            dkd: loss.logit_kind == "dkd",
            "standardised": loss.standardise,
            f"warm-up of {loss.warmup} epochs": loss.warmup > 0,
            f"weighted by {fusion.weighting}": fusion.weighting != "one" and config.fuses,
            "mixed as probabilities": fusion.space == "probs" and fusion.alpha < 1,
        }
        if any(kinds.values()):
            found.append(f"logits {', '.join(kind for kind, holds in kinds.items() if holds)}")
    if loss.contrasts:
        alpha = config.feature_alpha
        fused = f", alpha {alpha:g} of the task teacher's" if alpha < 1 else " of the task teacher"
        found.append(f"features contrasted{fused}, weight {loss.feature:g}")
    if loss.maps:
        found.append(
            f"maps of the task teacher: {loss.transform}, {loss.distance}, weight {loss.feature:g}"
        )
    if config.asks_clip:
        for each in config.clip.extra:
            found.append(f"with a further CLIP: {each.logits or each.model}, share {each.weight:g}")
        if config.clip.control != "none":
            found.append(f"{CONTROLS[config.clip.control]}: a control")
    return found


def _licensed(config: Config, run: dict[str, Any]) -> list[str]:
    whats = {"teacher": "weights of the task teacher", "clip": "weights of the zero-shot teacher"}
    return [
        "this student",
        "code that made it",
        f"data, {config.data.source}",
        *(f"{whats[who.split()[0]]}, {text}" for who, text in _teachers(config, run).items()),
    ]
