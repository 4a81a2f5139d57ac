"""What is trained: the student and, for a loss of features, the projections beside it.

Shapes: N images, K classes, d numbers of an embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from richkd import fusion
from richkd.banks import Banks
from richkd.config import Config
from richkd.data.batches import stream_seed
from richkd.losses import maps
from richkd.models import Network


class Contrast(nn.Module):
    """Projections of pooled features into one space, and banks of what came out: CRD, and RichKD of features.

    All projections are learnt, the teachers' too: features of different networks have no space in common otherwise (the
    released code). They have no other layer behind them.

    Args:
        config: The run.
        width: Features of the student.
        widths: Features of each teacher.
        weights: Weight of each teacher.
        banks: Where embeddings are kept.
    """

    def __init__(
        self,
        config: Config,
        width: int,
        widths: Sequence[int],
        weights: Sequence[float],
        banks: Banks,
    ) -> None:
        super().__init__()
        self.weights, self.banks = tuple(weights), banks
        size = config.contrast.width
        self.student = drawn(lambda: nn.Linear(width, size), config.seed, 0)
        # each draws from its own numbers: without CLIP the others start as with it
        self.teachers = nn.ModuleList(
            drawn(lambda w=w: nn.Linear(w, size), config.seed, 1 + k) for k, w in enumerate(widths)
        )

    def forward(
        self, student: Network, images: Tensor, beside: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return logits `(N, K)`, and the embeddings `(N, d)` of the student and of the fused teachers."""
        features = student.features(images)
        logits = student.head(features)
        with torch.autocast(images.device.type, enabled=False):
            own = F.normalize(self.student(features.float()), dim=1)
            each = [
                F.normalize(project(seen), dim=1)
                for project, seen in zip(self.teachers, beside, strict=True)
            ]
            fused = each[0] if len(each) == 1 else fusion.fuse_features(each, self.weights)
        return logits, (own, fused)


class Maps(nn.Module):
    """Outputs of the student's stages, made comparable with the teacher's: attention transfer, locality guidance and so on.

    Args:
        config: The run.
        own: Channels, height and width of each stage of the student.
        other: Of each stage of the teacher.
        device: Where the student is.
    """

    banks = None

    def __init__(
        self,
        config: Config,
        own: Sequence[tuple[int, int, int]],
        other: Sequence[tuple[int, int, int]],
        device: torch.device,
    ) -> None:
        super().__init__()
        sizes, others = [each[1:] for each in own], [each[1:] for each in other]
        self.resizes = maps.resizings(sizes, others, device)
        self.transform = config.loss.transform
        learnt, count = self.transform in maps.LEARNT, len(self.resizes)
        pairs = [(mine[0], its[0]) for mine, its in zip(own[-count:], other[-count:], strict=True)]
        self.student = nn.ModuleList(
            drawn(lambda a=a, b=b: nn.Conv2d(a, b, 1), config.seed, k) if learnt else nn.Identity()
            for k, (a, b) in enumerate(pairs)
        )

    def forward(
        self, student: Network, images: Tensor, beside: Sequence[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return logits `(N, K)`, and the transformed maps `(N, E)` of each stage."""
        features, stages = student.staged(images)
        logits = student.head(features)
        with torch.autocast(images.device.type, enabled=False):
            last = [each.float() for each in stages[-len(self.resizes) :]]
            brought = [project(each) for project, each in zip(self.student, last, strict=True)]
            return logits, tuple(maps.transformed(brought, self.resizes, self.transform))


class Learner(nn.Module):
    """The student, and what a loss of features learns beside it, None where there is no such loss."""

    def __init__(self, student: Network, comparison: Contrast | Maps | None = None) -> None:
        super().__init__()
        self.student, self.comparison = student, comparison

    def forward(
        self, images: Tensor, beside: Sequence[Tensor] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return logits `(N, K)` and what is compared.

        Args:
            images: `(N, C, H, W)`.
            beside: What the teachers' features or maps are, as `FusedTeacher.said` returns it.
        """
        if self.comparison is None:
            return self.student(images), ()
        return self.comparison(self.student, images, beside)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield each parameter that is trained: the student's by their own names, then the projections'."""
        yield from self.student.named_parameters()
        if self.comparison is not None:
            yield from self.comparison.named_parameters("comparison")

    def beside(self) -> dict[str, Tensor]:
        """Return what a run that goes on needs beside student and optimiser, by name: projections and banks."""
        if self.comparison is None:
            return {}
        own = {f"comparison.{name}": value for name, value in self.comparison.state_dict().items()}
        return own if self.comparison.banks is None else own | self.comparison.banks.state()

    def load_beside(self, state: dict[str, Tensor]) -> None:
        """Take over what `beside` returned."""
        if self.comparison is None:
            return
        own = {
            name.removeprefix("comparison."): value
            for name, value in state.items()
            if name.startswith("comparison.")
        }
        self.comparison.load_state_dict(own)
        if self.comparison.banks is not None:
            self.comparison.banks.load(state)


def drawn(make: Callable[[], Any], seed: int, number: int) -> Any:
    """Return a fresh layer, its weights from the `number`-th stream of projections of a run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "projections", number))
        return make()
