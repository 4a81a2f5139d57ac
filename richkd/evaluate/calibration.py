"""Whether a network is as often right as it is sure: the expected calibration error.

Guo et al., "On Calibration of Modern Neural Networks", 2017. A softmax at T = 1 is taken; scaling the logits changes what is
found here and not top-1. The negative log-likelihood beside it is `accuracy`'s `loss`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15  # as in that paper


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows of about the same confidence.

    Attributes:
        low: Percent; their confidence is above.
        high: Percent; their confidence is at most this.
        n: How many they are, at least 1.
        confidence: Their mean probability of the first class, percent.
        accuracy: Their top-1, percent.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How sure and how right the rows are, by confidence.

    Attributes:
        ece: Expected calibration error, percent: the mean over rows of their bin's `|accuracy - confidence|`.
        confidence: Mean probability of the first class, percent; above top-1 a network is too sure.
        bins: Those that hold rows, from the least confident one.
    """

    ece: float
    confidence: float
    bins: tuple[Bin, ...]


def calibration(logits: Tensor, labels: Tensor, bins: int = BINS) -> Calibration:
    """Return how well the probabilities of the first class fit the accuracy, in float64.

    Args:
        logits: `(N, K)`, N at least 1.
        labels: `(N,)`.
        bins: Equal parts of 0 to 100 % of confidence. Each holds its upper edge, so that a row that is entirely sure is in the
            last one.

    Returns:
        Of a row that is not finite nothing can be said, and all is NaN, as `accuracy`'s `loss` is.
    """
    top, first = logits.double().softmax(1).max(1)
    right = (first == labels).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    own = torch.bucketize(top, edges[1:-1])
    found, gap = [], 0.0
    for k in own.unique().tolist():
        rows = own == k
        n, confidence = int(rows.sum()), 100 * top[rows].mean().item()
        accuracy = 100 * right[rows].mean().item()
        gap += n * abs(accuracy - confidence)
        found.append(Bin(100 * k / bins, 100 * (k + 1) / bins, n, confidence, accuracy))
    return Calibration(gap / len(labels), 100 * top.mean().item(), tuple(found))
