"""A checkpoint is whole or invisible, whatever happens while it is written."""

import builtins
import errno
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from richkd import checkpoint
from richkd.errors import ConfigError, CorruptError, NonFiniteError
from richkd.files import write_json

FILES = ("weights.safetensors", "state.safetensors", "manifest.json")
CALLS = ("fsync", "rename", "mkdir", "unlink", "rmdir")


def save(folder, step):
    """Save a checkpoint in which all three files know `step`."""
    tensor = torch.full((4, 5), float(step))
    checkpoint.save(folder, {"w": tensor}, {"momentum": tensor}, {"step": step})


def step_of(folder):
    """Load a checkpoint, see that its files belong together, and return its step."""
    found = checkpoint.load(folder)
    steps = {*found.weights["w"].flatten().tolist(), *found.state["momentum"].flatten().tolist()}
    assert steps == {found.meta["step"]}
    return found.meta["step"]


class Killed(BaseException):
    """The process ends here; no cleaning up."""


def fail_from(monkeypatch, k, error, *, forever):
    """Let the k-th system call of a save raise, and all later ones too if `forever`; count the calls."""
    count = itertools.count(1)
    fired = []

    def wrap(real):
        def call(*args, **kwargs):
            n = next(count)
            if n == k or (forever and n > k):
                fired.append(n)
                raise error
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    monkeypatch.setattr(builtins, "open", wrap(builtins.open))
    return fired


@pytest.mark.parametrize("before", [None, 1])
def test_kill_at_any_system_call_leaves_the_old_or_the_new(tmp_path, monkeypatch, before):
    seen = []
    for k in itertools.count(1):
        folder = tmp_path / str(k) / "last"
        if before:
            save(folder, before)
        with monkeypatch.context() as patch:
            fired = fail_from(patch, k, Killed(), forever=True)
            try:
                save(folder, 2)
            except Killed:
                pass
        if not fired:
            break
        if before or checkpoint.exists(folder):
            seen.append(step_of(folder))
        assert checkpoint.exists(folder) == bool(seen)
        folder.parent.mkdir(exist_ok=True)
        without = shutil.copytree(folder.parent, tmp_path / f"{k}-without") / "last"
        shutil.rmtree(without, ignore_errors=True)
        if checkpoint.exists(without):
            step_of(without)  # what is half cleared away is no checkpoint
        save(folder, 3)  # what was left over does not hinder the next one, and goes
        assert step_of(folder) == 3
        assert os.listdir(folder.parent) == ["last"]
    assert set(seen) == ({1, 2} if before else {2})
    assert seen == sorted(seen)


def test_kill_between_the_two_renames_is_healed_by_load_and_save(tmp_path):
    folder = tmp_path / "last"
    save(folder, 1)
    os.rename(folder, tmp_path / ".last.old")
    assert step_of(folder) == 1
    save(tmp_path / "other", 2)
    os.rename(tmp_path / "other", tmp_path / ".last.new")
    assert checkpoint.exists(folder)
    assert step_of(folder) == 2
    assert checkpoint.verify(folder)["meta"] == {"step": 2}
    assert not folder.exists(), "reading changes nothing"
    save(folder, 3)
    assert step_of(folder) == 3
    assert os.listdir(tmp_path) == ["last"]


def test_swap_that_ends_between_two_looks_is_seen(tmp_path, monkeypatch):
    folder, new = tmp_path / "last", tmp_path / ".last.new"
    save(folder, 1)
    os.rename(folder, new)
    real = pathlib.Path.stat

    def stat(path, **options):
        try:
            return real(path, **options)
        finally:
            if os.path.exists(new):
                os.rename(new, folder)

    monkeypatch.setattr(pathlib.Path, "stat", stat)
    assert checkpoint.exists(folder)
    assert not new.exists()


def test_system_error_at_any_call_leaves_a_whole_one_and_no_temporary(tmp_path, monkeypatch):
    folder = tmp_path / "last"
    steps = set()
    for k in itertools.count(1):
        save(folder, 1)
        with monkeypatch.context() as patch:
            fired = fail_from(patch, k, OSError(errno.EIO, "Input/output error"), forever=False)
            try:
                save(folder, 2)
            except OSError as error:
                assert error.errno == errno.EIO
        if not fired:
            break
        steps.add(step_of(folder))
    assert steps == {1, 2}
    assert os.listdir(tmp_path) == ["last"]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_full_disk_leaves_the_old_one_and_no_temporary(tmp_path, monkeypatch, k):
    folder = tmp_path / "last"
    save(folder, 1)
    calls, real = itertools.count(1), os.fsync

    def fsync(handle):
        if next(calls) >= k:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            save(folder, 2)
    assert step_of(folder) == 1
    assert os.listdir(tmp_path) == ["last"]


