"""What a search space in YAML means, and what of it is refused before anything runs."""

from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from richkd.config import Config, Layers, build, read
from richkd.errors import ConfigError
from tune.settings import Settings
from tune.space import Space, read_space


def resolve(settings: dict[str, Any]) -> Config:
    return build(Layers().over("trial", settings))


@pytest.mark.parametrize(
    ("key", "entry", "distribution"),
    [
        ("fusion.alpha", {"uniform": [0, 1]}, FloatDistribution(0.0, 1.0)),
        ("fusion.alpha", {"uniform": [0.5, 0.5]}, FloatDistribution(0.5, 0.5)),
        ("loss.temperature", {"loguniform": [0.5, 8]}, FloatDistribution(0.5, 8.0, log=True)),
        ("train.epochs", {"int": [5, 20]}, IntDistribution(5, 20)),
        ("loss.logit", {"int": [1, 9]}, IntDistribution(1, 9)),
        ("clip.prompts", {"choice": ["a", "b"]}, CategoricalDistribution(("a", "b"))),
        ("clip.scale", {"choice": ["model", 100]}, CategoricalDistribution(("model", 100))),
        ("clip.scale", {"loguniform": [1, 100]}, FloatDistribution(1.0, 100.0, log=True)),
        (
            "clip.pretrained",
            {"choice": [None, "openai"]},
            CategoricalDistribution((None, "openai")),
        ),
    ],
)
def test_each_distribution_is_optunas(key, entry, distribution):
    assert read_space({key: entry}, resolve) == Space({key: distribution})


def test_the_space_of_the_embedded_default_is_read():
    layers = read([])
    space = read_space(
        build(layers, Settings).sweep.space, lambda values: build(layers.over("trial", values))
    )
    assert set(space) == {"fusion.alpha", "loss.temperature", "loss.logit", "clip.prompts"}


@pytest.mark.parametrize(
    ("key", "entry", "told"),
    [
        ("loss.temprature", {"uniform": [1, 2]}, "did you mean loss.temperature?"),
        ("nothing", {"choice": [1]}, "there is no key nothing"),
        ("loss", {"uniform": [1, 2]}, "is a section"),
        ("fusion.alpha", {"unifrom": [0, 1]}, "uniform, loguniform, int, logint, choice"),
        ("fusion.alpha", {"uniform": [0, 1], "int": [0, 1]}, "one of"),
        ("fusion.alpha", {}, "one of"),
        ("fusion.alpha", 0.5, "one of"),
        ("fusion.alpha", [0, 1], "one of"),
        ("fusion.alpha", {"uniform": 1}, "[low, high]"),
        ("fusion.alpha", {"uniform": [0]}, "[low, high]"),
        ("fusion.alpha", {"uniform": [0, 0.5, 1]}, "[low, high]"),
        ("fusion.alpha", {"choice": []}, "the choices"),
        ("fusion.alpha", {"uniform": [1, 0]}, "low <= high"),
        ("fusion.alpha", {"uniform": ["low", 1]}, "'low'"),
        ("fusion.alpha", {"uniform": [None, 1]}, "NoneType"),
        ("fusion.alpha", {"uniform": [0, 2]}, "cannot be 2.0: fusion.alpha must lie in 0 to 1"),
        ("fusion.alpha", {"uniform": [float("nan"), 1]}, "nan"),
        ("loss.temperature", {"uniform": [1, float("inf")]}, "inf"),
        ("loss.logit", {"loguniform": [0, 1]}, "low"),
        ("loss.logit", {"int": [1.5, 3]}, "integer"),
        ("train.epochs", {"uniform": [1, 20]}, "must be a whole number but got 1.0"),
        ("train.epochs", {"int": [0, 20]}, "must lie in 1 to"),
        ("student.shortcut", {"choice": ["A", "C"]}, "cannot be 'C'"),
        ("clip.prompts", {"uniform": [0, 1]}, "'0.0'"),
        ("clip.prompts", {"choice": ["digits", 5]}, "'5'"),
    ],
)
def test_what_no_trial_could_run_is_refused_in_one_line_that_names_the_key(key, entry, told):
    with pytest.raises(ConfigError) as caught:
        read_space({key: entry}, resolve)
    message = str(caught.value)
    assert message.startswith("sweep.space: ")
    assert key in message
    assert told in message
    assert "\n" not in message


def test_one_bad_key_among_good_ones_is_the_one_named():
    space = {"fusion.alpha": {"uniform": [0, 1]}, "train.lr": {"loguniform": [0.01, 1000]}}
    with pytest.raises(ConfigError, match="train.lr cannot be 1000"):
        read_space(space, resolve)


def test_plain_distillation_is_searched_without_fusion_and_clip():
    keys = ("fusion.alpha", "clip.prompts", "clip.scale", "loss.temperature", "train.lr")
    space = Space({key: FloatDistribution(0.1, 1.0) for key in keys})
    assert list(space.of_baseline()) == ["loss.temperature", "train.lr"]


@pytest.mark.parametrize("key", ["seed", "method.name", "data.seed", "data.validation", "storage"])
def test_what_is_compared_cannot_be_searched(key):
    with pytest.raises(ConfigError, match=f"{key} cannot be searched"):
        read_space({key: {"choice": [1, 2]}}, resolve)
