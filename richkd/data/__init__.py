"""Images as one indexed uint8 tensor: sources, subsets, batched augmentation, batches."""

from functools import lru_cache

from richkd.config import Data
from richkd.data.batches import Batches
from richkd.data.dataset import Dataset, Images
from richkd.data.digits import digits
from richkd.data.subsets import Split, split
from richkd.data.views import Views
from richkd.errors import ConfigError

SOURCES = {"digits": digits}

__all__ = ["Batches", "Dataset", "Images", "Split", "Views", "load", "split"]


@lru_cache(maxsize=2)
def load(config: Data) -> Dataset:
    """Return the data set that `config.source` names, read once a process."""
    if config.source not in SOURCES:
        raise ConfigError(
            f"data.source must be one of {', '.join(SOURCES)} but got {config.source!r}."
        )
    return SOURCES[config.source](config)
