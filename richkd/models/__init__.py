"""Students and task teachers by name.

Each network has `forward(images)`, which returns logits, `features(images)`, which returns what the linear
layer `head` sees, and `width`, the number of features.
"""

from difflib import get_close_matches

from torch import nn

from richkd.errors import ConfigError
from richkd.models.cnn import Cnn
from richkd.models.resnet import NARROW, X4, ResNet

RESNETS = {  # depth, channels
    "resnet8": (8, NARROW),
    "resnet14": (14, NARROW),
    "resnet20": (20, NARROW),
    "resnet32": (32, NARROW),
    "resnet44": (44, NARROW),
    "resnet56": (56, NARROW),
    "resnet110": (110, NARROW),
    "resnet8x4": (8, X4),
    "resnet32x4": (32, X4),
}
CNNS = {"cnn8": 8, "cnn16": 16, "cnn24": 24}  # channels of the first layer
NAMES = (*RESNETS, *CNNS)


def build(name: str, classes: int, *, channels: int = 3, shortcut: str = "B") -> nn.Module:
    """Return a network with fresh weights, drawn from PyTorch's global generator.

    Args:
        name: One of NAMES.
        classes: Number of logits.
        channels: Channels of the images.
        shortcut: Of ResNets: "B" is a 1 x 1 convolution, as in the distillation papers; "A" pads with
            zeros and has no parameters. Other networks have no shortcuts.

    Raises:
        ConfigError: If there is no such network or shortcut.
    """
    if shortcut not in ("A", "B"):
        raise ConfigError(
            f"student.shortcut and teacher.shortcut must be A or B but got {shortcut!r}."
        )
    if name in RESNETS:
        return ResNet(*RESNETS[name], classes, channels, shortcut)
    if name in CNNS:
        return Cnn(CNNS[name], classes, channels)
    near = get_close_matches(str(name), NAMES, 1)
    hint = f"did you mean {near[0]}?" if near else "take one of them."
    raise ConfigError(
        f"student.name and teacher.name must be one of {', '.join(NAMES)} but got {name!r}; {hint}"
    )
