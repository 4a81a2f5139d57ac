"""Groups of rows: by what the task teacher says of them (Table 9 of the supplement), and by how frequent their class is.

The supplement names no threshold of what is certain, so its numbers cannot be had again to the row; `evaluate.certain`
says which one is meant, and each group has its number of rows beside it.
"""

import numpy as np
from torch import Tensor

HEAD, TAIL = 100, 20  # training images of a class: more make it head, fewer tail


def by_teacher(logits: Tensor, labels: Tensor, certain: float | str) -> dict[str, Tensor]:
    """Return of each row whether the teacher is right and certain of it, right and uncertain, or wrong.

    Args:
        logits: What the task teacher says of the images, un-augmented, `(N, K)`.
        labels: `(N,)`.
        certain: As `evaluate.certain`.

    Returns:
        `right_certain`, `right_uncertain`, `wrong`: `(N,)` bool each; every row is in one of them.
    """
    right, sure = logits.argmax(1) == labels, is_certain(logits, certain)
    return {"right_certain": right & sure, "right_uncertain": right & ~sure, "wrong": ~right}


def is_certain(logits: Tensor, certain: float | str) -> Tensor:
    """Return of each row of `logits` `(N, K)` whether it is certain of its first class, whether or not that is right.

    Args:
        logits: `(N, K)`.
        certain: The probability at T = 1 of the first class above which a row is certain; or `q0.2`: above that quantile of
            it over all rows.
    """
    top = logits.double().softmax(1).amax(1)
    if not isinstance(certain, str):
        return top > certain
    # of many rows torch has no quantile
    return top > float(np.quantile(top.cpu().numpy(), float(certain[1:])))


def by_frequency(labels: Tensor, trained: Tensor) -> dict[str, Tensor]:
    """Return of each row whether its class is frequent.

    Args:
        labels: `(N,)`.
        trained: Training images of each class, `(K,)`.

    Returns:
        `head` (more than HEAD), `medium` and `tail` (fewer than TAIL): `(N,)` bool each; every row is in one of them.
    """
    seen = trained[labels]
    head, tail = seen > HEAD, seen < TAIL
    return {"head": head, "medium": ~head & ~tail, "tail": tail}
