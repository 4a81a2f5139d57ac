"""Steps of training, an epoch at a time: blocks of batches, precision, CUDA graphs.

No step waits for a GPU: what the host knows of a block of batches goes there in one copy, the target of all its rows is
made at once, and the terms of the loss stay there until the epoch has ended.
"""

import copy
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from richkd import fusion, losses
from richkd.config import Config
from richkd.data import Batches
from richkd.data.views import sent
from richkd.errors import ConfigError, Interrupted, NonFiniteError
from richkd.precision import in_use
from richkd.teachers import FusedTeacher
from richkd.workers import Group

ADVICE = "lower train.lr or loss.logit, or raise loss.temperature"  # of a run that diverged
ALONE = Group()
BLOCK = {
    "cpu": 256,
    "cuda": 4096,
}  # rows: of a CPU some seconds of a teacher, of a GPU more than a copy is worth
EAGER = 3  # steps before a graph is captured, in which kernels are chosen and momentum begins
TERMS = ("loss_ce", "loss_logit", "loss", "target_entropy")


class Slice(NamedTuple):
    """One worker's part of a global batch.

    Attributes:
        rows: Training rows `(B,)`, where their pixels are.
        labels: Visible labels `(B,)`, on the device.
        views: Crops `(B, 3)`, where the pixels are.
        target: Log-probabilities of the teacher `(B, K)`, on the device; None where nothing is distilled.
        labelled: Number of labelled rows in the global batch, on the device.
        total: Number of rows in the global batch.
    """

    rows: Tensor
    labels: Tensor
    views: Tensor
    target: Tensor | None
    labelled: Tensor
    total: int


class Steps:
    """The training of one student, as one worker sees it.

    Args:
        config: The run.
        student: As `group.wrap` returned it.
        teacher: None where nothing is distilled.
        optimizer: Of the student's parameters.
        batches: Global batches.
        group: The workers; each takes its slice of each batch.
    """

    def __init__(
        self,
        config: Config,
        student: nn.Module,
        teacher: FusedTeacher | None,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        group: Group = ALONE,
    ) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        self.optimizer, self.batches, self.group = optimizer, batches, group
        self.views, self.device = batches.views, batches.views.device
        self.half = in_use(config.train.precision, self.device) == "bf16"
        self.resident = self.views.view is not None
        alone = group.size == 1 and self.resident
        replayed = self.device.type == "cuda" and config.train.graphs and alone
        self.graph = Graph(optimizer) if replayed else None

    def blocks(self, epoch: int) -> Iterator[list[Slice]]:
        """Yield this worker's slices of the batches of `epoch`, a block of them at a time."""
        length = max(BLOCK[self.device.type] // self.batches.batch_size, 1)
        left = self.batches.epoch(epoch)
        while block := list(islice(left, length)):
            yield self._prepared(block)

    def _prepared(self, block: list[tuple[Tensor, Tensor, Tensor]]) -> list[Slice]:
        totals = [len(rows) for rows, _, _ in block]
        labelled = torch.stack([(labels >= 0).sum() for _, labels, _ in block])
        mine = [[each[self.group.slice(len(each))] for each in batch] for batch in block]
        rows, labels, views = map(torch.cat, zip(*mine, strict=True))
        sizes = [len(rows) for rows, _, _ in mine]
        targets = [None] * len(sizes)
        if self.teacher is not None and len(rows):
            targets = self.teacher.target(rows, views).split(sizes)
        known = torch.cat([rows[:, None], views, labels[:, None]], 1)
        there = sent(known, self.device)
        where = (there if self.resident else known).split(sizes)
        return [
            Slice(crops[:, 0], own[:, -1], crops[:, 1:-1], target, count, total)
            for crops, own, target, count, total in zip(
                where,
                there.split(sizes),
                targets,
                sent(labelled, self.device),
                totals,
                strict=True,
            )
        ]

    def take(self, part: Slice, progress: float) -> Tensor:
        """Take one step of the optimiser and return what this slice adds to the values of TERMS, `(4,)`.

        Args:
            part: This worker's slice.
            progress: How much of the training lies behind, 0 to 1; sets the learning rate.
        """
        lr = self.config.train.lr * (0.5 + 0.5 * math.cos(math.pi * progress))
        for parameters in self.optimizer.param_groups:
            if isinstance(parameters["lr"], Tensor):  # on a GPU, whose graphs read it there
                parameters["lr"].fill_(lr)
            else:
                parameters["lr"] = lr
        if self.graph is not None and len(part.rows) == self.config.train.batch_size:
            return self.graph.take(self.step, part)
        return self.step(part)

    def step(self, part: Slice) -> Tensor:
        """Take one step at the learning rate that is set, and return what `values` returns, detached."""
        values = self.values(part) if len(part.rows) else self.idle()
        self.optimizer.zero_grad(set_to_none=True)
        # the gradients of several workers are averaged, where they should add up
        (self.group.size * values[2]).backward()
        self.optimizer.step()
        return values.detach()

    def values(self, part: Slice) -> Tensor:
        """Return what a slice adds to the values of TERMS, `(4,)`; the third is the loss to descend."""
        images, weights = self.views.images(part.rows, part.views), self.config.loss
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.half, cache_enabled=False
        ):
            logits = self.student(images)
        logits = logits.float()
        ce = losses.cross_entropy(logits, part.labels, part.labelled)
        if part.target is None:
            zero = ce.new_zeros(())
            return torch.stack([ce.detach(), zero, weights.ce * ce, zero])
        logit = losses.kd(logits, part.target, self.teacher.temperature, part.total)
        loss = weights.ce * ce + weights.logit * logit
        entropy = fusion.entropy(part.target) * (len(part.rows) / part.total)
        return torch.stack([ce.detach(), logit.detach(), loss, entropy])

    def idle(self) -> Tensor:
        """Return the values of a worker whose slice is empty: zeros that go back through the whole network.

        The others wait for its gradients. In eval mode, so that the image that it looks at changes no statistics.
        """
        self.student.eval()
        zero = 0 * self.student(self.views.images(self.batches.transfer[:1])).sum()
        self.student.train()
        return torch.stack([zero.detach(), zero.detach(), zero, zero.detach()])

    def epoch(self, epoch: int, stop: Callable[[], int | None]) -> dict[str, float]:
        """Train for one epoch and return the mean of each of TERMS over the global batches.

        Args:
            epoch: From 0.
            stop: Asked before each step; a signal number ends the run.

        Raises:
            NonFiniteError: If a term or a weight is NaN or infinite; names epoch, step and term.
            Interrupted: If `stop` returned a signal.
        """
        self.student.train()
        steps, epochs = len(self.batches), self.config.train.epochs
        terms = torch.zeros(steps, len(TERMS), device=self.device)
        parts = (part for block in self.blocks(epoch) for part in block)
        for k, part in enumerate(parts):
            if (signum := stop()) is not None:
                raise Interrupted(signum, f"interrupted in epoch {epoch + 1} of {epochs}")
            terms[k] = self.take(part, (epoch * steps + k) / (epochs * steps))
        terms = self.group.total(terms)
        self.group.copy_from_first(self.student.buffers())
        check_finite(terms.cpu(), self.student, epoch)
        return dict(zip(TERMS, terms.double().mean(0).tolist(), strict=True))


