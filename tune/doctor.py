"""What faults left behind in a sweep's folder and on this machine: found, and mended where that loses nothing.

    python -m tune doctor              # what there is to mend
    python -m tune doctor --fix

A sweep needs no doctor to go on: `resume` takes what it finds. This is for what would otherwise be met one by one, or
stays: a file that no longer is what it was, a process that outlived its driver.
"""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from richkd import checkpoint
from richkd.config import Layers
from richkd.errors import ConfigError, CorruptError
from richkd.files import read_record
from tune.budget import spent
from tune.driver import OWNER, locked, owner_of, works
from tune.status import SEARCHES, unsent
from tune.sweep import Sweep, open_searches

PROC = Path("/proc")
MANY = 10_000  # what the cluster is asked for, at most


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
    findings = [*_lock(folder), *_records(folder), *_study(folder, ended)]
    findings += [*_runs(folder, ended), *_strays()]
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
        yield Finding(
            what=f"the driver with pid {owner['pid']} on {owner['host']} died, and left its name",
            advice="it is removed; if that machine is another one, make sure that nothing runs there",
            mend=partial(path.unlink, missing_ok=True),
        )


def _records(folder: Path) -> Iterator[Finding]:
    """Look at the records that belong to the sweep as a whole."""
    restore = "restore it from a copy; without it the sweep cannot go on"
    with _told("sweep.json", restore) as found:
        read_record(folder / "sweep.json", "layers", "tracking")
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
            advice=f"python -m tune sync {folder.name}",
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
        asked = read_record(folder / "sweep.json", "layers", "tracking")
        sweep = Sweep(folder, Layers.from_list(asked["layers"]))
        if sweep.settings.sweep.study is None and not (folder / "study.db").exists():
            if (sweep.runs / "trials").exists():
                yield Finding(what="study.db is missing", advice="restore it from a copy")
            return
        searches = open_searches(sweep, SEARCHES, sweep.settings.sweep.trials)
    except (ConfigError, CorruptError, TypeError) as error:
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
    if left:
        yield Finding(
            what=f"no driver runs {', '.join(left)}, though the study says so",
            advice=f"python -m tune resume {folder.name} goes on with them, each from its newest checkpoint",
        )


def _runs(folder: Path, ended: set[Path]) -> Iterator[Finding]:
    """Look at each run: its record, its metrics, its checkpoints."""
    for run in sorted({path.parent for path in folder.rglob("run.json")}):
        if "superseded" in run.parts:
            continue
        name = str(run.relative_to(folder))
        over = run in ended or run.parent in ended
        advice = "its run begins again, and ends the same"
        if over:
            advice = "it is removed; the study has the result of its trial"

        def remove(part: str, run: Path = run, over: bool = over) -> None:
            path = run / part if over else run
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        with _told(f"{name}/run.json", advice) as found:
            read_record(run / "run.json", "digest")
        yield from (replace(each, mend=partial(remove, "run.json")) for each in found)
        with _told(f"{name}/metrics.jsonl", "its whole lines are kept") as found:
            _lines(run / "metrics.jsonl")
        yield from (
            replace(each, mend=partial(_keep_lines, run / "metrics.jsonl")) for each in found
        )
        for part in ("last", "best"):
            if checkpoint.exists(run / part):
                with _told(f"{name}/{part}", advice) as found:
                    checkpoint.verify(run / part)
                yield from (replace(each, mend=partial(remove, part)) for each in found)


def _lines(path: Path) -> None:
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            json.loads(line)
        except ValueError as error:
            raise CorruptError(f"{path} has a torn line: {line[:40]!r}") from error


def _keep_lines(path: Path) -> None:
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            json.loads(line)
            kept.append(f"{line}\n")
    path.write_text("".join(kept))


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
    import ray
    from ray.util.placement_group import PlacementGroup
    from ray.util.state import list_jobs, list_placement_groups

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    jobs = {job.job_id for job in list_jobs(limit=MANY) if job.status == "RUNNING"}
    for group in list_placement_groups(limit=MANY, detail=True):
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
