"""What a run needs and costs on this machine: from a look at the cache and a few steps, never from a whole training.

For plans: what would have to be computed first is not computed, but told with its size and time.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from richkd import bench, cache, distill, models, teachers, zeroshot
from richkd.config import Config, Fusion
from richkd.data import Images, Views, split
from richkd.distill import Task
from richkd.errors import ConfigError, CorruptError
from richkd.evaluate.accuracy import accuracy, network_logits
from richkd.progress import Progress
from richkd.record import Record
from richkd.steps import ALONE, check_slices
from richkd.teachers import ClipTeacher, FusedTeacher, TaskTeacher
from richkd.threads import threads

# kinds of the cache that take their time, or room
LONG = ("teachers", "clip-images", "teacher-logits", "teacher-views")
BURSTS = 5  # of steps that are timed
BURST_SECONDS = 0.25  # of each, where they go on side by side
ROWS, FEW = 2048, 64  # of a pass that is timed; of a slow network's
SLOW = 0.5  # seconds of a pass over few rows
WRITES = 3  # pairs of epochs whose writing is timed
WIDTH = 512  # of CLIP's features, where none are looked at
PICTURES = 16  # that CLIP is timed on
CROPS = 128  # that the task teacher is timed on
LATENCY_SECONDS = 0.5
LATENCY_TIMES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """What one run costs here, as measured.

    Attributes:
        opening: Seconds to open data and student.
        step: Seconds of a step of the optimiser.
        steps: Steps of an epoch.
        validation: Seconds of a pass over the rows that epochs are chosen on.
        writing: Seconds of what is written in an epoch.
        testing: Seconds of a pass over the test rows.
        kept: Bytes of the checkpoints that a run leaves.
    """

    opening: float
    step: float
    steps: int
    validation: float
    writing: float
    testing: float
    kept: int

    @property
    def epoch(self) -> float:
        """Seconds of an epoch."""
        return self.steps * self.step + self.validation + self.writing

    def run(self, epochs: float, *, tested: bool = False) -> float:
        """Return the seconds of a run of so many epochs, the test rows read in the end or not."""
        return self.opening + epochs * self.epoch + tested * self.testing


@dataclass(frozen=True, kw_only=True, slots=True)
class Lack:
    """Something that the cache has not got: what it is, its bytes, and the seconds that it takes here."""

    what: str
    bytes: int
    seconds: float


def gpus() -> int:
    """Return how many GPUs PyTorch sees on this machine."""
    return torch.cuda.device_count()


def size(config: Config, task: Task) -> int:
    """Return how many parameters the student has."""
    return sum(each.numel() for each in distill.initial_student(config, task.dataset).parameters())


@torch.inference_mode()
def latency(config: Config, task: Task) -> float:
    """Return the milliseconds in which the student answers for one image here, on `device` and one thread.

    It is the median of LATENCY_SECONDS of answers, at least LATENCY_TIMES of them, after as many to warm up: a mean
    would hold what else the machine did. Untrained weights take as long as trained ones.
    """
    student = distill.open_student(config, task).eval()
    image = torch.zeros(1, task.dataset.channels, *task.dataset.size, device=task.device)
    image = image.to(memory_format=torch.channels_last)
    taken: list[float] = []
    with threads(1):
        for _ in range(LATENCY_TIMES):
            student(image).cpu()
        while sum(taken) < LATENCY_SECONDS or len(taken) < LATENCY_TIMES:
            began = time.perf_counter()
            student(image).cpu()  # which waits for a GPU, too
            taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)


def plain(config: Config) -> Config:
    """Return `config` with the scale and temperature that need no look at all rows, which change no speed."""
    return replace(
        config,
        loss=replace(config.loss, temperature_of="fused"),
        clip=replace(config.clip, scale="model"),
    )


def online(config: Config) -> Config:
    """Return `config` with a task teacher that keeps nothing of what it says of crops."""
    if config.teacher.logits is not None or config.teacher.views == "single":
        return config
    return replace(config, teacher=replace(config.teacher, views="online"))


def alone(config: Config) -> Config:
    """Return `config` with the task teacher alone."""
    return replace(plain(config), fusion=Fusion(alpha=1.0))


def mistakes(config: Config, task: Task, progress: Progress | None = None) -> list[str]:
    """Return why student, task teacher or zero-shot teachers cannot be used with the data of `task`, a line each.

    What takes its time and is not in the cache is not made, and so not looked at.
    """

    def student() -> None:
        network = distill.initial_student(config, task.dataset)
        batches = distill.open_batches(config, task, distilled=True)
        check_slices(batches, network, ALONE)

    def trained() -> None:
        if not config.teacher.brought:
            untrained_teacher(config, task)
            recipe = teachers.teacher_recipe(config)
            distill.open_batches(recipe, distill.open_task(recipe, beside=task), distilled=False)

    def clips() -> None:
        found = teachers.open_clip_teachers(
            config.clip, task.dataset, task.device, task.cache, progress
        )
        distill.check_teachers(config.teacher, task, None, found)

    told: dict[str, None] = {}
    for look in (
        student,
        trained,
        clips,
        lambda: distill.open_teacher(online(alone(config)), task, progress),
        lambda: distill.open_teacher(online(config), task, progress),
    ):
        with contextlib.suppress(cache.Missing), cache.found_only(*LONG):
            try:
                look()
            except (ConfigError, CorruptError) as error:
                told[str(error)] = None
    return list(told)


def untrained_teacher(config: Config, task: Task) -> nn.Module:
    """Return the network of a task teacher that is trained here, before its training."""
    dataset, given = task.dataset, config.teacher
    with torch.random.fork_rng(devices=[]):
        network = models.build(
            given.name,
            len(dataset.names),
            channels=dataset.channels,
            size=dataset.size if given.size is None else (given.size, given.size),
            shortcut=given.shortcut,
        )
    if given.size is not None:
        network = teachers.Resized(network, given.size)
    models.check_size(network, dataset.channels, dataset.size, field=f"teacher.name={given.name}")
    return network


@dataclass(kw_only=True, eq=False)
class LookedUp(TaskTeacher):
    """A task teacher whose answers lie ready: random ones, the same for every FEW-th row."""

    def __post_init__(self) -> None:
        width = self.classes + sum(self.sizes)
        self.known = torch.randn(FEW, width, device=self.train_views.device)

    def said(self, rows: Tensor, views: Tensor, pixels: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return logits `(B, K)` of those rows, and what is beside them."""
        return self.known[rows % FEW].split((self.classes, *self.sizes), 1)


