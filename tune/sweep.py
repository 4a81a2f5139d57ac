"""Run a sweep, or go on with one: a single path.

    python -m tune sweep                         # the embedded default
    python -m tune sweep my.yaml sweep.trials=50
    python -m tune resume                        # go on with the latest

A sweep folder holds `sweep.json` (what was asked for), `config.yaml` (the base config), `study.db` (both
searches), `trials/` and `refits/` (run folders), and at the end `summary.json`. What is finished is read
from the study and from the run folders, never from Ray's own state.
"""

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from richkd import distill, fusion
from richkd.command import Stop
from richkd.config import Config, Layers, build, digest, dump, flatten, to_dict
from richkd.data import load
from richkd.errors import ConfigError, Interrupted, RichkdError
from richkd.files import read_json, write_atomic, write_json
from richkd.methods import METHODS
from tune.agenda import Agenda, Job, Refits
from tune.display import Display, describe
from tune.environment import environment
from tune.logbook import Logbook
from tune.scheduler import pruner
from tune.settings import Settings
from tune.space import of_baseline, read_space
from tune.study import Search
from tune.summary import columns, read_refits, summarise, winner
from tune.tracking import Tracker
from tune.warmstart import Point, place, printed

PROJECT = Path(__file__).resolve().parent.parent
LEADING = 5  # trials that the link to MLflow's comparison shows; more would make it very long

# Ray's own result files, progress output, handlers and snapshots: ours do without, or have their own.
ENVIRONMENT = {
    "PYTHONPATH": str(PROJECT),
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",
}


class Sweep:
    """What was asked for, resolved: the base config, the settings, and the config of every run.

    Args:
        folder: Sweep folder.
        layers: Explicit settings, as given.
    """

    def __init__(self, folder: Path, layers: Layers) -> None:
        self.folder, self.layers = folder.resolve(), layers
        self.settings = build(layers, Settings)
        self.base = build(layers)
        if "fusion.alpha" in METHODS[self.base.method.name].fixed:
            raise ConfigError(
                f"method.name={self.base.method.name} has no fusion to search; use method.name=richkd-l "
                "(kd is tuned beside it), or `python -m richkd distill` for a single run."
            )
        self.space = read_space(self.settings.sweep.space, self.resolve)
        self.resolve(self.settings.sweep.settings)
        name = self.base.method.name
        self.labels = {
            "ce": "ce",
            "kd": "kd",
            "kd_tuned": "kd-tuned",
            "richkd_paper": f"{name}-paper",
            "richkd": name,
        }

    def resolve(self, settings: dict[str, Any], method: str | None = None) -> Config:
        """Return the config of a run: the base, a method, and dotted keys on top."""
        layers = self.layers
        if method is not None:
            preset = METHODS[method]
            layers = layers.over(
                method,
                {"method.name": method} | {key: preset.settings[key] for key in preset.fixed},
            )
        return build(layers.over("trial", settings))

    def trial(
        self, search: Search, number: int, params: dict[str, Any], settings: dict[str, Any]
    ) -> Job:
        """Return the job of a trial."""
        method = self.base.method.name if search.name == "richkd" else search.name
        prefix = "" if search.name == "richkd" else f"{search.name}-"
        config = self.resolve(self.settings.sweep.settings | settings, method)
        shown = flatten(to_dict(config))
        return Job(
            id=f"trial-{prefix}{number:03d}",
            kind="trial",
            method=search.name,
            number=number,
            folder=self.folder / "trials" / f"{prefix}{number:03d}",
            config=config,
            params={key: shown[key] for key in params},
        )

    def refit(self, refits: Refits, seed: int, settings: dict[str, Any]) -> Job:
        """Return the job of a refit."""
        base = self.base.method.name
        method = {"ce": "ce", "kd": "kd", "kd_tuned": "kd"}.get(refits.method, base)
        label = self.labels[refits.method]
        config = self.resolve(settings | {"seed": seed}, method)
        shown = flatten(to_dict(config))
        keys = [key for key in self.space if key in settings or refits.method == "richkd"]
        return Job(
            id=f"refit-{label}-seed{seed}",
            kind="refit",
            method=refits.method,
            number=seed,
            folder=self.folder / "refits" / f"{label}-seed{seed}",
            config=config,
            params={key: shown[key] for key in keys} | {"seed": seed},
        )


