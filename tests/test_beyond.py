"""What `tune evaluate` finds of the students of a sweep, and where it goes; what a sweep was told before it searched."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from richkd.command import main
from richkd.errors import ConfigError
from richkd.files import read_json
from tune import __main__ as command_line
from tune import report
from tune.evaluate import Sent, evaluate, metrics, told
from tune.findings import found_in
from tune.study import MAIN


@pytest.fixture
def client(copied):
    return MlflowClient(f"sqlite:///{copied.parent.parent / 'mlflow.db'}")


def test_students_are_evaluated_into_their_runs_in_mlflow_and_into_the_report(
    copied, client, capsys
):
    words = ["evaluate", str(copied), "evaluate.rows=40", "--json"]
    assert main("python -m tune", command_line.ABOUT, command_line.VERBS, words) == 0
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert answer["untold"] is None
    assert list(answer["students"]) == ["ce", "kd", "kd_tuned", "richkd_paper", "richkd"]
    ids, best = read_json(copied / "mlflow.json"), read_json(copied / "summary.json")["best"]
    for name, label in (("ce", "ce"), ("richkd", "richkd-l")):
        found = answer["students"][name]
        run = client.get_run(ids[f"{copied.name}/refit-{label}-seed{best['seed']}"])
        assert run.data.metrics["test/top1"] == pytest.approx(found["test"]["top1"])
        kept = run.data.metrics["evaluation/corrupted_computed_top1"]
        assert kept == pytest.approx(found["corruption"]["mean"])
        assert run.data.metrics["evaluation/pgd_8_top1"] == found["attack"]["pgd"][-1]
        assert run.data.metrics["test/ece"] == pytest.approx(found["calibration"]["student"]["ece"])
        files = {item.path for item in client.list_artifacts(run.info.run_id, "evaluation")}
        assert {"evaluation/evaluation.html", "evaluation/evaluation.json"} <= files
    parent = ids[copied.name]
    shown = {item.path for item in client.list_artifacts(parent, "explain")}
    assert {"explain/explain.html", "explain/grad-cam.png"} <= shown
    page = Path(answer["report"]).read_text()
    for text in ("Beyond accuracy", "Where they look", "What was told before"):
        assert f"<h2>{text}" in page
    assert f"{answer['students']['richkd']['corruption']['mean']:.2f}" in page
    # and a second time: what MLflow has already is not sent again
    label = {name: copied / "refits" / f"{name}-seed{best['seed']}" for name in ("ce", "richkd-l")}
    numbers = metrics(answer["students"]["richkd"])
    assert told([Sent(label["richkd-l"], (), numbers)], copied.parent) is None
    history = client.get_metric_history(run.info.run_id, "evaluation/pgd_8_top1")
    assert len(history) == 1


def test_what_was_told_before_the_search_is_in_mlflow_and_in_the_report(swept):
    answer, client = swept
    found = found_in(Path(answer["sweep"]))
    before = found.diagnosis
    ids = read_json(found.folder / "mlflow.json")
    metrics = client.get_run(ids[found.name]).data.metrics
    assert metrics["diagnosis/alpha_full"] == pytest.approx(before["alpha_star"]["full"])
    assert metrics["diagnosis/gain_low"] == pytest.approx(before["gain"]["low"])
    assert "diagnosis.json" in {item.path for item in client.list_artifacts(ids[found.name])}
    weight, close = before["alpha_star"]["full"], report.closeness(found)
    assert f"alpha {weight:.2f} at clip.scale model" in close[0]
    (start,) = [trial for trial in found.trials[MAIN] if trial.source == "theory"]
    assert start.params["fusion.alpha"] == pytest.approx(weight)
    assert f"{start.top1:.2f} %" in close[1]
    assert "from theory" in report.remark(found, start)
    assert replace(found, best=start).origin.startswith("the theory's own start")


def test_a_sweep_without_a_student_cannot_be_evaluated(copied):
    for file in (copied / "refits").glob("*/run.json"):
        file.unlink()
    with pytest.raises(ConfigError, match="has no student yet"):
        evaluate(copied)
