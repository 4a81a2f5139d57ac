"""What befalls a trial on a real Ray, and what its end is called: its process dies, hangs, runs out of memory, diverges."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import Script, holder

from richkd import checkpoint, distill
from richkd.command import Stop
from richkd.layers import build, read
from tune import runner
from tune.settings import Resources

EPOCHS = 6


class Killer(threading.Thread):
    """Kills the process of a run after given epochs, each time once."""

    def __init__(self, folder: Path, after: list[int]) -> None:
        super().__init__(daemon=True)
        self.folder, self.after = folder, list(after)
        self.killed: list[tuple[int, int]] = []  # pid and epochs that were written

    def run(self) -> None:
        """Wait and kill."""
        ends = time.monotonic() + 120
        while self.after and time.monotonic() < ends:
            path = self.folder / "metrics.jsonl"
            epochs = len(path.read_text().splitlines()) if path.exists() else 0
            if epochs >= self.after[0] and (pid := holder(self.folder)) is not None:
                os.kill(pid, signal.SIGKILL)
                self.killed.append((pid, epochs))
                del self.after[0]
            time.sleep(0.01)


@pytest.mark.timeout(240)
def test_each_fault_ends_its_trial_alone_and_is_called_by_its_name(
    cluster, cache_root, tmp_path, monkeypatch
):
    def afflicted(job: dict) -> None:  # nested, since a worker cannot import this file
        """Run a job, of which one hangs in its third epoch."""
        from richkd.steps import Steps
        from tune import trial

        whole = Steps.take

        def take(steps, part, progress):
            if progress >= 2 / 6:  # of the training
                time.sleep(600)
            return whole(steps, part, progress)

        if job["id"] == "hangs":
            Steps.take = take
        try:
            trial.trial(job)
        finally:
            Steps.take = whole

    base = build(
        read(["method.name=ce", f"cache={cache_root}", f"train.epochs={EPOCHS}", "device=cpu"])
    )
    with torch.random.fork_rng():
        straight = distill.run(base, tmp_path / "straight")
    # a teacher that sees each image as 4096 x 4096 pixels: its first map takes 300 GB
    huge = build(
        read(
            [
                *("method.name=kd", f"cache={cache_root}", "device=cpu", "train.batch_size=512"),
                *(f"teacher.checkpoint={tmp_path / 'straight'}", "teacher.size=4096"),
            ]
        )
    )
    script = Script(
        {
            "killed": base,
            "diverges": replace(base, train=replace(base.train, lr=100.0, momentum=0.9999)),
            "hangs": base,
            "too-large": huge,
            "sound": replace(base, seed=1),
        },
        tmp_path,
    )
    monkeypatch.setattr(runner, "trainable", afflicted)
    killer = Killer(tmp_path / "killed", [1, 4])
    killer.start()
    with pytest.warns(UserWarning, match="its process died") as told:
        runner.run(
            script,
            Stop(),
            Resources(patience=8.0),
            tmp_path / ".ray",
            gpu=False,
            address=None,
        )
    assert len({pid for pid, _ in killer.killed}) == 2  # the fault was there, twice
    deaths = [str(one.message).partition(":")[0] for one in told]
    assert (deaths.count("killed"), deaths.count("hangs")) == (2, 2)
    kinds = {name: why.kind if why else None for name, (_, why) in script.ends.items()}
    assert kinds == {
        "killed": None,
        "diverges": "nan",
        "hangs": "hung",
        "too-large": "memory",
        "sound": None,
    }
    assert script.epochs["killed"] == script.epochs["sound"] == list(range(1, EPOCHS + 1))
    assert (script.epochs["diverges"], script.epochs["hangs"]) == ([], [1, 2])
    hung = (tmp_path / "hangs" / "hung.txt").read_text()
    assert hung.count("Timeout (") == 2 and "in epoch" in hung
    assert not (tmp_path / "diverges" / "best").exists()
    for part in ("last", "best"):
        found, expected = (
            checkpoint.load(tmp_path / name / part) for name in ("killed", "straight")
        )
        assert found.weights.keys() == expected.weights.keys()
        for key, value in expected.weights.items():
            assert torch.equal(found.weights[key], value), (part, key)
    assert script.ends["killed"][0]["best_val_top1"] == straight.metrics["best_val_top1"]
