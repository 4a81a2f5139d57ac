"""What comes before the trials of a sweep: what all of them share, the first settings, what students cost."""

import itertools
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from richkd import cache, distill, estimate
from richkd.command import Stop
from richkd.config import Config, Data, Diagnose
from richkd.diagnose import diagnose, of_target
from richkd.errors import ConfigError, DataError, Stopped
from richkd.files import read_record
from richkd.layers import Layers, find_layer, flatten, read_layer, to_dict
from richkd.progress import Progress, stoppable
from richkd.teachers import FusedTeacher
from tune.agenda import OF_A_METHOD
from tune.best import find_sweep
from tune.display import Display
from tune.places import machines_of
from tune.settings import for_workers
from tune.space import Space
from tune.study import MAIN, settings_of
from tune.sweep import Sweep, asked_of, open_searches, student_of, trials_of
from tune.warmstart import (
    OF_FEATURES,
    PAPER,
    THEORY,
    Outside,
    Point,
    holds_plain,
    is_printed,
    meant,
    place,
    plain,
    printed,
    within,
)

ALPHA = "fusion.alpha"
# names that are looked up when a run starts: each choice is tried before any trial
NAMED = ("student.name", "teacher.name", "clip.prompts", "clip.logits", "clip.views")
WARM = 5  # trials of each search that a sweep takes from one before it
NAMES = 10  # trials that are named one by one where they lie outside
WORTH = 20.0  # seconds of work for which workers are started, which takes them some
STUDENTS_FILE = "students.json"  # what each student costs, where a search looks at that


def prepare(
    sweep: Sweep, progress: Progress, *, new: bool, **launch: Any
) -> dict[str, list[Point]]:
    """Make what all trials share, and return the first trials of each search.

    Whatever cannot be used, such as a prompt set without a placeholder, is refused here and not in the trials.

    Args:
        sweep: The sweep; what its students cost is noted in it, where that is looked at.
        progress: Told how far it is.
        new: Whether it begins; one that goes on has its first trials, and does without the sweeps that they came from.
        launch: As `look_at_all` takes it.
    """
    if sweep.grid:
        prepare_cells(sweep, progress, **launch)
        return {}
    sources = sweep.settings.warmstart.sources if new else ()
    earlier = {source: earlier_points(sweep, source) for source in sources if is_earlier(source)}
    config = sweep.typical
    task = distill.open_task(config)
    distill.initial_student(config, task.dataset)
    look_at_all(config, task, progress, **launch)
    teacher = distill.open_teacher(config, task, progress)
    for key in NAMED:
        for choice in sweep.space.choices(key):
            each = sweep.resolve({key: choice})
            distill.initial_student(each, task.dataset)
            look_at_all(each, task, progress, **launch)
            distill.open_teacher(each, task, progress)
    sweep.costs = costs_of(sweep, task, progress)
    first: dict[str, list[Point]] = {MAIN: [], "kd": []}
    for source in sources:
        if source == PAPER:
            found = paper_points(sweep, task, teacher)
        elif source == THEORY:
            found = theory_points(sweep, task, progress)
        elif is_earlier(source):
            found = earlier[source]
        else:
            found = {MAIN: [given_point(sweep, source, task, progress)]}
        for label, points in found.items():
            known = [point.settings for point in first[label]]
            first[label] += [point for point in points if point.settings not in known]
    return first


def prepare_cells(sweep: Sweep, progress: Progress, **launch: Any) -> None:
    """Look at what each cell of a grid needs, and make what several share; task teachers are trained by the runs.

    Raises:
        ConfigError: If a cell cannot be run; says which.
    """
    opened: Data | None = None
    for name, config in zip(sweep.students, sweep.configs(), strict=True):
        if config.data != opened:
            task, opened = distill.open_task(config, progress), config.data
        if told := estimate.mistakes(config, task, progress):
            raise ConfigError(f"sweep.grid, {name}: {told[0]}")
        look_at_all(config, task, progress, **launch)


def look_at_all(config: Config, task: distill.Task, progress: Progress, **launch: Any) -> None:
    """Let all workers of the cluster compute CLIP's features, where so many are missing that it is worth their start.

    Args:
        config: The run, with an absolute cache.
        task: Its data.
        progress: Told how far it is; may raise to stop, and what is finished stays.
        launch: `stop`, `address` and `dashboard`, as `runner.run` takes them.
    """
    if not config.asks_clip:
        return
    if sum(lack.seconds for lack in estimate.unseen(config, task, progress)) >= WORTH:
        from tune.spread import features  # Ray takes seconds to import

        features(config, task, progress, **launch)


