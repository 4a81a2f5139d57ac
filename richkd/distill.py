"""Distil one student: step, epoch, run.

    python -m richkd distill                                # richkd-l on the embedded digits
    python -m richkd distill method.name=kd seed=3 --json

A run folder holds `config.yaml`, `run.json` (what it is and how it ended), `metrics.jsonl` (one line an
epoch), `last/` (the newest checkpoint, from which a run goes on) and `best/` (the epoch with the highest
validation accuracy). Test rows are not read here but once, by `test`, after the run.
"""

import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from richkd import cache, checkpoint, fusion, losses, models, teachers
from richkd.config import Config, digest, dump, from_dict, to_dict
from richkd.data import Batches, Dataset, Split, Views, load, split
from richkd.data.batches import stream_seed
from richkd.errors import ConfigError, Interrupted, NonFiniteError
from richkd.evaluate import accuracy, evaluate
from richkd.files import check_writable, make_folder, read_record, write_atomic, write_json
from richkd.progress import Progress, stoppable
from richkd.student import network_of
from richkd.threads import one_thread

ADVICE = "lower train.lr or loss.logit, or raise loss.temperature"  # of a run that diverged
TESTED = ("test/", "teacher/", "clip/", "fused/")  # of the test rows
TERMS = ("loss_ce", "loss_logit", "loss", "target_entropy")

Report = Callable[[dict[str, float], Path], None]


@dataclass(kw_only=True, slots=True, eq=False)
class Task:
    """What every run on one data set with one seed shares: rows, and pixels on the device."""

    dataset: Dataset
    split: Split
    train: Views
    test: Views
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


@dataclass(kw_only=True, slots=True, eq=False)
class Outcome:
    """A finished run: its folder, the metrics of its best epoch, and the objects that `test` needs."""

    folder: Path
    metrics: dict[str, float]
    network: nn.Module
    teacher: teachers.FusedTeacher | None
    task: Task


