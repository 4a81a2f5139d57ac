"""Images augmented one by one: against timm's own transforms, by seed, over processes, and as runs meet them."""

import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from richkd import bench, checkpoint, distill, load_student, threads
from richkd.config import Data
from richkd.data import Stream, load, stream
from richkd.errors import ConfigError
from richkd.layers import build, read
from richkd.steps import Steps
from richkd.teachers import teacher_recipe

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROWS = 40


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> str:
    """Images in colour of 2 classes, smooth as photographs are, 32 pixels a side."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (ROWS, 4, 4, 3), np.uint8)
    images = [np.asarray(Image.fromarray(each).resize((32, 32), 3)) for each in coarse]
    path = tmp_path_factory.mktemp("stream") / "data.npz"
    np.savez(path, images=np.stack(images), labels=np.arange(ROWS) % 2)
    return str(path)


def opened(archive: str, augment: str = "strong", size: int = 48) -> Stream:
    config = Data(source="arrays", path=archive, folds=4, augment=augment, size=size)
    dataset = load(config)
    return Stream(dataset.train, dataset, CPU)


def reference(augment: str, size: int):
    """The published recipes, as timm makes them."""
    options = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    if augment == "resized":
        options = {"color_jitter": None}
    filtered = {"resized": "bilinear", "strong": "bicubic"}[augment]
    return create_transform(
        size, is_training=True, interpolation=filtered, mean=MEAN, std=STD, **options
    )


@pytest.mark.parametrize("augment", ["resized", "strong"])
def test_an_augmented_image_is_that_of_timm_under_the_same_seed(archive, augment):
    ours, theirs = opened(archive, augment), reference(augment, 48)
    rows = torch.arange(len(ours))
    seeds = ours.draw(len(rows), torch.Generator().manual_seed(3))
    found = ours.images(rows, seeds)
    erased = 0
    for row, (seed,) in enumerate(seeds.tolist()):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        expected = theirs(ours.source.picture(row))
        # an erased part alone is no whole grey level; it is brought to the nearest
        levels = expected * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        whole = (255 * levels - (255 * levels).round()).abs().amax(0) < 1e-3
        erased += bool((~whole).float().mean() > 0.01)
        assert (found[row] - expected).abs()[:, whole].max() < 1e-5
        assert (found[row] - expected).abs().max() < 0.51 / 255 / min(STD)
    assert erased == (0 if augment == "resized" else pytest.approx(len(rows) / 4, abs=6))


def test_an_image_depends_on_its_seed_alone_and_leaves_no_trace(archive):
    ours = opened(archive)
    rows = torch.arange(len(ours))
    seeds = ours.draw(len(rows), torch.Generator().manual_seed(0))
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    found = ours.pixels(rows, seeds)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    order = torch.randperm(len(rows))
    assert torch.equal(ours.pixels(rows[order], seeds[order]), found[order])
    assert torch.equal(ours.pixels(rows[5:6], seeds[5:6]), found[5:6])
    assert not torch.equal(ours.pixels(rows[5:6], seeds[6:7]), found[5:6])
    assert 0 <= seeds.min() and seeds.max() < 2**32 and len(seeds.unique()) == len(seeds)


def test_noise_leaves_the_range_of_a_byte_and_another_normalisation_sees_the_same_pixels(archive):
    ours = opened(archive)
    rows = torch.arange(len(ours)).repeat(4)
    pixels = ours.pixels(rows, ours.draw(len(rows), torch.Generator().manual_seed(1)))
    assert pixels.dtype == torch.int16
    assert pixels.min() < 0 and pixels.max() > 255
    other = ours.normalised_by((0.5,) * 3, (0.25,) * 3).normalised(pixels)
    torch.testing.assert_close(other, (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25)


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_posterising_keeps_bits_down_to_none(bits):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    found = np.asarray(stream.posterised(Image.fromarray(levels).convert("RGB"), bits, fillcolor=0))
    assert (found[..., 1] == levels.astype(int) // 2 ** (8 - bits) * 2 ** (8 - bits)).all()


def test_a_test_sees_whole_images_brought_to_size(archive):
    for augment, filtered in (("strong", Image.BICUBIC), ("resized", Image.BILINEAR)):
        ours = opened(archive, augment)
        found = ours.pixels(torch.tensor([3, 1]))
        for row, pixels in zip((3, 1), found, strict=True):
            expected = ours.source.picture(row).resize((48, 48), filtered)
            assert (pixels.numpy() == np.asarray(expected)).all()


def test_worker_processes_make_the_same_pixels_and_end(archive, monkeypatch):
    ours = opened(archive)
    rows, none = torch.arange(len(ours)), torch.arange(0)
    generator = torch.Generator().manual_seed(0)
    batches = [(part, ours.draw(len(part), generator)) for part in (*rows.split(13), none)]
    expected = [ours.pixels(*batch) for batch in batches]
    monkeypatch.setattr(stream, "CHUNK", 4)
    for count in (0, 2):
        monkeypatch.setattr(stream, "processes", lambda *_, count=count: count)
        before = torch.get_rng_state()
        made = ours.loader(batches)
        found = [next(made)]
        assert len(multiprocessing.active_children()) == count
        found += made
        assert all(map(torch.equal, found, expected))
        assert not multiprocessing.active_children()
        assert torch.equal(torch.get_rng_state(), before)
    made = ours.loader(batches)
    next(made)
    made.close()  # before its end
    assert not multiprocessing.active_children()


def test_processes_make_images_beside_a_gpu_if_there_are_many_and_cores_for_it(monkeypatch):
    for device, granted, images, expected in (
        ("cuda", 8, 50_000, 8),
        ("cuda", 1, 50_000, 0),
        ("cuda", 8, 20, 0),
        ("cpu", 8, 50_000, 0),
    ):
        monkeypatch.setattr(threads, "GRANTED", granted)
        assert stream.processes(torch.device(device), images) == expected


@pytest.fixture
def words(archive, cache_root) -> list[str]:
    return [
        *("data.source=arrays", f"data.path={archive}", "data.folds=4", "data.validation=6"),
        *("data.augment=strong", "data.size=24", "student.name=resnet8", f"cache={cache_root}"),
        *("train.epochs=3", "train.batch_size=8", "train.drop_last=true", "device=cpu"),
        *("train.optimizer=adamw", "train.lr=0.001", "teacher.name=resnet8", "teacher.epochs=1"),
        *("teacher.batch_size=8", "method.name=kd"),
    ]


class Stop(Exception):
    """The end of a run."""


class Dropping(nn.Module):
    """A network whose layers draw."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(144, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits `(N, 2)`."""
        return self.head(self.body(images))


