"""What a network says of each image in each view that can occur: a file in the cache that fills as it is asked.

Random crops of a padded image and flips have few outcomes, 162 of a CIFAR image, so that a teacher under augmentation can
be looked up, exactly, where it is usually run again in each step. Who asks for a row that is not there computes it, and
writes it down for all others; or all rows are computed ahead.

    CACHE/KIND/DIGEST/rows.npy      a row of numbers for each image and view, by image, then view: a sparse file
    CACHE/KIND/DIGEST/sums.npy      CRC-32 of each row, 0 where nobody has asked for it yet

A row is known if its checksum is right, whatever else there is: one that a kill, a power cut or a disk has torn is
computed again, alone. It is written before its checksum and read after it, so that any number of processes can read and
write at once without a lock. They map the file, of which the machine then holds one copy.
"""

import contextlib
import os
import warnings
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from richkd import cache
from richkd.errors import DataError
from richkd.progress import Progress

ROWS, SUMS = "rows.npy", "sums.npy"

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
        self.kind = kind
        self.shapes = {ROWS: ((count, width), np.dtype(dtype)), SUMS: ((count,), np.dtype("<u4"))}
        key = key | {"count": count, "width": width, "dtype": np.dtype(dtype).name}
        self.folder = cache.growing(root, kind, key, self._begin, self._is_usable)
        self.rows, self.sums = (np.load(self.folder / name, mmap_mode="r") for name in self.shapes)
        paths = [self.folder / name for name in self.shapes]
        # a cache may be one that can only be read
        writable = all(os.access(path, os.W_OK) for path in paths)
        self.files = [open(path, "r+b", buffering=0) for path in paths if writable]
        weakref.finalize(self, _close, self.files)

    def _begin(self, folder: Path) -> None:
        for name, (shape, dtype) in self.shapes.items():
            np.lib.format.open_memmap(folder / name, "w+", dtype, shape)

    def _is_usable(self, folder: Path) -> bool:
        """Say whether both files are there, as long as they should be."""
        try:
            mapped = {name: np.load(folder / name, mmap_mode="r") for name in self.shapes}
        except (OSError, ValueError, EOFError):
            return False
        return self.shapes == {name: (each.shape, each.dtype) for name, each in mapped.items()}

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.sums)

    def known(self) -> int:
        """Return how many rows have been written down; damaged ones are among them."""
        return int(np.count_nonzero(self.sums))

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
        """
        ranges = [(at, min(at + each, len(self))) for at in range(0, len(self), each)]
        missing = [one for one in ranges if not self._read(np.arange(*one))[1].all()]
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
        sums = self.sums[numbers]  # before the rows, which are written before them
        found = self.rows[numbers]
        known = np.fromiter(map(_sum, found), np.uint32, len(found)) == sums
        if damaged := int(((sums != 0) & ~known).sum()):
            warnings.warn(
                f"{self.folder / ROWS} is damaged in {damaged} of {len(numbers)} rows that were asked for; they are computed "
                "again. If this happens twice, check the disk.",
                stacklevel=3,
            )
        return found, known

    def _kept(self, values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            kept = np.ascontiguousarray(values, dtype=self.rows.dtype)
        if not (finite := np.isfinite(kept).all(1)).all():
            raise DataError(
                f"{self.kind} must be finite in {kept.dtype.name} but row {numbers[finite.argmin()]} is not; look at the "
                "teacher's weights, or give teacher.table=fp32."
            )
        return kept

    def _write(self, numbers: np.ndarray, rows: np.ndarray) -> None:
        """Write rows down, each before its checksum; not at all if the cache can only be read."""
        sums = np.fromiter(map(_sum, rows), np.uint32, len(rows))
        # plain writes: on a full disk they raise, where a memory map would kill the process
        for k, file in enumerate(self.files):
            mapped, values = (self.rows, self.sums)[k], (rows, sums)[k]
            each = mapped.strides[0]
            ends = np.flatnonzero(np.diff(numbers, append=-1) != 1) + 1  # of consecutive rows
            for start, stop in zip([0, *ends[:-1]], ends, strict=True):
                content = memoryview(values[start:stop].tobytes())
                place = mapped.offset + each * int(numbers[start])
                while content:
                    written = os.pwrite(file.fileno(), content, place)
                    content, place = content[written:], place + written


def _close(files: list[BinaryIO]) -> None:
    for file in files:
        file.close()


def _sum(row: np.ndarray) -> int:
    """Return the checksum of a row; 0 is kept for those that are not there."""
    return zlib.crc32(row) or 1
