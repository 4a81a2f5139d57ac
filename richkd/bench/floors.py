"""The least time that this machine allows: arithmetic, memory and launches, counted, over what it was measured to do.

    an image takes at least   FLOPs / FLOPs a second of a matrix product or a convolution
                              bytes / a copy's bytes a second
                              launches of a step / (batch x launches a second)

The largest of the three binds. Bytes are what no fusion of layers saves: each output of a convolution or a linear layer is
written and read once forward; in training it is read once more backward, and its gradient written and read.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

PASSES = {False: (2, 1), True: (5, 8)}  # over outputs and weights, of a look and of a training step
SECONDS = 0.25  # for each rate
SIDE = {"cpu": 1024, "cuda": 8192}  # of the matrices
ROWS = {"cpu": 64, "cuda": 4096}  # of the convolution
COPIED = 2**27  # bytes: more than stay in a cache
LAUNCHES = 1000  # in a graph
# by the counter itself; attention on a CPU does what it does on a GPU
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: (
        sdpa_flop_count(query, key, value)
    )
}
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a network does at least.

    Attributes:
        flops: Floating-point operations an image, two for a multiplication and an addition.
        outputs: Numbers an image that are moved: outputs of convolutions and linear layers, by how often each is.
        weights: Numbers a step that are moved: fp32 weights, with their gradients and momentum.
        launches: Operations a step that launch a kernel.
    """

    flops: int
    outputs: int
    weights: int
    launches: int


class Launches(TorchDispatchMode):
    """Counts the operations that compute something: no views, no bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        silent = operation.is_view or operation.__name__.startswith(("empty", "new_empty"))
        self.count += not silent
        return operation(*args, **(kwargs or {}))


def work(network: nn.Module, images: Tensor, *, training: bool) -> Work:
    """Return what `network` does in a look at `images` `(B, C, H, W)`, or in a step of SGD with momentum on them."""
    network = copy.deepcopy(network).train(training).requires_grad_(training)
    outputs = 0

    def seen(_module: nn.Module, _given: tuple, output: Tensor) -> None:
        nonlocal outputs
        outputs += output.numel()

    for module in network.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            module.register_forward_hook(seen)
    grouped = any(isinstance(each, _ConvNd) and each.groups > 1 for each in network.modules())
    flops, launches = FlopCounterMode(display=False, custom_mapping=UNCOUNTED), Launches()
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # in which attention is not counted
    with torch.enable_grad(), flops, launches:
        logits = network(images)
        forward = flops.get_total_flops()
        if training:
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, fused=True)
            F.cross_entropy(logits, logits.detach().argmax(1)).backward()
            optimizer.step()
    torch.backends.mha.set_fastpath_enabled(fast)
    # the counter takes the backward pass of a grouped convolution for one that is not
    total = 3 * forward if training and grouped else flops.get_total_flops()
    of_outputs, of_weights = PASSES[training]
    return Work(
        flops=total // len(images),
        outputs=of_outputs * outputs // len(images),
        weights=of_weights * sum(each.numel() for each in network.parameters()),
        launches=launches.count,
    )


def _fastest(once: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of some calls: what else the machine does slows down, never speeds up."""
    taken: list[float] = []
    once()
    while len(taken) < 3 or sum(taken) < SECONDS:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def rates(device: torch.device) -> dict[str, float | None]:
    """Measure what `device` does in a second.

    Returns:
        `fp32`, `tf32` and `bf16`: FLOPs of a matrix product or a convolution, whichever is faster; `copy`: bytes read and
        written; `launches`: kernels of a CUDA graph. Of a CPU `tf32` and `launches` are None.
    """
    found: dict[str, float | None] = {}
    for name, dtype in DTYPES.items():
        found[name] = None
        if name != "tf32" or device.type == "cuda":
            found[name] = _arithmetic(device, dtype, tf32=name == "tf32")
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy"] = 2 * COPIED / _fastest(lambda: target.copy_(source), device)
    found["launches"] = _launches(device) if device.type == "cuda" else None
    return found


def _arithmetic(device: torch.device, dtype: torch.dtype, *, tf32: bool) -> float:
    """Return the FLOPs a second of a square product or of a 3 x 3 convolution over small maps.

    Counted as all convolutions are, the latter does more: what its kernel would multiply with the padding is left out.
    """
    side, rows = SIDE[device.type], ROWS[device.type]
    a = torch.ones(side, side, dtype=dtype, device=device)
    out = torch.empty_like(a)
    maps = torch.ones(rows, 256, 8, 8, dtype=dtype, device=device)
    kernel = torch.ones(256, 256, 3, 3, dtype=dtype, device=device)
    maps, kernel = (each.to(memory_format=torch.channels_last) for each in (maps, kernel))
    before = torch.backends.cuda.matmul.allow_tf32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        product = 2 * side**3 / _fastest(lambda: torch.mm(a, a, out=out), device)
        convolution = _fastest(lambda: F.conv2d(maps, kernel, padding=1), device)
    torch.backends.cuda.matmul.allow_tf32 = before
    return max(product, 2 * 9 * kernel[:, :, 0, 0].numel() * rows * 64 / convolution)


def faster(one: dict[str, float | None], other: dict[str, float | None]) -> dict[str, float | None]:
    """Return the higher of two measurements of each rate."""
    return {name: one[name] and max(one[name], other[name]) for name in one}


def _launches(device: torch.device) -> float:
    value, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    value.add_(1)
    torch.cuda.synchronize(device)
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            value.add_(1)
    return LAUNCHES / _fastest(graph.replay, device)


def floor(
    parts: list[tuple[Work, str]], batch: int, rates: dict[str, float | None]
) -> dict[str, Any]:
    """Return the least seconds an image by each resource, the largest as images per second, and which that is.

    Args:
        parts: What is done for a batch, and in which precision, a name of DTYPES.
        batch: Images in it.
        rates: As `rates` returns them.
    """
    seconds = {
        "flops": sum(each.flops / rates[precision] for each, precision in parts),
        "bytes": sum(
            each.outputs * DTYPES[precision].itemsize + each.weights * 4 / batch
            for each, precision in parts
        )
        / rates["copy"],
    }
    if rates["launches"] is not None:
        seconds["launches"] = sum(each.launches for each, _ in parts) / batch / rates["launches"]
    binds = max(seconds, key=seconds.get)
    return seconds | {"images_per_second": 1 / seconds[binds], "binds": binds}
