"""MLflow, spoken to by one thread of the sweep's driver; the only module that knows it.

A server that is slow, refuses or is dead never stops a sweep and never slows it: every call writes a line of
`spool.jsonl` in the sweep's folder and returns, the thread carries the lines out in order, with metrics in batches,
and notes there how far it has come. While MLflow does not answer, they wait; the thread asks from time to time.
What still waits at the end, or when the driver is killed, the next start or `python -m tune sync` sends.
`Tracker.problem` says in one line what is missing and why.

Whether MLflow took what was sent last is not known then. So everything can be sent twice without harm: a point is
only sent if the history of its run has none of that step, and before a run is opened again it is searched for.

    tracker = Tracker(folder, "http://mlflow:5000")
    tracker.start()
    sweep = tracker.sweep("digits", {"data.source": "digits"}, {"richkd.kind": "sweep"})
    run = tracker.run(sweep, "trial-000", {"fusion.alpha": 0.7}, {"richkd.kind": "trial"})
    tracker.log(run, {"val/top1": 93.1}, step=1)
    tracker.finish(run, "FINISHED")
    tracker.close(timeout=60)
"""

import contextlib
import io
import json
import logging
import math
import os
import re
import sqlite3
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http.client import HTTPException
from importlib.metadata import version as installed
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple

from richkd.errors import ConfigError, RichkdError, Stopped
from richkd.files import NO_SPACE, check_writable, read_record, write_json
from tune import names
from tune.links import SWEEPS, VIEW, Pages, public
from tune.spool import Spool

RETRIES = (0.5, 2.0, 0.0)  # seconds after each attempt at what MLflow refuses though it answers
FIRST_PAUSE = 1.0  # seconds until an MLflow that does not answer is asked again; doubled each time
LAST_PAUSE = 15.0  # seconds, at most
PATIENCE = 5.0  # seconds that `close` waits for an MLflow that fails, or says nothing
FLUSH_SECONDS = 2.0  # what is put waits this long for more
OPERATIONS = 100  # that are sent between two notes of how far it has come
LISTED = "/api/2.0/mlflow/experiments/search?max_results=1"
LOCK_SECONDS = 120.0  # that another process may take to open a new database, or to promote
PROBE_SECONDS = 5.0  # that a server may take to say that it is well
METRICS_PER_BATCH = 900  # MLflow takes 1000 entities a call, tags included
PER_BATCH = 100  # parameters, or tags; MLflow's own limit
DIGEST_LENGTH = 36  # MLflow's own limit
NONFINITE = "richkd.nonfinite"
SUPERSEDED = " (superseded)"
TABLES = "mlflow.loggedArtifacts"  # the tag by which the UI finds tables
FULL = ("disk is full", "No space left")  # SQLite's words, and the system's
THREAD = "mlflow"
SPOOL = "spool.jsonl"
SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")

# MLflow's own waits are 7 retries from 2 s and 120 s a request: four minutes for a closed port, and a
# failure is not heard of before they are over. The retries are `Tracker._attempt`'s.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class _Operation(NamedTuple):
    """One call as plain data: a method of `_Store`, a run, when it was asked for (ms), and the rest."""

    name: str
    run: str
    at: int
    arguments: Sequence[Any]


class _Waits(Exception):
    """What is not sent now, though it may be later; the message says why."""


