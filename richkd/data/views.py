"""Batched random crop with padding and flip, as one indexed copy out of a padded uint8 tensor.

A set that fits in memory is padded once, into the cache unless it is small; of a larger one each batch is read, padded
and cropped the same way.

An image has `(2 pad + 1)^2` crops and, where flips are allowed, twice as many views. A view is named by
`(dy, dx, flip)`: the crop's offset in the padded image, then whether the crop is mirrored, which is what
torchvision's RandomCrop(size, padding) followed by RandomHorizontalFlip produces. Views are numbered as they are
counted up: flip first, then dx, then dy.
"""

import copy
import math
from collections.abc import Iterable
from typing import Self

import numpy as np
import torch
from torch import Tensor

from richkd.data.dataset import Dataset, Images
from richkd.data.padded import layout, padded


class Normalised:
    """Images on one device, with the mean and deviation under which a network sees them."""

    device: torch.device

    def _normalise_by(self, mean: Iterable[float], std: Iterable[float]) -> None:
        self.mean = torch.tensor([255 * m for m in mean], device=self.device)
        self.std = torch.tensor([255 * s for s in std], device=self.device)

    def normalised_by(self, mean: Iterable[float], std: Iterable[float]) -> Self:
        """Return the same views, on the same pixels, with another mean and deviation (in 0 to 1)."""
        other = copy.copy(self)
        other._normalise_by(mean, std)
        return other

    def normalised(self, pixels: Tensor) -> Tensor:
        """Return pixels `(B, H, W, C)` as networks take them, float32 `(B, C, H, W)` in channels-last memory order."""
        return normalise(pixels, self.mean, self.std)

    def pixels(self, rows: Tensor, views: Tensor | None = None) -> Tensor:
        """Return the asked-for views `(B, H, W, C)`; the images as they are without `views`."""
        raise NotImplementedError

    def images(self, rows: Tensor, views: Tensor | None = None) -> Tensor:
        """Return the same views normalised, as `normalised` does it."""
        return self.normalised(self.pixels(rows, views))


class Views(Normalised):
    """All views of some images, on one device; `Stream` has the same face for what is not cropped out of padded pixels.

    Args:
        images: N images of H x W pixels and C channels.
        dataset: Gives padding, flips and normalisation.
        device: Where the pixels lie and where batches are made.
        memory: GiB that padded pixels of its own may take; above, batches are read from `images` as they are needed.
    """

    streamed = False  # whether pixels are made ahead by other processes: see `stream.py`

    def __init__(
        self, images: Images, dataset: Dataset, device: torch.device, memory: float = math.inf
    ) -> None:
        self.source, self.device = images.pixels, device
        self.shape = self.source.shape[1:]
        self.pad, self.flips = dataset.pad, 1 + dataset.flip
        wanted, found = layout(self.source, dataset.pad, dataset.flip), images.padded
        if found is None or found.shape != wanted:
            fits = math.prod(wanted) <= memory * 2**30
            found = padded(self.source, dataset.pad, dataset.flip) if fits else None
        self.view = None if found is None else self._crops(found)
        self._normalise_by(dataset.mean, dataset.std)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    @property
    def count(self) -> int:
        """Number of views of one image."""
        return (2 * self.pad + 1) ** 2 * self.flips

    def number(self, views: Tensor) -> Tensor:
        """Return the number `(B,)` int64, below `count`, of each of `views` `(B, 3)`."""
        dy, dx, flip = views.unbind(1)
        return (dy * (2 * self.pad + 1) + dx) * self.flips + flip

    def numbered(self, numbers: Tensor) -> Tensor:
        """Return the views `(B, 3)` of these `numbers` `(B,)`, as `number` gives them."""
        crops, side = numbers // self.flips, 2 * self.pad + 1
        return torch.stack([crops // side, crops % side, numbers % self.flips], 1)

    def _crops(self, padded: np.ndarray) -> Tensor:
        """Return the crops of padded pixels: [n, flip, dy, dx] is H rows of W * C bytes.

        The bytes of a row are consecutive, and crops overlap in memory.
        """
        height, width, channels = self.shape
        pixels, side = torch.from_numpy(padded).to(self.device), 2 * self.pad + 1
        return pixels.as_strided(
            (len(pixels), self.flips, side, side, height, width * channels),
            (*pixels.stride()[:3], channels, pixels.stride(2), 1),
        )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` random views `(count, 3)`: dy, dx, flip, each uniform."""
        crops = torch.randint(2 * self.pad + 1, (count, 2), generator=generator)
        return torch.cat([crops, torch.randint(self.flips, (count, 1), generator=generator)], 1)

    def pixels(self, rows: Tensor, views: Tensor | None = None) -> Tensor:
        """Return the asked-for crops, uint8 `(B, H, W, C)`; the images as they are without `views`."""
        view, count = self.view, len(rows)
        if view is None:
            some = self.source[rows.cpu().numpy()]
            view = self._crops(padded(some, self.pad, self.flips == 2))
            rows = torch.arange(count)
        rows = sent(rows, self.device)
        if views is None:
            batch = view[rows, 0, self.pad, self.pad]
        else:
            dy, dx, flip = sent(views, self.device).unbind(1)
            # in the mirrored image the same crop starts as far from the other side
            batch = view[rows, flip, dy, torch.where(flip == 1, 2 * self.pad - dx, dx)]
        return batch.view(count, *self.shape)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on a device, on a GPU without waiting for it: from memory that it reads by itself."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn integers `(B, H, W, C)` into normalised float32 `(B, C, H, W)`; `mean` and `std` in grey levels."""
    width = pixels.shape[2]
    # over whole rows: a broadcast over one or three channels takes five times as long
    rows = pixels.flatten(2).sub(mean.repeat(width)).div_(std.repeat(width))
    return rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)