def points(sweep: Sweep, progress: Callable[[str, int, int], None]) -> dict[str, list[Point]]:
    """Return the first trials of each search, and prepare what all trials share.

    Whatever cannot be used, such as a prompt set without a placeholder, ends here and not in the trials.
    The paper's setting is run as printed, with T of the fused logits; the search's T is relative to the
    task teacher's, so where it lies in the space depends on how wide both spread here.
    """
    paper = printed(sweep.base.method.name)
    plain = printed("kd") | {"fusion.alpha": 1.0}
    config = sweep.resolve(paper)
    task = distill.open_task(config)
    distill.initial_student(config, task.dataset)
    teacher = distill.open_teacher(config, task, progress)
    for key in ("clip.prompts",):
        for choice in getattr(sweep.space.get(key), "choices", ()):
            distill.open_teacher(sweep.resolve({key: choice}), task, progress)
    if "paper" not in sweep.settings.warmstart.sources:
        return {"richkd": [], "kd": []}
    rows = task.split.transfer
    ratio = fusion.spread(teacher.fused("train")[rows]) / fusion.spread(teacher.task.train[rows])
    base = flatten(to_dict(sweep.base))
    kd_space = of_baseline(sweep.space)
    return {
        "richkd": [
            Point(params=place(paper, sweep.space, base, ratio), settings=paper),
            Point(params=place(plain, sweep.space, base, 1.0), settings=plain),
        ],
        "kd": [Point(params=place(plain, kd_space, base, 1.0), settings=printed("kd"))],
    }


def start(layers: Layers, *, address: str | None = None) -> dict[str, Any]:
    """Start the sweep that `layers` describe and carry it out."""
    settings, base = build(layers, Settings), build(layers)
    name = settings.sweep.name or time.strftime(
        f"{base.data.source}-{base.student.name}-%y%m%d-%H%M%S"
    )
    folder = Path(base.storage).resolve() / name
    sweep = Sweep(folder, layers)
    if (folder / "sweep.json").exists():
        raise ConfigError(
            f"sweep {name} exists already; go on with it (python -m tune resume {name}), or choose another sweep.name."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", dump(sweep.base).encode())
    write_json(
        folder / "sweep.json",
        {
            "name": name,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "digest": digest(sweep.base),
            "layers": layers.to_list(),
            "tracking": Tracker.address(settings.tracking.uri),
        },
    )
    return carry_out(sweep, address=address)


def resume(folder: Path, *, address: str | None = None) -> dict[str, Any]:
    """Go on with an interrupted sweep; a finished one gives its summary again."""
    if (folder / "summary.json").exists():
        result = located(folder, read_json(folder / "summary.json"))
        show(result)
        return result
    layers = Layers.from_list(read_json(folder / "sweep.json")["layers"])
    return carry_out(Sweep(folder, layers), address=address)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the sweep's lock; the operating system frees it when its holder dies."""
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"another process is working on {folder.name}; wait for it, or stop it first."
        ) from None


