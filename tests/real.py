"""Real outputs of CIFAR-10 teachers and of CLIP ViT-B/32 on the 10,000 test images, where RICHKD_DATA holds them."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from richkd import models
from richkd.models import foreign

REAL = os.environ.get("RICHKD_DATA")
IMAGES = "cifar10_test.npz"
CLIP = "clip/cifar10_test_clip_vitb32_logits.npz"
FILES = {
    "resnet20": "teachers/cifar10_resnet20-12fca82f.th",
    "resnet56": "teachers/cifar10_resnet56-4bfd9763.th",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test unless RICHKD_DATA holds these files or folders."""
    missing = [name for name in names if REAL is None or not (Path(REAL) / name).exists()]
    return pytest.mark.skipif(
        bool(missing), reason=f"set RICHKD_DATA to a folder that holds {', '.join(missing)}"
    )


needs_real_outputs = needs(IMAGES, CLIP, *FILES.values())


@functools.cache
def labels() -> Tensor:
    """Return the labels `(10000,)`."""
    return torch.from_numpy(np.load(Path(REAL) / IMAGES)["labels"].astype(np.int64))


@functools.cache
def clip_logits(prompts: str) -> Tensor:
    """Return CLIP's logits `(10000, 10)` with the prompts of a language."""
    return torch.from_numpy(np.load(Path(REAL) / CLIP)[prompts].astype(np.float32))


@functools.cache
def task_logits(name: str) -> Tensor:
    """Return what a published teacher says of the images, `(10000, 10)`; computed once, in seconds."""
    network = models.build(name, 10, channels=3, size=(32, 32), shortcut="A")
    foreign.load(network, Path(REAL) / FILES[name], field="teacher.checkpoint", name=name)
    network = network.eval().to(memory_format=torch.channels_last)
    images = torch.from_numpy(np.load(Path(REAL) / IMAGES)["images"]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
    with torch.inference_mode():
        return torch.cat([network((part / 255 - mean) / std) for part in images.split(250)])


def outputs(teacher: str, prompts: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of a task teacher and of CLIP, and the labels."""
    return task_logits(teacher), clip_logits(prompts), labels()
