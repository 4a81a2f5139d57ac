"""A distilled student taken from its checkpoint: normalisation and network in one module.

It takes a sweep, a run or a checkpoint:

    from richkd import load_student
    student = load_student("runs/digits-cnn8-261123-120000")
    student.names[student(student.read("photo.jpg")).argmax(1)[0]]
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from richkd import checkpoint, models
from richkd.config import Config
from richkd.data.pictures import centre, decode
from richkd.data.views import normalise
from richkd.errors import ConfigError, CorruptError
from richkd.files import read_record
from richkd.layers import Layers, build, flatten

# without them no image can be classified
META = {"config", "names", "channels", "size", "mean", "std"}


class Student(nn.Module):
    """A network with the normalisation that it was trained with.

    Args:
        saved: As `distill` wrote it, with class names, mean and deviation.
    """

    def __init__(self, saved: checkpoint.Checkpoint) -> None:
        super().__init__()
        self.network, meta = network_of(saved), saved.meta
        self.names = tuple(meta["names"])
        self.channels, self.size = meta["channels"], tuple(meta["size"])
        # as its test images were shown
        self.resample, self.border = meta.get("resample", "bicubic"), meta.get("border", 0.0)
        self.register_buffer("mean", torch.tensor([255 * m for m in meta["mean"]]))
        self.register_buffer("std", torch.tensor([255 * s for s in meta["std"]]))

    def read(self, *paths: str | Path) -> Tensor:
        """Return image files as this student takes them, uint8 `(N, C, H, W)`: upright, centre cut, scaled.

        Raises:
            DataError: If one cannot be read as an image.
        """
        height, width = self.size
        fitted = [
            ImageOps.fit(decode(Path(path)), (width, height), Image.Resampling.BICUBIC)
            if height != width
            else Image.fromarray(centre(decode(Path(path)), height, self.resample, self.border))
            for path in paths
        ]
        grey = self.channels == 1
        rows = [np.array(image.convert("L") if grey else image) for image in fitted]
        return (
            torch.from_numpy(np.stack(rows))
            .view(-1, height, width, self.channels)
            .permute(0, 3, 1, 2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, K)` of uint8 `images` `(N, C, H, W)`."""
        wanted = (self.channels, *self.size)
        if images.dtype != torch.uint8 or images.shape[1:] != wanted:
            raise ValueError(
                f"images must be uint8 of shape (N, {', '.join(map(str, wanted))}) but got {images.dtype} of "
                f"{tuple(images.shape)}."
            )
        return self.network(normalise(images.permute(0, 2, 3, 1), self.mean, self.std))


def check_meta(saved: checkpoint.Checkpoint) -> None:
    """Raise ConfigError unless a checkpoint says what one of a student says."""
    missing = META - saved.meta.keys()
    if (
        missing
        or not isinstance(saved.meta["config"], dict)
        or "student" not in saved.meta["config"]
    ):
        raise ConfigError(
            f"{saved.folder} must be the checkpoint of a student but lacks {', '.join(sorted(missing)) or 'student'}; "
            "name another."
        )


def run_config(saved: checkpoint.Checkpoint, changes: dict[str, Any] | None = None) -> Config:
    """Return the run that made a checkpoint, on whatever this machine has: what is found is the student's, not the machine's.

    Args:
        saved: Its checkpoint.
        changes: Dotted keys that say where things lie now, and how it is looked at.

    Raises:
        ConfigError: If it is a checkpoint of something else.
    """
    check_meta(saved)
    wanted = flatten(saved.meta["config"]) | {"device": "auto"} | (changes or {})
    return build(Layers().over("", wanted))


def network_of(saved: checkpoint.Checkpoint) -> nn.Module:
    """Return the network of a run's checkpoint with its weights.

    Raises:
        ConfigError: If it is a checkpoint of something else, or of another version.
    """
    check_meta(saved)
    meta = saved.meta
    wanted = meta["config"]["student"]
    try:
        network = models.build(
            wanted["name"],
            len(meta["names"]),
            channels=meta["channels"],
            size=meta["size"],
            shortcut=wanted["shortcut"],
        )
        network.load_state_dict(saved.weights)
    except (KeyError, TypeError, RuntimeError) as error:  # of torch: names or shapes differ
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{saved.folder} must be the checkpoint of a student but is not ({reason}); name another."
        ) from error
    return network


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a checkpoint folder, a run or a sweep stands for: its best one."""
    if (path / "summary.json").exists():
        return best_of(path)
    for name in ("best", "last"):
        if checkpoint.exists(path / name):
            return path / name
    if checkpoint.exists(path):
        return path
    raise ConfigError(f"{path} holds no checkpoint; give a checkpoint, a run or a finished sweep.")


def best_of(sweep: Path, cell: str | None = None) -> Path:
    """Return the checkpoint that a sweep's summary names; one outside the sweep is refused.

    Args:
        sweep: Its folder.
        cell: Of a grid, which names one for each student.

    Raises:
        ConfigError: If a grid is asked without a cell that it has, or a search for one.
    """
    summary = read_record(sweep / "summary.json", "best")
    best, cells = summary["best"], summary.get("cells", {})
    if cells and cell not in cells:
        got = repr(cell) if cell else "none"
        raise ConfigError(
            f"{sweep.name} is a grid, and of its cells one must be named but got {got}; take one of {', '.join(cells)} by "
            f"--cell where that is a flag, or its run, such as {sweep / 'refits' / next(iter(cells))}-seed0."
        )
    if cell and not cells:
        raise ConfigError(
            f"--cell={cell} names a student of a grid but {sweep.name} is none; leave it out."
        )
    best = cells[cell] if cell else best
    named = best.get("checkpoint") if isinstance(best, dict) else None
    if not isinstance(named, str) or not (sweep / named).resolve().is_relative_to(sweep.resolve()):
        raise CorruptError(
            f"{sweep / 'summary.json'} must name a checkpoint in the sweep's folder but names {named!r}; restore it."
        )
    return sweep / named


def load_student(path: str | Path) -> Student:
    """Return the student of a checkpoint, a run (its best epoch) or a sweep (its best refit), frozen, in eval mode.

    Raises:
        ConfigError: If there is no checkpoint of richkd at `path`.
        CorruptError: If a file's checksum is not the recorded one.
    """
    return Student(checkpoint.load(find_checkpoint(Path(path)))).eval().requires_grad_(False)
