"""What a network says of each image in each view that can occur: a file in the cache that fills as it is asked.

Random crops of a padded image and flips have few outcomes, 162 of a CIFAR image, so that a teacher under augmentation can
be looked up, exactly, where it is usually run again in each step. Who asks for a row that is not there computes it, and
writes it down for all others; or all rows are computed ahead.

    CACHE/KIND/DIGEST/rows.npy      of each image and view, by image, then view, the numbers `row` and their CRC-32 `sum`,
                                    0 where nobody has asked yet: a sparse file

A row is known if its checksum is right: one that a kill, a power cut or a disk has torn is computed again, alone. Row and
checksum are written at once, so that any number of processes can read and write without a lock. They map the file, of which
the machine then holds one copy.
"""

import contextlib
import os
import warnings
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from richkd import cache
from richkd.errors import ConfigError, DataError
from richkd.progress import Progress

ROWS = "rows.npy"

Compute = Callable[[np.ndarray], np.ndarray]  # numbers of rows, distinct and sorted -> those rows


class Table:
    """Rows of numbers, each computed when it is first asked for.

    Args:
        root: Cache folder.
        kind: What the rows are; a folder of that name.
        key: All that the rows depend on, as plain JSON.
        count: Number of rows.
        width: Numbers a row.
        dtype: In which they are kept: float16 or float32.

    Raises:
        ConfigError: If the table is not there and the cache cannot be written.
    """

    def __init__(
        self, root: Path, kind: str, key: dict[str, Any], count: int, width: int, dtype: type
    ) -> None:
        self.kind, self.count = kind, count
        self.record = np.dtype([("row", np.dtype(dtype), (width,)), ("sum", "<u4")])
        key = key | {"count": count, "width": width, "dtype": np.dtype(dtype).name}
        self.folder = cache.growing(root, kind, key, self._begin, self._is_usable)
        path = self.folder / ROWS
        self.records = np.load(path, mmap_mode="r")
        self.file = None  # of a cache that can only be read
        if os.access(path, os.W_OK):
            self.file = open(path, "r+b", buffering=0)
            weakref.finalize(self, self.file.close)

    def _begin(self, folder: Path) -> None:
        np.lib.format.open_memmap(folder / ROWS, "w+", self.record, (self.count,))

    def _is_usable(self, folder: Path) -> bool:
        """Say whether the file is there, as long as it should be."""
        try:
            found = np.load(folder / ROWS, mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        return (found.dtype, found.shape) == (self.record, (self.count,))

    def __len__(self) -> int:
        """Number of rows."""
        return self.count

    def known(self) -> int:
        """Return how many rows have been written down; damaged ones are among them."""
        return int(np.count_nonzero(self.records["sum"]))

    def get(self, numbers: np.ndarray, compute: Compute) -> np.ndarray:
        """Return rows `(n, width)` as they are kept, computed and written down where they are not known.

        Args:
            numbers: `(n,)` int64, in any order.
            compute: Given the numbers of unknown rows returns those rows, `(m, width)`.

        Raises:
            DataError: If a computed row cannot be kept in the table's dtype.
        """
        found, known = self._read(numbers)
        if not known.all():
            unknown = np.unique(numbers[~known])
            fresh = self._kept(compute(unknown), unknown)
            self._write(unknown, fresh)
            found[~known] = fresh[np.searchsorted(unknown, numbers[~known])]
        return found

    def fill(
        self, compute: Compute, each: int, progress: Progress, spread: cache.Spread | None = None
    ) -> None:
        """Compute all rows that are not known.

        Args:
            compute: As `get` takes it.
            each: Rows at a time, between which `progress` is told how far it is; it may raise to stop, and they stay.
            progress: Called with the kind, rows done and their number.
            spread: Computes all ranges that lack a row where there are several to do it; None: `compute` does.

        Raises:
            ConfigError: If a row is missing and the cache can only be read.
        """
        ranges = [(at, min(at + each, len(self))) for at in range(0, len(self), each)]
        missing = [one for one in ranges if not self._read(np.arange(*one))[1].all()]
        if missing and self.file is None:
            raise ConfigError(
                f"cache must be a folder that can be written, to compute rows ahead, but {self.folder} cannot; name "
                "another: cache=FOLDER."
            )
        done = len(self) - sum(stop - start for start, stop in missing)
        progress(self.kind, done, len(self))
        here = (self.get(np.arange(*one), compute) for one in missing)
        with contextlib.closing(spread(missing) if spread else here) as blocks:
            for (start, stop), block in zip(missing, blocks, strict=True):
                if spread:
                    numbers = np.arange(start, stop)
                    self._write(numbers, self._kept(block, numbers))
                done += stop - start
                progress(self.kind, done, len(self))

    def _read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows as they lie there, and of each whether it is known."""
        found = self.records[numbers]
        known = _sums(found["row"]) == found["sum"]
        torn = np.flatnonzero((found["sum"] != 0) & ~known)
        if len(torn):  # perhaps it was just being written
            found[torn] = self.records[numbers[torn]]
            known[torn] = _sums(found["row"][torn]) == found["sum"][torn]
            if damaged := int((~known[torn]).sum()):
                warnings.warn(
                    f"{self.folder / ROWS} is damaged in {damaged} of {len(numbers)} rows that were asked for; they are "
                    "computed again. If this happens twice, check the disk.",
                    stacklevel=3,
                )
        return np.ascontiguousarray(found["row"]), known

    def _kept(self, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            kept = np.ascontiguousarray(values, dtype=self.record["row"].base)
        if not (finite := np.isfinite(kept).all(1)).all():
            raise DataError(
                f"{self.kind} must be finite in {kept.dtype.name} but row {numbers[finite.argmin()]} is not; look at the "
                "teacher's weights, or give teacher.table=fp32."
            )
        return kept

    def _write(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        """Write rows down, each with its checksum; not at all if the cache can only be read."""
        if self.file is None:
            return
        records = np.empty(len(rows), self.record)
        records["row"], records["sum"] = rows, _sums(rows)
        ends = np.flatnonzero(np.diff(numbers, append=-1) != 1) + 1  # of consecutive rows
        # plain writes: on a full disk they raise, where a memory map would kill the process
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            content = memoryview(records[start:stop].tobytes())
            place = self.records.offset + self.record.itemsize * int(numbers[start])
            while content:
                written = os.pwrite(self.file.fileno(), content, place)
                content, place = content[written:], place + written


def _sums(rows: np.ndarray) -> np.ndarray:
    """Return the checksum of each row; 0 is kept for those that are not there."""
    return np.fromiter((zlib.crc32(row) or 1 for row in rows), np.uint32, len(rows))
