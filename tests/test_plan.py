"""What a sweep would take, and whether it can start: against hand-worked cases, real files and real refusals."""

import json
import os
import shutil
import socket
import sqlite3
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from richkd import distill, estimate
from richkd.command import main
from richkd.data import load
from richkd.errors import ConfigError
from richkd.layers import build, read
from tune import costs, places, sharing
from tune import plan as plans
from tune.__main__ import VERBS
from tune.costs import Lacks, Runs, cramped, expected_epochs, in_bytes, seconds_of, within
from tune.places import unsafe
from tune.settings import Sweep
from tune.sharing import Tried
from tune.store import Store
from tune.students import around_a_search
from tune.tracking import Tracker

SMALL = ["sweep.trials=4", "sweep.min_epochs=1", "refit.seeds=2", "train.epochs=3"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(costs, "MEASURE", 0.5)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def here(miniature, cache_root, tmp_path, monkeypatch):
    """Words of a small sweep whose folders lie in a new working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    return [*SMALL, f"cache={cache_root}"]


def asha(**changes) -> Sweep:
    return Sweep(**({"scheduler": "asha", "min_epochs": 1, "reduction": 2} | changes))


# expected epochs


@pytest.mark.parametrize("slots", [1, 3])
def test_without_early_stopping_every_trial_gets_all_epochs(slots):
    assert expected_epochs(asha(scheduler="none"), 7, 20, slots) == 20


def test_the_first_decision_comes_too_late_for_short_trials():
    assert expected_epochs(asha(min_epochs=20), 7, 20, 1) == 20


def test_two_trials_of_two_epochs_get_seven_quarters_each():
    # the first one passes; the second passes with even chance: (2 + (2 + 1) / 2) / 2
    assert expected_epochs(asha(), 2, 2, 1) == pytest.approx(1.75, abs=0.05)


def test_trials_side_by_side_that_all_pass_get_all_epochs():
    # the first to decide is the best so far; a lone trial of each study is always the first
    assert expected_epochs(asha(), 1, 5, 4) == 5


def test_a_single_decision_lets_pass_the_share_that_ranks_give():
    # the k-th to decide passes if it is among the best max(1, k // 3) of k
    trials, epochs = 12, 10
    share = sum(max(1, k // 3) / k for k in range(1, trials + 1)) / trials
    found = expected_epochs(asha(min_epochs=4, reduction=3), trials, epochs, 1)
    assert found == pytest.approx(4 + (epochs - 4) * share, abs=0.25)


# time and budgets


def pace(**changes) -> estimate.Pace:
    given = {"opening": 1.0, "step": 0.1, "steps": 10, "validation": 0.5, "writing": 0.5}
    return estimate.Pace(**(given | {"testing": 3.0, "kept": 100} | changes))


RUNS = Runs(
    trials={"richkd-l": 4, "kd": 2},
    epochs=10,
    expected={"richkd-l": 5, "kd": 6},
    seeds=1,
    students={name: one.method for name, one in around_a_search("richkd-l", {}).items()},
    refits=3,
)
NOTHING = Lacks(outputs=[], first=[], later=[], teacher=0.0, crops=None, bytes=0)
PACES = {"cnn8": {"taught": pace(), "labels": pace(step=0.0)}}


def test_the_time_is_that_of_all_runs_over_the_slots():
    found = seconds_of(RUNS, PACES, NOTHING, 2, 1.0)
    # an epoch takes 2 s, without a teacher 1 s; a run 1 s before, and 1 s around
    assert found["trial"] == {"richkd-l": 12, "kd": 14}
    assert found["refit"]["richkd"] == 1 + 1 + 20 + 3
    assert found["refit"]["ce"] == 1 + 1 + 10 + 3
    assert found["work"] == 4 * 12 + 2 * 14 + 3 * (4 * 25 + 15)
    assert found["wall"] == costs.STARTING + found["work"] / 2


def test_no_run_is_faster_for_more_slots_than_runs():
    found = seconds_of(RUNS, PACES, NOTHING, 1000, 1.0)
    assert found["runs"] == (1 + 1 + 20) + (1 + 1 + 20 + 3)


def test_a_teacher_is_trained_before_the_runs_or_in_them():
    teachers = replace(NOTHING, first=[0], later=[1, 2], teacher=100.0)
    plain, found = (seconds_of(RUNS, PACES, lacks, 2, 1.0) for lacks in (NOTHING, teachers))
    assert found["prepare"] - plain["prepare"] == 100
    assert found["work"] - plain["work"] == 200


def test_the_seeds_of_a_trial_count_each():
    one, three = (
        seconds_of(replace(RUNS, seeds=seeds), PACES, NOTHING, 2, 1.0) for seeds in (1, 3)
    )
    assert three["trial"]["kd"] - one["trial"]["kd"] == 2 * 13
    assert replace(RUNS, seeds=3).total == 3 * 6 + 5 * 3


@pytest.mark.parametrize(
    ("wanted", "gpus", "found"),
    [
        ({}, 0, None),
        ({"hours": 1.0}, 0, {"fits": True, "trials": 6}),
        # two slots for 30 s: four trials of 12 s, and none of 14 s
        ({"hours": (30 + costs.STARTING) / 3600}, 0, {"fits": False, "trials": 4}),
        ({"gpu_hours": 25 / 3600}, 1, {"fits": False, "trials": 2}),
        ({"gpu_hours": 25 / 3600}, 0.5, {"fits": False, "trials": 4}),
        ({"gpu_hours": 25 / 3600}, 0, None),
    ],
)
def test_a_budget_says_how_many_trials_it_pays(wanted, gpus, found):
    seconds = seconds_of(RUNS, PACES, NOTHING, 2, 1.0)
    assert within(Sweep(**wanted), RUNS, seconds, 2, gpus) == found


# disk


def test_what_a_run_keeps_is_as_large_as_the_files_of_a_real_run(here, tmp_path):
    config = build(read(here))
    task = distill.open_task(config)
    found = estimate.pace(
        config, task, estimate.stand_in(config, task), tmp_path / "try", seconds=0.1
    )
    outcome = distill.run(config, tmp_path / "run")
    kept = sum(
        path.stat().st_size
        for name in ("last", "best")
        for path in (outcome.folder / name).iterdir()
    )
    assert found.kept == pytest.approx(kept, rel=0.1)
    assert found.steps == len(distill.open_batches(config, task, distilled=True))


def test_a_small_disk_is_told_with_both_numbers():
    one = {"field": "storage", "path": "/a", "needed": 3_000_000, "free": 5_000_000, "disk": 1}
    other = one | {"field": "cache", "path": "/a/c"}
    assert cramped([one]) == []
    assert cramped([one, other | {"disk": 2}]) == []
    (told,) = cramped([one, other])  # each fits, both do not
    assert told.startswith("storage and cache must have 6 MB free but /a has 5 MB")


def test_bytes_are_said_in_few_characters():
    assert [in_bytes(n) for n in (0, 999, 1500, 2_340_000, 5e12)] == [
        *("0 B", "999 B", "1.5 kB", "2.34 MB", "5 TB")
    ]


# several machines


MOUNTS = [(Path("/"), "ext4"), (Path("/ram"), "tmpfs"), (Path("/box"), "overlay")]
SERVER, RUNNING = "http://mlflow:5000", Path("/srv/runs")


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ("/ram/runs", "tmpfs"),
        ("/box/a/runs", "overlay"),
        ("/tmp/runs", "temporary"),
        ("/srv/ray/session_x/runtime_resources/working_dir_files/_ray_pkg_1/runs", "job"),
    ],
)
def test_a_state_that_would_be_lost_is_refused_on_several_machines(state, word, monkeypatch):
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: "/tmp")
    (told,) = unsafe(2, Path(state), SERVER, MOUNTS, {})
    assert told.startswith("sweep.state must outlive")
    assert word in told
    assert "set sweep.state" in told
    assert unsafe(1, Path(state), SERVER, MOUNTS, {}) == []


def test_a_database_of_one_machine_and_an_unseen_storage_are_refused_on_several():
    database = "sqlite:////srv/mlflow.db"
    unseen = {
        "storage": (Path("/srv/runs"), ["10.0.0.2"]),
        "cache": (Path("/srv/cache"), ["10.0.0.3"]),
    }
    told = unsafe(3, RUNNING, database, MOUNTS, unseen)
    assert [line.split()[0] for line in told] == ["tracking.uri", "storage", "cache"]
    assert "http://HOST:5000" in told[0]
    assert "/srv/runs is not by 10.0.0.2" in told[1]
    assert "/srv/cache is not by 10.0.0.3" in told[2] and "teacher.checkpoint" in told[2]
    seen = {field: (folder, []) for field, (folder, _) in unseen.items()}
    assert unsafe(3, RUNNING, SERVER, MOUNTS, seen) == []
    assert unsafe(1, RUNNING, database, MOUNTS, {}) == []
    assert unsafe(3, RUNNING, SERVER, MOUNTS, {}) == []


def test_the_mounts_of_this_machine_have_its_root():
    assert any(place == Path("/") for place, _ in places.mounts())


# probes


class Health(BaseHTTPRequestHandler):
    """Answers to anything with the status of its server."""

    def do_GET(self):
        """Answer."""
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server():
    """A server on loopback whose `status` can be set; `asked` are the paths it was asked for."""
    made = HTTPServer(("127.0.0.1", 0), Health)
    made.status, made.asked = 200, []
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.mark.parametrize(("status", "why"), [(200, None), (404, None), (503, "503")])
def test_a_server_is_asked_for_its_health(server, status, why):
    server.status = status
    found = Tracker.probe(f"http://me:secret@127.0.0.1:{server.server_port}/")
    assert server.asked == ["/api/2.0/mlflow/experiments/search?max_results=1"]
    assert found is None if why is None else why in found


def test_a_server_that_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr("tune.tracking.PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "timed out" in Tracker.probe(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_closed_port_is_told():
    with socket.create_server(("127.0.0.1", 0)) as once:
        port = once.getsockname()[1]
    assert "refused" in Tracker.probe(f"http://127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="cannot be used .*refused.*HOST:PORT"):
        places.machines_of(f"127.0.0.1:{port}")


def test_a_port_behind_which_is_no_ray_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(places, "ASK", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ConfigError, match="did not answer within 1 s"):
            places.machines_of(f"127.0.0.1:{silent.getsockname()[1]}")


def test_a_cluster_says_what_it_has(cluster):
    (found,) = places.machines_of(ray.get_runtime_context().gcs_address)
    assert found["CPU"] == 2


def test_a_folder_is_looked_for_on_the_machines_of_a_cluster_and_nothing_stays_in_it(
    cluster, tmp_path
):
    address = ray.get_runtime_context().gcs_address
    assert places.unseen(address, tmp_path / "not" / "yet") == []  # a single machine sees its own
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_a_database_or_refused_and_a_new_one_is_not_made(tmp_path):
    path = tmp_path / "mlflow.db"
    assert Tracker.probe(f"sqlite:///{path}") is None
    assert not path.exists()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE a (b)")
    database.close()
    assert Tracker.probe(f"sqlite:///{path}") is None
    path.write_bytes(b"no database at all" * 100)
    assert "not a database" in Tracker.probe(f"sqlite:///{path}")
    assert "is no folder" in Tracker.probe(f"sqlite:///{path}/below/mlflow.db")


# the whole


def test_a_plan_has_its_numbers_and_leaves_nothing_behind(here, tmp_path):
    found = plans.plan(here)
    assert found["mistakes"] == []
    assert found["runs"]["total"] == 4 + 4 + 5 * 2
    assert found["cluster"] == {"machines": 1, "CPU": os.cpu_count(), "GPU": estimate.gpus()}
    assert found["hours"]["CPU"] == pytest.approx(found["seconds"]["work"] / 3600)
    assert found["seconds"]["wall"] > costs.STARTING
    assert list(tmp_path.iterdir()) == []
    json.dumps(found, allow_nan=False)
    lines = plans.table(found)
    assert max(map(len, lines)) <= 80


def test_what_is_cached_is_told_and_what_is_not_is_not_made(here, cache_root, tmp_path):
    own = tmp_path / "cache"
    shutil.copytree(cache_root / "miniature", own / "miniature")
    words = [*here, f"cache={own}", "seed=7", "teacher.epochs=3"]
    before = plans.plan(words)["lacks"]
    config = build(read(words))
    dataset = load(config.data)
    images = len(dataset.train) + len(dataset.test)
    assert [lack["what"] for lack in before["outputs"]] == [f"miniature over {images} images"]
    assert (before["first"], before["later"]) == ([7], [0, 1])
    assert before["teacher"] > 0
    assert not (own / "teachers").exists()
    assert not (own / "clip-images").exists()
    task = distill.open_task(config)
    teacher = distill.open_teacher(config, task).task
    (unjudged,) = estimate.unjudged(config, task)
    assert unjudged.what == f"task teacher over {images} images"
    assert unjudged.bytes == 4 * 10 * images
    assert len(teacher.train) + len(teacher.test) == images
    after = plans.plan(words)["lacks"]
    assert after["outputs"] == []
    assert (after["first"], after["later"]) == ([], [0, 1])
    # what was foretold to be written is what was written
    files = [path for name in ("teachers", "clip-images") for path in (own / name).rglob("*/*")]
    made = sum(path.stat().st_size for path in files if path.is_file())
    assert before["bytes"] - after["bytes"] == pytest.approx(made, rel=0.1)


def test_every_mistake_is_listed_at_once_with_exit_2(here, tmp_path, capfd):
    path = tmp_path / "my.yaml"
    path.write_text(
        "train:\n  lrr: 1\n  epochs: ten\nsweep:\n  trialz: 3\n  space:\n"
        "    fusion.alpha: {uniform: [0, 2]}\n    train.lr: {loguniform: [0, 1]}\n"
        "    student.name: {choice: [cnn8, cnn9]}\n    clip.prompts: {choice: [digits, digist]}\n"
        "teacher:\n  name: cnn25\n"
    )
    words = [str(path), *here, "data.source=digits", "clip.model=miniature", "clip.prompts=digits"]
    words.append("warmstart.sources=[paper, frist]")
    assert (
        main("python -m tune", "", VERBS, ["plan", *words, "tracking.uri=sqlite:////dev/null/x.db"])
        == 2
    )
    told = capfd.readouterr().err
    lines = [line for line in told.splitlines() if line.startswith("python -m tune plan: ")]
    for word in (
        *(f"{path}:2: there is no key train.lrr", f"{path}:3: train.epochs must be"),
        *(f"{path}:5: there is no key sweep.trialz", f"{path}:7: sweep.space: fusion.alpha"),
        *(
            f"{path}:8: sweep.space: train.lr",
            "'cnn9'",
            "'digist'",
            "'cnn25'",
            "tracking.uri",
            "sources=frist",
        ),
    ):
        assert [line for line in lines if word in line], word
    assert len(lines) == 10
    assert sorted(tmp_path.iterdir()) == [path]


def test_data_that_a_typo_hides_are_not_missed_twice(here):
    found = plans.plan([*here, "data.source=arrays", "data.paht=x.npz"])
    assert [line.split(";")[0] for line in found["mistakes"]] == ["there is no key data.paht"]


def test_data_and_teachers_that_do_not_fit_are_mistakes(here, tmp_path):
    rows = np.random.default_rng(0).normal(size=(10, 10)).astype(np.float32)
    np.save(tmp_path / "few.npy", rows)
    found = plans.plan([*here, f"clip.logits={tmp_path / 'few.npy'}", "train.batch_size=5000"])
    assert len(found["mistakes"]) == 2
    assert any(line.startswith("clip.logits") for line in found["mistakes"])
    assert any(line.startswith("train.batch_size") for line in found["mistakes"])


def test_a_storage_that_is_an_address_is_asked_for_by_its_own_probe(here, tmp_path, monkeypatch):
    asked = []

    def probe(store: Store) -> None:
        asked.append(store.url)
        raise ConfigError("storage=s3://bucket/runs has no such bucket")

    monkeypatch.setattr(Store, "probe", probe)
    found = plans.plan([*here, "storage=s3://bucket/runs", "sweep.state=here"])
    assert asked == ["s3://bucket/runs/plan"]
    assert found["mistakes"] == ["storage=s3://bucket/runs has no such bucket"]
    assert [each["field"] for each in found["disk"]] == ["sweep.state", "cache"]
    assert list(tmp_path.iterdir()) == []


def test_on_two_machines_what_one_alone_can_use_is_refused_with_its_mend(
    here, cache_root, monkeypatch
):
    monkeypatch.setattr(plans, "machines_of", lambda _: [{"CPU": 4.0}, {"CPU": 2.0}])
    asked = []
    monkeypatch.setattr(places, "unseen", lambda *of: asked.append(of) or ["10.0.0.2"])
    found = plans.plan(here, address="head:6379")
    fields = [line.split()[0] for line in found["mistakes"]]
    # tests lie among temporary files, and train their teacher
    assert fields == ["sweep.state", "tracking.uri", "storage", "cache"]
    assert [(address, folder.name) for address, folder in asked] == [
        ("head:6379", "runs"),
        ("head:6379", cache_root.name),
    ]
    assert found["side_by_side"] == 6
    assert found["cluster"] == {"machines": 2, "CPU": 6, "GPU": 0}


def test_a_plan_has_as_many_trials_a_gpu_as_the_sweep_would_measure(here, monkeypatch):
    monkeypatch.setattr(plans, "machines_of", lambda _: [{"CPU": 8.0, "GPU": 2.0}])
    tried = [
        Tried(trials=n, images_per_second=speed, memory=0.1)
        for n, speed in ((1, 100.0), (2, 160.0), (4, 170.0))
    ]
    monkeypatch.setattr(plans, "shared", lambda *_: tried)
    found = plans.plan(here)
    assert found["mistakes"] == []
    assert found["side_by_side"] == 4
    assert found["each"] == {"workers": 1, "CPU": 1, "GPU": 0.5}
    shown = "a GPU               2 trials a GPU: 1.0, 1.6, 1.7 times as fast with 1, 2, 4"
    assert shown in plans.table(found)
    assert sharing.slower(tried) == 1.25


def test_more_workers_than_the_machine_has_are_a_mistake(here):
    (told,) = plans.plan([*here, "resources.workers=1000"])["mistakes"]
    assert told.startswith("resources.workers=1000")


def test_a_taken_name_a_folder_that_cannot_be_and_a_small_disk_are_mistakes(
    here, tmp_path, monkeypatch
):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda _: usage)
    taken = tmp_path / "state" / "one"
    taken.mkdir(parents=True)
    (taken / "sweep.json").write_text("{}")
    (tmp_path / "file").write_text("")
    words = ["sweep.name=one", f"sweep.state={taken.parent}", f"storage={tmp_path / 'file'}"]
    found = plans.plan([*here, *words])
    assert [line.split()[0] for line in found["mistakes"]] == [
        *("sweep.name=one", "storage", "storage")
    ]
    assert "has 1 kB; free some space" in found["mistakes"][2]


def test_of_several_students_the_smallest_and_the_largest_are_measured(here):
    found = plans.plan([*here, "sweep.space.student.name={choice: [cnn16, cnn24, cnn8]}"])
    assert list(found["pace"]) == ["cnn8", "cnn24"]


def test_a_plan_counts_the_crops_that_teachers_have_still_to_speak_of(tmp_path):
    words = ["method.name=kd", "teacher.epochs=2", "teacher.shared=true", f"cache={tmp_path}"]
    config = build(read([*words, "device=cpu"]))
    task = distill.open_task(config)
    crops = 597 * 9
    expected = crops * (1 - (8 / 9) ** 20)
    before = estimate.untold(config, task, {0: 20, 1: 20})
    assert f"over {2 * round(expected)} crops, of {2 * crops}" in before.what
    assert before.bytes == 2 * round(expected) * 10 * 2
    assert before.seconds > 0
    distill.open_teacher(config, task).task.fill(lambda *_: None)  # that of one seed
    assert estimate.untold(config, task, {0: 20, 1: 20}).bytes == before.bytes / 2
    assert estimate.untold(config, task, {0: 20}).bytes == 0
    for other in ("teacher.views=online", "teacher.views=single"):
        assert estimate.untold(build(read([*words, other])), task, {0: 20}) is None