def stand_in(config: Config, task: Task) -> FusedTeacher:
    """Return a teacher as fast as that of `config`: untrained where it would be trained, what is looked up random."""
    size, classes = len(task.dataset.train), len(task.dataset.names)
    # the same for all, since a table of a large data set takes GiB
    logits = torch.randn(1, classes, device=task.device).expand(size, classes)
    own = _own(config, task)
    if _views_of(config, task, own) in ("exact", "single"):
        own = LookedUp(**{each.name: getattr(own, each.name) for each in fields(own)})
    live = [
        zeroshot.crop_features(
            teachers.model_of(given, task.device, task.cache), "online", task.dataset, task.cache
        )
        for _, given, _ in teachers.shares(config.clip)
        if given.views == "online"
    ]

    def crops(rows: Tensor, views: Tensor) -> Tensor:
        for look in live:
            look(rows, views)
        return logits[rows]

    images = torch.randn(FEW, WIDTH, device=task.device)
    clip = ClipTeacher(
        identity="random",
        train=logits,
        test=None,
        logit_scale=1.0,
        crops=crops if live else None,
        features=lambda rows, views: images[rows % FEW],
        width=WIDTH,
    )
    return FusedTeacher(plain(config), task.split, task.labels, own, [clip])


def _views_of(config: Config, task: Task, own: TaskTeacher) -> str | None:
    """Return how the task teacher meets crops, None if its logits are given."""
    given, width = config.teacher, own.classes + sum(own.sizes)
    if given.logits is not None:
        return None
    return teachers.views_in_use(given, task.train, width, config.train.epochs)


def _own(config: Config, task: Task) -> TaskTeacher:
    """Return the task teacher, run online; an untrained one in place of one that has still to be trained."""
    config = online(alone(config))
    try:
        with cache.found_only(*LONG):
            return distill.open_teacher(config, task).task
    except cache.Missing:
        network = untrained_teacher(config, task).eval().requires_grad_(False)
        network = network.to(task.device, memory_format=torch.channels_last)
        beside = distill.asked_beside(config, task)
        if beside is not None:
            image = torch.zeros(1, task.dataset.channels, *task.dataset.size, device=task.device)
            network = teachers.Outputs(network, beside, image)
        return TaskTeacher(
            identity="untrained",
            classes=len(task.dataset.names),
            train_views=task.train,
            test_views=task.test,
            network=network,
        )


