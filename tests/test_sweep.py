"""Real sweeps on a real local Ray, small: what they leave behind, and how they go on."""

import json
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from urllib.parse import unquote

import optuna
import pytest
import torch
from mlflow.tracking import MlflowClient
from small import SMALL, command

from richkd import checkpoint, load_student
from richkd.data import load
from richkd.errors import ConfigError, CorruptError, RichkdError
from richkd.evaluate import accuracy
from richkd.files import read_json, write_json
from richkd.layers import Layers, digest, from_dict, read, read_layer
from tune import launch as sweeps
from tune.best import best, find_sweep
from tune.tracking import Tracker

METHODS = ("ce", "kd", "kd-tuned", "richkd-l-paper", "richkd-l")


def children(client: MlflowClient, answer: dict) -> dict:
    parent = client.get_run(answer["mlflow"]["run_id"])
    runs = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    return {run.info.run_name: run for run in runs}


def test_the_answer_has_what_it_promises(swept):
    answer, _ = swept
    assert set(answer) >= {"sweep", "trials", "failed", "best", "summary", "mlflow", "seconds"}
    assert (answer["trials"], answer["failed"]) == (8, 0)
    assert set(answer["best"]) >= {"trial", "val_top1", "params", "checkpoint"}
    for name in ("teacher", "clip", "fused"):
        assert 0 < answer["summary"][name]["top1"] <= 100
    for name in ("ce", "kd", "kd_tuned", "richkd_paper", "richkd"):
        assert answer["summary"][name]["n"] == 2
    assert set(answer["summary"]["difference"]) >= {"mean", "se", "wins"}
    json.dumps(answer, allow_nan=False)


def test_mlflow_holds_the_whole_tree(swept):
    answer, client = swept
    parent = client.get_run(answer["mlflow"]["run_id"])
    assert parent.info.run_name == "small"
    assert parent.info.status == "FINISHED"
    assert client.get_experiment(parent.info.experiment_id).name == "richkd"
    found = children(client, answer)
    trials = [f"trial-{k:03d}" for k in range(4)] + [f"trial-kd-{k:03d}" for k in range(4)]
    refits = [f"refit-{method}-seed{seed}" for method in METHODS for seed in range(2)]
    assert sorted(found) == sorted(trials + refits)
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_children_carry_only_what_was_searched(swept):
    answer, client = swept
    found = children(client, answer)
    searched = {"fusion.alpha", "loss.temperature", "loss.logit", "clip.prompts"}
    assert set(found["trial-000"].data.params) == searched
    assert set(found["trial-kd-000"].data.params) == searched - {"fusion.alpha", "clip.prompts"}
    constants = client.get_run(answer["mlflow"]["run_id"]).data.params
    assert constants["student.name"] == "cnn8"
    assert not searched & set(constants)
    # T is relative in what is searched, and as printed where it was printed
    assert constants["loss.temperature_of"] == "task"
    tags = {found[f"trial-00{k}"].data.tags["richkd.loss.temperature_of"] for k in (0, 1)}
    assert tags == {"fused"}
    assert found["trial-002"].data.tags["richkd.loss.temperature_of"] == "task"


def test_the_papers_setting_is_the_first_trial_and_plain_distillation_the_second(swept):
    answer, client = swept
    found = children(client, answer)
    first, second = (found[f"trial-00{k}"].data.params for k in (0, 1))
    assert (first["fusion.alpha"], first["loss.temperature"], first["loss.logit"]) == (
        "0.7",
        "3.0",
        "3.0",
    )
    assert (second["fusion.alpha"], second["loss.temperature"], second["loss.logit"]) == (
        "1.0",
        "3.0",
        "3.0",
    )


def test_every_run_in_mlflow_has_its_config_and_each_epoch_once(swept, tmp_path):
    answer, client = swept
    for name, run in children(client, answer).items():
        kind, _, rest = name.partition("-")
        folder = Path(answer["sweep"]) / {"trial": "trials", "refit": "refits"}[kind] / rest
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        history = client.get_metric_history(run.info.run_id, "val/top1")
        assert [(m.step, m.value) for m in history] == [(r["epoch"], r["val/top1"]) for r in rows]
        assert run.data.tags["richkd.digest"] == digest(from_config(folder))
        text = Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path)))
        assert text.read_text() == (folder / "config.yaml").read_text()


def from_config(folder: Path):
    from richkd.layers import build

    return build(read_layer(folder / "config.yaml"))


