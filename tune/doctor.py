"""What faults left behind in a sweep's folder and on this machine: found, and mended where that loses nothing.

    python -m tune doctor              # what there is to mend
    python -m tune doctor --fix

A sweep needs no doctor to go on: `resume` takes what it finds. This is for what would otherwise be met one by one, or
stays: a file that no longer is what it was, a process that outlived its driver.
"""

import contextlib
import os
import platform
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from richkd import checkpoint
from richkd.errors import ConfigError, CorruptError
from richkd.files import read_record
from richkd.record import check_last, is_tested
from tune.best import called
from tune.budget import spent
from tune.driver import OWNER, locked, owner_of, works
from tune.logbook import CLOSE_SECONDS
from tune.places import machines_of
from tune.status import unsent
from tune.sweep import Sweep, asked_of, open_searches
from tune.tracking import Tracker

PROC = Path("/proc")
LIMIT = 10_000  # what the cluster is asked for, at most


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        what: In a line.
        advice: What to do, or what `--fix` does.
        mend: Does it; None where only a person can.
    """

    what: str
    advice: str
    mend: Callable[[], None] | None = None


def examine(folder: Path, address: str | None = None) -> list[Finding]:
    """Return what is wrong with a sweep on which no driver works, and with what its drivers left.

    Args:
        folder: Sweep folder.
        address: Of the Ray cluster on which it ran; None: only this machine is looked at.

    Raises:
        ConfigError: If a driver works on it: then half of it would look wrong.
    """
    if works(folder):
        owner = owner_of(folder)
        who = f"pid {owner['pid']}" if owner else "a driver"
        raise ConfigError(f"{who} works on {folder.name}; the doctor comes when it has ended.")
    ended: set[Path] = set()
    runs = folder
    with contextlib.suppress(ConfigError, CorruptError):
        runs = Sweep(folder, asked_of(folder)[1]).runs
    findings = [*_lock(folder), *_records(folder), *_study(folder, ended)]
    findings += [*_runs(runs, folder, ended), *_strays()]
    return findings + (list(_groups(address)) if address is not None else [])


def mend(folder: Path, findings: list[Finding]) -> None:
    """Mend what can be mended, under the sweep's lock."""
    with locked(folder):
        for finding in findings:
            if finding.mend is not None:
                finding.mend()


def _lock(folder: Path) -> Iterator[Finding]:
    if (owner := owner_of(folder)) is not None:
        path = folder / OWNER
        died = "died" if owner["host"] == platform.node() else "may have died"
        yield Finding(
            what=f"the driver with pid {owner['pid']} on {owner['host']} {died}, and left its name",
            advice="it is removed; if that machine is another one, make sure that nothing runs there",
            mend=partial(path.unlink, missing_ok=True),
        )


def _records(folder: Path) -> Iterator[Finding]:
    """Look at the records that belong to the sweep as a whole."""
    restore = "restore it from a copy; without it the sweep cannot go on"
    with _told("sweep.json", restore) as found:
        asked_of(folder)
    yield from found
    with _told("spent.json", "restore it, or remove it: then sweep.hours counts from 0") as found:
        spent(folder / "spent.json")
    yield from found
    if (ids := folder / "mlflow.json").exists():
        with _told("mlflow.json", "it is removed: MLflow gets new runs") as found:
            read_record(ids)
        yield from (replace(each, mend=partial(ids.unlink, missing_ok=True)) for each in found)
    if count := unsent(folder / "spool.jsonl"):
        yield Finding(
            what=f"MLflow has not got {count} messages",
            advice=f"python -m tune sync {called(folder)}",
        )
    for path in folder.rglob(".*.tmp"):
        yield Finding(
            what=f"{path.name} was being written when its writer died",
            advice="it is removed; the file that it was to replace is whole",
            mend=partial(path.unlink, missing_ok=True),
        )


