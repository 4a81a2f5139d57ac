"""ResNet18 and ResNet50 for small images: four stages after a 3 x 3 convolution, no max-pooling.

The names of the submodules are RepDistiller's, whose weights load once their last layer is called `head`.
Shapes: N images of C channels, D features, K classes.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from richkd.models.network import Network, draw_convolutions
from richkd.models.resnet import make_shortcut

STAGES = (64, 128, 256, 512)  # channels of the 3 x 3 convolutions


class Basic(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, inside: int, middle: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, middle, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.shortcut = make_shortcut(inside, middle, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, middle, H / stride, W / stride)` of `(N, inside, H, W)`."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """A 3 x 3 convolution between 1 x 1 ones, the last of which has 4 times the channels; a shortcut."""

    expansion = 4

    def __init__(self, inside: int, middle: int, stride: int, shortcut: str) -> None:
        super().__init__()
        outside = self.expansion * middle
        self.conv1 = nn.Conv2d(inside, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.shortcut = make_shortcut(inside, outside, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, 4 middle, H / stride, W / stride)` of `(N, inside, H, W)`."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x), inplace=True)


class ImageNetResNet(Network):
    """A ResNet of four stages.

    Args:
        block: Basic or Bottleneck.
        repeats: Blocks of each stage.
        classes: K.
        channels: C.
        shortcut: "A" or "B", where the shape changes.
    """

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck],
        repeats: tuple[int, ...],
        classes: int,
        channels: int,
        shortcut: str,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, STAGES[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STAGES[0])
        inside, stages = STAGES[0], []
        for i, middle in enumerate(STAGES):
            outside = block.expansion * middle
            first = block(inside, middle, 1 if i == 0 else 2, shortcut)
            rest = (block(outside, middle, 1, shortcut) for _ in range(1, repeats[i]))
            stages.append(nn.Sequential(first, *rest))
            inside = outside
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.head = nn.Linear(inside, classes)
        draw_convolutions(self)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of the four stages."""
        first = self.layer1(F.relu(self.bn1(self.conv1(images)), inplace=True))
        second = self.layer2(first)
        third = self.layer3(second)
        fourth = self.layer4(third)
        return fourth.mean((2, 3)), [first, second, third, fourth]
