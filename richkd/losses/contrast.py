"""Contrast of an image's features with those of other images: the loss of CRD, which RichKD takes for fused features.

Shapes: B rows of a batch, n rows of a bank, d numbers of an embedding, K negatives.
"""

import math

from torch import Tensor

EPS = 1e-7  # of the published loss


def similarities(embeddings: Tensor, bank: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """Return the scaled similarity `(B, K + 1)` of each embedding to the chosen rows of a bank.

    The product with the whole bank and then a gather: n / K times the arithmetic of a product with the chosen rows, three of
    CIFAR-100, but those would first be copied, a gigabyte a step at K 16,384, and that takes many times as long.

    Args:
        embeddings: Unit-norm, `(B, d)`.
        bank: Unit-norm but for rows not seen yet, `(n, d)`.
        chosen: Rows of the bank `(B, K + 1)`, the image's own first.
        temperature: By which similarities are divided.
    """
    return (embeddings @ bank.T).gather(1, chosen) / temperature


def contrast(similarity: Tensor, normaliser: Tensor, bank_rows: int, rows: int) -> Tensor:
    """Return the noise-contrastive loss of one side, mean over the global batch (Tian et al., 2020).

    With x = exp(similarity) / Z and c = K / n, `-log(x_0 / (x_0 + c)) - sum_k log(c / (x_k + c))`: which of the K + 1 rows is the
    image itself, and which are noise drawn evenly from the bank.

    Args:
        similarity: As `similarities` returns it, the positive first.
        normaliser: Z, a constant that is set once, from the first batch.
        bank_rows: n.
        rows: Number of rows in the global batch.
    """
    noise = (similarity.shape[1] - 1) / bank_rows
    scores = (similarity - normaliser.log()).exp()
    # each negative adds log(1 + x / c), small beside log c, of which as much again would have to cancel
    rises = ((scores + EPS) / noise).log1p().sum()
    own = similarity[:, 0] - normaliser.log() - math.log(noise)
    return (rises - own.sum()) / rows
