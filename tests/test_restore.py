"""A checkpoint out of MLflow, when nothing else is left of what made it; and results that are attached to runs."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from small import ROOT

from richkd import checkpoint, load_student
from richkd.command import main
from richkd.errors import ConfigError, CorruptError
from richkd.files import read_json
from tune.__main__ import ABOUT, VERBS
from tune.restore import restore
from tune.tracking import ENVIRONMENT, Tracker


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Leave no variable of ours behind."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def said(capfd, *words: str) -> dict:
    """Run a verb of `python -m tune`, which must end well, and return its answer."""
    capfd.readouterr()
    code = main("python -m tune", ABOUT, VERBS, [*words, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def refused(capfd, *words: str, code: int = 2) -> str:
    """Run a verb that must end with this code and one line, and return the line."""
    capfd.readouterr()
    assert main("python -m tune", ABOUT, VERBS, list(words)) == code
    _, err = capfd.readouterr()
    assert err.count("\n") == 1, err
    return err


def module(package: str, *words: str, cwd: Path) -> dict:
    """Run `python -m PACKAGE` in a process and a folder of its own, and return its answer."""
    done = subprocess.run(
        [sys.executable, "-m", package, *words, "--json"],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=300,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.soak
def test_the_best_is_restored_by_the_runs_id_when_only_mlflow_is_left(copied, tmp_path, cache_root):
    top, run_id = copied.parent.parent, read_json(copied / "mlflow.json")["small"]
    before, recorded = load_student(copied).state_dict(), read_json(copied / "summary.json")["best"]
    shutil.rmtree(top / "runs")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    words = [run_id, f"tracking.uri=sqlite:///{top}/mlflow.db", f"cache={cache_root}"]
    answer = module("tune", "best", *words, "--copy-to", "student", cwd=elsewhere)
    assert answer["verified"]
    assert answer["recorded"] == answer["found"] == recorded["recorded"]
    assert [path.name for path in elsewhere.iterdir()] == ["student"]
    after = load_student(elsewhere / "student").state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    words = ["student", f"cache={cache_root}", "evaluate.rows=0"]
    again = module("richkd", "evaluate", *words, cwd=elsewhere)
    for part in ("val", "test"):
        assert again[part]["top1"] == recorded["recorded"][f"{part}_top1"]


def sent(folder: Path, uri: str, best: Path, kind: str, metrics: dict) -> str:
    """Let a run of this kind log a checkpoint, as a driver does, and return its id."""
    folder.mkdir()
    tracker = Tracker(folder, uri, "restored")
    tracker.start()
    run = tracker.sweep(folder.name, {}, {"richkd.kind": kind})
    tracker.log(run, metrics, step=3)
    tracker.artifacts(run, best, "best" if kind == "sweep" else "checkpoint")
    tracker.finish(run, "FINISHED")
    assert tracker.close(60), tracker.problem
    return tracker.run_id(run)


@pytest.mark.parametrize("kind", ["sweep", "refit", "train"])
def test_a_server_gives_back_what_each_kind_of_run_keeps(swept, server, tmp_path, capfd, kind):
    best = Path(swept[0]["best"]["checkpoint"])
    recorded = swept[0]["best"]["recorded"]
    keys = ("best/refit_val_top1", "best/refit_test_top1")
    if kind != "sweep":
        keys = ("best_val_top1", "test/top1")
    metrics = dict(zip(keys, recorded.values(), strict=True))
    run_id = sent(tmp_path / "made", server, best, kind, metrics)
    assert MlflowClient(server).get_run(run_id).info.artifact_uri.startswith("mlflow-artifacts:")
    words = ["best", run_id, "--copy-to", str(tmp_path / "student")]
    place = [f"tracking.uri={server}", f"storage={tmp_path}"]
    answer = said(capfd, *words, *place)
    assert answer["found"] == recorded
    assert checkpoint.load(tmp_path / "student").sha256 == checkpoint.load(best).sha256
    assert "exists already" in refused(capfd, *words, *place)


def test_an_accuracy_that_is_not_the_recorded_one_is_told(swept, server, tmp_path):
    best = Path(swept[0]["best"]["checkpoint"])
    wrong = {"best_val_top1": 1.0, "test/top1": 2.0}
    run_id = sent(tmp_path / "made", server, best, "refit", wrong)
    answer = restore(run_id, server)
    assert not answer["verified"]
    assert answer["recorded"] == {"val_top1": 1.0, "test_top1": 2.0}


def test_what_keeps_no_checkpoint_is_refused_with_the_reason(swept, tmp_path, capfd):
    answer, client = swept
    uri = client.tracking_uri
    ids = read_json(Path(answer["sweep"]) / "mlflow.json")
    place = [f"tracking.uri={uri}", f"storage={tmp_path}"]
    assert "is a trial" in refused(capfd, "best", ids["small/trial-000"], *place)
    assert "not found" in refused(capfd, "best", "0" * 32, *place)
    assert "'nowhere'" in refused(capfd, "best", "nowhere", *place)
    missing = f"tracking.uri=sqlite:///{tmp_path}/nowhere.db"
    assert "nowhere.db is not" in refused(capfd, "best", "0" * 32, missing, f"storage={tmp_path}")
    assert not (tmp_path / "nowhere.db").exists()  # MLflow would have made it
    closed = "tracking.uri=http://127.0.0.1:1"
    line = refused(capfd, "best", "0" * 32, closed, f"storage={tmp_path}", code=75)
    assert "Connection refused" in line
    assert "data.fold" in refused(capfd, "best", "0" * 32, "data.fold=1")


def test_an_artifact_that_was_changed_or_is_torn_never_appears(copied, tmp_path):
    uri = f"sqlite:///{copied.parent.parent}/mlflow.db"
    run_id = read_json(copied / "mlflow.json")["small/refit-richkd-l-seed0"]
    place = Path(MlflowClient(uri).get_run(run_id).info.artifact_uri) / "checkpoint"
    (place / "extra.pkl").write_bytes(b"\x80\x04never read")
    assert restore(run_id, uri, tmp_path / "whole")["verified"]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == sorted(checkpoint.FILES)
    weights = place / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(CorruptError, match="weights.safetensors is damaged"):
        restore(run_id, uri, tmp_path / "student")
    weights.unlink()
    with pytest.raises(ConfigError, match="must have the artifact checkpoint/weights.safetensors"):
        restore(run_id, uri, tmp_path / "student")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "whole"]


@pytest.fixture
def results(tmp_path):
    """A folder of results."""
    folder = tmp_path / "diagnosis"
    (folder / "plots").mkdir(parents=True)
    (folder / "table.json").write_text("{}")
    (folder / "plots" / "größe 1.txt").write_text("first")
    return folder


def test_results_are_attached_to_the_run_that_is_meant(copied, results, capfd, tmp_path):
    client = MlflowClient(f"sqlite:///{copied.parent.parent}/mlflow.db")
    ids = read_json(copied / "mlflow.json")
    place = f"storage={copied.parent}"
    for wanted, key in (
        ("small", "small"),
        (str(copied), "small"),
        (ids["small"], "small"),
        (str(copied / "trials" / "kd-001"), "small/trial-kd-001"),
        ("small/refits/richkd-l-seed1", "small/refit-richkd-l-seed1"),
    ):
        answer = said(capfd, "log", wanted, str(results), place)
        assert (answer["run_id"], answer["files"]) == (ids[key], 2)
        assert answer["link"].partition("?")[0].endswith(f"/runs/{ids[key]}/artifacts/diagnosis")
        copy = tmp_path / "copy" / str(len(list(tmp_path.rglob("*"))))
        copy.mkdir()
        found = Path(client.download_artifacts(ids[key], "diagnosis", str(copy)))
        assert (found / "plots" / "größe 1.txt").read_text() == "first"
    # a second time replaces, and a file alone goes beside
    (results / "plots" / "größe 1.txt").write_text("second")
    said(capfd, "log", "small", str(results), place)
    found = Path(client.download_artifacts(ids["small"], "diagnosis", str(tmp_path)))
    assert (found / "plots" / "größe 1.txt").read_text() == "second"
    assert said(capfd, "log", "small", str(results / "table.json"), place)["files"] == 1
    assert "table.json" in {item.path for item in client.list_artifacts(ids["small"])}


def test_results_go_through_a_server_to_a_run_of_train(server, results, capfd, tmp_path, swept):
    best = Path(swept[0]["best"]["checkpoint"])
    run_id = sent(tmp_path / "mine", server, best, "train", {})
    answer = said(capfd, "log", str(tmp_path / "mine"), str(results), f"tracking.uri={server}")
    assert answer["run_id"] == run_id
    assert answer["link"].startswith(f"{server}/#/experiments/")
    found = MlflowClient(server).download_artifacts(run_id, "diagnosis", str(tmp_path))
    assert (Path(found) / "plots" / "größe 1.txt").read_text() == "first"


def test_what_should_not_be_attached_is_refused(copied, results, capfd, tmp_path):
    place = f"storage={copied.parent}"
    assert "RUN and FOLDER" in refused(capfd, "log", "small", place)
    assert "'nothing'" in refused(capfd, "log", "nothing", str(results), place)
    assert "folder with files" in refused(capfd, "log", "small", str(tmp_path / "none"), place)
    (tmp_path / "empty").mkdir()
    assert "folder with files" in refused(capfd, "log", "small", str(tmp_path / "empty"), place)
    own = str(copied / "refits" / "kd-seed0" / "best")
    assert "another name" in refused(capfd, "log", "small", own, place)
    (results / "plots" / "passwd").symlink_to("/etc/passwd")
    assert "is a link" in refused(capfd, "log", "small", str(results), place)
    (results / "plots" / "passwd").unlink()
    os.mkfifo(results / "pipe")
    assert "is neither" in refused(capfd, "log", "small", str(results), place)
    (results / "pipe").unlink()
    with sqlite3.connect(copied.parent.parent / "mlflow.db") as database:
        before = database.execute("select count(*) from runs").fetchone()
    closed = ["tracking.uri=http://127.0.0.1:1", place]
    assert "Connection refused" in refused(capfd, "log", "small", str(results), *closed, code=75)
    with sqlite3.connect(copied.parent.parent / "mlflow.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == before
