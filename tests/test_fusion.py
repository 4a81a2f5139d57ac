"""The fused target against float64 numpy, and what scales, prompts and constants do to it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import logsumexp

from richkd import fusion
from richkd.errors import ConfigError, DataError
from richkd.losses import kd

ROWS, CLASSES = 6, 5
LOGITS = arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-40, 40, width=32))
ALPHA = st.floats(0, 1)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def mixture(task, clip, alpha, temperature, space):
    """The target's probabilities, straight from Sec. 3 and from the supplement's theory section."""
    task, clip = task.astype(np.float64), clip.astype(np.float64)
    if space == "logits":
        return softmax((alpha * task + (1 - alpha) * clip) / temperature)
    return alpha * softmax(task / temperature) + (1 - alpha) * softmax(clip / temperature)


def normal(*shape, seed=0, std=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, std, shape).astype(np.float32))


def unit(*shape, seed=0):
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


@pytest.mark.parametrize("space", ["logits", "probs"])
@settings(deadline=None)
@given(task=LOGITS, clip=LOGITS, alpha=ALPHA, temperature=st.floats(0.5, 20))
def test_the_target_is_the_mixture_of_the_paper(space, task, clip, alpha, temperature):
    found = fusion.target(torch.from_numpy(task), torch.from_numpy(clip), alpha, temperature, space)
    expected = mixture(task, clip, alpha, temperature, space)
    np.testing.assert_allclose(found.double().exp().numpy(), expected, rtol=1e-4, atol=1e-7)
    assert found.isfinite().all()


@pytest.mark.parametrize("space", ["logits", "probs"])
@pytest.mark.parametrize("other", [0.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_teacher_of_weight_zero_changes_no_bit(space, other, alpha):
    kept, silent = normal(ROWS, CLASSES, std=8), torch.full((ROWS, CLASSES), other)
    pair = (kept, silent) if alpha == 1 else (silent, kept)
    found = fusion.target(*pair, alpha, 3.0, space)
    assert torch.equal(found, torch.log_softmax(kept / 3.0, 1))
    if space == "logits":
        assert torch.equal(fusion.fuse(*pair, alpha), kept)


@pytest.mark.parametrize("space", ["logits", "probs"])
@settings(deadline=None)
@given(
    task=LOGITS,
    clip=LOGITS,
    alpha=ALPHA,
    shift=arrays(np.float32, (2, ROWS, 1), elements=st.floats(-64, 64, width=32)),
)
def test_a_constant_added_to_a_row_changes_nothing(space, task, clip, alpha, shift):
    # float32 keeps a logit of 104 to 4e-6, and so the target and the loss to some 1e-5
    student, pairs = normal(ROWS, CLASSES, seed=9), []
    for moved in (0 * shift, shift):
        pairs.append((torch.from_numpy(task + moved[0]), torch.from_numpy(clip + moved[1])))
    targets = [fusion.target(*pair, alpha, 2.0, space) for pair in pairs]
    torch.testing.assert_close(*[target.exp() for target in targets], atol=5e-5, rtol=0)
    losses = [kd(student, target, 2.0, ROWS) for target in targets]
    torch.testing.assert_close(*losses, atol=2e-3, rtol=1e-4)
    spreads = [fusion.spread(fusion.fuse(*pair, alpha)) for pair in pairs]
    assert spreads[0] == pytest.approx(spreads[1], abs=2e-5)


def test_spread_is_the_deviation_around_the_mean_of_each_row():
    logits = normal(50, 10, std=3) + normal(50, 1, seed=1, std=20)
    double = logits.double().numpy()
    expected = (double - double.mean(1, keepdims=True)).std()
    assert fusion.spread(logits) == pytest.approx(expected, rel=1e-12)
    assert torch.allclose(fusion.centre(logits).mean(1), torch.zeros(50), atol=1e-5)
    assert fusion.spread(iter(logits.split(7))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("space", ["logits", "probs"])
def test_teachers_of_two_shapes_are_refused_by_both_shapes(space):
    with pytest.raises(DataError, match=r"\(6, 5\).*\(6, 4\)"):
        fusion.target(torch.zeros(6, 5), torch.zeros(6, 4), 0.5, 3.0, space)


@settings(deadline=None)
@given(logits=LOGITS)
def test_entropy_is_that_of_the_formula(logits):
    probs = softmax(logits.astype(np.float64))
    terms = np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-300)), 0)
    found = fusion.entropy(torch.log_softmax(torch.from_numpy(logits), 1)).item()
    assert found == pytest.approx(-terms.sum(1).mean(), abs=1e-5)


def test_entropy_lies_between_certainty_and_the_uniform():
    certain = torch.log_softmax(torch.tensor([[1e4, 0.0, 0.0]]), 1)
    assert fusion.entropy(certain) == 0
    assert fusion.entropy(torch.zeros(2, 8).log_softmax(1)).item() == pytest.approx(np.log(8))


@pytest.mark.parametrize("prompts", [1, 3, 12])
@pytest.mark.parametrize("reduce", ["embedding", "logits", "probs"])
def test_zero_shot_logits_are_those_of_the_formula(reduce, prompts):
    image, text = unit(7, 16), unit(prompts, CLASSES, 16, seed=1)
    found = fusion.zero_shot_logits(image, text, 100.0, reduce).double().numpy()
    x, w = image.double().numpy(), text.double().numpy()
    each = np.stack([100 * x @ prompt.T for prompt in w])
    if reduce == "probs":
        expected = np.log(np.mean([softmax(logits) for logits in each], 0))
    elif reduce == "logits":
        expected = each.mean(0)
    else:
        mean = w.mean(0)
        expected = 100 * x @ (mean / np.linalg.norm(mean, axis=1, keepdims=True)).T
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_mean_logits_are_those_of_the_mean_feature_times_its_length():
    image, text = unit(7, 16), unit(4, CLASSES, 16, seed=1)
    length = text.mean(0).norm(dim=1)
    embedding = fusion.zero_shot_logits(image, text, 100.0, "embedding")
    logits = fusion.zero_shot_logits(image, text, 100.0, "logits")
    torch.testing.assert_close(logits, embedding * length, atol=1e-4, rtol=1e-5)


def test_one_prompt_needs_no_reduction():
    image, text = unit(7, 16), unit(1, CLASSES, 16, seed=1)
    found = [
        fusion.zero_shot_logits(image, text, 50.0, r) for r in ("embedding", "logits", "probs")
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(found[0].log_softmax(1), found[2], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("scale", "factor"), [("model", 1.0), (25, 0.25), (25.0, 0.25), (100, 1.0)]
)
def test_a_scale_is_relative_to_the_model_s_own(scale, factor):
    assert fusion.scale_factor(scale, logit_scale=100.0) == pytest.approx(factor)


def test_raw_cosines_are_taken_with_a_warning():
    with pytest.warns(UserWarning, match=r"clip\.scale=none.*use clip\.scale=model"):
        assert fusion.scale_factor("none", logit_scale=100.0) == pytest.approx(0.01)


@pytest.mark.parametrize("scale", ["none", 25, 25.0])
def test_a_scale_of_cosines_is_refused_for_given_logits(scale):
    with pytest.raises(ConfigError, match=r"clip\.logits.*use clip\.scale=model"):
        fusion.scale_factor(scale, logit_scale=None)


def test_given_logits_are_taken_at_the_scale_they_have():
    assert fusion.scale_factor("model", logit_scale=None) == 1.0


def test_match_std_makes_both_spreads_equal_whatever_the_offset():
    task, clip = normal(200, 10, std=8), 22 + normal(200, 10, seed=1, std=2)
    factor = fusion.scale_factor("match_std", logit_scale=None, transfer=(task, clip))
    assert fusion.spread(factor * clip) == pytest.approx(fusion.spread(task), rel=1e-6)


def test_match_std_refuses_zero_shot_logits_that_say_nothing():
    with pytest.raises(DataError, match=r"match_std.*same for all classes"):
        constant = torch.full((4, 3), 22.3)
        fusion.scale_factor("match_std", logit_scale=None, transfer=(normal(4, 3), constant))


def held_out(sharpness, seed=0, rows=600):
    """Logits `sharpness` times too large for labels drawn from them."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (rows, CLASSES))
    labels = np.array([rng.choice(CLASSES, p=p) for p in softmax(logits)])
    return torch.from_numpy((sharpness * logits + 22).astype(np.float32)), torch.from_numpy(labels)


