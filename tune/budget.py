"""How long a sweep may take, over all of its drivers: hours of wall time, and hours of GPUs that its runs held."""

import time
from pathlib import Path

from richkd.errors import CorruptError
from richkd.files import read_record, write_json

SAVE_SECONDS = 10.0  # what a driver that is killed loses of its account, at most


class Budget:
    """Counts what is spent, in seconds of a clock that nobody sets, and keeps it beside the sweep.

    Args:
        path: File of the account.
        hours: Of wall time; None: any.
        gpu_hours: Of GPUs held by runs; None: any.
    """

    def __init__(self, path: Path, hours: float | None, gpu_hours: float | None) -> None:
        self.path, self.hours, self.gpu_hours = path, hours, gpu_hours
        before = spent(path)
        self.seconds, self.gpu_seconds = before["seconds"], before["gpu_seconds"]
        self.at = self.saved = time.monotonic()

    def tick(self, gpus: float = 0) -> str | None:
        """Count the time since the last call, in which `gpus` were held; return what is used up, None if nothing is."""
        now = time.monotonic()
        passed, self.at = now - self.at, now
        self.seconds += passed
        self.gpu_seconds += passed * gpus
        if now - self.saved >= SAVE_SECONDS:
            self.save()
        names = self.used_up()
        return " and ".join(f"sweep.{n}={getattr(self, n):g}" for n in names) if names else None

    def used_up(self) -> list[str]:
        """Return the names of the limits that are reached."""
        used = {"hours": self.seconds, "gpu_hours": self.gpu_seconds}
        return [
            name
            for name, seconds in used.items()
            if (limit := getattr(self, name)) is not None and seconds >= 3600 * limit
        ]

    def save(self) -> None:
        """Keep the account."""
        self.saved = time.monotonic()
        write_json(self.path, {"seconds": self.seconds, "gpu_seconds": self.gpu_seconds})


def spent(path: Path) -> dict[str, float]:
    """Return the `seconds` and `gpu_seconds` of an account, 0 where there is none.

    A torn one is told as such: an empty one would let the sweep have its time once more.
    """
    if not path.exists():
        return {"seconds": 0.0, "gpu_seconds": 0.0}
    account = read_record(path, "seconds", "gpu_seconds")
    if not all(isinstance(value, int | float) and value >= 0 for value in account.values()):
        raise CorruptError(f"{path} must hold numbers of seconds but holds {account}; mend it.")
    return account
