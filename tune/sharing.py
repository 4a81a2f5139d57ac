"""How many trials share a GPU: as many as so many trainings side by side, on one of the cluster's, find worth it.

A student of small images leaves most of a GPU idle, since it waits for its host. `resources.trials_per_gpu=auto` has
1, 2, 4, ... processes train the sweep's student for some seconds each, before the sweep's trials.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from richkd import estimate
from richkd.config import Config
from richkd.errors import RichkdError
from richkd.files import read_record, write_json
from richkd.progress import Progress
from tune.settings import Resources

SHARING_FILE = "sharing.json"  # what was measured, so that a sweep that goes on need not
GAIN = 1.1  # by which twice as many have to be faster in all
ROOM = 0.8  # of a GPU's memory; the rest is for evaluations, and for what else is there
MOST = 16
SECONDS = 4.0  # of steps of each number
PATIENCE = 60.0  # seconds that a GPU of the cluster may take to be free


@dataclass(frozen=True, kw_only=True, slots=True)
class Tried:
    """So many trainings side by side on a GPU: images a second of all of them, and the share of its memory in use."""

    trials: int
    images_per_second: float
    memory: float


def chosen(tried: Sequence[Tried]) -> int:
    """Return the last number of trials that was worth doubling to: a tenth faster in all, and with room in memory."""
    best = tried[0]
    for each in tried[1:]:
        if each.memory > ROOM or each.images_per_second < GAIN * best.images_per_second:
            break
        best = each
    return best.trials


def slower(tried: Sequence[Tried]) -> float:
    """Return by how much longer a step takes where as many trials as were chosen share a GPU; nothing tried: 1."""
    if not tried:
        return 1.0
    count = chosen(tried)
    shared = next(each for each in tried if each.trials == count)
    return count * tried[0].images_per_second / shared.images_per_second


def widen(measure: Callable[[int], Tried], most: int) -> list[Tried]:
    """Measure 1, 2, 4, ... up to `most` trainings side by side, until doubling is not worth it or would not fit."""
    tried = [measure(1)]
    while (
        chosen(tried) == tried[-1].trials
        and 2 * tried[-1].trials <= most
        and 2 * tried[-1].memory <= ROOM
    ):
        tried.append(measure(2 * tried[-1].trials))
    return tried


def at_most(resources: Resources, nodes: list[dict[str, float]], runs: int, *, gpu: bool) -> int:
    """Return how many trials a GPU might have: there are CPUs for them, and `runs` enough for each GPU; 1: nothing to ask.

    Args:
        resources: What a trial takes.
        nodes: CPUs and GPUs of each machine.
        runs: That could go on at once, had they the place.
        gpu: Whether a GPU is used where there is one.
    """
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if resources.trials_per_gpu != "auto" or resources.workers > 1 or not (gpu and with_gpus):
        return 1
    cpus = max(
        node.get("CPU", 0) // (resources.cpus_per_worker * node["GPU"]) for node in with_gpus
    )
    busy = -(-min(runs, resources.max_concurrent or runs) // sum(node["GPU"] for node in with_gpus))
    return max(1, int(min(MOST, cpus, busy)))


def measured(
    config: Config, resources: Resources, most: int, progress: Progress | None = None
) -> list[Tried]:
    """Measure on a GPU of the cluster that this process is connected to.

    Args:
        config: The run; what it would have to compute first is not computed.
        resources: What a trial takes.
        most: Trials a GPU.
        progress: Called about once a second; may raise to stop.

    Raises:
        RichkdError: If no GPU is free for PATIENCE seconds, or not even one training goes.
    """
    import ray  # takes seconds to import
    from ray.exceptions import RayError
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    cpus = resources.cpus_per_worker
    group = placement_group([{"CPU": most * cpus, "GPU": 1}])  # all of them on one GPU
    actors: list[Any] = []

    def answers(waiting: list[ray.ObjectRef]) -> list[Any]:
        asked = waiting
        while waiting:
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=1)
            if progress is not None:
                progress("trials a GPU", 0, 1)
        return ray.get(asked)

    def measure(count: int) -> Tried:
        try:
            actors.extend(place.remote(config, cpus) for _ in range(count - len(actors)))
            answers([actor.memory.remote() for actor in actors])  # all are open
            speeds = answers([actor.train.remote(SECONDS) for actor in actors])
            shares = answers([actor.memory.remote() for actor in actors])
        except RayError as error:  # as for want of memory
            if count == 1:
                reason = " ".join(str(error).split())[-200:]
                raise RichkdError(f"not even one training goes ({reason})") from error
            return Tried(trials=count, images_per_second=0.0, memory=1.0)
        return Tried(trials=count, images_per_second=sum(speeds), memory=max(shares))

    try:
        if not group.wait(PATIENCE):
            raise RichkdError(f"no GPU was free within {PATIENCE:g} s")
        place = ray.remote(estimate.Training).options(
            num_cpus=cpus,
            num_gpus=1 / most,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group),
        )
        return widen(measure, most)
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)


def settled(
    resources: Resources,
    nodes: list[dict[str, float]],
    runs: int,
    config: Config,
    path: Path,
    told: Callable[[str], None],
    progress: Progress | None = None,
) -> Resources:
    """Return `resources` with a number of trials a GPU: as asked for, as `path` has it, or as it is measured now.

    Args:
        resources: What is asked for.
        nodes: CPUs and GPUs of each machine.
        runs: As `at_most` takes them.
        config: The run that is measured.
        path: Where a measurement is kept.
        told: Gets a line that says what was found.
        progress: As `measured` takes it.
    """
    most = at_most(resources, nodes, runs, gpu=config.device != "cpu")
    if most == 1:
        return resources
    if path.exists():
        tried = [Tried(**each) for each in read_record(path, "tried")["tried"]]
    else:
        try:
            tried = measured(config, resources, most, progress)
        except RichkdError as error:
            warnings.warn(f"trials a GPU could not be measured: {error}; it is one.", stacklevel=2)
            return resources
        write_json(path, {"tried": [asdict(each) for each in tried]})
    told(line(tried))
    return replace(resources, trials_per_gpu=chosen(tried))


def line(tried: Sequence[Tried]) -> str:
    """Return what was found, for a person."""
    count, one = chosen(tried), tried[0].images_per_second
    speeds = ", ".join(f"{each.images_per_second / one:.1f}" for each in tried)
    return (
        f"{count} trial{'s' * (count > 1)} a GPU: {speeds} times as fast with "
        f"{', '.join(str(each.trials) for each in tried)}"
    )
