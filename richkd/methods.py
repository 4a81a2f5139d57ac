"""Name -> which losses with which weights: the one table."""

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


def _preset(ce: float, logit: float, temperature: float, alpha: float, *fixed: str) -> Method:
    weights = {"loss.ce": ce, "loss.logit": logit, "loss.temperature": temperature}
    return Method(settings=weights | {"fusion.alpha": alpha}, fixed=fixed)


METHODS = {
    # the labels alone
    "ce": _preset(1.0, 0.0, 3.0, 1.0, "fusion.alpha", "loss.logit"),
    # Hinton's distillation with RichKD's weights, so that fusion is the only difference
    "kd": _preset(1.0, 3.0, 3.0, 1.0, "fusion.alpha"),
    # the same loss as CRD's comparison weighs it
    "kd-crd": _preset(0.1, 0.9, 4.0, 1.0, "fusion.alpha"),
    # and as LSKD's does
    "kd-lskd": _preset(0.1, 9.0, 2.0, 1.0, "fusion.alpha"),
    # RichKD(L): fused logits (Sec. 3), with the weights of the released code
    "richkd-l": _preset(1.0, 3.0, 3.0, 0.7),
    # CLIP as the only teacher
    "clip": _preset(1.0, 3.0, 3.0, 0.0, "fusion.alpha"),
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
