"""Test images picked by what fusion did to them, as in Figures 1 and 8 of the paper.

Shapes: M test rows, K classes.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from richkd.evaluate.outcomes import BOTH_WRONG, FROM_OUTSIDE, HARMED, REPAIRED, TOP

CLASSES = 3  # most probable ones of each teacher that are drawn
LEAST = 0.01  # probability below which a class is drawn only if it is the true one, or to fill
FILLED = 4  # classes that are drawn at least

OUTCOMES = {
    REPAIRED: ("Repaired", "the task teacher is wrong, the fused teacher right"),
    FROM_OUTSIDE: (
        f"Repaired from outside the first {TOP}",
        f"the true class is not among the task teacher's first {TOP}, the fused teacher is right",
    ),
    HARMED: ("Harmed", "the task teacher is right, the fused teacher wrong"),
    BOTH_WRONG: ("Both wrong", "the task teacher and the fused teacher are wrong"),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """A test row and what the teachers say of it.

    Attributes:
        row: Among the test rows.
        label: Its true class.
        shares: By teacher, probabilities `(K,)` at T = 1.
        classes: Those that are drawn, the fused teacher's most probable first.
    """

    row: int
    label: int
    shares: dict[str, Tensor]
    classes: tuple[int, ...]


def pick(which: dict[str, Tensor], most: int, seed: int) -> dict[str, list[int]]:
    """Return by outcome at most so many of its rows, drawn by a seed and in their order.

    A row is drawn for the rarest of its outcomes, and for another only where that has too few.
    """
    taken, found = set[int](), dict[str, list[int]]()
    for name in sorted(which, key=lambda name: which[name].sum().item()):
        rows, k = np.flatnonzero(which[name].numpy()), list(OUTCOMES).index(name)
        drawn = np.random.default_rng([seed, 6, k]).permutation(rows)
        # a stable sort: fresh rows first, each in the order in which it was drawn
        chosen = sorted(drawn.tolist(), key=lambda row: row in taken)[:most]
        taken |= set(chosen)
        found[name] = sorted(chosen)
    return found


def sample(row: int, label: int, shown: dict[str, Tensor]) -> Sample:
    """Return a test row with what the teachers say of it.

    Args:
        row: Which.
        label: Its true class.
        shown: Logits `(M, K)` by teacher, `fused` among them.
    """
    shares = {who: logits[row].double().softmax(0) for who, logits in shown.items()}
    drawn = {label}
    for own in shares.values():
        values, classes = own.topk(min(CLASSES, len(own)))
        drawn |= set(classes[values >= LEAST].tolist())
    order = shares["fused"].argsort(descending=True, stable=True).tolist()
    drawn |= set([k for k in order if k not in drawn][: max(FILLED - len(drawn), 0)])
    classes = tuple(k for k in order if k in drawn)
    return Sample(row=row, label=label, shares=shares, classes=classes)
