"""Launching on a cluster: its layers, the files to launch with, and a job on a real Ray with its dashboard."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from richkd.config import CONF

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = CONF / "cluster"
RAY = str(Path(sys.executable).with_name("ray"))
SMALL = [
    *("sweep.trials=1", "sweep.startup=1", "sweep.min_epochs=1", "refit.seeds=1"),
    *("train.epochs=2", "teacher.epochs=10"),
]
# as on another machine: our code is nowhere to be found, and no address is known
ELSEWHERE = {
    key: value
    for key, value in os.environ.items()
    if key not in ("PYTHONPATH", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")
} | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback that nobody listens on, all of them different."""
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def descendants(pid: int) -> list[int]:
    """Return the processes that come of one, itself first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


@contextlib.contextmanager
def started(*words: str, cwd: Path) -> Iterator[None]:
    """Run `ray start`, wait until it has come up, and in the end kill exactly what came of it.

    `ray stop` would end every Ray on the machine.
    """
    log = cwd / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [RAY, "start", *words, "--num-cpus=1", "--block"],
            cwd=cwd,
            env=ELSEWHERE,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        ends = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < ends, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


class Head(NamedTuple):
    """A running cluster of two nodes with a CPU each."""

    address: str
    dashboard: str
    folders: list[Path]  # Ray's own, of each node


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster as `ray start` makes it, with its dashboard, each node in a folder of its own."""
    folders: list[Path] = []
    gcs, dashboard, client, *agents = free_ports(5)
    address = f"127.0.0.1:{gcs}"
    first = [
        "--head",
        f"--port={gcs}",
        f"--ray-client-server-port={client}",
        "--include-dashboard=true",
    ]
    first += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    with contextlib.ExitStack() as stack:
        for words, agent in zip((first, [f"--address={address}"]), agents, strict=True):
            folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets have short paths
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            words += ["--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
            words += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}"]
            stack.enter_context(started(*words, cwd=folder))
            folders.append(folder)
        yield Head(address, f"http://127.0.0.1:{dashboard}", folders)


@pytest.fixture
def settings(miniature, cache_root, tmp_path) -> list[str]:
    """What every run on another machine needs to be told: where things lie."""
    return [
        *(f"cache={cache_root}", f"storage={tmp_path / 'runs'}"),
        f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
    ]


@pytest.mark.timeout(180)
def test_a_job_ships_the_code_without_the_data_and_sweeps(head, settings, tmp_path):
    project = tmp_path / "project"
    for name in ("richkd", "tune", "conf"):
        shutil.copytree(ROOT / name, project / name)
    for name in ("requirements.txt", ".gitignore"):
        shutil.copy(ROOT / name, project)
    (project / "my.yaml").write_text("train: {epochs: 2}\n")
    for name in (
        *("runs/first/best/weights.safetensors", "mlruns/0/meta.yaml", ".git/config", "mlflow.db"),
        *("data/images.npz", "cache/features.npy", "teacher.pth", "student/weights.safetensors"),
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(bytes(1000))
    # a job may set what our driver sets, too, and then says what holds
    shipped = yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text())
    shipped["env_vars"] = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(shipped))
    job = subprocess.run(
        [
            *(RAY, "job", "submit", "--address", head.dashboard),
            *("--runtime-env", str(tmp_path / "job.yaml"), "--working-dir", ".", "--"),
            *("python", "-m", "tune", "sweep", "my.yaml", *SMALL, *settings, "sweep.name=job"),
        ],
        cwd=project,
        env=ELSEWHERE,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    summary = json.loads((tmp_path / "runs" / "job" / "summary.json").read_text())
    assert summary["summary"]["richkd"]["n"] == 1
    unpacked = "session_2*/runtime_resources/working_dir_files/_ray_pkg_*/*"
    found = {path.name for folder in head.folders for path in folder.glob(unpacked)}
    code = {"richkd", "tune", "conf", "requirements.txt", "my.yaml"}
    assert found - {"__pycache__"} == code


@pytest.mark.timeout(180)
def test_workers_on_machines_without_our_code_get_it_from_the_driver(head, settings, tmp_path):
    words = [
        "train.epochs=2",
        "teacher.epochs=10",
        "resources.workers=2",
        "--name",
        "far",
        "--json",
    ]
    driver = subprocess.run(
        [sys.executable, "-m", "tune", "train", *words, *settings, "--address", head.address],
        cwd=tmp_path,
        env=ELSEWHERE | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert driver.returncode == 0, driver.stderr
    assert json.loads(driver.stdout.splitlines()[-1])["workers"] == 2
    # a worker a node, of one CPU each, where nothing else of ours lies
    modules = "session_2*/runtime_resources/py_modules_files/*/tune/worker.py"
    assert all(list(folder.glob(modules)) for folder in head.folders)
