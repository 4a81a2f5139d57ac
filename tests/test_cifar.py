"""The real CIFAR-100 against torchvision's own reading, and real teachers and CLIP logits of CIFAR-10."""

import json
import os
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision
from real import CLIP, FILES, REAL, needs, needs_real_outputs

from richkd import __main__ as command_line
from richkd import distill
from richkd.command import main
from richkd.config import Data
from richkd.data.cifar import FOLDER, cifar100
from richkd.errors import ConfigError, CorruptError
from richkd.layers import build, read

needs_cifar100 = needs(FOLDER)


def run(*words):
    return main("python -m richkd", command_line.ABOUT, command_line.VERBS, [*words])


@pytest.fixture(scope="module")
def torchvision_s():
    """Both parts of CIFAR-100 as torchvision reads them."""
    return [torchvision.datasets.CIFAR100(REAL, train=train) for train in (True, False)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The data set as RICHKD_DATA gives it."""
    return cifar100(Data(source="cifar100"), tmp_path_factory.mktemp("cache"), None)


@needs_cifar100
def test_images_labels_and_names_are_torchvision_s_in_its_order(ours, torchvision_s):
    for found, expected in zip((ours.train, ours.test), torchvision_s, strict=True):
        assert np.array_equal(found.pixels, expected.data)
        assert found.labels.tolist() == expected.targets
    assert ours.names == tuple(torchvision_s[0].classes)


@needs_cifar100
def test_cifar_100_is_what_it_is(ours):
    assert (len(ours.train), len(ours.test), len(ours.names)) == (50_000, 10_000, 100)
    assert (np.bincount(ours.train.labels) == 500).all()
    assert (np.bincount(ours.test.labels) == 100).all()
    assert (ours.names[0], ours.names[19], ours.names[99]) == ("apple", "cattle", "worm")
    assert ours.train.labels[:3].tolist() == [19, 29, 0]
    assert ours.test.labels[:3].tolist() == [49, 33, 72]
    assert ours.train.ids.tolist() == list(range(50_000))
    assert ours.test.ids.tolist() == list(range(50_000, 60_000))
    assert (ours.first_test, ours.pad, ours.flip, ours.size) == (50_000, 4, True, (32, 32))


@needs_cifar100
def test_its_normalisation_is_that_of_the_training_pixels(ours, torchvision_s):
    for k in range(3):
        channel = torchvision_s[0].data[..., k].ravel()
        mean, square = channel.mean() / 255, np.square(channel, dtype=np.uint32).mean() / 255**2
        assert ours.mean[k] == pytest.approx(mean, abs=1e-9)
        assert ours.std[k] == pytest.approx((square - mean**2) ** 0.5, abs=1e-9)
    assert ours.mean == pytest.approx((0.5071, 0.4866, 0.4409), abs=1e-4)
    assert ours.std == pytest.approx((0.2673, 0.2564, 0.2762), abs=1e-4)


@needs_cifar100
def test_what_is_in_a_home_folder_is_found_and_not_downloaded_again(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise AssertionError

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setenv("HOME", str(Path(REAL).absolute().parent))
    data = Data(source="cifar100", root=f"~/{Path(REAL).name}", download=True)
    assert len(cifar100(data, tmp_path, None).test) == 10_000


@needs_cifar100
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("train", "a byte"), ("train", "missing"), ("test", "torn"), ("test", "missing")),
        *(("meta", "a byte"), ("meta", "missing")),
    ],
)
def test_a_damaged_copy_is_told_with_its_exit_code(tmp_path, capsys, name, damage):
    copy = tmp_path / FOLDER
    copy.mkdir()
    for each in ("train", "test", "meta"):
        os.symlink(Path(REAL).absolute() / FOLDER / each, copy / each)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).unlink()
    if damage != "missing":
        (copy / name).write_bytes(content if damage == "a byte" else content[:-1])
    wanted = ConfigError if (name, damage) == ("train", "missing") else CorruptError
    with pytest.raises(wanted):
        cifar100(Data(source="cifar100", root=str(tmp_path)), tmp_path, None)
    if (name, damage) == ("meta", "a byte"):
        code = run("cache", "data.source=cifar100", f"data.root={tmp_path}", f"cache={tmp_path}")
        assert code == 4
        last = capsys.readouterr().err.splitlines()[-1]
        assert "must hold the published files but one is damaged or missing; fetch it" in last


@pytest.mark.parametrize("given", [None, "", "none"])
def test_a_missing_folder_is_one_line(tmp_path, monkeypatch, capsys, given):
    monkeypatch.delenv("RICHKD_DATA", raising=False)
    if given == "":
        monkeypatch.setenv("RICHKD_DATA", "")
    words = [f"data.root={tmp_path / given}"] if given else []
    assert run("cache", "data.source=cifar100", f"cache={tmp_path}", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.root must " in line
    assert "data.download=true" in line


@pytest.mark.parametrize(
    "error", [URLError("Name or service not known"), ConnectionResetError(104, "reset")]
)
def test_a_download_without_internet_is_one_line(tmp_path, monkeypatch, capsys, error):
    def unreachable(*_, **__):
        raise error

    monkeypatch.delenv("RICHKD_DATA", raising=False)
    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    words = ("cache", "data.source=cifar100", "data.download=true", f"cache={tmp_path}")
    assert run(*words) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.strip()]
    assert f"data.download: CIFAR-100 could not be fetched into {tmp_path / 'data'} (" in line
    assert "download it on a machine with internet and give data.root" in line


@pytest.mark.soak
@needs_cifar100
def test_a_student_learns_from_real_images(tmp_path):
    words = [
        *("data.source=cifar100", f"data.root={REAL}", "data.validation=20000", "device=cpu"),
        *("method.name=ce", "student.name=cnn16", f"cache={tmp_path / 'cache'}"),
        *("train.epochs=1", "train.batch_size=64", "train.lr=0.05"),
    ]
    outcome = distill.run(build(read(words)), tmp_path / "run")
    assert distill.test(outcome)["test/top1"] > 5  # a guess is right on 1 %


@needs_real_outputs
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", {"teacher": 91.73, "clip": 88.97, "fused": 93.43}),
        pytest.param(*("resnet56", {"teacher": 93.39, "clip": 88.97}), marks=pytest.mark.soak),
    ],
)
def test_published_teachers_and_real_clip_have_their_published_accuracy(
    tmp_path, capsys, name, expected
):
    words = [
        *("data.source=arrays", f"data.path={REAL}/cifar10_test.npz", f"cache={tmp_path}"),
        *(
            f"teacher.name={name}",
            "teacher.shortcut=A",
            f"teacher.checkpoint={REAL}/{FILES[name]}",
        ),
        *("teacher.mean=[0.485, 0.456, 0.406]", "teacher.std=[0.229, 0.224, 0.225]"),
        *(f"clip.logits={REAL}/{CLIP}:english", "fusion.alpha=0.7", "device=cpu"),
    ]
    assert run("evaluate", *words, "--json") == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert "warning" not in told.err
    for who, top1 in expected.items():
        assert found[who]["all"]["rows"] == 10_000
        assert found[who]["all"]["top1"] == pytest.approx(top1, abs=0.015), who
        rows = {part: found[who][part]["rows"] for part in ("val", "test")}
        assert rows == {"val": 800, "test": 2000}
