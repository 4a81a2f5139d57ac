"""Grad-CAM of any network of `models`: where in an image the evidence for a class lies (Selvaraju et al., 2017).

The maps themselves are captum's: beside grad-cam, which would bring OpenCV, it brings nothing that is not here already.
Which layer is looked at is found here, for networks of ours and of libraries alike: the last one whose output still has
places, on more than one of which the logits depend. Of a transformer that is classified by its class token that is the norm
ahead of the last attention, as is usual: of what comes behind it only the class token counts.

Shapes: N images of H x W pixels, K classes, a map of h x w places, L tokens of D numbers.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from richkd.errors import ConfigError
from richkd.precision import computed

LEAST = 3  # places along the shorter side of a map that shows where; fewer only if there is no such layer


class Layout(NamedTuple):
    """How the output of a layer is a map.

    Attributes:
        kind: `maps` `(N, C, h, w)`, `last` `(N, h, w, C)` or `tokens` `(N, prefix + h w, D)`.
        grid: h and w.
        prefix: Tokens, such as a class token, that lie nowhere.
    """

    kind: str
    grid: tuple[int, int]
    prefix: int = 0

    def to_map(self, output: Tensor) -> Tensor:
        """Return an output as `(N, C, h, w)`."""
        if self.kind == "maps":
            return output
        if self.kind == "last":
            return output.permute(0, 3, 1, 2)
        return output[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)

    def with_map(self, output: Tensor, seen: Tensor) -> Tensor:
        """Return an output whose places hold `seen` `(N, C, h, w)`."""
        if self.kind == "maps":
            return seen
        if self.kind == "last":
            return seen.permute(0, 2, 3, 1)
        tokens = seen.flatten(2).transpose(1, 2)
        return torch.cat([output[:, : self.prefix], tokens], 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """A layer at which a network is looked at.

    Attributes:
        name: In the network.
        call: Which of its calls in a pass, from 0.
        layout: Of its output.
    """

    name: str
    call: int
    layout: Layout


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cam:
    """What Grad-CAM found.

    Attributes:
        maps: `(N, h, w)` on the CPU, from 0 to 1; each is scaled by its own maximum, and one without evidence is 0.
        logits: Of the same images, `(N, K)` on the CPU.
        layer: Where.
    """

    maps: Tensor
    logits: Tensor
    layer: Layer


def grad_cam(network: nn.Module, images: Tensor, classes: Tensor) -> Cam:
    """Return where the evidence for some classes lies: relu of the channels' mean gradients times the channels, summed.

    The network is left as it was: its mode, its gradients and its hooks.

    Args:
        network: Returns logits `(N, K)`.
        images: `(N, C, H, W)`, normalised, on the network's device.
        classes: For which of the classes, `(N,)`.

    Raises:
        ConfigError: If the network has no layer with places.
    """
    from captum.attr import LayerGradCam

    training = network.training
    network.eval()
    try:
        with torch.enable_grad(), computed(images.device, "fp32"):
            images = images.detach().clone().requires_grad_()
            layer, seen = find_layer(network, images[:1]), nn.Identity()
            with tapped(network, layer, seen):
                maps = LayerGradCam(network, seen).attribute(
                    images, classes.to(images.device), relu_attributions=True
                )
            logits = network(images)
    finally:
        network.train(training)
    maps = maps.detach().squeeze(1).double().cpu()
    highest = maps.amax((1, 2), keepdim=True)
    scaled = torch.where(highest > 0, maps / highest.clamp_min(1e-300), 0)
    return Cam(maps=scaled, logits=logits.detach().float().cpu(), layer=layer)


def find_layer(network: nn.Module, image: Tensor) -> Layer:
    """Return the last layer whose output has places, on more than one of which the logits depend.

    Args:
        network: In eval mode.
        image: `(1, C, H, W)`, with a gradient, since frozen weights have none.

    Raises:
        ConfigError: If there is none.
    """
    size, calls, found = tuple(image.shape[2:]), dict[str, int](), list[tuple[Layer, Tensor]]()

    def watch(name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            call = calls[name] = calls.get(name, -1) + 1
            layout = layout_of(module, output, size)
            if layout is not None:
                found.append((Layer(name=name, call=call, layout=layout), output))

        return module.register_forward_hook(hook)

    handles = [watch(name, module) for name, module in network.named_modules() if name]
    try:
        score = network(image).max()
    finally:
        for handle in handles:
            handle.remove()
    known = [(layer, output) for layer, output in found if output.requires_grad]
    outputs = [image, *(output for _, output in known)]
    slopes = torch.autograd.grad(score, outputs, allow_unused=True)[1:]
    seen = [
        layer
        for (layer, _), slope in zip(known, slopes, strict=True)
        if slope is not None and (layer.layout.to_map(slope) != 0).any(1).sum() > 1
    ]
    large = [layer for layer in seen if min(layer.layout.grid) >= LEAST]
    if not seen:
        raise ConfigError(
            f"Grad-CAM needs a layer with places but {type(network).__name__} shows none for images of {size[0]} x {size[1]} "
            "pixels; take another network, or larger images."
        )
    return (large or seen)[-1]


def layout_of(module: nn.Module, output: Any, size: tuple[int, int]) -> Layout | None:
    """Return how the output of a module is a map of an image of `size` pixels, None if it is none.

    Of tokens only those behind a norm are one, as of the many things that attention makes no other is; what was pooled is none.
    """
    kind = type(module).__name__.lower()
    if not isinstance(output, Tensor) or "pool" in kind:
        return None
    if output.dim() == 4:
        for name, (height, width) in (("maps", output.shape[2:]), ("last", output.shape[1:3])):
            alike = abs(height * size[1] - width * size[0]) < max(size)  # but for rounding
            if alike and height * width > 1:
                return Layout(name, (height, width))
    elif output.dim() == 3 and "norm" in kind:
        for prefix in range(output.shape[1] - 1):
            places = output.shape[1] - prefix
            height = round((places * size[0] / size[1]) ** 0.5)
            width = round(height * size[1] / size[0])
            if height * width == places:
                return Layout("tokens", (height, width), prefix)
    return None


@contextlib.contextmanager
def tapped(network: nn.Module, layer: Layer, seen: nn.Module) -> Iterator[None]:
    """Pass the output of a layer, as a map, through `seen` inside the context, so that there is a module to look at."""
    calls = 0

    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls != layer.call + 1:
            return None
        return layer.layout.with_map(output, seen(layer.layout.to_map(output)))

    handle = network.get_submodule(layer.name).register_forward_hook(hook)

    def begin(_module: nn.Module, _inputs: Any) -> None:
        nonlocal calls
        calls = 0

    first = network.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()
        first.remove()
