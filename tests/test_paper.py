"""Tables of the paper: the layers that hold them, what they show of ours, and each grid at tiny scale."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from richkd.errors import ConfigError, CorruptError
from richkd.layers import CONF, build, read
from tune.settings import Settings
from tune.sweep import Sweep
from tune.table import Cell, Layer, Paper, lines, of_grid, rows_judged, shown, table
from tune.tiny import images, scaled

PAPER = sorted(path.stem for path in (CONF / "paper").glob("*.yaml"))
TABLES = [name for name in PAPER if build(read([f"paper/{name}"]), Layer).paper.title]
GRIDS = [n for n in TABLES if build(read([f"paper/{n}"]), Settings).sweep.grid.rows]


def paper_of(name: str) -> Paper:
    return build(read([f"paper/{name}"]), Layer).paper


def told(name: str, *words: str, **more) -> dict:
    """Return the table of a layer of which nothing was run."""
    return table([f"paper/{name}", *words], **more)


def test_the_tables_of_the_supplement_are_there():
    grids = ["figure6", "table11", "table13", "table13-table14", "table9"]
    assert grids == GRIDS
    assert sorted([*grids, "table10", "table12"]) == TABLES


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_each_cell_of_a_grid_is_a_run(name, scale, cache_root, tmp_path):
    layers = scaled([f"paper/{name}", f"cache={cache_root}"], scale)
    sweep, paper = Sweep(tmp_path, layers), build(layers, Layer).paper
    assert paper.scale == scale
    assert set(paper.figures) <= set(sweep.settings.sweep.grid.rows)
    for config in sweep.configs():
        assert config.selection == "paper"
        assert (config.data.source == "cifar100") == (scale == "full")
        assert (config.train.epochs == 1) == (scale == "tiny")
        assert (config.data.imbalance == "table14") == ("table14" in name and scale == "full")
        assert (config.teacher.name == "resnet8") == (scale == "tiny")


def test_the_printed_gains_over_kd_are_those_of_the_printed_accuracies():
    answer = told("table11", "storage=nowhere")
    gains = [c["paper_gap"] for c in answer["cells"] if c["method"] == "richkd-l"]
    assert gains == pytest.approx([5.76, 4.64, 3.73, 5.24])
    fusion = paper_of("table10").figures["fusion"].values()
    shares = [share for _, _, share in fusion if share is not None]
    counts = [100 * some / of for some, of, share in fusion if share is not None]
    assert shares == pytest.approx(counts, abs=0.5)


@pytest.mark.parametrize("name", GRIDS)
def test_a_table_of_nothing_shows_the_papers_figures_within_80_columns(name, tmp_path):
    answer = told(name, f"storage={tmp_path}")
    said = lines(answer)
    assert max(len(line) for line in said if not line.startswith("go on")) <= 80
    assert said[0] == answer["title"]
    assert not any(cell["ours"] for cell in answer["cells"])
    assert answer["missing"]
    assert (answer["file"], answer["link"], answer["heading"]) == (None, None, None)
    again = f"python -m tune sweep paper/{name} storage={tmp_path}"
    assert answer["go_on"] == again
    assert not list(tmp_path.iterdir())


def test_what_fusing_does_is_laid_beside_the_papers_counts(tmp_path):
    outcomes = {"fixed": 178, "teacher_wrong": 827, "harmed": 8, "teacher_right": 9173}
    outcomes |= {"top5_fixed": 0, "top5_base": 0, "top5_lost": 2}
    found = {"outcomes": outcomes, "rows": {"n": 10_000, "of": "test"}, "data": "mine"}
    found |= {"teacher": {"top1": 91.73}, "fused": {"alpha": 0.7, "top1": 93.43}, "scale": "model"}
    (tmp_path / "diagnosis.json").write_text(json.dumps(found))
    answer = told("table10", diagnosis=tmp_path / "diagnosis.json")
    said = lines(answer)
    rows = [line.rsplit(maxsplit=2) for line in said if line.startswith("  ")]
    assert ["  teacher wrong, fused right", "178", "1126"] in rows
    assert ["  teacher wrong, fused right", "827", "2441"] in rows
    assert ["  teacher wrong, fused right", "21.52", "46"] in rows
    assert ["  teacher right, fused wrong", "0.09", "0.50"] in rows
    assert ["  target outside the teacher's top 5, fused right", "-", "40"] in rows  # of none
    assert "at alpha 0.7 and clip.scale model" in " ".join(said)
    assert max(map(len, said)) <= 80
    with pytest.raises(CorruptError, match=r"bench\.json"):
        (tmp_path / "bench.json").write_text("{}")
        told("table10", diagnosis=tmp_path / "bench.json")


def test_times_are_laid_beside_the_papers(tmp_path):
    own = {"kd": (5.0, 2**30), "richkd-l+table": (3.25, 3 * 2**29)}
    measured = {
        name: {"seconds_per_epoch": seconds, "memory": memory}
        for name, (seconds, memory) in own.items()
    }
    (tmp_path / "bench.json").write_text(json.dumps({"variants": measured}))
    answer = told("table12", bench=tmp_path / "bench.json")
    rows = [line.split() for line in lines(answer)]
    assert ["kd", "5.00", "7"] in rows
    assert ["kd", "1.00", "2.278"] in rows
    assert ["richkd-l+table", "1.50"] in rows
    assert ["richkd-lf+live", "missing", "46"] in rows
    assert answer["missing"] == ["richkd-l+live", "crd", "richkd-f+live", "richkd-lf+live"]


def findings(name: str, refits: dict, *, grid: bool = True, **settings):
    """Return what a sweep found, as far as a table reads it."""
    config = build(read(["data.source=cifar100"]).over("", settings))
    return SimpleNamespace(name=name, refits=refits, grid=grid, base=config)


def runs(*top1: float) -> dict:
    return {seed: {"test/top1": v, "test/last_top1": v - 1} for seed, v in enumerate(top1)}


def test_half_a_grid_shows_what_it_has_and_a_search_fills_the_column_that_it_is():
    layers = read(["paper/table11"])
    grid = findings("grid", {"deit_ti-kd": runs(70, 72), "deit_ti-at": runs(75, 73, 74)})
    searched = findings(
        "search",
        {"richkd": runs(80.0)},
        grid=False,
        **{"method.name": "autokd", "student.name": "deit_ti"},
    )
    cells = {(c.row, c.method): c for c in of_grid(paper_of("table11"), layers, [grid, searched])}
    at, kd, autokd = (cells["deit_ti", name] for name in ("at", "kd", "autokd"))
    assert (kd.n, kd.of, kd.ours, kd.last) == (2, 3, {0: 70, 1: 72}, {0: 69, 1: 71})
    assert (at.gap["mean"], at.gap["wins"], at.gap["n"]) == (3.0, 2, 2)
    assert autokd.ours == {0: 80.0}
    assert not cells["pit_ti", "autokd"].ours  # that search was of another student
    _, rows = shown(list(cells.values()))
    assert rows[1:3] == [
        ["  none", "missing", "", "", "65.08", "", "-8.17"],
        ["  at", "74.00 ± 1.00", "73.00 ± 1.00", "3", "73.51", "+3.00 (2.00)", "+0.26"],
    ]


def test_the_rows_that_epochs_were_chosen_on_are_those_of_what_ran():
    layers = read(["paper/table11"])  # selection=paper
    held_out, paper = findings("a", {}), findings("b", {}, selection="paper")
    assert rows_judged(layers, []) == rows_judged(layers, [paper]) == "test rows"
    assert rows_judged(layers, [held_out]) == "validation rows"
    assert rows_judged(layers, [held_out, paper]) == "validation rows (a) or test rows (b)"


def test_what_a_cell_has_not_is_no_number():
    cell = Cell(row="a", metric="n", method="kd", ours={0: 12.0, 1: 13.0}, n=2, counts=True)
    assert shown([cell])[1][1][1] == "12 ± 1"
    assert shown([replace(cell, ours={})])[1][1][1] == "-"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["digits"],
            "a layer with paper.title and paper.metrics .*figures, as printed, may be left",
        ),
        (["digits", "paper.title=mine"], "paper.metrics={top-1: test/top1}"),
        (["paper/table10", "SWEEP"], "a table of no sweep but got SWEEP"),
        (["paper/table11", "paper.figures.deit_ti={kd: [1, 2]}"], "a number of each of top-1"),
        (["paper/table11", "paper.source=grids"], "did you mean grid"),
        (["paper/table11", "paper.titel=x"], "did you mean paper.title"),
        (["paper/table11", "none-such"], "SWEEP must be a name"),
    ],
)
def test_what_is_no_table_is_refused(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        table([*words, f"storage={tmp_path}"])


def test_tiny_holds_in_all_cells_and_what_is_said_last_holds_over_it(cache_root):
    layers = scaled(["paper/table13", f"cache={cache_root}", "train.epochs=2"], "tiny")
    rows = build(layers, Settings).sweep.grid.rows
    assert rows["VGG13-VGG8-full"] == {"student.name": "vgg8", "teacher.trained_on": "full"}
    assert build(layers).train.epochs == 2
    with pytest.raises(ConfigError, match="--scale must be one of full, tiny"):
        scaled(["paper/table13"], "small")


def test_tiny_images_are_digits_in_colour_kept_once(cache_root):
    path = images(cache_root)
    before = path.stat().st_mtime_ns
    assert images(cache_root).stat().st_mtime_ns == before
    with np.load(path) as file:
        assert file["images"].shape == (600, 32, 32, 3)
        assert set(np.bincount(file["labels"], minlength=10) > 40) == {True}
        assert file["names"][3] == "three"


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*GRIDS, "table10"])
def test_every_cell_of_a_grid_runs_at_tiny_scale(name, cluster, miniature, cache_root, tmp_path):
    words = [f"cache={cache_root}", f"storage={tmp_path / 'runs'}"]
    words.append(f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}")
    answer = told(name, *words, scale="tiny")
    assert answer["heading"] == "Tiny scale: the numbers mean nothing beyond “it runs”."
    assert {line for line in answer["missing"] if not line.endswith("autokd")} == set()
    assert all(cell["n"] == 1 for cell in answer["cells"] if cell["method"] != "autokd")