@pytest.mark.parametrize("sharpness", [0.02, 1.0, 30.0])
def test_a_temperature_is_as_good_as_the_best_of_a_dense_grid(sharpness):
    logits, labels = held_out(sharpness)
    found = fusion.fit_temperature(logits, labels)

    def nll(temperature):
        scaled = logits.double().numpy() / temperature
        own = scaled[np.arange(len(scaled)), labels.numpy()]
        return (logsumexp(scaled, 1) - own).mean()

    grid = np.geomspace(1e-3, 1e3, 600)
    best = min(map(nll, grid))
    assert nll(found) <= best + 1e-9
    assert found == pytest.approx(sharpness, rel=0.2)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_temperature_moves_with_the_unit_of_the_logits(scale):
    for logits, labels in (held_out(1.0), (normal(600, CLASSES, seed=8), held_out(1.0)[1])):
        once = fusion.fit_temperature(logits, labels)
        assert fusion.fit_temperature(scale * logits, labels) == pytest.approx(
            scale * once, rel=1e-2
        )


def test_a_temperature_of_logits_that_say_nothing_is_refused():
    with pytest.raises(DataError, match="same for all classes"):
        fusion.fit_temperature(torch.full((4, 3), 22.3), torch.arange(4) % 3)


def test_calibrated_is_the_quotient_of_the_two_temperatures():
    task, labels = held_out(4.0)
    clip = task / 10 + normal(*task.shape, seed=3, std=0.1)
    factor = fusion.scale_factor("calibrated", logit_scale=None, held_out=(task, clip, labels))
    expected = fusion.fit_temperature(task, labels) / fusion.fit_temperature(clip, labels)
    assert factor == pytest.approx(expected)
    # after it, both are calibrated by one temperature: the task teacher's
    assert fusion.fit_temperature(factor * clip, labels) == pytest.approx(
        fusion.fit_temperature(task, labels), rel=1e-3
    )


def test_a_useless_teacher_is_flattened_and_not_refused():
    _, labels = held_out(1.0)
    assert fusion.fit_temperature(normal(600, CLASSES, seed=8, std=5), labels) > 10


def test_a_teacher_without_an_error_has_no_temperature():
    labels = torch.arange(20) % CLASSES
    logits = 3 * torch.nn.functional.one_hot(labels, CLASSES).float()
    with pytest.raises(DataError, match="right on all 20 held-out rows"):
        fusion.fit_temperature(logits, labels)
