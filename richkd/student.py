"""A distilled student taken from its checkpoint: normalisation and network in one module.

It takes a sweep, a run or a checkpoint:

    from richkd import load_student
    student = load_student("runs/digits-cnn8-261123-120000")
    student.names[student(images).argmax(1)[0]]  # images: uint8 (N, C, H, W)
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from richkd import checkpoint, models
from richkd.data.views import normalise
from richkd.errors import ConfigError
from richkd.files import read_json


class Student(nn.Module):
    """A network with the normalisation that it was trained with.

    Args:
        meta: What `distill` wrote into the checkpoint: config, class names, channels, mean, std.
    """

    def __init__(self, meta: dict) -> None:
        super().__init__()
        wanted = meta["config"]["student"]
        self.network = models.build(
            wanted["name"],
            len(meta["names"]),
            channels=meta["channels"],
            shortcut=wanted["shortcut"],
        )
        self.names = tuple(meta["names"])
        self.register_buffer("mean", torch.tensor([255 * m for m in meta["mean"]]))
        self.register_buffer("std", torch.tensor([255 * s for s in meta["std"]]))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, K)` of uint8 `images` `(N, C, H, W)`."""
        return self.network(normalise(images.permute(0, 2, 3, 1), self.mean, self.std))


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a checkpoint folder, a run or a sweep stands for: its best one."""
    if (path / "summary.json").exists():
        summary = read_json(path / "summary.json")
        return path / summary["best"]["checkpoint"]
    for name in ("best", "last"):
        if checkpoint.exists(path / name):
            return path / name
    if checkpoint.exists(path):
        return path
    raise ConfigError(f"{path} holds no checkpoint; give a checkpoint, a run or a finished sweep.")


def load_student(path: str | Path) -> Student:
    """Return the student of a checkpoint, a run (its best epoch) or a sweep (its best refit), in eval mode.

    Raises:
        ConfigError: If there is no checkpoint of richkd at `path`.
        CorruptError: If a file's checksum is not the recorded one.
    """
    saved = checkpoint.load(find_checkpoint(Path(path)))
    student = Student(saved.meta)
    student.network.load_state_dict(saved.weights)
    return student.eval()
