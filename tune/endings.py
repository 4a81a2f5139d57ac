"""How a run ends, as its last report says: finished, or failed for a reason that richkd knows."""

from typing import TYPE_CHECKING, Any

from richkd.errors import RichkdError
from richkd.files import NO_SPACE

if TYPE_CHECKING:
    from richkd.distill import Outcome


def foreseen(error: BaseException) -> dict[str, str] | None:
    """Return the report of an error that would only come again, None of any other.

    A full disk is no fault of the trial's: it goes on when there is space.
    """
    if isinstance(error, RichkdError):
        return {"failed": f"{type(error).__name__}: {error}"}
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return {"stopped": f"the disk is full ({error.filename or 'of the run folder'})"}
    return None


def ended(outcome: "Outcome", tested: dict[str, float]) -> dict[str, Any]:
    """Return the last report of a run."""
    teacher = outcome.teacher
    known = {f"identity/{k}": v for k, v in teacher.identities.items()} if teacher else {}
    return outcome.metrics | tested | known | {"finished": True}
