"""Images of one's own in a `.npz` file: `images`, `labels` and, if there are any, class `names`."""

from pathlib import Path

import numpy as np

from richkd.config import Data
from richkd.data.dataset import Dataset, Images
from richkd.data.names import read_names
from richkd.data.subsets import fold_of
from richkd.errors import ConfigError, CorruptError, DataError
from richkd.progress import Progress


def arrays(config: Data, root: Path, progress: Progress | None) -> Dataset:
    """Return the images of `data.path`, one of `data.folds` parts of them for testing.

    The file holds `images` `(N, H, W, C)` uint8 and `labels` `(N,)`, -1 where none is known, and may hold
    `names`, one a class; without them and without `data.names` classes are called by their number.

    Raises:
        ConfigError: If there is no such file, or an entry is missing.
        CorruptError: If the file is torn.
        DataError: If its arrays do not fit together.
    """
    if config.path is None or not Path(config.path).is_file():
        raise ConfigError(
            "data.path must be an .npz file with `images` and `labels` but "
            + ("none is given." if config.path is None else f"{config.path} is no file.")
        )
    pixels, labels, names = _entries(config.path)
    try:
        everything = Images(pixels=pixels, labels=labels)
    except DataError as error:
        raise DataError(f"data.path={config.path}: {error}") from error
    count = int(everything.labels.max(initial=-1)) + 1
    if count > len(everything):  # before anything of that size is made, as of 2**31 - 1 for unknown
        raise DataError(
            f"data.path={config.path}: labels must lie in 0 to the number of classes less 1, or be -1, but there is "
            f"{count - 1} among {len(everything)} images; number the classes from 0."
        )
    if (lowest := everything.labels[everything.labels >= 0].min(initial=count)) > 0 and count:
        raise DataError(
            f"data.path={config.path}: labels must begin at 0 but the lowest is {lowest}; number the classes from 0."
        )
    if config.names is not None:
        names = read_names(Path(config.names), count)
    names = names or tuple(map(str, range(count)))
    test = fold_of(everything.labels, config)
    train = np.setdiff1d(np.arange(len(everything)), test)
    return Dataset(
        name="arrays",
        names=names,
        train=Images(pixels=pixels[train], labels=labels[train], ids=train),
        test=Images(pixels=pixels[test], labels=labels[test], ids=test),
        pad=max(everything.pixels.shape[1:3]) // 8,  # 4 of 32, as for CIFAR
        flip=True,
    )


def _entries(path: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]:
    """Return `images`, `labels` and, if they are there, `names`."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            raise ConfigError(
                f"data.path must be an .npz file, as numpy.savez writes it, but {path} is none."
            )
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                if missing := {"images", "labels"} - set(archive.files):
                    raise ConfigError(
                        f"data.path must hold `images` and `labels` but {path} lacks {', '.join(sorted(missing))}; "
                        f"it has {', '.join(archive.files) or 'nothing'}."
                    )
                pixels, labels = archive["images"], archive["labels"]
                names = archive["names"] if "names" in archive.files else None
        except ConfigError:
            raise
        except Exception as error:  # NumPy, zipfile and zlib have their own for a torn file
            if "allow_pickle" in str(error):
                raise DataError(
                    f"data.path={path} must hold plain numbers and text but has Python objects; save them as arrays, "
                    "names as numpy.array(names, str)."
                ) from error
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise CorruptError(
                f"data.path={path} cannot be decoded ({reason}); write it anew."
            ) from error
    if names is None:
        return pixels, labels, None
    if names.ndim != 1 or names.dtype.kind not in "US":
        raise DataError(
            f"data.path={path}: `names` must be text, one a class, but got {names.dtype} of shape {names.shape}; "
            "write it anew, or leave it out and give data.names."
        )
    if names.dtype.kind == "S":
        try:
            names = np.char.decode(names, "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"data.path={path}: `names` must be UTF-8 but cannot be decoded ({error}); write it anew as text."
            ) from error
    return pixels, labels, tuple(map(str, names))
