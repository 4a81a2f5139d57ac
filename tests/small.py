"""A sweep that is over in half a minute, and how the command line runs one."""

import os
import subprocess
import sys
from pathlib import Path

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
