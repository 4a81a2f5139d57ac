"""A process that hangs ends itself, and leaves word of where it hung."""

import contextlib
import faulthandler
import time
from collections.abc import Iterator
from pathlib import Path

HUNG = "Timeout ("  # how faulthandler's word of a hang begins
GIVEN_UP = "given up: "
OFTEN = 1.0  # seconds between two beats that count


class Watchdog:
    """Ends this process if there was no beat for `patience` seconds, and adds where each of its threads was to a file.

    `faulthandler` does it, in a thread that needs no lock of Python's: also a process that is stuck outside
    Python is ended, by exit code 1.

    Args:
        folder: Run folder; made if missing.
        patience: Seconds.
        rank: Of the worker, where several share a run; each has a file of its own.
    """

    def __init__(self, folder: Path, patience: float, rank: int = 0) -> None:
        self.path = folder / (f"hung-{rank}.txt" if rank else "hung.txt")
        self.patience = patience
        self.due = 0.0

    def __enter__(self) -> "Watchdog":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a")
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.file.close()
        if self.path.stat().st_size == 0:
            self.path.unlink()

    def beat(self) -> None:
        """Say that the process goes on: before each step, so that most beats do no more than look at the clock."""
        now = time.monotonic()
        if now >= self.due:
            self.due = now + min(OFTEN, self.patience / 10)
            faulthandler.dump_traceback_later(self.patience, exit=True, file=self.file)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Wait for somebody else, as long as it takes."""
        faulthandler.cancel_dump_traceback_later()
        try:
            yield
        finally:
            self.due = 0.0
            self.beat()

    def forget(self) -> None:
        """Say that there is progress: what hung before did not hang for good."""
        self.file.truncate(0)


def hangs(folder: Path) -> tuple[int, Path]:
    """Return how often in a row a run has hung without progress, and the file that says where."""
    found = [(_hangs(path), path) for path in sorted(folder.glob("hung*.txt"))]
    return max(found, default=(0, folder / "hung.txt"), key=lambda one: one[0])


def _hangs(path: Path) -> int:
    return path.read_text(errors="replace").rpartition(GIVEN_UP)[2].count(HUNG)


def give_up(folder: Path, why: str) -> None:
    """Keep that the hangs so far were told, so that who tries again tries as often."""
    for path in folder.glob("hung*.txt"):
        with open(path, "a") as file:
            file.write(f"{GIVEN_UP}{why}\n")
