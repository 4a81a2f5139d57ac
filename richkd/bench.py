"""Images per second of training on this machine, beside those of a loop as it is usually written.

    python -m richkd bench                                  # the embedded digits
    python -m richkd bench my.yaml student.name=resnet8x4 --seconds=60 --json

Three variants take the steps that `distill.run` takes: `student` with the labels alone, `kd` from the task teacher,
`richkd-l` from both teachers. The fourth, `reference`, does the job of `richkd-l` with PIL images, a DataLoader and the
losses written out. They run in turn, a short burst each, so that what else the machine does meets all of them alike.
"""

import copy
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from richkd import distill, methods
from richkd.config import Config, Method
from richkd.data import Views
from richkd.data.pictures import picture
from richkd.distill import Task
from richkd.errors import Interrupted
from richkd.progress import Progress, stoppable
from richkd.steps import Slice, Steps
from richkd.teachers import FusedTeacher

METHODS = {"student": "ce", "kd": "kd", "richkd-l": "richkd-l"}  # the method of each variant
REFERENCE = "reference"
SECONDS = 20.0  # of a measurement, unless said otherwise
ROUNDS = 10  # that are aimed at
LEAST_ROUNDS = 3  # also if they take longer than asked, as with slow networks
WARM_STEPS = 3  # not counted: kernels are chosen, memory is allocated; fewer of slow networks
WIDTH = 80


def of_method(config: Config, name: str) -> Config:
    """Return `config` with the settings that `name` presets.

    Scale and temperature stay plain: their values change no speed, and to find relative ones the teacher would have
    to look at all rows first.
    """
    settings = methods.get(name).settings
    loss = {key.removeprefix("loss."): v for key, v in settings.items() if key.startswith("loss.")}
    return replace(
        config,
        method=Method(name=name),
        loss=replace(config.loss, **loss, temperature_of="fused"),
        fusion=replace(config.fusion, alpha=settings["fusion.alpha"], space="logits"),
        clip=replace(config.clip, scale="model"),
    )


class Ours:
    """A training of this project that can be taken a few steps further.

    Args:
        config: The run.
        task: Its data.
        teacher: None where nothing is distilled.
        again: Number of blocks of batches that it goes through again and again; None: all of them.
    """

    def __init__(
        self, config: Config, task: Task, teacher: FusedTeacher | None, again: int | None = None
    ) -> None:
        self.config, self.teacher, self.again = config, teacher, again
        self.student = distill.open_student(config, task).train()
        optimizer = distill.open_optimizer(config, self.student)
        batches = distill.open_batches(config, task, distilled=teacher is not None)
        self.steps = Steps(config, self.student, teacher, optimizer, batches)
        self.blocks = self._endless()

    def _endless(self) -> Iterator[list[tuple[Slice, float]]]:
        """Yield blocks of slices, each with how much of the training lies behind; it begins again where it would end."""
        steps, epochs = len(self.steps.batches), self.config.train.epochs
        for epoch in count():
            done = count((epoch % epochs) * steps)
            for block in islice(self.steps.blocks(0 if self.again else epoch), self.again):
                yield [(part, next(done) / (steps * epochs)) for part in block]

    def burst(self, steps: int) -> int:
        """Take `steps` steps, and what is left of their last block; return how many images they saw."""
        images, taken = 0, 0
        while taken < steps:
            block = next(self.blocks)
            for part, progress in block:
                self.steps.take(part, progress)
                images += part.total
            taken += len(block)
        return images


