"""A checkpoint is whole or invisible: a folder of safetensors and JSON, swapped in by rename.

    weights.safetensors  state.safetensors      tensors by name
    manifest.json                               format, sizes, SHA-256 and what it is; written last

It is written as the hidden sibling `.NAME.new`. An old checkpoint steps aside as `.NAME.old`, so that after a
kill at any moment the old one or the new one can be loaded. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as decode
from safetensors.torch import save as encode
from torch import Tensor

from richkd.errors import ConfigError, CorruptError
from richkd.files import read_json, sync, to_json, write_synced

FORMAT = 2  # in 1 the state was momentum alone
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.safetensors", "manifest.json"
FILES = (WEIGHTS, STATE, MANIFEST)
ADVICE = "take another checkpoint of the run (`best` or `last`), or make it again."


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Checkpoint:
    """A verified checkpoint, on the CPU."""

    folder: Path
    sha256: str  # of the weights
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    meta: dict[str, Any]


def save(
    folder: Path, weights: dict[str, Tensor], state: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write a checkpoint, or replace the one in `folder`; one process at a time.

    Args:
        folder: Where it appears, whole.
        weights: Tensors of the network, on any device, views included.
        state: Further tensors that a resumed run needs.
        meta: What it is, as plain JSON.

    Raises:
        ConfigError: If `folder` holds something that is no checkpoint.
        NonFiniteError: If `meta` holds NaN or an infinity.
        OSError: If the system refuses, as on a full disk; an old checkpoint is as it was.
    """
    if _is_foreign(folder):
        raise ConfigError(
            f"{folder} must be new or hold a checkpoint but has other files; name another."
        )
    new, old = _siblings(folder)
    try:
        _settle(folder)
        contents = {WEIGHTS: encode(_plain(weights)), STATE: encode(_plain(state))}
        manifest = {
            "format": FORMAT,
            "files": {name: _fingerprint(content) for name, content in contents.items()},
            "meta": meta,
        }
        contents[MANIFEST] = to_json({"sha256": _digest(manifest), **manifest})
        new.mkdir(parents=True)
        for name, content in contents.items():
            write_synced(new / name, content)
        sync(new)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
        sync(folder.parent)
    finally:
        _settle(folder)


def exists(folder: Path) -> bool:
    """Say whether there is a checkpoint, be it one that a kill left under its sibling's name."""
    return _seen(folder) is not None


def load(folder: Path) -> Checkpoint:
    """Load a checkpoint after its checksums were compared.

    Raises:
        ConfigError: If `folder` holds no checkpoint, or one of a newer format.
        CorruptError: If a file is not as it was written; names the file, what was recorded and found.
    """
    manifest, contents = _read(folder)
    try:
        weights, state = (decode(contents[name]) for name in (WEIGHTS, STATE))
    except SafetensorError as error:
        raise CorruptError(f"{folder} cannot be decoded: {error}; {ADVICE}") from error
    return Checkpoint(
        folder=folder,
        sha256=manifest["files"][WEIGHTS]["sha256"],
        weights=weights,
        state=state,
        meta=manifest["meta"],
    )


def verify(folder: Path) -> dict[str, Any]:
    """Compare a checkpoint's checksums and return its manifest; raises what `load` raises."""
    return _read(folder)[0]


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # cloned, since safetensors refuses tensors that share storage
    return {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of all that a manifest says but for the checksum itself."""
    said = json.dumps({name: manifest[name] for name in ("format", "files", "meta")})
    return hashlib.sha256(said.encode()).hexdigest()


def _siblings(folder: Path) -> tuple[Path, Path]:
    name, parent = folder.absolute().name, folder.absolute().parent  # `.` has no name of its own
    return parent / f".{name}.new", parent / f".{name}.old"


def _places(folder: Path) -> tuple[Path, ...]:
    """Return where the checkpoint may lie, first choice first.

    The last is the first again: a swap by another process may end between two looks.
    """
    return folder, *_siblings(folder), folder


def _is_foreign(folder: Path) -> bool:
    if not folder.exists():
        return False
    return not folder.is_dir() or (any(folder.iterdir()) and not (folder / MANIFEST).is_file())


def _settle(folder: Path) -> None:
    """End what a save left behind: finish a swap that was cut in two, then clear the siblings away."""
    siblings = _siblings(folder)
    for place in siblings:
        if not folder.exists() and (place / MANIFEST).is_file():
            os.rename(place, folder)
            sync(folder.parent)
    for place in siblings:
        (place / MANIFEST).unlink(missing_ok=True)  # first: what has a manifest is whole
        shutil.rmtree(place, ignore_errors=True)


def _seen(folder: Path) -> tuple[Path, int, int] | None:
    """Return where the manifest lies now and which file it is, None if there is none."""
    for place in _places(folder):
        try:
            found = (place / MANIFEST).stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return place, found.st_ino, found.st_mtime_ns
    return None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return the verified manifest and tensor files of a checkpoint, read once.

    If another process swaps in a new checkpoint between two files, the new one is read.
    """
    while True:
        before = _seen(folder)
        if before is None:
            raise ConfigError(
                f"{folder} must be a checkpoint but has no {MANIFEST}; name another folder."
            )
        try:
            return _read_from(before[0])
        except (ConfigError, CorruptError, FileNotFoundError):
            if _seen(folder) == before:
                raise


def _read_from(place: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    manifest = read_json(place / MANIFEST)
    _check_manifest(place, manifest)
    contents = {}
    for name, recorded in manifest["files"].items():
        path = place / name
        if path.is_symlink() or not path.is_file():
            raise CorruptError(f"{path} must be a file but is missing or a link; {ADVICE}")
        contents[name] = path.read_bytes()
        found = _fingerprint(contents[name])
        if found != recorded:
            raise CorruptError(f"{path} is damaged: recorded {recorded}, found {found}; {ADVICE}")
    return manifest, contents


def _fingerprint(content: bytes) -> dict[str, int | str]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _check_manifest(place: Path, manifest: Any) -> None:
    kinds = {"format": int, "files": dict, "meta": dict}
    if not isinstance(manifest, dict) or any(
        type(manifest.get(name)) is not kind for name, kind in kinds.items()
    ):
        raise ConfigError(
            f"{place} must be a checkpoint of richkd but its {MANIFEST} is something else."
        )
    if manifest["format"] > FORMAT:
        raise ConfigError(
            f"{place} must have format {FORMAT} or less but has {manifest['format']}; update richkd."
        )
    recorded, found = manifest.get("sha256"), _digest(manifest)
    if recorded != found:
        raise CorruptError(
            f"{place / MANIFEST} is damaged: recorded {recorded}, found {found}; {ADVICE}"
        )
    if set(manifest["files"]) != {WEIGHTS, STATE}:
        raise CorruptError(
            f"{place / MANIFEST} must list {WEIGHTS} and {STATE} but lists {sorted(manifest['files'])}; {ADVICE}"
        )