def open_task(config: Config, progress: Progress | None = None) -> Task:
    """Load data, cut it, and put the pixels on the device."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda but this machine has no usable GPU; use device=cpu.")
    device = torch.device(name)
    dataset = load(config.data, cache.root(config.cache), progress)
    return Task(
        dataset=dataset,
        split=split(dataset, config.data, config.seed),
        train=Views(dataset.train, dataset, device, config.data.memory),
        test=Views(dataset.test, dataset, device, config.data.memory),
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
    if config.loss.logit == 0:
        return None
    fixed_scale = config.clip.scale not in ("match_std", "calibrated")
    clip = own = None
    if config.fusion.alpha < 1:
        clip = teachers.open_clip_teacher(
            config.clip, task.dataset, task.device, task.cache, progress
        )
    if config.fusion.alpha > 0 or config.loss.temperature_of == "task" or not fixed_scale:
        trained = None
        if config.teacher.checkpoint is None and config.teacher.logits is None:
            trained = trained_teacher(config, task, progress)
        own = teachers.open_task(config.teacher, trained, task.dataset, task.train, task.test)
    rows = torch.from_numpy(task.split.validation)
    if own is not None and own.table is not None:
        teachers.check_sense("teacher.logits", own.table[rows], task.labels[rows])
    if clip is not None:
        source = "clip.prompts" if config.clip.logits is None else "clip.logits"
        teachers.check_sense(source, clip.train[rows], task.labels[rows])
    return teachers.FusedTeacher(config, task.split, task.labels, own, clip)


def trained_teacher(config: Config, task: Task, progress: Progress | None = None) -> Path:
    """Return the checkpoint of the teacher that `config` asks to be trained, from the cache if it is there.

    Its last epoch is taken, not its best: the validation rows stay unseen, since weights and temperatures
    are judged on them.
    """
    recipe = teachers.teacher_recipe(config)
    key = {"recipe": digest(recipe), "data": task.split.digest, "torch": torch.__version__}

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


def step(
    config: Config,
    student: nn.Module,
    teacher: teachers.FusedTeacher | None,
    images: Tensor,
    rows: Tensor,
    labels: Tensor,
    views: Tensor,
) -> Tensor:
    """Return the values of TERMS for one global batch, `(4,)`; the third is the loss to descend."""
    logits = student(images)
    labelled = int((labels >= 0).sum())
    ce = losses.cross_entropy(logits, labels.to(logits.device), labelled)
    if teacher is None:
        zero = ce.new_zeros(())
        return torch.stack([ce.detach(), zero, config.loss.ce * ce, zero])
    target = teacher.target(rows, views)
    logit = losses.kd(logits, target, teacher.temperature, len(rows))
    loss = config.loss.ce * ce + config.loss.logit * logit
    return torch.stack([ce.detach(), logit.detach(), loss, fusion.entropy(target)])


def train_epoch(
    config: Config,
    student: nn.Module,
    teacher: teachers.FusedTeacher | None,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    epoch: int,
    stop: Callable[[], int | None],
) -> dict[str, float]:
    """Train for one epoch and return the mean of each of TERMS.

    The terms stay on the device until the epoch has ended, so that no step waits for the host.

    Raises:
        NonFiniteError: If a term or a weight is NaN or infinite; names epoch, step and term.
        Interrupted: If `stop` returned a signal.
    """
    student.train()
    device, steps = batches.views.mean.device, len(batches)
    terms = torch.zeros(steps, len(TERMS), device=device)
    for k, (rows, labels, views) in enumerate(batches.epoch(epoch)):
        if (signum := stop()) is not None:
            raise Interrupted(signum, f"interrupted in epoch {epoch + 1} of {config.train.epochs}")
        progress = (epoch * steps + k) / (config.train.epochs * steps)
        for group in optimizer.param_groups:
            group["lr"] = config.train.lr * (0.5 + 0.5 * math.cos(math.pi * progress))
        values = step(
            config, student, teacher, batches.views.images(rows, views), rows, labels, views
        )
        optimizer.zero_grad(set_to_none=True)
        values[2].backward()
        optimizer.step()
        terms[k] = values.detach()
    check_finite(terms.cpu(), student, epoch)
    return dict(zip(TERMS, terms.double().mean(0).tolist(), strict=True))


def check_finite(terms: Tensor, student: nn.Module, epoch: int) -> None:
    """Raise NonFiniteError naming the first step and term of `terms` `(steps, 4)`, or the weight, not finite."""
    if not terms.isfinite().all():
        where = (~terms.isfinite()).nonzero()[0].tolist()
        raise NonFiniteError(
            f"{TERMS[where[1]]} is {terms[where[0], where[1]].item()} at step {where[0] + 1} of epoch {epoch + 1}; "
            f"{ADVICE}."
        )
    for name, value in student.state_dict().items():
        if not value.isfinite().all():
            raise NonFiniteError(f"weight {name} is not finite after epoch {epoch + 1}; {ADVICE}.")


def initial_student(config: Config, dataset: Dataset) -> nn.Module:
    """Return the untrained student; its weights depend on the seed alone, not on what ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(config.seed, "initialisation"))
        return models.build(
            config.student.name,
            len(dataset.names),
            channels=dataset.channels,
            shortcut=config.student.shortcut,
        )


