"""Accuracy on corrupted test images: the published arrays, or the same families computed here.

Families, severities and their numbers are those of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", 2019, as CIFAR-10-C and CIFAR-100-C were made. What is computed here is not those files: noise is
drawn anew, motion follows sub-pixels, and `frost`, which lays photographs over an image, and `spatter`, whose drops need an edge
detector, are left out. So results of the two must not stand in one table, and each says which it is.

Their lengths are pixels of an image of 32; larger images have them in proportion, smaller ones as they are.

Shapes: N images of H x W pixels and C channels, float in 0 to 1 within this file.
"""

import functools
import io
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from richkd.errors import CorruptError, DataError

SIDE = 32  # pixels of the images that the lengths are for
SEVERITIES = (1, 2, 3, 4, 5)
CHUNK = 250  # images that are corrupted at a time
GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    "weather": ("snow", "frost", "fog", "brightness", "spatter"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression", "saturate"),
}
# published beside the fifteen by which networks are compared, for choosing settings: in no mean
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


# by family, what gives the images (N, C, H, W) uint8 of a severity
Series = dict[str, Callable[[int], Tensor]]


def unit(x: Tensor) -> float:
    """Return how many pixels of these images are one of an image of SIDE; never less than one."""
    return max(1.0, min(x.shape[2:]) / SIDE)


def uniform(shape: tuple[int, ...], low: float, high: float, generator: Generator) -> Tensor:
    """Return numbers drawn uniformly."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def smoothed(x: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Return `x` under a Gaussian of that deviation, in pixels; the border goes on as it ends."""
    radius = math.ceil(truncate * sigma)
    if radius == 0:
        return x
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for _ in range(2):  # along the rows, then along the columns
        x = weighted(x, kernel[None]).transpose(2, 3)
    return x


def weighted(x: Tensor, kernel: Tensor) -> Tensor:
    """Return the sum of neighbours by the weights of `kernel`, of odd height and width; the border goes on as it ends."""
    height, width = kernel.shape
    wide = F.pad(x, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    found = torch.zeros_like(x)
    # a convolution of single channels takes many times as long
    for row, column in kernel.nonzero().tolist():
        part = wide[:, :, row : row + x.shape[2], column : column + x.shape[3]]
        found.add_(part, alpha=kernel[row, column].item())
    return found


def sampled(x: Tensor, places: Tensor, border: str = "border") -> Tensor:
    """Return `x` at `places` `(N, H, W, 2)`, x and y in pixels, between which it is linear."""
    sides = torch.tensor([x.shape[3], x.shape[2]])
    return F.grid_sample(
        x, (2 * places + 1) / sides - 1, padding_mode=border, align_corners=False, mode="bilinear"
    )


def pixels_of(x: Tensor) -> Tensor:
    """Return the place of each pixel, `(H, W, 2)`: x, y."""
    height, width = x.shape[2:]
    y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x_, y], 2).float()


def zoomed(x: Tensor, factor: float) -> Tensor:
    """Return the middle of `x`, enlarged to its size."""
    middle = torch.tensor([x.shape[3] - 1, x.shape[2] - 1]) / 2
    places = (pixels_of(x) - middle) / factor + middle
    return sampled(x, places.expand(len(x), -1, -1, -1))


def moved(x: Tensor, radius: float, sigma: float, angles: Tensor) -> Tensor:
    """Return `x` smeared to one side along an angle each, in degrees, with the weights of half a Gaussian."""
    radius, sigma = radius * unit(x), sigma * unit(x)
    count = 1 + min(2 * math.ceil(radius), math.ceil(4 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(count) / sigma) ** 2)
    turn = torch.deg2rad(angles)
    step = torch.stack([turn.cos(), turn.sin()], 1)[:, None, None]
    places, found = pixels_of(x), torch.zeros_like(x)
    for k, weight in enumerate(weights / weights.sum()):
        found += weight * sampled(x, places + k * step)
    return found


