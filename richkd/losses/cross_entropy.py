"""Cross-entropy with the labels that there are: unlabelled rows take no part."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor, labels: Tensor, labelled: int | Tensor, smoothing: float = 0.0
) -> Tensor:
    """Return the mean cross-entropy over the labelled rows of the global batch, 0 if it has none.

    Args:
        logits: Student logits, `(N, K)`.
        labels: `(N,)`; -1 marks an unlabelled row.
        labelled: Number of labelled rows in the global batch.
        smoothing: Share of each target that all classes have alike.
    """
    count = torch.as_tensor(labelled).clamp(min=1)
    total = F.cross_entropy(
        logits, labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing
    )
    return total / count
