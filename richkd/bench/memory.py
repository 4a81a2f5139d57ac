"""How much memory a training takes at most.

    what it holds + what its first steps allocate on top

It holds its weights, the teachers and the images; gradients and momentum are allocated in the first steps. A table that is
mapped is not counted: its pages belong to all processes. On a GPU PyTorch's allocator says what was allocated; on a CPU,
where it keeps no account, the tensors that live are counted, operation by operation. What a kernel takes and gives back
within one operation is then missed: 0.1 % of resnet8x4's step by PyTorch's profiler, which sees such tensors.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from richkd.bench.reference import Reference
from richkd.bench.variants import Ours

STEPS = 2  # in the second one the gradients of the first live while the student looks at the next images


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make inside its `with` block, as long as they live.

    Attributes:
        bytes: Of those that live now.
        peak: Of those that lived at the same time, at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: dict[int, weakref.ref] = {}  # by address, since views share their storage

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self._see((args, kwargs), new=False)
        made = operation(*args, **(kwargs or {}))
        self._see(made, new=True)
        self.peak = max(self.peak, self.bytes)
        return made

    def _see(self, tree: Any, *, new: bool) -> None:
        for leaf in tree_iter(tree):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            address, size = storage._cdata, new * storage.nbytes()
            if address in self.known:
                continue

            def gone(_: weakref.ref, address: int = address, size: int = size) -> None:
                self.bytes -= size
                del self.known[address]

            self.bytes += size
            self.known[address] = weakref.ref(storage, gone)


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[list[int]]:
    """Yield a list to which, in the end, the bytes are added that were allocated on `device` at the same time, at most."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
    else:
        with Living() as living:
            yield found
        found.append(living.peak)


def size(tree: Any) -> int:
    """Return the bytes of the tensors and networks in nested lists, tuples and dictionaries, each storage once."""
    storages = {}
    for leaf in tree_iter(tree):
        found: Iterable[Tensor] = ()
        if isinstance(leaf, nn.Module):
            found = [*leaf.parameters(), *leaf.buffers()]
        elif isinstance(leaf, Tensor):
            found = [leaf]
        for each in found:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def held(loop: Ours | Reference, device: torch.device) -> int:
    """Return the bytes that a training holds on `device` before its first step: student, banks, teachers and images."""
    if isinstance(loop, Reference):
        pixels = loop.loader.dataset.pixels.nbytes if device.type == "cpu" else 0
        return pixels + size([loop.student, loop.teacher, loop.given, loop.clip])
    teachers = []
    if loop.teacher is not None:
        clips = [[getattr(each, name) for name in each.__slots__] for each in loop.teacher.clips]
        teachers = [vars(loop.teacher), vars(loop.teacher.task), *clips]
    learner = loop.learner
    return size([learner, learner.beside(), teachers, loop.steps.views.view])


def peak(loop: Ours | Reference, device: torch.device) -> int:
    """Return the bytes that a training takes at most, by its first STEPS steps, which are taken here."""
    before = held(loop, device)
    with measured(device) as most:
        loop.burst(STEPS)
    return before + most[0]
