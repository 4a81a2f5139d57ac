"""MLflow's own server on a loopback port, with faults that can be switched on and off."""

import contextlib
import socket
import threading
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
