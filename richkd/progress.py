"""How far something is: the callback of long preparations, what makes of it lines or an interruption; an epoch's line."""

from collections.abc import Callable
from typing import Any

from richkd.errors import Interrupted

Progress = Callable[[str, int, int], None]  # what is prepared, done, of how many


def stoppable(progress: Progress | None, stop: Callable[[], int | None]) -> Progress:
    """Return `progress` that ends a preparation by Interrupted if `stop` says so; nothing is kept of it."""

    def told(what: str, done: int, total: int) -> None:
        if (signum := stop()) is not None:
            raise Interrupted(signum, f"interrupted while preparing the {what}")
        if progress is not None:
            progress(what, done, total)

    return told


def lines(print_line: Callable[[str], None]) -> Progress:
    """Return the `progress` of a plain stream: a line at the start, the half and the end."""
    printed: dict[str, int] = {}

    def told(what: str, done: int, total: int) -> None:
        half = 2 * done // max(total, 1)
        if printed.get(what) != half:
            printed[what] = half
            print_line(f"{what}: {100 * done // max(total, 1)} %")

    return told


def epoch_line(metrics: dict[str, Any], epochs: int, part: str) -> str:
    """Return what is printed of an epoch of a single run; `part` names the rows that it is judged on, `val` or `test`."""
    return (
        f"epoch {metrics['epoch']:4d}/{epochs}  loss {metrics['train/loss']:7.3f}  "
        f"{part} top1 {metrics['val/top1']:6.2f} %  best {metrics['best_val_top1']:6.2f} %  "
        f"{metrics['images_per_second']:7.0f} images/s"
    )
