"""Distil one student: what a run opens, the run, its test.

    python -m richkd distill                                # richkd-l on the embedded digits
    python -m richkd distill method.name=kd seed=3 --json

A run folder (see `record`) holds `config.yaml`, `run.json` (what it is and how it ended), `metrics.jsonl` (one line
an epoch), `last/` (the newest checkpoint, from which a run goes on) and `best/` (the epoch with the highest
validation accuracy). Test rows are not read here but once, by `test`, after the run; unless `selection: paper` says
that the best epoch is the one with the highest test accuracy.
"""

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from richkd import cache, checkpoint, fusion, models, teachers
from richkd.banks import Banks
from richkd.config import Config, Teacher
from richkd.data import Batches, Dataset, Split, Stream, Views, load, split, views_of
from richkd.data.batches import stream_seed
from richkd.errors import ConfigError, NonFiniteError
from richkd.evaluate import (
    accuracy,
    accuracy_of,
    agreement,
    by_frequency,
    by_teacher,
    calibration,
    evaluate,
)
from richkd.evaluate.accuracy import network_logits
from richkd.files import read_record, write_json
from richkd.layers import digest
from richkd.learner import Contrast, Learner, Maps
from richkd.progress import Progress, stoppable
from richkd.record import TESTED, Record, held, optimizer_state, seed_folders, set_state
from richkd.steps import ADVICE, ALONE, Steps, check_slices
from richkd.student import network_of, run_config
from richkd.threads import one_thread
from richkd.workers import Group

MOMENT = 1.0  # seconds for a process that has just been stopped to leave its folder
TOKENS = ("cls_token", "dist_token", "pos_embed")  # names of transformers' learnt tokens
SOME = 500  # rows on which a teacher that is not trained here is looked at

_looked_at: set[tuple[str, ...]] = set()  # teachers, with the rows that they were asked about

Report = Callable[[dict[str, float], Path], None]


@dataclass(kw_only=True, slots=True, eq=False)
class Task:
    """What every run on one data set with one seed shares: rows, and pixels on the device."""

    dataset: Dataset
    split: Split
    train: Views | Stream
    test: Views | Stream
    device: torch.device
    wanted_cache: str | None

    @property
    def cache(self) -> Path:
        """Folder of the cache, made if missing."""
        return cache.root(self.wanted_cache)

    @property
    def labels(self) -> Tensor:
        """True labels `(N,)` of all training rows: for evaluation, never for the loss."""
        return torch.from_numpy(self.dataset.train.labels)

    @property
    def judged(self) -> tuple[Views, Tensor, Tensor]:
        """Images, their rows and the labels of these, on which epochs are chosen: held out, or of the test if none are."""
        rows = torch.from_numpy(self.split.validation)
        if len(rows):
            return self.train, rows, self.labels[rows]
        labels = torch.from_numpy(self.dataset.test.labels)
        return self.test, torch.arange(len(labels)), labels

    @property
    def frequencies(self) -> Tensor:
        """Training images of each class `(K,)`, held-out ones among them, which any way to choose epochs has alike."""
        rows = torch.from_numpy(np.concatenate([self.split.transfer, self.split.validation]))
        own = self.labels[rows]
        return torch.bincount(own[own >= 0], minlength=len(self.dataset.names))


@dataclass(kw_only=True, slots=True, eq=False)
class Outcome:
    """A finished run: its folder, the metrics of its best epoch, and the objects that `test` needs."""

    config: Config
    folder: Path
    metrics: dict[str, float]
    network: nn.Module
    teacher: teachers.FusedTeacher | None
    task: Task