def compute(layers: Layers, *, command: str, stop: Stop, **launch: Any) -> dict[str, Any]:
    """Compute what all runs of a config share, and give it to all machines of the cluster.

    Args:
        layers: Explicit settings.
        command: What goes on after it was stopped.
        stop: Says whether one came.
        launch: `address` and `dashboard`, as `runner.run` takes them.

    Returns:
        As `distill.prepared`.
    """
    config, machines = for_workers(layers), machines_of(launch["address"])
    launch = {"stop": stop, **launch}
    try:
        with Display("cache", stop=stop) as display:
            progress = stoppable(display.progress, stop)
            task = distill.open_task(config, progress)
            look_at_all(config, task, progress, **launch)
            teacher = distill.open_teacher(config, task, progress)
            if config.teacher.views == "exact" and teacher is not None and teacher.task is not None:
                from tune.spread import crops

                crops(config, teacher.task, progress, **launch)
            if len(machines) > 1:
                from tune.nodes import share
                from tune.runner import connect

                connect(**launch)
                share(cache.used(), progress=progress)
    except Stopped as stopped:
        stopped.args = (f"{stopped}; go on with: {command}",)
        raise
    return distill.prepared(task, teacher)


def paper_points(sweep: Sweep, task: distill.Task, teacher: FusedTeacher) -> dict[str, list[Point]]:
    """Return the setting as printed and, where the method holds it, plain distillation, with T of the fused logits.

    Where the search's T is relative to the task teacher's, its place in the space depends on how wide both spread here.
    """
    own = sweep.base.method.name
    paper = printed(own)
    ratio = 1.0
    if sweep.resolve(sweep.settings.sweep.settings).loss.temperature_of == "task":
        alone, fused = teacher.spreads(task.split.transfer)
        ratio = fused / alone
    base = flatten(to_dict(sweep.base))
    main = [as_printed(paper, sweep.space, base, ratio)]
    if holds_plain(own):
        main.append(as_printed(plain(), sweep.space, base, 1.0))
    return {
        MAIN: main,
        "kd": [as_printed(printed("kd"), sweep.space.of_baseline(), base | plain(), 1.0)],
    }


def theory_points(sweep: Sweep, task: distill.Task, progress: Progress) -> dict[str, list[Point]]:
    """Return the weight that the teachers' errors on the held-out rows call for, with the prompts that fuse best.

    The temperature keeps the target as sharp as plain distillation's as printed, and the rest is as printed. The sweep keeps
    the diagnosis, for its report. Nothing is returned, and a warning says why, where these rows cannot tell; nothing where
    no weight is searched, or no row is held out.
    """
    config, own = sweep.typical, sweep.base.method.name
    if ALPHA not in sweep.space or not config.asks_logits or config.selection == "paper":
        return {}
    key = "clip.prompts" if config.clip.logits is None else "clip.logits"
    # whatever a look at the teachers was asked for: the final fit alone reads test rows
    config = replace(config, diagnose=Diagnose())
    try:
        found = diagnose(config, sweep.space.choices(key), progress, task=task)
    except (ConfigError, DataError) as error:
        warnings.warn(f"warmstart.sources: theory is left out: {error}", stacklevel=2)
        return {}
    sweep.diagnosis, weight = found, found["alpha_star"]["full"]
    if weight is None:
        warnings.warn(f"warmstart.sources: theory is left out: {found['caution']}.", stacklevel=2)
        return {}
    settings = printed(own) | {ALPHA: weight, key: found["prompts"]}
    of = sweep.resolve(sweep.settings.sweep.settings).loss.temperature_of
    if of == "fused":
        settings["loss.temperature"] *= of_target(found, "sharpness", weight)
    settings["loss.temperature_of"] = of
    base = flatten(to_dict(sweep.base))
    params = place(settings, sweep.space, base, 1.0)
    return {MAIN: [Point(params=params, settings=settings | params, source=THEORY)]}


def given_point(sweep: Sweep, source: str, task: distill.Task, progress: Progress) -> Point:
    """Return the setting of a layer, such as the `start.yaml` of a diagnosis, as it stands.

    Raises:
        ConfigError: If there is no such layer, or it holds what is no setting of a trial.
    """
    try:
        settings = {each.key: each.value for each in read_layer(find_layer(source)).entries}
        for key in settings:
            if not key.startswith((*OF_A_METHOD, "student.", "train.")):
                raise ConfigError(
                    f"it sets {key}, which all trials of a sweep share; leave it out, or give it as a layer."
                )
        config = sweep.resolve(settings)
    except ConfigError as error:
        raise ConfigError(f"warmstart.sources={source}: {error}") from error
    ratio = 1.0
    if config.loss.temperature_of == "fused" and config.fuses:
        alone, fused = distill.open_teacher(config, task, progress).spreads(task.split.transfer)
        ratio = fused / alone
    point = as_printed(settings, sweep.space, flatten(to_dict(config)), ratio)
    return replace(point, source=Path(source).name)


