"""Wide ResNets for small images: pre-activation blocks in three stages (Zagoruyko and Komodakis, 2016).

Depth is 6 n + 4; `wrn_DEPTH_WIDTH` has stages of 16, 32 and 64 times WIDTH channels after a stem of 16. The names
of the submodules are RepDistiller's, whose weights load once their last layer is called `head`. Shapes: N images of
C channels, D features, K classes.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from richkd.models.network import Network, draw_convolutions

STEM = 16  # channels


class Block(nn.Module):
    """Norm, ReLU and a 3 x 3 convolution, twice, and a shortcut: 1 x 1 of the first ReLU if widths differ."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.convShortcut = None
        if inside != outside:
            self.convShortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, outside, H / stride, W / stride)` of `(N, inside, H, W)`."""
        active = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True)) + shortcut


class Wrn(Network):
    """A wide ResNet of `depth` layers.

    Args:
        depth: 6 n + 4 layers.
        factor: How many times 16, 32 and 64 channels the stages have.
        classes: K.
        channels: C.
    """

    def __init__(self, depth: int, factor: int, classes: int, channels: int) -> None:
        super().__init__()
        widths = (STEM, *(factor * STEM * 2**i for i in range(3)))
        self.conv1 = nn.Conv2d(channels, STEM, 3, 1, 1, bias=False)
        self.block1, self.block2, self.block3 = (
            _stage((depth - 4) // 6, widths[i], widths[i + 1], 1 if i == 0 else 2) for i in range(3)
        )
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        draw_convolutions(self)
        nn.init.zeros_(self.head.bias)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of the three stages.

        The last is what is pooled, behind the norm and ReLU at the end; the others are sums, before the next stage's.
        """
        first = self.block1(self.conv1(images))
        second = self.block2(first)
        third = F.relu(self.bn1(self.block3(second)), inplace=True)
        return third.mean((2, 3)), [first, second, third]


def _stage(blocks: int, inside: int, outside: int, stride: int) -> nn.Module:
    rest = (Block(outside, outside, 1) for _ in range(1, blocks))
    return nn.Sequential(OrderedDict(layer=nn.Sequential(Block(inside, outside, stride), *rest)))