def plasma(count: int, side: int, decay: float, generator: Generator) -> Tensor:
    """Return clouds by the diamond-square algorithm on a torus, `(count, 1, side, side)` in 0 to 1.

    Args:
        count: How many.
        side: A power of two.
        decay: How much finer ripples are lower.
        generator: Draws the ripples.
    """
    clouds = torch.zeros(count, side, side)
    step, height = side, 1.0

    def rippled(total: Tensor) -> Tensor:
        return total / 4 + uniform(total.shape, -height, height, generator)

    while step >= 2:
        half = step // 2
        corners = clouds[:, ::step, ::step]
        right = corners + corners.roll(-1, 2)
        clouds[:, half::step, half::step] = rippled(right + right.roll(-1, 1))
        centres = clouds[:, half::step, half::step]
        clouds[:, ::step, half::step] = rippled(
            centres + centres.roll(1, 1) + corners + corners.roll(-1, 2)
        )
        clouds[:, half::step, ::step] = rippled(
            centres + centres.roll(1, 2) + corners + corners.roll(-1, 1)
        )
        step, height = half, height / decay
    low, high = clouds.amin((1, 2), keepdim=True), clouds.amax((1, 2), keepdim=True)
    return ((clouds - low) / (high - low)).unsqueeze(1)


def gaussian_noise(x: Tensor, level: float, generator: Generator) -> Tensor:
    """Add noise of that deviation."""
    return x + level * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, level: float, generator: Generator) -> Tensor:
    """Count photons, so many of a white pixel."""
    return torch.poisson(x * level, generator) / level


def impulse_noise(x: Tensor, level: float, generator: Generator) -> Tensor:
    """Set that share of the numbers to black or white."""
    drawn = torch.rand(x.shape, generator=generator)
    return x.masked_fill(drawn < level, 1).masked_fill(drawn < level / 2, 0)


def speckle_noise(x: Tensor, level: float, generator: Generator) -> Tensor:
    """Add noise in proportion to the pixel."""
    return x + x * level * torch.randn(x.shape, generator=generator)


def gaussian_blur(x: Tensor, level: float, _: Generator) -> Tensor:
    """Smooth with that deviation."""
    return smoothed(x, level * unit(x))


def glass_blur(x: Tensor, level: tuple[float, int, int], generator: Generator) -> Tensor:
    """Give each pixel the value of a near one, between two smoothings: deviation, distance, times.

    That it is copied, not swapped, is what the published code comes to, where both sides of its swap are one view of memory.
    """
    sigma, times = level[0] * unit(x), level[2]
    far = round(level[1] * unit(x))
    count, channels, height, width = x.shape
    x = smoothed(x, sigma)
    inside = slice(far + 1, height - far + 1), slice(far + 1, width - far + 1)
    places = torch.arange(height * width).view(height, width)
    for _ in range(times):
        from_here = places.repeat(count, 1, 1)
        y, x_ = torch.randint(-far, far, (2, *from_here[:, *inside].shape), generator=generator)
        from_here[:, *inside] += y * width + x_
        index = from_here.view(count, 1, -1).expand(-1, channels, -1)
        x = x.flatten(2).gather(2, index).view(x.shape)
    return smoothed(x, sigma)


def defocus_blur(x: Tensor, level: tuple[float, float], _: Generator) -> Tensor:
    """Smooth with a disk whose edge is smoothed: radius, and deviation of that."""
    radius = level[0] * unit(x)
    reach = math.ceil(radius) + 1
    line = torch.arange(-reach, reach + 1)
    disk = (line[:, None] ** 2 + line**2 <= radius**2).float()[None, None]
    edge = torch.exp(-0.5 * (torch.tensor([-1.0, 0.0, 1.0]) / level[1]) ** 2)
    edge = (edge[:, None] * edge)[None, None]
    disk = F.conv2d(disk, edge, padding=1)[0, 0]
    return weighted(x, disk / disk.sum())


def motion_blur(x: Tensor, level: tuple[float, float], generator: Generator) -> Tensor:
    """Smear along a random angle: radius, deviation."""
    return moved(x, *level, uniform((len(x),), -45, 45, generator))


def zoom_blur(x: Tensor, level: float, _: Generator) -> Tensor:
    """Take the mean of the image and of itself enlarged up to that factor."""
    factors = [1 + k / 100 for k in range(round(100 * (level - 1)))]
    return functools.reduce(torch.add, (zoomed(x, factor) for factor in factors), x) / (
        len(factors) + 1
    )


