"""One of the workers that Ray Train lets share a distillation."""

from pathlib import Path
from typing import Any

import ray.train
from ray.util import get_current_placement_group

from richkd.config import from_dict
from tune.endings import ended


def worker(job: dict[str, Any]) -> None:
    """Run one worker's part of a job; every worker reports as often as the others, and the first one's counts.

    Args:
        job: As `trial` takes it, and `heard`: the newest epoch that the driver knows of.
    """
    import torch

    from richkd import distill
    from richkd.workers import Group

    torch.set_num_threads(job["threads"])
    # Ray Train gives it back when the run ends, but not if Ray Tune stops the trial
    ray.train.report({"run": {"placement_group": get_current_placement_group().id.hex()}})
    group = Group.of_process_group()
    outcome = distill.run(
        from_dict(job["config"]),
        Path(job["folder"]),
        report=lambda metrics, _: ray.train.report({"run": metrics}),
        resume=True,
        heard=job["heard"],
        group=group,
    )
    tested = distill.test(outcome) if job["test"] and group.first else {}
    ray.train.report({"run": ended(outcome, tested)})
