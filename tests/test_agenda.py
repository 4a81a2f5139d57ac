"""The order of a sweep's jobs and how each ends, on scripted metrics."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from richkd.config import Config, Fusion, Train
from richkd.errors import ConfigError, Stopped
from tune.agenda import Agenda, Job, Refits
from tune.scheduler import pruner
from tune.settings import Sweep
from tune.space import Space
from tune.study import Failure, Search
from tune.warmstart import Point

EPOCHS = 4
CONFIG = Config(train=Train(epochs=EPOCHS))
SPACE = Space({"fusion.alpha": FloatDistribution(0, 1)})
ALPHAS = {"richkd": (0.7, 1.0, 0.4, 0.2), "kd": (0.1, 0.9)}


class Log:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.started_: list[str] = []
        self.epochs: list[tuple[str, int]] = []
        self.ends: list[tuple[str, str]] = []
        self.errors: dict[str, Failure] = {}

    def started(self, job: Job) -> None:
        """Hear of a start."""
        self.started_.append(job.id)

    def epoch(self, job: Job, metrics: dict) -> None:
        """Hear of an epoch."""
        self.epochs.append((job.id, metrics["epoch"]))

    def ended(self, job: Job, state: str, metrics: dict) -> None:
        """Hear of an end."""
        self.ends.append((job.id, state))
        if state == "failed":
            self.errors[job.id] = Failure(metrics["failure"], metrics["error"])


class Script:
    """A sweep of two searches and three refitted settings, with what a run of it would report."""

    def __init__(self, *, scheduler: str = "none", seeds: int = 2) -> None:
        self.storage, self.seeds, self.scheduler = InMemoryStorage(), seeds, scheduler
        self.refitted: set[str] = set()  # what lies finished in the run folders
        self.settings: dict[str, dict] = {}  # what each job ran
        self.failing: dict[str, Failure] = {}

    def agenda(self) -> tuple[Agenda, Log]:
        """Return an agenda on the script's study, as a start or a restart makes it."""
        rule = pruner(Sweep(scheduler=self.scheduler, min_epochs=1, reduction=2))
        searches = [
            Search(
                name,
                self.storage,
                SPACE,
                [Point(params={"fusion.alpha": a}, settings={"fusion.alpha": a}) for a in alphas],
                len(alphas),
                1,
                rule,
                0,
            )
            for name, alphas in ALPHAS.items()
        ]
        refits = [
            Refits(method="richkd", settings={"found": True}, search=searches[0]),
            Refits(method="kd_tuned", settings={"found": True}, search=searches[1]),
            Refits(method="paper", settings={"fusion.alpha": 0.7}),
        ]
        log = Log()
        agenda = Agenda(
            searches,
            refits,
            self.seeds,
            trial_of=self.trial,
            refit_of=self.refit,
            finished=lambda job: job.id in self.refitted,
            listeners=[log],
        )
        return agenda, log

    def trial(self, search: Search, number: int, params: dict, settings: dict) -> Job:
        """Return the job of a trial."""
        return self.job(f"trial-{search.label(number)}", "trial", search.name, number, settings)

    def refit(self, refits: Refits, seed: int, settings: dict) -> Job:
        """Return the job of a refit."""
        return self.job(f"refit-{refits.method}-{seed}", "refit", refits.method, seed, settings)

    def job(self, name: str, kind: str, method: str, number: int, settings: dict) -> Job:
        """Return a job, and write down its settings."""
        self.settings[name] = settings
        config = replace(CONFIG, fusion=Fusion(alpha=settings.get("fusion.alpha", 0.7)))
        return Job(
            id=name, kind=kind, method=method, number=number, folder=Path(name), config=config
        )

    def top1(self, job: Job, epoch: int) -> float:
        """Return an accuracy that grows with the epoch and is highest for alpha near 0.5."""
        return 90 - 20 * abs(self.settings[job.id]["fusion.alpha"] - 0.5) + epoch

    def drive(self, agenda: Agenda, slots: int = 2, stop_after: int | None = None) -> None:
        """Run jobs side by side, an epoch each in turn, as Tune would."""
        running: list[tuple[Job, int]] = []
        heard = 0
        while True:
            while len(running) < slots and (job := agenda.next()) is not None:
                running.append((job, 0))
            if not running:
                assert agenda.over
                return
            job, epoch = running.pop(0)
            if job.id in self.failing:
                agenda.ended(job, {}, self.failing[job.id])
                continue
            top1 = self.top1(job, epoch + 1)
            heard += 1
            if heard == stop_after:
                agenda.stop()
            metrics = {"epoch": epoch + 1, "val/top1": top1, "best_val_top1": top1}
            if not agenda.epoch(job, metrics):
                agenda.ended(job, metrics, None)
            elif epoch + 1 < EPOCHS:
                running.append((job, epoch + 1))
            else:
                if job.kind == "refit":
                    self.refitted.add(job.id)
                end = {"best_val_top1": top1, "best_val_loss": 0.5, "finished": True}
                agenda.ended(job, metrics | end, None)


