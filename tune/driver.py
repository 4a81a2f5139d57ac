"""What a driver does around an agenda, whatever is on it: the lock, the work, and an end that can be gone on from."""

import contextlib
import itertools
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from richkd.command import Stop
from richkd.errors import ConfigError, CorruptError, Interrupted, Stopped, causes
from richkd.files import NO_SPACE, read_record, write_json
from tune.agenda import Agenda
from tune.settings import Resources

OWNER = "owner.json"
BEAT_SECONDS = 5.0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a sweep or a run; a driver that died holds it no longer.

    On one machine the operating system sees to that. On a file system that several machines share it may not
    hear of the others' locks; there a driver shows that it lives by a beat in `owner.json`. Nobody's clock is
    compared with another's: who finds an owner on another machine waits for its next beat.

    Raises:
        ConfigError: If another driver works there.
    """
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=1)  # who only asks whether it is held holds it for an instant
    except Timeout:
        raise _taken(folder, owner_of(folder)) from None
    try:
        owner = owner_of(folder)
        if owner and owner["host"] != platform.node():
            time.sleep(2 * BEAT_SECONDS)
            if (now := owner_of(folder)) and now != owner:
                raise _taken(folder, now)
        with _beating(folder):
            yield
    finally:
        lock.release()


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Return `host`, `pid`, `since` and `beat` of the driver that works there, or was killed there; None if none."""
    try:
        return read_record(folder / OWNER, "host", "pid", "since", "beat")
    except (ConfigError, CorruptError):
        return None


def works(folder: Path) -> bool:
    """Whether a driver on this machine holds the lock of a folder."""
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def busy(folder: Path) -> bool:
    """Whether a driver works on a folder; of one on another machine, which may have died, there is only its word."""
    owner = owner_of(folder)
    return works(folder) or (owner is not None and owner["host"] != platform.node())


def _taken(folder: Path, owner: dict[str, Any] | None) -> ConfigError:
    who = "another process"
    if owner:
        who += f" (pid {owner['pid']} on {owner['host']}, since {owner['since']})"
    return ConfigError(f"{who} is working on {folder.name}; wait for it, or stop it first.")


@contextlib.contextmanager
def _beating(folder: Path) -> Iterator[None]:
    """Show in a folder that its driver lives."""
    path, done = folder / OWNER, threading.Event()
    owner = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%F %T%z")}

    def beat(count: int) -> None:
        with contextlib.suppress(OSError):  # a full disk costs the beat, not the sweep
            write_json(path, owner | {"beat": count})

    def go_on() -> None:
        for count in itertools.count(1):
            if done.wait(BEAT_SECONDS):
                return
            beat(count)

    beat(0)
    thread = threading.Thread(target=go_on, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def work(agenda: Agenda, stop: Stop, resources: Resources, scratch: Path, **more: Any) -> None:
    """Let Ray do what is on the agenda, if anything is left.

    The arguments are those of `runner.run`.

    Raises:
        Interrupted: If a signal came.
        Stopped: If Ray ended early, or the budget is used up.
    """
    if not agenda.over:
        from tune.runner import run  # Ray takes seconds to import

        run(agenda, stop, resources, scratch, **more)
    if agenda.error is not None:
        raise agenda.error
    if agenda.stopping:
        raise Interrupted(stop.signum, "interrupted")
    if not agenda.over:  # as on SIGUSR1, on which Tune stops by itself
        raise Stopped("Ray Tune ended before everything was done")


@contextlib.contextmanager
def resumable(close: Callable[[str], None], command: Callable[[], str]) -> Iterator[None]:
    """Let what ends the work early say how to go on.

    Args:
        close: Told what MLflow is to say of the end.
        command: Says what goes on from where it ended.
    """
    try:
        yield
    except BaseException as error:
        # what a signal handler raises inside Ray comes wrapped; so does a full disk inside SQLite
        stopped = next((one for one in causes(error) if isinstance(one, Stopped)), error)
        if is_full(error):
            stopped = Stopped("the disk is full; free some space")
        with contextlib.suppress(OSError):
            close("KILLED" if isinstance(stopped, Stopped) else "FAILED")
        if isinstance(stopped, Stopped):
            stopped.args = (f"{stopped}; go on with: {command()}",)
        raise stopped from error.__cause__


def is_full(error: BaseException) -> bool:
    """Whether a full disk is among the causes of an error; SQLite has its own word for it."""
    return any(
        getattr(one, "errno", None) in NO_SPACE or "disk is full" in str(one)
        for one in causes(error)
    )
