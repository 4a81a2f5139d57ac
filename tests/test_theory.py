"""The theory of two teachers: against dense grids, NumPy, and real CLIP outputs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real import needs_real_outputs, outputs
from scipy.optimize import minimize

from richkd import fusion, theory
from richkd.errors import DataError

GRID = np.linspace(0, 1, 101)


def made(seed: int, n: int, k: int, noise: float = 1.0, tie: float = 0.0):
    """Return logits of two teachers whose errors correlate by about `tie`, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    right, shared = 3 * np.eye(k)[labels], rng.normal(size=(n, k))
    own, other = rng.normal(size=(2, n, k))
    task = right + tie * shared + math.sqrt(1 - tie * tie) * own
    clip = right + noise * (tie * shared + math.sqrt(1 - tie * tie) * other)
    return torch.from_numpy(task), torch.from_numpy(clip), torch.from_numpy(labels)


def measured(task, clip, labels, weight: float) -> float:
    """The mean squared error at a weight of standardised logits, straight from its definition."""

    def unit(x):
        x = x - x.mean(1, keepdims=True)
        return x / np.sqrt((x**2).mean())

    task, clip = (unit(each.numpy().astype(float)) for each in (task, clip))
    right = unit(np.eye(task.shape[1])[labels.numpy()])
    return ((weight * task + (1 - weight) * clip - right) ** 2).mean()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(2, 60),
    k=st.integers(2, 8),
    noise=st.floats(0, 5),
    tie=st.floats(-1, 1),
)
def test_the_full_form_is_the_minimiser_and_the_error_is_predicted_exactly(seed, n, k, noise, tie):
    task, clip, labels = made(seed, n, k, noise, tie)
    found = theory.errors(task, clip, labels)
    each = [measured(task, clip, labels, a) for a in GRID]
    best = found.full()
    assert 0 <= best <= 1
    assert measured(task, clip, labels, best) <= min(each) + 1e-9
    np.testing.assert_allclose([found.error(a) for a in GRID], each, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("sign", [1, -1])
def test_errors_that_are_equal_or_opposite_have_a_weight(sign):
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(np.arange(40) % 4)
    right, noise = theory.truth(labels, 4), rng.normal(size=(40, 4))
    noise = fusion.centre(torch.from_numpy(noise))
    noise -= (noise * right).mean() / right.square().mean() * right  # so both have one spread
    task, clip = right + 0.05 * noise, right + sign * 0.05 * noise
    found = theory.errors(task, clip, labels)
    assert found.rho == pytest.approx(sign, abs=0.02)
    assert found.full() == (1.0 if sign == 1 else pytest.approx(0.5))
    assert found.printed() == (1.0 if sign == 1 else pytest.approx(0.5))
    if sign == -1:  # opposite errors cancel
        assert found.error(0.5) < 0.01 * found.error(1)


def test_a_teacher_without_errors_takes_all_the_weight():
    task, _, labels = made(1, 50, 5)
    exact = 7.0 * torch.nn.functional.one_hot(labels, 5).double() + 3
    found = theory.errors(task, exact, labels)
    assert max(found.sigma_c, found.bias_c) < 1e-12
    assert found.rho == 0
    assert found.full() == pytest.approx(0, abs=1e-12)
    assert theory.errors(exact, task, labels).full() == pytest.approx(1)


def test_a_class_that_no_row_has_is_no_obstacle():
    task, clip, labels = made(2, 60, 5)
    kept = labels != 3
    found = theory.errors(task[kept], clip[kept], labels[kept])
    each = [measured(task[kept], clip[kept], labels[kept], a) for a in GRID]
    assert found.error(found.full()) <= min(each) + 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.floats(-50, 50), scale=st.floats(0.01, 100))
def test_constants_of_rows_and_the_scale_of_a_teacher_change_no_error(seed, size, scale):
    task, clip, labels = made(seed, 30, 4)
    rows = size * torch.from_numpy(np.random.default_rng(seed).normal(size=(30, 1)))
    ours, theirs = (
        theory.errors(task, clip, labels),
        theory.errors(task + rows, scale * clip + size, labels),
    )
    for name in ("bias_t", "bias_c", "bias", "sigma_t", "sigma_c", "rho"):
        assert getattr(theirs, name) == pytest.approx(getattr(ours, name), abs=1e-9)
    assert theirs.spread_c == pytest.approx(scale * ours.spread_c)
    # what is mapped mixes the same logits, whatever their scale
    alpha = theirs.mapped(theirs.full())
    assert alpha / (1 - alpha) == pytest.approx(
        scale * ours.mapped(ours.full()) / (1 - ours.mapped(ours.full())), rel=1e-6
    )


