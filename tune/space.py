"""A search space in YAML, as Optuna's distributions.

    sweep:
      space:
        fusion.alpha: {uniform: [0, 1], step: 0.05}
        loss.temperature: {loguniform: [0.5, 8]}
        clip.scale: {choice: [model, match_std]}
        clip.prompts: {choice: [digits, digits-bad], when: {clip.scale: model}}

`when` draws a key only where others have these values (one, or a list of them); elsewhere it keeps the base config's.
Everything is laid over the base config once at the start, so that a sweep of 100 trials cannot fail 100 times on
a typo.
"""

import itertools
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from operator import index
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial

from richkd import methods
from richkd.config import Config
from richkd.errors import ConfigError
from richkd.layers import flatten, to_dict

DISTRIBUTIONS: dict[str, Callable[..., BaseDistribution]] = {
    "uniform": lambda low, high, step=None: FloatDistribution(
        float(low), float(high), step=None if step is None else float(step)
    ),
    "loguniform": lambda low, high: FloatDistribution(float(low), float(high), log=True),
    "int": lambda low, high, step=1: IntDistribution(index(low), index(high), step=index(step)),
    "logint": lambda low, high: IntDistribution(index(low), index(high), log=True),
    "choice": lambda *choices: CategoricalDistribution(choices),
}
STEPPED = ("uniform", "int")

FIXED = ("seed", "method.name", "device", "storage", "cache", "teacher.logits")
FIXED_SECTIONS = ("data.",)
BEYOND_KD = (  # what plain distillation has not
    *("fusion.", "clip.", "contrast."),
    *("loss.feature", "loss.transform", "loss.distance"),
    *("loss.logit_kind", "loss.dkd_", "loss.standardise", "loss.warmup"),
)