def carry_out(sweep: Sweep, *, address: str | None = None) -> dict[str, Any]:
    """Do what is left of a sweep and summarise it.

    Raises:
        Interrupted: On SIGINT or SIGTERM, after the running trials have stopped at a checkpoint.
        RichkdError: If no trial succeeded.
    """
    began = time.monotonic()
    folder, name = sweep.folder, sweep.folder.name
    asked = read_json(folder / "sweep.json")

    def seconds() -> float:
        return asked.get("seconds", 0.0) + time.monotonic() - began

    stop = Stop()
    with locked(folder), stop.installed(), Display(name) as display:
        logbook = Logbook(folder, asked["tracking"], sweep.settings.tracking.experiment)
        try:
            display.line(f"sweep {name} in {_short(folder)}")
            dataset = load(sweep.base.data)
            logbook.open(sweep.settings, sweep.base, sweep.space, environment(), dataset)
            first = points(sweep, distill.stoppable(display.progress, stop))
            agenda = plan(sweep, first, [display, logbook])
            display.agenda = agenda
            if not agenda.over:
                run_on_ray(sweep, agenda, stop, address)
            if agenda.stopping:
                raise Interrupted(stop.signum, "interrupted")
            result = conclude(sweep, agenda, logbook, seconds())
        except Interrupted as interrupted:
            logbook.close("KILLED")
            line = f"go on with: python -m tune resume {name}"
            raise Interrupted(interrupted.signum, f"{interrupted}; {line}") from None
        except BaseException:
            logbook.close("FAILED")
            raise
        finally:
            write_json(folder / "sweep.json", asked | {"seconds": seconds()})
    show(result)
    return result


def plan(sweep: Sweep, first: dict[str, list[Point]], listeners: list) -> Agenda:
    """Return the agenda: both searches, then the refits of the five students that are compared."""
    from optuna.storages import RDBStorage

    wanted = sweep.settings.sweep
    storage = RDBStorage(f"sqlite:///{sweep.folder / 'study.db'}")
    richkd, kd = (
        Search(
            label,
            storage,
            space,
            first[label],
            wanted.trials,
            wanted.startup,
            pruner(wanted),
            sweep.base.seed,
        )
        for label, space in (("richkd", sweep.space), ("kd", of_baseline(sweep.space)))
    )
    refits = [
        Refits(method="richkd_paper", settings=printed(sweep.base.method.name)),
        Refits(method="kd", settings=printed("kd")),
        Refits(method="ce", settings={}),
        Refits(method="richkd", settings=wanted.settings, search=richkd),
        Refits(method="kd_tuned", settings=wanted.settings, search=kd),
    ]

    def finished(job: Job) -> bool:
        path = job.folder / "run.json"
        return path.exists() and "test/top1" in read_json(path).get("metrics", {})

    return Agenda(
        [richkd, kd],
        refits,
        sweep.settings.refit.seeds,
        trial_of=sweep.trial,
        refit_of=sweep.refit,
        finished=finished,
        listeners=listeners,
    )


