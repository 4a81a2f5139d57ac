"""MLflow's own server on a loopback port: as a user starts it, or with faults that can be switched on and off."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient, set_tracking_uri
from werkzeug.serving import make_server

from tune.tracking import ENVIRONMENT


class Server:
    """MLflow's own server over a database, with faults that can be switched on and off.

    Attributes:
        fault: None; `closed`: the port is; `hanging`: nothing is answered; `500`: so is all that is asked;
            `deaf`: what is asked is done, but the answer is lost.
        faults: How often the fault met a request.
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        self.faults, self.port = 0, 0
        self.woken = threading.Event()
        self._open()

    @property
    def uri(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def _open(self) -> None:
        self.server = make_server("127.0.0.1", self.port, self._app, threaded=True)
        self.server.daemon_threads = True
        self.server.log = lambda *_: None
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        """Close the port."""
        self.woken.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def break_(self, fault: str) -> None:
        """Begin a fault."""
        self.fault, self.faults = fault, 0
        self.woken.clear()
        if fault == "closed":
            self.close()

    def mend(self) -> None:
        """End it."""
        if self.fault == "closed":
            self._open()
        self.fault = None
        self.woken.set()

    def fired(self) -> bool:
        """Whether the fault was met, or the port is closed indeed."""
        if self.fault == "closed":
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) != 0
        return self.faults > 0

    def _app(self, environ: dict, start_response) -> Iterator[bytes]:
        from mlflow.server import app

        fault = self.fault
        self.faults += fault is not None
        if fault == "hanging":
            self.woken.wait()
        if fault == "deaf":
            list(app(environ, lambda *_: lambda _: None))
        if fault is not None:
            start_response("500 Internal Server Error", [])
            return [b"broken"]
        return app(environ, start_response)


@contextlib.contextmanager
def served(place: Path) -> Iterator[Server]:
    """Serve a database in a folder; the server has answered once.

    MLflow keeps the first one that a process serves: later ones are served the same.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{place}/mlflow.db")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", f"{place}/artifacts")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that MLflow's server imports on its way
            import mlflow.server.fastapi_app  # noqa: F401
        found = Server()
        # migrated before: the first request would wait for it
        MlflowClient(f"sqlite:///{place}/mlflow.db").search_experiments()
        MlflowClient(found.uri).search_experiments()
        yield found
        found.close()
        set_tracking_uri(None)  # the server has set it for the whole process


@contextlib.contextmanager
def launched(place: Path) -> Iterator[str]:
    """Run `mlflow server` over `mlflow.db` in a folder, with a process group of its own, and return its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [
        *("--backend-store-uri", f"sqlite:///{place}/mlflow.db"),
        *("--artifacts-destination", str(place / "artifacts")),
        *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
    ]
    given = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with open(place / "server.log", "wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words],
            cwd=place,
            env=given | {"MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, place / "server.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait()


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 180
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])
