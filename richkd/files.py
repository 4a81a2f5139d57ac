"""Files that are whole or invisible: atomic writes, JSON and checksums."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import Any

from richkd.errors import ConfigError, CorruptError, NonFiniteError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk; a rename survives a power cut once its folder is flushed."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path, field: str) -> None:
    """Make a folder that the config key `field` leads to; one that is there will do.

    Raises:
        ConfigError: If something on the way is no folder, or forbids it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        raise ConfigError(
            f"{field} must lead to a folder that can be made but {path} cannot ({error.strerror}); choose another."
        ) from error


def nearest(path: Path) -> Path:
    """Return the nearest folder above `path`, or `path` itself, that exists."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.is_dir())


def check_writable(path: Path, field: str) -> None:
    """Raise ConfigError unless the config key `field` leads to what can be made, or written; makes nothing."""
    above = next(
        part for part in (path.absolute(), *path.absolute().parents) if os.path.lexists(part)
    )
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "cannot be written" if above.is_dir() else "is no folder"
        raise ConfigError(
            f"{field} must lead to a folder that can be made but {above} {what}; choose another."
        )


def check_target(path: Path, flag: str) -> None:
    """Raise ConfigError unless the file that `flag` names can be written; makes nothing."""
    if path.is_dir():
        raise ConfigError(f"{flag} must be a file but {path} is a folder; name another.")
    check_writable(path.parent, flag)


def own_folder(*parts: str) -> Path:
    """Return a folder of this user's alone on this machine, below that of temporary files; made if missing.

    Raises:
        ConfigError: If its name is taken by another user, or others may use it.
    """
    top = Path(tempfile.gettempdir()) / f"richkd-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(top, 0o700)
    found = os.lstat(top)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{top} must be a folder that is yours alone but is not; remove it, or set TMPDIR to another folder."
        )
    path = top.joinpath(*parts)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_synced(path: Path, content: bytes) -> None:
    """Write a new file and flush it. It is visible while it is written: for folders that are not yet."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at any moment `path` holds the old content or the new, never a part.

    Args:
        path: File to write or replace; missing folders are made.
        content: All of it, in bytes.

    Raises:
        OSError: If the system refuses, as on a full disk; the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short: `path` may have a long name
    try:
        write_synced(partial, content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def to_json(value: Any) -> bytes:
    """Return `value` as JSON for humans, keys in their order.

    Raises:
        NonFiniteError: If it holds NaN or an infinity, which JSON does not know.
    """
    try:
        return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise NonFiniteError(
            f"JSON holds finite numbers only but got {str(value)[:200]}."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; a NonFiniteError if it holds NaN or an infinity."""
    write_atomic(path, to_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: If there is none.
        CorruptError: If it is torn, or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ConfigError(f"{path} must be a JSON file but there is none.") from error
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 are a ValueError, too
        raise CorruptError(
            f"{path} cannot be decoded: {error}; restore it or remove it."
        ) from error


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has `keys`; a CorruptError if it is something else."""
    record = read_json(path)
    if not isinstance(record, dict) or not record.keys() >= set(keys):
        raise CorruptError(
            f"{path} must be an object with {', '.join(keys) or 'keys'} but is not; restore it or remove it."
        )
    return record


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
