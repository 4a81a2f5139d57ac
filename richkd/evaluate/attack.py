"""Images changed a little so that a network errs: FGSM and PGD.

Goodfellow et al., "Explaining and Harnessing Adversarial Examples", 2015; Madry et al., "Towards Deep Learning Models Resistant to
Adversarial Attacks", 2018. Distances are L-infinity in grey levels: `eps` 8 is the 8/255 of the literature.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 8.0  # grey levels
STEPS = 10


def fgsm(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, eps: float = EPS
) -> Tensor:
    """Return images one step of `eps` up the loss; see `pgd`."""
    pixels = images.float()
    return _step(logits_of, pixels, pixels, labels, eps, eps)


def pgd(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    eps: float = EPS,
    steps: int = STEPS,
    seed: int = 0,
) -> Tensor:
    """Return images some steps up the loss, from a random start, within `eps` of the given ones.

    A step is 2.5 eps / steps, as Madry et al. take it: the 2/255 of the literature at 8/255 and ten steps.

    Args:
        logits_of: Gives the logits `(N, K)` of float pixels in 0 to 255; a network in eval mode, with its normalisation. The
            gradients of its weights are left alone.
        images: uint8 `(N, C, H, W)`.
        labels: `(N,)`.
        eps: Grey levels by which a pixel may change.
        steps: How many.
        seed: Of the start.

    Returns:
        Float `(N, C, H, W)` in 0 to 255; not rounded, as attacks are compared.
    """
    pixels = images.float()
    start = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(seed))
    found = (pixels + eps * (2 * start.to(pixels.device) - 1)).clamp(0, 255)
    for _ in range(steps):
        found = _step(logits_of, found, pixels, labels, eps, 2.5 * eps / steps)
    return found


def _step(
    logits_of: Callable[[Tensor], Tensor],
    found: Tensor,
    pixels: Tensor,
    labels: Tensor,
    eps: float,
    step: float,
) -> Tensor:
    """Return `found` a step up the loss, kept within `eps` of `pixels` and in the range of a pixel."""
    with torch.enable_grad():
        found = found.detach().requires_grad_()
        loss = F.cross_entropy(logits_of(found), labels, reduction="sum")
        (slope,) = torch.autograd.grad(loss, found)
    moved = found.detach() + step * slope.sign()
    return torch.clamp(moved, pixels - eps, pixels + eps).clamp(0, 255)
