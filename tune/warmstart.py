"""The first trials of a search: settings known to be worth a try, as printed where they were printed."""

from dataclasses import dataclass
from typing import Any

from optuna.distributions import CategoricalDistribution, IntDistribution

from richkd.methods import METHODS
from tune.space import Space

WEIGHTS = ("loss.ce", "loss.logit", "loss.temperature")


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One trial: where it lies in the search space, and what is run."""

    params: dict[str, Any]
    settings: dict[str, Any]


def printed(method: str) -> dict[str, Any]:
    """Return a method's weights, alpha and temperature as printed: T of the fused logits."""
    preset = METHODS[method].settings
    keys = [*WEIGHTS, *(["fusion.alpha"] if "fusion.alpha" not in METHODS[method].fixed else [])]
    return {key: preset[key] for key in keys} | {"loss.temperature_of": "fused"}


def place(
    settings: dict[str, Any], space: Space, base: dict[str, Any], ratio: float
) -> dict[str, Any]:
    """Return where `settings` lie in `space`, so that the sampler learns from them.

    Args:
        settings: Dotted keys as run, with T of the fused logits.
        space: What is searched; its temperature is relative to the task teacher's logits.
        base: Values of the base config, for keys that `settings` leave alone.
        ratio: Spread of the fused logits over that of the task teacher's, at these settings.
    """
    params = {}
    for key, distribution in space.items():
        value = settings.get(key, base[key])
        if key == "loss.temperature":
            value = value / ratio
        if isinstance(distribution, CategoricalDistribution):
            params[key] = value if value in distribution.choices else distribution.choices[0]
        elif not isinstance(value, int | float):  # such as clip.scale=model
            params[key] = distribution.low
        else:
            nearest = min(max(value, distribution.low), distribution.high)
            params[key] = round(nearest) if isinstance(distribution, IntDistribution) else nearest
    return params
