"""What one run is made of: frozen dataclasses, each of which refuses what lies outside its range."""

import os
import re
import time
import unicodedata
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from richkd import methods
from richkd.errors import ConfigError

CHOSEN_ON_TEST = (
    "selection: paper, so epochs and settings are chosen on the test rows, which flatters"
)
MILESTONES = (150, 180, 210)  # of 240 epochs, as the distillation papers train CNNs on CIFAR-100
MAX_NAME = 200  # bytes

UNUSABLE = {"Cc", "Cs", "Zl", "Zp"}  # Unicode: control, half a pair, line and paragraph break


def in_range(name: str, value: float | None, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is None or lies in `low` to `high`; NaN lies nowhere."""
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{name} must lie in {low} to {high} but got {value}.")


def is_url(storage: str) -> bool:
    """Say whether `storage` is an address, and not a folder."""
    return "://" in storage


def check_storage(url: str) -> None:
    """Raise ConfigError unless `url` is the address of a folder on an S3-like store, without credentials."""
    shown = re.sub(r"//[^/]*@", "//***@", url)
    if shown != url:
        raise ConfigError(
            f"storage must not hold credentials but got {shown}; put them into AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment of every machine."
        )
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[^?#]*)?", url):
        raise ConfigError(
            f"storage must be a folder or s3://BUCKET/FOLDER but got {shown.partition('?')[0]}; the server's address is "
            "AWS_ENDPOINT_URL in the environment."
        )


def expand(section: Any, *keys: str) -> None:
    """Put the home folder in place of a leading `~` in paths, which a shell does not do behind `key=`."""
    for key in keys:
        value = getattr(section, key)
        if value is not None and value.startswith("~"):
            object.__setattr__(section, key, os.path.expanduser(value))  # `~nobody` stays


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    if value not in choices:
        near = get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ConfigError(f"{name} must be one of {', '.join(choices)} but got {value!r}{hint}")


def check_text(what: str, text: str) -> None:
    """Raise ConfigError if `text` holds what OmegaConf would act on, or signs that no path can hold."""
    if "${" in text or text == "???":
        raise ConfigError(f"{what}: {text!r} is not a plain value; write the value itself.")
    if not UNUSABLE.isdisjoint(map(unicodedata.category, text)):
        raise ConfigError(f"{what} must be text on one line but got {text!r}.")


def check_name(what: str, name: str) -> None:
    """Raise ConfigError unless `name` can be the name of a folder everywhere."""
    check_text(what, name)
    if not name.strip() or set(name) & set("/\\?=") or name[0] in ".-":
        raise ConfigError(
            f"{what} must be a plain folder name but got {name!r}; use letters, digits, - and _."
        )
    if len(name.encode()) > MAX_NAME:
        raise ConfigError(
            f"{what} may have {MAX_NAME} bytes but has {len(name.encode())}; shorten it."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Which images, and which of them are learnt from."""

    source: str = "digits"  # digits | cifar100 | imagenet | folder | arrays
    # of cifar100: torchvision's folder; of imagenet: the one with train/ and val/; None: RICHKD_DATA, or its imagenet/
    root: str | None = None
    download: bool = False  # of cifar100: whether torchvision may fetch what is not in `root`
    path: str | None = None  # of folder: the folder; of arrays: the .npz file
    names: str | None = None  # of folder, arrays and imagenet: text file with a class name a line
    # how images are varied: crop (out of padded pixels, and flip), or one by one: resized (ImageNet) | strong (transformers)
    augment: str = "crop"
    size: int = 32  # of folder, resized and strong: pixels of a side that images are brought to
    pad: int | None = None  # pixels of zero padding before the random crop; None: the source's own
    flip: bool | None = None  # whether a mirror image keeps its class; None: the source's own
    unreadable: float = 0.0  # of folder: share of files that may be left out; 0: none
    folds: int = 5  # where a source has no test rows, one of so many parts of its rows is taken
    fold: int = 0  # which
    memory: float = 4.0  # GiB that the crops of a part may take; a larger one is read by batches
    validation: int | float = 0.1  # rows held out for settings and epochs, or a share below 1
    seed: int = 0  # of the split and of the labelled subset
    # a long tail among the training rows, before any is held out: the rarest class' share of the most frequent one's rows,
    # or `table14`, the supplement's printed list for CIFAR-100, which is another curve than its formula's
    imbalance: int | float | str | None = None
    fraction: float = 1.0  # share of each class' rows, of those not held out, that are learnt from
    whole: bool = False  # whether all rows but the held-out ones are learnt from, labelled, whatever the three keys around say
    labelled_per_class: int | None = None  # None: every transfer row keeps its label
    labelled_share: float | None = None  # share of labelled rows in each batch; None: as they fall

    def __post_init__(self) -> None:
        expand(self, "root", "path", "names")
        one_of("data.augment", self.augment, ("crop", "resized", "strong"))
        if self.augment != "crop" and self.pad is not None:
            raise ConfigError(
                f"data.pad is a matter of data.augment=crop but got {self.augment}; leave it out."
            )
        in_range("data.size", self.size, 8, 1024)
        in_range("data.pad", self.pad, 0, 256)
        in_range("data.unreadable", self.unreadable, 0, 0.5)
        in_range("data.folds", self.folds, 2, 1000)
        in_range("data.fold", self.fold, 0, self.folds - 1)
        in_range("data.memory", self.memory, 0, 1e6)
        if not 0 < self.validation < 1:
            in_range("data.validation", self.validation, 1, 10_000_000)
            if self.validation != int(self.validation):
                raise ConfigError(
                    f"data.validation must be a number of rows, or a share below 1, but got {self.validation}."
                )
            object.__setattr__(self, "validation", int(self.validation))
        in_range("data.seed", self.seed, 0, 2**31 - 1)
        if isinstance(self.imbalance, str):
            if self.imbalance != "table14":
                raise ConfigError(
                    f"data.imbalance must be a ratio in 0.0001 to 1, table14 or null but got {self.imbalance!r}."
                )
        elif self.imbalance is not None:
            in_range("data.imbalance", self.imbalance, 1e-4, 1)
            object.__setattr__(self, "imbalance", float(self.imbalance))
        in_range("data.fraction", self.fraction, 1e-4, 1)
        in_range("data.labelled_per_class", self.labelled_per_class, 1, 10_000_000)
        in_range("data.labelled_share", self.labelled_share, 0.01, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """The network that is trained."""

    name: str = "resnet8x4"
    shortcut: str = "B"  # of ResNets: A pads with zeros, B is a 1 x 1 convolution

    def __post_init__(self) -> None:
        one_of("student.shortcut", self.shortcut, ("A", "B"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Teacher:
    """The task teacher: a checkpoint, published weights, given logits, or trained on the labelled rows if none."""

    name: str = "resnet32x4"  # of the network, but for a checkpoint of richkd, which knows its own
    # if it is trained here: `same` rows as the student, those with a label; or `full`: all but the held-out ones
    trained_on: str = "same"
    shortcut: str = "B"
    epochs: int = 240
    batch_size: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    checkpoint: str | None = None  # a run or a checkpoint of richkd, or a file of weights
    pretrained: str | None = None  # weights of timm/NAME or torchvision/NAME: a tag, or `default`
    logits: str | None = None  # FILE.npy, FILE.npz:KEY or FILE.safetensors:KEY; a row an image
    mean: tuple[float, ...] | None = None  # of its input's channels, in 0 to 1; None: its own
    std: tuple[float, ...] | None = None
    size: int | None = (
        None  # pixels of a side that it sees, and is trained at; None: its own, or the data's
    )
    views: str = "auto"  # how it meets the student's crops: auto | online | exact | single
    shared: bool = False  # whether other runs ask it, too, for which `auto` keeps what it says; a sweep sets it
    table: str = (
        "fp16"  # what `exact` keeps: fp16, within 5e-4 of a logit, or fp32, the logit itself
    )
    precision: str = "fp32"  # in which it is run; bf16 is faster, and some 8e-3 of the logits off

    def __post_init__(self) -> None:
        expand(self, "checkpoint", "logits")
        one_of("teacher.views", self.views, ("auto", "online", "exact", "single"))
        one_of("teacher.trained_on", self.trained_on, ("same", "full"))
        one_of("teacher.table", self.table, ("fp16", "fp32"))
        one_of("teacher.precision", self.precision, ("fp32", "bf16"))
        if self.logits is not None and self.views in ("online", "exact"):
            raise ConfigError(
                f"teacher.views={self.views} needs a network but teacher.logits knows no crops; leave it out, or give "
                "teacher.checkpoint."
            )
        one_of("teacher.shortcut", self.shortcut, ("A", "B"))
        in_range("teacher.epochs", self.epochs, 1, 100_000)
        in_range("teacher.batch_size", self.batch_size, 2, 1_000_000)
        in_range("teacher.lr", self.lr, 1e-8, 100)
        in_range("teacher.weight_decay", self.weight_decay, 0, 10)
        in_range("teacher.size", self.size, 8, 4096)
        given = {f"teacher.{key}": getattr(self, key) for key in self.brought}
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} exclude each other but are both given "
                f"({', '.join(given.values())}); leave one out."
            )
        for key, low in (("mean", -10), ("std", 1e-6)):
            if (values := getattr(self, key)) is None:
                continue
            object.__setattr__(self, key, tuple(map(float, values)))
            for value in values:
                in_range(f"teacher.{key}", value, low, 10)
            if len(values) not in (1, 3):
                raise ConfigError(
                    f"teacher.{key} must have a number for each channel, 1 or 3, but got {len(values)}."
                )
        if (self.mean is None) != (self.std is None):
            raise ConfigError(
                "teacher.mean and teacher.std belong together but only one is given; give both or none."
            )
        if self.checkpoint is self.pretrained is None:
            # one that is trained on a stream is trained at its size
            for key in ("mean", "std") if self.logits is None else ("mean", "std", "size"):
                if getattr(self, key) is not None:
                    raise ConfigError(
                        f"teacher.{key} is a matter of teacher.checkpoint or teacher.pretrained but neither is given; "
                        f"leave it out, or say teacher.{key}=null."
                    )

    @property
    def brought(self) -> tuple[str, ...]:
        """The key that the teacher comes from, none if it is trained here."""
        keys = ("checkpoint", "pretrained", "logits")
        return tuple(key for key in keys if getattr(self, key) is not None)


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroShot:
    """A vision-language model with prompts, or its logits computed elsewhere."""

    model: str = "ViT-B-32"  # a name of open_clip's, or `miniature`
    pretrained: str | None = "laion2b_s34b_b79k"  # open_clip's tag; None: random weights
    file: str | None = None  # where its weights lie on this machine; None: open_clip downloads them
    prompts: str = "rich12"  # a named set or a text file
    reduce: str = "embedding"  # how several prompts become one classifier
    logits: str | None = None  # as teacher.logits, instead of a model
    # what it sees of the student's crops: `whole`: the image without them; a number: the nearest of so many stored views;
    # `online`: each crop itself, in each step
    views: int | str = "whole"

    def __post_init__(self) -> None:
        expand(self, "file", "prompts", "logits")
        if self.reduce is not None:  # else it is that of the first teacher, and so are views
            one_of("clip.reduce", self.reduce, ("embedding", "logits", "probs"))
        if isinstance(self.views, int):
            if not 1 <= self.views <= 1_000_000:
                raise ConfigError(
                    f"clip.views must be whole, online or a number of stored views from 1 on but got {self.views}."
                )
        elif self.views not in ("whole", "online", None):
            raise ConfigError(
                f"clip.views must be whole, online or a number of stored views but got {self.views!r}."
            )
        if self.logits is not None and self.views not in ("whole", None):
            raise ConfigError(
                f"clip.views={self.views} needs a model but clip.logits={self.logits} knows no crops; leave one of them out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Extra(ZeroShot):
    """A further zero-shot teacher; prompts, reduce and views that are not given are those of the first one."""

    weight: float  # its share of the zero-shot logits; the first teacher has what is left of 1
    prompts: str | None = None
    reduce: str | None = None
    views: int | str | None = None  # of given logits `whole`

    def __post_init__(self) -> None:
        ZeroShot.__post_init__(self)
        in_range("clip.extra.weight", self.weight, 0, 1)

    def beside(self, first: ZeroShot) -> "Extra":
        """Return this teacher with what it takes from the first one."""
        return replace(
            self,
            prompts=first.prompts if self.prompts is None else self.prompts,
            reduce=first.reduce if self.reduce is None else self.reduce,
            views=(first.views if self.logits is None else "whole")
            if self.views is None
            else self.views,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip(ZeroShot):
    """The zero-shot teacher, or several of them, each brought to the same kind of scale."""

    scale: int | float | str = "model"  # model | match_std | calibrated | none | a logit scale
    # what is done to the zero-shot logits of the rows that are learnt from, to see what they are good for: `zeros` says nothing,
    # `permuted` gives each row another's, `permuted-in-class` that of another of its true class
    control: str = "none"
    extra: list[Extra] = field(default_factory=list)

    def __post_init__(self) -> None:
        ZeroShot.__post_init__(self)
        object.__setattr__(self, "extra", [each.beside(self) for each in self.extra])
        one_of("clip.control", self.control, ("none", "zeros", "permuted", "permuted-in-class"))
        if isinstance(self.scale, str):
            scales = ("model", "match_std", "calibrated", "none")
            if self.scale not in scales:
                raise ConfigError(
                    f"clip.scale must be one of {', '.join(scales)} or a number but got {self.scale!r}."
                )
        else:
            in_range("clip.scale", self.scale, 1e-3, 1e5)
            object.__setattr__(self, "scale", float(self.scale))
        reduces = {self.reduce, *(each.reduce for each in self.extra)}
        if "probs" in reduces and self.scale not in ("model", "match_std", "calibrated"):
            raise ConfigError(
                f"clip.reduce=probs mixes probabilities at the model's own scale but got clip.scale={self.scale}; "
                "use clip.scale=model, match_std or calibrated, or clip.reduce=embedding or logits."
            )
        # decimal shares that sum to 1 may be above it by rounding
        if (total := sum(each.weight for each in self.extra)) > 1 + 1e-9:
            raise ConfigError(
                f"the weights of clip.extra are shares of the zero-shot logits but sum to {total:g}; lower them."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Fusion:
    """How the two teachers become one."""

    alpha: float = 0.7  # weight of the task teacher's logits
    feature_alpha: float | None = None  # of its features, the paper's lambda; None: alpha
    space: str = "logits"  # `probs` mixes probabilities, as the supplement's theory writes it
    # whether alpha is `one` for all rows, or moved from row to row, as held-out rows have it, by the `class` that the task
    # teacher predicts or by its calibrated `confidence`
    weighting: str = "one"

    def __post_init__(self) -> None:
        in_range("fusion.alpha", self.alpha, 0, 1)
        in_range("fusion.feature_alpha", self.feature_alpha, 0, 1)
        one_of("fusion.space", self.space, ("logits", "probs"))
        one_of("fusion.weighting", self.weighting, ("one", "class", "confidence"))
        if self.space == "probs" and self.weighting != "one":
            raise ConfigError(
                f"fusion.weighting={self.weighting} weighs logits but fusion.space=probs mixes probabilities; leave one of "
                "them out."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """The preset of weights that lies under everything else."""

    name: str = "richkd-l"

    def __post_init__(self) -> None:
        methods.get(self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """Weights of the three terms of the loss, and what each of them is."""

    ce: float = 1.0  # of the labels
    logit: float = 3.0  # of the teachers' logits
    feature: float = 0.0  # of their features
    smoothing: float = 0.0  # of the labels: the share of a target that all classes have alike
    logit_kind: str = "kd"  # kd | dkd
    temperature: float = 3.0
    temperature_of: str = (
        "fused"  # `task`: as sharp as the task teacher's logits are at `temperature`
    )
    standardise: bool = False  # rows of logits to mean 0 and deviation 1, as LSKD does
    warmup: int = 0  # epochs in which the weight of the logits rises to what it is
    dkd_alpha: float = 1.0  # of dkd: weight of the target class
    dkd_beta: float = 8.0  # and of the others among themselves
    feature_kind: str = "contrast"  # of pooled features; or of `maps`, the outputs of the stages
    transform: str = "attention"  # of maps: attention | channel | projection
    distance: str = "mse"  # of transformed maps: mse | l1 | cosine | kl

    def __post_init__(self) -> None:
        for key in ("ce", "logit", "feature"):
            in_range(f"loss.{key}", getattr(self, key), 0, 1e6)
        in_range("loss.smoothing", self.smoothing, 0, 0.99)
        in_range("loss.temperature", self.temperature, 0.01, 1000)
        in_range("loss.warmup", self.warmup, 0, 100_000)
        in_range("loss.dkd_alpha", self.dkd_alpha, 0, 1e6)
        in_range("loss.dkd_beta", self.dkd_beta, 0, 1e6)
        one_of("loss.logit_kind", self.logit_kind, ("kd", "dkd"))
        one_of("loss.temperature_of", self.temperature_of, ("fused", "task"))
        one_of("loss.feature_kind", self.feature_kind, ("contrast", "maps"))
        one_of("loss.transform", self.transform, ("attention", "channel", "projection"))
        one_of("loss.distance", self.distance, ("mse", "l1", "cosine", "kl"))
        if self.ce == 0 and not self.distils:
            raise ConfigError(
                "loss.ce, loss.logit and loss.feature cannot all be 0; nothing would be learnt."
            )

    @property
    def distils(self) -> bool:
        """Whether anything is learnt from teachers."""
        return self.logit > 0 or self.feature > 0

    @property
    def contrasts(self) -> bool:
        """Whether pooled features are contrasted."""
        return self.feature > 0 and self.feature_kind == "contrast"

    @property
    def maps(self) -> bool:
        """Whether the outputs of stages are compared."""
        return self.feature > 0 and self.feature_kind == "maps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """The contrast of features with those of other images, which are kept in banks (CRD; Tian et al., 2020)."""

    width: int = 128  # of the space into which all features are projected
    negatives: int = 16384  # rows of other classes that each image is told from
    temperature: float = 0.07
    momentum: float = 0.5  # share of what a bank held of a row, where its image is seen again
    replacement: bool = True  # whether a row may be drawn twice for one image
    # whether unlabelled images have the class that the fused teacher thinks likeliest; else each is a class of its own
    pseudo_labels: bool = False

    def __post_init__(self) -> None:
        in_range("contrast.width", self.width, 1, 100_000)
        in_range("contrast.negatives", self.negatives, 1, 10_000_000)
        # below, scores of the first batch would overflow
        in_range("contrast.temperature", self.temperature, 0.02, 100)
        in_range("contrast.momentum", self.momentum, 0, 0.9999)


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """How the student is trained, by default by plain SGD with momentum along a cosine to 0, step by step."""

    epochs: int = 240
    batch_size: int = 64
    drop_last: bool = False  # whether the rows that fill no batch are left out of an epoch
    optimizer: str = "sgd"  # sgd | adamw
    lr: float = 0.05
    momentum: float = 0.9  # of sgd
    nesterov: bool = False  # of sgd
    weight_decay: float = 5e-4  # of all parameters; of adamw not of vectors, biases and tokens
    schedule: str = "cosine"  # of the learning rate: cosine (step by step) | epochs (cosine epoch by epoch) | steps
    # of steps: epochs after which it falls to a tenth; None: after 150, 180 and 210
    milestones: tuple[int, ...] | None = None
    lr_min: float = 0.0  # of the cosines: where they end
    warmup: int = 0  # of the cosines: epochs in which the rate climbs to `lr`
    warmup_lr: float = 0.0  # of a warm-up: from here
    precision: str = (
        "auto"  # of the student's layers: fp32, bf16 (autocast); auto: bf16 on a GPU that has it
    )
    graphs: bool = True  # whether a GPU replays the step as one CUDA graph; of one worker alone

    def __post_init__(self) -> None:
        one_of("train.precision", self.precision, ("auto", "fp32", "bf16"))
        one_of("train.optimizer", self.optimizer, ("sgd", "adamw"))
        one_of("train.schedule", self.schedule, ("cosine", "epochs", "steps"))
        in_range("train.epochs", self.epochs, 1, 100_000)
        in_range("train.batch_size", self.batch_size, 2, 1_000_000)
        in_range("train.lr", self.lr, 1e-8, 100)
        in_range("train.momentum", self.momentum, 0, 0.9999)
        in_range("train.weight_decay", self.weight_decay, 0, 10)
        in_range("train.lr_min", self.lr_min, 0, self.lr)
        in_range("train.warmup", self.warmup, 0, 100_000)
        in_range("train.warmup_lr", self.warmup_lr, 0, self.lr)
        self._check_schedule()
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise ConfigError(
                f"train.nesterov is a matter of sgd with momentum but got train.optimizer={self.optimizer} and "
                f"train.momentum={self.momentum:g}; leave it out."
            )

    def _check_schedule(self) -> None:
        """Take the usual milestones where none are given; raise ConfigError if a key would have no effect."""
        if self.schedule == "steps":
            own = MILESTONES if self.milestones is None else tuple(self.milestones)
            object.__setattr__(self, "milestones", own)
            for epoch in own:
                in_range("train.milestones", epoch, 1, 100_000)
            for key in ("lr_min", "warmup", "warmup_lr"):
                if value := getattr(self, key):
                    raise ConfigError(
                        f"train.{key} is a matter of train.schedule=cosine or epochs but got {value:g} with steps; leave it "
                        f"out, or say train.{key}=0."
                    )
        elif self.milestones is not None:
            raise ConfigError(
                f"train.milestones is a matter of train.schedule=steps but got {list(self.milestones)} with {self.schedule}; "
                "leave it out, or say train.milestones=null."
            )
        if self.warmup >= self.epochs:
            raise ConfigError(
                f"train.warmup must end before train.epochs={self.epochs} do but got {self.warmup}; lower it, or say "
                "train.warmup=0 train.warmup_lr=0."
            )
        if self.warmup_lr and not self.warmup:
            raise ConfigError(
                f"train.warmup_lr is a matter of train.warmup but got {self.warmup_lr:g} with none; leave it out, or say "
                "train.warmup_lr=0."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """How test rows are looked at beside their accuracy."""

    # probability at T = 1 above which the task teacher is certain; `q0.2`: above that quantile of it
    certain: int | float | str = 0.5
    rows: int = 1000  # that are corrupted and attacked, drawn once; 0: none are
    corrupted: str | None = (
        None  # folder of CIFAR-100-C; None: the one beside the data, else made here
    )

    def __post_init__(self) -> None:
        in_range("evaluate.rows", self.rows, 0, 10_000_000)
        if not isinstance(self.certain, str):
            in_range("evaluate.certain", self.certain, 0, 1)
            object.__setattr__(self, "certain", float(self.certain))
        elif not re.fullmatch(r"q0?\.\d+", self.certain):
            raise ConfigError(
                f"evaluate.certain must be a probability, or a quantile such as q0.2, but got {self.certain!r}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnose:
    """On what teachers are judged before anything is distilled."""

    rows: str = "validation"  # validation | test | all
    # prompt sets that are compared with that of `clip`, or files of logits with clip.logits; None: those that a sweep would try
    prompts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        one_of("diagnose.rows", self.rows, ("validation", "test", "all"))
        if self.prompts is not None:
            object.__setattr__(self, "prompts", tuple(self.prompts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run, fully resolved."""

    data: Data = field(default_factory=Data)
    student: Student = field(default_factory=Student)
    teacher: Teacher = field(default_factory=Teacher)
    clip: Clip = field(default_factory=Clip)
    fusion: Fusion = field(default_factory=Fusion)
    method: Method = field(default_factory=Method)
    loss: Loss = field(default_factory=Loss)
    contrast: Contrast = field(default_factory=Contrast)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    diagnose: Diagnose = field(default_factory=Diagnose)
    seed: int = (
        0  # of initial weights, order, augmentation and (with data.seed) the labelled subset
    )
    # the rows on which epochs and settings are chosen: `validation`, or `paper`, as published figures were obtained: none are
    # held out, and the best epoch is the best one on the test rows
    selection: str = "validation"
    device: str = "auto"  # auto | cpu | cuda
    storage: str = "runs"  # folder of run folders; of a sweep also s3://BUCKET/FOLDER
    cache: str | None = None  # None: RICHKD_CACHE, else ~/.cache/richkd

    def __post_init__(self) -> None:
        in_range("seed", self.seed, 0, 2**31 - 1)
        one_of("selection", self.selection, ("validation", "paper"))
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        if self.storage.startswith("file:///"):  # a folder like any other
            object.__setattr__(self, "storage", self.storage.removeprefix("file://"))
        if is_url(self.storage):
            check_storage(self.storage)
        self._check_views()
        if self.fusion.space == "probs" and self.loss.temperature_of == "task":
            raise ConfigError(
                "loss.temperature_of=task compares spreads of logits but fusion.space=probs mixes probabilities; "
                "use loss.temperature_of=fused."
            )
        if self.fusion.space == "probs" and self.loss.standardise:
            raise ConfigError(
                "loss.standardise standardises logits but fusion.space=probs mixes probabilities; leave one of them out."
            )
        if self.clip.control == "zeros" and self.loss.contrasts and self.feature_alpha < 1:
            raise ConfigError(
                "clip.control=zeros silences CLIP's logits but loss.feature listens to its features; use "
                "fusion.feature_alpha=1, or clip.control=permuted."
            )
        if self.selection == "paper" and self.clip.scale == "calibrated":
            raise ConfigError(
                "clip.scale=calibrated fits temperatures on held-out rows but selection=paper holds none out; use "
                "clip.scale=model or match_std."
            )
        if self.selection == "paper" and self.fusion.weighting != "one":
            raise ConfigError(
                f"fusion.weighting={self.fusion.weighting} is fitted on held-out rows but selection=paper holds none out; use "
                "fusion.weighting=one."
            )

    @property
    def feature_alpha(self) -> float:
        """Weight of the task teacher's features."""
        return self.fusion.alpha if self.fusion.feature_alpha is None else self.fusion.feature_alpha

    @property
    def asks_logits(self) -> bool:
        """Whether there is a use for the fused teacher's logits: they are learnt, or give pseudo-labels."""
        return self.loss.logit > 0 or (self.loss.contrasts and self.contrast.pseudo_labels)

    @property
    def fuses(self) -> bool:
        """Whether there is a use for logits of both teachers together."""
        return self.asks_logits and 0 < self.fusion.alpha < 1

    @property
    def asks_clip(self) -> bool:
        """Whether the loss has a use for what zero-shot teachers say."""
        of_logits = self.asks_logits and self.fusion.alpha < 1
        return of_logits or (self.loss.contrasts and self.feature_alpha < 1)

    def _check_views(self) -> None:
        """Raise ConfigError if a teacher is to meet crops in a way in which they do not come."""
        if self.data.augment == "crop":
            return
        if self.teacher.views == "exact":
            raise ConfigError(
                f"teacher.views=exact keeps what can be seen of an image but under data.augment={self.data.augment} that "
                "has no end; use teacher.views=online."
            )
        for clip in (self.clip, *self.clip.extra):
            if clip.views != "whole":
                raise ConfigError(
                    f"clip.views={clip.views} is a matter of data.augment=crop but got {self.data.augment}; use "
                    "clip.views=whole."
                )

    @property
    def judged(self) -> str:
        """Which rows epochs and settings are chosen on, and `val/*` of an epoch are of: `validation` or `test`."""
        return "validation" if self.selection == "validation" else "test"

    @property
    def part(self) -> str:
        """The same in short: `val` or `test`."""
        return "val" if self.selection == "validation" else "test"

    @property
    def caution(self) -> str:
        """What is to be said beside an accuracy that was chosen on test rows; empty if none was."""
        return "" if self.selection == "validation" else CHOSEN_ON_TEST


def run_folder(config: Config, name: str | None, *, resume: bool) -> Path:
    """Return the folder of a single run, by default a new one named after method, seed and time.

    Raises:
        ConfigError: If `name` is no name, if there is nothing to go on with, or if another run has it.
    """
    if name is None:
        if resume:
            raise ConfigError("--resume goes on with a run; give its --name.")
        name = f"{config.method.name}-seed{config.seed}-{time.strftime('%y%m%d-%H%M%S')}"
    check_name("--name", name)
    if is_url(config.storage):
        raise ConfigError(
            f"storage must be a folder for a single run but got {config.storage}; only a sweep takes an address."
        )
    folder = Path(config.storage) / name
    there = (folder / "run.json").exists()
    if resume and not there:
        raise ConfigError(
            f"--resume goes on with the run in {folder}, but there is none; give its --name, or leave --resume out."
        )
    if there and not resume:
        raise ConfigError(
            f"{folder} holds a run already; go on with it (--resume), or give another --name."
        )
    return folder
