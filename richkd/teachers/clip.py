"""The zero-shot teachers: CLIP with prompts, or logits that were given.

Shapes: N training rows, M test rows, B rows of a batch, K classes.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from richkd import fusion, logits, zeroshot
from richkd.config import Clip, ZeroShot
from richkd.data import Dataset
from richkd.data.views import sent
from richkd.progress import Progress
from richkd.teachers.whole import looked_up, placed
from richkd.zeroshot import prompts


@dataclass(kw_only=True, slots=True, eq=False)
class ClipTeacher:
    """Zero-shot logits of every row at the model's own scale, and the image features behind them."""

    identity: str  # changes with its outputs; a run goes on with the same one only
    train: Tensor  # (N, K)
    test: Tensor | None  # (M, K); None if only given logits of the training rows are known
    logit_scale: float | None  # None if only given logits are known
    source: str = "clip.prompts"  # the key that it comes from
    weight: float = 1.0  # its share of the zero-shot logits
    # logits of crops of training rows, as `logits` takes them; None: of the whole images, whatever the crop
    crops: Callable[[Tensor, Tensor], Tensor] | None = None
    # unit-norm image features of crops, or of the whole images, likewise; None if only given logits are known
    features: Callable[[Tensor, Tensor], Tensor] | None = None
    width: int = 0  # numbers of such features
    device: torch.device | None = None  # where its logits are wanted; None: where they lie

    def logits(self, rows: Tensor, views: Tensor) -> Tensor:
        """Return logits `(B, K)` of those crops of training rows."""
        if self.crops is not None:
            return self.crops(rows, views)
        return looked_up(self.train, rows, self.device or self.train.device)


def open_clip_teachers(
    config: Clip,
    dataset: Dataset,
    device: torch.device,
    cache_root: Path,
    progress: Progress | None,
) -> list[ClipTeacher]:
    """Return the zero-shot teacher and those beside it, with their shares; ones without a share are not opened."""
    return [
        replace(
            open_clip_teacher(each, dataset, device, cache_root, progress, field=field),
            weight=weight,
        )
        for field, each, weight in shares(config)
    ]


def shares(config: Clip) -> list[tuple[str, ZeroShot, float]]:
    """Return the key of each zero-shot teacher that has a share, the teacher, and its share of their logits."""
    first = 1 - sum(each.weight for each in config.extra)
    extra = [(f"clip.extra[{k}]", each, each.weight) for k, each in enumerate(config.extra)]
    return [one for one in (("clip", config, first), *extra) if one[2] > 1e-9]


def model_of(
    config: ZeroShot, device: torch.device, cache_root: Path, progress: Progress | None = None
) -> zeroshot.ZeroShot:
    """Return the model of a zero-shot teacher."""
    return zeroshot.load(
        config.model,
        config.pretrained,
        config.file,
        device=device,
        root=cache_root,
        progress=progress,
    )


def open_clip_teacher(
    config: ZeroShot,
    dataset: Dataset,
    device: torch.device,
    cache_root: Path,
    progress: Progress | None,
    *,
    field: str = "clip",
) -> ClipTeacher:
    """Return a zero-shot teacher; its image and text features come from the cache, or go there."""
    if config.logits is not None:
        train, test = logits.aligned(config.logits, dataset, field=f"{field}.logits")
        return ClipTeacher(
            identity=logits.identity(config.logits),
            train=placed(train, device),
            test=None if test is None else placed(test, device),
            logit_scale=None,
            source=f"{field}.logits",
            device=device,
        )
    templates = prompts.templates(config.prompts, f"{field}.prompts")
    clip = model_of(config, device, cache_root, progress)
    text = zeroshot.text_matrix(
        clip, templates, dataset.names, cache_root, field=f"{field}.prompts"
    ).to(device)

    def logits_of(image: Tensor) -> Tensor:
        return fusion.zero_shot_logits(image, text, clip.logit_scale, config.reduce)

    def whole_logits(image: Tensor) -> Tensor:
        table = placed(torch.empty(len(image), len(dataset.names)), device)
        rows = fusion.together(table.shape[1])
        for part, some in zip(table.split(rows), image.split(rows), strict=True):
            part.copy_(logits_of(some.to(device)))
        return table

    whole, tested = (
        zeroshot.image_features(clip, part, cache_root, progress)
        for part in (dataset.train, dataset.test)
    )
    train, test = map(whole_logits, (whole, tested))
    parts = [clip.identity, templates, dataset.names, dataset.digest, config.reduce]
    crops = look = None
    if config.views != "whole":
        parts.append(config.views)
        look = zeroshot.crop_features(clip, config.views, dataset, cache_root, progress)

        def crops(rows: Tensor, views: Tensor) -> Tensor:
            return logits_of(sent(look(rows, views), device))

    def features(rows: Tensor, views: Tensor) -> Tensor:
        return sent(whole[rows.cpu()] if look is None else look(rows, views), device).float()

    return ClipTeacher(
        identity=hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12],
        train=train,
        test=test,
        logit_scale=clip.logit_scale,
        source=f"{field}.prompts",
        crops=crops,
        features=features,
        width=whole.shape[1],
        device=device,
    )
