"""One trial, without Ray: what it reports however it ends, and that a process that hangs or holds its folder ends."""

import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray.tune
import torch
from ray.exceptions import ActorDiedError, NodeDiedError
from ray.train import ControllerError, WorkerGroupError
from torch import distributed

from richkd import checkpoint, distill, record
from richkd.errors import DataError, NonFiniteError
from richkd.layers import build, read, to_dict
from richkd.steps import Steps
from tune import trial as trials
from tune.trial import UNSURE, WORKER_RESTARTS, trial
from tune.watchdog import Watchdog, hangs

ROOT = Path(__file__).resolve().parent.parent
FULL = OSError(errno.ENOSPC, "No space left on device", "weights")
NO_GPU_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def job_of(folder: Path, *overrides: str, **more: object) -> dict:
    config = build(read(["method.name=ce", "train.epochs=3", *overrides]))
    return {
        "id": "trial-000",
        "config": to_dict(config),
        "folder": str(folder),
        "test": False,
        "seeds": 1,
        "heard": 0,
        "store": None,
        "workers": 1,
        "each": {"CPU": 1},
        "threads": 1,
        "patience": 60.0,
        "scratch": str(folder.parent / "scratch"),
    } | more


@pytest.fixture
def reports(monkeypatch) -> list[dict]:
    """What trials report in this process."""
    found: list[dict] = []
    monkeypatch.setattr(ray.tune, "report", lambda metrics: found.append(metrics["run"]))
    return found


CHILD = """
import ctypes, json, resource, sys, tempfile, time
from pathlib import Path
import ray.tune
from richkd import distill
from richkd.layers import build, read
from richkd.steps import Steps
from tune.trial import trial

job, how = json.loads(sys.argv[1]), sys.argv[2]
# what is imported at the first step takes longer than a short patience
brief = build(read(["method.name=ce", "train.epochs=1"]))
distill.run(brief, Path(tempfile.mkdtemp(dir=job["scratch"])))

def report(metrics):
    print(json.dumps(metrics["run"]), flush=True)
    if how == "slow report" and "finished" not in metrics["run"]:
        time.sleep(job["patience"] + 1)

ray.tune.report = report
take = Steps.take

def stuck(steps, part, progress):
    if how == "stuck" and progress >= 1 / 3:  # in the second of three epochs
        ctypes.PyDLL(None).sleep(600)  # holds Python's lock
    return take(steps, part, progress)

Steps.take = stuck
if how == "little memory":
    grown = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")]
    resource.setrlimit(resource.RLIMIT_AS, (1024 * grown[0] + 2**27,) * 2)
trial(job)
"""


@contextlib.contextmanager
def child(job: dict, how: str = "") -> Iterator[subprocess.Popen]:
    """Run a trial in another process, which prints what it reports."""
    Path(job["scratch"]).mkdir(exist_ok=True)
    command = [sys.executable, "-c", CHILD, json.dumps(job), how]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(job: dict, how: str) -> tuple[int, list[dict]]:
    """Return the exit code of a trial in another process, and its reports."""
    with child(job, how) as process:
        lines = process.communicate(timeout=120)[0].splitlines()
        return process.returncode, [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("error", "found", "told"),
    [
        (DataError("no labels"), "error", "DataError: no labels"),
        (NonFiniteError("loss is nan"), "nan", "NonFiniteError: loss is nan"),
        (MemoryError(), "memory", "MemoryError; lower train.batch_size, or"),
        (
            NO_GPU_MEMORY,
            "memory",
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.;",
        ),
        (KeyError("x"), "error", "KeyError: 'x' (its traceback: "),
    ],
)
def test_a_failure_is_told_with_its_class_and_the_process_lives(
    reports, monkeypatch, tmp_path, error, found, told
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(distill, "run_seeds", fail)
    trial(job_of(tmp_path / "run"))
    (said,) = reports
    assert said["class"] == found
    assert said["failed"].startswith(told)
    path = tmp_path / "run" / "error.txt"
    assert path.exists() == (type(error) is KeyError)
    if path.exists():
        assert str(path) in said["failed"]
        assert "in fail" in path.read_text()
    assert not (tmp_path / "run" / "hung.txt").exists()


def test_a_failure_is_told_by_what_led_to_it(reports, monkeypatch, tmp_path):
    for cause in (NO_GPU_MEMORY, FULL):

        def fail(*_: object, cause: Exception = cause, **__: object) -> None:
            raise RuntimeError("the step failed") from cause

        monkeypatch.setattr(distill, "run_seeds", fail)
        trial(job_of(tmp_path / "run"))
    assert reports[0]["class"] == "memory"
    assert reports[1] == {"stopped": "the disk is full (weights)"}


def test_a_process_whose_gpu_is_broken_takes_no_other_trial(reports, monkeypatch, tmp_path):
    asked: list[str] = []

    def fail(*_: object, **__: object) -> None:
        raise NO_GPU_MEMORY

    def broken() -> None:
        raise torch.AcceleratorError("device-side assert triggered")

    monkeypatch.setattr(distill, "run_seeds", fail)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append("freed"))
    trial(job_of(tmp_path / "run"))
    assert (asked, reports.pop()["class"]) == (["freed"], "memory")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(torch.AcceleratorError):
        trial(job_of(tmp_path / "run"))
    assert not reports


