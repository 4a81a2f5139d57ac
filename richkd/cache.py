"""Teacher outputs on disk: content-addressed, checksummed, memory-mapped, shared by processes.

    CACHE/KIND/DIGEST.json            what the entry is, for humans
    CACHE/KIND/DIGEST/                the entry; appears when it is whole
        rows.npy  shards.json         of `rows`: float32 rows and the SHA-256 of each shard
    CACHE/KIND/DIGEST.sha256          of a `folder`: the SHA-256 of each file, as `sha256sum --check` reads it
    CACHE/KIND/.DIGEST.partial/       an entry in the making; rows go on from their finished shards

The digest covers kind, key and format number: another model, prompt set or data set is another entry, so
an entry is never out of date. An entry's bytes are compared with their checksums once a machine: a note outside
the cache, which is dropped with any change of a file, says so to this user's other processes. What goes on `growing` is
checked by who reads it, see `table`.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from richkd.errors import ConfigError, CorruptError, DataError
from richkd.files import own_folder, read_json, sync, write_atomic, write_json
from richkd.progress import Progress

FORMAT = 2
SHARD = 1024  # rows: at most a minute or two of a ViT-B/32 on one core is lost by a kill
ROWS, SHARDS = "rows.npy", "shards.json"
BLOCK = 2**26  # bytes
SETTLED = 2.0  # seconds: the coarsest clock of a file system; a second change within may bear the same time
BOOT = Path("/proc/sys/kernel/random/boot_id")

Range = tuple[int, int]  # rows from start to before stop
Compute = Callable[[int, int], np.ndarray]  # such a range -> its rows
Spread = Callable[[list[Range]], Iterator[np.ndarray]]  # several -> the rows of each, in order

_verified: dict[Path, str] = {}  # entries that this process has found sound, as `_stamp` gives them
_used: dict[Path, None] = {}  # in order
_unmade: tuple[str, ...] = ()  # kinds that are not made now, as `found_only` was told


class Missing(Exception):
    """An entry is not there, and `found_only` keeps it from being made."""


@contextlib.contextmanager
def found_only(*kinds: str) -> Iterator[None]:
    """Inside, an entry of these kinds is found or raised as Missing: a question of what there is, asked by the one who reads it."""
    global _unmade
    before, _unmade = _unmade, kinds
    try:
        yield
    finally:
        _unmade = before


def _check_made(kind: str) -> None:
    if kind in _unmade:
        raise Missing(kind)


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


def used() -> list[Path]:
    """Return the entries that this process has asked for, `CACHE/KIND/DIGEST`, in order."""
    return list(_used)


def rows(
    root: Path,
    kind: str,
    key: dict[str, Any],
    count: int,
    width: int,
    compute: Compute,
    *,
    progress: Progress | None = None,
    spread: Spread | None = None,
) -> np.ndarray:
    """Return a table of teacher outputs, from the cache or computed into it.

    An interrupted fill goes on from its finished shards. Each shard's checksum is compared when the table
    is first opened on a machine; a damaged shard is computed again, with a warning.

    Args:
        root: Cache folder.
        kind: What the rows are; a folder of that name, and the word that `progress` gets.
        key: All that the rows depend on, as plain JSON.
        count: Number of rows.
        width: Values a row.
        compute: Given start and stop returns those rows, `(stop - start, width)`; called for at most
            SHARD rows at a time, in order, by one process at a time.
        progress: Called with kind, finished rows and `count`. May raise to stop; finished shards stay.
        spread: Computes all rows that are missing where there are several to do it, shard by shard; None: `compute` does.

    Returns:
        Float32 `(count, width)`, memory-mapped copy on write, so that all processes share one copy, none can damage the
        file, and PyTorch takes it.

    Raises:
        DataError: If `compute` or `spread` returned another shape or a value that is not finite.
        ConfigError: If the table is not there and the cache cannot be written.
    """
    if count < 1 or width < 1:
        raise DataError(
            f"{kind} must have at least one row and one column but got {(count, width)}."
        )
    description = _describe(kind, {"key": key, "count": count, "width": width})
    entry = _entry(root, description)
    _used[entry] = None
    if not _is_sound(entry, count, width):
        _check_made(kind)
        with _locked(root, entry, description, progress):
            place = entry
            if not entry.exists():
                place = _partial(entry)
                place.mkdir(exist_ok=True)
            blocks = spread or (lambda missing: (compute(*each) for each in missing))
            _fill(place, kind, count, width, blocks, progress, expected=place == entry)
            if place != entry:
                _publish(place, entry)
    return _table(entry, count, width)


def folder(
    root: Path,
    kind: str,
    key: dict[str, Any],
    build: Callable[[Path], None],
    *,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of an artefact that is built once; a damaged one is built again, with a warning.

    Args:
        root: Cache folder.
        kind: What it is; a folder of that name.
        key: All that it depends on, as plain JSON.
        build: Fills the empty folder that it is given. If it raises, nothing is kept.
        progress: Called about once a second while another process builds, and while checksums are compared; may
            raise to stop.

    Raises:
        ConfigError: If it is not there and the cache cannot be written.
    """
    description = _describe(kind, key)
    entry = _entry(root, description)
    _used[entry] = None
    if not _is_whole(entry, kind, progress):
        _check_made(kind)
        with _locked(root, entry, description, progress):
            if not _is_whole(entry, kind, progress):
                _build(entry, build)
    return entry


