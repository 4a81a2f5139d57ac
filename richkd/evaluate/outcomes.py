"""What fusing does to the rows that the task teacher gets right and wrong (Table 10 and Figure 1 of the paper's supplement)."""

from torch import Tensor

from richkd.evaluate.accuracy import rank
from richkd.evaluate.categories import is_certain

TOP = 5
REPAIRED, FROM_OUTSIDE, HARMED, BOTH_WRONG = "repaired", "from_outside", "harmed", "both_wrong"


def in_top(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return of each row `(N,)` whether its label is among the `count` highest of `logits` `(N, K)`, as `rank` has it."""
    return rank(logits, labels) < count


def happened(task: Tensor, fused: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return by name in which rows `(N,)` fusing did what; those repaired from outside the top 5 are repaired ones, too.

    Args:
        task: Logits of the task teacher, `(N, K)`.
        fused: Of the fused teacher.
        labels: `(N,)`.
    """
    before, after = in_top(task, labels, 1), in_top(fused, labels, 1)
    return {
        REPAIRED: ~before & after,
        FROM_OUTSIDE: ~in_top(task, labels, TOP) & after,
        HARMED: before & ~after,
        BOTH_WRONG: ~before & ~after,
    }


def outcomes(task: Tensor, fused: Tensor, labels: Tensor) -> dict[str, int]:
    """Return the counts of Table 10; the arguments are those of `happened`.

    Returns:
        `fixed` of `teacher_wrong` rows are right after fusing, `top5_fixed` of the `top5_base` whose label is outside the
        teacher's top 5; `harmed` of `teacher_right` are wrong after, and of `top5_lost` the label is outside the fused top 5.
    """
    what, before = happened(task, fused, labels), in_top(task, labels, 1)
    counted = {
        "fixed": what[REPAIRED],
        "teacher_wrong": ~before,
        "harmed": what[HARMED],
        "teacher_right": before,
        "top5_fixed": what[FROM_OUTSIDE],
        "top5_base": ~in_top(task, labels, TOP),
        "top5_lost": before & ~in_top(fused, labels, TOP),
    }
    return {name: int(rows.sum()) for name, rows in counted.items()}


def certainty(logits: Tensor, labels: Tensor, certain: float | str) -> dict[str, int]:
    """Return how many rows a teacher is right and wrong about, certain of it or not, as Figure 1 shares them out.

    Args:
        logits: `(N, K)`; divided by its temperature, of a calibrated teacher.
        labels: `(N,)`.
        certain: As `evaluate.certain`.
    """
    right, sure = in_top(logits, labels, 1), is_certain(logits, certain)
    counted = {
        "right_certain": right & sure,
        "right_uncertain": right & ~sure,
        "wrong_uncertain": ~right & ~sure,
        "wrong_certain": ~right & sure,
    }
    return {name: int(rows.sum()) for name, rows in counted.items()}
