"""Put the winner of a sweep into MLflow's model registry; it replaces a champion only if it beats it.

    python -m tune promote digits --dry-run
    python -m tune promote digits

A student and its data have one registered model, `richkd-STUDENT-DATA`, a sweep that is promoted gives it a
version. The alias `champion` is the version to use, `challenger` the one that was promoted last and did not win. A
champion that is replaced keeps no alias; the version that replaced it says in its description which it was.

They are compared by the refits of the setting found, a number a seed, on validation rows: test rows choose nothing.
Each was chosen on these rows by its own sweep, which flatters both. What the registry says of a version is read as
text that anybody may have written.
"""

import hashlib
import json
import math
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from richkd import cache, checkpoint
from richkd.config import Config, Data
from richkd.data import load, split
from richkd.errors import ConfigError, RichkdError
from richkd.files import read_record
from richkd.layers import Layers, build, flatten
from richkd.student import load_student
from tune import names
from tune.best import best, called
from tune.summary import difference, read_refits, spread
from tune.sweep import asked_of
from tune.tracking import Client, Tracker, alone

CHAMPION, CHALLENGER = "champion", "challenger"
DIGEST = "richkd.checkpoint"  # the tag by which a version is found again
# images that show what the model takes: made up, since nobody's own should leave for a registry by this
EXAMPLES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What a version is judged by, as its tags keep it.

    Attributes:
        val: Validation accuracy in percent by seed.
        test: Test accuracy likewise, to be shown.
        data: Digest of images, labels and names.
        rows: Digest of the numbers of the validation rows.
    """

    val: dict[int, float]
    test: dict[int, float]
    data: str
    rows: str

    def to_tags(self) -> dict[str, str]:
        """Return the tags that keep it."""
        return {
            "richkd.val_top1": json.dumps(self.val),
            "richkd.test_top1": json.dumps(self.test),
            "richkd.test": said(self.test),
            "richkd.data": self.data,
            "richkd.validation": self.rows,
        }

    @classmethod
    def from_tags(cls, tags: dict[str, str]) -> Self | None:
        """Return what tags keep; None if they are not ours, or not whole."""
        try:
            val, test = (
                _by_seed(json.loads(tags[f"richkd.{part}_top1"])) for part in ("val", "test")
            )
            return cls(val=val, test=test, data=tags["richkd.data"], rows=tags["richkd.validation"])
        except (KeyError, ValueError, TypeError, AttributeError):
            return None


def _by_seed(found: dict[str, Any]) -> dict[int, float]:
    """Return accuracies by seed; a ValueError if there is none, or one is no number."""
    numbers = {int(seed): float(value) for seed, value in found.items()}
    if not numbers or not all(map(math.isfinite, numbers.values())):
        raise ValueError("no accuracies")
    return numbers


def said(values: dict[int, float]) -> str:
    """Return mean and spread over the seeds as text."""
    found = spread(list(values.values()))
    sd = "" if found["sd"] is None else f" ± {found['sd']:.2f}"
    return f"{found['mean']:.2f}{sd} over {found['n']} seed{'s' * (found['n'] > 1)}"


def gap(values: dict[int, float], others: dict[int, float]) -> dict[str, Any] | None:
    """Return by how much `values` are higher, with a 95 % t interval; None if there is no spread to judge by.

    Seeds that both have make pairs, if there are two at least: what a seed does to both, such as which rows have
    labels, cancels. Otherwise it is Welch's interval; of a side with one seed the spread is taken to be the other's.

    Returns:
        `mean`, `low`, `high`, and `pairs`, 0 for Welch's.
    """
    paired = difference(values, others)
    if paired is not None and paired["n"] > 1:
        return {key: paired[key] for key in ("mean", "low", "high")} | {"pairs": paired["n"]}
    sides = [list(values.values()), list(others.values())]
    known = [statistics.variance(side) for side in sides if len(side) > 1]
    if not known:
        return None
    errors = [  # of each mean, squared
        (statistics.variance(side) if len(side) > 1 else known[0]) / len(side) for side in sides
    ]
    mean, error = statistics.fmean(sides[0]) - statistics.fmean(sides[1]), sum(errors)
    half = 0.0
    if error > 0:
        from scipy.stats import t

        freedom = [len(side) - 1 for side in sides]
        if 0 in freedom:
            df = max(freedom)
        else:
            df = error**2 / sum(e**2 / f for e, f in zip(errors, freedom, strict=True))
        half = float(t.ppf(0.975, df)) * error**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether an entry is the champion, why, and by what difference if one was reckoned."""

    wins: bool
    why: str
    gap: dict[str, Any] | None = None


