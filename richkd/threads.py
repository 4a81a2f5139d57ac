"""How many threads of the CPU compute: one for what is kept, whose numbers must be the same for everybody."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute on `count` threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """Compute on one thread of the CPU.

    The last bits of a sum depend on how it is shared out among threads; with one, whoever fills a cache
    fills it with the same values. On a busy machine it is also faster, since threads wait for each other.
    """
    return threads(1)