@given(weight=st.floats(0, 1))
def test_mapping_a_weight_and_back_is_the_identity_and_mixes_the_same_logits(weight):
    task, clip, labels = made(3, 20, 4, noise=2)
    found = theory.errors(5 * task, clip, labels)
    alpha = found.mapped(weight)
    assert found.standardised(alpha) == pytest.approx(weight, abs=1e-9)
    mixed = fusion.centre(fusion.fuse(5 * task, clip, alpha))
    unit = (
        weight * theory.standardise(5 * task, "")[0]
        + (1 - weight) * theory.standardise(clip, "")[0]
    )
    np.testing.assert_allclose(mixed / mixed.norm(), unit / unit.norm(), atol=1e-9)


def test_the_likeliest_weight_is_that_of_a_fine_grid_of_weights_each_with_its_own_temperature():
    task, clip, labels = made(4, 400, 5, noise=1.5, tie=0.3)
    found = theory.likeliest(task, clip, labels)

    def nll(alpha):
        fused = fusion.fuse(task, clip, alpha)
        fused = fused / fusion.fit_temperature(fused, labels)
        return torch.nn.functional.cross_entropy(fused, labels).item()

    best = min(GRID, key=nll)
    assert abs(found - best) <= 0.01
    assert theory.likeliest(task + 9, 3 * clip, labels) == pytest.approx(
        found / (found + (1 - found) / 3), abs=1e-3
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 4), rank=st.integers(1, 4))
def test_shares_of_several_teachers_are_the_constrained_minimum(seed, count, rank):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(count, rank))
    moments = factor @ factor.T
    found = theory.shares(torch.from_numpy(moments)).numpy()
    assert (found >= 0).all() and found.sum() == pytest.approx(1)
    least = min(
        minimize(
            lambda w: w @ moments @ w,
            start,
            bounds=[(0, 1)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            method="SLSQP",
        ).fun
        for start in (np.full(count, 1 / count), np.eye(count)[0])
    )
    assert found @ moments @ found <= least + 1e-6


def test_shares_of_two_teachers_are_the_full_form():
    task, clip, labels = made(5, 80, 6, noise=1.4, tie=0.2)
    moments, spreads = theory.second_moments([task, 3 * clip], labels)
    found, both = theory.shares(moments), theory.errors(task, 3 * clip, labels)
    assert found[0].item() == pytest.approx(both.full())
    assert theory.mapped_shares(found, spreads)[0] == pytest.approx(both.mapped(both.full()))


def test_a_constant_teacher_is_refused():
    task, _, labels = made(6, 20, 4)
    with pytest.raises(DataError, match="CLIP must differ between classes"):
        theory.errors(task, torch.ones(20, 4), labels)
    with pytest.raises(DataError, match="task teacher must differ between classes"):
        theory.errors(torch.arange(20.0)[:, None].expand(20, 4), task, labels)
    with pytest.raises(DataError, match="one shape"):
        theory.errors(task, task[:, :3], labels)


@needs_real_outputs
@pytest.mark.parametrize(
    ("teacher", "prompts", "gap"),
    [("resnet20", "english", -0.08), ("resnet20", "french", -0.13)],
)
def test_on_real_clip_outputs_printed_and_full_form_differ_as_measured(teacher, prompts, gap):
    task, clip, labels = outputs(teacher, prompts)
    found = theory.errors(task, clip, labels)
    assert found.printed() - found.full() == pytest.approx(gap, abs=0.01)
    if prompts == "english":
        assert found.full() == pytest.approx(0.58, abs=0.01)
        assert found.mapped(found.full()) == pytest.approx(0.26, abs=0.01)


@needs_real_outputs
@pytest.mark.parametrize(
    ("teacher", "mapped", "nll"),
    [
        ("resnet20", 95.3, 95.3),
        pytest.param("resnet56", 95.4, 95.8, marks=pytest.mark.soak),
    ],
)
def test_on_real_clip_outputs_the_mapped_weight_of_500_rows_is_right_on_the_others(
    teacher, mapped, nll
):
    task, clip, labels = outputs(teacher, "english")
    rng, found = np.random.default_rng(0), []
    for _ in range(20):
        rows = torch.from_numpy(rng.permutation(len(labels)))
        some, others = rows[:500], rows[500:]
        own = theory.errors(task[some], clip[some], labels[some])
        weights = own.mapped(own.full()), theory.likeliest(task[some], clip[some], labels[some])
        fused = (fusion.fuse(task[others], clip[others], a) for a in weights)
        found.append([100 * (z.argmax(1) == labels[others]).double().mean() for z in fused])
    ours, rival = np.mean(found, 0)
    assert ours >= mapped
    assert rival >= nll


@needs_real_outputs
def test_errors_of_raw_logits_would_be_nonsense():
    """Why logits are centred and standardised: CLIP's offset would be its bias."""
    task, clip, labels = outputs("resnet20", "english")
    right = torch.nn.functional.one_hot(labels, 10)
    assert (clip - right).mean().item() == pytest.approx(21.9, abs=0.1)
    assert theory.errors(task, clip, labels).bias_c < 1
