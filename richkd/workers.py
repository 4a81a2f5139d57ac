"""Several workers on one distillation: which rows each takes, and how their parts become one result.

The global batch is the unit. Every worker draws the whole of it from the same seeds and takes its slice; losses are sums
divided by the global counts, so that what the workers compute adds up to what one would have computed.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The workers of one run, as one of them sees them.

    Attributes:
        rank: Number of this worker; the first one, 0, writes the files.
        size: Number of workers; more than one need torch.distributed's process group.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_process_group(cls) -> "Group":
        """Return the workers that torch.distributed has brought together."""
        return cls(rank=dist.get_rank(), size=dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the worker that writes the files."""
        return self.rank == 0

    def slice(self, rows: int) -> slice:
        """Return this worker's part of `rows` rows; parts differ by one row at most, and may be empty."""
        each, more = divmod(rows, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def lengths(self, rows: int) -> list[int]:
        """Return how many of `rows` rows each worker's part has."""
        slices = [Group(rank=rank, size=self.size).slice(rows) for rank in range(self.size)]
        return [each.stop - each.start for each in slices]

    def wrap(self, learner: nn.Module) -> nn.Module:
        """Return `learner` such that a backward pass leaves the mean of all workers' gradients in its parameters.

        All workers start with the first one's weights. Statistics of batch norm are each worker's own slice's while
        it trains, as in all data-parallel training; the running ones are the first worker's.
        """
        if self.size == 1:
            return learner
        # unused ones are looked for, since then no bucket is laid out anew after the first step: a run that is gone on with
        # adds up in the order of the straight one
        return nn.parallel.DistributedDataParallel(
            learner, gradient_as_bucket_view=True, find_unused_parameters=True
        )

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over the workers."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, part: Tensor, rows: int) -> Tensor:
        """Return all `rows` rows, of which each worker has the part that `slice` gave it."""
        if self.size == 1:
            return part
        longest = -(-rows // self.size)  # all parts of one length, as gathering wants them
        padded = part.new_zeros(longest, *part.shape[1:])
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        lengths = self.lengths(rows)
        return torch.cat([each[:length] for each, length in zip(parts, lengths, strict=True)])

    def from_first(self, value: Any) -> Any:
        """Return the first worker's `value`, plain JSON, to all; nothing is pickled on the way."""
        if self.size == 1:
            return value
        device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        said = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
        length = torch.tensor(len(said), device=device)
        dist.broadcast(length, src=0)
        heard = said if self.first else said.new_empty(int(length))
        dist.broadcast(heard, src=0)
        return json.loads(bytes(heard.tolist()))

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors that all workers have, in one order, with the first worker's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)
