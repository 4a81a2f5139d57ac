"""A search as its study remembers it: who comes first, what is told, and what a restart finds."""

import math
import random

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.pruners import NopPruner
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import TrialState

from richkd.errors import ConfigError
from tune.scheduler import pruner
from tune.settings import Sweep
from tune.space import Space
from tune.study import Failure, Search, settings_of
from tune.warmstart import Point

SPACE = Space(
    {
        "fusion.alpha": FloatDistribution(0, 1),
        "loss.temperature": FloatDistribution(0.5, 8, log=True),
        "clip.prompts": CategoricalDistribution(("digits", "digits-bad")),
    }
)
POINTS = [
    Point(
        params={"fusion.alpha": 0.7, "loss.temperature": 2.5, "clip.prompts": "digits"},
        settings={"fusion.alpha": 0.7, "loss.temperature": 3.0, "loss.temperature_of": "fused"},
    ),
    Point(
        params={"fusion.alpha": 1.0, "loss.temperature": 3.0, "clip.prompts": "digits"},
        settings={"fusion.alpha": 1.0, "loss.temperature": 3.0},
    ),
]


def open_search(
    storage, *, trials=6, points=(), space=SPACE, scheduler=None, seed=0, name="richkd", **more
) -> Search:
    rule = NopPruner() if scheduler is None else pruner(scheduler)
    return Search(name, storage, space, list(points), trials, 3, rule, seed, **more)


def succeed(search: Search, number: int, top1: float, loss: float = 0.5) -> None:
    search.tell(
        number,
        TrialState.COMPLETE,
        {"best_val_top1": top1, "best_val_loss": loss, "finished": True},
    )


@pytest.fixture
def storage():
    return InMemoryStorage()


@pytest.fixture(scope="module")
def databases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    names = iter(range(100))
    return lambda: RDBStorage(f"sqlite:///{folder / f'{next(names)}.db'}")


def test_points_come_first_in_order_and_run_as_printed(storage):
    search = open_search(storage, points=POINTS)
    for number, point in enumerate(POINTS):
        assert search.ask() == (number, point.params, point.settings)
    number, params, settings = search.ask()
    assert number == 2
    assert params == settings
    assert set(params) == set(SPACE)


def test_settings_are_read_back_from_a_trial(storage):
    search = open_search(storage, points=POINTS[:1], trials=2)
    for top1 in (91.0, 90.0):
        succeed(search, search.ask()[0], top1)
    drawn = search.study.trials[1]
    assert settings_of(search.best()) == POINTS[0].settings
    assert settings_of(drawn) == drawn.params


@pytest.mark.parametrize("trials", [1, 2, 3, 7])
def test_no_more_and_no_fewer_trials_than_asked_for(storage, trials):
    search = open_search(storage, trials=trials, points=POINTS)
    states = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED)
    given = []
    while (asked := search.ask()) is not None:
        given.append(asked[0])
        metrics = {"best_val_top1": 90.0, "best_val_loss": 0.5}
        search.tell(asked[0], states[asked[0] % 3], metrics)
    assert given == list(range(trials))
    assert search.over
    assert search.ask() is None
    assert sum(search.states().values()) == trials


def test_a_search_is_over_only_when_the_last_one_running_has_ended(storage):
    search = open_search(storage, trials=2)
    first, second = search.ask()[0], search.ask()[0]
    assert search.ask() is None
    succeed(search, second, 90.0)
    assert not search.over
    succeed(search, first, 90.0)
    assert search.over


def test_a_restart_gives_out_what_was_running_under_its_number_and_nothing_twice(databases):
    storage = databases()
    search = open_search(storage, trials=5, points=POINTS)
    asked = [search.ask() for _ in range(4)]
    search.epoch(1, 1, 50.0)
    succeed(search, 0, 91.0)
    search.tell(2, TrialState.FAIL, {})

    again = open_search(storage, trials=5, points=POINTS)
    assert not again.over
    assert [again.ask() for _ in range(2)] == [asked[1], asked[3]]
    number, *_ = again.ask()
    assert number == 4
    assert again.ask() is None
    for number in (1, 3, 4):
        succeed(again, number, 80.0 + number)
    assert again.over
    assert again.states() == {"COMPLETE": 4, "FAIL": 1}
    assert again.best().number == 0
    assert again.study.trials[1].intermediate_values == {1: 50.0}

    finished = open_search(storage, trials=5, points=POINTS)
    assert finished.over
    assert finished.ask() is None