class Graph:
    """The step of full batches as one CUDA graph, launched at once where its kernels would be launched one by one.

    At the batches of the distillation papers a GPU waits for launches most of the time. The first EAGER steps of a run are
    taken as they come, beside the usual stream, as capturing wants it; then the step is recorded, and from there on
    replayed on the tensors that it was recorded with, into which each slice is copied.

    Args:
        optimizer: That the step ends with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.taken = optimizer, 0
        self.graph = torch.cuda.CUDAGraph()

    def take(self, step: Callable[[Slice], Tensor], part: Slice) -> Tensor:
        """Take a step and return its values, which hold until the next one.

        Args:
            step: `Steps.step`; it is not kept, since a GPU's memory is given back only where nothing holds itself.
            part: The slice.

        Raises:
            ConfigError: If the step cannot be recorded.
        """
        self.taken += 1
        if self.taken <= EAGER:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                values = step(part)
            torch.cuda.current_stream().wait_stream(stream)
            return values
        if self.taken == EAGER + 1:
            self._capture(step, part)
        for own, given in zip(self.part, part, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given)
        self.graph.replay()
        return self.values

    def _capture(self, step: Callable[[Slice], Tensor], part: Slice) -> None:
        """Record the step; nothing is computed yet."""
        self.part = Slice(*(e.clone() if isinstance(e, Tensor) else e for e in part))
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(self.graph):
                self.values = step(self.part)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"train.graphs: a step of this student cannot be recorded ({reason}); give train.graphs=false."
            ) from error


def check_slices(batches: Batches, student: nn.Module, group: Group) -> None:
    """Raise ConfigError if some worker would get one row that the student's batch norm cannot take alone.

    It cannot where the last map has a single pixel.
    """
    sizes = {len(batches.transfer) % batches.batch_size, batches.batch_size} - {0}
    if batches.share is not None:
        sizes = {batches.batch_size}
    if not any(1 in group.lengths(rows) for rows in sizes):
        return
    try:
        copy.deepcopy(student).train()(batches.views.images(batches.transfer[:1]))
    except ValueError as error:  # of batch norm
        raise ConfigError(
            f"train.batch_size={batches.batch_size} leaves a batch, or a worker's slice of one, of a single row of the "
            f"{len(batches.transfer)}, which the student's batch norm cannot take; change it a little."
        ) from error


def check_finite(terms: Tensor, student: nn.Module, epoch: int) -> None:
    """Raise NonFiniteError naming the first step and term of `terms` `(steps, 4)`, or the weight, not finite."""
    if not terms.isfinite().all():
        where = (~terms.isfinite()).nonzero()[0].tolist()
        raise NonFiniteError(
            f"{TERMS[where[1]]} is {terms[where[0], where[1]].item()} at step {where[0] + 1} of epoch {epoch + 1}; "
            f"{ADVICE}."
        )
    for name, value in student.state_dict().items():
        if not value.isfinite().all():
            name = name.removeprefix("module.")  # of a student wrapped for several workers
            raise NonFiniteError(f"weight {name} is not finite after epoch {epoch + 1}; {ADVICE}.")
