"""Networks of timm and torchvision with the interface of ours, fresh or with their published weights.

A library is imported when one of its networks is asked for. Shapes: N images of C channels, D features, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from richkd.errors import ConfigError
from richkd.models.network import Network, untold

PREFIXES = ("timm/", "torchvision/")
FIELDS = "student.name and teacher.name"
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # classifiers that torchvision adds for training
WITHOUT_AUXILIARY: dict[str, Any] = {"aux_logits": False, "init_weights": True}
OPTIONS = {"googlenet": WITHOUT_AUXILIARY, "inception_v3": WITHOUT_AUXILIARY}
STEM = 4  # times that images are smaller behind what these libraries count as a network's stem
PUBLISHED = (
    "fc",
    "linear",
    "classifier.0",
    "classifier",
)  # last layers in RepDistiller and mdistiller


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """What the images of a network must be like, None where that is not known.

    Attributes:
        mean: Subtracted from channels in 0 to 1.
        std: Then they are divided by it.
        size: Pixels of a side.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None


class LibraryNetwork(Network):
    """A library's network, cut before its last linear layer.

    Args:
        body: The network, which is changed: the identity takes the place of its classifier.
        classifier: Name of the linear layer in `body`.
    """

    def __init__(self, body: nn.Module, classifier: str) -> None:
        super().__init__()
        head = body.get_submodule(classifier)
        assert isinstance(head, nn.Linear)
        body.set_submodule(classifier, nn.Identity())
        self.body, self.head, self.classifier = body, head, classifier
        self.stages = _stages(body)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)` and the outputs of the stages.

        Of a network whose maps shrink these are its stages from a quarter of the image's side on, before any last
        convolution or norm; of one of tokens the first, the middle and the last block, each token in its place and
        without class token.

        Raises:
            ConfigError: Of torchvision's networks, and the few of timm's that do not tell them.
        """
        if not self.stages:
            raise untold(self.body)
        x, maps = self.body.forward_intermediates(images, indices=self.stages)
        return self.body.forward_head(x), maps  # whose last layer is the identity

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)`.

        Raises:
            ConfigError: If the body returns something else.
        """
        features = self.body(images)
        if not isinstance(features, Tensor) or features.shape[1:] != (self.width,):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise ConfigError(
                f"{FIELDS}: a network must return features of shape (images, {self.width}) before {self.classifier} "
                f"but {type(self.body).__name__} returned {found}; take another network."
            )
        return features


def build(name: str, classes: int, channels: int) -> Network:
    """Return the network `timm/NAME` or `torchvision/NAME` with fresh weights.

    Args:
        name: The library, a slash and its name of the network; timm's may end in `.TAG`.
        classes: K.
        channels: C.

    Raises:
        ConfigError: If there is no such network, or it does not fit the interface.
    """
    library, _, bare = name.partition("/")
    if library == "timm":
        try:
            return _timm(bare, num_classes=classes, in_chans=channels)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{FIELDS}: timm cannot build {bare} for {classes} classes and images of {channels} channels "
                f"({_line(error)}); take another network."
            ) from error
    if channels != 3:
        raise ConfigError(
            f"{FIELDS}: networks of torchvision take images of 3 channels but the images have {channels}; "
            "take timm/NAME or a network of ours."
        )
    return _torchvision(bare, classes)


def pretrained(name: str, tag: str = "") -> tuple[Network, Preprocessing]:
    """Return a network with its published weights and its own classes, and what its images must be like.

    Args:
        name: `timm/NAME` or `torchvision/NAME`.
        tag: Which weights: timm's tag or a member of torchvision's enumeration; "" is the library's default.

    Raises:
        ConfigError: If there is no such network, no such weights, or they cannot be loaded.
    """
    if not name.startswith(PREFIXES):
        raise ConfigError(
            f"teacher.name with published weights must be timm/NAME or torchvision/NAME but got {name!r}; "
            "give teacher.checkpoint=FILE for another network."
        )
    library, _, bare = name.partition("/")
    try:
        if library == "timm":
            return _pretrained_timm(bare, tag)
        return _pretrained_torchvision(bare, tag)
    except ConfigError:
        raise
    except Exception as error:  # of the network, the server, the disk or the file: all end the same
        raise ConfigError(
            f"teacher.pretrained: the {tag or 'default'} weights of {name} could not be loaded ({_line(error)}); "
            "download them on a machine with internet and give teacher.checkpoint=FILE."
        ) from error


def own_names(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `weights` under the names of `network`; tensors are not copied.

    Args:
        network: What `build` or `pretrained` returned.
        weights: Under names of the library, or for networks of ours of RepDistiller and mdistiller; names that
            are the network's already stay.
    """
    if weights.keys() == network.state_dict().keys():
        return weights
    if isinstance(network, LibraryNetwork):
        last, prefix = (network.classifier,), "body."
        weights = {key: value for key, value in weights.items() if not key.startswith(AUXILIARY)}
    else:
        last, prefix = PUBLISHED, ""
    heads = {f"{layer}.{end}": f"head.{end}" for layer in last for end in ("weight", "bias")}
    return {heads.get(key, prefix + key): value for key, value in weights.items()}