def device_of(config: Config) -> torch.device:
    """Return the device that `config` names, or finds here."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda but this machine has no usable GPU; use device=cpu.")
    return torch.device(name)


def open_task(config: Config, progress: Progress | None = None, beside: Task | None = None) -> Task:
    """Load data, cut it, and put the pixels on the device; they are shared with a task on the same data, if given."""
    if beside is not None:
        return replace(
            beside, split=split(beside.dataset, config.data, config.seed, config.selection)
        )
    device = device_of(config)
    if device.type == "cuda":
        # a run that is gone on with ends as the straight one
        torch.backends.cudnn.deterministic = True
    dataset = load(config.data, cache.root(config.cache), progress)
    return Task(
        dataset=dataset,
        split=split(dataset, config.data, config.seed, config.selection),
        train=views_of(dataset.train, dataset, device, config.data.memory),
        test=views_of(dataset.test, dataset, device, config.data.memory),
        device=device,
        wanted_cache=config.cache,
    )


def open_teacher(
    config: Config, task: Task, progress: Progress | None = None
) -> teachers.FusedTeacher | None:
    """Open the teachers that `config` gives a weight, None where nothing is distilled.

    A task teacher that is neither a checkpoint nor a file of logits is trained on the labelled rows, once
    for each seed and recipe, and kept in the cache.
    """
    if not config.loss.distils:
        return None
    relative = config.clip.scale in ("match_std", "calibrated")
    relative |= config.loss.temperature_of == "task"
    own = None
    clips = []
    if config.asks_clip:
        clips = teachers.open_clip_teachers(
            config.clip, task.dataset, task.device, task.cache, progress
        )
    beside = asked_beside(config, task)
    if beside is not None or (config.asks_logits and (config.fusion.alpha > 0 or relative)):
        given = config.teacher
        trained = None if given.brought else trained_teacher(config, task, progress)
        own = teachers.open_task(
            given,
            trained,
            task.dataset,
            task.train,
            task.test,
            task.cache,
            progress,
            config.train.epochs,
            beside,
        )
    check_teachers(config.teacher, task, own, clips)
    return teachers.FusedTeacher(config, task.split, task.labels, own, clips)


def asked_beside(config: Config, task: Task) -> teachers.Beside | None:
    """Return what the loss of features of `config` asks of a task teacher beside its logits, None if nothing."""
    if config.loss.maps:
        student = initial_student(config, task.dataset)
        image = torch.zeros(1, task.dataset.channels, *task.dataset.size)
        sizes = tuple(shape[1:] for shape in models.stage_shapes(student, image))
        return teachers.Beside(transform=config.loss.transform, student=sizes)
    if config.loss.contrasts and config.feature_alpha > 0:
        return teachers.Beside()
    return None


def check_teachers(
    given: Teacher,
    task: Task,
    own: teachers.TaskTeacher | None,
    clips: list[teachers.ClipTeacher],
) -> None:
    """Look at what the teachers that were brought say of some held-out rows; once a process.

    Where none are held out, they are rows that are learnt from and have a label.
    """
    seen = (*(each.identity for each in (own, *clips) if each is not None), task.split.digest)
    if seen in _looked_at:
        return
    rows = torch.from_numpy(
        task.split.validation if len(task.split.validation) else task.split.labelled
    )
    some = rows[:: -(-len(rows) // SOME)]
    for source in given.brought if own is not None else ():
        teachers.check_sense(f"teacher.{source}", own.plain(some), task.labels[some])
        if source == "checkpoint" and Path(given.checkpoint).is_file() and given.mean is None:
            teachers.check_normalisation(own, some[::2], task.labels[some[::2]])
    for clip in clips:
        teachers.check_sense(clip.source, clip.train[some], task.labels[some])
    _looked_at.add(seen)  # last: a teacher that is refused is refused again


def trained_teacher(config: Config, task: Task, progress: Progress | None = None) -> Path:
    """Return the checkpoint of the teacher that `config` asks to be trained, from the cache if it is there.

    Its last epoch is taken, not its best: the validation rows stay unseen, since weights and temperatures
    are judged on them.
    """
    recipe = teachers.teacher_recipe(config)
    rows = open_task(recipe, beside=task).split
    key = {"recipe": digest(recipe), "data": rows.digest, "torch": torch.__version__}

    def build(folder: Path) -> None:
        def report(metrics: dict[str, float], _: Path) -> None:
            if progress is not None:
                progress("teacher", metrics["epoch"], recipe.train.epochs)

        try:
            with one_thread():
                run(recipe, folder / "run", report=report)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"the teacher, in its own training: {str(error).partition(';')[0]}; lower teacher.lr."
            ) from error

    return cache.folder(task.cache, "teachers", key, build, progress=progress) / "run" / "last"


def initial_student(config: Config, dataset: Dataset) -> nn.Module:
    """Return the untrained student; its weights depend on the seed alone, not on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "initialisation"))
        student = models.build(
            config.student.name,
            len(dataset.names),
            channels=dataset.channels,
            size=dataset.size,
            shortcut=config.student.shortcut,
        )
    field = f"student.name={config.student.name}"
    models.check_size(student, dataset.channels, dataset.size, field=field)
    return student


