"""The table of methods against the weights that the papers print."""

import pytest

from richkd import methods
from richkd.config import Config, flatten, to_dict
from richkd.errors import ConfigError

# loss.ce, loss.logit, loss.temperature, fusion.alpha
PRINTED = {
    "ce": (1, 0, 3, 1),
    "kd": (1, 3, 3, 1),  # RichKD's own weights: the ablation of the fusion
    "kd-crd": (0.1, 0.9, 4, 1),
    "kd-lskd": (0.1, 9, 2, 1),
    "richkd-l": (1, 3, 3, 0.7),
    "clip": (1, 3, 3, 0),
}
KEYS = ("loss.ce", "loss.logit", "loss.temperature", "fusion.alpha")


def test_every_method_is_held_to_its_printed_weights():
    found = {name: tuple(m.settings[key] for key in KEYS) for name, m in methods.METHODS.items()}
    assert found == PRINTED


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_fixes_only_what_it_sets_and_sets_only_what_exists(name):
    method = methods.get(name)
    assert set(method.fixed) <= set(method.settings) <= set(flatten(to_dict(Config())))


@pytest.mark.parametrize("name", methods.METHODS)
def test_only_richkd_leaves_alpha_free(name):
    assert ("fusion.alpha" in methods.get(name).fixed) == (not name.startswith("richkd"))


def test_kd_differs_from_richkd_in_alpha_alone():
    kd, richkd = methods.get("kd").settings, methods.get("richkd-l").settings
    assert {key for key in kd if kd[key] != richkd[key]} == {"fusion.alpha"}


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
    with pytest.raises(ConfigError, match="one of ce, kd, kd-crd, kd-lskd, richkd-l, clip but got"):
        methods.get(name)
