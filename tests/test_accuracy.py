"""Accuracy and loss against torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, top_k_accuracy_score
from torch import nn
from torchmetrics.functional.classification import multiclass_accuracy

from richkd.data import Dataset, Images, Views
from richkd.evaluate import accuracy, evaluate
from richkd.evaluate.accuracy import network_logits


def random_logits(classes, rows, seed):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 3, (rows, classes)).astype(np.float32))
    return logits, torch.from_numpy(rng.integers(0, classes, rows))


@settings(deadline=None, max_examples=50)
@given(classes=st.integers(2, 12), rows=st.integers(1, 60), seed=st.integers(0, 99))
def test_accuracy_is_that_of_torchmetrics(classes, rows, seed):
    logits, labels = random_logits(classes, rows, seed)
    found = accuracy(logits, labels)
    for name, k in (("top1", 1), ("top5", min(5, classes))):
        expected = multiclass_accuracy(logits, labels, classes, average="micro", top_k=k)
        assert found[name] == pytest.approx(100 * expected.item(), abs=1e-4)


def test_accuracy_and_loss_are_those_of_scikit_learn():
    logits, labels = random_logits(10, 500, 0)
    found, every = accuracy(logits, labels), np.arange(10)
    for name, k in (("top1", 1), ("top5", 5)):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=every)
        assert found[name] == pytest.approx(100 * expected)
    probs = logits.double().softmax(1)
    assert found["loss"] == pytest.approx(log_loss(labels, probs, labels=every))


@settings(deadline=None, max_examples=50)
@given(classes=st.integers(2, 12), rows=st.integers(1, 60), seed=st.integers(0, 99))
def test_among_equal_logits_the_lower_class_comes_first(classes, rows, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.integers(0, 3, (rows, classes)), rng.integers(0, classes, rows)
    order = np.argsort(-logits, 1, kind="stable")
    found = accuracy(torch.from_numpy(logits).float(), torch.from_numpy(labels))
    assert found["top1"] == pytest.approx(100 * np.mean(logits.argmax(1) == labels))
    assert found["top5"] == pytest.approx(100 * np.mean((order[:, :5] == labels[:, None]).any(1)))


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_with_up_to_five_classes_top5_counts_them_all(classes):
    assert accuracy(*random_logits(classes, 50, 0))["top5"] == 100


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_wrong(value):
    logits, labels = torch.eye(4), torch.arange(4)
    logits[2] = value
    found = accuracy(logits, labels)
    assert (found["top1"], found["top5"]) == (75, 75)
    assert not np.isfinite(found["loss"])


def test_one_nan_makes_its_row_wrong_in_whichever_column():
    logits, labels = torch.eye(3), torch.arange(3)
    logits[0, 0] = logits[1, 2] = float("nan")
    assert accuracy(logits, labels)["top1"] == pytest.approx(100 / 3)


def test_a_constant_added_to_a_row_changes_nothing():
    logits, labels = random_logits(10, 200, 1)
    moved = accuracy(logits + torch.linspace(-50, 50, 200)[:, None], labels)
    assert moved == pytest.approx(accuracy(logits, labels), abs=1e-4)


def toy():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    images = Images(pixels=pixels, labels=np.arange(40) % 4)
    names = ("a", "b", "c", "d")
    task = Dataset(name="toy", names=names, train=images, test=images, pad=1, flip=True)
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 4))
    return network, Views(images, task, torch.device("cpu")), torch.from_numpy(images.labels)


@pytest.mark.parametrize("training", [True, False])
def test_a_network_is_run_in_eval_mode_and_left_as_it_was(training):
    network, views, _ = toy()
    network.train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, second = (network_logits(network, views, torch.arange(40)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(part.training == training for part in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("batch_size", [1, 7, 40, 512])
def test_logits_do_not_depend_on_how_rows_are_batched(batch_size):
    network, views, _ = toy()
    rows = torch.tensor([5, 39, 0, 5, 17, 8, 9, 10])
    found = network_logits(network, views, rows, batch_size)
    expected = network.eval()(views.images(torch.arange(40)))[rows]
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-5)


def test_evaluate_scores_the_asked_rows_against_their_own_labels():
    network, views, labels = toy()
    rows = torch.arange(30, 40)
    expected = accuracy(network_logits(network, views, torch.arange(40))[30:], labels[30:])
    assert evaluate(network, views, rows, labels[rows]) == pytest.approx(expected)