def test_what_ends_the_process_is_not_held_up(reports, monkeypatch, tmp_path):
    def leave(*_: object, **__: object) -> None:
        sys.exit(0)  # as Tune ends a trial, in its report

    monkeypatch.setattr(distill, "run_seeds", leave)
    with pytest.raises(SystemExit):
        trial(job_of(tmp_path / "run"))
    assert not reports


def test_a_trial_that_memory_does_not_suffice_for_is_infeasible(tmp_path):
    job = job_of(tmp_path / "run", "train.batch_size=597", "student.name=resnet56")
    code, reported = ended(job, "little memory")
    assert code == 0
    (said,) = reported
    assert said["class"] == "memory"
    assert "lower train.batch_size" in said["failed"]


def test_seeds_of_a_trial_report_their_mean_and_test_rows_once(reports, tmp_path):
    trial(job_of(tmp_path / "run", seeds=2, test=True))
    assert [row["epoch"] for row in reports] == [1, 2, 3, 3]
    states = [json.loads((tmp_path / f"run/seed{k}/run.json").read_text()) for k in range(2)]
    last, each = reports[-1], [state["metrics"] for state in states]
    assert last["finished"]
    for key in ("best_val_top1", "test/top1", "val/loss"):
        assert last[key] == (each[0][key] + each[1][key]) / 2
    configs = [(tmp_path / f"run/seed{k}/config.yaml").read_text() for k in range(2)]
    assert [text.partition("\nseed: ")[2][0] for text in configs] == ["0", "1"]


def test_one_seed_that_diverges_fails_the_trial_at_once(reports, monkeypatch, tmp_path):
    take, poisoned = Steps.take, []

    def poison(steps, part, progress):
        if steps.config.seed == 1 and not poisoned:
            poisoned.append(steps.config.seed)
            with torch.no_grad():
                next(steps.student.parameters()).fill_(math.nan)
        return take(steps, part, progress)

    monkeypatch.setattr(Steps, "take", poison)
    trial(job_of(tmp_path / "run", seeds=2))
    assert poisoned
    (said,) = reports  # nothing before
    assert said["class"] == "nan"
    assert "step 1 of epoch 1" in said["failed"]


@pytest.mark.soak
def test_a_process_that_hangs_ends_itself_and_is_given_up_the_third_time(reports, tmp_path):
    folder = tmp_path / "run"
    job = job_of(folder, patience=3.0)
    for attempt in (1, 2):
        code, reported = ended(job, "stuck")
        assert code == 1
        assert [row["epoch"] for row in reported] == [1]
        assert hangs(folder) == (attempt, folder / "hung.txt")
    assert "in stuck" in (folder / "hung.txt").read_text()  # where
    trial(job)
    why = "no step for 3 s at epoch 2"
    assert reports == [{"failed": f"{why}; where it hung: {folder}/hung.txt", "class": "hung"}]
    reports.clear()
    assert f"given up: {why}" in (folder / "hung.txt").read_text()
    trial(job)  # tried again, it does not hang
    assert [row["epoch"] for row in reports] == [1, 2, 3, 3]
    assert reports[-1]["finished"]
    assert not (folder / "hung.txt").exists()


def test_progress_makes_good_what_hung_before(tmp_path):
    (tmp_path / "hung.txt").write_text("Timeout (0:00:01)!\n")
    with Watchdog(tmp_path, 60) as watchdog:
        assert hangs(tmp_path)[0] == 1
        watchdog.forget()
        assert hangs(tmp_path)[0] == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.soak
def test_a_report_may_take_as_long_as_tune_likes(tmp_path):
    code, reported = ended(job_of(tmp_path / "run", "train.epochs=1", patience=3.0), "slow report")
    assert code == 0
    assert [row["epoch"] for row in reported] == [1, 1]


def test_beats_cost_nothing(tmp_path):
    with Watchdog(tmp_path, 60) as watchdog:
        began = time.perf_counter()
        for _ in range(10_000):
            watchdog.beat()
        assert time.perf_counter() - began < 0.1


@pytest.mark.soak
def test_a_trial_waits_for_the_process_of_a_driver_that_was_killed(reports, monkeypatch, tmp_path):
    folder = tmp_path / "run"
    with child(job_of(folder), "slow report") as old:  # which holds the folder while it reports
        assert json.loads(old.stdout.readline())["epoch"] == 1
        with monkeypatch.context() as patch:
            patch.setattr(record, "WAIT", 0.1)
            trial(job_of(folder))
        assert reports.pop()["failed"].startswith(f"ConfigError: {folder} must have one writer")
        killer = threading.Timer(1, old.kill)
        killer.start()
        trial(job_of(folder))
        assert old.wait() == -signal.SIGKILL
    assert [row["epoch"] for row in reports] == [1, 2, 3, 3]


