"""One weight a row: alpha, moved by which class the task teacher predicts there, or by how sure it is.

`theory` has the weight a* of standardised logits that minimises the mean squared error of the fused ones on some rows,
`mean(e_c (e_c - e_t)) / mean((e_t - e_c)^2)`. It is estimated for each group of held-out rows, and alpha is moved there as a*
is: `alpha / (1 - alpha)` is multiplied by what `a* / (1 - a*)` of the group is over that of all rows. So alpha stays the weight
that is searched, at 0 and 1 it stays itself, groups that are alike change nothing, and the scale of the logits is of no matter.

The group of a row is known from what the task teacher says of it: never from its label, which a target must not know, and
never of a column, since one weight for a class of all rows would change what each teacher says of a row.

Shapes: N rows, M held-out rows, K classes, G groups; F fits.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from richkd import fusion, theory

FOLDS = 5  # of the held-out rows: the weight of a fold's rows is fitted on the others
BINS = 5  # of confidence, each with as many of the held-out rows
# so many rows of the mean of all are put into each group: without them, weights by class from 500 rows of CIFAR-10 cost 0.1
# points on the other rows; of 200 little is left of what groups differ in
PRIOR = 50
BOUNDS = 0.02, 0.98  # of a*, so that no group silences a teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighting:
    """What moves alpha, as fitted on all held-out rows (fit 0) and on those outside of each fold (fits 1 to FOLDS).

    Attributes:
        by: What groups rows, `class` or `confidence`.
        temperature: At which confidence is calibrated, `(F, 1)`.
        edges: Between the bins of confidence, `(F, G - 1)`.
        odds: By which the odds of alpha are multiplied in a group, `(F, G)`.
    """

    by: str
    temperature: Tensor
    edges: Tensor
    odds: Tensor

    def alphas(self, alpha: float, task: Tensor, fold: Tensor | int = 0) -> Tensor:
        """Return the weight of the task teacher in each row, `(N, 1)`.

        Args:
            alpha: Its weight overall.
            task: Its logits of the rows, `(N, K)`.
            fold: Of each row, `(N,)`, the one that it is in; 0 for rows that no weight was fitted on.
        """
        groups = groups_of(self.by, task, self.temperature[fold], self.edges[fold])
        odds = alpha * self.odds[fold, groups][:, None]
        return odds / (odds + (1 - alpha))

    def to(self, device: torch.device) -> "Weighting":
        """Return the same on a device."""
        if self.odds.device == device:
            return self
        return Weighting(
            by=self.by,
            temperature=self.temperature.to(device),
            edges=self.edges.to(device),
            odds=self.odds.to(device),
        )


def confidence(task: Tensor, temperature: Tensor | float) -> Tensor:
    """Return the logarithm of the top probability, `(N,)`, of logits `(N, K)` at a temperature."""
    return F.log_softmax(task / temperature, 1).amax(1)


def groups_of(by: str, task: Tensor, temperature: Tensor, edges: Tensor) -> Tensor:
    """Return the group `(N,)` of each row by the task teacher's logits `(N, K)`.

    Args:
        by: `class`, the one that it predicts; or `confidence`.
        task: The logits.
        temperature: Of confidence, one or a row each, `(1,)` or `(N, 1)`.
        edges: Between its bins, likewise, `(G - 1,)` or `(N, G - 1)`.
    """
    if by == "class":
        return task.argmax(1)
    return (confidence(task, temperature)[:, None] > edges).sum(1)


def folds(rows: int, seed: int) -> Tensor:
    """Return the fold of each of so many held-out rows, 1 to FOLDS, drawn at random and of one size, `(M,)`."""
    order = np.random.default_rng([seed, 6]).permutation(rows)
    return torch.from_numpy(1 + order % FOLDS)


def fit(
    by: str, task: Tensor, clip: Tensor, labels: Tensor, fold: Tensor | None = None
) -> Weighting:
    """Fit weights on held-out rows.

    Args:
        by: `class`, the one that the task teacher predicts; or `confidence`, in bins of equally many rows.
        task: Logits of the task teacher, `(M, K)`, which was not trained on these rows.
        clip: Of the zero-shot teacher, on any scale.
        labels: `(M,)`, all known.
        fold: As `folds` draws it; None: weights are of use on other rows alone.

    Raises:
        DataError: If shapes differ or a teacher is constant. If the task teacher's confidence cannot be calibrated since it
            makes no error, on all rows or outside of a fold.
    """
    fits = [_fit(by, task, clip, labels)]
    for k in range(1, FOLDS + 1) if fold is not None else ():
        kept = fold != k
        fits.append(_fit(by, task[kept], clip[kept], labels[kept]))
    temperature, edges, odds = map(torch.stack, zip(*fits, strict=True))
    return Weighting(by=by, temperature=temperature, edges=edges, odds=odds)


def _fit(by: str, task: Tensor, clip: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return temperature `(1,)`, edges `(G - 1,)` and odds `(G,)` of one fit."""
    temperature, edges, count = task.new_ones(1), task.new_empty(0), task.shape[1]
    if by == "confidence":
        temperature *= fusion.fit_temperature(task, labels, instead="fusion.weighting=class or one")
        inner = torch.arange(1, BINS, dtype=task.dtype) / BINS
        edges, count = confidence(task, temperature).quantile(inner), BINS
    groups = groups_of(by, task, temperature, edges)
    return temperature, edges, shifts(task, clip, labels, groups, count).to(task.dtype)


def shifts(task: Tensor, clip: Tensor, labels: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return what `a* / (1 - a*)` of each of `count` groups is over that of all rows, `(G,)`, with a* within BOUNDS.

    a* is a quotient of means over rows, so a group is drawn to all rows by PRIOR rows of the mean of all in both; one without a
    row is like all. Arguments beside the groups `(M,)` are those of `fit`.
    """
    e_t, e_c, _, _ = theory.residuals(task, clip, labels)
    each = torch.stack([(e_c * (e_c - e_t)).mean(1), (e_t - e_c).square().mean(1)])
    overall = each.mean(1, keepdim=True)
    sums = torch.stack([groups.bincount(part, count) for part in each])
    pooled = (sums + PRIOR * overall) / (groups.bincount(minlength=count) + PRIOR)
    return _odds(*pooled) / _odds(*overall)


def _odds(part: Tensor, whole: Tensor) -> Tensor:
    # where teachers do not differ, no weight is better than another
    weight = torch.where(whole > 1e-12, part / whole, 0.5).clamp(*BOUNDS)
    return weight / (1 - weight)
