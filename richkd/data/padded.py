"""Padded pixels, out of which every crop is cut: built once a machine, mapped by all processes."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

from richkd import cache
from richkd.data.dataset import Images
from richkd.errors import ConfigError
from richkd.progress import Progress

FORMAT = 1
FILE = "padded.npy"
SMALL = 2**24  # bytes: below, ten copies are less than what one process takes for PyTorch itself
ROWS = 1024  # that are padded and written at a time


def layout(pixels: np.ndarray, pad: int, flip: bool) -> tuple[int, ...]:
    """Return the shape of `pixels` `(N, H, W, C)` once they are padded: `(N, 1 or 2, H + 2 pad, W + 2 pad, C)`."""
    n, height, width, channels = pixels.shape
    return n, 1 + flip, height + 2 * pad, width + 2 * pad, channels


def padded(pixels: np.ndarray, pad: int, flip: bool) -> np.ndarray:
    """Return `pixels` with zeros around each image, and beside each its mirror image where `flip`."""
    found = np.zeros(layout(pixels, pad, flip), np.uint8)
    inside(found, pad, *pixels.shape[1:3])[:] = pixels
    if flip:
        found[:, 1] = found[:, 0, :, ::-1]
    return found


def inside(found: np.ndarray, pad: int, height: int, width: int) -> np.ndarray:
    """Return the images `(N, H, W, C)` as they lie in the padded ones."""
    return found[:, 0, pad : pad + height, pad : pad + width]


def shared(
    images: Images,
    pad: int,
    flip: bool,
    memory: float,
    root: Path,
    progress: Progress | None = None,
) -> Images:
    """Return `images` with their padded pixels in a map of the cache, and their pixels as a part of it.

    Left as they are: few pixels, and more than `memory` GiB, of which batches are read as they are needed. Where the
    cache cannot be written there is a warning, and each process pads its own.
    """
    shape = layout(images.pixels, pad, flip)
    size = math.prod(shape)
    if size < SMALL or size > memory * 2**30:
        return images
    key = {"format": FORMAT, "images": images.digest, "pad": pad, "flip": flip}

    def build(place: Path) -> None:
        # plain writes: on a full disk they raise, where a memory map would kill the process
        with open(place / FILE, "xb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(images), ROWS):
                if progress is not None:
                    progress("padded pixels", start, len(images))
                file.write(padded(images.pixels[start : start + ROWS], pad, flip))
        if progress is not None:
            progress("padded pixels", len(images), len(images))

    try:
        entry = cache.folder(root, "padded", key, build, progress=progress)
    except (ConfigError, OSError) as error:
        warnings.warn(
            f"padded pixels cannot be kept, and so each process has a copy of {size / 2**20:.0f} MiB: {error}",
            stacklevel=2,
        )
        return images
    # copy on write: PyTorch takes no array that cannot be written, and nobody writes
    found = np.load(entry / FILE, mmap_mode="c", allow_pickle=False)
    return replace(images, pixels=inside(found, pad, *images.pixels.shape[1:3]), padded=found)
