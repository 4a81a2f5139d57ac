"""The complete CIFAR-100 in torchvision's layout: 50,000 training and 10,000 test images of 32 x 32."""

import os
from http.client import HTTPException
from pathlib import Path

import numpy as np

from richkd.config import Data
from richkd.data.dataset import Dataset, Images
from richkd.errors import ConfigError, CorruptError
from richkd.files import NO_SPACE
from richkd.progress import Progress

FOLDER = "cifar-100-python"


def cifar100(config: Data, root: Path, progress: Progress | None) -> Dataset:
    """Return CIFAR-100 from `data.root`, else RICHKD_DATA; torchvision compares its checksums.

    Raises:
        ConfigError: If it is not there, or cannot be downloaded.
        CorruptError: If a file is not the published one.
    """
    from torchvision.datasets import CIFAR100

    place = config.root or os.environ.get("RICHKD_DATA")
    if not place and config.download:
        place = root / "data"
    if not place:
        raise ConfigError(
            f"data.root must name the folder that holds {FOLDER} but is not given, nor is RICHKD_DATA; give it, or "
            "data.download=true."
        )
    place = Path(place).expanduser()
    if not (place / FOLDER / "train").exists() and not config.download:
        hint = f"give its parent, {place.parent}" if place.name == FOLDER else "give another"
        raise ConfigError(
            f"data.root must hold {FOLDER}, as torchvision lays it out, but {place} does not; {hint}, or "
            "data.download=true."
        )
    try:
        parts = [CIFAR100(place, train=train, download=config.download) for train in (True, False)]
    except (RuntimeError, OSError, HTTPException) as error:  # of the checksums; of the network
        if isinstance(error, OSError) and (not config.download or error.errno in NO_SPACE):
            raise
        reason = " ".join(str(error).split())[:200]
        if not config.download:
            raise CorruptError(
                f"{place / FOLDER} must hold the published files but one is damaged or missing; fetch it anew."
            ) from error
        raise ConfigError(
            f"data.download: CIFAR-100 could not be fetched into {place} ({reason}); download it on a machine with "
            "internet and give data.root."
        ) from error
    train, test = (
        Images(pixels=part.data, labels=np.array(part.targets), ids=np.arange(len(part)) + start)
        for part, start in zip(parts, (0, len(parts[0])), strict=True)
    )
    return Dataset(
        name="cifar100",
        names=tuple(parts[0].classes),
        train=train,
        test=test,
        pad=4,
        flip=True,
        first_test=len(train),
    )
