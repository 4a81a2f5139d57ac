"""Attach what was found out about a run to the run in MLflow: `tune log RUN FOLDER`.

RUN is a run of `tune train`, a sweep, one of its trials or refits, each by its folder, the first two by name, too; or
any id that MLflow knows.
"""

from pathlib import Path
from typing import Any

from richkd.errors import ConfigError
from richkd.files import read_record
from tune.best import called, find_sweep
from tune.restore import KEPT, is_run_id
from tune.sweep import DIAGNOSIS, asked_of
from tune.tracking import Client, Tracker

KINDS = {"trials": "trial", "refits": "refit"}
# what runs keep by themselves: a checkpoint that was overwritten could not be restored
OWN = {name for name, *_ in KEPT.values()} | {
    *("config.yaml", "environment.json", "summary.json", "summary_table.json", "report"),
    DIAGNOSIS,
}


def attach(wanted: str, path: Path, storage: Path, uri: str | None = None) -> dict[str, Any]:
    """Store a folder or a file as an artifact of a run, under its own name.

    What is there under that name is replaced; a file that the folder has no longer stays.

    Args:
        wanted: The run.
        path: Folder or file.
        storage: Folder in which sweeps and runs lie.
        uri: Address of MLflow; None: that of the sweep, or the usual one.

    Returns:
        `run_id`, `name` of the run, `artifact`, `files` (how many), `link`.

    Raises:
        ConfigError: If there is no such run, or the folder holds what is no file.
        Stopped: If MLflow does not answer.
    """
    path = path.resolve()
    count = _files(path)
    if path.name in OWN:
        raise ConfigError(
            f"FOLDER must have another name than what a run keeps by itself but is {path.name}; rename it."
        )
    run_id, address = find(wanted, storage)
    client = Client(uri or address or Tracker.address(None))
    run = client.run(run_id)
    client.attach(run_id, path)
    return {
        "run_id": run_id,
        "name": run.name,
        "artifact": path.name,
        "files": count,
        "link": client.pages.run(run.experiment, run_id, path.name),
    }


def find(wanted: str, storage: Path) -> tuple[str, str | None]:
    """Return the id of a run in MLflow, and the address of that MLflow if the run is of a sweep here.

    Raises:
        ConfigError: If there is none.
    """
    for place in (storage / wanted, Path(wanted).absolute()):
        above = place.parent.parent
        folders, key = [place], place.name
        if place.parent.name in KINDS:
            folders = [above, storage / above.name]  # the latter with `sweep.state`
            key = f"{above.name}/{KINDS[place.parent.name]}-{place.name}"
        for folder in folders:
            if (folder / "mlflow.json").exists():
                if (run_id := read_record(folder / "mlflow.json").get(key)) is None:
                    raise ConfigError(
                        f"MLflow must have a run of {key} but has not heard of it; send it: python -m tune sync {called(folder)}"
                    )
                return run_id, _address(folder)
    if is_run_id(wanted):
        try:
            return wanted, _address(find_sweep(wanted, storage))
        except ConfigError:  # of none that lies here
            return wanted, None
    raise ConfigError(
        f"RUN must be a sweep, a run of `tune train`, a folder of one, or an id in MLflow but got {wanted!r}, and "
        "nothing of that name has a run in MLflow."
    )


def _address(folder: Path) -> str | None:
    if not (folder / "sweep.json").exists():
        return None
    return Tracker.recall(asked_of(folder)[0]["tracking"])


def _files(path: Path) -> int:
    """Return how many files there are to send.

    Raises:
        ConfigError: If there is none, or something is a link, which could lead anywhere, or no file at all.
    """
    found = [path] if path.is_file() else [*path.rglob("*")] if path.is_dir() else []
    for each in found:
        if each.is_symlink() or not (each.is_file() or each.is_dir()):
            raise ConfigError(
                f"FOLDER must hold files and folders alone but {each} is {'a link' if each.is_symlink() else 'neither'}; "
                "remove it, or copy what it leads to."
            )
    count = sum(each.is_file() for each in found)
    if not count:
        raise ConfigError(f"FOLDER must be a file, or a folder with files, but got {path}.")
    return count
