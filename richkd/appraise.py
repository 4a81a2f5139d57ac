"""All that is to be known of a student: right on what, how sure, how robust, at which cost.

    python -m richkd evaluate runs/kd3                    # lines here; tables, pictures and a page in runs/kd3/evaluation
    python -m richkd evaluate runs/kd3 evaluate.rows=0    # without corruption and attacks

Test rows, un-augmented. Its teachers are those of its run, as they lie in the cache or where its config says.
"""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from richkd import cache, distill, estimate, teachers
from richkd.config import Config
from richkd.errors import ConfigError, CorruptError, DataError
from richkd.evaluate import (
    Calibration,
    accuracy,
    accuracy_of,
    agreement,
    by_teacher,
    calibration,
    corruption,
)
from richkd.evaluate.attack import fgsm, pgd
from richkd.evaluate.costs import macs
from richkd.files import read_record
from richkd.precision import computed
from richkd.progress import Progress
from richkd.record import frequencies

EPS = (1, 2, 4, 8)  # grey levels by which attacks may change a pixel
# what of teachers the cache may lack, and is not made for a look at a student that did not listen to them
COMPUTED = ("teachers", "teacher-logits", "miniature", "clip-images", "clip-texts", "clip-cards")
BATCH = 250  # images of a pass
PUBLISHED = "CIFAR-100-C"  # folder of the published arrays, beside those of CIFAR-100


@dataclass(kw_only=True, slots=True, eq=False)
class Appraisal:
    """What was found of a student.

    Attributes:
        found: Numbers and text that JSON can hold, accuracies in percent: see `appraise`.
        calibrations: By `student`, `teacher`, `clip` and `fused`, those that are known.
        config: The run that made it.
    """

    found: dict[str, Any]
    calibrations: dict[str, Calibration]
    config: Config


def appraise(
    folder: Path, changes: dict[str, Any] | None = None, progress: Progress | None = None
) -> Appraisal:
    """Return all that is to be known of the student of a checkpoint.

    Args:
        folder: Checkpoint.
        changes: Dotted keys that say where its data lie now, and how it is looked at.
        progress: Told how far it is.

    Returns:
        `run`, `checkpoint`, `student`, `method`, `data`, `selection`; `val`, `test` and, where epochs were chosen on test rows, `last`: top-1
        and top-5. `calibration` by model: `ece`, `nll`, `confidence`. `classes`: `name`, `n`, `top1`. `groups`: under a long
        tail, by how frequent classes are. With teachers, `teacher`, `clip` and `fused`: `top1`; `agreement` with each, the
        share of rows of which both say the same; `categories` by what the task teacher says. `corruption`: `kind` (published
        or computed), `rows`, `clean`, `mean`, `top1` by family and severity. `attack`: `rows`, `clean`, `eps`, `fgsm`, `pgd`.
        `costs`: `parameters`, `macs`, `flops`, `latency_ms`, `device`. `notes`: what could not be found.

    Raises:
        ConfigError: If its data is not that which it was made with, or published arrays are not of them.
    """
    again = distill.retest(folder, changes)
    task, config = again.task, again.config
    labels = torch.from_numpy(task.dataset.test.labels)
    shown, notes = _shown(again, folder, progress)
    said = {"student": again.logits} | shown
    calibrations = {who: calibration(logits, labels) for who, logits in said.items()}
    of = {who: accuracy(logits, labels) for who, logits in said.items()}
    found: dict[str, Any] = {
        "run": str(folder.parent),
        "checkpoint": str(folder),
        "student": config.student.name,
        "method": config.method.name,
        "data": task.dataset.name,
        "selection": config.selection,
        "val": _percent(again.found["val"]),
        "test": _percent(again.found["test"]),
        "rows": len(labels),
        "images_per_second": again.speed,
    }
    if "last" in again.found:
        found["last"] = {"top1": again.found["last"]["top1"]}
    if groups := frequencies(again.found["test"]):
        found["groups"] = groups
    found |= {who: {"top1": of[who]["top1"]} for who in shown}
    found["calibration"] = {
        who: {"ece": own.ece, "nll": of[who]["loss"], "confidence": own.confidence}
        for who, own in calibrations.items()
    }
    found["agreement"] = agreement(again.logits, shown)
    if "teacher" in shown:
        groups = by_teacher(shown["teacher"], labels, config.evaluate.certain)
        found["categories"] = _nested(accuracy_of(again.logits, labels, groups))
    found["classes"] = by_class(again.logits, labels, task.dataset.names)
    if config.evaluate.rows:
        found |= _robustness(again, labels, progress)
    found["costs"] = _costs(again)
    return Appraisal(found=found | {"notes": notes}, calibrations=calibrations, config=config)


def _percent(values: dict[str, float]) -> dict[str, float]:
    return {key: values[key] for key in ("top1", "top5")}


