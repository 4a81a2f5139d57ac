"""Real sweeps that search a student, in branches, for accuracy and cost; and one that begins where they ended."""

import csv
import json
import warnings
from pathlib import Path

import pytest
import yaml
from mlflow.tracking import MlflowClient

from richkd import estimate
from richkd.config import CONF, build, read
from richkd.distill import initial_student, open_task
from richkd.errors import ConfigError
from tune import launch as sweeps
from tune.launch import More
from tune.settings import Settings

TINY = [
    *("sweep.trials=5", "sweep.startup=2", "refit.seeds=1", "train.epochs=2", "teacher.epochs=5"),
    *("sweep.space.clip.prompts=null", "sweep.space.loss.logit=null"),
    "sweep.space.student.name={choice: [cnn8, cnn16]}",
]
BRANCHES = [
    "sweep.space.clip.scale={choice: [model, match_std]}",
    "sweep.space.loss.temperature={choice: [2, 4]}",
    "sweep.space.fusion.alpha={uniform: [0, 1], step: 0.5, when: {clip.scale: model}}",
]


@pytest.fixture(scope="module")
def searched(cluster, miniature, cache_root, tmp_path_factory):
    """The layers and the answer of a sweep of three objectives."""
    folder = tmp_path_factory.mktemp("searched")
    places = [f"cache={cache_root}", f"storage={folder / 'runs'}"]
    places.append(f"tracking.uri=sqlite:///{folder / 'mlflow.db'}")
    objectives = ["sweep.objectives=[top1, parameters, latency]", "sweep.name=searched"]
    return places, sweeps.start(read([*TINY, *BRANCHES, *objectives, *places]))


def runs_of(places: list[str], parent: str) -> dict[str, dict]:
    """Return metrics, params and tags of a sweep's children as MLflow's own client reads them."""
    client = MlflowClient(tracking_uri=places[2].removeprefix("tracking.uri="))
    ids = [each.experiment_id for each in client.search_experiments()]
    found = client.search_runs(ids, f"tags.mlflow.parentRunId = '{parent}'")
    return {run.info.run_name: run.data for run in found}


@pytest.mark.timeout(300)
def test_each_trial_is_told_what_its_student_costs(searched, cache_root):
    places, answer = searched
    children = runs_of(places, answer["mlflow"]["run_id"])
    trials = {name: run for name, run in children.items() if name.startswith("trial")}
    assert len(trials) == 10
    sizes, latencies = {}, {}
    for name, run in trials.items():
        student = run.params["student.name"]
        sizes.setdefault(student, set()).add(run.metrics["parameters"])
        latencies.setdefault(student, set()).add(run.metrics["latency"])
        if "kd" not in name:
            assert ("fusion.alpha" in run.params) == (run.params["clip.scale"] == "model")
    for student, found in sizes.items():
        config = build(read([f"student.name={student}", *places[:2]]))
        network = initial_student(config, open_task(config).dataset)
        assert found == {float(sum(each.numel() for each in network.parameters()))}
        assert len(latencies[student]) == 1  # measured once, whatever ran beside
        assert 0 < min(latencies[student]) < 1000


@pytest.mark.timeout(300)
def test_the_front_holds_students_that_none_betters(searched):
    places, answer = searched
    folder, front = Path(answer["sweep"]), answer["front"]
    children = runs_of(places, answer["mlflow"]["run_id"])
    values = {
        name: (-run.metrics["best_val_top1"], run.metrics["parameters"], run.metrics["latency"])
        for name, run in children.items()
        if name.startswith("trial-0")
    }
    undominated = {
        name
        for name, own in values.items()
        if not any(
            other != own and all(a <= b for a, b in zip(other, own, strict=True))
            for other in values.values()
        )
        and "richkd.duplicate_of" not in children[name].tags
    }
    assert {each["trial"] for each in front} == undominated
    assert front[0]["top1"] == answer["best"]["val_top1"] == -min(values.values())[0]
    for each in front:
        manifest = json.loads((folder / each["checkpoint"] / "manifest.json").read_text())
        assert manifest["files"]
    assert answer["states"]["richkd"] == {"COMPLETE": 5}  # nothing was stopped early


@pytest.mark.timeout(300)
def test_choices_of_numbers_and_branches_are_reported(searched):
    _, answer = searched
    page = Path(answer["report"]).read_text()
    assert "Accuracy against cost" in page
    with open(Path(answer["report"]).with_name("pareto.csv")) as file:
        rows = list(csv.DictReader(file))
    on_front = {row["trial"] for row in rows if row["front"] == "yes"}
    assert on_front >= {each["trial"].removeprefix("trial-") for each in answer["front"]}
    assert len(rows) >= len(answer["front"])


