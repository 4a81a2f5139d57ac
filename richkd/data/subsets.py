"""Which training rows are learnt from, which of them have labels, and which are held out."""

import hashlib
from dataclasses import dataclass

import numpy as np

from richkd.config import Data
from richkd.data.dataset import Dataset
from richkd.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Split:
    """Row numbers into the training images of a data set.

    Attributes:
        transfer: Rows that the student learns from, sorted.
        labels: Label of *every* training row as the student may see it: -1 unless the row belongs to
            the labelled part of the transfer set.
        validation: Held-out rows, sorted; all labelled. Settings and epochs are chosen on them. None under
            `selection: paper`.
        digest: SHA-256 of the above, which a trained network carries as what it has seen.
    """

    transfer: np.ndarray
    labels: np.ndarray
    validation: np.ndarray
    digest: str

    @property
    def labelled(self) -> np.ndarray:
        """The labelled transfer rows, sorted."""
        return self.transfer[self.labels[self.transfer] >= 0]


def stratified(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` rows that keep the shares of the classes, at least one a class; sorted.

    Args:
        labels: `(N,)`; rows with -1 are never drawn.
        count: Number of rows, at least the number of classes.
        rng: Source of the draw.

    Raises:
        DataError: If `count` is below the number of classes or would empty one.
    """
    classes, sizes = np.unique(labels[labels >= 0], return_counts=True)
    if (sizes < 2).any():
        raise DataError(
            f"a stratified part takes and leaves a row of each class but class {classes[sizes < 2][0]} has only 1 "
            "labelled row; add rows or leave the class out."
        )
    if not len(classes) <= count <= sizes.sum() - len(classes):
        raise DataError(
            f"a stratified part needs between {len(classes)} rows (one a class) and "
            f"{sizes.sum() - len(classes)} (leaving one a class) but {count} were asked for; change data.validation."
        )
    share = np.maximum(count * sizes / sizes.sum(), 1)
    take = np.minimum(np.floor(share).astype(int), sizes - 1)
    by_remainder = np.argsort(np.floor(share) - share, kind="stable")
    while take.sum() != count:  # hand out, or take back, what rounding left over
        step = 1 if take.sum() < count else -1
        for k in by_remainder:
            if take.sum() == count:
                break
            if 1 <= take[k] + step < sizes[k]:
                take[k] += step
    drawn = [
        rng.permutation(np.flatnonzero(labels == k))[:n] for k, n in zip(classes, take, strict=True)
    ]
    return np.sort(np.concatenate(drawn))


def fold_of(labels: np.ndarray, config: Data) -> np.ndarray:
    """Return the test rows of a source that has none of its own: one of `data.folds` stratified parts, sorted.

    They depend on `data.fold` alone, so that all seeds and methods are tested on the same rows, and the folds
    together hold each labelled row once. Rows without a label are never tested.

    Raises:
        DataError: If a class has fewer labelled rows than there are folds.
    """
    from sklearn.model_selection import StratifiedKFold

    known = np.flatnonzero(labels >= 0)
    classes, sizes = np.unique(labels[known], return_counts=True)
    if len(known) == 0 or sizes.min() < config.folds:
        fewest = (
            f"class {classes[sizes.argmin()]} has {sizes.min()}" if len(known) else "there is none"
        )
        raise DataError(
            f"a source without test rows needs data.folds={config.folds} labelled rows of each class but {fewest}; "
            "lower data.folds, or bring test rows."
        )
    folds = StratifiedKFold(config.folds, shuffle=True, random_state=0)
    return known[list(folds.split(known, labels[known]))[config.fold][1]]


def split(dataset: Dataset, config: Data, seed: int, selection: str = "validation") -> Split:
    """Cut validation rows from the training set and choose the labelled part of the rest.

    The validation rows depend on `data.seed` alone, so that runs with other seeds are compared on the
    same ones, unless the source itself sets rows aside for that; the labelled subset depends on `data.seed` and
    on `seed`, since few labels are a large part of the chance in a few-label result. Rows without a label are
    never held out. With `selection` as `paper` no row is, not even of those that the source sets aside.
    """
    labels = dataset.train.labels
    validation = dataset.held_out if selection == "validation" else np.arange(0)
    if validation is None:
        count = config.validation
        if count < 1:
            count = max(round(count * (labels >= 0).sum()), len(dataset.names))
        validation = stratified(labels, count, np.random.default_rng([config.seed, 1]))
    transfer = np.setdiff1d(np.arange(len(labels)), validation)
    visible = labels.copy()
    visible[validation] = -1
    if config.labelled_per_class is not None:
        rng = np.random.default_rng([config.seed, 2, seed])
        visible[:] = -1
        for k, name in enumerate(dataset.names):
            rows = transfer[labels[transfer] == k]
            if len(rows) < config.labelled_per_class:
                raise DataError(
                    f"data.labelled_per_class={config.labelled_per_class} but class {name!r} has {len(rows)} "
                    "labelled rows outside the validation set; ask for fewer of either."
                )
            visible[rng.permutation(rows)[: config.labelled_per_class]] = k
    text = hashlib.sha256(dataset.digest.encode())
    for part in (transfer, visible, validation):
        text.update(part.tobytes())
    return Split(transfer=transfer, labels=visible, validation=validation, digest=text.hexdigest())
