"""Frozen dataclasses of one sweep: space, budget, resources, tracking; the run itself is `richkd.config`."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from richkd import cache
from richkd.config import Config, check_name, expand, in_range, one_of
from richkd.errors import ConfigError
from richkd.layers import Layers, build, flatten
from richkd.layers import digest as config_digest

MANY = 1_000_000
OBJECTIVES = ("top1", "parameters", "latency")  # validation accuracy goes up, the others down
# change no result, but for how many there are
UNHASHED = (
    *("resources.", "tracking.", "sweep.name", "sweep.state", "sweep.study"),
    *("sweep.trials", "sweep.hours", "sweep.gpu_hours"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Cells that are run instead of a search: each row with each method, over `refit.seeds` seeds.

        rows: {resnet: {student.name: resnet8}, vgg: {student.name: vgg8, train.lr: 0.01}}
        methods: {kd: {method.name: kd-crd}, richkd: {method.name: richkd-l}}

    A row is compared with its `kd`, if there is a method of that name.
    """

    rows: dict[str, Any] = field(default_factory=dict)  # name: dotted keys
    methods: dict[str, Any] = field(default_factory=dict)  # likewise, on top of the row's

    def __post_init__(self) -> None:
        for table, entries in (("rows", self.rows), ("methods", self.methods)):
            for name, settings in entries.items():
                if not isinstance(settings, dict):
                    raise ConfigError(
                        f"sweep.grid.{table}.{name} must be settings, as in {{student.name: resnet8}}, but got {settings!r}."
                    )
                if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name) or "-seed" in name:
                    raise ConfigError(
                        f"sweep.grid.{table} must have names that a folder can bear, of letters, digits, - and _ without "
                        f"-seed, but has {name!r}; rename it."
                    )
        labels = [f"{row}-{method}" for row in self.rows for method in self.methods]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ConfigError(
                f"sweep.grid must tell its cells apart but has {twice[0]} twice, from a row and a method; rename one."
            )
        if bool(self.rows) != bool(self.methods):
            raise ConfigError(
                f"sweep.grid needs rows and methods but has no {'methods' if self.rows else 'rows'}; add them, as in "
                "{kd: {method.name: kd}}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What is searched, and for how long."""

    name: str | None = None  # folder and parent run; None: <data>-<student or grid>-<yymmdd-hhmmss>
    trials: int = 16  # of the method, and as many again for its baseline kd
    startup: int = 4  # trials drawn at random before the sampler learns; Optuna's 10 is most of 16
    objectives: tuple[str, ...] = (
        "top1",
    )  # and parameters or latency of a student that is searched
    scheduler: str = "asha"  # asha | median | none; with several objectives none
    min_epochs: int = 4  # epochs before the first decision of asha or median
    reduction: int = 3  # asha lets one in `reduction` trials pass a decision
    hours: float | None = None  # of wall time, resumed ones counted in; None: until all is done
    gpu_hours: float | None = None  # of GPUs held by runs, likewise
    seeds_per_trial: int = 1  # that a trial runs side by side; it reports their mean
    state: str | None = None  # folder of study, lock and spool; None: in `storage`
    study: str | None = None  # address of Optuna's database; None: study.db in `state`
    settings: dict[str, Any] = field(default_factory=dict)  # dotted key: value, in every trial
    space: dict[str, Any] = field(default_factory=dict)  # dotted key: {distribution: bounds}
    grid: Grid = field(default_factory=Grid)  # instead of a search; then `space` is not looked at

    def __post_init__(self) -> None:
        in_range("sweep.trials", self.trials, 1, MANY)
        in_range("sweep.startup", self.startup, 0, MANY)
        in_range("sweep.min_epochs", self.min_epochs, 1, MANY)
        in_range("sweep.reduction", self.reduction, 2, MANY)
        in_range("sweep.hours", self.hours, 1e-4, 1e6)
        in_range("sweep.gpu_hours", self.gpu_hours, 1e-4, 1e6)
        in_range("sweep.seeds_per_trial", self.seeds_per_trial, 1, 1000)
        one_of("sweep.scheduler", self.scheduler, ("asha", "median", "none"))
        for objective in self.objectives:
            one_of("sweep.objectives", objective, OBJECTIVES)
        if self.objectives[:1] != ("top1",) or len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(
                f"sweep.objectives must be top1, and then each of {', '.join(OBJECTIVES[1:])} once at most, but are "
                f"{', '.join(self.objectives) or 'none'}; begin with top1."
            )
        expand(self, "state")
        if self.study is not None and re.search(r"://[^@]*:.*@|passw", self.study):
            raise ConfigError(
                "sweep.study must hold no password, since it is written down; give it by the database's own way, such as "
                "~/.pgpass or PGPASSWORD."
            )
        if self.name is not None:
            check_name("sweep.name", self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class Refit:
    """The final fits of the methods that are compared."""

    seeds: int = 8  # each varies labelled subset, teacher, initial weights and order

    def __post_init__(self) -> None:
        in_range("refit.seeds", self.seeds, 1, 10_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class Warmstart:
    """Where the first trials come from."""

    # `paper`; `theory`, the weight that the teachers' errors on the held-out rows call for; a layer of settings, such as the
    # start.yaml of a diagnosis; and sweeps: a name, a folder or an MLflow run id
    sources: tuple[str, ...] = ("paper", "theory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a trial takes of the cluster."""

    workers: int = 1  # that share the batches of a trial
    cpus_per_worker: int = 1  # and threads
    # where there are GPUs, and `device` is not cpu; for trials of one worker. auto: what a sweep measures, else 1
    trials_per_gpu: int | str = "auto"
    max_concurrent: int | None = None  # None: as many as fit
    patience: float = 1800.0  # seconds without a step after which a run counts as hung

    def __post_init__(self) -> None:
        in_range("resources.workers", self.workers, 1, 10_000)
        in_range("resources.cpus_per_worker", self.cpus_per_worker, 1, MANY)
        in_range("resources.max_concurrent", self.max_concurrent, 1, MANY)
        in_range("resources.patience", self.patience, 1, 1e6)
        if isinstance(self.trials_per_gpu, str):
            if self.trials_per_gpu != "auto":
                raise ConfigError(
                    f"resources.trials_per_gpu must be auto or a whole number but got {self.trials_per_gpu!r}."
                )
            return
        in_range("resources.trials_per_gpu", self.trials_per_gpu, 1, 64)
        if self.workers > 1 and self.trials_per_gpu > 1:
            raise ConfigError(
                f"resources.workers={self.workers} take a GPU each but resources.trials_per_gpu={self.trials_per_gpu} "
                "share one; set one of them to 1."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """Where MLflow is."""

    uri: str | None = None  # None: MLFLOW_TRACKING_URI, else mlflow.db in the working folder
    experiment: str = "richkd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One sweep, beside the `Config` of its runs."""

    sweep: Sweep = field(default_factory=Sweep)
    refit: Refit = field(default_factory=Refit)
    warmstart: Warmstart = field(default_factory=Warmstart)
    resources: Resources = field(default_factory=Resources)
    tracking: Tracking = field(default_factory=Tracking)


def for_workers(layers: Layers) -> Config:
    """Return the config of a run with an absolute cache, for workers that have another environment."""
    return build(layers.over("", {"cache": str(cache.root(build(layers).cache))}))


def fit(
    resources: Resources, nodes: list[dict[str, float]], *, gpu: bool
) -> tuple[int, dict[str, float]]:
    """Return how many trials fit into the cluster at once, and what each of their workers takes.

    Args:
        resources: What is asked for; trials a GPU that are not settled yet are one.
        nodes: CPUs and GPUs of each machine, as Ray says; a worker is on one of them.
        gpu: Whether a GPU is used where there is one.

    Raises:
        ConfigError: If not even one fits.
    """
    cluster = {what: sum(node.get(what, 0) for node in nodes) for what in ("CPU", "GPU")}
    wanted = resources.workers * resources.cpus_per_worker
    if wanted > cluster["CPU"]:
        raise ConfigError(
            f"resources.workers={resources.workers} with resources.cpus_per_worker={resources.cpus_per_worker} must fit "
            f"into the cluster's {cluster['CPU']:g} CPUs but take {wanted}; lower one of them."
        )
    each: dict[str, float] = {"CPU": resources.cpus_per_worker}
    places = [int(node.get("CPU", 0) // resources.cpus_per_worker) for node in nodes]
    if sum(places) < resources.workers:
        raise ConfigError(
            f"resources.workers={resources.workers} with resources.cpus_per_worker={resources.cpus_per_worker} must "
            f"each fit into one of the cluster's {len(nodes)} machines but only {sum(places)} do; lower one of them."
        )
    if gpu and cluster["GPU"]:
        shared = 1 if resources.trials_per_gpu == "auto" else resources.trials_per_gpu
        each["GPU"] = 1 / shared
        gpus = [int(node.get("GPU", 0)) * shared for node in nodes]
        places = [min(both) for both in zip(places, gpus, strict=True)]
        if sum(places) < resources.workers:
            raise ConfigError(
                f"resources.workers={resources.workers} take a GPU each but the cluster has {cluster['GPU']:g}, with "
                f"CPUs beside them for {sum(places)}; lower it, or use device=cpu."
            )
    return sum(places) // resources.workers, each


def digest(settings: Settings, base: Config) -> str:
    """Return 12 hexadecimal digits that change with everything that changes a sweep's result, but for its length."""
    kept = {k: v for k, v in flatten(asdict(settings)).items() if not k.startswith(UNHASHED)}
    text = json.dumps([config_digest(base), kept], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
