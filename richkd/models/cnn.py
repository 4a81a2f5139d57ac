"""Small networks for 8 x 8 digits: three convolutions, seconds of training on one core.

Shapes: N images of C channels, D features, K classes.
"""

from torch import Tensor, nn

from richkd.models.network import Network


class Cnn(Network):
    """Three 3 x 3 convolutions of `first`, twice and twice as many channels, the last two with stride 2.

    Args:
        first: Channels of the first convolution; D is twice that.
        classes: K.
        channels: C.
    """

    def __init__(self, first: int, classes: int, channels: int) -> None:
        super().__init__()
        width = 2 * first
        self.body = nn.Sequential(
            *_layer(channels, first, 1),
            *_layer(first, width, 2),
            *_layer(width, width, 2),
        )
        self.head = nn.Linear(width, classes)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of the three layers."""
        x, maps = images, []
        for module in self.body:
            x = module(x)
            if isinstance(module, nn.ReLU):
                maps.append(x)
        return x.mean((2, 3)), maps


def _layer(inside: int, outside: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
    return convolution, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