def is_earlier(source: str) -> bool:
    """Whether a source of first trials is a sweep, and neither a word nor a layer."""
    return source not in (PAPER, THEORY) and not source.endswith((".yaml", ".yml"))


def as_printed(settings: dict[str, Any], space: Space, base: dict[str, Any], ratio: float) -> Point:
    """Return a setting as printed with its place in the space; of what it leaves alone that place is run.

    But features weigh as printed, as the logits do, wherever the nearest place is.
    """
    params = place(settings, space, base, ratio)
    exact = {key: meant(key, base | settings) for key in params if key == OF_FEATURES}
    return Point(params=params, settings=params | exact | settings)


def earlier_points(sweep: Sweep, source: str) -> dict[str, list[Point]]:
    """Return the best trials of an earlier sweep as far as they lie in the space of this one; the others are named.

    Settings alone are taken over, no results: they are run again.

    Args:
        sweep: The sweep that begins.
        source: Name, folder or MLflow run id of the earlier one.

    Raises:
        ConfigError: If there is no such sweep, or it has no trial that lies in the space.
    """
    try:
        folder = find_sweep(source, sweep.folder.parent)
    except ConfigError as error:
        raise ConfigError(f"warmstart.sources={source}: {error}") from error
    asked, layers = asked_of(folder)
    before = Sweep(folder, layers)
    paper = PAPER in sweep.settings.warmstart.sources
    points: dict[str, list[Point]] = {MAIN: [], "kd": []}
    outside, known = [], 0
    for search in open_searches(before, trials_of(before, asked)):
        main = search.name == MAIN
        space = sweep.space if main else sweep.space.of_baseline()
        method = sweep.resolve(sweep.settings.sweep.settings, None if main else "kd")
        fixed, found = flatten(to_dict(method)), points[search.name]
        for trial in search.distinct():
            if len(found) == WARM:
                break
            settings = settings_of(trial)
            if paper and is_printed(before.base.method.name if main else "kd", settings):
                known += main  # it is among the first trials already
                continue
            try:
                job = before.trial(search, trial.number, trial.params, settings)
                ran = flatten(to_dict(job.config))
                searched = before.settings.sweep.settings | settings
                params = within(space, fixed, ran, searched)
            except (Outside, ConfigError) as error:
                outside.append(f"trial-{search.label(trial.number)} ({error})")
            else:
                name = f"{folder.name}/{job.id}"
                found.append(Point(params=params, settings=params, source=name))
    if outside:
        rest = f"; and {len(outside) - NAMES} more" if len(outside) > NAMES else ""
        left_out = (
            f"outside the space of this sweep, and left out: {'; '.join(outside[:NAMES])}{rest}"
        )
        warnings.warn(f"warmstart.sources={source}: {left_out}.", stacklevel=2)
    if not points[MAIN] and not known:
        raise ConfigError(
            f"warmstart.sources={source} must have a finished trial inside the space of this sweep but has none; widen "
            "sweep.space, or leave it out."
        )
    return points


def costs_of(sweep: Sweep, task: distill.Task, progress: Progress) -> dict[str, dict[str, float]]:
    """Return what each student that can be drawn costs, by the sweep's objectives; nothing if it looks at accuracy alone.

    Latency is measured here, before anything else runs, and once: trials of one student have one latency, and a sweep
    that goes on compares with what it measured first.
    """
    beside, path = sweep.settings.sweep.objectives[1:], sweep.folder / STUDENTS_FILE
    if not beside:
        return {}
    found: dict[str, dict[str, float]] = read_record(path) if path.exists() else {}
    measure = {"parameters": estimate.size, "latency": estimate.latency}
    base, choices = flatten(to_dict(sweep.base)), {}
    for key in (key for key in sweep.space if key.startswith("student.")):
        kept = [base[key]] if key in sweep.space.when else []  # where it is not searched
        choices[key] = [*sweep.space.choices(key), *kept]
    drawn = list(itertools.product(*choices.values()))
    for k, values in enumerate(drawn):
        progress("students", k, len(drawn))
        config = sweep.resolve(dict(zip(choices, values, strict=True)))
        costs = found.setdefault(student_of(config), {})
        for name in beside:
            if name not in costs:
                costs[name] = measure[name](config, task)
    progress("students", len(drawn), len(drawn))
    return found