def test_only_refits_read_the_test_rows(swept):
    answer, client = swept
    for name, run in children(client, answer).items():
        tested = [key for key in run.data.metrics if key.startswith("test/")]
        assert bool(tested) == name.startswith("refit-"), name
        for key in tested:
            assert len(client.get_metric_history(run.info.run_id, key)) == 1


def test_pruned_trials_are_pruned_in_the_study_and_never_the_best(swept):
    answer, _ = swept
    studies = f"sqlite:///{Path(answer['sweep']) / 'study.db'}"
    for name in ("richkd", "kd"):
        trials = optuna.load_study(study_name=name, storage=studies).trials
        assert len(trials) == 4
        for trial in trials:
            folder = (
                Path(answer["sweep"])
                / "trials"
                / (f"{'' if name == 'richkd' else 'kd-'}{trial.number:03d}")
            )
            epochs = len((folder / "metrics.jsonl").read_text().splitlines())
            assert (trial.state.name == "COMPLETE") == (epochs == 3)
            assert list(trial.intermediate_values) == list(range(1, epochs + 1))
    best_trial = optuna.load_study(study_name="richkd", storage=studies).best_value
    assert answer["best"]["val_top1"] == best_trial


def test_the_summary_and_the_best_checkpoint_are_artifacts(swept, tmp_path, monkeypatch):
    answer, client = swept
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)  # `load_table` asks nobody else
    run_id = answer["mlflow"]["run_id"]
    names = {item.path for item in client.list_artifacts(run_id)}
    assert names >= {
        "config.yaml",
        "environment.json",
        "summary.json",
        "summary_table.json",
        "best",
    }
    experiment = client.get_run(run_id).info.experiment_id
    table = client.load_table(experiment, "summary_table.json", [run_id])
    assert len(table) == 8
    copy = Path(client.download_artifacts(run_id, "best", str(tmp_path)))
    ours = load_student(answer["sweep"]).state_dict()
    theirs = load_student(copy).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_ui_shows_the_summary_and_links_the_best_trials(swept):
    answer, client = swept
    note = client.get_run(answer["mlflow"]["run_id"]).data.tags["mlflow.note.content"]
    top1 = answer["summary"]["richkd"]
    assert f"| richkd-l, as found | {top1['mean']:.2f} ± {top1['sd']:.2f} |" in note
    study = optuna.load_study(
        study_name="richkd", storage=f"sqlite:///{Path(answer['sweep']) / 'study.db'}"
    )
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    found = children(client, answer)
    linked = re.findall("[0-9a-f]{32}", unquote(answer["mlflow"]["links"]["compare"]))
    assert sorted(linked) == sorted(found[f"trial-00{k}"].info.run_id for k in range(4))
    best_first = sorted(complete, key=lambda t: (-t.value, t.user_attrs["val_loss"]))
    names = [f"trial-{t.number:03d}" for t in best_first]
    assert linked[: len(names)] == [found[name].info.run_id for name in names]


