"""How many trials share a GPU: the decision on scripted measurements, and a real one on a GPU that is none."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from richkd.errors import ConfigError, RichkdError
from richkd.files import write_json
from richkd.layers import build, read
from tune import sharing
from tune.settings import Resources, fit
from tune.sharing import Tried, at_most, chosen, line, settled, widen

ROOT = Path(__file__).resolve().parent.parent
AUTO = Resources()
CONFIG = build(read(["device=auto"]))
TWO_GPUS = [{"CPU": 16.0, "GPU": 2.0}]
REAL = """
import sys
from pathlib import Path

import ray

from richkd.command import Stop
from richkd.layers import build, read
from small import Script
from tune import runner, sharing
from tune.settings import Resources

if __name__ == "__main__":
    folder, sharing.SECONDS = Path(sys.argv[1]), 0.5
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=runner.runtime_env(),
    )
    config = build(read(["method.name=ce", "train.epochs=1"]))
    seen = []

    def settle(*asked):
        sweep = build(read([]))
        seen.append(sharing.settled(*asked, sweep, folder / "sharing.json", print))
        return seen[-1]

    agenda = Script({"one": config, "other": config}, folder)
    runner.run(agenda, Stop(), Resources(), folder / ".ray", gpu=True, address=None, settle=settle)
    print(seen[0].trials_per_gpu, *(failure for _, failure in agenda.ends.values()))
"""


def tried(*speeds, memory=0.01):
    return [
        Tried(trials=2**k, images_per_second=speed, memory=min(1.0, memory * 2**k))
        for k, speed in enumerate(speeds)
    ]


@pytest.mark.parametrize(
    ("speeds", "memory", "count"),
    [
        ((100,), 0.01, 1),
        ((100, 190), 0.01, 2),
        ((100, 180, 290, 300), 0.01, 4),
        ((100, 109), 0.01, 1),
        ((100, 111), 0.01, 2),
        ((100, 90, 400), 0.01, 1),  # of what comes after nobody asks
        ((100, 190, 380), 0.3, 2),  # three fifths of the memory, and more than there is
        ((100, 190, 0), 0.01, 2),  # it did not go
    ],
)
def test_the_number_is_the_last_that_doubling_was_worth(speeds, memory, count):
    assert chosen(tried(*speeds, memory=memory)) == count


@pytest.mark.parametrize(
    ("speeds", "memory", "most", "asked"),
    [
        ((100, 200, 400, 800, 1600), 0.01, 16, [1, 2, 4, 8, 16]),
        ((100, 200, 400, 800, 1600), 0.01, 7, [1, 2, 4]),
        ((100, 200, 210, 800, 1600), 0.01, 16, [1, 2, 4]),
        ((100, 200, 400, 800, 1600), 0.15, 16, [1, 2, 4]),  # eight would not fit
        ((100, 200), 0.5, 16, [1]),
    ],
)
def test_more_are_tried_as_long_as_it_pays_and_they_would_fit(speeds, memory, most, asked):
    script = {each.trials: each for each in tried(*speeds, memory=memory)}
    assert [each.trials for each in widen(script.__getitem__, most)] == asked


@pytest.mark.parametrize(
    ("resources", "nodes", "runs", "gpu", "most"),
    [
        (AUTO, TWO_GPUS, 42, True, 8),
        (replace(AUTO, cpus_per_worker=3), TWO_GPUS, 42, True, 2),
        (AUTO, [{"CPU": 256.0, "GPU": 1.0}], 42, True, 16),
        (AUTO, TWO_GPUS, 6, True, 3),  # else a GPU would idle
        (replace(AUTO, max_concurrent=4), TWO_GPUS, 42, True, 2),
        (AUTO, [{"CPU": 1.0, "GPU": 4.0}], 42, True, 1),
        (AUTO, TWO_GPUS, 42, False, 1),
        (AUTO, [{"CPU": 16.0}], 42, True, 1),
        (Resources(workers=2), TWO_GPUS, 42, True, 1),
        (Resources(trials_per_gpu=4), TWO_GPUS, 42, True, 1),
    ],
)
def test_no_more_are_tried_than_have_a_cpu_and_something_to_do(resources, nodes, runs, gpu, most):
    assert at_most(resources, nodes, runs, gpu=gpu) == most


def test_what_is_not_settled_is_a_trial_a_gpu():
    assert fit(AUTO, TWO_GPUS, gpu=True) == (2, {"CPU": 1, "GPU": 1.0})


@pytest.mark.parametrize("given", ["many", "4x"])
def test_another_word_is_refused(given):
    with pytest.raises(ConfigError, match="trials_per_gpu must be auto or a whole number but got"):
        Resources(trials_per_gpu=given)


def test_the_line_says_what_came_of_each_number():
    assert line(tried(100, 180, 290, 300)) == (
        "4 trials a GPU: 1.0, 1.8, 2.9, 3.0 times as fast with 1, 2, 4, 8"
    )
    assert line(tried(100)).startswith("1 trial a GPU")


def test_a_sweep_that_goes_on_does_not_measure_again(tmp_path, monkeypatch):
    measurements = iter([tried(100, 180)])
    monkeypatch.setattr(sharing, "measured", lambda *_: next(measurements))
    told = []
    for _ in range(2):
        found = settled(AUTO, TWO_GPUS, 42, CONFIG, tmp_path / "sharing.json", told.append)
        assert found.trials_per_gpu == 2
    assert told == [line(tried(100, 180))] * 2


def test_what_was_asked_for_or_has_no_gpu_is_not_measured(tmp_path):
    four, path = Resources(trials_per_gpu=4), tmp_path / "sharing.json"
    write_json(path, {"tried": []})  # nobody reads it
    assert settled(four, TWO_GPUS, 42, CONFIG, path, print) == four
    assert settled(AUTO, TWO_GPUS, 42, replace(CONFIG, device="cpu"), path, print) == AUTO
    assert settled(AUTO, [{"CPU": 2.0}], 42, CONFIG, path, print) == AUTO


def test_where_nothing_can_be_measured_it_is_a_trial_a_gpu_with_a_warning(tmp_path, monkeypatch):
    def fails(*_):
        raise RichkdError("no GPU was free within 60 s")

    monkeypatch.setattr(sharing, "measured", fails)
    with pytest.warns(UserWarning, match="no GPU was free within 60 s; it is one"):
        assert settled(AUTO, TWO_GPUS, 42, CONFIG, tmp_path / "sharing.json", print) == AUTO
    assert not (tmp_path / "sharing.json").exists()


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_trainings_side_by_side_are_measured_and_then_the_runs_share_the_gpu(tmp_path):
    """The GPU is one that Ray is told of; the processes find none, and train on the CPU."""
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = sharing.read_record(tmp_path / "sharing.json")["tried"]
    assert [each["trials"] for each in found] == [1, 2]
    assert all(each["images_per_second"] > 0 and each["memory"] == 0 for each in found)
    own = [Tried(**each) for each in found]
    assert done.stdout.splitlines() == [line(own), f"{chosen(own)} None None"]
