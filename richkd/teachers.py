"""The fused teacher as one object: rows and views in, the student's target out.

Whether a teacher's logits are computed online, read from a cache or from a file is decided here and
nowhere else.

Shapes: N training rows, M test rows, B rows of a batch, K classes.
"""

import hashlib
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from richkd import checkpoint, fusion, zeroshot
from richkd.config import Clip, Config, Teacher, Train
from richkd.data import Dataset, Split, Views
from richkd.errors import ConfigError, CorruptError, DataError
from richkd.evaluate.accuracy import accuracy, network_logits
from richkd.files import sha256_of
from richkd.progress import Progress
from richkd.student import check_meta, find_checkpoint, network_of
from richkd.zeroshot import prompts


def read_logits(spec: str, rows: int, classes: int, *, field: str) -> Tensor:
    """Read logits that somebody computed elsewhere, float32 `(rows, classes)`.

    Args:
        spec: `FILE.npy`, `FILE.npz:KEY` or `FILE.safetensors:KEY`.
        rows: Expected number of rows, one a training image in the data set's order.
        classes: Expected number of columns.
        field: Config key, for the messages.

    Raises:
        ConfigError: If the file or the key is missing.
        DataError: If the shape is another, or a value is not finite.
        CorruptError: If the file cannot be decoded.
    """
    path, key = _file_of(spec)

    def fits(shape: tuple[int, ...]) -> None:
        if shape != (rows, classes):
            raise DataError(
                f"{field} must hold one row a training image and one column a class, {(rows, classes)}, "
                f"but {spec} has {shape}."
            )

    if not path.is_file():
        raise ConfigError(
            f"{field} must name a file (.npy, .npz:KEY or .safetensors:KEY) but {spec} is missing."
        )
    if path.suffix not in (".npy", ".npz", ".safetensors") or (path.suffix == ".npy" and key):
        raise ConfigError(f"{field} must end in .npy, .npz:KEY or .safetensors:KEY but got {spec}.")
    try:
        values = _entry(path, key, fits)
    except KeyError as error:
        raise ConfigError(
            f"{field}={spec} names no entry of the file; it has {error.args[0]}."
        ) from error
    except DataError:
        raise
    except Exception as error:  # each format has its own exceptions for a torn or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CorruptError(
            f"{field}: {path} cannot be decoded: {reason}; write it anew."
        ) from error
    if isinstance(values, np.dtype):
        raise DataError(f"{field} must hold floating-point logits but {spec} has {values}.")
    fits(tuple(values.shape))
    if not values.dtype.is_floating_point:
        raise DataError(
            f"{field} must hold floating-point logits but {spec} has {values.dtype}; are they labels?"
        )
    values = values.float()
    bad = ~values.isfinite().all(1)
    if bad.any():
        raise DataError(
            f"{field} must hold finite logits but {int(bad.sum())} rows of {spec} do not, the first is row "
            f"{int(bad.nonzero()[0])}; compute them anew."
        )
    return values


def _file_of(spec: str) -> tuple[Path, str]:
    """Split `FILE:KEY`; a path may hold colons itself."""
    name, _, key = spec.rpartition(":") if not Path(spec).exists() else (spec, "", "")
    return Path(name or spec), key


def _entry(path: Path, key: str, fits: Callable[[tuple[int, ...]], None]) -> Tensor | np.dtype:
    """Read one array, or only its type if that is no number; a KeyError says which entries there are.

    `fits` raises for a wrong shape, before content that may be very large is unpacked.
    """
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as archive:
            if key not in archive.keys():
                raise KeyError(", ".join(archive.keys()))
            return archive.get_tensor(key)
    if path.suffix == ".npy":
        values = np.load(path, mmap_mode="r", allow_pickle=False)  # shape first, content later
    else:
        # opened here, since NumPy leaves a torn file open
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if key not in archive.files:
                raise KeyError(", ".join(archive.files))
            with archive.zip.open(f"{key}.npy") as member:
                version = np.lib.format.read_magic(member)
                header = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    header = np.lib.format.read_array_header_2_0
                fits(header(member)[0])
            values = archive[key]
    if values.dtype.kind not in "fiub" or values.dtype.itemsize > 8:
        return values.dtype
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("=")))


@dataclass(kw_only=True, eq=False)
class TaskTeacher:
    """The user's own teacher: a network run on what the student sees, or given logits."""

    identity: str  # changes with its outputs; a run goes on with the same one only
    train_views: Views
    test_views: Views
    network: nn.Module | None = None
    table: Tensor | None = None  # (N, K), un-augmented

    def logits(self, rows: Tensor, views: Tensor | None) -> Tensor:
        """Return logits `(B, K)` of those crops of training rows; given logits know no crops."""
        if self.network is None:
            return self.table[rows]
        with torch.no_grad():
            return self.network(self.train_views.images(rows, views))

    @cached_property
    def train(self) -> Tensor:
        """Logits `(N, K)` of all un-augmented training rows."""
        if self.network is None:
            return self.table
        return network_logits(self.network, self.train_views, torch.arange(len(self.train_views)))

    @cached_property
    def test(self) -> Tensor | None:
        """Logits `(M, K)` of the test rows; None if only given logits of the training rows are known."""
        if self.network is None:
            return None
        return network_logits(self.network, self.test_views, torch.arange(len(self.test_views)))


