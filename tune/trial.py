"""One trial: in a process that goes on to the next, or shared by several workers of Ray Train."""

import gc
import itertools
import time
from pathlib import Path
from typing import Any

import ray.tune

from tune.endings import failure, raised
from tune.store import Store, mirrored, names
from tune.watchdog import give_up, hangs
from tune.worker import work, worker

NODE_DIED = "node has died"  # Ray's words
HANGS = 2  # of a run without progress, after which it is not started again
WORKER_RESTARTS = 3  # of the workers of a trial, after one of them died
UNSURE = 3  # epochs of which reports can be on their way when a worker dies: two, and one to spare
SETTLE = 0.5  # seconds for Tune to hand on the report that it has just taken


def trial(job: dict[str, Any]) -> None:
    """Run one job, reporting once an epoch and once at its end.

    A run that fails ends by a report that says why and of which class the failure is: raising would end the
    process, and with it the caches that the next trial would find. So that Tune sees a trial fail only when its
    process is gone, which is worth another try.

    Args:
        job: `id`; `config` (resolved, as a dict); `folder`; `seeds` that run side by side; `heard`, the newest epoch that
            the driver knows of; `threads` of a worker; `test`: whether the test rows are read at the end; `patience`,
            the seconds without a step after which a worker has hung; `workers`, `each` (what Ray is to give each of
            them) and `scratch`, a folder of Ray's own; `store`, where the run folder is kept, if not in `folder`.
    """
    from richkd.record import clear_damaged

    folder, said = Path(job["folder"]), None

    def report(metrics: dict[str, Any]) -> None:
        ray.tune.report({"run": metrics})

    try:
        if job["workers"] > 1:
            clear_damaged(folder, job["seeds"])
            said = _shared(job)
        else:
            with mirrored(job, report) as (here, told):
                clear_damaged(Path(here["folder"]), job["seeds"])
                if (said := _hung(here)) is None:
                    work(here, told)
    except Exception as error:
        said = failure(error, folder)
    if said is not None:
        _clean()
        report(said)


def _hung(job: dict[str, Any]) -> dict[str, str] | None:
    """Return the report of a job that has hung twice at the same place, None of any other."""
    from richkd.record import newest

    folder = Path(job["folder"])
    times, path = hangs(folder)
    if times < HANGS:
        return None
    epoch = 1 + newest(folder, job["seeds"])
    why = f"no step for {job['patience']:g} s at epoch {epoch}"
    give_up(folder, why)
    return {"failed": f"{why}; where it hung: {path}", "class": "hung"}


def _clean() -> None:
    """Give back the memory of a run that failed; if the device itself no longer works, this ends the process."""
    import torch

    gc.collect()  # an error's frames hold tensors
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # raises what a broken device says to everything from now on
        torch.cuda.empty_cache()


def _shared(job: dict[str, Any]) -> dict[str, str] | None:
    """Let Ray Train run the job on several workers, and start them anew if one of them dies.

    Not by Ray Train itself, which would also start anew what is bound to fail again.

    Returns:
        The last report of a job that failed, None if the workers have reported its end.
    """
    from ray.exceptions import RayError
    from ray.train import ControllerError, WorkerGroupError

    folder, heard = Path(job["folder"]), job["heard"]
    begun = reached = _newest(job)
    deaths = 0  # since there was progress
    for attempt in itertools.count():
        if (said := _hung(job)) is not None:
            return said
        try:
            _fit(job | {"heard": heard}, f"{job['id']}-{attempt}")
            return None
        except (WorkerGroupError, ControllerError, RayError) as error:
            if (said := raised(error, folder)) is not None:
                return said
            each = [error, *getattr(error, "worker_failures", {}).values()]
            # the loss of a machine is not held against the run
            lost = any(NODE_DIED in str(one) for one in each)
        now = _newest(job)
        if now > begun:  # all before have been reported once
            heard = max(heard, now - UNSURE)
        deaths = 0 if now > reached else deaths
        reached, deaths = now, deaths + (not lost)
        if deaths > WORKER_RESTARTS:
            break
    times, path = hangs(folder)
    where = f"; where one hung: {path}" if times else ""
    return {"failed": f"its workers died {deaths} times{where}", "class": "lost"}


def _newest(job: dict[str, Any]) -> int:
    """Return the newest epoch from which all of a job's runs can go on."""
    from richkd.record import newest

    if job["store"] is not None:
        store = Store(job["store"])
        return min(store.newest(name) or 0 for name in names(job["seeds"]))
    return newest(Path(job["folder"]), job["seeds"])


def _fit(job: dict[str, Any], name: str) -> None:
    """Start the workers of a job and return when they have ended, and Tune has taken all of their reports."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

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

    relay, scratch = Relay(), {"storage_path": job["scratch"]}
    if job["store"] is not None:
        place = Store(job["scratch"])
        scratch = {"storage_path": place.base, "storage_filesystem": place.files}
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
                **scratch,
                failure_config=FailureConfig(max_failures=0),
                callbacks=[relay],
            ),
        ).fit()
    finally:
        relay.drain()
