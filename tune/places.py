"""Where a sweep's files may lie when several machines take part, told by plain data: neither Ray nor a disk is asked."""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

VOLATILE = ("tmpfs", "ramfs", "overlay")  # file systems that end with a machine or a container
JOB = "working_dir_files"  # Ray's folder of what a job brought


def mounts() -> list[tuple[Path, str]]:
    """Return place and type of each file system that is mounted, as far as this system says."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split()
            found.append((Path(place.encode().decode("unicode_escape")), kind))
    return found


def unsafe(
    machines: int,
    state: Path,
    tracking: str,
    mounts: Sequence[tuple[Path, str]],
    storage: str,
    unseen: Sequence[str] = (),
) -> list[str]:
    """Return what a sweep on several machines would lose, or could not share, a line each with its mend.

    Args:
        machines: How many there are; on a single one everything may be.
        state: Folder of study, spool and lock.
        tracking: MLflow's address.
        mounts: Place and type of each file system.
        storage: Folder or address of run folders.
        unseen: Machines that cannot see `storage`.
    """
    if machines < 2:
        return []
    told = []
    state, temporary = state.resolve(), Path(tempfile.gettempdir()).resolve()
    above = [(place, kind) for place, kind in mounts if state.is_relative_to(place)]
    place, kind = max(above, key=lambda one: len(one[0].parts), default=(None, None))
    why = None
    if JOB in state.parts:
        why = "in the folder that Ray unpacked for this job"
    elif state.is_relative_to(temporary):
        why = f"under {temporary}, the system's folder for temporary files"
    elif kind in VOLATILE:
        why = f"on {place}, a file system ({kind}) that ends with its machine or container"
    if why is not None:
        told.append(
            f"sweep.state must outlive the driver's machine but {state} lies {why}; set sweep.state, or storage, to a "
            "folder on a disk that stays."
        )
    if tracking.startswith("sqlite"):
        told.append(
            f"tracking.uri must be a server where a sweep runs on {machines} machines but is {tracking}; start "
            "`mlflow server` and set tracking.uri=http://HOST:5000."
        )
    if unseen:
        told.append(
            f"storage must be seen by all {machines} machines but {storage} is not by {', '.join(unseen)}; set it to a "
            "folder on a shared file system, or to an address such as s3://BUCKET/FOLDER."
        )
    return told
