"""How far long preparations are: the callback that they call, and what makes of it lines or an interruption."""

from collections.abc import Callable

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
