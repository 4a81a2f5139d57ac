"""ResNets for small images: three stages, from 16 x 16 convolutions up to the x4 widths of distillation papers.

Depth is 6 n + 2. `resnetNx4` has a stem of 32 and stages of 64, 128 and 256 channels, so its first stage
widens, too. Shapes: N images of C channels, D features, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from richkd.models.network import Network, draw_convolutions

NARROW, X4 = (16, 16, 32, 64), (32, 64, 128, 256)  # stem and stages


class Pad(nn.Module):
    """Shortcut A: every `stride`-th pixel, zeros for the new channels; no parameters (He et al., 2015)."""

    def __init__(self, new: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = new // 2, new - new // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, C + new, H / stride, W / stride)` of `(N, C, H, W)`."""
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, self.before, self.after))


def make_shortcut(inside: int, outside: int, stride: int, shortcut: str) -> nn.Module:
    """Return the identity, or shortcut "A" or "B" where the shape changes."""
    if (inside, stride) == (outside, 1):
        return nn.Identity()
    if shortcut == "A":
        return Pad(outside - inside, stride)
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, which is the identity unless shape changes."""

    def __init__(self, inside: int, outside: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = make_shortcut(inside, outside, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, outside, H / stride, W / stride)` of `(N, inside, H, W)`."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x), inplace=True)


class ResNet(Network):
    """A ResNet of `depth` layers.

    Args:
        depth: 6 n + 2 layers.
        widths: Channels of the stem and of the three stages.
        classes: K.
        channels: C.
        shortcut: "A" or "B", where the shape changes.
    """

    def __init__(
        self, depth: int, widths: tuple[int, ...], classes: int, channels: int, shortcut: str
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                Block(widths[i], widths[i + 1], 1 if i == 0 else 2, shortcut),
                *(
                    Block(widths[i + 1], widths[i + 1], 1, shortcut)
                    for _ in range(1, (depth - 2) // 6)
                ),
            )
            for i in range(3)
        )
        self.head = nn.Linear(widths[-1], classes)
        draw_convolutions(self)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of the three stages."""
        first = self.layer1(F.relu(self.bn1(self.conv1(images)), inplace=True))
        second = self.layer2(first)
        third = self.layer3(second)
        return third.mean((2, 3)), [first, second, third]
