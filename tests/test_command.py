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

import pytest

from richkd.__main__ import ABOUT, VERBS
from richkd.command import Done, Stop, Verb, main
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