class Tracker:
    """A spool in front of MLflow. Runs are named by keys of ours, known before MLflow has answered.

    The folder holds `spool.jsonl` while something is to be sent, and `mlflow.json`: run ids by key, by which runs
    of an earlier start are gone on with.

    Args:
        folder: Of the sweep or the run; it must be there when the tracker is started.
        uri: Server or database; None means what `address` says.
        experiment: Name of the experiment, created if there is none.

    Raises:
        ConfigError: If `uri` names a folder or a database that is no file.
        CorruptError: If `mlflow.json` cannot be read.
    """

    def __init__(self, folder: Path, uri: str | None = None, experiment: str = "richkd") -> None:
        self.folder, self.uri = folder, self.address(uri)
        self._ids = folder / "mlflow.json"
        self._written = read_record(self._ids) if self._ids.exists() else {}
        self._store = _Store(self.uri, experiment, folder, dict(self._written))
        self._spool: Spool | None = None
        self._viewed: set[str] = set()  # runs that have a view
        self._connected = False
        self._outage: str | None = None  # why nothing is sent now
        self._refused: str | None = None  # the first operation that MLflow refused, and why
        self._since: float | None = None  # when the call began after which none has succeeded
        self._closing = threading.Event()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name=THREAD, daemon=True)

    @staticmethod
    def address(uri: str | None) -> str:
        """Return the absolute address: `uri`, else MLFLOW_TRACKING_URI, else `mlflow.db` in this folder.

        The last is what a plain `mlflow ui` started in this folder shows.

        Raises:
            ConfigError: If it names a folder or a database that is no file.
        """
        uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        if uri == "databricks":
            return uri
        scheme = uri.partition(":")[0] if ":" in uri else ""
        if len(scheme) < 2 or scheme == "file":  # C:\ is a folder too
            raise ConfigError(
                f"tracking.uri must be a server or a database but got {uri!r}: MLflow no longer keeps "
                "runs in plain files; use sqlite:///mlflow.db or the address of a server."
            )
        if scheme.partition("+")[0] not in SCHEMES:
            raise ConfigError(
                f"tracking.uri must begin with one of {', '.join(SCHEMES)} but got {public(uri)!r}; use "
                "sqlite:///mlflow.db or the address of a server."
            )
        if scheme != "sqlite":
            return uri
        path = uri.removeprefix("sqlite:///")
        if path in (uri, "", ":memory:"):
            raise ConfigError(
                f"tracking.uri must name a file but got {uri!r}; use sqlite:///mlflow.db."
            )
        return f"sqlite:///{Path(path).absolute().as_posix()}"

    @staticmethod
    def recall(written: str) -> str:
        """Return the address that was written down without credentials, with those of MLFLOW_TRACKING_URI.

        Raises:
            ConfigError: If the environment names another address.
        """
        if "***@" not in written:
            return written
        given = os.environ.get("MLFLOW_TRACKING_URI", "")
        if public(given) != written:
            raise ConfigError(
                f"MLFLOW_TRACKING_URI must give the password of {written}, which is written down nowhere; set it."
            )
        return given

    @staticmethod
    def probe(uri: str) -> str | None:
        """Return why MLflow cannot be used at an absolute address, None if it answers, or cannot be asked so simply.

        A server is asked for an experiment and may take PROBE_SECONDS, a file is opened; nothing is written.
        """
        try:
            if uri.startswith(("http://", "https://")):
                # urllib takes no credentials there
                where = re.sub(r"//[^/]*@", "//", uri).rstrip("/")
                urllib.request.urlopen(where + LISTED, timeout=PROBE_SECONDS).close()
            elif (path := _database(uri)) is not None:
                check_writable(path.parent, "tracking.uri")
                if path.exists():
                    with contextlib.closing(sqlite3.connect(path)) as database:
                        database.execute("PRAGMA schema_version")
        except urllib.error.HTTPError as error:
            if error.code == 403:
                return "it answers 403: it takes no request to this host; see `mlflow server --allowed-hosts`"
            return None if error.code < 500 else f"it answers {error.code} {error.reason}"
        except (OSError, ValueError, HTTPException, sqlite3.Error) as error:
            return _reason(error)
        except ConfigError as error:
            return str(error)
        return None

    def running(self, runs: Iterable[str]) -> list[str]:
        """Return those of the runs that MLflow says are running; none if it does not answer."""
        _set_waits()
        from mlflow.tracking import MlflowClient

        client, found = MlflowClient(tracking_uri=self.uri), []
        for run in runs:
            if (run_id := self.run_id(run)) is None:
                continue
            try:
                info = client.get_run(run_id).info
            except Exception:  # of MLflow, its store or the network
                return []
            if info.status == "RUNNING":
                found.append(run)
        return found

    def start(self) -> None:
        """Start the thread, which imports MLflow and opens the experiment; returns at once.

        Raises:
            OSError: If the spool cannot be written.
        """
        _set_waits()
        os.environ.pop("MLFLOW_RUN_ID", None)  # would be used instead of new runs
        self._spool = Spool(self.folder / SPOOL)
        # where it is to be sent, for `sync`
        self._spool.write({"uri": self.public_uri, "experiment": self._store.experiment})
        self._thread.start()

    def sweep(self, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        """Open the parent run and return its key.

        Args:
            name: Name of the run.
            params: Constants of the sweep by dotted key; written once.
            tags: Tags by key.
        """
        self._put("create", name, name, None, _texts(params), _texts(tags))
        return name

    def run(self, sweep: str, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        """Open a child run and return its key.

        Args:
            sweep: Key of the parent run.
            name: Name of the run, unique in the sweep.
            params: The searched parameters by dotted key, and no others: the UI compares the first few.
            tags: Tags by key.
        """
        key = f"{sweep}/{name}"
        self._put("create", key, name, sweep, _texts(params), _texts(tags))
        return key

    def retire(self, run: str) -> None:
        """Let go of a run that another one of its name is to follow: it stays in MLflow, as superseded."""
        self._put("retire", run)

    def log(self, run: str, metrics: Mapping[str, Any], step: int) -> None:
        """Send metrics, but for those of which MLflow has that step already.

        Args:
            run: Key of a run.
            metrics: Values by key; what is no number is left out, and non-finite numbers, which MLflow
                would store as 0 or 1.8e308, are counted in the tag `richkd.nonfinite` instead.
            step: Epoch.
        """
        numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, Real)}
        self._put("log", run, numbers, int(step))

    def tag(self, run: str, tags: Mapping[str, Any]) -> None:
        """Set tags of a run."""
        self._put("tag", run, _texts(tags))

    def text(self, run: str, text: str, file: str) -> None:
        """Store `text` as the artifact `file` of a run."""
        self._put("text", run, text, file)

    def artifacts(self, run: str, folder: Path, name: str) -> None:
        """Store a folder as the artifact folder `name`; it must stay as it is until it is sent."""
        self._put("artifacts", run, os.path.relpath(folder, self.folder), name)  # both may be moved

    def table(self, run: str, columns: Mapping[str, Iterable[Any]], file: str) -> None:
        """Store columns of equal length as the artifact `file` (`.json`), which the UI shows as a table."""
        self._put("table", run, {name: list(column) for name, column in columns.items()}, file)

    def dataset(self, run: str, name: str, digest: str, context: str) -> None:
        """Name a dataset that the run read.

        Args:
            run: Key of a run.
            name: Name of the dataset.
            digest: Our own digest of its content; MLflow keeps 36 characters.
            context: What it was read for, such as `training`.
        """
        self._put("dataset", run, name, digest, context)

    def view(
        self,
        run: str,
        columns: Mapping[str, Iterable[str]],
        order: str,
        parents: Mapping[str, Iterable[str]],
    ) -> None:
        """Let the UI show columns where `links` lead; by itself it shows none of ours.

        There are two views, since children fold under their parent only in the order of time: all runs, the newest
        first, and the children of one run by a metric.

        Args:
            run: Key of the parent run.
            columns: What children have: keys by kind, `metrics`, `params` or `tags`.
            order: Metric by which children are ranked, the highest first.
            parents: What parents have beside that, likewise.
        """
        self._viewed.add(run)
        below, above = (
            [f"{kind}.`{names.key(key)}`" for kind, keys in each.items() for key in keys]
            for each in (columns, parents)
        )
        self._put("view", run, below, f"metrics.`{names.key(order)}`", above)

    def finish(self, run: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End a run, after its metrics."""
        self._put("finish", run, status)

    def close(self, timeout: float) -> bool:
        """Send what waits and end; safe to call twice, and after a signal interrupted any other call.

        Args:
            timeout: Seconds to wait at most; a server that fails is given up after a few.

        Returns:
            Whether everything was sent, and the spool removed; if not, `problem` says why.
        """
        if self._spool is None:
            return True
        self._closing.set()
        began = time.monotonic()
        while self._thread.is_alive() and not self._given_up.is_set():
            now = time.monotonic()
            failing = now - max(began, self._since or now)
            if now - began >= timeout or failing >= PATIENCE:
                self._given_up.set()
                self._outage = self._outage or (
                    f"MLflow at {self.public_uri} did not take everything within {now - began:.0f} s"
                )
            self._thread.join(0.05)
        if self.problem is None:
            self._spool.remove()
        return self.problem is None

    @property
    def waits(self) -> bool:
        """Whether something waits because MLflow did not answer, or the disk is full."""
        return self._outage is not None

    @property
    def problem(self) -> str | None:
        """What MLflow has not taken and why, in one line; None if it has everything that was sent so far."""
        if not self.waits:
            return self._refused
        from tune.best import called  # torch takes a second to import

        return (
            f"{self._outage}; {len(self._spool.waiting())} operations wait in {self._spool.path}; "
            f"send them: python -m tune sync {called(self.folder)}"
        )

    @property
    def public_uri(self) -> str:
        """The address without credentials."""
        return public(self.uri)

    @property
    def experiment_id(self) -> str | None:
        """MLflow's id of the experiment, None until it has answered."""
        return self._store.experiment_id

    def run_id(self, run: str) -> str | None:
        """Return MLflow's id of a run, None until it has answered."""
        return self._store.ids.get(run)

    @property
    def points(self) -> int:
        """How many metric points MLflow has taken."""
        return self._store.points

    def links(self, sweep: str, children: Iterable[str]) -> dict[str, str]:
        """Return addresses of the UI, as far as MLflow has answered.

        Args:
            sweep: Key of the parent run.
            children: Keys of the runs to compare; the best few, since an address has an end.

        Returns:
            `command` (starts the UI of a database; absent for a server), `runs` (all of the experiment), `sweep`,
            `ranking` (its children, the best first; absent without a view), `compare`.
        """
        pages, links, at = Pages(self.uri), {}, self.experiment_id
        if pages.command is not None:
            links["command"] = pages.command
        if at is None:
            return links
        seen = sweep in self._viewed
        links["runs"] = pages.runs(at, SWEEPS if seen else None)
        if (parent := self.run_id(sweep)) is not None:
            links["sweep"] = pages.run(at, parent)
            if seen:
                links["ranking"] = pages.runs(at, parent)
        if ids := [run_id for child in children if (run_id := self.run_id(child)) is not None]:
            links["compare"] = pages.compared(at, ids)
        return links

    def place(
        self, run: str, children: Iterable[str] = (), *, titles: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return where a run is to be seen, as plain JSON.

        Args:
            run: Its key.
            children: As in `links`.
            titles: What a person is told of which link.

        Returns:
            `tracking_uri`, `experiment`, `run_id`, `links`, and `lines` for the terminal.
        """
        links = self.links(run, children)
        lines = {titles[key]: line for key, line in links.items() if key in titles}
        if self.problem:
            lines["MLflow"] = f"is incomplete: {self.problem}"
        return {
            "tracking_uri": self.public_uri,
            "experiment": self._store.experiment,
            "run_id": self.run_id(run),
            "links": links,
            "lines": lines,
        }

    def _put(self, name: str, run: str, *arguments: Any) -> None:
        if self._spool is not None:
            operation = _Operation(name, run, time.time_ns() // 1_000_000, arguments)
            self._spool.write(operation._asdict())

    def _work(self) -> None:
        logging.getLogger("urllib3.connectionpool").addFilter(_of_others)  # warns of every retry
        pause = FIRST_PAUSE
        while not self._given_up.is_set():
            closing = self._closing.is_set()  # asked before reading: what was put before is read
            try:
                self._send()
            except Exception as error:  # not only `_Waits`: the disk may be full, too
                if not self._given_up.is_set():
                    self._outage = str(error) if isinstance(error, _Waits) else _reason(error)
                if closing and not isinstance(error, _Waits):
                    return
                pause = FIRST_PAUSE if closing else min(2 * pause, LAST_PAUSE)
                wait = pause
            else:
                if closing:
                    self._outage = None
                    return
                self._outage, pause, wait = None, FIRST_PAUSE, FLUSH_SECONDS
            (self._given_up if closing else self._closing).wait(wait)

    def _send(self) -> None:
        """Send what waits, and note how far it has come.

        Raises:
            _Waits: If MLflow does not answer; what was not noted as done is tried again.
            OSError: If the disk does not take the note.
        """
        if not self._connected:
            self._store.load()  # takes seconds, of which no server is to blame
            self._attempt(_Operation("connect", "the experiment", 0, ()))
            # by an earlier driver, or before an outage, any of these may have been tried
            tried = (each for each, _ in self._spool.waiting() if each["name"] == "create")
            self._store.asked_for |= {each["run"] for each in tried}
            self._connected = True
        waiting = self._spool.waiting()
        for first in range(0, len(waiting), OPERATIONS):
            some = waiting[first : first + OPERATIONS]
            for operation in _gathered(_Operation(**record) for record, _ in some):
                self._attempt(operation)
            if self._store.ids != self._written:  # before the note: else none would look for them
                self._written = dict(self._store.ids)
                write_json(self._ids, self._written)
            self._spool.done(some[-1][1])

    def _attempt(self, operation: _Operation) -> None:
        opens = operation.name in ("connect", "create")
        if not opens and operation.run not in self._store.ids:
            return  # MLflow refused to open it, and that was noted
        # an upload takes its time, and so does a database that is migrated
        patient = operation.name == "artifacts" or self.uri.startswith("sqlite:")
        for pause in RETRIES:
            if self._given_up.is_set():
                raise _Waits("given up")
            began = time.monotonic()
            self._since = self._since or (None if patient else began)
            try:
                getattr(self._store, operation.name)(
                    operation.run, operation.at, *operation.arguments
                )
            except Exception as error:  # of MLflow, its store, the network or the disk
                reason = _reason(error)
                self._since = self._since or began
            else:
                self._since = None
                return
            what = (
                f"MLflow at {self.public_uri} failed to {operation.name} {operation.run} ({reason})"
            )
            full = any(text in reason for text in FULL)
            if operation.name == "connect" or full or not self._store.answers():
                self._connected = False
                raise _Waits(what)
            self._given_up.wait(pause)
        self._since = None  # it answers: it is this operation that it does not take
        self._refused = self._refused or f"{what}."
        self._spool.write({"refused": operation.name, "run": operation.run, "why": reason})


class Found(NamedTuple):
    """A run as MLflow has it, and its metrics as they were last."""

    name: str
    experiment: str  # MLflow's id of it
    tags: dict[str, str]
    metrics: dict[str, float]


class Client:
    """MLflow asked at once, by a verb whose user waits: a call answers, or raises an error of one line.

    A version of a registered model is known by its number, as text.

    Args:
        uri: Absolute address.

    Raises:
        ConfigError: If it is a database that is not there.
        Stopped: If MLflow does not answer.
    """

    def __init__(self, uri: str) -> None:
        _set_waits()
        self.uri, self.pages = uri, Pages(uri)
        if (database := _database(uri)) is not None and not database.exists():
            raise ConfigError(
                f"tracking.uri must lead to an MLflow that is there but {database} is not; give its database, or the "
                "address of its server."
            )
        with self._asked("open"):
            from mlflow.tracking import MlflowClient

            self.client = MlflowClient(tracking_uri=uri)

    def run(self, run_id: str) -> Found:
        """Return a run; a ConfigError if there is none."""
        with self._asked(f"find run {run_id}"):
            found = self.client.get_run(run_id)
        info, data = found.info, found.data
        return Found(info.run_name, info.experiment_id, data.tags, data.metrics)

    def attach(self, run_id: str, path: Path) -> None:
        """Store a folder, or a file, as an artifact of a run under its own name; what has that name is replaced."""
        with self._asked(f"store {path.name}"):
            if path.is_dir():
                self.client.log_artifacts(run_id, str(path), path.name)
            else:
                self.client.log_artifact(run_id, str(path))

    def log(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Add metrics to a run that has ended; one that it has with this value already stays as it is."""
        with self._asked("store metrics"):
            known = self.client.get_run(run_id).data.metrics
            for key, value in metrics.items():
                if known.get(key) != value:
                    self.client.log_metric(run_id, key, value)

    def fetch(self, run_id: str, name: str, files: Iterable[str], folder: Path) -> None:
        """Bring files of the artifact folder `name`, and no others, into a folder.

        Raises:
            ConfigError: If one is missing.
        """
        with self._asked(f"send {name} of run {run_id}"):
            items = self.client.list_artifacts(run_id, name)
            there = {item.path for item in items if not item.is_dir}
            wanted = [f"{name}/{file}" for file in files]
            if missing := [path for path in wanted if path not in there]:
                raise ConfigError(
                    f"MLflow's run {run_id} must have the artifact {missing[0]} but has not; name another run."
                )
            for path in wanted:
                self.client.download_artifacts(run_id, path, str(folder))

    def aliases(self, model: str) -> dict[str, str]:
        """Return the versions of a registered model that have an alias, by alias; none if there is no such model."""
        with self._asked(f"find model {model}"):
            found = self.client.search_registered_models(f"name = '{model}'")
        return {alias: str(version) for one in found for alias, version in one.aliases.items()}

    def version(self, model: str, tag: str, value: str) -> str | None:
        """Return the newest version of a model that has this tag, None if there is none."""
        with self._asked(f"find versions of {model}"):
            found = self.client.search_model_versions(f"name = '{model}'")
        numbers = [int(one.version) for one in found if one.tags.get(tag) == value]
        return str(max(numbers)) if numbers else None

    def tags(self, model: str, version: str) -> dict[str, str]:
        """Return the tags of a version."""
        with self._asked(f"find version {version} of {model}"):
            return dict(self.client.get_model_version(model, version).tags)

    def tag(self, model: str, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with self._asked(f"tag version {version} of {model}"):
            for key, value in tags.items():
                self.client.set_model_version_tag(model, version, key, value)

    def describe(self, model: str, version: str, text: str) -> None:
        """Set the description of a version."""
        with self._asked(f"describe version {version} of {model}"):
            self.client.update_model_version(model, version, text)

    def alias(self, model: str, alias: str, version: str) -> None:
        """Give a version an alias, which another one loses."""
        with self._asked(f"give version {version} of {model} the alias {alias}"):
            self.client.set_registered_model_alias(model, alias, version)

    def unalias(self, model: str, alias: str) -> None:
        """Take an alias away."""
        with self._asked(f"take the alias {alias} of {model} away"):
            self.client.delete_registered_model_alias(model, alias)

    def register(
        self,
        run_id: str,
        model: str,
        student: Any,
        example: Any,
        *,
        classes: Sequence[str],
        files: Iterable[Path],
        tags: Mapping[str, str],
    ) -> str:
        """Log a network as a model of a run, register it, and return its version.

        What is logged is the graph that torch.export traces: it is loaded without our code, and nothing of it is
        unpickled.

        Args:
            run_id: Of the run that made it.
            model: Name in the registry.
            student: A torch module in eval mode: uint8 `(N, C, H, W)` to logits `(N, K)`.
            example: Images `(N, C, H, W)` as a NumPy array, two at least: of one, N would be traced as the constant 1.
            classes: K names in the order of the logits.
            files: Are laid beside, in `extra_files`.
            tags: Of the version.
        """
        import mlflow
        import numpy as np
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        signature = ModelSignature(
            Schema([TensorSpec(np.dtype(np.uint8), (-1, *example.shape[1:]))]),
            Schema([TensorSpec(np.dtype(np.float32), (-1, len(classes)))]),
        )
        packages = [f"{package}=={installed(package)}" for package in ("torch", "numpy")]
        # log_model asks for the address of the whole process
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        with (
            self._asked(f"register {model}"),
            contextlib.redirect_stderr(io.StringIO()),  # tells what it does
            warnings.catch_warnings(action="ignore"),  # of its own type hints
        ):
            mlflow.set_tracking_uri(self.uri)
            try:
                logged = mlflow.pytorch.log_model(
                    student,
                    name="student",
                    run_id=run_id,
                    registered_model_name=model,
                    signature=signature,
                    input_example=example,
                    serialization_format="pt2",
                    pip_requirements=packages,  # else it runs the model to find them
                    extra_files=[str(path) for path in files],
                    metadata={"names": list(classes)},
                    tags=dict(tags),
                )
            finally:
                mlflow.set_tracking_uri(before)
        return str(logged.registered_model_version)

    @contextlib.contextmanager
    def _asked(self, what: str) -> Iterator[None]:
        """Turn what MLflow, its store or the network raise into an error of ours."""
        try:
            yield
        except RichkdError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            text = f"MLflow at {public(self.uri)} does not {what} ({_reason(error)}); "
            status = getattr(error, "get_http_status_code", None)  # of MLflow's own exceptions
            if isinstance(error, OSError) or (status is not None and status() >= 500):
                raise Stopped(f"{text}run the same command again when it answers.") from error
            if status is not None:
                raise ConfigError(f"{text}compare what you gave with what its UI shows.") from error
            raise RichkdError(f"{text}it cannot be mended from here.") from error


def _gathered(operations: Iterable[_Operation]) -> Iterator[_Operation]:
    """Yield operations in their order, but the metrics of a run together: before its end, or at last."""
    points: dict[str, list[tuple[str, float, int, int]]] = defaultdict(list)
    for operation in operations:
        if operation.name == "log":
            metrics, step = operation.arguments
            points[operation.run] += [
                (k, value, operation.at, step) for k, value in metrics.items()
            ]
            continue
        if operation.name in ("finish", "retire") and operation.run in points:
            yield _Operation("metrics", operation.run, 0, (points.pop(operation.run),))
        yield operation
    for run, left in points.items():
        yield _Operation("metrics", run, 0, (left,))


class _Store:
    """The calls of MLflow's client, for the tracker's thread; each can be repeated after a failure.

    Args:
        uri: Absolute address.
        experiment: Name.
        folder: From which paths of artifacts are given.
        ids: Run ids by key.
    """

    def __init__(self, uri: str, experiment: str, folder: Path, ids: dict[str, str]) -> None:
        self.uri, self.experiment, self.folder, self.ids = uri, experiment, folder, ids
        self.experiment_id: str | None = None
        self.points = 0  # that were sent
        self.context: dict[str, str] = {}
        # what was not finite, by run: (key, step), and a number for each that an earlier driver counted
        self.nonfinite: dict[str, set[Any]] = defaultdict(set)
        self.steps: dict[str, _Steps] = {}  # of runs that have not ended
        self.asked_for: set[str] = set()  # runs that were asked for, answered or not

    def load(self) -> None:
        """Import MLflow, and ask it what each run is to say of user, command and commit."""
        from mlflow.tracking.context.registry import resolve_tags

        self.context = self.context or resolve_tags()

    def connect(self, _run: str, _at: int) -> None:
        """Open the experiment; a new database is migrated first."""
        from mlflow.tracking import MlflowClient

        artifacts = None  # the server decides
        with alone(self.uri):
            if (database := _database(self.uri)) is not None:
                # beside the database, not in the folder that the driver happened to be started in
                below = re.sub(r"[^\w.-]", "_", self.experiment)
                artifacts = str(database.parent / "mlruns" / below)
            self.client = MlflowClient(tracking_uri=self.uri)
            found = self.client.get_experiment_by_name(self.experiment)
            if found is not None and found.lifecycle_stage != "active":
                raise ConfigError(
                    f"experiment {self.experiment} is deleted; choose another tracking.experiment, or "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
                )
            if found is None:
                made = self.client.create_experiment(self.experiment, artifact_location=artifacts)
                self.experiment_id = made
            else:
                self.experiment_id = found.experiment_id

    def answers(self) -> bool:
        """Whether MLflow still answers to a harmless question."""
        try:
            return self.client.get_experiment(self.experiment_id) is not None
        except Exception:  # as in `_attempt`; no client if it never connected
            return False

    def create(
        self,
        run: str,
        at: int,
        name: str,
        parent: str | None,
        params: dict[str, Any],
        tags: dict[str, Any],
    ) -> None:
        """Open a run, or go on with the one that is known; parameters it has already stay as they are."""
        from mlflow.entities import Param

        if parent in self.ids:
            tags = tags | {"mlflow.parentRunId": self.ids[parent]}
        found = self._known(run)
        if found is None:
            made = self._unanswered(run, at, names.run(name))
            if made is None:
                made = self.client.create_run(
                    self.experiment_id,
                    start_time=at,
                    tags=self.context | {names.key(key): value for key, value in tags.items()},
                    run_name=names.run(name),
                )
                self.steps[run] = _Steps(lambda _: set())
            self.ids[run] = made.info.run_id
        else:
            self.client.update_run(self.ids[run], status="RUNNING")
            self.tag(run, at, tags)
            counted = int(found.data.tags.get(NONFINITE, 0))
            self.nonfinite.setdefault(run, set(range(counted)))
        written = {} if found is None else found.data.params
        values = {names.key(key): value for key, value in params.items()}
        batch = [Param(key, value) for key, value in values.items() if key not in written]
        for first in range(0, len(batch), PER_BATCH):
            some = batch[first : first + PER_BATCH]
            self.client.log_batch(self.ids[run], params=some, synchronous=True)
        keys = {names.key(key): key for key in (*params, *tags)}
        self._tag(run, names.originals(keys | {names.run(name): name}))

    def retire(self, run: str, at: int) -> None:
        """Rename a run and forget it, unless it was opened since: then this is sent for the second time."""
        found = self._known(run)
        if found is not None and found.info.start_time < at:
            name = found.info.run_name.removesuffix(SUPERSEDED) + SUPERSEDED
            self.client.update_run(self.ids[run], name=name)
            self.tag(run, at, {"richkd.state": "superseded"})
            for known in (self.ids, self.steps, self.nonfinite):
                known.pop(run, None)

    def _known(self, run: str) -> Any:
        from mlflow.exceptions import MlflowException

        if run not in self.ids:
            return None
        try:
            found = self.client.get_run(self.ids[run])
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None  # of another server
        return found if found.info.lifecycle_stage == "active" else None

    def _unanswered(self, run: str, at: int, name: str) -> Any:
        """Return the run that an earlier attempt opened, though its answer was lost; None on a first one."""
        tried = run in self.asked_for
        self.asked_for.add(run)
        rule = f"attributes.start_time = {at}"
        found = self.client.search_runs([self.experiment_id], rule) if tried else []
        return next((one for one in found if one.info.run_name == name), None)

    def metrics(self, run: str, _at: int, points: list[tuple[str, float, int, int]]) -> None:
        """Send those points of (key, value, ms, step) of whose key MLflow has not that step."""
        from mlflow.entities import Metric, RunTag

        if run not in self.steps:
            self.steps[run] = self._read(run)
        known, new = self.steps[run], {}
        for key, value, at, step in points:
            if step not in known[names.key(key)]:
                new.setdefault((names.key(key), step), (value, at))
        if not new:
            return
        batch = [
            Metric(key, value, at, step)
            for (key, step), (value, at) in new.items()
            if math.isfinite(value)
        ]
        tags = []
        self._tag(run, names.originals({names.key(key): key for key, *_ in points}))
        if len(batch) < len(new):
            self.nonfinite[run] |= {
                point for point, (value, _) in new.items() if not math.isfinite(value)
            }
            tags = [RunTag(NONFINITE, str(len(self.nonfinite[run])))]
        try:
            for first in range(0, len(batch) or 1, METRICS_PER_BATCH):
                some = batch[first : first + METRICS_PER_BATCH]
                self.client.log_batch(self.ids[run], metrics=some, tags=tags, synchronous=True)
        except Exception:
            del self.steps[run]  # it may have taken them: it is asked before they are sent again
            raise
        for key, step in new:
            known[key].add(step)
        self.points += len(batch)

    def _read(self, run: str) -> "_Steps":
        """Return the steps that MLflow has of a run."""
        run_id = self.ids[run]
        keys = self.client.get_run(run_id).data.metrics.keys()
        return _Steps(
            lambda key: (
                {point.step for point in self.client.get_metric_history(run_id, key)}
                if key in keys
                else set()
            )
        )

    def tag(self, run: str, _at: int, tags: dict[str, Any]) -> None:
        """Set tags."""
        keys = {names.key(key): key for key in tags}
        self._tag(run, {given: tags[key] for given, key in keys.items()} | names.originals(keys))

    def _tag(self, run: str, tags: dict[str, str]) -> None:
        """Set tags whose keys MLflow takes."""
        from mlflow.entities import RunTag

        batch = [RunTag(key, value) for key, value in tags.items()]
        for first in range(0, len(batch), PER_BATCH):
            some = batch[first : first + PER_BATCH]
            self.client.log_batch(self.ids[run], tags=some, synchronous=True)

    def view(self, run: str, at: int, below: list[str], order: str, above: list[str]) -> None:
        """Keep two views in tags of the experiment, as the UI itself does when it is told to share one.

        That of all runs has a name, and the columns of the sweep that came last, until a person changes it.
        """
        ranking = {
            "selectedColumns": below,
            "orderByKey": order,
            "orderByAsc": False,
            "searchFilter": f"tags.mlflow.parentRunId = '{self.ids[run]}'",
        }
        everything = {
            "selectedColumns": above + below,
            "orderByKey": "attributes.start_time",
            "orderByAsc": False,
        }
        named = {
            "name": SWEEPS,
            "createdAt": at,
            "updatedAt": at,
            "state": json.dumps(everything),
        }
        views = {VIEW + self.ids[run]: ranking}
        known = self.client.get_experiment(self.experiment_id).tags.get(VIEW + SWEEPS)
        if known is None or _as_written(known):
            views[VIEW + SWEEPS] = named
        for key, view in views.items():
            self.client.set_experiment_tag(self.experiment_id, key, json.dumps(view))

    def text(self, run: str, _at: int, text: str, file: str) -> None:
        """Store a text."""
        self.client.log_text(self.ids[run], text, file)

    def artifacts(self, run: str, _at: int, folder: str, name: str) -> None:
        """Store a folder; of one that is missing MLflow would say nothing."""
        path = self.folder / folder
        if not path.is_dir():
            raise FileNotFoundError(f"there is no folder {path}")
        self.client.log_artifacts(self.ids[run], str(path), name)

    def table(self, run: str, at: int, columns: dict[str, list[Any]], file: str) -> None:
        """Store a table as `log_table` does, which would append to the one that a resumed sweep has."""
        data = [[_cell(cell) for cell in row] for row in zip(*columns.values(), strict=True)]
        content = json.dumps({"columns": list(columns), "data": data}, default=str)
        self.text(run, at, content, file)
        tables = json.loads(self.client.get_run(self.ids[run]).data.tags.get(TABLES, "[]"))
        entry = {"path": file, "type": "table"}
        if entry not in tables:
            self.tag(run, at, {TABLES: json.dumps([*tables, entry])})

    def dataset(self, run: str, _at: int, name: str, digest: str, context: str) -> None:
        """Name an input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # MLflow asks for a source that it could load; ours is made by code
        source = Dataset(name, digest[:DIGEST_LENGTH], source_type="code", source='{"tags": {}}')
        entry = DatasetInput(source, [InputTag("mlflow.data.context", context)])
        self.client.log_inputs(self.ids[run], [entry])

    def finish(self, run: str, at: int, status: str) -> None:
        """End a run."""
        self.client.set_terminated(self.ids[run], status, end_time=at)
        self.steps.pop(run, None)


class _Steps(dict[str, set[int]]):
    """The steps that MLflow has of each key of a run; those of a key are read when they are first asked for."""

    def __init__(self, read: Callable[[str], set[int]]) -> None:
        self.read = read

    def __missing__(self, key: str) -> set[int]:
        self[key] = self.read(key)
        return self[key]


def _set_waits() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _of_others(record: logging.LogRecord) -> bool:
    return record.threadName != THREAD


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    # half a surrogate pair is text that no database takes
    return {
        key: str(value).encode(errors="backslashreplace").decode() for key, value in values.items()
    }


def _as_written(view: str) -> bool:
    """Whether a named view is as it was made, and not one that a person has changed."""
    try:
        said = json.loads(view)
        return said["createdAt"] == said["updatedAt"]
    except (ValueError, TypeError, KeyError):
        return False


def _database(uri: str) -> Path | None:
    """Return the file of a SQLite database, None for a server."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else Path(path.partition("?")[0])


@contextlib.contextmanager
def alone(uri: str) -> Iterator[None]:
    """Hold the lock of a database; of a server, which looks after itself, there is none.

    Two that open a new database at once would leave it half migrated.

    Raises:
        Stopped: If another process holds it for LOCK_SECONDS.
    """
    path = _database(uri)
    if path is None:
        yield
        return
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise Stopped(
            f"another process holds {lock.lock_file}; run the same command again when it has ended."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reason(error: BaseException) -> str:
    """Return one line on an error: what the system said, if a connection or a file is at the bottom."""
    told, inner = error, error.__cause__ or error.__context__
    while inner is not None:
        told = inner if isinstance(inner, OSError) else told
        inner = inner.__cause__ or inner.__context__
    first = public((str(told).splitlines() or [""])[0])[:300]
    return f"{type(told).__name__}: {first}"