def test_sigkill_at_random_moments_never_loses_an_acknowledged_step(tmp_path):
    folder = tmp_path / "last"
    draw = random.Random(0)
    last, kills = 0, 25
    for _ in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for step in itertools.count(last + 1):
                    save(folder, step)
                    os.write(writer, step.to_bytes(8, "big"))
            finally:
                os._exit(1)
        os.close(writer)
        time.sleep(draw.uniform(0.005, 0.1))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child was still saving"
        with open(reader, "rb") as pipe:
            acknowledged = pipe.read()
        last = int.from_bytes(acknowledged[-8:], "big") if acknowledged else last
        if last or checkpoint.exists(folder):
            found = step_of(folder)
            assert last <= found <= last + 1
            last = found
    assert last > kills / 2


def test_reader_beside_a_writer_always_loads_a_whole_one(tmp_path):
    folder = tmp_path / "last"
    save(folder, 0)
    child = os.fork()
    if child == 0:
        try:
            for step in range(1, 10_000):
                save(folder, step)
        finally:
            os._exit(0)
    try:
        end, steps = time.monotonic() + 1, []
        while time.monotonic() < end:
            assert checkpoint.exists(folder)
            steps.append(step_of(folder))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert steps == sorted(steps)
    assert steps[-1] > 1


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_is_never_loaded(tmp_path, name):
    folder = tmp_path / "last"
    save(folder, 1)
    path, draw = folder / name, random.Random(0)
    whole = path.read_bytes()
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            checkpoint.load(folder)
        except CorruptError as error:
            assert name in str(error)
        except ConfigError:
            assert name == "manifest.json"  # it no longer says that this is a checkpoint
        else:
            # only layout is free in JSON: what was said is what was written
            assert name == "manifest.json" and json.loads(damaged) == json.loads(whole)


@pytest.mark.parametrize("name", FILES)
def test_cut_file_is_corrupt(tmp_path, name):
    folder = tmp_path / "last"
    save(folder, 1)
    whole = (folder / name).read_bytes()
    end = len(whole) - (name == "manifest.json")  # without the line break it is still whole
    for length in {*range(0, end, 64), *range(max(0, end - 64), end)}:
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(CorruptError, match=name):
            checkpoint.load(folder)


def test_corrupt_error_says_what_was_recorded_and_found(tmp_path):
    folder = tmp_path / "last"
    save(folder, 1)
    recorded = checkpoint.verify(folder)["files"]["weights.safetensors"]["sha256"]
    with open(folder / "weights.safetensors", "ab") as file:
        file.write(b"x")
    with pytest.raises(CorruptError, match=f"weights.safetensors.*{recorded}.*found.*'sha256'"):
        checkpoint.verify(folder)


