"""Contrast and its banks against float64 numpy: values, gradients, who is told from whom, what is kept."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from richkd.banks import Banks
from richkd.config import Contrast
from richkd.errors import ConfigError
from richkd.losses import contrast, similarities
from richkd.workers import Group

CPU, ALONE = torch.device("cpu"), Group()
CLASSES = torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 0, 1, 0, 1])


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    drawn = np.random.default_rng(seed).normal(size=shape)
    return torch.from_numpy(drawn / np.linalg.norm(drawn, axis=-1, keepdims=True))


def banks_of(classes=CLASSES, seed: int = 0, **settings) -> Banks:
    made = Banks(classes, Contrast(**{"width": 4, "negatives": 6} | settings), seed, CPU)
    made.begin(0)
    return made


def published(embeddings, bank, chosen, temperature, normaliser, bank_rows, rows):
    """The loss as CRD's authors wrote it: rows are copied, one product each, probabilities, logarithms."""
    embeddings, bank = (np.asarray(each, np.float64) for each in (embeddings, bank))
    total, noise = 0.0, (chosen.shape[1] - 1) / bank_rows
    for own, rows_of in zip(embeddings, np.asarray(chosen), strict=True):
        scores = np.exp(bank[rows_of] @ own / temperature) / normaliser
        total -= np.log(scores[0] / (scores[0] + noise + 1e-7))
        total -= np.log(noise / (scores[1:] + noise + 1e-7)).sum()
    return total / rows


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 5),
    negatives=st.integers(1, 9),
    temperature=st.floats(0.05, 2),
    normaliser=st.floats(1, 1e5),
    seed=st.integers(0, 99),
)
def test_contrast_is_the_published_loss(rows, negatives, temperature, normaliser, seed):
    own, bank = units(rows, 4, seed=seed), units(12, 4, seed=seed + 1)
    chosen = torch.from_numpy(np.random.default_rng(seed).integers(12, size=(rows, negatives + 1)))
    similarity = similarities(own, bank, chosen, temperature)
    found = contrast(similarity, torch.tensor(normaliser, dtype=torch.float64), 12, 5)
    expected = published(own, bank, chosen, temperature, normaliser, 12, 5)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_the_product_with_the_whole_bank_gives_numbers_and_gradients_of_the_product_with_chosen_rows():
    bank, chosen = units(50, 8, seed=1).float(), torch.randint(50, (6, 30))
    found = []
    for form in ("whole", "gathered"):
        own = units(6, 8).float().requires_grad_()
        if form == "whole":
            scores = similarities(own, bank, chosen, 0.07)
        else:
            scores = (bank[chosen] @ own[:, :, None]).squeeze(2) / 0.07
        loss = contrast(scores, torch.tensor(40.0), 50, 6)
        loss.backward()
        found.append((loss.detach(), own.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_contrast_has_the_gradient_of_finite_differences():
    bank, chosen = units(9, 3, seed=1), torch.tensor([[0, 1, 1, 5], [3, 2, 8, 4]])
    own = units(2, 3).requires_grad_()

    def loss(embeddings):
        return contrast(similarities(embeddings, bank, chosen, 0.5), torch.tensor(7.0), 9, 2)

    assert torch.autograd.gradcheck(loss, own)


@pytest.mark.parametrize("replacement", [True, False])
def test_negatives_are_of_other_classes_and_unlabelled_rows_exclude_themselves_alone(replacement):
    banks, rows = banks_of(replacement=replacement), torch.arange(len(CLASSES)).repeat(300)
    chosen = banks.draw(rows)
    assert torch.equal(chosen[:, 0], rows)
    for row, own in enumerate(CLASSES.tolist()):
        drawn = set(chosen[rows == row, 1:].flatten().tolist())
        others = {k for k, other in enumerate(CLASSES.tolist()) if other != own or own == -1}
        assert drawn == others - {row}
    if not replacement:
        assert all(len(set(each)) == 7 for each in chosen.tolist())


@pytest.mark.parametrize("replacement", [True, False])
def test_all_rows_of_other_classes_are_drawn_alike(replacement):
    banks, rows = banks_of(replacement=replacement), torch.zeros(20_000, dtype=torch.long)
    chosen = torch.cat([banks.draw(part)[:, 1:] for part in rows.split(4)])
    counts = torch.bincount(chosen.flatten(), minlength=len(CLASSES))[CLASSES != 0].double()
    assert (counts / counts.mean() - 1).abs().max() < 0.03


def test_draws_depend_on_seed_and_epoch_alone():
    rows, found = torch.arange(5), []
    for seed, epoch in ((0, 0), (0, 0), (1, 0), (0, 1)):
        banks = banks_of(seed=seed)
        banks.begin(epoch)
        found.append(banks.draw(rows))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_a_batch_moves_its_rows_half_way_and_back_to_unit_length():
    banks, rows = banks_of(), torch.tensor([7, 2])
    before = [banks.student.clone(), banks.teacher.clone()]
    new = [units(2, 4, seed=seed).float() for seed in (1, 2)]
    banks.update(*new, rows, 2, ALONE)
    for bank, old, embeddings in zip((banks.student, banks.teacher), before, new, strict=True):
        expected = old.double().numpy()
        moved = 0.5 * expected[rows] + 0.5 * embeddings.double().numpy()
        expected[rows] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        np.testing.assert_allclose(bank, expected, rtol=1e-5, atol=1e-6)


def test_of_a_row_that_is_there_twice_the_last_counts():
    once, twice = banks_of(), banks_of()
    new = units(3, 4).float()
    once.update(new[1:], new[1:], torch.tensor([3, 5]), 2, ALONE)
    twice.update(new, new, torch.tensor([5, 3, 5]), 3, ALONE)
    assert torch.equal(once.student, twice.student)


def test_both_sides_are_told_from_the_others_bank_and_normalised_by_the_first_batch():
    banks, rows = banks_of(), torch.tensor([0, 1, 4])
    own, fused = units(3, 4, seed=3).float(), units(3, 4, seed=4).float()
    chosen = banks.draw(rows)
    banks.begin(0)
    found = banks.loss(own, fused, rows, 3, ALONE)
    expected, constants = 0.0, []
    for embeddings, bank in ((own, banks.teacher), (fused, banks.student)):
        scores = np.exp(np.einsum("bd,bkd->bk", embeddings, bank[chosen]) / 0.07)
        constants.append(scores.mean() * 12)
        expected += published(embeddings, bank, chosen, 0.07, constants[-1], 12, 3)
    assert found.item() == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(banks.normalisers, constants, rtol=1e-5)
    kept = banks.normalisers.clone()
    banks.loss(fused, own, rows, 3, ALONE)
    assert torch.equal(banks.normalisers, kept)


def test_a_first_batch_of_random_vectors_costs_what_the_published_loss_does():
    # all scores alike: x = 1 / n, so that each side is log(1 + K) + K log(1 + 1 / K)
    banks = Banks(torch.arange(50_000) // 500, Contrast(), 0, CPU)
    banks.begin(0)
    # within the spread of random similarities at temperature 0.07
    sides = 2 * (np.log(1 + 16384) + 16384 * np.log(1 + 1 / 16384))
    own, fused = units(8, 128).float(), units(8, 128, seed=1).float()
    found = banks.loss(own, fused, torch.arange(8) * 5000, 8, ALONE)
    assert found.item() == pytest.approx(sides, rel=0.2)


def test_what_is_kept_comes_back_and_normalisers_are_not_set_anew():
    banks, rows = banks_of(), torch.tensor([0, 1])
    new = units(2, 4).float()
    banks.loss(new, new, rows, 2, ALONE)
    banks.update(new, new, rows, 2, ALONE)
    other = banks_of(seed=9)
    other.load({name: value.clone() for name, value in banks.state().items()})
    banks.begin(1)
    other.generator.set_state(banks.generator.get_state())
    assert torch.equal(banks.loss(new, new, rows, 2, ALONE), other.loss(new, new, rows, 2, ALONE))
    assert torch.equal(banks.normalisers, other.normalisers)


def test_too_few_negatives_are_told_with_the_key():
    with pytest.raises(ConfigError, match=r"contrast needs images of other classes"):
        banks_of(torch.zeros(5, dtype=torch.long))
    assert (
        banks_of(torch.tensor([0, 0, 0, 1]), replacement=True).draw(torch.tensor([0])).eq(3).sum()
        == 6
    )
    with pytest.raises(
        ConfigError, match=r"contrast.negatives=6 must be drawn once each .* only 1"
    ):
        banks_of(torch.tensor([0, 0, 0, 1]), replacement=False)
