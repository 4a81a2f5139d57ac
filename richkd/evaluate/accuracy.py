"""Top-1, top-5 and loss, in percent and nats."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from richkd.data import Views
from richkd.precision import computed

LEAST = 30  # rows of a group below which its accuracy would be noise


def rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes come before the label in each row `(N,)` of `logits` `(N, K)`.

    Among equal logits the lower class comes first, as in `argmax`; in a row that is not finite the label comes after all others,
    and after five at least.
    """
    classes = logits.shape[1]
    own = logits.gather(1, labels[:, None])
    first = torch.arange(classes, device=logits.device) < labels[:, None]
    before = ((logits > own) | ((logits == own) & first)).sum(1)
    before[~logits.isfinite().all(1)] = max(classes, 5)
    return before


def accuracy(logits: Tensor, labels: Tensor, *, balanced: bool = False) -> dict[str, float]:
    """Return `top1` and `top5` in percent and the mean cross-entropy `loss` of `logits` `(N, K)`.

    With fewer than five classes `top5` counts all of them; ranks are those of `rank`. With `balanced` each is the mean over classes of their means, which is
    what the many rows of a frequent class cannot hide.
    """
    before = rank(logits, labels)
    found = {
        "top1": 100 * (before < 1).double(),
        "top5": 100 * (before < 5).double(),
        "loss": F.cross_entropy(logits.double(), labels, reduction="none"),
    }
    if balanced:
        _, own, sizes = labels.unique(return_inverse=True, return_counts=True)
        share = 1 / (len(sizes) * sizes[own].double())
        return {name: (values * share).sum().item() for name, values in found.items()}
    return {name: values.mean().item() for name, values in found.items()}


def accuracy_of(logits: Tensor, labels: Tensor, groups: dict[str, Tensor]) -> dict[str, float]:
    """Return the accuracy of groups of rows.

    Args:
        logits: `(N, K)`.
        labels: `(N,)`.
        groups: By name, which rows belong to it, `(N,)`.

    Returns:
        `NAME/n`, the rows of each group, and of LEAST rows or more `NAME/top1` and `NAME/top5` in percent.
    """
    found: dict[str, float] = {}
    for name, rows in groups.items():
        found[f"{name}/n"] = int(rows.sum())
        if found[f"{name}/n"] >= LEAST:
            own = accuracy(logits[rows], labels[rows])
            found |= {f"{name}/{key}": own[key] for key in ("top1", "top5")}
    return found


def agreement(logits: Tensor, shown: dict[str, Tensor]) -> dict[str, float]:
    """Return by name the share of rows, percent, of which `logits` and those of that name, `(N, K)`, have one first class."""
    first = logits.argmax(1)
    return {
        name: 100 * (first == own.argmax(1)).double().mean().item() for name, own in shown.items()
    }


@torch.inference_mode()
def network_logits(network: nn.Module, views: Views, rows: Tensor, batch_size: int = 512) -> Tensor:
    """Return the logits `(len(rows), K)` of un-augmented images, the network in eval mode and in fp32."""
    training = network.training
    network.eval()
    with computed(views.device, "fp32"):
        logits = torch.cat([network(views.images(part)) for part in rows.split(batch_size)])
    network.train(training)
    return logits


def evaluate(
    network: nn.Module, views: Views, rows: Tensor, labels: Tensor, *, balanced: bool = False
) -> dict[str, float]:
    """Return `accuracy` of a network on some rows; `labels` are those rows' own."""
    return accuracy(network_logits(network, views, rows).cpu(), labels, balanced=balanced)
