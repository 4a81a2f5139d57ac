"""What MLflow's own client reads back, and what a server that is dead, hangs or refuses does not do to us."""

import http.server
import json
import math
import os
import random
import socket
import sqlite3
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from richkd.errors import ConfigError
from tune import names, tracking
from tune.links import VIEW
from tune.tracking import ENVIRONMENT, Tracker

AT_ONCE = 0.5  # seconds: far less than any wait for a server


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Leave no variable of ours behind, and wait for no server longer than a second."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 0.1)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """The address of a database that two drivers have opened at once, when it was new."""
    folder = tmp_path_factory.mktemp("tracking")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        for name in ("first-0", "first-1"):
            (folder / name).mkdir()
        trackers = [Tracker(folder / name, uri, name) for name in ("first-0", "first-1")]
        for tracker in trackers:
            tracker.start()
        for tracker in trackers:
            assert tracker.close(100), tracker.problem
    return uri


@pytest.fixture(scope="module")
def client(database):
    return MlflowClient(tracking_uri=database)


@pytest.fixture
def folder(tmp_path):
    """The folder of a sweep called digits."""
    (tmp_path / "digits").mkdir()
    return tmp_path / "digits"


@pytest.fixture
def start(database, request, folder):
    """Return what starts a tracker of one sweep on an experiment of this test's own."""

    def begin() -> Tracker:
        tracker = Tracker(folder, database, request.node.name)
        tracker.start()
        return tracker

    return begin


def sent(tracker: Tracker) -> Tracker:
    """End a tracker that must have sent everything."""
    assert tracker.close(60), tracker.problem
    return tracker


def runs(client: MlflowClient, tracker: Tracker) -> list:
    return client.search_runs([tracker.experiment_id])


