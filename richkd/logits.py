"""Logits that somebody computed elsewhere, as a teacher: read, checked, and aligned with the images.

Rows are in the order of the source: the training images first, then, if they are there, the test images; of a
source that we cut ourselves, all images as they lie in it.

Shapes: N training rows, M test rows, K classes.
"""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from richkd import files
from richkd.data import Dataset
from richkd.errors import ConfigError, CorruptError, DataError
from richkd.files import sha256_of, write_atomic
from richkd.fusion import together


def aligned(spec: str, dataset: Dataset, *, field: str) -> tuple[Tensor, Tensor | None]:
    """Read given logits of a data set: `(N, K)` of the training rows, and `(M, K)` of the test rows if they are there.

    An `.npz` file may hold `labels` beside them, which are then compared with the data's own.

    Args:
        spec: `FILE.npy`, `FILE.npz:KEY` or `FILE.safetensors:KEY`.
        dataset: Says which rows there are, and where they stand in their source.
        field: Config key, for the messages.

    Raises:
        DataError: If they have another shape than the data, or labels that are not the data's; and as `read_logits`.
    """
    train, test = dataset.train, dataset.test
    counts = [len(train) + len(test) + len(dataset.unreadable)]
    if dataset.first_test is not None:  # the source itself says which are for training
        counts.append(dataset.first_test)
    left_out = np.setdiff1d(np.arange(max(counts)), np.concatenate([train.ids, test.ids]))
    values = read_logits(spec, counts, len(dataset.names), field=field, unused=left_out)
    _check_labels(spec, dataset, field)
    whole = len(values) == counts[0]
    return values[train.ids], values[test.ids] if whole else None


def _check_labels(spec: str, dataset: Dataset, field: str) -> None:
    """Compare the `labels` that lie beside logits in an `.npz` file with the data's own, where both are known."""
    path, key = _file_of(spec)
    if path.suffix != ".npz" or key == "labels":
        return
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            said = archive["labels"] if "labels" in archive.files else None
    except Exception as error:  # as of the logits
        if "allow_pickle" in str(error):  # Python objects are no labels of ours
            return
        raise _undecodable(field, path, error) from error
    if said is None or said.ndim != 1 or said.dtype.kind not in "iu":
        return
    said, wrong = said.astype(np.int64), 0
    for images in (dataset.train, dataset.test):
        there = images.ids < len(said)
        own, other = images.labels[there], said[images.ids[there]]
        wrong += int(((own != other) & (own >= 0) & (other >= 0)).sum())
    if wrong:
        raise DataError(
            f"{field}: the labels in {path} differ from those of {dataset.name} in {wrong} rows; are its rows, or its "
            "classes, in another order?"
        )


