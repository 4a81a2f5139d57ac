"""The agenda on Ray Tune: a searcher that hands out jobs and a scheduler that hears of them.

Both are thin: every decision is the agenda's. Tune snapshots what it is given; nothing of ours is in its
snapshots, since a sweep goes on from its study and its folders.
"""

import contextlib
import errno
import logging
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray import PlacementGroupID
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup

from richkd import cache
from richkd.command import Stop, say
from richkd.errors import ConfigError, Interrupted, Stopped
from richkd.layers import to_dict
from richkd.progress import Progress
from tune.agenda import Agenda, Job
from tune.budget import Budget
from tune.environment import PROJECT
from tune.nodes import alive, share
from tune.places import unusable
from tune.settings import Resources, fit
from tune.store import Store
from tune.study import Failure
from tune.trial import trial as trainable

PROCESS_RESTARTS = 3  # of a run whose process died, without an epoch in between
LOOK_SECONDS = 5.0  # between two looks at the cluster
ROOM_SECONDS = 600.0  # in which a cluster may find new machines for those that it lost
FULL = os.strerror(errno.ENOSPC)  # where a process cannot even begin
NODE_DIED = "its node has died"  # Ray's words for the end of an actor that shared its machine's
PACKAGES = ("richkd", "tune")

# Ray's own result files, progress output, handlers and snapshots: ours do without, or have their own.
ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # an epoch of seconds waits so long to be heard of
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}


@contextlib.contextmanager
def guarded(agenda: Agenda) -> Iterator[None]:
    """Let an error of the driver stop the agenda, which raises it in the end: Tune would bury it in its own."""
    try:
        yield
    except Interrupted:  # a second signal: at once
        raise
    except Exception as error:
        agenda.broke(error)


class JobSearcher(Searcher):
    """Gives Tune the agenda's next job, with what all jobs are run with."""

    def __init__(self, agenda: Agenda, stop: Stop, shared: dict[str, Any], seeds: int) -> None:
        super().__init__()
        self.agenda, self.stop, self.shared, self.seeds = agenda, stop, shared, seeds

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next job, None if it has to wait for others, FINISHED at the end."""
        if self.stop.signum is not None:
            self.agenda.stop()
        job = None
        with guarded(self.agenda):
            job = self.agenda.next()
        if job is None:
            return Searcher.FINISHED if self.agenda.over else None
        return {
            "id": job.id,
            "config": to_dict(job.config),
            "folder": str(job.folder),
            "test": job.kind in ("refit", "train"),
            "heard": job.heard,
            "seeds": self.seeds if job.kind == "trial" else 1,
            "store": job.store,
            **self.shared,
        }

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """Nothing: the scheduler has heard already."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""

    def __getstate__(self) -> dict:
        return {}


class JobScheduler(FIFOScheduler):
    """Tells the agenda what Tune hears of a job."""

    def __init__(self, agenda: Agenda, stop: Stop) -> None:
        super().__init__()
        self.agenda, self.stop = agenda, stop
        self.latest: dict[str, dict[str, Any]] = {}
        self.placed: dict[str, str] = {}  # job to the placement group of its workers

    def __getstate__(self) -> dict:
        return {}

    def _job(self, trial: Trial) -> Job:
        return self.agenda.running[trial.config["id"]]

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Pass an epoch on and return whether the trial goes on."""
        prefix = "run/"
        metrics = {k.removeprefix(prefix): v for k, v in result.items() if k.startswith(prefix)}
        job = self._job(trial)
        if self.stop.signum is not None:
            self.agenda.stop()
        if "placement_group" in metrics:  # its workers have started
            if job.id in self.placed:
                warnings.warn(
                    f"{job.id}: a worker died; all of them go on from the newest checkpoint.",
                    stacklevel=2,
                )
            self.placed[job.id] = metrics["placement_group"]
            return TrialScheduler.CONTINUE if self.stop.signum is None else TrialScheduler.STOP
        before = self.latest.get(job.id, {}).get("epoch", job.heard)
        if metrics.get("epoch", before + 1) <= before and "finished" not in metrics:
            return TrialScheduler.CONTINUE  # workers that started anew do not know what arrived
        self.latest[job.id] = metrics
        trial.max_failures = trial.num_failures + PROCESS_RESTARTS  # it gets on
        if "stopped" in metrics:
            self.agenda.broke(Stopped(metrics["stopped"]))
        if metrics.keys() & {"failed", "finished", "stopped"}:
            return TrialScheduler.CONTINUE
        goes_on = False
        with guarded(self.agenda):
            goes_on = self.agenda.epoch(job, metrics)
        return TrialScheduler.CONTINUE if goes_on else TrialScheduler.STOP

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Pass the end on."""
        self._ended(trial, None)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Pass the end on: a run says itself why it fails, so its process died, and once too often.

        Tune says so also before it starts a run anew.
        """
        words, full = last_words(trial), None
        if FULL in words:  # no fault of the run's, which is left to a resume
            full = Stopped("the disk is full; free some space")
            self.agenda.broke(full)
        if not trial.should_recover():
            self._ended(trial, None if full else death_of(words, trial.num_failures))

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A trial that Tune takes away before it ran is left to a resume."""
        self._ended(trial, None)

    def _ended(self, trial: Trial, died: Failure | None) -> None:
        job = self._job(trial)
        metrics = self.latest.pop(job.id, {})
        if (group := self.placed.pop(job.id, None)) is not None:
            free(group)
        said = Failure(metrics["class"], metrics["failed"]) if "failed" in metrics else None
        with guarded(self.agenda):
            self.agenda.ended(job, metrics, said or died)