def open_task(
    config: Teacher, trained: Path | None, dataset: Dataset, train_views: Views, test_views: Views
) -> TaskTeacher:
    """Return the task teacher of `config`.

    Args:
        config: Says where it comes from.
        trained: Checkpoint of the teacher that this run trained itself, if it did.
        dataset: Task; its classes must be the teacher's.
        train_views: Training images.
        test_views: Test images.
    """
    views = {"train_views": train_views, "test_views": test_views}
    if config.logits is not None:
        shape = (len(dataset.train), len(dataset.names))
        table = read_logits(config.logits, *shape, field="teacher.logits")
        return TaskTeacher(
            identity=_identity(config.logits), table=table.to(train_views.mean.device), **views
        )
    try:
        saved = checkpoint.load(trained or find_checkpoint(Path(config.checkpoint)))
        check_meta(saved)
    except ConfigError as error:
        raise ConfigError(f"teacher.checkpoint: {error}") from error
    if saved.meta["channels"] != dataset.channels:
        raise DataError(
            f"teacher.checkpoint={config.checkpoint} takes images of {saved.meta['channels']} channels but "
            f"{dataset.name} has {dataset.channels}; give a teacher of this task."
        )
    if tuple(saved.meta["size"]) != dataset.size:
        raise DataError(
            f"teacher.checkpoint={config.checkpoint} takes images of {saved.meta['size']} pixels but "
            f"{dataset.name} has {list(dataset.size)}; give a teacher of this task."
        )
    if tuple(saved.meta["names"]) != dataset.names:
        raise DataError(
            f"teacher.checkpoint={config.checkpoint} knows {len(saved.meta['names'])} classes "
            f"({', '.join(saved.meta['names'][:3])}, ...) but {dataset.name} has {len(dataset.names)} "
            f"({', '.join(dataset.names[:3])}, ...); give a teacher of this task."
        )
    # under another normalisation than its own a teacher is wrong without an error
    views = {
        name: part.normalised_by(saved.meta["mean"], saved.meta["std"])
        for name, part in views.items()
    }
    network = network_of(saved)
    return TaskTeacher(
        identity=_short(saved.sha256),
        network=network.eval().requires_grad_(False).to(train_views.mean.device),
        **views,
    )


@dataclass(kw_only=True, slots=True, eq=False)
class ClipTeacher:
    """Zero-shot logits of every row at the model's own scale."""

    identity: str  # changes with its outputs; a run goes on with the same one only
    train: Tensor  # (N, K)
    test: Tensor | None  # (M, K); None if only given logits are known
    logit_scale: float | None  # None if only given logits are known


def open_clip_teacher(
    config: Clip,
    dataset: Dataset,
    device: torch.device,
    cache_root: Path,
    progress: Progress | None,
) -> ClipTeacher:
    """Return the zero-shot teacher; its image and text features come from the cache, or go there."""
    if config.logits is not None:
        shape = (len(dataset.train), len(dataset.names))
        table = read_logits(config.logits, *shape, field="clip.logits")
        return ClipTeacher(
            identity=_identity(config.logits), train=table.to(device), test=None, logit_scale=None
        )
    templates = prompts.templates(config.prompts)
    clip = zeroshot.load(
        config.model,
        config.pretrained,
        config.file,
        device=device,
        root=cache_root,
        progress=progress,
    )
    text = zeroshot.text_matrix(clip, templates, dataset.names, cache_root).to(device)
    train, test = (
        fusion.zero_shot_logits(
            zeroshot.image_features(clip, part, cache_root, progress).to(device),
            text,
            clip.logit_scale,
            config.reduce,
        )
        for part in (dataset.train, dataset.test)
    )
    parts = [clip.identity, templates, dataset.names, dataset.digest, config.reduce]
    return ClipTeacher(
        identity=_short(hashlib.sha256(json.dumps(parts).encode()).hexdigest()),
        train=train,
        test=test,
        logit_scale=clip.logit_scale,
    )


def _identity(spec: str) -> str:
    """Return the identity of logits in a file."""
    path, key = _file_of(spec)
    return _short(sha256_of(path)) + (f":{key}" if key else "")


def _short(sha256: str) -> str:
    return sha256[:12]


