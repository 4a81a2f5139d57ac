"""Between the agenda and Ray Tune: what a trial reports, and that no error of ours becomes Tune's."""

import errno
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from richkd.command import Stop
from richkd.errors import ConfigError, Interrupted
from tune import runner
from tune.driver import is_full
from tune.runner import PROCESS_RESTARTS, Deaths, Guard, JobScheduler, JobSearcher, death_of
from tune.settings import Resources, fit

SHARED = {"workers": 1, "each": {"CPU": 1}, "threads": 1, "scratch": "scratch"}


def running(name: str, failures: int = 0) -> SimpleNamespace:
    """Return what Tune hands over of a trial."""
    return SimpleNamespace(
        config={"id": name}, num_failures=failures, max_failures=PROCESS_RESTARTS
    )


class Broken:
    """An agenda that cannot write."""

    over = False

    def __init__(self, error: Exception) -> None:
        self.problem, self.error = error, None
        self.running = {"trial-000": SimpleNamespace(id="trial-000", heard=0)}

    def fail(self, *_: object) -> None:
        """Do nothing but fail."""
        raise self.problem

    next = epoch = ended = fail

    def broke(self, error: Exception) -> None:
        """Hear of it."""
        self.error, self.over = error, True


def test_an_error_of_the_driver_ends_the_sweep_and_not_tune():
    error = OSError(errno.ENOSPC, "No space left on device")
    agenda = Broken(error)
    some = running("trial-000")
    scheduler = JobScheduler(agenda, Stop())
    result = {"run/epoch": 1, "run/val/top1": 90.0}
    assert scheduler.on_trial_result(None, some, result) == TrialScheduler.STOP
    scheduler.on_trial_complete(None, some, result)
    assert JobSearcher(agenda, Stop(), SHARED, 1).suggest("x") == Searcher.FINISHED
    assert agenda.error is error


def test_a_second_signal_passes_through():
    some = running("trial-000")
    scheduler = JobScheduler(Broken(Interrupted(2, "at once")), Stop())
    with pytest.raises(Interrupted):
        scheduler.on_trial_result(None, some, {"run/epoch": 1})


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (ValueError("no"), False),
    ],
)
def test_a_full_disk_is_found_at_the_bottom_of_an_error(error, full):
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("outer") from inner
    except RuntimeError as outer:
        assert is_full(outer) is full


@pytest.mark.parametrize(
    ("resources", "cluster", "gpu", "slots", "each"),
    [
        (Resources(), {"CPU": 2.0}, True, 2, {"CPU": 1}),
        (Resources(cpus_per_worker=3), {"CPU": 8.0}, True, 2, {"CPU": 3}),
        (Resources(), {"CPU": 16.0, "GPU": 2.0}, True, 2, {"CPU": 1, "GPU": 1.0}),
        (Resources(trials_per_gpu=4), {"CPU": 6.0, "GPU": 2.0}, True, 6, {"CPU": 1, "GPU": 0.25}),
        (Resources(), {"CPU": 16.0, "GPU": 2.0}, False, 16, {"CPU": 1}),
        (Resources(workers=2), {"CPU": 5.0}, True, 2, {"CPU": 1}),
        (Resources(workers=2, cpus_per_worker=2), {"CPU": 7.0}, True, 1, {"CPU": 2}),
        (Resources(workers=2), {"CPU": 64.0, "GPU": 5.0}, True, 2, {"CPU": 1, "GPU": 1.0}),
    ],
)
def test_as_many_trials_run_at_once_as_fit(resources, cluster, gpu, slots, each):
    assert fit(resources, [cluster], gpu=gpu) == (slots, each)


@pytest.mark.parametrize(
    ("resources", "cluster", "message"),
    [
        (
            Resources(cpus_per_worker=3),
            {"CPU": 2.0},
            "resources.cpus_per_worker=3 .* 2 CPUs but take 3",
        ),
        (Resources(workers=3), {"CPU": 2.0}, "resources.workers=3 .* 2 CPUs but take 3"),
        (Resources(workers=3), {"CPU": 8.0, "GPU": 2.0}, "take a GPU each but the cluster has 2"),
    ],
)
def test_a_trial_that_fits_nowhere_is_refused(resources, cluster, message):
    with pytest.raises(ConfigError, match=message):
        fit(resources, [cluster], gpu=True)


def test_a_worker_needs_all_that_it_takes_on_one_machine():
    small, large = {"CPU": 3.0}, {"CPU": 6.0}
    assert fit(Resources(cpus_per_worker=2), [small, large], gpu=True) == (4, {"CPU": 2})
    assert fit(Resources(cpus_per_worker=2, workers=3), [small, large], gpu=True)[0] == 1
    with pytest.raises(ConfigError, match="one of the cluster's 2 machines but only 1 do"):
        fit(Resources(cpus_per_worker=4, workers=2), [small, large], gpu=True)
    gpus = [{"CPU": 1.0, "GPU": 8.0}, {"CPU": 8.0}]
    assert fit(Resources(), gpus, gpu=True)[0] == 1
    with pytest.raises(ConfigError, match="cluster has 8, with CPUs beside them for 1"):
        fit(Resources(workers=2), gpus, gpu=True)


def test_workers_do_not_share_a_gpu():
    with pytest.raises(ConfigError, match="take a GPU each but resources.trials_per_gpu=2"):
        Resources(workers=2, trials_per_gpu=2)