def untold(config: Config, task: Task, epochs: dict[int, float]) -> Lack | None:
    """Return what task teachers will have to say of crops for their tables, None where it is not kept.

    Args:
        config: The run.
        task: Its data.
        epochs: Of each seed whose teacher is asked, the epochs of runs of which no two meet the same crops.
    """
    own, views = _own(config, task), task.train.count
    if _views_of(config, task, own) != "exact":
        return None
    crops = len(task.split.transfer) * views
    rows = 0
    for seed, count in epochs.items():
        seeded = replace(task, split=split(task.dataset, config.data, seed, config.selection))
        unknown = _unknown(replace(config, seed=seed), seeded)
        rows += round(unknown * crops * (1 - (1 - 1 / views) ** count))
    some = torch.from_numpy(task.split.transfer)[:CROPS]
    crop = task.train.draw(len(some), torch.Generator().manual_seed(0))
    for _ in range(2):  # the first pass traces the network
        began = time.perf_counter()
        own.logits(some, crop).cpu()  # which waits for a GPU, too
    each = (time.perf_counter() - began) / len(some)
    what = f"task teacher over {rows} crops, of {crops * len(epochs)} that there are"
    size = np.dtype(teachers.DTYPES[config.teacher.table]).itemsize
    size *= own.classes + sum(own.sizes)
    return Lack(what=what, bytes=rows * size, seconds=rows * each)


def _unknown(config: Config, task: Task) -> float:
    """Return which share of the task teacher's table has still to be computed."""
    try:
        with cache.found_only(*LONG):
            table = distill.open_teacher(alone(config), task).task.table
    except cache.Missing:
        return 1.0
    return 1 - table.known() / len(table)


