"""Teacher outputs on disk are computed once, and never served damaged."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from richkd import cache
from richkd.errors import ConfigError, DataError

COUNT, WIDTH = 50, 3
ORACLE = np.arange(COUNT * WIDTH, dtype=np.float32).reshape(COUNT, WIDTH)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(cache, "SHARD", 8)  # 50 rows are 6 whole shards and one of 2 rows
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("machine")))
    new_process(monkeypatch)


def new_process(monkeypatch):
    """Forget what this process has verified, as a new one would."""
    monkeypatch.setattr(cache, "_verified", {})


class Compute:
    """Slices of the oracle; keeps what it was asked for, and can stop at a row."""

    def __init__(self, stop_at=None):
        self.calls, self.stop_at = [], stop_at

    def __call__(self, start, stop):
        """Return rows of the oracle, or stop."""
        if start == self.stop_at:
            raise InterruptedError("power cut")
        self.calls.append((start, stop))
        return ORACLE[start:stop]


def table(root, compute, **changes):
    wanted = {"kind": "images", "key": {"model": "m", "data": "d"}, "count": COUNT, "width": WIDTH}
    return cache.rows(root, compute=compute, **(wanted | changes))


def entry_of(root):
    return next(path for path in (root / "images").iterdir() if path.is_dir())


def test_rows_are_computed_once_in_order(tmp_path):
    first = Compute()
    assert np.array_equal(table(tmp_path, first), ORACLE)
    assert first.calls == [(i, min(i + 8, 50)) for i in range(0, 50, 8)]
    second = Compute()
    assert np.array_equal(table(tmp_path, second), ORACLE)
    assert second.calls == []


def test_rows_are_mapped_float32_and_never_written(tmp_path):
    found = table(tmp_path, lambda start, stop: ORACLE[start:stop].astype(np.float64))
    assert isinstance(found, np.memmap)
    assert found.dtype == np.float32
    assert found.shape == (COUNT, WIDTH)
    torch.from_numpy(found).zero_()
    assert np.array_equal(table(tmp_path, Compute()), ORACLE)


def test_file_is_an_ordinary_npy_with_its_key_beside(tmp_path):
    table(tmp_path, Compute())
    entry = entry_of(tmp_path)
    assert np.array_equal(np.load(entry / "rows.npy"), ORACLE)
    beside = json.loads(entry.with_suffix(".json").read_text())
    assert beside["kind"] == "images"
    assert beside["key"]["key"] == {"model": "m", "data": "d"}


@pytest.mark.parametrize(
    "changes",
    [
        {"key": {"model": "n", "data": "d"}},
        {"key": {"model": "m", "data": "e"}},
        {"key": {"model": "m", "data": "d", "size": 32}},
        {"count": 49},
        {"width": 2},
        {"kind": "texts"},
    ],
)
def test_whatever_changes_in_the_key_is_another_entry(tmp_path, changes):
    table(tmp_path, Compute())
    calls = []

    def compute(start, stop):
        calls.append(start)
        return np.zeros((stop - start, changes.get("width", WIDTH)))

    assert not table(tmp_path, compute, **changes).any()
    assert calls
    assert np.array_equal(table(tmp_path, None), ORACLE)


def test_order_of_the_key_does_not_matter(tmp_path):
    table(tmp_path, Compute())
    assert np.array_equal(table(tmp_path, None, key={"data": "d", "model": "m"}), ORACLE)


def test_another_format_is_another_entry(tmp_path, monkeypatch):
    table(tmp_path, Compute())
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    compute = Compute()
    table(tmp_path, compute)
    assert compute.calls


@pytest.mark.parametrize("stop_at", range(0, 50, 8))
def test_interrupted_fill_goes_on_from_its_finished_shards(tmp_path, stop_at):
    first, second = Compute(stop_at), Compute()
    with pytest.raises(InterruptedError):
        table(tmp_path, first)
    assert not list(tmp_path.glob("images/[!.]*/")), "a part is not visible"
    assert np.array_equal(table(tmp_path, second), ORACLE)
    assert first.calls + second.calls == [(i, min(i + 8, 50)) for i in range(0, 50, 8)]


def test_sigkill_while_filling_ends_in_the_same_bytes_as_a_straight_fill(tmp_path):
    def slowly(start, stop):
        time.sleep(0.02)
        return ORACLE[start:stop]

    draw, kills = random.Random(0), 0
    while not list(tmp_path.glob("images/[!.]*/")):
        child = os.fork()
        if child == 0:
            try:
                table(tmp_path, slowly)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.03, 0.08))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert kills > 1
    assert np.array_equal(table(tmp_path, None), ORACLE)
    table(tmp_path / "straight", Compute())
    for name in (cache.ROWS, cache.SHARDS):
        whole = (entry_of(tmp_path / "straight") / name).read_bytes()
        assert (entry_of(tmp_path) / name).read_bytes() == whole


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_damaged_shard_alone_is_computed_again_with_a_warning(tmp_path, monkeypatch):
    table(tmp_path, Compute())
    path = entry_of(tmp_path) / cache.ROWS
    flip(path, len(cache._header(COUNT, WIDTH)) + 4 * WIDTH * 17)  # row 17 is in the third shard
    new_process(monkeypatch)
    compute = Compute()
    with pytest.warns(UserWarning, match="damaged in 1 of 7 shards .the first at row 16"):
        assert np.array_equal(table(tmp_path, compute), ORACLE)
    assert compute.calls == [(16, 24)]
    new_process(monkeypatch)
    assert np.array_equal(table(tmp_path, None), ORACLE), "it was mended on the disk"


def damaged(whole: bytes, draw: random.Random) -> bytes:
    content = bytearray(whole)
    content[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    return bytes(content)


def cuts(size: int) -> list[int]:
    """Every 64th length, and the last 64."""
    return sorted({*range(0, size, 64), *range(max(0, size - 64), size)})


@pytest.mark.filterwarnings("ignore:.* is damaged in")
@pytest.mark.parametrize("name", [cache.ROWS, cache.SHARDS])
def test_flipped_bit_or_torn_file_of_a_table_is_never_served(tmp_path, name):
    table(tmp_path, Compute())
    draw, path = random.Random(0), entry_of(tmp_path) / name
    whole = path.read_bytes()
    torn = [whole[:length] for length in cuts(len(whole))]
    for content in [*(damaged(whole, draw) for _ in range(400)), *torn]:
        path.write_bytes(content)  # in the process that computed it: the file's times tell
        assert content != whole
        assert np.array_equal(table(tmp_path, Compute()), ORACLE)
    assert len(torn) > 64


@pytest.mark.filterwarnings("ignore:.* is damaged, and is built again")
@pytest.mark.parametrize("name", ["{}/sub/file", "{}.sha256"])
def test_flipped_bit_or_torn_file_of_a_folder_is_never_served(tmp_path, name):
    def build(path: Path) -> None:
        (path / "sub").mkdir()
        (path / "sub" / "file").write_bytes(random.Random(1).randbytes(300))
        built.append(path)

    built = []
    entry = cache.folder(tmp_path, "teachers", {}, build)
    draw, path = random.Random(0), entry.parent / name.format(entry.name)
    whole = path.read_bytes()
    content = (entry / "sub/file").read_bytes()
    torn = [whole[:length] for length in cuts(len(whole))]
    for k, bad in enumerate([*(damaged(whole, draw) for _ in range(400)), *torn]):
        path.write_bytes(bad)
        cache.folder(tmp_path, "teachers", {}, build)
        assert (entry / "sub/file").read_bytes() == content
        assert len(built) == k + 2, "it was built again"
    assert path.read_bytes() == whole


@pytest.mark.parametrize("change", ["more", "gone", "renamed", "no sums"])
def test_folder_with_other_files_is_built_again(tmp_path, change):
    entry = cache.folder(tmp_path, "teachers", {}, build)
    file = entry / "sub" / "file"
    if change == "more":
        (entry / "other").touch()
    elif change == "gone":
        file.unlink()
    elif change == "renamed":
        file.rename(entry / "sub" / "folder")
    else:
        entry.with_name(f"{entry.name}.sha256").unlink()
    with pytest.warns(UserWarning, match=f"{entry.name} is damaged, and is built again"):
        cache.folder(tmp_path, "teachers", {}, build)
    assert [path.relative_to(entry).as_posix() for path in entry.rglob("*")] == ["sub", "sub/file"]


def test_sums_of_a_folder_are_those_of_sha256sum(tmp_path):
    entry = cache.folder(tmp_path, "teachers", {}, build)
    words = ["sha256sum", "--strict", "--check", f"../{entry.name}.sha256"]
    subprocess.run(words, cwd=entry, check=True, stdout=subprocess.DEVNULL)


def settle(monkeypatch) -> None:
    """Let the times of files that were just written count as past."""
    monkeypatch.setattr(cache, "SETTLED", 0.02)
    time.sleep(0.05)


def reads_of(root: Path, monkeypatch) -> int:
    """Open a table and a folder as a new process does and return how often bytes were compared."""
    new_process(monkeypatch)
    seen = []
    with monkeypatch.context() as patch:
        for name in ("_sound", "_sums"):
            real = getattr(cache, name)
            patch.setattr(cache, name, lambda *a, real=real: seen.append(a) or real(*a))
        assert np.array_equal(table(root, None), ORACLE)
        cache.folder(root, "teachers", {}, pytest.fail)
    return len(seen)


def test_checksums_are_compared_once_a_machine(tmp_path, tmp_path_factory, monkeypatch):
    table(tmp_path, Compute())
    entry = cache.folder(tmp_path, "teachers", {}, build)
    assert reads_of(tmp_path, monkeypatch) == 2, "too soon after they were written"
    assert reads_of(tmp_path, monkeypatch) == 2
    settle(monkeypatch)
    assert [reads_of(tmp_path, monkeypatch) for _ in range(3)] == [2, 0, 0]
    table(tmp_path, None)  # noted by the process itself, too
    boot = tmp_path / "boot"
    boot.write_text("another")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "BOOT", boot)
        assert [reads_of(tmp_path, monkeypatch) for _ in range(2)] == [2, 0]
    with monkeypatch.context() as patch:  # another machine that shares the cache
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("other")))
        assert [reads_of(tmp_path, monkeypatch) for _ in range(2)] == [2, 0]
    assert [reads_of(tmp_path, monkeypatch) for _ in range(2)] == [2, 0], "of the other start"
    os.utime(entry / "sub/file", (0, 0))
    settle(monkeypatch)
    assert [reads_of(tmp_path, monkeypatch) for _ in range(2)] == [1, 0]


def test_change_of_a_noted_file_is_found_though_its_times_are_set_back(tmp_path, monkeypatch):
    table(tmp_path, Compute())
    entry = cache.folder(tmp_path, "teachers", {}, build)
    settle(monkeypatch)
    assert [reads_of(tmp_path, monkeypatch) for _ in range(2)] == [2, 0]
    for path, use in (
        (entry_of(tmp_path) / cache.ROWS, lambda: table(tmp_path, Compute())),
        (entry / "sub/file", lambda: cache.folder(tmp_path, "teachers", {}, build)),
    ):
        for forget in (False, True):
            if forget:
                new_process(monkeypatch)
            before = path.stat()
            flip(path, -1)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            after = path.stat()
            assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
            settle(monkeypatch)
            with pytest.warns(UserWarning, match="damaged"):
                use()
            settle(monkeypatch)
            use()  # found sound, and noted
    assert np.array_equal(table(tmp_path, None), ORACLE)


@pytest.mark.parametrize("how", ["others may use it", "a link", "another's", "cannot be made"])
def test_note_where_others_could_write_is_neither_read_nor_written(tmp_path, monkeypatch, how):
    table(tmp_path, Compute())
    cache.folder(tmp_path, "teachers", {}, build)
    settle(monkeypatch)
    assert [reads_of(tmp_path, monkeypatch) for _ in range(2)] == [2, 0]
    top = Path(tempfile.gettempdir()) / f"richkd-{os.getuid()}"
    if how == "others may use it":
        top.chmod(0o777)
    elif how == "a link":
        top.rename(tmp_path / "elsewhere")
        top.symlink_to(tmp_path / "elsewhere")
    elif how == "another's":
        other = os.getuid() + 1
        monkeypatch.setattr(os, "getuid", lambda: other)
        top.rename(top.with_name(f"richkd-{os.getuid()}"))
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert [reads_of(tmp_path, monkeypatch) for _ in range(2)] == [2, 2]


def test_comparison_of_a_large_folder_is_told_and_can_be_stopped(tmp_path, monkeypatch):
    def stop(what, done, total):
        assert (what, done, total) == ("teachers (comparing checksums)", 4, len("content"))
        raise InterruptedError

    cache.folder(tmp_path, "teachers", {}, build)
    monkeypatch.setattr(cache, "BLOCK", 4)
    with pytest.raises(InterruptedError):
        cache.folder(tmp_path, "teachers", {}, build, progress=stop)


def test_used_entries_are_known_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_used", {})
    for _ in range(2):
        table(tmp_path, Compute())
        entry = cache.folder(tmp_path, "teachers", {}, build)
    assert cache.used() == [entry_of(tmp_path), entry]


def test_damage_in_a_file_that_this_process_has_verified_is_found_by_its_time(tmp_path):
    table(tmp_path, Compute())
    path = entry_of(tmp_path) / cache.ROWS
    flip(path, path.stat().st_size - 1)
    os.utime(path, ns=(0, 0))
    with pytest.warns(UserWarning, match="damaged"):
        assert np.array_equal(table(tmp_path, Compute()), ORACLE)


def test_damaged_header_misleads_nobody(tmp_path, monkeypatch):
    table(tmp_path, Compute())
    path = entry_of(tmp_path) / cache.ROWS
    path.write_bytes(path.read_bytes().replace(b"(50, 3)", b"(3, 50)"))
    new_process(monkeypatch)
    assert np.array_equal(table(tmp_path, None), ORACLE)


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_cut_table_is_mended(tmp_path, monkeypatch, length):
    table(tmp_path, Compute())
    path = entry_of(tmp_path) / cache.ROWS
    os.truncate(path, length % path.stat().st_size)
    new_process(monkeypatch)
    with pytest.warns(UserWarning, match="damaged"):
        assert np.array_equal(table(tmp_path, Compute()), ORACLE)
    assert np.array_equal(np.load(path), ORACLE)


@pytest.mark.parametrize("content", [None, b"", b'["0"', b"{}", b"[]", b"[1, 2, 3, 4, 5, 6, 7]"])
def test_table_without_its_checksums_is_computed_again(tmp_path, monkeypatch, content):
    table(tmp_path, Compute())
    shards = entry_of(tmp_path) / cache.SHARDS
    shards.unlink()
    if content is not None:
        shards.write_bytes(content)
    new_process(monkeypatch)
    compute = Compute()
    with pytest.warns(UserWarning, match="damaged in 7 of 7"):
        assert np.array_equal(table(tmp_path, compute), ORACLE)
    assert len(compute.calls) == 7


def test_missing_table_is_computed_again(tmp_path):
    table(tmp_path, Compute())
    (entry_of(tmp_path) / cache.ROWS).unlink()
    with pytest.warns(UserWarning, match="damaged"):
        assert np.array_equal(table(tmp_path, Compute()), ORACLE)


def test_damage_in_a_part_is_found_when_it_goes_on(tmp_path):
    with pytest.raises(InterruptedError):
        table(tmp_path, Compute(stop_at=24))
    path = next(tmp_path.glob("images/.*.partial")) / cache.ROWS
    flip(path, len(cache._header(COUNT, WIDTH)))
    compute = Compute()
    with pytest.warns(UserWarning, match="damaged in 1 of 7"):
        assert np.array_equal(table(tmp_path, compute), ORACLE)
    assert [start for start, _ in compute.calls] == [0, 24, 32, 40, 48]


class Spread:
    """Rows of the oracle that several compute; keeps what it was asked for and gave, and can break."""

    def __init__(self, broken_at=None):
        self.asked, self.given, self.closed, self.broken_at = [], [], 0, broken_at

    def __call__(self, missing):
        """Yield the rows of each range."""
        self.asked.append(missing)
        try:
            for start, stop in missing:
                if start == self.broken_at:
                    raise DataError("what a worker raised")
                self.given.append((start, stop))
                yield ORACLE[start:stop]
        finally:
            self.closed += 1


def test_rows_that_others_compute_are_those_of_a_straight_fill(tmp_path):
    for name, more in (("straight", {}), ("spread", {"spread": Spread()})):
        (tmp_path / name).mkdir()
        table(tmp_path / name, Compute() if not more else None, **more)
    straight, spread = (entry_of(tmp_path / name) for name in ("straight", "spread"))
    for file in (cache.ROWS, cache.SHARDS):
        assert (straight / file).read_bytes() == (spread / file).read_bytes()


def test_others_are_asked_at_once_for_what_is_missing_and_not_for_what_is_there(tmp_path):
    spread = Spread(broken_at=24)
    with pytest.raises(DataError, match="what a worker raised"):
        table(tmp_path, None, spread=spread)
    ranges = [(start, min(start + 8, COUNT)) for start in range(0, COUNT, 8)]
    assert (spread.asked, spread.given, spread.closed) == ([ranges], ranges[:3], 1)
    again = Spread()
    assert np.array_equal(table(tmp_path, None, spread=again), ORACLE)
    assert (again.asked, again.given, again.closed) == ([ranges[3:]], ranges[3:], 1)
    table(tmp_path, None, spread=None)


def test_others_are_told_when_their_rows_are_not_wanted_any_more(tmp_path):
    def stop(_what, done, _total):
        if done == 16:
            raise InterruptedError

    spread = Spread()
    with pytest.raises(InterruptedError):
        table(tmp_path, None, spread=spread, progress=stop)
    assert (len(spread.given), spread.closed) == (2, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_value_that_is_not_finite_is_refused_with_its_row(tmp_path, value):
    def compute(start, stop):
        block = ORACLE[start:stop].copy()
        if start <= 21 < stop:
            block[21 - start, 1] = value
        return block

    with pytest.raises(DataError, match="row 21"):
        table(tmp_path, compute)


@pytest.mark.parametrize("shape", [(8, 2), (7, 3), (24,), (8, 3, 1)])
def test_wrong_shape_is_refused_with_both_shapes(tmp_path, shape):
    with pytest.raises(
        DataError, match=r"\(8, 3\).*but got " + repr(shape)[:-1].replace("(", r"\(")
    ):
        table(tmp_path, lambda start, stop: np.zeros(shape))


@pytest.mark.parametrize("changes", [{"count": 0}, {"width": 0}])
def test_empty_table_is_refused(tmp_path, changes):
    with pytest.raises(DataError, match="at least one"):
        table(tmp_path, Compute(), **changes)


def test_progress_counts_rows_and_goes_on_where_it_was(tmp_path):
    told = []
    with pytest.raises(InterruptedError):
        table(tmp_path, Compute(stop_at=16), progress=lambda *args: told.append(args))
    assert told == [("images", done, 50) for done in (0, 8, 16)]
    told.clear()
    table(tmp_path, Compute(), progress=lambda *args: told.append(args))
    assert told == [("images", done, 50) for done in (16, 24, 32, 40, 48, 50)]


def test_full_disk_keeps_the_finished_shards(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    compute = Compute()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            table(tmp_path, compute)
    again = Compute()
    assert np.array_equal(table(tmp_path, again), ORACLE)
    assert 0 < len(again.calls) < 7


def refuse(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


def test_cache_that_can_only_be_read_serves_what_it_has(tmp_path, monkeypatch):
    table(tmp_path, Compute())
    entry = cache.folder(tmp_path, "teachers", {}, lambda path: None)
    new_process(monkeypatch)
    for name in ("mkdir", "rename", "replace", "truncate"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(cache, "FileLock", refuse)
    assert np.array_equal(table(cache.root(str(tmp_path)), None), ORACLE)
    assert cache.folder(tmp_path, "teachers", {}, refuse) == entry


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_cache_that_cannot_be_written_is_a_config_error_before_any_work(
    tmp_path, monkeypatch, code
):
    def acquire(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", acquire)
    compute = Compute()
    with pytest.raises(ConfigError, match="RICHKD_CACHE"):
        table(tmp_path, compute)
    assert compute.calls == []
    with pytest.raises(ConfigError, match="RICHKD_CACHE"):
        cache.folder(tmp_path, "teachers", {}, lambda path: pytest.fail("built"))


def test_access_error_of_the_computation_is_not_blamed_on_the_cache(tmp_path):
    def compute(start, stop):
        raise PermissionError(errno.EACCES, "Permission denied", "image.png")

    with pytest.raises(PermissionError, match=r"image\.png"):
        table(tmp_path, compute)


def test_root_is_the_key_then_the_environment_then_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RICHKD_CACHE", raising=False)
    assert cache.root(None) == tmp_path / "home/.cache/richkd"
    assert cache.root("~/mine") == tmp_path / "home/mine"
    monkeypatch.setenv("RICHKD_CACHE", str(tmp_path / "environment"))
    assert cache.root(None) == tmp_path / "environment"
    assert cache.root(str(tmp_path / "key")) == tmp_path / "key"
    assert all(path.is_dir() for path in tmp_path.iterdir())


def test_relative_root_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cache.root("here") == tmp_path / "here"


def test_root_that_cannot_be_a_folder_is_a_config_error(tmp_path):
    (tmp_path / "file").write_text("")
    for wanted in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cache must be a folder"):
            cache.root(str(wanted))


def build(path: Path) -> None:
    (path / "sub").mkdir()
    (path / "sub" / "file").write_text("content")


def test_folder_is_built_once_and_has_its_key_beside(tmp_path):
    entry = cache.folder(tmp_path, "teachers", {"seed": 1}, build)
    assert (entry / "sub" / "file").read_text() == "content"
    assert [path.name for path in entry.iterdir()] == ["sub"]
    assert json.loads(entry.with_suffix(".json").read_text())["key"] == {"seed": 1}
    assert cache.folder(tmp_path, "teachers", {"seed": 1}, pytest.fail) == entry
    assert cache.folder(tmp_path, "teachers", {"seed": 2}, build) != entry


def test_nothing_is_kept_of_a_folder_that_failed(tmp_path):
    def fail(path):
        build(path)
        raise RuntimeError("diverged")

    with pytest.raises(RuntimeError, match="diverged"):
        cache.folder(tmp_path, "teachers", {}, fail)
    assert not [path for path in (tmp_path / "teachers").iterdir() if path.is_dir()]
    assert (cache.folder(tmp_path, "teachers", {}, build) / "sub").is_dir()


def test_left_over_of_a_killed_build_is_cleared(tmp_path):
    child = os.fork()
    if child == 0:
        cache.folder(tmp_path, "teachers", {}, lambda path: (build(path), os._exit(9)))
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob("teachers/.*.partial"))) == 1
    cache.folder(tmp_path, "teachers", {}, build)  # would fail if `sub` were there
    assert not list(tmp_path.glob("teachers/.*.partial"))


def build_slowly(path: Path) -> None:
    (path / str(os.getpid())).write_text("")
    time.sleep(0.3)


def both(root: str, start) -> None:
    start.wait()
    cache.folder(Path(root), "teachers", {}, build_slowly)

    def compute(first, last):
        with open(Path(root) / "calls", "a") as file:
            file.write(f"{first}\n")
        time.sleep(0.01)
        return ORACLE[first:last]

    assert np.array_equal(table(Path(root), compute), ORACLE)


def test_four_processes_build_and_compute_once(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    workers = [context.Process(target=both, args=(str(tmp_path), start)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    entry = next(path for path in (tmp_path / "teachers").iterdir() if path.is_dir())
    assert len(list(entry.iterdir())) == 1
    starts = (tmp_path / "calls").read_text().split()
    assert starts == [str(i) for i in range(0, 50, 8)]


def test_wait_for_another_process_is_told_and_can_be_stopped(tmp_path):
    class Stop(Exception):
        pass

    def stop(what, done, total):
        assert what == "images (another process is at it)"
        raise Stop

    with pytest.raises(InterruptedError):
        table(tmp_path, Compute(stop_at=0))
    lock = next(tmp_path.glob("images/.*.partial")).with_suffix(".lock")
    child = os.fork()
    if child == 0:
        held = FileLock(lock)
        held.acquire()
        (tmp_path / "held").touch()
        time.sleep(30)
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with pytest.raises(Stop):
            table(tmp_path, Compute(), progress=stop)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert np.array_equal(table(tmp_path, Compute()), ORACLE), "the lock died with its owner"


def test_what_is_missing_is_said_instead_of_made_and_leaves_no_trace(tmp_path):
    with cache.found_only("images", "teachers"):
        with pytest.raises(cache.Missing, match="images"):
            table(tmp_path, refuse)
        with pytest.raises(cache.Missing, match="teachers"):
            cache.folder(tmp_path, "teachers", {}, refuse)
        assert list(tmp_path.iterdir()) == []
        assert len(table(tmp_path, Compute(), kind="texts")) == COUNT  # of another kind
    table(tmp_path, Compute())
    made = cache.folder(tmp_path, "teachers", {}, build)
    with cache.found_only("images", "teachers"):
        assert np.array_equal(table(tmp_path, refuse), ORACLE)
        assert cache.folder(tmp_path, "teachers", {}, refuse) == made
