"""MLflow dies, hangs, errs and returns, or its driver is killed: no point is lost or doubled, and no time lost.

Points are compared with what MLflow's own client reads back. The server is MLflow's, on a loopback port.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from serving import served

from richkd.errors import Stopped
from tune import tracking
from tune.driver import resumable
from tune.spool import Spool
from tune.tracking import ENVIRONMENT, Tracker

LOST = 10.0  # seconds that a sweep may lose by its tracker, in all
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that has answered once."""
    with served(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture(autouse=True)
def environment(monkeypatch, server):
    """Leave no variable of ours behind, and every server in order."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.2)
    yield
    if server.fault:
        server.mend()


@pytest.fixture
def folder(tmp_path):
    """The folder of a sweep called digits."""
    (tmp_path / "digits").mkdir()
    return tmp_path / "digits"


class Script:
    """A sweep of three trials that reports epochs, and knows what it reported and how long that took."""

    def __init__(self, tracker: Tracker, folder: Path) -> None:
        self.tracker, self.folder = tracker, folder
        self.lost = 0.0
        self.points: dict[str, list[tuple[int, float]]] = {}

    def _call(self, method, *arguments):
        began = time.monotonic()
        answer = method(*arguments)
        self.lost += time.monotonic() - began
        return answer

    def begin(self) -> None:
        """Open the runs."""
        self._call(self.tracker.start)
        self._call(self.tracker.sweep, "digits", {"a": 1}, {"b": 2})
        for n in range(3):
            self.points[self._call(self.tracker.run, "digits", f"trial-{n}", {"n": n}, {})] = []

    def epochs(self, first: int, last: int, pause: float) -> None:
        """Report epochs of all trials, with a pause (seconds) after each."""
        for epoch in range(first, last + 1):
            for n, (run, points) in enumerate(self.points.items()):
                self._call(self.tracker.log, run, {"val/top1": epoch + n / 10}, epoch)
                points.append((epoch, epoch + n / 10))
            time.sleep(pause)

    def end(self) -> bool:
        """End the runs and return whether MLflow has everything."""
        for run in self.points:
            self._call(self.tracker.text, run, "text", "config.yaml")
            self._call(self.tracker.finish, run, "FINISHED")
        self._call(self.tracker.finish, "digits", "FINISHED")
        return self._call(self.tracker.close, 60.0)


def check(
    client: MlflowClient, tracker: Tracker, points: dict[str, list[tuple[int, float]]]
) -> None:
    """Assert that MLflow has each run and each point once, and that all have ended."""
    found = client.search_runs([tracker.experiment_id])
    assert sorted(run.info.run_name for run in found) == sorted(
        ["digits", *(run.split("/")[1] for run in points)]
    )
    assert {run.info.status for run in found} == {"FINISHED"}
    for run, expected in points.items():
        history = client.get_metric_history(tracker.run_id(run), "val/top1")
        assert sorted((point.step, point.value) for point in history) == expected, run
        assert [file.path for file in client.list_artifacts(tracker.run_id(run))] == ["config.yaml"]


@pytest.mark.parametrize("fault", ["closed", "hanging", "500", "deaf"])
def test_a_server_that_fails_and_returns_after_two_seconds_has_missed_nothing(
    server, folder, request, monkeypatch, fault
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    script = Script(Tracker(folder, server.uri, request.node.name), folder)
    script.begin()
    script.epochs(1, 10, 0.05)
    wait_for(lambda: len(Spool(folder / "spool.jsonl").waiting()) == 0)
    server.break_(fault)
    script.epochs(11, 30, 0.1)  # two seconds
    wait_for(lambda: script.tracker.waits)
    assert server.fired()
    server.mend()
    script.epochs(31, 40, 0.05)
    assert script.end(), script.tracker.problem
    assert script.lost < LOST
    assert not (folder / "spool.jsonl").exists()
    check(MlflowClient(server.uri), script.tracker, script.points)


def wait_for(true) -> None:
    deadline = time.monotonic() + 30
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


@pytest.mark.parametrize(
    ("fault", "when", "patience"),
    [
        ("closed", "from the start", 1.0),
        ("hanging", "from the start", 1.0),
        ("500", "from the start", 1.0),
        ("closed", "on the way", 1.0),
        ("deaf", "on the way", 1.0),
        ("500", "at the end", 1.0),
        ("hanging", "at the end", tracking.PATIENCE),  # the worst: the thread waits for an answer
    ],
)
def test_a_server_that_stays_dead_costs_a_few_seconds_and_gets_everything_later(
    server, folder, request, monkeypatch, fault, when, patience
):
    monkeypatch.setattr(tracking, "PATIENCE", patience)
    script = Script(Tracker(folder, server.uri, request.node.name), folder)
    if when == "from the start":
        server.break_(fault)
    script.begin()
    script.epochs(1, 5, 0.05)
    if when != "from the start":
        wait_for(lambda: len(Spool(folder / "spool.jsonl").waiting()) == 0)
    if when == "on the way":
        server.break_(fault)
    script.epochs(6, 15, 0.05)
    if when == "at the end":
        server.break_(fault)
    assert not script.end()
    assert server.fired()
    print(f"{fault} {when}: {script.lost:.2f} s lost")
    assert script.lost < min(LOST, patience + 1.5)
    assert "operations wait in" in script.tracker.problem
    assert "send them: python -m tune sync" in script.tracker.problem
    server.mend()
    later = Tracker(folder, server.uri, request.node.name)
    later.start()
    assert later.close(60), later.problem
    assert not (folder / "spool.jsonl").exists()
    check(MlflowClient(server.uri), later, script.points)


DRIVER = """
import itertools, sys, time
from pathlib import Path
from tune import tracking
tracking.FLUSH_SECONDS = 0.02
tracker = tracking.Tracker(Path(sys.argv[1]), sys.argv[2], "killed")
tracker.start()
tracker.sweep("digits", {"a": 1}, {})
began, runs = int(sys.argv[3]), 0
for epoch in itertools.count(1):
    if epoch % 20 == 1:
        runs += 1
        run = tracker.run("digits", f"trial-{began}-{runs}", {"n": runs}, {})
    # what an earlier driver may have reported is reported again, with a value of its own
    for each in ("digits/trial-0-1", run) if began else (run,):
        tracker.log(each, {"val/top1": began + epoch / 1000}, epoch)
        print(each, epoch, flush=True)
    time.sleep(0.01)
"""


@pytest.mark.soak
def test_drivers_that_are_killed_lose_and_double_no_point(server, folder, tmp_path):
    rng = random.Random(4)
    reported, waited, ids = set(), 0, folder / "mlflow.json"
    for number in range(5):
        said = tmp_path / f"said-{number}"
        with open(said, "w") as file:
            command = [sys.executable, "-c", DRIVER, str(folder), server.uri, str(number)]
            driver = subprocess.Popen(command, cwd=ROOT, stdout=file)
        opened = f"digits/trial-{number}-1"
        try:
            wait_for(lambda opened=opened: ids.exists() and opened in ids.read_text())
            time.sleep(rng.uniform(0, 0.5))
        finally:
            driver.kill()
        assert driver.wait() == -signal.SIGKILL
        waited += len(Spool(folder / "spool.jsonl").waiting())
        whole = said.read_text().rpartition("\n")[0].splitlines()
        reported |= {tuple(line.split()) for line in whole}
    assert waited > 10  # kills came in between
    last = Tracker(folder, server.uri, "killed")
    last.start()
    assert last.close(60), last.problem
    client, found = MlflowClient(server.uri), []
    children = client.search_runs([last.experiment_id], "tags.`mlflow.parentRunId` != ''")
    assert len({run.info.run_name for run in children}) == len(children) > 5
    for run in children:
        history = client.get_metric_history(run.info.run_id, "val/top1")
        found += [(f"digits/{run.info.run_name}", str(point.step)) for point in history]
    assert len(found) == len(set(found))
    assert reported <= set(found)
    assert len(found) <= len(reported) + 5  # a point may be put and not be said, before each kill
    assert len(client.search_runs([last.experiment_id])) == len(children) + 1


def test_a_full_disk_stops_a_sweep_resumably_and_what_was_put_before_is_sent_later(
    server, folder, request, monkeypatch
):
    script = Script(Tracker(folder, server.uri, request.node.name), folder)
    script.begin()
    script.epochs(1, 5, 0.0)
    usual, full, file = os.write, os.open("/dev/full", os.O_WRONLY), script.tracker._spool.file
    monkeypatch.setattr(os, "write", lambda to, line: usual(full if to == file else to, line))
    began = time.monotonic()
    with (
        pytest.raises(Stopped, match="the disk is full; free some space; go on with: again"),
        resumable(lambda _: script.tracker.close(60), lambda: "again"),
    ):
        script.epochs(6, 7, 0.0)
    assert script.points["digits/trial-0"][-1] == (5, 5.0)  # it was raised where the next was put
    assert time.monotonic() - began < LOST
    assert "No space left on device" in script.tracker.problem
    monkeypatch.undo()
    os.close(full)
    later = Script(Tracker(folder, server.uri, request.node.name), folder)
    later.begin()
    later.points = script.points
    later.epochs(6, 7, 0.0)
    assert later.end(), later.tracker.problem
    check(MlflowClient(server.uri), later.tracker, later.points)
