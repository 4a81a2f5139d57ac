"""The order of rows and views of each epoch, a function of the seed and the epoch alone.

Nothing is carried from epoch to epoch, so a resumed run meets the batches that the straight run would
have met. Order and augmentation have generators of their own: methods with one seed share both, and
differences between them are paired.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from richkd.data.subsets import Split
from richkd.data.views import Views
from richkd.errors import DataError

STREAMS = {
    name: k
    for k, name in enumerate(
        ("initialisation", "order", "augmentation", "negatives", "banks", "projections", "layers")
    )
}


def stream_seed(seed: int, stream: str, epoch: int = 0) -> int:
    """Return the seed of one stream of random numbers in one epoch."""
    return int(np.random.SeedSequence([seed, STREAMS[stream], epoch]).generate_state(1)[0])


class Batches:
    """Global batches of one run.

    Args:
        split: Transfer rows and their visible labels.
        views: Where the augmentation is drawn.
        batch_size: Rows in a global batch; the last one of an epoch may be smaller.
        share: Share of labelled rows in each batch, drawn anew as often as needed; None takes rows as
            they fall. An epoch has as many batches either way: one pass over as many rows as there are.
        seed: The run's seed.
        drop_last: Whether rows that fill no batch are left out of an epoch.
    """

    def __init__(
        self,
        split: Split,
        views: Views,
        batch_size: int,
        share: float | None,
        seed: int,
        *,
        drop_last: bool = False,
    ) -> None:
        self.labels = torch.from_numpy(split.labels)
        self.transfer = torch.from_numpy(split.transfer)
        if batch_size > len(self.transfer):
            raise DataError(
                f"train.batch_size and teacher.batch_size must not exceed the {len(self.transfer)} rows that are learnt from "
                f"but got {batch_size}; lower it."
            )
        known = self.labels[self.transfer] >= 0
        self.labelled, self.unlabelled = self.transfer[known], self.transfer[~known]
        self.views, self.batch_size, self.seed = views, batch_size, seed
        self.share, self.drop_last = share if len(self.unlabelled) else None, drop_last

    def __len__(self) -> int:
        """Steps in an epoch."""
        full, left = divmod(len(self.transfer), self.batch_size)
        return full + (left > 0 and not self.drop_last)

    @property
    def rows(self) -> int:
        """Rows in an epoch."""
        most = len(self) * self.batch_size
        return min(len(self.transfer), most) if self.share is None else most

    def order(self, epoch: int) -> list[Tensor]:
        """Return the rows of each batch of `epoch`."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", epoch))
        if self.share is None:
            rows = self.transfer[torch.randperm(len(self.transfer), generator=generator)]
            return list(rows.split(self.batch_size))[: len(self)]
        labelled = min(max(round(self.share * self.batch_size), 1), self.batch_size)
        parts = [
            endless(self.labelled, labelled * len(self), generator).view(len(self), -1),
            endless(self.unlabelled, (self.batch_size - labelled) * len(self), generator).view(
                len(self), -1
            ),
        ]
        return list(torch.cat(parts, 1))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield rows `(B,)`, visible labels `(B,)` and views `(B, 3)`, or seeds `(B, 1)`, of each batch of `epoch`."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, "augmentation", epoch))
        for rows in self.order(epoch):
            yield rows, self.labels[rows], self.views.draw(len(rows), generator)


def endless(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` of `rows` in the order of as many permutations as that takes."""
    passes = -(-count // len(rows))
    order = [torch.randperm(len(rows), generator=generator) for _ in range(passes)]
    return rows[torch.cat(order)[:count]] if order else rows[:0]