class Deaths(ray.tune.Callback):
    """Hears of runs that are started anew since their process died."""

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Say so; the loss of a machine is not held against the run."""
        words = last_words(trial)
        if NODE_DIED in words:
            trial.max_failures += 1
        what = "machine" if NODE_DIED in words else "process"
        warnings.warn(
            f"{trial.config['id']}: its {what} died; it goes on from its newest checkpoint.",
            stacklevel=2,
        )


class Guard(ray.tune.Stopper):
    """Ends everything where it is, at its newest checkpoint, when the sweep cannot go on.

    The budget is used up, the cluster is gone or has had no room for a run for too long, or something broke that is no
    run's own.

    Args:
        agenda: Is told of it.
        budget: What may be spent; None: anything.
        gpus: That a run holds.
        fits: Raises ConfigError if the cluster, as it is now, has no room for a run.
    """

    def __init__(
        self, agenda: Agenda, budget: Budget | None, gpus: float, fits: Callable[[], Any]
    ) -> None:
        self.agenda, self.budget, self.gpus, self.fits = agenda, budget, gpus, fits
        self.looked = self.room = time.monotonic()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped by it."""
        return False

    def stop_all(self) -> bool:
        """Look at all three; Tune asks several times a second, also while nothing runs."""
        why = None
        with guarded(self.agenda):
            used_up = self.budget and self.budget.tick(self.gpus * len(self.agenda.running))
            if used_up:
                why = f"the budget is used up ({used_up})"
            elif time.monotonic() - self.looked > LOOK_SECONDS:
                self.looked = time.monotonic()
                why = self._look()
        if why is not None:
            self.agenda.broke(Stopped(why))
        return self.agenda.error is not None

    def _look(self) -> str | None:
        """Return why the cluster cannot be used any more, None if it can."""
        if not alive():
            return "the Ray cluster is gone"
        try:
            self.fits()
        except ConfigError:
            if time.monotonic() - self.room > ROOM_SECONDS:
                return "the cluster has lost the machines that have room for a run"
        else:
            self.room = time.monotonic()
        return None

    def __getstate__(self) -> dict:
        return {}


def last_words(trial: Trial) -> str:
    """Return what Ray wrote of the newest failure of a trial, in one line."""
    try:
        text = Path(trial.error_file).read_text(errors="replace")
    except (OSError, TypeError):  # on a full disk there is none
        text = ""
    return " ".join(text.rpartition("Failure #")[2].split())


def death_of(words: str, times: int) -> Failure:
    """Return the failure of a run whose process died, from what Ray says of it."""
    _, _, detail = words.partition("Worker exit detail:")
    short = (detail or words.partition(") ")[2]).strip().partition(". ")[0][:200]
    kind = "memory" if "running low on memory" in words else "lost"
    return Failure(kind, f"its process died {times} times: {short}")


def free(group: str) -> None:
    """Remove the placement group of a job's workers, which outlives a trial that was stopped.

    Ray Train's own cleaner asks a dashboard that need not run; the next trial would wait for ever.
    """
    if (ray.util.placement_group_table().get(group) or {}).get("state") != "REMOVED":
        ray.util.remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group)))


def runtime_env() -> dict[str, Any]:
    """Return what workers on any machine need to run our code: its modules, and Ray's settings as they are here.

    The modules are shipped, since on another machine they may lie elsewhere, in another version, or nowhere.
    """
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # a job's runtime environment may set the same variables, which have their values from it then
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    return {
        "env_vars": {name: os.environ[name] for name in ENVIRONMENT},
        "py_modules": [str(PROJECT / package) for package in PACKAGES],
        "excludes": ["__pycache__"],
    }


