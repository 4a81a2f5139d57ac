"""The fused teacher as one object: rows and views in, out comes what the student learns from.

Whether a teacher's logits are computed online, looked up in a table or read from a file is decided here and nowhere
else.

Shapes: N training rows, M test rows, B rows of a batch, K classes.
"""

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from richkd import cache, checkpoint, fusion, logits, models, zeroshot
from richkd.config import Clip, Config, Contrast, Evaluate, Fusion, Loss, Teacher, Train, ZeroShot
from richkd.data import Dataset, Images, Split, Views
from richkd.data.views import sent
from richkd.errors import ConfigError, DataError
from richkd.evaluate.accuracy import accuracy, network_logits
from richkd.files import sha256_of
from richkd.losses import maps
from richkd.models import foreign, library
from richkd.models.library import Preprocessing
from richkd.precision import computed
from richkd.progress import Progress
from richkd.student import check_meta, find_checkpoint, network_of
from richkd.table import Table
from richkd.threads import ahead, one_thread
from richkd.zeroshot import prompts

LONG = 60  # epochs from which on a run meets the same crops often enough for a table
MOST = 8 * 2**30  # bytes of a table that is made unasked
DTYPES = {"fp16": np.float16, "fp32": np.float32}  # of a table
# bytes of a table of logits on a GPU; a larger one stays in the host's memory, and its rows are sent as they are asked for
HELD = 2**30
WHOLE = slice(None)  # all rows
LEAST = 16  # images in a batch: fewer take another path through the convolutions, and get other last bits
PIXELS = {
    "cpu": 2**16,
    "cuda": 2**20,
}  # in a batch: 64 CIFAR images, more would not stay in a core's cache; 1024
IMAGES_AHEAD = 16  # whose crops are computed between two looks at who wants to stop


