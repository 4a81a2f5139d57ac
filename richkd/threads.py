"""One thread for what is computed once and kept: small nets, whose numbers must be the same for everybody."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread of the CPU.

    The last bits of a sum depend on how it is shared out among threads; with one, whoever fills a cache
    fills it with the same values. On a busy machine it is also faster, since threads wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
