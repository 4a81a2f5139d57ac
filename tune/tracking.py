"""MLflow, spoken to by one thread of the sweep's driver; the only module that knows it.

A server that is slow, refuses or is dead never stops a sweep and never slows it: every call returns at
once, the thread carries them out in order and sends metrics in batches, and after three failures in a row
of a server that does not answer nothing more is sent. `Tracker.problem` then says in one line what happened.

    tracker = Tracker("http://mlflow:5000")
    tracker.start()
    sweep = tracker.sweep("digits", {"data.source": "digits"}, {"richkd.kind": "sweep"})
    run = tracker.run(sweep, "trial-000", {"fusion.alpha": 0.7}, {"richkd.kind": "trial"})
    tracker.log(run, {"val/top1": 93.1}, step=1)
    tracker.finish(run, "FINISHED")
    tracker.close(timeout=8)
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import posixpath
import queue
import re
import shlex
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import quote

from richkd.errors import ConfigError

PAUSES = (2.0, 8.0, 0.0)  # seconds after each failed attempt, while MLflow does not answer
PATIENCE = 8.0  # seconds that `close` waits for an MLflow that fails
FLUSH_SECONDS = 2.0  # metrics wait this long for others of their run
METRICS_PER_BATCH = 900  # MLflow takes 1000 entities a call, tags included
PARAMS_PER_BATCH = 100  # MLflow's own limit
RUNS_PER_SEARCH = 10_000
DIGEST_LENGTH = 36  # MLflow's own limit
KEY_LENGTH = 250  # MLflow's own limit
NONFINITE = "richkd.nonfinite"
TABLES = "mlflow.loggedArtifacts"  # the tag by which the UI finds tables
THREAD = "mlflow"
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
    arguments: tuple[Any, ...]


class Tracker:
    """A queue in front of MLflow. Runs are named by keys of ours, known before MLflow has answered.

    Args:
        uri: Server or database; None means what `address` says.
        experiment: Name of the experiment, created if there is none.
        known: Run ids by key, as `known()` gave them at an earlier start: these runs are gone on with.

    Raises:
        ConfigError: If `uri` names a folder or a database that is no file.
    """

    def __init__(
        self,
        uri: str | None = None,
        experiment: str = "richkd",
        *,
        known: Mapping[str, str] | None = None,
    ) -> None:
        self.uri = self.address(uri)
        # the first failure, one line; a dead server outranks others
        self.problem: str | None = None
        self._store = _Store(self.uri, experiment, dict(known or {}))
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._points: dict[str, list[tuple[str, float, int, int]]] = {}
        self._silent = threading.Event()  # set: nothing more is sent
        self._failing: tuple[float, str] | None = None  # since when, and why
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

    def start(self) -> None:
        """Start the thread, which imports MLflow and opens the experiment; returns at once."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ.pop("MLFLOW_RUN_ID", None)  # would be used instead of new runs
        self._thread.start()

    def sweep(self, name: str, params: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
        """Open the parent run and return its key.

        Args:
            name: Name of the run.
            params: Constants of the sweep by dotted key; written once.
            tags: Tags by key.
        """
        self._put("create", name, name, None, dict(params), dict(tags))
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
        self._put("create", key, name, sweep, dict(params), dict(tags))
        return key

    def log(self, run: str, metrics: Mapping[str, Any], step: int) -> None:
        """Keep metrics for the next batch.

        Args:
            run: Key of a run.
            metrics: Values by key; what is no number is left out, and non-finite numbers, which MLflow
                would store as 0 or 1.8e308, are counted in the tag `richkd.nonfinite` instead.
            step: Epoch.
        """
        numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, Real)}
        self._put("log", run, numbers, int(step))

    def fill(self, run: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Send what MLflow lacks of the metrics of some epochs, as after a kill; each has its `epoch`."""
        points = [
            (key, float(value), int(row["epoch"]))
            for row in rows
            for key, value in row.items()
            if key != "epoch" and isinstance(value, Real)
        ]
        self._put("fill", run, points)

    def tag(self, run: str, tags: Mapping[str, Any]) -> None:
        """Set tags of a run."""
        self._put("tag", run, dict(tags))

    def text(self, run: str, text: str, file: str) -> None:
        """Store `text` as the artifact `file` of a run."""
        self._put("text", run, text, file)

    def artifacts(self, run: str, folder: Path, name: str) -> None:
        """Store a folder as the artifact folder `name`; it must stay as it is until `close`."""
        self._put("artifacts", run, str(folder), name)

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

    def finish(self, run: str, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """End a run, after its metrics."""
        self._put("finish", run, status)

    def close(self, timeout: float) -> bool:
        """Send what is left and end; safe to call twice, and after a signal interrupted any other call.

        Args:
            timeout: Seconds to wait at most; a server that fails is given up after a few.

        Returns:
            Whether everything was sent; if not, `problem` says why.
        """
        if self._thread.ident is None:
            return True
        self._queue.put(None)
        began = time.monotonic()
        while self._thread.is_alive() and not self._silent.is_set():
            now = time.monotonic()
            since, reason = self._failing or (now, "it is slow")
            if now - began >= timeout or now - max(since, began) >= PATIENCE:
                self.problem = self.problem or (
                    f"MLflow at {self.public_uri} did not take everything within {now - began:.0f} s "
                    f"({reason})."
                )
                self._silent.set()
            self._thread.join(min(0.05, max(0.0, timeout - (now - began))))
        return self.problem is None

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

    def known(self) -> dict[str, str]:
        """Return MLflow's ids by key, of the runs that it has opened so far."""
        return dict(self._store.ids)

    def links(self, sweep: str, children: Iterable[str]) -> dict[str, str]:
        """Return addresses of the UI, as far as MLflow has answered.

        Args:
            sweep: Key of the parent run.
            children: Keys of the runs to compare; the best few, since an address has an end.

        Returns:
            `command` (starts the UI of a database; absent for a server), `runs`, `sweep`, `compare`.
        """
        links = {}
        server = self.uri.startswith(("http://", "https://"))
        if not server:
            local = f"sqlite:///{(Path.cwd() / 'mlflow.db').as_posix()}"
            address = shlex.quote(self.public_uri)
            option = "" if self.uri == local else f" --backend-store-uri {address}"
            links["command"] = f"mlflow ui{option}"
        if self.experiment_id is None:
            return links
        root = (self.public_uri.rstrip("/") if server else "http://127.0.0.1:5000") + "/#"
        runs = f"{root}/experiments/{self.experiment_id}/runs"
        # without it a fresh browser shows an experiment's traces, of which there are none
        view = "?workflowType=machine_learning"
        links["runs"] = f"{runs}{view}"
        if (parent := self.run_id(sweep)) is not None:
            links["sweep"] = f"{runs}/{parent}{view}"
        if ids := [run_id for child in children if (run_id := self.run_id(child)) is not None]:
            links["compare"] = (
                f"{root}/compare-runs?runs={_json(ids)}&experiments={_json([self.experiment_id])}"
                f"&{view.removeprefix('?')}"
            )
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
        # a SimpleQueue can be put to from a signal handler that interrupts another put
        self._queue.put(_Operation(name, run, time.time_ns() // 1_000_000, arguments))

    def _work(self) -> None:
        logging.getLogger("urllib3.connectionpool").addFilter(_of_others)  # warns of every retry
        self._attempt(_Operation("connect", "the experiment", 0, ()))
        due = time.monotonic() + FLUSH_SECONDS
        open_ = True
        while open_:
            with contextlib.suppress(queue.Empty):
                operation = self._queue.get(timeout=max(0.0, due - time.monotonic()))
                open_ = operation is not None
                if operation is not None:
                    self._carry_out(operation)
            if not open_ or time.monotonic() >= due:
                for run in list(self._points):
                    self._flush(run)
                due = time.monotonic() + FLUSH_SECONDS

    def _carry_out(self, operation: _Operation) -> None:
        if operation.name == "log":
            metrics, step = operation.arguments
            points = [(key, value, operation.at, step) for key, value in metrics.items()]
            self._points.setdefault(operation.run, []).extend(points)
            return
        if operation.name == "finish":
            self._flush(operation.run)
        self._attempt(operation)

    def _flush(self, run: str) -> None:
        points = self._points.pop(run, [])
        for first in range(0, len(points), METRICS_PER_BATCH):
            batch = points[first : first + METRICS_PER_BATCH]
            self._attempt(_Operation("metrics", run, 0, (batch,)))

    def _attempt(self, operation: _Operation) -> None:
        opens = operation.name in ("connect", "create")
        if not opens and operation.run not in self._store.ids:
            return  # MLflow did not open it, and that was noted
        for pause in PAUSES:
            if self._silent.is_set():
                return
            began = time.monotonic()
            try:
                getattr(self._store, operation.name)(
                    operation.run, operation.at, *operation.arguments
                )
            except Exception as error:  # of MLflow, its store, the network or the disk
                reason = _reason(error)
                self._failing = self._failing or (began, reason)
            else:
                self._failing = None
                return
            if answers := self._store.answers():  # so it is this operation that it does not take
                self._failing = None
            else:
                self._silent.wait(pause)
        if self._silent.is_set():
            return
        what = f"MLflow at {self.public_uri} failed to {operation.name} {operation.run} ({reason})"
        if answers:
            self.problem = self.problem or f"{what}."
        else:
            self.problem = f"{what}; nothing was sent after that."
            self._silent.set()


class _Store:
    """The calls of MLflow's client, for the tracker's thread; each can be repeated after a failure.

    Args:
        uri: Absolute address.
        experiment: Name.
        ids: Run ids by key.
    """

    def __init__(self, uri: str, experiment: str, ids: dict[str, str]) -> None:
        self.uri, self.experiment, self.ids = uri, experiment, ids
        self.experiment_id: str | None = None
        self.nonfinite: Counter[str] = Counter()
        self.asked_for: set[str] = set()  # runs that were asked for, answered or not

    def connect(self, _run: str, _at: int) -> None:
        """Import MLflow and open the experiment; a new database is migrated first."""
        from mlflow.tracking import MlflowClient
        from mlflow.tracking.context.registry import resolve_tags

        with self._migrating() as artifacts:
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
        self.context = resolve_tags()  # user, command, commit

    @contextlib.contextmanager
    def _migrating(self) -> Iterator[str | None]:
        """Hold a lock over the first use of a database: two at once would leave it half migrated.

        Yields:
            Where the artifacts of a new experiment go: beside the database, not in the folder that the
            driver happened to be started in; None if the server decides.
        """
        if not self.uri.startswith("sqlite:///"):
            yield None
            return
        from filelock import FileLock

        path = Path(self.uri.removeprefix("sqlite:///").partition("?")[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=120):
            yield str(path.parent / "mlruns" / re.sub(r"[^\w.-]", "_", self.experiment))

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
            tags = self.context | {_key(key): str(value) for key, value in tags.items()}
            made = self._unanswered(run, at, _name(name)) or self.client.create_run(
                self.experiment_id, start_time=at, tags=tags, run_name=_name(name)
            )
            self.ids[run] = made.info.run_id
        else:
            self.client.update_run(self.ids[run], status="RUNNING")
            self.tag(run, at, tags)
            self.nonfinite[run] = int(found.data.tags.get(NONFINITE, 0))
            if parent is None:
                self._adopt(run)
        written = {} if found is None else found.data.params
        values = {_key(key): str(value) for key, value in params.items()}
        batch = [Param(key, value) for key, value in values.items() if key not in written]
        for first in range(0, len(batch), PARAMS_PER_BATCH):
            some = batch[first : first + PARAMS_PER_BATCH]
            self.client.log_batch(self.ids[run], params=some, synchronous=True)

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
        found = self._search(f"attributes.start_time = {at}") if tried else []
        return next((one for one in found if one.info.run_name == name), None)

    def _adopt(self, sweep: str) -> None:
        """Learn of the children that a killed driver opened after it had last written down their ids."""
        for child in self._search(f"tags.`mlflow.parentRunId` = '{self.ids[sweep]}'"):
            self.ids.setdefault(f"{sweep}/{child.info.run_name}", child.info.run_id)

    def _search(self, rule: str) -> list[Any]:
        return list(
            self.client.search_runs([self.experiment_id], rule, max_results=RUNS_PER_SEARCH)
        )

    def metrics(self, run: str, _at: int, points: list[tuple[str, float, int, int]]) -> None:
        """Send points of (key, value, ms, step); one that MLflow has with the same ms is not doubled."""
        from mlflow.entities import Metric, RunTag

        batch = [
            Metric(_key(k), value, at, step)
            for k, value, at, step in points
            if math.isfinite(value)
        ]
        dropped = len(points) - len(batch)
        count = self.nonfinite[run] + dropped
        tags = [RunTag(NONFINITE, str(count))] if dropped else []
        self.client.log_batch(self.ids[run], metrics=batch, tags=tags, synchronous=True)
        self.nonfinite[run] = count

    def fill(self, run: str, at: int, points: list[tuple[str, float, int]]) -> None:
        """Send those points of (key, value, step) whose step MLflow has not got."""
        known = {
            key: {point.step for point in self.client.get_metric_history(self.ids[run], _key(key))}
            for key in {key for key, *_ in points}
        }
        missing = [(k, value, at, step) for k, value, step in points if step not in known[k]]
        for first in range(0, len(missing), METRICS_PER_BATCH):
            self.metrics(run, at, missing[first : first + METRICS_PER_BATCH])

    def tag(self, run: str, _at: int, tags: dict[str, Any]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        batch = [RunTag(_key(key), str(value)) for key, value in tags.items()]
        self.client.log_batch(self.ids[run], tags=batch, synchronous=True)

    def text(self, run: str, _at: int, text: str, file: str) -> None:
        """Store a text."""
        self.client.log_text(self.ids[run], text, file)

    def artifacts(self, run: str, _at: int, folder: str, name: str) -> None:
        """Store a folder; of one that is missing MLflow would say nothing."""
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        self.client.log_artifacts(self.ids[run], folder, name)

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


def _of_others(record: logging.LogRecord) -> bool:
    return record.threadName != THREAD


def _name(name: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())[:250]


def _key(key: str) -> str:
    """Return a key that MLflow takes.

    The usual ones, such as `val/top1`, stay as they are; another gets a digest, so that no two become one.
    """
    clean = posixpath.normpath("/" + re.sub(r"[^\w./ :-]", "_", key)).lstrip("/")[:KEY_LENGTH]
    if clean == key and key:
        return key
    digest = hashlib.sha256(key.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{clean[: KEY_LENGTH - 9]}-{digest}"


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(ids: list[str]) -> str:
    return quote(json.dumps(ids, separators=(",", ":")))


def public(text: str) -> str:
    """Return `text` without the credentials of addresses in it, be there an @ or a slash in a password."""
    return re.sub(r"://([^/\s]+|[^/@\s]*:[^@\s]*)@", "://***@", text)


def _reason(error: BaseException) -> str:
    """Return one line on an error: what the system said, if a connection or a file is at the bottom."""
    told, inner = error, error.__cause__ or error.__context__
    while inner is not None:
        told = inner if isinstance(inner, OSError) else told
        inner = inner.__cause__ or inner.__context__
    first = public((str(told).splitlines() or [""])[0])[:300]
    return f"{type(told).__name__}: {first}"
