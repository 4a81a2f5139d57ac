"""The first trials of a search: settings known to be worth a try, as printed, by theory, or from a sweep before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from richkd import escape
from richkd.methods import METHODS
from tune.space import Space

PAPER, THEORY = "paper", "theory"
OF_FEATURES = "fusion.feature_alpha"
# what plain distillation is without, whatever a sweep has in all its runs
BARE = {
    "loss.feature": 0.0,
    "loss.logit_kind": "kd",
    "loss.standardise": False,
    "loss.warmup": 0,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One trial: where it lies in the search space, what is run, and where it comes from."""

    params: dict[str, Any]
    settings: dict[str, Any]
    source: str = PAPER


class Outside(ValueError):
    """What was run lies outside a space; says where."""


def printed(method: str) -> dict[str, Any]:
    """Return a method's preset, but what makes the method and so holds anyway, as printed: T of the fused logits."""
    preset = METHODS[method]
    given = {key: value for key, value in preset.settings.items() if key not in preset.fixed}
    return given | {"loss.temperature_of": "fused"}


def plain() -> dict[str, Any]:
    """Return plain distillation as printed, as a setting of another method: the logits of the task teacher alone."""
    return printed("kd") | BARE | {"fusion.alpha": 1.0}


def holds_plain(method: str) -> bool:
    """Whether plain distillation is a setting of a method: nothing that makes the method is against it."""
    preset, other = METHODS[method], plain()
    return all(other.get(key, preset.settings[key]) == preset.settings[key] for key in preset.fixed)


def is_printed(method: str, settings: Mapping[str, Any]) -> bool:
    """Whether a trial ran a method as printed, or plain distillation as printed, whatever else it ran with."""
    return is_own(method, settings) or plain().items() <= settings.items()


def is_own(method: str, settings: Mapping[str, Any]) -> bool:
    """Whether a trial ran a method as printed, where features weigh as logits do."""
    one_weight = settings.get(OF_FEATURES) in (None, METHODS[method].settings["fusion.alpha"])
    return one_weight and printed(method).items() <= settings.items()


def meant(key: str, values: Mapping[str, Any]) -> Any:
    """Return a value of a config; that of features is the logits' where it is None, as `Config.feature_alpha`."""
    follows = key == OF_FEATURES and values[key] is None
    return values["fusion.alpha" if follows else key]


def place(
    settings: dict[str, Any], space: Space, base: dict[str, Any], ratio: float
) -> dict[str, Any]:
    """Return where `settings` lie in `space`, at its nearest bound if beyond, so that the sampler learns from them.

    Args:
        settings: Dotted keys as run, with T of the fused logits.
        space: What is searched; its temperature is relative to the task teacher's logits.
        base: Values of the base config, for keys that `settings` leave alone.
        ratio: Spread of the fused logits over that of the task teacher's, at these settings.
    """
    params, ran = {}, base | settings
    for key, distribution in space.distributions.items():
        value = meant(key, ran)
        if key == "loss.temperature":
            value = value / ratio
        params[key] = _nearest(distribution, value)
    return {key: params[key] for key in space.active(params)}


def _nearest(distribution: BaseDistribution, value: Any) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return value if value in distribution.choices else distribution.choices[0]
    low, high, step = distribution.low, distribution.high, distribution.step
    if not isinstance(value, int | float):  # such as clip.scale=model
        return low
    value = min(max(value, low), high)
    if step is not None:
        value = min(low + round((value - low) / step) * step, high)
    return round(value) if isinstance(distribution, IntDistribution) else value


def within(
    space: Space, fixed: Mapping[str, Any], ran: Mapping[str, Any], searched: Mapping[str, Any]
) -> dict[str, Any]:
    """Return where in `space` a trial of another sweep lies, between two steps at the nearest one.

    Args:
        space: What is searched now.
        fixed: What all trials have where `space` leaves it alone, by dotted key.
        ran: What the trial ran, all keys.
        searched: Those of them that its sweep searched or set for its trials.

    Raises:
        Outside: If it cannot be run here as it was there; Optuna itself would take any value.
    """
    params = {}
    for key in space.active(ran):
        value = meant(key, ran)
        if not _holds(space.distributions[key], value):
            raise Outside(f"{key}={value} is not in {said(space.distributions[key])}")
        params[key] = _nearest(space.distributions[key], value)  # a step may be new
    for key in searched:
        if key not in params and ran[key] != fixed[key]:
            raise Outside(f"{key}={ran[key]} is not searched, and is {fixed[key]}")
    return params


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    number = int if isinstance(distribution, IntDistribution) else int | float
    return isinstance(value, number) and distribution.low <= value <= distribution.high


def said(distribution: BaseDistribution) -> str:
    """Return a distribution in a few words."""
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(escape.line(str(choice)) for choice in distribution.choices)
    step = f" in steps of {distribution.step:g}" if distribution.step not in (None, 1) else ""
    return f"{distribution.low:g} to {distribution.high:g}{step}"