TRIALS = [f"trial-00{k}" for k in range(4)] + [f"trial-kd-00{k}" for k in range(2)]
REFITS = [f"refit-{name}-{seed}" for name in ("paper", "richkd", "kd_tuned") for seed in range(2)]


@pytest.mark.parametrize("slots", [1, 2, 3, 20])
def test_every_job_starts_once_and_ends_once(slots):
    script = Script()
    agenda, log = script.agenda()
    script.drive(agenda, slots)
    assert sorted(log.started_) == sorted(TRIALS + REFITS)
    assert sorted(log.ends) == sorted((job, "finished") for job in TRIALS + REFITS)
    assert len(log.started_) == agenda.total == 12
    assert agenda.failed == {}
    assert agenda.running == {}
    assert agenda.next() is None


def test_trials_come_before_refits_and_refits_wait_for_no_other_search():
    script = Script()
    agenda, log = script.agenda()
    script.drive(agenda, slots=1)
    assert log.started_ == TRIALS + REFITS


def test_a_refit_waits_for_its_search_and_lets_others_pass():
    script = Script()
    agenda, _ = script.agenda()
    trials = [agenda.next() for _ in TRIALS]
    assert [agenda.next().id for _ in range(2)] == ["refit-paper-0", "refit-paper-1"]
    assert agenda.next() is None
    assert not agenda.over
    end = {"best_val_top1": 90.0, "best_val_loss": 0.5, "finished": True}
    for job in trials[4:]:
        agenda.ended(job, end, None)
    assert [agenda.next().id for _ in range(2)] == ["refit-kd_tuned-0", "refit-kd_tuned-1"]
    assert agenda.next() is None
    for job in trials[:4]:
        agenda.ended(job, end, None)
    assert [agenda.next().id for _ in range(2)] == ["refit-richkd-0", "refit-richkd-1"]


def test_a_refit_runs_what_its_search_found_over_its_own_settings():
    script = Script()
    agenda, _ = script.agenda()
    script.drive(agenda)
    assert script.settings["refit-richkd-1"] == {"found": True, "fusion.alpha": 0.4}
    assert script.settings["refit-kd_tuned-0"] == {"found": True, "fusion.alpha": 0.1}
    assert script.settings["refit-paper-0"] == {"fusion.alpha": 0.7}


def test_failed_trials_are_counted_and_never_the_best():
    script = Script()
    script.failing = {
        "trial-002": Failure("error", "RuntimeError: no"),
        "refit-paper-1": Failure("lost", "killed"),
    }
    agenda, log = script.agenda()
    script.drive(agenda)
    assert agenda.failed == log.errors == script.failing
    assert agenda.searches[0].states() == {"COMPLETE": 3, "FAIL": 1}
    assert script.settings["refit-richkd-0"]["fusion.alpha"] == 0.7  # 0.4, the best, has failed
    assert len(log.ends) == agenda.total


def test_a_restart_knows_which_trials_failed_and_why():
    script = Script()
    script.failing = {
        "trial-001": Failure("error", "RuntimeError: no"),
        "trial-kd-000": Failure("lost", "killed"),
    }
    agenda, _ = script.agenda()
    script.drive(agenda, stop_after=12)
    again, _ = script.agenda()
    assert again.failed == script.failing


def test_a_full_disk_stops_the_sweep_and_fails_no_trial():
    script = Script()
    agenda, log = script.agenda()
    job = agenda.next()
    agenda.broke(Stopped("the disk is full"))
    agenda.ended(job, {"stopped": "the disk is full"}, None)
    assert agenda.over
    assert (str(agenda.error), agenda.failed) == ("the disk is full", {})
    assert log.ends == [(job.id, "stopped")]
    again, later = script.agenda()
    script.drive(again)
    assert sorted(later.started_) == sorted(TRIALS + REFITS)


def test_a_search_without_a_success_leaves_its_refits_in_failed():
    script = Script()
    script.failing = {f"trial-kd-00{k}": Failure("error", "RuntimeError: no") for k in range(2)}
    agenda, log = script.agenda()
    script.drive(agenda)
    assert agenda.failed.pop("refit-kd_tuned").text == "its search has no finished trial"
    assert agenda.failed == script.failing
    assert not any("kd_tuned" in job for job in log.started_)
    assert sum(state == "finished" for _, state in log.ends) == 4 + 4