@pytest.mark.timeout(300)
def test_all_methods_are_compared_on_the_student_that_was_found(searched):
    places, answer = searched
    children = runs_of(places, answer["mlflow"]["run_id"])
    found = answer["best"]["settings"]["student.name"]
    refits = {name: run for name, run in children.items() if name.startswith("refit")}
    assert len(refits) == 5
    for name in refits:
        if "tuned" not in name:
            folder = Path(answer["sweep"]) / "refits" / name.removeprefix("refit-")
            assert yaml.safe_load((folder / "config.yaml").read_text())["student"]["name"] == found


@pytest.mark.timeout(300)
def test_a_sweep_given_more_keeps_what_it_measured(searched):
    _, answer = searched
    before = (Path(answer["sweep"]) / "students.json").read_bytes()
    more = sweeps.go_on(Path(answer["sweep"]), more=More(trials=1))
    assert more["states"]["richkd"] == {"COMPLETE": 6}
    assert (Path(answer["sweep"]) / "students.json").read_bytes() == before


@pytest.mark.timeout(300)
def test_a_sweep_begins_with_the_best_of_another_and_names_what_lies_outside(searched, tmp_path):
    places, answer = searched
    narrower = ["sweep.space.student.name=null", "student.name=cnn8", "sweep.scheduler=median"]
    narrower += ["sweep.space.loss.temperature={choice: [2, 4, 6]}", "sweep.name=after"]
    layers = read([*TINY, *BRANCHES, *narrower, "warmstart.sources=[searched]", *places])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        after = sweeps.start(layers)
    said = " ".join(str(one.message) for one in told)
    children = runs_of(places, after["mlflow"]["run_id"])
    before = runs_of(places, answer["mlflow"]["run_id"])
    fitting = [
        run.params
        for name, run in before.items()
        if name.startswith("trial-0") and run.params["student.name"] == "cnn8"
    ]
    assert fitting
    first = children["trial-000"].params
    assert {"student.name": "cnn8"} | first in fitting
    left_out = [
        n
        for n, run in before.items()
        if n.startswith("trial") and run.params["student.name"] == "cnn16"
    ]
    assert any(
        f"searched/{name} (student.name=cnn16 is not searched, and is cnn8)" in said
        for name in left_out
    )
    assert after["front"] == []


@pytest.mark.timeout(300)
def test_a_source_that_is_no_sweep_or_lies_outside_leaves_no_trace(searched, tmp_path):
    places, _ = searched
    runs = Path(places[1].removeprefix("storage="))
    before = sorted(runs.iterdir())
    with pytest.raises(ConfigError, match=r"warmstart.sources=nobody: SWEEP must be"):
        sweeps.start(read([*TINY, "warmstart.sources=[paper, nobody]", *places]))
    far = "sweep.space.loss.temperature={uniform: [90, 99]}"
    with (
        pytest.warns(UserWarning, match=r"loss.temperature=[0-9.]+ is not in 90 to 99"),
        pytest.raises(ConfigError, match="must have a finished trial inside"),
    ):
        sweeps.start(read([*TINY, far, "warmstart.sources=[searched]", *places]))
    assert sorted(runs.iterdir()) == before


def test_a_larger_student_is_slower(cache_root, miniature):
    found = {}
    for name in ("cnn8", "resnet56"):
        config = build(read([f"student.name={name}", f"cache={cache_root}"]))
        found[name] = estimate.latency(config, open_task(config))
    assert 0 < found["cnn8"] < found["resnet56"] / 3  # 4 layers against 56


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sweep.objectives=[top1, parameters]"], "no student is searched"),
        (["sweep.objectives=[parameters]"], "begin with top1"),
        (["sweep.objectives=[top1, top1]"], "once at most"),
        (["sweep.objectives=[]"], "are none"),
        (["sweep.objectives=[top1, latncy]"], "one of top1, parameters, latency"),
        (["sweep.scheduler=medain"], "one of asha, median, none"),
    ],
)
def test_objectives_that_mean_nothing_are_refused(words, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        layers = read(words)
        build(layers, Settings)
        sweeps.Sweep(tmp_path, layers)


@pytest.mark.parametrize(
    "layer", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem
)
def test_each_layer_of_a_search_makes_a_sweep_of_digits(layer, tmp_path):
    assert sweeps.Sweep(tmp_path, read([f"sweep/{layer.stem}"])).base.data.source == "digits"