def read_logits(
    spec: str, rows: list[int], classes: int, *, field: str, unused: np.ndarray | None = None
) -> Tensor:
    """Read logits that somebody computed elsewhere, float32, one of `rows` by `classes`.

    Args:
        spec: `FILE.npy`, `FILE.npz:KEY` or `FILE.safetensors:KEY`.
        rows: Numbers of rows that would do.
        classes: Expected number of columns.
        field: Config key, for the messages.
        unused: Rows that nobody asks for, such as those of files that cannot be read; they may hold anything.

    Raises:
        ConfigError: If the file or the key is missing.
        DataError: If the shape is another, or a value is not finite.
        CorruptError: If the file cannot be decoded.
    """
    path, key = _file_of(spec)

    def fits(shape: tuple[int, ...]) -> None:
        if shape not in [(count, classes) for count in rows]:
            wanted = " or ".join(str((count, classes)) for count in sorted(rows))
            raise DataError(
                f"{field} must hold one row an image (of all, or of the training images alone) and one column a class, "
                f"{wanted}, but {spec} has {shape}; `python -m richkd cache ... --rows FILE` writes their order."
            )

    if not path.is_file():
        raise ConfigError(
            f"{field} must name a file (.npy, .npz:KEY or .safetensors:KEY) but {spec} is missing."
        )
    if path.suffix not in (".npy", ".npz", ".safetensors") or (path.suffix == ".npy" and key):
        raise ConfigError(f"{field} must end in .npy, .npz:KEY or .safetensors:KEY but got {spec}.")
    try:
        values = _entry(path, key, fits)
    except KeyError as error:
        raise ConfigError(
            f"{field}={spec} names no entry of the file; it has {error.args[0]}."
        ) from error
    except DataError:
        raise
    except Exception as error:  # each format has its own exceptions for a torn or foreign file
        raise _undecodable(field, path, error) from error
    if isinstance(values, np.dtype):
        raise DataError(f"{field} must hold floating-point logits but {spec} has {values}.")
    fits(tuple(values.shape))
    if not values.dtype.is_floating_point:
        raise DataError(
            f"{field} must hold floating-point logits but {spec} has {values.dtype}; are they labels?"
        )
    values = values.float()
    # by blocks: a look at all of a large table would be another one
    parts = values.split(together(classes))
    bad = torch.cat([~part.isfinite().all(1) for part in parts])
    if unused is not None:
        bad[unused[unused < len(bad)]] = False
    if bad.any():
        raise DataError(
            f"{field} must hold finite logits but {int(bad.sum())} rows of {spec} do not, the first is row "
            f"{int(bad.nonzero()[0])}, counted from 0; compute them anew."
        )
    return values


def _undecodable(field: str, path: Path, error: Exception) -> CorruptError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CorruptError(f"{field}: {path} cannot be decoded: {reason}; write it anew.")


def _file_of(spec: str) -> tuple[Path, str]:
    """Split `FILE:KEY`; a path may hold colons itself."""
    name, _, key = spec.rpartition(":") if not Path(spec).exists() else (spec, "", "")
    return Path(name or spec), key


def _entry(path: Path, key: str, fits: Callable[[tuple[int, ...]], None]) -> Tensor | np.dtype:
    """Read one array, or only its type if that is no number; a KeyError says which entries there are.

    `fits` raises for a wrong shape, before content that may be very large is unpacked.
    """
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as archive:
            if key not in archive.keys():
                raise KeyError(", ".join(archive.keys()))
            return archive.get_tensor(key)
    if path.suffix == ".npy":
        values = np.load(path, mmap_mode="r", allow_pickle=False)  # shape first, content later
    else:
        # opened here, since NumPy leaves a torn file open
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if key not in archive.files:
                raise KeyError(", ".join(archive.files))
            with archive.zip.open(f"{key}.npy") as member:
                version = np.lib.format.read_magic(member)
                header = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    header = np.lib.format.read_array_header_2_0
                fits(header(member)[0])
            values = archive[key]
    if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
        return values.dtype
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("=")))


def write(path: Path, train: Tensor, test: Tensor, dataset: Dataset) -> None:
    """Write logits of all images of a data set as `aligned` reads them; rows of files that cannot be read are zeros.

    Args:
        path: `FILE.npy`, replaced if it is there.
        train: `(N, K)`.
        test: `(M, K)`.
        dataset: Says where each row stands in the source.

    Raises:
        ConfigError: If it cannot be written as this file.
    """
    check_target(path)
    rows = len(train) + len(test) + len(dataset.unreadable)
    values = np.zeros((rows, train.shape[1]), np.float32)
    for images, part in ((dataset.train, train), (dataset.test, test)):
        values[images.ids] = part.cpu().numpy()
    content = io.BytesIO()
    np.save(content, values)
    write_atomic(path, content.getvalue())


def check_target(path: Path) -> None:
    """Raise ConfigError unless logits can be written as this file."""
    if path.suffix != ".npy":
        raise ConfigError(f"--logits must name a file that ends in .npy but got {path}.")
    files.check_target(path, "--logits")


def identity(spec: str) -> str:
    """Return what changes with the content of given logits."""
    path, key = _file_of(spec)
    return sha256_of(path)[:12] + (f":{key}" if key else "")
