"""Images per second and memory of training on this machine, beside those of a loop as it is usually written.

    python -m richkd bench                                  # the embedded digits
    python -m richkd bench my.yaml student.name=resnet8x4 --seconds=60 --json
    python -m richkd bench my.yaml --variants=kd+table,richkd-l+table+bf16
    python -m richkd bench my.yaml --table12                # CLIP live and cached, as in the paper's supplement

A variant takes the steps of a run: `student` learns from the labels alone, `kd` from the task teacher, `richkd-l` from both
teachers, `crd`, `richkd-f` and `richkd-lf` from features, too. Behind the method stands what is changed about it:

    +table    the task teacher's logits of each crop come from its table (teacher.views=exact), which is full: the batches
              of a burst are a small fixed set whose rows are asked for beforehand
    +bf16     the student's layers are computed in bf16 (train.precision=bf16)
    +live     CLIP looks at each crop (clip.views=online)

`reference` does the job of `richkd-l` with PIL images, a DataLoader and the losses written out. All run in turn, a short
burst each, so that what else the machine does meets all of them alike. The JSON object is, but for what describes machine
and job:

    rates       what the machine was measured to do in a second: FLOPs of a matrix product or a convolution in fp32, tf32
                and bf16, bytes that a copy reads and writes, launches; tf32 and launches are null on a CPU
    work        flops, outputs, weights, launches of student and teacher, see `floors.Work`
    rounds      how often each was measured
    variants    of each its images_per_second (median), low and high (quartiles), ratio (median of its speed by the
                reference's in the same round), seconds_per_epoch, memory (bytes at most) and floor: the least seconds an
                image by flops, bytes and launches, the images_per_second that they allow, and which of them binds
    parts       images per second, low and high of what is measured alone: fill (teacher over random crops, as a table is
                filled), augment and pil (batches of 128 random crops as `Views.images` and torchvision make them), contrast
                and gather (both sides of the loss of contrast, forward and backward, as it is and with copied rows)
    ratios      medians over pairs of bursts of the same round: richkd-l/reference:bf16 and :fp32, richkd-l/kd, richkd-f/kd
                and richkd-lf/kd with the table full, augment/pil, contrast/gather; one whose variants were not measured is
                left out
    errors      their standard errors
    computed    see `computed`; {} where nothing is filled
"""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from richkd import distill, zeroshot
from richkd.bench import floors, memory
from richkd.bench.reference import Reference
from richkd.bench.variants import (
    REFERENCE,
    Loop,
    Ours,
    Variant,
    burst_length,
    of_method,
    open_loops,
    speed,
)
from richkd.config import Config
from richkd.distill import Task
from richkd.errors import ConfigError, Interrupted
from richkd.progress import Progress, stoppable

__all__ = ["Ours", "burst_length", "measure", "of_method", "speed"]

SECONDS = 20.0  # of a measurement, unless said otherwise
ROUNDS = 10  # that are aimed at
LEAST_ROUNDS = 3  # also if they take longer than asked, as with slow networks
PARTS = ("fill", "augment", "pil", "contrast", "gather")
OF_QUARTILES = (
    1.2533 / 1.3490
)  # error of a median by that of a mean; between quartiles lie 1.349 deviations
SLOW = 10  # times as long as a burst: what the first steps of a loop may take before it gets no others to warm up
FEW = 2  # images on which work is counted
TRIALS = 10  # of the sweep that is computed


def compared(config: Config) -> dict[str, tuple[str, str]]:
    """Return by name the pairs of loops whose speeds are compared."""
    full = "" if config.teacher.logits is not None else "+table"
    return {
        "richkd-l/reference:bf16": (f"richkd-l{full}+bf16", REFERENCE),
        "richkd-l/reference:fp32": (f"richkd-l{full}", REFERENCE),
        "richkd-l/kd": (f"richkd-l{full}", f"kd{full}"),
        "richkd-f/kd": (f"richkd-f{full}", f"kd{full}"),
        "richkd-lf/kd": (f"richkd-lf{full}", f"kd{full}"),
        "augment/pil": ("augment", "pil"),
        "contrast/gather": ("contrast", "gather"),
    }


