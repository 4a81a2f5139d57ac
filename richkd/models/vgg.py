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

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)`."""
        x = images
        for block in (self.block0, self.block1, self.block2):
            x = F.max_pool2d(F.relu(block(x), inplace=True), 2)
        x = F.relu(self.block3(x), inplace=True)
        x = _shrunk(x, images.shape[2])
        return F.relu(self.block4(x), inplace=True).mean((2, 3))


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
