"""The folder of one run: what it is, its metrics, its checkpoints; written by one process.

    config.yaml  run.json  metrics.jsonl  last/  best/  .lock

`last/` is the truth: a kill may come between two writes of an epoch, and what is written after it is then made good.
"""

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from richkd import checkpoint
from richkd.config import Config
from richkd.data import Dataset, Split
from richkd.errors import ConfigError, CorruptError
from richkd.files import check_writable, make_folder, read_record, write_atomic, write_json
from richkd.layers import digest, dump, to_dict
from richkd.learner import Learner
from richkd.teachers import FusedTeacher

TESTED = ("test/", "teacher/", "clip/", "fused/")  # metrics of the test rows
WAIT = 60.0  # seconds for the process of a driver that was killed to end

Metrics = dict[str, float]


@contextlib.contextmanager
def held(folder: Path, wait: float = WAIT) -> Iterator[None]:
    """Hold a run folder, which has one writer; the operating system frees it when its holder dies.

    Args:
        folder: Run folder; made if missing.
        wait: Seconds for another process to leave it.

    Raises:
        ConfigError: If another process still holds it, or it cannot be made.
    """
    make_folder(folder, "storage")
    try:
        with FileLock(folder / ".lock", timeout=wait):
            yield
    except Timeout:
        raise ConfigError(
            f"{folder} must have one writer but another process is at it; wait for it, or stop it first."
        ) from None


class Record:
    """The folder of a run that begins or goes on.

    Args:
        folder: Run folder.
        config: The run.
        resume: Whether it may hold this run already.

    Raises:
        ConfigError: If it holds another run, or this one without `resume`, or cannot be written.
    """

    def __init__(self, folder: Path, config: Config, *, resume: bool) -> None:
        self.folder, self.config, self.resume = folder, config, resume
        self.state: dict[str, Any] = {"state": "running", "digest": digest(config)}
        self.state["selection"] = config.selection
        self.tested: Metrics = {}  # what a run before this one read of the test rows
        self._check_same()
        check_writable(folder, "storage")

    def _check_same(self) -> None:
        """Raise ConfigError if there is a run already, or one to go on with of other settings, data or teachers."""
        if not (self.folder / "run.json").exists():
            return
        if not self.resume:
            raise ConfigError(
                f"{self.folder} holds a run already; go on with it (--resume), or give another --name."
            )
        before = read_record(self.folder / "run.json", "digest", "data", "teachers")
        for key, what in (("digest", "settings"), ("data", "data"), ("teachers", "teachers")):
            if key in self.state and before[key] != self.state[key]:
                raise ConfigError(
                    f"{self.folder} was made with other {what} ({before[key]}, now {self.state[key]}); compare its "
                    "config.yaml and the files that it names, or start anew with another --name."
                )
        metrics = before.get("metrics", {})
        self.tested = {key: value for key, value in metrics.items() if key.startswith(TESTED)}

    def check(self, dataset: Dataset, teacher: FusedTeacher | None) -> None:
        """Raise ConfigError if the folder holds a run with other data or teachers; writes nothing."""
        self.state |= {"data": dataset.digest, "teachers": teacher.identities if teacher else {}}
        self._check_same()

    def open(
        self, dataset: Dataset, split: Split, teacher: FusedTeacher | None, workers: int
    ) -> None:
        """Say in the folder, which is `held`, what the run is made of.

        Raises:
            ConfigError: If it holds a run with other data or teachers.
        """
        self.check(dataset, teacher)
        self.state |= {"torch": torch.__version__, "python": platform.python_version()}
        # the last bits of a result depend on both
        self.state |= {"threads": torch.get_num_threads(), "workers": workers}
        if dataset.unreadable:
            self.state["unreadable"] = list(dataset.unreadable)
        if teacher is not None:
            self.state |= {"temperature": teacher.temperature, "clip_factors": teacher.factors}
            if teacher.task is not None:
                self.state["teacher_views"] = teacher.task.views
        self.about = {
            "config": to_dict(self.config),
            "digest": digest(self.config),
            "names": list(dataset.names),
            "channels": dataset.channels,
            "size": list(dataset.size),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "resample": dataset.resample,
            "border": dataset.border,
            "data": dataset.digest,
            "trained_on": split.digest,
            "rows": {
                "train": len(split.transfer),
                "labelled": int((split.labels >= 0).sum()),
                "validation": len(split.validation),
                "test": len(dataset.test),
            },
        }
        write_atomic(self.folder / "config.yaml", dump(self.config).encode())

    def restore(
        self, learner: Learner, optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Any] | None, list[Metrics]]:
        """Load `last/` into learner and optimiser, and bring what is written after it in each epoch to its state.

        Random numbers need no state: each epoch's are a function of the seed and the epoch.

        Returns:
            What `last/` says of itself, None if there is none, and the metrics of each epoch up to it.
        """
        if not checkpoint.exists(self.folder / "last"):
            return None, []
        saved, student = checkpoint.load(self.folder / "last"), learner.student
        student.load_state_dict(saved.weights)
        learner.load_beside(saved.state)
        set_state(learner, optimizer, saved.state)
        meta, rows = saved.meta, rows_of(self.folder, saved.meta)
        epoch = meta["epoch"]
        if epoch and meta["best"]["epoch"] == epoch:
            checkpoint.save(self.folder / "best", dict(student.state_dict()), {}, meta)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(self.folder / "metrics.jsonl", lines.encode())
        return meta, rows

    def begin(self, learner: Learner, optimizer: torch.optim.Optimizer, epoch: int) -> None:
        """Say that the run goes on after `epoch`; before the first there is a checkpoint, too, to go on from."""
        write_json(self.folder / "run.json", self.state)
        if epoch == 0:
            self._save(learner, optimizer, 0, {}, None)
            write_atomic(self.folder / "metrics.jsonl", b"")

    def epoch(
        self, learner: Learner, optimizer: torch.optim.Optimizer, metrics: Metrics, best: Metrics
    ) -> None:
        """Keep an epoch: its checkpoint, and its line of metrics."""
        self._save(learner, optimizer, metrics["epoch"], metrics, best)
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _save(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        metrics: Metrics,
        best: Metrics | None,
    ) -> None:
        meta = self.about | {"epoch": epoch, "metrics": metrics, "best": best}
        weights = dict(learner.student.state_dict())
        state = optimizer_state(learner, optimizer) | learner.beside()
        checkpoint.save(self.folder / "last", weights, state, meta)
        if best is not None and best["epoch"] == epoch:
            checkpoint.save(self.folder / "best", weights, {}, meta)

    def finish(self, metrics: Metrics, seconds: float) -> None:
        """Say that the run has finished; what a run before this one read of the test rows stays."""
        self.state |= {"state": "finished", "seconds": seconds, "metrics": metrics | self.tested}
        write_json(self.folder / "run.json", self.state)


