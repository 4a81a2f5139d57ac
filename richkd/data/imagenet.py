"""ImageNet, or some of its classes, as it is usually unpacked; read file by file, never decoded as a whole.

DIR/train/WNID/*.JPEG  DIR/val/WNID/*.JPEG          a class by its number in WordNet, `val` is the test set
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from richkd.config import Data
from richkd.data.dataset import Dataset, Images
from richkd.data.folder import folders, image_files
from richkd.data.names import read_names
from richkd.errors import ConfigError, DataError
from richkd.progress import Progress

# open_clip calls these two what it calls others, and a class must be known by its name
OWN_NAMES = {"n04008634": "projectile", "n04355933": "sunglass"}


class Paths(Sequence):
    """Paths of files below a folder: of a million of them bytes, which processes share, not objects.

    Args:
        root: The folder.
        files: Relative paths.
    """

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root, self.files = root, np.array([os.fsencode(file) for file in files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> Path:
        return self.root / self.relative(k)

    def relative(self, k: int) -> str:
        """Return a path relative to `root`."""
        return os.fsdecode(bytes(self.files[k]))


def imagenet(config: Data, _: Path, progress: Progress | None) -> Dataset:
    """Return the images of `data.root`, else of `imagenet` in RICHKD_DATA.

    What is in the files is not looked at: their names and sizes stand for it.

    Raises:
        ConfigError: If they are not there, or are not to be streamed.
        DataError: If the two parts have not the same classes, or one of them is empty.
    """
    if config.augment == "crop":
        raise ConfigError(
            "data.source=imagenet is read file by file but data.augment=crop cuts out of padded pixels; use resized or strong."
        )
    place = config.root or os.environ.get("RICHKD_DATA") and f"{os.environ['RICHKD_DATA']}/imagenet"
    parts = ("train", "val")
    if not place or not all((Path(place) / part).is_dir() for part in parts):
        raise ConfigError(
            f"data.root must be a folder with train/WNID and val/WNID but got {place}; give it, or RICHKD_DATA, in which it "
            "is called imagenet."
        )
    root = Path(place).absolute()
    classes = {part: folders(root / part) for part in parts}
    if differing := set(classes["train"]) ^ set(classes["val"]):
        raise DataError(
            f"data.root must have the same classes in train and val but {sorted(differing)[:5]} are in one of them alone; "
            "add or remove them."
        )
    known = classes["train"]
    names = read_names(Path(config.names), len(known)) if config.names else names_of(known)
    train = _listed(root, "train", known, 0, progress)
    return Dataset(
        name="imagenet",
        names=names,
        train=train,
        test=_listed(root, "val", known, len(train), progress),
        pad=0,
        flip=True,
        first_test=len(train),
        mean=(0.0,) * 3,  # a stream brings its own
        std=(1.0,) * 3,
    )


def names_of(wnids: list[str]) -> tuple[str, ...]:
    """Return what classes are called: as open_clip does those of ImageNet, by their folder where there are others."""
    import open_clip
    from timm.data import ImageNetInfo

    spoken = dict(zip(ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES, strict=True))
    spoken |= OWN_NAMES
    if not all(wnid in spoken for wnid in wnids):
        return tuple(wnids)
    return tuple(spoken[wnid] for wnid in wnids)


def _listed(
    root: Path, part: str, classes: list[str], start: int, progress: Progress | None
) -> Images:
    """Return the files of `train` or `val`, without reading them; the first is the `start`-th of the source."""
    files: list[str] = []
    labels: list[int] = []
    text = hashlib.sha256(f"imagenet {part}".encode())
    for label, name in enumerate(classes):
        if progress is not None:
            progress(f"list of {part} images", label, len(classes))
        found = image_files(root, f"{part}/{name}")
        if not found:
            raise DataError(
                f"data.root: each class needs images but {root / part / name} has none; add some, or remove it."
            )
        sizes = [os.stat(root / file).st_size for file in found]
        text.update(json.dumps([*zip(found, sizes, strict=True)]).encode())
        files += found
        labels += [label] * len(found)
    if progress is not None:
        progress(f"list of {part} images", len(classes), len(classes))
    return Images(
        pixels=None,
        labels=np.array(labels),
        ids=np.arange(len(files)) + start,
        files=Paths(root, files),
        digest=text.hexdigest(),
    )