def test_a_sweep_and_its_trials_are_a_parent_and_its_children(start, client, request):
    tracker = start()
    sweep = tracker.sweep(
        "digits", {"train.epochs": 20, "clip.model": "miniature"}, {"richkd.kind": "sweep"}
    )
    trial = tracker.run(sweep, "trial-000", {"fusion.alpha": 0.7}, {"richkd.kind": "trial"})
    refit = tracker.run(sweep, "refit-ce-seed3", {"seed": 3}, {"richkd.trial": 3})
    sent(tracker)
    assert client.get_experiment(tracker.experiment_id).name == request.node.name
    parent, first, second = (client.get_run(tracker.run_id(key)) for key in (sweep, trial, refit))
    assert [run.info.run_name for run in (parent, first, second)] == [
        *("digits", "trial-000", "refit-ce-seed3")
    ]
    assert parent.data.params == {"train.epochs": "20", "clip.model": "miniature"}
    assert first.data.params == {"fusion.alpha": "0.7"}
    assert parent.data.tags["richkd.kind"] == "sweep"
    assert second.data.tags["richkd.trial"] == "3"
    assert "mlflow.parentRunId" not in parent.data.tags
    children = client.search_runs(
        [tracker.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    assert {run.info.run_id for run in children} == {first.info.run_id, second.info.run_id}


def test_two_drivers_at_once_open_a_new_database(database, client):
    names = {experiment.name for experiment in client.search_experiments()}
    assert names >= {"first-0", "first-1"}
    assert sqlite3.connect(database.removeprefix("sqlite:///")).execute("select 1").fetchone()


def test_metrics_are_kept_by_epoch(start, client):
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    trial = tracker.run(sweep, "trial-000", {}, {})
    curve = [
        (epoch, 90 + math.sin(epoch)) for epoch in range(1, 1200)
    ]  # more than MLflow takes a call
    for epoch, value in curve:
        tracker.log(trial, {"val/top1": value, "train/loss": 1 / epoch}, epoch)
    tracker.finish(trial, "FINISHED")
    sent(tracker)
    found = client.get_metric_history(tracker.run_id(trial), "val/top1")
    assert [(point.step, point.value) for point in found] == curve
    losses = client.get_metric_history(tracker.run_id(trial), "train/loss")
    assert [point.value for point in losses] == [1 / epoch for epoch, _ in curve]
    assert abs(found[0].timestamp / 1000 - time.time()) < 100
    assert client.get_run(tracker.run_id(sweep)).data.metrics == {}


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_is_that_of_the_end_and_metrics_before_it_are_there(start, client, status):
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    tracker.log(sweep, {"best_val_top1": 93.0}, 0)
    tracker.tag(sweep, {"richkd.state": "ended"})
    tracker.finish(sweep, status)
    sent(tracker)
    run = client.get_run(tracker.run_id(sweep))
    assert run.info.status == status
    assert run.info.end_time >= run.info.start_time
    assert run.data.metrics == {"best_val_top1": 93.0}
    assert run.data.tags["richkd.state"] == "ended"


def test_artifacts_lie_beside_the_database_and_are_read_back(
    start, client, database, tmp_path, monkeypatch
):
    (tmp_path / "best" / "deep").mkdir(parents=True)
    (tmp_path / "best" / "deep" / "weights").write_bytes(bytes(range(256)))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    tracker.artifacts(sweep, tmp_path / "best", "checkpoint")
    tracker.text(sweep, "a: ä\n", "config.yaml")
    sent(tracker)
    copy = Path(client.download_artifacts(tracker.run_id(sweep), "", str(tmp_path)))
    assert (copy / "checkpoint" / "deep" / "weights").read_bytes() == bytes(range(256))
    assert (copy / "config.yaml").read_text(encoding="utf-8") == "a: ä\n"
    place = Path(client.get_experiment(tracker.experiment_id).artifact_location)
    assert place.is_relative_to(Path(database.removeprefix("sqlite:///")).parent)
    assert list(work.iterdir()) == []


def test_a_table_is_read_back_by_mlflow_and_a_second_one_replaces_it(
    start, client, database, monkeypatch
):
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    tracker.table(sweep, {"model": ["old", "rows", "gone"]}, "table.json")
    columns = {"model": ["kd", "richkd"], "top1": [88.5, math.nan], "wins": ["", "2 of 2"]}
    tracker.table(sweep, columns, "table.json")
    sent(tracker)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)  # the client's own address is not asked
    found = client.load_table(tracker.experiment_id, "table.json", [tracker.run_id(sweep)])
    assert list(found.columns) == list(columns)
    assert found["model"].tolist() == columns["model"]
    assert found["wins"].tolist() == columns["wins"]
    assert found["top1"].isna().tolist() == [False, True]
    tag = json.loads(client.get_run(tracker.run_id(sweep)).data.tags["mlflow.loggedArtifacts"])
    assert tag == [{"path": "table.json", "type": "table"}]


def test_datasets_are_inputs_and_are_not_doubled(start, client):
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    for _ in range(2):
        tracker.dataset(sweep, "digits", "a" * 64, "training")
        tracker.dataset(sweep, "digits", "b" * 64, "test")
    sent(tracker)
    inputs = client.get_run(tracker.run_id(sweep)).inputs.dataset_inputs
    found = {(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in inputs}
    assert found == {("digits", "a" * 36, "training"), ("digits", "b" * 36, "test")}
    assert len(inputs) == 2


def test_what_is_not_finite_is_counted_and_what_is_no_number_left_out(start, client):
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    tracker.log(sweep, {"a": math.nan, "b": math.inf, "c": 1, "d": "text", "e": None}, 1)
    tracker.log(sweep, {"a": -math.inf, "b": np.float32(0.5), "c": np.int64(2), "f": [1.0]}, 2)
    sent(tracker)
    run = client.get_run(tracker.run_id(sweep))
    assert run.data.metrics == {"b": 0.5, "c": 2.0}
    assert run.data.tags["richkd.nonfinite"] == "3"
    assert [p.value for p in client.get_metric_history(run.info.run_id, "c")] == [1.0, 2.0]


def odd_keys() -> list[str]:
    rng = random.Random(0)
    letters = "ab/._- :@#%ß漢\n\t\\'\"${}[]()*?é\u202e\x00😀"
    keys = {"".join(rng.choices(letters, k=rng.randint(0, 12))) for _ in range(230)}
    keys |= {"a b", "a@b", "a#b", "a_b", "a//b", "a/b", "a/./b", "/a/b", "a/b/", "..", "../a", ""}
    keys |= {"x" * 250, "x" * 251, "x" * 252, "loss(%)", "loss(#)", "a\nb", "Δloss"}
    return sorted(keys)


def test_odd_keys_are_taken_and_no_two_become_one(start, client):
    keys = odd_keys()
    assert len(keys) > 200
    tracker = start()
    sweep = tracker.sweep("digits", dict.fromkeys(keys, "x") | {"a_b": "as it is"}, {})
    tracker.log(sweep, {key: number for number, key in enumerate(keys)}, 1)
    sent(tracker)
    run = client.get_run(tracker.run_id(sweep))
    assert len(run.data.params) == len(keys)
    assert sorted(run.data.metrics.values()) == list(range(len(keys)))
    assert set(run.data.params) == set(run.data.metrics)
    assert run.data.params["a_b"] == "as it is"
    # what was changed ends in the digest of a tag that keeps it
    kept = originals(run.data.tags)
    changed = set(run.data.params) - set(keys)
    assert len(changed) > 100
    assert {kept[key[-8:]] for key in changed} == set(keys) - set(run.data.params)


def originals(tags: dict[str, str]) -> dict[str, str]:
    """Return the names that MLflow did not take as they were, by digest."""
    prefix = "richkd.name."
    return {k.removeprefix(prefix): json.loads(v) for k, v in tags.items() if k.startswith(prefix)}


def test_odd_names_of_runs_are_taken_and_no_two_become_one(start, client):
    odd = [
        *odd_keys(),
        "\ud800",
        "a\ud800",
        "a\udfff",
        "<script>",
        "=cmd|' /C calc'!A0",
        "'; drop table runs",
    ]
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    keys = {tracker.run(sweep, name, {}, {}): name for name in odd}
    assert len(keys) == len(odd) > 200
    sent(tracker)
    shown = {}
    for key, name in keys.items():
        run = client.get_run(tracker.run_id(key))
        shown[run.info.run_name] = name
        kept = originals(run.data.tags)
        assert kept.get(run.info.run_name[-8:], run.info.run_name) == name
        assert run.info.run_name.isprintable()
    assert len(shown) == len(odd)
    assert "a b" in shown


def test_odd_names_of_students_and_data_are_taken_by_the_registry_and_no_two_become_one(client):
    plain = [
        ("cnn8", "digits"),
        ("wrn_16_2", "cifar100"),
        ("timm.resnet-18", "cats.v2"),
        ("größe", "猫"),
    ]
    odd = [
        ("timm/resnet18.a1_in1k", "cats"),
        ("timm_resnet18.a1_in1k", "my cats"),
        ("a-b", "c"),
        ("a", "b-c"),
    ]
    odd += [("torchvision/resnet18", name) for name in odd_keys()]
    odd += [(name, "digits") for name in odd_keys()]
    pairs = dict.fromkeys(plain + odd)
    shown = {names.model(*pair): pair for pair in pairs}
    assert len(shown) == len(pairs) > 400
    for student, data in plain:
        assert names.model(student, data) == f"richkd-{student}-{data}"
    for name in shown:
        client.create_registered_model(name)
    found, token = set(), None
    while token != "":
        page = client.search_registered_models(max_results=1000, page_token=token)
        found |= {model.name for model in page}
        token = page.token or ""
    assert found >= set(shown)


def test_half_a_surrogate_pair_in_a_value_is_taken(start, client):
    tracker = start()
    sweep = tracker.sweep("digits", {"a": "x\ud800"}, {"b": "\udfff"})
    sent(tracker)
    data = client.get_run(tracker.run_id(sweep)).data
    assert (data.params["a"], data.tags["b"]) == ("x\\ud800", "\\udfff")


@pytest.mark.parametrize(
    "key",
    [
        "val/top1",
        "loss.temperature",
        "space.clip.prompts",
        "a b",
        "x-y_z",
        "m:0",
        "x" * 250,
        "größe",
    ],
)
def test_usual_keys_stay_as_they_are(start, client, key):
    tracker = start()
    sweep = tracker.sweep("digits", {key: 1}, {key: "tag"})
    tracker.log(sweep, {key: 2}, 1)
    sent(tracker)
    data = client.get_run(tracker.run_id(sweep)).data
    assert (data.params, data.metrics, data.tags[key]) == ({key: "1"}, {key: 2.0}, "tag")


@pytest.mark.parametrize(
    "params", [{"a": ""}, {"a": "x" * 10_000}, {"a": None}, {f"k{i}": i for i in range(250)}]
)
def test_odd_values_of_parameters_are_taken(start, client, params):
    tracker = start()
    sweep = tracker.sweep("digits", params, {"long": "y" * 9000})
    sent(tracker)
    found = client.get_run(tracker.run_id(sweep)).data.params
    assert found == {key: str(value)[:6000] for key, value in params.items()}


def curve(client: MlflowClient, tracker: Tracker, run: str, key: str) -> list[tuple[int, float]]:
    """Return what MLflow has of a metric, in the order of the steps."""
    history = client.get_metric_history(tracker.run_id(run), key)
    return sorted((point.step, point.value) for point in history)


def test_a_point_that_mlflow_has_is_not_sent_again_be_it_of_this_driver_or_another(start, client):
    tracker = start()
    run = tracker.sweep("digits", {}, {})
    tracker.log(run, {"val/top1": 1.0, "lr": 0.5}, step=1)
    tracker.log(run, {"val/top1": 1.5, "lr": 0.5}, step=1)  # of workers that started anew
    tracker.log(run, {"val/top1": 2.0}, step=2)
    tracker.finish(run, "KILLED")
    tracker.log(run, {"val/top1": 2.5}, step=2)
    sent(tracker)
    again = start()
    again.sweep("digits", {}, {})
    for epoch in (1, 2, 3, 3):  # reported again by a trial that goes on
        again.log(run, {"val/top1": epoch + 0.25, "lr": 0.5}, step=epoch)
    again.log(run, {"val/top1": 4.0}, step=4)
    sent(again)
    assert curve(client, again, run, "val/top1") == [(1, 1.0), (2, 2.0), (3, 3.25), (4, 4.0)]
    assert curve(client, again, run, "lr") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert again.points == 4


def test_known_runs_are_gone_on_with(start, client):
    first = start()
    sweep = first.sweep("digits", {"a": 1, "odd@key": 1}, {"richkd.state": "running"})
    trial = first.run(sweep, "trial-000", {"fusion.alpha": 0.7}, {})
    first.log(trial, {"val/top1": 90.0, "bad": math.nan}, 1)
    first.finish(trial, "KILLED")
    first.finish(sweep, "KILLED")
    sent(first)

    second = start()
    assert second.run_id(trial) == first.run_id(trial)
    second.sweep("digits", {"a": 2, "odd@key": 2, "b": 3}, {"richkd.state": "running again"})
    second.run(sweep, "trial-000", {"fusion.alpha": 0.9}, {})
    new = second.run(sweep, "trial-001", {"fusion.alpha": 0.1}, {})
    second.log(trial, {"val/top1": 91.0, "bad": math.inf}, 2)
    second.finish(trial, "FINISHED")
    sent(second)

    assert len(runs(client, second)) == 3
    parent, child = client.get_run(second.run_id(sweep)), client.get_run(second.run_id(trial))
    assert parent.info.run_id == first.run_id(sweep)
    assert parent.info.status == "RUNNING"
    assert sorted(parent.data.params.values()) == ["1", "1", "3"]  # written once
    assert parent.data.tags["richkd.state"] == "running again"
    assert child.info.status == "FINISHED"
    assert child.data.tags["richkd.nonfinite"] == "2"
    history = client.get_metric_history(child.info.run_id, "val/top1")
    assert [(point.step, point.value) for point in history] == [(1, 90.0), (2, 91.0)]
    assert client.get_run(second.run_id(new)).data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_what_was_sent_and_not_noted_is_sent_again_without_harm(start, client, folder):
    first = start()
    sweep = first.sweep("digits", {"a": 1}, {})
    trial = first.run(sweep, "trial-000", {"fusion.alpha": 0.7}, {"b": 2})
    for epoch in (1, 2, 3):
        first.log(trial, {"val/top1": 90.0 + epoch}, epoch)
    first.table(trial, {"a": [1]}, "table.json")
    first.dataset(trial, "digits", "abc", "training")
    first.finish(trial, "KILLED")
    lines = (folder / "spool.jsonl").read_bytes()
    sent(first)
    known = json.loads((folder / "mlflow.json").read_text())
    assert set(known) == {"digits", "digits/trial-000"}
    for left in (known, {sweep: known[sweep]}, {}):  # a kill can come before they are written down
        (folder / "mlflow.json").write_text(json.dumps(left))
        (folder / "spool.jsonl").write_bytes(lines)
        again = sent(start())
        assert json.loads((folder / "mlflow.json").read_text()) == known
        assert len(runs(client, again)) == 2
        assert curve(client, again, trial, "val/top1") == [(1, 91.0), (2, 92.0), (3, 93.0)]
        run = client.get_run(again.run_id(trial))
        assert (run.info.status, len(run.inputs.dataset_inputs)) == ("KILLED", 1)
        assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [
            {"path": "table.json", "type": "table"}
        ]


def test_a_run_that_is_superseded_stays_and_its_key_opens_a_new_one(start, client, folder):
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    refit = tracker.run(sweep, "refit-kd-seed0", {"fusion.alpha": 0.7}, {})
    tracker.log(refit, {"val/top1": 90.0}, 1)
    tracker.finish(refit, "FINISHED")
    old = sent(tracker).run_id(refit)
    again = start()
    again.retire(refit)
    again.run(sweep, "refit-kd-seed0", {"fusion.alpha": 0.9}, {"richkd.state": "running"})
    again.log(refit, {"val/top1": 91.0}, 1)
    lines = (folder / "spool.jsonl").read_bytes()
    new = sent(again).run_id(refit)
    (folder / "spool.jsonl").write_bytes(lines)  # of a driver that was killed before it noted it
    third = sent(start())
    assert (third.run_id(refit), len(runs(client, third))) == (new, 3)
    for run_id, name, state, alpha, value in (
        (old, "refit-kd-seed0 (superseded)", "superseded", "0.7", 90.0),
        (new, "refit-kd-seed0", "running", "0.9", 91.0),
    ):
        run = client.get_run(run_id)
        assert run.info.run_name == name
        assert run.data.tags["richkd.state"] == state
        assert run.data.params == {"fusion.alpha": alpha}
        history = client.get_metric_history(run_id, "val/top1")
        assert [(point.step, point.value) for point in history] == [(1, value)]


def test_ids_that_this_mlflow_does_not_know_are_replaced(start, client, folder):
    known = {"digits": "0" * 32, "digits/trial-000": "1" * 32}
    (folder / "mlflow.json").write_text(json.dumps(known))
    tracker = start()
    trial = tracker.run(tracker.sweep("digits", {}, {}), "trial-000", {"a": 1}, {})
    sent(tracker)
    known = json.loads((folder / "mlflow.json").read_text())
    assert {run.info.run_id for run in runs(client, tracker)} == set(known.values())
    assert client.get_run(tracker.run_id(trial)).data.params == {"a": "1"}


def test_ids_are_written_down_while_the_driver_works(start, folder):
    tracker = start()
    tracker.sweep("digits", {}, {})
    wait_for((folder / "mlflow.json").exists)
    assert json.loads((folder / "mlflow.json").read_text()) == {"digits": tracker.run_id("digits")}
    sent(tracker)


def lose_first_answer(monkeypatch, method: str) -> list[dict]:
    """Let `method` of MLflow's client do its work once without its caller hearing of it; return what it is given."""
    usual, calls = getattr(MlflowClient, method), []

    def lossy(self, *args, **kwargs):
        answer = usual(self, *args, **kwargs)
        calls.append(kwargs)
        if len(calls) == 1:
            raise ConnectionResetError("the answer is lost")
        return answer

    monkeypatch.setattr(MlflowClient, method, lossy)
    return calls


def test_a_run_whose_answer_was_lost_is_not_opened_twice(start, client, monkeypatch):
    tracker = start()
    lose_first_answer(monkeypatch, "create_run")
    sweep = tracker.sweep("digits", {"a": 1}, {})
    tracker.run(sweep, "trial-000", {}, {})
    sent(tracker)
    assert len(runs(client, tracker)) == 2
    assert client.get_run(tracker.run_id(sweep)).data.params == {"a": "1"}


def test_metrics_whose_answer_was_lost_are_not_stored_twice(start, client, monkeypatch):
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    calls = lose_first_answer(monkeypatch, "log_batch")
    for epoch in range(1, 4):
        tracker.log(sweep, {"val/top1": 90.0, "bad": math.nan}, epoch)
    sent(tracker)
    steps = [point.step for call in calls for point in call.get("metrics", ())]
    assert len(calls) > 1
    assert steps == [1, 2, 3]  # not even sent twice: not every store would notice
    history = client.get_metric_history(tracker.run_id(sweep), "val/top1")
    assert [point.step for point in history] == [1, 2, 3]
    assert client.get_run(tracker.run_id(sweep)).data.tags["richkd.nonfinite"] == "3"


def break_calls(monkeypatch, times: int) -> None:
    """Let the next `times` calls of MLflow's client find a dead server."""
    left = iter(range(times))
    for method in ("log_batch", "set_terminated", "get_experiment"):
        usual = getattr(MlflowClient, method)

        def call(self, *args, usual=usual, **kwargs):
            if next(left, None) is not None:
                raise ConnectionRefusedError(111, "Connection refused")
            return usual(self, *args, **kwargs)

        monkeypatch.setattr(MlflowClient, method, call)


def wait_for(true) -> None:
    deadline = time.monotonic() + 30
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def test_a_server_that_comes_back_soon_has_missed_nothing(start, client, monkeypatch):
    monkeypatch.setattr(tracking, "FIRST_PAUSE", 0.1)
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    wait_for(lambda: tracker.run_id(sweep))
    break_calls(monkeypatch, 4)  # two attempts, and the question after each
    tracker.log(sweep, {"val/top1": 90.0}, 1)
    tracker.finish(sweep, "FINISHED")
    sent(tracker)
    run = client.get_run(tracker.run_id(sweep))
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"val/top1": 90.0})
    assert tracker.problem is None


