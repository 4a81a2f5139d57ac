"""Where the first trials of a search lie, and what they run."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from richkd import distill
from richkd.errors import ConfigError
from richkd.layers import build, flatten, read, to_dict
from richkd.methods import METHODS
from tune.first import as_printed, prepare
from tune.space import Space
from tune.study import MAIN
from tune.sweep import Sweep
from tune.warmstart import Outside, holds_plain, is_own, is_printed, place, plain, printed, within

BASE = flatten(to_dict(build(read([]))))
TEMPERATURE = Space({"loss.temperature": FloatDistribution(0.5, 8.0, log=True)})


@pytest.mark.parametrize("method", METHODS)
def test_printed_numbers_are_those_of_the_methods(method):
    found = printed(method)
    assert found.pop("loss.temperature_of") == "fused"
    preset = METHODS[method]
    assert found == {key: v for key, v in preset.settings.items() if key not in preset.fixed}
    assert {"loss.ce", "loss.temperature"} <= set(found)


@pytest.mark.parametrize("method", METHODS)
def test_printed_numbers_make_a_config_of_their_method(method):
    config = build(read([f"method.name={method}"]).over("trial", printed(method)))
    shown = flatten(to_dict(config))
    assert {key: shown[key] for key in printed(method)} == printed(method)
    assert config.fusion.alpha == METHODS[method].settings["fusion.alpha"]


def test_the_papers_setting_is_that_of_sec_3():
    assert printed("richkd-l") == {
        "loss.ce": 1.0,
        "loss.logit": 3.0,
        "loss.temperature": 3.0,
        "fusion.alpha": 0.7,
        "loss.temperature_of": "fused",
    }


@pytest.mark.parametrize("method", METHODS)
def test_plain_distillation_is_a_setting_of_a_method_that_takes_it(method):
    layers = read([f"method.name={method}"]).over("trial", plain())
    if holds_plain(method):
        assert build(layers).fusion.alpha == 1
    else:
        with pytest.raises(ConfigError, match=f"method.name={method} means"):
            build(layers)


@pytest.mark.parametrize("method", ["kd", "ce"])
def test_a_baseline_is_plain_whatever_a_sweep_has_in_all_its_runs(method, tmp_path):
    words = ["method.name=richkd-lf", "loss.logit_kind=dkd", "loss.standardise=true"]
    loss = Sweep(tmp_path, read(words)).resolve(printed(method), method).loss
    assert (loss.feature, loss.logit_kind, loss.standardise) == (0, "kd", False)


def test_a_search_over_distillers_is_a_sweep_like_any_other(tmp_path):
    sweep = Sweep(tmp_path, read(["sweep/autokd"]))
    assert [student.title for student in sweep.students.values()][-1] == "autokd, as found"
    assert set(sweep.space.of_baseline()) == {"loss.logit", "loss.temperature"}
    assert not any(key.startswith(("fusion.", "clip.")) for key in sweep.space)
    waits = {key: when for key, when in sweep.space.when.items() if key != "loss.dkd_beta"}
    assert waits == dict.fromkeys(
        ("loss.transform", "loss.distance"), {"loss.feature_kind": ("maps",)}
    )


@pytest.mark.parametrize("ratio", [0.5, 0.8, 1.0, 1.7])
def test_the_place_of_a_temperature_is_relative_to_the_task_teacher(ratio):
    paper = printed("richkd-l")
    found = place(paper, TEMPERATURE, BASE, ratio)["loss.temperature"]
    # the fused logits are `ratio` times as wide, so this makes them as sharp as T = 3 does
    assert found * ratio == pytest.approx(paper["loss.temperature"])


@pytest.mark.parametrize(("ratio", "found"), [(0.1, 8.0), (100.0, 0.5)])
def test_a_place_beyond_the_bounds_is_the_nearest_bound(ratio, found):
    assert place(printed("richkd-l"), TEMPERATURE, BASE, ratio) == {"loss.temperature": found}


def test_only_the_temperature_is_divided():
    space = Space(
        {"fusion.alpha": FloatDistribution(0, 1), "loss.logit": FloatDistribution(0.5, 16)}
    )
    found = place(printed("richkd-l"), space, BASE, 2.0)
    assert found == {"fusion.alpha": 0.7, "loss.logit": 3.0}


def test_a_key_that_the_setting_leaves_alone_lies_where_the_base_config_is():
    space = Space(
        {
            "clip.prompts": CategoricalDistribution(("digits-bad", "digits")),
            "train.lr": FloatDistribution(0.001, 1.0),
        }
    )
    found = place(printed("richkd-l"), space, BASE, 1.0)
    assert found == {"clip.prompts": "digits", "train.lr": BASE["train.lr"]}


def test_a_value_that_is_no_choice_lies_at_the_first_one():
    space = Space({"clip.prompts": CategoricalDistribution(("digits-bad", "digits-photo"))})
    assert place({}, space, BASE, 1.0) == {"clip.prompts": "digits-bad"}


@pytest.mark.parametrize(
    ("key", "distribution"),
    [
        ("loss.temperature", IntDistribution(1, 8)),
        ("clip.scale", FloatDistribution(1.0, 100.0, log=True)),
        ("clip.scale", CategoricalDistribution(("none", 50))),
        ("data.labelled_per_class", IntDistribution(1, 50)),
        ("loss.temperature", CategoricalDistribution((1, 2, 4))),
    ],
)
def test_every_place_is_one_that_the_distribution_contains(key, distribution):
    base = BASE | {"data.labelled_per_class": None}
    found = place(printed("richkd-l"), Space({key: distribution}), base, 1.25)[key]
    assert distribution._contains(distribution.to_internal_repr(found))
    if isinstance(distribution, IntDistribution):
        assert isinstance(found, int)


def test_a_place_is_in_the_branch_that_is_searched_there():
    searched = {
        "clip.scale": CategoricalDistribution(("model", "none")),
        "fusion.alpha": FloatDistribution(0, 1),
    }
    for value, keys in (("model", ["clip.scale", "fusion.alpha"]), ("none", ["clip.scale"])):
        space = Space(searched, {"fusion.alpha": {"clip.scale": (value,)}})
        assert list(place(printed("richkd-l"), space, BASE, 1.0)) == keys  # at clip.scale model


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("setting", [printed("richkd-lf"), plain()], ids=["paper", "plain"])
def test_searched_features_weigh_in_the_first_trials_as_the_logits_do(bounds, setting, tmp_path):
    low, high = bounds
    words = ["sweep/features", f"sweep.space.fusion.feature_alpha={{uniform: [{low}, {high}]}}"]
    sweep = Sweep(tmp_path, read(words))
    point = as_printed(setting, sweep.space, flatten(to_dict(sweep.base)), 1.0)
    alpha = setting["fusion.alpha"]
    assert point.params["fusion.feature_alpha"] == min(alpha, high)
    assert sweep.resolve(point.settings).feature_alpha == alpha
    assert is_printed("richkd-lf", point.settings)


def test_other_weights_of_features_are_not_as_printed():
    own = printed("richkd-lf")
    for weight, same in ((None, True), (0.7, True), (0.0, False)):
        assert is_own("richkd-lf", own | {"fusion.feature_alpha": weight}) == same
    assert is_printed("richkd-lf", plain() | {"fusion.feature_alpha": 0.0})  # which has no features


def test_a_trial_whose_features_weighed_as_its_logits_lies_there():
    space = Space({"fusion.feature_alpha": FloatDistribution(0, 1)})
    ran = {"fusion.alpha": 0.4, "fusion.feature_alpha": None}
    assert within(space, {}, ran, {}) == {"fusion.feature_alpha": 0.4}


def test_a_place_between_two_steps_is_the_nearest_one():
    space = Space(
        {
            "fusion.alpha": FloatDistribution(0, 1, step=0.25),
            "loss.logit": FloatDistribution(0.5, 16, step=0.5),
        }
    )
    assert place({"fusion.alpha": 0.7}, space, BASE, 1.0) == {
        "fusion.alpha": 0.75,
        "loss.logit": 3.0,
    }


@given(
    st.dictionaries(
        st.sampled_from(["fusion.alpha", "loss.temperature", "train.epochs", "clip.prompts"]),
        st.one_of(st.integers(-2, 12), st.floats(-2, 12), st.sampled_from(["digits", "other"])),
    ),
    st.sampled_from([None, 0.25]),
)
def test_a_trial_of_another_sweep_is_run_as_it_was_or_refused_by_the_key(values, step):
    space = Space(
        {
            "fusion.alpha": FloatDistribution(0, 1, step=step),
            "train.epochs": IntDistribution(2, 10, step=2),
            "clip.prompts": CategoricalDistribution(("digits", "digits-bad")),
        }
    )
    fixed = {"loss.temperature": 3}
    ran = {"fusion.alpha": 0.5, "train.epochs": 4, "clip.prompts": "digits"} | fixed | values
    try:
        found = within(space, fixed, ran, values)
    except Outside as refused:
        key = str(refused).partition("=")[0]
        distribution = space.distributions.get(key)
        assert key in values
        if distribution is None:
            assert values[key] != fixed[key]
        else:
            assert not contains(distribution, values[key])
    else:
        assert all(contains(space.distributions[key], value) for key, value in found.items())
        steps = {"fusion.alpha": step or 0, "train.epochs": 2, "clip.prompts": 0}
        for key, value in found.items():  # as it was, or at the nearest step
            assert value == ran[key] or abs(value - ran[key]) <= steps[key] / 2
        assert ran["loss.temperature"] == 3


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether Optuna itself could draw a value."""
    if isinstance(distribution, IntDistribution) and not isinstance(value, int):
        return False
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


