"""One image file as a picture: whatever Pillow reads, turned upright, as 8-bit RGB."""

import contextlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from richkd.errors import DataError

WRITE_ONLY = ("PDF", "PALM")  # Pillow's formats that it cannot read


def suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, of the formats that Pillow reads."""
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in known if kind not in WRITE_ONLY)


def decode(source: Path | bytes) -> Image.Image:
    """Return a picture as RGB, as a person would see it.

    EXIF's turn is applied, what is transparent lies over white, of an animation the first frame is taken,
    16-bit grey is scaled to 8 bits. Safe to call from threads; no file stays open.

    Args:
        source: A file, or the bytes of one.

    Raises:
        DataError: If it is cut, no picture, too large (Pillow's limit against decompression bombs) or of
            floating-point or 32-bit values, whose range is unknown. Of bytes, the message is the reason alone.
    """
    if isinstance(source, Path):
        try:
            return decode(source.read_bytes())
        except (DataError, OSError) as error:
            raise DataError(
                f"{source} cannot be read as an image ({reason(error)}); repair or remove it."
            ) from error
    if not source:
        raise DataError("the file is empty")
    try:
        with Image.open(BytesIO(source)) as image:
            # Pillow only warns up to twice the limit, and a filter of warnings is no matter of one thread
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise DataError(
                    f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}"
                )
            if image.format == "EPS":
                raise DataError("EPS is a program, not an image")
            image.load()
            upright = image
            with contextlib.suppress(Exception):  # torn EXIF leaves a sound picture as it is
                upright = ImageOps.exif_transpose(image)
            return _rgb(upright)
    except (DataError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise DataError("no format that Pillow knows") from error
    except Exception as error:  # each format has its own exceptions for a torn file
        raise DataError(reason(error)) from error


def pixels(source: Path | bytes, size: int) -> np.ndarray:
    """Return the centre square of a picture, scaled to uint8 `(size, size, 3)`; bicubic, antialiased.

    The shorter side comes to `size` pixels. Raises as `decode` does.
    """
    return centre(decode(source), size)


def centre(
    image: Image.Image, size: int, resample: str = "bicubic", border: float = 0.0
) -> np.ndarray:
    """Return the centre square of a picture, scaled to uint8 `(size, size, 3)`; antialiased.

    Args:
        image: RGB.
        size: Pixels of a side.
        resample: Pillow's name of the filter.
        border: Share of the picture that is cut off at each of its sides first.
    """
    side = min(image.size) * (1 - 2 * border)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.array(image.resize((size, size), Image.Resampling[resample.upper()], box=box))


def picture(values: np.ndarray) -> Image.Image:
    """Return uint8 `(H, W, C)` as a picture, grey if it has one channel."""
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def reason(error: Exception) -> str:
    """Return what an exception says, in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DataError("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        return _from_16_bits(np.asarray(image))
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        return ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, image.mode, "RGB"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(grey: np.ndarray) -> Image.Image:
    """Return integer `(H, W)` in 0 to 65535 as RGB; scaled, where Pillow's own conversion would clip."""
    if grey.min() < 0 or grey.max() > 65535:
        raise DataError(f"32-bit pixels from {grey.min()} to {grey.max()}, whose range is unknown")
    return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
