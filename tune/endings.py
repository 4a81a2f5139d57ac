"""How a run ends, as its last report says: finished, or failed, and of which class the failure is."""

import contextlib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from richkd.errors import NonFiniteError, RichkdError, Stopped, causes
from richkd.files import NO_SPACE, write_atomic

if TYPE_CHECKING:
    from richkd.distill import Outcome

NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
)  # of a GPU, and of this machine, as torch says


def foreseen(error: BaseException) -> dict[str, str] | None:
    """Return the report of an error that has a known reason, None of any other.

    A full disk, or a store that is gone, is no fault of the trial's: it goes on when that is mended.
    """
    for one in causes(error):
        if isinstance(one, OSError) and one.errno in NO_SPACE:
            return {"stopped": f"the disk is full ({one.filename or 'of the run folder'})"}
        if isinstance(one, Stopped):  # its store cannot be reached
            return {"stopped": str(one)}
        if _is_memory(one):
            first = ". ".join(_told(one).split(". ")[:2])  # torch goes on for a paragraph
            told = f"{first}; lower train.batch_size, or let fewer trials share the device."
            return {"failed": told, "class": "memory"}
    if isinstance(error, RichkdError):
        found = "nan" if isinstance(error, NonFiniteError) else "error"
        return {"failed": _told(error), "class": found}
    return None


def failure(error: BaseException, folder: Path) -> dict[str, str]:
    """Return the report of any error; the traceback of one that was not foreseen is kept in `folder`."""
    if (said := foreseen(error)) is not None:
        return said
    path = folder / "error.txt"
    with contextlib.suppress(OSError):
        write_atomic(path, "".join(traceback.format_exception(error)).encode())
    return {"failed": f"{_told(error)} (its traceback: {path})", "class": "error"}


def raised(error: Exception, folder: Path) -> dict[str, str] | None:
    """Return the report of what one of several workers raised, None if they ended because one of them died.

    Args:
        error: Of Ray Train. It knows the worker's tracebacks, as text.
        folder: Of the job.
    """
    each = list(getattr(error, "worker_failures", {0: error}).values())
    died = any(type(one).__module__.startswith("ray.") for one in each)
    # what the others say of a worker that is gone is no error of theirs
    own = [one for one in each if not _is_of_another(one)]
    if (said := next((found for one in own if (found := foreseen(one))), None)) is not None:
        return said
    if died or not own:
        return None
    own[0].__cause__ = error
    return failure(own[0], folder)


def ended(outcomes: list["Outcome"], tested: dict[str, float]) -> dict[str, Any]:
    """Return the last report of a job: the mean over its seeds, and the teachers of all of them."""
    from richkd.distill import mean

    known: dict[str, list[str]] = {}
    for outcome in outcomes:
        for who, digest in (outcome.teacher.identities if outcome.teacher else {}).items():
            known.setdefault(f"identity/{who}", []).append(digest)
    teachers = {who: ", ".join(dict.fromkeys(digests)) for who, digests in known.items()}
    return mean([one.metrics for one in outcomes]) | tested | teachers | {"finished": True}


def _is_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in NO_MEMORY)
    )


def _is_of_another(error: BaseException) -> bool:
    module = type(error).__module__
    return module.startswith(("ray.", "torch.distributed")) or "gloo" in str(error)


def _told(error: BaseException) -> str:
    """Return an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
