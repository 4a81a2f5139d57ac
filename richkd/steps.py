"""Steps of training, an epoch at a time: blocks of batches, precision, CUDA graphs.

No step waits for a GPU: what the host knows of a block of batches goes there in one copy, the target of all its rows is
made at once, and the terms of the loss stay there until the epoch has ended.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from richkd import fusion, losses
from richkd.config import Config
from richkd.data import Batches
from richkd.data.batches import stream_seed
from richkd.data.views import sent
from richkd.errors import ConfigError, Interrupted, NonFiniteError
from richkd.learner import Learner
from richkd.losses import maps
from richkd.precision import in_use
from richkd.schedule import learning_rate
from richkd.teachers import FusedTeacher
from richkd.workers import Group

ADVICE = "lower train.lr, loss.logit or loss.feature, or raise loss.temperature"  # of a run that diverged
ALONE = Group()
BLOCK = {
    "cpu": 256,
    "cuda": 4096,
}  # rows: of a CPU some seconds of a teacher, of a GPU more than a copy is worth
VALUES = (
    2**27
)  # numbers that a teacher says of a block at most: half a gibibyte, where maps are compared
EAGER = 3  # steps before a graph is captured, in which kernels are chosen and momentum begins
TERMS = ("loss_ce", "loss_logit", "loss_feature", "loss", "target_entropy")
LOSS = TERMS.index("loss")


class Slice(NamedTuple):
    """One worker's part of a global batch.

    Attributes:
        rows: Training rows `(B,)`, where their pixels are.
        labels: Visible labels `(B,)`, on the device.
        views: Crops `(B, 3)`, where the pixels are, or seeds `(B, 1)` of streamed ones.
        target: Log-probabilities of the teacher `(B, K)`, on the device; None where no logits are learnt.
        labelled: Number of labelled rows in the global batch, on the device.
        total: Number of rows in the global batch.
        beside: What a loss of features asks of the teachers, as `Said.beside`, on the device.
        ids: Place of each row of the *global* batch among the rows that are learnt from, on the device; None where no banks
            are kept.
        pixels: The crops themselves, integers `(B, H, W, C)` on the device, where they are streamed.
    """

    rows: Tensor
    labels: Tensor
    views: Tensor
    target: Tensor | None
    labelled: Tensor
    total: int
    beside: tuple[Tensor, ...] = ()
    ids: Tensor | None = None
    pixels: Tensor | None = None

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors that it holds."""
        for each in self:
            yield from (
                part
                for part in (each if isinstance(each, tuple) else (each,))
                if isinstance(part, Tensor)
            )