def run(
    config: Config,
    folder: Path,
    *,
    report: Report | None = None,
    resume: bool = False,
    stop: Callable[[], int | None] = lambda: None,
    progress: Progress | None = None,
) -> Outcome:
    """Distil the student of `config` into `folder`.

    Args:
        config: The run, fully resolved.
        folder: Run folder; must not hold another run.
        report: Called once an epoch with the metrics and the folder of the newest checkpoint. It may
            raise to end the run there.
        resume: Go on from `last/` if there is one. On a CPU with as many threads the result equals the
            straight run's, bit for bit.
        stop: Asked before each step; a signal number ends the run.
        progress: Called with what is being prepared, done and total.

    Returns:
        The finished run, with the metrics of its best epoch.

    Raises:
        ConfigError: If something does not fit together; before any training.
        NonFiniteError: If training diverged; the last good checkpoint stays.
        Interrupted: If `stop` said so; resumable.
    """
    started = time.monotonic()
    if not resume and (folder / "run.json").exists():
        raise ConfigError(
            f"{folder} holds a run already; go on with it (--resume), or give another --name."
        )
    state = {"state": "running", "digest": digest(config)}
    before = check_same(folder, state)
    tested = {k: v for k, v in before.get("metrics", {}).items() if k.startswith(TESTED)}
    check_writable(folder, "storage")
    progress = stoppable(progress, stop)
    task = open_task(config, progress)
    student = initial_student(config, task.dataset).to(task.device)
    student = student.to(memory_format=torch.channels_last)
    teacher = open_teacher(config, task, progress)
    everything = len(task.split.labelled) == len(task.split.transfer)
    # without a target unlabelled rows teach nothing, so each batch is filled with labelled ones
    share = 1.0 if teacher is None and not everything else config.data.labelled_share
    batches = Batches(task.split, task.train, config.train.batch_size, share, config.seed)
    optimizer = torch.optim.SGD(
        student.parameters(),
        lr=config.train.lr,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
        fused=True,
    )
    state |= {"data": task.dataset.digest, "teachers": teacher.identities if teacher else {}}
    check_same(folder, state)
    state |= {"torch": torch.__version__, "python": platform.python_version()}
    state |= {"threads": torch.get_num_threads()}  # on a CPU, the last bits depend on it
    if task.dataset.unreadable:
        state["unreadable"] = list(task.dataset.unreadable)
    if teacher is not None:
        state |= {"temperature": teacher.temperature, "clip_factor": teacher.factor}
    make_folder(folder, "storage")
    write_atomic(folder / "config.yaml", dump(config).encode())
    first, best, rows = 0, None, []
    if resume and checkpoint.exists(folder / "last"):
        meta = restore(folder / "last", student, optimizer)
        first, best = meta["epoch"], meta["best"]
        rows = mend(folder, student, meta)
    write_json(folder / "run.json", state)

    def save(epoch: int, metrics: dict[str, float]) -> None:
        meta = checkpoint_meta(config, task, epoch, metrics, best)
        weights = dict(student.state_dict())
        momentum = momentum_of(student, optimizer)
        checkpoint.save(folder / "last", weights, momentum, meta)
        if best is not None and best["epoch"] == epoch:
            checkpoint.save(folder / "best", weights, {}, meta)

    if first == 0:
        save(0, {})  # an interrupt in the first epoch finds something to go on from
        write_atomic(folder / "metrics.jsonl", b"")
    held_out = torch.from_numpy(task.split.validation)
    for epoch in range(first, config.train.epochs):
        began = time.monotonic()
        trained = train_epoch(config, student, teacher, optimizer, batches, epoch, stop)
        seconds = time.monotonic() - began
        found = evaluate(student, task.train, held_out, task.labels[held_out])
        if not math.isfinite(found["loss"]):
            raise NonFiniteError(f"val/loss is {found['loss']} after epoch {epoch + 1}; {ADVICE}.")
        if best is None or better(found, best):
            best = {"epoch": epoch + 1, **found}
        metrics = {
            "epoch": epoch + 1,
            **{f"train/{name}": value for name, value in trained.items()},
            **{f"val/{name}": value for name, value in found.items()},
            "best_val_top1": best["top1"],
            "best_val_loss": best["loss"],
            "lr": optimizer.param_groups[0]["lr"],
            "seconds": time.monotonic() - began,
            "images_per_second": batches.rows / seconds,
        }
        save(epoch + 1, metrics)
        rows.append(metrics)
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if report is not None:
            report(metrics, folder / "last")
    student.load_state_dict(checkpoint.load(folder / "best").weights)
    speeds = sorted(row["images_per_second"] for row in rows)
    metrics = rows[-1] | {
        "best_epoch": best["epoch"],
        "best_val_top5": best["top5"],
        "images_per_second": speeds[len(speeds) // 2],
    }
    state |= {"state": "finished", "seconds": time.monotonic() - started}
    state["metrics"] = metrics | tested
    write_json(folder / "run.json", state)
    return Outcome(folder=folder, metrics=metrics, network=student, teacher=teacher, task=task)


def better(found: dict[str, float], best: dict[str, float]) -> bool:
    """Say whether `found` is the better epoch: higher validation accuracy, ties by lower loss."""
    return (found["top1"], -found["loss"]) > (best["top1"], -best["loss"])


def check_same(folder: Path, state: dict) -> dict:
    """Return `run.json` of a run to go on with; a ConfigError if it names other settings, data or teachers."""
    if not (folder / "run.json").exists():
        return {}
    before = read_record(folder / "run.json", "digest", "data", "teachers")
    for key, what in (("digest", "settings"), ("data", "data"), ("teachers", "teachers")):
        if key in state and before[key] != state[key]:
            raise ConfigError(
                f"{folder} was made with other {what} ({before[key]}, now {state[key]}); compare its config.yaml "
                "and the files that it names, or start anew with another --name."
            )
    return before


def mend(folder: Path, student: nn.Module, meta: dict) -> list[dict[str, float]]:
    """Bring what is written after `last/` in each epoch to its state: a kill may have come in between.

    Args:
        folder: Run folder.
        student: With the weights of `last/`.
        meta: What `last/` says of itself.

    Returns:
        The lines of `metrics.jsonl` up to that epoch.
    """
    epoch, path = meta["epoch"], folder / "metrics.jsonl"
    if epoch and meta["best"]["epoch"] == epoch:
        checkpoint.save(folder / "best", dict(student.state_dict()), {}, meta)
    lines = path.read_text().splitlines()[: max(epoch - 1, 0)] if path.exists() else []
    lines += [json.dumps(meta["metrics"])] if epoch else []
    write_atomic(path, "".join(line + "\n" for line in lines).encode())
    return [json.loads(line) for line in lines]


def checkpoint_meta(
    config: Config, task: Task, epoch: int, metrics: dict[str, float], best: dict[str, float] | None
) -> dict:
    """Return what a checkpoint says of itself, as plain JSON."""
    return {
        "config": to_dict(config),
        "digest": digest(config),
        "epoch": epoch,
        "metrics": metrics,
        "best": best,
        "names": list(task.dataset.names),
        "channels": task.dataset.channels,
        "size": list(task.dataset.size),
        "mean": list(task.dataset.mean),
        "std": list(task.dataset.std),
        "data": task.dataset.digest,
        "trained_on": task.split.digest,
    }


def momentum_of(student: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's momentum buffers by the name of their parameter."""
    return {
        name: optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in student.named_parameters()
        if optimizer.state[parameter].get("momentum_buffer") is not None
    }


def restore(folder: Path, student: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Load a checkpoint into student and optimiser; return what it says of itself.

    Random numbers need no state: each epoch's are a function of the seed and the epoch.
    """
    saved = checkpoint.load(folder)
    student.load_state_dict(saved.weights)
    for name, parameter in student.named_parameters():
        if name in saved.state:
            # with the parameter's own strides: the fused optimiser walks both in memory order
            buffer = torch.empty_like(parameter).copy_(saved.state[name])
            optimizer.state[parameter]["momentum_buffer"] = buffer
    return saved.meta


def test(outcome: Outcome) -> dict[str, float]:
    """Read the test rows with the best epoch's student and with its teachers, once: it is kept in `run.json`.

    Returns:
        `test/top1`, `test/top5`, `test/loss` of the student, and `teacher/top1`, `clip/top1` and
        `fused/top1` where the run had them: the teachers on the same test rows, un-augmented.
    """
    state = read_record(outcome.folder / "run.json", "metrics")
    known = {key: value for key, value in state["metrics"].items() if key.startswith(TESTED)}
    if known:
        return known
    task, teacher = outcome.task, outcome.teacher
    labels = torch.from_numpy(task.dataset.test.labels)
    found = evaluate(outcome.network, task.test, torch.arange(len(labels)), labels)
    metrics = {f"test/{name}": value for name, value in found.items()}
    for name, logits in (teacher.shown("test") if teacher is not None else {}).items():
        metrics[f"{name}/top1"] = accuracy(logits.cpu(), labels)["top1"]
    state["metrics"] |= metrics
    write_json(outcome.folder / "run.json", state)
    return metrics


def retest(folder: Path) -> tuple[dict[str, dict[str, float]], float, dict]:
    """Evaluate the student of a checkpoint again, on validation and test rows.

    Returns:
        `val` and `test`, each with `top1`, `top5` and `loss`; images per second; and what the checkpoint
        says of itself.

    Raises:
        ConfigError: If the data that the checkpoint's config names is not the data it was made with.
    """
    saved = checkpoint.load(folder)
    network = network_of(saved)
    # on whatever this machine has: the accuracy is the student's, not the machine's
    config = replace(from_dict(saved.meta["config"]), device="auto")
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
    validation, labels = (
        torch.from_numpy(task.split.validation),
        torch.from_numpy(task.dataset.test.labels),
    )
    found = {"val": evaluate(network, task.train, validation, task.labels[validation])}
    began = time.monotonic()
    found["test"] = evaluate(network, task.test, torch.arange(len(labels)), labels)
    return found, len(labels) / (time.monotonic() - began), saved.meta