def _timm(name: str, **options: Any) -> Network:
    import timm

    architecture = timm.models.get_arch_name(name)
    _check_name("timm", architecture, timm.list_models())
    if name != architecture:
        _check_name("timm", name, timm.list_models(f"{architecture}.*", pretrained=True))
    body = timm.create_model(name, **options)
    head = body.get_classifier() if hasattr(body, "get_classifier") else None
    # VOLO adds the logits of a second layer
    if isinstance(head, nn.Linear) and getattr(body, "aux_head", None) is None:
        layer = next(layer for layer, module in body.named_modules() if module is head)
        return LibraryNetwork(body, layer)
    raise _no_head(f"timm/{name}")


def _stages(body: nn.Module) -> list[int]:
    """Return which of the outputs that timm knows of `body` are told; none of other networks."""
    if not hasattr(body, "forward_intermediates"):
        return []
    shrunk = [stage["reduction"] for stage in body.feature_info]
    if len(set(shrunk)) == 1:
        return [0, len(shrunk) // 2, len(shrunk) - 1]
    return [i for i, times in enumerate(shrunk) if times >= STEM]


def _torchvision(name: str, classes: int, **options: Any) -> Network:
    from torchvision import models

    _check_name("torchvision", name, models.list_models(module=models))
    if name.startswith("mnasnet"):
        raise ConfigError(
            f"{FIELDS}: torchvision/{name} reads only weights with a version beside them, which checkpoints do not "
            "keep; take another network."
        )
    options |= OPTIONS.get(name, {})
    body = models.get_model(name, weights=None, num_classes=classes, **options)
    layers = [
        (layer, module) for layer, module in body.named_modules() if isinstance(module, nn.Linear)
    ]
    if not layers or layers[-1][1].out_features != classes:
        raise _no_head(f"torchvision/{name}")
    return LibraryNetwork(body, layers[-1][0])


def _pretrained_timm(name: str, tag: str) -> tuple[Network, Preprocessing]:
    import timm

    network = _timm(f"{name}.{tag}" if tag else name, pretrained=True)
    wanted = timm.data.resolve_model_data_config(network.body)
    return network, Preprocessing(
        mean=tuple(wanted["mean"]), std=tuple(wanted["std"]), size=wanted["input_size"][-1]
    )


def _pretrained_torchvision(name: str, tag: str) -> tuple[Network, Preprocessing]:
    from torchvision import models

    _check_name("torchvision", name, models.list_models(module=models))
    choices = models.get_model_weights(name)
    if tag and tag not in choices.__members__:
        raise ConfigError(
            f"teacher.pretrained: the weights of torchvision/{name} must be one of {', '.join(choices.__members__)} "
            f"but got {tag!r}; take one of them."
        )
    weights = choices[tag] if tag else choices.DEFAULT
    # networks with auxiliary classifiers were trained on otherwise scaled images, which they scale themselves
    options = {"transform_input": True} if name in OPTIONS else {}
    network = _torchvision(name, len(weights.meta["categories"]), **options)
    loaded = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    network.load_state_dict(own_names(network, loaded))
    wanted = weights.transforms()
    return network, Preprocessing(
        mean=tuple(wanted.mean), std=tuple(wanted.std), size=wanted.crop_size[0]
    )


def _check_name(library: str, name: str, names: Sequence[str]) -> None:
    """Raise ConfigError with the nearest of `names` unless `name` is one of them."""
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = (
            f"did you mean {library}/{near[0]}?"
            if near
            else f"{library}.models.list_models() names them."
        )
        raise ConfigError(f"{FIELDS}: {library} has no network {name!r}; {hint}")


def _no_head(name: str) -> ConfigError:
    return ConfigError(
        f"{FIELDS}: a network must end in one linear layer but {name} does not; take another network."
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
