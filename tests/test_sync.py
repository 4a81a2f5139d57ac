"""What `python -m tune sync` sends: what waits in the spool, and what only the run folders know."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from mlflow.tracking import MlflowClient

from richkd import checkpoint
from richkd.command import main
from richkd.config import Config
from richkd.errors import ConfigError
from richkd.layers import read
from tune import tracking
from tune.__main__ import ABOUT, VERBS
from tune.logbook import Logbook
from tune.sync import find, sync
from tune.tracking import ENVIRONMENT, Tracker

EPOCHS = 3


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Leave no variable of ours behind, and wait for no server."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.1)
    monkeypatch.setattr(tracking, "PATIENCE", 1.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """The address of a database that is migrated."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('sync') / 'mlflow.db'}"
    MlflowClient(uri).search_experiments()
    return uri


def run_folder(folder: Path, *, tested: bool, more: float = 0.0, epochs: int = EPOCHS) -> None:
    """Make the folder of a run whose validation accuracy is `more` percent higher."""
    folder.mkdir(parents=True)
    rows = [{"epoch": k, "val/top1": 90.0 + k + more, "lr": 0.1 / k} for k in range(1, epochs + 1)]
    meta = {"epoch": epochs, "metrics": rows[-1], "config": {"train": {"epochs": EPOCHS}}}
    checkpoint.save(folder / "last", {"w": torch.zeros(1)}, {}, meta)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    metrics = rows[-1] | ({"test/top1": 88.0} if tested else {})
    (folder / "run.json").write_text(json.dumps({"state": "finished", "metrics": metrics}))


@pytest.fixture
def swept(tmp_path, database, request):
    """The folder of a sweep that had one trial and one refit, of which MLflow has heard nothing."""
    folder = tmp_path / "runs" / "digits"
    run_folder(folder / "trials" / "000", tested=False)
    run_folder(folder / "refits" / "kd-seed0", tested=True)
    layers = read([f"tracking.experiment={request.node.name}"]).to_list()
    record = {"started": "now", "layers": layers, "tracking": database}
    (folder / "sweep.json").write_text(json.dumps(record))
    return folder


def begun(folder: Path, uri: str, experiment: str, *, timeout: float) -> Tracker:
    """Let a driver open all runs and hear the first epoch of one of them."""
    tracker = Tracker(folder, uri, experiment)
    tracker.start()
    tracker.sweep("digits", {}, {})
    trial = tracker.run("digits", "trial-000", {}, {})
    tracker.run("digits", "refit-kd-seed0", {}, {})
    tracker.log(trial, {"val/top1": 91.0, "lr": 0.1}, 1)
    tracker.close(timeout)
    return tracker


