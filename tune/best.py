"""The best checkpoint of a sweep: find it, verify it, hand it over."""

import shlex
import shutil
import warnings
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from richkd import checkpoint, distill
from richkd.errors import ConfigError, CorruptError
from richkd.files import make_folder, read_record
from richkd.student import best_of


def called(folder: Path) -> str:
    """Return what a command line in this working folder may call a sweep, quoted for a shell."""
    here = Path("runs").absolute() == folder.absolute().parent
    return shlex.quote(folder.name if here else str(folder))


def find_sweep(wanted: str | None, storage: Path, *, finished: bool = False) -> Path:
    """Return the folder of a sweep.

    Args:
        wanted: Its name, its folder, or the id of its MLflow run; None: the one started last.
        storage: Folder in which sweeps lie.
        finished: Whether, without a name, only finished ones count.

    Raises:
        ConfigError: If there is none.
    """
    folders = [path.parent for path in storage.glob("*/sweep.json")]
    if wanted is None:
        done = [folder for folder in folders if (folder / "summary.json").exists()]
        if not folders:
            raise ConfigError(f"there is no sweep in {storage}; start one: python -m tune sweep.")
        if finished and done:
            folders = done
        return max(folders, key=_started)
    for folder in (storage / wanted, Path(wanted)):
        if (folder / "sweep.json").exists():
            return folder
    for folder in folders:
        ids = folder / "mlflow.json"
        if ids.exists() and read_record(ids).get(folder.name) == wanted:
            return folder
    if any((place / "run.json").exists() for place in (storage / wanted, Path(wanted))):
        raise ConfigError(
            f"{wanted} is a single run, no sweep; look at it: python -m richkd evaluate {shlex.quote(wanted)}"
        )
    names = sorted(folder.name for folder in folders)
    near = get_close_matches(wanted, names, 1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ConfigError(
        f"SWEEP must be a name, a folder or an MLflow run id but got {wanted!r}; {storage} has {', '.join(names) or 'none'}{hint}"
    )


def _started(folder: Path) -> str:
    """Return when a sweep started; one whose record is damaged counts as the oldest, with a warning."""
    try:
        return str(read_record(folder / "sweep.json", "started")["started"])
    except CorruptError as error:
        warnings.warn(f"passed over: {error}", stacklevel=2)
        return ""


def best(
    folder: Path,
    copy_to: Path | None = None,
    changes: dict[str, Any] | None = None,
    cell: str | None = None,
) -> dict[str, Any]:
    """Verify the best checkpoint of a finished sweep: checksums, then accuracy, evaluated again.

    Args:
        folder: Sweep folder.
        copy_to: New folder for a copy of the checkpoint; it appears only when it is whole.
        changes: Dotted keys that say where its data lie now.
        cell: Of a grid, which has no best one: the student, of whose seeds it is the best on validation rows.

    Returns:
        `checkpoint`, `recorded` and `found` (each `val_top1`, of the rows that `selection` names, and `test_top1`),
        `selection`, `verified`, `copy`.

    Raises:
        ConfigError: If the sweep has not finished, or `copy_to` exists, or there is no such cell.
        CorruptError: If a checksum is not the recorded one.
    """
    if not (folder / "summary.json").exists():
        raise ConfigError(
            f"{folder.name} has not finished; go on with it: python -m tune resume {called(folder)}"
        )
    check_new(copy_to)
    source = best_of(folder, cell)
    summary = read_record(folder / "summary.json", "best")
    recorded = (summary["cells"][cell] if cell else summary["best"]).get("recorded")
    if not isinstance(recorded, dict) or recorded.keys() != {"val_top1", "test_top1"}:
        raise CorruptError(
            f"{folder / 'summary.json'} records no accuracy of its best checkpoint; restore it."
        )
    answer = {"sweep": folder.name, "checkpoint": str(source)}
    return answer | verified(source, recorded, copy_to, changes)


def check_new(copy_to: Path | None) -> None:
    """Raise ConfigError if the folder of a copy is there already."""
    if copy_to is not None and copy_to.exists():
        raise ConfigError(f"--copy-to {copy_to} exists already; name a new folder.")


def verified(
    source: Path,
    recorded: dict[str, Any],
    copy_to: Path | None,
    changes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint again, and copy it if that is wanted.

    Args:
        source: The checkpoint.
        recorded: `val_top1` and `test_top1`, as they should be.
        copy_to: As in `best`.
        changes: As in `best`.

    Returns:
        `recorded`, `found`, `selection`, `verified`, `copy`, as `best`.
    """
    again = distill.retest(source, changes)
    answer: dict[str, Any] = {
        "recorded": recorded,
        "found": {f"{part}_top1": values["top1"] for part, values in again.found.items()},
        "selection": again.config.selection,
    }
    answer["verified"] = all(
        isinstance(value, int | float) and abs(answer["found"][key] - value) < 1e-6
        for key, value in recorded.items()
    )  # percent; a single row is at least 1e-5
    if copy_to is not None:
        hand_over(source, copy_to)
        answer["copy"] = str(copy_to)
    return answer


def hand_over(source: Path, target: Path) -> None:
    """Copy a checkpoint; the copy is verified before it appears under its name."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial.parent, "--copy-to")
    try:
        partial.mkdir()
        for name in checkpoint.FILES:  # and nothing that somebody laid beside them
            shutil.copy(source / name, partial / name)
        checkpoint.load(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
