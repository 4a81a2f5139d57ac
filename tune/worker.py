"""One of the workers that Ray Train lets share a distillation, and the reporter between them and Ray Tune."""

from pathlib import Path
from typing import Any

import ray.train
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util import get_current_placement_group

from richkd.config import from_dict
from tune.trial import ended, foreseen


def worker(job: dict[str, Any]) -> None:
    """Run one worker's part of a job; every worker reports as often as the others, and the first one's counts.

    Args:
        job: As `trial` takes it, and `heard`: the newest epoch that the driver knows of.
    """
    import torch

    from richkd import distill
    from richkd.workers import Group

    torch.set_num_threads(job["threads"])
    # Ray frees it by itself only where it is told of the end, which it is not if the trial is stopped
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


class Reporter(TuneReportCallback):
    """Passes the first worker's reports on to Ray Tune, and failures that starting anew would only repeat."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Hear of exceptions of workers; of others, such as a killed process, Ray starts the workers anew."""
        for error in worker_exceptions.values():
            # Ray wraps what a worker raised; without it, a failure would only be tried again in vain
            if (said := foreseen(getattr(error, "_base_exc", error))) is not None:
                self._training_actor_item_queue.put({"run": said})
                return
