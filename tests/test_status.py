"""How a sweep stands, against its study, its folders and its lock."""

import json
import os
import platform
from pathlib import Path

import optuna
import pytest

from richkd.errors import CorruptError
from richkd.files import read_json, write_json
from tune.driver import locked
from tune.status import lines, status


def test_the_status_of_a_finished_sweep_counts_what_the_study_and_the_folders_hold(swept):
    answer, _ = swept
    folder = Path(answer["sweep"])
    found = status(folder)
    studies = [
        optuna.load_study(study_name=name, storage=f"sqlite:///{folder / 'study.db'}")
        for name in ("richkd", "kd")
    ]
    words = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
    states = [words[trial.state.name] for study in studies for trial in study.trials]
    assert found["trials"] == {name: states.count(name) for name in set(states)} | {"of": 8}
    assert found["refits"] == {"finished": 10, "begun": 0, "of": 10}
    assert (found["state"], found["driver"], found["unsent"]) == ("finished", None, 0)
    assert found["best"]["val_top1"] == answer["best"]["val_top1"]
    assert 0 < found["hours"] < 1
    json.dumps(found)
    assert max(map(len, lines(found))) < 120


def test_a_sweep_on_which_a_driver_works_is_running(copied):
    with locked(copied):
        found = status(copied)
    assert (found["state"], found["driver"]["pid"]) == ("running", os.getpid())
    assert not any("go on" in line for line in lines(found))


def test_of_a_driver_on_another_machine_its_word_is_taken(copied):
    owner = {"host": f"not-{platform.node()}", "pid": 7, "since": "then", "beat": 3}
    write_json(copied / "owner.json", owner)
    found = status(copied)
    assert found["state"] == "running"
    assert any("which cannot be looked at from here" in line for line in lines(found))


def test_a_command_that_is_shown_finds_the_sweep_wherever_it_lies(copied):
    (copied / "summary.json").unlink()
    (line,) = (line for line in lines(status(copied)) if line.startswith("go on"))
    assert line.endswith(f"python -m tune resume {copied}")


@pytest.mark.parametrize("layers", [[[1]], "x", None])
def test_a_record_that_cannot_be_read_is_told(copied, layers):
    write_json(copied / "sweep.json", read_json(copied / "sweep.json") | {"layers": layers})
    with pytest.raises(CorruptError, match="sweep.json holds no layers"):
        status(copied)
