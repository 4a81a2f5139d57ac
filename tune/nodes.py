"""The machines of a cluster: which there are, what they can see, and a cache that all of them have.

    share(cache.used())     after the driver has made what all runs need, and before they start

A trained teacher that another machine trained again would have other bits. So each machine is given what its cache
lacks; one that shares the driver's disk lacks nothing.
"""

import hashlib
import secrets
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from richkd import cache
from richkd.errors import CorruptError, RichkdError
from richkd.files import read_record, sha256_of, write_synced
from richkd.progress import Progress

PART = 2**26  # bytes that are in flight at once, to a machine
PATIENCE = 60.0  # seconds for a look at a file, the start of a process included


class Node(NamedTuple):
    """A machine that is there; several may be the same one, as in a test."""

    id: str
    name: str
    resources: dict[str, float]


def alive() -> list[Node]:
    """Return the machines of the cluster, with what each of them offers."""
    return [
        Node(node["NodeID"], node["NodeManagerHostname"], node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def others() -> list[Node]:
    """Return the machines of the cluster but for the one that this process runs on."""
    here = ray.get_runtime_context().get_node_id()
    return [node for node in alive() if node.id != here]


def probe(folder: Path) -> list[str]:
    """Return the names of the machines that do not see in `folder` a file that is written there now.

    One that does not answer within a minute is one of them.
    """
    path, content = folder / f".{secrets.token_hex(8)}.probe", secrets.token_bytes(64)
    write_synced(path, content)
    try:
        asked = {on(_read, node.id).remote(str(path), 0, PART): node.name for node in others()}
        if not asked:
            return []
        done, _ = ray.wait([*asked], num_returns=len(asked), timeout=PATIENCE)
        seen = {answer for answer in done if _got(answer) == content}
        return sorted(name for answer, name in asked.items() if answer not in seen)
    finally:
        path.unlink()


def _got(answer: ray.ObjectRef) -> bytes | None:
    try:
        return ray.get(answer)
    except RayError:  # it was lost meanwhile
        return None


def share(
    entries: list[Path], root: Path | None = None, *, progress: Progress | None = None
) -> dict[str, list[str]]:
    """Give each machine of the cluster the entries of this one's cache that its own does not have.

    Args:
        entries: As `cache.used` returns them.
        root: Cache of the other machines; None: where it is here.
        progress: Called once a second with the number of machines that have all; may raise to stop.

    Returns:
        Machine to the entries, `KIND/DIGEST`, that it was sent. One that is lost meanwhile gets a warning: what it
        lacks is made there when a run asks for it.

    Raises:
        ConfigError: If a machine's cache cannot be written.
        CorruptError: If an entry did not arrive as it was sent.
    """
    here = ray.get_runtime_context().get_node_id()
    wanted = [(str(entry), str(root or entry.parent.parent)) for entry in entries if entry.exists()]
    asked = {on(_take, node.id).remote(wanted, here): node for node in others()}
    waiting = list(asked)
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1)
        if progress is not None:
            progress("caches of other machines", len(asked) - len(waiting), len(asked))
    sent = {}
    for answer, node in asked.items():
        try:
            sent[node.id] = ray.get(answer)
        except RayTaskError as error:
            cause = error
            while isinstance(cause, RayTaskError):
                cause = cause.cause
            if not isinstance(cause, RichkdError):
                raise
            raise type(cause)(f"{node.name}: {cause}") from error
        except RayError as error:
            warnings.warn(
                f"{node.name} was lost while it was sent the cache ({type(error).__name__}).",
                stacklevel=2,
            )
    return sent


def list_entry(entry: Path) -> dict[str, Any]:
    """Return what an entry of a cache is, and the size and SHA-256 of each of its files."""
    return {
        "description": read_record(entry.with_suffix(".json"), "format", "kind", "key"),
        "files": {
            path.relative_to(entry).as_posix(): [path.stat().st_size, sha256_of(path)]
            for path in sorted(entry.rglob("*"))
            if path.is_file()
        },
    }


def receive(
    entry: Path,
    root: Path,
    listed: dict[str, Any],
    part: Callable[[str, int, int], bytes],
) -> None:
    """Put an entry of another machine's cache into the cache `root`, whole or not at all.

    Args:
        entry: Where it lies on the other machine.
        root: Cache of this machine.
        listed: As `list_entry` returns it there.
        part: Given path, offset and size returns bytes of a file there.

    Raises:
        CorruptError: If a file did not arrive as it was sent.
    """

    def build(folder: Path) -> None:
        for name, (size, sha256) in listed["files"].items():
            path, found = folder / name, hashlib.sha256()
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                for offset in range(0, size, PART):
                    content = part(str(entry / name), offset, PART)
                    found.update(content)
                    file.write(content)
            if found.hexdigest() != sha256:
                raise CorruptError(
                    f"{entry / name} did not arrive as it was sent: {sha256}, found {found.hexdigest()}; start again."
                )

    said = listed["description"]
    made = cache.folder(root, said["kind"], said["key"], build)
    if made.name != entry.name:
        raise CorruptError(
            f"{entry.with_suffix('.json')} must say what the entry is but tells of {made.name}; remove both."
        )


def on(function: Any, node: str) -> Any:
    """Return a remote function as it runs on that machine alone."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return function.options(scheduling_strategy=strategy)


@ray.remote(num_cpus=0, max_retries=0)
def _read(path: str, offset: int, size: int) -> bytes:
    """Return bytes of a file on the machine where this runs, none if it is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except FileNotFoundError:
        return b""


@ray.remote(num_cpus=0, max_retries=0)
def _list(entry: str) -> dict[str, Any]:
    return list_entry(Path(entry))


@ray.remote(num_cpus=0, max_retries=0)
def _take(wanted: list[tuple[str, str]], source: str) -> list[str]:
    """Bring the entries that are missing here from the machine `source`, and return which they were."""
    taken = []
    for name, root in wanted:
        entry = Path(name)
        ours = Path(root, entry.parent.name, entry.name)
        if not ours.exists():
            listed = ray.get(on(_list, source).remote(name))
            receive(
                entry,
                cache.root(root),
                listed,
                lambda *where: ray.get(on(_read, source).remote(*where)),
            )
            taken.append(f"{entry.parent.name}/{entry.name}")
    return taken
