"""A sweep's folder without a sweep: a real study, and run folders with the files that a report reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from richkd.files import write_json
from richkd.layers import digest, dump, read
from tune.agenda import Refits
from tune.sweep import Sweep
from tune.warmstart import printed

PROMPTS = ("digits", "digits-photo", "digits-written", "digits-bad")
HOSTILE = (
    "<script>document.title='pwned'</script>",
    '"><img src=x onerror="document.title=\'pwned\'">',
    "=cmd|' /C calc'!A0",
    "@SUM(1)|a\n# b\n| c |",
    "$\\frac$ `x` [a](javascript:alert(1))",
    "漢字" * 3,
    "文字" * 3,
    "\u202eltr\x1b[31m\udc80",
)
EPOCHS = 20


def curve(rng: np.random.Generator, top1: float, epochs: int = EPOCHS) -> list[float]:
    """Return validation top-1 by epoch, %, that ends near `top1`."""
    rise = 1 - np.exp(-np.arange(1, epochs + 1) / 3)
    return list(np.round(np.clip(top1 * rise + rng.normal(0, 0.5, epochs), 0, 100) * 4) / 4)


def trial(
    rng: np.random.Generator, state: TrialState, prompts: tuple[str, ...], **more: Any
) -> FrozenTrial:
    """Return a trial of the main search: the best alpha is 0.6, the other parameters hardly matter."""
    space = {
        "fusion.alpha": FloatDistribution(0, 1),
        "loss.temperature": FloatDistribution(0.5, 8, log=True),
        "loss.logit": FloatDistribution(0.5, 16, log=True),
        "clip.prompts": CategoricalDistribution(prompts),
    }
    params: dict[str, Any] = {
        "fusion.alpha": float(rng.uniform()),
        "loss.temperature": float(2 ** rng.uniform(-1, 3)),
        "loss.logit": float(2 ** rng.uniform(-1, 4)),
        "clip.prompts": prompts[rng.integers(len(prompts))],
    }
    steps = curve(rng, 93 - 25 * (params["fusion.alpha"] - 0.6) ** 2)
    epochs = {TrialState.COMPLETE: EPOCHS, TrialState.PRUNED: 5, TrialState.FAIL: 2}[state]
    steps = steps[:epochs]
    attributes: dict[str, Any] = {"val_loss": 0.3}
    if state == TrialState.FAIL:
        attributes |= {"failure": "nan", "error": f"NaN in step 3 of {prompts[0]}"}
    return create_trial(
        state=state,
        value=max(steps) if state == TrialState.COMPLETE else None,
        params=params,
        distributions=space,
        intermediate_values=dict(enumerate(steps, 1)),
        user_attrs=attributes | more,
    )


def study_best(storage: str) -> dict[str, Any] | None:
    """Return what the best trial ran, None if none ran to its end."""
    study = optuna.load_study(study_name="richkd", storage=storage)
    complete = study.get_trials(states=[TrialState.COMPLETE])
    return max(complete, key=lambda one: (one.value, -one.number)).params if complete else None


def fake(
    folder: Path,
    trials: int = 12,
    *,
    seeds: int = 3,
    complete: int = 4,
    prompts: tuple[str, ...] = PROMPTS,
    words: tuple[str, ...] = (),
) -> Path:
    """Make the folder of a sweep whose trials have ended.

    Args:
        folder: To be made.
        trials: Of the main search, and up to 12 of kd's; of these every `complete`-th ran to its end, and one failed.
        seeds: Of each refit; 0 makes none, and no summary.
        complete: 0: none ran to its end.
        prompts: Names of prompt sets that the trials drew from.
        words: `key=value`, laid over conf/digits.yaml.
    """
    rng = np.random.default_rng(0)
    words = (
        f"storage={folder.parent}",
        f"sweep.trials={max(trials, 1)}",
        f"refit.seeds={seeds or 2}",
        *words,
    )
    layers = read(list(words))
    if prompts != PROMPTS:  # names that no config takes, but that an older study may hold
        layers = layers.over("", {"sweep.space.clip.prompts": None})
    folder.mkdir(parents=True)
    asked = {"name": folder.name, "started": "2026-01-01T00:00:00+0000", "layers": layers.to_list()}
    write_json(folder / "sweep.json", asked | {"tracking": "http://127.0.0.1:9"})
    write_json(folder / "spent.json", {"seconds": 4000.0, "gpu_seconds": 0.0})
    sweep = Sweep(folder, layers)
    storage = f"sqlite:///{folder / 'study.db'}"
    for name, count in (("richkd", trials), ("kd", min(trials, 12))):
        study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
        states = [
            TrialState.COMPLETE if complete and k % complete == 0 else TrialState.PRUNED
            for k in range(count)
        ]
        if count > 2:
            states[2] = TrialState.FAIL
        study.add_trials([trial(rng, state, prompts) for state in states])
    best = study_best(storage) or printed("richkd-l")
    ran = {"richkd": best, "richkd_paper": printed("richkd-l")}
    for method in sweep.students if seeds else ():
        settings = sweep.settings.sweep.settings | ran.get(method, {})
        for seed in range(seeds):
            job = sweep.refit(Refits(method=method, settings=settings), seed, settings)
            steps = curve(rng, 85 if method == "ce" else 92)
            rows = [{"epoch": epoch, "val/top1": top1} for epoch, top1 in enumerate(steps, 1)]
            job.folder.mkdir(parents=True)
            (job.folder / "config.yaml").write_text(dump(job.config))
            text = "".join(json.dumps(row | {"train/loss": 1.0}) + "\n" for row in rows)
            (job.folder / "metrics.jsonl").write_text(text)
            metrics = {"best_val_top1": max(steps), "best_val_loss": 0.3}
            metrics |= {f"{part}/top1": float(rng.normal(90, 1)) for part in ("test", "teacher")}
            run = {
                "state": "finished",
                "digest": digest(job.config),
                "data": "0" * 64,
                "threads": 1,
            }
            write_json(job.folder / "run.json", run | {"workers": 1, "metrics": metrics})
    if seeds:
        write_json(folder / "summary.json", {"failures": {}})
    return folder
