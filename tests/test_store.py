"""Run folders on an S3 server of our own: what comes back is whole, whatever happened on the way."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import traceback
import urllib.request
from pathlib import Path

import pytest
import ray.tune
import torch
from moto.server import ThreadedMotoServer
from pyarrow import fs

from richkd import checkpoint
from richkd.config import run_folder
from richkd.errors import ConfigError, CorruptError, Stopped
from richkd.files import own_folder
from richkd.layers import build, read, to_dict
from tune import store as stores
from tune.store import Store, bring, mirrored
from tune.trial import trial

KEYS = {"AWS_ACCESS_KEY_ID": "AKIDOFATEST", "AWS_SECRET_ACCESS_KEY": "SECRETOFATEST"}
URL = "s3://bucket/sweeps/small/trials/007"


def serve(port: int = 0) -> ThreadedMotoServer:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    return server


def address(server: ThreadedMotoServer) -> str:
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


def call(server: ThreadedMotoServer, path: str, method: str) -> None:
    urllib.request.urlopen(urllib.request.Request(address(server) + path, method=method)).close()


@pytest.fixture(scope="module")
def running():
    server = serve()
    yield server
    server.stop()


@pytest.fixture
def server(running, monkeypatch):
    """An empty bucket on a server that the environment names."""
    for variable, value in (KEYS | {"AWS_ENDPOINT_URL": address(running)}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(stores, "PAUSES", (0.01, 0.01))
    call(running, "/moto-api/reset", "POST")
    call(running, "/bucket", "PUT")
    return running


def save(folder: Path, epoch: int, best: int, *, state: str = "running") -> None:
    """Bring a run folder to an epoch, in the order in which a run writes."""
    tensor, meta = torch.full((40,), float(epoch)), {"epoch": epoch, "best": {"epoch": best}}
    checkpoint.save(folder / "last", {"w": tensor}, {"momentum": tensor}, meta)
    if best == epoch:
        checkpoint.save(folder / "best", {"w": tensor}, {}, meta)
    (folder / "config.yaml").write_text("seed: 0\n")
    lines = (json.dumps({"epoch": k + 1}) + "\n" for k in range(epoch))
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "run.json").write_text(json.dumps({"state": state}))


def epochs(folder: Path) -> tuple[int, int]:
    """Return the epochs of `last` and `best`, after what they say of each other was checked."""
    last, best = (checkpoint.load(folder / kind) for kind in ("last", "best"))
    assert last.meta["best"]["epoch"] == best.meta["epoch"]
    for found in (last, best):
        assert found.weights["w"].eq(found.meta["epoch"]).all()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) >= last.meta["epoch"] - 1, "what its own epoch was, `last` says itself"
    return last.meta["epoch"], best.meta["epoch"]


def objects(store: Store, name: str = "") -> list[str]:
    return sorted(f"{at}/{file}" for at, files in store._list(name).items() for file in files)


def recorded(monkeypatch) -> list[str]:
    """Return the list in which each upload from now on is noted, by its path below the run folder."""
    paths, real = [], Store._put

    def put(self, path, content):
        paths.append(path.removeprefix(f"{self.base}/"))
        real(self, path, content)

    monkeypatch.setattr(Store, "_put", put)
    return paths


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["", "seed0", "refits/richkd-l-seed3"])
def test_run_folder_comes_back_as_it_was(server, tmp_path, name):
    save(tmp_path / "a", 1, 1)
    save(tmp_path / "a", 2, 1)
    assert Store(URL).newest(name) is None
    assert not Store(URL).fetch(name, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    Store(URL).push(tmp_path / "a", name)
    assert Store(URL).newest(name) == 2
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").touch()
    assert Store(URL).fetch(name, tmp_path / "b")
    assert files_of(tmp_path / "b") == files_of(tmp_path / "a")
    assert epochs(tmp_path / "b") == (2, 1)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_only_what_changed_is_sent_and_the_older_goes(server, tmp_path, monkeypatch):
    store, sent = Store(URL), recorded(monkeypatch)
    save(tmp_path, 1, 1)
    store.push(tmp_path)
    kinds = [path.split("-")[0] for path in sent]
    assert kinds == ["config.yaml", "metrics.jsonl", *["best"] * 3, *["last"] * 3, "run.json"]
    for place in (sent[2:5], sent[5:8]):
        assert [path.rpartition("/")[2] for path in place] == list(checkpoint.FILES)
    sent.clear()
    store.push(tmp_path)
    assert sent == []
    save(tmp_path, 2, 1)
    store.push(tmp_path)
    assert [path.split("-")[0] for path in sent] == ["metrics.jsonl", *["last"] * 3]
    there = objects(store)
    assert len(there) == 9
    assert [path[:12] for path in there if path.endswith("manifest.json")] == [
        "best-000001-",
        "last-000002-",
    ]
    selector = fs.FileSelector(store.base)
    folders = [info.base_name for info in store.files.get_file_info(selector) if not info.is_file]
    assert len(folders) == 2, "nothing is left of the older one"
    sent.clear()
    Store(URL).push(tmp_path)  # of another process, which does not know the small ones
    assert sent == ["config.yaml", "metrics.jsonl", "run.json"]


class Killed(BaseException):
    """The process ends here."""


def kill_at(monkeypatch, k: int) -> list[int]:
    """Let the k-th change of the store tear what it writes and be the last; count the changes."""
    calls, fired, real = itertools.count(1), [], {}

    def wrap(name):
        real[name] = getattr(Store, name)

        def change(self, path, what):
            if next(calls) == k:
                fired.append(path)
                if name == "_write":
                    real[name](self, path, what[: len(what) // 2])
                raise Killed
            return real[name](self, path, what)

        return change

    for name in ("_write", "_remove"):
        monkeypatch.setattr(Store, name, wrap(name))
    return fired


@pytest.mark.parametrize("best", [1, 2])
def test_kill_at_any_change_leaves_the_old_or_the_new(server, tmp_path, monkeypatch, best):
    seen = []
    for k in itertools.count(1):
        url, run = f"{URL}/{k}", tmp_path / str(k)
        save(run, 1, 1)
        Store(url).push(run)
        save(run, 2, best)
        with monkeypatch.context() as patch:
            fired = kill_at(patch, k)
            with contextlib.suppress(Killed):
                Store(url).push(run)
        if not fired:
            break
        assert Store(url).fetch("", tmp_path / f"{k}-again")
        seen.append(epochs(tmp_path / f"{k}-again"))
        Store(url).push(run)  # what was left over does not hinder the next one, and goes
        assert len(objects(Store(url))) == 9
        Store(url).fetch("", tmp_path / f"{k}-again")
        assert epochs(tmp_path / f"{k}-again") == (2, best)
    assert seen == sorted(seen)
    assert set(seen) == {(1, 1), (2, best)}
    assert len(seen) == {1: 2 + 3 + 1 + 1, 2: 2 + 6 + 1 + 2}[best]


def newest_of(store: Store, kind: str) -> str:
    return max(place for place in store._list("") if place.startswith(kind))


def two_whole(run: Path, monkeypatch) -> Store:
    """Kill a push between the newer manifest and the removal of the older checkpoints."""
    save(run, 1, 1)
    Store(URL).push(run)
    save(run, 2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_remove", kill)
        with pytest.raises(Killed):
            Store(URL).push(run)
    return Store(URL)


def kill(*_) -> None:
    raise Killed


@pytest.mark.parametrize("kind", ["last", "best"])
def test_damaged_newest_is_passed_over_for_the_one_before(server, tmp_path, monkeypatch, kind):
    store = two_whole(tmp_path / "run", monkeypatch)
    place = newest_of(store, kind)
    assert "-000002-" in place
    for file in checkpoint.FILES:
        path = f"{store.base}/{place}/{file}"
        whole = store._get(path)
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for content in (bytes(flipped), whole[:-1], b"", None):
            if content is None:
                store.files.delete_file(path)
            else:
                store._put(path, content)
            assert Store(URL).fetch("", tmp_path / "again")
            assert epochs(tmp_path / "again") == (1, 1)
        store._put(path, whole)
        assert Store(URL).fetch("", tmp_path / "again")
        assert epochs(tmp_path / "again") == (2, 2)


def test_damage_without_one_before_is_refused_and_leaves_what_is_there(server, tmp_path):
    save(tmp_path / "run", 1, 1)
    store = Store(URL)
    store.push(tmp_path / "run")
    (tmp_path / "again").mkdir()
    place = newest_of(store, "last")
    store._put(f"{store.base}/{place}/weights.safetensors", b"something else")
    with pytest.raises(CorruptError, match=f"{URL} has no checkpoint .* remove that folder"):
        Store(URL).fetch("", tmp_path / "again")
    assert os.listdir(tmp_path / "again") == []
    assert sorted(os.listdir(tmp_path)) == ["again", "run"]


def test_bit_flipped_before_it_is_sent_is_refused(server, tmp_path):
    save(tmp_path, 1, 1)
    path = tmp_path / "last" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptError, match="weights.safetensors is damaged"):
        Store(URL).push(tmp_path)


def test_driver_brings_the_best_without_the_optimisers_state(server, tmp_path):
    assert not bring("s3://bucket/s", "refits/a", tmp_path / "there")
    save(tmp_path / "run", 1, 1)
    save(tmp_path / "run", 2, 1, state="finished")
    Store("s3://bucket/s/refits/a").push(tmp_path / "run")
    assert bring("s3://bucket/s", "refits/a", tmp_path / "there")
    found = files_of(tmp_path / "there")
    assert {name.split("/")[0] for name in found} == {
        *("best", "config.yaml", "metrics.jsonl", "run.json")
    }
    assert all(found[name] == files_of(tmp_path / "run")[name] for name in found)
    assert checkpoint.verify(tmp_path / "there" / "best")["meta"]["epoch"] == 1


def test_probe_leaves_nothing(server):
    store = Store("s3://bucket/new/folder")
    store.probe()
    assert objects(store) == []


def refused(store: Store, tmp_path: Path, words: list[str]) -> None:
    """See that the probe is refused, a push and a fetch end resumably, and no message holds a secret."""
    save(tmp_path / "run", 1, 1)
    for use, error in (
        (store.probe, ConfigError),
        (lambda: store.push(tmp_path / "run"), Stopped),
        (lambda: store.fetch("", tmp_path / "again"), Stopped),
    ):
        began = time.monotonic()
        with pytest.raises(error) as caught:
            use()
        assert time.monotonic() - began < 15
        text = "".join(traceback.format_exception(caught.value))
        assert not [secret for secret in KEYS.values() if secret in text]
        assert all(word in str(caught.value) for word in ["storage", store.url, *words])


@pytest.mark.soak
def test_dead_server_is_an_error_within_a_bounded_time(server, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    refused(Store(URL), tmp_path, ["NETWORK_CONNECTION"])


@pytest.mark.soak
def test_server_that_never_answers_is_an_error_within_a_bounded_time(server, tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "TIMEOUT", 1.0)
    monkeypatch.setattr(stores, "ATTEMPTS", 1)
    monkeypatch.setattr(stores, "PAUSES", ())
    with socket.create_server(("127.0.0.1", 0)) as hole:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        refused(Store(URL), tmp_path, ["NETWORK_CONNECTION"])


def test_server_that_errs_with_a_key_in_its_text_is_quoted_without_it(
    tmp_path, server, monkeypatch
):
    store, calls = Store(URL), []

    def fail(*_):
        calls.append(1)
        raise OSError(f"the key {KEYS['AWS_ACCESS_KEY_ID']} with {KEYS['AWS_SECRET_ACCESS_KEY']}")

    for name in ("_put", "_get", "_list"):
        monkeypatch.setattr(store, name, fail)
    monkeypatch.setattr(store, "_list", lambda *_: store._ask(fail))
    refused(store, tmp_path, ["the key *** with ***"])
    assert calls


def test_missing_bucket_is_refused_by_the_probe(server):
    with pytest.raises(
        ConfigError, match=r"storage=s3://none/x .*NO_SUCH_BUCKET.*AWS_ENDPOINT_URL"
    ):
        Store("s3://none/x").probe()


def test_server_that_returns_is_waited_for(server, tmp_path, monkeypatch):
    other = serve()
    monkeypatch.setenv("AWS_ENDPOINT_URL", address(other))
    monkeypatch.setattr(stores, "PAUSES", (0.5, 2.0))
    store, port = Store(URL), other.get_host_and_port()[1]
    store.probe()
    other.stop()
    save(tmp_path / "run", 1, 1)
    back = []
    timer = threading.Timer(1, lambda: back.append(serve(port)))
    timer.start()
    try:
        store.push(tmp_path / "run")
    finally:
        timer.join()
        back[0].stop()
    monkeypatch.setenv("AWS_ENDPOINT_URL", address(server))
    assert Store(URL).newest() == 1


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://AKID:HIDDEN@bucket/x", ["s3://***@bucket/x", "credentials", "AWS_ACCESS_KEY_ID"]),
        ("s3://a@b@bucket/x", ["s3://***@bucket/x"]),
        ("s3://bucket/x?access_key=HIDDEN", ["s3://BUCKET/FOLDER", "s3://bucket/x;"]),
        ("s3://", ["s3://BUCKET/FOLDER"]),
        ("s3:///x", ["s3://BUCKET/FOLDER"]),
        ("gs://bucket/x", ["s3://BUCKET/FOLDER"]),
        ("http://server/bucket", ["s3://BUCKET/FOLDER"]),
        ("file://other/x", ["s3://BUCKET/FOLDER"]),
    ],
)
def test_other_addresses_are_refused_and_no_secret_is_shown(url, words):
    with pytest.raises(ConfigError) as caught:
        build(read([f"storage={url}"]))
    text = str(caught.value)
    assert text.startswith("storage must") and "HIDDEN" not in text
    assert all(word in text for word in words)


def test_file_address_is_the_folder(tmp_path):
    assert build(read([f"storage=file://{tmp_path}"])).storage == str(tmp_path)


def test_single_run_takes_no_address():
    config = build(read([f"storage={URL}"]))
    assert config.storage == URL
    with pytest.raises(
        ConfigError, match=f"storage must be a folder for a single run but got {URL}"
    ):
        run_folder(config, "x", resume=False)


# a job of a sweep


@pytest.fixture
def machine(tmp_path_factory, monkeypatch):
    """Return a call that moves this process to another machine, with temporary files of its own."""

    def move() -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("machine")))

    move()
    return move


def job(folder: Path, **changes) -> dict:
    return {"folder": str(folder), "store": URL, "seeds": 1} | changes


def test_job_without_a_store_runs_in_its_folder_and_reports_as_it_would(tmp_path):
    given = job(tmp_path, store=None)
    with mirrored(given, print) as found:
        assert found == (given, print)


@pytest.mark.parametrize("seeds", [1, 2])
def test_job_goes_on_on_another_machine_from_what_was_heard_of(server, machine, tmp_path, seeds):
    given, told = job(tmp_path / "trials" / "007", seeds=seeds), []
    runs = ["seed0", "seed1"][:seeds] if seeds > 1 else [""]

    def die(metrics):
        told.append(metrics["epoch"])
        if metrics["epoch"] == 3:
            raise Killed

    with pytest.raises(Killed), mirrored(given, die) as (ours, report):
        folder = Path(ours["folder"])
        assert folder.parent == own_folder("runs") and not folder.exists()
        for epoch in (1, 2, 3):
            for run in runs:
                save(folder / run, epoch, 1)
            assert Store(URL).newest(runs[-1]) == (epoch - 1 or None)
            report({"epoch": epoch})
    assert told == [1, 2, 3]
    machine()
    with mirrored(given, told.append) as (ours, report):
        folder = Path(ours["folder"])
        for run in runs:
            assert epochs(folder / run) == (3, 1)
            save(folder / run, 4, 1)
        report({"finished": True})
    assert not folder.exists() and not (tmp_path / "trials").exists()
    assert Store(URL).newest(runs[-1]) == 4


def test_job_whose_store_died_ends_resumably_and_keeps_what_was_not_sent(
    server, machine, tmp_path, monkeypatch
):
    given, told, dead = job(tmp_path / "007"), [], []

    def fail(self, path, content):
        dead.append(path)
        raise OSError("NETWORK_CONNECTION")

    with pytest.raises(Stopped), mirrored(given, told.append) as (ours, report):
        folder = Path(ours["folder"])
        save(folder, 1, 1)
        report({"epoch": 1})
        save(folder, 2, 1)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "_put", fail)
            report({"epoch": 2})
    assert dead and told == [{"epoch": 1}]
    with mirrored(given, told.append) as (ours, report):
        assert ours["folder"] == str(folder) and epochs(folder) == (2, 1), "newer than the store's"
        report({"epoch": 2})
        (folder / "note").touch()
        shutil.copytree(folder, tmp_path / "left")
    assert not folder.exists()
    shutil.copytree(tmp_path / "left", folder)  # as a kill would have left it
    with mirrored(given, told.append):
        assert (folder / "note").exists(), "as new as the store's"


class Reports(list):
    """What trials report in this process, which ends when they report `last`."""

    last: int | None = None

    def __call__(self, said: dict) -> None:
        """Take a report."""
        self.append(said["run"])
        if self.last is not None and said["run"].get("epoch") == self.last:
            raise Killed


@pytest.fixture
def reports(monkeypatch) -> Reports:
    found = Reports()
    monkeypatch.setattr(ray.tune, "report", found)
    return found


def trial_of(folder: Path, **changes) -> dict:
    words = ["method.name=ce", "train.epochs=4", "train.batch_size=128"]
    return {
        "id": "trial-007",
        "config": to_dict(build(read(words))),
        "test": True,
        "heard": 0,
        "workers": 1,
        "threads": 1,
        "patience": 60.0,
        **job(folder),
        **changes,
    }


@pytest.mark.parametrize("seeds", [1, 2])
def test_trial_that_moved_ends_as_the_straight_one(server, machine, tmp_path, reports, seeds):
    trial(trial_of(tmp_path / "straight", store=None, seeds=seeds))
    straight = list(reports)
    reports.clear()
    reports.last = 2
    with pytest.raises(Killed):
        trial(trial_of(tmp_path / "007", seeds=seeds))
    machine()
    reports.clear()
    reports.last = None
    trial(trial_of(tmp_path / "007", seeds=seeds, heard=2))
    assert [each["epoch"] for each in reports] == [3, 4, 4]
    timed = ("second", "images_per")

    def plain(said: dict) -> dict:
        return {key: value for key, value in said.items() if not any(word in key for word in timed)}

    assert [*map(plain, reports)] == [*map(plain, straight[2:])]
    assert not (tmp_path / "007").exists() and not list(own_folder("runs").iterdir())
    for name in ["seed0", "seed1"] if seeds == 2 else [""]:
        assert Store(URL).fetch(name, tmp_path / "whole")
        assert bring(URL, name, tmp_path / "brought")
        for kind in ("last", "best"):
            ours = checkpoint.load(tmp_path / "straight" / name / kind)
            theirs = checkpoint.load(tmp_path / "whole" / kind)
            for part in ("weights", "state"):
                for key, tensor in getattr(ours, part).items():
                    assert torch.equal(tensor, getattr(theirs, part)[key]), key
        state = json.loads((tmp_path / "brought" / "run.json").read_text())
        assert state["state"] == "finished" and "test/top1" in state["metrics"]


def test_trial_whose_store_dies_stops_and_does_not_fail(
    server, machine, tmp_path, reports, monkeypatch
):
    real, calls = Store._put, []

    def put(self, path, content):
        if "last-000002" in path:
            calls.append(path)
            raise OSError("AWS Error NETWORK_CONNECTION")
        real(self, path, content)

    monkeypatch.setattr(Store, "_put", put)
    trial(trial_of(tmp_path / "007"))
    assert len(calls) == 1 + len(stores.PAUSES)
    assert [list(each) for each in reports[1:]] == [["stopped"]] and reports[0]["epoch"] == 1
    assert reports[1]["stopped"].startswith(f"storage={URL} cannot be reached (AWS Error NETWORK")
    reports.clear()
    monkeypatch.setattr(Store, "_put", real)
    trial(trial_of(tmp_path / "007", heard=1))
    assert [each["epoch"] for each in reports] == [2, 3, 4, 4], "what was trained is not lost"