@pytest.mark.parametrize(("alpha", "placed"), [(0.55, 0.5), (0.7, 0.75), (1, 1.0), (0.25, 0.25)])
def test_a_trial_between_two_steps_begins_at_the_nearest(alpha, placed):
    space = Space({"fusion.alpha": FloatDistribution(0, 1, step=0.25)})
    ran = {"fusion.alpha": alpha}
    assert within(space, {}, ran, ran) == {"fusion.alpha": placed}


def first_of(tmp_path, cache_root, *words):
    """Return a sweep and the first trials of its main search."""
    layers = read([f"cache={cache_root}", "teacher.epochs=10", *words])
    sweep = Sweep(tmp_path / "runs" / "one", layers)
    return sweep, prepare(sweep, lambda what, done, total: None, new=True)[MAIN]


def test_a_sweep_begins_with_the_theorys_weight_and_is_not_narrowed_by_it(tmp_path, cache_root):
    sweep, points = first_of(tmp_path, cache_root)
    assert [point.source for point in points] == ["paper", "paper", "theory"]
    found, start = sweep.diagnosis, points[-1]
    assert start.params["fusion.alpha"] == found["alpha_star"]["full"]
    assert start.params["clip.prompts"] == found["prompts"]
    # as printed: relative to the task teacher's logits, so as sharp as plain distillation's target
    assert (start.settings["loss.temperature"], start.settings["loss.temperature_of"]) == (
        3,
        "task",
    )
    assert start.settings["loss.logit"] == 3
    assert len(found["clip"]) == 4
    low_high = sweep.space.distributions["fusion.alpha"]
    assert (low_high.low, low_high.high) == (0, 1)


