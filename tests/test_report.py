"""The report of a sweep, against its study, its files, Optuna, an HTML parser and a browser."""

import base64
import csv
import io
import itertools
import json
import re
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from faked import HOSTILE, fake, trial
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState
from small import ROOT, command

from richkd import draw
from richkd.errors import Interrupted
from richkd.files import read_json, write_json
from richkd.layers import build, digest, read
from richkd.page import Code, Text, to_html, to_markdown
from tune import launch, plots, report
from tune.budget import Budget
from tune.driver import locked
from tune.findings import Trial, comparable, found_in, importance, ranked, read_trial
from tune.sweep import Sweep, asked_of, open_searches

PICTURES = ["students", "alpha", "heat", "importance", "prompts", "parallel", "history", "curves"]
EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Reader(HTMLParser):
    """Reads a page, and holds that its tags are closed in their order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.cells: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        """Note a tag."""
        self.tags.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        """Close a tag."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Note the text of a cell."""
        if "td" in self.open:
            self.cells[-1] += data


def table(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    return list(csv.DictReader(io.StringIO(path.read_text())))


@pytest.fixture(scope="module")
def faked(tmp_path_factory) -> Path:
    """A finished sweep of 12 trials."""
    return fake(tmp_path_factory.mktemp("faked") / "first")


def test_a_sweep_ends_with_its_report_on_the_disk_and_in_mlflow(swept):
    answer, client = swept
    page = Path(answer["report"])
    assert page == Path(answer["sweep"]) / "report" / "report.html"
    (experiment,) = client.search_experiments(filter_string="name = 'richkd'")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.`richkd.kind` = 'sweep'")
    sent = {one.path for one in client.list_artifacts(parent.info.run_id, "report")}
    assert sent == {f"report/{one.name}" for one in page.parent.iterdir()}
    assert "report/report.html" in parent.data.tags["mlflow.note.content"]


def test_the_tables_hold_what_the_study_and_the_refits_hold(swept):
    answer, _ = swept
    folder = Path(answer["sweep"])
    storage = f"sqlite:///{folder / 'study.db'}"
    study = optuna.load_study(study_name="richkd", storage=storage)
    rows = table(folder / "report" / "leaderboard.csv")
    assert int(rows[0]["trial"]) == answer["best"]["trial"]
    assert {int(row["trial"]) for row in rows} == {t.number for t in study.trials}
    for row in rows:
        found = study.trials[int(row["trial"])]
        last = found.intermediate_values[max(found.intermediate_values)]
        complete = found.state == TrialState.COMPLETE
        assert float(row["val_top1"]) == (found.value if complete else last)
        assert (
            float(row["fusion.alpha"])
            == found.user_attrs.get("settings", found.params)["fusion.alpha"]
        )
    for row in table(folder / "report" / "summary.csv"):
        entry = answer["summary"][row["model"]]
        assert float(row["test_top1"]) == entry.get("mean", entry.get("top1"))
    points = table(folder / "report" / "curves.csv")
    for student, label in (("kd_tuned", "kd-tuned"), ("richkd", "richkd-l")):
        lines = (folder / "refits" / f"{label}-seed1" / "metrics.jsonl").read_text().splitlines()
        mine = [p["val_top1"] for p in points if (p["run"], p["seed"]) == (student, "1")]
        assert list(map(float, mine)) == [json.loads(line)["val/top1"] for line in lines]


def test_the_report_is_rebuilt_without_mlflow_and_its_pictures_are_the_same_bytes(copied):
    folder = copied / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    code = f"""
import sys
from pathlib import Path
sys.argv = ["tune", "report", "{copied}"]
from tune.__main__ import ABOUT, VERBS, main
assert main("python -m tune", ABOUT, VERBS, sys.argv[1:]) == 0
assert not {{"mlflow", "ray"}} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(folder / "report.html") in done.stdout
    assert f"optuna-dashboard sqlite:///{copied / 'study.db'}" in done.stdout
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    same = [name for name in before if not name.startswith("report.")]
    assert all(after[name] == before[name] for name in same)


def test_the_answer_names_files_that_are_there(faked):
    process = command("report", str(faked), "--json", cwd=faked.parent)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    answer = json.loads(out.splitlines()[-1])
    assert all(
        Path(path).is_file() for path in (answer["html"], answer["markdown"], *answer["csv"])
    )
    assert len(answer["leading"]) == 5


def test_the_page_fetches_nothing_and_runs_nothing(faked):
    page = report.write(found_in(faked)).read_text()
    read = Reader(page)
    tags = [tag for tag, _ in read.tags]
    assert not {"script", "link", "iframe", "object", "embed", "form", "base"} & set(tags)
    (policy,) = (a["content"] for _, a in read.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    for _, attributes in read.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "url(" not in page and "@import" not in page
    assert tags.count("img") == len(PICTURES)


def test_each_picture_has_its_table_in_the_page_and_beside_it(faked):
    folder = report.write(found_in(faked)).parent
    read = Reader((folder / "report.html").read_text())
    saved = {a["download"]: a["href"] for tag, a in read.tags if tag == "a"}
    assert {f"{name}.csv" for name in PICTURES} <= saved.keys()
    for name, link in saved.items():
        assert (
            base64.b64decode(link.removeprefix("data:text/csv;base64,"))
            == (folder / name).read_bytes()
        )
        assert len((folder / name).read_bytes().splitlines()) > 1
    for name in PICTURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<script" not in (folder / f"{name}.svg").read_bytes()
    links = re.findall(r"\]\(([\w-]+\.(?:png|csv))\)", (folder / "report.md").read_text())
    assert {f"{name}.{kind}" for name in PICTURES for kind in ("png", "csv")} <= set(links)
    assert all((folder / link).is_file() for link in links)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """The folder of a report whose prompt sets and failures have hostile names."""
    folder = fake(tmp_path_factory.mktemp("hostile") / "a <b>|c", 30, prompts=HOSTILE)
    texts = {f"trial-{k:03d}": text for k, text in enumerate(HOSTILE)}
    write_json(
        folder / "summary.json", {"failures": texts, "failure_kinds": dict.fromkeys(texts, "nan")}
    )
    return report.write(found_in(folder)).parent


def test_hostile_names_are_text_in_the_page(hostile):
    page = (hostile / "report.html").read_text()
    read = Reader(page)
    assert not {"script", "form"} & {tag for tag, _ in read.tags}
    assert all(a["src"].startswith("data:") for tag, a in read.tags if tag == "img")
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith("on")]
    for name in HOSTILE[:4]:
        assert name.replace("\n", "\\n") in read.cells
    assert "\x1b" not in page and "\u202e" not in page


def test_hostile_names_do_nothing_in_a_browser(hostile, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium")
    page = hostile / "report.html"
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    run = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    shown = subprocess.run([*run, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>a &lt;b&gt;|c</title>" in shown.stdout


def test_hostile_names_stay_in_their_cells_in_markdown_and_csv(hostile):
    folder = hostile
    text = (folder / "report.md").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not re.search(r"(?<!\\)<", "\n".join(lines))
    blocks = itertools.groupby(lines, lambda line: line.startswith("|"))
    for block in (list(block) for is_table, block in blocks if is_table):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block}) == 1
    for path in folder.glob("*.csv"):
        rows = list(csv.reader(io.StringIO(path.read_text(), newline="")))
        assert len({len(row) for row in rows}) == 1, path
        for cell in (cell for row in rows for cell in row):
            if re.match(r"\s*[=+\-@\t\r]", cell):
                float(cell)


def test_names_that_the_font_lacks_can_be_told_apart():
    drawn = {draw.drawable(name) for name in HOSTILE}
    assert len(drawn) == len(HOSTILE)
    assert all(len(one) <= 24 and one.isprintable() for one in drawn)
    assert draw.drawable("é 0.5 $x$") == "é 0.5 $x$"


@pytest.mark.parametrize(
    ("trials", "complete", "seeds"), [(12, 4, 0), (12, 0, 0), (1, 1, 0), (1, 1, 1), (0, 1, 0)]
)
def test_a_sweep_that_has_not_finished_says_so(tmp_path, trials, complete, seeds):
    words = ("sweep.trials=20", "refit.seeds=4")
    folder = fake(tmp_path / "x", trials, complete=complete, seeds=seeds, words=words)
    (folder / "summary.json").unlink(missing_ok=True)
    found = found_in(folder)
    page = report.write(found).read_text()
    Reader(page)
    assert f"This sweep is stopped: {2 * trials} of 40 trials have ended" in page
    assert f"{5 * seeds} of 20 refits have finished" in page
    assert "python -m tune resume" in page
    assert ("No trial has finished yet" in page) == (found.best is None)
    with locked(folder):
        (note,) = report.unfinished(found_in(folder))
        assert "This sweep is running" in note.text


def test_what_the_terminal_says_of_hostile_names_is_printable(hostile):
    said = report.lines(found_in(hostile.parent), hostile / "report.html")
    assert all(line.isprintable() for line in said)
    assert sum(line.startswith("trial ") for line in said) == 5


def test_a_sweep_without_a_study_has_a_report(tmp_path):
    folder = fake(tmp_path / "x", 0, seeds=0)
    (folder / "study.db").unlink()
    page = report.write(found_in(folder)).read_text()
    assert "stopped: 0 of ? trials have ended" in page


def test_a_torn_line_ends_a_curve(faked, tmp_path):
    shutil.copytree(faked, tmp_path / "x")
    path = tmp_path / "x" / "refits" / "kd-seed0" / "metrics.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().splitlines()[:3]) + b'\n{"epoch": 4, "val')
    found = found_in(tmp_path / "x")
    assert list(found.curves["kd"][0]) == [1, 2, 3]
    assert all(picture.svg for picture in plots.pictures(found))


def test_the_bars_of_a_trial_of_several_seeds_are_those_of_its_runs(tmp_path):
    rng = np.random.default_rng(0)
    each = [[60.0, 80.0, 79.0], [70.0, 75.0, 84.0], [61.0, 90.0, 88.0]]
    for k, values in enumerate(each):
        place = tmp_path / "trials" / "000" / f"seed{k}"
        place.mkdir(parents=True)
        rows = [json.dumps({"epoch": e, "val/top1": v}) for e, v in enumerate(values, 1)]
        (place / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    one = trial(rng, TrialState.COMPLETE, ("a",))
    found = read_trial(one, "000", tmp_path, 3)
    assert found.seeds == (80.0, 84.0, 90.0)
    assert read_trial(one, "001", tmp_path, 3).seeds == ()
    assert read_trial(one, "000", tmp_path, 1).seeds == ()


def test_the_picture_along_alpha_has_means_and_deviations_over_seeds(faked):
    found = found_in(faked)
    seeds = (90.0, 91.0, 95.0)
    main = [replace(t, seeds=seeds) if t.state == "finished" else t for t in found.main]
    picture = plots.alpha(replace(found, trials=found.trials | {"richkd": main}))
    rows = {row[0]: dict(zip(picture.header, row, strict=True)) for row in picture.rows}
    best = rows[f"trial-{found.best.label}"]
    assert (best["sd"], best["seeds"]) == (pytest.approx(np.std(seeds, ddof=1)), 3)
    values = [metrics["best_val_top1"] for metrics in found.refits["richkd"].values()]
    assert rows["richkd"]["val_top1"] == pytest.approx(statistics.fmean(values))
    assert rows["richkd"]["sd"] == pytest.approx(statistics.stdev(values))
    assert (rows["kd"]["alpha"], rows["richkd_paper"]["alpha"]) == (1.0, 0.7)


def trials(
    count: int, rng: np.random.Generator, state: TrialState = TrialState.COMPLETE
) -> list[Trial]:
    return [read_trial(trial(rng, state, ("a", "b")), "", Path(), 1) for _ in range(count)]


def test_trials_are_compared_where_all_of_them_have_been():
    rng = np.random.default_rng(0)
    whole, early = trials(3, rng), trials(2, rng, TrialState.PRUNED)
    epoch, values = comparable(whole)
    assert epoch is None
    assert [value for _, value in values] == [t.values[0] for t in whole]
    epoch, values = comparable([*whole, *early, *trials(2, rng, TrialState.FAIL)])
    assert epoch == 5
    assert [value for _, value in values] == [t.curve[5] for t in (*whole, *early)]
    assert comparable([replace(whole[0], duplicate_of=3)]) == (None, [])


def test_what_decides_is_named_also_where_trials_lack_a_parameter():
    rng = np.random.default_rng(0)
    those = trials(60, rng)
    for k, one in enumerate(those[::2]):  # a branch of the space that has no weight
        params = {key: value for key, value in one.params.items() if key != "loss.logit"}
        those[2 * k] = replace(one, params=params, space={key: one.space[key] for key in params})
    shares = importance([(one, -abs(one.params["fusion.alpha"] - 0.6)) for one in those])
    assert shares.keys() == {"fusion.alpha", "loss.temperature", "loss.logit", "clip.prompts"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["fusion.alpha"] > 0.6
    assert importance([(one, one.top1) for one in those[:9]]) is None
    assert importance([(one, 90.0) for one in those]) is None


def test_all_pictures_are_drawn_of_trials_that_lack_a_parameter(faked):
    found = found_in(faked)
    names = ("fusion.alpha", "loss.temperature", "clip.prompts")
    main = []
    for place, one in enumerate(found.main):  # each name is missing in every third trial

        def left(of: dict, gone: str = names[place % 3]) -> dict:
            return {key: value for key, value in of.items() if key != gone}

        less = left(one.params), left(one.space), left(one.settings)
        main.append(replace(one, **dict(zip(("params", "space", "settings"), less, strict=True))))
    for best in (0, 4, 8):
        less = replace(found, trials=found.trials | {"richkd": main}, best=main[best])
        assert plots.heat(less).svg
    drawn = plots.pictures(less)
    assert all(picture.svg for picture in drawn)
    Reader(to_html("x", report.document(less, drawn)))


ALPHAS = [FloatDistribution(0, 1), IntDistribution(0, 1), CategoricalDistribution((0, 0.5, 1.0))]
TEMPERATURES = [
    *(FloatDistribution(0.5, 8, log=True), FloatDistribution(1, 4, step=0.5)),
    *(IntDistribution(1, 8), IntDistribution(1, 8, log=True)),
    *(CategoricalDistribution((2, 4)), CategoricalDistribution((0.5, 4, 2.0))),
]


@pytest.mark.parametrize(
    ("alpha", "temperature"), list(zip(2 * ALPHAS, TEMPERATURES, strict=True)), ids=str
)
def test_all_pictures_are_drawn_whatever_parameters_are_drawn_from(faked, alpha, temperature):
    found = found_in(faked)
    space = {
        "fusion.alpha": alpha,
        "loss.temperature": temperature,
        "loss.logit": temperature,
        "clip.prompts": CategoricalDistribution((None, "a", "b")),
        "student.residual": CategoricalDistribution((True, False)),
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    main = []
    for one in found.main:
        params = study.ask(space).params
        main.append(replace(one, params=params, space=space, settings=params))
    best = next(one for one in main if one.number == found.best.number)
    found = replace(found, trials=found.trials | {"richkd": main}, best=best)
    drawn = {picture.name: picture for picture in plots.pictures(found)}
    assert [name for name, picture in drawn.items() if not picture.svg] == []
    rows = drawn["heat"].rows
    params = {one.label: one.params for one in main}
    assert rows and all(
        row[1:3] == (params[row[0]]["fusion.alpha"], params[row[0]]["loss.temperature"])
        for row in rows
    )


def costly(folder: Path) -> Path:
    """Return the folder of a sweep of top-1 and parameters whose trial 3 is the duplicate of trial 1, on the front."""
    fake(folder, 0, seeds=0, words=("sweep/pareto", "sweep.objectives=[top1, parameters]"))
    (folder / "study.db").unlink()
    main, _ = open_searches(Sweep(folder, asked_of(folder)[1]), 6)
    found = [(90.0, 0.3, 2000), (91.0, 0.2, 2000), (80.0, 0.5, 1000), None, (80, 0.4, 3000)]
    for values in [*found, (91.0, 0.1, 3000)]:
        number = main.ask()[0]
        if values is None:
            main.answer(number, main.study.trials[1])
        else:
            metrics = dict(zip(COSTLY, values, strict=True))
            main.tell(number, TrialState.COMPLETE, metrics)
    return folder


COSTLY = ("best_val_top1", "best_val_loss", "parameters")


def test_picture_table_and_summary_have_the_front_of_the_search(tmp_path):
    found = found_in(costly(tmp_path / "x"))
    assert [one.label for one in found.front] == ["001", "002"]
    picture = plots.pareto(found)
    rows = {row[0]: row[1] for row in picture.rows}
    assert rows == {"000": "no", "001": "yes", "002": "yes", "004": "no", "005": "no"}


def test_points_of_a_front_that_coincide_have_one_label(tmp_path):
    found = found_in(costly(tmp_path / "x"))
    twin = replace(found.main[1], number=6, label="006")
    main = [*found.main, twin]
    main[1] = replace(main[1], params=main[1].params | {"student.name": "cnn16"})
    main[2] = replace(main[2], params=main[2].params | {"student.name": "cnn8"})
    found = replace(found, trials={"richkd": main})
    same = replace(twin, params=main[1].params)
    of_one = replace(found, trials={"richkd": [*main[:-1], same]})
    assert plots.labels(of_one, 1) == {
        (1000.0, 80.0): "cnn8: 002",
        (2000.0, 91.0): "cnn16: 001, 006",
    }
    assert plots.pareto(of_one).svg
    more = [replace(same, number=k, label=f"{k:03d}") for k in range(7, 10)]
    many = replace(found, trials={"richkd": [*of_one.main, *more]})
    assert plots.labels(many, 1)[2000.0, 91.0] == "cnn16: 001, 006, 007, 008 …"
    wide = [
        replace(same, number=10 + k, label=f"{10 + k:03d}", values=(70.0 - k, 900.0 - k))
        for k in range(5)
    ]
    crowded = replace(found, trials={"richkd": [*of_one.main, *wide]})
    assert plots.labels(crowded, 1)[2000.0, 91.0] == "001, 006"


def test_trials_of_the_same_accuracy_are_ranked_by_loss_as_the_best_is_chosen(tmp_path):
    found = found_in(costly(tmp_path / "x"))
    assert [one.label for one in ranked(found.main)] == ["005", "001", "003", "000", "004", "002"]
    assert ranked(found.main)[0] is found.best


@pytest.mark.parametrize("costs", [("parameters",), ("parameters", "latency")])
def test_a_sweep_with_costs_shows_what_accuracy_costs(faked, costs):
    found = found_in(faked)
    main = [
        replace(one, values=(one.values[0], *(1000.0 + one.number for _ in costs)), front=True)
        if one.values
        else one
        for one in found.main
    ]
    found = replace(found, objectives=("top1", *costs), trials=found.trials | {"richkd": main})
    drawn = plots.pictures(found)
    (picture,) = (one for one in drawn if one.name == "pareto")
    assert picture.svg and picture.header == ("trial", "front", "top1", *costs)
    assert len(picture.rows) == sum(one.state == "finished" for one in main)
    page = to_html("x", report.document(found, drawn))
    assert all(f">{cost}</th>" in page for cost in costs)


def test_the_leaderboard_says_where_first_trials_are_from(faked):
    found = found_in(faked)
    rng = np.random.default_rng(0)
    sources = ("paper", "first/trial-003", "a|<b>/trial-kd-001", None)
    main = [
        read_trial(trial(rng, TrialState.COMPLETE, ("a",), source=source), f"00{k}", Path(), 1)
        for k, source in enumerate(sources)
    ]
    board, _ = report.leaderboard(replace(found, trials={"richkd": main}))
    remarks = {row[0]: row[-1] for row in board.rows}
    assert remarks == {
        **{"000": "", "001": "from first/trial-003"},
        **{"002": "from a|<b>/trial-kd-001", "003": ""},
    }


def gap(*values: float) -> dict:
    """Return a difference over two seeds, or one without an interval."""
    mean = statistics.fmean(values)
    low, high = (values[0], values[-1]) if len(values) > 1 else (None, None)
    se = None if low is None else 0.5
    return {"mean": mean, "se": se, "low": low, "high": high, "wins": 1, "n": len(values)}


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "cannot be compared"),
        (gap(1.0), "On a single seed"),
        (gap(0.5, 2.0), "better than"),
        (gap(-2.0, -1.0), "worse than"),
        (gap(-1.0, 2.0), "do not tell"),
        (gap(0.0, 0.0), "the same"),
    ],
)
def test_the_verdict_says_no_more_than_the_interval(faked, found, said):
    assert said in report.verdict(replace(found_in(faked), summary={"difference_tuned": found}))


def test_the_command_of_the_report_runs_what_the_best_refit_ran(swept):
    answer, _ = swept
    folder = Path(answer["sweep"])
    text = (folder / "report" / "report.md").read_text()
    (line,) = (line for line in text.splitlines() if " -m richkd distill method" in line)
    threads, *words = shlex.split(line)
    run = read_json(folder / answer["best"]["checkpoint"] / ".." / "run.json")
    assert threads == f"OMP_NUM_THREADS={run['threads']}"
    assert digest(build(read(words[4:]))) == run["digest"]


def test_the_summary_of_a_sweep_is_what_its_report_was_made_of(tmp_path, monkeypatch):
    folder, written = fake(tmp_path / "x"), []
    sweep = Sweep(folder, asked_of(folder)[1])
    agenda = SimpleNamespace(searches=open_searches(sweep, 12), failed={})
    logbook = SimpleNamespace(conclude=lambda *_: {})
    known = replace(found_in(folder), seconds=1.5)
    monkeypatch.setattr(launch, "gather", lambda *_, **__: known)
    monkeypatch.setattr(report, "write", lambda found: written.append(found) or folder / "page")
    result = launch.conclude(sweep, agenda, logbook, Budget(folder / "spent.json", None, None))
    assert written == [known]
    assert (result["seconds"], result["summary"]) == (1.5, known.summary)
    best = result["best"]
    assert (best["trial"], best["val_top1"]) == (known.best.number, known.best.top1)
    assert best["params"] == known.best.params
    assert Path(best["checkpoint"]).parent.name == f"richkd-l-seed{known.seed}"
    assert result.keys() <= read_json(folder / "summary.json").keys()


def test_the_front_of_a_summary_is_that_of_the_report(tmp_path):
    folder = costly(tmp_path / "x")
    shown = launch.front(Sweep(folder, asked_of(folder)[1]), found := found_in(folder))
    assert [one["trial"] for one in shown] == ["trial-001", "trial-002"]
    assert [(one["top1"], one["parameters"]) for one in shown] == [(91.0, 2000.0), (80.0, 1000.0)]
    assert [one["params"] for one in shown] == [found.main[k].params for k in (1, 2)]
    assert [one["checkpoint"] for one in shown] == ["trials/001/best", "trials/002/best"]


def test_a_report_that_fails_is_a_warning_with_the_line_that_makes_it(faked, monkeypatch):
    found = found_in(faked)
    monkeypatch.setattr(report, "write", lambda _: 1 / 0)
    with pytest.warns(UserWarning, match=r"ZeroDivisionError.*python -m tune report .*first"):
        assert launch.report_of(found) is None

    def stopped(_: object) -> None:
        raise Interrupted(2, "stopped")

    monkeypatch.setattr(report, "write", stopped)
    with pytest.raises(Interrupted):
        launch.report_of(found)


def test_passwords_of_the_tracker_are_in_no_report(tmp_path):
    words = ("tracking.uri=postgresql://me:hunter2@host/db",)
    folder = report.write(found_in(fake(tmp_path / "x", 2, words=words))).parent
    assert not [path for path in folder.iterdir() if b"hunter2" in path.read_bytes()]


@given(st.lists(st.floats(0, 1), max_size=6))
def test_what_is_drawn_beside_each_other_does_not_coincide(places):
    moved = draw.beside(places, 0.02)
    assert all(now >= before for now, before in zip(moved, places, strict=True))
    assert all(b - a >= 0.02 - 1e-9 for a, b in itertools.pairwise(sorted(moved)))
    clear = [x for x in places if all(y == x or y > x or y < x - 0.02 * 6 for y in places)]
    assert all(x in moved for x in clear)


def test_text_and_code_are_shown_as_they_are():
    blocks = [Text("a < b & c", "note"), Code("a <b>\n  c")]
    assert "a &lt; b &amp; c" in to_html("x", blocks) and "a &lt;b&gt;\n  c" in to_html("x", blocks)
    assert "    a <b>\n      c" in to_markdown("x", blocks)


@pytest.mark.soak
def test_a_study_of_200_trials_is_reported_in_under_a_minute(tmp_path):
    folder = fake(tmp_path / "large", 200, seeds=8)
    began = time.monotonic()
    process = command("report", str(folder), cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert time.monotonic() - began < 60
    assert len(table(folder / "report" / "leaderboard.csv")) == 200


def test_the_dashboard_of_optuna_opens_the_studies_of_a_sweep(faked):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    program = Path(sys.executable).with_name("optuna-dashboard")
    process = subprocess.Popen(
        [program, f"sqlite:///{faked / 'study.db'}", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            assert process.poll() is None
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies") as answer:
                    studies = json.load(answer)["study_summaries"]
                break
            except OSError:
                time.sleep(0.1)
        assert {study["study_name"] for study in studies} == {"richkd", "kd"}
    finally:
        process.terminate()
        process.wait(30)
