"""Padded pixels that processes share: the same crops, one copy, whole or not at all."""

import errno
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from richkd import cache
from richkd.config import Data
from richkd.data import Views, _loaded, load, padded
from richkd.errors import Interrupted

CPU = torch.device("cpu")
CHILD = """
import sys
from pathlib import Path

import torch

from richkd.config import Data
from richkd.data import Views, load

task = load(Data(source="arrays", path=sys.argv[1]), Path(sys.argv[2]))
views = Views(task.train, task, torch.device("cpu"))
every = torch.arange(len(views))
assert views.images(every).isfinite().all() and views.pixels(every, views.numbered(every % 162)).any()
print("all read", flush=True)
sys.stdin.readline()
lines = iter(open("/proc/self/smaps").read().splitlines())
for line in lines:
    if line.endswith("padded.npy"):
        print(line.split()[-1], *(next(lines).replace(" ", "") for _ in range(20)), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def source(tmp_path):
    """Pixels as an `.npz` file; few enough to be private unless a test says otherwise."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 6, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(60) % 3)
    return tmp_path / "mine.npz"


@pytest.fixture
def opened(source, tmp_path, monkeypatch):
    """Open the pixels as a set that is large enough to be shared, or not."""

    def opened(*, small=0, progress=None, **options):
        monkeypatch.setattr(padded, "SMALL", small)
        _loaded.clear()
        data = Data(source="arrays", path=str(source), **options)
        return load(data, tmp_path / "cache", progress)

    return opened


@pytest.mark.parametrize("options", [{}, {"pad": 0}, {"flip": False}, {"pad": 3}], ids=str)
def test_shared_pixels_give_the_crops_of_private_ones(opened, options):
    private, found = opened(small=2**24, **options), opened(**options)
    assert private.train.padded is None
    assert found.digest == private.digest
    for part in ("train", "test"):
        ours, theirs = getattr(found, part), getattr(private, part)
        assert isinstance(ours.padded, np.memmap)
        assert np.array_equal(ours.pixels, theirs.pixels)
        a, b = Views(ours, found, CPU), Views(theirs, private, CPU)
        assert np.shares_memory(a.view.numpy(), ours.pixels)
        for number in range(a.count):
            rows = torch.arange(len(ours))
            views = a.numbered(torch.full_like(rows, number))
            assert torch.equal(a.pixels(rows, views), b.pixels(rows, views))
        assert torch.equal(a.images(rows), b.images(rows))


@pytest.mark.parametrize(("small", "memory"), [(2**24, 4.0), (0, 1e-7)])
def test_few_pixels_and_more_than_the_memory_are_not_kept(opened, tmp_path, small, memory):
    assert opened(small=small, memory=memory).train.padded is None
    assert not (tmp_path / "cache" / "padded").exists()


def test_with_another_padding_shared_pixels_are_padded_anew(opened):
    found = opened(pad=2)
    other, private = replace(found, pad=1), replace(found.train, padded=None)
    a, b = (Views(images, other, CPU) for images in (found.train, private))
    rows = torch.arange(len(private))
    assert torch.equal(a.pixels(rows, a.numbered(rows % 18)), b.pixels(rows, a.numbered(rows % 18)))


def test_processes_hold_one_copy(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2500, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(2500) % 5)
    command = [sys.executable, "-c", CHILD, tmp_path / "mine.npz", tmp_path / "cache"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(2)]
    try:
        assert [child.stdout.readline() for child in children] == ["all read\n"] * 2
        sizes = []
        for child in children:  # each looks while the other one holds its map, too
            child.stdin.write("\n")
            child.stdin.flush()
            told = child.stdout.readline()
            sizes.append({key: int(value) for key, value in re.findall(r"(\w+):(\d+)kB", told)})
    finally:
        for child in children:
            child.communicate(timeout=30)
    maps = (tmp_path / "cache" / "padded").glob("*/padded.npy")
    whole = max(path.stat().st_size for path in maps) / 1024
    for size in sizes:
        assert size["Rss"] > 0.9 * whole
        assert size["Anonymous"] == size["Private_Dirty"] == 0
    assert sum(size["Pss"] for size in sizes) == pytest.approx(whole, rel=0.1)


def test_a_damaged_map_is_built_again(opened, tmp_path):
    whole = opened().train.padded.copy()
    for path in (tmp_path / "cache" / "padded").glob("*/padded.npy"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged, and is built again"):
        assert np.array_equal(opened().train.padded, whole)


def test_an_interrupted_build_leaves_nothing(opened, tmp_path):
    def stop(what, done, total):
        if what == "padded pixels" and done == total:
            raise Interrupted(2, "interrupted")

    with pytest.raises(Interrupted):
        opened(progress=stop)
    left = [path.name for path in (tmp_path / "cache" / "padded").iterdir() if path.is_dir()]
    assert left == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_where_nothing_can_be_kept_each_process_pads_its_own(opened, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, "no")

    monkeypatch.setattr(cache, "_build", refuse)
    with pytest.warns(UserWarning, match="padded pixels cannot be kept"):
        found = opened()
    assert found.train.padded is None
    assert len(Views(found.train, found, CPU).images(torch.arange(5))) == 5
