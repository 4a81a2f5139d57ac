"""Run folders on an S3-like store, where there is no rename: what is whole has its manifest, which comes last.

    URL/NAME/config.yaml  metrics.jsonl  run.json       as in the run folder
    URL/NAME/last-000007-DIGEST/  best-000005-DIGEST/   checkpoints: epoch, and the start of their manifest's SHA-256

A checkpoint goes up under a name that only the same bytes can have, so that no whole one is ever overwritten; the one
before is removed when the newer is whole. Address and credentials of the server come from the environment alone:
AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or what else an AWS client finds there.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from richkd import checkpoint
from richkd.config import check_storage
from richkd.errors import ConfigError, CorruptError, Stopped
from richkd.files import own_folder, sync, write_synced
from richkd.record import seed_folders

MANIFEST = checkpoint.MANIFEST
BEFORE, AFTER = ("config.yaml", "metrics.jsonl"), ("run.json",)  # the checkpoints, by their order
ATTEMPTS = 3  # of the client, within a second or so: also where Ray uses it
PAUSES = (4.0,)  # seconds before further ones
TIMEOUT = 10.0  # seconds without a byte, in each attempt
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
CHECKPOINT = re.compile(r"(last|best)-(\d{6,})-([0-9a-f]{12})")

T = TypeVar("T")
Report = Callable[[dict[str, Any]], None]


class Store:
    """A folder of run folders on an object store.

    Args:
        url: `s3://BUCKET/FOLDER`.

    Raises:
        ConfigError: If it is no such address, or holds credentials.
    """

    def __init__(self, url: str) -> None:
        from pyarrow import fs

        check_storage(url)
        self.url = url.rstrip("/")
        self.base = self.url.removeprefix("s3://")
        # SHA-256 of the small files that lie there as this process sent them
        self.sent: dict[str, bytes] = {}
        server = urlsplit(
            os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        )
        self.files = fs.S3FileSystem(
            endpoint_override=server.netloc + server.path.rstrip("/") or None,
            scheme=server.scheme or None,
            region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
            connect_timeout=TIMEOUT,
            request_timeout=TIMEOUT,
            allow_delayed_open=True,  # a small file is one request
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        )

    def push(self, folder: Path, name: str = "") -> None:
        """Send what has changed of a run folder since it was sent.

        `last/` is the truth from which a run goes on, so what it needs is there before it: the best checkpoint, and the
        metrics of the epochs before.

        Args:
            folder: Run folder, which nobody writes meanwhile.
            name: What it is called in the store.

        Raises:
            CorruptError: If a checkpoint of it is damaged.
            Stopped: If the store cannot be reached; nothing whole is lost.
        """
        there = self._list(name)
        for file in BEFORE:
            self._push_file(folder / file, name)
        kept = {self._push_checkpoint(folder / kind, name, there) for kind in ("best", "last")}
        for file in AFTER:
            self._push_file(folder / file, name)
        for place in _checkpoints(there):
            if place not in kept:
                self._remove(_join(name, place), there[place])

    def newest(self, name: str = "") -> int | None:
        """Return the epoch of the newest checkpoint to go on from, None if there is none."""
        places = _whole(self._list(name), "last")
        return _epoch(places[0]) if places else None

    def fetch(self, name: str, folder: Path, *, last: bool = True) -> bool:
        """Bring a run folder from the store, in place of `folder`, as its newest whole checkpoint leaves it.

        Args:
            name: What it is called in the store.
            folder: Where it appears, whole.
            last: Whether the run may go on there; otherwise the state of the optimiser stays behind.

        Returns:
            Whether there is one; if not, `folder` is as it was.

        Raises:
            CorruptError: If there are checkpoints but none is as it was sent.
            Stopped: If the store cannot be reached.
        """
        there = self._list(name)
        partial = folder.with_name(f".{folder.name}.fetch")
        damaged = []
        for place in _whole(there, "last"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                self._fetch_checkpoints(name, place, there, partial, last=last)
            except (CorruptError, FileNotFoundError) as error:
                damaged.append(str(error))
                continue
            for file in (*BEFORE, *AFTER):
                if file in there[""]:
                    write_synced(partial / file, self._read(_join(name, file)))
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(partial, folder)
            sync(folder.parent)
            return True
        if damaged:
            shutil.rmtree(partial, ignore_errors=True)
            raise CorruptError(
                f"{_join(self.url, name)} has no checkpoint that is as it was sent ({damaged[0]}); remove that folder "
                "to run it anew."
            )
        return False

    def clear(self, name: str) -> None:
        """Remove a folder that nobody needs, if that can be done now."""
        with contextlib.suppress(OSError):
            self.files.delete_dir(_join(self.base, name))

    def probe(self) -> None:
        """Raise ConfigError unless a small file can be written, read and removed."""
        path, content = _join(self.base, f".probe-{secrets.token_hex(8)}"), secrets.token_bytes(64)
        try:
            self._put(path, content)
            found = self._get(path)
            self.files.delete_file(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"storage={self.url} must be a place that can be written and read but cannot ({reason(error)}); check that "
                "the bucket exists, and AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment."
            ) from None  # whose text may hold credentials
        if found != content:
            raise ConfigError(
                f"storage={self.url} must give back what is written but gave other bytes; choose another."
            )

    def _push_file(self, path: Path, name: str) -> None:
        if not path.exists():
            return
        content, target = path.read_bytes(), _join(name, path.name)
        digest = hashlib.sha256(content).digest()
        if self.sent.get(target) != digest:
            self._write(target, content)
            self.sent[target] = digest

    def _push_checkpoint(
        self, folder: Path, name: str, there: dict[str, dict[str, int]]
    ) -> str | None:
        """Send a checkpoint if it is not there, and return its name in the store; None if there is none to send."""
        if not (folder / MANIFEST).exists():
            return None
        manifest = (folder / MANIFEST).read_bytes()
        epoch = checkpoint.verify(folder)["meta"]["epoch"]
        place = f"{folder.name}-{epoch:06d}-{_digest(manifest)}"
        sizes = {file: (folder / file).stat().st_size for file in checkpoint.FILES}
        if there.get(place) != sizes:  # or torn
            for file in checkpoint.FILES:  # the manifest is the last of them
                self._write(_join(name, place, file), (folder / file).read_bytes())
        return place

    def _fetch_checkpoints(
        self, name: str, place: str, there: dict[str, dict[str, int]], folder: Path, *, last: bool
    ) -> None:
        """Bring a checkpoint `last/`, if it is asked for, and the best one that it knows of, and verify both."""
        wanted = [(place, "last")] if last else []
        best = json.loads(self._read_checked(name, place, MANIFEST))["meta"]["best"]
        if best is not None:
            epoch = best["epoch"]
            found = [each for each in _whole(there, "best") if _epoch(each) == epoch]
            if not found:
                raise CorruptError(f"the best checkpoint, of epoch {epoch}, is missing")
            wanted.append((found[0], "best"))
        for source, kind in wanted:
            (folder / kind).mkdir()
            for file in checkpoint.FILES:
                write_synced(folder / kind / file, self._read_checked(name, source, file))
            checkpoint.verify(folder / kind)

    def _read_checked(self, name: str, place: str, file: str) -> bytes:
        """Return a file of a checkpoint, whose name says which bytes its manifest has."""
        path = _join(name, place, file)
        content = self._read(path)
        if file == MANIFEST and place.rpartition("-")[2] != _digest(content):
            raise CorruptError(f"{_join(self.url, path)} is damaged")
        return content

    def _list(self, name: str) -> dict[str, dict[str, int]]:
        """Return the sizes of the files in each folder of a run folder, `""` its own."""
        from pyarrow import fs

        base = _join(self.base, name)
        selector = fs.FileSelector(base, recursive=True, allow_not_found=True)
        found: dict[str, dict[str, int]] = {"": {}}
        for info in self._ask(lambda: self.files.get_file_info(selector)):
            if info.is_file:
                place, _, file = info.path.removeprefix(f"{base}/").rpartition("/")
                found.setdefault(place, {})[file] = info.size
        return found

    def _remove(self, path: str, files: dict[str, int]) -> None:
        """Remove a checkpoint; its manifest first, since what has one is whole."""
        place = _join(self.base, path)
        with contextlib.suppress(FileNotFoundError):  # a try before this one got so far
            if MANIFEST in files:
                self._ask(lambda: self.files.delete_file(f"{place}/{MANIFEST}"))
            self._ask(lambda: self.files.delete_dir(place))

    def _write(self, path: str, content: bytes) -> None:
        self._ask(lambda: self._put(_join(self.base, path), content))

    def _read(self, path: str) -> bytes:
        return self._ask(lambda: self._get(_join(self.base, path)))

    def _put(self, path: str, content: bytes) -> None:
        with self.files.open_output_stream(path) as stream:
            stream.write(content)

    def _get(self, path: str) -> bytes:
        with self.files.open_input_stream(path) as stream:
            return stream.read()

    def _ask(self, call: Callable[[], T]) -> T:
        """Return what `call` does, after a further try or two if the store fails.

        Raises:
            FileNotFoundError: If it is not there.
            Stopped: If the store cannot be reached.
        """
        pauses = list(PAUSES)
        while True:
            try:
                return call()
            except FileNotFoundError:
                raise
            except OSError as error:
                if not pauses:
                    raise Stopped(
                        f"storage={self.url} cannot be reached ({reason(error)}); go on when it is back"
                    ) from None  # whose text may hold credentials
            time.sleep(pauses.pop(0))


@contextlib.contextmanager
def mirrored(job: dict[str, Any], report: Report) -> Iterator[tuple[dict[str, Any], Report]]:
    """Give a job the folder in which this process is to run it, and what takes its reports.

    With a store that is a folder of this machine, brought up to what the store has; each report is made after the
    run folders were sent, so that nothing that was heard of can be lost with the machine. The folder goes when the
    job ends, unless the store could not be reached.

    Args:
        job: `folder`; `store`, the URL of the job's folder, or None; `seeds`.
        report: Takes metrics.
    """
    if job["store"] is None:
        yield job, report
        return
    store = Store(job["store"])
    name = hashlib.sha256(store.url.encode()).hexdigest()[:12]
    folder = own_folder("runs") / f"{Path(job['folder']).name}-{name}"
    runs = names(job["seeds"])
    for run in runs:
        if (epoch := store.newest(run)) is not None and epoch > _local(folder / run):
            store.fetch(run, folder / run)
    behind = False

    def told(metrics: dict[str, Any]) -> None:
        nonlocal behind
        behind = True
        for run in runs:
            store.push(folder / run, run)
        behind = False
        report(metrics)

    try:
        yield job | {"folder": str(folder)}, told
    finally:
        if not behind:
            shutil.rmtree(folder, ignore_errors=True)


def names(seeds: int) -> list[str]:
    """Return what the runs of a job are called in its folder."""
    return [place.name for place in seed_folders(Path(), seeds)]


def bring(url: str, name: str, folder: Path) -> bool:
    """Bring a finished run from the store at `url`, to be looked at: without the state of its optimiser.

    Returns:
        Whether there is one; if not, `folder` is as it was.

    Raises:
        CorruptError: If none of its checkpoints is as it was sent.
        Stopped: If the store cannot be reached.
    """
    return Store(url).fetch(name, folder, last=False)


def reason(error: Exception) -> str:
    """Return what an object store complains of, on one line and without credentials."""
    text = " ".join(str(error).split())
    for variable in SECRETS:
        if value := os.environ.get(variable):
            text = text.replace(value, "***")
    return text[:300]


def _local(folder: Path) -> int:
    """Return the epoch of the run in a folder of this machine, -1 if there is none to go on from."""
    with contextlib.suppress(ConfigError, CorruptError):
        return checkpoint.verify(folder / "last")["meta"]["epoch"]
    return -1


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _digest(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:12]


def _epoch(place: str) -> int:
    return int(place.split("-")[1])


def _checkpoints(there: dict[str, dict[str, int]]) -> list[str]:
    return [place for place in there if CHECKPOINT.fullmatch(place)]


def _whole(there: dict[str, dict[str, int]], kind: str) -> list[str]:
    """Return the names of the checkpoints that have a manifest, newest first."""
    places = (place for place in _checkpoints(there) if place.startswith(kind))
    return sorted((p for p in places if MANIFEST in there[p]), key=_epoch, reverse=True)
