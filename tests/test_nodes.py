"""The machines of a cluster are given what their caches lack, whole and byte for byte, or nothing."""

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from richkd import cache
from richkd.errors import CorruptError
from tune import nodes
from tune.runner import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
TABLE = np.random.default_rng(0).random((3000, 5), np.float32)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("machine")))
    monkeypatch.setattr(nodes, "PART", 999)


def build(folder: Path) -> None:
    (folder / "run" / "last").mkdir(parents=True)
    (folder / "run" / "last" / "weights").write_bytes(random.Random(0).randbytes(2500))
    (folder / "run" / "empty").touch()


def fill(root: Path) -> list[Path]:
    """Return a folder and a table of two shards."""
    root.mkdir()
    folder = cache.folder(root, "teachers", {"seed": 1, "lr": 0.1}, build)
    cache.rows(root, "images", {"m": [1, None]}, 3000, 5, lambda start, stop: TABLE[start:stop])
    (table,) = (path for path in (root / "images").iterdir() if path.is_dir())
    return [folder, table]


def read(path: str, offset: int, size: int) -> bytes:
    """Return what the other machine would send; never more than was asked for."""
    assert size == nodes.PART
    return Path(path).read_bytes()[offset : offset + size]


def files_of(entry: Path) -> dict[str, bytes]:
    return {str(p.relative_to(entry)): p.read_bytes() for p in entry.rglob("*") if p.is_file()}


def test_entries_arrive_byte_for_byte_and_are_served(tmp_path):
    entries, there = fill(tmp_path / "here"), tmp_path / "there"
    there.mkdir()
    for entry in entries:
        nodes.receive(entry, there, nodes.list_entry(entry), read)
        arrived = there / entry.parent.name / entry.name
        assert files_of(arrived) == files_of(entry)
        beside = arrived.with_suffix(".json")
        assert beside.read_bytes() == entry.with_suffix(".json").read_bytes()
    assert cache.folder(there, "teachers", {"seed": 1, "lr": 0.1}, pytest.fail) == (
        there / "teachers" / entries[0].name
    )
    served = cache.rows(there, "images", {"m": [1, None]}, 3000, 5, None)
    assert np.array_equal(served, TABLE)


@pytest.mark.parametrize("how", ["flipped", "short", "none"])
def test_part_that_is_damaged_on_the_way_is_refused_and_nothing_is_kept(tmp_path, how):
    entries, there, fired = fill(tmp_path / "here"), tmp_path / "there", []
    there.mkdir()

    def damaged(path, offset, size):
        content = bytearray(read(path, offset, size))
        if offset == 999:
            fired.append(path)
            if how == "flipped":
                content[7] ^= 16
            else:
                content = content[: 5 * (how == "short")]
        return bytes(content)

    for entry in entries:
        with pytest.raises(CorruptError, match="did not arrive as it was sent"):
            nodes.receive(entry, there, nodes.list_entry(entry), damaged)
    assert len(fired) == 2
    assert not [path for path in there.glob("*/*") if path.is_dir()]


def test_entry_that_says_it_is_another_is_refused(tmp_path):
    entry, there = fill(tmp_path / "here")[0], tmp_path / "there"
    there.mkdir()
    listed = nodes.list_entry(entry)
    listed["description"]["key"]["seed"] = 2
    with pytest.raises(CorruptError, match="must say what the entry is"):
        nodes.receive(entry, there, listed, read)
    assert not (there / "teachers" / entry.name).exists()


CODE = """
import json, os, sys, tempfile, warnings
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from richkd import cache
from tune import nodes
from tune.runner import ENVIRONMENT

here, there = Path(sys.argv[1]), Path(sys.argv[2])
entries = [Path(word) for word in sys.argv[3:]]
args = {"num_cpus": 1, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=args)
second = cluster.add_node(num_cpus=1)
ray.init(
    address=cluster.address,
    runtime_env={"env_vars": ENVIRONMENT},
    log_to_driver=False,
    logging_level="ERROR",
)
said = {"alive": len(nodes.alive()), "others": [node.id for node in nodes.others()]}
said["second"] = second.node_id
said["same disk"] = nodes.share(entries)
told = []
said["sent"] = nodes.share([*entries, here / "none"], there, progress=lambda *at: told.append(at))
said["told"] = told[-1]
said["again"] = nodes.share(entries, there)
said["seen"] = nodes.probe(here)
os.chdir(here)  # the workers' own working folder is another one
said["unseen"] = nodes.probe(Path("/proc/self/cwd"))
said["left"] = [path.name for path in here.glob(".*.probe")]
said["name"] = nodes.alive()[0].name
file = there.parent / "file"
file.touch()
try:
    nodes.share(entries, file / "below")
except Exception as error:
    said["refused"] = [type(error).__name__, str(error)]
cluster.remove_node(second, allow_graceful=False)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    real, nodes.others = nodes.others, lambda: [nodes.Node(second.node_id, "lost", {})]
    said["lost"] = nodes.share(entries, there)
    said["unanswered"] = nodes.probe(here)
    nodes.others = real
said["warned"] = [str(each.message) for each in caught if "was sent the cache" in str(each.message)]
print(json.dumps(said), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory) -> dict:
    """What a driver says of a cluster of two nodes, in a process of its own."""
    folder = tmp_path_factory.mktemp("nodes")
    entries = fill(folder / "here")
    words = [folder / "here", folder / "there", *entries]
    found = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, words)],
        env=os.environ | ENVIRONMENT,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=240,
    )
    return json.loads(found.stdout.splitlines()[-1]) | {"entries": entries, "folder": folder}


@pytest.mark.soak
def test_other_machine_is_sent_what_it_lacks_once(two_nodes):
    names = [f"{entry.parent.name}/{entry.name}" for entry in two_nodes["entries"]]
    second = two_nodes["second"]
    assert two_nodes["alive"] == 2 and two_nodes["others"] == [second]
    assert two_nodes["same disk"] == {second: []}
    assert two_nodes["sent"] == {second: names}
    assert two_nodes["told"] == ["caches of other machines", 1, 1]
    assert two_nodes["again"] == {second: []}
    for entry in two_nodes["entries"]:
        arrived = two_nodes["folder"] / "there" / entry.parent.name / entry.name
        assert files_of(arrived) == files_of(entry)


@pytest.mark.soak
def test_machine_that_does_not_see_the_drivers_file_is_named(two_nodes):
    assert two_nodes["seen"] == []
    assert two_nodes["unseen"] == [two_nodes["name"]]
    assert two_nodes["left"] == []


@pytest.mark.soak
def test_cache_that_a_machine_cannot_write_is_refused_by_its_name(two_nodes):
    kind, text = two_nodes["refused"]
    assert kind == "ConfigError"
    assert text.startswith(f"{two_nodes['name']}: cache must be a folder")


@pytest.mark.soak
def test_lost_machine_is_a_warning_and_sees_nothing(two_nodes):
    assert two_nodes["lost"] == {}
    assert len(two_nodes["warned"]) == 1 and "lost was lost" in two_nodes["warned"][0]
    assert two_nodes["unanswered"] == ["lost"]
