"""Launching on a cluster: its layers, the files to launch with, and a job on a real Ray with its dashboard."""

import contextlib
import copy
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from serving import Server, served

from richkd.command import Stop, main
from richkd.errors import ConfigError
from richkd.layers import CONF, build, digest, find_layer, read, read_layer
from tune import runner
from tune.__main__ import ABOUT, VERBS
from tune.settings import Resources, Settings, fit

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


GPU8 = {"CPU": 64.0, "GPU": 8.0}
FITS = {  # layer: machines as Ray describes them, trials side by side, what a worker takes
    "local": ([{"CPU": 2.0}], 2, {"CPU": 1}),
    "cpu": ([{"CPU": 16.0}, {"CPU": 16.0}, {"CPU": 9.0}], 2, {"CPU": 4}),
    "gpu1": ([{"CPU": 16.0, "GPU": 1.0}], 1, {"CPU": 2, "GPU": 1}),  # until it has measured
    "gpu8": ([GPU8, GPU8], 16, {"CPU": 4, "GPU": 1}),
    "multinode": ([{}, *4 * [{"CPU": 4.0, "GPU": 1.0}]], 2, {"CPU": 4, "GPU": 1}),
}
CONCERNED = {"device", "storage", "cache", "resources", "sweep.state", "sweep.study"}


@pytest.mark.parametrize("beneath", [(), ("imagefolder", "data.path=/mnt/richkd/data")])
@pytest.mark.parametrize("name", FITS)
def test_a_layer_of_a_cluster_fits_what_it_is_made_for(name, beneath):
    layers = read([*beneath, f"cluster/{name}"])
    base, settings = build(layers), build(layers, Settings)
    nodes, slots, each = FITS[name]
    assert fit(settings.resources, nodes, gpu=base.device != "cpu") == (slots, each)
    assert base.data.source == (beneath[0][5:] if beneath else "digits")


@pytest.mark.parametrize("name", FITS)
def test_a_layer_of_a_cluster_changes_no_result_and_begins_with_its_command(name):
    path = CLUSTER / f"{name}.yaml"
    for key, *_ in read_layer(path).entries:
        assert key in CONCERNED or key.split(".")[0] in CONCERNED, key
    assert digest(build(read([f"cluster/{name}"]))) == digest(build(read([])))
    command = next(line for line in path.read_text().splitlines() if "python -m" in line)
    assert shlex.split(command.lstrip("# "))[:5] == [
        "python",
        "-m",
        "tune",
        "sweep",
        f"cluster/{name}",
    ]


@pytest.mark.parametrize("name", ["cpu", "multinode"])
def test_what_outlives_a_machine_lies_on_the_shared_file_system(name):
    base = build(read([f"cluster/{name}"]))
    assert base.storage.startswith("/mnt/richkd/") and base.cache.startswith("/mnt/richkd/")


def test_the_cluster_of_vms_is_one_that_ray_up_takes(capsys):
    asked = yaml.safe_load((CLUSTER / "vms.yaml").read_text())
    config = prepare_config(asked)
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError, match="head_start_command"):
        validate_config(config | {"head_start_command": "ray start"})
    assert config["max_workers"] == len(asked["provider"]["worker_ips"])
    start = asked["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start and "--head" in start
    for source in asked["file_mounts"].values():
        assert (ROOT / source).is_file()


@pytest.fixture
def manifest() -> dict:
    """The RayJob."""
    return yaml.safe_load((CLUSTER / "rayjob.yaml").read_text())


def groups(manifest: dict) -> list[dict]:
    cluster = manifest["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_manifest_is_one_that_kuberay_takes(manifest):
    schema = json.loads((ROOT / "tests" / "kuberay_rayjob_schema.json").read_text())
    jsonschema.validate(manifest, schema)
    for damage, message in (
        (lambda m: m["spec"].update(backoffLimits=1), "backoffLimits"),
        (lambda m: groups(m)[0].pop("rayStartParams"), "rayStartParams"),
        (lambda m: groups(m)[1].update(replicas="4"), "'4' is not of type 'integer'"),
        (lambda m: groups(m)[1]["template"]["spec"].pop("containers"), "containers"),
        (lambda m: groups(m)[0]["rayStartParams"].update({"num-cpus": 0}), "0 is not of type"),
    ):
        damaged = copy.deepcopy(manifest)
        damage(damaged)
        with pytest.raises(jsonschema.ValidationError, match=message):
            jsonschema.validate(damaged, schema)


def test_a_retry_of_the_manifest_goes_on_with_the_same_sweep_on_the_same_volume(manifest):
    spec = manifest["spec"]
    assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]
    command, _, rest = spec["entrypoint"].partition("||")
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "tune", "sweep"] and words[-1] == "--resume"
    layers = read(words[4:-1])
    base, settings = build(layers), build(layers, Settings)
    assert settings.sweep.name is not None
    for group in groups(manifest):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (mount,), (volume,) = container["volumeMounts"], pod["volumes"]
        assert mount["name"] == volume["name"] and "persistentVolumeClaim" in volume
        for path in (base.storage, base.cache, base.data.path):
            assert Path(path).is_relative_to(mount["mountPath"])
    head, workers = groups(manifest)
    env = {each["name"]: each["value"] for each in head["template"]["spec"]["containers"][0]["env"]}
    assert env["MLFLOW_TRACKING_URI"].startswith("http://")
    # what the head and the workers offer, as Ray will say it
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    node = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
    nodes = [{"CPU": float(head["rayStartParams"]["num-cpus"])}, *workers["replicas"] * [node]]
    assert fit(settings.resources, nodes, gpu=base.device != "cpu")[0] == 2