def check_sense(source: str, logits: Tensor, labels: Tensor) -> None:
    """Look at a teacher's logits of rows whose labels are known; warns if they are little better than a guess.

    Args:
        source: Config key that the logits come from.
        logits: `(N, K)`.
        labels: `(N,)`.

    Raises:
        DataError: If they are the same for all classes.
    """
    if fusion.spread(logits) == 0:
        raise DataError(
            f"{source} gives each image the same logit for all classes; compute them anew."
        )
    top1, chance = accuracy(logits.cpu(), labels)["top1"], 100 / logits.shape[1]
    if top1 < 1.5 * chance:
        warnings.warn(
            f"{source} is right on {top1:.1f} % of the held-out rows, where a guess is on {chance:.1f} %; check "
            "the order of its rows and of its classes, its normalisation, or the prompts.",
            stacklevel=2,
        )


class FusedTeacher:
    """What the student learns from: the task teacher, the zero-shot teacher, or both.

    A teacher whose weight is 0 is not opened, so that plain distillation needs no CLIP.

    Attributes:
        factor: Constant from the model's scale to the scale in use.
        temperature: T of the loss, after `loss.temperature_of` was applied.
        alpha: Weight of the task teacher.
        identities: By name of the teachers that take part, what changes with their outputs.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        labels: Tensor,
        task: TaskTeacher | None,
        clip: ClipTeacher | None,
    ) -> None:
        self.task, self.clip = task, clip
        given = {"teacher": task, "clip": clip}
        self.identities = {name: each.identity for name, each in given.items() if each is not None}
        self.alpha, self.space = config.fusion.alpha, config.fusion.space
        self.factor = 1.0
        rows = torch.from_numpy(split.transfer)
        if clip is not None:
            held_out = torch.from_numpy(split.validation)
            needs_task = config.clip.scale in ("match_std", "calibrated")
            self.factor = fusion.scale_factor(
                config.clip.scale,
                logit_scale=clip.logit_scale,
                transfer=(task.train[rows], clip.train[rows]) if needs_task else None,
                held_out=(task.train[held_out].cpu(), clip.train[held_out].cpu(), labels[held_out])
                if needs_task
                else None,
            )
        self.temperature = config.loss.temperature
        if config.loss.temperature_of == "task" and self.alpha < 1:
            spread = fusion.spread(task.train[rows])
            self.temperature *= (
                fusion.spread(self.fused("train")[rows]) / spread if spread else math.inf
            )
        if not 1e-3 <= self.temperature <= 1e4:
            raise ConfigError(
                f"the temperature in use must lie in 0.001 to 10000 but loss.temperature={config.loss.temperature} "
                f"of the {config.loss.temperature_of} logits came to {self.temperature:.3g}; "
                "see whether one of the teachers is constant."
            )

    def parts(self, part: str) -> tuple[Tensor, Tensor]:
        """Return task and zero-shot logits of all un-augmented rows of `train` or `test`, both scaled.

        A teacher that takes no part is replaced by the other: with its weight of 0 it changes nothing.
        """
        task = getattr(self.task, part) if self.task is not None else None
        clip = self.factor * getattr(self.clip, part) if self.clip is not None else None
        return (clip if task is None else task), (task if clip is None else clip)

    def fused(self, part: str) -> Tensor:
        """Return the fused logits of all un-augmented rows of `train` or `test`."""
        return fusion.fuse(*self.parts(part), self.alpha)

    def shown(self, part: str) -> dict[str, Tensor]:
        """Return by name the logits `(N, K)` of `teacher`, `clip` and, if there are both, `fused`.

        Teachers that take no part, or whose logits for that part are unknown, are left out.
        """
        given = {"teacher": self.task, "clip": self.clip}
        found = {
            name: getattr(source, part) for name, source in given.items() if source is not None
        }
        found = {name: logits for name, logits in found.items() if logits is not None}
        if len(found) == 2:
            found["fused"] = (
                self.fused(part)
                if self.space == "logits"
                else fusion.target(*self.parts(part), self.alpha, self.temperature, self.space)
            )
        return found

    def target(self, rows: Tensor, views: Tensor) -> Tensor:
        """Return the target's log-probabilities `(B, K)` for those crops of training rows."""
        clip = self.factor * self.clip.train[rows] if self.clip is not None else None
        task = self.task.logits(rows, views) if self.task is not None and self.alpha > 0 else clip
        return fusion.target(
            task, task if clip is None else clip, self.alpha, self.temperature, self.space
        )


def teacher_recipe(config: Config) -> Config:
    """Return the run that trains the task teacher of `config`: cross-entropy on its labelled rows."""
    return replace(
        config,
        data=replace(
            config.data, labelled_share=None
        ),  # of no effect, so of none on the cache either
        student=replace(config.student, name=config.teacher.name, shortcut=config.teacher.shortcut),
        teacher=Teacher(),
        clip=Clip(),
        fusion=replace(config.fusion, alpha=1.0, space="logits"),
        method=replace(config.method, name="ce"),
        loss=replace(config.loss, ce=1.0, logit=0.0, temperature=3.0, temperature_of="fused"),
        train=Train(
            epochs=config.teacher.epochs,
            batch_size=config.teacher.batch_size,
            lr=config.teacher.lr,
            weight_decay=config.teacher.weight_decay,
        ),
    )