def rows_of(folder: Path, meta: dict[str, Any]) -> list[Metrics]:
    """Return the metrics of each epoch up to that of `last/`, whose `meta` knows its own if a kill came before its line.

    Raises:
        CorruptError: If a line is torn or missing.
    """
    path, epoch = folder / "metrics.jsonl", meta["epoch"]
    lines = path.read_bytes().splitlines()[: max(epoch - 1, 0)] if path.exists() else []
    try:
        rows = [json.loads(line) for line in lines] + ([meta["metrics"]] if epoch else [])
        found = [row["epoch"] for row in rows]
    except (ValueError, TypeError, KeyError):
        found = []
    if found != list(range(1, epoch + 1)):
        raise CorruptError(
            f"{path} must have a line for each of {epoch} epochs but has not; restore it, or begin the run anew."
        )
    return rows


def seed_folders(folder: Path, seeds: int) -> list[Path]:
    """Return the run folder of each seed: `folder` itself if there is one, else `seed0`, `seed1`, ... in it."""
    return [folder] if seeds == 1 else [folder / f"seed{k}" for k in range(seeds)]


def is_tested(folder: Path) -> bool:
    """Whether a run has read its test rows, which is the last that it does; a CorruptError if `run.json` is damaged."""
    path = folder / "run.json"
    return path.exists() and "test/top1" in read_record(path).get("metrics", {})


def check_last(folder: Path) -> None:
    """Raise CorruptError unless `last/` and the metrics of the epochs up to it are as they were written."""
    rows_of(folder, checkpoint.verify(folder / "last")["meta"])


