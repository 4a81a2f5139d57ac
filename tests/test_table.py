"""A table holds what a teacher says of every crop, whoever filled it, whatever happened to its file."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import transforms

from richkd import checkpoint, distill, models, teachers
from richkd.__main__ import ABOUT, VERBS
from richkd.command import main
from richkd.config import Teacher
from richkd.data import Dataset, Images, Views
from richkd.data.pictures import picture
from richkd.errors import ConfigError, DataError
from richkd.layers import build, read
from richkd.table import ROWS, Table
from richkd.threads import threads

WIDTH, COUNT = 5, 400
FP16 = 2.0**-11  # half a step of a number with 11 binary digits, relative


def row(numbers: np.ndarray) -> np.ndarray:
    """Return what the rows of these tests hold."""
    return np.sin(np.outer(numbers + 1, np.arange(1, WIDTH + 1))).astype(np.float32)


def quiet(*_: object) -> None:
    """Hear how far a fill is."""


def opened(root, dtype=np.float32, count: int = COUNT, kind: str = "rows") -> Table:
    return Table(root, kind, {"of": "a test"}, count, WIDTH, dtype)


def unasked(numbers):
    raise AssertionError(f"{numbers} were asked for again")


@given(asked=st.lists(st.lists(st.integers(0, COUNT - 1), max_size=30), max_size=8))
def test_each_row_is_computed_once_and_found_ever_after(asked, tmp_path_factory):
    root, computed = tmp_path_factory.mktemp("cache"), []

    def compute(numbers):
        computed.extend(numbers.tolist())
        return row(numbers)

    for numbers in asked:
        found = opened(root).get(np.array(numbers, np.int64), compute)
        assert np.array_equal(found, row(np.array(numbers, np.int64)))
    assert sorted(computed) == sorted({number for numbers in asked for number in numbers})
    assert opened(root).known() == len(computed)


def test_rows_kept_in_half_are_what_they_are_found_as_from_the_first_time(tmp_path):
    numbers = np.arange(COUNT)
    table = opened(tmp_path, np.float16)
    first = table.get(numbers, row)
    assert first.dtype == np.float16
    assert np.array_equal(first, table.get(numbers, unasked))
    error = np.abs(first.astype(np.float64) - row(numbers))
    assert (
        error <= FP16 * np.abs(row(numbers)) + 2.0**-25
    ).all()  # of numbers near 0 a half has fewer digits


def test_a_fill_that_was_cut_ends_with_the_bytes_of_one_that_was_not(tmp_path):
    straight, cut = opened(tmp_path / "straight"), opened(tmp_path / "cut")
    straight.fill(row, 32, quiet)
    told = []

    def interrupt(kind, done, total):
        told.append((kind, done, total))
        if done > COUNT // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.fill(row, 32, interrupt)
    assert told[-1] == ("rows", 224, COUNT)
    cut = opened(tmp_path / "cut")
    assert cut.known() == 224
    asked = []
    cut.fill(lambda numbers: asked.extend(numbers.tolist()) or row(numbers), 32, quiet)
    assert asked == list(range(224, COUNT))
    assert (cut.folder / ROWS).read_bytes() == (straight.folder / ROWS).read_bytes()


def test_several_fill_a_table_as_one_does(tmp_path):
    straight, table = opened(tmp_path / "straight"), opened(tmp_path / "by several")
    straight.fill(row, 32, quiet)
    table.get(np.arange(40, 100), row)
    handed = []

    def spread(missing):
        handed.extend(missing)
        yield from (row(np.arange(*one)) for one in missing)

    table.fill(unasked, 32, quiet, spread)
    whole = 64  # of the ranges the one that 40 to 100 hold whole
    expected = [(at, min(at + 32, COUNT)) for at in range(0, COUNT, 32) if at != whole]
    assert handed == expected
    assert (table.folder / ROWS).read_bytes() == (straight.folder / ROWS).read_bytes()


CHILD = """
import sys
import numpy as np
from pathlib import Path
from tests.test_table import opened, row