def test_settings_that_the_config_refuses_together_make_a_failed_trial(monkeypatch):
    script = Script()
    usual = script.trial

    def trial(search: Search, number: int, params: dict, settings: dict) -> Job:
        if search.name == "richkd" and number < 2:
            raise ConfigError("loss.ce and loss.logit cannot both be 0")
        return usual(search, number, params, settings)

    monkeypatch.setattr(script, "trial", trial)
    agenda, log = script.agenda()
    script.drive(agenda)
    assert agenda.searches[0].states() == {"COMPLETE": 2, "FAIL": 2}
    assert list(agenda.failed) == ["trial-000", "trial-001"]
    assert "cannot both be 0" in agenda.failed["trial-000"].text
    assert log.started_[0] == "trial-002"


def test_pruned_trials_are_told_as_pruned_and_the_sweep_goes_on():
    script = Script(scheduler="asha")
    agenda, log = script.agenda()
    script.drive(agenda, slots=1)
    pruned = {job for job, state in log.ends if state == "pruned"}
    assert pruned == {"trial-001", "trial-003"}  # alphas 1.0 and 0.2, after 0.7 and 0.4
    for job in pruned:
        assert [epoch for name, epoch in log.epochs if name == job] == [1]
    assert agenda.searches[0].states() == {"COMPLETE": 2, "PRUNED": 2}
    assert len(log.ends) == agenda.total


def test_a_trial_is_not_pruned_at_its_last_epoch_and_a_refit_never():
    script = Script(scheduler="asha")
    agenda, _ = script.agenda()
    first, second = agenda.next(), agenda.next()
    assert agenda.epoch(first, {"epoch": EPOCHS, "val/top1": 90.0, "best_val_top1": 90.0})
    assert agenda.epoch(second, {"epoch": EPOCHS, "val/top1": 10.0, "best_val_top1": 10.0})
    refit = replace(second, id="refit-paper-0", kind="refit", method="paper")
    assert agenda.epoch(refit, {"epoch": 1, "val/top1": 0.0, "best_val_top1": 0.0})


@pytest.mark.parametrize("stop_after", [1, 3, 9, 17, 25, 40])
@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_a_sweep_that_is_stopped_goes_on_and_every_job_ends_exactly_once(stop_after, scheduler):
    script = Script(scheduler=scheduler)
    agenda, log = script.agenda()
    script.drive(agenda, stop_after=stop_after)
    stopped = {job for job, state in log.ends if state == "stopped"}
    assert agenda.next() is None
    assert set(log.started_) == {job for job, _ in log.ends}
    left = {
        f"trial-{search.label(trial.number)}"
        for search in agenda.searches
        for trial in search.study.trials
        if trial.state == TrialState.RUNNING
    }
    assert left == {job for job in stopped if job.startswith("trial")}

    again, later = script.agenda()
    assert again.before == sum(state != "stopped" for _, state in log.ends)
    script.drive(again)
    assert left <= set(later.started_)
    ended = [job for job, state in log.ends + later.ends if state != "stopped"]
    assert sorted(ended) == sorted(TRIALS + REFITS)
    assert again.total == agenda.total

    last, silent = script.agenda()
    assert last.over
    assert last.next() is None
    assert silent.started_ == []


def test_a_stop_between_jobs_gives_out_nothing_more():
    agenda, log = Script().agenda()
    agenda.stop()
    assert agenda.next() is None
    assert agenda.over
    assert log.started_ == []


@pytest.mark.parametrize(
    "metrics",
    [
        {"best_val_top1": 90.0},
        {"val/top1": 90.0},
        {"val/top1": math.nan, "best_val_top1": 90.0},
        {"val/top1": "90", "best_val_top1": 90.0},
    ],
)
def test_a_trial_whose_report_lacks_the_metric_fails_and_the_others_go_on(metrics):
    script = Script()
    agenda, log = script.agenda()
    job = agenda.next()
    assert not agenda.epoch(job, {"epoch": 1, **metrics})
    agenda.ended(job, {"epoch": 1, **metrics}, None)
    script.drive(agenda)
    assert [(name, why.kind) for name, why in agenda.failed.items()] == [("trial-000", "metric")]
    assert agenda.searches[0].states() == {"COMPLETE": 3, "FAIL": 1}
    assert agenda.searches[0].best().number != 0
    assert log.epochs[0] != ("trial-000", 1)  # MLflow is not sent what cannot be compared


