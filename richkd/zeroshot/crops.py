"""CLIP over the student's own crops: of which views features are kept, and which of them stands for a crop.

A view is `(dy, dx, flip)`, as in `data.views`. K views are kept of all images, the same ones, so that each is a table like
that of the whole images; the first K of one order, so that more of them go on from fewer.

Shapes: B crops, N images, D features.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from richkd.data import Dataset, Images, Views
from richkd.data.pictures import picture

if TYPE_CHECKING:
    from PIL.Image import Image

READ = 64  # images whose crops are cut at once


class Crops:
    """Images in one view each, as pictures.

    Args:
        images: The images.
        dataset: Gives their padding and flips.
        view: The one that all are seen in.

    Attributes:
        digest: Changes with the images and with what the view shows of them, whatever the padding.
    """

    def __init__(self, images: Images, dataset: Dataset, view: tuple[int, int, int]) -> None:
        # without memory of its own: what is asked for is cut from the images themselves
        self.views = Views(images, dataset, torch.device("cpu"), memory=0)
        self.view, (dy, dx, flip) = torch.tensor(view), view
        place = f" at {dy - dataset.pad}, {dx - dataset.pad}" + ", mirrored" * flip
        # in its middle a view is the whole image, unless CLIP sees that from its file
        whole = images.files is None and place == " at 0, 0"
        self.digest = images.digest + place * (not whole)

    def __len__(self) -> int:
        return len(self.views)

    def pictures(self, start: int, stop: int) -> "Iterator[Image]":
        """Yield rows `start` to `stop` in this view."""
        for rows in torch.arange(start, stop).split(READ):
            yield from pictures(self.views, rows, self.view.expand(len(rows), 3))


def pictures(views_of: Views, rows: Tensor, views: Tensor) -> "Iterator[Image]":
    """Yield those crops as pictures, as the student sees them before they are normalised."""
    return map(picture, views_of.pixels(rows, views).cpu().numpy())


def order(pad: int, flips: int, count: int) -> list[tuple[int, int, int]]:
    """Return the first `count` views of an order in which each is as far as can be from all before.

    It begins with the image as it is. A mirror image is farther than any offset, so both flips are covered alike; of views
    that are equally far the one nearest to the centre comes first, and then the lowest.
    """
    views = _all(pad, flips)
    central = np.square(views[:, :2] - pad).sum(1)
    gaps, found = np.full(len(views), _far(pad) + 1), [int(central.argmin())]
    while len(found) < count:
        gaps = np.minimum(gaps, _distances(views, views[found[-1]], pad, mirrored=0))
        found.append(int((gaps * (_far(pad) + 1) - central).argmax()))
    return [tuple(views[k].tolist()) for k in found]


def nearest(stored: list[tuple[int, int, int]], pad: int, flips: int) -> Tensor:
    """Return for each view, by dy, dx and flip, which of the stored ones is nearest: of the same flip if there is one.

    Of several that are equally near it is the first.
    """
    views = _all(pad, flips)
    least, found = np.full(len(views), np.iinfo(np.int64).max), np.zeros(len(views), np.int64)
    for k, view in enumerate(stored):
        distances = _distances(views, np.array(view), pad, mirrored=1)
        found[distances < least] = k
        least = np.minimum(least, distances)
    return torch.from_numpy(found).view(2 * pad + 1, 2 * pad + 1, flips)


def _all(pad: int, flips: int) -> np.ndarray:
    """Return all views `(V, 3)`, lowest first."""
    offsets = range(2 * pad + 1)
    return np.stack(np.meshgrid(offsets, offsets, range(flips), indexing="ij"), 3).reshape(-1, 3)


def _far(pad: int) -> int:
    """Return more than the square of any distance between two offsets."""
    return 8 * pad**2 + 1


def _distances(views: np.ndarray, view: np.ndarray, pad: int, *, mirrored: int) -> np.ndarray:
    """Return the squares of the distances of `views` to one; offsets count `mirrored` times between two flips."""
    offsets, same = np.square(views[:, :2] - view[:2]).sum(1), views[:, 2] == view[2]
    return np.where(same, offsets, _far(pad) + mirrored * offsets)