@pytest.mark.parametrize(
    ("code", "again"), [(0, False), (3, False), (1, True), (75, True), (137, True)]
)
def test_only_a_sweep_that_did_not_end_is_tried_again(manifest, tmp_path, code, again):
    (tmp_path / "python").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(manifest["spec"]["entrypoint"], shell=True, env={"PATH": path})
    assert (done.returncode != 0) is again


def test_the_image_is_of_the_ray_that_the_manifest_names_and_has_all_of_the_code(manifest):
    image = (CLUSTER / "Dockerfile").read_text()
    version = manifest["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"FROM rayproject/ray:{version}-py311" in image
    bound = f"ray[default,data,tune,train]>={version.rpartition('.')[0]},"
    assert bound in (ROOT / "requirements.txt").read_text()
    copied = {line.split()[1] for line in image.splitlines() if line.startswith("COPY")}
    assert copied == {"requirements.txt", "richkd", "tune", "conf"}


def test_no_file_to_launch_with_holds_a_secret():
    for path in CLUSTER.iterdir():
        for line in path.read_text().splitlines():
            assert not re.search(r"(?i)(password|token|secret|access_?key)\w*\s*[:=]", line), line
            assert not re.search(r"://[^/\s]*@", line), line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dashboard=192.0.2.1"], "--dashboard must be an address of this machine"),
        (["--dashboard=nowhere.invalid"], "--dashboard must be an address of this machine"),
        (["--dashboard=127.0.0.1", "--address=far:1"], "that at far:1 has its own"),
        # refused right after the warning
        (
            ["--dashboard=0.0.0.0", "resources.cpus_per_worker=10000"],
            "warning: --dashboard=0.0.0.0",
        ),
    ],
)
@pytest.mark.parametrize("verb", ["sweep", "train"])
def test_a_dashboard_is_refused_where_it_cannot_be_and_warned_of_where_others_reach_it(
    verb, words, told, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main("python -m tune", ABOUT, VERBS, [verb, *words]) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
def test_a_cluster_of_our_own_shows_a_dashboard_only_where_it_was_asked_to(
    host, monkeypatch, tmp_path
):
    asked = {}

    def init(**arguments: object) -> None:
        asked.update(arguments)
        raise ConnectionError("not started")

    for name in (*runner.ENVIRONMENT, "RAY_OVERRIDE_JOB_RUNTIME_ENV"):
        monkeypatch.setenv(name, "1")  # taken back in the end, unlike what `run` sets
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    cluster = {"address": None, "dashboard": host}
    with pytest.raises(ConfigError, match="not started"):
        runner.run(SimpleNamespace(), Stop(), Resources(), tmp_path, gpu=False, **cluster)
    assert asked["include_dashboard"] is (host is not None)
    assert asked["address"] == "local"
    assert asked["dashboard_host"] == "127.0.0.1"


def test_the_page_about_clusters_says_what_there_is():
    page = (ROOT / "docs" / "CLUSTER.md").read_text()
    commands = re.findall(r"python -m tune (\w+) ([^\n#]*)", page.replace("\\\n", " "))
    assert len(commands) >= 5
    for verb, words in commands:
        flags = {flag.partition("=")[0] for flag in VERBS[verb].flags}
        for word in shlex.split(words):
            if word.startswith("--"):
                assert word[2:].partition("=")[0] in flags, word
            elif word.startswith("cluster/"):
                assert find_layer(word) == CLUSTER / f"{word.removeprefix('cluster/')}.yaml"
    for linked in re.findall(r"\]\(\.\./([^)]*)\)", page):
        assert (ROOT / linked).exists(), linked
    named = {path for path in re.findall(r"conf/cluster/\w+\.?\w*", page)}
    assert all((ROOT / path).is_file() for path in named)


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


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """MLflow's server."""
    with served(tmp_path_factory.mktemp("server")) as found:
        yield found


@pytest.fixture
def settings(miniature, cache_root, tmp_path) -> list[str]:
    """What every run on another machine needs to be told: where things lie."""
    return [
        *(f"cache={cache_root}", f"storage={tmp_path / 'runs'}"),
        f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}",
    ]


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_a_job_ships_the_code_without_the_data_and_sweeps(head, server, settings, tmp_path):
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
    (tmp_path / "tmp").mkdir()
    shipped["env_vars"] = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "TMPDIR": str(tmp_path / "tmp"),  # what lies beside it is no temporary folder then
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(shipped))
    job = subprocess.run(
        [
            *(RAY, "job", "submit", "--address", head.dashboard),
            *("--runtime-env", str(tmp_path / "job.yaml"), "--working-dir", ".", "--"),
            *("python", "-m", "tune", "sweep", "my.yaml", *SMALL, *settings, "sweep.name=job"),
            f"tracking.uri={server.uri}",  # of several machines
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


@pytest.mark.soak
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
