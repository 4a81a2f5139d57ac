"""Images of one's own in a `.npz` file: `images`, `labels` and, if there are any, class `names`."""

import zipfile
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
            f"data.path must be an .npz file with `images` and `labels` but got {config.path}."
        )
    try:
        with open(config.path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            entries = getattr(archive, "files", [])  # of a single array there are none
            if missing := {"images", "labels"} - set(entries):
                raise ConfigError(
                    f"data.path must hold `images` and `labels` but {config.path} lacks {', '.join(sorted(missing))}; "
                    f"it has {', '.join(entries) or 'no names at all'}."
                )
            pixels, labels = archive["images"], archive["labels"]
            names = tuple(map(str, archive["names"])) if "names" in entries else None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        if "allow_pickle" in str(error):
            raise DataError(
                f"data.path={config.path} must hold plain numbers and text but has Python objects; save them as arrays."
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise CorruptError(f"{config.path} cannot be decoded ({reason}); write it anew.") from error
    everything = Images(pixels=pixels, labels=labels)
    count = int(everything.labels.max(initial=-1)) + 1
    if config.names is not None:
        names = read_names(Path(config.names), count)
    names = names or tuple(map(str, range(count)))
    test = fold_of(everything.labels, config)
    train = np.setdiff1d(np.arange(len(everything)), test)
    return Dataset(
        name=Path(config.path).stem,
        names=names,
        train=Images(pixels=pixels[train], labels=labels[train], ids=train),
        test=Images(pixels=pixels[test], labels=labels[test], ids=test),
        pad=max(everything.pixels.shape[1:3]) // 8,  # 4 of 32, as for CIFAR
        flip=True,
    )
