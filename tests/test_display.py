"""What the terminal shows while a sweep runs: its width, its counts, and plain lines without a terminal."""

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.cells import cell_len
from rich.console import Console

from richkd.command import Stop
from richkd.config import Config, Fusion, Loss, Train
from richkd.layers import brief
from tune.agenda import Job
from tune.display import Display, describe, describe_job, show

PARAMS = {
    "fusion.alpha": 0.123456789,
    "loss.temperature": 7.987654321,
    "loss.logit": 15.123456789,
    "clip.prompts": "digits-written",
}
STATES = ("finished", "running", "pruned", "failed", "stopped")


def job(number: int, kind: str = "trial", params: dict | None = None) -> Job:
    name = f"trial-kd-{number:03d}" if kind == "trial" else f"refit-richkd-l-paper-seed{number}"
    return Job(
        id=name,
        kind=kind,
        method="richkd",
        number=number,
        folder=Path(name),
        config=Config(train=Train(epochs=240)),
        params=PARAMS if params is None else params,
    )


def console(width: int, terminal: bool) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=terminal, highlight=False, soft_wrap=True
    )


def fill(display: Display, jobs: int = 20, **more: dict) -> None:
    """Let `jobs` jobs begin, report and end, in all states."""
    for number in range(jobs):
        one = job(number, "refit" if number % 4 == 3 else "trial", **more)
        display.started(one)
        display.epoch(one, {"epoch": 120, "best_val_top1": 90.0 + number / 10})
        state = STATES[number % len(STATES)]
        if state != "running":
            metrics = {"best_val_top1": 91.0 + number / 10} if state == "finished" else {}
            display.ended(one, state, metrics)


