"""Real sweeps that search a student, in branches, for accuracy and cost; and one that begins where they ended."""

import csv
import json
import shlex
import warnings
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import yaml
from mlflow.tracking import MlflowClient

from richkd import estimate
from richkd.distill import initial_student, open_task
from richkd.errors import ConfigError
from richkd.layers import CONF, build, flatten, read, to_dict
from tune import first
from tune import launch as sweeps
from tune.launch import More
from tune.settings import Settings
from tune.sweep import Sweep, asked_of, open_searches, student_of
from tune.warmstart import printed

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
    assert on_front == {each["trial"].removeprefix("trial-") for each in answer["front"]}
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
@pytest.mark.soak
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
        f"{name} (student.name=cnn16 is not searched, and is cnn8)" in said for name in left_out
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
        Sweep(tmp_path, layers)


def commands() -> list[list[str]]:
    """Return the words of each sweep that a layer of conf/sweep shows in its head."""
    found = []
    for layer in sorted((CONF / "sweep").glob("*.yaml")):
        lines = [line for line in layer.read_text().splitlines() if " tune sweep " in line]
        assert lines, layer
        found += [shlex.split(line.partition(" tune sweep ")[2]) for line in lines]
    return found


@pytest.mark.parametrize("words", [*commands(), [*TINY, *BRANCHES]], ids=" ".join)
def test_the_first_trials_run_what_the_study_says_of_them(words, tmp_path):
    sweep = Sweep(tmp_path, read(words))
    base = flatten(to_dict(sweep.base))
    own = sweep.base.method.name
    for space, method in ((sweep.space, own), (sweep.space.of_baseline(), "kd")):
        point = first.as_printed(printed(method), space, base, 1.0)
        ran = flatten(to_dict(sweep.resolve(point.settings, method)))
        for key, value in (point.params | printed(method)).items():
            assert ran[key] == value


@pytest.mark.parametrize("words", [w for w in commands() if "sweep/pareto" in w], ids=" ".join)
def test_each_student_that_can_be_drawn_has_its_costs(words, monkeypatch, tmp_path):
    sweep = Sweep(tmp_path, read([*words, "sweep.objectives=[top1, parameters]"]))
    monkeypatch.setattr(first.estimate, "size", lambda config, _: len(config.student.name))
    sweep.costs = first.costs_of(sweep, None, lambda *_: None)
    base, study = flatten(to_dict(sweep.base)), optuna.create_study()
    point = first.as_printed(printed(sweep.base.method.name), sweep.space, base, 1.0)
    study.enqueue_trial(point.params)
    for number in range(20):
        trial = study.ask()
        sweep.space.draw(trial)
        settings = point.settings if number == 0 else trial.params
        job = sweep.trial(SimpleNamespace(name="richkd", label=str), number, trial.params, settings)
        assert job.costs == {"parameters": len(job.config.student.name)}


def test_costs_that_were_measured_stay_and_what_is_missing_is_measured(monkeypatch, tmp_path):
    words = ["sweep/pareto", "sweep.objectives=[top1, parameters, latency]"]
    sweep = Sweep(tmp_path, read(words))
    name = student_of(sweep.resolve({"student.name": "cnn16"}))
    (tmp_path / "students.json").write_text(json.dumps({name: {"latency": 7.0}}))
    monkeypatch.setattr(first.estimate, "size", lambda *_: 3)
    monkeypatch.setattr(first.estimate, "latency", lambda *_: 5.0)
    found = first.costs_of(sweep, None, lambda *_: None)
    assert found.pop(name) == {"parameters": 3, "latency": 7.0}
    assert list(found.values()) == [{"parameters": 3, "latency": 5.0}] * 2


def test_a_sweep_that_was_killed_as_it_began_begins_with_its_first_trials(searched, monkeypatch):
    places, _ = searched
    folder = Path(places[1].removeprefix("storage=")) / "cut"
    sources = "warmstart.sources=[searched, paper]"
    layers = read([*TINY, *BRANCHES, sources, "sweep.name=cut", "sweep.trials=8", *places])

    def killed(*_: object) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sweeps, "Logbook", killed)  # what comes first after `sweep.json`
        sweeps.start(layers)
    for search in open_searches(Sweep(folder, asked_of(folder)[1]), 8):
        found = [trial.user_attrs["source"] for trial in search.study.trials]
        assert found[0].startswith("searched/trial-")
        assert "paper" in found


@pytest.mark.parametrize(
    "layer", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem
)
def test_each_layer_of_a_search_makes_a_sweep_of_digits(layer, tmp_path):
    assert Sweep(tmp_path, read([f"sweep/{layer.stem}"])).base.data.source == "digits"
