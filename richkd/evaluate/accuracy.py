"""Top-1, top-5 and loss, in percent and nats."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from richkd.data import Views
from richkd.precision import computed


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `top1` and `top5` in percent and the mean cross-entropy `loss` of `logits` `(N, K)`.

    With fewer than five classes `top5` counts all of them. Among equal logits the lower class comes first,
    as in `argmax`; a row that is not finite is wrong.
    """
    own = logits.gather(1, labels[:, None])
    first = torch.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & first)).sum(1)  # classes before the label
    rank[~logits.isfinite().all(1)] = 5
    return {
        "top1": 100 * (rank < 1).double().mean().item(),
        "top5": 100 * (rank < 5).double().mean().item(),
        "loss": F.cross_entropy(logits.double(), labels).item(),
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


def evaluate(network: nn.Module, views: Views, rows: Tensor, labels: Tensor) -> dict[str, float]:
    """Return `accuracy` of a network on some rows; `labels` are those rows' own."""
    return accuracy(network_logits(network, views, rows).cpu(), labels)
