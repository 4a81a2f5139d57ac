"""The checkpoint that MLflow keeps of a run, of which nothing else need be left: fetched by the run's id, and verified.

python -m tune best RUN_ID --copy-to student tracking.uri=http://mlflow:5000
"""

import re
import tempfile
from pathlib import Path
from typing import Any

from richkd import checkpoint
from richkd.errors import ConfigError
from tune.best import check_new, verified
from tune.tracking import Client

# what kind of run keeps one: the artifact, and the metrics that recorded its accuracy
KEPT = {
    "sweep": ("best", {"val_top1": "best/refit_val_top1", "test_top1": "best/refit_test_top1"}),
    "refit": ("checkpoint", {"val_top1": "best_val_top1", "test_top1": "test/top1"}),
    "train": ("checkpoint", {"val_top1": "best_val_top1", "test_top1": "test/top1"}),
}


def is_run_id(text: str) -> bool:
    """Whether a word looks like the id of a run in MLflow."""
    return re.fullmatch("[0-9a-f]{32}", text) is not None


def restore(
    run_id: str, uri: str, copy_to: Path | None = None, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Verify the checkpoint of a sweep, a refit or a run of `tune train`: checksums, then accuracy, evaluated again.

    The three files of a checkpoint are taken, whatever else lies there, and nothing is unpickled.

    Args:
        run_id: Of the run.
        uri: Absolute address of MLflow.
        copy_to: New folder for the checkpoint; it appears only when it is whole.
        changes: Dotted keys that say where its data lie now.

    Returns:
        What `best` returns.

    Raises:
        ConfigError: If MLflow has no such run, or no checkpoint of it, or `copy_to` exists.
        CorruptError: If a checksum is not the recorded one.
        Stopped: If MLflow does not answer.
    """
    check_new(copy_to)
    mlflow = Client(uri)
    run = mlflow.run(run_id)
    kind = run.tags.get("richkd.kind")
    if kind not in KEPT:
        what = "a trial" if kind == "trial" else "no run of richkd"
        raise ConfigError(
            f"a sweep, a refit or a run of `tune train` keeps its checkpoint in MLflow but {run_id} ({run.name}) is {what}; "
            "name another."
        )
    name, metrics = KEPT[kind]
    recorded = {part: run.metrics.get(key) for part, key in metrics.items()}
    if None in recorded.values():
        raise ConfigError(
            f"{run.name} must have finished but MLflow has no accuracy of its checkpoint; go on with it, or send what "
            "waits: python -m tune sync."
        )
    # the cache of the machine that it was made on is none of ours
    here = {"cache": None} | (changes or {})
    answer = {"sweep": run.name, "checkpoint": f"runs:/{run_id}/{name}"}
    with tempfile.TemporaryDirectory(prefix="richkd-") as place:
        folder = Path(place) / run_id  # errors name it
        folder.mkdir()
        mlflow.fetch(run_id, name, checkpoint.FILES, folder)
        return answer | verified(folder, recorded, copy_to, here)
