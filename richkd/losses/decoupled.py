"""Decoupled distillation: the target class and the others among themselves, each with a weight of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dkd(
    logits: Tensor,
    target: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    beta: float,
    rows: int,
) -> Tensor:
    """Return `T^2 (alpha TCKD + beta NCKD)`, mean over the global batch (Zhao et al., 2022).

    TCKD is the divergence of the two probabilities of the target class and of all others, NCKD that of the others among
    themselves. The target class of a row is its label, and where there is none the one that the teacher thinks likeliest.

    Args:
        logits: Student logits, `(N, K)`.
        target: Log-probabilities of the teacher at the same temperature, `(N, K)`.
        labels: `(N,)`; -1 marks an unlabelled row.
        temperature: T > 0.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        rows: Number of rows in the global batch.
    """
    own = torch.where(labels >= 0, labels, target.argmax(1))
    is_own = F.one_hot(own, logits.shape[1]).bool()
    student = F.log_softmax(logits / temperature, 1)
    divergence = alpha * F.kl_div(
        _binary(student, own, is_own),
        _binary(target, own, is_own),
        reduction="sum",
        log_target=True,
    )
    divergence = divergence + beta * F.kl_div(
        _others(student, is_own), _others(target, is_own), reduction="sum", log_target=True
    )
    return temperature**2 * divergence / rows


def _binary(log_probs: Tensor, own: Tensor, is_own: Tensor) -> Tensor:
    """Return the log-probabilities `(N, 2)` of the target class and of all others together."""
    others = log_probs.masked_fill(is_own, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_probs.gather(1, own[:, None]), others], 1)


def _others(log_probs: Tensor, is_own: Tensor) -> Tensor:
    """Return the log-probabilities `(N, K)` of the other classes given that it is none but them; 0 for the target class."""
    left = log_probs.masked_fill(is_own, -torch.inf)
    return (log_probs - left.logsumexp(1, keepdim=True)).masked_fill(is_own, 0.0)
