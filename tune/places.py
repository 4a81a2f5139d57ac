"""The machines that a sweep would run on, asked before it starts, and where its files may lie if there are several."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from richkd import estimate
from richkd.config import Config
from richkd.errors import ConfigError
from richkd.files import nearest
from richkd.layers import to_dict
from tune.environment import PROJECT
from tune.settings import Resources
from tune.sharing import Tried

VOLATILE = ("tmpfs", "ramfs", "overlay")  # file systems that end with a machine or a container
JOB = "working_dir_files"  # Ray's folder of what a job brought
MENDS = {
    "storage": ", or to an address such as s3://BUCKET/FOLDER",
    "cache": ", or bring a teacher (teacher.checkpoint): trained on each of them it would have other bits",
}
REACH, ASK = 5.0, 30.0  # seconds that a cluster may take to be reached, and to be asked
PATIENCE = 60.0  # seconds that the machines of a cluster may take to look at a folder
MEASURING = 300.0  # seconds that a measurement there may take
ASKED = """
import json, sys, ray
from pathlib import Path
from dataclasses import asdict
from richkd.layers import from_dict
from tune import nodes, sharing
from tune.settings import Resources
from tune.runner import runtime_env
ray.init(address=sys.argv[1], runtime_env=runtime_env(), log_to_driver=False, logging_level="ERROR")
print(json.dumps({}))
"""


def mounts() -> list[tuple[Path, str]]:
    """Return place and type of each file system that is mounted, as far as this system says."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split()
            found.append((Path(place.encode().decode("unicode_escape")), kind))
    return found


def unsafe(
    machines: int,
    state: Path,
    tracking: str,
    mounts: Sequence[tuple[Path, str]],
    unseen: Mapping[str, tuple[Path, Sequence[str]]],
) -> list[str]:
    """Return what a sweep on several machines would lose, or could not share, a line each with its mend.

    Args:
        machines: How many there are; on a single one everything may be.
        state: Folder of study, spool and lock.
        tracking: MLflow's address.
        mounts: Place and type of each file system.
        unseen: Folder that all must see, by its key, and the machines that do not.
    """
    if machines < 2:
        return []
    told = []
    state, temporary = state.resolve(), Path(tempfile.gettempdir()).resolve()
    above = [(place, kind) for place, kind in mounts if state.is_relative_to(place)]
    place, kind = max(above, key=lambda one: len(one[0].parts), default=(None, None))
    why = None
    if JOB in state.parts:
        why = "in the folder that Ray unpacked for this job"
    elif state.is_relative_to(temporary):
        why = f"under {temporary}, the system's folder for temporary files"
    elif kind in VOLATILE:
        why = f"on {place}, a file system ({kind}) that ends with its machine or container"
    if why is not None:
        told.append(
            f"sweep.state must outlive the driver's machine but {state} lies {why}; set sweep.state, or storage, to a "
            "folder on a disk that stays."
        )
    if tracking.startswith("sqlite"):
        told.append(
            f"tracking.uri must be a server where a sweep runs on {machines} machines but is {tracking}; start "
            "`mlflow server` and set tracking.uri=http://HOST:5000."
        )
    for field, (folder, blind) in unseen.items():
        if blind:
            told.append(
                f"{field} must be seen by all {machines} machines but {folder} is not by {', '.join(blind)}; set it to a folder "
                f"on a shared file system{MENDS[field]}."
            )
    return told


def check(
    machines: int, address: str | None, state: Path, tracking: str, shared: Mapping[str, Path]
) -> list[str]:
    """Return what `unsafe` says of a sweep, after the other machines have looked for what all must see.

    Args:
        machines: How many there are.
        address: Of their cluster.
        state: As `unsafe` takes it.
        tracking: As `unsafe` takes it.
        shared: Folders that all must see, by key.

    Raises:
        ConfigError: If the cluster does not answer.
    """
    looked = {}
    if machines > 1:
        looked = {field: (folder, unseen(address, folder)) for field, folder in shared.items()}
    return unsafe(machines, state, tracking, mounts(), looked)


def machines_of(address: str | None) -> list[dict[str, float]]:
    """Return CPUs and GPUs of each living machine of a cluster, or of this machine where none is named.

    Raises:
        ConfigError: If the cluster cannot be reached: in REACH seconds a port, in ASK seconds what is behind it.
    """
    if (address or os.environ.get("RAY_ADDRESS") or "local") == "local":
        return [{"CPU": os.cpu_count() or 1, "GPU": estimate.gpus()}]
    return _asked(address, "[node.resources for node in nodes.alive()]", ASK)


def unseen(address: str | None, folder: Path) -> list[str]:
    """Return the names of the machines of a cluster that do not see the nearest folder to `folder` that exists.

    Raises:
        ConfigError: If the cluster does not answer.
    """
    return _asked(address, "nodes.probe(Path(sys.argv[2]))", 2 * PATIENCE, str(nearest(folder)))


def shared(address: str | None, config: Config, resources: Resources, most: int) -> list[Tried]:
    """Return what `sharing.measured` finds on a cluster, or on this machine where none is named.

    Raises:
        ConfigError: If nothing was found.
    """
    question = (
        "[asdict(each) for each in sharing.measured(from_dict(json.loads(sys.argv[2])), "
        "Resources(**json.loads(sys.argv[3])), int(sys.argv[4]))]"
    )
    given = json.dumps(to_dict(config)), json.dumps(to_dict(resources)), str(most)
    return [Tried(**each) for each in _asked(address, question, MEASURING, *given)]


def unusable(address: str | None, reason: str) -> ConfigError:
    """Return the error of a Ray cluster that cannot be used, or not be started where none is named."""
    there = os.environ.get("RAY_ADDRESS")
    if not address and not there:
        return ConfigError(f"Ray cannot be started on this machine ({reason}); mend that first.")
    field = f"--address {address}" if address else f"RAY_ADDRESS={there}"
    return ConfigError(
        f"{field} cannot be used ({reason}); give HOST:PORT of a running Ray cluster, or none."
    )


def _asked(address: str | None, question: str, seconds: float, *arguments: str) -> Any:
    """Return what a cluster answers.

    A process of its own asks, since Ray itself would wait more than a minute for a cluster that does not answer.
    """
    place = address or os.environ.get("RAY_ADDRESS") or "local"
    host, _, port = place.rpartition(":")
    try:
        if port.isdigit() and "/" not in host:
            socket.create_connection((host, int(port)), REACH).close()
        asked = subprocess.run(
            [sys.executable, "-c", ASKED.format(question), place, *arguments],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
            env=os.environ | {"PYTHONPATH": str(PROJECT)},
        )
        return json.loads(asked.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()
        reason = " ".join((said[-1] if said else str(error)).split())[:200]
        if isinstance(error, subprocess.TimeoutExpired):
            reason = f"it did not answer within {seconds:g} s"
        raise unusable(address, reason) from error
