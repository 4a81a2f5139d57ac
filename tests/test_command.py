"""Both command lines as a shell sees them: exit codes, one-line errors, JSON on the last line."""

import argparse
import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from richkd import data
from richkd.__main__ import ABOUT, VERBS
from richkd.command import Done, Stop, Verb, main
from richkd.config import Data
from richkd.data import load
from richkd.errors import ConfigError, CorruptError, Interrupted, NonFiniteError, Stopped
from tune.__main__ import VERBS as TUNE_VERBS


def verb(outcome: object, **flags: str) -> dict[str, Verb]:
    def run(arguments: argparse.Namespace) -> Done:
        print("chatter")
        if isinstance(outcome, BaseException):
            raise outcome
        flags = {key: value for key, value in vars(arguments).items() if key != "stop"}
        return Done({"words": arguments.words, "flags": flags}, outcome)

    return {"go": Verb(run=run, help="goes", flags=flags)}


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (0, 0),
        (3, 3),
        (NonFiniteError("x"), 1),
        (ConfigError("x"), 2),
        (CorruptError("x"), 4),
        (Stopped("x"), 75),
        (Interrupted(signal.SIGINT, "x"), 130),
        (Interrupted(signal.SIGTERM, "x"), 143),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 75),
        (OSError(errno.EROFS, "Read-only file system", "f"), 2),
    ],
)
def test_the_exit_code_says_what_happened(outcome, code, capsys):
    assert main("program", "", verb(outcome), ["go"]) == code


def test_an_error_is_one_line_on_standard_error(capsys):
    main("program", "", verb(ConfigError("a\nb")), ["go"])
    assert capsys.readouterr().err == "program: a b\n"


def test_a_warning_is_one_line_and_does_not_disturb_the_answer(capsys):
    def run(_: argparse.Namespace) -> Done:
        warnings.warn("a\nb", stacklevel=1)
        return Done({})

    verbs = {"go": Verb(run=run, help="goes", flags={})}
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main("program", "", verbs, ["go", "--json"]) == 0
    told = capsys.readouterr()
    assert (told.out, told.err) == ("{}\n", "program: warning: a b\n")


def test_an_unforeseen_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        main("program", "", verb(ZeroDivisionError()), ["go"])


@pytest.mark.parametrize("outcome", [0, ConfigError("x")])
def test_json_is_the_only_line_of_standard_output(outcome, capsys):
    main("program", "", verb(outcome), ["go", "--json", "a.yaml"])
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1
    assert json.loads(told.out)
    assert "chatter" in told.err


def test_words_and_flags_may_be_mixed(capsys):
    flags = {"name=NAME": "a name", "dry": "nothing"}
    main(
        "program", "", verb(0, **flags), ["go", "a.yaml", "--name", "n", "x=1", "--json", "b.yaml"]
    )
    answer = json.loads(capsys.readouterr().out)
    assert answer["words"] == ["a.yaml", "x=1", "b.yaml"]
    assert answer["flags"]["name"] == "n"
    assert answer["flags"]["dry"] is False


@pytest.mark.parametrize("argv", [["og"], ["go", "--jsn"], ["go", "--name"]])
def test_a_wrong_command_line_is_one_line_and_exit_2(argv, capsys):
    assert main("program", "", verb(0, **{"name=NAME": ""}), argv) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_verb_with_a_typo_is_suggested(capsys):
    assert main("python -m richkd", ABOUT, VERBS, ["distil"]) == 2
    assert "did you mean distill?" in capsys.readouterr().err


@pytest.mark.parametrize("verbs", [VERBS, TUNE_VERBS])
def test_help_names_every_verb_and_fits_80_columns(verbs, capsys):
    assert main("python -m x", "about", verbs, ["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in verbs)
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_the_second_ends(signum, capfd):
    before = signal.getsignal(signum)
    stop = Stop()
    with stop.installed():
        assert stop() is None
        os.kill(os.getpid(), signum)
        assert stop() == signum
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), signum)
            signal.sigtimedwait([], 1)  # where the handler runs at the latest
    assert caught.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before
    assert "stopping" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["distill", "--help"], ["best", "none", "--json"]])
