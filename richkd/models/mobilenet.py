"""MobileNetV2 for small images: inverted residuals of half width, with ReLU in place of ReLU6.

The names of the submodules are RepDistiller's, whose weights load once their last layer is called `head`.
Shapes: N images of C channels, D features, K classes.
"""

from torch import Tensor, nn

from richkd.models.network import Network, draw_convolutions, draw_head

STEM, LAST = 32, 1280  # channels; the last ones are never scaled down
STAGES = (  # expanded?, channels, blocks, stride
    (False, 16, 1, 1),
    (True, 24, 2, 1),
    (True, 32, 3, 2),
    (True, 64, 4, 2),
    (True, 96, 3, 1),
    (True, 160, 3, 2),
    (True, 320, 1, 1),
)
LAST_OF_SIZE = (1, 2, 4, 6)  # of those rows: the next one has stride 2


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; a shortcut if the shape stays."""

    def __init__(self, inside: int, outside: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * inside
        self.conv = nn.Sequential(
            *_layer(inside, wide, 1),
            *_layer(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.residual = (inside, stride) == (outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, outside, H / stride, W / stride)` of `(N, inside, H, W)`."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(Network):
    """MobileNetV2.

    Args:
        expansion: How many times wider a block is inside.
        scale: Factor of all widths but the last.
        classes: K.
        channels: C.
    """

    def __init__(self, expansion: int, scale: float, classes: int, channels: int) -> None:
        super().__init__()
        inside = int(scale * STEM)
        self.conv1 = nn.Sequential(*_layer(channels, inside, 3, 2))
        stages = []
        for expanded, full, blocks, stride in STAGES:
            outside, stage = int(scale * full), []
            for i in range(blocks):
                stage.append(
                    InvertedResidual(
                        inside, outside, 1 if i else stride, expansion if expanded else 1
                    )
                )
                inside = outside
            stages.append(nn.Sequential(*stage))
        self.blocks = nn.Sequential(*stages)
        self.conv2 = nn.Sequential(*_layer(inside, LAST, 1))
        self.head = nn.Linear(LAST, classes)
        draw_convolutions(self)
        draw_head(self.head)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of four stages.

        They are the last blocks of each size, projections without ReLU; what is pooled is another convolution behind.
        """
        x, maps = self.conv1(images), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in LAST_OF_SIZE:
                maps.append(x)
        return self.conv2(x).mean((2, 3)), maps


def _layer(
    inside: int, outside: int, size: int, stride: int = 1, *, groups: int = 1
) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inside, outside, size, stride, size // 2, groups=groups, bias=False)
    return convolution, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
