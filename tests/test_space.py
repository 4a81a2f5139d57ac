"""What a search space in YAML means, and what of it is refused before anything runs."""

import statistics
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from richkd.config import Config
from richkd.errors import ConfigError
from richkd.layers import Layers, build, read
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
        ("fusion.alpha", {"uniform": [0, 1], "step": 0.1}, FloatDistribution(0.0, 1.0, step=0.1)),
        ("train.epochs", {"int": [5, 20]}, IntDistribution(5, 20)),
        ("train.epochs", {"int": [5, 20], "step": 5}, IntDistribution(5, 20, step=5)),
        ("train.batch_size", {"logint": [8, 64]}, IntDistribution(8, 64, log=True)),
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
        ("fusion.alpha", {"uniform": [0, 1], "step": 0.3}, "whole number of steps"),
        ("train.epochs", {"int": [5, 20], "step": 4}, "whole number of steps"),
        ("train.epochs", {"int": [5, 20], "step": 0.5}, "integer"),
        ("loss.temperature", {"loguniform": [1, 4], "step": 1}, "step goes with uniform and int"),
        ("clip.prompts", {"choice": ["digits"], "step": 1}, "step goes with uniform and int"),
        ("fusion.alpha", {"uniform": [0, 1], "if": {}}, "step and when"),
        ("fusion.alpha", {"uniform": [0, 1], "when": "model"}, "as in {clip.scale: model}"),
        ("fusion.alpha", {"uniform": [0, 1], "when": {}}, "as in {clip.scale: model}"),
        ("fusion.alpha", {"uniform": [0, 1], "when": {"clip.scale": "model"}}, "names clip.scale"),
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


def test_of_what_makes_a_method_it_is_said_how_to_search_it_no_more():
    def crd(settings):
        return build(read(["method.name=crd"]).over("", settings))

    with pytest.raises(
        ConfigError, match=r"means fusion.alpha=1.0 .*: sweep.space.fusion.alpha=null\."
    ):
        read_space({"fusion.alpha": {"uniform": [0, 1]}}, crd)


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


TREE = {  # written against the order in which it can be drawn
    "loss.logit": {"uniform": [1, 9], "when": {"fusion.space": "logits", "clip.scale": "none"}},
    "fusion.space": {"choice": ["logits", "probs"], "when": {"clip.scale": ["model", "none"]}},
    "clip.scale": {"choice": ["model", "match_std", "none"]},
    "loss.temperature": {"loguniform": [1, 8]},
}


def branch(values: dict[str, Any]) -> set[str]:
    """Return what TREE searches in a trial, written out by hand."""
    keys = {"clip.scale", "loss.temperature"}
    if values["clip.scale"] in ("model", "none"):
        keys.add("fusion.space")
        if values["fusion.space"] == "logits" and values["clip.scale"] == "none":
            keys.add("loss.logit")
    return keys


def test_a_key_is_drawn_only_where_those_that_it_waits_for_have_the_values():
    space = read_space(TREE, resolve)
    assert list(space) == ["clip.scale", "loss.temperature", "fusion.space", "loss.logit"]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(60):
        trial = study.ask()
        space.draw(trial)
        assert set(trial.params) == branch(trial.params)
        assert set(space.active(trial.params | {"train.lr": 1})) == set(trial.params)
        seen.add(frozenset(trial.params))
        study.tell(trial, 0.0)
    assert len(seen) == 3


def test_what_no_branch_reaches_is_not_active_though_its_condition_holds():
    space = read_space(TREE, resolve)
    values = {"clip.scale": "match_std", "fusion.space": "logits", "loss.logit": 3.0}
    assert space.active(values | {"loss.temperature": 3.0}) == ["clip.scale", "loss.temperature"]


def test_a_sampler_learns_in_each_branch():
    space = read_space(
        {
            "clip.scale": {"choice": ["model", "none"]},
            "fusion.alpha": {"uniform": [0, 1], "when": {"clip.scale": "model"}},
            "loss.logit": {"uniform": [1, 9], "when": {"clip.scale": "none"}},
        },
        resolve,
    )
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=10))
    for _ in range(60):
        trial = study.ask()
        space.draw(trial)
        found = trial.params
        study.tell(
            trial, abs(found.get("fusion.alpha", 2) - 0.3) + (found.get("loss.logit", 0)) / 9
        )
    late = [trial.params for trial in study.trials[40:]]
    assert sum(each["clip.scale"] == "model" for each in late) > 14
    alphas = [each["fusion.alpha"] for each in late if "fusion.alpha" in each]
    assert abs(statistics.median(alphas) - 0.3) < 0.1


def test_a_value_is_tried_where_it_is_searched():
    space = {
        "fusion.space": {"choice": ["logits", "probs"]},
        # relative temperatures are refused beside probabilities
        "loss.temperature_of": {"choice": ["fused", "task"], "when": {"fusion.space": "logits"}},
    }

    def of_probs(settings: dict[str, Any]) -> Config:
        return build(Layers().over("base", {"fusion.space": "probs"}).over("trial", settings))

    assert list(read_space(space, of_probs)) == list(space)
    del space["loss.temperature_of"]["when"]
    with pytest.raises(ConfigError, match="temperature_of cannot be 'task'"):
        read_space(space, of_probs)


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"clip.scale": {"choice": ["model"], "when": {"clip.scale": "model"}}}, "clip.scale wait"),
        (
            {
                "clip.scale": {"choice": ["model"], "when": {"fusion.space": "logits"}},
                "fusion.space": {"choice": ["logits"], "when": {"clip.scale": "model"}},
                "train.lr": {"uniform": [0.1, 1]},
            },
            "clip.scale, fusion.space wait",
        ),
        (
            {
                "clip.scale": {"choice": ["model"]},
                "fusion.alpha": {"uniform": [0, 1], "when": {"clip.scale": "none"}},
            },
            "waits for clip.scale=none but its choices are model",
        ),
        (
            {
                "train.epochs": {"int": [1, 3]},
                "fusion.alpha": {"uniform": [0, 1], "when": {"train.epochs": 3}},
            },
            "names train.epochs",
        ),
    ],
)
def test_conditions_that_cannot_hold_are_refused(space, told):
    with pytest.raises(ConfigError, match=told):
        read_space(space, resolve)


def test_plain_distillation_waits_for_no_key_of_clip():
    space = read_space(TREE | {"train.lr": {"uniform": [0.1, 1]}}, resolve).of_baseline()
    assert space == Space(
        {
            "loss.temperature": FloatDistribution(1, 8, log=True),
            "train.lr": FloatDistribution(0.1, 1),
            "loss.logit": FloatDistribution(1, 9),
        }
    )


def test_every_branch_is_tried_and_not_only_the_first_value_of_each_condition():
    space = {
        "fusion.space": {"choice": ["logits", "probs"]},
        "loss.temperature_of": {
            "choice": ["fused", "task"],
            "when": {"fusion.space": ["logits", "probs"]},
        },
    }
    with pytest.raises(ConfigError, match="temperature_of cannot be 'task'.*fusion.space=probs"):
        read_space(space, resolve)
