"""The numbers of a summary against numpy and scipy, and how its table is laid out."""

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from scipy import stats

from tune.students import around_a_search
from tune.summary import (
    TEACHERS,
    columns,
    difference,
    read_refits,
    spread,
    summarise,
    winner,
)

percent = st.floats(0, 100)
STUDENTS = around_a_search("richkd-l", {})


def run(test: float, val: float = 90.0, loss: float = 0.3, **teachers: float) -> dict[str, float]:
    """Return the metrics of one refit."""
    return {"test/top1": test, "best_val_top1": val, "best_val_loss": loss} | {
        f"{name}/top1": value for name, value in teachers.items()
    }


def full(seeds: int, scale: float = 3.0) -> dict[str, dict[int, dict[str, float]]]:
    """Return refits of all students with seeded noise."""
    rng = np.random.default_rng(0)
    teachers = {"teacher": 90.2, "clip": 80.0, "fused": 94.6}
    return {
        name: {s: run(90 + scale * float(rng.normal()), **teachers) for s in range(seeds)}
        for name in STUDENTS
    }


@given(st.lists(percent, min_size=2, max_size=20))
def test_spread_is_the_mean_and_the_sample_deviation(values):
    found = spread(values)
    assert found["n"] == len(values)
    assert found["mean"] == pytest.approx(np.mean(values), abs=1e-9)
    assert found["sd"] == pytest.approx(np.std(values, ddof=1), abs=1e-6)


def test_one_value_has_no_deviation():
    assert spread([91.25]) == {"mean": 91.25, "sd": None, "n": 1}
    unknown = dict.fromkeys(("se", "low", "high"))
    assert difference({3: 91.0}, {3: 90.0}) == {"mean": 1.0, "wins": 1, "n": 1, **unknown}


@given(st.lists(st.tuples(percent, percent), min_size=2, max_size=20))
def test_a_difference_is_paired_by_seed(pairs):
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    found = difference(dict(enumerate(ours)), dict(reversed(list(enumerate(theirs)))))
    assert found["n"] == len(pairs)
    assert found["wins"] == np.sum(ours > theirs)
    assert found["mean"] == pytest.approx(np.mean(ours - theirs), abs=1e-9)
    assert found["se"] == pytest.approx(stats.sem(ours - theirs), abs=1e-6)


def test_a_difference_has_the_statistic_and_the_interval_of_the_paired_t_test():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(92, 1, 8), rng.normal(90, 1, 8)
    found = difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    test = stats.ttest_rel(ours, theirs)
    assert found["mean"] / found["se"] == pytest.approx(test.statistic)
    interval = test.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))


def test_only_seeds_that_both_have_are_compared():
    ours, theirs = {0: 91.0, 1: 95.0, 2: 93.0}, {2: 90.0, 0: 90.0, 7: 10.0}
    found = difference(ours, theirs)
    assert (found["mean"], found["wins"], found["n"]) == (2.0, 2, 2)
    assert difference(ours, {5: 1.0}) is None
    assert difference({}, {}) is None


def test_a_tie_is_no_win():
    assert difference({0: 90.0, 1: 91.0}, {0: 90.0, 1: 90.0})["wins"] == 1


def test_every_student_is_compared_to_kd_and_the_setting_found_to_tuned_kd_too():
    refits = full(8)
    summary = summarise(refits, STUDENTS)
    assert "difference" not in summary["kd"]
    top1 = {m: np.array([runs[s]["test/top1"] for s in range(8)]) for m, runs in refits.items()}
    for name in set(STUDENTS) - {"kd"}:
        gaps = top1[name] - top1["kd"]
        assert summary[name]["difference"]["mean"] == pytest.approx(gaps.mean())
        assert summary[name]["difference"]["se"] == pytest.approx(stats.sem(gaps))
    assert summary["difference"] == summary["richkd"]["difference"]
    tuned = top1["richkd"] - top1["kd_tuned"]
    assert summary["difference_tuned"]["mean"] == pytest.approx(tuned.mean())
    assert [summary[name]["top1"] for name in TEACHERS] == pytest.approx([90.2, 80.0, 94.6])
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(("alone", "left_out"), [("teacher", "clip"), ("clip", "teacher")])
def test_a_teacher_without_weight_is_told_by_the_papers_setting(alone, left_out):
    refits = full(3)
    refits["richkd"] = {seed: run(91.0, **{alone: 85.0 + seed}) for seed in range(3)}
    summary = summarise(refits, STUDENTS)
    assert summary[alone]["top1"] == summary["fused"]["top1"] == pytest.approx(86.0)
    assert summary[left_out]["top1"] == refits["richkd_paper"][0][f"{left_out}/top1"]


