"""One trial: in a process that goes on to the next, or shared by several workers of Ray Train."""

import time
from pathlib import Path
from typing import Any

import ray.tune

from richkd.config import from_dict
from richkd.errors import RichkdError
from tune.endings import ended, foreseen

RESTARTS = 3  # of the workers of a trial, after one of them died
SETTLE = 0.5  # seconds for Tune to hand on the report that it has just taken


def trial(job: dict[str, Any]) -> None:
    """Run one job, reporting once an epoch and once at its end.

    A run that fails for a reason that richkd knows ends by a report that says so, since raising would
    end the process, and with it the caches that the next trial would find.

    Args:
        job: `id`; `config` (resolved, as a dict); `folder`; `threads` of a worker; `test`: whether the test rows are read
            at the end; `workers`, `each` (what Ray is to give each of them) and `scratch`, a folder of Ray's own.
    """
    if job["workers"] > 1:
        _shared(job)
        return
    import torch

    from richkd import distill

    torch.set_num_threads(job["threads"])
    try:
        outcome = distill.run(
            from_dict(job["config"]),
            Path(job["folder"]),
            report=lambda metrics, _: ray.tune.report({"run": metrics}),
            resume=True,
        )
        tested = distill.test(outcome) if job["test"] else {}
    except (RichkdError, OSError) as error:
        if (said := foreseen(error)) is None:
            raise
        ray.tune.report({"run": said})
        return
    ray.tune.report({"run": ended(outcome, tested)})


def _shared(job: dict[str, Any]) -> None:
    """Let Ray Train run the job on several workers, and start them anew if one of them dies.

    Not by Ray Train itself, which would also start anew what is bound to fail again.
    """
    from ray.train import WorkerGroupError

    from richkd import checkpoint

    last = Path(job["folder"]) / "last"
    heard = checkpoint.verify(last)["meta"]["epoch"] if checkpoint.exists(last) else 0
    for left in reversed(range(RESTARTS + 1)):
        try:
            _fit(job | {"heard": heard}, f"{job['id']}-{left}")
            return
        except WorkerGroupError as error:
            # Ray wraps what a worker raised; what comes of a killed process is no error of ours
            raised = [getattr(one, "_base_exc", one) for one in error.worker_failures.values()]
            said = next((found for one in raised if (found := foreseen(one)) is not None), None)
            if said is not None:
                ray.tune.report({"run": said})
                return
            if left == 0:
                raise


def _fit(job: dict[str, Any], name: str) -> None:
    """Start the workers of a job and return when they have ended, and Tune has taken all of their reports."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    from tune.worker import worker

    class Relay(TuneReportCallback):
        """What carries the workers' reports to Tune."""

        def drain(self) -> None:
            """Wait until they are taken: Tune locks up if the trial itself reports or returns before."""
            while not self._training_actor_item_queue.empty():
                time.sleep(0.1)
            time.sleep(SETTLE)

    class Trainer(TorchTrainer):
        """Without the actor that frees placement groups, which `runner.free` does.

        It would outlive each trial that is stopped, for good where no dashboard runs.
        """

        def _create_default_callbacks(self) -> list:
            found = super()._create_default_callbacks()
            return [one for one in found if type(one).__name__ != "PlacementGroupCleanerCallback"]

    relay = Relay()
    try:
        Trainer(
            worker,
            train_loop_config=job,
            scaling_config=ScalingConfig(
                num_workers=job["workers"],
                use_gpu="GPU" in job["each"],
                resources_per_worker=job["each"],
            ),
            run_config=RunConfig(
                name=name,
                storage_path=job["scratch"],
                failure_config=FailureConfig(max_failures=0),
                callbacks=[relay],
            ),
        ).fit()
    finally:
        relay.drain()
