"""Whole sweeps under faults, at seeded moments: python -m pytest -m soak, under 20 minutes on two cores.

After each, study, run folders and MLflow must tell the same, with each trial once, and each curve be that of a straight
run. The table that is printed at the end says how many faults there were, how many the sweep got over, and how much
work was done twice.
"""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from audit import audit, rows_of, straight, trials_of
from serving import Server, served
from small import command, holder

from richkd.files import read_json

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]

EPOCHS = 5
WORDS = [
    *("sweep.trials=4", "sweep.startup=4", "sweep.scheduler=none", "refit.seeds=1"),
    *(f"train.epochs={EPOCHS}", "teacher.epochs=10", "sweep.name=soak"),
]


class Ledger:
    """What was done to sweeps, and what it cost."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, int, float, float]] = []

    def add(self, fault: str, injected: int, recovered: int, redone: float, all_: float) -> None:
        """Keep a row: seconds of work that were done twice, of all seconds of work."""
        self.rows.append((fault, injected, recovered, redone, all_))

    def table(self) -> str:
        """Return the rows as Markdown."""
        lines = ["| fault | injected | recovered | work redone |", "|---|---|---|---|"]
        for fault, injected, recovered, redone, all_ in self.rows:
            lines.append(f"| {fault} | {injected} | {recovered} | {redone:.1f} s of {all_:.0f} s |")
        return "\n".join(lines)


@pytest.fixture(scope="module")
def ledger(request) -> Iterator[Ledger]:
    """The ledger, which is printed at the end."""
    found = Ledger()
    yield found
    request.config.get_terminal_writer().write(f"\n\n{found.table()}\n")


class Drive:
    """A sweep on the command line, its driver started as often as need be.

    Args:
        place: Where it runs and keeps everything.
        words: Of `tune sweep`.
        flags: Of each start.
        more: Environment.
    """

    def __init__(self, place: Path, *words: str, flags: tuple[str, ...] = (), **more: str) -> None:
        self.place, self.words, self.flags, self.more = place, words, flags, more
        self.folder = place / "runs" / "soak"
        self.redone, self.told = 0.0, ""
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the sweep, or resume it."""
        again = (self.folder / "sweep.json").exists()
        words = ("resume", "soak") if again else ("sweep", *WORDS, *self.words)
        self.process = command(*words, *self.flags, cwd=self.place, **self.more)

    def written(self) -> int:
        """Return how many epochs its runs have written."""
        return sum(len(rows_of(path)) for path in self.runs())

    def runs(self) -> list[Path]:
        """Return the run folders."""
        return [*self.folder.glob("trials/*"), *self.folder.glob("refits/*-seed*")]

    def until(self, true: Callable[[], bool], seconds: float = 150) -> None:
        """Wait for something to be true while the driver lives."""
        ends = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < ends, "waited too long"
            if self.process.poll() is not None:
                raise AssertionError(f"it ended too soon: {self.process.communicate()}")
            time.sleep(0.02)

    def lost(self, run: Path) -> float:
        """Return the seconds of work that would be lost if a run ended now."""
        last = run / "last" / "manifest.json"
        state = run / "run.json"
        if not state.exists() or json.loads(state.read_text()).get("state") == "finished":
            return 0.0
        return time.time() - last.stat().st_mtime if last.exists() else 0.0

    def kill(self, pid: int, runs: list[Path]) -> None:
        """Kill a process, with the work of some runs since their checkpoints."""
        self.redone += sum(map(self.lost, runs))
        os.kill(pid, signal.SIGKILL)

    def kill_one(self, moments: random.Random) -> int:
        """Kill the process of one of the runs under way, and return which it was."""
        found: list[tuple[int, Path]] = []

        def running() -> bool:
            found[:] = [(pid, run) for run in self.runs() if (pid := holder(run)) is not None]
            return bool(found)

        self.until(running)
        pid, run = moments.choice(found)
        self.kill(pid, [run])
        return pid

    def end(self, seconds: float = 200) -> int:
        """Wait for the driver and return its exit code."""
        out, self.told = self.process.communicate(timeout=seconds)
        return self.process.returncode

    def finish(self) -> None:
        """Let the sweep finish, which must find nothing failed."""
        code = self.end()
        assert code == 0, self.told
        summary = read_json(self.folder / "summary.json")
        assert (summary["failed"], summary["trials"]) == (0, 8)

    def seconds(self) -> float:
        """Return how long its epochs took, in all."""
        return sum(row["seconds"] for run in self.runs() for row in rows_of(run))


