"""Losses against float64 numpy, their gradients, and their sums over slices of a batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from richkd import fusion
from richkd.losses import cross_entropy, dkd, kd

ROWS, CLASSES = 7, 5
LOGITS = arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-30, 30, width=32))
LABELS = arrays(np.int64, ROWS, elements=st.integers(-1, CLASSES - 1))
CUTS = st.lists(st.integers(0, ROWS), max_size=3).map(lambda cuts: [0, *sorted(cuts), ROWS])


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def normal(*shape, seed=0, std=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, std, shape).astype(np.float32))


@settings(deadline=None)
@given(student=LOGITS, teacher=LOGITS, temperature=st.floats(0.5, 20))
def test_kd_is_the_divergence_times_t_squared(student, teacher, temperature):
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    expected = temperature**2 * (np.exp(p) * (p - q)).sum() / ROWS
    target = torch.log_softmax(torch.from_numpy(teacher) / temperature, 1)
    found = kd(torch.from_numpy(student), target, temperature, ROWS).item()
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4 * temperature**2)


def test_kd_of_equal_logits_is_zero_and_rests_there():
    student = normal(ROWS, CLASSES, std=5).requires_grad_()
    loss = kd(student, torch.log_softmax(student.detach() / 3, 1), 3.0, ROWS)
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert student.grad.abs().max() < 1e-6


def test_kd_has_the_gradient_of_finite_differences():
    student = normal(3, CLASSES).double().requires_grad_()
    target = torch.log_softmax(normal(3, CLASSES, seed=1).double() / 3, 1)
    assert torch.autograd.gradcheck(lambda logits: kd(logits, target, 3.0, 3), student)


def test_kd_at_a_high_temperature_matches_centred_logits():
    # Hinton et al. 2015, Sec. 2.1: T^2 KL tends to half the squared distance over K
    student = normal(ROWS, CLASSES, std=2).double().requires_grad_()
    teacher = normal(ROWS, CLASSES, seed=1, std=2).double()
    kd(student, torch.log_softmax(teacher / 1e4, 1), 1e4, ROWS).backward()
    expected = fusion.centre(student.detach() - teacher) / CLASSES / ROWS
    torch.testing.assert_close(student.grad, expected, rtol=1e-2, atol=1e-5)


def test_t_squared_keeps_the_gradient_comparable_at_high_temperatures():
    sizes = []
    for temperature in (20.0, 200.0):
        student = normal(ROWS, CLASSES).double().requires_grad_()
        target = torch.log_softmax(normal(ROWS, CLASSES, seed=1).double() / temperature, 1)
        kd(student, target, temperature, ROWS).backward()
        sizes.append(student.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_richkd_at_alpha_one_is_kd_bit_for_bit():
    student, task, clip = (normal(ROWS, CLASSES, seed=seed, std=8) for seed in range(3))
    fused = kd(student, fusion.target(task, clip, 1.0, 3.0, "logits"), 3.0, ROWS)
    assert torch.equal(fused, kd(student, torch.log_softmax(task / 3.0, 1), 3.0, ROWS))


@settings(deadline=None)
@given(logits=LOGITS, labels=LABELS)
def test_cross_entropy_is_the_mean_over_labelled_rows_alone(logits, labels):
    known = np.flatnonzero(labels >= 0)
    expected = -log_softmax(logits)[known, labels[known]].mean() if len(known) else 0.0
    found = cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), len(known)).item()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_unlabelled_rows_have_no_gradient():
    logits = normal(4, CLASSES).requires_grad_()
    cross_entropy(logits, torch.tensor([2, -1, 0, -1]), 2).backward()
    assert logits.grad[[1, 3]].eq(0).all()
    assert logits.grad[[0, 2]].ne(0).any(1).all()


def test_a_batch_without_labels_has_loss_and_gradient_zero():
    logits = normal(ROWS, CLASSES).requires_grad_()
    loss = cross_entropy(logits, torch.full((ROWS,), -1), 0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.eq(0).all()


@settings(deadline=None)
@given(logits=LOGITS, teacher=LOGITS, labels=LABELS, cuts=CUTS)
def test_slices_of_a_batch_add_up_to_the_whole(logits, teacher, labels, cuts):
    def losses(rows):
        given = torch.from_numpy(logits[rows]).double().requires_grad_()
        target = torch.log_softmax(torch.from_numpy(teacher[rows]).double() / 3, 1)
        ce = cross_entropy(given, torch.from_numpy(labels[rows]), int((labels >= 0).sum()))
        values = torch.stack([ce, kd(given, target, 3.0, ROWS)])
        values.sum().backward()
        return values.detach(), given.grad

    whole, gradient = losses(slice(None))
    parts = [losses(slice(low, high)) for low, high in zip(cuts, cuts[1:], strict=False)]
    torch.testing.assert_close(sum(values for values, _ in parts), whole)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient)


def decoupled(student, teacher, labels, temperature, alpha, beta):
    """DKD as its equations say, in float64 and row by row."""
    total = 0.0
    for s, t, label in zip(student, teacher, labels, strict=True):
        p, q = (np.exp(log_softmax(z[None] / temperature)[0]) for z in (t, s))
        label = p.argmax() if label < 0 else label
        others = np.arange(len(p)) != label
        two = [(each[label], each[others].sum()) for each in (p, q)]
        target = sum(a * np.log(a / b) for a, b in zip(*two, strict=True))
        rest = [each[others] / each[others].sum() for each in (p, q)]
        nontarget = (rest[0] * np.log(rest[0] / rest[1])).sum()
        total += temperature**2 * (alpha * target + beta * nontarget)
    return total / len(student)


@settings(deadline=None)
@given(
    student=arrays(np.float64, (ROWS, CLASSES), elements=st.floats(-20, 20)),
    teacher=arrays(np.float64, (ROWS, CLASSES), elements=st.floats(-20, 20)),
    labels=LABELS,
    temperature=st.floats(1, 20),
    alpha=st.floats(0, 4),
    beta=st.floats(0, 16),
)
def test_dkd_is_its_equations(student, teacher, labels, temperature, alpha, beta):
    target = torch.log_softmax(torch.from_numpy(teacher) / temperature, 1)
    given = (torch.from_numpy(labels), temperature, alpha, beta, ROWS)
    found = dkd(torch.from_numpy(student), target, *given).item()
    expected = decoupled(student, teacher, labels, temperature, alpha, beta)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_dkd_weighted_by_the_teachers_doubt_is_kd():
    # Zhao et al. 2022, Eq. 7: KD = TCKD + (1 - p_target) NCKD, row by row
    student, teacher = normal(1, CLASSES).double(), normal(1, CLASSES, seed=1).double()
    target, label = torch.log_softmax(teacher / 4, 1), torch.tensor([2])
    doubt = 1 - target.exp()[0, 2].item()
    found = dkd(student, target, label, 4.0, 1.0, doubt, 1)
    torch.testing.assert_close(found, kd(student, target, 4.0, 1))


def test_dkd_has_the_gradient_of_finite_differences():
    student = normal(3, CLASSES).double().requires_grad_()
    target = torch.log_softmax(normal(3, CLASSES, seed=1).double() / 4, 1)
    labels = torch.tensor([0, -1, 4])
    assert torch.autograd.gradcheck(lambda z: dkd(z, target, labels, 4.0, 1.0, 8.0, 3), student)


def test_a_sure_teacher_leaves_dkd_finite():
    student = normal(2, CLASSES).requires_grad_()
    target = torch.log_softmax(torch.eye(CLASSES)[:2] * 400, 1)
    loss = dkd(student, target, torch.tensor([0, 1]), 1.0, 1.0, 8.0, 2)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@settings(deadline=None)
@given(logits=arrays(np.float32, (ROWS, CLASSES), elements=st.floats(-30, 30, width=32)))
def test_standardised_rows_have_mean_zero_and_deviation_one(logits):
    logits = logits + np.arange(CLASSES, dtype=np.float32)  # never constant to rounding
    wide = logits.astype(np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / (wide.std(1, ddof=1, keepdims=True) + 1e-7)
    found = fusion.standardise(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_standardising_forgets_size_and_offset_alone():
    logits = normal(ROWS, CLASSES).double()
    torch.testing.assert_close(
        fusion.standardise(7 * logits + 3), fusion.standardise(logits), rtol=1e-5, atol=1e-6
    )


@settings(deadline=None)
@given(logits=LOGITS, labels=LABELS, smoothing=st.floats(0, 0.9))
def test_smoothed_labels_share_out_what_they_say(logits, labels, smoothing):
    known = np.flatnonzero(labels >= 0)
    soft = np.full((ROWS, CLASSES), smoothing / CLASSES)
    soft[known, labels[known]] += 1 - smoothing
    expected = -(soft * log_softmax(logits))[known].sum() / max(len(known), 1)
    given = torch.from_numpy(logits), torch.from_numpy(labels), len(known)
    assert cross_entropy(*given, smoothing).item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
