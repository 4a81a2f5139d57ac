"""One trial in a process that goes on to the next: the reporter between `richkd.distill` and Ray Tune."""

from pathlib import Path
from typing import Any

import ray.tune

from richkd.config import from_dict
from richkd.errors import RichkdError
from richkd.files import NO_SPACE


def trial(job: dict[str, Any]) -> None:
    """Run one job of a sweep, reporting once an epoch and once at its end.

    A run that fails for a reason that richkd knows ends by a report that says so, since raising would
    end the process, and with it the caches that the next trial would find.

    Args:
        job: `config` (resolved, as a dict), `folder`, `threads`, and `test`: whether the test rows are read
            at the end.
    """
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
    except RichkdError as error:
        ray.tune.report({"run": {"failed": f"{type(error).__name__}: {error}"}})
        return
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        # no fault of the trial's: it goes on when there is space
        ray.tune.report(
            {"run": {"stopped": f"the disk is full ({error.filename or job['folder']})"}}
        )
        return
    teacher = outcome.teacher
    known = {f"identity/{k}": v for k, v in teacher.identities.items()} if teacher else {}
    ray.tune.report({"run": outcome.metrics | tested | known | {"finished": True}})
