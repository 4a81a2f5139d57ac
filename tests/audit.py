"""What must hold of a sweep after any fault: study, run folders and MLflow tell the same, and each trial ran once."""

import json
from pathlib import Path
from typing import Any

import optuna
from mlflow.tracking import MlflowClient

from richkd import distill
from richkd.layers import build, read_layer

LABELS = {"richkd": "", "kd": "kd-"}
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
OF_TIME = ("seconds", "images_per_second")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run by epoch, as its folder has them."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trials_of(folder: Path, runs: Path | None = None) -> dict[str, tuple[Any, Path]]:
    """Return each trial of a sweep with its run folder, by the name of its MLflow run."""
    found = {}
    for study, label in LABELS.items():
        address = f"sqlite:///{folder / 'study.db'}"
        for trial in optuna.load_study(study_name=study, storage=address).trials:
            name = f"{label}{trial.number:03d}"
            found[f"trial-{name}"] = (trial, (runs or folder) / "trials" / name)
    return found


def audit(folder: Path, uri: str, *, runs: Path | None = None) -> dict[str, int]:
    """Raise AssertionError unless study, run folders and MLflow agree; return how many trials and refits there are."""
    client = MlflowClient(tracking_uri=uri)
    parent = json.loads((folder / "mlflow.json").read_text())[folder.name]
    experiment = client.get_run(parent).info.experiment_id
    assert client.get_run(parent).info.status == "FINISHED"
    assert not (folder / "spool.jsonl").exists()
    children: dict[str, Any] = {}
    for run in client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'"):
        if run.data.tags["richkd.state"] != "superseded":
            assert run.info.run_name not in children, f"{run.info.run_name} is there twice"
            children[run.info.run_name] = run
    trials = trials_of(folder, runs)
    refits = {
        f"refit-{path.parent.name}": path.parent
        for path in (runs or folder).glob("refits/*-seed*/run.json")
    }
    assert set(children) == set(trials) | set(refits)
    for name, (trial, place) in trials.items():
        rows = rows_of(place)
        epochs = [row["epoch"] for row in rows]
        assert epochs == list(range(1, len(rows) + 1)), name
        assert trial.state.name in STATES, f"{name} is {trial.state.name}"
        assert children[name].data.tags["richkd.state"] == STATES[trial.state.name], name
        values = {row["epoch"]: row["val/top1"] for row in rows}
        if trial.state.name != "FAIL":
            assert trial.intermediate_values == values, name
    for name, place in refits.items():
        assert "test/top1" in json.loads((place / "run.json").read_text())["metrics"], name
    for name, run in children.items():
        rows = rows_of(trials[name][1] if name in trials else refits[name])
        for key in ("val/top1", "train/loss", "lr"):
            history = client.get_metric_history(run.info.run_id, key)
            found = sorted((point.step, point.value) for point in history)
            written = [(row["epoch"], row[key]) for row in rows]
            if name in trials and trials[name][0].state.name == "FAIL":
                written = written[: len(found)]  # nobody has asked for what came last
            assert found == written, f"{name} {key}"
    return {"trials": len(trials), "refits": len(refits)}


def straight(place: Path, folder: Path) -> None:
    """Raise AssertionError unless a run's curve is that of a straight run of its config, number by number."""
    rows: list[dict[str, Any]] = []
    config = build(read_layer(place / "config.yaml"))
    distill.run(config, folder, report=lambda metrics, _: rows.append(dict(metrics)))
    expected = [{k: v for k, v in row.items() if k not in OF_TIME} for row in rows]
    assert [
        {k: v for k, v in row.items() if k not in OF_TIME} for row in rows_of(place)
    ] == expected