def test_a_reader_that_has_gone_is_no_traceback(words, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    package = "tune" if "best" in words else "richkd"
    ended = subprocess.run(
        [sys.executable, "-m", package, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writer)
    assert ended.returncode == (2 if "best" in words else 0)
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr


# evaluate


def evaluated(capsys, *words):
    code = main("python -m richkd", ABOUT, VERBS, ["evaluate", *words, "--json"])
    told = capsys.readouterr()
    return code, json.loads(told.out), told.err


@pytest.fixture
def taught(tmp_path):
    """A layer with two given teachers of the digits: one right on all but 100 rows, one on the even classes."""
    source = load(Data(), tmp_path)
    labels = np.concatenate([source.train.labels, source.test.labels])
    right = np.eye(10)[labels].astype(np.float32)
    task = 5 * right
    task[:100] = np.roll(task[:100], 1, axis=1)
    np.savez(tmp_path / "given.npz", task=task, clip=right * (labels % 2 == 0)[:, None])
    np.save(tmp_path / "train.npy", task[: len(source.train)])
    layer = tmp_path / "mine.yaml"
    layer.write_text(
        f"data: {{source: digits, validation: 200}}\n"
        f"teacher: {{logits: '{tmp_path}/given.npz:task'}}\n"
        f"clip: {{logits: '{tmp_path}/given.npz:clip'}}\n"
        f"cache: {tmp_path}/cache\n"
    )
    return str(layer)


def test_the_teachers_of_a_config_are_evaluated_on_all_rows(taught, capsys):
    code, found, told = evaluated(capsys, taught, "fusion.alpha=0.5")
    assert code == 0
    assert (found.pop("alpha"), found.pop("scale")) == (0.5, "model")
    assert "fused at alpha 0.5, clip.scale model" in told
    assert set(found) == {"teacher", "clip", "fused"}
    for parts in found.values():
        assert {part: values["rows"] for part, values in parts.items()} == {
            **{"val": 200, "test": 800, "all": 1797},
        }
    assert found["teacher"]["all"]["top1"] == pytest.approx(100 * 1697 / 1797)
    assert found["teacher"]["test"]["top1"] == 100
    even = np.isin(load(Data(), Path()).test.labels, (0, 2, 4, 6, 8)).mean()
    # of a row without a word the first class is taken, which is even
    assert found["clip"]["test"]["top1"] == pytest.approx(100 * even)
    assert "teacher  all   top1  94.44 %" in told
    assert "of 1797 rows" in told


def test_teachers_without_test_rows_are_evaluated_on_the_others(taught, tmp_path, capsys):
    _, found, _ = evaluated(
        capsys, taught, f"teacher.logits={tmp_path}/train.npy", "method.name=kd"
    )
    assert set(found) == {"alpha", "scale", "teacher"}
    assert {part: values["rows"] for part, values in found["teacher"].items()} == {
        **{"val": 200, "all": 997},
    }


def test_a_config_without_a_teacher_has_nothing_to_evaluate(taught, capsys):
    code, found, _ = evaluated(capsys, taught, "method.name=ce")
    assert code == 2
    assert "or a config with a teacher, but method.name=ce has none" in found["error"]


def test_a_run_is_evaluated_by_its_folder_and_by_its_name(taught, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["distill", taught, "method.name=kd", "student.name=cnn8", "train.epochs=1", "--name"]
    monkeypatch.setattr("richkd.evaluation.write", lambda _, folder, name: folder / name)
    monkeypatch.setattr("richkd.estimate.LATENCY_SECONDS", 0)
    # a run goes before a layer under conf/ of the same name
    for name in ("mine", "digits"):
        assert main("python -m richkd", ABOUT, VERBS, [*words, name, "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        for word in (name, f"runs/{name}", f"runs/{name}/best"):
            code, found, _ = evaluated(capsys, word, "evaluate.rows=0")
            assert (code, found["val"], found["test"]) == (0, made["val"], made["test"])
            assert found["page"] == f"runs/{name}/evaluation/{name}"


def test_a_layer_under_conf_is_known_by_its_name_also_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for word in ("imagefolder", "imagefolder.yaml"):
        code, found, _ = evaluated(capsys, word)
        assert code == 2
        assert "data.path must be a folder" in found["error"]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("none", "a run, a sweep, a checkpoint or layers but none is none"),
        ("runs/none", "but runs/none is none: no folder here or in runs/"),
        ("/", "/ holds no checkpoint; give a checkpoint, a run or a finished sweep"),
    ],
)
def test_what_is_neither_a_run_nor_a_layer_is_asked_for(word, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, found, _ = evaluated(capsys, word)
    assert code == 2
    assert told in found["error"]


def test_a_folder_of_data_that_is_called_like_a_layer_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imagefolder").mkdir()
    code, found, _ = evaluated(capsys, "imagefolder", "data.path=nothing")
    assert code == 2
    assert "data.path must be a folder" in found["error"]


def test_of_a_run_it_can_be_said_where_its_data_lie_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    whole = {"images": rng.integers(0, 256, (60, 8, 8, 3), np.uint8), "labels": np.arange(60) % 3}
    np.savez("data.npz", **whole)
    Path("names.txt").write_text("a\nb\nc\n")
    words = ["data.source=arrays", "data.path=data.npz", "data.names=names.txt"]
    words += ["data.validation=6", "method.name=ce"]
    words += ["student.name=cnn8", "train.epochs=1", "train.batch_size=16"]
    assert main("python -m richkd", ABOUT, VERBS, ["distill", *words, "--name", "mine"]) == 0
    capsys.readouterr()
    (tmp_path / "moved").mkdir()
    Path("data.npz").rename("moved/renamed.npz")
    Path("names.txt").rename("moved/names.txt")
    data._loaded.clear()
    assert evaluated(capsys, "mine")[0] == 2
    moved = "data.path=moved/renamed.npz", "data.names=moved/names.txt", "evaluate.rows=5"
    code, found, _ = evaluated(capsys, "mine", *moved)
    assert (code, "test" in found) == (0, True)
    for word in ("data.seed=1", "data.source=folder"):
        code, found, _ = evaluated(capsys, "mine", *moved, word)
        assert code == 2
        assert f"but got {word.partition('=')[0]}" in found["error"]