def lines(text: str) -> list[str]:
    """Return the lines that a terminal shows, without control codes."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return [line.rstrip() for line in re.split(r"[\r\n]", plain)]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("title", ["digits-cnn8-260101-120000", "a-long-name-" * 9])
def test_the_live_table_is_no_wider_than_the_terminal_and_80_columns(width, title):
    out = console(width, terminal=True)
    with Display(title, out) as display:
        fill(display)
        display.live.refresh()
    shown = lines(out.file.getvalue())
    assert any("trial-kd-018" in line for line in shown)
    assert max(cell_len(line) for line in shown) <= min(80, width)


@pytest.mark.parametrize("width", [80, 200])
def test_at_80_columns_run_state_epoch_accuracy_and_settings_are_all_there(width):
    out = console(width, terminal=True)
    with Display("digits", out) as display:
        fill(display)
        drawn = console(width, terminal=False)
        drawn.print(display.draw())
    rows = {line.split()[0]: line for line in lines(drawn.file.getvalue()) if "120/240" in line}
    assert len(rows) == 12
    assert rows["trial-kd-018"].split()[:4] == ["trial-kd-018", "failed", "120/240", "91.80"]
    assert "alpha 0.123 T 7.99" in rows["trial-kd-018"]
    assert "refit-richkd-l-paper-seed19" in rows


def test_the_header_counts_ends_and_names_the_best_trial():
    out = console(80, terminal=True)
    with Display("digits", out) as display:
        fill(display)
        header = display.header()
    assert header.startswith("12 of 0 runs, 4 pruned, 4 failed, best 92.00 % (trial-kd-010), 0:0")


@pytest.mark.parametrize("name", ["[bold]digits[/bold]", "[/]", "digits [x]"])
def test_brackets_in_names_are_shown_as_they_are(name):
    out = console(80, terminal=True)
    with Display(name, out) as display:
        fill(display, 3, params={"clip.prompts": name})
        display.live.refresh()
    shown = lines(out.file.getvalue())
    assert any(line.strip() == name for line in shown)
    assert any(line.startswith("trial-kd-000") and name in line for line in shown)


def test_the_terminal_is_left_clean_and_its_cursor_shown():
    out = console(80, terminal=True)
    with Display("digits", out) as display:
        display.progress("pre-training the miniature", 3, 10)
        display.live.refresh()
        fill(display)
    assert display.live is None
    text = out.file.getvalue()
    assert "pre-training the miniature:  30 %" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_without_a_terminal_each_end_is_one_plain_line(width):
    out = console(width, terminal=False)
    with Display("digits", out) as display:
        assert display.live is None
        fill(display)
    text = out.file.getvalue()
    assert "\x1b" not in text
    told = text.splitlines()
    assert len(told) == 16
    assert told[0].startswith(
        "trial-kd-000                 finished  val  91.00  alpha 0.123 T 7.99"
    )
    assert [line.split()[1] for line in told[:4]] == ["finished", "pruned", "failed", "stopped"]


def test_an_end_before_the_first_epoch_has_no_accuracy():
    out = console(80, terminal=False)
    with Display("digits", out) as display:
        one = job(0)
        display.started(one)
        display.ended(one, "failed", {})
    assert re.match(r"trial-kd-000 +failed +val +-  alpha", out.file.getvalue())


def test_progress_without_a_terminal_is_a_line_at_the_start_the_half_and_the_end():
    out = console(80, terminal=False)
    with Display("digits", out) as display:
        for done in range(101):
            display.progress("pre-training", done, 100)
    assert out.file.getvalue().splitlines() == [
        "pre-training: 0 %",
        "pre-training: 50 %",
        "pre-training: 100 %",
    ]


def test_progress_of_nothing_divides_by_nothing():
    out = console(80, terminal=False)
    Display("digits", out).progress("cache", 0, 0)
    assert out.file.getvalue() == "cache: 0 %\n"


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (PARAMS, "alpha 0.123 T 7.99 w 15.1 digits-written"),
        ({"train.lr": 0.00012345, "train.epochs": 20}, "lr 0.000123 epochs 20"),
        ({"fusion.alpha": 1.0, "seed": 3}, "alpha 1"),
        ({}, ""),
    ],
)
def test_settings_are_told_in_few_characters(params, text):
    assert describe(params) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.5, "0.5"), (0.123456, "0.123"), (3, "3"), (2.0, "2"), (78042.0, "78042")),
        *((1e20, "1e+20"), (float("inf"), "inf"), ("a", "a"), (True, "True"), (None, "-")),
        ({"choice": ["A", "no"], "when": {"k": 1}}, "{choice: [A, 'no'], when: {k: 1}}"),
        (("top1", "latency"), "[top1, latency]"),
    ],
)
def test_a_value_is_said_shortly(value, text):
    assert brief(value) == text


def test_a_temperature_says_what_it_is_relative_to():
    found = {"fusion.alpha": 0.61907, "loss.temperature": 2.39, "loss.logit": 4, "seed": 3}
    assert describe(found) == "alpha 0.619 T 2.39 w 4"
    assert describe(found | {"loss.temperature_of": "task"}) == "alpha 0.619 T 2.39 of task w 4"


def test_a_temperature_of_fused_logits_is_marked_where_fusion_makes_it_another():
    one = job(0, params={"loss.temperature": 3.0})
    fused = replace(one.config, fusion=Fusion(alpha=0.7))
    assert describe_job(replace(one, config=fused)) == "T 3 of fused"
    assert describe_job(replace(one, config=replace(fused, fusion=Fusion(alpha=1.0)))) == "T 3"
    relative = replace(fused, loss=Loss(temperature_of="task"))
    assert describe_job(replace(one, config=relative)) == "T 3"


class Known:
    """An agenda that an earlier driver has worked on."""

    total, before, stopping = 72, 5, False
    searches = (
        SimpleNamespace(
            best=lambda: SimpleNamespace(values=[92.75], number=3), label="{:03d}".format
        ),
    )


def test_what_an_earlier_driver_did_is_counted():
    with Display("digits", console(80, terminal=True)) as display:
        display.follow(Known())
        fill(display, 1)
        assert display.header().startswith("6 of 72 runs, best 92.75 % (trial-003), 0:0")


RESULT = {
    "sweep": "runs/s",
    "summary": {
        "kd_tuned": {"mean": 90.0, "sd": 1.0, "n": 2, "difference": None},
        "richkd": {"mean": 90.0, "sd": 1.0, "n": 2, "difference": None},
        "difference_tuned": {"mean": 0.0, "se": 0.0, "low": 0.0, "high": 0.0, "wins": 0, "n": 2},
    },
    "best": {
        **{"settings": {"student.name": "cnn8", "clip.scale": "none"}, "scale": "none", "trial": 3},
        **{"val_top1": 91.0, "origin": None, "checkpoint": "runs/s/refits/richkd-l-seed1/best"},
    },
    "front": [],
    "duplicates": 0,
    "mlflow": {"lines": {}},
    "failed": 0,
    "seconds": 60.0,
    "machine": {"cores": 2},
}


def test_equal_students_are_said_to_be_equal_and_not_to_differ_by_nothing(capsys):
    show(RESULT)
    said = capsys.readouterr().out
    assert "equal, seed by seed" in said
    assert "+0.00" not in said
    assert "cnn8 at clip.scale none" in said
    assert "Pareto" not in said


def test_the_front_is_a_table_of_its_objectives(capsys):
    first = {"trial": "trial-003", "top1": 91.25, "latency": 0.1234567}
    second = {"trial": "trial-001", "top1": 80.0, "latency": 0.05}
    params = [{"student.name": "cnn[8]"}, {"student.name": "cnn4", "fusion.alpha": 0.5}]
    pairs = zip((first, second), params, strict=True)
    show(RESULT | {"front": [each | {"params": of} for each, of in pairs]})
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith("trial-0")]
    assert rows == [
        ["trial-003", "91.25", "0.123", "cnn[8]"],
        ["trial-001", "80.00", "0.05", "cnn4", "alpha", "0.5"],
    ]
    assert "top-1, %  latency, ms an image" in said


def test_a_signal_is_shown_by_the_live_table_and_by_nobody_beside_it(capfd):
    stop = Stop()
    file = io.StringIO()
    with Display("s", Console(file=file, force_terminal=True, width=80), stop=stop) as display:
        assert "stopping" not in display.draw().plain
        stop._handle(2, None)
        assert "stopping" in display.header()
        assert "stopping" in display.draw().plain
    assert capfd.readouterr().err == ""
    stop.signum = None
    stop._handle(2, None)
    assert "stopping" in capfd.readouterr().err
