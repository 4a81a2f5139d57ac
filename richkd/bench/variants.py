"""What is measured: trainings of this project by name, a loop as it is usually written, and parts of either.

The name of a variant is a method and what is changed about it, such as `richkd-l+table+bf16`. Without a change the task
teacher is run on every crop, CLIP's logits are cached and all is computed in fp32.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from richkd import distill, methods
from richkd.bench.gathered import Contrasted, gathered
from richkd.bench.reference import Pictures, Reference, augmentation
from richkd.config import Config, Loss, Method
from richkd.distill import Task
from richkd.errors import ConfigError
from richkd.losses import similarities
from richkd.progress import Progress
from richkd.steps import Slice, Steps
from richkd.teachers import FusedTeacher
from richkd.threads import one_thread

METHODS = {  # the method of each variant
    "student": "ce",
    **{name: name for name in ("kd", "richkd-l", "crd", "richkd-f", "richkd-lf")},
}
CONTRASTED = ("crd", "richkd-f", "richkd-lf")  # whose teachers are asked for features
CHANGES = {
    "table": ("teacher.views", "exact"),  # its rows are there before the measurement
    "bf16": ("train.precision", "bf16"),
    "live": ("clip.views", "online"),
}
WITHOUT = {
    "student": ("table", "live"),
    "kd": ("live",),
    "crd": ("live",),
}  # what has no such teacher
PLAIN = {"teacher.views": "online", "train.precision": "fp32", "clip.views": "whole"}
REFERENCE = "reference"
WARM_STEPS = 3  # not counted: kernels are chosen, memory is allocated; fewer of slow networks
AGAIN = 1  # blocks of batches of a training whose teacher's table is full
BATCH = 128  # rows that are augmented at a time
FILL = {"cpu": 128, "cuda": 4096}  # rows at a time of which a table is asked


class Loop(Protocol):
    """Something that can be taken a few steps further."""

    def burst(self, steps: int) -> int:
        """Take `steps` steps and return how many images they saw."""


class Variant(NamedTuple):
    """A training to measure: the method, and by what it differs from the plain one."""

    method: str
    changes: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str) -> "Variant":
        """Return the variant of a name; raises ConfigError if there is none."""
        method, *changes = name.split("+")
        if method not in METHODS or not set(changes) <= set(CHANGES):
            raise ConfigError(
                f"--variants must be of {', '.join(METHODS)}, each with any of +{', +'.join(CHANGES)} behind it, "
                f"but got {name!r}; write it like richkd-l+table+bf16."
            )
        found = cls(method, tuple(change for change in CHANGES if change in changes))
        if idle := [change for change in found.changes if change in WITHOUT.get(method, ())]:
            raise ConfigError(
                f"--variants: {name} asks for +{idle[0]}, but {method} has no such teacher; leave it out."
            )
        return found

    def __str__(self) -> str:
        return "+".join((self.method, *self.changes))

    def config(self, base: Config) -> Config:
        """Return the run that the variant is of; its method and the changed keys of `base` are of no effect."""
        settings = PLAIN | dict(CHANGES[change] for change in self.changes)
        if base.teacher.logits is not None and "table" not in self.changes:
            del settings["teacher.views"]  # such a teacher knows no crops
        return changed(of_method(base, METHODS[self.method]), settings)


def wanted(config: Config, names: str | None = None, *, live: bool = False) -> list[Variant]:
    """Return the variants that are asked for.

    Args:
        config: The run.
        names: Of the variants, with commas between them; None takes each method plain, and with what makes it fast.
        live: Whether the variants of Table 12 of the supplement are to be measured, too, with CLIP live and cached.

    Raises:
        ConfigError: If there is no such variant.
    """
    found = default(config) if names is None else [Variant.named(name) for name in names.split(",")]
    return list(dict.fromkeys(found + table12(config) * live))


def table12(config: Config) -> list[Variant]:
    """Return what Table 12 of the supplement compares, with CLIP live, as there, and cached."""
    methods = ["richkd-l", *(("richkd-f", "richkd-lf") if has_features(config) else ())]
    found = [Variant("kd"), *([Variant("crd")] if has_features(config) else ())]
    return found + [Variant(method, each) for method in methods for each in ((), ("live",))]


def has_features(config: Config) -> bool:
    """Whether both teachers are networks, of which features are known."""
    return config.teacher.logits is None and config.clip.logits is None


def default(config: Config) -> list[Variant]:
    """Return what is measured unless it is said: each method plain, and with all that makes it fast."""
    plain = [Variant(method) for method in ("student", "kd", "richkd-l")]
    if config.teacher.logits is not None:  # which know no crops
        return [*plain, Variant("richkd-l", ("bf16",))]
    table = [Variant("kd", ("table",)), Variant("richkd-l", ("table",))]
    if has_features(config):
        table += [Variant("richkd-f", ("table",)), Variant("richkd-lf", ("table",))]
    return [*plain, *table, Variant("richkd-l", ("table", "bf16"))]


def of_method(config: Config, name: str) -> Config:
    """Return `config` with the settings that `name` presets.

    Scale, temperature and weighting stay plain: their values change no speed, and to find relative ones the teacher would have
    to look at all rows first.
    """
    settings = methods.get(name).settings
    loss = {key.removeprefix("loss."): v for key, v in settings.items() if key.startswith("loss.")}
    return replace(
        config,
        method=Method(name=name),
        loss=Loss(**loss),
        fusion=replace(
            config.fusion, alpha=settings["fusion.alpha"], space="logits", weighting="one"
        ),
        clip=replace(config.clip, scale="model"),
    )


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """Return `config` with other values of dotted keys."""
    for key, value in settings.items():
        section, _, field = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config


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
        self.learner = distill.open_learner(config, task, teacher).train()
        self.student = self.learner.student
        optimizer = distill.open_optimizer(config, self.learner)
        batches = distill.open_batches(config, task, distilled=teacher is not None)
        self.steps = Steps(config, self.learner, teacher, optimizer, batches)
        self.blocks = self._endless()

    def _endless(self) -> Iterator[list[tuple[Slice, float]]]:
        """Yield blocks of slices, each with how much of the training lies behind; it begins again where it would end."""
        steps, epochs = len(self.steps.batches), self.config.train.epochs
        for epoch in count():
            done = count((epoch % epochs) * steps)
            for block in islice(self.steps.blocks(0 if self.again else epoch), self.again):
                yield [(part, next(done) / (steps * epochs)) for part in block]

    def fill(self) -> None:
        """Have the teacher say beforehand what it is asked again and again."""
        for _ in islice(self.steps.blocks(0), self.again):
            pass

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


class Crops:
    """Random crops of transfer rows, again and again, of which something is made.

    Args:
        task: The data.
        make: Given rows `(B,)` and views `(B, 3)`.
        rows: B.
    """

    def __init__(self, task: Task, make: Callable[[Tensor, Tensor], object], rows: int) -> None:
        self.transfer, self.views = torch.from_numpy(task.split.transfer), task.train
        self.make, self.rows = make, rows
        self.generator = torch.Generator().manual_seed(0)

    def burst(self, steps: int) -> int:
        """Make something of `steps` batches of crops and return how many images they held."""
        for _ in range(steps):
            chosen = torch.randint(len(self.transfer), (self.rows,), generator=self.generator)
            views = self.views.draw(self.rows, self.generator)
            self.make(self.transfer[chosen], views)
        return steps * self.rows


def open_loops(
    config: Config, task: Task, variants: list[Variant], progress: Progress | None = None
) -> dict[str, Loop]:
    """Return a training for each variant by its name, the loop beside them, and the parts that are measured alone.

    Each training has a student of its own, and all have the same teachers.
    """
    opened: dict[Variant, FusedTeacher] = {}

    def fused(changes: tuple[str, ...], method: str = "richkd-l") -> FusedTeacher:
        asked = Variant(method, changes)
        if asked not in opened:
            opened[asked] = distill.open_teacher(asked.config(config), task, progress)
        return opened[asked]

    def training(variant: Variant) -> Ours:
        own, changes = variant.config(config), tuple(c for c in variant.changes if c != "bf16")
        if variant.method == "student":
            return Ours(own, task, None)
        contrasts = variant.method in CONTRASTED
        teacher = fused(changes, variant.method) if contrasts else fused(changes)
        if variant.method == "kd":
            teacher = FusedTeacher(own, task.split, task.labels, teacher.task, [])
        if "table" not in changes:
            return Ours(own, task, teacher)
        ours = Ours(own, task, teacher, AGAIN)
        ours.fill()
        return ours

    plain = fused(())
    loops: dict[str, Loop] = {str(variant): training(variant) for variant in variants}
    loops[REFERENCE] = Reference(Variant("richkd-l").config(config), task, plain)
    if plain.task.network is not None:
        loops["fill"] = Crops(task, plain.task.logits, FILL[task.device.type])
    pictures = Pictures(task, augmentation(task.dataset))
    there = task.device if task.train.view is not None else torch.device("cpu")
    own = one_threaded(lambda *crops: task.train.images(*(each.to(there) for each in crops)))
    pil = one_threaded(lambda rows, _: torch.stack([pictures.view(row) for row in rows]))
    loops |= {"augment": Crops(task, own, BATCH), "pil": Crops(task, pil, BATCH)}
    if any(variant.method in CONTRASTED for variant in variants):
        loops["contrast"] = Contrasted(config, task, similarities)
        loops["gather"] = Contrasted(config, task, gathered)
    return loops


def one_threaded(make: Callable[..., object]) -> Callable[..., object]:
    """Return `make` computed on one thread of the CPU."""

    def made(*given: object) -> object:
        with one_thread():
            return make(*given)

    return made


def timed(loop: Loop, steps: int, device: torch.device) -> tuple[int, float]:
    """Return how many images a burst of `steps` steps saw, and the seconds that it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    images = loop.burst(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return images, time.perf_counter() - began


def speed(loop: Loop, steps: int, device: torch.device) -> float:
    """Return the images per second of a burst of `steps` steps."""
    images, seconds = timed(loop, steps, device)
    return images / seconds


def burst_length(loop: Loop, seconds: float, device: torch.device) -> int:
    """Warm `loop` up and return how many of its steps take about `seconds`."""
    for _ in range(WARM_STEPS):
        _, each = timed(loop, 1, device)
        if each > seconds:
            break  # to such a step what the first one does once is nothing
    return max(1, round(seconds / each))
