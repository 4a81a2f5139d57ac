"""Distillations over two workers of a real local Ray: tracked, gone on with after a death, and freed when stopped."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
import ray.tune
from mlflow.tracking import MlflowClient
from ray.tune.schedulers import FIFOScheduler
from small import Script

from richkd import load_student
from richkd.command import Stop, main
from richkd.errors import ConfigError, CorruptError, Interrupted
from richkd.layers import build, read
from tune import __main__ as command_line
from tune import runner
from tune.agenda import Job
from tune.settings import Resources
from tune.train import train

EPOCHS = 6
SHORT = [
    *(f"train.epochs={EPOCHS}", "teacher.epochs=4", "resources.workers=2"),
    "train.batch_size=64",
]


@pytest.fixture(scope="module")
def overrides(miniature, cache_root, tmp_path_factory) -> list[str]:
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    return [*SHORT, f"cache={cache_root}", f"tracking.uri={uri}"]


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


@pytest.fixture(scope="module")
def straight(cluster, overrides, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("straight") / "straight"
    return train(read(overrides), folder, command="")


def processes() -> dict[int, bytes]:
    """Return the command lines of this process's descendants: others on the machine may use Ray too."""
    names, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            pid = int(path.name)
            names[pid] = (path / "cmdline").read_bytes()
            # after the name, which is in brackets and may hold anything: the state, then the parent
            parents[pid] = int((path / "stat").read_text().rpartition(")")[2].split()[1])

    def ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and ours(parents[pid]))

    return {pid: name for pid, name in names.items() if ours(pid)}


def kill_a_worker(folder: Path, killed: list[int]) -> None:
    """Kill one of the processes of Ray Train's workers when two epochs are done."""
    metrics, ends = folder / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < ends:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
            pid = next(pid for pid, name in processes().items() if b"RayTrainWorker" in name)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            return
        time.sleep(0.02)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*a worker died")