@pytest.mark.parametrize("best", [{}, *({"best_val_top1": v} for v in (math.nan, math.inf))])
def test_a_trial_that_ends_without_a_finite_result_is_a_failed_one(best):
    agenda, log = Script().agenda()
    job = agenda.next()
    agenda.ended(job, {"epoch": EPOCHS, "finished": True, **best}, None)
    assert (agenda.failed[job.id].kind, log.ends) == ("metric", [(job.id, "failed")])


def test_a_restart_ends_a_trial_that_was_to_stop_and_runs_it_no_further():
    script = Script(scheduler="asha")
    agenda, _ = script.agenda()
    best, other = agenda.next(), agenda.next()
    assert agenda.epoch(best, {"epoch": 1, "val/top1": 90.0, "best_val_top1": 90.0})
    assert not agenda.epoch(other, {"epoch": 1, "val/top1": 50.0, "best_val_top1": 50.0})
    # here the driver is killed: Tune has not stopped the trial yet
    again, log = script.agenda()
    first = again.next()
    assert (first.id, first.heard) == (best.id, 1)
    assert again.next().id not in (best.id, other.id)
    assert log.ends == [(other.id, "pruned")]
    assert again.searches[0].states()["PRUNED"] == 1


def test_trials_that_diverge_are_counted_and_never_the_best_under_early_stopping():
    script = Script(scheduler="asha")
    diverged = ("trial-000", "trial-002", "trial-kd-000")
    script.failing = {name: Failure("nan", "loss is nan at step 3 of epoch 1") for name in diverged}
    agenda, log = script.agenda()
    script.drive(agenda)
    assert sorted(agenda.failed) == sorted(diverged)
    assert {why.kind for why in agenda.failed.values()} == {"nan"}
    assert not {name for name, _ in log.epochs} & set(diverged)
    assert agenda.searches[0].best().number not in (0, 2)
    states = agenda.searches[0].states()
    assert states["FAIL"] == 2 and sum(states.values()) == 4


def test_a_setting_that_ran_is_answered_and_not_run_again():
    script = Script()
    points = [
        Point(params={"fusion.alpha": alpha}, settings={"fusion.alpha": alpha})
        for alpha in (0.7, 0.2, 0.7, 0.2)
    ]
    search = Search(
        "richkd",
        script.storage,
        SPACE,
        points,
        4,
        1,
        pruner(Sweep(scheduler="none")),
        0,
    )
    log = Log()
    agenda = Agenda(
        [search],
        [],
        1,
        trial_of=script.trial,
        refit_of=script.refit,
        finished=lambda job: False,
        listeners=[log],
    )
    script.drive(agenda, slots=1)
    assert log.ends == [(f"trial-00{k}", "finished") for k in range(4)]
    assert {job for job, _ in log.epochs} == {"trial-000", "trial-001"}
    assert [t.user_attrs.get("duplicate_of") for t in search.study.trials] == [None, None, 0, 1]
    assert [t.value for t in search.study.trials[:2]] == [t.value for t in search.study.trials[2:]]


def test_methods_are_compared_on_the_student_that_was_found():
    script = Script()
    space = Space(
        {
            "student.name": CategoricalDistribution(("cnn8", "cnn16")),
            "fusion.alpha": FloatDistribution(0, 1),
        }
    )
    settings = [
        {"student.name": "cnn8", "fusion.alpha": 0.1},
        {"student.name": "cnn16", "fusion.alpha": 0.5},
    ]
    search = Search(
        "richkd",
        script.storage,
        space,
        [Point(params=each, settings=each) for each in settings],
        2,
        1,
        pruner(Sweep(scheduler="none")),
        0,
    )
    refits = [
        Refits(method="richkd", settings={}, search=search),
        Refits(method="printed", settings={"fusion.alpha": 0.7}, shared=search),
    ]
    agenda = Agenda(
        [search],
        refits,
        1,
        trial_of=script.trial,
        refit_of=script.refit,
        finished=lambda job: False,
    )
    trials = [agenda.next() for _ in settings]
    assert agenda.next() is None  # what is printed waits for the student, too
    for job, top1 in zip(trials, (80.0, 90.0), strict=True):
        agenda.ended(job, {"best_val_top1": top1, "best_val_loss": 0.5, "finished": True}, None)
    assert [agenda.next().id for _ in refits] == ["refit-richkd-0", "refit-printed-0"]
    assert script.settings["refit-richkd-0"] == settings[1]
    assert script.settings["refit-printed-0"] == {"fusion.alpha": 0.7, "student.name": "cnn16"}
