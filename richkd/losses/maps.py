"""Distance of the student's stage outputs from the teacher's: attention transfer, locality guidance and their relatives.

A loss is a transform of the maps and a distance between what comes out. `attention` with `mse` is attention transfer,
`projection` with `mse` locality guidance; a search may mix them. Stages are paired from the last one backwards. Maps of two
sizes are brought to the larger height and width, bilinearly, as the code of locality guidance does, also where that is
attention transfer; the CNN code of attention transfer averages the larger map down instead.

Shapes: N images, C channels, H x W places of a map, E numbers of a transformed one.
"""

from collections.abc import Callable, Sequence
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
Resizing = tuple[Tensor, Tensor]  # by which a map is multiplied from the left and from the right


def attention(maps: Tensor) -> Tensor:
    """Return where the map is strong, `(N, H W)` of unit length: the mean square over channels (p = 2).

    Of a token model the maps are its tokens in their places, the class token left out.
    """
    return F.normalize(maps.square().mean(1).flatten(1), dim=1)


def channel(maps: Tensor) -> Tensor:
    """Return the mean over places, `(N, C)`."""
    return maps.mean((2, 3))


def projection(maps: Tensor) -> Tensor:
    """Return all numbers, `(N, C H W)`."""
    return maps.flatten(1)


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": attention,
    "channel": channel,
    "projection": projection,
}
LEARNT = (
    "channel",
    "projection",
)  # before which a 1 x 1 convolution brings the student's channels to the teacher's


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean square of the differences, `(N,)`."""
    return (student - teacher).square().mean(1)


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of the absolute differences, `(N,)`."""
    return (student - teacher).abs().mean(1)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return 1 - the cosine of the angle between them, `(N,)`."""
    return 1 - F.cosine_similarity(student, teacher, 1)


def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence of their softmaxes, `(N,)`."""
    student, teacher = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mse,
    "l1": l1,
    "cosine": cosine,
    "kl": kl,
}


def paired_sizes(student: Sequence[Size], teacher: Sequence[Size]) -> list[Size]:
    """Return the size at which each pair of stages is compared, given the sizes of each network's stages."""
    count = min(len(student), len(teacher))
    return [
        (max(own[0], other[0]), max(own[1], other[1]))
        for own, other in zip(student[-count:], teacher[-count:], strict=True)
    ]


def resizings(
    own: Sequence[Size], other: Sequence[Size], device: torch.device
) -> list[Resizing | None]:
    """Return for each pair of stages what brings the maps of `own` to the size at which the pair is compared.

    Args:
        own: Height and width of each stage of one network.
        other: Of the network that it is compared with.
        device: Where the maps are.

    Returns:
        Two matrices a pair, None where a map has its size. Products, since the gradient of PyTorch's own interpolation adds
        up in no fixed order on a GPU.
    """
    wanted = paired_sizes(own, other)
    return [
        None
        if before == after
        else (_resizing(before[0], after[0], device), _resizing(before[1], after[1], device).T)
        for before, after in zip(own[-len(wanted) :], wanted, strict=True)
    ]


def _resizing(own: int, wanted: int, device: torch.device) -> Tensor:
    """Return the matrix `(wanted, own)`: what becomes of each place by itself."""
    each = torch.eye(own, device=device)[None]
    return F.interpolate(each, wanted, mode="linear", align_corners=False)[0].T


def transformed(
    maps: Sequence[Tensor], resizes: Sequence[Resizing | None], transform: str
) -> list[Tensor]:
    """Return the last maps, one for each of `resizes` and brought to its size, transformed: `(N, E)` each."""
    return [
        TRANSFORMS[transform](each if resize is None else resize[0] @ each @ resize[1])
        for each, resize in zip(maps[len(maps) - len(resizes) :], resizes, strict=True)
    ]


def distance(student: Sequence[Tensor], teacher: Sequence[Tensor], kind: str, rows: int) -> Tensor:
    """Return the distances of all pairs of transformed maps added up, mean over the global batch.

    Args:
        student: `(N, E)` of each stage.
        teacher: Likewise.
        kind: One of DISTANCES.
        rows: Number of rows in the global batch.
    """
    return sum(map(_total, repeat(DISTANCES[kind]), student, teacher)) / rows


def _total(kind: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    return kind(student, teacher).sum()