When = dict[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched.

    Attributes:
        distributions: By dotted key; a key comes after those that it depends on.
        when: Of a key that is not always searched: the values that others must have, by their keys.
    """

    distributions: dict[str, BaseDistribution]
    when: dict[str, When] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.distributions)

    def __len__(self) -> int:
        return len(self.distributions)

    def choices(self, key: str) -> tuple[Any, ...]:
        """Return what a key is chosen from, nothing if it is not searched so."""
        return getattr(self.distributions.get(key), "choices", ())

    def high(self, key: str, otherwise: float) -> float:
        """Return the highest value of a number that is searched, `otherwise` if it is not."""
        searched = self.choices(key) or [getattr(self.distributions.get(key), "high", otherwise)]
        return max(searched)

    def active(self, values: Mapping[str, Any]) -> list[str]:
        """Return the keys that are searched in a trial of these `values`, which may hold more."""
        found: dict[str, Any] = {}
        for key in self.distributions:
            if self._holds(key, found):
                found[key] = values[key]
        return list(found)

    def draw(self, trial: Trial) -> None:
        """Let a trial suggest each key that is searched in it; what it has already stays as it is."""
        there, drawn = trial.params, {}
        for key, distribution in self.distributions.items():
            if self._holds(key, drawn):
                drawn[key] = there[key] if key in there else _suggest(trial, key, distribution)

    def _holds(self, key: str, drawn: Mapping[str, Any]) -> bool:
        rules = self.when.get(key, {})
        return all(k in drawn and drawn[k] in allowed for k, allowed in rules.items())

    def of_baseline(self) -> "Space":
        """Return the part that plain distillation has too: it knows no fusion, no features and one loss of logits."""
        kept = {k: d for k, d in self.distributions.items() if not k.startswith(BEYOND_KD)}
        rules = {
            key: {k: values for k, values in when.items() if k in kept}
            for key, when in self.when.items()
            if key in kept
        }
        return Space(kept, {key: when for key, when in rules.items() if when})


def read_space(space: dict[str, Any], resolve: Callable[[dict[str, Any]], Config]) -> Space:
    """Return what is searched.

    Args:
        space: Dotted key to `{distribution: bounds}`, with `step` and `when` beside it.
        resolve: Lays dotted keys over the base config; raises ConfigError for what the config refuses.

    Raises:
        ConfigError: If a key is unknown or changes what is compared, a distribution is unknown or malformed, a bound is no value
            that the config takes, or `when` names what is not chosen or depends on itself.
    """
    distributions: dict[str, BaseDistribution] = {}
    for key, entry in space.items():
        if key in FIXED or key.startswith(FIXED_SECTIONS):
            raise ConfigError(
                f"sweep.space: {key} cannot be searched: its trials could not be compared with each other; set it "
                "for the whole sweep."
            )
        distributions[key] = _distribution(key, entry)
    when = {
        key: _rules(key, entry["when"], distributions)
        for key, entry in space.items()
        if "when" in entry
    }
    found = Space({key: distributions[key] for key in _ordered(distributions, when)}, when)
    fixed = methods.get(resolve({}).method.name).fixed
    where: dict[str, list[dict[str, Any]]] = {}  # the cases in which a key is searched
    for key, distribution in found.distributions.items():
        rules = when.get(key, {})
        above = [case for other in rules for case in where[other]] or [{}]
        where[key] = [
            case | dict(zip(rules, values, strict=True))
            for case in above
            for values in itertools.product(*rules.values())
        ]
        bounds = getattr(distribution, "choices", None) or (distribution.low, distribution.high)
        for case, value in itertools.product(where[key], bounds):
            cure = f" To search it no more: sweep.space.{key}=null." if key in fixed else ""
            _try(key, value, lambda values, case=case: resolve(case | values), cure)
    return found


def _distribution(key: str, entry: Any) -> BaseDistribution:
    kinds = [kind for kind in entry if kind in DISTRIBUTIONS] if isinstance(entry, dict) else []
    if len(kinds) != 1 or not entry.keys() <= {kinds[0], "step", "when"}:
        raise ConfigError(
            f"sweep.space: {key} must be one of {', '.join(DISTRIBUTIONS)} with its bounds, as in "
            f"{{uniform: [0, 1]}}, and may have step and when beside it, but got {entry!r}."
        )
    kind, bounds = kinds[0], entry[kinds[0]]
    if not isinstance(bounds, list) or (len(bounds) != 2 if kind != "choice" else not bounds):
        raise ConfigError(
            f"sweep.space: {key} needs a list, [low, high] or the choices, but got {bounds!r}."
        )
    if "step" in entry and kind not in STEPPED:
        raise ConfigError(
            f"sweep.space: {key}: step goes with {' and '.join(STEPPED)} but is given to {kind}; leave it out."
        )
    steps = {"step": entry["step"]} if "step" in entry else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Optuna would cut the range
            return DISTRIBUTIONS[kind](*bounds, **steps)
    except UserWarning as cut:
        raise ConfigError(
            f"sweep.space: {key}: the range of {kind} must be a whole number of steps but {bounds!r} is none of "
            f"{entry['step']!r}; change one of them."
        ) from cut
    except (ValueError, TypeError) as error:
        raise ConfigError(f"sweep.space: {key}: {kind} cannot be {bounds!r}: {error}") from error


def _rules(key: str, when: Any, distributions: Mapping[str, BaseDistribution]) -> When:
    if not isinstance(when, dict) or not when:
        raise ConfigError(
            f"sweep.space: {key}: when must say which values others have, as in {{clip.scale: model}}, but got {when!r}."
        )
    found: When = {}
    for other, wanted in when.items():
        values = tuple(wanted) if isinstance(wanted, list) else (wanted,)
        choices = getattr(distributions.get(other), "choices", ())
        if not choices:
            raise ConfigError(
                f"sweep.space: {key}: when must name a key of the space that is a choice but names {other}; search that by "
                "choice, or leave it out."
            )
        if unknown := [value for value in values if value not in choices]:
            raise ConfigError(
                f"sweep.space: {key}: when waits for {other}={unknown[0]} but its choices are "
                f"{', '.join(map(str, choices))}; take one of them."
            )
        found[other] = values
    return found


def _ordered(keys: Collection[str], when: Mapping[str, When]) -> list[str]:
    """Return keys in their order, but each after those that it depends on."""
    order: list[str] = []
    while len(order) < len(keys):
        ready = [key for key in keys if key not in order and set(when.get(key, ())) <= set(order)]
        if not ready:
            circle = ", ".join(key for key in keys if key not in order)
            raise ConfigError(
                f"sweep.space: {circle} wait for each other by when; leave one of these out."
            )
        order += ready
    return order


def _suggest(trial: Trial, key: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    whole = isinstance(distribution, IntDistribution)
    suggest = trial.suggest_int if whole else trial.suggest_float
    low, high = distribution.low, distribution.high
    return suggest(key, low, high, step=distribution.step, log=distribution.log)


def _try(key: str, value: Any, resolve: Callable[[dict[str, Any]], Config], cure: str) -> None:
    """Raise ConfigError, which ends with `cure`, unless the config takes `value` as it is: text takes numbers, but as text."""
    try:
        kept = flatten(to_dict(resolve({key: value})))[key]
    except ConfigError as error:
        raise ConfigError(f"sweep.space: {key} cannot be {value!r}: {error}{cure}") from error
    if kept != value:
        raise ConfigError(
            f"sweep.space: {key} cannot be {value!r}: the config would take it for {kept!r}."
        )
