"""What a sweep may take: counted over its drivers, by a clock that nobody sets."""

import json
import time

import pytest

from richkd.errors import CorruptError
from tune.budget import Budget, spent


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that the test moves; the clock on the wall goes back an hour at each look."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 - 3600 * now[0])
    return now


def test_a_budget_is_used_up_when_its_hours_have_passed_and_not_before(tmp_path, clock):
    budget = Budget(tmp_path / "spent.json", 1.0, None)
    clock[0] += 3599
    assert budget.tick(gpus=8) is None
    clock[0] += 1
    assert budget.tick() == "sweep.hours=1"
    assert budget.used_up() == ["hours"]


def test_gpu_hours_are_those_of_gpus_that_runs_held(tmp_path, clock):
    budget = Budget(tmp_path / "spent.json", None, 2.0)
    for gpus, seconds in ((0, 7200), (4, 900), (0.5, 3600)):
        clock[0] += seconds
        assert budget.tick(gpus) is None
    assert budget.gpu_seconds == 4 * 900 + 0.5 * 3600
    clock[0] += 900
    assert budget.tick(2) == "sweep.gpu_hours=2"


def test_a_driver_goes_on_with_the_account_of_the_one_before(tmp_path, clock):
    path = tmp_path / "spent.json"
    first = Budget(path, 1.0, None)
    clock[0] += 3000
    first.tick()
    clock[0] += 5  # not written down: the driver is killed
    clock[0] = 7.0  # another machine
    second = Budget(path, 1.0, None)
    clock[0] += 599
    assert second.tick() is None
    clock[0] += 1
    assert second.tick() is not None
    more = Budget(path, 2.0, None)
    assert more.used_up() == []


def test_a_killed_driver_loses_seconds_of_the_account(tmp_path, clock):
    budget = Budget(tmp_path / "spent.json", None, None)
    for _ in range(100):
        clock[0] += 0.5
        budget.tick(1)
    assert spent(budget.path)["seconds"] > 50 - 11


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"seconds": "1", "gpu_seconds": 0}'])
def test_a_torn_account_is_told_and_no_new_time_given(tmp_path, content):
    path = tmp_path / "spent.json"
    path.write_text(content)
    with pytest.raises(CorruptError, match="spent.json"):
        Budget(path, 1.0, None)


def test_the_account_is_plain_json(tmp_path, clock):
    budget = Budget(tmp_path / "spent.json", None, None)
    clock[0] += 20
    budget.tick(2)
    found = json.loads(budget.path.read_text())
    assert found == {"seconds": 20.0, "gpu_seconds": 40.0}