def run_on_ray(sweep: Sweep, agenda: Agenda, stop: Stop, address: str | None) -> None:
    """Let Ray Tune run the agenda's jobs, each in a process that goes on to the next."""
    import ray
    import ray.tune

    from tune.runner import JobScheduler, JobSearcher
    from tune.trial import trial

    ours = not ray.is_initialized()
    if ours:
        for variable, value in ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    resources = sweep.settings.resources
    slots = int(ray.cluster_resources().get("CPU", 0) // resources.cpus_per_worker)
    if resources.gpus_per_worker:
        slots = min(slots, int(ray.cluster_resources().get("GPU", 0) / resources.gpus_per_worker))
    if slots < 1:
        raise ConfigError(
            f"a trial asks for {resources.cpus_per_worker} CPUs and {resources.gpus_per_worker} GPUs but the cluster "
            f"has {ray.cluster_resources()}; lower resources.cpus_per_worker or resources.gpus_per_worker."
        )
    wanted = {"cpu": resources.cpus_per_worker, "gpu": resources.gpus_per_worker}
    try:
        # Ray's handlers end the process with a stack dump: ours go on top, after `ray.init`
        with stop.installed(), tempfile.TemporaryDirectory(prefix="richkd-ray-") as scratch:
            ray.tune.Tuner(
                ray.tune.with_resources(trial, wanted),
                tune_config=ray.tune.TuneConfig(
                    search_alg=JobSearcher(agenda, stop),
                    scheduler=JobScheduler(agenda, stop),
                    num_samples=agenda.total,
                    max_concurrent_trials=min(slots, resources.max_concurrent or slots),
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=ray.tune.RunConfig(name="sweep", storage_path=scratch, verbose=0),
            ).fit()
    finally:
        if ours:
            ray.shutdown()


def conclude(sweep: Sweep, agenda: Agenda, logbook: Logbook, seconds: float) -> dict[str, Any]:
    """Choose the best, summarise, and write it down: `summary.json` and MLflow."""
    refits = read_refits(sweep.folder / "refits", sweep.labels)
    search = agenda.searches[0]
    trial, seed = search.best(), winner(refits)
    if trial is None or seed is None:
        reasons = "; ".join(sorted(set(agenda.failed.values()))[:3])
        raise RichkdError(
            f"no trial of {sweep.folder.name} gave a student: {reasons or 'all were stopped early'}."
        )
    best = sweep.trial(
        search, trial.number, trial.params, trial.user_attrs.get("settings", trial.params)
    )
    metrics = refits["richkd"][seed]
    summary = summarise(refits)
    result = {
        "sweep": str(sweep.folder),
        "trials": sum(s.trials for s in agenda.searches),
        "states": {search.name: search.states() for search in agenda.searches},
        "failed": len(agenda.failed),
        "failures": agenda.failed,
        "best": {
            "trial": trial.number,
            "val_top1": trial.value,
            "params": best.params,
            "scale": sweep.base.clip.scale,
            "seed": seed,
            "checkpoint": f"refits/{sweep.labels['richkd']}-seed{seed}/best",
            "recorded": {"val_top1": metrics["best_val_top1"], "test_top1": metrics["test/top1"]},
        },
        "leading": [f"trial-{ranked.number:03d}" for ranked in search.ranked()[:LEADING]],
        "summary": summary,
        "seconds": seconds,
        "machine": {"cores": os.cpu_count(), "platform": platform.platform()},
    }
    result["mlflow"] = logbook.conclude(result, columns(summary))
    write_json(sweep.folder / "summary.json", result)
    return located(sweep.folder, result)


def located(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return a summary as its reader finds things: `summary.json` itself survives a move of the folder."""
    best = result["best"] | {"checkpoint": str(folder / result["best"]["checkpoint"])}
    return result | {"sweep": str(folder), "best": best}


def show(result: dict[str, Any]) -> None:
    """Print the summary that a person reads."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)

    def line(what: str, text: str = "", style: str | None = None) -> None:
        console.print(f"{what:<14}{text}" if text else what, style=style, markup=False)

    table = Table(box=None, pad_edge=False)
    found = columns(result["summary"])
    for name in found:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in zip(*found.values(), strict=True):
        table.add_row(*row)
    best, summary = result["best"], result["summary"]
    n = summary["richkd"]["n"]
    line("")
    console.print(table)
    line(f"mean ± standard deviation over {n} seeds; differences paired by seed")
    gap = summary.get("difference_tuned")
    if gap and gap["se"] is not None:
        line(
            f"as found against kd tuned by as many trials: {gap['mean']:+.2f} (s.e. {gap['se']:.2f}), "
            f"{gap['wins']} of {gap['n']} wins"
        )
    line("")
    line("best setting", f"{describe(best['params'])} at clip.scale {best['scale']}")
    line("", f"trial {best['trial']}, {best['val_top1']:.2f} % on validation")
    line("checkpoint", _short(best["checkpoint"]))
    line("restore it", f"python -m tune best {Path(result['sweep']).name} --copy-to student")
    for what, text in result["mlflow"]["lines"].items():
        line(what, text)
    if result["failed"]:
        line("failed", f"{result['failed']}: {next(iter(result['failures'].values()))}", "red")
    line(f"{result['seconds']:.0f} s on {result['machine']['cores']} cores")


def _short(path: str | Path) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return str(path)