def snow(x: Tensor, level: tuple[float, ...], generator: Generator) -> Tensor:
    """Let flakes fall: mean, deviation, zoom, threshold, radius and deviation of their fall, share of the image."""
    mean, deviation, zoom, least, radius, sigma, share = level
    flakes = mean + deviation * torch.randn((len(x), 1, *x.shape[2:]), generator=generator)
    flakes = zoomed(flakes, zoom)
    flakes = flakes.where(flakes >= least, 0).clamp(0, 1)
    flakes = moved(flakes, radius, sigma, uniform((len(x),), -135, -45, generator))
    pale = torch.maximum(x, 1.5 * grey(x) + 0.5)
    return share * x + (1 - share) * pale + flakes + flakes.flip(2, 3)


def fog(x: Tensor, level: tuple[float, float], generator: Generator) -> Tensor:
    """Lay clouds over the image: their share, and how much finer ripples are lower."""
    share, decay = level
    side = 2 ** math.ceil(math.log2(max(*x.shape[2:], SIDE)))
    clouds = plasma(len(x), side, decay, generator)[..., : x.shape[2], : x.shape[3]]
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + share * clouds) * most / (most + share)


def brightness(x: Tensor, level: float, _: Generator) -> Tensor:
    """Add that to the value of each pixel, in HSV."""
    value = x.amax(1, keepdim=True)
    brighter = (value + level).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-6), brighter)


def contrast(x: Tensor, level: float, _: Generator) -> Tensor:
    """Bring pixels to that share of their distance from the mean."""
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * level + mean


