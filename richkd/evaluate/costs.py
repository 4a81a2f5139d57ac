"""What an answer of a network costs, apart from time: see `estimate.latency` for that."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def macs(network: nn.Module, image: Tensor) -> int:
    """Return the multiply-adds of one answer: those of convolutions, matrix products and attention.

    PyTorch counts two floating-point operations each, one to multiply and one to add; papers often call multiply-adds FLOPs.
    What is done element by element, such as normalisation, is not counted.

    Args:
        network: In eval mode.
        image: As it takes one, `(1, C, H, W)`.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # of the fused kernels of attention, those of the CPU are counted as nothing
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2