def test_code_packages_data_and_teachers_are_recorded(swept, tmp_path):
    answer, client = swept
    run = client.get_run(answer["mlflow"]["run_id"])
    environment = json.loads(
        Path(
            client.download_artifacts(run.info.run_id, "environment.json", str(tmp_path))
        ).read_text()
    )
    assert environment["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    refit = children(client, answer)["refit-richkd-l-paper-seed1"]
    record = read_json(Path(answer["sweep"]) / "refits" / "richkd-l-paper-seed1" / "run.json")
    assert record["teachers"] == {
        name: refit.data.tags[f"richkd.{name}"] for name in ("teacher", "clip")
    }
    inputs = {entry.dataset.name for entry in run.inputs.dataset_inputs}
    assert inputs == {"digits"}


def test_the_best_is_restored_and_equal(swept, tmp_path):
    answer, _ = swept
    found = best(Path(answer["sweep"]), tmp_path / "copy")
    assert found["verified"] is True
    assert found["found"] == found["recorded"]
    student = load_student(tmp_path / "copy")
    config = from_dict(read_json(tmp_path / "copy" / "manifest.json")["meta"]["config"])
    test = load(config.data).test
    with torch.inference_mode():
        logits = student(torch.from_numpy(test.pixels).permute(0, 3, 1, 2))
    assert accuracy(logits, torch.from_numpy(test.labels))["top1"] == found["recorded"]["test_top1"]


def test_a_damaged_best_is_not_handed_over(swept, tmp_path):
    answer, _ = swept
    copy = tmp_path / "small"
    shutil.copytree(answer["sweep"], copy)
    path = (
        copy
        / "refits"
        / Path(answer["best"]["checkpoint"]).parent.name
        / "best"
        / "weights.safetensors"
    )
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="weights.safetensors"):
        best(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "summary",
    [
        [],
        {"best": {}},
        {"best": {"checkpoint": "../../elsewhere"}},
        {"best": {"checkpoint": "refits/richkd-l-seed0/best", "recorded": {"val_top1": 1}}},
    ],
)
def test_a_summary_that_is_not_ours_is_refused(copied, summary):
    (copied / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(CorruptError, match="summary.json"):
        best(copied)


def test_only_the_files_of_a_checkpoint_are_handed_over(copied, tmp_path):
    source = copied / read_json(copied / "summary.json")["best"]["checkpoint"]
    (source / "extra.py").write_text("print()")
    best(copied, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(checkpoint.FILES)


def test_a_student_of_other_weights_is_refused(copied):
    source = copied / read_json(copied / "summary.json")["best"]["checkpoint"]
    saved = checkpoint.load(source)
    for meta in ({}, saved.meta | {"config": {}}, saved.meta | {"names": ["a", "b"]}):
        checkpoint.save(source, saved.weights, saved.state, meta)
        with pytest.raises(ConfigError, match="must be the checkpoint of a student"):
            load_student(copied)


@pytest.mark.parametrize("damage", ["gone", "cut", "overwritten"])
def test_a_sweep_does_not_go_on_without_its_study(cluster, copied, damage):
    (copied / "summary.json").unlink()
    study = copied / "study.db"
    content = study.read_bytes()
    study.unlink()
    if damage != "gone":
        study.write_bytes(content[:5000] if damage == "cut" else b"x" * 200 + content[200:])
    with pytest.raises(CorruptError, match=r"study.db .*start a new sweep"):
        sweeps.go_on(copied)


@pytest.mark.parametrize("record", [[], {}, {"layers": [[1]], "tracking": ""}])
def test_a_sweep_whose_record_is_not_ours_is_refused_and_passed_over(swept, copied, record):
    (copied / "summary.json").unlink()
    (copied / "sweep.json").write_text(json.dumps(record))
    with pytest.raises(CorruptError, match="sweep.json"):
        sweeps.go_on(copied)
    whole = copied.with_name("whole")
    shutil.copytree(swept[0]["sweep"], whole)
    if "layers" not in record:
        with pytest.warns(UserWarning, match="passed over"):
            assert find_sweep(None, copied.parent) == whole


def test_without_a_name_the_best_is_that_of_the_latest_finished_sweep(swept, copied):
    whole = Path(shutil.copytree(swept[0]["sweep"], copied.with_name("whole")))
    (copied / "summary.json").unlink()
    write_json(copied / "sweep.json", read_json(copied / "sweep.json") | {"started": "9"})
    assert find_sweep(None, copied.parent) == copied
    assert find_sweep(None, copied.parent, finished=True) == whole


def test_a_sweep_is_found_by_name_folder_run_id_and_as_the_latest(swept):
    answer, _ = swept
    folder = Path(answer["sweep"])
    for wanted in ("small", str(folder), answer["mlflow"]["run_id"], None):
        assert find_sweep(wanted, folder.parent) == folder
    with pytest.raises(ConfigError, match="small"):
        find_sweep("smal", folder.parent)


def test_a_finished_sweep_resumed_runs_nothing_and_answers_the_same(swept):
    answer, client = swept
    folder = Path(answer["sweep"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}
    again = sweeps.go_on(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")} == before
    assert again["summary"] == answer["summary"]
    assert again["best"] == answer["best"]
    assert len(children(client, again)) == 18


def test_a_name_is_not_used_twice(swept):
    answer, _ = swept
    folder = Path(answer["sweep"])
    layers = Layers.from_list(read_json(folder / "sweep.json")["layers"])
    with pytest.raises(ConfigError, match="small exists already"):
        sweeps.start(layers)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("signum", "storage", "moment"),
    [
        (signal.SIGINT, "runs", "trials/*/metrics.jsonl"),
        (signal.SIGTERM, "other place", "study.db"),  # Ray is starting
    ],
)
def test_a_signal_stops_a_sweep_and_the_line_that_it_prints_finishes_it(
    miniature, cache_root, tmp_path, signum, storage, moment
):
    words = [*SMALL, "train.epochs=8", "sweep.trials=3", "refit.seeds=1", "sweep.name=cut"]
    words += [f"cache={cache_root}", f"storage={storage}"]
    process = command("sweep", *words, cwd=tmp_path)
    folder = tmp_path / storage / "cut"
    deadline = time.monotonic() + 120
    while not list(folder.glob(moment)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signum)
    _, told = process.communicate(timeout=90)
    assert process.returncode == 128 + signum, told
    assert "Traceback" not in told
    assert not (folder / "summary.json").exists()
    line = shlex.split(told.splitlines()[-1].partition("go on with: python -m tune ")[2])
    process = command(*line, "--json", cwd=tmp_path)
    out, told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    answer = json.loads(out.splitlines()[-1])
    assert answer["trials"] == 6
    assert answer["summary"]["richkd"]["n"] == 1
    for path in folder.rglob("metrics.jsonl"):  # no epoch twice
        epochs = [json.loads(line)["epoch"] for line in path.read_text().splitlines()]
        assert epochs == list(range(1, len(epochs) + 1))


def test_a_password_is_handed_on_and_written_down_nowhere(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        sweeps, "carry_out", lambda _, asked, tracking, **__: seen.update({tracking: asked})
    )
    uri = "http://me:secret@host:5"
    sweeps.start(read([f"tracking.uri={uri}", f"storage={tmp_path}"]))
    assert list(seen) == [uri]
    assert "secret" not in json.dumps(seen[uri])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Tracker.recall(seen[uri]["tracking"]) == uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@other:5")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI must give the password") as caught:
        Tracker.recall(seen[uri]["tracking"])
    assert "secret" not in str(caught.value)


BAD = {
    "sweep.space.loss.temprature={uniform: [1, 2]}": ["loss.temprature", "loss.temperature"],
    "sweep.space.fusion.alpha={uniform: [0, 2]}": ["fusion.alpha", "2"],
    "sweep.space.fusion.alpha={unifrom: [0, 1]}": ["fusion.alpha", "uniform"],
    "sweep.space.clip.prompts={choice: [digits, digit]}": ["clip.prompts", "digit"],
    "sweep.trials=0": ["sweep.trials", "0"],
    "sweep.space={}": ["sweep.space is empty", "richkd distill"],
    "sweep.space.student.name={choice: [cnn8, cnn9]}": ["student.name", "cnn9"],
    "clip.prompts=rich12": ["clip.prompts", "does not know", "blurry"],
    "storage=/proc/version/runs": ["storage", "/proc/version"],
    "sweep.name=a/b": ["sweep.name", "a/b"],
    "sweep.name=a=b": ["sweep.name", "a=b"],
    "sweep.name=-a": ["sweep.name", "-a"],
    "sweep.settings.fusion.alpha=0.5": ["method.name=kd", "fusion.alpha"],
    "sweep.settings.train.epochs=5": ["sweep.settings", "train.epochs"],
    "resources.cpus_per_worker=1000": ["resources.cpus_per_worker", "1000"],
    "student.name=cnn9": ["student.name", "cnn9", "cnn8"],
    "method.name=kd": ["method.name", "richkd-l"],
    "tracking.uri=mlruns": ["tracking.uri", "sqlite"],
}


@pytest.mark.parametrize("override", BAD)
def test_a_bad_sweep_is_refused_in_one_line_before_anything_runs(
    override, miniature, cache_root, tmp_path
):
    words = [*SMALL, f"cache={cache_root}", f"storage={tmp_path}", override]
    with pytest.raises(RichkdError) as caught:
        sweeps.start(read(words))
    assert caught.value.exit_code == 2
    for word in BAD[override]:
        assert word in str(caught.value)
    assert not list(tmp_path.iterdir())  # nothing that would be in the way of the next try


def test_who_looks_for_a_sweep_is_told_what_there_is_instead(tmp_path):
    for folder, record in (("first", "sweep.json"), ("kd3", "run.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / record).write_text("{}")
    with pytest.raises(ConfigError, match="'frist'.*did you mean first"):
        find_sweep("frist", tmp_path)
    with pytest.raises(ConfigError, match="kd3 is a single run.*richkd evaluate kd3"):
        find_sweep("kd3", tmp_path)
