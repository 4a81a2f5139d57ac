"""Images as one indexed uint8 tensor: sources, subsets, batched augmentation, batches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from richkd import cache
from richkd.config import Data
from richkd.data.arrays import arrays
from richkd.data.batches import Batches
from richkd.data.cifar import cifar100
from richkd.data.dataset import Dataset, Images
from richkd.data.digits import digits
from richkd.data.folder import folder
from richkd.data.imagenet import imagenet
from richkd.data.padded import shared
from richkd.data.rows import rows
from richkd.data.stream import Stream
from richkd.data.subsets import Split, split
from richkd.data.views import Views
from richkd.errors import ConfigError
from richkd.progress import Progress

SOURCES: dict[str, Callable[[Data, Path, Progress | None], Dataset]] = {
    "digits": digits,
    "cifar100": cifar100,
    "folder": folder,
    "arrays": arrays,
    "imagenet": imagenet,
}
OWN = {  # keys of some sources alone
    "root": ("cifar100", "imagenet"),
    "download": ("cifar100",),
    "path": ("folder", "arrays"),
    "names": ("folder", "arrays", "imagenet"),
    "unreadable": ("folder",),
    "folds": ("folder", "arrays"),
    "fold": ("folder", "arrays"),
}

# of streams: the normalisation and filters of both recipes; photographs are tested on their 224 of 256 central pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLE, BORDER = {"resized": "bilinear", "strong": "bicubic"}, 16 / 256

__all__ = [
    "Batches",
    "Dataset",
    "Images",
    "Split",
    "Stream",
    "Views",
    "load",
    "rows",
    "split",
    "views_of",
]

_loaded: dict[tuple[Data, Path], Dataset] = {}  # the last one


def load(config: Data, cache_root: Path | None = None, progress: Progress | None = None) -> Dataset:
    """Return the data set that `config.source` names, read once a process.

    Args:
        config: Says where it is and what is done with it.
        cache_root: Where decoded and padded images are kept; None: as without a configured cache.
        progress: Told how many of them are.

    Raises:
        ConfigError: If there is no such source, or it is not where `config` says.
        DataError: If its images, labels or names do not fit together.
        CorruptError: If it is damaged.
    """
    if config.source not in SOURCES:
        raise ConfigError(
            f"data.source must be one of {', '.join(SOURCES)} but got {config.source!r}."
        )
    for key, sources in OWN.items():
        if getattr(config, key) != getattr(Data(), key) and config.source not in sources:
            raise ConfigError(
                f"data.{key} is a matter of data.source={' or '.join(sources)} but data.source is {config.source}; "
                "leave it out."
            )
    streamed = config.augment != "crop"
    if config.size != Data().size and config.source != "folder" and not streamed:
        raise ConfigError(
            f"data.size is a matter of data.source=folder, or of data.augment=resized or strong, but data.source is "
            f"{config.source}; leave it out."
        )
    # what only the split reads makes no other data set
    asked = replace(
        config,
        validation=1,
        seed=0,
        imbalance=None,
        fraction=1.0,
        whole=False,
        labelled_per_class=None,
        labelled_share=None,
    )
    root = cache.root(None) if cache_root is None else cache_root
    if (asked, root) not in _loaded:
        dataset = SOURCES[config.source](config, root, progress)
        own = {key: getattr(config, key) for key in ("pad", "flip")}
        dataset = replace(dataset, **{k: v for k, v in own.items() if v is not None})
        if streamed:
            if dataset.channels != 3:
                raise ConfigError(
                    f"data.augment={config.augment} is for images in colour but {dataset.name} has {dataset.channels} "
                    "channel; use data.augment=crop."
                )
            dataset = replace(
                dataset,
                augment=config.augment,
                side=config.size,
                resample=RESAMPLE[config.augment],
                border=BORDER if dataset.train.files is not None else 0.0,
                mean=MEAN,
                std=STD,
            )
        parts = {
            part: shared(
                getattr(dataset, part), dataset.pad, dataset.flip, config.memory, root, progress
            )
            for part in ("train", "test")
            if not streamed
        }
        dataset = replace(dataset, **parts)
        _loaded.clear()
        _loaded[asked, root] = dataset
    return _loaded[asked, root]


def views_of(
    images: Images, dataset: Dataset, device: torch.device, memory: float
) -> Views | Stream:
    """Return all views of the training or test images of `dataset`, as its augmentation makes them.

    Args:
        images: Of the data set.
        dataset: Says how they are augmented.
        device: Where batches are made.
        memory: GiB that padded pixels may take.
    """
    if dataset.streamed:
        return Stream(images, dataset, device)
    return Views(images, dataset, device, memory)