DIED = ActorDiedError()
GONE = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")


@pytest.mark.parametrize(
    ("failures", "attempts", "found"),
    [
        ({0: GONE, 1: DIED}, WORKER_RESTARTS + 1, "lost"),
        ({0: GONE}, WORKER_RESTARTS + 1, "lost"),
        ({0: distributed.DistBackendError("NCCL"), 1: DIED}, WORKER_RESTARTS + 1, "lost"),
        ({0: ValueError("of the death"), 1: DIED}, WORKER_RESTARTS + 1, "lost"),
        ({0: GONE, 1: NO_GPU_MEMORY}, 1, "memory"),
        ({0: DataError("no labels"), 1: GONE}, 1, "error"),
        ({0: GONE, 1: ValueError("a mistake")}, 1, "error"),
        ({0: NonFiniteError("loss is nan"), 1: NonFiniteError("loss is nan")}, 1, "nan"),
    ],
)
def test_workers_are_started_anew_only_if_one_of_them_died(
    reports, monkeypatch, tmp_path, failures, attempts, found
):
    names: list[str] = []

    def fit(job: dict, name: str) -> None:
        names.append(name)
        raise WorkerGroupError("what the workers said", failures)

    monkeypatch.setattr(trials, "_fit", fit)
    trial(job_of(tmp_path / "run", workers=2))
    assert len(set(names)) == len(names) == attempts
    (said,) = reports
    assert said["class"] == found
    assert (tmp_path / "run" / "error.txt").exists() == ("a mistake" in said["failed"])


@pytest.mark.parametrize(
    ("epochs", "death", "attempts"),
    [
        (
            [0, *range(1, 11)] + [10] * 9,
            DIED,
            10 + WORKER_RESTARTS,
        ),  # it gets on for ten epochs
        ([0] * 30, NodeDiedError("The node has died."), None),
    ],
)
def test_workers_that_get_on_or_lose_their_machine_are_started_as_often_as_need_be(
    reports, monkeypatch, tmp_path, epochs, death, attempts
):
    reached, count = iter(epochs), [0]

    def fit(job: dict, name: str) -> None:
        count[0] += 1
        if attempts is None and count[0] == 20:
            return
        raise WorkerGroupError("what the workers said", {0: death})

    monkeypatch.setattr(trials, "_fit", fit)
    monkeypatch.setattr(trials, "_newest", lambda _: next(reached))
    trial(job_of(tmp_path / "run", workers=2))
    assert count[0] == (attempts or 20)
    assert [said["class"] for said in reports] == (["lost"] if attempts else [])


def test_a_run_whose_checkpoint_is_damaged_begins_again_and_ends_the_same(reports, tmp_path):
    trial(job_of(tmp_path / "whole"))
    trial(job_of(tmp_path / "run"))
    path = tmp_path / "run" / "last" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    reports.clear()
    trial(job_of(tmp_path / "run"))
    assert "finished" in reports[-1]
    weights = [checkpoint.load(tmp_path / name / "last").weights for name in ("whole", "run")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_controller_that_is_lost_is_started_anew(reports, monkeypatch, tmp_path):
    raised = [ControllerError(RuntimeError("no workers")), DIED]

    def fit(job: dict, name: str) -> None:
        if raised:
            raise raised.pop()

    monkeypatch.setattr(trials, "_fit", fit)
    trial(job_of(tmp_path / "run", workers=2))
    assert not raised
    assert not reports  # the workers have said all


def test_workers_report_again_what_may_have_been_lost_with_one_of_them(monkeypatch, tmp_path):
    heard: list[int] = []
    reached = iter([4, 4, 20, 20, 20])  # epochs in the folder: at first, and after each death

    def fit(job: dict, name: str) -> None:
        heard.append(job["heard"])
        if len(heard) < 4:
            raise WorkerGroupError("", {0: DIED})

    monkeypatch.setattr(trials, "_fit", fit)
    monkeypatch.setattr(record, "newest", lambda *_: next(reached))
    trial(job_of(tmp_path / "run", workers=2, heard=1))
    # all after 1, until something was trained: then all of those have been reported
    assert heard == [1, 1, 20 - UNSURE, 20 - UNSURE]


def test_workers_that_hang_at_one_place_are_given_up(reports, monkeypatch, tmp_path):
    folder, attempts = tmp_path / "run", []
    folder.mkdir()

    def fit(job: dict, name: str) -> None:
        attempts.append(name)
        for rank in ("", "-1"):  # the second waits for the first
            with open(folder / f"hung{rank}.txt", "a") as file:
                file.write("Timeout (0:00:01)!\n")
        raise WorkerGroupError("", {0: DIED, 1: DIED})

    monkeypatch.setattr(trials, "_fit", fit)
    trial(job_of(folder, workers=2, patience=3.0))
    assert len(attempts) == 2
    (said,) = reports
    assert said["class"] == "hung"
    assert said["failed"].startswith("no step for 3 s at epoch 1; where it hung: ")
