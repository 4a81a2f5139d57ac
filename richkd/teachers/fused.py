"""The fused teacher as one object: rows and views in, out comes what the student learns from.

Shapes: N training rows, M test rows, B rows of a batch, K classes.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from richkd import fusion, weighting
from richkd.config import Config
from richkd.data import Split
from richkd.data.views import sent
from richkd.errors import ConfigError
from richkd.teachers.clip import ClipTeacher
from richkd.teachers.task import TaskTeacher
from richkd.teachers.whole import WHOLE, blocks


def lender_of(control: str, split: Split, labels: Tensor, key: list[int]) -> Tensor | None:
    """Return of each training row the one whose zero-shot logits it is given under a control, None if its own.

    Rows that are learnt from are permuted among themselves, so that what the student hears on the whole stays the same, a
    long tail included; others keep their own. It is one permutation for a whole run, and another for another seed: by a
    single one a lucky draw would look like an effect.

    Args:
        control: As `clip.control`. `permuted-in-class` reads the *true* labels of rows that are learnt from, also of those
            whose label the student must not see: it is a control, and no method.
        split: Says which rows are learnt from.
        labels: True labels of all training rows, `(N,)`; those without one make a class.
        key: Seed of the permutation.
    """
    if control not in ("permuted", "permuted-in-class"):
        return None
    rng, rows, found = np.random.default_rng(key), split.transfer, np.arange(len(labels))
    groups = labels.numpy()[rows] if control == "permuted-in-class" else np.zeros_like(rows)
    for k in np.unique(groups):
        found[rows[groups == k]] = rng.permutation(rows[groups == k])
    return torch.from_numpy(found)


class Said(NamedTuple):
    """What the teachers say of some crops.

    Attributes:
        target: Log-probabilities `(B, K)` of the fused teacher; None where no logits are learnt.
        beside: Of a loss of features: features `(B, D)` of each teacher that has a weight, the task teacher first, or the
            task teacher's transformed maps `(B, E)`, a stage each.
    """

    target: Tensor | None
    beside: tuple[Tensor, ...]


class FusedTeacher:
    """What the student learns from: the task teacher, the zero-shot teacher, or both.

    A teacher whose weight is 0 is not opened, so that plain distillation needs no CLIP.

    Attributes:
        task: The task teacher, None if it takes no part.
        clips: The zero-shot teachers that take part.
        factors: Constant of each from the model's scale to the scale in use.
        zero_shot: Their logits on that scale, mixed by their shares, `(N, K)` of `train` and `(M, K)` of `test`; None
            where there are none. Those of rows that are learnt from are what `clip.control` makes of them.
        lender: Of each training row the one whose zero-shot logits and features it is given, `(N,)`; None: its own.
        temperature: T of the loss, after `loss.temperature_of` was applied.
        alpha: Weight of the task teacher.
        weighting: What moves it from row to row; None: nothing.
        fold: Of each training row, the one of the held-out rows that it is in, from 1 on; 0 for all others, `(N,)`.
        widths: Numbers of the features of each teacher that a loss of features listens to.
        weights: Weight of each of these.
        identities: By name of the teachers that take part, what changes with their outputs.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        labels: Tensor,
        task: TaskTeacher | None,
        clips: list[ClipTeacher],
    ) -> None:
        self.task, self.clips = task, clips
        self.identities = {} if task is None else {"teacher": task.identity}
        for k, clip in enumerate(clips):
            self.identities["clip" if k == 0 else f"clip {k + 1}"] = clip.identity
        self.alpha, self.space = config.fusion.alpha, config.fusion.space
        self.loss, self.standardised = config.loss, config.loss.standardise
        self.widths, self.weights = self._features(config.feature_alpha)
        rows, held_out = (torch.from_numpy(part) for part in (split.transfer, split.validation))
        asked = config.asks_logits
        # of logits that nobody asks for the scale is of no effect
        scale = config.clip.scale if asked else "model"
        needs_task = scale in ("match_std", "calibrated")
        self.factors = [
            fusion.scale_factor(
                scale,
                logit_scale=clip.logit_scale,
                transfer=(blocks(task.train, rows), blocks(clip.train, rows))
                if needs_task
                else None,
                held_out=(task.train[held_out].cpu(), clip.train[held_out].cpu(), labels[held_out])
                if needs_task
                else None,
            )
            for clip in clips
        ]
        self.zero_shot = {
            part: self._mixed([getattr(clip, part) for clip in clips]) for part in ("train", "test")
        }
        self.silent, own = config.clip.control == "zeros", self.zero_shot["train"]
        self.lender = lender_of(
            config.clip.control, split, labels, [config.data.seed, 5, config.seed]
        )
        if self.silent and own is not None:
            self.zero_shot["train"] = own.index_fill(0, rows.to(own.device), 0)
        elif self.lender is not None and own is not None:
            self.zero_shot["train"] = own[self.lender.to(own.device)]
        self.fold = torch.zeros(len(labels), dtype=torch.int64)
        self.fold[held_out] = weighting.folds(len(held_out), config.data.seed)
        self.weighting = self._fitted(config, held_out, labels)
        self.temperature = config.loss.temperature
        if asked and config.loss.temperature_of == "task" and self.alpha < 1:
            alone, fused = self.spreads(split.transfer)
            self.temperature *= fused / alone if alone else math.inf
        if not 1e-3 <= self.temperature <= 1e4:
            raise ConfigError(
                f"the temperature in use must lie in 0.001 to 10000 but loss.temperature={config.loss.temperature} "
                f"of the {config.loss.temperature_of} logits came to {self.temperature:.3g}; "
                "see whether one of the teachers is constant."
            )

    def _learnt(self, fused: Tensor) -> Tensor:
        """Return fused logits as the student learns them."""
        return fusion.standardise(fused) if self.standardised else fused

    def spreads(self, rows: np.ndarray) -> tuple[float, float]:
        """Return the spread of the task teacher's logits of un-augmented training rows, and of the fused ones, as learnt."""
        chosen = torch.from_numpy(rows)
        alone = fusion.spread(map(self._learnt, blocks(self.task.train, chosen)))
        some = chosen.split(fusion.together(self.task.classes))
        return alone, fusion.spread(self._learnt(self.fused("train", each)) for each in some)

    def _fitted(
        self, config: Config, held_out: Tensor, labels: Tensor
    ) -> weighting.Weighting | None:
        """Return what moves alpha from row to row, fitted on the held-out rows; None: nothing."""
        by = config.fusion.weighting
        if by == "one" or not config.fuses:
            return None
        task, clip = (logits.cpu() for logits in self.parts("train", held_out))
        found = weighting.fit(by, task, clip, labels[held_out], self.fold[held_out])
        return found.to(self.task.train_views.device)

    def _alphas(self, part: str, rows: Tensor | slice, task: Tensor) -> float | Tensor:
        """Return the weight of the task teacher, or that of each row `(B, 1)` by what it says of these, `(B, K)`."""
        if self.weighting is None:
            return self.alpha
        fold = sent(self.fold[rows], task.device) if part == "train" else 0
        return self.weighting.to(task.device).alphas(self.alpha, task, fold)

    def _features(self, alpha: float) -> tuple[list[int], list[float]]:
        """Return widths and weights of the teachers whose features the student is contrasted with."""
        if not self.loss.contrasts:
            return [], []
        found = [(sum(self.task.sizes), alpha)] if alpha > 0 else []
        for clip in self.clips if alpha < 1 else ():
            if clip.features is None:
                raise ConfigError(
                    f"loss.feature asks CLIP for its features but {clip.source} gives logits alone; give a model, or "
                    "fusion.feature_alpha=1."
                )
            found.append((clip.width, (1 - alpha) * clip.weight))
        return [width for width, _ in found], [weight for _, weight in found]

    def _mixed(self, known: list[Tensor | None]) -> Tensor | None:
        """Return the logits of the zero-shot teachers, scaled and mixed, None unless all are known."""
        if not known or any(each is None for each in known):
            return None
        shares = [f * clip.weight for f, clip in zip(self.factors, self.clips, strict=True)]
        # one at its own scale is no copy
        scaled = [e if s == 1 else s * e for s, e in zip(shares, known, strict=True)]
        return functools.reduce(torch.add, scaled)

    def zero_shot_logits(self, rows: Tensor, views: Tensor) -> Tensor | None:
        """Return the mixed zero-shot logits `(B, K)` for those crops of training rows, None where there are none."""
        mixed = self._mixed([clip.logits(self._lent(rows), views) for clip in self.clips])
        return torch.zeros_like(mixed) if self.silent and mixed is not None else mixed

    def _lent(self, rows: Tensor) -> Tensor:
        """Return the training rows whose zero-shot logits and features these rows are given."""
        return rows if self.lender is None else self.lender[rows]

    def _known(self, part: str, rows: Tensor | slice) -> tuple[Tensor | None, Tensor | None]:
        """Return task and zero-shot logits of un-augmented rows of `train` or `test`, both scaled, None where unknown."""
        tables = (None if self.task is None else getattr(self.task, part)), self.zero_shot[part]
        task, clip = (None if table is None else table[rows] for table in tables)
        return task, clip

    def parts(self, part: str, rows: Tensor | slice = WHOLE) -> tuple[Tensor, Tensor]:
        """Return task and zero-shot logits of un-augmented rows of `train` or `test`, both scaled.

        A teacher that takes no part is replaced by the other: with its weight of 0 it changes nothing.
        """
        task, clip = self._known(part, rows)
        return (clip if task is None else task), (task if clip is None else clip)

    def fused(self, part: str, rows: Tensor | slice = WHOLE) -> Tensor:
        """Return the fused logits of un-augmented rows of `train` or `test`."""
        task, clip = self.parts(part, rows)
        return fusion.fuse(task, clip, self._alphas(part, rows, task))

    def shown(self, part: str, rows: Tensor | slice = WHOLE) -> dict[str, Tensor]:
        """Return by name the logits of those rows of `teacher`, `clip` and, if there are both, `fused`.

        Teachers that take no part, or whose logits for that part are unknown, are left out.
        """
        found = dict(zip(("teacher", "clip"), self._known(part, rows), strict=True))
        found = {name: logits for name, logits in found.items() if logits is not None}
        if len(found) == 2:
            found["fused"] = (
                self.fused(part, rows)
                if self.space == "logits"
                else fusion.target(
                    *self.parts(part, rows), self.alpha, self.temperature, self.space
                )
            )
        return found

    def said(self, rows: Tensor, views: Tensor, pixels: Tensor | None = None) -> Said:
        """Return what is learnt of those crops of training rows, both on the CPU.

        Args:
            rows: `(B,)`.
            views: Their crops, one a row.
            pixels: The crops themselves, where they are streamed.
        """
        learnt, own = self.loss.logit > 0, ()
        if self.task is not None and (
            self.loss.maps or self.task.sizes or (learnt and self.alpha > 0)
        ):
            own = self.task.said(rows, views, pixels)
        target, beside = None, own[1:]
        if learnt:
            clip = self.zero_shot_logits(rows, views)
            task = own[0] if own else clip
            target = fusion.target(
                task,
                task if clip is None else clip,
                self._alphas("train", rows, task),
                self.temperature,
                self.space,
                standardised=self.standardised,
            )
        if len(beside) < len(self.widths):
            features = (clip.features(self._lent(rows), views) for clip in self.clips)
            beside = (*beside, *features)
        return Said(target, beside)
