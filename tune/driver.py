"""What a driver does around an agenda, whatever is on it: the lock, the work, and an end that can be gone on from."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from richkd.command import Stop
from richkd.errors import ConfigError, Interrupted, Stopped
from richkd.files import NO_SPACE
from tune.agenda import Agenda
from tune.settings import Resources


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a sweep or a run; the operating system frees it when its holder dies."""
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"another process is working on {folder.name}; wait for it, or stop it first."
        ) from None


def work(
    agenda: Agenda,
    stop: Stop,
    resources: Resources,
    scratch: Path,
    *,
    gpu: bool,
    address: str | None,
) -> None:
    """Let Ray do what is on the agenda, if anything is left.

    The arguments are those of `runner.run`.

    Raises:
        Interrupted: If a signal came.
        Stopped: If Ray ended early.
    """
    if not agenda.over:
        from tune.runner import run  # Ray takes seconds to import

        run(agenda, stop, resources, scratch, gpu=gpu, address=address)
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


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what led to it, back to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_full(error: BaseException) -> bool:
    """Whether a full disk is among the causes of an error; SQLite has its own word for it."""
    return any(
        getattr(one, "errno", None) in NO_SPACE or "disk is full" in str(one)
        for one in causes(error)
    )
