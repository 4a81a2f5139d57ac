"""A labelled image set, checked once when it is made.

Shapes: N images of H x W pixels and C channels, K classes.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from richkd.config import UNUSABLE
from richkd.data.pictures import decode, picture
from richkd.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Images:
    """Rows of pixels `(N, H, W, C)` uint8 with labels `(N,)` int64, -1 where none is known.

    Attributes:
        pixels: In memory, or a memory map of a file; None of files that are never decoded as a whole, in RGB then.
        labels: Class of each row.
        ids: `(N,)`, place of each row among all images of its source, training and test; as they come if None.
        files: The files that the rows were made of, if they were.
        digest: SHA-256 of pixels, shape and labels, unless the source knows a better one.
        padded: Map of the padded pixels, of which `pixels` are a part, if they are kept: see `padded.py`.
    """

    pixels: np.ndarray | None
    labels: np.ndarray
    ids: np.ndarray | None = None
    files: Sequence[Path] | None = None
    digest: str | None = None
    padded: np.ndarray | None = None

    def __post_init__(self) -> None:
        pixels, labels = self.pixels, self.labels
        assert pixels is not None or (self.files is not None and self.digest is not None)
        if pixels is not None and (
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
        count = len(self.files) if pixels is None else len(pixels)
        if labels.shape != (count,):
            raise DataError(
                f"there must be one label an image but got {labels.shape} for {count} images."
            )
        object.__setattr__(self, "labels", labels.astype(np.int64))
        if self.ids is None:
            object.__setattr__(self, "ids", np.arange(len(labels)))
        if self.digest is None:
            text = hashlib.sha256(str(pixels.shape).encode())
            text.update(np.ascontiguousarray(pixels))
            text.update(np.ascontiguousarray(self.labels))
            object.__setattr__(self, "digest", text.hexdigest())

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, row: int) -> "Image":
        """Return a row from its file, in full, where there is one."""
        return picture(self.pixels[row]) if self.files is None else decode(self.files[row])

    def pictures(self, start: int, stop: int) -> "Iterator[Image]":
        """Yield rows `start` to `stop` as CLIP should see them."""
        return map(self.picture, range(start, stop))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """Training and test images of one task, with what their augmentation and normalisation need."""

    name: str
    names: tuple[str, ...]  # class names in the order of the labels
    train: Images
    test: Images
    pad: int  # pixels of zero padding around an image before the random crop
    flip: bool  # whether a mirror image keeps its class
    held_out: np.ndarray | None = None  # training rows that the source itself sets aside
    unreadable: tuple[str, ...] = ()  # files that were left out, and why
    first_test: int | None = None  # place of its first test row in the source; None: cut by us
    mean: tuple[float, ...] | None = None  # of each channel of the training pixels, in 0 to 1
    std: tuple[float, ...] | None = None
    augment: str = "crop"  # or how a stream of them is augmented, see `stream.py`
    side: int | None = None  # pixels of a side to which a stream brings them
    resample: str = "bicubic"  # how whole images are scaled then
    border: float = 0.0  # share of an image that is cut off at each side before
    digest: str = ""

    def __post_init__(self) -> None:
        classes = len(self.names)
        if classes < 2:
            raise DataError(f"{self.name} must have at least 2 classes but got {classes}.")
        check_names(self.name, self.names)
        decoded = self.train.pixels is not None
        if decoded and self.train.pixels.shape[1:] != self.test.pixels.shape[1:]:
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
            if empty := self._without(images.labels):
                raise DataError(
                    f"each class needs a labelled image but {self.name} has none for {empty!r} among its {part} rows."
                )
        if self.held_out is not None:
            if empty := self._without(self.train.labels[self.held_out]):
                raise DataError(
                    f"each class needs a validation image but {self.name} has none for {empty!r} among those that it "
                    "sets aside; add some, or leave them all to be cut from the training images."
                )
        if self.mean is None:
            mean, std = moments(self.train.pixels)
            object.__setattr__(self, "mean", mean)
            object.__setattr__(self, "std", std)
        text = repr((self.name, self.names, self.train.digest, self.test.digest))
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest())

    def _without(self, labels: np.ndarray) -> list[str]:
        """Return the names of classes, five at most, that have no row among `labels`."""
        counts = np.bincount(labels[labels >= 0], minlength=len(self.names))
        return [self.names[k] for k in np.flatnonzero(counts == 0)[:5]]

    @property
    def channels(self) -> int:
        """Number of channels, 1 or 3."""
        return 3 if self.train.pixels is None else self.train.pixels.shape[3]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of an image as a network sees it."""
        return self.train.pixels.shape[1:3] if self.side is None else (self.side, self.side)

    @property
    def streamed(self) -> bool:
        """Whether images are augmented one by one, so that no table holds all that can be seen of them."""
        return self.augment != "crop"


def check_names(source: str, names: tuple[str, ...]) -> None:
    """Raise DataError unless the class names of `source` make distinct prompts of one line."""
    # two spellings of one word would give one prompt for two classes, which reads underscores as spaces
    spelled = [unicodedata.normalize("NFC", name).replace("_", " ") for name in names]
    counts = Counter(spelled)
    twice = [name for name, spoken in zip(names, spelled, strict=True) if counts[spoken] > 1]
    if twice:
        raise DataError(
            f"class names must differ, also with spaces for underscores and after Unicode's NFC, but {len(twice)} of the {len(names)} names "
            f"of {source} do not: {twice!r}."
        )
    for name in names:
        if not name.strip() or UNUSABLE & set(map(unicodedata.category, name)):
            raise DataError(
                f"a class name of {source} must be one line of text, for the prompts, but got {name!r}."
            )


def moments(pixels: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 `(N, H, W, C)`, in 0 to 1; exact."""
    counts = np.zeros((pixels.shape[3], 256), np.int64)
    for start in range(0, len(pixels), 1024):
        flat = pixels[start : start + 1024].reshape(-1, pixels.shape[3])
        counts += [np.bincount(channel, minlength=256) for channel in flat.T]
    shares = counts / counts.sum(1, keepdims=True)
    mean = shares @ np.arange(256) / 255
    std = np.maximum(shares @ np.arange(256) ** 2 / 255**2 - mean**2, 1e-6) ** 0.5
    return tuple(mean.tolist()), tuple(std.tolist())