def test_a_restart_before_the_first_trial_still_begins_with_the_points(storage):
    open_search(storage, points=POINTS)
    again = open_search(storage, points=POINTS)
    assert [again.ask()[2] for _ in POINTS] == [point.settings for point in POINTS]
    assert again.ask()[0] == 2


def test_a_start_that_was_cut_between_two_points_is_made_good(storage):
    study = optuna.create_study(study_name="richkd", storage=storage, direction="maximize")
    study.enqueue_trial(POINTS[0].params, user_attrs={"settings": POINTS[0].settings})
    search = open_search(storage, points=POINTS)
    assert [search.ask()[2] for _ in POINTS] == [point.settings for point in POINTS]


def test_a_trial_that_was_cut_while_it_was_drawn_is_drawn_to_its_end(databases):
    storage = databases()
    study = optuna.create_study(study_name="richkd", storage=storage, direction="maximize")
    cut = study.ask({"fusion.alpha": SPACE.distributions["fusion.alpha"]})
    number, params, settings = open_search(storage).ask()
    assert number == cut.number
    assert set(params) == set(settings) == set(SPACE)
    assert params["fusion.alpha"] == cut.params["fusion.alpha"]


def test_a_restart_draws_anew_and_not_the_same_points_again(storage):
    search = open_search(storage, trials=2)
    first = [search.ask()[1] for _ in range(2)]
    for number in range(2):
        search.tell(number, TrialState.FAIL, {})
    longer = open_search(storage, trials=4)
    second = [longer.ask()[1] for _ in range(2)]
    assert not any(params in first for params in second)