def tampered(folder, change, *, sign):
    """Change the manifest of a checkpoint; with `sign`, its own checksum too."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if sign:
        manifest["sha256"] = checkpoint._digest(manifest)
    write_json(path, manifest)


@pytest.mark.parametrize("sign", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"]["weights.safetensors"].update(size=1),
        lambda m: m["files"]["weights.safetensors"].update(sha256="0" * 64),
        lambda m: m["files"].pop("state.safetensors"),
        lambda m: m["files"].update({"more": {"size": 0, "sha256": "0" * 64}}),
        lambda m: m["files"].update({"/etc/passwd": m["files"].pop("state.safetensors")}),
        lambda m: m["files"].update({"../state.safetensors": m["files"].pop("state.safetensors")}),
        lambda m: m["files"].update({"State.safetensors": m["files"].pop("state.safetensors")}),
        lambda m: m["files"].update({"state.safetensors": None}),
    ],
)
def test_tampered_manifest_is_refused(tmp_path, change, sign):
    folder = tmp_path / "last"
    save(folder, 1)
    tampered(folder, change, sign=sign)
    with pytest.raises(CorruptError):
        checkpoint.load(folder)


def test_changed_meta_is_refused(tmp_path):
    folder = tmp_path / "last"
    save(folder, 1)
    tampered(folder, lambda m: m["meta"].update(step=2), sign=False)
    with pytest.raises(CorruptError, match="manifest.json"):
        checkpoint.load(folder)


def test_link_in_place_of_a_file_is_refused(tmp_path):
    folder = tmp_path / "last"
    save(folder, 1)
    os.rename(folder / "weights.safetensors", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "weights.safetensors")
    with pytest.raises(CorruptError, match="link"):
        checkpoint.load(folder)


def test_missing_file_is_corrupt_and_another_file_beside_is_ignored(tmp_path):
    folder = tmp_path / "last"
    save(folder, 1)
    (folder / "model.onnx").write_bytes(b"")
    assert step_of(folder) == 1
    (folder / "state.safetensors").unlink()
    with pytest.raises(CorruptError, match="state.safetensors"):
        checkpoint.load(folder)


def test_newer_format_is_a_config_error(tmp_path):
    folder = tmp_path / "last"
    save(folder, 1)
    tampered(folder, lambda m: m.update(format=3), sign=True)
    with pytest.raises(ConfigError, match="format 2 or less but has 3"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "manifest",
    [{}, [], None, {"name": "app"}, {"format": "1", "files": {}, "meta": {}}, {"format": True}],
)
def test_foreign_manifest_is_a_config_error(tmp_path, manifest):
    write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(ConfigError, match="something else"):
        checkpoint.load(tmp_path)


def test_no_checkpoint_is_a_config_error(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        assert not checkpoint.exists(folder)
        with pytest.raises(ConfigError, match="has no manifest.json"):
            checkpoint.load(folder)


def test_save_does_not_touch_a_folder_with_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="other files"):
        save(tmp_path, 1)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_save_takes_an_empty_folder(tmp_path):
    (tmp_path / "last").mkdir()
    save(tmp_path / "last", 1)
    assert step_of(tmp_path / "last") == 1


def test_meta_that_is_not_finite_is_refused_and_the_old_one_stays(tmp_path):
    folder = tmp_path / "last"
    save(folder, 1)
    with pytest.raises(NonFiniteError):
        checkpoint.save(folder, {}, {}, {"loss": float("nan")})
    assert step_of(folder) == 1
    assert os.listdir(tmp_path) == ["last"]


def test_views_of_one_storage_and_strided_tensors_are_kept(tmp_path):
    base = torch.arange(24.0).reshape(2, 3, 4)
    weights = {
        "base": base,
        "tied": base,
        "part": base[1],
        "turned": base.permute(2, 0, 1),
        "every": base[:, :, ::2],
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "wide": torch.ones(1).expand(3, 4),
        "grad": torch.nn.Parameter(torch.rand(3)),
    }
    checkpoint.save(tmp_path / "c", weights, {}, {})
    found = checkpoint.load(tmp_path / "c").weights
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor), name


def test_loaded_tensors_are_their_own(tmp_path):
    save(tmp_path / "c", 1)
    found = checkpoint.load(tmp_path / "c")
    found.weights["w"].add_(1)
    assert step_of(tmp_path / "c") == 1
    assert found.state["momentum"].eq(1).all()


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)
tensors = st.builds(
    lambda dtype, shape, seed: (
        torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        if dtype is torch.bool
        else torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(50).to(dtype)
        if dtype.is_floating_point
        else torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    ),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=4).map(tuple),
    st.integers(0, 99),
)
named = st.dictionaries(st.text(max_size=8).filter(lambda name: name != "__metadata__"), tensors)
plain = st.dictionaries(st.text(), st.integers() | st.text() | st.floats(-1, 1) | st.none())


@settings(max_examples=100, deadline=None)
@given(weights=named, state=named, meta=plain)
def test_whatever_is_saved_is_loaded(tmp_path_factory, weights, state, meta):
    folder = tmp_path_factory.getbasetemp() / "any"
    checkpoint.save(folder, weights, state, meta)
    found = checkpoint.load(folder)
    assert found.folder == folder
    assert found.meta == meta
    for saved, loaded in ((weights, found.weights), (state, found.state)):
        assert loaded.keys() == saved.keys()
        for name, tensor in saved.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)
    shutil.rmtree(folder)


@pytest.mark.parametrize("folder", ["/", ".", ""])
def test_a_folder_without_a_name_of_its_own_holds_no_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not checkpoint.exists(pathlib.Path(folder))
