"""Who becomes champion in MLflow's registry, by its own client, and what is loaded from there without our code."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from scipy import stats

from richkd import checkpoint, load_student
from richkd.command import main
from richkd.config import Data
from richkd.errors import ConfigError, RichkdError
from richkd.files import read_json, write_json
from tune.__main__ import ABOUT, VERBS
from tune.promote import Entry, gap, judge, label, promote
from tune.tracking import ENVIRONMENT

MODEL = "richkd-cnn8-digits"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Leave no variable of ours behind."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def entry(*val: float, seeds: int = 0) -> Entry:
    """Return an entry with these accuracies, of seeds from `seeds` on."""
    by_seed = dict(enumerate(val, seeds))
    return Entry(val=by_seed, test=by_seed, data="data", rows="rows")


def test_a_difference_is_paired_where_seeds_are_common_and_welchs_elsewhere():
    rng = np.random.default_rng(0)
    values, others = rng.normal(93, 1, 8), rng.normal(92, 2, 5)
    a, b = entry(*values), entry(*others)
    found = gap(a.val, b.val)
    expected = stats.ttest_rel(values[:5], others).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert found["pairs"] == 5
    found = gap(a.val, entry(*others, seeds=7).val)  # a single one is common
    expected = stats.ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert found["pairs"] == 0


def test_without_spread_there_is_no_interval_and_equal_accuracies_have_one_of_no_width():
    assert gap({0: 93.0}, {1: 92.0}) is None
    assert gap({0: 93.0}, {0: 92.0}) is None
    same = gap({0: 93.0, 1: 93.0}, {2: 92.5, 3: 92.5})
    assert (same["mean"], same["low"], same["high"]) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(("champion", "first"), [(8, 0), (8, 8), (1, 0), (1, 8)])
def test_a_student_that_is_no_better_replaces_the_champion_once_in_forty_times(champion, first):
    rng = np.random.default_rng(1)
    wins = sum(
        judge(entry(*rng.normal(90, 2, 5)), entry(*rng.normal(90, 2, champion), seeds=first)).wins
        for _ in range(2000)
    )
    assert wins / 2000 == pytest.approx(0.025, abs=0.012)


def test_what_cannot_be_compared_does_not_replace_the_champion():
    better, champion = entry(99, 98.9, 98.8), entry(50, 50.1, 50.2)
    assert judge(better, champion).wins
    assert not judge(better, None).wins
    assert not judge(better, replace(champion, data="other")).wins
    assert not judge(better, replace(champion, rows="other")).wins
    assert not judge(entry(99), champion).wins
    assert not judge(champion, better).wins


def test_tags_bring_an_entry_back_and_those_of_a_stranger_none():
    one = entry(93.25, 92.5)
    tags = one.to_tags()
    assert Entry.from_tags(tags) == one
    assert Entry.from_tags({}) is None
    for key, value in (
        ("richkd.val_top1", "{}"),
        ("richkd.val_top1", '{"0": "NaN"}'),
        ("richkd.val_top1", '{"a": 1}'),
        ("richkd.val_top1", "[1]"),
        ("richkd.val_top1", '{"0": null}'),
        ("richkd.test_top1", "<script>"),
    ):
        assert Entry.from_tags(tags | {key: value}) is None, (key, value)


def test_data_are_called_by_their_source_or_by_their_own_folder_or_file(monkeypatch, tmp_path):
    assert label(Data()) == "digits"
    assert label(Data(source="folder", path="/data/cats/")) == "cats"
    assert label(Data(source="arrays", path="deep/cats.v2.npz")) == "cats.v2"
    monkeypatch.chdir(tmp_path)
    assert label(Data(source="folder", path=".")) == tmp_path.name
    assert label(Data(source="folder", path="..")) == tmp_path.parent.name


def choose(folder, seed: int) -> None:
    """Let the summary of a sweep name the refit of another seed, as if another sweep had ended with it."""
    summary = read_json(folder / "summary.json")
    best = summary["best"]
    best["checkpoint"] = f"refits/richkd-l-seed{seed}/best"
    metrics = read_json(folder / "refits" / f"richkd-l-seed{seed}" / "run.json")["metrics"]
    best["recorded"] = {"val_top1": metrics["best_val_top1"], "test_top1": metrics["test/top1"]}
    write_json(folder / "summary.json", summary)


def aliases(client: MlflowClient) -> dict[str, int]:
    found = client.get_registered_model(MODEL).aliases
    return {alias: int(version) for alias, version in found.items()}


LOADS = """
import json, sys
for name in ("richkd", "tune"):
    sys.modules[name] = None  # an import of it raises
import mlflow, numpy as np, torch
images = np.load(sys.argv[1])
model = mlflow.pytorch.load_model(sys.argv[2])
for count in (1, 2, 7):
    np.save(sys.argv[3] + f"/{count}.npy", model(torch.from_numpy(images[:count])).detach().numpy())