def test_the_same_seed_draws_the_same_points():
    drawn = [open_search(InMemoryStorage(), seed=seed).ask()[1] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_two_searches_share_a_database_and_nothing_else(databases):
    storage = databases()
    richkd = open_search(storage, trials=2)
    kd = open_search(
        storage,
        trials=2,
        name="kd",
        space=Space({"loss.temperature": SPACE.distributions["loss.temperature"]}),
    )
    assert (richkd.ask()[0], kd.ask()[0], richkd.ask()[0]) == (0, 0, 1)
    succeed(kd, 0, 99.0)
    assert richkd.best() is None
    assert kd.best().value == 99.0


def fail(search: Search, number: int, kind: str) -> None:
    search.tell(number, TrialState.FAIL, {}, Failure(kind, f"why {number}"))


def test_a_trial_that_does_not_fit_is_infeasible_and_the_sampler_keeps_away(storage):
    search = open_search(storage, trials=60, space=Space({"fusion.alpha": FloatDistribution(0, 1)}))
    drawn = []
    while (asked := search.ask()) is not None:
        number, params, _ = asked
        drawn.append(params["fusion.alpha"])
        if drawn[-1] > 0.5:
            fail(search, number, "memory")
        else:
            succeed(search, number, 90.0)
    states = search.states()
    assert states["INFEASIBLE"] == sum(alpha > 0.5 for alpha in drawn) > 0
    assert {why.kind for why in search.failures().values()} == {"memory"}
    trials = search.study.trials
    assert all(
        (max(t.constraints.values(), default=0) > 0) == (t.params["fusion.alpha"] > 0.5)
        for t in trials
    )
    late = drawn[30:]
    assert sum(alpha > 0.5 for alpha in late) < len(late) / 4  # of random ones it would be half
    assert search.leading(60) == sorted(t.number for t in trials if t.value is not None)


def test_failed_trials_of_a_class_are_tried_again_as_new_ones_and_count_no_longer(databases):
    storage = databases()
    search = open_search(storage, trials=4, points=POINTS)
    asked = [search.ask() for _ in range(4)]
    fail(search, 0, "lost")
    fail(search, 1, "nan")
    fail(search, 2, "lost")
    succeed(search, 3, 90.0)
    again = open_search(storage, trials=4, points=POINTS)
    assert again.over
    assert again.retry(("lost", "hung")) == 2
    assert not again.over
    given = [again.ask(), again.ask()]
    assert again.ask() is None
    assert [number for number, *_ in given] == [4, 5]
    assert [rest for _, *rest in given] == [list(asked[0][1:]), list(asked[2][1:])]
    assert again.failures() == {1: Failure("nan", "why 1")}
    for number, *_ in given:
        succeed(again, number, 95.0)
    # a restart knows it all, and does not try them once more
    later = open_search(storage, trials=4, points=POINTS)
    assert later.over
    assert later.retry(("lost",)) == 0
    assert later.failures() == {1: Failure("nan", "why 1")}


def test_a_search_that_is_given_more_trials_goes_on_from_the_last_one(databases):
    storage = databases()
    first = open_search(storage, trials=3, points=POINTS)
    while (asked := first.ask()) is not None:
        succeed(first, asked[0], 90.0)
    more = open_search(storage, trials=5, points=POINTS)
    given = []
    while (asked := more.ask()) is not None:
        given.append(asked)
        succeed(more, asked[0], 91.0)
    assert [number for number, *_ in given] == [3, 4]
    before = [trial.params for trial in more.study.trials[:3]]
    assert all(params not in before for _, params, _ in given)


def test_a_trial_that_ran_with_other_settings_is_put_on_the_list_again(databases):
    storage = databases()
    search = open_search(storage, trials=2, points=POINTS)
    asked = [search.ask(), search.ask()]
    assert not search.stale(0, "first") and not search.stale(1, "first")
    search.epoch(0, 1, 50.0)
    succeed(search, 1, 90.0)
    same = open_search(storage, trials=2, points=POINTS)
    assert not same.stale(same.ask()[0], "first")
    again = open_search(storage, trials=2, points=POINTS)
    assert again.stale(again.ask()[0], "second")
    # a driver that is killed here has told nobody yet: the trial is run once too often, and none is lost
    fail(again, 0, "error")
    number, *rest = again.ask()
    assert (number, rest, again.newest(number)) == (2, list(asked[0][1:]), 0)
    assert not again.stale(number, "second")
    assert again.failures() == {}
    assert again.ask() is None


def test_what_an_earlier_driver_heard_is_known_and_not_reported_twice(databases):
    storage = databases()
    search = open_search(storage, trials=1)
    number, *_ = search.ask()
    for epoch in (1, 2, 3):
        search.epoch(number, epoch, 50.0 + epoch)
    again = open_search(storage, trials=1)
    assert again.ask()[0] == number
    assert again.newest(number) == 3
    again.epoch(number, 3, 99.0)
    again.epoch(number, 4, 54.0)
    found = again.study.trials[number].intermediate_values
    assert found == {1: 51.0, 2: 52.0, 3: 53.0, 4: 54.0}


def test_the_best_is_the_highest_and_a_tie_goes_to_the_lower_loss(storage):
    search = open_search(storage, trials=5)
    results = [(90.0, 0.1), (92.0, 0.5), (92.0, 0.3), (92.0, 0.3), (91.0, 0.01)]
    for top1, loss in results:
        succeed(search, search.ask()[0], top1, loss)
    assert search.best().number == 2
    assert search.best().value == 92.0


def test_the_leading_trials_are_the_complete_ones_and_then_the_best_of_those_stopped(storage):
    search = open_search(storage, trials=4)
    numbers = [search.ask()[0] for _ in range(4)]
    for number, top1 in zip(numbers, (80.0, 95.0, 90.0, 85.0), strict=True):
        search.epoch(number, 1, top1)
    search.tell(numbers[1], TrialState.PRUNED, {})
    search.tell(numbers[3], TrialState.PRUNED, {})
    succeed(search, numbers[0], 80.0)
    succeed(search, numbers[2], 90.0)
    assert search.leading(3) == [numbers[2], numbers[0], numbers[1]]


def test_a_pruned_or_failed_trial_is_never_the_best(storage):
    search = open_search(storage, trials=3)
    for top1, state in ((99.0, TrialState.PRUNED), (98.0, TrialState.FAIL)):
        number = search.ask()[0]
        search.epoch(number, 1, top1)
        search.tell(number, state, {"best_val_top1": top1, "best_val_loss": 0.0})
    assert search.best() is None
    succeed(search, search.ask()[0], 50.0)
    assert search.best().value == 50.0
    assert search.states() == {"COMPLETE": 1, "FAIL": 1, "PRUNED": 1}


class Halving:
    """Successive halving as its paper words it: at each rung, in the best 1 of `eta` so far, or out."""

    def __init__(self, low: int, eta: int) -> None:
        self.low, self.eta = low, eta
        self.rungs: dict[int, list[float]] = {}

    def stops(self, epoch: int, value: float) -> bool:
        """Hear of an epoch; return whether the trial is out."""
        rung, rest = 0, epoch / self.low
        while rest > 1:
            rung, rest = rung + 1, rest / self.eta
        if rest != 1:
            return False
        came = self.rungs.setdefault(rung, [])
        came.append(value)
        better = sum(other > value for other in came)
        return better >= max(1, len(came) // self.eta)


def curve(number: int, epochs: int) -> list[float]:
    rng = random.Random(number)
    top, rate = rng.uniform(60, 95), rng.uniform(0.1, 1)
    return [
        round(top * (1 - math.exp(-rate * e)) + rng.gauss(0, 2), 1) for e in range(1, epochs + 1)
    ]


@pytest.mark.parametrize(
    ("low", "eta", "slots"), [(1, 2, 1), (1, 3, 4), (2, 3, 2), (3, 2, 5), (5, 3, 2)]
)
def test_asha_decides_as_the_papers_rule_does_in_any_order_of_arrival(storage, low, eta, slots):
    trials, epochs = 30, 20
    search = open_search(
        storage,
        trials=trials,
        space=Space({}),
        scheduler=Sweep(scheduler="asha", min_epochs=low, reduction=eta),
    )
    rule, order = Halving(low, eta), random.Random(low * 100 + eta)
    running: dict[int, int] = {}
    pruned = set()
    while True:
        while len(running) < slots and (asked := search.ask()) is not None:
            running[asked[0]] = 0
        if not running:
            break
        number = order.choice(sorted(running))
        running[number] += 1
        epoch = running[number]
        value = curve(number, epochs)[epoch - 1]
        stops = search.epoch(number, epoch, value)
        assert stops == rule.stops(epoch, value), (number, epoch)
        if stops:
            pruned.add(number)
            search.tell(number, TrialState.PRUNED, {})
        elif epoch == epochs:
            succeed(search, number, value)
        if stops or epoch == epochs:
            del running[number]
    states = [trial.state for trial in search.study.trials]
    assert {n for n, state in enumerate(states) if state == TrialState.PRUNED} == pruned
    assert 0 < len(pruned) < trials
    assert states.count(TrialState.COMPLETE) == trials - len(pruned)


def test_asha_remembers_its_rungs_over_a_restart(databases):
    storage, scheduler = databases(), Sweep(scheduler="asha", min_epochs=2, reduction=2)
    search = open_search(storage, trials=4, scheduler=scheduler)
    for value in (80.0, 90.0):
        number = search.ask()[0]
        assert not search.epoch(number, 1, value)
        assert not search.epoch(number, 2, value)
        succeed(search, number, value)
    again = open_search(storage, trials=4, scheduler=scheduler)
    number = again.ask()[0]
    assert not again.epoch(number, 1, 1.0)
    assert again.epoch(number, 2, 85.0)  # a study without a memory would let the first one pass


def test_without_a_scheduler_nothing_is_stopped(storage):
    search = open_search(storage, trials=3, scheduler=Sweep(scheduler="none"))
    for value in (90.0, 10.0, math.nan):
        number = search.ask()[0]
        assert not any(search.epoch(number, epoch, value) for epoch in range(1, 20))


def test_asha_stops_a_trial_whose_accuracy_is_not_a_number(storage):
    search = open_search(storage, scheduler=Sweep(scheduler="asha", min_epochs=1))
    assert search.epoch(search.ask()[0], 1, math.nan)


BOTH = {"objectives": ("top1", "parameters")}


def test_of_several_objectives_the_front_is_kept_and_the_most_accurate_is_the_best(storage):
    search = open_search(storage, trials=40, **BOTH)
    rng = random.Random(0)
    values = {}
    while (asked := search.ask()) is not None:
        number, top1, parameters = asked[0], rng.randrange(80, 90), rng.randrange(1, 9)
        metrics = {"best_val_top1": float(top1), "best_val_loss": 0.5, "parameters": parameters}
        values[number] = (top1, -parameters)
        search.tell(number, TrialState.COMPLETE, metrics)
    undominated = {
        number
        for number, own in values.items()
        if not any(
            other != own and all(a >= b for a, b in zip(other, own, strict=True))
            for other in values.values()
        )
    }
    front = search.front()
    assert {trial.number for trial in front} == undominated
    assert 1 < len(front) < 40
    top1s = [trial.values[0] for trial in front]
    assert top1s == sorted(top1s, reverse=True)
    assert search.best().values[0] == max(top1 for top1, _ in values.values())


def test_with_several_objectives_epochs_are_kept_and_nothing_stops_early(databases):
    storage = databases()
    rule = Sweep(objectives=("top1", "parameters"), scheduler="asha", min_epochs=1, reduction=2)
    search = open_search(storage, trials=3, scheduler=rule, **BOTH)
    for top1 in (90.0, 50.0):
        number = search.ask()[0]
        assert not any(search.epoch(number, epoch, top1) for epoch in (1, 2, 3))
    again = open_search(storage, trials=3, scheduler=rule, **BOTH)
    assert [again.ask()[0] for _ in range(3)] == [0, 1, 2]
    assert [again.newest(number) for number in range(3)] == [3, 3, 0]
    assert not again.stops_here(1)
    assert not again.epoch(1, 3, 50.0)  # of a checkpoint before it
    assert not again.epoch(1, 4, 51.0)
    assert again.study.trials[1].intermediate_values == {1: 50.0, 2: 50.0, 3: 50.0, 4: 51.0}


def test_a_trial_that_does_not_fit_ends_a_search_of_several_objectives_no_more_than_others(storage):
    search = open_search(storage, trials=12, **BOTH)
    for k in range(12):
        number = search.ask()[0]
        search.epoch(number, 1, 80.0)
        if k % 3 == 0:
            search.tell(number, TrialState.FAIL, {}, Failure("memory", "out of it"))
        else:
            metrics = {"best_val_top1": 80.0 + k, "best_val_loss": 0.5, "parameters": 5}
            search.tell(number, TrialState.COMPLETE, metrics)
    assert search.states() == {"COMPLETE": 8, "INFEASIBLE": 4}
    assert [trial.number for trial in search.front()] == [11]


def test_a_study_of_other_objectives_is_refused(storage):
    open_search(storage).ask()
    with pytest.raises(ConfigError, match="sweep.objectives"):
        open_search(storage, **BOTH)


def test_a_setting_that_ran_is_known_and_one_that_failed_is_not(storage):
    search = open_search(storage, trials=6)
    numbers = [search.ask()[0] for _ in range(5)]
    for number, stamp in zip(numbers, "aabbc", strict=True):
        assert not search.stale(number, stamp)
    assert search.known(1, "a") is None  # it is running
    succeed(search, 0, 91.0)
    search.tell(2, TrialState.FAIL, {}, Failure("lost", "its process died"))
    assert search.known(1, "a").number == 0
    assert search.known(3, "b") is None
    assert search.known(4, "c") is None


@pytest.mark.parametrize("objectives", [("top1",), ("top1", "parameters")])
def test_a_known_setting_is_answered_with_its_result_and_counts_as_a_trial(storage, objectives):
    search = open_search(storage, trials=3, objectives=objectives)
    for _ in range(3):
        search.stale(search.ask()[0], "same")
    for epoch in (1, 2):
        search.epoch(0, epoch, 90.0 + epoch)
    metrics = {"best_val_top1": 92.0, "best_val_loss": 0.25, "parameters": 7}
    search.tell(0, TrialState.COMPLETE, metrics)
    for number in (1, 2):
        answer = search.answer(number, search.known(number, "same"))
        assert answer.items() >= {"duplicate_of": 0, "epoch": 2, "best_val_top1": 92.0}.items()
        assert answer["best_val_loss"] == 0.25
    assert search.over
    first, second, third = search.study.trials
    assert first.values == second.values == third.values == [92.0, 7.0][: len(objectives)]
    assert first.intermediate_values == second.intermediate_values
    assert [trial.user_attrs.get("duplicate_of") for trial in search.study.trials] == [None, 0, 0]
    assert search.best().number == 0
    assert [trial.number for trial in search.distinct()] == [0]
    assert search.leading(5) == [0]
    assert search.duplicates == 2


def test_a_known_setting_that_was_stopped_early_is_stopped_where_it_was(storage):
    search = open_search(storage, trials=2, scheduler=Sweep(min_epochs=1, reduction=2))
    for _ in range(2):
        search.stale(search.ask()[0], "same")
    search.epoch(0, 1, 60.0)
    search.tell(0, TrialState.PRUNED, {"best_val_loss": 0.9})
    answer = search.answer(1, search.known(1, "same"))
    assert (answer["epoch"], answer["best_val_top1"]) == (1, 60.0)
    assert search.states() == {"PRUNED": 2}
    assert search.study.trials[1].intermediate_values == {1: 60.0}


def test_median_stops_what_is_worse_than_half_of_those_that_ended(storage):
    search = open_search(
        storage, trials=6, scheduler=Sweep(scheduler="median", startup=3, min_epochs=2)
    )
    for top1 in (70.0, 80.0, 90.0):
        number = search.ask()[0]
        assert not any(search.epoch(number, epoch, top1) for epoch in (1, 2, 3))
        succeed(search, number, top1)
    worse, better = search.ask()[0], search.ask()[0]
    assert not search.epoch(worse, 1, 79.0)  # too early to say
    assert search.epoch(worse, 2, 79.0)
    assert not any(search.epoch(better, epoch, 81.0) for epoch in (1, 2, 3))


@pytest.mark.parametrize(
    ("key", "distribution", "told"),
    [
        ("clip.prompts", CategoricalDistribution(("digits", "photo")), "was digits, digits-bad"),
        ("fusion.alpha", CategoricalDistribution((0, 1)), "was 0 to 1 and is 0, 1"),
        ("fusion.alpha", FloatDistribution(0.1, 1, log=True), "fusion.alpha must stay of its kind"),
    ],
)
def test_a_space_that_cannot_be_one_with_what_was_drawn_is_refused_by_key(
    storage, key, distribution, told
):
    open_search(storage).ask()
    changed = Space(SPACE.distributions | {key: distribution})
    with pytest.raises(ConfigError, match=told):
        open_search(storage, space=changed)
    assert len(optuna.load_study(study_name="richkd", storage=storage).trials) == 1


def test_a_range_may_change(storage):
    open_search(storage).ask()
    wider = Space(SPACE.distributions | {"loss.temperature": FloatDistribution(0.1, 16, log=True)})
    search = open_search(storage, space=wider)
    assert [search.ask()[0] for _ in range(2)] == [0, 1]


def test_as_many_but_other_objectives_are_refused(storage):
    ended = {"best_val_top1": 90.0, "best_val_loss": 0.5, "parameters": 5}
    search = open_search(storage, **BOTH)
    search.tell(search.ask()[0], TrialState.COMPLETE, ended)
    with pytest.raises(ConfigError, match="must stay top1, parameters but are top1, latency"):
        open_search(storage, objectives=("top1", "latency"))


def test_a_failure_that_was_half_said_when_its_driver_died_is_said_again(databases):
    storage = databases()
    search = open_search(storage, trials=2)
    trial = search.running[search.ask()[0]]
    why = Failure("memory", "out of it")
    trial.set_user_attr("error", why.text)
    trial.set_user_attr("failure", why.kind)
    trial.set_constraint("memory", 1.0)  # and here the driver dies
    again = open_search(storage, trials=2)
    number = again.ask()[0]
    assert again.failed(number) == why
    again.tell(number, TrialState.FAIL, {}, why)
    assert again.states() == {"INFEASIBLE": 1}
    assert again.failures() == {number: why}
    assert again.failed(again.ask()[0]) is None
