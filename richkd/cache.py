"""Teacher outputs on disk: content-addressed, checksummed, memory-mapped, shared by processes.

    CACHE/KIND/DIGEST.json            what the entry is, for humans
    CACHE/KIND/DIGEST/                the entry; appears when it is whole
        rows.npy  shards.json         of a table: float32 rows and the SHA-256 of each shard
    CACHE/KIND/.DIGEST.partial/       an entry in the making; a table goes on from its finished shards

The digest covers kind, key and format number: another model, prompt set or data set is another entry, so
an entry is never out of date.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from richkd.errors import ConfigError, CorruptError, DataError
from richkd.files import read_json, sync, write_json
from richkd.progress import Progress

FORMAT = 1
SHARD = 1024  # rows: at most a minute or two of a ViT-B/32 on one core is lost by a kill
ROWS, SHARDS = "rows.npy", "shards.json"

_verified: set[tuple] = set()  # tables that this process has found sound, as `_stamp` gives them


def root(configured: str | None) -> Path:
    """Return the cache folder: `configured`, else RICHKD_CACHE, else `~/.cache/richkd`; made if missing.

    A folder that can only be read will do for entries that are there.

    Raises:
        ConfigError: If it cannot be made.
    """
    wanted = configured or os.environ.get("RICHKD_CACHE") or "~/.cache/richkd"
    try:
        path = Path(wanted).expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise _unusable(wanted, error) from error
    return path


def rows(
    root: Path,
    kind: str,
    key: dict[str, Any],
    count: int,
    width: int,
    compute: Callable[[int, int], np.ndarray],
    *,
    progress: Progress | None = None,
) -> np.ndarray:
    """Return a table of teacher outputs, from the cache or computed into it.

    An interrupted fill goes on from its finished shards. Each shard's checksum is compared when a
    process first opens the table; a damaged shard is computed again, with a warning.

    Args:
        root: Cache folder.
        kind: What the rows are; a folder of that name, and the word that `progress` gets.
        key: All that the rows depend on, as plain JSON.
        count: Number of rows.
        width: Values a row.
        compute: Given start and stop returns those rows, `(stop - start, width)`; called for at most
            SHARD rows at a time, in order, by one process at a time.
        progress: Called with kind, finished rows and `count`. May raise to stop; finished shards stay.

    Returns:
        Float32 `(count, width)`, memory-mapped and read-only, so that all processes share one copy.

    Raises:
        DataError: If `compute` returned another shape or a value that is not finite.
        ConfigError: If the table is not there and the cache cannot be written.
    """
    if count < 1 or width < 1:
        raise DataError(
            f"{kind} must have at least one row and one column but got {(count, width)}."
        )
    description = _describe(kind, {"key": key, "count": count, "width": width})
    entry = _entry(root, description)
    if not _is_sound(entry, count, width):
        with _locked(root, entry, description, progress):
            place = entry
            if not entry.exists():
                place = _partial(entry)
                place.mkdir(exist_ok=True)
            _fill(place, kind, count, width, compute, progress, expected=place == entry)
            if place != entry:
                _publish(place, entry)
        _verified.add(_stamp(entry))
    return _table(entry, count, width)


def folder(
    root: Path,
    kind: str,
    key: dict[str, Any],
    build: Callable[[Path], None],
    *,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of an artefact that is built once.

    Args:
        root: Cache folder.
        kind: What it is; a folder of that name.
        key: All that it depends on, as plain JSON.
        build: Fills the empty folder that it is given. If it raises, nothing is kept.
        progress: Called about once a second while another process builds; may raise to stop.

    Raises:
        ConfigError: If it is not there and the cache cannot be written.
    """
    description = _describe(kind, key)
    entry = _entry(root, description)
    if not entry.exists():
        with _locked(root, entry, description, progress):
            if not entry.exists():
                partial = _partial(entry)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                try:
                    build(partial)
                    for path in partial.rglob("*"):
                        sync(path)
                    _publish(partial, entry)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return entry


def _describe(kind: str, key: dict[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "kind": kind, "key": key}


def _entry(root: Path, description: dict[str, Any]) -> Path:
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return root / description["kind"] / hashlib.sha256(text.encode()).hexdigest()


def _partial(entry: Path) -> Path:
    return entry.with_name(f".{entry.name}.partial")


def _publish(partial: Path, entry: Path) -> None:
    sync(partial)
    os.rename(partial, entry)
    sync(entry.parent)


@contextmanager
def _locked(
    root: Path, entry: Path, description: dict[str, Any], progress: Progress | None
) -> Iterator[None]:
    """Hold the entry's lock, which the system frees if its owner dies, and say what the entry is."""
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(entry.with_name(f".{entry.name}.lock"))
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1)
            except Timeout:
                if progress is not None:
                    progress(f"{description['kind']} (another process is at it)", 0, 1)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise _unusable(root, error) from error
    try:
        write_json(entry.with_suffix(".json"), description)
        yield
    finally:
        lock.release()


