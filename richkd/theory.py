"""The bias and variance of teachers, and the weight between them that their errors call for (theory of the paper's supplement).

Shapes: N rows, K classes, M teachers.

Each row of logits is centred over its classes and each teacher divided by its spread, the standard deviation of all its
centred cells; the truth is the one-hot label, brought to the same form. So errors are told apart from units: a constant
added to a row, or a teacher that speaks louder, changes nothing. Of an error of teacher i, `e_i = f_i - f*`, the bias is its
mean in each class' column, and variance and covariance are what is left, averaged over all cells. The mean squared error of
`a f_T + (1 - a) f_C` is then, exactly,

    mean_k (a b_t + (1 - a) b_c)^2 + a^2 s_t^2 + (1 - a)^2 s_c^2 + 2 a (1 - a) rho s_t s_c.

With one bias for all classes, centring would make it zero, and the weight as printed, which drops it, would look right.
A weight of standardised logits is no `fusion.alpha`: `mapped` brings it to the scale on which logits are fused, and only
mapped weights are of any use.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.errors import DataError
from richkd.fusion import centre, check_pair, spread

LOUDEST = 1e3  # spreads of logits beyond which a softmax says 0 and 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """How two teachers err: the task teacher and the zero-shot one, in standardised units.

    Attributes:
        bias_t: Root mean square over the classes of the task teacher's bias.
        bias_c: Of the zero-shot teacher's.
        bias: Mean over the classes of the product of both.
        sigma_t: Standard deviation of the task teacher's errors around its bias.
        sigma_c: Of the zero-shot teacher's.
        rho: Correlation of these; 0 where one does not vary.
        spread_t: Of the task teacher's logits, by which they were divided.
        spread_c: Of the zero-shot teacher's.
    """

    bias_t: float
    bias_c: float
    bias: float
    sigma_t: float
    sigma_c: float
    rho: float
    spread_t: float
    spread_c: float

    @property
    def covariance(self) -> float:
        """Covariance of the errors around their biases."""
        return self.rho * self.sigma_t * self.sigma_c

    def printed(self) -> float:
        """Return the weight as the supplement prints it: of the variances alone, the bias dropped; clipped to [0, 1]."""
        return ratio(
            self.sigma_c**2 - self.covariance,
            self.sigma_t**2 + self.sigma_c**2 - 2 * self.covariance,
        )

    def independent(self) -> float:
        """Return the weight as printed for errors without correlation."""
        return ratio(self.sigma_c**2, self.sigma_t**2 + self.sigma_c**2)

    def full(self) -> float:
        """Return the weight that minimises the mean squared error, bias and all; clipped to [0, 1]."""
        t, c = self.bias_t**2 + self.sigma_t**2, self.bias_c**2 + self.sigma_c**2
        both = self.bias + self.covariance
        return ratio(c - both, t + c - 2 * both)

    def error(self, weight: float, *, biased: bool = True) -> float:
        """Return the mean squared error that is predicted at a weight of standardised logits, with or without bias."""
        a, b = weight, 1 - weight
        found = (a * self.sigma_t) ** 2 + (b * self.sigma_c) ** 2 + 2 * a * b * self.covariance
        if biased:
            found += (a * self.bias_t) ** 2 + (b * self.bias_c) ** 2 + 2 * a * b * self.bias
        return found

    def mapped(self, weight: float) -> float:
        """Return the `fusion.alpha` that mixes logits as they are as `weight` mixes standardised ones."""
        t, c = weight / self.spread_t, (1 - weight) / self.spread_c
        return t / (t + c)

    def standardised(self, alpha: float) -> float:
        """Return the weight of standardised logits that `fusion.alpha` comes to: the inverse of `mapped`."""
        t, c = alpha * self.spread_t, (1 - alpha) * self.spread_c
        return t / (t + c)


def ratio(part: float, whole: float) -> float:
    """Return `part / whole` clipped to [0, 1]; 1, so the task teacher alone, where teachers do not differ.

    Then every weight has the same error, and nothing is gained by a second teacher.
    """
    return min(max(part / whole, 0.0), 1.0) if whole > 1e-12 else 1.0


def standardise(logits: Tensor, who: str) -> tuple[Tensor, float]:
    """Return row-centred logits `(N, K)` over their spread in float64, and that spread.

    Raises:
        DataError: If `who` says the same of all classes.
    """
    wide = spread(logits)
    if not wide > 0:
        raise DataError(
            f"the logits of {who} must differ between classes but are constant in each of {len(logits)} rows; look at its "
            "file, or at its prompts."
        )
    return centre(logits.double()) / wide, wide


def truth(labels: Tensor, classes: int) -> Tensor:
    """Return the one-hot labels `(N, K)`, centred and standardised as logits are."""
    return standardise(F.one_hot(labels, classes), "the labels")[0]


def residuals(task: Tensor, clip: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float, float]:
    """Return the errors `(N, K)` of both teachers in standardised units, and the spreads of their logits.

    Args:
        task: Logits of the task teacher, `(N, K)`.
        clip: Of the zero-shot teacher, on any scale.
        labels: `(N,)`, all known, of rows that neither teacher was trained on.

    Raises:
        DataError: If shapes differ, or a teacher is constant.
    """
    check_pair(task, clip)
    own, wide = standardise(task, "the task teacher")
    other, narrow = standardise(clip, "CLIP")
    right = truth(labels, task.shape[1])
    return own - right, other - right, wide, narrow


def errors(task: Tensor, clip: Tensor, labels: Tensor) -> Errors:
    """Return how two teachers err on rows with these labels; the arguments are those of `residuals`."""
    return _moments(*residuals(task, clip, labels))


def errors_of_probabilities(task: Tensor, clip: Tensor, labels: Tensor) -> Errors:
    """Return how two teachers' probabilities `(N, K)` err; these have one unit already, so none is standardised.

    The weight is then one of `fusion.space=probs`.
    """
    right = F.one_hot(labels, task.shape[1]).double()
    return _moments(task.double() - right, clip.double() - right, 1.0, 1.0)


def _moments(e_t: Tensor, e_c: Tensor, wide: float, narrow: float) -> Errors:
    b_t, b_c = e_t.mean(0), e_c.mean(0)
    sigma_t, sigma_c = ((e - b).square().mean().sqrt().item() for e, b in ((e_t, b_t), (e_c, b_c)))
    covariance = ((e_t - b_t) * (e_c - b_c)).mean().item()
    varies = sigma_t * sigma_c > 1e-12
    return Errors(
        bias_t=b_t.square().mean().sqrt().item(),
        bias_c=b_c.square().mean().sqrt().item(),
        bias=(b_t * b_c).mean().item(),
        sigma_t=sigma_t,
        sigma_c=sigma_c,
        rho=covariance / (sigma_t * sigma_c) if varies else 0.0,
        spread_t=wide,
        spread_c=narrow,
    )


def likeliest(task: Tensor, clip: Tensor, labels: Tensor) -> float:
    """Return the `fusion.alpha` that minimises the negative log-likelihood of the fused logits after calibration.

    The rival that a theory must meet. The likelihood of `softmax(u z_T + v z_C)` is convex in `u, v >= 0`, and both the
    weight, `u / (u + v)`, and the temperature, `1 / (u + v)`, are in them.

    Args:
        task: Logits of the task teacher, `(N, K)`.
        clip: Of the zero-shot teacher, on the scale in use.
        labels: `(N,)`, all known, of rows that neither teacher was trained on.
    """
    from scipy.optimize import minimize

    check_pair(task, clip)
    (own, wide), (other, narrow) = standardise(task, "the task teacher"), standardise(clip, "CLIP")
    both = torch.stack([own, other])

    def nll(loudness: list[float]) -> tuple[float, list[float]]:
        u = torch.tensor(loudness, dtype=torch.float64, requires_grad=True)
        loss = F.cross_entropy(torch.einsum("m,mnk->nk", u, both), labels)
        loss.backward()
        return loss.item(), u.grad.tolist()

    found = minimize(nll, [1.0, 1.0], jac=True, method="L-BFGS-B", bounds=[(0, LOUDEST)] * 2)
    u, v = (float(x) for x in (found.x[0] / wide, found.x[1] / narrow))
    return u / (u + v) if u + v > 0 else 1.0


def second_moments(logits: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, list[float]]:
    """Return the mean products `(M, M)` of the standardised errors of several teachers, and the spreads of their logits."""
    right = truth(labels, logits[0].shape[1])
    each = [standardise(z, f"teacher {k + 1}") for k, z in enumerate(logits)]
    flat = torch.stack([(own - right).flatten() for own, _ in each])
    return flat @ flat.T / flat.shape[1], [wide for _, wide in each]


def shares(moments: Tensor) -> Tensor:
    """Return the weights `(M,)` of standardised teachers that minimise `w' E w` with `w >= 0` and `sum w = 1`.

    A few teachers have few subsets: on each the equations of the minimum are solved, and the best of the solutions that are
    weights is the minimum, for it lies inside one of the faces.

    Args:
        moments: `E`, symmetric and positive semi-definite, `(M, M)`.
    """
    count = len(moments)
    best, lowest = torch.full((count,), 1 / count, dtype=torch.float64), math.inf
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            part = moments[chosen, :][:, chosen].double()
            system = torch.ones(size + 1, size + 1, dtype=torch.float64)
            system[:size, :size], system[size, size] = part, 0
            right = torch.zeros(size + 1, dtype=torch.float64)
            right[size] = 1
            solved = torch.linalg.lstsq(system, right[:, None], driver="gelsd").solution[:size, 0]
            if (solved < -1e-9).any():
                continue
            solved = solved.clamp(min=0) / solved.clamp(min=0).sum()
            value = (solved @ part @ solved).item()
            if value < lowest - 1e-12:
                best = torch.zeros(count, dtype=torch.float64)
                best[list(chosen)], lowest = solved, value
    return best


def mapped_shares(weights: Tensor, spreads: Sequence[float]) -> list[float]:
    """Return the weights of logits as they are that mix as `weights` mix standardised ones."""
    each = weights / torch.tensor(spreads, dtype=torch.float64)
    return (each / each.sum()).tolist()
