"""What every network offers, and how convolutions of the distillation papers start.

Shapes: N images of C channels, D features, K classes.
"""

from torch import Tensor, nn


class Network(nn.Module):
    """A body that yields pooled `features` and the linear layer `head` on them."""

    head: nn.Linear

    @property
    def width(self) -> int:
        """Return D, the number of features."""
        return self.head.in_features

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)`."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, K)` of `images` `(N, C, H, W)`."""
        return self.head(self.features(images))


def draw_convolutions(network: nn.Module) -> None:
    """Draw weights with standard deviation sqrt(2 / (k k out)) (He et al., fan-out); biases are 0."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def draw_head(head: nn.Linear) -> None:
    """Draw weights with standard deviation 0.01; biases are 0."""
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