def _study(folder: Path, ended: set[Path]) -> Iterator[Finding]:
    """Look at the study: trials that say they run, though no driver does. Fills in the folders of those that ended."""
    try:
        asked, layers = asked_of(folder)
        sweep = Sweep(folder, layers)
        own = sweep.settings.sweep.study is None and not sweep.grid
        if own and not (folder / "study.db").exists():
            if (sweep.runs / "trials").exists():
                yield Finding(what="study.db is missing", advice="restore it from a copy")
            return
        searches = open_searches(sweep, sweep.settings.sweep.trials)
    except (ConfigError, CorruptError) as error:
        yield Finding(what=f"the study cannot be read: {error}", advice="restore it from a copy")
        return
    for search in searches:
        running = {trial.number for trial in search.left_over}
        for trial in search.study.get_trials(deepcopy=False):
            if trial.number not in running:
                ended.add(sweep.runs / "trials" / search.label(trial.number))
    left = [
        f"trial-{search.label(trial.number)}" for search in searches for trial in search.left_over
    ]
    open_ = [] if (folder / "summary.json").exists() else [*left, *_begun(sweep.runs)]
    if left:
        yield Finding(
            what=f"no driver runs {', '.join(left)}, though the study says so",
            advice=f"python -m tune resume {called(folder)} goes on with them, each from its newest checkpoint",
        )

    def tracker() -> Tracker:
        experiment = sweep.settings.tracking.experiment
        return Tracker(folder, Tracker.recall(asked["tracking"]), experiment)

    runs = [folder.name, *(f"{folder.name}/{job}" for job in open_)]
    running: list[str] = []
    with contextlib.suppress(ConfigError, CorruptError):  # of the address, and of `mlflow.json`
        running = tracker().running(runs)
    if running:
        yield Finding(
            what=f"MLflow says that {', '.join(running)} run{'s' * (len(running) == 1)}",
            advice="it is told that they were stopped",
            mend=partial(_stop, tracker(), running),
        )


def _runs(runs: Path, folder: Path, ended: set[Path]) -> Iterator[Finding]:
    """Look at each run: its record, its metrics, its checkpoints."""
    for run in sorted({path.parent for path in runs.rglob("run.json")}):
        if "superseded" in run.parts:
            continue
        over = run in ended or run.parent in ended
        parts = {"run.json": partial(read_record, run / "run.json", "digest")}
        if checkpoint.exists(run / "best"):
            parts["best"] = partial(checkpoint.verify, run / "best")
        if checkpoint.exists(run / "last"):
            parts["last"] = partial(check_last, run)
        for part, look in parts.items():
            spared = over or (part == "last" and _tested(run))
            advice = "its run begins again, and ends the same"
            if spared:
                advice = "it is removed: nobody goes on from it"
            with _told(f"{run.relative_to(runs)}/{part}", advice) as found:
                look()
            mend = partial(_remove, run / part) if spared else partial(_begin_again, run, folder)
            yield from (replace(each, mend=mend) for each in found)


def _begun(runs: Path) -> list[str]:
    """Return the refits that have begun and are not over."""
    folders = (path.parent for path in sorted(runs.glob("refits/*-seed*/run.json")))
    return [f"refit-{run.name}" for run in folders if not _tested(run)]


def _stop(tracker: Tracker, running: list[str]) -> None:
    """Tell MLflow that runs have stopped."""
    tracker.start()
    for run in running:
        tracker.tag(run, {"richkd.state": "stopped"})
        tracker.finish(run, "KILLED")
    tracker.close(CLOSE_SECONDS)


def _tested(run: Path) -> bool:
    """Whether a run is over, as far as its record can be read."""
    with contextlib.suppress(CorruptError):
        return is_tested(run)
    return False


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _begin_again(run: Path, folder: Path) -> None:
    """Let a resume run it anew, be the sweep finished or not."""
    shutil.rmtree(run, ignore_errors=True)
    (folder / "summary.json").unlink(missing_ok=True)


def _strays() -> Iterator[Finding]:
    """Look for Ray's processes of this user whose cluster is gone: init has adopted them."""
    for pid, name in orphans():
        yield Finding(
            what=f"{name} (pid {pid}) outlived its cluster",
            advice="it is killed",
            mend=partial(_kill, pid),
        )


def orphans() -> list[tuple[int, str]]:
    """Return pid and name of each worker of Ray, of this user, whose parent has died."""
    found = []
    for path in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            name = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if name.startswith("ray::") and parent == 1 and path.stat().st_uid == os.getuid():
                found.append((int(path.name), name.strip()))
    return found


def _groups(address: str) -> Iterator[Finding]:
    """Look for resources of a cluster that are kept for drivers that have ended."""
    machines_of(address)  # Ray itself would wait a minute for one that does not answer
    import ray
    from ray.util.placement_group import PlacementGroup
    from ray.util.state import list_jobs, list_placement_groups

    if not ray.is_initialized():
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    jobs = {job.job_id for job in list_jobs(limit=LIMIT) if job.status == "RUNNING"}
    for group in list_placement_groups(limit=LIMIT, detail=True):
        if group.state == "REMOVED" or group.is_detached or group.creator_job_id in jobs:
            continue
        known = PlacementGroup(ray.PlacementGroupID.from_hex(group.placement_group_id))
        yield Finding(
            what=f"placement group {group.placement_group_id} is kept for a driver that has ended",
            advice="it is removed",
            mend=partial(ray.util.remove_placement_group, known),
        )


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _told(name: str, advice: str) -> Iterator[list[Finding]]:
    """Collect, as findings, what is raised inside."""
    found: list[Finding] = []
    try:
        yield found
    except (ConfigError, CorruptError, OSError) as error:
        found.append(Finding(what=f"{name} is damaged: {error}", advice=advice))
