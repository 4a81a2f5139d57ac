"""Will CLIP help here, by how much, with which weight: what can be told before anything is distilled.

    python -m richkd diagnose my.yaml                     on the validation rows
    python -m richkd diagnose my.yaml diagnose.rows=all teacher.logits=FILE.npy clip.logits=FILE.npz:KEY

It speaks of the teachers, alone and fused, not of a student. What it returns is plain JSON; `document` makes a page of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from richkd import checkpoint, distill, fusion, teachers, theory
from richkd.config import Config
from richkd.data import split
from richkd.diagnose import measure
from richkd.errors import ConfigError, DataError, RichkdError
from richkd.evaluate.accuracy import LEAST, accuracy
from richkd.evaluate.outcomes import outcomes
from richkd.progress import Progress
from richkd.student import find_checkpoint, run_config
from richkd.teachers import FusedTeacher

IMPLAUSIBLE = 99.5  # top-1, %, above which a foreign teacher has probably seen the rows
FAR = 5.0  # standard errors, and points, by which one is better here than on test rows, likewise
NEAR_NOTHING = 0.5  # points up to which a gain would change little
MOST = 20_000  # rows that teachers are judged on: what more would tell is far below what a gain varies by
SAMPLE = 20_000  # transfer rows of which targets are looked at


@dataclass(kw_only=True, slots=True, eq=False)
class Rows:
    """What the teachers say of the rows that they are judged on.

    Attributes:
        task: Logits of the task teacher, `(N, K)`.
        clips: Of the zero-shot teacher by prompt set, on the scale in use.
        labels: `(N,)`, all known.
        balanced: Whether each class counts alike.
    """

    task: Tensor
    clips: dict[str, Tensor]
    labels: Tensor
    balanced: bool


def diagnose(
    config: Config,
    prompts: Sequence[str] = (),
    progress: Progress | None = None,
    *,
    task: distill.Task | None = None,
) -> dict[str, Any]:
    """Return whether the fused teacher is better than the task teacher, by how much, with which weight, and why.

    Args:
        config: Data and teachers; of methods only the temperature counts.
        prompts: Prompt sets, or files of logits where `clip.logits` is given, that are compared with that of `clip`, unless
            `diagnose.prompts` says which.
        progress: Told how far it is.
        task: What `distill.open_task` gives for `config`, if it is open already.

    Returns:
        Plain JSON. All accuracies are in percent and on the rows of `diagnose.rows`; weights are of the task teacher, on
        `scale`. `teacher`, `fused` (at `fusion.alpha`, as `outcomes`; `outcomes_weighted` are at the theory's weight) and each of
        `clip` are as `measure.teacher` returns them; `curve`, `plateau`, `alpha_star`, `errors` and what follows are of the prompt
        set that fuses best, `prompts`. `helps` is true if the lower end of the 95 % interval of `gain` lies above 0, None if the
        rows cannot tell, which `caution` then says; no weight is recommended then.

    Raises:
        ConfigError: If there are no such rows, or nothing is fused.
        DataError: If a teacher is constant, or does not know the rows.
    """
    config = teachers.with_both(config)
    task = task or distill.open_task(config, progress)
    opened = dict(each_fused(config, task, prompts, progress))
    first = next(iter(opened.values()))
    parts = rows_of(config, task)
    labels = torch.cat([own[rows] for _, rows, own in parts])
    rows = Rows(
        task=logits_of(first, parts, 0),
        clips={name: logits_of(each, parts, 1) for name, each in opened.items()},
        labels=labels,
        balanced=task.split.balanced,
    )
    found = measured(rows, config, task.dataset.names, progress)
    found["data"] = task.dataset.name
    found["rows"] = {"of": config.diagnose.rows, "n": len(labels)}
    found["balanced"] = rows.balanced
    found["several"] = shares_of(opened[found["prompts"]], config, parts, rows.task, labels)
    found["target"] = target_of(opened[found["prompts"]], task, config)
    return judged(found, config, cautions(rows, config, task, parts, first))


def each_fused(
    config: Config, task: distill.Task, prompts: Sequence[str], progress: Progress | None
) -> Iterator[tuple[str, FusedTeacher]]:
    """Yield the fused teacher with each of the prompt sets that are compared, that of `clip` first."""
    key = "prompts" if config.clip.logits is None else "logits"
    wanted = prompts if config.diagnose.prompts is None else config.diagnose.prompts
    own = distill.open_teacher(config, task, progress)
    yield getattr(config.clip, key), own
    for name in dict.fromkeys(beside(config, name) for name in wanted):
        if name == getattr(config.clip, key):
            continue
        other = replace(config, clip=replace(config.clip, **{key: name}))
        try:
            clips = teachers.open_clip_teachers(
                other.clip, task.dataset, task.device, task.cache, progress
            )
        except RichkdError as error:
            error.args = (f"diagnose.prompts, {name}: {error}",)
            raise
        yield name, FusedTeacher(other, task.split, task.labels, own.task, clips)


def beside(config: Config, name: str) -> str:
    """Return what a prompt set that is compared is called in full: of logits in one file of several its key will do."""
    file, _, key = (config.clip.logits or "").rpartition(":")
    alone = file and key and ":" not in name and not Path(name).exists()
    return f"{file}:{name}" if alone else name


Part = tuple[str, Tensor, Tensor]  # `train` or `test`, which of its rows, and labels of all of them


def rows_of(config: Config, task: distill.Task) -> list[Part]:
    """Return the rows that teachers are judged on, as far as their labels are known, MOST of them at most.

    Raises:
        ConfigError: If there are too few.
    """
    test = torch.from_numpy(task.dataset.test.labels)
    held_out = torch.from_numpy(task.split.validation)
    everything = torch.arange(len(task.labels))
    chosen = {
        "validation": [("train", held_out, task.labels)],
        "test": [("test", torch.arange(len(test)), test)],
        "all": [("train", everything, task.labels), ("test", torch.arange(len(test)), test)],
    }[config.diagnose.rows]
    found = [(part, rows[labels[rows] >= 0], labels) for part, rows, labels in chosen]
    count = sum(len(rows) for _, rows, _ in found)
    if count < LEAST:
        raise ConfigError(
            f"diagnose.rows={config.diagnose.rows} must hold {LEAST} labelled rows or more but has {count}; "
            f"{'' if config.selection == 'paper' else 'raise data.validation, or '}say diagnose.rows=test or all."
        )
    return drawn(found, count, config.seed) if count > MOST else found


def drawn(parts: Sequence[Part], count: int, seed: int) -> list[Part]:
    """Return MOST of so many rows, drawn at random."""
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng([seed, 10]).choice(count, MOST, replace=False)] = True
    found, start = [], 0
    for part, rows, labels in parts:
        found.append((part, rows[torch.from_numpy(chosen[start : start + len(rows)])], labels))
        start += len(rows)
    return found


def logits_of(teacher: FusedTeacher, parts: Sequence[Part], which: int) -> Tensor:
    """Return the logits `(N, K)` of the task teacher (`which` 0) or of the zero-shot one (1) on those rows.

    Raises:
        DataError: If they are unknown, or not finite.
    """
    who, found = ("the task teacher", "the zero-shot teacher")[which], []
    for part, rows, _ in parts:
        known = (teacher.task and getattr(teacher.task, part)), teacher.zero_shot[part]
        if known[which] is None:
            raise DataError(
                f"diagnose needs logits of the {part} rows but {who}'s file has the training rows alone; give all rows, or say "
                "diagnose.rows=validation."
            )
        found.append(known[which][rows.to(known[which].device)].cpu())
    logits = torch.cat(found)
    if bad := int((~logits.isfinite().all(1)).sum()):
        raise DataError(
            f"{who} must give finite logits but is NaN or infinite on {bad} of {len(logits)} rows; look at its weights, or "
            "compute its logits anew."
        )
    return logits


def measured(
    rows: Rows, config: Config, names: tuple[str, ...], progress: Progress | None = None
) -> dict[str, Any]:
    """Return all that logits and labels say, before it is judged whether these rows may say it."""
    tell, parts = progress or (lambda what, done, total: None), len(rows.clips) + 1
    task, labels, seed = rows.task, rows.labels, config.seed
    weights = measure.row_weights(labels, balanced=rows.balanced)
    base, alpha = task.argmax(1) == labels, config.fusion.alpha
    clips, right = [], {}
    for k, (name, clip) in enumerate(rows.clips.items()):
        tell("diagnosis", k, parts + 1)
        right[name] = measure.right_along(task, clip, labels)
        gain = measure.out_of_bag(right[name], base, weights, seed)
        own = measure.teacher(clip, labels, seed, balanced=rows.balanced)
        along = measure.top1(right[name], weights)
        best = {"alpha": measure.GRID[int(along.argmax())], "top1": along.max().item()}
        clips.append({"prompts": name} | own | {"gain": gain, "best": best})
    chosen = max(clips, key=lambda each: each["best"]["top1"])["prompts"]
    tell("diagnosis", parts - 1, parts + 1)
    clip, along = rows.clips[chosen], measure.top1(right[chosen], weights).tolist()
    fused = fusion.fuse(task, clip, alpha)
    every = torch.cat(list(right.values()))
    both = {
        who: measure.teacher(z, labels, seed, balanced=rows.balanced)
        for who, z in (("teacher", task), ("fused", fused))
    }
    own, rules = theory.errors(task, clip, labels), measure.rules(task, clip, labels, seed, weights)
    tell("diagnosis", parts, parts + 1)
    found = {
        "scale": config.clip.scale,
        "temperature": config.loss.temperature,
        "classes": len(names),
        "teacher": both["teacher"],
        "clip": clips,
        "prompts": chosen,
        "fused": {"alpha": alpha} | both["fused"],
        "curve": [
            {"alpha": a, "top1": value}
            for a, value in sorted(zip(measure.GRID, along, strict=True))
        ],
        "best": next(each["best"] for each in clips if each["prompts"] == chosen),
        "plateau": measure.plateau(along),
        # the prompt set is chosen in each sample, too
        "gain": measure.out_of_bag(every, base, weights, seed),
        "outcomes": outcomes(task, fused, labels),
        "errors": plain(own),
        "rules": rules,
        "weighting": measure.weightings(task, clip, labels, seed, weights, rules["nll"]["folds"]),
        "standardised": {form: getattr(own, form)() for form in measure.FORMS},
        "errors_along": measure.errors_along(task, clip, labels, seed),
        "certain": config.evaluate.certain,
        "figure1": measure.figure1(
            {"teacher": task, "fused": fused},
            labels,
            config.evaluate.certain,
            {who: each["temperature"] for who, each in both.items()},
        ),
        "agreement": measure.agreement(task, clip, labels),
        "by_class": measure.classes({"teacher": task, "clip": clip, "fused": fused}, labels, names),
    }
    tell("diagnosis", parts + 1, parts + 1)
    found["alpha_star"] = {form: found["rules"][form]["alpha"] for form in (*measure.FORMS, "nll")}
    weighted = fusion.fuse(task, clip, found["alpha_star"]["full"])
    found["outcomes_weighted"] = outcomes(task, weighted, labels)
    found["probabilities"] = of_probabilities(task, clip, labels, found)
    found["alpha_star"]["probabilities"] = (found["probabilities"] or {}).get("full")
    return found


def plain(own: theory.Errors) -> dict[str, float]:
    """Return errors as plain JSON."""
    names = ("bias_t", "bias_c", "sigma_t", "sigma_c", "rho", "spread_t", "spread_c")
    return {name: getattr(own, name) for name in names}


def of_probabilities(
    task: Tensor, clip: Tensor, labels: Tensor, found: dict[str, Any]
) -> dict[str, float] | None:
    """Return errors and weights on calibrated probabilities, None where one of the teachers cannot be calibrated."""
    zero_shot = next(each for each in found["clip"] if each["prompts"] == found["prompts"])
    temperatures = found["teacher"]["temperature"], zero_shot["temperature"]
    if None in temperatures:
        return None
    pair = ((z.double() / t).softmax(1) for z, t in zip((task, clip), temperatures, strict=True))
    own = theory.errors_of_probabilities(*pair, labels)
    return plain(own) | {form: getattr(own, form)() for form in measure.FORMS}


def shares_of(
    teacher: FusedTeacher, config: Config, parts: Sequence[Part], task: Tensor, labels: Tensor
) -> list[dict[str, Any]]:
    """Return the weight of each of several zero-shot teachers and of the task teacher by theory; nothing of a single pair.

    Returns:
        Of each: `teacher`, `standardised`, and `share` of the logits on the scale in use.
    """
    if len(teacher.clips) < 2:
        return []
    names, logits = ["task teacher"], [task]
    for (field, own, _), clip, factor in zip(
        teachers.shares(config.clip), teacher.clips, teacher.factors, strict=True
    ):
        names.append(
            f"{field}: {called(own.logits) if own.logits else f'{own.model}, {own.prompts}'}"
        )
        logits.append(
            torch.cat([factor * getattr(clip, part)[rows].cpu() for part, rows, _ in parts])
        )
    moments, spreads = theory.second_moments(logits, labels)
    weights = theory.shares(moments)
    mapped = theory.mapped_shares(weights, spreads)
    return [
        {"teacher": name, "standardised": weight, "share": share}
        for name, weight, share in zip(names, weights.tolist(), mapped, strict=True)
    ]


def target_of(teacher: FusedTeacher, task: distill.Task, config: Config) -> dict[str, Any]:
    """Return what the student will receive on the rows that it learns from, or on SAMPLE of them, un-augmented."""
    rows = task.split.transfer
    if len(rows) > SAMPLE:
        rows = np.sort(np.random.default_rng([config.seed, 9]).choice(rows, SAMPLE, replace=False))
    chosen = torch.from_numpy(rows)
    own, clip = (each.cpu() for each in teacher.parts("train", chosen))
    labels = task.labels[chosen]
    known = labels >= 0
    error = None
    if known.any():
        error = 100 - accuracy(own[known], labels[known])["top1"]
    return {
        "rows": len(rows),
        "teacher_error": error,
        "curve": measure.targets(own, clip, config.loss.temperature),
    }


def cautions(
    rows: Rows,
    config: Config,
    task: distill.Task,
    parts: Sequence[Part],
    teacher: FusedTeacher,
) -> str | None:
    """Return why these rows cannot tell how good the task teacher is, None if nothing speaks against them."""
    name, count = config.diagnose.rows, len(rows.labels)
    for part, chosen, _ in parts:
        if part == "train" and (seen := learnt_from(config, task)) is not None:
            own = int(np.isin(chosen.numpy(), seen).sum())
            if own:
                return (
                    f"the task teacher was trained on {own} of these {count} rows, so its accuracy on them is flattered; name rows "
                    f"that it has not seen: diagnose.rows={'validation' if name == 'all' else 'test'}"
                )
    top1 = accuracy(rows.task, rows.labels)["top1"]
    if teachers.is_guess(top1, rows.task.shape[1]):
        return (
            f"the task teacher is right on {top1:.1f} % of these {count} rows, little better than a guess; check the order of its "
            "rows and of its classes, and its normalisation"
        )
    if not config.teacher.brought:
        return None
    # of all rows the training rows come first: next to test rows that it has not seen they would be hidden
    part, n = parts[0][0], len(parts[0][1])
    top1 = accuracy(rows.task[:n], rows.labels[:n])["top1"]
    which = f"{top1:.1f} % of {n} {'training' if part == 'train' else part} rows"
    if top1 >= IMPLAUSIBLE:
        return (
            f"the task teacher is right on {which}, as if it had been trained on them; name rows that it has not seen, with "
            "diagnose.rows, or bring a teacher that left them out"
        )
    tested = teacher.task.test
    if part == "train" and tested is not None:
        labels = torch.from_numpy(task.dataset.test.labels)
        there = accuracy(tested.cpu(), labels)["top1"]
        shares = ((top1, n), (there, len(labels)))
        noise = sum(p * (100 - p) / each for p, each in shares) ** 0.5
        if top1 - there > max(FAR, FAR * noise):
            return (
                f"the task teacher is right on {which} but on {there:.1f} % of the test rows, as if it had been trained on them; say "
                "diagnose.rows=test, or bring a teacher that left them out"
            )
    return None


def learnt_from(config: Config, task: distill.Task) -> np.ndarray | None:
    """Return the training rows that the task teacher learnt from, None if nobody knows.

    A teacher that we trained carries the digest of what it has seen; the rows are cut again and compared with it.
    """
    given = config.teacher
    if not given.brought:
        return distill.open_task(teachers.teacher_recipe(config), beside=task).split.labelled
    if given.checkpoint is None:
        return None
    folder = Path(given.checkpoint)
    if folder.name == checkpoint.WEIGHTS and checkpoint.exists(folder.parent):
        folder = folder.parent
    if not folder.is_dir():
        return None
    saved = checkpoint.load(find_checkpoint(folder))
    meta = saved.meta
    if meta["data"] != task.dataset.digest:
        return None
    before = run_config(saved)
    seen = split(task.dataset, before.data, before.seed, before.selection)
    if seen.digest != meta["trained_on"]:
        return None
    return seen.transfer if before.loss.distils else seen.labelled


def of_target(found: dict[str, Any], name: str, alpha: float) -> float:
    """Return what a diagnosis found of the target at a weight, between two of the grid; as `measure.targets` names it."""
    curve = found["target"]["curve"]
    along = ([each[key] for each in curve] for key in ("alpha", name))
    return float(np.interp(alpha, *along))


def called(prompts: str) -> str:
    """Return what a prompt set is called: of a file of logits its key, or its name."""
    path, _, key = prompts.rpartition(":")
    return key if path and not Path(prompts).exists() else Path(prompts).name


def judged(found: dict[str, Any], config: Config, caution: str | None) -> dict[str, Any]:
    """Return what was found with a verdict; without a weight where the rows cannot tell."""
    gain, plateau = found["gain"], found["plateau"]
    found["caution"], found["start"] = caution, None
    over = f"{found['teacher']['top1']:.1f} %"
    prompts = called(found["prompts"])
    if caution is not None:
        found["helps"], found["plateau"], found["several"] = None, None, []
        found["alpha_star"] = dict.fromkeys(found["alpha_star"])
        found["verdict"] = f"Whether fusing helps cannot be told from these rows: {caution}."
        return found
    found["helps"] = gain["low"] > 0
    mean, low, high = (
        f"{gain[key]:+.1f}".replace("-0.0", "+0.0") for key in ("mean", "low", "high")
    )
    interval = f"{mean} points (95 % interval {low} to {high}) over {over}"
    alone = next(each for each in found["clip"] if each["prompts"] == found["prompts"])
    if not found["helps"]:
        # of a few rows an interval that holds 0 says little
        open_ = gain["mean"] > 0 and gain["high"] > NEAR_NOTHING
        how = "is not shown to be better on so few rows" if open_ else "is not better"
        advice = "judge on more rows (diagnose.rows, data.validation), " if open_ else ""
        found["verdict"] = (
            f"The fused teacher {how}: {interval} at the best weight, scale {found['scale']}, prompts {prompts}, with which CLIP "
            f"alone is right on {alone['top1']:.1f} %; {advice}distil from the task teacher alone (method.name=kd), or try other "
            "prompts or another CLIP."
        )
        return found
    # of raw cosines a weight that counts may be a thousandth
    alpha = round(found["alpha_star"]["full"], 6)
    kept = of_target(found, "kept", alpha)
    key = "clip.prompts" if config.clip.logits is None else "clip.logits"
    found["start"] = {
        "fusion.space": "logits",
        "fusion.alpha": alpha,
        "loss.temperature": float(f"{kept:.4g}"),
        "loss.temperature_of": "fused",
        key: found["prompts"],
        "clip.scale": found["scale"],
    }
    low, high = plateau
    weight = f"weight {low:g} to {high:g}" if low < high else f"weight {low:g}"
    clip = (
        f" and {alone['top1']:.1f} % of CLIP alone"
        if alone["top1"] > found["teacher"]["top1"]
        else ""
    )
    found["verdict"] = (
        f"The fused teacher is better: {interval}{clip}, {weight} at scale {found['scale']}, {alpha:.2g} by theory with temperature "
        f"{kept:.2g}, prompts {prompts}."
    )
    return found
