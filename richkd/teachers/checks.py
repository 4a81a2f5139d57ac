"""What can be told of a teacher from rows whose labels are known, before anything is learnt from it."""

import warnings

from torch import Tensor

from richkd import fusion
from richkd.data import Views
from richkd.errors import DataError
from richkd.evaluate.accuracy import accuracy, network_logits
from richkd.teachers.task import TaskTeacher


def check_sense(source: str, logits: Tensor, labels: Tensor) -> None:
    """Look at a teacher's logits of rows whose labels are known; warns if they are little better than a guess.

    Args:
        source: Config key that the logits come from.
        logits: `(N, K)`.
        labels: `(N,)`.

    Raises:
        DataError: If they are not finite, or the same for all classes.
    """
    if bad := int((~logits.isfinite().all(1)).sum()):
        raise DataError(
            f"{source} must give finite logits but is NaN or infinite on {bad} of {len(logits)} labelled rows; look at "
            "its weights."
        )
    if fusion.spread(logits) == 0:
        raise DataError(
            f"{source} gives each image the same logit for all classes; compute them anew."
        )
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3:
        warnings.warn(
            f"{source} holds rows that sum to 1: these are probabilities, where logits are wanted; give their logarithm.",
            stacklevel=2,
        )
    top1, classes = accuracy(logits.cpu(), labels)["top1"], logits.shape[1]
    if is_guess(top1, classes):
        warnings.warn(
            f"{source} is right on {top1:.1f} % of {len(labels)} labelled rows, where a guess is on {100 / classes:.1f} %; check "
            "the order of its rows and of its classes, its normalisation, or the prompts.",
            stacklevel=2,
        )


def is_guess(top1: float, classes: int) -> bool:
    """Return whether top-1, %, is little better than that of a guess."""
    chance = 100 / classes
    # of two classes, half as much again as a guess would be 75 %
    return top1 < min(1.5 * chance, chance + (100 - chance) / 10)


USUAL = {  # mean and deviation that published weights expect
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100's": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "-1 to 1's": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "0 to 1's": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
CLEAR = 3.0  # standard errors by which another normalisation must be better before it is named


def check_normalisation(teacher: TaskTeacher, rows: Tensor, labels: Tensor) -> None:
    """Warn if a network whose normalisation nobody gave is clearly better under one of the usual ones.

    Args:
        teacher: Shown images under the data's own normalisation.
        rows: Training rows whose labels are known.
        labels: Theirs.
    """
    views = teacher.train_views
    if views.shape[2] != 3:
        return

    def right(part: Views) -> Tensor:
        said = network_logits(teacher.network, part, rows)[:, : teacher.classes]
        return said.cpu().argmax(1) == labels

    own = right(views)
    found = {name: right(views.normalised_by(*usual)) for name, usual in USUAL.items()}
    best = max(found, key=lambda name: int(found[name].sum()))
    gained, lost = (found[best] & ~own).sum().item(), (own & ~found[best]).sum().item()
    if gained - lost > CLEAR * (gained + lost) ** 0.5:
        mean, std = (",".join(map(str, values)) for values in USUAL[best])
        shares = [100 * each.double().mean().item() for each in (own, found[best])]
        warnings.warn(
            f"teacher.mean and teacher.std are not given, and under the data's own the teacher is right on "
            f"{shares[0]:.1f} % of {len(rows)} labelled rows, under {best} on {shares[1]:.1f} %; give "
            f"teacher.mean=[{mean}] teacher.std=[{std}] if it was trained so.",
            stacklevel=2,
        )
