"""The lock of a sweep: one driver at a time, on this machine and on others, and none that is dead."""

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from richkd.errors import ConfigError
from tune import driver
from tune.driver import locked, owner_of, works

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from pathlib import Path
from tune.driver import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def wait_for_owner(folder: Path) -> dict:
    ends = time.monotonic() + 10
    while (owner := owner_of(folder)) is None and time.monotonic() < ends:
        time.sleep(0.01)
    return owner


def test_a_second_driver_is_refused_and_hears_who_the_first_is(holder, tmp_path):
    wait_for_owner(tmp_path)
    assert works(tmp_path)
    with pytest.raises(ConfigError, match=rf"pid {holder.pid} on {platform.node()}"):
        with locked(tmp_path):
            raise AssertionError


def test_the_lock_of_a_killed_driver_is_free_at_once(holder, tmp_path):
    wait_for_owner(tmp_path)
    holder.send_signal(signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    assert owner_of(tmp_path)["pid"] == holder.pid  # it had no time to clear up
    assert not works(tmp_path)
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 1
        while owner_of(tmp_path)["pid"] != os.getpid():
            assert time.monotonic() - began < 10
    assert owner_of(tmp_path) is None


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A driver on another machine, whose lock this one does not see; returns what lets it die."""
    monkeypatch.setattr(driver, "BEAT_SECONDS", 0.2)
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(0.1):
            count += 1
            # a clock that stands at another century
            owner = {"host": "node7", "pid": 1, "since": "1970-01-01", "beat": count}
            partial = tmp_path / ".beat"
            partial.write_text(json.dumps(owner))
            partial.rename(tmp_path / "owner.json")

    thread = threading.Thread(target=beat)
    thread.start()

    def die() -> None:
        done.set()
        thread.join()

    yield die
    die()


def test_a_driver_on_another_machine_that_lives_is_left_alone(elsewhere, tmp_path):
    wait_for_owner(tmp_path)
    with pytest.raises(ConfigError, match="pid 1 on node7, since 1970-01-01"):
        with locked(tmp_path):
            raise AssertionError


def test_a_driver_on_another_machine_that_died_is_taken_over_from(elsewhere, tmp_path):
    wait_for_owner(tmp_path)
    elsewhere()
    with locked(tmp_path):
        ends = time.monotonic() + 10
        while owner_of(tmp_path)["host"] != platform.node():
            assert time.monotonic() < ends


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_torn_owner_is_nobody(tmp_path, content):
    (tmp_path / "owner.json").write_text(content)
    assert owner_of(tmp_path) is None
    with locked(tmp_path):
        assert wait_for_owner(tmp_path)["pid"] == os.getpid()


def test_an_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(KeyError):
        with locked(tmp_path):
            raise KeyError
    with locked(tmp_path):
        pass