def curves(uri: str, folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return what MLflow has of each run: points by metric."""
    client, found = MlflowClient(uri), {}
    for run, run_id in json.loads((folder / "mlflow.json").read_text()).items():
        keys = client.get_run(run_id).data.metrics
        found[run] = {
            key: sorted((p.step, p.value) for p in client.get_metric_history(run_id, key))
            for key in keys
        }
    return found


WHOLE = {
    "val/top1": [(1, 91.0), (2, 92.0), (3, 93.0)],
    "lr": [(1, 0.1), (2, 0.1 / 2), (3, 0.1 / 3)],
}


def test_what_waited_and_what_only_the_folders_have_is_sent_once(
    swept, database, request, monkeypatch, capsys
):
    name = request.node.name
    dead = begun(swept, "http://127.0.0.1:1", name, timeout=1.5)
    assert "4 operations wait" in dead.problem
    monkeypatch.chdir(swept.parent.parent)
    for told in ("4 operations that waited, 11 points", "0 operations that waited, 0 points"):
        assert main("python -m tune", ABOUT, VERBS, ["sync", "digits"]) == 0
        assert capsys.readouterr().out == f"sent       {told} that only run folders had\n"
        assert curves(database, swept) == {
            "digits": {},
            "digits/trial-000": WHOLE,
            "digits/refit-kd-seed0": WHOLE | {"test/top1": [(3, 88.0)]},
        }
        assert not (swept / "spool.jsonl").exists()


def test_while_mlflow_is_dead_everything_waits_on_and_the_code_is_75(
    swept, request, capsys, monkeypatch
):
    asked = json.loads((swept / "sweep.json").read_text()) | {"tracking": "http://127.0.0.1:1"}
    (swept / "sweep.json").write_text(json.dumps(asked))
    begun(swept, "http://127.0.0.1:1", request.node.name, timeout=1.5)
    monkeypatch.chdir(swept.parent.parent)
    for _ in range(2):
        assert main("python -m tune", ABOUT, VERBS, ["sync"]) == 75
        said = capsys.readouterr().err
        assert "4 operations wait in" in said
        assert said.endswith("send them: python -m tune sync digits\n")


def test_a_sweep_on_which_a_driver_works_is_left_to_it(swept):
    with FileLock(swept / "lock"), pytest.raises(ConfigError, match="another process is working"):
        sync(swept)


def test_run_folders_are_found_where_storage_is_if_the_state_lies_elsewhere(
    swept, database, request, tmp_path
):
    state = tmp_path / "state" / "digits"
    state.mkdir(parents=True)
    settings = [f"sweep.state={state.parent}", f"storage={swept.parent}"]
    layers = read([*settings, f"tracking.experiment={request.node.name}"]).to_list()
    asked = json.loads((swept / "sweep.json").read_text()) | {"layers": layers}
    (state / "sweep.json").write_text(json.dumps(asked))
    begun(state, database, request.node.name, timeout=60)
    assert sync(state)["points"] == 11
    assert curves(database, state)["digits/trial-000"] == WHOLE


def test_a_trial_of_several_seeds_has_the_mean_of_what_all_of_them_have(
    tmp_path, database, request
):
    folder = tmp_path / "runs" / "digits"
    run_folder(folder / "trials" / "000" / "seed0", tested=False)
    run_folder(folder / "trials" / "000" / "seed1", tested=False, more=1.0, epochs=2)
    run_folder(folder / "trials" / "001" / "seed0", tested=False)  # the other has just begun
    name = request.node.name
    layers = read([f"tracking.experiment={name}", "sweep.seeds_per_trial=2"]).to_list()
    record = {"started": "now", "layers": layers, "tracking": database}
    (folder / "sweep.json").write_text(json.dumps(record))
    begun(folder, database, name, timeout=60)
    assert sync(folder)["points"] == 4  # of the first epoch the spread, and the second
    found = curves(database, folder)["digits/trial-000"]
    assert found["val/top1"] == [(1, 91.0), (2, 92.5)]
    assert found["val/top1_sd"] == [(1, pytest.approx(0.5**0.5)), (2, pytest.approx(0.5**0.5))]


def test_what_mlflow_has_never_opened_is_told(swept, database):
    answer = sync(swept)
    assert answer["unopened"] == ["digits/refit-kd-seed0", "digits/trial-000"]
    assert answer["points"] == 0


def test_a_run_of_train_is_synced_from_its_own_folder(tmp_path, database, request):
    folder = tmp_path / "runs" / "first"
    run_folder(folder, tested=True)
    tracker = Tracker(folder, "http://127.0.0.1:1", request.node.name)
    tracker.start()
    tracker.sweep("first", {}, {})
    assert not tracker.close(1.5)
    spool = (folder / "spool.jsonl").read_text()
    (folder / "spool.jsonl").write_text(spool.replace("http://127.0.0.1:1", database))
    assert find("first", tmp_path / "runs") == find(str(folder), tmp_path) == folder
    answer = sync(folder)
    assert (answer["operations"], answer["points"], answer["unopened"]) == (1, 7, [])
    assert curves(database, folder) == {"first": WHOLE | {"test/top1": [(3, 88.0)]}}
    assert sync(folder)["operations"] == 0  # it says no more where MLflow is: it has everything


def test_the_password_is_taken_from_the_environment_and_written_nowhere(swept, monkeypatch):
    asked = json.loads((swept / "sweep.json").read_text())
    asked |= {"tracking": "http://***@127.0.0.1:1"}
    (swept / "sweep.json").write_text(json.dumps(asked))
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI must give the password"):
        sync(swept)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:hunter2@127.0.0.1:1")
    assert main("python -m tune", ABOUT, VERBS, ["sync", str(swept)]) == 75
    written = (swept / "spool.jsonl").read_text()
    assert "http://***@127.0.0.1:1" in written
    assert "hunter2" not in written


def test_a_failed_run_says_why_and_of_what_class_and_the_sweep_counts_them(
    swept, database, request
):
    book = Logbook(swept, database, request.node.name)
    book.tracker.start()
    book.tracker.sweep("digits", {}, {})
    job = SimpleNamespace(
        **{"id": "trial-000", "kind": "trial", "number": 0, "method": "richkd"},
        **{"config": Config(), "params": {}, "costs": {}, "folder": swept / "trials" / "000"},
    )
    book.started(job)
    for epoch in (1, 1, 2):  # the first is heard again, as after a kill of a worker
        book.epoch(job, {"epoch": epoch, "val/top1": 90.0 + epoch})
    book.ended(job, "failed", {"epoch": 2, "error": "loss is nan", "failure": "nan"})
    best = {"val_top1": 93.0, "recorded": {"val_top1": 92.0, "test_top1": 91.0}}
    best |= {"checkpoint": "trials/000/last", "trial": 0, "params": {}, "settings": {}, "scale": 1}
    result = {"best": best, "summary": {}, "failed": 1, "sweep": str(swept), "seconds": 7.5}
    result |= {"leading": [], "failures_by_class": {"nan": 1}}
    assert "MLflow" not in book.conclude(result, {"": ["kd"], "top1": ["92"]})["lines"]
    client = MlflowClient(database)
    trial, sweep = (
        client.get_run(book.tracker.run_id(run)) for run in ("digits/trial-000", "digits")
    )
    assert trial.info.status == "FAILED"
    assert trial.data.tags["richkd.error"] == "loss is nan"
    assert trial.data.tags["richkd.failure"] == "nan"
    history = client.get_metric_history(trial.info.run_id, "val/top1")
    assert [(point.step, point.value) for point in history] == [(1, 91.0), (2, 92.0)]
    assert sweep.data.metrics["failed/nan"] == 1
    assert sweep.data.metrics["failed"] == 1
