"""Name -> which losses with which weights: the one table.

Multi-level logit distillation (MLKD), which the paper's tables quote, is not among them: what its published code computes is
not what its paper defines (masks multiply means, so that nothing is selected, and terms of the strong view take the weak
one), so a row of that name could not be said to be either.
"""

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from richkd.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A preset of dotted keys.

    Attributes:
        settings: Laid over the defaults and under the user's layers.
        fixed: Keys of `settings` that make the method what it is; another value is refused.
    """

    settings: dict[str, Any] = field(hash=False)
    fixed: tuple[str, ...] = ()


# what a loss is, beside how much it weighs
KINDS = ("standardise", "logit_kind", "feature_kind", "transform", "distance")


def _preset(
    ce: float, logit: float, temperature: float, alpha: float, *fixed: str, **others: Any
) -> Method:
    """Return a method of these weights; what `others` say of its loss makes it what it is, as that it has no features."""
    others = {"feature": 0.0} | others
    kinds = [key for key in KINDS if key in others] + ["feature"] * (others["feature"] == 0)
    return Method(
        settings={
            "loss.ce": ce,
            "loss.logit": logit,
            "loss.temperature": temperature,
            "fusion.alpha": alpha,
            **{f"loss.{key}": value for key, value in others.items()},
        },
        fixed=(*fixed, *(f"loss.{key}" for key in kinds)),
    )


def _of_features(feature: float, *fixed: str, **others: Any) -> Method:
    """Return a method of the task teacher's features alone."""
    found = _preset(1.0, 0.0, 3.0, 1.0, *_NO_LOGITS, *fixed, feature=feature, **others)
    return Method(
        settings=found.settings | {"fusion.feature_alpha": 1.0},
        fixed=(*found.fixed, "fusion.feature_alpha"),
    )


_ALONE = "fusion.alpha"  # the task teacher, or CLIP, or none
_NO_LOGITS = ("fusion.alpha", "loss.logit")
_PLAIN = {"standardise": False, "logit_kind": "kd"}
_CONTRAST = {"feature": 0.8, "feature_kind": "contrast"}

METHODS = {
    # the labels alone
    "ce": _preset(1.0, 0.0, 3.0, 1.0, *_NO_LOGITS),
    # Hinton's distillation with RichKD's weights, so that fusion is the only difference
    "kd": _preset(1.0, 3.0, 3.0, 1.0, _ALONE, **_PLAIN),
    # the same loss as CRD's comparison weighs it
    "kd-crd": _preset(0.1, 0.9, 4.0, 1.0, _ALONE, **_PLAIN),
    # and as LSKD's does
    "kd-lskd": _preset(0.1, 9.0, 2.0, 1.0, _ALONE, **_PLAIN),
    # RichKD: fused logits, fused features, both (Sec. 3), with the weights of the released code; any loss of logits
    "richkd-l": _preset(1.0, 3.0, 3.0, 0.7),
    "richkd-f": _preset(1.0, 0.0, 3.0, 0.7, "loss.logit", **_CONTRAST),
    "richkd-lf": _preset(1.0, 3.0, 3.0, 0.7, **_CONTRAST),
    # contrastive representation distillation (Tian et al., 2020), which is richkd-f without CLIP
    "crd": _of_features(0.8, feature_kind="contrast"),
    # attention transfer (Zagoruyko and Komodakis, 2017), p = 2
    # its weight is for all labels: on the 50 labels of the digits it drowns them (23 % after 10 epochs)
    "at": _of_features(1000.0, feature_kind="maps", transform="attention", distance="mse"),
    # locality guidance (Li et al., 2022)
    "lg": _of_features(2.5, feature_kind="maps", transform="projection", distance="mse"),
    # logit standardisation (Sun et al., 2024) with its own weights; fusion.alpha below 1 fuses
    "lskd": _preset(0.1, 9.0, 2.0, 1.0, standardise=True, logit_kind="kd"),
    # decoupled distillation (Zhao et al., 2022); fusion.alpha below 1 fuses
    "dkd": _preset(1.0, 1.0, 4.0, 1.0, logit_kind="dkd", warmup=20),
    # where a search over distillers begins: see conf/sweep/autokd.yaml
    "autokd": Method(
        settings={
            "loss.ce": 1.0,
            "loss.logit": 3.0,
            "loss.feature": 1.0,
            "loss.feature_kind": "maps",
            "loss.temperature": 3.0,
            "fusion.alpha": 1.0,
        },
        fixed=(_ALONE,),
    ),
    # CLIP as the only teacher
    "clip": _preset(1.0, 3.0, 3.0, 0.0, _ALONE),
}


def get(name: str) -> Method:
    """Return a method.

    Raises:
        ConfigError: If there is none of that name; the nearest is suggested.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"method.name must be one of {', '.join(METHODS)} but got {name!r}{hint}")
    return METHODS[name]
