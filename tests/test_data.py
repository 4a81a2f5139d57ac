"""Views against torchvision, splits and batches by their properties, and data sets that are refused."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from richkd.config import Data
from richkd.data import Batches, Dataset, Images, Split, Views, load, split
from richkd.data.batches import stream_seed
from richkd.data.digits import NAMES
from richkd.data.subsets import stratified
from richkd.errors import ConfigError, DataError


def images(labels=(0, 1, 2) * 20, size=(6, 5), channels=1, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (len(labels), *size, channels), dtype=np.uint8)
    return Images(pixels=pixels, labels=np.array(labels))


def dataset(train=None, names=("a", "b", "c"), pad=2, flip=True, **changes):
    train = images() if train is None else train
    whole = {"name": "toy", "train": train, "test": train} | changes
    return Dataset(names=names, pad=pad, flip=flip, **whole)


# views


def cropped(pixels, dy, dx, flip, pad):
    """One view by torchvision: pad, crop, then mirror."""
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    image = v2.functional.crop(F.pad(image, [pad] * 4), dy, dx, *image.shape[1:])
    image = v2.functional.horizontal_flip(image) if flip else image
    return image.permute(1, 2, 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("pad", "flip"), [(0, False), (0, True), (1, False), (2, True)])
def test_every_view_is_torchvision_s(channels, pad, flip):
    task = dataset(images(channels=channels), pad=pad, flip=flip)
    views = Views(task.train, task, torch.device("cpu"))
    offsets = range(2 * pad + 1)
    every = [(dy, dx, f) for dy in offsets for dx in offsets for f in range(1 + flip)]
    found = views.pixels(torch.full((len(every),), 7), torch.tensor(every))
    assert len(every) == (2 * pad + 1) ** 2 * (1 + flip)
    for k, view in enumerate(every):
        assert torch.equal(found[k], cropped(task.train.pixels[7], *view, pad)), view


@given(seed=st.integers(0, 2**32 - 1), pad=st.integers(0, 4), flip=st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_random_crop_and_flip_of_torchvision_is_one_of_the_views(seed, pad, flip):
    task = dataset(images(channels=3), pad=pad, flip=flip)
    views = Views(task.train, task, torch.device("cpu"))
    drawing = [v2.RandomCrop(task.size, padding=pad), *[v2.RandomHorizontalFlip()] * flip]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = v2.Compose(drawing)(torch.from_numpy(task.train.pixels[7]).permute(2, 0, 1))
    every = views.numbered(torch.arange(views.count))
    found = views.pixels(torch.full((views.count,), 7), every)
    assert (found == drawn.permute(1, 2, 0)).all((1, 2, 3)).any()


@given(pad=st.integers(0, 9), flip=st.booleans())
@settings(deadline=None)
def test_views_are_numbered_from_flip_to_dy_and_back(pad, flip):
    task = dataset(pad=pad, flip=flip)
    views = Views(task.train, task, torch.device("cpu"))
    offsets = range(2 * pad + 1)
    every = torch.cartesian_prod(*map(torch.tensor, (offsets, offsets, range(1 + flip))))
    assert views.count == len(every)
    assert torch.equal(views.number(every), torch.arange(views.count))
    assert torch.equal(views.numbered(torch.arange(views.count)), every)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_a_drawn_batch_is_torchvision_s_normalised(channels, flip):
    task = dataset(images(channels=channels), flip=flip)
    views = Views(task.train, task, torch.device("cpu"))
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:32]
    drawn = views.draw(32, torch.Generator().manual_seed(1))
    found = views.images(rows, drawn)
    normalise = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(task.mean, task.std)]
    )
    for k, (row, view) in enumerate(zip(rows, drawn.tolist(), strict=True)):
        one = cropped(task.train.pixels[row], *view, task.pad).permute(2, 0, 1)
        torch.testing.assert_close(found[k], normalise(one), atol=1e-5, rtol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_without_views_images_come_as_they_are():
    task = dataset(images(channels=3))
    views = Views(task.train, task, torch.device("cpu"))
    rows = torch.tensor([3, 3, 0])
    assert torch.equal(views.pixels(rows), torch.from_numpy(task.train.pixels)[rows])


def test_draws_are_uniform_over_all_views():
    task = dataset(pad=1, flip=True)
    drawn = Views(task.train, task, torch.device("cpu")).draw(
        18_000, torch.Generator().manual_seed(0)
    )
    kinds, counts = drawn.unique(dim=0, return_counts=True)
    assert len(kinds) == 18
    assert ((counts - 1000).abs() < 5 * 1000**0.5).all()


def test_without_flips_none_is_drawn():
    task = dataset(flip=False)
    drawn = Views(task.train, task, torch.device("cpu")).draw(500, torch.Generator().manual_seed(0))
    assert drawn[:, 2].eq(0).all()


def test_training_images_are_normalised_to_mean_0_and_deviation_1():
    task = dataset(images(channels=3))
    found = Views(task.train, task, torch.device("cpu")).images(torch.arange(60))
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grey", [0, 33, 35, 77, 255])
def test_a_constant_channel_is_normalised_to_zero(grey):
    flat = Images(pixels=np.full((6, 4, 4, 1), grey, np.uint8), labels=np.arange(6) % 3)
    found = Views(flat, dataset(flat), torch.device("cpu")).images(torch.arange(6))
    assert found.abs().max() < 0.1


def test_another_normalisation_shares_the_pixels_and_leaves_the_first_alone():
    task = dataset(images(channels=3))
    views = Views(task.train, task, torch.device("cpu"))
    before = views.images(torch.arange(4))
    other = views.normalised_by((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    expected = v2.functional.normalize(
        views.pixels(torch.arange(4)).permute(0, 3, 1, 2) / 255, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)
    )
    torch.testing.assert_close(other.images(torch.arange(4)), expected, atol=1e-5, rtol=1e-5)
    assert other.view.data_ptr() == views.view.data_ptr()
    assert torch.equal(views.images(torch.arange(4)), before)


# splits

CLASS_SIZES = st.lists(st.integers(2, 40), min_size=2, max_size=8)


@settings(deadline=None)
@given(sizes=CLASS_SIZES, unlabelled=st.integers(0, 20), data=st.data())
def test_a_stratified_part_is_exact_and_takes_and_leaves_one_a_class(sizes, unlabelled, data):
    classes, total = len(sizes), sum(sizes)
    labels = np.repeat(np.arange(classes), sizes)
    labels = np.random.default_rng(0).permutation(np.append(labels, np.full(unlabelled, -1)))
    count = data.draw(st.integers(classes, total - classes))
    rows = stratified(labels, count, np.random.default_rng(data.draw(st.integers(0, 9))))
    assert len(rows) == len(set(rows)) == count
    assert (np.diff(rows) > 0).all()
    taken = np.bincount(labels[rows], minlength=classes)  # an unlabelled row would raise
    assert (taken >= 1).all()
    assert (np.array(sizes) - taken >= 1).all()
    shares = count * np.array(sizes) / total
    if (shares >= 1).all() and (np.ceil(shares) < sizes).all():
        assert (np.abs(taken - shares) < 1).all()


@pytest.mark.parametrize("count", [0, 2, 58, 60, 1000])
def test_a_part_that_is_too_small_or_too_large_is_refused(count):
    with pytest.raises(DataError, match=f"between 3 rows .* and 57 .* but {count} were asked for"):
        stratified(np.arange(60) % 3, count, np.random.default_rng(0))


def test_a_class_of_one_row_cannot_be_both_held_out_and_learnt():
    with pytest.raises(DataError, match="class 1 has only 1 labelled row"):
        stratified(np.array([0, 0, 0, 1, 2, 2, 2]), 3, np.random.default_rng(0))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 5),
    data_seed=st.integers(0, 5),
    validation=st.integers(3, 40),
    each=st.none() | st.integers(1, 5),
)
def test_a_split_parts_the_rows_and_shows_the_labels_that_it_should(
    seed, data_seed, validation, each
):
    task = dataset(images((0, 1, 2) * 20 + (-1,) * 7), test=images())
    config = Data(validation=validation, seed=data_seed, labelled_per_class=each)
    found = split(task, config, seed)
    assert np.array_equal(np.sort(np.append(found.transfer, found.validation)), np.arange(67))
    assert len(found.validation) == validation
    truth = task.train.labels
    assert set(truth[found.validation]) == {0, 1, 2}
    assert (found.labels[found.validation] == -1).all()
    visible = found.labels >= 0
    assert (found.labels[visible] == truth[visible]).all()
    assert np.array_equal(found.labelled, np.flatnonzero(visible))
    counts = np.bincount(truth[visible], minlength=3)
    if each is None:
        assert counts.sum() == 60 - validation
    else:
        assert (counts == each).all()


def test_validation_depends_on_the_data_seed_and_labels_on_both():
    task = dataset()

    def cut(data_seed, seed):
        return split(task, Data(validation=15, seed=data_seed, labelled_per_class=2), seed)

    one, other_run, other_data = cut(0, 0), cut(0, 1), cut(1, 0)
    assert np.array_equal(one.validation, other_run.validation)
    assert not np.array_equal(one.validation, other_data.validation)
    assert not np.array_equal(one.labelled, other_run.labelled)
    assert not np.array_equal(one.labelled, other_data.labelled)
    assert len({one.digest, other_run.digest, other_data.digest}) == 3
    assert cut(0, 0).digest == one.digest


def test_few_labels_are_a_draw_of_their_own_under_each_data_seed():
    def place(
        data_seed,
    ):  # of the one labelled row among the 19 of its class, so that the cut plays no part
        cut = split(dataset(), Data(validation=3, seed=data_seed, labelled_per_class=1), 0)
        return np.searchsorted(
            cut.transfer[cut.transfer % 3 == 0], cut.labelled[cut.labelled % 3 == 0]
        )[0]

    assert len({place(data_seed) for data_seed in range(6)}) > 1


def test_more_labels_a_class_than_there_are_is_refused():
    with pytest.raises(DataError, match=r"labelled_per_class=16 but class 'a' has 15"):
        split(dataset(), Data(validation=15, labelled_per_class=16), 0)


def test_a_split_leaves_the_data_set_as_it_was():
    task = dataset()
    before = task.train.labels.copy()
    split(task, Data(validation=15, labelled_per_class=2), 0)
    assert np.array_equal(task.train.labels, before)


# batches


def batches(labelled=20, rows=60, batch_size=16, share=None, seed=0):
    task = dataset(images((0, 1, 2) * (rows // 3)))
    labels = task.train.labels.copy()
    labels[labelled:] = -1
    held_out = np.arange(3)
    labels[held_out] = -1
    transfer = np.arange(3, rows)
    cut = Split(transfer=transfer, labels=labels, validation=held_out, digest="")
    views = Views(task.train, task, torch.device("cpu"))
    return Batches(cut, views, batch_size, share, seed)


@pytest.mark.parametrize("batch_size", [1, 16, 19, 57])
def test_an_epoch_is_a_permutation_of_the_transfer_rows(batch_size):
    order = batches(batch_size=batch_size)
    for epoch in range(3):
        parts = order.order(epoch)
        assert len(parts) == len(order) == -(-57 // batch_size)
        assert all(len(part) == batch_size for part in parts[:-1])
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(3, 60))


def test_a_batch_is_not_larger_than_the_set():
    with pytest.raises(DataError, match="must not exceed the 57 rows .* but got 58"):
        batches(batch_size=58)


@pytest.mark.parametrize(
    ("share", "labelled"), [(0.01, 1), (0.25, 4), (0.33, 5), (0.5, 8), (0.99, 16), (1.0, 16)]
)
def test_the_labelled_share_is_held_in_each_batch(share, labelled):
    order = batches(share=share)
    for rows, labels, _ in order.epoch(0):
        assert len(rows) == 16
        assert (labels >= 0).sum() == labelled
    assert len(order.order(0)) == len(order) == 4


def test_under_a_share_rows_recur_only_after_all_of_their_kind_were_met():
    order = batches(share=0.75, labelled=20)  # 4 batches of 12 of the 17 labelled rows
    rows = torch.cat(order.order(0))
    labelled = rows[rows < 20]
    counts = torch.bincount(labelled, minlength=20)[3:]
    assert counts.sum() == 48
    assert set(counts.tolist()) == {2, 3}
    unlabelled = rows[rows >= 20]
    assert len(unlabelled.unique()) == len(unlabelled)


def test_a_share_means_nothing_where_all_rows_are_labelled():
    assert torch.equal(batches(60, share=0.25).order(0)[0], batches(60).order(0)[0])


def test_a_batch_holds_the_visible_labels_of_its_rows():
    order = batches()
    for rows, labels, views in order.epoch(1):
        assert torch.equal(labels, order.labels[rows])
        assert views.shape == (len(rows), 3)


@pytest.mark.parametrize("share", [None, 0.5])
def test_batches_are_a_function_of_seed_and_epoch_alone(share):
    def epoch(seed, number, before=()):
        order = batches(seed=seed, share=share)
        for other in before:
            list(order.epoch(other))
        return [torch.cat(parts) for parts in zip(*order.epoch(number), strict=True)]

    straight = epoch(0, 2, before=(0, 1))
    assert all(map(torch.equal, straight, epoch(0, 2)))
    for other in (epoch(1, 2), epoch(0, 3)):
        assert not torch.equal(straight[0], other[0])
        assert not torch.equal(straight[2], other[2])


def test_streams_of_other_names_seeds_and_epochs_differ():
    found = {
        stream_seed(seed, stream, epoch)
        for seed in range(20)
        for stream in ("initialisation", "order", "augmentation")
        for epoch in range(20)
    }
    assert len(found) == 20 * 3 * 20


def test_the_order_is_shared_by_runs_that_differ_in_augmentation_alone():
    task = dataset(pad=0, flip=False)
    one = batches()
    other = copy.copy(one)
    other.views = Views(task.train, task, torch.device("cpu"))
    pairs = zip(one.epoch(0), other.epoch(0), strict=True)
    assert all(torch.equal(a[0], b[0]) for a, b in pairs)


# the embedded default


def test_digits_are_what_they_are():
    task = load(Data())
    assert (len(task.train), len(task.test)) == (997, 800)
    assert task.names == NAMES == tuple("zero one two three four five six seven eight nine".split())
    assert (task.size, task.channels, task.pad, task.flip) == ((8, 8), 1, 1, False)
    assert len(np.unique(task.train.pixels)) == 17
    assert {0, 255} <= set(np.unique(task.test.pixels))


def test_digits_are_scikit_learn_s_each_once_with_its_label():
    from sklearn.datasets import load_digits

    raw, task = load_digits(), load(Data())
    pixels = np.concatenate([task.train.pixels, task.test.pixels]).reshape(1797, 64)
    labels = np.concatenate([task.train.labels, task.test.labels])
    found = np.column_stack([np.rint(pixels * (16 / 255)).astype(int), labels])
    expected = np.column_stack([raw.data.astype(int), raw.target])
    assert np.array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_digits_are_cut_the_same_way_for_every_seed_and_read_once():
    assert load(Data(seed=1)).digest == load(Data(seed=2)).digest
    assert load(Data()) is load(Data())


def test_an_unknown_source_is_refused_by_name():
    with pytest.raises(ConfigError, match="data.source must be one of digits, .* but got 'digitz'"):
        load(replace(Data(), source="digitz"))


# what is refused

PIXELS = np.zeros((6, 4, 4, 1), np.uint8)
LABELS = np.arange(6) % 3


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (PIXELS.astype(np.float32), LABELS, "uint8 .* but got float32"),
        (PIXELS[..., 0], LABELS, r"\(N, H, W, 1 or 3\) but got uint8 of shape \(6, 4, 4\)"),
        (np.zeros((6, 3, 4, 4), np.uint8), LABELS, r"shape \(6, 3, 4, 4\)"),
        (PIXELS[:, :0], LABELS, r"shape \(6, 0, 4, 1\)"),
        (PIXELS, LABELS.astype(float), "integers but got float64"),
        (PIXELS, LABELS == 1, "integers but got bool"),
        (PIXELS, LABELS[:5], r"got \(5,\) for 6 images"),
        (PIXELS, LABELS[:, None], r"got \(6, 1\) for 6 images"),
    ],
)
def test_images_that_do_not_fit_their_labels_are_refused(pixels, labels, message):
    with pytest.raises(DataError, match=message):
        Images(pixels=pixels, labels=labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((-2, 0, 1, 2), "0 to 2, or be -1, for 3 classes but toy has -2 to 2"),
        ((0, 1, 2, 3), "for 3 classes but toy has 0 to 3"),
        ((0, 1, 1, 99), "for 3 classes but toy has 0 to 99"),
        ((0, 2, -1, 0), r"none for \['b'\] among its training rows"),
        ((-1, -1, -1, -1), r"none for \['a', 'b', 'c'\] among its training rows"),
        ((), r"none for \['a', 'b', 'c'\]"),
    ],
)
def test_labels_that_do_not_fit_the_classes_are_refused_by_both_counts(labels, message):
    with pytest.raises(DataError, match=message):
        dataset(images(np.array(labels, int)), test=images())


def test_a_test_row_without_a_label_is_refused():
    with pytest.raises(DataError, match="test labels must lie in 0 to 2 for 3 classes .* -1 to 2"):
        dataset(test=images((0, 1, 2, -1)))


def test_a_class_without_a_test_row_is_refused():
    with pytest.raises(DataError, match=r"none for \['c'\] among its test rows"):
        dataset(test=images((0, 1, 0, 1)))


@pytest.mark.parametrize("other", [{"size": (6, 6)}, {"channels": 3}])
def test_training_and_test_images_of_two_shapes_are_refused(other):
    with pytest.raises(DataError, match=r"one height, width and number of channels .*\(6, 5, 1\)"):
        dataset(test=images(**other))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a",), "at least 2 classes but got 1"),
        ((), "at least 2 classes but got 0"),
        (("a", "b", "a"), r"2 of the 3 names of toy do not: \['a', 'a'\]"),
        (("caf\u00e9", "b", "cafe\u0301"), "after Unicode's NFC, but 2 of the 3 names"),
        (("maple_tree", "b", "maple tree"), "with spaces for underscores .* 2 of the 3 names"),
        (("a", "", "c"), "one line of text, for the prompts, but got ''"),
        (("a", " \t", "c"), "one line of text"),
        (("a", "b\nb", "c"), r"one line of text, for the prompts, but got 'b\\nb'"),
        (("a", "b\x00", "c"), "one line of text"),
        (("a", "b\u2028b", "c"), "one line of text"),
        (("a", "\ud800", "c"), "one line of text"),
    ],
)
def test_class_names_that_make_no_distinct_prompts_are_refused(names, message):
    with pytest.raises(DataError, match=message):
        dataset(names=names)


@pytest.mark.parametrize(
    "name",
    [*("{}", "{0!r}", "%s", "100 %", "it's", '"x"', "a/b", "..", "=1+1", "|", "<b>", "x" * 300)]
    + ["زرافه", "می‌خواهم", "👩‍🚀", "caf\u00e9"],
)
def test_any_other_line_of_text_is_a_class_name_taken_literally(name):
    task = dataset(names=("a", name, "c"))
    assert task.names[1] == name
    assert len(task.digest) == 64


def test_the_digest_changes_with_pixels_labels_names_and_their_order():
    rows = [images(), images(seed=1), images((1, 0, 2) * 20)]
    digests = {dataset(train).digest for train in rows}
    digests |= {dataset(names=names).digest for names in (("a", "c", "b"), ("a", "b", "d"))}
    assert len(digests) == 5
    assert dataset(images()).digest in digests


def test_a_validation_part_of_the_source_has_a_row_of_each_class():
    held = dataset(held_out=np.array([0, 1, 2]))
    assert split(held, Data(), 0).validation.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"validation image but toy has none for \['c'\]"):
        dataset(held_out=np.array([0, 1, 3]))
