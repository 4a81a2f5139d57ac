"""One process's part of a job: all of it, or that of one of the workers which Ray Train brings together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from ray.util import get_current_placement_group

from richkd.layers import from_dict
from tune.endings import ended
from tune.store import mirrored
from tune.watchdog import Watchdog


def work(job: dict[str, Any], report: Callable[[dict[str, Any]], None], group: Any = None) -> None:
    """Run a job in this process, reporting once an epoch and once at its end.

    Args:
        job: As `trial` takes it.
        report: Called with the metrics, by every worker as often as by the others.
        group: The workers that share it, a `richkd.workers.Group`; None for this process alone.
    """
    import torch

    from richkd import distill
    from richkd.record import WAIT, newest
    from richkd.steps import ALONE

    torch.set_num_threads(job["threads"])
    group, folder = group or ALONE, Path(job["folder"])
    begun = newest(folder, job["seeds"])
    with Watchdog(folder, job["patience"], group.rank) as watchdog:

        def tell(metrics: dict[str, Any], _: Path | None = None) -> None:
            if metrics["epoch"] > begun:
                watchdog.forget()
            with watchdog.resting():  # Tune keeps a trial that it stopped until there is another
                report(metrics)

        outcomes = distill.run_seeds(
            from_dict(job["config"]),
            folder,
            job["seeds"],
            report=tell,
            resume=True,
            heard=job["heard"],
            stop=watchdog.beat,
            progress=lambda *_: watchdog.beat(),
            group=group,
            wait=min(WAIT, job["patience"] / 2),
        )
        tested = {}
        if job["test"] and group.first:
            tested = distill.mean([distill.test(outcome) for outcome in outcomes])
        tell(ended(outcomes, tested))


def worker(job: dict[str, Any]) -> None:
    """Run one worker's part of a job; the first one's reports count."""
    from richkd.workers import Group

    def report(metrics: dict[str, Any]) -> None:
        ray.train.report({"run": metrics})

    # Ray Train gives it back when the run ends, but not if Ray Tune stops the trial
    report({"placement_group": get_current_placement_group().id.hex()})
    group = Group.of_process_group()
    with mirrored(job if group.first else job | {"store": None}, report) as (here, told):
        work(here, told, group)