def measure(
    config: Config,
    variants: list[Variant],
    seconds: float = SECONDS,
    progress: Progress | None = None,
    stop: Callable[[], int | None] = lambda: None,
) -> dict[str, Any]:
    """Measure how fast each variant trains with the data, student and teachers of `config`, and in how much memory.

    Args:
        config: The run; its method and the keys that variants change are of no effect.
        variants: What to measure beside the reference.
        seconds: How long to measure in all; three rounds are made in any case. Preparations come on top.
        progress: Called with what is being prepared, or measured, done and total.
        stop: Asked before each burst; a signal number ends the measurement.

    Returns:
        Plain JSON, as above.

    Raises:
        ConfigError: If something does not fit together.
        Interrupted: If `stop` said so.
    """
    if config.data.augment != "crop":
        raise ConfigError(
            f"bench measures crops, beside a loop that crops, but data.augment={config.data.augment}; use data.augment=crop."
        )
    told = stoppable(progress, stop)
    task = distill.open_task(config, told)
    device = task.device

    def before_a_burst(percent: int) -> None:
        if (signum := stop()) is not None:
            raise Interrupted(signum, "interrupted while measuring; nothing is kept of it")
        if progress is not None:
            progress("measurement", percent, 100)

    # torchvision draws from the global generator
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loops = open_loops(config, task, variants, told)
        before_a_burst(0)
        rates = floors.rates(device)
        both = [name for name in loops if name in compared(config)["richkd-l/kd"]]
        rounds = Rounds(loops, both if len(both) == 2 else [], device)
        rounds.take(seconds, before_a_burst)
        # once more, since other work may have come or gone
        rates = floors.faster(rates, floors.rates(device))
    if progress is not None:
        progress("measurement", 100, 100)
    return described(config, task) | figures(config, task, rounds, rates)


class Rounds:
    """Bursts of loops in turn.

    Args:
        loops: By name.
        both: Names of two that are compared closely, in the order of `loops`: each round ends with them the other way
            round. Or none.
        device: Where they run.

    Attributes:
        memory: Bytes that each training takes at most.
        speeds: Images per second of each loop, round by round.
        again: Of the two in the end of each round.
    """

    def __init__(self, loops: dict[str, Loop], both: list[str], device: torch.device) -> None:
        self.loops, self.both, self.device = loops, both, device
        self.memory: dict[str, int] = {}
        self.speeds: dict[str, list[float]] = {name: [] for name in loops}
        self.again: dict[str, list[float]] = {name: [] for name in both}

    def take(self, seconds: float, before_a_burst: Callable[[int], None]) -> None:
        """Warm up, then measure for so long in all; `before_a_burst` is told how many percent are done."""
        each = seconds / ((len(self.loops) + len(self.both)) * ROUNDS)
        began = time.perf_counter()
        steps = {}
        for name in self.loops:
            before_a_burst(0)
            steps[name] = self._warmed_up(name, each)
        while (taken := time.perf_counter() - began) < seconds or self.count < LEAST_ROUNDS:
            once = [(name, self.speeds) for name in self.loops]
            for name, found in [*once, *((name, self.again) for name in self.both[::-1])]:
                before_a_burst(min(int(100 * taken / seconds), 99))
                found[name].append(speed(self.loops[name], steps[name], self.device))

    def _warmed_up(self, name: str, seconds: float) -> int:
        """Take a loop's first steps and return how many of them take about `seconds`."""
        loop, began = self.loops[name], time.perf_counter()
        if isinstance(loop, Ours | Reference):
            self.memory[name] = memory.peak(loop, self.device)
        if time.perf_counter() - began > SLOW * seconds:
            return 1
        return burst_length(loop, seconds, self.device)

    @property
    def count(self) -> int:
        """Number of rounds so far."""
        return len(self.speeds[REFERENCE])

    def pairs(self, one: str, other: str) -> list[tuple[float, float]]:
        """Return the speeds of two loops wherever one was measured beside the other."""
        found = list(zip(self.speeds[one], self.speeds[other], strict=True))
        if {one, other} == set(self.both):
            found += zip(self.again[one], self.again[other], strict=True)
        return found


def figures(
    config: Config, task: Task, rounds: Rounds, rates: dict[str, float | None]
) -> dict[str, Any]:
    """Return what was found, without what describes machine and job."""
    work = worked(config, task, rounds.loops)
    order = torch.cat(distill.open_batches(config, task, distilled=True).order(0))
    usual = "tf32" if rates["tf32"] and torch.backends.cudnn.allow_tf32 else "fp32"
    variants = {}
    for name, taken in rounds.memory.items():
        own = summary(rounds.speeds[name])
        doing = done(name, work, config.teacher.precision, usual)
        variants[name] = own | {
            "ratio": ratio(rounds.pairs(name, REFERENCE))[0],
            "seconds_per_epoch": len(order) / own["images_per_second"],
            "memory": taken,
            "floor": floors.floor(doing, config.train.batch_size, rates),
        }
    ratios = {
        name: ratio(rounds.pairs(*pair))
        for name, pair in compared(config).items()
        if set(pair) <= set(rounds.loops)
    }
    parts = {name: summary(rounds.speeds[name]) for name in PARTS if name in rounds.loops}
    return {
        "rates": rates,
        "work": {name: asdict(each) for name, each in work.items()},
        "rounds": rounds.count,
        "variants": variants,
        "parts": parts,
        "ratios": {name: median for name, (median, _) in ratios.items()},
        "errors": {name: error for name, (_, error) in ratios.items()},
        "computed": computed(config, task, order, variants, parts),
    }


def summary(speeds: list[float]) -> dict[str, float]:
    """Return median and quartiles of the rounds' `speeds`."""
    low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
    return {"images_per_second": median, "low": low, "high": high}


