"""What faults left behind: each is found by name, mended where that loses nothing, and a sound sweep has none."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import optuna
import pytest

from richkd.errors import ConfigError
from tune import doctor
from tune import sweep as sweeps
from tune.doctor import examine, mend
from tune.driver import locked
from tune.spool import Spool
from tune.status import lines, status


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


def test_what_a_killed_driver_left_is_found_and_cleared_away(copied):
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


def test_a_damaged_refit_runs_again_and_ends_the_same(swept, copied):
    refit = copied / "refits" / "ce-seed1"
    before = json.loads((refit / "run.json").read_text())["metrics"]
    flip(refit / "best" / "weights.safetensors")
    (copied / "summary.json").unlink()
    found = examine(copied)
    assert "refits/ce-seed1/best" in found[0].what
    mend(copied, found)
    assert not refit.exists()
    again = sweeps.go_on(copied)
    after = json.loads((refit / "run.json").read_text())["metrics"]
    assert after["test/top1"] == before["test/top1"]
    assert again["summary"] == swept[0]["summary"]
    assert examine(copied) == []


def test_torn_metrics_keep_their_whole_lines(copied):
    path = copied / "trials" / "000" / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:50])
    found = examine(copied)
    assert "torn line" in found[0].what
    mend(copied, found)
    assert path.read_text() == whole


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
    assert any("tune resume small" in line for line in lines(told))


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


def test_the_status_of_a_finished_sweep_counts_what_the_study_and_the_folders_hold(swept):
    answer, _ = swept
    from pathlib import Path

    folder = Path(answer["sweep"])
    found = status(folder)
    studies = [
        optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'study.db'}")
        for name in ("richkd", "kd")
    ]
    states = [trial.state.name.lower() for study in studies for trial in study.trials]
    assert found["trials"] == {name: states.count(name) for name in set(states)} | {"of": 8}
    assert found["refits"] == {"finished": 10, "begun": 0, "of": 10}
    assert (found["state"], found["driver"], found["unsent"]) == ("finished", None, 0)
    assert found["best"]["val_top1"] == answer["best"]["val_top1"]
    assert 0 < found["hours"] < 1
    json.dumps(found)
    assert max(map(len, lines(found))) < 120
