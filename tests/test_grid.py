"""Grids: what their cells are, and how one runs, is gone on with and handed over."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from richkd import load_student
from richkd.errors import ConfigError
from richkd.files import read_json, write_json
from richkd.layers import build, read
from tune import launch
from tune.best import best
from tune.costs import runs_of
from tune.findings import found_in
from tune.first import prepare_cells
from tune.settings import Settings
from tune.status import lines, status
from tune.sweep import Sweep
from tune.table import lines as shown
from tune.table import table

LAYER = """
paper:
  title: A table of digits
  metrics: {top-1: test/top1}
  figures:
    small: {kd: 80.5, autokd: 82.25, richkd: 81.00}
train: {epochs: 2}
teacher: {epochs: 5}
sweep:
  grid:
    rows:
      small: {student.name: cnn8}
      large: {student.name: cnn16, train.lr: 0.1}
    methods:
      kd: {method.name: kd-crd}
      richkd: {method.name: richkd-l, fusion.alpha: 0.5}
refit: {seeds: 1}
"""
CELLS = ["small-kd", "small-richkd", "large-kd", "large-richkd"]


@pytest.fixture(scope="module")
def layer(tmp_path_factory) -> Path:
    """A layer with a table, and the grid that makes ours."""
    path = tmp_path_factory.mktemp("layer") / "digits-table.yaml"
    path.write_text(LAYER)
    return path


@pytest.fixture(scope="module")
def words(layer, cache_root, tmp_path_factory) -> list[str]:
    """The words of a command line that runs the grid."""
    folder = tmp_path_factory.mktemp("grid")
    own = [f"cache={cache_root}", f"storage={folder / 'runs'}", "sweep.name=grid"]
    return [str(layer), *own, f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"]


@pytest.fixture(scope="module")
def ran(cluster, miniature, words) -> Path:
    """The folder of the grid, which has run and was then given another seed."""
    answer = launch.start(read(words))
    assert (answer["failed"], answer["best"], list(answer["cells"])) == (0, None, CELLS)
    more = read([*words, "refit.seeds=2"])
    with pytest.raises(ConfigError, match=r"refit.seeds: 1 -> 2.*--changed"):
        launch.start(more, resume=True)
    launch.start(more, resume=True, changed=True)
    return Path(answer["sweep"])


def test_a_cell_is_its_row_and_on_top_its_method(layer, tmp_path):
    sweep = Sweep(tmp_path, read([str(layer)]))
    assert list(sweep.students) == CELLS
    assert [one.against for one in sweep.students.values()] == [None, "small-kd", None, "large-kd"]
    config = sweep.configs()[3]
    assert (config.student.name, config.train.lr) == ("cnn16", 0.1)
    assert (config.method.name, config.fusion.alpha) == ("richkd-l", 0.5)
    assert sweep.configs()[2].method.name == "kd-crd"
    assert not sweep.space  # though conf/digits.yaml, which lies beneath, has one


def test_a_plan_counts_the_runs_of_a_grid_and_no_trials(layer, tmp_path):
    words = ["refit.seeds=3", "sweep.grid.rows.large={student.name: cnn16, train.epochs: 9}"]
    runs = runs_of(Sweep(tmp_path, read([str(layer), *words])), slots=2)
    assert (runs.trials, runs.expected, runs.total) == ({}, {}, 4 * 3)
    assert runs.epochs == 9  # of the longest
    assert runs.students["large-kd"] == "kd-crd"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sweep.grid.rows.small={student.nam: cnn8}"], "small-kd: .*did you mean student.name"),
        (["sweep.grid.methods.kd={method.name: kd, fusion.alpha: 0.5}"], "means fusion.alpha=1"),
        (["sweep.grid.methods.kd={method.name: kdd}"], "method.name must be one of"),
        (["sweep.grid.rows.small={seed: 3}"], "seed is one for all cells"),
        (["sweep.grid.rows.small=cnn8"], "must be settings, as in {student.name: resnet8}"),
        (["sweep.grid.rows.a/b={student.name: cnn8}"], "names that a folder can bear"),
        (["sweep.grid.rows.a-seed={student.name: cnn8}"], "names that a folder can bear"),
        (["sweep.grid.methods=null"], "has no methods"),
        (
            [
                *("sweep.grid.rows.a-b={student.name: cnn8}", "sweep.grid.rows.a={train.lr: 1}"),
                "sweep.grid.methods.b-kd={method.name: kd}",
            ],
            "a-b-kd twice",
        ),
        (["sweep.objectives=[top1, latency]"], "no student is searched"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(words, told, layer, tmp_path):
    with pytest.raises(ConfigError, match=told):
        Sweep(tmp_path, read([str(layer), *words]))


def test_a_network_that_is_not_there_is_refused_with_its_cell_before_anything_runs(
    miniature, layer, cache_root, tmp_path
):
    words = [f"cache={cache_root}", "sweep.grid.rows.other={student.name: cnn9}"]
    with pytest.raises(ConfigError, match=r"other-kd: .*cnn9.*did you mean cnn"):
        prepare_cells(Sweep(tmp_path, read([str(layer), *words])), lambda *_: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(120)
def test_a_grid_is_summed_up_by_cell_against_kd_of_its_row(ran):
    found = found_in(ran)
    top1 = {
        name: [runs[seed]["test/top1"] for seed in (0, 1)] for name, runs in found.refits.items()
    }
    assert list(top1) == CELLS
    for row in ("small", "large"):
        gaps = np.subtract(top1[f"{row}-richkd"], top1[f"{row}-kd"])
        gap = found.summary[f"{row}-richkd"]["difference"]
        assert gap["mean"] == pytest.approx(gaps.mean())
        assert gap["wins"] == np.sum(gaps > 0)
        assert found.summary[f"{row}-kd"]["mean"] == pytest.approx(np.mean(top1[f"{row}-kd"]))
    assert (ran / "report" / "report.html").exists()


@pytest.mark.timeout(120)
def test_another_seed_runs_alone_and_a_grid_that_is_done_stays(ran, words, capsys):
    runs = sorted(path.parent.name for path in ran.glob("refits/*/run.json"))
    assert runs == sorted(f"{cell}-seed{seed}" for cell in CELLS for seed in (0, 1))
    assert not (ran / "refits" / "superseded").exists()
    launch.go_on(ran)
    assert "nothing was left to do" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--add-trials adds to a search"):
        launch.go_on(ran, more=launch.More(trials=3))
    found = status(ran)
    assert (found["refits"], found["trials"]) == ({"finished": 8, "begun": 0, "of": 8}, {})
    assert not any(line.startswith("trials") for line in lines(found))


@pytest.mark.timeout(120)
def test_a_run_of_a_grid_that_failed_is_told_and_can_be_tried_again(ran, tmp_path, monkeypatch):
    folder = tmp_path / "grid"
    shutil.copytree(ran, folder)
    failed = {"failures": {"refit-small-kd-seed0": "a reason"}}
    kinds = {"failure_kinds": {"refit-small-kd-seed0": "lost"}}
    write_json(folder / "summary.json", read_json(folder / "summary.json") | failed | kinds)
    assert status(folder)["failures"] == {"refit-small-kd-seed0": ["lost", "a reason"]}
    asked = []
    monkeypatch.setattr(launch, "carry_out", lambda *_, **more: asked.append(more["retry"]) or {})
    launch.go_on(folder, more=launch.More(retry=("lost",)))
    assert asked == [("lost",)]


@pytest.mark.timeout(120)
def test_mlflow_has_a_child_a_cell_and_seed_with_its_row_and_method(ran):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{ran.parent.parent / 'mlflow.db'}")
    parent = read_json(ran / "mlflow.json")["grid"]
    experiment = client.get_run(parent).info.experiment_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    seen = {tuple(run.data.params[key] for key in ("row", "method", "seed")) for run in children}
    assert len(children) == 8
    assert seen == {(*cell.split("-"), seed) for cell in CELLS for seed in "01"}
    assert all("test/top1" in run.data.metrics for run in children)
    assert client.get_run(parent).data.params["row.large"] == "student.name cnn16, train.lr 0.1"


@pytest.mark.timeout(120)
def test_one_cell_of_a_grid_is_handed_over(ran, tmp_path):
    for cell, got in ((None, "none"), ("small-at", "'small-at'")):
        with pytest.raises(ConfigError, match=f"got {got}; take one of small-kd"):
            best(ran, cell=cell)
    answer = best(ran, tmp_path / "student", cell="large-richkd")
    runs = found_in(ran).refits["large-richkd"]
    assert answer["verified"]
    assert answer["recorded"]["val_top1"] == max(run["best_val_top1"] for run in runs.values())
    assert load_student(tmp_path / "student").names[0] == "zero"
    with pytest.raises(ConfigError, match="is a grid"):
        load_student(ran)


@pytest.mark.timeout(120)
def test_a_grid_is_called_by_its_table_and_a_search_by_its_student(layer):
    for words, name in (([str(layer)], "digits-digits-table-"), ([], "digits-cnn8-")):
        layers = read(words)
        assert launch.named(layers, build(layers, Settings), build(layers)).startswith(name)


def test_a_table_lays_ours_beside_the_papers_and_says_what_is_missing(ran, words):
    answer = table([*words[:3], "refit.seeds=3"])
    runs = found_in(ran).refits["small-richkd"]
    cells = {(cell["row"], cell["method"]): cell for cell in answer["cells"]}
    assert list(cells)[:3] == [("small", "kd"), ("small", "autokd"), ("small", "richkd")]
    assert cells["small", "richkd"]["ours"] == {s: run["test/top1"] for s, run in runs.items()}
    assert cells["small", "richkd"]["paper_gap"] == pytest.approx(0.5)
    assert cells["large", "kd"]["paper"] is None
    assert answer["missing"] == [
        *("small kd (2 of 3)", "small autokd", "small richkd (2 of 3)"),
        *("large kd (2 of 3)", "large richkd (2 of 3)"),
    ]
    said = shown(answer)
    assert max(map(len, said[:-2])) <= 80  # then come a path and an address
    row = next(line.split() for line in said if line.startswith("  richkd"))
    gap = np.mean([runs[s]["test/top1"] for s in runs]) - np.mean(
        [run["test/top1"] for run in found_in(ran).refits["small-kd"].values()]
    )
    assert row[-4:-2] == ["81.00", f"{gap:+.2f}"]
    assert answer["sweeps"] == ["grid"]
    assert Path(answer["file"]).read_text() == answer["markdown"]
    assert "| missing |" in answer["markdown"]
    assert "artifacts/table" in answer["link"]
