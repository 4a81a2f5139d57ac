"""Expected calibration error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from richkd.evaluate import accuracy, calibration


def logits_of(confidence: list[float]) -> torch.Tensor:
    """Logits of two classes whose first one has that probability."""
    p = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log()


def loop(logits: torch.Tensor, labels: torch.Tensor, bins: int) -> float:
    """The error row by row, with edges as fractions: (k / bins, (k + 1) / bins]."""
    cells: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        high = max(row)
        weights = [math.exp(value - high) for value in row]
        top = max(weights) / math.fsum(weights)
        (cell,) = [k for k in range(bins) if k / bins < top <= (k + 1) / bins]
        cells.setdefault(cell, []).append((top, weights.index(max(weights)) == label))
    return 100 * math.fsum(
        abs(math.fsum(t for t, _ in cell) - sum(r for _, r in cell)) for cell in cells.values()
    ) / len(labels)  # fmt: skip


def drawn(seed: int, n: int, classes: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels that agree more often than by chance."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = scale * torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += scale
    return logits, labels


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 200),
    classes=st.integers(2, 9),
    scale=st.floats(0.1, 20),
    bins=st.integers(1, 20),
)
def test_the_error_is_torchmetrics_and_a_loops(seed, n, classes, scale, bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = drawn(seed, n, classes, scale)
    found = calibration(logits, labels, bins)
    theirs = multiclass_calibration_error(logits.double().softmax(1), labels, classes, bins)
    assert found.ece == pytest.approx(loop(logits, labels, bins), abs=1e-9)
    # in float32, and confidences of 1 apart from the last bin
    if logits.double().softmax(1).max() < 1 - 1e-6:
        assert found.ece == pytest.approx(100 * theirs.item(), abs=1e-3)
    assert sum(each.n for each in found.bins) == n
    top1 = sum(each.n * each.accuracy for each in found.bins) / n
    assert top1 == pytest.approx(accuracy(logits, labels)["top1"])
    assert abs(found.confidence - top1) <= found.ece + 1e-9  # triangle inequality


@pytest.mark.parametrize(("classes", "bins"), [(2, 2), (4, 4), (2, 4), (8, 16)])
def test_a_confidence_at_an_edge_is_in_the_bin_below_it_and_the_first_of_equal_classes_is_taken(
    classes, bins
):
    found = calibration(torch.zeros(4, classes), torch.tensor([0, 0, 0, 1]), bins)
    (only,) = found.bins
    assert (only.high, only.n) == (100 / classes, 4)
    assert (only.confidence, only.accuracy) == (100 / classes, 75)
    assert found.ece == 75 - 100 / classes


def test_of_a_row_that_is_not_finite_nothing_can_be_said():
    found = calibration(torch.tensor([[0.0, math.nan], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert math.isnan(found.ece)
    assert math.isnan(found.confidence)


def test_a_row_that_is_entirely_sure_is_in_the_last_bin():
    found = calibration(torch.tensor([[1e4, 0.0], [1e4, 0.0]]), torch.tensor([0, 1]))
    (only,) = found.bins
    assert (only.high, only.n, only.confidence, only.accuracy) == (100, 2, 100, 50)
    assert found.ece == 50


def test_in_one_bin_the_error_is_the_gap_of_the_means():
    found = calibration(logits_of([0.91, 0.93, 0.92, 0.99]), torch.tensor([0, 0, 1, 0]), 1)
    assert found.ece == pytest.approx(93.75 - 75)
    assert found.confidence == pytest.approx(93.75)


def test_a_constant_added_to_rows_changes_nothing():
    logits, labels = drawn(1, 300, 5, 2.0)
    moved = calibration(logits.double() + torch.arange(300)[:, None], labels)
    assert moved.ece == pytest.approx(calibration(logits, labels).ece)


def test_perfectly_calibrated_rows_have_no_error():
    right = torch.tensor([0, 0, 0, 1])  # of four at 75 %, three
    assert calibration(logits_of([0.75] * 4), right).ece == pytest.approx(0, abs=1e-12)


def test_a_picture_has_a_panel_for_each_model_and_the_bins_as_a_table():
    from richkd.evaluate.pictures import reliability

    found = {who: calibration(*drawn(k, 200, 4, 2.0)) for k, who in enumerate(("teacher", "clip"))}
    picture = reliability(found)
    assert picture.png.startswith(b"\x89PNG")
    assert len(picture.rows) == sum(len(each.bins) for each in found.values())
    assert picture.csv.decode().startswith("model,low,high,n,confidence,accuracy")