@pytest.mark.parametrize("missing", STUDENTS)
def test_a_summary_does_without_a_method_that_failed(missing):
    refits = full(3)
    del refits[missing]
    summary = summarise(refits, STUDENTS)
    assert missing not in summary
    assert (summary["difference"] is None) == (missing in ("kd", "richkd"))
    assert (summary["difference_tuned"] is None) == (missing in ("kd_tuned", "richkd"))
    assert len({len(cells) for cells in columns(summary).values()}) == 1


def test_the_winner_is_chosen_on_validation_and_ties_go_to_the_lower_loss():
    runs = {0: run(99, 91, 0.1), 1: run(80, 92, 0.4), 2: run(70, 92, 0.3), 3: run(99, 92, 0.3)}
    assert winner(runs) == 2
    assert winner({}) is None


def test_refits_are_read_by_label_and_only_finished_ones(tmp_path):
    labels = {name: student.label for name, student in STUDENTS.items()}
    assert labels["kd_tuned"] == "kd-tuned"  # each begins as another one does
    assert (labels["richkd"], labels["richkd_paper"]) == ("richkd-l", "richkd-l-paper")

    def write(name: str, state: str, metrics: dict) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"state": state, "metrics": metrics}))

    for label in labels.values():
        for seed in (10, 9):
            write(f"{label}-seed{seed}", "finished", run(seed, label_length=len(label)))
    write("kd-seed0", "running", run(1.0))
    write("kd-seed1", "finished", {"best_val_top1": 1.0})  # its test rows were not read yet
    found = read_refits(tmp_path, labels)
    assert {method: list(runs) for method, runs in found.items()} == {m: [9, 10] for m in labels}
    for method, label in labels.items():
        assert found[method][9]["label_length/top1"] == len(label)
    assert read_refits(tmp_path / "none", labels) == {}


def rendered(summary: dict, width: int) -> list[str]:
    """Return the lines of the table as the terminal shows it."""
    console = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    found = columns(summary)
    for name in found:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in zip(*found.values(), strict=True):
        table.add_row(*row)
    console.print(table)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("scale", [0.3, 30.0])
def test_the_table_fits_80_characters_and_nothing_is_cut(scale):
    lines = rendered(summarise(full(1000, scale), STUDENTS), 80)
    assert len(lines) == 1 + len(TEACHERS) + len(STUDENTS)
    assert max(len(line) for line in lines) <= 80
    assert not any("…" in line for line in lines)


def test_the_table_says_what_the_summary_holds():
    refits = {
        "kd": {0: run(88.0), 1: run(89.0)},
        "richkd": {0: run(90.0, clip=80.0), 1: run(92.0, clip=80.0)},  # alpha 0
    }
    found = columns(summarise(refits, STUDENTS))
    assert list(found) == ["", "test top-1, %", "against kd", "wins"]
    rows = list(zip(*found.values(), strict=True))
    assert rows == [
        ("zero-shot CLIP", "80.00 ± 0.00", "", ""),
        ("fused teacher, as found", "80.00 ± 0.00", "", ""),
        ("kd, T 3, weight 3", "88.50 ± 0.71", "", ""),
        ("richkd-l, as found", "91.00 ± 1.41", "+2.50 (s.e. 0.50)", "2 of 2"),
    ]


def test_one_seed_is_shown_without_spread_and_none_without_rows():
    rows = list(zip(*columns(summarise(full(1), STUDENTS)).values(), strict=True))
    assert not any("±" in cell or "s.e." in cell for row in rows for cell in row)
    assert [len(cells) for cells in columns(summarise({}, STUDENTS)).values()] == [0, 0, 0, 0]


@pytest.mark.parametrize(("name", "preset"), [("richkd-lf", "as printed"), ("autokd", "untuned")])
def test_a_summary_speaks_of_the_method_that_was_searched(name, preset):
    students = around_a_search(name, {})
    found = columns(summarise({each: {0: run(90.0)} for each in students}, students))
    assert found[""][-2:] == [f"{name}, {preset}", f"{name}, as found"]
