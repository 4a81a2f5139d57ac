"""The table of methods against the weights that the papers print."""

import pytest

from richkd import methods
from richkd.config import Config
from richkd.errors import ConfigError
from richkd.layers import Layers, build, flatten, to_dict

# loss.ce, loss.logit, loss.feature, loss.temperature, fusion.alpha; where no logits are learnt T is the default
PRINTED = {
    "ce": (1, 0, 0, 3, 1),
    "kd": (1, 3, 0, 3, 1),  # RichKD's own weights: the ablation of the fusion
    "kd-crd": (0.1, 0.9, 0, 4, 1),
    "kd-lskd": (0.1, 9, 0, 2, 1),
    "richkd-l": (1, 3, 0, 3, 0.7),
    "richkd-f": (1, 0, 0.8, 3, 0.7),
    "richkd-lf": (1, 3, 0.8, 3, 0.7),
    "crd": (1, 0, 0.8, 3, 1),
    "at": (1, 0, 1000, 3, 1),
    "lg": (1, 0, 2.5, 3, 1),
    "lskd": (0.1, 9, 0, 2, 1),
    "dkd": (1, 1, 0, 4, 1),
    "clip": (1, 3, 0, 3, 0),
}
KEYS = ("loss.ce", "loss.logit", "loss.feature", "loss.temperature", "fusion.alpha")
KINDS = {  # what else makes them what they are
    "at": {"loss.feature_kind": "maps", "loss.transform": "attention", "loss.distance": "mse"},
    "lg": {"loss.feature_kind": "maps", "loss.transform": "projection", "loss.distance": "mse"},
    "lskd": {"loss.standardise": True, "loss.logit_kind": "kd"},
    "dkd": {
        "loss.logit_kind": "dkd",
        "loss.dkd_alpha": 1,
        "loss.dkd_beta": 8,
        "loss.warmup": 20,
        "loss.standardise": False,
    },
    "crd": {
        "loss.feature_kind": "contrast",
        "contrast.negatives": 16384,
        "contrast.temperature": 0.07,
        "contrast.momentum": 0.5,
        "contrast.width": 128,
    },
}


@pytest.mark.parametrize("name", PRINTED)
def test_every_method_is_held_to_its_printed_weights(name):
    found = flatten(to_dict(build(Layers().over("", {"method.name": name}))))
    assert tuple(found[key] for key in KEYS) == PRINTED[name]
    assert KINDS.get(name, {}).items() <= found.items()


def test_all_methods_but_the_search_are_printed():
    assert methods.METHODS.keys() - PRINTED.keys() == {"autokd"}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_fixes_only_what_it_sets_and_sets_only_what_exists(name):
    method = methods.get(name)
    assert set(method.fixed) <= set(method.settings) <= set(flatten(to_dict(Config())))


@pytest.mark.parametrize("name", methods.METHODS)
def test_richkd_and_losses_that_compose_with_it_leave_alpha_free(name):
    free = name.startswith("richkd") or name in ("dkd", "lskd")
    assert ("fusion.alpha" not in methods.get(name).fixed) == free


def test_kd_differs_from_richkd_in_alpha_alone():
    kd, richkd = (
        flatten(to_dict(build(Layers().over("", {"method.name": name}))))
        for name in ("kd", "richkd-l")
    )
    assert {key for key in kd if kd[key] != richkd[key]} == {"fusion.alpha", "method.name"}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ce", "loss.feature", 0.8),
        ("kd", "loss.logit_kind", "dkd"),
        ("kd-crd", "loss.standardise", True),
        ("kd-lskd", "loss.feature", 0.8),
        ("richkd-l", "loss.feature", 0.8),
        ("richkd-f", "loss.feature_kind", "maps"),
        ("richkd-f", "loss.logit", 3.0),
        ("richkd-f", "loss.feature", 0.0),
        ("crd", "fusion.feature_alpha", 0.3),
        ("crd", "loss.feature", 0.0),
        ("at", "loss.transform", "projection"),
        ("lg", "loss.distance", "l1"),
        ("lskd", "loss.standardise", False),
        ("dkd", "loss.logit_kind", "kd"),
        ("clip", "fusion.alpha", 0.5),
    ],
)
def test_a_method_cannot_become_another_under_its_name(name, key, value):
    with pytest.raises(ConfigError, match=f"method.name={name}"):
        build(Layers().over("", {"method.name": name, key: value}))


def test_the_default_config_is_the_default_method():
    default = flatten(to_dict(Config()))
    assert methods.get(default["method.name"]).settings.items() <= default.items()


@pytest.mark.parametrize(
    ("typo", "meant"), [("richkd", "richkd-l"), ("kd_crd", "kd-crd"), ("klip", "clip")]
)
def test_an_unknown_method_suggests_the_nearest(typo, meant):
    with pytest.raises(ConfigError, match=f"'{typo}'; did you mean {meant}[?]"):
        methods.get(typo)


@pytest.mark.parametrize("name", ["", "zzz", "None"])
def test_a_method_near_to_none_is_told_all(name):
    with pytest.raises(ConfigError, match=f"one of {', '.join(methods.METHODS)} but got"):
        methods.get(name)