def test_one_call_that_mlflow_refuses_is_noted_and_the_others_go_on(
    start, client, tmp_path, folder, monkeypatch
):
    monkeypatch.setattr(tracking, "RETRIES", (0.1, 0.1, 0.0))
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    tracker.artifacts(sweep, tmp_path / "missing", "checkpoint")
    tracker.table(sweep, {"a": [1], "b": []}, "table.json")
    tracker.log(sweep, {"val/top1": 90.0}, 1)
    tracker.finish(sweep, "FINISHED")
    assert not tracker.close(60)
    assert "artifacts" in tracker.problem  # the first
    assert not tracker.waits
    refused = [json.loads(line) for line in lines_of(folder) if b'"refused"' in line]
    assert [each["refused"] for each in refused] == ["artifacts", "table"]
    assert "there is no folder" in refused[0]["why"]
    assert "\n" not in tracker.problem
    run = client.get_run(tracker.run_id(sweep))
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"val/top1": 90.0})


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "spool.jsonl").read_bytes().splitlines()


def test_a_deleted_experiment_is_told_with_what_to_do(start, client, request, monkeypatch):
    monkeypatch.setattr(tracking, "PATIENCE", 1.0)
    client.delete_experiment(client.create_experiment(request.node.name))
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    assert not tracker.close(60)
    assert "mlflow experiments restore --experiment-id" in tracker.problem
    assert tracker.run_id(sweep) is None


