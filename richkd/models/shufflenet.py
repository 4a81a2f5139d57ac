"""ShuffleNets V1 and V2 for small images: a 1 x 1 stem and three stages, each of which halves the image.

Weights start as PyTorch draws them. The names of the submodules are RepDistiller's, whose weights load once their
last layer is called `head`. Shapes: N images of C channels, D features, K classes.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from richkd.models.network import Network

STEM = 24  # channels


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Return `x` `(N, C, H, W)` with its channels dealt out, so that each group sees all the others."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def three_stages(
    stages: tuple[tuple[int, int], ...],
    first: Callable[[int, int], nn.Module],
    other: Callable[[int], nn.Module],
) -> list[nn.Sequential]:
    """Return the stages behind the stem: of each, a `first` unit, which halves the image, and `other` ones.

    Args:
        stages: Channels and units of each stage.
        first: Given the channels before and of the stage.
        other: Given the channels of the stage.
    """
    layers, inside = [], STEM
    for outside, units in stages:
        halving = first(inside, outside)
        layers.append(nn.Sequential(halving, *(other(outside) for _ in range(1, units))))
        inside = outside
    return layers


class GroupedUnit(nn.Module):
    """V1: grouped 1 x 1, shuffle, 3 x 3 of each channel, grouped 1 x 1; a sum, or with stride 2 a concatenation.

    Args:
        inside: Channels of the input.
        outside: Channels of the output, those of the pooled input included.
        stride: 1 or 2.
        groups: Of the 1 x 1 convolutions.
    """

    def __init__(self, inside: int, outside: int, stride: int, groups: int) -> None:
        super().__init__()
        new = outside - inside if stride == 2 else outside
        middle = new // 4
        # the stem's few channels are not grouped
        self.groups, self.stride = 1 if inside == STEM else groups, stride
        self.conv1 = nn.Conv2d(inside, middle, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, new, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(new)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, outside, H / stride, W / stride)` of `(N, inside, H, W)`."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(shuffle(y, self.groups))), inplace=True)
        y = self.bn3(self.conv3(y))
        if self.stride == 2:
            y = torch.cat((y, F.avg_pool2d(x, 3, 2, 1)), 1)
        else:
            y = y + x
        return F.relu(y, inplace=True)


class ShuffleNetV1(Network):
    """ShuffleNet V1.

    Args:
        stages: Channels and units of each stage.
        groups: Of the 1 x 1 convolutions.
        classes: K.
        channels: C.
    """

    def __init__(
        self, stages: tuple[tuple[int, int], ...], groups: int, classes: int, channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1, self.layer2, self.layer3 = three_stages(
            stages,
            lambda inside, outside: GroupedUnit(inside, outside, 2, groups),
            lambda width: GroupedUnit(width, width, 1, groups),
        )
        self.head = nn.Linear(stages[-1][0], classes)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of the three stages."""
        first = self.layer1(F.relu(self.bn1(self.conv1(images)), inplace=True))
        second = self.layer2(first)
        third = self.layer3(second)
        return third.mean((2, 3)), [first, second, third]


class SplitUnit(nn.Module):
    """V2: half of the channels stay, the others pass 1 x 1, 3 x 3 of each channel and 1 x 1; a shuffle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, width, H, W)` of `(N, width, H, W)`."""
        kept, y = x.chunk(2, 1)
        y = F.relu(self.bn1(self.conv1(y)), inplace=True)
        y = self.bn2(self.conv2(y))
        y = F.relu(self.bn3(self.conv3(y)), inplace=True)
        return shuffle(torch.cat((kept, y), 1), 2)


class DownUnit(nn.Module):
    """V2: two branches with stride 2, half of the new channels each; a shuffle."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        half = outside // 2
        self.conv1 = nn.Conv2d(inside, inside, 3, 2, 1, groups=inside, bias=False)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv2 = nn.Conv2d(inside, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(inside, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, outside, H / 2, W / 2)` of `(N, inside, H, W)`."""
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return shuffle(torch.cat((left, right), 1), 2)


class ShuffleNetV2(Network):
    """ShuffleNet V2.

    Args:
        stages: Channels and units of each stage, the one with stride 2 included.
        last: Channels of the last 1 x 1 convolution.
        classes: K.
        channels: C.
    """

    def __init__(
        self, stages: tuple[tuple[int, int], ...], last: int, classes: int, channels: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1, self.layer2, self.layer3 = three_stages(stages, DownUnit, SplitUnit)
        self.conv2 = nn.Conv2d(stages[-1][0], last, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(last)
        self.head = nn.Linear(last, classes)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of the three stages.

        What is pooled is one more convolution behind the last of them.
        """
        first = self.layer1(F.relu(self.bn1(self.conv1(images)), inplace=True))
        second = self.layer2(first)
        third = self.layer3(second)
        last = F.relu(self.bn2(self.conv2(third)), inplace=True)
        return last.mean((2, 3)), [first, second, third]
