"""What every network offers, and how convolutions of the distillation papers start.

Shapes: N images of C channels, D features, K classes.
"""

import torch
from torch import Tensor, nn

from richkd.errors import ConfigError


class Network(nn.Module):
    """A body that yields pooled `features` and the linear layer `head` on them."""

    head: nn.Linear

    @property
    def width(self) -> int:
        """Return D, the number of features."""
        return self.head.in_features

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of the stages, in one pass.

        Returns:
            Features, and of each stage, from the first to the last, a map `(N, C_i, H_i, W_i)`. A stem is no stage.

        Raises:
            ConfigError: If the network does not tell them.
        """
        raise untold(self)

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)`."""
        return self.staged(images)[0]

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, K)` of `images` `(N, C, H, W)`."""
        return self.head(self.features(images))


def untold(network: nn.Module) -> ConfigError:
    """Return what to raise where outputs of the stages of `network` are asked for and not told."""
    return ConfigError(
        f"the methods at, lg and autokd compare the outputs of stages, which {type(network).__name__} does not tell; "
        "take a network of ours or another timm/NAME."
    )


@torch.no_grad()
def check_size(network: nn.Module, channels: int, size: tuple[int, int], *, field: str) -> None:
    """Raise ConfigError unless `network` takes images of `channels` x `size`; it is left as it is.

    Args:
        network: On the CPU.
        channels: C.
        size: H and W.
        field: Config key that the network comes from, for the message.
    """
    training = network.training
    try:
        network.eval()(torch.zeros(1, channels, *size))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:  # each has its own
        raise ConfigError(
            f"{field}: the network must take images of {size[0]} x {size[1]} pixels but does not "
            f"({' '.join(str(error).split())[:200]}); take another, or larger images."
        ) from error
    finally:
        network.train(training)


@torch.no_grad()
def stage_shapes(network: nn.Module, image: Tensor) -> tuple[tuple[int, int, int], ...]:
    """Return channels, height and width of the output of each stage for one `image` `(1, C, H, W)`; nothing is changed."""
    training = network.training
    _, outputs = network.eval().staged(image)
    network.train(training)
    return tuple(tuple(each.shape[1:]) for each in outputs)


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
