"""One image file as a picture: whatever Pillow reads, turned upright, as RGB."""

from pathlib import Path

from PIL import Image


def decode(path: Path) -> Image.Image:
    """Return the picture in `path` as RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")