def test_a_run_that_is_gone_on_with_meets_the_same_pixels_and_draws(words, tmp_path, monkeypatch):
    def dropping(*_):
        torch.manual_seed(0)
        return Dropping()

    monkeypatch.setattr(distill, "initial_student", dropping)
    config = build(read([*words, "method.name=ce"]))
    expected = distill.run(config, tmp_path / "straight").network.state_dict()

    def report(metrics, _):
        if metrics["epoch"] == 1:
            raise Stop

    with pytest.raises(Stop):
        distill.run(config, tmp_path / "cut", report=report)
    torch.rand(7)
    found = distill.run(config, tmp_path / "cut", resume=True).network.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_student_and_teacher_see_one_augmented_image_each_in_its_own_way(words, tmp_path):
    config = build(read([*words, "teacher.size=16"]))
    assert teacher_recipe(config).data.size == 16
    task = distill.open_task(config)
    teacher = distill.open_teacher(config, task)
    assert teacher.task.views == "online"
    saved = checkpoint.load(distill.trained_teacher(config, task))
    assert (saved.meta["size"], saved.meta["mean"]) == ([16, 16], list(MEAN))
    learner = distill.open_learner(config, task, teacher)
    optimizer = distill.open_optimizer(config, learner)
    batches = distill.open_batches(config, task, distilled=True)
    steps = Steps(config, learner, teacher, optimizer, batches)
    parts = [part for block in steps.blocks(0) for part in block]
    assert len(parts) == len(task.split.transfer) // 8
    for part, (rows, _, views) in zip(parts, batches.epoch(0), strict=True):
        assert torch.equal(part.pixels, task.train.pixels(rows, views))
        images = nn.functional.interpolate(
            task.train.images(rows, views), (16, 16), mode="bilinear", align_corners=False
        )
        with torch.inference_mode():
            logits = teacher.task.network.network(images)
        expected = torch.log_softmax(logits / teacher.temperature, 1)
        torch.testing.assert_close(part.target, expected, rtol=1e-4, atol=1e-5)
    outcome = distill.run(config, tmp_path / "run")
    found = distill.test(outcome)
    student = load_student(tmp_path / "run")
    assert student.size == (24, 24)
    again = distill.retest(tmp_path / "run" / "best").found
    assert again["test"]["top1"] == found["test/top1"]


def test_what_needs_all_crops_at_hand_is_refused(words, archive):
    for more, said in {
        "teacher.views=exact": "teacher.views=exact keeps .* data.augment=strong",
        "clip.views=online": "clip.views=online is a matter of data.augment=crop",
        "clip.extra=[{weight: 0.5, views: 4}]": "clip.views=4 is a matter",
        "data.pad=4": "data.pad is a matter of data.augment=crop",
        "data.augment=weak": "data.augment must be one of crop, resized, strong",
    }.items():
        with pytest.raises(ConfigError, match=f"{said}"):
            build(read([*words, more]))
    with pytest.raises(ConfigError, match="teacher.size is a matter of teacher.checkpoint"):
        teacher_recipe(build(read(["teacher.size=16"])))
    with pytest.raises(ConfigError, match="data.size is a matter of data.source=folder, or of"):
        load(Data(source="arrays", path=archive, size=64))
    with pytest.raises(ConfigError, match="bench measures crops, .* data.augment=strong"):
        bench.measure(build(read(words)), [])
    with pytest.raises(ConfigError, match="data.augment=strong is for images in colour but digits"):
        load(Data(augment="strong"))


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_a_signal_ends_a_run_and_its_worker_processes(words, tmp_path, archive):
    with np.load(archive) as found:
        images, labels = (np.repeat(found[name], 40, 0) for name in ("images", "labels"))
    np.savez(tmp_path / "many.npz", images=images, labels=labels)
    words = [*words, "method.name=ce", f"data.path={tmp_path / 'many.npz'}", "train.epochs=10000"]
    code = """
import runpy
from richkd.data import stream
stream.processes = lambda *_: 2  # as beside a GPU
runpy.run_module("richkd", run_name="__main__")
"""
    command = [sys.executable, "-c", code, "distill", *words, f"storage={tmp_path}", "--name=a"]
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:

        def members() -> list[int]:
            found = []
            for path in Path("/proc").glob("[0-9]*/stat"):
                try:
                    state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                except OSError:
                    continue
                if int(group) == process.pid and state != "Z":
                    found.append(int(path.parent.name))
            return found

        end = time.monotonic() + 60
        while len(members()) < 3 and time.monotonic() < end:
            time.sleep(0.1)
        assert len(members()) >= 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert not members()
