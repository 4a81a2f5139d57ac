"""How many threads of the CPU compute: one for what is kept, whose numbers must be the same for everybody; all to read."""

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

GRANTED = (
    torch.get_num_threads()
)  # as OMP_NUM_THREADS says, which Ray sets to a job's cores; else the machine's
AHEAD = 4  # items in flight for each thread

T = TypeVar("T")
U = TypeVar("U")


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


def ahead(
    read: Callable[[T], U], items: Iterable[T], count: int = os.cpu_count() or 1
) -> Iterator[U]:
    """Yield `read(item)` for each item, in order, read by `count` threads, one a core if not said, a few items ahead."""
    pool, flying = ThreadPoolExecutor(count), deque()
    try:
        for item in items:
            flying.append(pool.submit(read, item))
            if len(flying) == AHEAD * count:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
