"""Students and task teachers by name.

Each network has `forward(images)`, which returns logits, `features(images)`, which returns what the linear
layer `head` sees, `staged(images)`, which returns the outputs of its stages beside them, and `width`, the number of
features.
"""

from difflib import get_close_matches
from typing import Any

from richkd.errors import ConfigError
from richkd.models import library
from richkd.models.cnn import Cnn
from richkd.models.mobilenet import MobileNetV2
from richkd.models.network import Network, check_size, stage_shapes
from richkd.models.pvt import Pvt
from richkd.models.resnet import NARROW, X4, ResNet
from richkd.models.resnet_imagenet import Basic, Bottleneck, ImageNetResNet
from richkd.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from richkd.models.t2t import T2t
from richkd.models.vgg import Vgg
from richkd.models.vit import Deit, Pit
from richkd.models.wrn import Wrn

NETWORKS: dict[str, tuple[Any, ...]] = {  # class and its first arguments
    "resnet8": (ResNet, 8, NARROW),
    "resnet14": (ResNet, 14, NARROW),
    "resnet20": (ResNet, 20, NARROW),
    "resnet32": (ResNet, 32, NARROW),
    "resnet44": (ResNet, 44, NARROW),
    "resnet56": (ResNet, 56, NARROW),
    "resnet110": (ResNet, 110, NARROW),
    "resnet8x4": (ResNet, 8, X4),
    "resnet32x4": (ResNet, 32, X4),
    "resnet18": (ImageNetResNet, Basic, (2, 2, 2, 2)),
    "resnet50": (ImageNetResNet, Bottleneck, (3, 4, 6, 3)),
    "wrn_16_1": (Wrn, 16, 1),
    "wrn_16_2": (Wrn, 16, 2),
    "wrn_40_1": (Wrn, 40, 1),
    "wrn_40_2": (Wrn, 40, 2),
    "vgg8": (Vgg, (1, 1, 1, 1, 1)),
    "vgg11": (Vgg, (1, 1, 2, 2, 2)),
    "vgg13": (Vgg, (2, 2, 2, 2, 2)),
    "vgg16": (Vgg, (2, 2, 3, 3, 3)),
    "vgg19": (Vgg, (2, 2, 4, 4, 4)),
    "mobilenetv2": (MobileNetV2, 6, 0.5),
    "shufflenetv1": (ShuffleNetV1, ((240, 4), (480, 8), (960, 4)), 3),
    "shufflenetv2": (ShuffleNetV2, ((116, 4), (232, 8), (464, 4)), 1024),
    "deit_ti": (Deit,),
    "pit_ti": (Pit,),
    "t2t_vit_7": (T2t,),
    "pvt_ti": (Pvt,),
    "cnn8": (Cnn, 8),
    "cnn16": (Cnn, 16),
    "cnn24": (Cnn, 24),
}
NAMES = tuple(NETWORKS)

__all__ = ["NAMES", "NETWORKS", "Network", "build", "check_size", "stage_shapes"]


def build(
    name: str,
    classes: int,
    *,
    channels: int = 3,
    size: tuple[int, int] = (224, 224),
    shortcut: str = "B",
) -> Network:
    """Return a network with fresh weights, drawn from PyTorch's global generator.

    Args:
        name: One of NAMES, or `timm/NAME` or `torchvision/NAME`, a network of those libraries.
        classes: Number of logits.
        channels: Channels of the images.
        size: Their height and width, of which transformers in NAMES know the places; all others take what comes.
        shortcut: Of ResNets in NAMES: "B" is a 1 x 1 convolution, as in the distillation papers; "A" pads
            with zeros and has no parameters. Other networks have no such choice.

    Raises:
        ConfigError: If there is no such network or shortcut, or it does not fit the interface.
    """
    if shortcut not in ("A", "B"):
        raise ConfigError(
            f"student.shortcut and teacher.shortcut must be A or B but got {shortcut!r}."
        )
    if name in NETWORKS:
        kind, *arguments = NETWORKS[name]
        shortcuts = (shortcut,) if kind in (ResNet, ImageNetResNet) else ()
        sizes = (tuple(size),) if kind in (Deit, Pit, T2t, Pvt) else ()
        return kind(*arguments, classes, channels, *shortcuts, *sizes)
    if str(name).startswith(library.PREFIXES):
        return library.build(name, classes, channels)
    near = get_close_matches(str(name), NAMES, 1)
    hint = f"did you mean {near[0]}?" if near else "take one of them."
    raise ConfigError(
        f"student.name and teacher.name must be one of {', '.join(NAMES)}, timm/NAME or torchvision/NAME "
        f"but got {name!r}; {hint}"
    )