def _unusable(path: str | Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"cache must be a folder that can be written but {path} cannot ({error}); "
        "name another: cache=FOLDER, or RICHKD_CACHE in the environment."
    )


def _fill(
    place: Path,
    kind: str,
    count: int,
    width: int,
    compute: Callable[[int, int], np.ndarray],
    progress: Progress | None,
    *,
    expected: bool,
) -> None:
    """Compute the shards of the table in `place` that are missing or damaged.

    A finished table is `expected` to have all of them.
    """
    path, starts = place / ROWS, range(0, count, SHARD)
    recorded = _recorded(place, len(starts))
    sound = _sound(path, recorded, count, width)
    damaged = [i for i, good in enumerate(sound) if not good and (expected or recorded[i])]
    if damaged:
        warnings.warn(
            f"{path} is damaged in {len(damaged)} of {len(starts)} shards (the first at row "
            f"{starts[damaged[0]]}); they are computed again. If this happens twice, check the disk.",
            stacklevel=3,
        )
    if all(sound):
        return
    header = _header(count, width)
    done = sum(min(SHARD, count - start) for start, good in zip(starts, sound, strict=True) if good)
    # plain writes: on a full disk they raise, where a memory map would kill the process
    with open(path, "r+b" if path.exists() else "xb") as file:
        file.truncate(len(header) + 4 * count * width)
        file.write(header)
        for i, start in enumerate(starts):
            if sound[i]:
                continue
            if progress is not None:
                progress(kind, done, count)
            stop = min(start + SHARD, count)
            content = _checked(compute(start, stop), kind, start, stop, width).tobytes()
            file.seek(len(header) + 4 * start * width)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            recorded[i] = hashlib.sha256(content).hexdigest()
            write_json(place / SHARDS, recorded)
            done += stop - start
    if progress is not None:
        progress(kind, count, count)


def _checked(values: np.ndarray, kind: str, start: int, stop: int, width: int) -> np.ndarray:
    """Return computed rows as float32, or raise DataError if they cannot be kept."""
    block = np.ascontiguousarray(values, dtype="<f4")
    if block.shape != (stop - start, width):
        raise DataError(
            f"{kind} must have shape {(stop - start, width)} for rows {start} to {stop} "
            f"but got {block.shape}."
        )
    if not (finite := np.isfinite(block).all(1)).all():
        raise DataError(
            f"{kind} must be finite but row {start + int(finite.argmin())} is not; "
            "look at that image, or compute in a higher precision."
        )
    return block


def _recorded(place: Path, shards: int) -> list[str | None]:
    """Return the recorded SHA-256 of each shard, None where there is none or the record is torn."""
    try:
        recorded = read_json(place / SHARDS)
    except (ConfigError, CorruptError):
        recorded = None
    return recorded if isinstance(recorded, list) and len(recorded) == shards else [None] * shards


def _sound(path: Path, recorded: list[str | None], count: int, width: int) -> list[bool]:
    """Say of each shard whether its bytes are the recorded ones."""
    if not path.exists():
        return [False] * len(recorded)
    with open(path, "rb") as file:  # not memory-mapped: the file may have been cut
        file.seek(len(_header(count, width)))
        return [
            hashlib.sha256(file.read(4 * width * min(SHARD, count - i * SHARD))).hexdigest()
            == value
            for i, value in enumerate(recorded)
        ]


def _is_sound(entry: Path, count: int, width: int) -> bool:
    """Say whether a finished table is there and sound; its bytes are read once a process."""
    if not (entry / ROWS).exists():
        return False
    if _stamp(entry) not in _verified:
        recorded = _recorded(entry, len(range(0, count, SHARD)))
        if not all(_sound(entry / ROWS, recorded, count, width)):
            return False
        _verified.add(_stamp(entry))
    return True


def _stamp(entry: Path) -> tuple:
    found = (entry / ROWS).stat()
    return str(entry), found.st_ino, found.st_size, found.st_mtime_ns


def _header(count: int, width: int) -> bytes:
    """Return the first bytes of the `.npy` file; known, so that a damaged one misleads nobody."""
    stream = BytesIO()
    layout = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(stream, layout)
    return stream.getvalue()


def _table(entry: Path, count: int, width: int) -> np.ndarray:
    offset = len(_header(count, width))
    return np.memmap(entry / ROWS, dtype="<f4", mode="r", offset=offset, shape=(count, width))
