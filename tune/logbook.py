"""A sweep as MLflow shows it: one parent, a child for each trial and refit.

Children carry only what was searched, since the UI's parallel coordinates open on the first parameters;
the parent carries the constants.
"""

import json
from pathlib import Path
from typing import Any

from richkd import escape
from richkd.config import Config
from richkd.data import Dataset
from richkd.files import read_record
from richkd.layers import digest, dump, flatten, to_dict
from richkd.record import TESTED
from tune.agenda import Job
from tune.best import called
from tune.settings import Settings
from tune.settings import digest as sweep_digest
from tune.space import Space
from tune.summary import top1_of
from tune.sweep import DIAGNOSIS
from tune.tracking import Tracker

STATUS = {"finished": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
HIDDEN = (
    *("sweep.space", "sweep.settings", "sweep.grid", "sweep.name", "sweep.state", "sweep.study"),
    *("storage", "cache", "device", "tracking"),
)
RANKED = ("best_val_top1", "test/top1")  # what children are sorted by; the first one to begin with
CLOSE_SECONDS = 60.0  # a healthy store needs about 5 for a hundred runs on two cores


class Logbook:
    """Listens to an agenda and writes it to MLflow.

    Whatever is said can raise an OSError: on a full disk it cannot be written down.

    Args:
        folder: Sweep folder.
        uri: Address of MLflow.
        experiment: Name of the experiment.
    """

    def __init__(self, folder: Path, uri: str, experiment: str) -> None:
        self.folder, self.name = folder, folder.name
        self.tracker = Tracker(folder, uri, experiment)
        self.closed = False
        self.fixed: tuple[str, ...] = ()  # keys that the sweep sets in all trials

    def open(
        self,
        settings: Settings,
        base: Config,
        space: Space,
        environment: dict[str, Any],
        dataset: Dataset,
    ) -> None:
        """Begin, or go on with, the parent run."""
        self.fixed = tuple(settings.sweep.settings)
        asked = flatten(to_dict(base)) | settings.sweep.settings | flatten(to_dict(settings))
        constants = {key: value for key, value in shown(asked).items() if key not in space}
        grid = settings.sweep.grid
        for kind, entries in (
            *(("row", grid.rows), ("method", grid.methods)),
            ("space", {} if grid.rows else settings.sweep.space),
        ):
            constants |= {f"{kind}.{key}": _say(entry) for key, entry in entries.items()}
        tags = opening("sweep", sweep_digest(settings, base), environment)
        self.tracker.start()
        self.tracker.sweep(self.name, constants, tags | {"richkd.sweep": self.name})
        self.tracker.view(
            self.name,
            {
                "metrics": (*RANKED, *settings.sweep.objectives[1:]),
                "params": list(space) or ["row", "method"],
                "tags": ("richkd.method", "richkd.state"),
            },
            RANKED[0],
            {"metrics": ("best/refit_test_top1",), "params": ("student.name",)},
        )
        self.tracker.text(self.name, dump(base), "config.yaml")
        self.tracker.text(self.name, json.dumps(environment, indent=2), "environment.json")
        if (told := self.folder / DIAGNOSIS).exists():
            self._diagnosed(read_record(told))
        for part, images in (("training", dataset.train), ("test", dataset.test)):
            self.tracker.dataset(self.name, dataset.name, images.digest, part)

    def _diagnosed(self, found: dict[str, Any]) -> None:
        """Keep what was told of the teachers before anything was distilled; of a weight that cannot be told nothing."""
        weights = {f"alpha_{form}": weight for form, weight in found["alpha_star"].items()}
        gains = {f"gain_{name}": value for name, value in found["gain"].items()}
        top1 = {"teacher_top1": found["teacher"]["top1"], "best_top1": found["best"]["top1"]}
        values = {
            f"diagnosis/{name}": value
            for name, value in (weights | gains | top1).items()
            if value is not None
        }
        self.tracker.log(self.name, values, 0)
        self.tracker.text(self.name, json.dumps(found, indent=2), DIAGNOSIS)

    def started(self, job: Job) -> None:
        """Begin, or go on with, a child run."""
        tags = opening(job.kind, digest(job.config)) | {
            "richkd.sweep": self.name,
            f"richkd.{'trial' if job.kind == 'trial' else 'seed'}": job.number,
            "richkd.method": job.method,
        }
        settings = flatten(to_dict(job.config))
        tags |= {f"richkd.{key}": settings[key] for key in self.fixed}
        run = self.tracker.run(self.name, job.id, job.params, tags)
        self.tracker.text(run, dump(job.config), "config.yaml")

    def epoch(self, job: Job, metrics: dict[str, Any]) -> None:
        """Keep an epoch's metrics; of an epoch that is reported again, as after a kill, MLflow keeps the first."""
        # the UI compares runs by the metric that it got first
        first = {"best_val_top1": metrics["best_val_top1"]} if "best_val_top1" in metrics else {}
        values = first | {key: value for key, value in metrics.items() if key != "epoch"}
        self.tracker.log(self._key(job), values, metrics["epoch"])

    def ended(self, job: Job, state: str, metrics: dict[str, Any]) -> None:
        """End a child run; a refit leaves its checkpoint and its test accuracy there."""
        run = self._key(job)
        costs = {key: metrics[key] for key in job.costs if key in metrics}
        if "duplicate_of" in metrics:  # it had no epochs of its own
            costs["best_val_top1"] = metrics["best_val_top1"]
        if costs:
            self.tracker.log(run, costs, metrics["epoch"])
        if state == "finished" and job.kind == "refit":
            self.tracker.log(run, tested(metrics), job.config.train.epochs)
            self.tracker.artifacts(run, job.folder / "best", "checkpoint")
        self.tracker.tag(run, ending(state, metrics))
        self.tracker.finish(run, STATUS[state])

    def retire(self, job: Job) -> None:
        """Let the run of a job that is run anew, with other settings, be followed by another one."""
        self.tracker.retire(self._key(job))

    def conclude(self, result: dict[str, Any], columns: dict[str, list]) -> dict[str, Any]:
        """Write the summary, end the parent run, and return where everything is to be seen.

        Returns:
            `tracking_uri`, `experiment`, `run_id`, `links`, and `lines` for the terminal.
        """
        best, summary = result["best"], result["summary"]
        metrics = {"failed": result["failed"]}
        if best is not None:
            metrics |= {
                "best_val_top1": best["val_top1"],
                "best/refit_val_top1": best["recorded"]["val_top1"],
                "best/refit_test_top1": best["recorded"]["test_top1"],
            }
        failures = result.get("failures_by_class", {})
        metrics |= {f"failed/{name}": count for name, count in failures.items()}
        for name, entry in summary.items():
            if entry and not name.startswith("difference"):
                metrics[f"summary/{name}"] = top1_of(entry)
        for name, other in (("difference", "kd"), ("difference_tuned", "kd_tuned")):
            if summary.get(name):
                metrics[f"summary/richkd_minus_{other}"] = summary[name]["mean"]
        # a sweep that is extended is concluded again, later: a point with the same step would be passed over
        self.tracker.log(self.name, metrics, int(result["seconds"]))
        self.tracker.table(
            self.name,
            {key or "model": cells for key, cells in columns.items()},
            "summary_table.json",
        )
        self.tracker.text(self.name, json.dumps(result, indent=2), "summary.json")
        if best is not None:
            self.tracker.artifacts(self.name, self.folder / best["checkpoint"], "best")
            found = {f"best.{key}": value for key, value in best["params"].items()}
            self.tracker.tag(self.name, {"richkd.best_trial": best["trial"], **found})
        if result.get("report") is not None:
            self.tracker.artifacts(self.name, (self.folder / result["report"]).parent, "report")
        # the run's description in the UI
        self.tracker.tag(self.name, {"mlflow.note.content": _note(result, columns)})
        self.close("FINISHED")
        leading = [f"{self.name}/{job}" for job in result["leading"]]
        titles = {
            "command": "MLflow UI",
            "runs": "all sweeps",
            "sweep": "this sweep",
            "ranking": "its runs",
            "compare": "best trials",
        }
        return self.tracker.place(self.name, leading, titles=titles)

    def close(self, status: str) -> None:
        """End the parent run and wait until MLflow has everything; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        state = {"FINISHED": "finished", "KILLED": "stopped"}.get(status, "failed")
        try:
            self.tracker.tag(self.name, {"richkd.state": state})
            self.tracker.finish(self.name, status)
        finally:
            self.tracker.close(CLOSE_SECONDS)

    def _key(self, job: Job) -> str:
        return f"{self.name}/{job.id}"


def shown(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of the settings by dotted key that MLflow is to show as parameters."""
    return {k: v for k, v in settings.items() if not k.startswith(HIDDEN) and v is not None}


def opening(kind: str, digest: str, environment: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the tags that say what a run is, and for one with no parent of what code."""
    tags = {"richkd.kind": kind, "richkd.state": "running", "richkd.digest": digest}
    return tags | ({"richkd.commit": environment["commit"] or ""} if environment else {})


def ending(state: str, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the tags that say how a run ended: why and of what class, if it failed, and with which teachers."""
    tags = {"richkd.state": state}
    for key in (key for key in metrics if key.startswith("identity/")):
        tags[key.replace("identity/", "richkd.")] = metrics[key]
    said = ("error", "failure", "duplicate_of")
    return tags | {f"richkd.{key}": metrics[key] for key in said if key in metrics}


def tested(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of the test rows."""
    return {key: value for key, value in metrics.items() if key.startswith(TESTED)}


def _note(result: dict[str, Any], columns: dict[str, list]) -> str:
    """Return the summary as Markdown."""
    rows = [
        list(columns),
        ["---", *["---:"] * (len(columns) - 1)],
        *zip(*columns.values(), strict=True),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    best = result["best"]
    if best is None:
        return table + _report(result)
    settings = ", ".join(
        f"`{key}` {escape.markdown(str(value))}" for key, value in best["settings"].items()
    )
    return (
        f"{table}\n\nBest setting (trial {best['trial']}): {settings}, at `clip.scale` {best['scale']}.\n\n"
        f"Restore the best checkpoint:\n\n    python -m tune best {called(Path(result['sweep']))}{_report(result)}"
    )


def _report(result: dict[str, Any]) -> str:
    if result.get("report") is None:
        return ""
    return "\n\nPictures, tables and what makes it again: `report/report.html` among the artifacts."


def _say(entry: dict[str, Any]) -> str:
    return ", ".join(f"{word} {value}" for word, value in entry.items())