def test_where_temperatures_are_of_fused_logits_the_theorys_keeps_the_target_as_sharp(
    tmp_path, cache_root
):
    fused = "sweep.settings={loss.temperature_of: fused}"
    sweep, points = first_of(tmp_path, cache_root, fused)
    config = sweep.resolve(points[-1].settings)
    task = distill.open_task(config)
    teacher = distill.open_teacher(config, task)
    alone, both = teacher.spreads(task.split.transfer)
    assert config.loss.temperature == pytest.approx(3 * both / alone, rel=0.02)


def test_a_sweep_begins_without_theory_where_rows_cannot_tell(tmp_path, cache_root):
    for words in (["selection=paper"], ["sweep.space.fusion.alpha=null"]):
        sweep, points = first_of(tmp_path, cache_root, *words)
        assert {point.source for point in points} == {"paper"}
        assert sweep.diagnosis is None
    with pytest.warns(UserWarning, match="theory is left out: diagnose.rows=validation must hold"):
        _, points = first_of(tmp_path, cache_root, "data.validation=20")
    assert {point.source for point in points} == {"paper"}
    _, points = first_of(tmp_path, cache_root, "warmstart.sources=[paper]")
    assert {point.source for point in points} == {"paper"}


def test_theory_reads_no_test_rows_whatever_is_diagnosed(tmp_path, cache_root):
    asked = ["diagnose.rows=test", "diagnose.prompts=[digits-bad]"]
    sweep, _ = first_of(tmp_path, cache_root, *asked)
    assert sweep.diagnosis["rows"] == {"of": "validation", "n": 400}
    assert len(sweep.diagnosis["clip"]) == 4  # those that the sweep chooses from


def test_a_sweep_begins_with_the_layer_that_a_diagnosis_wrote(tmp_path, cache_root):
    start = tmp_path / "start.yaml"
    start.write_text(
        "fusion.space: logits\nfusion.alpha: 0.4\nloss.temperature: 2.0\n"
        "loss.temperature_of: fused\nclip.prompts: digits-photo\nclip.scale: model\n"
    )
    sweep, points = first_of(tmp_path, cache_root, f"warmstart.sources=[paper, {start}]")
    own = points[-1]
    assert own.source == "start.yaml"
    config = sweep.resolve(own.settings)
    assert (config.fusion.alpha, config.clip.prompts) == (0.4, "digits-photo")
    # run as it stands; placed where the searched temperature, of the task teacher's logits, is as sharp
    assert (config.loss.temperature, config.loss.temperature_of) == (2.0, "fused")
    teacher = distill.open_teacher(config, task := distill.open_task(config))
    alone, fused = teacher.spreads(task.split.transfer)
    assert own.params["loss.temperature"] == pytest.approx(2 * alone / fused)
    assert own.params["fusion.alpha"] == 0.4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data.seed: 1", "it sets data.seed, which all trials of a sweep share"),
        ("fusion.alhpa: 1", "did you mean"),
        (None, "neither a file here"),
    ],
)
def test_a_layer_that_no_trial_can_begin_with_is_refused(tmp_path, cache_root, text, said):
    start = tmp_path / "start.yaml"
    if text is not None:
        start.write_text(text)
    with pytest.raises(ConfigError, match=said):
        first_of(tmp_path, cache_root, f"warmstart.sources=[{start}]")