def heard_of(results: list[dict]) -> list[int]:
    """Return the epochs that an agenda hears of."""
    heard: list[int] = []

    class Heard:
        running = {"train": SimpleNamespace(id="train", heard=0)}

        def epoch(self, job: object, metrics: dict) -> bool:
            heard.append(metrics["epoch"])
            return True

    some = running("train")
    scheduler = JobScheduler(Heard(), Stop())
    for result in results:
        scheduler.on_trial_result(None, some, {f"run/{k}": v for k, v in result.items()})
    return heard


def test_an_epoch_that_workers_report_again_is_heard_once():
    with pytest.warns(UserWarning, match="a worker died"):
        heard = heard_of(
            [
                {"placement_group": "a"},
                {"epoch": 1},
                {"epoch": 2},
                {"placement_group": "b"},
                {"epoch": 2},
                {"epoch": 3},
                {"epoch": 3, "finished": True},
            ]
        )
    assert heard == [1, 2, 3]


def test_a_signal_while_workers_start_is_not_kept_waiting_for_an_epoch():
    stopped: list[bool] = []
    job = SimpleNamespace(id="train", heard=0)
    agenda = SimpleNamespace(running={"train": job}, stop=lambda: stopped.append(True))
    stop = Stop()
    stop.signum = 2
    scheduler = JobScheduler(agenda, stop)
    some = running("train")
    started = {"run/placement_group": "a"}
    assert scheduler.on_trial_result(None, some, started) == TrialScheduler.STOP
    assert stopped == [True]


def test_a_run_that_gets_on_may_lose_its_process_as_often_as_it_likes():
    class Heard:
        running = {"trial-000": SimpleNamespace(id="trial-000", heard=0)}

        def epoch(self, job: object, metrics: dict) -> bool:
            return True

    some = running("trial-000", failures=7)
    JobScheduler(Heard(), Stop()).on_trial_result(None, some, {"run/epoch": 1})
    assert some.max_failures == 7 + PROCESS_RESTARTS


DIED = (
    "Failure # 1 (occurred at 2026-01-01)\nray.exceptions.ActorDiedError: The actor died unexpectedly before finishing "
    "this task.\n\tclass_name: trial\nThe actor is dead because {reason}\n"
)


@pytest.mark.parametrize(
    ("reason", "allowed", "what"),
    [
        (
            "its worker process has died. Worker exit type: SYSTEM_ERROR",
            PROCESS_RESTARTS,
            "process",
        ),
        ("its node has died. Node Id: 0123", PROCESS_RESTARTS + 1, "machine"),
    ],
)
def test_the_loss_of_a_machine_is_not_held_against_a_run(tmp_path, reason, allowed, what):
    some = running("trial-000", failures=1)
    some.error_file = str(tmp_path / "error.txt")
    (tmp_path / "error.txt").write_text(DIED.format(reason=reason))
    with pytest.warns(UserWarning, match=f"trial-000: its {what} died"):
        Deaths().on_trial_recover(0, [some], some)
    assert some.max_failures == allowed


@pytest.mark.parametrize(
    ("detail", "kind"),
    [
        (
            "Worker unexpectedly exits with a connection error code 2. End of file. Some causes",
            "lost",
        ),
        ("Task was killed due to the node running low on memory. Memory on the node", "memory"),
    ],
)
def test_a_death_is_told_in_a_line_with_its_class(detail, kind):
    words = f"ActorDiedError: its worker has died. Worker exit detail: {detail}"
    died = death_of(words, 4)
    assert died.kind == kind
    assert died.text.startswith("its process died 4 times: ")
    assert died.text.endswith(detail.partition(". ")[0])


@pytest.mark.parametrize(("again", "ends"), [(True, 0), (False, 1)])
def test_a_death_counts_only_if_the_run_is_not_started_anew(tmp_path, again, ends):
    heard: list[tuple] = []
    job = SimpleNamespace(id="trial-000", heard=0)
    agenda = SimpleNamespace(running={job.id: job}, ended=lambda *what: heard.append(what))
    some = running(job.id, failures=4)
    some.should_recover = lambda: again
    some.error_file = str(tmp_path / "error.txt")
    (tmp_path / "error.txt").write_text(DIED.format(reason="its worker process has died."))
    JobScheduler(agenda, Stop()).on_trial_error(None, some)
    assert len(heard) == ends
    assert all(why.kind == "lost" for *_, why in heard)


class Agenda:
    """What a guard tells of."""

    def __init__(self) -> None:
        self.running, self.error = {}, None

    def broke(self, error: Exception) -> None:
        """Hear of an error."""
        self.error = self.error or error


def guard(monkeypatch, nodes: list, fits) -> tuple[Guard, list[float]]:
    """Return a guard over a cluster of these nodes, and its clock."""
    now = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runner, "alive", lambda: nodes)
    return Guard(Agenda(), None, 0, fits), now


def test_a_cluster_that_is_gone_ends_the_sweep_resumably(monkeypatch):
    nodes = ["one"]
    watch, now = guard(monkeypatch, nodes, lambda: None)
    now[0] += 6
    assert not watch.stop_all()
    nodes.clear()
    now[0] += 6
    assert watch.stop_all()
    assert watch.agenda.error.exit_code == 75
    assert "the Ray cluster is gone" in str(watch.agenda.error)


def test_a_cluster_without_room_for_a_run_is_waited_for_and_not_for_ever(monkeypatch):
    full = [False]

    def fits() -> None:
        if full[0]:
            raise ConfigError("no room")

    watch, now = guard(monkeypatch, ["head"], fits)
    full[0] = True
    for _ in range(100):
        now[0] += 5.9
        assert not watch.stop_all()
    full[0] = False  # an autoscaler has found a machine
    now[0] += 6
    assert not watch.stop_all()
    full[0] = True
    now[0] += 601
    assert watch.stop_all()
    assert "room for a run" in str(watch.agenda.error)