def ratio(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Return the median of the ratios of pairs of speeds, and its standard error.

    The error is that of a normal law with the quartiles of the ratios: a few that other work disturbed do not count.
    """
    low, median, high = statistics.quantiles(
        [one / other for one, other in pairs], n=4, method="inclusive"
    )
    return median, OF_QUARTILES * (high - low) / math.sqrt(len(pairs))


def worked(config: Config, task: Task, loops: dict[str, Loop]) -> dict[str, floors.Work]:
    """Return what the student does in a step, and the teachers that are run in some loop in a look at as many images."""
    reference = loops[REFERENCE]
    images = task.train.images(torch.from_numpy(task.split.transfer[:FEW]))
    found = {"student": floors.work(reference.student, images, training=True)}
    if reference.teacher is not None:
        found["teacher"] = floors.work(reference.teacher, images, training=False)
    if any("+live" in name for name in loops):
        own = config.clip
        clip = zeroshot.load(
            own.model, own.pretrained, own.file, device=task.device, root=task.cache
        )
        pictures = list(task.dataset.train.pictures(0, FEW))
        found["clip"] = floors.work(*tower(clip.encoder, pictures), training=False)
    return found


def tower(encoder: zeroshot.Encoder, pictures: list[Image.Image]) -> tuple[nn.Module, Tensor]:
    """Return the image tower of a CLIP, and those pictures as it sees them."""
    network, seen = encoder.network.visual, []
    hook = network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    encoder.encode_images(pictures)
    hook.remove()
    return network, seen[0]


def done(
    name: str, work: dict[str, floors.Work], teacher: str, usual: str
) -> list[tuple[floors.Work, str]]:
    """Return what a loop does for a batch, and in which precision.

    Args:
        name: Of the loop.
        work: As `worked` returns it.
        teacher: Precision in which the task teacher is run here.
        usual: Precision of convolutions of which nothing is said.
    """
    method, *changes = name.split("+")
    found = [(work["student"], "bf16" if "bf16" in changes else usual)]
    if "teacher" in work and method != "student" and "table" not in changes:
        found.append((work["teacher"], usual if method == REFERENCE else teacher))
    if "live" in changes:
        found.append((work["clip"], usual))
    return found


def computed(
    config: Config,
    task: Task,
    order: Tensor,
    variants: dict[str, dict[str, Any]],
    parts: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Compute what training takes in which a table is filled as it goes, from the measured rates.

    An image has V views. One that is drawn n times over all epochs needs V (1 - (1 - 1 / V)^n) rows of the table, each
    computed once. The trials of a sweep have one seed and so meet the same views: the first one pays for all.

    Returns:
        Plain JSON: `epochs`, `views` (V), `fills` (rows of the table an image needs), `variant` (whose steps are taken: the
        faster one), `first_run` and `sweep_of_10` (how many times faster than the reference a run is alone, and a trial of
        ten), and of both the `seconds_per_epoch`. Nothing if there is no table, or none was measured.
    """
    names = [name for name in ("richkd-l+table+bf16", "richkd-l+table") if name in variants]
    if not names or "fill" not in parts:
        return {}
    epochs, views = config.train.epochs, task.train.count
    fastest = min(names, key=lambda name: variants[name]["seconds_per_epoch"])
    fills = filled(torch.bincount(order) * epochs, views)
    filling = fills / parts["fill"]["images_per_second"] / epochs
    stepping, usual = (variants[name]["seconds_per_epoch"] for name in (fastest, REFERENCE))
    first, later = stepping + filling, stepping + filling / TRIALS
    return {
        "epochs": epochs,
        "views": views,
        "fills": fills / len(task.split.transfer),
        "variant": fastest,
        "first_run": usual / first,
        f"sweep_of_{TRIALS}": usual / later,
        "seconds_per_epoch": {"first_run": first, f"sweep_of_{TRIALS}": later},
    }


def filled(draws: Tensor, views: int) -> float:
    """Return how many views of all images are expected to occur where each image is drawn `draws` `(N,)` times."""
    return float(views * (1 - (1 - 1 / views) ** draws.double()).sum())


def described(config: Config, task: Task) -> dict[str, Any]:
    """Return what a measurement was made with: the machine and the job."""
    device = task.device
    given, clip = config.teacher, config.clip
    teacher = "given logits" if given.logits is not None else given.name
    if given.checkpoint is not None and not Path(given.checkpoint).is_file():
        teacher = given.checkpoint  # a run or checkpoint of richkd knows its network itself
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "pillow")}
        | {"python": platform.python_version()},
        "data": task.dataset.name,
        "size": list(task.dataset.size),
        "student": config.student.name,
        "teacher": teacher,
        "clip": "given logits" if clip.logits is not None else clip.model,
        "batch_size": config.train.batch_size,
    }


def processor() -> str:
    """Return the name of the CPU, where the system says it, and the instructions that PyTorch uses."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
