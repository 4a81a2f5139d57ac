"""The banks of contrast: for each image that is learnt from, the newest embedding of it by the student and by its teachers.

Shapes: n rows of a bank, d numbers of an embedding, B rows of a global batch, K negatives.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd import losses
from richkd.config import Contrast
from richkd.data.batches import stream_seed
from richkd.errors import ConfigError
from richkd.workers import Group


class Banks:
    """Two banks, the normaliser of each, and which rows are told from which.

    Rows are numbered among those that are learnt from, so that neither held-out rows nor ones left out take part. All workers
    hold the same banks: each applies every worker's embeddings, in the order of the global batch.

    Args:
        classes: Class of each row `(n,)`; rows of one class are never each other's negatives, and -1 is a class of its own.
        config: Size and constants.
        seed: The run's seed.
        device: Where they lie, and where negatives are drawn.

    Raises:
        ConfigError: If some row has no negative, or too few of them to be drawn once each.
    """

    def __init__(self, classes: Tensor, config: Contrast, seed: int, device: torch.device) -> None:
        self.config, self.seed, self.rows = config, seed, len(classes)
        self.generator = torch.Generator(device)
        alone = classes.max() + 1 + torch.arange(self.rows)
        groups = torch.where(classes >= 0, classes, alone)
        _, where, sizes = groups.unique(return_inverse=True, return_counts=True)
        self.groups, self.largest = where.to(device), int(sizes.max())
        # rows of a class lie side by side: all others are one window behind them, over the end and on
        self.order = torch.argsort(where, stable=True).to(device)
        self.end = sizes.cumsum(0)[where].to(device)
        self.others = (self.rows - sizes)[where].to(device)
        self._check(self.rows - self.largest)
        # initial values as published: uniform, not normalised
        initial = torch.Generator().manual_seed(stream_seed(seed, "banks"))
        reach = 1 / math.sqrt(config.width / 3)
        student, teacher = (
            torch.empty(self.rows, config.width).uniform_(-reach, reach, generator=initial)
            for _ in range(2)
        )
        self.student, self.teacher = student.to(device), teacher.to(device)
        self.normalisers = torch.zeros(2, device=device)  # 0: not set yet
        self.begun = False

    def _check(self, fewest: int) -> None:
        if fewest < 1:
            raise ConfigError(
                "contrast needs images of other classes but all that are learnt from have one class; use a method without "
                "contrast."
            )
        wanted = self.config.negatives
        if not self.config.replacement and fewest < wanted:
            raise ConfigError(
                f"contrast.negatives={wanted} must be drawn once each but some image has only {fewest} of other classes; lower "
                "it, or give contrast.replacement=true."
            )

    def begin(self, epoch: int) -> None:
        """Begin the random numbers of an epoch, from 0."""
        self.generator.manual_seed(stream_seed(self.seed, "negatives", epoch))

    def draw(self, rows: Tensor) -> Tensor:
        """Return for each of `rows` `(B,)` itself and K rows of other classes, `(B, K + 1)`.

        Drawn for the whole global batch, so that any number of workers draws the same. Without replacement all rows of a
        batch share one permutation, of which each takes a window at a place of its own: for one row that is an even draw.
        """
        if self.config.replacement:
            size = (len(rows), self.config.negatives)
            # of 2^62, so that the remainder is even to 1e-13
            drawn = torch.randint(2**62, size, generator=self.generator, device=self.order.device)
            behind = self.end[rows][:, None] + drawn % self.others[rows][:, None]
            negatives = self.order[behind % self.rows]
        else:
            negatives = self._once_each(rows)
        return torch.cat([rows[:, None], negatives], 1)

    def _once_each(self, rows: Tensor) -> Tensor:
        count, own = self.config.negatives, self.generator
        device, wide = self.order.device, min(self.config.negatives + self.largest, self.rows)
        permuted = torch.randperm(self.rows, generator=own, device=device)
        start = torch.randint(self.rows, (len(rows), 1), generator=own, device=device)
        window = permuted[(start + torch.arange(wide, device=device)) % self.rows]
        # of a window the first K of other classes; what is left over is written beyond them
        other = self.groups[window] != self.groups[rows][:, None]
        place = other.cumsum(1) - 1
        place = torch.where(other & (place < count), place, count)
        return window.new_empty(len(rows), count + 1).scatter_(1, place, window)[:, :count]

    def loss(
        self, student: Tensor, teacher: Tensor, rows: Tensor, total: int, group: Group
    ) -> Tensor:
        """Return the contrast of both sides, this worker's part of the mean over the global batch.

        The student's embeddings are told from each other in the teachers' bank, the teachers' in the student's.

        Args:
            student: Unit-norm embeddings of this worker's slice, `(b, d)`.
            teacher: Those of the fused teachers.
            rows: Rows of the global batch, `(B,)`.
            total: B.
            group: The workers.
        """
        chosen = self.draw(rows)[group.slice(total)]
        similarity = [
            losses.similarities(embeddings, bank, chosen, self.config.temperature)
            for embeddings, bank in ((student, self.teacher), (teacher, self.student))
        ]
        if not self.begun:
            sums = torch.stack([each.detach().exp().sum() for each in similarity])
            mean = group.total(sums) / (total * chosen.shape[1])
            self.normalisers.copy_(mean * self.rows)
            self.begun = True
        return sum(
            losses.contrast(each, normaliser, self.rows, total)
            for each, normaliser in zip(similarity, self.normalisers, strict=True)
        )

    @torch.no_grad()
    def update(
        self, student: Tensor, teacher: Tensor, rows: Tensor, total: int, group: Group
    ) -> None:
        """Move the rows of the global batch towards its embeddings, after the loss; the arguments are those of `loss`."""
        both = group.gather(torch.cat([student, teacher], 1).detach(), total)
        # of a row that is there twice the last one counts, in whatever order a GPU writes
        place = torch.arange(total, device=rows.device)
        last = torch.where(rows[:, None] == rows, place, -1).amax(1)
        keep = self.config.momentum
        for bank, new in zip((self.student, self.teacher), both.chunk(2, 1), strict=True):
            moved = F.normalize(keep * bank[rows] + (1 - keep) * new, dim=1)
            bank[rows] = moved[last]

    def state(self) -> dict[str, Tensor]:
        """Return what a run that goes on needs, by name."""
        return {
            "banks.student": self.student,
            "banks.teacher": self.teacher,
            "banks.normalisers": self.normalisers,
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned."""
        for name, own in self.state().items():
            own.copy_(state[name])
        self.begun = bool((self.normalisers > 0).all())