class Broken(http.server.BaseHTTPRequestHandler):
    """Answers everything by 500."""

    def do_GET(self) -> None:
        """Fail."""
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(params=["closed", "hanging", "500"])
def dead(request):
    """The port of a server that is no use."""
    if request.param == "500":
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            thread.start()
            yield server.server_port
            server.shutdown()
            thread.join()
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if request.param == "hanging":
            listener.listen(50)
        yield listener.getsockname()[1]


def test_a_dead_server_raises_nothing_delays_nobody_and_is_told_without_credentials(
    dead, tmp_path, folder
):
    tracker = Tracker(folder, f"http://bob:hunter2@127.0.0.1:{dead}")
    slowest = 0.0

    def call(method, *arguments):
        nonlocal slowest
        began = time.perf_counter()
        answer = method(*arguments)
        slowest = max(slowest, time.perf_counter() - began)
        return answer

    call(tracker.start)
    sweep = call(tracker.sweep, "digits", {"a": 1}, {"b": 2})
    for number in range(50):
        trial = call(tracker.run, sweep, f"trial-{number:03d}", {"a": 1}, {"b": 2})
        call(tracker.log, trial, {"val/top1": 90.0, "bad": math.nan}, 1)
        call(tracker.tag, trial, {"c": 3})
        call(tracker.text, trial, "text", "file.txt")
        call(tracker.artifacts, trial, tmp_path, "best")
        call(tracker.table, trial, {"a": [1]}, "table.json")
        call(tracker.dataset, trial, "digits", "abc", "training")
        call(tracker.finish, trial, "FINISHED")
        assert call(tracker.run_id, trial) is None
        assert call(tracker.links, sweep, [trial]) == {}
    assert slowest < AT_ONCE
    began = time.monotonic()
    assert not tracker.close(1.5)
    assert time.monotonic() - began < 2
    assert f"127.0.0.1:{dead}" in tracker.problem
    assert "\n" not in tracker.problem
    for secret in ("bob", "hunter2"):
        assert secret not in tracker.problem
        assert secret not in tracker.public_uri
        assert secret.encode() not in (folder / "spool.jsonl").read_bytes()
    assert f"; 401 operations wait in {folder}/spool.jsonl; send them: " in tracker.problem
    began = time.monotonic()
    assert not tracker.close(5)  # and the second time it waits for nothing
    assert time.monotonic() - began < 0.5


