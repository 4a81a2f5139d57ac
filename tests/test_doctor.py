"""What faults left behind: each is found by name, mended where that loses nothing, and a sound sweep has none."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from mlflow.tracking import MlflowClient

from richkd.errors import ConfigError
from richkd.files import read_json, write_json
from tune import doctor, driver
from tune import launch as sweeps
from tune.doctor import examine, mend
from tune.driver import locked
from tune.spool import Spool
from tune.status import lines, status


@pytest.fixture(autouse=True)
def nobody(monkeypatch, request):
    """No process of another test's Ray is met, but where processes are looked for."""
    if "outlived" not in request.node.name:
        monkeypatch.setattr(doctor, "orphans", lambda: [])


def texts(folder) -> list[str]:
    return [finding.what for finding in examine(folder)]


def flip(path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_sound_sweep_has_nothing_to_mend(copied):
    assert examine(copied) == []


def test_nothing_is_looked_at_while_a_driver_works(copied):
    with locked(copied), pytest.raises(ConfigError, match=f"pid {os.getpid()} works on small"):
        examine(copied)


def test_what_a_killed_driver_left_is_found_and_cleared_away(copied, monkeypatch):
    monkeypatch.setattr(driver, "BEAT_SECONDS", 0.1)
    owner = {"host": "node7", "pid": 7, "since": "then", "beat": 3}
    (copied / "owner.json").write_text(json.dumps(owner))
    (copied / "trials" / "000" / ".0123456789abcdef.tmp").write_text("{")
    (copied / "mlflow.json").write_text("{")
    found = examine(copied)
    assert len(found) == 3
    assert "pid 7 on node7" in found[0].what
    mend(copied, found[1:])
    (copied / "owner.json").write_text(json.dumps(owner | {"host": os.uname().nodename}))
    mend(copied, examine(copied))
    assert examine(copied) == []


@pytest.mark.parametrize("file", ["weights.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_of_a_trial_that_ended_is_removed_and_its_result_stays(copied, file):
    flip(copied / "trials" / "000" / "last" / file)
    found = examine(copied)
    assert [finding.what.partition(" ")[0] for finding in found] == ["trials/000/last"]
    mend(copied, found)
    assert examine(copied) == []
    assert (copied / "trials" / "000" / "metrics.jsonl").exists()
    assert status(copied)["trials"]["of"] == 8


@pytest.mark.soak
def test_a_damaged_refit_runs_again_and_ends_the_same(swept, copied):
    refit = copied / "refits" / "ce-seed1"
    before = json.loads((refit / "run.json").read_text())["metrics"]
    flip(refit / "best" / "weights.safetensors")
    found = examine(copied)
    assert "refits/ce-seed1/best" in found[0].what
    mend(copied, found)
    assert not refit.exists()
    again = sweeps.go_on(copied)
    after = json.loads((refit / "run.json").read_text())["metrics"]
    assert after["test/top1"] == before["test/top1"]
    assert again["summary"] == swept[0]["summary"]
    assert examine(copied) == []


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b'{"epoch": 1'])
def test_metrics_that_are_not_whole_are_found_and_a_torn_end_is_none(copied, damage):
    refit = copied / "refits" / "ce-seed0"
    state = read_json(refit / "run.json")
    tested = {key: v for key, v in state["metrics"].items() if not key.startswith("test/")}
    write_json(refit / "run.json", state | {"metrics": tested})  # it is not over
    path = refit / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:50])  # of a kill in the middle of a line, which nobody reads
    assert examine(copied) == []
    path.write_bytes(damage + b"\n" + whole.partition(b"\n")[2])
    found = examine(copied)
    assert len(found) == 1 and "metrics.jsonl must have a line for each" in found[0].what
    mend(copied, found)
    assert not refit.exists()  # it runs again


@pytest.mark.parametrize("name", ["sweep.json", "spent.json"])
def test_a_torn_record_of_the_sweep_is_named_and_left_to_a_person(copied, name):
    (copied / name).write_text((copied / name).read_text()[:-5])
    found = examine(copied)
    assert found[0].what.startswith(f"{name} is damaged")
    assert found[0].mend is None


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_study_that_cannot_be_read_is_named(copied, damage):
    path = copied / "study.db"
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:5000])
    found = examine(copied)
    assert len(found) == 1
    assert "study" in found[0].what and "copy" in found[0].advice


def test_a_damaged_last_checkpoint_of_a_refit_costs_no_best_one(copied):
    refit = copied / "refits" / "ce-seed1"
    flip(refit / "last" / "weights.safetensors")
    found = examine(copied)
    assert len(found) == 1
    mend(copied, found)
    assert examine(copied) == []
    assert (refit / "best" / "manifest.json").exists() and not (refit / "last").exists()
    assert (copied / "summary.json").exists()


def test_what_mlflow_takes_for_running_is_told_to_have_stopped(copied):
    client = MlflowClient(tracking_uri=read_json(copied / "sweep.json")["tracking"])
    ids = read_json(copied / "mlflow.json")
    (copied / "summary.json").unlink()
    with contextlib.closing(sqlite3.connect(copied / "study.db")) as database, database:
        database.execute("update trials set state = 'RUNNING' where number = 2 and study_id = 1")
    for run in ("small", "small/trial-002"):
        client.update_run(ids[run], status="RUNNING")
    found = [finding for finding in examine(copied) if "MLflow says" in finding.what]
    assert [finding.what for finding in found] == ["MLflow says that small, small/trial-002 run"]
    mend(copied, found)
    for run in ("small", "small/trial-002"):
        told = client.get_run(ids[run])
        assert (told.info.status, told.data.tags["richkd.state"]) == ("KILLED", "stopped")
    assert not any("MLflow" in text for text in texts(copied))


def test_trials_that_nobody_runs_are_found_and_resume_goes_on_with_them(copied):
    with sqlite3.connect(copied / "study.db") as database:
        database.execute("update trials set state = 'RUNNING' where number = 3 and study_id = 1")
    database.close()
    found = examine(copied)
    assert "trial-003" in found[0].what and "resume" in found[0].advice
    (copied / "summary.json").unlink()
    told = status(copied)
    assert told["state"] == "stopped"
    assert set(told["epochs"]) == {"trial-003"}
    assert any(f"tune resume {copied}" in line for line in lines(told))


def test_what_mlflow_lacks_is_counted(copied):
    spool = Spool(copied / "spool.jsonl")
    for name in ("tag", "finish"):
        spool.write({"name": name, "run": "small", "at": 0, "arguments": []})
    assert any("has not got 2 messages" in text for text in texts(copied))
    assert status(copied)["unsent"] == 2


def test_a_worker_that_outlived_its_cluster_is_found_and_killed(copied):
    # a child that calls itself as Ray's workers do, and whose parent ends
    inner = "import time; time.sleep(600)"
    outer = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen(['ray::TrainController', '-c', {inner!r}], "
        "executable=sys.executable, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
    )
    out = subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True, timeout=60)
    pid = int(out.stdout)
    try:
        found = [finding for finding in examine(copied) if f"(pid {pid})" in finding.what]
        assert len(found) == 1
        mend(copied, found)
        ends = time.monotonic() + 10
        while pid in dict(doctor.orphans()) and time.monotonic() < ends:
            time.sleep(0.05)
        assert pid not in dict(doctor.orphans())
    finally:
        shutil.rmtree(copied)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
