"""On which rows epochs and settings are chosen: held-out ones, or, as published figures were obtained, test rows."""

import json
from pathlib import Path

import numpy as np
import pytest
from faked import fake
from small import SMALL

from richkd import checkpoint, distill
from richkd.__main__ import ABOUT, VERBS
from richkd.command import main
from richkd.data import load, split
from richkd.errors import ConfigError
from richkd.evaluate import evaluate
from richkd.layers import build, read
from richkd.student import network_of
from richkd.teachers import teacher_recipe

PAPER = "selection=paper"


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[distill.Outcome, dict[str, float], list[dict]]:
    """A run whose best test epoch is not its last one, what it read of the test rows, and its epochs."""
    folder = tmp_path_factory.mktemp("run")
    words = ["method.name=ce", "student.name=cnn8", "train.epochs=10"]  # the fourth is the best
    outcome = distill.run(build(read([*words, PAPER])), folder / "run")
    found = distill.test(outcome)
    rows = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    return outcome, found, rows


def test_every_training_row_is_learnt_from_and_none_held_out():
    config = build(read(["data.labelled_per_class=null"]))
    dataset = load(config.data)
    found = split(dataset, config.data, 0, "paper")
    assert np.array_equal(found.transfer, np.arange(len(dataset.train)))
    assert len(found.validation) == 0
    assert np.array_equal(found.labels, dataset.train.labels)


def test_the_teacher_learns_from_all_rows_as_well():
    recipe = teacher_recipe(build(read([PAPER])))
    assert recipe.selection == "paper"


def test_the_best_epoch_is_the_best_one_on_test_rows(ran):
    outcome, found, rows = ran
    top1 = [row["val/top1"] for row in rows]
    assert top1[-1] < max(top1)
    assert found["test/top1"] == outcome.metrics["best_val_top1"] == max(top1)
    assert found["test/last_top1"] == top1[-1]


def test_the_last_epochs_accuracy_is_that_of_its_checkpoint(ran):
    outcome, found, _ = ran
    task = outcome.task
    network = network_of(checkpoint.load(outcome.folder / "last"))
    _, rows, labels = task.judged
    assert len(rows) == len(task.dataset.test)
    assert evaluate(network, task.test, rows, labels)["top1"] == found["test/last_top1"]


def test_a_checkpoint_is_evaluated_again_on_the_rows_that_it_was_chosen_on(ran):
    outcome, found, _ = ran
    again = distill.retest(outcome.folder / "best")
    assert again.found["val"] == again.found["test"]
    assert again.found["test"]["top1"] == found["test/top1"]
    assert again.config.selection == "paper"


def test_a_checkpoint_of_before_there_was_a_choice_is_one_of_held_out_rows(tmp_path):
    config = build(read(["method.name=ce", "student.name=cnn8", "train.epochs=1", "device=cpu"]))
    distill.run(config, tmp_path)
    saved = checkpoint.load(tmp_path / "best")
    del saved.meta["config"]["selection"]
    checkpoint.save(tmp_path / "old", saved.weights, {}, saved.meta)
    found = distill.retest(tmp_path / "old").config
    assert found.selection == "validation"


def test_a_scale_that_needs_held_out_rows_is_refused():
    with pytest.raises(ConfigError, match="selection=paper"):
        build(read([PAPER, "clip.scale=calibrated"]))
    build(read([PAPER, "clip.scale=match_std", "loss.temperature_of=task"]))


@pytest.mark.parametrize("selection", ["validation", "paper"])
def test_what_is_printed_says_on_which_rows_it_was_chosen(tmp_path, capsys, selection):
    words = [
        "distill",
        "method.name=ce",
        "student.name=cnn8",
        "train.epochs=1",
        f"storage={tmp_path}",
    ]
    assert main("richkd", ABOUT, VERBS, [*words, "--name=run", f"selection={selection}"]) == 0
    said = capsys.readouterr().out
    paper = selection == "paper"
    assert ("flatters" in said) == paper
    assert ("of the epoch that is best on these rows" in said) == paper
    assert ("val" in said) != paper
    assert main("richkd", ABOUT, VERBS, ["evaluate", str(tmp_path / "run"), "evaluate.rows=0"]) == 0
    assert ("of the epoch that is best on these rows" in capsys.readouterr().out) == paper


def test_a_teacher_is_shown_on_test_rows_where_none_are_held_out(tmp_path):
    config = build(read([PAPER, "method.name=kd", "teacher.epochs=1", f"cache={tmp_path}"]))
    task = distill.open_task(config)
    teacher = distill.open_teacher(config, task)
    found = distill.prepared(task, teacher)
    assert found["teacher"].keys() == {"test_top1"}
    assert distill.evaluate_teachers(task, teacher)["teacher"].keys() == {"test", "all"}
    assert "val" not in " ".join(distill.prepared_lines("digits", found))


def test_a_report_says_that_it_was_chosen_on_test_rows(tmp_path):
    from tune.findings import found_in
    from tune.report import lines, write

    found = found_in(fake(tmp_path / "sweep", words=(PAPER,)))
    page = write(found)
    text = page.with_suffix(".md").read_text()
    assert "chosen on the test rows, which flatters" in text
    assert "best epoch's test top-1, %" in text
    assert "validation rows" not in text
    assert any("flatters" in line for line in lines(found, page))


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_sweep_goes_through_and_its_best_is_no_champion(cluster, cache_root, tmp_path):
    from tune import launch
    from tune.best import best
    from tune.promote import promote

    words = [*SMALL, PAPER, "sweep.trials=2", "refit.seeds=1", "sweep.name=paper"]
    words += [
        f"cache={cache_root}",
        f"storage={tmp_path}",
        f"tracking.uri=sqlite:///{tmp_path}/m.db",
    ]
    answer = launch.start(read(words))
    assert answer["selection"] == "paper"
    found = best(Path(answer["sweep"]))
    assert found["verified"] and found["found"]["val_top1"] == found["found"]["test_top1"]
    with pytest.raises(ConfigError, match="selection=paper"):
        promote(Path(answer["sweep"]))