print("begun", flush=True)
opened(Path(sys.argv[1]), count=200_000).fill(row, 16, lambda *_: None)
"""


def test_a_killed_process_leaves_a_table_that_another_goes_on_with(tmp_path):
    root = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
    ) as child:
        child.stdout.readline()
        while opened(tmp_path, count=200_000).known() < 100:
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
    table = opened(tmp_path, count=200_000)
    known = table.known()
    assert 100 <= known < 200_000
    asked = []
    numbers = np.arange(known + 100)
    found = table.get(numbers, lambda some: asked.extend(some.tolist()) or row(some))
    assert np.array_equal(found, row(numbers))
    assert len(asked) <= 100 + 16


@pytest.mark.parametrize("place", [0, 3, 4 * WIDTH - 1, 4 * WIDTH, 4 * WIDTH + 3])
def test_a_flipped_bit_is_refused_and_its_row_alone_computed_again(tmp_path, place):
    table = opened(tmp_path)
    table.fill(row, 32, quiet)
    path = table.folder / ROWS
    content = bytearray(path.read_bytes())
    content[len(content) - (4 * WIDTH + 4) * (COUNT - 123) + place] ^= 1
    path.write_bytes(content)
    table, asked = opened(tmp_path), []
    with pytest.warns(UserWarning, match="is damaged in 1 of 400 rows"):
        found = table.get(np.arange(COUNT), lambda some: asked.extend(some.tolist()) or row(some))
    assert asked == [123]
    assert np.array_equal(found, row(np.arange(COUNT)))
    assert np.array_equal(opened(tmp_path).get(np.arange(COUNT), unasked), found)


@pytest.mark.parametrize("damage", ["cut", "header", "gone"])
def test_a_file_that_cannot_be_mapped_is_begun_anew(tmp_path, damage):
    table = opened(tmp_path)
    table.fill(row, 32, quiet)
    path = table.folder / ROWS
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:1000] if damage == "cut" else b"\0" * 32 + content[32:])
    with pytest.warns(UserWarning, match="is damaged, and is built again"):
        table = opened(tmp_path)
    assert table.known() == 0
    assert np.array_equal(table.get(np.arange(COUNT), row), row(np.arange(COUNT)))


def test_a_cache_that_can_only_be_read_is_read(tmp_path, monkeypatch):
    opened(tmp_path).get(np.arange(10), row)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    table = opened(tmp_path)
    assert np.array_equal(table.get(np.arange(10), unasked), row(np.arange(10)))
    assert np.array_equal(table.get(np.arange(20), row), row(np.arange(20)))
    assert opened(tmp_path).known() == 10
    with pytest.raises(ConfigError, match="cache must be a folder that can be written, to compute"):
        table.fill(row, 32, quiet)


def test_a_full_disk_is_told_and_what_lies_there_stays(tmp_path, monkeypatch):
    table = opened(tmp_path)
    table.get(np.arange(10), row)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        table.get(np.arange(20), row)
    assert np.array_equal(table.get(np.arange(10), unasked), row(np.arange(10)))


def test_what_half_cannot_hold_is_refused(tmp_path):
    table = opened(tmp_path, np.float16, kind="teacher-views")
    with pytest.raises(DataError, match="finite in float16 but row 7 is not.*teacher.table=fp32"):
        table.get(np.arange(10), lambda some: np.where(some[:, None] == 7, 1e5, row(some)))
    assert table.known() == 0


def test_many_ask_at_once_and_all_are_told_the_same(tmp_path):
    asked, expected = (
        np.random.default_rng(0).integers(0, COUNT, (8, 40, 25)),
        row(np.arange(COUNT)),
    )
    wrong = []

    def ask(of_one):
        table = opened(tmp_path)
        wrong.extend(n for n in of_one if not np.array_equal(table.get(n, row), expected[n]))

    all_at_once = [threading.Thread(target=ask, args=(each,)) for each in asked]
    for one in all_at_once:
        one.start()
    for one in all_at_once:
        one.join()
    assert not wrong
    assert opened(tmp_path).known() == len(np.unique(asked))


def test_those_who_compute_other_digits_do_not_damage_each_others_rows(tmp_path):
    # as processes with other processors do
    asked, expected = np.random.default_rng(0).integers(0, 40, (6, 60, 25)), row(np.arange(40))
    wrong = []

    def ask(which, of_one):
        table = opened(tmp_path, count=40)
        for numbers in of_one:
            found = table.get(numbers, lambda some: row(some) * (1 + which * 1e-6))
            if not np.allclose(found, expected[numbers], rtol=1e-5):
                wrong.append(numbers)
            table._write(numbers[:1], row(numbers[:1]) * np.float32(1 + which * 1e-6))

    all_at_once = [threading.Thread(target=ask, args=each) for each in enumerate(asked)]
    for one in all_at_once:
        one.start()
    for one in all_at_once:
        one.join()
    assert not wrong
    opened(tmp_path, count=40).get(np.unique(asked), unasked)


def coloured(count: int = 40, size: int = 32) -> Dataset:
    """Return random pictures of CIFAR's shape, padding and flips."""
    rng = np.random.default_rng(0)

    def images(n):
        pixels = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        return Images(pixels=pixels, labels=np.arange(n) % 4)

    return Dataset(
        name="coloured", names=tuple("abcd"), train=images(count), test=images(8), pad=4, flip=True
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Return what opens a teacher of random weights and statistics, and its network."""
    torch.manual_seed(0)
    network = models.build("resnet8", 4)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(network.state_dict(), path)
    dataset = coloured()
    views = [Views(part, dataset, torch.device("cpu")) for part in (dataset.train, dataset.test)]

    def opener(root, beside=None, **changes):
        settings = {"name": "resnet8", "checkpoint": str(path), "views": "exact"} | changes
        return teachers.open_task(Teacher(**settings), None, dataset, *views, root, beside=beside)

    return opener, network.eval(), dataset, views[0]


@pytest.mark.parametrize(
    ("changes", "within"),
    [({"table": "fp32"}, 2e-6), ({"table": "fp16"}, FP16 + 2e-6), ({"precision": "bf16"}, 4e-2)],
    ids=str,
)
def test_rows_are_what_the_teacher_says_of_torchvision_s_own_draws_one_by_one(
    teacher, tmp_path, changes, within
):
    opener, network, dataset, views = teacher
    task = opener(tmp_path, **changes)
    draw = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    )
    finish = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(dataset.mean, dataset.std)]
    )
    every = views.numbered(torch.arange(views.count))
    assert views.count == 162
    torch.manual_seed(1)
    seen, apart = [], []
    for k in range(120):
        image = k % len(dataset.train)
        crop = draw(picture(dataset.train.pixels[image]))
        ours = views.pixels(torch.full((162,), image), every)
        same = (ours == torch.from_numpy(np.array(crop))).all((1, 2, 3)).nonzero()[:, 0]
        assert len(same) == 1  # each draw is one of the views
        with torch.no_grad():
            alone = network(finish(crop)[None])[0]
        found = task.logits(torch.tensor([image]), every[same])[0]
        seen.append(int(same))
        apart.append((found - alone).abs().max() / alone.abs().max())
    assert len(set(seen)) > 60
    assert max(apart) <= within
    assert task.table.known() == len(
        {(k % len(dataset.train), view) for k, view in enumerate(seen)}
    )


def test_a_crop_s_row_has_the_same_bits_whoever_else_is_in_the_batch(teacher, tmp_path):
    opener, _, dataset, views = teacher
    rows, crops = torch.arange(len(dataset.train)), views.numbered(torch.arange(40) * 4)
    expected = opener(tmp_path / "a", table="fp32").logits(rows, crops)
    for k, sizes in enumerate(([1] * 40, [3] * 13 + [1], [17, 23])):
        task = opener(tmp_path / f"b{k}", table="fp32")
        parts = zip(rows.split(sizes), crops.split(sizes), strict=True)
        assert torch.equal(torch.cat([task.logits(*part) for part in parts]), expected)
    with threads(2):
        many = opener(tmp_path / "threads", table="fp32")
        more = rows.repeat(5), views.numbered(torch.arange(200) % 162)
        found = many.logits(*more)
    assert torch.equal(found, opener(tmp_path / "c", table="fp32").logits(*more))


def test_features_lie_beside_logits(teacher, tmp_path):
    opener, network, _, views = teacher
    rows, crops = torch.arange(20), views.numbered(torch.arange(20))
    task = opener(tmp_path, beside=teachers.Beside(), table="fp32")
    with torch.no_grad():
        images = views.images(rows, crops)
        torch.testing.assert_close(task.logits(rows, crops), network(images))
        torch.testing.assert_close(task.said(rows, crops)[1], network.features(images))
    assert task.table.known() == 20
    assert torch.equal(task.train, opener(None, views="online").train)


@pytest.mark.parametrize(
    ("settings", "epochs", "expected"),
    [
        ({}, 59, "online"),
        ({}, 60, "exact"),
        ({"shared": True}, 1, "exact"),
        ({"views": "online", "shared": True}, 240, "online"),
        ({"views": "single"}, 1, "single"),
        ({"views": "exact"}, 1, "exact"),
    ],
)
def test_auto_keeps_crops_where_they_are_met_often_enough(teacher, settings, epochs, expected):
    views = teacher[3]
    assert teachers.views_in_use(Teacher(**settings), views, 4, epochs) == expected


def test_auto_makes_no_table_that_no_disk_would_take(teacher):
    views = teacher[3]
    width = teachers.MOST // (2 * len(views) * views.count)
    assert teachers.views_in_use(Teacher(shared=True), views, width, 240) == "exact"
    assert teachers.views_in_use(Teacher(shared=True), views, width + 1, 240) == "online"
    assert teachers.views_in_use(Teacher(shared=True, table="fp32"), views, width, 1) == "online"


def test_a_single_teacher_says_of_each_crop_what_it_says_of_the_whole_image(teacher, tmp_path):
    opener, network, dataset, views = teacher
    rows, crops = torch.arange(20), views.numbered(torch.arange(20))
    task = opener(tmp_path, views="single")
    assert torch.equal(task.logits(rows, crops), task.train[:20])
    identities = {
        opener(tmp_path, **each).identity
        for each in (
            {},
            {"views": "single"},
            {"table": "fp32"},
            {"precision": "bf16"},
            {"views": "online"},
        )
    }
    assert len(identities) == 5


@pytest.mark.parametrize("views", ["online", "exact"])
def test_given_logits_know_no_crops(views):
    with pytest.raises(ConfigError, match=f"teacher.views={views} needs a network"):
        Teacher(logits="logits.npy", views=views)


def trained(words: list[str], folder: Path, *more: str) -> tuple[dict, dict[str, torch.Tensor]]:
    outcome = distill.run(build(read([*words, *more])), folder)
    return outcome.metrics, checkpoint.load(folder / "last").weights


def test_a_short_training_from_the_table_is_that_of_the_teacher_run_online(tmp_path, cache_root):
    words = ["train.epochs=3", f"cache={cache_root}", "device=cpu"]
    online, weights = trained(words, tmp_path / "online", "teacher.views=online")
    for attempt in ("filled", "found"):
        exact = ["teacher.views=exact", "teacher.table=fp32"]
        metrics, same = trained(words, tmp_path / attempt, *exact)
        assert all(torch.equal(value, same[name]) for name, value in weights.items())
        assert metrics["train/loss"] == online["train/loss"]
    half, _ = trained(words, tmp_path / "half", "teacher.views=exact")
    assert half["train/loss"] == pytest.approx(online["train/loss"], rel=5e-3)
    # with small steps, whose rounding does not grow from step to step, the weights agree as well
    small = [*words, "train.lr=0.0001"]
    _, exact = trained(small, tmp_path / "small", "teacher.views=online")
    _, close = trained(small, tmp_path / "small half", "teacher.views=exact")
    for name, value in exact.items():
        torch.testing.assert_close(close[name], value, rtol=2e-3, atol=2e-5)


def test_a_run_from_a_table_is_gone_on_with_by_a_run_that_asks_alike(tmp_path, cache_root):
    words = ["train.epochs=2", f"cache={cache_root}", "device=cpu", "teacher.views=exact"]

    def cut(metrics, _):
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        distill.run(build(read(words)), tmp_path / "run", report=cut)
    distill.run(build(read(words)), tmp_path / "run", resume=True)
    _, straight = trained(words, tmp_path / "straight")
    found = checkpoint.load(tmp_path / "run" / "last").weights
    assert all(torch.equal(value, found[name]) for name, value in straight.items())


@pytest.mark.parametrize(
    "name", sorted({*models.NAMES} - {"deit_ti", "pit_ti", "t2t_vit_7", "pvt_ti"})
)
def test_batch_norms_are_folded_into_convolutions_without_an_error(name, tmp_path):
    torch.manual_seed(0)
    network = models.build(name, 10).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    task = teachers.TaskTeacher(
        identity="", classes=10, train_views=None, test_views=None, network=network
    )
    assert task.folded is not network
    left = sum(isinstance(m, torch.nn.BatchNorm2d) for m in task.folded.modules())
    assert left < sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules()) / 1.5
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        apart = (task.folded(images) - network(images)).norm() / network(images).norm()
    assert apart < 2e-6


def test_the_cache_verb_computes_all_crops_ahead_and_a_run_asks_for_none(tmp_path, monkeypatch):
    words = ["method.name=kd", "teacher.epochs=2", "teacher.views=exact", "train.epochs=1"]
    words += [f"cache={tmp_path / 'cache'}", f"storage={tmp_path}", "device=cpu"]
    assert main("python -m richkd", ABOUT, VERBS, ["cache", *words]) == 0
    (path,) = (tmp_path / "cache" / "teacher-views").glob("*/rows.npy")
    assert np.load(path)["sum"].all()
    monkeypatch.setattr(teachers.TaskTeacher, "of_numbers", pytest.fail)
    assert main("python -m richkd", ABOUT, VERBS, ["distill", *words]) == 0