def clear_damaged(folder: Path, seeds: int) -> None:
    """Remove the run folders of a job of which a checkpoint or a line is not as it was written: they begin again.

    What a run does is decided by its config, so it ends the same.
    """
    for place in seed_folders(folder, seeds):
        try:
            if checkpoint.exists(place / "best"):
                checkpoint.verify(place / "best")
            if checkpoint.exists(place / "last"):
                check_last(place)
        except CorruptError:
            shutil.rmtree(place)


def newest(folder: Path, seeds: int = 1) -> int:
    """Return the epoch up to which all seeds have a checkpoint, 0 if there is none; a CorruptError if it is damaged."""
    lasts = [place / "last" for place in seed_folders(folder, seeds)]
    if not all(map(checkpoint.exists, lasts)):
        return 0
    return min(checkpoint.verify(last)["meta"]["epoch"] for last in lasts)


def optimizer_state(learner: Learner, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what the optimiser keeps of each parameter, such as its momentum, as `KEY NAME`."""
    return {
        f"{key} {name}": value
        for name, parameter in learner.trained()
        for key, value in optimizer.state[parameter].items()
        if value is not None
    }


def set_state(learner: Learner, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Give an optimiser what `optimizer_state` returned; other entries of `state` are passed over."""
    parameters = dict(learner.trained())
    for entry, value in state.items():
        key, _, name = entry.partition(" ")
        if (parameter := parameters.get(name)) is None:
            continue
        if value.shape == parameter.shape:
            # with the parameter's own strides: the fused optimiser walks both in memory order
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][key] = value.to(parameter.device)


def result_of(folder: Path) -> dict[str, Any]:
    """Return what a finished and tested run came to: `run`, `checkpoint`, `val`, `test`, speed, and its teachers.

    `val` is of the rows that its epoch was chosen on, which `selection` says; `last` of test rows and the last epoch. A run
    of before there was a choice is never asked: its settings have another digest, so it is not gone on with.
    """
    state = read_record(folder / "run.json", "metrics")
    found = state["metrics"]
    result = {
        "run": str(folder),
        "checkpoint": str(folder / "best"),
        "val": {"top1": found["best_val_top1"], "top5": found["best_val_top5"]},
        "test": {"top1": found["test/top1"], "top5": found["test/top5"]},
        "last": {"top1": found["test/last_top1"]},
        "selection": state["selection"],
        "images_per_second": found["images_per_second"],
    }
    for who in ("teacher", "clip", "fused"):
        if f"{who}/top1" in found:
            result[who] = {"top1": found[f"{who}/top1"]}
    if groups := frequencies({key.removeprefix("test/"): found[key] for key in found}):
        result["groups"] = groups
    if "unreadable" in state:
        result["unreadable"] = state["unreadable"]
    return result


def frequencies(found: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return `n` and, where it was measured, `top1` of the test rows of frequent and rare classes: none but under a long tail."""
    return {
        name: {key: found[f"{name}/{key}"] for key in ("n", "top1") if f"{name}/{key}" in found}
        for name in ("head", "medium", "tail")
        if f"{name}/n" in found
    }


def result_lines(result: dict[str, Any]) -> list[str]:
    """Return a result as lines for the terminal."""
    lines = [
        f"{who:<10} test top1 {result[who]['top1']:6.2f} %"
        for who in ("teacher", "clip", "fused")
        if who in result
    ]
    paper = result["selection"] == "paper"
    for part, who in (("test", "student"), *((("val", ""),) * (not paper))):
        top1, top5 = (result[part][key] for key in ("top1", "top5"))
        lines.append(f"{who:<10} {part:<4} top1 {top1:6.2f} %  top5 {top5:6.2f} %")
    if paper:
        lines[-1] += "  of the epoch that is best on these rows"
        if "last" in result:
            lines.append(f"{'':<10} test top1 {result['last']['top1']:6.2f} %  of the last epoch")
    for name, group in result.get("groups", {}).items():
        if "top1" in group:
            lines.append(
                f"{'':<10} test top1 {group['top1']:6.2f} %  of {group['n']} rows of {name} classes"
            )
    if "unreadable" in result:
        lines.append(
            f"left out   {len(result['unreadable'])} files, listed in {result['run']}/run.json"
        )
    return [*lines, f"checkpoint {result['checkpoint']}"]
