"""Addresses of MLflow's pages, as its UI knows them.

A fresh browser opens an experiment on its traces, of which there are none, and its runs without a single metric.
So the addresses lead to the runs, and to views that lie in tags of the experiment: `VIEW` says where.
"""

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

TRAINING = "workflowType=machine_learning"  # the UI's mode for runs that train
VIEW = "mlflow.sharedViewState."  # before the name of a view: which columns, order and filter
SWEEPS = "richkd"  # the view of all sweeps


class Pages:
    """The pages of one MLflow.

    Args:
        uri: Its address; credentials in it are not passed on.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.server = uri, uri.startswith(("http://", "https://"))
        self.root = (public(uri).rstrip("/") if self.server else "http://127.0.0.1:5000") + "/#"

    @property
    def command(self) -> str | None:
        """What starts the UI of a database; None for a server."""
        if self.server:
            return None
        local = f"sqlite:///{(Path.cwd() / 'mlflow.db').as_posix()}"
        option = (
            "" if self.uri == local else f" --backend-store-uri {shlex.quote(public(self.uri))}"
        )
        return f"mlflow ui{option}"

    def runs(self, experiment: str, view: str | None = None) -> str:
        """Return the page of an experiment's runs, as a view shows them."""
        shown = "" if view is None else f"&viewStateShareKey={quote(view, safe='')}"
        return f"{self.root}/experiments/{experiment}/runs?{TRAINING}{shown}"

    def run(self, experiment: str, run_id: str, artifact: str | None = None) -> str:
        """Return the page of a run, or of an artifact of it."""
        below = "" if artifact is None else f"/artifacts/{quote(artifact)}"
        return f"{self.root}/experiments/{experiment}/runs/{run_id}{below}?{TRAINING}"

    def compared(self, experiment: str, run_ids: Iterable[str]) -> str:
        """Return the page that compares runs; the best few, since an address has an end."""
        runs, experiments = _json(run_ids), _json([experiment])
        return f"{self.root}/compare-runs?runs={runs}&experiments={experiments}&{TRAINING}"

    def version(self, model: str, version: str) -> str:
        """Return the page of a version of a registered model."""
        return f"{self.root}/models/{quote(model, safe='')}/versions/{version}?{TRAINING}"


def public(text: str) -> str:
    """Return `text` without the credentials of addresses in it, be there an @ or a slash in a password."""
    return re.sub(r"://([^/\s]+|[^/@\s]*:[^@\s]*)@", "://***@", text)


def _json(ids: Iterable[str]) -> str:
    return quote(json.dumps(list(ids), separators=(",", ":")))
