"""The embedded default: the 1,797 handwritten digits that ship with scikit-learn, 8 x 8 pixels, grey."""

from pathlib import Path

import numpy as np

from richkd.config import Data
from richkd.data.dataset import Dataset, Images
from richkd.data.subsets import stratified
from richkd.progress import Progress

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_ROWS = 800


def digits(config: Data, root: Path, progress: Progress | None) -> Dataset:
    """Return the digits, 997 for training and 800 for testing, cut the same way for every seed."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = np.rint(raw.images * (255 / 16)).astype(np.uint8)[..., None]  # 17 grey levels
    labels = raw.target.astype(np.int64)
    test = stratified(labels, TEST_ROWS, np.random.default_rng(0))
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Dataset(
        name="digits",
        names=NAMES,
        train=Images(pixels=pixels[train], labels=labels[train]),
        test=Images(
            pixels=pixels[test], labels=labels[test], ids=np.arange(len(train), len(labels))
        ),
        pad=1,  # shifts of one pixel: an eighth of the image, as 4 of 32 for CIFAR
        flip=False,
        first_test=len(train),
    )
