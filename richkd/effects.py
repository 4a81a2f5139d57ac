"""Keys that have no effect on the run that they were given to, so that nobody waits for one."""

import warnings
from collections.abc import Callable

from richkd.config import Config
from richkd.layers import Layers

OF_LOGITS = (
    *("loss.logit_kind", "loss.standardise", "loss.temperature"),
    *("loss.warmup", "loss.dkd_"),
)
# how keys begin, whether a run hears them, and why not where it does not
RULES: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (("teacher.", "fusion."), lambda run: run.loss.distils, "it learns from labels alone"),
    (("clip.",), lambda run: run.asks_clip, "CLIP has no weight"),
    (("fusion.weighting",), lambda run: run.fuses, "no logits are fused"),
    (
        ("contrast.", "fusion.feature_alpha"),
        lambda run: run.loss.contrasts,
        "no features are contrasted",
    ),
    (
        ("loss.transform", "loss.distance"),
        lambda run: run.loss.maps,
        "no feature maps are compared",
    ),
    (("loss.feature_kind",), lambda run: run.loss.feature > 0, "loss.feature is 0"),
    (("loss.smoothing",), lambda run: run.loss.ce > 0, "loss.ce is 0"),
    (OF_LOGITS, lambda run: run.loss.logit > 0, "loss.logit is 0"),
    (("loss.dkd_",), lambda run: run.loss.logit_kind == "dkd", "loss.logit_kind is kd"),
)


def check_effects(config: Config, layers: Layers) -> None:
    """Warn of each key of the command line that has no effect on the run that it makes.

    Layers are written for many methods, so what they set for others is no mistake.

    Args:
        config: The run.
        layers: What it was made of.
    """
    own = dict.fromkeys(entry.key for entry in layers.entries if not entry.origin)
    for key in own:
        for starts, heard, why in RULES:
            if key.startswith(starts) and not heard(config):
                warnings.warn(
                    f"{key} has no effect on method.name={config.method.name}: {why}.", stacklevel=2
                )
                break
