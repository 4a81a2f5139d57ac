"""Going on with a sweep: with more trials or hours, with failed ones again, with other code, settings or budget."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from audit import audit, rows_of, trials_of
from mlflow.tracking import MlflowClient
from small import SMALL, copy_of

from richkd.errors import ConfigError, Stopped
from richkd.files import read_json, write_json
from richkd.layers import Layers, read
from tune import launch as sweeps
from tune.driver import locked
from tune.launch import More
from tune.status import status


@pytest.fixture
def uri(copied) -> str:
    """The address of the copy's MLflow."""
    return read_json(copied / "sweep.json")["tracking"]


def start(tmp_path, cache_root, *words: str) -> tuple[dict, Path, str]:
    """Start a sweep of its own, and return its answer, its folder and its MLflow."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    layers = read([*SMALL, f"cache={cache_root}", f"storage={tmp_path / 'runs'}", *words])
    folder = tmp_path / "runs" / "own"
    layers = layers.over("", {"tracking.uri": uri, "sweep.name": "own"})
    return sweeps.start(layers), folder, uri


@pytest.fixture
def planned(monkeypatch) -> list[dict]:
    """What a driver would have been asked to do, each time: nothing is done."""
    seen: list[dict] = []

    def carry_out(sweep, asked, tracking, **more):
        seen.append({"sweep": sweep, "asked": asked, **more})
        return {}

    monkeypatch.setattr(sweeps, "carry_out", carry_out)
    return seen


@pytest.mark.timeout(240)
def test_a_finished_sweep_is_given_more_trials_whatever_ray_left_and_nothing_runs_twice(
    swept, copied, uri
):
    answer, _ = swept
    before = {path: path.stat().st_mtime_ns for path in copied.glob("trials/*/metrics.jsonl")}
    # Ray's own files, of a driver that was killed: cut, torn, or of something else
    scratch = copied / ".ray"
    (scratch / "0123").mkdir(parents=True)
    for name, content in {
        "tuner.pkl": b"\x80\x04cos\nsystem\n(S'touch evil'\ntR.",
        "experiment_state-2026.json": b'{"trial_data": [',
        "search_gen_state-2026.json": b"",
        "searcher-state-2026.pkl": b"\x80",
    }.items():
        (scratch / name).write_bytes(content)
    more = sweeps.go_on(copied, more=More(trials=1))
    assert not scratch.exists()
    assert more["trials"] == answer["trials"] + 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert audit(copied, uri) == {"trials": 10, "refits": 10}
    found = status(copied)
    assert (found["trials"]["of"], found["refits"]["finished"], found["state"]) == (
        10,
        10,
        "finished",
    )
    assert more["seconds"] > answer["seconds"]
    again = sweeps.go_on(copied)
    assert again["summary"] == more["summary"]


@pytest.mark.timeout(240)
def test_refits_of_a_setting_that_is_the_best_no_longer_are_set_aside_and_followed(copied, uri):
    best = read_json(copied / "summary.json")["best"]["trial"]
    other = 3 if best != 3 else 2
    with sqlite3.connect(copied / "study.db") as database:
        (key,) = database.execute(
            "select trial_id from trials where number = ? and study_id = 1", (other,)
        ).fetchone()
        database.execute("delete from trial_values where trial_id = ?", (key,))
        database.execute("update trials set state = 'COMPLETE' where trial_id = ?", (key,))
        database.execute(
            "insert into trial_values (trial_id, objective, value, value_type) "
            "values (?, 0, 99.9, 'FINITE')",
            (key,),
        )
        database.execute(
            "insert into trial_user_attributes (trial_id, key, value_json) "
            "select ?, 'val_loss', '0.1' where not exists (select 1 from trial_user_attributes "
            "where trial_id = ? and key = 'val_loss')",
            (key, key),
        )
    database.close()
    kept = {path: path.stat().st_mtime_ns for path in copied.glob("refits/kd*/metrics.jsonl")}
    (copied / "summary.json").unlink()
    answer = sweeps.go_on(copied)
    assert answer["best"]["trial"] == other
    aside = {path.name for path in copied.glob("refits/superseded/*")}
    assert aside == {"richkd-l-seed0-0", "richkd-l-seed1-0"}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    client = MlflowClient(tracking_uri=uri)
    parent = client.get_run(read_json(copied / "mlflow.json")["small"])
    rule = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    names = [run.info.run_name for run in client.search_runs([parent.info.experiment_id], rule)]
    assert names.count("refit-richkd-l-seed0 (superseded)") == 1
    assert names.count("refit-richkd-l-seed0") == names.count("refit-kd-seed0") == 1


@pytest.mark.timeout(240)
def test_failed_trials_are_tried_again_by_class_and_count_no_longer(copied, uri):
    with sqlite3.connect(copied / "study.db") as database:
        for number, kind in ((1, "lost"), (3, "nan")):
            (key,) = database.execute(
                "select trial_id from trials where number = ? and study_id = 1", (number,)
            ).fetchone()
            database.execute("update trials set state = 'FAIL' where trial_id = ?", (key,))
            for name, value in (("failure", kind), ("error", f"why {kind}")):
                database.execute(
                    "insert into trial_user_attributes (trial_id, key, value_json) values (?, ?, ?)",
                    (key, name, json.dumps(value)),
                )
    database.close()
    assert status(copied)["failures"] == {
        "trial-001": ["lost", "why lost"],
        "trial-003": ["nan", "why nan"],
    }
    answer = sweeps.go_on(copied, more=More(retry=("lost", "hung")))
    assert answer["failures"] == {"trial-003": "why nan"}
    assert answer["failures_by_class"] == {"nan": 1}
    trials = trials_of(copied)
    assert len(trials) == 9
    again, _ = trials["trial-004"]
    assert again.params == trials["trial-001"][0].params
    assert again.user_attrs["retry_of"] == 1
    assert again.state.name in ("COMPLETE", "PRUNED")


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_seeds_of_a_trial_run_side_by_side_and_the_trial_is_their_mean(
    cluster, miniature, cache_root, tmp_path
):
    words = ("sweep.seeds_per_trial=2", "sweep.trials=3", "refit.seeds=1")
    answer, folder, uri = start(tmp_path, cache_root, *words)
    client = MlflowClient(tracking_uri=uri)
    ids = read_json(folder / "mlflow.json")
    for name, (trial, place) in trials_of(folder).items():
        first, second = (rows_of(place / f"seed{k}") for k in (0, 1))
        assert len(first) == len(second) > 0
        means = {
            a["epoch"]: (a["val/top1"] + b["val/top1"]) / 2
            for a, b in zip(first, second, strict=True)
        }
        assert trial.intermediate_values == pytest.approx(means)
        if trial.state.name == "COMPLETE":
            best = (first[-1]["best_val_top1"] + second[-1]["best_val_top1"]) / 2
            assert trial.value == pytest.approx(best)
        history = client.get_metric_history(ids[f"own/{name}"], "val/top1")
        assert {point.step: point.value for point in history} == pytest.approx(means)
        assert len(history) == len(means)
        assert client.get_metric_history(ids[f"own/{name}"], "val/top1_sd")
    assert answer["summary"]["richkd"]["n"] == 1


@pytest.fixture(scope="module")
def ended(cluster, miniature, cache_root, tmp_path_factory) -> Path:
    """The folder of a sweep whose hours are used up, beside its MLflow."""
    folder = tmp_path_factory.mktemp("hours")
    words = ("sweep.hours=0.001", "train.epochs=12", "sweep.scheduler=none", "refit.seeds=1")
    with pytest.raises(Stopped, match=r"sweep.hours=0.001.*resume .*own --add-hours 1$") as said:
        start(folder, cache_root, *words, "sweep.trials=2")
    assert said.value.exit_code == 75
    return folder / "runs" / "own"


@pytest.fixture
def stopped(ended, tmp_path) -> Iterator[Path]:
    """A copy of it."""
    with copy_of(ended, tmp_path / "copy") as folder:
        yield folder


@pytest.mark.timeout(240)
def test_a_sweep_ends_when_its_hours_are_used_up_and_goes_on_with_more(stopped):
    found = status(stopped)
    assert found["state"] == "stopped"
    assert 0.001 <= found["hours"] < 0.01  # it was kept to: 12 epochs of 9 runs take longer
    for path in stopped.glob("trials/*"):
        assert len(rows_of(path)) < 12
    with pytest.raises(ConfigError, match="--add-gpu-hours adds to sweep.gpu_hours but"):
        sweeps.go_on(stopped, more=More(gpu_hours=1))
    answer = sweeps.go_on(stopped, more=More(hours=1))
    assert answer["failed"] == 0
    assert audit(stopped, read_json(stopped / "sweep.json")["tracking"]) == {
        "trials": 4,
        "refits": 5,
    }


@pytest.mark.soak
@pytest.mark.timeout(240)
def test_with_other_settings_trials_that_ran_begin_anew_and_the_record_agrees(stopped):
    uri = read_json(stopped / "sweep.json")["tracking"]
    before = {
        name for name, (trial, _) in trials_of(stopped).items() if trial.state.name == "RUNNING"
    }
    assert before
    layers = Layers.from_list(read_json(stopped / "sweep.json")["layers"])
    other = layers.over("", {"train.epochs": 3, "sweep.hours": 1.0})
    answer = sweeps.start(other, resume=True, changed=True)
    assert answer["failed"] == 0
    trials = trials_of(stopped)
    failed = {name for name, (trial, _) in trials.items() if trial.state.name == "FAIL"}
    assert failed == before
    again = {trial.user_attrs.get("retry_of") for trial, _ in trials.values()} - {None}
    assert again == {trials[name][0].number for name in failed}
    assert audit(stopped, uri) == {"trials": 4 + len(failed), "refits": 5}
    assert read_json(stopped / "sweep.json")["changes"][0]["found"] == ["train.epochs: 12 -> 3"]


def test_a_name_that_a_run_has_is_no_sweeps(cluster, miniature, cache_root, tmp_path):
    (tmp_path / "runs" / "own").mkdir(parents=True)
    (tmp_path / "runs" / "own" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="sweep.name=own is taken: .* holds a run"):
        start(tmp_path, cache_root)


def test_a_study_of_that_name_in_a_shared_database_is_not_adopted(
    swept, cluster, miniature, cache_root, tmp_path
):
    study = f"sqlite:///{Path(swept[0]['sweep']) / 'study.db'}"
    names = optuna.get_all_study_names(study)
    assert names == ["richkd", "kd"]
    shared = f"sqlite:///{tmp_path / 'shared.db'}"
    for name in names:
        optuna.copy_study(
            from_study_name=name,
            from_storage=study,
            to_storage=shared,
            to_study_name=f"own/{name}",
        )
    with pytest.raises(ConfigError, match="sweep.study has trials of that name"):
        start(tmp_path, cache_root, f"sweep.study={shared}")
    assert not (
        tmp_path / "runs" / "own" / "sweep.json"
    ).exists()  # nothing is in the way of the next try


def test_a_budget_that_is_used_up_is_told_before_anything_is_prepared(copied, planned, monkeypatch):
    monkeypatch.undo()
    (copied / "summary.json").unlink()
    layers = Layers.from_list(read_json(copied / "sweep.json")["layers"])
    write_json(copied / "spent.json", {"seconds": 7200.0, "gpu_seconds": 0.0})
    with pytest.raises(Stopped, match="--add-hours 1"):
        sweeps.start(layers.over("", {"sweep.hours": 2.0}), resume=True)
    assert not (copied / "summary.json").exists()


def test_another_tracker_may_be_given_to_a_sweep_that_goes_on(copied, planned):
    (copied / "summary.json").unlink()
    layers = Layers.from_list(read_json(copied / "sweep.json")["layers"])
    other = "sqlite:////elsewhere/mlflow.db"
    sweeps.start(layers.over("", {"tracking.uri": other}), resume=True)
    assert planned[0]["asked"]["tracking"] == other


def test_two_drivers_of_one_sweep_are_one_too_many(copied):
    (copied / "summary.json").unlink()
    with locked(copied), pytest.raises(ConfigError, match="is working on small"):
        sweeps.go_on(copied)


def test_changed_code_is_shown_and_needs_leave(copied, planned):
    (copied / "summary.json").unlink()
    asked = read_json(copied / "sweep.json")
    asked["fingerprint"] |= {"richkd/distill.py": "0123456789ab", "torch": "1.0"}
    write_json(copied / "sweep.json", asked)
    with pytest.raises(ConfigError, match="richkd/distill.py: 0123456789ab -> .*torch: 1.0 -> .*"):
        sweeps.go_on(copied)
    assert planned == []
    sweeps.go_on(copied, changed=True)
    assert planned[0]["asked"]["changes"][0]["found"][0].startswith("richkd/distill.py: ")


def test_changed_settings_are_shown_and_need_leave(copied, planned):
    (copied / "summary.json").unlink()
    layers = Layers.from_list(read_json(copied / "sweep.json")["layers"])
    launch = {"resume": True}
    sweeps.start(layers.over("", {"resources.max_concurrent": 1, "sweep.trials": 5}), **launch)
    assert len(planned) == 1  # how long, and on what, may change
    other = layers.over("", {"train.lr": 0.01})
    with pytest.raises(ConfigError, match="train.lr: 0.05 -> 0.01; go back to that, or say"):
        sweeps.start(other, **launch)
    sweeps.start(other, changed=True, **launch)
    assert planned[1]["sweep"].base.train.lr == 0.01


def test_a_sweep_that_is_started_with_resume_begins_or_goes_on(swept, planned, tmp_path):
    folder = Path(swept[0]["sweep"])
    layers = Layers.from_list(read_json(folder / "sweep.json")["layers"])
    finished = sweeps.start(layers, resume=True)
    assert finished["summary"] == swept[0]["summary"]
    assert planned == []
    sweeps.start(layers.over("", {"storage": str(tmp_path)}), resume=True)
    assert planned[0]["new"]
    with pytest.raises(ConfigError, match="--resume goes on with a sweep by its name"):
        sweeps.start(layers.over("", {"sweep.name": None}), resume=True)