class Steps:
    """The training of one student, as one worker sees it.

    Args:
        config: The run.
        learner: The student, and what is learnt beside it.
        teacher: None where nothing is distilled.
        optimizer: Of the student's parameters.
        batches: Global batches.
        group: The workers; each takes its slice of each batch.
    """

    def __init__(
        self,
        config: Config,
        learner: Learner,
        teacher: FusedTeacher | None,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        group: Group = ALONE,
    ) -> None:
        self.config, self.learner, self.teacher = config, learner, teacher
        self.student, self.comparison = learner.student, learner.comparison
        self.wrapped = group.wrap(learner)
        self.optimizer, self.batches, self.group = optimizer, batches, group
        self.views, self.device = batches.views, batches.views.device
        self.half = in_use(config.train.precision, self.device) == "bf16"
        self.resident = self.views.view is not None
        alone = group.size == 1 and self.resident
        replayed = self.device.type == "cuda" and config.train.graphs and alone
        self.banks = None if self.comparison is None else self.comparison.banks
        generators = [] if self.banks is None else [self.banks.generator]
        self.graph = Graph(optimizer, generators) if replayed else None
        # how much of its weight the loss of logits has; read by a graph
        self.rise = torch.ones((), device=self.device)

    def blocks(self, epoch: int) -> Iterator[list[Slice]]:
        """Yield this worker's slices of the batches of `epoch`, a block of them at a time."""
        left = self.batches.epoch(epoch)
        if self.views.streamed:
            yield from self._streamed(list(left))
        rows = BLOCK[self.device.type]
        if self.teacher is not None and self.teacher.task is not None:
            rows = min(rows, VALUES // (sum(self.teacher.task.sizes) + self.teacher.task.classes))
        length = max(rows // self.batches.batch_size, 1)
        while block := list(islice(left, length)):
            yield self._prepared(block)

    def _streamed(self, batches: list[tuple[Tensor, Tensor, Tensor]]) -> Iterator[list[Slice]]:
        """Yield each batch by itself, as soon as its pixels are made."""
        mine = [[each[self.group.slice(len(each))] for each in batch] for batch in batches]
        with contextlib.closing(
            self.views.loader([(rows, views) for rows, _, views in mine])
        ) as made:
            for batch, pixels in zip(batches, made, strict=True):
                yield self._prepared([batch], sent(pixels, self.device))

    def _prepared(
        self, block: list[tuple[Tensor, Tensor, Tensor]], pixels: Tensor | None = None
    ) -> list[Slice]:
        """Return the slices of a block; where views are streamed, of the one batch that `pixels` were made for."""
        totals = [len(rows) for rows, _, _ in block]
        labelled = torch.stack([(labels >= 0).sum() for _, labels, _ in block])
        mine = [[each[self.group.slice(len(each))] for each in batch] for batch in block]
        rows, labels, views = map(torch.cat, zip(*mine, strict=True))
        sizes = [len(rows) for rows, _, _ in mine]
        targets: Sequence[Tensor | None] = [None] * len(sizes)
        beside: Sequence[tuple[Tensor, ...]] = [()] * len(sizes)
        if self.teacher is not None and len(rows):
            said = self.teacher.said(rows, views, pixels)
            if said.target is not None:
                targets = said.target.split(sizes)
            if said.beside:
                beside = list(zip(*(each.split(sizes) for each in said.beside), strict=True))
        ids: Sequence[Tensor | None] = [None] * len(sizes)
        if self.banks is not None:
            everyone = torch.cat([rows for rows, _, _ in block])
            places = torch.searchsorted(self.batches.transfer, everyone)
            ids = sent(places, self.device).split(totals)
        known = torch.cat([rows[:, None], views, labels[:, None]], 1)
        there = sent(known, self.device)
        where = (there if self.resident else known).split(sizes)
        return [
            Slice(crops[:, 0], own[:, -1], crops[:, 1:-1], *others)
            for crops, own, *others in zip(
                where,
                there.split(sizes),
                targets,
                sent(labelled, self.device),
                totals,
                beside,
                ids,
                [pixels] * len(sizes),
                strict=True,
            )
        ]

    def take(self, part: Slice, progress: float) -> Tensor:
        """Take one step of the optimiser and return what this slice adds to the values of TERMS.

        Args:
            part: This worker's slice.
            progress: How much of the training lies behind, 0 to 1; sets the learning rate.
        """
        lr = learning_rate(self.config.train, progress)
        for parameters in self.optimizer.param_groups:
            if isinstance(parameters["lr"], Tensor):  # on a GPU, whose graphs read it there
                parameters["lr"].fill_(lr)
            else:
                parameters["lr"] = lr
        if self.graph is not None and len(part.rows) == self.config.train.batch_size:
            return self.graph.take(self.step, part)
        return self.step(part)

    def step(self, part: Slice) -> Tensor:
        """Take one step at the learning rate that is set, and return the values of TERMS, detached."""
        values, found = self.values(part) if len(part.rows) else self.idle(part)
        self.optimizer.zero_grad(set_to_none=True)
        # the gradients of several workers are averaged, where they should add up
        (self.group.size * values[LOSS]).backward()
        self.optimizer.step()
        if self.banks is not None:
            self.banks.update(*found, part.ids, part.total, self.group)
        return values.detach()

    def values(self, part: Slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what a slice adds to the values of TERMS, of which the loss is to be descended, and what was compared."""
        weights = self.config.loss
        if part.pixels is None:
            images = self.views.images(part.rows, part.views)
        else:
            images = self.views.normalised(part.pixels)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.half, cache_enabled=False
        ):
            logits, found = self.wrapped(images, part.beside)
        logits = logits.float()
        ce = losses.cross_entropy(logits, part.labels, part.labelled, weights.smoothing)
        logit = feature = entropy = ce.new_zeros(())
        loss = weights.ce * ce
        if part.target is not None:
            logit = self._of_logits(logits, part)
            loss = loss + weights.logit * self.rise * logit
            entropy = fusion.entropy(part.target) * (len(part.rows) / part.total)
        if self.comparison is not None:
            feature = self._of_features(found, part)
            loss = loss + weights.feature * feature
        terms = [ce.detach(), logit.detach(), feature.detach(), loss, entropy]
        return torch.stack(terms), found

    def _of_logits(self, logits: Tensor, part: Slice) -> Tensor:
        weights, temperature = self.config.loss, self.teacher.temperature
        if weights.standardise:
            logits = fusion.standardise(logits)
        if weights.logit_kind == "kd":
            return losses.kd(logits, part.target, temperature, part.total)
        shares = weights.dkd_alpha, weights.dkd_beta
        return losses.dkd(logits, part.target, part.labels, temperature, *shares, part.total)

    def _of_features(self, found: tuple[Tensor, ...], part: Slice) -> Tensor:
        if self.banks is not None:
            return self.banks.loss(*found, part.ids, part.total, self.group)
        return maps.distance(found, part.beside, self.config.loss.distance, part.total)

    def idle(self, part: Slice) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the values of a worker whose slice is empty: zeros that go back through the whole network.

        The others wait for its gradients, and for its part of what they gather. In eval mode, so that the image that it looks
        at changes no statistics.
        """
        self.learner.eval()
        image = self.views.images(self.batches.transfer[:1])
        widths = () if self.teacher is None else self.teacher.widths
        logits, found = self.wrapped(image, [image.new_ones(1, width) for width in widths])
        self.learner.train()
        zero = 0 * sum(each.sum() for each in (logits, *found))
        none = tuple(each[:0] for each in found)
        if self.banks is not None:
            zero = zero + self._of_features(none, part)
        return torch.stack([zero if k == LOSS else zero.detach() for k in range(len(TERMS))]), none

    @contextlib.contextmanager
    def _seeded(self, epoch: int) -> Iterator[None]:
        """Have layers that draw, such as drop-path, draw what belongs to the epoch and to this worker."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(stream_seed(self.config.seed, "layers", epoch) + self.group.rank)
            yield

    def epoch(self, epoch: int, stop: Callable[[], int | None]) -> dict[str, float]:
        """Train for one epoch and return the mean of each of TERMS over the global batches.

        Args:
            epoch: From 0.
            stop: Asked before each step; a signal number ends the run.

        Raises:
            NonFiniteError: If a term or a weight is NaN or infinite; names epoch, step and term.
            Interrupted: If `stop` returned a signal.
        """
        self.learner.train()
        if self.banks is not None:
            self.banks.begin(epoch)
        if warmup := self.config.loss.warmup:
            self.rise.fill_(min((epoch + 1) / warmup, 1.0))
        steps, epochs = len(self.batches), self.config.train.epochs
        terms = torch.zeros(steps, len(TERMS), device=self.device)
        with contextlib.closing(self.blocks(epoch)) as blocks, self._seeded(epoch):
            for k, part in enumerate(part for block in blocks for part in block):
                if (signum := stop()) is not None:
                    raise Interrupted(signum, f"interrupted in epoch {epoch + 1} of {epochs}")
                terms[k] = self.take(part, (epoch * steps + k) / (epochs * steps))
        terms = self.group.total(terms)
        self.group.copy_from_first(self.student.buffers())
        check_finite(terms.cpu(), self.learner, epoch)
        return dict(zip(TERMS, terms.double().mean(0).tolist(), strict=True))


class Graph:
    """The step of full batches as one CUDA graph, launched at once where its kernels would be launched one by one.

    At the batches of the distillation papers a GPU waits for launches most of the time. The first EAGER steps of a run are
    taken as they come, beside the usual stream, as capturing wants it; then the step is recorded, and from there on
    replayed on the tensors that it was recorded with, into which each slice is copied.

    Args:
        optimizer: That the step ends with.
        generators: Of random numbers that a step draws on the GPU, beside PyTorch's own.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, generators: Sequence[torch.Generator] = ()
    ) -> None:
        self.optimizer, self.taken = optimizer, 0
        self.graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self.graph.register_generator_state(generator)

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
        for own, given in zip(self.part.tensors(), part.tensors(), strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.values

    def _capture(self, step: Callable[[Slice], Tensor], part: Slice) -> None:
        """Record the step; nothing is computed yet."""
        self.part = part._replace(
            **{name: _copied(value) for name, value in part._asdict().items()}
        )
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


def _copied(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copied, value))
    return value.clone() if isinstance(value, Tensor) else value


def check_slices(batches: Batches, student: nn.Module, group: Group) -> None:
    """Raise ConfigError if some worker would get one row that the student's batch norm cannot take alone.

    It cannot where the last map has a single pixel.
    """
    sizes = {batches.rows % batches.batch_size, batches.batch_size} - {0}
    if not any(1 in group.lengths(rows) for rows in sizes):
        return
    try:
        copy.deepcopy(student).train()(batches.views.images(batches.transfer[:1]))
    except ValueError as error:  # of batch norm
        raise ConfigError(
            f"train.batch_size={batches.batch_size} leaves a batch, or a worker's slice of one, of a single row of the "
            f"{len(batches.transfer)}, which the student's batch norm cannot take; change it a little."
        ) from error


def check_finite(terms: Tensor, learner: Learner, epoch: int) -> None:
    """Raise NonFiniteError naming the first step and term of `terms` `(steps, 5)`, or the weight, not finite."""
    if not terms.isfinite().all():
        where = (~terms.isfinite()).nonzero()[0].tolist()
        raise NonFiniteError(
            f"{TERMS[where[1]]} is {terms[where[0], where[1]].item()} at step {where[0] + 1} of epoch {epoch + 1}; "
            f"{ADVICE}."
        )
    weights = learner.student.state_dict() | learner.beside()
    for name, value in weights.items():
        if not value.isfinite().all():
            raise NonFiniteError(f"weight {name} is not finite after epoch {epoch + 1}; {ADVICE}.")
