"""A search space in YAML, as Optuna's distributions.

    sweep:
      space:
        fusion.alpha: {uniform: [0, 1]}
        loss.temperature: {loguniform: [0.5, 8]}
        clip.prompts: {choice: [digits, digits-bad]}

It is laid over the base config once at the start, so that a sweep of 100 trials cannot fail 100 times on
a typo.
"""

from collections.abc import Callable
from operator import index
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from richkd.config import Config, flatten, to_dict
from richkd.errors import ConfigError

DISTRIBUTIONS: dict[str, Callable[[list], BaseDistribution]] = {
    "uniform": lambda bounds: FloatDistribution(*map(float, bounds)),
    "loguniform": lambda bounds: FloatDistribution(*map(float, bounds), log=True),
    "int": lambda bounds: IntDistribution(*map(index, bounds)),
    "choice": CategoricalDistribution,
}

FIXED = ("seed", "method.name", "device", "storage", "cache", "teacher.logits")
FIXED_SECTIONS = ("data.",)

Space = dict[str, BaseDistribution]


def read_space(space: dict[str, Any], resolve: Callable[[dict[str, Any]], Config]) -> Space:
    """Return the distribution of each searched key.

    Args:
        space: Dotted key to `{distribution: bounds}`.
        resolve: Lays dotted keys over the base config; raises ConfigError for what the config refuses.

    Raises:
        ConfigError: If a key is unknown or changes what is compared, a distribution is unknown or malformed, or a bound is no value
            that the config takes.
    """
    found = {}
    for key, entry in space.items():
        if key in FIXED or key.startswith(FIXED_SECTIONS):
            raise ConfigError(
                f"sweep.space: {key} cannot be searched: its trials could not be compared with each other; set it "
                "for the whole sweep."
            )
        if not isinstance(entry, dict) or len(entry) != 1 or next(iter(entry)) not in DISTRIBUTIONS:
            raise ConfigError(
                f"sweep.space: {key} must be one of {', '.join(DISTRIBUTIONS)} with its bounds, as in "
                f"{{uniform: [0, 1]}}, but got {entry!r}."
            )
        ((kind, bounds),) = entry.items()
        if not isinstance(bounds, list) or (len(bounds) != 2 if kind != "choice" else not bounds):
            raise ConfigError(
                f"sweep.space: {key} needs a list, [low, high] or the choices, but got {bounds!r}."
            )
        try:
            distribution = DISTRIBUTIONS[kind](bounds)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"sweep.space: {key}: {kind} cannot be {bounds!r}: {error}"
            ) from error
        for value in getattr(distribution, "choices", None) or (
            distribution.low,
            distribution.high,
        ):
            _try(key, value, resolve)
        found[key] = distribution
    return found


def _try(key: str, value: Any, resolve: Callable[[dict[str, Any]], Config]) -> None:
    """Raise ConfigError unless the config takes `value` as it is: text takes numbers, but as text."""
    try:
        kept = flatten(to_dict(resolve({key: value})))[key]
    except ConfigError as error:
        raise ConfigError(f"sweep.space: {key} cannot be {value!r}: {error}") from error
    if kept != value:
        raise ConfigError(
            f"sweep.space: {key} cannot be {value!r}: the config would take it for {kept!r}."
        )


def of_baseline(space: Space) -> Space:
    """Return the part of `space` that plain distillation has too: it knows neither fusion nor CLIP."""
    return {key: value for key, value in space.items() if not key.startswith(("fusion.", "clip."))}