def pace(
    config: Config,
    task: Task,
    teacher: FusedTeacher | None,
    folder: Path,
    *,
    seconds: float,
    workers: int = 1,
    each: int = 1,
) -> Pace:
    """Take some steps of a run, a pass and two checkpoints, and return what they cost.

    Args:
        config: The run.
        task: Its data.
        teacher: None where nothing is distilled.
        folder: New folder for the checkpoints, on the disk where runs will lie.
        seconds: How long to measure steps.
        workers: That share each batch; one's slice is timed, without what they say to each other.
        each: Threads of a worker.
    """
    device, (views, rows, labels) = task.device, task.judged
    steps = len(distill.open_batches(config, task, distilled=teacher is not None))
    slices = replace(config.train, batch_size=max(2, -(-config.train.batch_size // workers)))
    with threads(each):
        ours = bench.Ours(replace(config, train=slices), task, teacher)
        began = time.perf_counter()
        distill.open_student(config, distill.open_task(config))
        opening = time.perf_counter() - began
        length = bench.burst_length(ours, seconds / BURSTS, device)
        speed = statistics.median(bench.speed(ours, length, device) for _ in range(BURSTS))
        passing = _row_seconds(ours.student, views, rows, labels)
    writing, kept = _keep(config, task, ours, folder)
    return Pace(
        opening=opening,
        step=slices.batch_size / speed,
        steps=steps,
        validation=passing * len(rows) / workers,
        writing=writing,
        testing=2 * passing * len(task.dataset.test),  # the best epoch's student and the last one's
        kept=kept,
    )


class Training:
    """A run's steps for as long as one asks, beside others on the same device: to see how many go together.

    Args:
        config: The run; what it would have to compute first is not computed.
        count: Threads.
    """

    def __init__(self, config: Config, count: int) -> None:
        torch.set_num_threads(count)
        task = distill.open_task(config)
        self.device = task.device
        self.ours = bench.Ours(config, task, stand_in(config, task))
        self.length = bench.burst_length(self.ours, BURST_SECONDS, self.device)

    def train(self, seconds: float) -> float:
        """Train for so many seconds, and return the median of the bursts' images a second."""
        end, speeds = time.perf_counter() + seconds, []
        while not speeds or time.perf_counter() < end:
            speeds.append(bench.speed(self.ours, self.length, self.device))
        return statistics.median(speeds)

    def memory(self) -> float:
        """Return the share of a GPU's memory that all of its processes hold, contexts included; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0.0
        free, total = torch.cuda.mem_get_info(self.device)
        return 1 - free / total


def _row_seconds(network: nn.Module, views: Views, rows: Tensor, labels: Tensor) -> float:
    """Return the seconds that a row takes in an evaluation; `labels` are those rows' own."""
    for count in (FEW, ROWS, ROWS):  # the first pass of a size allocates memory
        some, began = rows[:count], time.perf_counter()
        accuracy(network_logits(network, views, some).cpu(), labels[:count])
        taken = time.perf_counter() - began
        if taken > SLOW:
            break  # of such a network a few tell enough
    return taken / len(some)


def _keep(config: Config, task: Task, ours: bench.Ours, folder: Path) -> tuple[float, int]:
    """Return the seconds of what is written in an epoch, in every second of which the best is, and the bytes that stay."""
    record = Record(folder, config, resume=False)
    record.open(task.dataset, task.split, None, 1)
    record.begin(ours.learner, ours.steps.optimizer, 0)
    numbers = dict.fromkeys((f"number {k}" for k in range(12)), math.pi)  # as many as an epoch has
    best = {"epoch": 1, "top1": math.pi, "top5": math.pi, "loss": math.pi}
    for epoch in range(1, 2 * WRITES + 2):
        if epoch == 2:  # the first one makes what the others replace
            began = time.perf_counter()
        kept = best | {"epoch": epoch - epoch % 2}
        record.epoch(ours.learner, ours.steps.optimizer, numbers | {"epoch": epoch}, kept)
    seconds = (time.perf_counter() - began) / (2 * WRITES)
    return seconds, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def untrained(config: Config, task: Task, seeds: Iterable[int]) -> list[int]:
    """Return for which of `seeds` the task teacher has still to be trained."""
    found = []
    for seed in () if config.teacher.brought else seeds:
        own = replace(task, split=split(task.dataset, config.data, seed, config.selection))
        try:
            with cache.found_only("teachers"):
                distill.trained_teacher(replace(config, seed=seed), own)
        except cache.Missing:
            found.append(seed)
    return found


def teacher_pace(config: Config, task: Task, folder: Path, *, seconds: float) -> Pace:
    """Return what the training of a task teacher costs here, as `pace` does."""
    recipe = teachers.teacher_recipe(config)
    same = recipe.data.size == config.data.size
    task = distill.open_task(recipe, beside=task if same else None)
    return pace(recipe, task, None, folder, seconds=seconds)


def unseen(config: Config, task: Task, progress: Progress | None = None) -> list[Lack]:
    """Return which images, whole or in a stored view, the zero-shot teachers that have a share have not seen, by model."""
    found = []
    for _, given, _ in teachers.shares(config.clip):
        if given.logits is not None:
            continue
        clip, parts = teachers.model_of(given, task.device, task.cache, progress), []
        for part in zeroshot.looks(given.views, task.dataset):
            try:
                with cache.found_only("clip-images"):
                    zeroshot.image_features(clip, part, task.cache)
            except cache.Missing:
                parts.append(part)
        if rows := sum(map(len, parts)):
            what = f"{given.model} over {rows} images"
            seconds = rows * _look_seconds(clip, parts[0])
            found.append(Lack(what=what, bytes=4 * rows * clip.width, seconds=seconds))
    return found


def unjudged(config: Config, task: Task) -> list[Lack]:
    """Return of how many images a task teacher that is there has not said its logits; one that is trained soon will."""
    try:
        with cache.found_only("teachers"):
            own = distill.open_teacher(online(alone(config)), task).task
    except cache.Missing:
        return []
    rows = 0
    for part in ("train", "test"):
        try:
            with cache.found_only("teacher-logits"):
                getattr(own, part)
        except cache.Missing:
            rows += len(getattr(task.dataset, part))
    if rows == 0:
        return []
    labels = torch.from_numpy(task.dataset.test.labels)
    seconds = rows * _row_seconds(own.network, own.test_views, torch.arange(len(labels)), labels)
    what = f"task teacher over {rows} images"
    return [Lack(what=what, bytes=4 * rows * own.classes, seconds=seconds)]


def _look_seconds(clip: zeroshot.ZeroShot, images: Images | zeroshot.Crops) -> float:
    """Return the seconds that CLIP takes over an image."""
    clip.encoder.encode_images(images.pictures(0, 1))  # the first allocates memory
    some = min(PICTURES, len(images))
    began = time.perf_counter()
    clip.encoder.encode_images(images.pictures(0, some))
    return (time.perf_counter() - began) / some
