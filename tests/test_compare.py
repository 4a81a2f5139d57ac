"""Sweeps beside each other, against scipy and the summaries of each."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faked import fake
from scipy import stats
from small import ROOT, command

from richkd.errors import ConfigError
from richkd.files import read_json, write_json
from tune.compare import ASIDE, compare, lines


def table(path: str) -> list[dict[str, str]]:
    """Read a CSV file."""
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


def accuracies(folder: Path, label: str) -> list[float]:
    """Return test top-1 of refits by seed, %, as their run folders have it."""
    return [
        read_json(folder / "refits" / f"{label}-seed{seed}" / "run.json")["metrics"]["test/top1"]
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    """Two sweeps that differ in one setting of the student's training, and in what their refits came to."""
    place = tmp_path_factory.mktemp("pair")
    folders = [fake(place / "one", 6), fake(place / "two", 6, words=("train.lr=0.1",))]
    for seed in range(3):
        path = folders[1] / "refits" / f"richkd-l-seed{seed}" / "run.json"
        run = read_json(path)
        run["metrics"]["test/top1"] += 1 + seed / 7
        write_json(path, run)
    return folders


def test_the_difference_is_paired_by_seed_and_has_the_interval_of_the_t_test(pair):
    found = compare(pair)
    ours, theirs = accuracies(pair[1], "richkd-l"), accuracies(pair[0], "richkd-l")
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    first, gap = found["sweeps"]
    assert gap["to the first mean"] == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)
    assert gap["to the first low"] == pytest.approx(low)
    assert gap["to the first high"] == pytest.approx(high)
    assert (first["to the first n"], gap["to the first n"]) == (None, 3)
    assert found["warnings"] == []
    assert any(f"({low:+.2f} to {high:+.2f})" in line for line in lines(found))


def test_the_table_has_a_row_a_sweep_with_what_the_run_folders_hold(pair, tmp_path):
    path = tmp_path / "new" / "x.csv"
    found = compare(pair, path)
    rows = table(found["csv"])
    assert found["csv"] == str(path)
    assert [row["sweep"] for row in rows] == ["one", "two"]
    for row, folder in zip(rows, pair, strict=True):
        for column, label in (("richkd", "richkd-l"), ("kd_tuned", "kd-tuned"), ("ce", "ce")):
            values = accuracies(folder, label)
            assert float(row[f"test {column}"]) == pytest.approx(sum(values) / 3)
            assert float(row[f"test {column} sd"]) == pytest.approx(stats.tstd(values))
        assert float(row["hours"]) == pytest.approx(4000 / 3600)
    assert [row["train.lr"] for row in rows] == ["0.05", "0.1"]


def test_without_a_name_the_table_lies_beside_the_sweeps(pair):
    assert compare(pair)["csv"] == str(pair[0].parent / "comparison.csv")


@pytest.mark.parametrize(
    ("words", "said", "pairs"),
    [
        (("train.epochs=7",), "train.epochs 20 and 7", True),
        (("data.seed=1",), "data.seed 0 and 1", False),
        (("data.validation=300",), "data.validation 400 and 300", False),
    ],
)
def test_what_cannot_be_compared_is_said(pair, tmp_path, words, said, pairs):
    found = compare([pair[0], fake(tmp_path / "other", 2, words=words)])
    assert found["warnings"] == [f"one and other: {said}"]
    assert (found["sweeps"][1]["to the first mean"] is not None) == pairs
    assert any(line.startswith("careful") and said in line for line in lines(found))


def test_sweeps_of_other_data_have_no_difference(pair, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair[0], other)
    for path in other.glob("refits/*/run.json"):
        write_json(path, read_json(path) | {"data": "1" * 64})
    (other / "summary.json").unlink()
    found = compare([pair[0], other])
    assert found["sweeps"][1]["to the first mean"] is None
    assert found["warnings"] == [
        "one and other: other data (digest 000000000000 and 111111111111)",
        "one and other: other is stopped",
    ]


def test_a_sweep_without_refits_is_compared_as_far_as_it_goes(pair, tmp_path):
    found = compare([pair[0], fake(tmp_path / "begun", 1, complete=0, seeds=0)])
    assert found["sweeps"][1]["to the first mean"] is None
    assert table(found["csv"])[1]["test richkd"] == ""
    assert any("stopped" in line for line in lines(found))


@pytest.mark.parametrize("count", [2, ASIDE, ASIDE + 2])
def test_the_table_fits_into_a_terminal(pair, tmp_path, count):
    folders = [*pair]
    for k in range(count - 2):
        folders.append(tmp_path / f"sweep{k}")
        shutil.copytree(pair[k % 2], folders[-1])
    shown = lines(compare(folders, tmp_path / "x.csv"), width=100)
    rows = shown[: shown.index("")]
    assert max(map(len, rows)) <= 100
    assert all(any(folder.name in line for line in rows) for folder in folders)


def test_sweeps_of_the_same_name_are_told_apart(pair, tmp_path, monkeypatch):
    shutil.copytree(pair[1], tmp_path / "old" / "one")
    monkeypatch.chdir(tmp_path)
    found = compare([pair[0], Path("old/one")])
    first, other = found["sweeps"]
    assert (first["sweep"], other["sweep"]) == (str(pair[0].resolve()), "old/one")
    assert [row["folder"] for row in table(found["csv"])] == [str(pair[0]), f"{tmp_path}/old/one"]
    assert first["to the first mean"] is None
    ours, theirs = accuracies(pair[1], "richkd-l"), accuracies(pair[0], "richkd-l")
    assert other["to the first mean"] == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)
    assert any("old/one" in line for line in lines(found))


def test_a_sweep_by_two_spellings_is_one(pair, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(pair[0])
    monkeypatch.chdir(pair[0].parent)
    with pytest.raises(ConfigError, match="two sweeps or more but got one"):
        compare([pair[0], Path("one"), tmp_path / "link"])


def test_settings_that_differ_are_shown_to_their_last_digit(pair, tmp_path):
    found = compare([pair[0], fake(tmp_path / "x", 2, words=("train.lr=0.0500001",))])
    assert [row["train.lr"] for row in found["sweeps"]] == [0.05, 0.0500001]
    assert any(line.split()[-2:] == ["0.05", "0.0500001"] for line in lines(found) if line)


@pytest.mark.parametrize("count", [0, 1])
def test_less_than_two_sweeps_are_refused(pair, count):
    with pytest.raises(ConfigError, match="two sweeps or more"):
        compare([pair[0]] * (count + 1) if count else [])


def test_a_comparison_is_made_without_what_draws_and_without_ray_and_mlflow(pair):
    code = f"""
import sys
from tune.__main__ import ABOUT, VERBS, main
words = ["compare", "{pair[0]}", "{pair[1]}"]
assert main("python -m tune", ABOUT, VERBS, words) == 0
assert not {{"mlflow", "ray", "matplotlib"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_verb_prints_writes_and_answers(pair):
    storage = f"storage={pair[0].parent}"
    process = command("compare", "one", "two", storage, "--json", cwd=pair[0].parent)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert [row["sweep"] for row in answer["sweeps"]] == ["one", "two"]
    assert Path(answer["csv"]).is_file()
    assert "paired by seed" in err