def saturate(x: Tensor, level: tuple[float, float], _: Generator) -> Tensor:
    """Multiply the saturation of each pixel, in HSV, and add to it; grey has the hue 0, of red."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    own = (value - low) / value.clamp(min=1e-6)
    red = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1)
    away = torch.where(value > low, (value - x) / (value - low).clamp(min=1e-6), red)
    return value * (1 - away * (own * level[0] + level[1]).clamp(0, 1))


def elastic_transform(x: Tensor, level: tuple[float, float, float], generator: Generator) -> Tensor:
    """Bend the image: by how much, how smoothly, and how far three corners are moved, in parts of the side."""
    side = min(x.shape[2:])
    bend, sigma, far = (side * part for part in level)
    middle, third = torch.tensor([x.shape[3] // 2, x.shape[2] // 2]), side // 3
    corners = middle + third * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    ends = corners + uniform((len(x), 3, 2), -far, far, generator)
    # the affine map that takes the ends back, of each image
    back = torch.linalg.solve(F.pad(ends, (0, 1), value=1.0), corners.expand_as(ends))
    drift = bend * smoothed(uniform((len(x), 2, *x.shape[2:]), -1, 1, generator), sigma, 3.0)
    places = F.pad(pixels_of(x) + drift.permute(0, 2, 3, 1), (0, 1), value=1.0)
    return sampled(x, places @ back[:, None], "reflection")


def pixelate(x: Tensor, level: float, _: Generator) -> Tensor:
    """Scale down to that share of the side, and up again."""

    def scaled(picture: Image.Image) -> Image.Image:
        size = tuple(max(1, int(each * level)) for each in picture.size)
        return picture.resize(size, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX)

    return pictured(x, scaled)


def jpeg_compression(x: Tensor, level: int, _: Generator) -> Tensor:
    """Compress with that quality."""

    def compressed(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=level)
        return Image.open(file)

    return pictured(x, compressed)


def pictured(x: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Return images changed one by one, as Pillow has them."""
    pixels = (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
    changed = (
        np.asarray(change(Image.fromarray(each if each.shape[2] == 3 else each[..., 0])))
        for each in pixels
    )
    found = torch.from_numpy(np.stack(list(changed))).view(pixels.shape)
    return found.permute(0, 3, 1, 2).float() / 255


def grey(x: Tensor) -> Tensor:
    """Return the lightness of pixels, `(N, 1, H, W)`."""
    if x.shape[1] == 1:
        return x
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


class Family(NamedTuple):
    """One kind of corruption: what does it, and how much of it each severity is."""

    corrupt: Callable[[Tensor, Any, Generator], Tensor]
    levels: tuple[Any, ...]


FAMILIES = {
    "gaussian_noise": Family(gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Family(shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": Family(impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "speckle_noise": Family(speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "defocus_blur": Family(
        defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))
    ),
    "glass_blur": Family(
        glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))
    ),
    "motion_blur": Family(motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Family(zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "gaussian_blur": Family(gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "snow": Family(
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "fog": Family(fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Family(brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Family(contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Family(
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Family(pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Family(jpeg_compression, (80, 65, 58, 50, 40)),
    "saturate": Family(saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}


def corrupted(images: Tensor, family: str, severity: int) -> Tensor:
    """Return corrupted images, the same for the same images, family and severity.

    Args:
        images: uint8 `(N, C, H, W)` on the CPU, of 1 or 3 channels.
        family: One of FAMILIES; `saturate` has no meaning for images of one channel.
        severity: One of SEVERITIES.

    Returns:
        uint8 `(N, C, H, W)`.
    """
    corrupt, levels = FAMILIES[family]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{family} {severity}".encode()))
    parts = [
        corrupt(part.float() / 255, levels[severity - 1], generator) for part in images.split(CHUNK)
    ]
    return (torch.cat(parts).clamp(0, 1) * 255).round().byte()


def computed(images: Tensor) -> Series:
    """Return all families that there are for such images, computed; see `corrupted`."""
    names = [name for name in FAMILIES if name != "saturate" or images.shape[1] == 3]
    return {name: functools.partial(corrupted, images, name) for name in names}


def published(folder: Path, labels: np.ndarray, shape: tuple[int, ...], rows: np.ndarray) -> Series:
    """Return the families of published files, such as CIFAR-100-C.

    Args:
        folder: Holds `labels.npy` and a file for each family, `(5 M, H, W, C)` uint8: the M test images in order at severity 1,
            then at 2, and so on.
        labels: Of all test images, `(M,)`.
        shape: Of one of them, `(H, W, C)`.
        rows: Test images that are asked for.

    Raises:
        DataError: If the files are of other images, or there are none.
        CorruptError: If one cannot be read.
    """
    names = [name for group in GROUPS.values() for name in group]
    paths = {name: folder / f"{name}.npy" for name in names if (folder / f"{name}.npy").exists()}
    if not paths.keys() - set(EXTRA) or not (folder / "labels.npy").exists():
        raise DataError(
            f"evaluate.corrupted must hold labels.npy and files such as gaussian_noise.npy but {folder} does not; give the "
            "folder of CIFAR-100-C."
        )
    found = {name: mapped(path) for name, path in paths.items()}
    count = len(SEVERITIES) * len(labels)
    for name, array in found.items():
        if array.dtype != np.uint8 or array.shape != (count, *shape):
            raise DataError(
                f"{paths[name]} must be uint8 of shape {(count, *shape)}, the {len(labels)} test images at five severities, "
                f"but got {array.dtype} of {array.shape}; give the arrays that were made of these images."
            )
    theirs = mapped(folder / "labels.npy")
    if not np.array_equal(theirs, np.tile(labels, len(SEVERITIES))):
        raise DataError(
            f"{folder / 'labels.npy'} must hold the labels of the {len(labels)} test images five times over but does not; "
            "give the arrays that were made of these images."
        )

    def images(array: np.ndarray, severity: int) -> Tensor:
        chosen = array[(severity - 1) * len(labels) + rows]
        return torch.from_numpy(chosen).permute(0, 3, 1, 2)

    return {name: functools.partial(images, array) for name, array in found.items()}


def mapped(path: Path) -> np.ndarray:
    """Return an array that stays in its file; nothing is unpickled."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptError(f"{path} is no whole .npy file of numbers; fetch it anew.") from error


def mean_of(top1: dict[str, list[float]]) -> float:
    """Return the mean over families and severities, percent, without those in EXTRA."""
    own = [value for name, values in top1.items() if name not in EXTRA for value in values]
    return sum(own) / len(own)


def by_group(top1: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return by severity the mean over the families of each group that are there, percent, without those in EXTRA."""
    found = {}
    for group, names in GROUPS.items():
        own = [top1[name] for name in names if name in top1 and name not in EXTRA]
        if own:
            found[group] = [sum(values) / len(own) for values in zip(*own, strict=True)]
    return found