def open_student(config: Config, task: Task) -> nn.Module:
    """Return the untrained student on the device, in the memory order that is trained fastest."""
    student = initial_student(config, task.dataset).to(task.device)
    return student.to(memory_format=torch.channels_last)


def open_learner(config: Config, task: Task, teacher: teachers.FusedTeacher | None) -> Learner:
    """Return the untrained student with what a loss of features learns beside it.

    Raises:
        ConfigError: If the student cannot be compared so.
    """
    student, comparison = open_student(config, task), None
    if config.loss.contrasts:
        banks = Banks(classes_of(config, task, teacher), config.contrast, config.seed, task.device)
        comparison = Contrast(config, student.width, teacher.widths, teacher.weights, banks)
    elif config.loss.maps:
        image = torch.zeros(1, task.dataset.channels, *task.dataset.size, device=task.device)
        own = models.stage_shapes(student, image)
        comparison = Maps(config, own, teacher.task.network.stages, task.device)
    return Learner(student, None if comparison is None else comparison.to(task.device))


def classes_of(config: Config, task: Task, teacher: teachers.FusedTeacher) -> Tensor:
    """Return the class of each row that is learnt from, as contrast may know it: -1 where there is no label.

    True labels of unlabelled rows are never read.
    """
    rows = task.split.transfer
    known = torch.from_numpy(task.split.labels[rows])
    if not config.contrast.pseudo_labels:
        return known
    parts = torch.from_numpy(rows).split(fusion.together(len(task.dataset.names)))
    likeliest = torch.cat([teacher.fused("train", some).argmax(1) for some in parts]).cpu()
    return torch.where(known >= 0, known, likeliest)


def open_batches(config: Config, task: Task, *, distilled: bool) -> Batches:
    """Return the global batches of `config`, whether or not there is a teacher to distil from."""
    everything = len(task.split.labelled) == len(task.split.transfer)
    # without a target unlabelled rows teach nothing, so each batch is filled with labelled ones
    share = config.data.labelled_share if distilled or everything else 1.0
    train = config.train
    return Batches(
        task.split, task.train, train.batch_size, share, config.seed, drop_last=train.drop_last
    )