def _nested(values: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return `NAME/KEY` as NAME: KEY."""
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        group, key = name.split("/")
        found.setdefault(group, {})[key] = value
    return found


def _shown(
    again: distill.Retested, folder: Path, progress: Progress | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the logits of the test rows of the run's teachers, and what is to be said of those that are missing."""
    try:
        with cache.found_only("teachers"):  # one is not trained again for a look at it
            teacher = distill.open_teacher(again.config, again.task, progress)
            shown = {} if teacher is None else teacher.shown("test")
    except cache.Missing:
        return {}, [
            "without teachers: the run's own is in this cache no more; cache=FOLDER says where it is"
        ]
    except (ConfigError, CorruptError, OSError) as error:
        return {}, [f"without teachers: {error}"]
    if teacher is not None:
        record = folder.parent / "run.json"
        then = read_record(record).get("teachers", {}) if record.exists() else teacher.identities
        if then != teacher.identities:
            return {}, ["without teachers: those that its config names are others than the run had"]
    shown = _beside(again, progress) | shown
    return {who: logits.cpu() for who, logits in shown.items()}, []


def _beside(again: distill.Retested, progress: Progress | None) -> dict[str, Tensor]:
    """Return what teachers of the config that the run did not listen to say of the test rows, as far as the cache has it.

    So students of one sweep are compared by one teacher's categories, one that learnt from labels alone, too.
    """
    both = teachers.with_both(again.config)
    with contextlib.suppress(cache.Missing, ConfigError, DataError, CorruptError, OSError):
        with cache.found_only(*COMPUTED):
            found = distill.open_teacher(both, again.task, progress)
            return {who: z for who, z in found.shown("test").items() if who != "fused"}
    return {}


def by_class(logits: Tensor, labels: Tensor, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return name, rows and top-1 of each class that has rows, in their order."""
    right = (logits.argmax(1) == labels).double()
    counts = torch.bincount(labels, minlength=len(names))
    top1 = 100 * torch.bincount(labels, right, minlength=len(names)) / counts
    return [
        {"name": name, "n": n, "top1": value}
        for name, n, value in zip(names, counts.tolist(), top1.tolist(), strict=True)
        if n
    ]


def _robustness(
    again: distill.Retested, labels: Tensor, progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Return top-1 of some test rows, corrupted and attacked."""
    task, config = again.task, again.config
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = order[: config.evaluate.rows].sort().values
    pixels = task.test.pixels(rows).permute(0, 3, 1, 2).contiguous()
    own = labels[rows]
    again.network.requires_grad_(False)

    def logits_of(images: Tensor) -> Tensor:
        images = images.to(task.device, torch.float32).permute(0, 2, 3, 1)
        with computed(task.device, "fp32"):
            return again.network(task.test.normalised(images))

    @torch.no_grad()
    def top1(images: Tensor) -> float:
        said = [logits_of(part).cpu() for part in images.split(BATCH)]
        return accuracy(torch.cat(said), own)["top1"]

    common = {"rows": len(rows), "clean": accuracy(again.logits[rows], own)["top1"]}
    return {
        "corruption": common | _corrupted(again, pixels.cpu(), rows, top1, progress),
        "attack": common | _attacked(logits_of, top1, pixels, own.to(task.device), progress),
    }


def _corrupted(
    again: distill.Retested,
    pixels: Tensor,
    rows: Tensor,
    top1_of: Callable[[Tensor], float],
    progress: Progress | None,
) -> dict[str, Any]:
    """Return top-1 by family and severity, their mean, and whether the images are the published ones."""
    folder = _published(again)
    if folder is None:
        kind, families = "computed", corruption.computed(pixels)
    else:
        labels, shape = again.task.dataset.test.labels, tuple(pixels.permute(0, 2, 3, 1).shape[1:])
        kind = "published"
        families = corruption.published(folder, labels, shape, rows.numpy())
    found = {}
    for k, (family, images) in enumerate(families.items(), start=1):
        found[family] = [top1_of(images(severity)) for severity in corruption.SEVERITIES]
        if progress is not None:
            progress("corrupted images", k, len(families))
    return {"kind": kind, "mean": corruption.mean_of(found), "top1": found}


def _published(again: distill.Retested) -> Path | None:
    """Return the folder of the published arrays, None where there is none."""
    config = again.config
    if config.evaluate.corrupted is not None:
        return Path(config.evaluate.corrupted).expanduser()
    root = config.data.root or os.environ.get("RICHKD_DATA")
    if config.data.source != "cifar100" or not root:
        return None
    folder = Path(root).expanduser() / PUBLISHED
    return folder if folder.is_dir() else None


def _attacked(
    logits_of: Callable[[Tensor], Tensor],
    top1_of: Callable[[Tensor], float],
    pixels: Tensor,
    labels: Tensor,
    progress: Progress | None,
) -> dict[str, Any]:
    """Return top-1 under attacks of each size."""
    found: dict[str, Any] = {"eps": list(EPS), "fgsm": [], "pgd": []}
    for k, eps in enumerate(EPS, start=1):
        for name, attack in (("fgsm", fgsm), ("pgd", pgd)):
            parts = zip(pixels.split(BATCH), labels.split(BATCH), strict=True)
            changed = torch.cat([attack(logits_of, *part, eps) for part in parts])
            found[name].append(top1_of(changed))
        if progress is not None:
            progress("attacks", k, len(EPS))
    return found


def _costs(again: distill.Retested) -> dict[str, Any]:
    """Return size and speed of an answer."""
    task = again.task
    image = torch.zeros(1, task.dataset.channels, *task.dataset.size, device=task.device)
    count = macs(again.network, image)
    return {
        "parameters": sum(each.numel() for each in again.network.parameters()),
        "macs": count,
        "flops": 2 * count,
        "latency_ms": estimate.latency(again.config, task),
        "device": task.device.type,
    }
