"""What scaling is reported, from made-up times and from a real local Ray."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from richkd.command import main
from tune.__main__ import ABOUT, VERBS
from tune.scale import Clock, line, overhead_of, row, temporary

ROOT = Path(__file__).resolve().parent.parent


def clock(*jobs: list[dict], **times: list[float] | float) -> Clock:
    """Return the clock of jobs of such epochs."""
    found = Clock()
    found.epochs = list(jobs)
    for name, value in times.items():
        setattr(found, name, value)
    return found


def epochs(*speeds: float) -> list[dict]:
    """Return epochs of a second each."""
    return [{"images_per_second": speed, "seconds": 1.0} for speed in speeds]


def test_speed_is_that_of_the_warm_epochs_and_start_up_ends_where_training_begins():
    found = row(2, clock(epochs(1.0, 100.0, 120.0, 110.0), given=[50.0], heard=58.0), None)
    assert found == {
        "workers": 2,
        "images_per_second": 110.0,
        "speed_up": 1.0,
        "efficiency": 100.0,
        "startup_seconds": 7.0,
    }


def test_efficiency_is_the_speed_up_over_the_additional_workers():
    base = {"workers": 2, "images_per_second": 100.0}
    found = row(8, clock(epochs(1.0, 300.0), given=[0.0], heard=2.0), base)
    assert (found["speed_up"], found["efficiency"]) == (3.0, 75.0)
    assert line(found).split() == ["8", "300", "3.00x", "75", "%", "1.0", "s"]


def test_the_overhead_of_a_trial_is_all_but_its_epochs_and_the_first_does_not_count():
    # 102.5 - 100 - 2, 105.7 - 102.5 - 3, 110 - 105.7 - 4
    jobs = [epochs(*[1.0] * count) for count in (9, 2, 3, 4)]
    found = overhead_of(clock(*jobs, ended_at=[100.0, 102.5, 105.7, 110.0]))
    assert found == pytest.approx(0.3)


def test_a_clock_notes_when_the_first_epoch_of_the_newest_job_was_heard_of(monkeypatch):
    times = iter(range(100))
    monkeypatch.setattr("tune.scale.time.monotonic", lambda: float(next(times)))
    found = Clock()
    for job in ("a", "b"):
        found.started(job)
        for epoch in (1, 2):
            found.epoch(job, {"epoch": epoch})
        found.ended(job, "finished", {})
    assert (found.given, found.heard, found.ended_at) == ([0.0, 3.0], 4.0, [2.0, 5.0])
    assert [len(each) for each in found.epochs] == [2, 2]


@pytest.mark.parametrize("storage", ["new", "s3://bucket/runs"])
def test_what_is_measured_lies_in_a_folder_that_is_gone_afterwards(storage, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with temporary(storage) as folder:
        assert folder.is_dir()
        assert folder.is_relative_to(tmp_path / "new") is (storage == "new")
    assert not folder.exists() and not list(tmp_path.iterdir())


BAD = {
    ("resources.workers=1,x",): "which numbers of workers",
    ("train.epochs=2",): "which numbers of workers to measure but they are not given",
    ("resources.workers=0,1",): "resources.workers must lie in 1",
    ("resources.workers=1,1000",): "take 1000",
    ("resources.workers=1", "--epochs=1"): "--epochs must be 2 or more",
}


@pytest.mark.parametrize("words", BAD)
def test_what_cannot_be_measured_is_refused_in_one_line(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main("python -m tune", ABOUT, VERBS, ["scale", *words]) == 2
    assert BAD[words] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def reached(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


@pytest.mark.timeout(240)
@pytest.mark.soak
def test_scaling_is_measured_with_the_dashboard_on_loopback_and_nothing_is_kept(
    miniature, cache_root, tmp_path
):
    words = ["resources.workers=1", "--epochs=3", "teacher.epochs=10", f"cache={cache_root}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tune", "scale", *words, "--dashboard=127.0.0.1", "--json"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    told = []
    for text in process.stderr:
        told.append(text)
        if text.startswith("dashboard  http://127.0.0.1:"):
            port = int(text.partition(",")[0].rpartition(":")[2])
            outside = socket.gethostbyname(socket.gethostname())
            assert reached("127.0.0.1", port)
            assert outside.startswith("127.") or not reached(outside, port)
            break
    out, rest = process.communicate(timeout=180)
    assert process.returncode == 0, "".join(told) + rest
    assert any(text.startswith("dashboard") for text in told)
    answer = json.loads(out.splitlines()[-1])
    (found,) = answer["workers"]
    assert found["workers"] == 1 and found["images_per_second"] > 100
    assert found["startup_seconds"] > 0
    assert answer["trial_overhead_seconds"] < 1
    assert not list(tmp_path.iterdir())