def check(drive: Drive, uri: str, folder: Path, epochs: int = EPOCHS) -> None:
    """Audit a sweep, and run every trial again, straight, beside it."""
    assert audit(drive.folder, uri) == {"trials": 8, "refits": 5}
    for name, (trial, place) in trials_of(drive.folder).items():
        assert trial.state.name == "COMPLETE"
        assert len(rows_of(place)) == epochs
        straight(place, folder / name)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """MLflow's server."""
    with served(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def place(tmp_path, miniature, cache_root) -> Path:
    """A folder for a sweep, whose cache has the miniature."""
    place = tmp_path / "place"
    place.mkdir()
    return place


def test_three_kills_of_the_driver(place, cache_root, tmp_path, ledger):
    moments = random.Random(1)
    drive = Drive(place, RICHKD_CACHE=str(cache_root))
    killed = 0
    for epochs in (4, 15, 30):
        drive.start()
        drive.until(lambda epochs=epochs: drive.written() >= epochs + moments.randrange(3))
        time.sleep(moments.uniform(0, 0.5))
        drive.kill(drive.process.pid, drive.runs())
        assert drive.end() == -signal.SIGKILL
        killed += 1
        assert not (drive.folder / "summary.json").exists()
    drive.start()
    drive.finish()
    check(drive, f"sqlite:///{place / 'mlflow.db'}", tmp_path)
    ledger.add("kill -9 of the driver", 3, killed, drive.redone, drive.seconds())


def test_three_kills_of_trial_processes(place, cache_root, tmp_path, ledger):
    moments = random.Random(2)
    drive = Drive(place, RICHKD_CACHE=str(cache_root))
    drive.start()
    killed: set[int] = set()
    for epochs in (3, 12, 25):
        drive.until(lambda epochs=epochs: drive.written() >= epochs)
        time.sleep(moments.uniform(0, 0.3))
        killed.add(drive.kill_one(moments))
    drive.finish()
    assert len(killed) == 3
    assert drive.told.count("its process died; it goes on from its newest checkpoint") >= 1
    check(drive, f"sqlite:///{place / 'mlflow.db'}", tmp_path)
    ledger.add("kill -9 of a trial's process", 3, len(killed), drive.redone, drive.seconds())


def raylet_of(driver: int) -> int | None:
    """Return the raylet that a driver has started, None before it has."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            name = (path / "cmdline").read_bytes().split(b"\0")[0]
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if name.endswith(b"/raylet") and parent == driver:
            return int(path.name)
    return None


def test_the_only_raylet_dies(place, cache_root, tmp_path, ledger):
    # longer than Ray takes to notice
    drive = Drive(place, "train.epochs=50", RICHKD_CACHE=str(cache_root))
    drive.start()
    drive.until(lambda: drive.written() >= 6)
    drive.kill(raylet_of(drive.process.pid), drive.runs())
    assert drive.end() == 75, drive.told
    assert "the Ray cluster is gone; go on with: python -m tune resume" in drive.told
    drive.start()
    drive.finish()
    check(drive, f"sqlite:///{place / 'mlflow.db'}", tmp_path, 50)
    ledger.add("kill -9 of the only raylet (exit 75)", 1, 1, drive.redone, drive.seconds())


@pytest.fixture
def two_nodes(place, monkeypatch):
    """A Ray cluster of two nodes on this machine; returns it and the second node."""
    from ray.cluster_utils import Cluster

    from tune.places import VOLATILE, mounts

    above = [(path, kind) for path, kind in mounts() if place.is_relative_to(path)]
    if max(above, key=lambda one: len(one[0].parts))[1] in VOLATILE:
        pytest.skip(f"{place} is on a file system that several machines may not use")
    (place / "tmp").mkdir()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
    )
    second = cluster.add_node(num_cpus=2)
    yield cluster, second
    cluster.shutdown()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_node_is_lost_with_its_trials(
    two_nodes, server, place, cache_root, tmp_path, ledger, workers
):
    cluster, second = two_nodes
    words = (f"tracking.uri={server.uri}", f"tracking.experiment=node{workers}")
    words += (f"resources.workers={workers}",)
    if workers > 1:
        words += ("sweep.trials=1", "sweep.startup=1", "sweep.space.clip.prompts=null")
    drive = Drive(
        place,
        *words,
        flags=("--address", cluster.address),
        RICHKD_CACHE=str(cache_root),
        TMPDIR=str(place / "tmp"),  # what lies beside it is no temporary folder then
        RAY_AUTH_MODE="disabled",
    )
    drive.start()
    drive.until(lambda: drive.written() >= 3)
    drive.redone += sum(map(drive.lost, drive.runs()))
    cluster.remove_node(second, allow_graceful=False)
    assert len(cluster.worker_nodes) == 0
    code = drive.end(300)
    assert code == 0, drive.told
    found = audit(drive.folder, server.uri)
    assert found == ({"trials": 8, "refits": 5} if workers == 1 else {"trials": 2, "refits": 5})
    assert read_json(drive.folder / "summary.json")["failed"] == 0
    assert " died; " in drive.told  # the node had runs on it
    if workers == 1:
        for name, (_, run) in trials_of(drive.folder).items():
            straight(run, tmp_path / name)
    what = "a node of two, one-worker trials" if workers == 1 else "a node of two, nested trainers"
    ledger.add(f"kill -9 of {what}", 1, 1, drive.redone, drive.seconds())


@pytest.mark.parametrize("fault", ["closed", "hanging", "500"])
def test_the_tracker_fails_and_returns(server, place, cache_root, tmp_path, ledger, fault):
    words = (f"tracking.uri={server.uri}", f"tracking.experiment={fault}")
    drive = Drive(place, *words, RICHKD_CACHE=str(cache_root))
    drive.start()
    drive.until(lambda: drive.written() >= 5)
    server.break_(fault)
    before = drive.written()
    drive.until(lambda: drive.written() >= before + 20)  # it is not kept waiting
    drive.until(server.fired)
    server.mend()
    drive.finish()
    check(drive, server.uri, tmp_path)
    ledger.add(f"tracker: {fault}, for 20 epochs", 1, 1, 0.0, drive.seconds())


def test_kills_and_an_outage_at_random_moments(server, place, cache_root, tmp_path, ledger):
    seed = random.SystemRandom().randrange(1_000_000)
    moments = random.Random(seed)
    print(f"seed {seed}")  # shown if it fails
    words = (f"tracking.uri={server.uri}", "tracking.experiment=random")
    drive = Drive(place, *words, RICHKD_CACHE=str(cache_root))
    drive.start()
    faults = ["driver", "process", "tracker", "driver", "process"]
    moments.shuffle(faults)
    for k, fault in enumerate(faults):
        drive.until(lambda k=k: drive.written() >= 3 + 9 * k)
        time.sleep(moments.uniform(0, 0.5))
        if fault == "driver":
            drive.kill(drive.process.pid, drive.runs())
            assert drive.end() == -signal.SIGKILL
            drive.start()
        elif fault == "tracker":
            server.break_(moments.choice(["closed", "hanging", "500"]))
        else:
            drive.kill_one(moments)
    server.mend()
    drive.finish()
    check(drive, server.uri, tmp_path)
    ledger.add(f"five of these at random (seed {seed})", 5, 5, drive.redone, drive.seconds())


def test_the_disk_is_full(place, cache_root, tmp_path, ledger):
    runs = place / "runs"
    runs.mkdir()
    if (
        os.getuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", runs], check=False
        ).returncode
    ):
        pytest.skip("a file system of a few MB can be mounted by root alone")
    try:
        drive = Drive(place, RICHKD_CACHE=str(cache_root))
        drive.start()
        code = drive.end()
        assert code == 75, drive.told
        assert "disk is full" in drive.told and "tune resume" in drive.told
        subprocess.run(["mount", "-o", "remount,size=200m", runs], check=True)
        drive.start()
        drive.finish()
        check(drive, f"sqlite:///{place / 'mlflow.db'}", tmp_path)
        ledger.add("a full disk (exit 75)", 1, 1, drive.redone, drive.seconds())
    finally:
        subprocess.run(["umount", "-l", runs], check=True)


def test_runs_on_an_object_store_outlive_their_driver(place, cache_root, tmp_path, ledger):
    from moto.server import ThreadedMotoServer

    bucket = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    bucket.start()
    host, port = bucket.get_host_and_port()
    try:
        urllib.request.urlopen(
            urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")
        ).close()
        drive = Drive(
            place,
            *("storage=s3://bucket/sweeps", f"sweep.state={place / 'runs'}", "sweep.trials=2"),
            *("sweep.startup=2", "sweep.space.clip.prompts=null"),
            AWS_ENDPOINT_URL=f"http://{host}:{port}",
            AWS_REGION="us-east-1",
            AWS_ACCESS_KEY_ID="AKIDOFATEST",
            AWS_SECRET_ACCESS_KEY="SECRETOFATEST",
            AWS_EC2_METADATA_DISABLED="true",
            RICHKD_CACHE=str(cache_root),
        )

        def heard() -> int:
            study = drive.folder / "study.db"
            if not study.exists():
                return 0
            with contextlib.closing(sqlite3.connect(study)) as database:
                try:
                    (count,) = database.execute(
                        "select count(*) from trial_intermediate_values"
                    ).fetchone()
                except sqlite3.OperationalError:  # it is being made
                    return 0
            return count

        drive.start()
        drive.until(lambda: heard() >= 4)
        os.kill(drive.process.pid, signal.SIGKILL)
        assert drive.end() == -signal.SIGKILL
        drive.start()
        assert drive.end() == 0, drive.told
        summary = read_json(drive.folder / "summary.json")
        assert (summary["failed"], summary["trials"]) == (0, 4)
        assert heard() == 4 * EPOCHS
        for name, (trial, _) in trials_of(drive.folder).items():
            assert list(trial.intermediate_values) == list(range(1, EPOCHS + 1)), name
        verified = command("best", "soak", "--json", cwd=place, **drive.more)
        out, told = verified.communicate(timeout=120)
        assert verified.returncode == 0, told
        assert json.loads(out.splitlines()[-1])["verified"]
        assert not list(drive.folder.glob("trials/*"))  # they are on the store alone
    finally:
        bucket.stop()
    ledger.add("kill -9 of the driver, runs on S3", 1, 1, 0.0, 0.0)
