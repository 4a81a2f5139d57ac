"""The zero-shot teacher: prompts, any model of open_clip, and the miniature of the embedded default.

Features are cached, not logits: logits of any prompts, reduction and scale are then one matrix product, so
a search over prompt sets runs CLIP on no image twice. Where all is cached the network is never built.

Shapes: N images, P prompts, K classes, D features.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from richkd import cache
from richkd.data import Images
from richkd.files import read_json, to_json, write_synced
from richkd.progress import Progress
from richkd.zeroshot import miniature, openclip, prompts

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Encoder", "ZeroShot", "image_features", "load", "text_matrix"]


class Encoder(Protocol):
    """Two towers into one space."""

    logit_scale: float

    def encode_images(self, pictures: "Iterable[Image]") -> Tensor:
        """Return unit-norm features `(N, D)` of N pictures, grey or RGB, of any size."""

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Return unit-norm features, one row a text."""


class ZeroShot:
    """A model by name, built when something is not in the cache yet.

    Attributes:
        identity: Changes with everything that its features depend on.
        logit_scale: The model's exp(logit_scale).
        width: D.
    """

    def __init__(self, identity: str, build: Callable[[], Encoder], root: Path) -> None:
        self.identity, self._build = identity, build

        def card(folder: Path) -> None:
            width = self.encoder.encode_texts(["a"]).shape[1]
            said = {"logit_scale": self.encoder.logit_scale, "width": width}
            write_synced(folder / "card.json", to_json(said))

        found = read_json(cache.folder(root, "clip-cards", {"model": identity}, card) / "card.json")
        self.logit_scale: float = found["logit_scale"]
        self.width: int = found["width"]

    @cached_property
    def encoder(self) -> Encoder:
        """The network itself."""
        return self._build()


def load(
    model: str,
    pretrained: str | None,
    file: str | None = None,
    *,
    device: torch.device,
    root: Path,
    progress: Progress | None = None,
) -> ZeroShot:
    """Return a zero-shot model.

    Args:
        model: `miniature`, or a name of open_clip's.
        pretrained: open_clip's tag; None draws weights at random; the miniature has none.
        file: Where the weights lie on this machine; they are not downloaded then.
        device: Where it runs, if it has to.
        root: Cache folder.
        progress: Told how far a pre-training is.

    Raises:
        ConfigError: If there is no such model, or its weights cannot be had.
    """
    if model == "miniature":
        name = miniature.identity(root, progress)
        return ZeroShot(name, lambda: miniature.Miniature(device, miniature.weights(root)), root)
    name = openclip.identity(model, pretrained, file)
    return ZeroShot(name, lambda: openclip.OpenClip(model, pretrained, file, device), root)


def text_matrix(
    clip: ZeroShot, templates: Sequence[str], names: Sequence[str], root: Path
) -> Tensor:
    """Return unit-norm text features `(P, K, D)` of each template and class, from the cache or into it."""
    texts = [text for row in prompts.captions(templates, names) for text in row]

    def compute(start: int, stop: int) -> np.ndarray:
        return clip.encoder.encode_texts(texts[start:stop]).numpy()

    key = {"model": clip.identity, "texts": texts}
    rows = cache.rows(root, "clip-texts", key, len(texts), clip.width, compute)
    return torch.tensor(rows).view(len(templates), len(names), clip.width)


def image_features(
    clip: ZeroShot, images: Images, root: Path, progress: Progress | None = None
) -> Tensor:
    """Return unit-norm image features `(N, D)`, from the cache or into it.

    Args:
        clip: Model.
        images: N images, seen un-augmented.
        root: Cache folder.
        progress: Told how many rows are done.
    """

    def compute(start: int, stop: int) -> np.ndarray:
        return clip.encoder.encode_images(images.pictures(start, stop)).numpy()

    key = {"model": clip.identity, "images": images.digest}
    rows = cache.rows(root, "clip-images", key, len(images), clip.width, compute, progress=progress)
    return torch.tensor(rows)
