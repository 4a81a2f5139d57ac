"""A labelled image set held in memory, checked once when it is made.

Shapes: N images of H x W pixels and C channels, K classes.
"""

import hashlib
import unicodedata
from dataclasses import dataclass, field

import numpy as np

from richkd.config import UNUSABLE
from richkd.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Images:
    """Rows of pixels `(N, H, W, C)` uint8 with labels `(N,)` int64, -1 where none is known."""

    pixels: np.ndarray
    labels: np.ndarray
    digest: str = field(init=False)  # SHA-256 of pixels, shape and labels

    def __post_init__(self) -> None:
        pixels, labels = self.pixels, self.labels
        if (
            pixels.dtype != np.uint8
            or pixels.ndim != 4
            or pixels.shape[3] not in (1, 3)
            or 0 in pixels.shape[1:]
        ):
            raise DataError(
                f"images must be uint8 of shape (N, H, W, 1 or 3) but got {pixels.dtype} of shape {pixels.shape}."
            )
        if not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"labels must be integers but got {labels.dtype}; -1 marks an unlabelled row."
            )
        if labels.shape != pixels.shape[:1]:
            raise DataError(
                f"there must be one label an image but got {labels.shape} for {len(pixels)} images."
            )
        object.__setattr__(self, "labels", labels.astype(np.int64))
        text = hashlib.sha256(str(pixels.shape).encode())
        text.update(np.ascontiguousarray(pixels))
        text.update(np.ascontiguousarray(self.labels))
        object.__setattr__(self, "digest", text.hexdigest())

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """Training and test images of one task, with what their augmentation and normalisation need."""

    name: str
    names: tuple[str, ...]  # class names in the order of the labels
    train: Images
    test: Images
    pad: int  # pixels of zero padding around an image before the random crop
    flip: bool  # whether a mirror image keeps its class
    mean: tuple[float, ...] = field(init=False)  # of each channel of the training pixels, in 0 to 1
    std: tuple[float, ...] = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        classes = len(self.names)
        if classes < 2:
            raise DataError(f"{self.name} must have at least 2 classes but got {classes}.")
        # two spellings of one word in Unicode would give one prompt for two classes
        spelled = [unicodedata.normalize("NFC", name) for name in self.names]
        if len(set(spelled)) < classes:
            twice = [
                n for n, same in zip(self.names, spelled, strict=True) if spelled.count(same) > 1
            ]
            raise DataError(
                f"class names must differ, also after Unicode's NFC, but {len(twice)} of the {classes} names "
                f"of {self.name} do not: {twice!r}."
            )
        for name in self.names:
            if not name.strip() or UNUSABLE & set(map(unicodedata.category, name)):
                raise DataError(
                    f"a class name of {self.name} must be one line of text, for the prompts, but got {name!r}."
                )
        if self.train.pixels.shape[1:] != self.test.pixels.shape[1:]:
            raise DataError(
                f"training and test images of {self.name} must have one height, width and number of channels but "
                f"got {self.train.pixels.shape[1:]} and {self.test.pixels.shape[1:]}."
            )
        for part, images, least in (("training", self.train, -1), ("test", self.test, 0)):
            low, high = images.labels.min(initial=0), images.labels.max(initial=0)
            if low < least or high >= classes:
                unlabelled = ", or be -1," if least else ""
                raise DataError(
                    f"{part} labels must lie in 0 to {classes - 1}{unlabelled} for {classes} classes but "
                    f"{self.name} has {low} to {high}."
                )
            counts = np.bincount(images.labels[images.labels >= 0], minlength=classes)
            if (counts == 0).any():
                empty = [self.names[k] for k in np.flatnonzero(counts == 0)[:5]]
                raise DataError(
                    f"each class needs a labelled image but {self.name} has none for {empty!r} among its {part} rows."
                )
        pixels = self.train.pixels.reshape(-1, self.train.pixels.shape[3])
        counts = [np.bincount(channel, minlength=256) / len(pixels) for channel in pixels.T]
        mean = [float(c @ np.arange(256)) / 255 for c in counts]
        square = [float(c @ np.arange(256) ** 2) / 255**2 for c in counts]
        std = [max(s - m * m, 1e-6) ** 0.5 for s, m in zip(square, mean, strict=True)]
        object.__setattr__(self, "mean", tuple(mean))
        object.__setattr__(self, "std", tuple(std))
        text = repr((self.name, self.names, self.train.digest, self.test.digest))
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest())

    @property
    def channels(self) -> int:
        """Number of channels, 1 or 3."""
        return self.train.pixels.shape[3]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.train.pixels.shape[1:3]