def test_known_ids_outlive_a_dead_server(dead, folder):
    known = {"digits": "0" * 32}
    (folder / "mlflow.json").write_text(json.dumps(known))
    tracker = Tracker(folder, f"http://127.0.0.1:{dead}")
    tracker.start()
    tracker.sweep("digits", {}, {})
    tracker.close(0.1)
    assert tracker.run_id("digits") == "0" * 32
    assert json.loads((folder / "mlflow.json").read_text()) == known


def test_a_tracker_that_was_not_started_closes_and_one_closed_takes_calls(start, folder):
    tracker = Tracker(folder, "http://127.0.0.1:1")
    tracker.finish("digits", "FAILED")  # of a sweep that could not begin
    assert tracker.close(1)
    assert list(folder.iterdir()) == []
    tracker = sent(start())
    tracker.log(tracker.sweep("digits", {}, {}), {"a": 1.0}, 1)
    assert tracker.close(1)


@pytest.mark.parametrize(
    "uri", ["mlruns", "./mlruns", "/m/mlruns", "file:./mlruns", "file:///m", "C:\\runs"]
)
def test_a_folder_is_refused_with_what_to_use(uri, tmp_path):
    with pytest.raises(ConfigError, match="use sqlite:///mlflow.db or the address of a server"):
        Tracker(tmp_path, uri)


