"""A sweep: what was asked for, resolved, and what its folder knows of it.

A sweep folder holds `sweep.json` (what was asked for), `config.yaml` (the base config), `study.db` (both
searches), `spent.json` (the time it took), `trials/` and `refits/` (run folders), and at the end `summary.json`.
What is finished is read from the study and from the run folders, never from Ray's own state.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from richkd import cache, methods
from richkd.config import Config, is_url
from richkd.errors import ConfigError, CorruptError, Stopped
from richkd.files import read_record
from richkd.layers import Layers, build, digest, flatten, to_dict
from tune.agenda import OF_A_METHOD, Job, Refits
from tune.best import called
from tune.budget import Budget
from tune.driver import is_full
from tune.scheduler import pruner
from tune.settings import Settings
from tune.space import Space, read_space
from tune.store import Store
from tune.students import around_a_search, cells
from tune.study import MAIN, Search
from tune.warmstart import BARE, Point, printed

DIAGNOSIS = "diagnosis.json"  # what was told of the teachers before the search
BASELINES = ("ce", "kd", "kd-crd", "kd-lskd")  # the labels alone, and plain distillation


class Sweep:
    """What was asked for, resolved: the base config, the settings, and the config of every run.

    Args:
        folder: Sweep folder, with its study, lock and spool.
        layers: Explicit settings, as given.
    """

    def __init__(self, folder: Path, layers: Layers) -> None:
        self.folder = folder.resolve()
        # all runs with one seed ask one teacher
        self.layers = Layers().over("a sweep", {"teacher.shared": True}).under(layers)
        self.settings = build(layers, Settings)
        self.base = build(self.layers)
        self.runs, self.store = self.folder, None  # where run folders lie, as the driver sees them
        if is_url(self.base.storage):
            self.store = Store(f"{self.base.storage.rstrip('/')}/{folder.name}")
        elif self.settings.sweep.state is not None:
            self.runs = Path(self.base.storage).resolve() / folder.name
        self.cache = str(cache.root(self.base.cache))
        own, wanted = self.base.method.name, self.settings.sweep
        self.students = cells(own, wanted.grid) or around_a_search(own, wanted.settings)
        self.costs: dict[str, dict[str, float]] = {}  # of each student, by objective
        self.diagnosis: dict[str, Any] | None = None  # of its teachers, if it began with one
        self.space = Space({})
        if not self.grid:
            self._open_search()
        beside = wanted.objectives[1:]
        if beside and not any(key.startswith("student.") for key in self.space):
            raise ConfigError(
                f"sweep.objectives has {', '.join(beside)} but no student is searched, and so all trials cost the same; add "
                "sweep.space.student.name={choice: [...]}, or leave them out."
            )
        for name, student in self.students.items():
            try:
                self.resolve(student.settings, student.method)
            except ConfigError as error:
                where = f"sweep.grid, {name}: " if self.grid else ""
                raise ConfigError(f"{where}{error}") from error
        if "?" in str(self.folder):
            raise ConfigError(
                f"storage and sweep.name must not hold a question mark, which SQLite cannot take, but got "
                f"{self.folder}; choose another."
            )

    def _open_search(self) -> None:
        """Read the space, and refuse what cannot be searched."""
        if self.base.method.name in BASELINES:
            raise ConfigError(
                f"method.name={self.base.method.name} is what a sweep compares its own method with; use method.name=richkd-l "
                "(kd is tuned beside it), or `python -m richkd distill` for a single run."
            )
        self.space = read_space(self.settings.sweep.space, self.resolve)
        if not self.space:
            raise ConfigError(
                "sweep.space is empty but a sweep searches something; name keys as conf/digits.yaml does, give it a "
                "sweep.grid, or run `python -m richkd distill` for a single run."
            )
        for key in self.settings.sweep.settings:
            if not key.startswith(OF_A_METHOD):
                raise ConfigError(
                    f"sweep.settings may hold keys of {', '.join(OF_A_METHOD)} but holds {key}, and then trials would "
                    "differ from the refits that they are compared with; set it for the whole sweep."
                )
        self.resolve(self.settings.sweep.settings)

    @property
    def grid(self) -> bool:
        """Whether it runs the cells of a grid, and searches nothing."""
        return bool(self.settings.sweep.grid.rows)

    @property
    def typical(self) -> Config:
        """The config of a run as most are: the setting as printed, or the first cell that has a teacher."""
        if not self.grid:
            return self.resolve(printed(self.base.method.name))
        taught = [one for one in self.students.values() if one.method != "ce"]
        first = next(iter(taught or self.students.values()))
        return self.resolve(first.settings, first.method)

    def configs(self) -> list[Config]:
        """Return the configs that differ in more than a seed, before anything is searched: of all cells, or of the setting."""
        if not self.grid:
            return [self.typical]
        return [self.resolve(one.settings, one.method) for one in self.students.values()]

    def resolve(self, settings: dict[str, Any], method: str | None = None) -> Config:
        """Return the config of a run: the base, a method, and dotted keys on top."""
        layers = self.layers
        if method is not None:
            preset = methods.get(str(method))
            layers = layers.over(
                method,
                {"method.name": method}
                | (BARE if method in BASELINES else {})
                | {key: preset.settings[key] for key in preset.fixed},
            )
        # absolute, for workers that have another environment
        return build(layers.over("trial", settings).over("", {"cache": self.cache}))

    def trial(
        self, search: Search, number: int, params: dict[str, Any], settings: dict[str, Any]
    ) -> Job:
        """Return the job of a trial."""
        method = self.base.method.name if search.name == MAIN else search.name
        config = self.resolve(self.settings.sweep.settings | settings, method)
        shown = flatten(to_dict(config))
        return Job(
            id=f"trial-{search.label(number)}",
            kind="trial",
            method=search.name,
            number=number,
            folder=self.runs / "trials" / search.label(number),
            config=config,
            params={key: shown[key] for key in params},
            store=self._address("trials", search.label(number)),
            costs=self.costs[student_of(config)] if self.costs else {},
        )

    @property
    def shared(self) -> dict[str, Path]:
        """Folders that all machines must see, by key."""
        found = {} if self.store is not None else {"storage": self.runs.parent}
        # one that is trained is kept in the cache, by whoever needs it first
        if not all(config.teacher.brought for config in self.configs()):
            found["cache"] = Path(self.cache)
        return found

    def _address(self, kind: str, name: str) -> str | None:
        return None if self.store is None else f"{self.store.url}/{kind}/{name}"

    def refit(self, refits: Refits, seed: int, settings: dict[str, Any]) -> Job:
        """Return the job of a refit."""
        student = self.students[refits.method]
        config = self.resolve(settings | {"seed": seed}, student.method)
        shown = flatten(to_dict(config))
        own, name = student.method == self.base.method.name, f"{student.label}-seed{seed}"
        space = self.space if own else self.space.of_baseline()
        keys = [key for key in space.active(shown) if key in settings or own]
        return Job(
            id=f"refit-{name}",
            kind="refit",
            method=refits.method,
            number=seed,
            folder=self.runs / "refits" / name,
            config=config,
            params=student.params | {key: shown[key] for key in keys} | {"seed": seed},
            # with the settings, since nobody sets aside what lies on a store
            store=self._address("refits", f"{name}-{digest(config)}"),
        )


def student_of(config: Config) -> str:
    """Return what tells students of different cost apart."""
    return json.dumps(asdict(config.student), sort_keys=True)


def state_of(settings: Settings, base: Config) -> Path:
    """Return the folder in which sweeps keep their study, lock and spool."""
    folder = Config().storage if is_url(base.storage) else base.storage
    return Path(settings.sweep.state or folder).resolve()


def asked_of(folder: Path) -> tuple[dict[str, Any], Layers]:
    """Return what `sweep.json` says, and the layers in it; a CorruptError if it cannot be read."""
    asked = read_record(folder / "sweep.json", "layers", "tracking")
    try:
        return asked, Layers.from_list(asked["layers"])
    except TypeError as error:
        raise CorruptError(
            f"{folder / 'sweep.json'} holds no layers that can be read; restore it, or start a new sweep."
        ) from error


def trials_of(sweep: Sweep, asked: dict[str, Any]) -> int:
    """Return how many trials each search has: what its settings say, and what `sweep.json` says that it was given since."""
    return sweep.settings.sweep.trials + asked.get("more_trials", 0)


def budget_of(sweep: Sweep, asked: dict[str, Any]) -> Budget:
    """Return what a sweep may take: what its settings say, and what `sweep.json` says that it was given since."""
    wanted = sweep.settings.sweep
    limits = {
        name: None if limit is None else limit + asked.get(f"more_{name}", 0.0)
        for name, limit in (("hours", wanted.hours), ("gpu_hours", wanted.gpu_hours))
    }
    return Budget(sweep.folder / "spent.json", **limits)


def going_on(folder: Path, budget: Budget) -> str:
    """Return the line that goes on with a sweep; one whose time is up needs more of it."""
    line = f"python -m tune resume {called(folder)}"
    for name in budget.used_up():
        line += f" --add-{name.replace('_', '-')} 1"
    return line


def open_searches(
    sweep: Sweep, trials: int, first: dict[str, list[Point]] | None = None
) -> list[Search]:
    """Return the search of the method and that of plain distillation, as far as the study's database knows them.

    A grid has none.

    Args:
        sweep: The sweep.
        trials: Of each.
        first: The first trials of each, which may be in the study already; None: they are.

    Raises:
        CorruptError: If the database is damaged, or is gone though trials ran.
    """
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import DatabaseError

    if sweep.grid:
        return []
    wanted, database = sweep.settings.sweep, sweep.folder / "study.db"
    advice = "restore it, or start a new sweep"
    address, prefix = wanted.study, f"{sweep.folder.name}/"
    if address is None:
        address, prefix = f"sqlite:///{database}", ""
        if (sweep.runs / "trials").exists() and not database.exists():
            raise CorruptError(f"{database} is missing, and with it which trials ran; {advice}.")
    try:
        storage = RDBStorage(address)
        return [
            Search(
                label,
                storage,
                space,
                first[label] if first else [],
                trials if space else 1,  # nothing to search: one trial says it all
                wanted.startup,
                pruner(wanted),
                sweep.base.seed,
                prefix=prefix,
                objectives=wanted.objectives,
            )
            for label, space in ((MAIN, sweep.space), ("kd", sweep.space.of_baseline()))
        ]
    except (DatabaseError, StorageInternalError) as error:
        if is_full(error):
            raise Stopped("the disk is full; free some space") from error
        reason = str(error.__cause__ or error).splitlines()[0]
        raise CorruptError(f"{address} cannot be read ({reason}); {advice}.") from error
