"""The task teacher: a network of the user's, or logits that were given.

Shapes: N training rows, M test rows, B rows of a batch, K classes.
"""

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from richkd import cache, checkpoint, logits, models
from richkd.config import Teacher
from richkd.data import Dataset, Images, Views
from richkd.data.views import sent
from richkd.errors import ConfigError, DataError
from richkd.files import sha256_of
from richkd.losses import maps
from richkd.models import foreign, library
from richkd.models.library import Preprocessing
from richkd.precision import computed
from richkd.progress import Progress
from richkd.student import check_meta, find_checkpoint, network_of
from richkd.table import Table
from richkd.teachers.whole import looked_up, placed
from richkd.threads import ahead, one_thread

LONG = 60  # epochs from which on a run meets the same crops often enough for a table
MOST = 8 * 2**30  # bytes of a table that is made unasked
DTYPES = {"fp16": np.float16, "fp32": np.float32}  # of a table
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
    seen = hashlib.sha256(repr(wanted).encode()).hexdigest()[:12]

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
        identity=hashlib.sha256(repr(said).encode()).hexdigest()[:12],
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
