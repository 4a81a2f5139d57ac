"""Send MLflow what it lacks of a sweep, or of a run of `tune train`: what waits, then what only the run folders say.

python -m tune sync digits
"""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from richkd import checkpoint
from richkd.distill import mean
from richkd.errors import CorruptError, Stopped
from richkd.files import read_record
from richkd.record import Metrics, rows_of, seed_folders
from tune.best import find_sweep
from tune.driver import locked
from tune.logbook import tested
from tune.spool import Spool
from tune.sweep import Sweep, asked_of
from tune.tracking import SPOOL, Tracker


def find(wanted: str | None, storage: Path) -> Path:
    """Return the folder of a run of `tune train`, else that of a sweep, as `find_sweep` does."""
    for folder in (storage / wanted, Path(wanted)) if wanted else ():
        if (folder / "run.json").exists() or (folder / SPOOL).exists():
            return folder
    return find_sweep(wanted, storage)


def sync(folder: Path) -> dict[str, Any]:
    """Send what MLflow lacks.

    Args:
        folder: Of a sweep or of a run of `tune train`, on which nobody works.

    Returns:
        `folder`, `operations` that waited, `points` that were missing beside them, and the runs `unopened` in MLflow.

    Raises:
        ConfigError: If a driver works on it, or the environment lacks the password of MLflow.
        Stopped: If MLflow does not answer; what is left waits on.
    """
    with locked(folder):
        waiting, address, runs, seeds = [], {}, folder, 1
        if (folder / SPOOL).exists():
            spool = Spool(folder / SPOOL)
            waiting, address = spool.waiting(), spool.address
        if (folder / "sweep.json").exists():
            asked, layers = asked_of(folder)
            sweep = Sweep(folder, layers)
            runs, seeds = sweep.runs, sweep.settings.sweep.seeds_per_trial
            experiment = sweep.settings.tracking.experiment
            address = {"uri": asked["tracking"], "experiment": experiment}
        answer = {"folder": str(folder), "operations": len(waiting), "points": 0, "unopened": []}
        if not address:  # of a run; it is written down as long as something waits
            return answer
        place = (folder, Tracker.recall(address["uri"]), address["experiment"])
        _sent(*place, {})
        found = dict(_runs(runs, seeds))
        tracker = _sent(*place, found)
        unopened = sorted(run for run in found if tracker.run_id(run) is None)
        return answer | {"points": tracker.points, "unopened": unopened}


def _sent(
    folder: Path, uri: str, experiment: str, runs: dict[str, list[tuple[int, Metrics]]]
) -> Tracker:
    """Return a tracker that has sent everything: what waited, and of these runs what MLflow lacked."""
    tracker = Tracker(folder, uri, experiment)
    tracker.start()
    for run, rows in runs.items():
        for epoch, metrics in rows:
            tracker.log(run, metrics, epoch)
    tracker.close(math.inf)
    if tracker.waits:
        raise Stopped(tracker.problem)
    if tracker.problem:
        warnings.warn(tracker.problem, stacklevel=2)
    return tracker


def _runs(folder: Path, seeds: int) -> Iterator[tuple[str, list[tuple[int, Metrics]]]]:
    """Yield the key of each run in a folder that has an epoch behind it, with its metrics by epoch."""
    places = [(folder.name, folder, 1)]
    for kind, jobs, each in (("trial", "trials", seeds), ("refit", "refits", 1)):
        for job in sorted(folder.glob(f"{jobs}/*")):
            places.append((f"{folder.name}/{kind}-{job.name}", job, each))
    for run, place, each in places:
        if rows := _rows(seed_folders(place, each)):
            yield run, rows


def _rows(folders: list[Path]) -> list[tuple[int, Metrics]]:
    """Return the metrics of a run by epoch, as the driver logs them; those of the test rows are of the last.

    Args:
        folders: Its run folders, one a seed.
    """
    if not all(checkpoint.exists(folder / "last") for folder in folders):
        return []
    try:
        metas = [checkpoint.verify(folder / "last")["meta"] for folder in folders]
        each = [rows_of(*one) for one in zip(folders, metas, strict=True)]
        state = read_record(folders[0] / "run.json", "state")
    except CorruptError as error:
        warnings.warn(f"passed over: {error}", stacklevel=2)
        return []
    means = [mean(list(rows)) for rows in zip(*each, strict=False)]  # as far as all seeds have come
    rows = [(int(row["epoch"]), {k: v for k, v in row.items() if k != "epoch"}) for row in means]
    final = tested(state.get("metrics", {}))
    return [*rows, (metas[0]["config"]["train"]["epochs"], final)] if final else rows
