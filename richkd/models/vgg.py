"""VGGs for small images: five blocks of 3 x 3 convolutions with norms, and one linear layer.

The names of the submodules are RepDistiller's, whose weights load once their last layer is called `head`.
Shapes: N images of C channels, D features, K classes.
"""

import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from richkd.models.network import Network, draw_convolutions, draw_head

WIDTHS = (64, 128, 256, 512, 512)  # channels of the blocks
LARGE = 64  # pixels from which the fourth block is pooled, too


class Vgg(Network):
    """A VGG with batch norms.

    Args:
        repeats: Convolutions of each block.
        classes: K.
        channels: C.
    """

    def __init__(self, repeats: tuple[int, ...], classes: int, channels: int) -> None:
        super().__init__()
        self.block0, self.block1, self.block2, self.block3, self.block4 = (
            _block(count, inside, outside)
            for count, inside, outside in zip(
                repeats, (channels, *WIDTHS[:-1]), WIDTHS, strict=True
            )
        )
        self.head = nn.Linear(WIDTHS[-1], classes)
        draw_convolutions(self)
        draw_head(self.head)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of four stages.

        They are the last four blocks, behind their ReLU and before they are pooled; the first block, of the images' own
        size, is the stem.
        """
        stem = F.relu(self.block0(images), inplace=True)
        first = F.relu(self.block1(F.max_pool2d(stem, 2)), inplace=True)
        second = F.relu(self.block2(F.max_pool2d(first, 2)), inplace=True)
        third = F.relu(self.block3(F.max_pool2d(second, 2)), inplace=True)
        fourth = F.relu(self.block4(_shrunk(third, images.shape[2])), inplace=True)
        return fourth.mean((2, 3)), [first, second, third, fourth]


@torch.fx.wrap  # a choice that stays one where the network is traced
def _shrunk(x: Tensor, side: int) -> Tensor:
    return F.max_pool2d(x, 2) if side >= LARGE else x


def _block(count: int, inside: int, outside: int) -> nn.Sequential:
    """Return `count` convolutions, each with its norm, and a ReLU between them."""
    layers: list[nn.Module] = []
    for i in range(count):
        if i:
            layers.append(nn.ReLU(inplace=True))
        layers += [
            nn.Conv2d(outside if i else inside, outside, 3, 1, 1),
            nn.BatchNorm2d(outside),
        ]
    return nn.Sequential(*layers)