class Pictures(torch.utils.data.Dataset):
    """Transfer rows as PIL images under `transform`, each with its visible label and its row."""

    def __init__(self, task: Task, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pixels, self.transform = task.dataset.train.pixels, transform
        self.rows, self.labels = task.split.transfer, task.split.labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> tuple[Tensor, int, int]:
        row = self.rows[k]
        return self.transform(picture(self.pixels[row])), self.labels[row], row


class Reference:
    """The job of a variant as it is usually written, for comparison: the same loss from the same crops.

    Rows come as they fall, since the share of labelled ones in a batch changes no speed.

    Args:
        config: The run.
        task: Its data.
        teacher: Whose network and zero-shot logits are used.
    """

    def __init__(self, config: Config, task: Task, teacher: FusedTeacher) -> None:
        from torchvision import transforms

        self.config, self.device = config, task.device
        self.student = distill.initial_student(config, task.dataset).to(task.device).train()
        self.temperature, self.alpha = teacher.temperature, teacher.alpha
        self.clip = teacher.zero_shot["train"]
        self.given, self.teacher = teacher.task.given, None
        if teacher.task.network is not None:
            network = copy.deepcopy(teacher.task.network)
            self.teacher = network.to(memory_format=torch.contiguous_format)
        self.adapt = renormalisation(task.train, teacher.task.train_views)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=config.train.lr,
            momentum=config.train.momentum,
            weight_decay=config.train.weight_decay,
        )
        dataset = task.dataset
        flip = [transforms.RandomHorizontalFlip()] if dataset.flip else []
        augmentation = [
            transforms.RandomCrop(dataset.size, padding=dataset.pad),
            *flip,
            transforms.ToTensor(),
            transforms.Normalize(dataset.mean, dataset.std),
        ]
        self.loader = DataLoader(
            Pictures(task, transforms.Compose(augmentation)),
            batch_size=config.train.batch_size,
            shuffle=True,
        )
        self.batches = self._endless()

    def _endless(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def teacher_logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return the task teacher's logits `(B, K)` of `images`, or those given for their rows."""
        if self.teacher is None:
            return self.given[0][rows]
        with torch.no_grad():
            return self.teacher(self.adapt(images))

    def loss(self, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of a batch; a label of -1 marks a row that has none."""
        logits = self.student(images)
        target = self.teacher_logits(images, rows)
        if self.clip is not None:
            target = self.alpha * target + (1 - self.alpha) * self.clip[rows]
        labelled = labels >= 0
        ce = logits.new_zeros(())
        if labelled.any():
            ce = F.cross_entropy(logits[labelled], labels[labelled])
        t = self.temperature
        student, target = F.log_softmax(logits / t, 1), F.softmax(target / t, 1)
        kd = F.kl_div(student, target, reduction="batchmean") * t**2
        return self.config.loss.ce * ce + self.config.loss.logit * kd

    def burst(self, steps: int) -> int:
        """Take `steps` steps and return how many images they saw."""
        images, total = 0, 0.0
        for _ in range(steps):
            batch, labels, rows = (part.to(self.device) for part in next(self.batches))
            loss = self.loss(batch, labels, rows)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
            images += len(batch)
        return images


def renormalisation(own: Views, wanted: Views) -> Callable[[Tensor], Tensor]:
    """Return what brings images normalised as in `own` to the normalisation of `wanted`."""
    if torch.equal(own.mean, wanted.mean) and torch.equal(own.std, wanted.std):
        return nn.Identity()
    scale = (own.std / wanted.std).view(-1, 1, 1)
    shift = ((own.mean - wanted.mean) / wanted.std).view(-1, 1, 1)
    return lambda images: images * scale + shift


def open_variants(
    config: Config, task: Task, progress: Progress | None = None
) -> dict[str, Ours | Reference]:
    """Return a training for each variant, by name; each has a student of its own, and all have the same teachers."""
    configs = {variant: of_method(config, name) for variant, name in METHODS.items()}
    fused = distill.open_teacher(configs["richkd-l"], task, progress)
    alone = FusedTeacher(configs["kd"], task.split, task.labels, fused.task, [])
    taught = {"student": None, "kd": alone, "richkd-l": fused}
    variants = {name: Ours(configs[name], task, teacher) for name, teacher in taught.items()}
    return variants | {REFERENCE: Reference(configs["richkd-l"], task, fused)}


def speed(variant: Ours | Reference, steps: int, device: torch.device) -> float:
    """Return the images per second of a burst of `steps` steps."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    images = variant.burst(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images / (time.perf_counter() - began)


def burst_length(variant: Ours | Reference, seconds: float, device: torch.device) -> int:
    """Warm `variant` up and return how many of its steps take about `seconds`."""
    for _ in range(WARM_STEPS):
        each = variant.config.train.batch_size / speed(variant, 1, device)
        if each > seconds:
            break  # to such a step what the first one does once is nothing
    return max(1, round(seconds / each))


def measure(
    config: Config,
    seconds: float = SECONDS,
    progress: Progress | None = None,
    stop: Callable[[], int | None] = lambda: None,
) -> dict[str, Any]:
    """Measure how fast each variant trains with the data, student and teachers of `config`.

    Args:
        config: The run; its method is of no effect.
        seconds: How long to measure in all; three rounds are made in any case. Preparations come on top.
        progress: Called with what is being prepared, or measured, done and total.
        stop: Asked before each burst; a signal number ends the measurement.

    Returns:
        Plain JSON: the machine, the job, and of each variant the median of its `images_per_second` over the rounds,
        its quartiles `low` and `high`, and `ratio`, the median over the rounds of its speed by the reference's in the
        same round.

    Raises:
        ConfigError: If something does not fit together.
        Interrupted: If `stop` said so.
    """
    told = stoppable(progress, stop)
    task = distill.open_task(config, told)

    def before_a_burst(percent: int) -> None:
        if (signum := stop()) is not None:
            raise Interrupted(signum, "interrupted while measuring; nothing is kept of it")
        if progress is not None:
            progress("measurement", percent, 100)

    # torchvision draws from the global generator
    with torch.random.fork_rng(devices=[task.device] if task.device.type == "cuda" else []):
        variants = open_variants(config, task, told)
        speeds = {name: [] for name in variants}
        steps = {}
        began = time.perf_counter()
        for name, variant in variants.items():
            before_a_burst(0)
            steps[name] = burst_length(variant, seconds / (len(variants) * ROUNDS), task.device)
        while len(speeds[REFERENCE]) < LEAST_ROUNDS or time.perf_counter() - began < seconds:
            for name, variant in variants.items():
                before_a_burst(min(int(100 * (time.perf_counter() - began) / seconds), 99))
                speeds[name].append(speed(variant, steps[name], task.device))
    if progress is not None:
        progress("measurement", 100, 100)
    return described(config, task) | {
        "rounds": len(speeds[REFERENCE]),
        "variants": {name: summary(own, speeds[REFERENCE]) for name, own in speeds.items()},
    }


def summary(speeds: list[float], reference: list[float]) -> dict[str, float]:
    """Return median and quartiles of the rounds' `speeds`, and the median of their ratios to the `reference`'s."""
    low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
    ratio = statistics.median(a / b for a, b in zip(speeds, reference, strict=True))
    return {"images_per_second": median, "low": low, "high": high, "ratio": ratio}


def described(config: Config, task: Task) -> dict[str, Any]:
    """Return what a measurement was made with: the machine and the job."""
    device = task.device
    given, clip = config.teacher, config.clip
    teacher = "given logits" if given.logits is not None else given.name
    if given.checkpoint is not None and not Path(given.checkpoint).is_file():
        teacher = given.checkpoint  # a run or checkpoint of richkd knows its network itself
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "data": task.dataset.name,
        "size": list(task.dataset.size),
        "student": config.student.name,
        "teacher": teacher,
        "clip": "given logits" if clip.logits is not None else clip.model,
        "batch_size": config.train.batch_size,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Return the lines that show what `measure` returned, none wider than 80 characters."""
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    height, width = found["size"]
    head = [
        f"images/s of training on {found['device']} ({found['device_name']}), {threads}, torch {found['torch']}",
        f"{found['student']} from {found['teacher']} and {found['clip']}, {found['data']} {height} x {width}, "
        f"batch {found['batch_size']}, {found['rounds']} rounds",
    ]
    lines = [line for text in head for line in textwrap.wrap(text, WIDTH)]
    lines.append(f"{'variant':<12}{'images/s':>10}   {'(quartiles)':<22}{'against reference':>18}")
    for name, own in found["variants"].items():
        spread = f"({own['low']:.1f} to {own['high']:.1f})"
        lines.append(
            f"{name:<12}{own['images_per_second']:>10.1f}   {spread:<22}{own['ratio']:>17.2f}x"
        )
    return [*lines, "medians over the rounds, of speeds and of each round's ratio"]
