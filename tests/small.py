"""What tests run: a sweep that is over in half a minute, how the command line runs one, and an agenda by hand."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from richkd.config import Config
from tune.agenda import Job
from tune.study import Failure

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("sweep.trials=4", "sweep.startup=1", "sweep.min_epochs=1", "refit.seeds=2"),
    *("train.epochs=3", "teacher.epochs=10"),
]


def command(*words: str, cwd: Path, **more: str) -> subprocess.Popen:
    """Start `python -m tune` with these words in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""} | more
    return subprocess.Popen(
        [sys.executable, "-m", "tune", *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def holder(folder: Path) -> int | None:
    """Return the process that has the lock of a run folder open, None if there is none."""
    lock = str(folder / ".lock")
    for handles in Path("/proc").glob("[0-9]*/fd"):
        try:
            links = [os.readlink(handle) for handle in handles.iterdir()]
        except OSError:
            continue
        if lock in links:
            return int(handles.parent.name)
    return None


@contextlib.contextmanager
def copy_of(sweep: Path, target: Path) -> Iterator[Path]:
    """Copy a sweep, and the `mlflow.db` beside its runs, into `target`, and yield its folder there."""
    source = sweep.parent.parent
    shutil.copytree(source, target)
    folder = target / "runs" / sweep.name
    with contextlib.closing(sqlite3.connect(target / "mlflow.db")) as database, database:
        for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
            database.execute(
                f"update {table} set {column} = replace({column}, ?, ?)", (str(source), str(target))
            )
    asked = (folder / "sweep.json").read_text()
    (folder / "sweep.json").write_text(asked.replace(str(source), str(target)))
    # a process knows the place of a run's artifacts by the run's id, which the copy shares
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    _artifact_repos_cache.clear()
    yield folder
    _artifact_repos_cache.clear()


class Script:
    """An agenda of given configs, and how each of them ended."""

    def __init__(self, configs: dict[str, Config], folder: Path) -> None:
        self.left = [
            Job(id=name, kind="trial", method="ce", number=k, folder=folder / name, config=config)
            for k, (name, config) in enumerate(configs.items())
        ]
        self.total, self.stopping, self.error = len(self.left), False, None
        self.running: dict[str, Job] = {}
        self.epochs: dict[str, list[int]] = {name: [] for name in configs}
        self.ends: dict[str, tuple[dict, Failure | None]] = {}

    def next(self) -> Job | None:
        """Give out a job."""
        job = self.left.pop(0) if self.left else None
        if job is not None:
            self.running[job.id] = job
        return job

    @property
    def over(self) -> bool:
        """Whether all have ended."""
        return not self.left and not self.running

    def epoch(self, job: Job, metrics: dict) -> bool:
        """Hear of an epoch."""
        self.epochs[job.id].append(metrics["epoch"])
        return True

    def ended(self, job: Job, metrics: dict, failure: Failure | None) -> None:
        """Hear of an end."""
        del self.running[job.id]
        self.ends[job.id] = (metrics, failure)

    def broke(self, error: Exception) -> None:
        """Hear of an error of the driver."""
        raise error