def open_optimizer(config: Config, learner: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of all that is learnt; each step sets its learning rate, which lies on a GPU if they do."""
    train, device = config.train, next(learner.parameters()).device
    lr = torch.tensor(train.lr, device=device) if device.type == "cuda" else train.lr
    if train.optimizer == "adamw":
        groups = decayed(learner, train.weight_decay)
        return torch.optim.AdamW(groups, lr=lr, fused=True, capturable=device.type == "cuda")
    return torch.optim.SGD(
        learner.parameters(),
        lr=lr,
        momentum=train.momentum,
        nesterov=train.nesterov,
        weight_decay=train.weight_decay,
        fused=True,
    )


def decayed(learner: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters in two groups: those that decay, and vectors, biases and tokens, which do not."""
    kept = [
        parameter.dim() < 2 or name.rpartition(".")[2].startswith(("bias", *TOKENS))
        for name, parameter in learner.named_parameters()
    ]
    parameters = [*zip(learner.parameters(), kept, strict=True)]
    return [
        {"params": [each for each, free in parameters if not free], "weight_decay": weight_decay},
        {"params": [each for each, free in parameters if free], "weight_decay": 0.0},
    ]


class Run:
    """A run that is taken epoch by epoch; inside its `with` block it alone writes its folder.

    The arguments are those of `run`, and `beside`, another run's task on the same data.

    Attributes:
        rows: Metrics of each epoch so far, those of the folder included.
        task: Its rows and pixels.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        resume: bool = False,
        stop: Callable[[], int | None] = lambda: None,
        progress: Progress | None = None,
        group: Group = ALONE,
        wait: float = MOMENT,
        beside: Task | None = None,
    ) -> None:
        began = time.monotonic()
        self.config, self.folder, self.resume = config, folder, resume
        self.stop, self.group, self.wait = stop, group, wait
        self.record = Record(folder, config, resume=resume) if group.first else None
        progress = stoppable(progress, stop)
        self.task = open_task(config, progress, beside)
        self.teacher = open_teacher(config, self.task, progress)
        self.learner = open_learner(config, self.task, self.teacher)
        self.student = self.learner.student
        self.batches = open_batches(config, self.task, distilled=self.teacher is not None)
        check_slices(self.batches, self.student, group)
        self.optimizer = open_optimizer(config, self.learner)
        self.seconds = time.monotonic() - began  # of its own: others may take turns with it

    def __enter__(self) -> "Run":
        """Take the folder and, on all workers, the state that lies in it."""
        config, group, task = self.config, self.group, self.task
        meta, rows = None, []
        with contextlib.ExitStack() as opened:
            if self.record is not None:
                opened.enter_context(held(self.folder, self.wait))
                self.record.open(task.dataset, task.split, self.teacher, group.size)
                if self.resume:
                    meta, rows = self.record.restore(self.learner, self.optimizer)
                self.record.begin(self.learner, self.optimizer, meta["epoch"] if meta else 0)
            meta, self.rows = group.from_first([meta, rows])
            self.best = meta["best"] if meta else None
            share_state(group, self.learner, self.optimizer)
            self.steps = Steps(
                config, self.learner, self.teacher, self.optimizer, self.batches, group
            )
            self.opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the folder back, and what belongs to the workers' group, which may end before this object does."""
        self.opened.close()
        del self.steps

    def advance(self) -> None:
        """Train for one epoch, look at the rows on which epochs are chosen, and keep both."""
        group, epoch = self.group, len(self.rows)
        began = time.monotonic()
        trained = self.steps.epoch(epoch, self.stop)
        seconds = time.monotonic() - began
        views, rows, labels = self.task.judged
        logits = network_logits(self.student, views, rows[group.slice(len(rows))])
        logits = group.gather(logits, len(rows)).cpu()
        found = accuracy(logits, labels, balanced=self.task.split.balanced)
        if not math.isfinite(found["loss"]):
            raise NonFiniteError(f"val/loss is {found['loss']} after epoch {epoch + 1}; {ADVICE}.")
        if self.best is None or better(found, self.best):
            self.best = {"epoch": epoch + 1, **found}
        metrics = {
            "epoch": epoch + 1,
            **{f"train/{name}": value for name, value in trained.items()},
            **{f"val/{name}": value for name, value in found.items()},
            "best_val_top1": self.best["top1"],
            "best_val_loss": self.best["loss"],
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "seconds": time.monotonic() - began,
            "images_per_second": self.batches.rows / seconds,
        }
        self.rows.append(metrics)
        if self.record is not None:
            self.record.epoch(self.learner, self.optimizer, metrics, self.best)
        self.seconds += time.monotonic() - began

    def finish(self) -> Outcome:
        """Say that the run has finished, and return it with its best epoch's student."""
        if self.record is not None:
            self.student.load_state_dict(checkpoint.load(self.folder / "best").weights)
        self.group.copy_from_first(self.student.state_dict().values())
        speeds = sorted(row["images_per_second"] for row in self.rows)
        metrics = self.rows[-1] | {
            "best_epoch": self.best["epoch"],
            "best_val_top5": self.best["top5"],
            "images_per_second": speeds[len(speeds) // 2],
        }
        if self.record is not None:
            self.record.finish(metrics, self.seconds)
        return Outcome(
            config=self.config,
            folder=self.folder,
            metrics=metrics,
            network=self.student,
            teacher=self.teacher,
            task=self.task,
        )


def run(
    config: Config,
    folder: Path,
    *,
    report: Report | None = None,
    resume: bool = False,
    heard: int | None = None,
    stop: Callable[[], int | None] = lambda: None,
    progress: Progress | None = None,
    group: Group = ALONE,
    wait: float = MOMENT,
) -> Outcome:
    """Distil the student of `config` into `folder`.

    Args:
        config: The run, fully resolved.
        folder: Run folder; must not hold another run. Of several workers the first one alone uses it.
        report: Called once an epoch, by every worker, with the metrics and the folder of the newest checkpoint.
            It may raise to end the run there.
        resume: Go on from `last/` if there is one. On a CPU with as many threads the result equals the
            straight run's, bit for bit.
        heard: The newest epoch of which a report is known to have arrived: each after it is reported, also those
            that lie in the folder. Without it only the epochs that are trained now.
        stop: Asked before each step; a signal number ends the run.
        progress: Called with what is being prepared, done and total.
        group: The workers of this run.
        wait: Seconds for another process that is still at the folder to leave it.

    Returns:
        The finished run, with the metrics of its best epoch.

    Raises:
        ConfigError: If something does not fit together, or another process is at the folder; before any training.
        NonFiniteError: If training diverged; the last good checkpoint stays.
        Interrupted: If `stop` said so; resumable.
    """
    (outcome,) = run_seeds(
        config,
        folder,
        1,
        report=report,
        heard=heard,
        resume=resume,
        stop=stop,
        progress=progress,
        group=group,
        wait=wait,
    )
    return outcome


def run_seeds(
    config: Config,
    folder: Path,
    seeds: int,
    *,
    report: Report | None = None,
    heard: int | None = None,
    **options: Any,
) -> list[Outcome]:
    """Distil a student for each of several seeds, epoch by epoch together, so that one look judges all of them.

    Each is the run that `run` would have made of it, bit for bit. After a kill some may be an epoch ahead; the
    others catch up.

    Args:
        config: The first seed's run; the k-th has the seed `config.seed + k`.
        folder: Holds the run folders of `seed_folders`.
        seeds: How many.
        report: As `run` takes it; called when all have done an epoch, with `mean` of their metrics.
        heard: As `run` takes it.
        options: What else `run` takes.

    Raises:
        RichkdError: What `run` raises, of any of them; it ends all.
    """
    runs: list[Run] = []
    with contextlib.ExitStack() as opened:
        for k, place in enumerate(seed_folders(folder, seeds)):
            beside = runs[0].task if runs else None
            one = Run(replace(config, seed=config.seed + k), place, beside=beside, **options)
            runs.append(opened.enter_context(one))
        if heard is None:
            heard = min(len(one.rows) for one in runs)
        for epoch in range(1, config.train.epochs + 1):
            for one in runs:
                if len(one.rows) < epoch:
                    one.advance()
            if report is not None and epoch > heard:
                report(mean([one.rows[epoch - 1] for one in runs]), runs[0].folder / "last")
        return [one.finish() for one in runs]


def mean(each: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean over the seeds of each metric that all have, and `val/top1_sd`, their spread; of one seed its own."""
    if len(each) == 1:
        return each[0]
    names = [name for name in each[0] if all(name in metrics for metrics in each)]
    found = {name: fmean(metrics[name] for metrics in each) for name in names}
    if "epoch" in found:
        found["epoch"] = each[0]["epoch"]
    if "val/top1" in found:
        found["val/top1_sd"] = stdev(metrics["val/top1"] for metrics in each)
    return found


def better(found: dict[str, float], best: dict[str, float]) -> bool:
    """Say whether `found` is the better epoch: higher validation accuracy, ties by lower loss."""
    return (found["top1"], -found["loss"]) > (best["top1"], -best["loss"])


def share_state(group: Group, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
    """Give all workers the first one's weights and banks and, if it has any, the state of its optimiser."""
    group.copy_from_first(learner.state_dict().values())
    beside = learner.beside()
    group.copy_from_first(beside.values())
    learner.load_beside(beside)
    state = optimizer_state(learner, optimizer)
    shapes = group.from_first({name: list(value.shape) for name, value in state.items()})
    if not group.first:
        set_state(learner, optimizer, {name: torch.zeros(shape) for name, shape in shapes.items()})
    group.copy_from_first(optimizer_state(learner, optimizer).values())


def test(outcome: Outcome) -> dict[str, float]:
    """Read the test rows with the best epoch's student and with its teachers, once: it is kept in `run.json`.

    Returns:
        `test/top1`, `test/top5`, `test/loss` and `test/ece` of the student, `test/last_top1` of the last epoch's, and
        `teacher/top1`, `clip/top1` and `fused/top1` where the run had them: the teachers on the same test rows,
        un-augmented; with each its `test/agreement_teacher` and so on, in percent of the rows. By what the
        task teacher says of a row, if there is one, `test/right_certain/top1` and so on, and under a long tail by how
        frequent the row's class was in training, `test/head/top1` and so on: see `evaluate.categories`.
    """
    with held(outcome.folder):
        state = read_record(outcome.folder / "run.json", "metrics")
        known = {key: value for key, value in state["metrics"].items() if key.startswith(TESTED)}
        if known:
            return known
        task, teacher = outcome.task, outcome.teacher
        labels = torch.from_numpy(task.dataset.test.labels)
        rows, shown = torch.arange(len(labels)), teacher.shown("test") if teacher else {}
        logits = network_logits(outcome.network, task.test, rows).cpu()
        found = accuracy(logits, labels)
        found["ece"] = calibration(logits, labels).ece
        shown = {who: own.cpu() for who, own in shown.items()}
        found |= {f"agreement_{who}": each for who, each in agreement(logits, shown).items()}
        found["last_top1"] = found["top1"]
        if state["metrics"]["best_epoch"] != state["metrics"]["epoch"]:
            last = copy.deepcopy(outcome.network)
            last.load_state_dict(checkpoint.load(outcome.folder / "last").weights)
            found["last_top1"] = evaluate(last, task.test, rows, labels)["top1"]
        groups: dict[str, Tensor] = {}
        if "teacher" in shown:
            groups |= by_teacher(shown["teacher"], labels, outcome.config.evaluate.certain)
        if task.split.balanced:
            groups |= by_frequency(labels, task.frequencies)
        found |= accuracy_of(logits, labels, groups)
        metrics = {f"test/{name}": value for name, value in found.items()}
        for name, logits in shown.items():
            metrics[f"{name}/top1"] = accuracy(logits, labels)["top1"]
        state["metrics"] |= metrics
        write_json(outcome.folder / "run.json", state)
        return metrics


def evaluate_teachers(
    task: Task, teacher: teachers.FusedTeacher
) -> dict[str, dict[str, dict[str, float]]]:
    """Evaluate teachers on un-augmented rows, for a look at them before anything is trained.

    Returns:
        By name of the teacher, of `val` (if any are held out), `test` and `all` rows whose labels and logits are known:
        `top1`, `top5`, `loss`, `ece` and `rows`. A teacher that has learnt from some of these rows is flattered by them.
    """
    labels = {"train": task.labels, "test": torch.from_numpy(task.dataset.test.labels)}
    validation = torch.from_numpy(task.split.validation)
    found: dict[str, dict[str, dict[str, float]]] = {}
    shown = {part: teacher.shown(part) for part in labels}
    for who, logits in shown["train"].items():
        parts = {}
        if len(validation):
            parts["val"] = (logits[validation].cpu(), labels["train"][validation])
        everything = [(logits.cpu(), labels["train"])]
        if who in shown["test"]:
            parts["test"] = (shown["test"][who].cpu(), labels["test"])
            everything.append(parts["test"])
        parts["all"] = tuple(map(torch.cat, zip(*everything, strict=True)))
        found[who] = {}
        for part, (values, own) in parts.items():
            known = own >= 0
            balanced = part == "val" and task.split.balanced
            of_known = accuracy(values[known], own[known], balanced=balanced)
            of_known["ece"] = calibration(values[known], own[known]).ece
            found[who][part] = of_known | {"rows": int(known.sum())}
    return found


def prepared(task: Task, teacher: teachers.FusedTeacher | None) -> dict[str, Any]:
    """Return what the cache holds for a run: where, for how many images, and how good its teachers are on held-out rows.

    Where none are held out, on test rows.
    """
    found = {
        "cache": str(task.cache),
        "train": len(task.dataset.train),
        "test": len(task.dataset.test),
    }
    if task.dataset.unreadable:
        found["unreadable"] = list(task.dataset.unreadable)
    if teacher is not None and teacher.task is not None and teacher.task.table is not None:
        table = teacher.task.table
        found["crops"], found["crops_known"] = len(table), table.known()
    of, part = ("train", "val") if len(task.split.validation) else ("test", "test")
    _, rows, labels = task.judged
    for who, logits in (teacher.shown(of, rows) if teacher else {}).items():
        top1 = accuracy(logits.cpu(), labels, balanced=task.split.balanced)["top1"]
        found[who] = {f"{part}_top1": top1}
    return found


def prepared_lines(source: str, found: dict[str, Any]) -> Iterator[str]:
    """Yield what is printed of `prepared`."""
    yield f"cached for {source} in {found['cache']}"
    if "crops" in found:
        yield f"teacher    {found['crops_known']:,} of {found['crops']:,} crops in its table"
    for who, each in found.items():
        if isinstance(each, dict):
            for key, top1 in each.items():
                yield f"{who:<10} {key.replace('_', ' ')} {top1:6.2f} %"


@dataclass(kw_only=True, slots=True, eq=False)
class Retested:
    """A student taken from its checkpoint, and its accuracy, found again.

    Attributes:
        found: `val` and `test`, each with `top1`, `top5` and `loss`, the former of the rows that its epoch was chosen on, and
            the latter under a long tail by groups, as `test` has it; of a best epoch that was chosen on test rows `last`, that
            of the last epoch, where it lies beside.
        logits: Of the test rows, `(M, K)` on the CPU.
        speed: Images per second.
        config: The run that made it, where a key that was not there yet has its default.
        network: On the device.
        task: Its data.
    """

    found: dict[str, dict[str, float]]
    logits: Tensor
    speed: float
    config: Config
    network: nn.Module
    task: Task


def retest(folder: Path, changes: dict[str, Any] | None = None) -> Retested:
    """Evaluate the student of a checkpoint again, on validation and test rows.

    Args:
        folder: Checkpoint.
        changes: Dotted keys that say where its data lie now, and how it is looked at.

    Raises:
        ConfigError: If the data that the checkpoint's config names is not the data it was made with.
    """
    saved = checkpoint.load(folder)
    network = network_of(saved)
    config = run_config(saved, changes)
    task = open_task(config)
    if task.dataset.digest != saved.meta["data"]:
        raise ConfigError(
            f"{folder} was made with another version of {task.dataset.name} (digest {saved.meta['data'][:12]}, "
            f"now {task.dataset.digest[:12]}); its accuracy cannot be checked here."
        )
    if tuple(saved.meta["names"]) != task.dataset.names:
        raise ConfigError(
            f"{folder} knows {len(saved.meta['names'])} classes but {task.dataset.name} has "
            f"{len(task.dataset.names)}; it is no student of this task."
        )
    network = network.to(task.device, memory_format=torch.channels_last)
    labels = torch.from_numpy(task.dataset.test.labels)
    found = {"val": evaluate(network, *task.judged, balanced=task.split.balanced)}
    began = time.monotonic()
    rows = torch.arange(len(labels))
    logits = network_logits(network, task.test, rows).cpu()
    seconds = time.monotonic() - began
    found["test"] = accuracy(logits, labels)
    if task.split.balanced:
        groups = by_frequency(labels, task.frequencies)
        found["test"] |= accuracy_of(logits, labels, groups)
    beside = folder.parent / "last"
    if config.selection == "paper" and folder.name == "best" and checkpoint.exists(beside):
        last = copy.deepcopy(network)
        last.load_state_dict(checkpoint.load(beside).weights)
        found["last"] = evaluate(last, task.test, rows, labels)
    return Retested(
        found=found,
        logits=logits,
        speed=len(labels) / seconds,
        config=config,
        network=network.eval(),
        task=task,
    )