@pytest.mark.parametrize(
    "uri", ["sqlite://", "sqlite:///", "sqlite:///:memory:", "sqlite:mlflow.db"]
)
def test_a_database_that_is_no_file_is_refused(uri, tmp_path):
    with pytest.raises(ConfigError, match="must name a file"):
        Tracker(tmp_path, uri)


def test_the_address_is_what_was_given_or_the_variable_or_this_folders_database(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert Tracker.address(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert Tracker.address("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert Tracker.address(f"sqlite:///{tmp_path}/c.db") == f"sqlite:///{tmp_path}/c.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert Tracker.address(None) == "http://mlflow:5000"
    assert Tracker.address("databricks") == "databricks"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    with pytest.raises(ConfigError):
        Tracker.address(None)
    with pytest.raises(ConfigError, match="must begin with one of sqlite, http"):
        Tracker.address("foo://x")


@pytest.mark.parametrize(
    ("uri", "public"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("https://bob:hunter2@mlflow/x", "https://***@mlflow/x"),
        ("http://hunter2@mlflow", "http://***@mlflow"),
        ("postgresql://bob:hun@ter2@db/mlflow", "postgresql://***@db/mlflow"),
        ("postgresql://bob:hun/ter2@db/mlflow", "postgresql://***@db/mlflow"),
        ("sqlite:////home/bob@work/mlflow.db", "sqlite:////home/bob@work/mlflow.db"),
    ],
)
def test_credentials_are_never_shown(uri, public, tmp_path):
    assert Tracker(tmp_path, uri).public_uri == public


def test_links_open_the_runs_the_sweep_and_the_comparison(start, client, database, monkeypatch):
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    trials = [tracker.run(sweep, f"trial-{k}", {}, {}) for k in range(2)]
    sent(tracker)
    links = tracker.links(sweep, [*trials, "digits/unknown"])
    experiment, parent = tracker.experiment_id, tracker.run_id(sweep)
    assert links["command"] == f"mlflow ui --backend-store-uri {database}"
    assert links["runs"].startswith(f"http://127.0.0.1:5000/#/experiments/{experiment}/runs?")
    assert links["sweep"].startswith(
        f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/{parent}?"
    )
    path, _, query = links["compare"].partition("?")
    assert path == "http://127.0.0.1:5000/#/compare-runs"
    values = dict(part.split("=") for part in query.split("&"))
    assert json.loads(unquote(values["runs"])) == [tracker.run_id(trial) for trial in trials]
    assert json.loads(unquote(values["experiments"])) == [experiment]
    assert query.startswith("runs=")  # the page finds nothing behind another key
    assert "compare" not in tracker.links(sweep, [])
    monkeypatch.chdir(Path(database.removeprefix("sqlite:///")).parent)
    assert tracker.links(sweep, trials)["command"] == "mlflow ui"


def views(client: MlflowClient, tracker: Tracker) -> dict[str, str]:
    """Return the views that an experiment keeps."""
    tags = client.get_experiment(tracker.experiment_id).tags
    return {k.removeprefix(VIEW): v for k, v in tags.items() if k.startswith(VIEW)}


def test_a_view_ranks_the_children_and_another_shows_all_runs_until_a_person_changes_it(
    start, client
):
    tracker = start()
    sweep = tracker.sweep("digits", {}, {})
    columns = {"metrics": ["val/top1"], "params": ["fusion.alpha", "odd@key"]}
    tracker.view(sweep, columns, "val/top1", {"params": ["student.name"]})
    sent(tracker)
    parent, found = tracker.run_id(sweep), views(client, tracker)
    below = ["metrics.`val/top1`", "params.`fusion.alpha`", f"params.`{names.key('odd@key')}`"]
    ranked = json.loads(found[parent])
    assert ranked["selectedColumns"] == below
    assert (ranked["orderByKey"], ranked["orderByAsc"]) == ("metrics.`val/top1`", False)
    assert ranked["searchFilter"] == f"tags.mlflow.parentRunId = '{parent}'"
    assert len(client.search_runs([tracker.experiment_id], ranked["searchFilter"])) == 0
    named = json.loads(found["richkd"])
    assert json.loads(named["state"])["selectedColumns"] == ["params.`student.name`", *below]
    links = tracker.links(sweep, [])
    assert links["ranking"].endswith(f"&viewStateShareKey={parent}")
    assert links["runs"].endswith("&viewStateShareKey=richkd")

    # another sweep has other columns; those that a person has chosen stay
    for changed, expected in ((False, ["metrics.`m`"]), (True, ["params.`student.name`", *below])):
        text = json.dumps(named | {"updatedAt": named["createdAt"] + changed})
        client.set_experiment_tag(tracker.experiment_id, f"{VIEW}richkd", text)
        again = start()
        again.view(again.sweep("digits", {}, {}), {"metrics": ["m"]}, "m", {})
        sent(again)
        now = views(client, again)
        assert json.loads(json.loads(now["richkd"])["state"])["selectedColumns"] == expected
        assert json.loads(now[parent])["selectedColumns"] == ["metrics.`m`"]


def test_links_to_a_server_need_no_command_and_hold_no_credentials(tmp_path):
    (tmp_path / "mlflow.json").write_text('{"digits": "abc"}')
    tracker = Tracker(tmp_path, "http://bob:hunter2@mlflow:5000/")
    assert tracker.links("digits", []) == {}
    tracker._store.experiment_id = "7"
    links = tracker.links("digits", ["digits"])
    assert set(links) == {"runs", "sweep", "compare"}
    assert links["sweep"].startswith("http://***@mlflow:5000/#/experiments/7/runs/abc")
    assert not any("hunter2" in link for link in links.values())


def test_the_command_can_be_pasted_into_a_shell(tmp_path):
    tracker = Tracker(tmp_path, f"sqlite:///{tmp_path}/my runs/mlflow.db")
    command = tracker.links("digits", [])["command"]
    assert command == f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/my runs/mlflow.db'"


def test_a_run_id_in_the_environment_is_not_written_to(start, client, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "f" * 32)
    tracker = start()
    tracker.sweep("digits", {}, {})
    sent(tracker)
    assert len(runs(client, tracker)) == 1
    assert "MLFLOW_RUN_ID" not in os.environ


def test_credentials_in_an_error_are_not_passed_on(start, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("x" * 275 + " http://bob:hunter2-and-more@mlflow:5000\nsecond line")

    monkeypatch.setattr(MlflowClient, "set_terminated", refuse)
    tracker = start()
    tracker.finish(tracker.sweep("digits", {}, {}), "FINISHED")
    assert not tracker.close(60)
    assert "ValueError: xxx" in tracker.problem
    assert "hunter2" not in tracker.problem
    assert "second line" not in tracker.problem