def growing(
    root: Path,
    kind: str,
    key: dict[str, Any],
    begin: Callable[[Path], None],
    usable: Callable[[Path], bool],
) -> Path:
    """Return the folder of an artefact that goes on growing; what is in it is checked by who reads it.

    It is not among those that `used` returns: each machine has its own.

    Args:
        root: Cache folder.
        kind: What it is; a folder of that name.
        key: All that it depends on, as plain JSON.
        begin: Puts into the empty folder that it is given what it begins with.
        usable: Whether a folder that is there can be gone on with; it is begun anew, with a warning, if not.

    Raises:
        ConfigError: If it is not there and the cache cannot be written.
    """
    description = _describe(kind, key)
    entry = _entry(root, description)
    if not (entry.exists() and usable(entry)):
        _check_made(kind)
        with _locked(root, entry, description, None):
            if not (entry.exists() and usable(entry)):
                _build(entry, begin, summed=False)
    return entry


def _build(entry: Path, build: Callable[[Path], None], *, summed: bool = True) -> None:
    """Build the folder of an entry, in place of a damaged one if there is one, its checksums `summed` up beside it."""
    if entry.exists():
        warnings.warn(
            f"{entry} is damaged, and is built again. If this happens twice, check the disk.",
            stacklevel=3,
        )
    partial = _partial(entry)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        build(partial)
        for path in partial.rglob("*"):
            sync(path)
        if summed:
            write_atomic(_sums_of(entry), _sums(partial, lambda *_: None))
        if entry.exists():
            shutil.rmtree(entry)
        _publish(partial, entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_whole(entry: Path, kind: str, progress: Progress | None) -> bool:
    """Say whether a folder is there, just as it was built; its bytes are read once a machine."""
    if not entry.exists():
        return False
    stamp = _stamp(_files(entry))
    if not _is_noted(entry, stamp):
        try:
            recorded = _sums_of(entry).read_bytes()
        except FileNotFoundError:
            return False
        told = progress or (lambda *_: None)
        if _sums(entry, lambda *done: told(f"{kind} (comparing checksums)", *done)) != recorded:
            return False
        _note(entry, stamp)
    return True


def _sums_of(entry: Path) -> Path:
    return entry.with_name(f"{entry.name}.sha256")


def _files(entry: Path) -> list[Path]:
    return sorted(path for path in entry.rglob("*") if path.is_file())


def _sums(entry: Path, told: Callable[[int, int], None]) -> bytes:
    """Return the SHA-256 of each file of an entry, a line each; `told` gets bytes read and their number."""
    files, lines, done = _files(entry), [], 0
    total = sum(path.stat().st_size for path in files)
    for path in files:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                done += len(block)
                if len(block) == BLOCK:  # of a small file there is nothing to tell
                    told(done, total)
        lines.append(f"{digest.hexdigest()}  {path.relative_to(entry).as_posix()}\n")
    return "".join(lines).encode()


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


@contextlib.contextmanager
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
    spread: Spread,
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
    missing = [
        (i, starts[i], min(starts[i] + SHARD, count)) for i in range(len(starts)) if not sound[i]
    ]
    done = count - sum(stop - start for _, start, stop in missing)
    # plain writes: on a full disk they raise, where a memory map would kill the process
    with (
        open(path, "r+b" if path.exists() else "xb") as file,
        contextlib.closing(spread([(start, stop) for _, start, stop in missing])) as blocks,
    ):
        file.truncate(len(header) + 4 * count * width)
        file.write(header)
        for i, start, stop in missing:
            if progress is not None:
                progress(kind, done, count)
            content = _checked(next(blocks), kind, start, stop, width).tobytes()
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
    """Say whether a finished table is there and sound; its bytes are read once a machine."""
    if not (entry / ROWS).exists():
        return False
    stamp = _stamp([entry / ROWS])
    if not _is_noted(entry, stamp):
        recorded = _recorded(entry, len(range(0, count, SHARD)))
        if not all(_sound(entry / ROWS, recorded, count, width)):
            return False
        _note(entry, stamp)
    return True


def _stamp(files: list[Path]) -> str | None:
    """Return what changes with any change of the files, taken before their bytes are read.

    The time of the last change is in it, which nobody can set, and the system's start, since a power cut may undo
    what was written. None so soon after a change that another one could bear the same time.
    """
    found = [(path, path.stat()) for path in files]
    newest = max((status.st_ctime_ns for _, status in found), default=0)
    if time.time_ns() - newest < SETTLED * 1e9:
        return None
    parts = [
        [str(path), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        for path, status in found
    ]
    return json.dumps([BOOT.read_text() if BOOT.exists() else None, parts])


def _noted_at(entry: Path) -> Path:
    return own_folder("verified") / hashlib.sha256(str(entry).encode()).hexdigest()


def _is_noted(entry: Path, stamp: str | None) -> bool:
    """Say whether the entry has been found sound on this machine, and is as it was then."""
    if stamp is None:
        return False
    if _verified.get(entry) == stamp:
        return True
    try:
        return _noted_at(entry).read_bytes() == stamp.encode()
    except (OSError, ConfigError):
        return False


def _note(entry: Path, stamp: str | None) -> None:
    """Note that the entry was found sound; without the note others compare its checksums, too."""
    if stamp is not None:
        _verified[entry] = stamp
        with contextlib.suppress(OSError, ConfigError):
            write_atomic(_noted_at(entry), stamp.encode())


def _header(count: int, width: int) -> bytes:
    """Return the first bytes of the `.npy` file; known, so that a damaged one misleads nobody."""
    stream = BytesIO()
    layout = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(stream, layout)
    return stream.getvalue()


def _table(entry: Path, count: int, width: int) -> np.ndarray:
    offset = len(_header(count, width))
    return np.memmap(entry / ROWS, dtype="<f4", mode="c", offset=offset, shape=(count, width))