@dataclass(kw_only=True, eq=False)
class TaskTeacher:
    """The user's own teacher: a network and what it says of what the student sees, or given logits.

    What it says of an image is its logits and, where it was opened for a loss of features, numbers beside them.

    Attributes:
        identity: Changes with its outputs; a run goes on with the same one only.
        classes: K.
        train_views: Training images under its own normalisation.
        test_views: Test images, likewise.
        network: Frozen, in eval mode, says all these numbers in a row; None if its logits were given.
        given: Logits `(N, K)` of the training rows and `(M, K)` of the test rows, un-augmented, None where unknown.
        single: Whether it says of each crop what it says of the whole image, which is wrong under augmentation.
        table: What it says of each crop of each training row, known or computed when it is asked; None asks the network.
        precision: In which the network is run, `fp32` or `bf16`.
        keep: Keeps what the network says of whole parts, by the part's name; None computes it anew.
    """

    identity: str
    classes: int
    train_views: Views
    test_views: Views
    network: nn.Module | None = None
    given: tuple[Tensor, Tensor | None] | None = None
    single: bool = False
    table: Table | None = None
    precision: str = "fp32"
    keep: Callable[[str, Callable[[int, int], np.ndarray]], np.ndarray] | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each thing beside the logits has: its features, or each of its maps."""
        return self.network.sizes if isinstance(self.network, Outputs) else ()

    @property
    def views(self) -> str:
        """How it meets the student's crops: `teacher.views` as it is in use, or `given` logits."""
        if self.network is None:
            return "given"
        return "single" if self.single else "online" if self.table is None else "exact"

    def logits(self, rows: Tensor, views: Tensor) -> Tensor:
        """Return logits `(B, K)` of those crops of training rows, both on the CPU."""
        return self.said(rows, views)[0]

    def said(self, rows: Tensor, views: Tensor, pixels: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return logits `(B, K)` of those crops of training rows, both on the CPU, and what is beside them.

        Args:
            rows: `(B,)`.
            views: Their crops, one a row.
            pixels: The crops themselves, integers `(B, H, W, C)` on the device, where they are streamed.
        """
        if self.network is None or self.single:
            return (looked_up(self.train, rows, self.train_views.device),)
        if self.table is None:
            found = self._run(self.train_views, rows, views, pixels)
        else:
            numbers = rows * self.train_views.count + self.train_views.number(views)
            known = torch.from_numpy(self.table.get(numbers.numpy(), self.of_numbers))
            found = sent(known, self.train_views.device).float()
        return found.split((self.classes, *self.sizes), 1)

    def of_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """Return what the network says of the crops that are rows `numbers` of its table."""
        rows, views = (
            torch.from_numpy(part) for part in np.divmod(numbers, self.train_views.count)
        )
        return self._run(self.train_views, rows, self.train_views.numbered(views)).cpu().numpy()

    def fill(self, progress: Progress, spread: cache.Spread | None = None) -> None:
        """Compute all rows of the table that are not known yet, as `Table.fill` does."""
        self.table.fill(self.of_numbers, IMAGES_AHEAD * self.train_views.count, progress, spread)

    def _run(
        self,
        part: Views,
        rows: Tensor,
        views: Tensor | None = None,
        pixels: Tensor | None = None,
    ) -> Tensor:
        """Return what the network says of crops of `part`, or of whole images.

        On a CPU that is the same whoever else is in a batch, from LEAST on and on one thread, so that a table holds what any
        process would have computed. Several threads have a batch each.
        """
        device, count = part.device, len(rows)
        more = -count % LEAST  # the last row again
        chosen = torch.cat([torch.arange(count), torch.full((more,), count - 1)])
        network = self.folded  # traced once, before there are several threads
        each = max(PIXELS[device.type] // math.prod(part.shape[:2]) // LEAST, 1) * LEAST

        def run(batch: Tensor) -> Tensor:
            if pixels is None:
                images = part.images(rows[batch], None if views is None else views[batch])
            else:
                images = part.normalised(pixels[batch])
            with torch.no_grad(), computed(device, self.precision):
                return network(images).float()

        batches, workers = chosen.split(each), torch.get_num_threads()
        if device.type == "cpu" and min(workers, len(batches)) > 1:
            with one_thread():
                said = list(ahead(run, batches, workers))
        else:
            said = [run(batch) for batch in batches]
        return torch.cat(said)[:count]

    @cached_property
    def folded(self) -> nn.Module:
        """The network with its batch norms folded into its convolutions, where it can be traced: exact, and faster."""
        try:
            folded = fuse(self.network)
        except Exception:  # whatever stands in the way of a trace
            return self.network
        return folded.to(memory_format=torch.channels_last)

    def plain(self, rows: Tensor) -> Tensor:
        """Return logits `(B, K)` of un-augmented training rows."""
        if self.network is None:
            return self.given[0][rows]
        return self._run(self.train_views, rows)[:, : self.classes]

    @cached_property
    def train(self) -> Tensor:
        """Logits `(N, K)` of all un-augmented training rows."""
        return self.given[0] if self.network is None else self._whole("train", self.train_views)

    @cached_property
    def test(self) -> Tensor | None:
        """Logits `(M, K)` of the test rows; None if only given logits of the training rows are known."""
        return self.given[1] if self.network is None else self._whole("test", self.test_views)

    def _whole(self, part: str, views: Views) -> Tensor:
        def compute(start: int, stop: int) -> np.ndarray:
            return self._run(views, torch.arange(start, stop))[:, : self.classes].cpu().numpy()

        if self.keep is None:
            return placed(torch.from_numpy(compute(0, len(views))), views.device)
        return placed(torch.from_numpy(self.keep(part, compute)), views.device)


def placed(table: Tensor, device: torch.device) -> Tensor:
    """Return a table of logits on the device, a large one where it is: on the CPU, or in the cache's file."""
    return table.to(device) if table.nbytes <= HELD else table


def blocks(table: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """Yield those rows of a table of logits by blocks, since all of a large one would be a large copy."""
    for some in rows.split(fusion.together(table.shape[1])):
        yield table[some]


def looked_up(table: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """Return rows of a table on the device, wherever the table is."""
    return sent(table[sent(rows, table.device)], device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """What a loss of features asks of a task teacher beside its logits.

    Attributes:
        transform: Of its stage outputs; None asks for its pooled features.
        student: Height and width of each stage of the student, with which they are compared.
    """

    transform: str | None = None
    student: tuple[maps.Size, ...] = ()


class Outputs(nn.Module):
    """The logits of a network and, behind them, its pooled features, or its stage outputs made comparable.

    Args:
        network: Has a head; in eval mode.
        beside: What is asked for.
        image: One that it takes, `(1, C, H, W)`.

    Attributes:
        stages: Channels, height and width of each stage's output, where they are asked for.
        sizes: How many numbers each thing behind the logits has.
    """

    def __init__(self, network: nn.Module, beside: Beside, image: Tensor) -> None:
        super().__init__()
        self.network, self.transform = network, beside.transform
        self.stages, self.sizes = (), (network.head.in_features,)
        if beside.transform is not None:
            with torch.no_grad():
                _, outputs = network.staged(image)
            self.stages = tuple(tuple(each.shape[1:]) for each in outputs)
            own = [shape[1:] for shape in self.stages]
            self.resizes = maps.resizings(own, beside.student, image.device)
            each = maps.transformed(outputs, self.resizes, self.transform)
            self.sizes = tuple(part.shape[1] for part in each)

    def forward(self, images: Tensor) -> Tensor:
        """Return `(N, K + E)` of `images` `(N, C, H, W)`."""
        if self.transform is None:
            features = self.network.features(images)
            return torch.cat([self.network.head(features), features], 1)
        features, outputs = self.network.staged(images)
        each = maps.transformed(outputs, self.resizes, self.transform)
        return torch.cat([self.network.head(features), *each], 1)


class Resized(nn.Module):
    """A network that sees its images brought to `size` pixels a side, as after the shared augmentation.

    Bilinear without a filter, which is how the recipes for small teachers of large crops shrink them.
    """

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size, self.head = network, size, network.head

    def features(self, images: Tensor) -> Tensor:
        """Return the pooled features `(N, D)` of `images` `(N, C, H, W)`."""
        return self.network.features(self._shrunk(images))

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the pooled features `(N, D)`, and the outputs of the stages."""
        return self.network.staged(self._shrunk(images))

    def _shrunk(self, images: Tensor) -> Tensor:
        size = (self.size, self.size)
        return F.interpolate(images, size, mode="bilinear", align_corners=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(N, K)` of `images` `(N, C, H, W)`."""
        return self.head(self.features(images))


def open_task(
    config: Teacher,
    trained: Path | None,
    dataset: Dataset,
    train_views: Views,
    test_views: Views,
    cache_root: Path | None = None,
    progress: Progress | None = None,
    epochs: int = 1,
    beside: Beside | None = None,
) -> TaskTeacher:
    """Return the task teacher of `config`.

    Args:
        config: Says where it comes from.
        trained: Checkpoint of the teacher that this run trained itself, if it did.
        dataset: Task; its classes must be the teacher's.
        train_views: Training images.
        test_views: Test images.
        cache_root: Where what it says is kept; None keeps nothing.
        progress: Told how far such a computation is.
        epochs: Of the run that asks; of a long one `teacher.views=auto` keeps what it says of crops.
        beside: What is asked for beside its logits.

    Raises:
        ConfigError: If it does not fit together, or cannot say what is asked for.
    """
    views = {"train_views": train_views, "test_views": test_views}
    classes, device = len(dataset.names), train_views.device
    if beside is not None and (config.logits is not None or config.views == "single"):
        given = "teacher.logits" if config.logits is not None else "teacher.views=single"
        raise ConfigError(
            f"loss.feature asks the task teacher for more than {given} knows, its logits; give teacher.checkpoint, or use a "
            "method without features."
        )
    if config.logits is not None:
        train, test = logits.aligned(config.logits, dataset, field="teacher.logits")
        return TaskTeacher(
            identity=logits.identity(config.logits),
            classes=classes,
            given=(placed(train, device), None if test is None else placed(test, device)),
            **views,
        )
    network, sha256, own = _network(config, trained, dataset)
    # under another normalisation than its own a teacher is wrong without an error
    mean = config.mean or own.mean or dataset.mean
    std = config.std or own.std or dataset.std
    size = config.size or own.size
    if len(mean) != dataset.channels or len(std) != dataset.channels:
        raise ConfigError(
            f"teacher.mean and teacher.std must have a number for each channel of {dataset.name}, {dataset.channels}, "
            f"but have {len(mean)} and {len(std)}; give as many."
        )
    views = {name: part.normalised_by(mean, std) for name, part in views.items()}
    if size is not None and (size, size) != dataset.size:
        network = Resized(network, size)
    models.check_size(network, dataset.channels, dataset.size, field="teacher.name, teacher.size")
    wanted = (sha256, mean, std, size, config.precision)
    if dataset.streamed:
        wanted += (dataset.augment, dataset.size)  # which say what whole images are, too
    seen = _short(hashlib.sha256(repr(wanted).encode()).hexdigest())

    def keep(part: str, compute: Callable[[int, int], np.ndarray]) -> np.ndarray:
        images: Images = getattr(dataset, part)
        key = {"teacher": seen, "images": images.digest, "torch": torch.__version__}
        return cache.rows(
            cache_root, "teacher-logits", key, len(images), classes, compute, progress=progress
        )

    network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    crops = views["train_views"]
    width = classes
    if beside is not None:
        image = torch.zeros(1, dataset.channels, *dataset.size, device=device)
        network = Outputs(network, beside, image)
        width += sum(network.sizes)
    how, table = views_in_use(config, crops, width, epochs), None
    if how == "exact" and cache_root is not None:
        key = {"teacher": seen, "images": dataset.train.digest, "torch": torch.__version__}
        key |= {
            "pad": crops.pad,
            "flips": crops.flips,
            "beside": None if beside is None else asdict(beside),
        }
        rows = len(crops) * crops.count
        try:
            table = Table(cache_root, "teacher-views", key, rows, width, DTYPES[config.table])
        except ConfigError as error:
            if config.views != "auto":
                raise
            warnings.warn(
                f"the teacher is run online, since no table can be made: {error}", stacklevel=2
            )
            how = "online"
    said = (seen, how, config.table if how == "exact" else None)
    return TaskTeacher(
        identity=_short(hashlib.sha256(repr(said).encode()).hexdigest()),
        classes=classes,
        network=network,
        single=how == "single",
        table=table,
        precision=config.precision,
        keep=None if cache_root is None else keep,
        **views,
    )


def views_in_use(config: Teacher, crops: Views, width: int, epochs: int) -> str:
    """Return how a network meets the student's crops: what `teacher.views` says, where `auto` looks at what a table is worth.

    In `epochs` epochs a run meets V (1 - (1 - 1 / V)^epochs) of the V crops of an image, in LONG of 162 a third.

    Args:
        config: Says what is wanted.
        crops: Training images.
        width: Numbers that are kept of each crop.
        epochs: Of the run that asks.
    """
    if config.views != "auto":
        return config.views
    if crops.streamed:  # of which no two are the same
        return "online"
    kept = len(crops) * crops.count * width * np.dtype(DTYPES[config.table]).itemsize
    return "exact" if kept <= MOST and (config.shared or epochs >= LONG) else "online"


def _network(
    config: Teacher, trained: Path | None, dataset: Dataset
) -> tuple[nn.Module, str, Preprocessing]:
    """Return a task teacher's network, what changes with its weights, and what it wants to see."""
    if config.pretrained is not None:
        tag = "" if config.pretrained == "default" else config.pretrained
        network, wanted = library.pretrained(config.name, tag)
        if network.head.out_features != len(dataset.names):
            raise DataError(
                f"teacher.pretrained={config.pretrained} of {config.name} knows {network.head.out_features} classes but "
                f"{dataset.name} has {len(dataset.names)}; give a teacher of this task: teacher.checkpoint=FILE."
            )
        # by name, too: networks that differ in their activation alone share their weights
        return network, f"{config.name} {_digest_of(network)}", wanted
    given = Path(config.checkpoint or "")
    if trained is None and given.is_file():
        network = models.build(
            config.name,
            len(dataset.names),
            channels=dataset.channels,
            size=(config.size, config.size) if config.size else dataset.size,
            shortcut=config.shortcut,
        )
        foreign.load(network, given, field="teacher.checkpoint", name=config.name)
        return network, f"{config.name} {config.shortcut} {sha256_of(given)}", Preprocessing()
    if trained is None and not given.exists() and not checkpoint.exists(given):
        raise ConfigError(
            f"teacher.checkpoint must be a run, a checkpoint or a file of weights but {given} is missing."
        )
    try:
        saved = checkpoint.load(trained or find_checkpoint(given))
        check_meta(saved)
    except ConfigError as error:
        raise ConfigError(f"teacher.checkpoint: {error}") from error
    meta, advice = saved.meta, "give a teacher of this task"
    if meta["channels"] != dataset.channels:
        raise DataError(
            f"teacher.checkpoint={config.checkpoint} takes images of {meta['channels']} channels but "
            f"{dataset.name} has {dataset.channels}; {advice}."
        )
    if tuple(meta["size"]) != dataset.size and config.size is None:
        raise DataError(
            f"teacher.checkpoint={config.checkpoint} takes images of {meta['size']} pixels but {dataset.name} has "
            f"{list(dataset.size)}; {advice}, or say at which size it shall see them: teacher.size={meta['size'][0]}."
        )
    if tuple(meta["names"]) != dataset.names:
        raise DataError(
            f"teacher.checkpoint={config.checkpoint} knows {len(meta['names'])} classes "
            f"({', '.join(meta['names'][:3])}, ...) but {dataset.name} has {len(dataset.names)} "
            f"({', '.join(dataset.names[:3])}, ...); {advice}."
        )
    own = Preprocessing(mean=tuple(meta["mean"]), std=tuple(meta["std"]))
    return network_of(saved), saved.sha256, own


def _digest_of(network: nn.Module) -> str:
    """Return the SHA-256 of a network's weights."""
    text = hashlib.sha256()
    for name, value in network.state_dict().items():
        text.update(name.encode())
        text.update(value.contiguous().numpy().tobytes())
    return text.hexdigest()


@dataclass(kw_only=True, slots=True, eq=False)
class ClipTeacher:
    """Zero-shot logits of every row at the model's own scale, and the image features behind them."""

    identity: str  # changes with its outputs; a run goes on with the same one only
    train: Tensor  # (N, K)
    test: Tensor | None  # (M, K); None if only given logits of the training rows are known
    logit_scale: float | None  # None if only given logits are known
    source: str = "clip.prompts"  # the key that it comes from
    weight: float = 1.0  # its share of the zero-shot logits
    # logits of crops of training rows, as `logits` takes them; None: of the whole images, whatever the crop
    crops: Callable[[Tensor, Tensor], Tensor] | None = None
    # unit-norm image features of crops, or of the whole images, likewise; None if only given logits are known
    features: Callable[[Tensor, Tensor], Tensor] | None = None
    width: int = 0  # numbers of such features
    device: torch.device | None = None  # where its logits are wanted; None: where they lie

    def logits(self, rows: Tensor, views: Tensor) -> Tensor:
        """Return logits `(B, K)` of those crops of training rows."""
        if self.crops is not None:
            return self.crops(rows, views)
        return looked_up(self.train, rows, self.device or self.train.device)


def open_clip_teachers(
    config: Clip,
    dataset: Dataset,
    device: torch.device,
    cache_root: Path,
    progress: Progress | None,
) -> list[ClipTeacher]:
    """Return the zero-shot teacher and those beside it, with their shares; ones without a share are not opened."""
    return [
        replace(
            open_clip_teacher(each, dataset, device, cache_root, progress, field=field),
            weight=weight,
        )
        for field, each, weight in shares(config)
    ]


def shares(config: Clip) -> list[tuple[str, ZeroShot, float]]:
    """Return the key of each zero-shot teacher that has a share, the teacher, and its share of their logits."""
    first = 1 - sum(each.weight for each in config.extra)
    extra = [(f"clip.extra[{k}]", each, each.weight) for k, each in enumerate(config.extra)]
    return [one for one in (("clip", config, first), *extra) if one[2] > 1e-9]


def model_of(
    config: ZeroShot, device: torch.device, cache_root: Path, progress: Progress | None = None
) -> zeroshot.ZeroShot:
    """Return the model of a zero-shot teacher."""
    return zeroshot.load(
        config.model,
        config.pretrained,
        config.file,
        device=device,
        root=cache_root,
        progress=progress,
    )


def open_clip_teacher(
    config: ZeroShot,
    dataset: Dataset,
    device: torch.device,
    cache_root: Path,
    progress: Progress | None,
    *,
    field: str = "clip",
) -> ClipTeacher:
    """Return a zero-shot teacher; its image and text features come from the cache, or go there."""
    if config.logits is not None:
        train, test = logits.aligned(config.logits, dataset, field=f"{field}.logits")
        return ClipTeacher(
            identity=logits.identity(config.logits),
            train=placed(train, device),
            test=None if test is None else placed(test, device),
            logit_scale=None,
            source=f"{field}.logits",
            device=device,
        )
    templates = prompts.templates(config.prompts, f"{field}.prompts")
    clip = model_of(config, device, cache_root, progress)
    text = zeroshot.text_matrix(
        clip, templates, dataset.names, cache_root, field=f"{field}.prompts"
    ).to(device)

    def logits_of(image: Tensor) -> Tensor:
        return fusion.zero_shot_logits(image, text, clip.logit_scale, config.reduce)

    def whole_logits(image: Tensor) -> Tensor:
        table = placed(torch.empty(len(image), len(dataset.names)), device)
        rows = fusion.together(table.shape[1])
        for part, some in zip(table.split(rows), image.split(rows), strict=True):
            part.copy_(logits_of(some.to(device)))
        return table

    whole, tested = (
        zeroshot.image_features(clip, part, cache_root, progress)
        for part in (dataset.train, dataset.test)
    )
    train, test = map(whole_logits, (whole, tested))
    parts = [clip.identity, templates, dataset.names, dataset.digest, config.reduce]
    crops = look = None
    if config.views != "whole":
        parts.append(config.views)
        look = zeroshot.crop_features(clip, config.views, dataset, cache_root, progress)

        def crops(rows: Tensor, views: Tensor) -> Tensor:
            return logits_of(sent(look(rows, views), device))

    def features(rows: Tensor, views: Tensor) -> Tensor:
        return sent(whole[rows.cpu()] if look is None else look(rows, views), device).float()

    return ClipTeacher(
        identity=_short(hashlib.sha256(json.dumps(parts).encode()).hexdigest()),
        train=train,
        test=test,
        logit_scale=clip.logit_scale,
        source=f"{field}.prompts",
        crops=crops,
        features=features,
        width=whole.shape[1],
        device=device,
    )


def _short(sha256: str) -> str:
    return sha256[:12]


def check_sense(source: str, logits: Tensor, labels: Tensor) -> None:
    """Look at a teacher's logits of rows whose labels are known; warns if they are little better than a guess.

    Args:
        source: Config key that the logits come from.
        logits: `(N, K)`.
        labels: `(N,)`.

    Raises:
        DataError: If they are not finite, or the same for all classes.
    """
    if bad := int((~logits.isfinite().all(1)).sum()):
        raise DataError(
            f"{source} must give finite logits but is NaN or infinite on {bad} of {len(logits)} labelled rows; look at "
            "its weights."
        )
    if fusion.spread(logits) == 0:
        raise DataError(
            f"{source} gives each image the same logit for all classes; compute them anew."
        )
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3:
        warnings.warn(
            f"{source} holds rows that sum to 1: these are probabilities, where logits are wanted; give their logarithm.",
            stacklevel=2,
        )
    top1, chance = accuracy(logits.cpu(), labels)["top1"], 100 / logits.shape[1]
    # of two classes, half as much again as a guess would be 75 %
    if top1 < min(1.5 * chance, chance + (100 - chance) / 10):
        warnings.warn(
            f"{source} is right on {top1:.1f} % of {len(labels)} labelled rows, where a guess is on {chance:.1f} %; check "
            "the order of its rows and of its classes, its normalisation, or the prompts.",
            stacklevel=2,
        )


USUAL = {  # mean and deviation that published weights expect
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100's": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "-1 to 1's": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "0 to 1's": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
CLEAR = 3.0  # standard errors by which another normalisation must be better before it is named


def check_normalisation(teacher: TaskTeacher, rows: Tensor, labels: Tensor) -> None:
    """Warn if a network whose normalisation nobody gave is clearly better under one of the usual ones.

    Args:
        teacher: Shown images under the data's own normalisation.
        rows: Training rows whose labels are known.
        labels: Theirs.
    """
    views = teacher.train_views
    if views.shape[2] != 3:
        return

    def right(part: Views) -> Tensor:
        said = network_logits(teacher.network, part, rows)[:, : teacher.classes]
        return said.cpu().argmax(1) == labels

    own = right(views)
    found = {name: right(views.normalised_by(*usual)) for name, usual in USUAL.items()}
    best = max(found, key=lambda name: int(found[name].sum()))
    gained, lost = (found[best] & ~own).sum().item(), (own & ~found[best]).sum().item()
    if gained - lost > CLEAR * (gained + lost) ** 0.5:
        mean, std = (",".join(map(str, values)) for values in USUAL[best])
        shares = [100 * each.double().mean().item() for each in (own, found[best])]
        warnings.warn(
            f"teacher.mean and teacher.std are not given, and under the data's own the teacher is right on "
            f"{shares[0]:.1f} % of {len(rows)} labelled rows, under {best} on {shares[1]:.1f} %; give "
            f"teacher.mean=[{mean}] teacher.std=[{std}] if it was trained so.",
            stacklevel=2,
        )


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
        both = zip(*(blocks(table, chosen) for table in self.parts("train")), strict=True)
        fused = (self._learnt(fusion.fuse(*each, self.alpha)) for each in both)
        return alone, fusion.spread(fused)

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
        return fusion.fuse(*self.parts(part, rows), self.alpha)

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
                self.alpha,
                self.temperature,
                self.space,
                standardised=self.standardised,
            )
        if len(beside) < len(self.widths):
            features = (clip.features(self._lent(rows), views) for clip in self.clips)
            beside = (*beside, *features)
        return Said(target, beside)


def teacher_recipe(config: Config) -> Config:
    """Return the run that trains the task teacher of `config`: cross-entropy, at the size that it sees.

    It learns from the rows of `config` that have a label or, as `teacher.trained_on` says, from all but the held-out ones. Its
    learning rate falls by the student's steps if it has as many epochs, as the published teachers' did; else along a cosine.
    """
    if config.teacher.size is not None and config.data.augment == "crop":
        raise ConfigError(
            "teacher.size is a matter of teacher.checkpoint or teacher.pretrained, or of data.augment=resized or strong, but "
            "none of them is given; leave it out, or say teacher.size=null."
        )
    # a share of labels is of no effect, so of none on the cache either
    data = replace(config.data, labelled_share=None, size=config.teacher.size or config.data.size)
    if config.teacher.trained_on == "full":
        # a long tail decides which rows are held out; else this is the teacher that any other regime's full one is
        tail = data.imbalance if config.selection == "validation" else None
        whole = tail is not None
        data = replace(data, imbalance=tail, fraction=1.0, labelled_per_class=None, whole=whole)
    train, own = config.train, config.teacher
    steps = train.schedule == "steps" and own.epochs == train.epochs
    return replace(
        config,
        data=data,
        student=replace(config.student, name=config.teacher.name, shortcut=config.teacher.shortcut),
        teacher=Teacher(),
        clip=Clip(),
        fusion=Fusion(alpha=1.0),
        method=replace(config.method, name="ce"),
        loss=Loss(ce=1.0, logit=0.0),
        contrast=Contrast(),
        evaluate=Evaluate(),
        train=Train(
            precision="fp32",  # one teacher, whatever the student's layers and machine
            graphs=train.graphs,
            epochs=own.epochs,
            batch_size=own.batch_size,
            lr=own.lr,
            weight_decay=own.weight_decay,
            schedule="steps" if steps else "cosine",
            milestones=train.milestones if steps else None,
        ),
    )
