"""The zero-shot teacher: prompts, any model of open_clip, and the miniature of the embedded default.

Features are cached, not logits: logits of any prompts, reduction and scale are then one matrix product, so
a search over prompt sets runs CLIP on no image twice. Where all is cached the network is never built.

Shapes: N images, B crops, P prompts, K classes, D features.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from richkd import cache
from richkd.data import Dataset, Images, Views
from richkd.errors import ConfigError, DataError
from richkd.files import read_json, to_json, write_synced
from richkd.progress import Progress
from richkd.zeroshot import crops, miniature, openclip, prompts
from richkd.zeroshot.crops import Crops

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Crops",
    "Encoder",
    "ZeroShot",
    "crop_features",
    "image_features",
    "load",
    "looking",
    "looks",
    "text_matrix",
]


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
    clip: ZeroShot,
    templates: Sequence[str],
    names: Sequence[str],
    root: Path,
    *,
    field: str = "clip.prompts",
) -> Tensor:
    """Return unit-norm text features `(P, K, D)` of each template and class, from the cache or into it.

    Raises:
        DataError: If the model cannot read them; `field` is the key that they are of.
    """
    texts = [text for row in prompts.captions(templates, names) for text in row]

    def compute(start: int, stop: int) -> np.ndarray:
        encoder = clip.encoder
        try:
            return encoder.encode_texts(texts[start:stop]).numpy()
        except DataError as error:
            raise DataError(f"{field}: {error}") from error

    key = {"model": clip.identity, "texts": texts}
    rows = cache.rows(root, "clip-texts", key, len(texts), clip.width, compute)
    return torch.tensor(rows).view(len(templates), len(names), clip.width)


def looks(views: int | str, dataset: Dataset) -> list[Images | Crops]:
    """Return all that a zero-shot model looks at ahead: the whole images, training and test, and stored views; nothing twice.

    Args:
        views: `clip.views`: a number of views, or a word where none is stored.
        dataset: Task.

    Raises:
        ConfigError: If there are not so many views.
    """
    seen: dict[str, Images | Crops] = {}
    stored = (Crops(dataset.train, dataset, view) for view in _stored(views, dataset))
    for each in (dataset.train, dataset.test, *stored):
        seen.setdefault(each.digest, each)
    return [*seen.values()]


def _stored(views: int | str, dataset: Dataset) -> list[tuple[int, int, int]]:
    """Return the views of which features are kept."""
    if isinstance(views, str):
        return []
    flips = 1 + dataset.flip
    if views > (possible := flips * (2 * dataset.pad + 1) ** 2):
        raise ConfigError(
            f"clip.views must be at most {possible}, the views that an image of {dataset.name} has (data.pad={dataset.pad}, "
            f"data.flip={str(dataset.flip).lower()}), but got {views}; lower it: {possible} are exact."
        )
    return crops.order(dataset.pad, flips, views)


def image_features(
    clip: ZeroShot,
    images: Images | Crops,
    root: Path,
    progress: Progress | None = None,
    spread: cache.Spread | None = None,
) -> Tensor:
    """Return unit-norm image features `(N, D)`, from the cache or into it: mapped, not copied.

    Args:
        clip: Model.
        images: N images, whole or in one view each.
        root: Cache folder.
        progress: Told how many rows are done.
        spread: As `cache.rows` takes it.
    """
    key = {"model": clip.identity, "images": images.digest}
    rows = cache.rows(
        *(root, "clip-images", key, len(images), clip.width, looking(clip, images)),
        progress=progress,
        spread=spread,
    )
    return torch.from_numpy(rows)


def looking(clip: ZeroShot, images: Images | Crops) -> Callable[[int, int], np.ndarray]:
    """Return what computes image features: given start and stop, those rows."""

    def compute(start: int, stop: int) -> np.ndarray:
        return clip.encoder.encode_images(images.pictures(start, stop)).numpy()

    return compute


def crop_features(
    clip: ZeroShot,
    views: int | str,
    dataset: Dataset,
    root: Path,
    progress: Progress | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what gives unit-norm features `(B, D)` of crops, given their training rows `(B,)` and views `(B, 3)`.

    Args:
        clip: Model.
        views: `clip.views`: a number of views that are stored, of which the nearest stands for a crop; or `online`, and
            the model runs on each crop.
        dataset: Task.
        root: Cache folder.
        progress: Told how many rows of all stored views are done.
    """
    if views == "online":
        views_of = Views(dataset.train, dataset, torch.device("cpu"), memory=0)
        return lambda rows, views: clip.encoder.encode_images(crops.pictures(views_of, rows, views))
    stored = _stored(views, dataset)

    def of_all(k: int) -> Progress:
        def told(what: str, done: int, total: int) -> None:
            if progress is not None:
                progress(f"{what}, {len(stored)} views", k * total + done, len(stored) * total)

        return told

    tables = [
        image_features(clip, Crops(dataset.train, dataset, view), root, of_all(k))
        for k, view in enumerate(stored)
    ]
    nearest = crops.nearest(stored, dataset.pad, 1 + dataset.flip)

    def look_up(rows: Tensor, views: Tensor) -> Tensor:
        which = nearest[tuple(views.cpu().T)]
        found, rows = torch.empty(len(rows), clip.width), rows.cpu()
        for k in which.unique().tolist():
            found[which == k] = tables[k][rows[which == k]]
        return found

    return look_up