def connect(stop: Stop, address: str | None, dashboard: str | None = None) -> None:
    """Connect this process with a Ray cluster, if it is not yet; one of our own ends with the process.

    The arguments are those of `run`.
    """
    if ray.is_initialized():
        return
    try:
        context = ray.init(
            # one that runs already has its own dashboard, or none
            address=(address or os.environ.get("RAY_ADDRESS", "local"))
            if dashboard is None
            else "local",
            include_dashboard=dashboard is not None,
            dashboard_host=dashboard or "127.0.0.1",
            runtime_env=runtime_env(),
            log_to_driver=False,
            logging_level="ERROR",
        )
    except SystemExit as left:  # Ray's handler, in place until ours is again
        raise Interrupted(signal.SIGTERM, "interrupted while Ray started") from left
    except (ValueError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise unusable(address, reason) from error
    stop.install()
    if dashboard is not None:
        say(
            f"dashboard  http://{context.dashboard_url}, with the token that `ray get-auth-token` prints"
        )
    # a screen about each process that dies, of which `Deaths` has a line, and on a full disk about its own notes
    for module in ("execution.experiment_state", "execution.tune_controller", "tune"):
        logging.getLogger(f"ray.tune.{module}").setLevel(logging.CRITICAL)


def run(
    agenda: Agenda,
    stop: Stop,
    resources: Resources,
    scratch: Path,
    *,
    gpu: bool,
    address: str | None,
    budget: Budget | None = None,
    seeds: int = 1,
    store: Store | None = None,
    dashboard: str | None = None,
    progress: Progress | None = None,
    settle: Callable[..., Resources] | None = None,
) -> None:
    """Let Ray Tune run the agenda's jobs, each in a process that goes on to the next.

    Args:
        agenda: What there is to do.
        stop: Says whether a signal came.
        resources: What a job takes.
        scratch: Folder of Ray's own notes, which nobody reads; removed in the end.
        gpu: Whether a GPU is used where there is one.
        address: Of a running cluster; without it a local one is started, unless there is one.
        budget: What may be spent; None: anything.
        seeds: Runs that make up a trial, side by side.
        store: Where run folders are kept, if not on a disk that all machines share; so are Ray's own notes.
        dashboard: Address of this machine at which a cluster that is started shows Ray's dashboard; None: nowhere.
        progress: Told how many machines have what the cache of this one has; may raise to stop.
        settle: Given `resources`, CPUs and GPUs of each machine, and the number of runs, says what a job takes; None:
            that is settled.
    """
    connect(stop, address, dashboard)
    try:

        def fits() -> tuple[int, dict[str, float]]:
            return fit(resources, [node.resources for node in alive()], gpu=gpu)

        fits()  # or it is refused, before anything takes its time
        shutil.rmtree(scratch, ignore_errors=True)  # of a driver that was killed
        share(cache.used(), progress=progress)
        if settle is not None:
            resources = settle(resources, [node.resources for node in alive()], agenda.total)
        slots, each = fits()
        path, files = str(scratch.parent), None
        if store is not None:
            path, files = store.base, store.files
        alone = resources.workers == 1
        shared = {
            "workers": resources.workers,
            "each": each,
            "threads": resources.cpus_per_worker,
            "scratch": str(scratch / "train")
            if store is None
            else f"{store.url}/{scratch.name}/train",
            "patience": resources.patience,
        }
        gpus = each.get("GPU", 0) * resources.workers
        ray.tune.Tuner(
            # a trial that waits for its workers takes nothing that they need
            ray.tune.with_resources(trainable, each if alone else {"CPU": 0, "memory": 1}),
            tune_config=ray.tune.TuneConfig(
                search_alg=JobSearcher(agenda, stop, shared, seeds),
                scheduler=JobScheduler(agenda, stop),
                num_samples=agenda.total,
                max_concurrent_trials=min(slots, resources.max_concurrent or slots),
                reuse_actors=alone,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=ray.tune.RunConfig(
                name=scratch.name,
                storage_path=path,
                storage_filesystem=files,
                verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=PROCESS_RESTARTS),
                callbacks=[Deaths()],
                stop=Guard(agenda, budget, gpus, fits),
            ),
        ).fit()
        for job in list(agenda.running.values()):  # of which Tune had not heard when it ended
            agenda.ended(job, {}, None)
    finally:
        # a cluster of our own ends with the process: `ray.shutdown` would undo our signal handlers now
        shutil.rmtree(scratch, ignore_errors=True)
        if store is not None:
            store.clear(scratch.name)