np.save(sys.argv[3] + "/served.npy", mlflow.pyfunc.load_model(sys.argv[2]).predict(images))
"""


def test_the_registrys_rule_both_ways_and_what_is_loaded_from_it(
    copied, tmp_path, monkeypatch, capfd
):
    uri = f"sqlite:///{copied.parent.parent / 'mlflow.db'}"
    client, seed = MlflowClient(uri), read_json(copied / "summary.json")["best"]["seed"]

    # nothing is written by a look
    answer = promote(copied, dry_run=True)
    assert (answer["champion"], answer["version"], answer["link"]) == (True, None, None)
    assert client.search_registered_models() == []

    # the first is the champion, and two at once are one
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(promote, [copied, copied]))
    assert sorted(answer["new"] for answer in answers) == [False, True]
    assert all(answer["champion"] for answer in answers)
    assert aliases(client) == {"champion": 1}
    assert len(client.search_model_versions(f"name = '{MODEL}'")) == 1
    first = client.get_model_version(MODEL, "1")
    assert first.tags["richkd.sweep"] == "small"
    assert first.tags["richkd.run"] == first.run_id == read_json(copied / "mlflow.json")["small"]
    refits = [read_json(copied / "refits" / f"richkd-l-seed{k}" / "run.json") for k in (0, 1)]
    val = [refit["metrics"]["best_val_top1"] for refit in refits]
    assert json.loads(first.tags["richkd.val_top1"]) == {"0": val[0], "1": val[1]}
    test = [refit["metrics"]["test/top1"] for refit in refits]
    assert (
        first.tags["richkd.test"]
        == f"{np.mean(test):.2f} ± {np.std(test, ddof=1):.2f} over 2 seeds"
    )
    assert first.tags["richkd.data"] == refits[0]["data"]

    # another checkpoint that is no better is the challenger
    choose(copied, 1 - seed)
    words = ["promote", str(copied), "--json"]
    assert main("python -m tune", ABOUT, VERBS, words) == 0
    out, _ = capfd.readouterr()
    answer = json.loads(out.splitlines()[-1])
    assert (answer["champion"], answer["version"], answer["before"]) == (False, "2", "1")
    assert "does not beat version 1: +0.00" in answer["verdict"]
    assert aliases(client) == {"champion": 1, "challenger": 2}

    # and the champion once it beats it by more than seeds differ, not before
    for lower, wins in ((0.5, False), (20.0, True)):
        noisy = (
            {0: val[0] - lower - 2, 1: val[1] - lower + 2}
            if not wins
            else {0: val[0] - lower, 1: val[1] - lower - 1}
        )
        client.set_model_version_tag(MODEL, "1", "richkd.val_top1", json.dumps(noisy))
        answer = promote(copied)
        assert (answer["champion"], answer["new"]) == (wins, False)
    assert "beats version 1: +20.50" in answer["verdict"]
    assert aliases(client) == {"champion": 2}
    assert promote(copied)["verdict"] == "is the champion already"
    assert client.get_model_version(MODEL, "2").description.endswith(answer["verdict"])

    # it takes any number of images, gives the student's logits, and needs none of our code
    student = load_student(copied)
    shape = (7, student.channels, *student.size)
    images = np.random.default_rng(5).integers(0, 256, shape, np.uint8)
    np.save(tmp_path / "images.npy", images)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    subprocess.run(
        [sys.executable, "-I", "-c", LOADS]
        + [str(tmp_path / "images.npy"), f"models:/{MODEL}@champion", str(tmp_path)],
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    logits = student(torch.from_numpy(images)).numpy()
    for count in (1, 2, 7):
        np.testing.assert_allclose(np.load(tmp_path / f"{count}.npy"), logits[:count], atol=1e-4)
    np.testing.assert_allclose(np.load(tmp_path / "served.npy"), logits, atol=1e-4)

    # the signature, the example and the checkpoint lie with it
    from mlflow.artifacts import download_artifacts
    from mlflow.models import Model

    place = download_artifacts(f"models:/{MODEL}/2", dst_path=str(tmp_path))
    card = Model.load(place)
    (takes,), (gives,) = card.signature.inputs.inputs, card.signature.outputs.inputs
    assert (takes.type, takes.shape) == (np.dtype("uint8"), (-1, *shape[1:]))
    assert (gives.type, gives.shape) == (np.dtype("float32"), (-1, 10))
    assert np.asarray(card.load_input_example(place)).shape == (2, *shape[1:])
    assert card.metadata["names"] == list(student.names)
    whole = checkpoint.load(tmp_path / "extra_files")
    assert whole.sha256 == client.get_model_version(MODEL, "2").tags["richkd.checkpoint"]


def test_a_checkpoint_that_does_not_reproduce_its_accuracy_is_not_promoted(copied):
    summary = read_json(copied / "summary.json")
    summary["best"]["recorded"]["val_top1"] += 1
    write_json(copied / "summary.json", summary)
    with pytest.raises(RichkdError, match="nothing is promoted"):
        promote(copied)


def test_a_sweep_of_which_mlflow_has_not_heard_is_told_how_to_send_it(copied):
    (copied / "mlflow.json").unlink()
    with pytest.raises(ConfigError, match="python -m tune sync"):
        promote(copied)


def test_a_server_that_does_not_answer_is_one_line_and_can_be_tried_again(copied, capfd):
    record = read_json(copied / "sweep.json")
    write_json(copied / "sweep.json", record | {"tracking": "http://127.0.0.1:1"})
    assert main("python -m tune", ABOUT, VERBS, ["promote", str(copied)]) == 75
    out, err = capfd.readouterr()
    assert err.count("\n") == 1
    assert "127.0.0.1:1 does not find run" in err
    assert "Connection refused" in err
