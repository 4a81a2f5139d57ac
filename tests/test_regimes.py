"""Fewer rows, and long tails: which rows are learnt from, by the student and by its teacher, and how that is judged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from richkd import distill
from richkd.config import Data
from richkd.data import Dataset, Images, load, split
from richkd.data.subsets import TABLE14, long_tail
from richkd.errors import ConfigError, DataError
from richkd.layers import build, read
from richkd.teachers import teacher_recipe


def dataset(sizes: list[int], unlabelled: int = 0) -> Dataset:
    """Return grey images of one pixel, so many of each class, mixed."""

    def images(labels: np.ndarray) -> Images:
        return Images(pixels=np.zeros((len(labels), 1, 1, 1), np.uint8), labels=labels)

    labels = np.append(np.repeat(np.arange(len(sizes)), sizes), np.full(unlabelled, -1))
    return Dataset(
        name="sized",
        names=tuple(f"class {k}" for k in range(len(sizes))),
        train=images(np.random.default_rng(0).permutation(labels)),
        test=images(np.arange(len(sizes))),
        pad=0,
        flip=False,
    )


@pytest.fixture(scope="module")
def like_cifar100() -> Dataset:
    return dataset([500] * 100)


def learnt(task: Dataset, **settings) -> np.ndarray:
    """Return the labels of what is learnt from where no row is held out."""
    return task.train.labels[split(task, Data(**settings), 0, "paper").transfer]


@pytest.mark.parametrize(
    ("words", "seed", "begins"),
    [
        (["data.source=digits"], 0, "4bc69a0684773c7f"),
        ([], 0, "f7ebc59b273c9691"),
        ([], 3, "414afe72591dfe2c"),
        (
            ["data.seed=1", "data.labelled_per_class=null", "data.validation=0.2"],
            0,
            "c96353f6197bc37c",
        ),
    ],
)
def test_a_split_of_before_there_were_regimes_is_the_same(words, seed, begins):
    config = build(read(words)).data
    assert split(load(config), config, seed).digest.startswith(begins)


@pytest.mark.parametrize(
    ("rho", "total"),
    [(0.5, 36_029), (0.2, 24_856), (0.1, 19_573), (0.05, 15_907), (0.02, 12_608), (0.01, 10_847)],
)
def test_a_long_tail_of_a_ratio_has_the_usual_number_of_rows(rho, total):
    counts = long_tail(np.full(100, 500), rho)
    assert (counts.sum(), counts[0], counts[-1]) == (total, 500, int(500 * rho))


def test_the_printed_list_is_another_curve_than_the_formulas():
    counts = long_tail(np.full(100, 500), 0.01)
    assert (len(TABLE14), sum(TABLE14)) == (100, 16_013)
    assert np.flatnonzero(counts == TABLE14).tolist() == [0, 99]
    assert counts[:10].tolist() == [500, 477, 455, 434, 415, 396, 378, 361, 344, 328]
    assert counts[-8:].tolist() == [6, 6, 6, 6, 5, 5, 5, 5]
    assert TABLE14[90:96] == (13, 12, 12, 11, 10, 10)
    assert TABLE14[24] - int(500 * 0.01 ** (24 / 99)) == 103


@pytest.mark.parametrize(("imbalance", "total"), [(0.01, 10_847), ("table14", 16_013)])
def test_a_long_tail_keeps_the_first_rows_of_each_class_permutation(
    like_cifar100, imbalance, total
):
    labels = learnt(like_cifar100, imbalance=imbalance)
    assert len(labels) == total
    assert np.array_equal(
        np.bincount(labels, minlength=100), long_tail(np.full(100, 500), imbalance)
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.floats(0.01, 1))
def test_of_a_class_that_has_fewer_rows_all_are_kept(sizes, rho):
    counts = long_tail(np.array(sizes), rho)
    for c, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        assert count == min(size, max(1, int(max(sizes) * rho ** (c / (len(sizes) - 1)))))


def test_the_printed_list_is_refused_for_other_data():
    with pytest.raises(ConfigError, match="100 classes of 500 rows but there are 3 of 4 to 9"):
        split(dataset([9, 4, 5]), Data(imbalance="table14", validation=3), 0)
    with pytest.raises(ConfigError, match="table14"):
        Data(imbalance="table13")


def test_held_out_rows_are_cut_from_the_long_tail(like_cifar100):
    found = split(like_cifar100, Data(imbalance=0.01, validation=0.1), 0)
    assert len(found.validation) == 1085
    assert len(found.transfer) + len(found.validation) == 10_847
    assert found.balanced
    left_out = np.setdiff1d(np.arange(50_000), np.append(found.transfer, found.validation))
    assert (found.labels[left_out] == -1).all()


def test_rows_without_a_label_are_in_no_tail():
    task = dataset([40, 40, 40], unlabelled=50)
    assert (learnt(task, imbalance=0.1) == -1).sum() == 50


def test_a_class_with_too_few_rows_in_the_tail_is_told():
    with pytest.raises(DataError, match="has only 1 labelled row"):
        split(dataset([40, 40, 40]), Data(imbalance=0.01, validation=5), 0)


@pytest.mark.parametrize(("fraction", "each"), [(0.25, 125), (0.5, 250), (0.75, 375), (1.0, 500)])
def test_few_shots_are_as_many_of_each_class(like_cifar100, fraction, each):
    assert (np.bincount(learnt(like_cifar100, fraction=fraction)) == each).all()


def test_fewer_shots_are_a_part_of_more_and_other_held_out_rows_are_not_touched():
    task = dataset([40, 80, 24], unlabelled=20)
    cuts = [split(task, Data(fraction=f, validation=9), 0) for f in (0.25, 0.5, 0.75, 1.0)]
    for few, more in zip(cuts, cuts[1:], strict=False):
        assert set(few.transfer) < set(more.transfer)
        assert np.array_equal(few.validation, more.validation)
    other = split(task, Data(fraction=0.25, validation=9, seed=1), 0)
    assert not np.array_equal(other.transfer, cuts[0].transfer)
    again = split(task, Data(fraction=0.25, validation=9), 5)  # another run's seed
    assert again.digest == cuts[0].digest


def test_labels_are_drawn_among_the_rows_that_are_learnt_from():
    found = split(dataset([40, 40]), Data(fraction=0.5, labelled_per_class=3, validation=4), 0)
    assert len(found.labelled) == 6
    assert set(found.labelled) < set(found.transfer)


def test_whole_is_all_but_the_held_out_rows_whatever_else_is_said():
    task = dataset([40, 40, 40], unlabelled=5)
    regime = {"imbalance": 0.2, "validation": 0.2}
    few = split(task, Data(**regime, fraction=0.5, labelled_per_class=2), 0)
    found = split(task, Data(**regime, fraction=0.5, labelled_per_class=2, whole=True), 0)
    assert np.array_equal(found.validation, few.validation)
    assert np.array_equal(found.transfer, np.setdiff1d(np.arange(125), few.validation))
    assert len(found.labelled) == 120 - len(few.validation)


@pytest.mark.parametrize(
    ("regime", "selection"),
    [
        (["data.fraction=0.3"], "validation"),
        (["data.fraction=0.3"], "paper"),
        (["data.imbalance=0.2"], "validation"),
        (["data.imbalance=0.2"], "paper"),
    ],
)
def test_a_full_teacher_learns_from_all_rows_but_the_held_out_ones(tmp_path, regime, selection):
    words = ["method.name=kd", "teacher.epochs=1", f"cache={tmp_path}", f"selection={selection}"]
    words += ["data.labelled_per_class=null", "data.validation=100", *regime]
    folders = []
    for trained_on in ("same", "full"):
        config = build(read([*words, f"teacher.trained_on={trained_on}"]))
        task = distill.open_task(config)
        folders.append(distill.trained_teacher(config, task))
        own = distill.open_task(teacher_recipe(config), beside=task).split
        everything = np.setdiff1d(np.arange(len(task.dataset.train)), task.split.validation)
        wanted = everything if trained_on == "full" else task.split.transfer
        assert np.array_equal(own.transfer, wanted)
        assert np.array_equal(own.validation, task.split.validation)
    assert folders[0] != folders[1]


def test_few_shots_ask_the_full_teacher_of_the_plain_run():
    words = ["data.source=cifar100", "teacher.trained_on=full"]
    few = teacher_recipe(build(read([*words, "data.fraction=0.25"])))
    assert few == teacher_recipe(build(read([*words, "data.labelled_per_class=4"])))
    assert few == teacher_recipe(build(read(["data.source=cifar100"])))


def test_under_a_long_tail_classes_count_alike_and_the_test_is_told_by_frequency(tmp_path):
    words = [
        "method.name=ce",
        "student.name=cnn8",
        "train.epochs=2",
        "data.labelled_per_class=null",
    ]
    config = build(read([*words, "data.imbalance=0.1", "data.validation=0.2"]))
    outcome = distill.run(config, tmp_path / "run")
    task, network = outcome.task, outcome.network
    views, rows, labels = task.judged
    with torch.no_grad():
        first = network.eval()(views.images(rows)).argmax(1)
    shares = [(first[labels == k] == k).double().mean().item() for k in range(10)]
    assert outcome.metrics["best_val_top1"] == pytest.approx(100 * np.mean(shares))
    found = distill.test(outcome)
    kept = np.append(task.split.transfer, task.split.validation)
    assert task.frequencies.tolist() == np.bincount(task.dataset.train.labels[kept]).tolist()
    assert sum(found[f"test/{group}/n"] for group in ("head", "medium", "tail")) == 800
    again = distill.retest(outcome.folder / "best").found
    assert again["val"]["top1"] == pytest.approx(outcome.metrics["best_val_top1"])
