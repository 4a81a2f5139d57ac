"""What logits and labels say of two teachers and of their mixture: tensors in, plain numbers out.

Shapes: N rows, K classes, G weights on the grid, S prompt sets.

Rows must be such as the teachers were not trained on. Whatever is chosen, such as a weight, is scored on rows that it was
not chosen on: out of the bag, for the gain, and over folds, for rules that give a weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from richkd import fusion, theory, weighting
from richkd.errors import DataError
from richkd.evaluate.accuracy import accuracy
from richkd.evaluate.calibration import calibration
from richkd.evaluate.outcomes import certainty

# from the task teacher alone downwards: of weights that are equally right the first is taken, which is nearest to plain
# distillation
GRID = tuple(k / 20 for k in range(20, -1, -1))
BAGS = 1000  # bootstrap samples
FORMS = ("full", "printed", "independent")  # of the theory's weight
FOLDS = 5  # in which rules are fitted and scored
NEAR = 0.5  # points within which weights are as good as the best
SURE = (0.025, 0.975)  # quantiles between which 95 % of the samples lie
BLOCK = 50  # samples whose counts are held at once


def row_weights(labels: Tensor, *, balanced: bool) -> Tensor:
    """Return what each row counts `(N,)`: all alike, or all classes alike."""
    _, own, sizes = labels.unique(return_inverse=True, return_counts=True)
    return 1 / sizes[own].double() if balanced else torch.ones(len(labels), dtype=torch.float64)


def top1(right: Tensor, weights: Tensor) -> Tensor:
    """Return the accuracy, %, of rows `(..., N)` that are right or not, by what each counts."""
    return 100 * (right.double() @ weights) / weights.sum()


def right_along(task: Tensor, clip: Tensor, labels: Tensor) -> Tensor:
    """Return of each weight of GRID which rows `(G, N)` the fused teacher gets right."""
    return torch.stack([fusion.fuse(task, clip, a).argmax(1) == labels for a in GRID])


def plateau(along: list[float]) -> list[float]:
    """Return the lowest and the highest weight around the best of GRID between which top-1 stays within NEAR points of it."""
    best = max(range(len(along)), key=along.__getitem__)
    first = last = best
    while last + 1 < len(along) and along[last + 1] >= along[best] - NEAR:
        last += 1
    while first > 0 and along[first - 1] >= along[best] - NEAR:
        first -= 1
    return [GRID[last], GRID[first]]


def out_of_bag(right: Tensor, base: Tensor, weights: Tensor, seed: int) -> dict[str, float]:
    """Return what choosing the best of several teachers gains over one of them, by the bootstrap, in points.

    In each sample of the rows the best is chosen, and the difference is taken on the rows that are not in the sample, paired
    by image: on the rows that it was chosen on, the best of many useless ones looks like a gain.

    Args:
        right: Which rows each choice gets right, `(C, N)`.
        base: Which rows the one gets right, `(N,)`.
        weights: Of the rows, `(N,)`.
        seed: Of the samples.

    Returns:
        `mean`, and `low` and `high` between which 95 % of the samples lie.
    """
    count, rng = len(base), np.random.default_rng([seed, 6])
    scored = (right.double() * weights).T.contiguous().numpy()  # (N, C)
    gained = scored - (base.double() * weights).numpy()[:, None]
    share, found = weights.numpy(), []
    for start in range(0, BAGS, BLOCK):
        drawn = rng.integers(0, count, (min(BLOCK, BAGS - start), count))
        counts = np.stack([np.bincount(rows, minlength=count) for rows in drawn]).astype(float)
        best = (counts @ scored).argmax(1)
        for left, chosen in zip(counts == 0, best, strict=True):
            if left.any():
                found.append(100 * gained[left, chosen].sum() / share[left].sum())
    low, high = np.quantile(found, SURE)
    return {"mean": float(np.mean(found)), "low": float(low), "high": float(high)}


def halves(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return two disjoint halves of the rows, each once to fit on and once to look at."""
    rows = torch.from_numpy(np.random.default_rng([seed, 7]).permutation(count))
    one, other = rows[: count // 2], rows[count // 2 :]
    return [(one, other), (other, one)]


def folds(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return FOLDS parts of the rows to look at, each with the others to fit on."""
    rows = torch.from_numpy(np.random.default_rng([seed, 8]).permutation(count))
    parts = rows.tensor_split(FOLDS)
    return [
        (torch.cat([part for part in parts if part is not held]), held)
        for held in parts
        if len(held)
    ]


def teacher(logits: Tensor, labels: Tensor, seed: int, *, balanced: bool) -> dict[str, Any]:
    """Return how right, how sure and how calibrated a teacher is.

    Returns:
        `top1` and `top5`, %; `nll` and `entropy`, nats; `ece`, %, with its `bins`; `temperature`, which calibrates it on these
        rows, None where it makes no error that tells; `ece_calibrated`, %, each half at the temperature of the other.
    """
    own = accuracy(logits, labels, balanced=balanced)
    sure = calibration(logits, labels)
    found = {
        "top1": own["top1"],
        "top5": own["top5"],
        "nll": own["loss"],
        "entropy": fusion.entropy(F.log_softmax(logits.double(), 1)).item(),
        "ece": sure.ece,
        "bins": [asdict(each) for each in sure.bins],
        "temperature": None,
        "ece_calibrated": None,
    }
    try:
        found["temperature"] = fusion.fit_temperature(logits, labels)
        calibrated = torch.empty_like(logits)
        for fit, look in halves(len(labels), seed):
            calibrated[look] = logits[look] / fusion.fit_temperature(logits[fit], labels[fit])
        found["ece_calibrated"] = calibration(calibrated, labels).ece
    except DataError:  # right on all of them: no temperature is the best
        pass
    return found


def errors_along(task: Tensor, clip: Tensor, labels: Tensor, seed: int) -> list[dict[str, float]]:
    """Return the mean squared error that one half of the rows predicts along alpha, and what the other half measures.

    Not the other way round as well: the mean of both ways would agree whatever the theory says.

    Returns:
        Of each weight of GRID: `alpha`, `predicted` with the bias, `unbiased` as the supplement's weight has it, and `measured`,
        all in standardised units.
    """
    fit, look = halves(len(labels), seed)[0]
    own = theory.errors(task[fit], clip[fit], labels[fit])
    e_t, e_c, _, _ = theory.residuals(task[look], clip[look], labels[look])
    found = []
    for a in sorted(GRID):
        weight = own.standardised(a)
        found.append(
            {
                "alpha": a,
                "predicted": own.error(weight),
                "unbiased": own.error(weight, biased=False),
                "measured": (weight * e_t + (1 - weight) * e_c).square().mean().item(),
            }
        )
    return found


def best_on_grid(task: Tensor, clip: Tensor, labels: Tensor) -> float:
    """Return the weight of GRID that is right most often on these rows."""
    return GRID[int(right_along(task, clip, labels).sum(1).argmax())]


WEIGHTINGS = ("one", "class", "confidence")  # as `fusion.weighting`


def weights_of(task: Tensor, clip: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the weight that each rule gives on some rows, on the scale in use: the theory's forms, `nll` and `best`."""
    own = theory.errors(task, clip, labels)
    return {form: own.mapped(getattr(own, form)()) for form in FORMS} | {
        "nll": theory.likeliest(task, clip, labels),
        "best": best_on_grid(task, clip, labels),
    }


def rules(
    task: Tensor, clip: Tensor, labels: Tensor, seed: int, weights: Tensor
) -> dict[str, dict[str, float]]:
    """Return what each rule that gives a weight says of all rows, and how right its weights are on rows it has not seen.

    Returns:
        By name: `alpha`, the cross-fitted `top1`, %, and `folds`, the weight of each fold.
    """
    parts, found = folds(len(labels), seed), {}
    each = [weights_of(task[fit], clip[fit], labels[fit]) for fit, _ in parts]
    for name, alpha in weights_of(task, clip, labels).items():
        right = torch.zeros(len(labels), dtype=torch.bool)
        own = [fold[name] for fold in each]
        for weight, (_, look) in zip(own, parts, strict=True):
            right[look] = fusion.fuse(task[look], clip[look], weight).argmax(1) == labels[look]
        found[name] = {"alpha": alpha, "top1": top1(right, weights).item(), "folds": own}
    return found


def weightings(
    task: Tensor,
    clip: Tensor,
    labels: Tensor,
    seed: int,
    weights: Tensor,
    likeliest: Sequence[float],
) -> dict[str, dict[str, float] | None]:
    """Return whether one weight a row beats one for all, on rows that neither was fitted on.

    The overall weight is the likeliest one, of each fold as `rules` has it: beside the theory's, which can be too high, a weight a row would look like a gain
    that another single weight has, too.

    Returns:
        `one`: its `top1`, %. `class` and `confidence`, as `fusion.weighting`: also `gain` over it in points, paired by image, and
        the `se` of that; None where the task teacher makes no error by which to calibrate its confidence.
    """
    right = {by: torch.zeros(len(labels), dtype=torch.bool) for by in WEIGHTINGS}
    for overall, (fit, look) in zip(likeliest, folds(len(labels), seed), strict=True):
        known = task[fit], clip[fit], labels[fit]
        for by in list(right):
            alpha: float | Tensor = overall
            if by != "one" and 0 < overall < 1:
                try:
                    alpha = weighting.fit(by, *known).alphas(overall, task[look])
                except DataError:
                    del right[by]
                    continue
            right[by][look] = fusion.fuse(task[look], clip[look], alpha).argmax(1) == labels[look]
    found: dict[str, dict[str, float] | None] = dict.fromkeys(WEIGHTINGS)
    share = weights / weights.sum()
    for by, own in right.items():
        found[by] = {"top1": top1(own, weights).item()}
        if by != "one":
            gap = 100 * (own.double() - right["one"].double())
            mean = (gap * share).sum().item()
            se = (share * (gap - mean)).square().sum().sqrt().item()
            found[by] |= {"gain": mean, "se": se}
    return found


def agreement(task: Tensor, clip: Tensor, labels: Tensor) -> dict[str, float]:
    """Return in percent how often both teachers name the same class, and which of them is right."""
    one, other = task.argmax(1), clip.argmax(1)
    own, theirs = one == labels, other == labels
    shares = {
        "same_class": one == other,
        "both_right": own & theirs,
        "only_teacher": own & ~theirs,
        "only_clip": ~own & theirs,
        "neither": ~own & ~theirs,
    }
    return {name: 100 * rows.double().mean().item() for name, rows in shares.items()}


def classes(
    logits: Mapping[str, Tensor], labels: Tensor, names: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Return the accuracy of each teacher on each class that has rows, those that fusing gains most first.

    Args:
        logits: Of `teacher`, `clip` and `fused`, `(N, K)` each.
        labels: `(N,)`.
        names: Of the classes.

    Returns:
        `name`, `n`, top-1 of each teacher, %, and `gain`, points of the fused one over the task teacher.
    """
    right = {who: (z.argmax(1) == labels).double() for who, z in logits.items()}
    found = []
    for k in labels.unique().tolist():
        rows = labels == k
        own = {who: 100 * each[rows].mean().item() for who, each in right.items()}
        found.append(
            {"name": names[k], "n": int(rows.sum())} | own | {"gain": own["fused"] - own["teacher"]}
        )
    return sorted(found, key=lambda each: -each["gain"])


def figure1(
    logits: Mapping[str, Tensor],
    labels: Tensor,
    certain: float | str,
    temperatures: Mapping[str, Any],
) -> dict[str, dict[str, dict[str, int]]]:
    """Return the counts of right and wrong, certain and uncertain rows, of the task teacher and of the fused one.

    Args:
        logits: Of `teacher` and `fused`, `(N, K)` each.
        labels: `(N,)`.
        certain: As `evaluate.certain`.
        temperatures: By which each is calibrated; None of one that cannot be.

    Returns:
        Under `as_is` and, for those that can be calibrated, `calibrated`, by teacher, as `outcomes.certainty` has them.
    """
    found: dict[str, dict[str, dict[str, int]]] = {"as_is": {}, "calibrated": {}}
    for who, z in logits.items():
        found["as_is"][who] = certainty(z, labels, certain)
        if temperatures[who] is not None:
            found["calibrated"][who] = certainty(z / temperatures[who], labels, certain)
    return found


def targets(task: Tensor, clip: Tensor, temperature: float) -> list[dict[str, float]]:
    """Return what a student would learn along alpha, and the temperature that keeps its target as sharp as plain distillation's.

    Args:
        task: Logits of the task teacher on rows that are learnt from, un-augmented, `(N, K)`.
        clip: Of the zero-shot teacher, on the scale in use.
        temperature: T of plain distillation.

    Returns:
        Of each weight of GRID: `alpha`; `sharpness`, the spread of the fused logits over the task teacher's; `entropy`, nats, of
        the target at `temperature` as it stands; `kept`, the temperature at which the fused logits are as sharp as the task
        teacher's at `temperature`; `entropy_kept`; and `kl`, nats, of the target at `kept` from plain distillation's.
    """
    alone, found = fusion.spread(task), []
    plain = F.log_softmax(task.double() / temperature, 1)
    for a in sorted(GRID):
        fused = fusion.fuse(task, clip, a).double()
        sharpness = fusion.spread(fused) / alone
        kept = max(temperature * sharpness, 1e-9)
        said = F.log_softmax(fused / kept, 1)
        found.append(
            {
                "alpha": a,
                "sharpness": sharpness,
                "entropy": fusion.entropy(F.log_softmax(fused / temperature, 1)).item(),
                "kept": kept,
                "entropy_kept": fusion.entropy(said).item(),
                "kl": F.kl_div(plain, said, reduction="batchmean", log_target=True).item(),
            }
        )
    return found
