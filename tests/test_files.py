"""Files are whole or invisible."""

import errno
import hashlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from richkd import files
from richkd.errors import ConfigError, CorruptError, NonFiniteError


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    files.write_atomic(path, b"old")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    files.write_atomic(path, b"old")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_content_is_flushed_before_the_rename_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    files.write_atomic(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]


def test_longest_file_name_can_be_written(tmp_path):
    files.write_atomic(tmp_path / ("x" * 255), b"content")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"content"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)  # fmt: skip


@given(value=json_values)
def test_json_survives_the_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_json_keeps_the_order_of_keys(tmp_path):
    files.write_json(tmp_path / "a.json", {"z": 1, "a": 2})
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["z", "a"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_refuses_what_is_not_finite(tmp_path, value):
    with pytest.raises(NonFiniteError, match="finite"):
        files.write_json(tmp_path / "a.json", {"loss": value})
    assert not os.listdir(tmp_path)


def test_json_cut_anywhere_is_corrupt(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"name": "digits", "epochs": [1, 2, 3]})
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # without the line break it is still whole
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptError, match="a.json"):
            files.read_json(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{'a': 1}"])
def test_what_is_no_json_is_corrupt(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CorruptError, match="cannot be decoded"):
        files.read_json(tmp_path / "a.json")


def test_missing_json_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="there is none"):
        files.read_json(tmp_path / "a.json")


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 1_000_000)
    assert files.sha256_of(tmp_path / "file") == hashlib.sha256(b"x" * 1_000_000).hexdigest()
