"""How the task teacher and a zero-shot teacher become one target: pure functions of tensors.

Shapes: N images, K classes, P prompts, D width of the joint image-text space.

`alpha` is the weight of the task teacher, the zero-shot teacher has `1 - alpha` (Sec. 3 of the paper:
`z_F = alpha z_T + (1 - alpha) z_C`). An alpha means something only together with the scale of the
zero-shot logits, so the two are always quoted together. A constant added to a row of logits changes
no prediction and no loss; CLIP's is large, hence rows are centred before any statistic.
"""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.errors import ConfigError, DataError

CELLS = (
    2**24
)  # logits that are looked at together; in float64 128 MiB, where a large table would be many GiB


def centre(logits: Tensor) -> Tensor:
    """Subtract from each row of `logits` `(N, K)` its mean over classes."""
    return logits - logits.mean(1, keepdim=True)


def together(classes: int) -> int:
    """Return how many rows of a table of logits are looked at together."""
    return max(CELLS // classes, 1)


def spread(logits: Tensor | Iterable[Tensor]) -> float:
    """Return the standard deviation of all cells of the row-centred `logits` `(N, K)`, or of blocks of them, in float64."""
    if isinstance(logits, Tensor):
        logits = logits.split(together(logits.shape[1]))
    total, cells = 0.0, 0
    for block in logits:
        total, cells = total + centre(block.double()).square().sum(), cells + block.numel()
    return (total / cells).sqrt().item()


def check_pair(task: Tensor, clip: Tensor) -> None:
    """Raise DataError unless both teachers gave logits of one shape."""
    if task.shape != clip.shape:
        raise DataError(
            f"both teachers must give logits of one shape but got {tuple(task.shape)} from the task teacher "
            f"and {tuple(clip.shape)} from CLIP; check that both know the same classes in the same order."
        )


def fuse(task: Tensor, clip: Tensor, alpha: float | Tensor) -> Tensor:
    """Mix two teachers' logits, `alpha * task + (1 - alpha) * clip` (Sec. 3).

    Args:
        task: Logits of the task teacher, `(N, K)`.
        clip: Logits of the zero-shot teacher, `(N, K)`, already on the scale in use.
        alpha: Weight of the task teacher in [0, 1]; 1 gives plain distillation, bit for bit. Or one a row between 0 and 1,
            `(N, 1)`.
    """
    check_pair(task, clip)
    one_weight = not isinstance(alpha, Tensor)
    if one_weight and alpha in (0.0, 1.0):  # a weight of 0 silences infinities too
        return task if alpha == 1.0 else clip
    return alpha * task + (1 - alpha) * clip


def standardise(logits: Tensor) -> Tensor:
    """Bring each row of `logits` `(N, K)` to mean 0 and deviation 1 (LSKD; Sun et al., 2024).

    So a student need not reach the size of its teacher's logits, only their shape.
    """
    return centre(logits) / (logits.std(1, keepdim=True) + 1e-7)


def fuse_features(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Mix teachers' embeddings, unit-norm `(N, d)` each, and bring the mixture to unit length.

    `f_F = lambda f_T + (1 - lambda) f_C` (Sec. 3) in the space into which all are projected, since the
    features themselves have different widths (the released code).
    """
    mixed = sum(w * e for w, e in zip(weights, embeddings, strict=True))
    return F.normalize(mixed, dim=1)


def target(
    task: Tensor,
    clip: Tensor,
    alpha: float | Tensor,
    temperature: float,
    space: str,
    *,
    standardised: bool = False,
) -> Tensor:
    """Return the log-probabilities `(N, K)` that the student learns, at `temperature`.

    `space="logits"` is the method: fuse, then one softmax. `space="probs"` is the mixture of
    probabilities that the supplement's theory section writes instead:
    `alpha softmax(z_T / T) + (1 - alpha) softmax(z_C / T)`. Fused logits may be standardised
    before the softmax. Logits alone can have a weight a row, as `fuse` takes it.
    """
    if space == "logits":
        fused = fuse(task, clip, alpha)
        return F.log_softmax((standardise(fused) if standardised else fused) / temperature, 1)
    check_pair(task, clip)
    task, clip = F.log_softmax(task / temperature, 1), F.log_softmax(clip / temperature, 1)
    if alpha in (0.0, 1.0):
        return task if alpha == 1.0 else clip
    return torch.logaddexp(task + math.log(alpha), clip + math.log1p(-alpha))


def entropy(log_probs: Tensor) -> Tensor:
    """Return the mean entropy in nats of `log_probs` `(N, K)`."""
    return -(log_probs.exp() * log_probs).sum(1).mean()


def zero_shot_logits(image: Tensor, text: Tensor, logit_scale: float, reduce: str) -> Tensor:
    """Turn unit-norm features into zero-shot logits `(N, K)` at the model's own scale.

    Args:
        image: Unit-norm image features, `(N, D)`.
        text: Unit-norm text features of each prompt and class, `(P, K, D)`.
        logit_scale: The model's exp(logit_scale), 100 for OpenAI's weights.
        reduce: How prompts become one classifier. `embedding`: mean of the text features, normalised
            again (the released code). `logits`: mean of the logits of each prompt, which is the former
            times the length of the mean feature of each class. `probs`: log of the mean probability
            at the model's scale; a scale factor applied later multiplies that logarithm.
    """
    if reduce == "probs":
        each = (F.log_softmax(logit_scale * image @ prompt.T, 1) for prompt in text)
        return functools.reduce(torch.logaddexp, each) - math.log(len(text))
    mean = text.mean(0)
    if reduce == "embedding":
        mean = F.normalize(mean, dim=1)
    return logit_scale * image @ mean.T


def fit_temperature(
    logits: Tensor, labels: Tensor, *, instead: str = "clip.scale=model or match_std"
) -> float:
    """Return the temperature that minimises the negative log-likelihood of `logits / T`.

    It is sought from a thousandth to a thousand times the spread of the logits; a teacher that is worse than
    a guess ends at the upper end.

    Args:
        logits: `(N, K)`, of rows that the teacher was not trained on.
        labels: `(N,)`, all known.
        instead: What the error advises, which asks for no temperature.

    Raises:
        DataError: If every row is right: the likelihood then grows without end as T falls. If no row
            says anything.
    """
    from scipy.optimize import minimize_scalar

    own = logits.gather(1, labels[:, None])
    if ((logits >= own).sum(1) == 1).all():
        raise DataError(
            f"a temperature is fitted on the errors of a teacher but one is right on all {len(labels)} held-out "
            f"rows; was it trained on them? Use {instead}."
        )
    wide = spread(logits)
    if wide == 0:
        raise DataError(
            "a temperature is fitted on logits but a teacher's are the same for all classes; look at the prompts "
            "or at the file of logits."
        )
    logits = centre(logits.double()) / wide

    def nll(log_t: float) -> float:
        return F.cross_entropy(logits / math.exp(log_t), labels).item()

    found = minimize_scalar(nll, bounds=(math.log(1e-3), math.log(1e3)), method="bounded")
    return wide * math.exp(found.x)


def scale_factor(
    scale: int | float | str,
    *,
    logit_scale: float | None,
    transfer: tuple[Tensor | Iterable[Tensor], Tensor | Iterable[Tensor]] | None = None,
    held_out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> float:
    """Return the constant that brings zero-shot logits from the model's scale to the one in use.

    One factor for the data set, never one a row: a factor a row would erase how sure CLIP is.

    Args:
        scale: `model`: exp(logit_scale), the default. `match_std`: the spread of the task teacher.
            `calibrated`: times T_task / T_clip, each fitted by likelihood on held-out rows, so that
            alpha 1 stays plain distillation. A number: that logit scale. `none`: raw cosines, as in
            the released code, whose spread is about 0.03: CLIP then hardly takes part; warns.
        logit_scale: The model's exp(logit_scale); None where only logits are known.
        transfer: Task and zero-shot logits `(N, K)` of the transfer rows, or blocks of them, for `match_std`.
        held_out: Task and zero-shot logits `(M, K)` and labels `(M,)` of held-out rows, for `calibrated`.

    Raises:
        ConfigError: If a scale of cosines is asked of given logits.
        DataError: If zero-shot logits that do not vary are to be brought to a spread, or a teacher makes no
            error on the rows that its temperature is fitted on.
    """
    if scale == "model":
        return 1.0
    if scale == "match_std":
        task, clip = map(spread, transfer)
        if clip == 0:
            raise DataError(
                "clip.scale=match_std divides by the spread of the zero-shot logits but they are the same for "
                "all classes; look at the prompts or at clip.logits."
            )
        return task / clip
    if scale == "calibrated":
        task, clip, labels = held_out
        return fit_temperature(task, labels) / fit_temperature(clip, labels)
    if logit_scale is None:
        raise ConfigError(
            f"clip.scale={scale} needs cosines, but clip.logits gives logits at a scale of their own; "
            "use clip.scale=model, match_std or calibrated."
        )
    if scale == "none":
        warnings.warn(
            "clip.scale=none fuses raw cosines, as the released code does; they spread by about 0.03, so CLIP "
            "hardly takes part and alpha does little but soften the teacher; use clip.scale=model.",
            stacklevel=2,
        )
    return (1.0 if scale == "none" else float(scale)) / logit_scale