def judge(entry: Entry, champion: Entry | None) -> Verdict:
    """Say whether an entry beats a champion, which takes more than what seeds do.

    Args:
        entry: The candidate.
        champion: None if its tags are not ours.
    """
    if champion is None:
        return Verdict(wins=False, why="that has no accuracies to compare with")
    if champion.data != entry.data:
        return Verdict(wins=False, why="that was made with other images, labels or classes")
    if champion.rows != entry.rows:
        return Verdict(wins=False, why="that was judged on other validation rows")
    if len(entry.val) < 2:
        return Verdict(wins=False, why="a single seed cannot tell skill from luck (refit.seeds)")
    found = gap(entry.val, champion.val)
    seeds = f"{found['pairs']} common seeds" if found["pairs"] else "without common seeds"
    text = (
        f"{found['mean']:+.2f} (95 % interval {found['low']:+.2f} to {found['high']:+.2f}, {seeds})"
    )
    if found["low"] > 0:
        return Verdict(wins=True, why=text, gap=found)
    more = "; more of them (refit.seeds) would tell more" if found["mean"] > 0 else ""
    return Verdict(wins=False, why=f"{text} is no more than seeds do{more}", gap=found)


def promote(folder: Path, *, cell: str | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Register the best checkpoint of a finished sweep, and make it the champion if it is the first or better.

    A checkpoint that is registered already gets no second version, but is judged again. On a database promotions
    wait for each other. A server has no lock to offer: of two at the same moment the later one is the champion
    though it may have met only the one before; promoting the other again sets it right.

    Args:
        folder: Sweep folder.
        cell: As in `best`.
        dry_run: Whether to say only what would happen.

    Returns:
        `model`, `version` (None while it has none), `new` (whether it had none), `champion` (whether it is),
        `verdict`, `difference` (as `gap`), `before` (version of the champion that it met), `sweep`, `refit`, `val`
        and `test` as text, `test_before`, `dry_run`, `link`.

    Raises:
        ConfigError: If the sweep has not finished, was judged on test rows, or MLflow has no run of it.
        CorruptError: If a checksum is not the recorded one.
        RichkdError: If the checkpoint does not reproduce its accuracy.
        Stopped: If MLflow does not answer.
    """
    found = best(folder, cell=cell)
    if not found["verified"]:
        raise RichkdError(
            f"the best checkpoint of {folder.name} does not reproduce its accuracy (recorded {found['recorded']}, found "
            f"{found['found']}); nothing is promoted."
        )
    source, (run_id, uri) = Path(found["checkpoint"]), run_of(folder)
    manifest = checkpoint.verify(source)
    meta, digest = manifest["meta"], manifest["files"][checkpoint.WEIGHTS]["sha256"]
    config = build(Layers().over("", flatten(meta["config"])))
    if config.caution:
        raise ConfigError(
            f"a champion is judged on validation rows but {folder.name} has selection=paper; sweep again with "
            "selection=validation."
        )
    model = names.model(config.student.name, label(config.data))
    entry = Entry(**accuracies(source), data=meta["data"], rows=rows_of(config))
    about = {
        "richkd.sweep": folder.name,
        "richkd.run": run_id,
        "richkd.refit": source.parent.name,
        DIGEST: digest,
    }
    client = Client(uri)
    client.run(run_id)  # refused now, if at all
    with alone(uri):
        version = client.version(model, DIGEST, digest)
        new = version is None
        if new and not dry_run:
            version = client.register(
                run_id,
                model,
                load_student(source),
                _example(meta),
                classes=meta["names"],
                files=[source / name for name in checkpoint.FILES],
                tags=about,
            )
        # as late as can be: registering takes seconds
        champion = client.aliases(model).get(CHAMPION)
        before = None if champion is None else Entry.from_tags(client.tags(model, champion))
        verdict = _verdict(entry, version, champion, before)
        if not dry_run:
            client.tag(model, version, about | entry.to_tags())
            if champion != version:  # what made it the champion is still to be read
                text = f"validation {said(entry.val)}, test {said(entry.test)}; {verdict.why}"
                client.describe(model, version, text)
            _crown(client, model, version, wins=verdict.wins)
    return {
        "model": model,
        "version": version,
        "new": new,
        "champion": verdict.wins,
        "verdict": verdict.why,
        "difference": verdict.gap,
        "before": champion,
        "sweep": folder.name,
        "refit": source.parent.name,
        "val": said(entry.val),
        "test": said(entry.test),
        "test_before": None if before is None else said(before.test),
        "dry_run": dry_run,
        "link": None if version is None else client.pages.version(model, version),
    }


def _verdict(
    entry: Entry, version: str | None, champion: str | None, before: Entry | None
) -> Verdict:
    """Return the verdict on a version, in words that name the champion which it met."""
    if champion is None:
        return Verdict(wins=True, why="there was no champion")
    if champion == version:
        return Verdict(wins=True, why="is the champion already")
    found = judge(entry, before)
    verb = "beats" if found.wins else "does not beat"
    return Verdict(wins=found.wins, why=f"{verb} version {champion}: {found.why}", gap=found.gap)


def _crown(client: Client, model: str, version: str, *, wins: bool) -> None:
    """Give a version the alias that it has won, and take the other one from it."""
    won, lost = (CHAMPION, CHALLENGER) if wins else (CHALLENGER, CHAMPION)
    aliases = client.aliases(model)
    if aliases.get(won) != version:
        client.alias(model, won, version)
    if aliases.get(lost) == version:
        client.unalias(model, lost)


def lines(answer: dict[str, Any]) -> list[str]:
    """Return what came of a promotion as lines for the terminal."""
    model, version = answer["model"], answer["version"]
    number = "a new version" if version is None else f"version {version}"
    known = "" if answer["new"] else ", registered before"
    alias = CHAMPION if answer["champion"] else CHALLENGER
    beside = ""
    if answer["test_before"] is not None and answer["before"] != version:
        beside = f", version {answer['before']} {answer['test_before']}"
    told = [
        f"model      {model}, {number}: {answer['refit']} of {answer['sweep']}{known}",
        f"validation {answer['val']}",
        f"test       {answer['test']}{beside}; validation decides",
        f"{alias:<11}{'would be: ' * answer['dry_run']}{answer['verdict']}",
    ]
    if answer["dry_run"]:
        return told
    use = f'mlflow.pytorch.load_model("models:/{model}@{alias}")'
    return [*told, f"use it     {use}", f"see it     {answer['link']}"]


def run_of(folder: Path) -> tuple[str, str]:
    """Return id of a sweep's run and address of the MLflow that has it.

    Raises:
        ConfigError: If MLflow has not heard of it yet, or the environment lacks its password.
    """
    asked, _ = asked_of(folder)
    ids = folder / "mlflow.json"
    found = read_record(ids).get(folder.name) if ids.exists() else None
    if found is None:
        raise ConfigError(
            f"MLflow at {asked['tracking']} must have a run of {folder.name} but has none yet; send it: python -m tune "
            f"sync {called(folder)}"
        )
    return found, Tracker.recall(asked["tracking"])


def accuracies(source: Path) -> dict[str, dict[int, float]]:
    """Return `val` and `test` of all seeds of the refit whose best checkpoint is at `source`, in percent."""
    name, _, _ = source.parent.name.rpartition("-seed")
    runs = read_refits(source.parent.parent, {"": name})[""]
    return {
        part: {seed: metrics[key] for seed, metrics in runs.items()}
        for part, key in (("val", "best_val_top1"), ("test", "test/top1"))
    }


def rows_of(config: Config) -> str:
    """Return a digest of the validation rows of a run: their numbers in its data set."""
    dataset = load(config.data, cache.root(config.cache))
    rows = split(dataset, config.data, config.seed).validation
    return hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()


def label(data: Data) -> str:
    """Return what data are called in the registry: their source, or their own folder or file."""
    if data.path is None:
        return data.source
    place = Path(os.path.abspath(data.path))
    return place.stem if data.source == "arrays" else place.name


def _example(meta: dict[str, Any]) -> np.ndarray:
    """Return the images of the input example, uint8 `(N, C, H, W)`: noise, the same for all."""
    shape = (EXAMPLES, meta["channels"], *meta["size"])
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)