def test_a_run_whose_worker_is_killed_ends_as_the_straight_one(straight, overrides, tmp_path):
    folder, killed = tmp_path / "killed", []
    killer = threading.Thread(target=kill_a_worker, args=(folder, killed))
    killer.start()
    answer = train(read(overrides), folder, command="")
    killer.join()
    assert killed
    assert rows(folder) == rows(Path(straight["run"]))
    files = [Path(run["run"]) / "last" / "weights.safetensors" for run in (answer, straight)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert answer["test"] == straight["test"]
    client = MlflowClient(answer["mlflow"]["tracking_uri"])
    history = client.get_metric_history(answer["mlflow"]["run_id"], "val/top1")
    assert [point.step for point in history] == list(range(1, EPOCHS + 1))


def test_mlflow_has_the_run(straight):
    folder = Path(straight["run"])
    client = MlflowClient(straight["mlflow"]["tracking_uri"])
    run = client.get_run(straight["mlflow"]["run_id"])
    assert (run.info.run_name, run.info.status) == ("straight", "FINISHED")
    assert run.data.tags["richkd.kind"] == "train"
    assert run.data.tags["richkd.state"] == "finished"
    assert run.data.params["resources.workers"] == "2"
    assert run.data.metrics["test/top1"] == straight["test"]["top1"]
    history = client.get_metric_history(run.info.run_id, "val/top1")
    assert [(p.step, p.value) for p in history] == [
        (row["epoch"], row["val/top1"]) for row in rows(folder)
    ]
    found = {file.path for file in client.list_artifacts(run.info.run_id, "checkpoint")}
    assert "checkpoint/weights.safetensors" in found


def test_its_checkpoint_is_a_student(straight):
    assert load_student(straight["run"]).names[3] == "three"
    assert straight["workers"] == 2
    assert straight["test"]["top1"] > 50


def test_ray_leaves_nothing_in_the_run_folder(straight):
    assert {path.name for path in Path(straight["run"]).iterdir()} - {".lock"} == {
        *("config.yaml", "run.json", "metrics.jsonl", "last", "best", "mlflow.json", "lock")
    }


def test_only_the_same_run_goes_on_and_mlflow_hears_of_no_other(straight, overrides):
    folder = Path(straight["run"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds a run already"):
        train(read(overrides), folder, command="")
    with pytest.raises(ConfigError, match="was made with other settings"):
        train(read([*overrides, "train.lr=0.2"]), folder, command="", resume=True)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    client = MlflowClient(straight["mlflow"]["tracking_uri"])
    assert client.get_run(straight["mlflow"]["run_id"]).info.status == "FINISHED"


def test_a_damaged_checkpoint_is_found_before_ray_starts(straight, overrides, tmp_path):
    folder = shutil.copytree(straight["run"], tmp_path / "damaged")
    weights = folder / "last" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="is damaged"):
        train(read(overrides), folder, command="", resume=True)


def test_a_run_that_is_interrupted_before_it_began_is_begun_anew(cluster, overrides, tmp_path):
    stop = Stop()
    stop.signum = signal.SIGINT
    layers = read([*overrides, "method.name=ce"])
    with pytest.raises(Interrupted, match="go on with: the same$"):
        train(layers, tmp_path / "early", command="the same", stop=stop)
    (tmp_path / "early" / "run.json").write_text("{}")
    with pytest.raises(CorruptError, match="run.json must be an object"):
        train(layers, tmp_path / "early", command="the same", resume=True)


class Stopping(Script):
    """An agenda of which a job is stopped after an epoch."""

    def epoch(self, job: Job, metrics: dict) -> bool:
        """Hear of an epoch."""
        return super().epoch(job, metrics) and job.id != "stopped"


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_trials_of_several_workers_give_back_what_they_took_however_they_end(
    cluster, overrides, tmp_path
):
    config = build(read([*overrides, "method.name=ce", "train.epochs=2"]))
    bad = replace(config, data=replace(config.data, labelled_per_class=1000))
    script = Stopping({"stopped": config, "failed": bad, "finished": config}, tmp_path)
    runner.run(script, Stop(), Resources(workers=2), tmp_path / ".ray", gpu=False, address=None)
    assert script.ends["stopped"][0]["epoch"] == 1
    assert "finished" not in script.ends["stopped"][0]
    why = script.ends["failed"][1]
    assert why.kind == "error"
    assert why.text.startswith("DataError: data.labelled_per_class=1000")
    assert script.ends["finished"][0]["finished"]
    ends = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < ends:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2
    assert not [name for name in processes().values() if b"PlacementGroupCleaner" in name]
    assert not (tmp_path / ".ray").exists()


def test_more_workers_than_there_are_cores_are_refused_before_anything_is_made(overrides, tmp_path):
    layers = read([*overrides, "resources.workers=1000"])
    with pytest.raises(ConfigError, match="resources.workers=1000 .* CPUs but take 1000"):
        train(layers, tmp_path / "many", command="")
    assert not (tmp_path / "many").exists()


class Busy(FIFOScheduler):
    """A driver that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[int] = []

    def on_trial_result(self, tune_controller: object, trial: object, result: dict) -> str:
        """Hear of an epoch, slowly."""
        self.heard.append(result["run/epoch"])
        time.sleep(1)  # in which the workers report again, and end
        return FIFOScheduler.CONTINUE


@pytest.mark.timeout(60)
def test_a_trial_whose_workers_end_while_the_driver_is_busy_ends_too(cluster, tmp_path):
    def hasty(job: dict) -> None:  # nested, since a worker cannot import this file
        import ray.train.torch

        from tune import trial

        class Hasty(ray.train.torch.TorchTrainer):
            def fit(self) -> None:
                (relay,) = self.run_config.callbacks
                for epoch in (1, 2):
                    relay.after_report(None, [{"run": {"epoch": epoch}}], None)

        ray.train.torch.TorchTrainer = Hasty
        trial.trial(job)

    job = {"id": "hasty", "folder": str(tmp_path), "scratch": str(tmp_path), "config": {}}
    job |= {
        "workers": 2,
        "each": {"CPU": 1},
        "seeds": 1,
        "heard": 0,
        "patience": 60.0,
        "store": None,
    }
    busy = Busy()
    ray.tune.Tuner(
        ray.tune.with_resources(hasty, {"CPU": 1}),
        param_space=job,
        tune_config=ray.tune.TuneConfig(scheduler=busy),
        run_config=ray.tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert busy.heard == [1, 2]


def test_a_run_is_evaluated_and_explained_in_its_run_of_mlflow(straight, overrides, capsys):
    uri = next(word for word in overrides if word.startswith("tracking.uri="))
    words = ["evaluate", straight["run"], "evaluate.rows=20", uri, "--json"]
    assert main("python -m tune", command_line.ABOUT, command_line.VERBS, words) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["untold"] is None
    client = MlflowClient(uri.partition("=")[2])
    run_id = straight["mlflow"]["run_id"]
    top = {item.path for item in client.list_artifacts(run_id)}
    assert {"evaluation", "explain"} <= top
    kept = client.get_run(run_id).data.metrics["evaluation/fgsm_8_top1"]
    assert kept == answer["student"]["attack"]["fgsm"][-1]
