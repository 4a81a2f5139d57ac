"""Learning rates and optimisers: against timm's and torch's own, and as they go on after a stop."""

import copy

import pytest
import timm.scheduler
import torch
from torch import nn

from richkd import checkpoint, distill
from richkd.config import Train
from richkd.errors import ConfigError
from richkd.layers import CONF, build, read
from richkd.learner import Learner
from richkd.models import NAMES
from richkd.record import optimizer_state, set_state
from richkd.schedule import learning_rate

STEPS = 7  # of an epoch; divides no power of two, so that shares of the training are rounded


def rates(train: Train) -> list[list[float]]:
    """Return the learning rate of each step, by epoch."""
    total = STEPS * train.epochs
    return [
        [learning_rate(train, (epoch * STEPS + k) / total) for k in range(STEPS)]
        for epoch in range(train.epochs)
    ]


def test_the_papers_rate_falls_to_a_tenth_after_epochs_150_180_and_210():
    found = rates(Train(schedule="steps"))
    for number, epoch in enumerate(found, 1):  # as the released code counts, and compares
        expected = 0.05 * 0.1 ** sum(number > stage for stage in (150, 180, 210))
        assert epoch == pytest.approx([expected] * STEPS, rel=1e-12)
    assert (found[149][0], found[150][0]) == (0.05, pytest.approx(0.005))


@pytest.mark.parametrize(("warmup", "lr_min"), [(20, 5e-6), (0, 0.0)])
def test_the_transformers_rate_is_that_of_timm(warmup, lr_min):
    climb = {"warmup": warmup, "warmup_lr": 5e-7 if warmup else 0.0}
    train = Train(schedule="epochs", epochs=300, lr=5e-4, lr_min=lr_min, **climb)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=5e-4)
    oracle = timm.scheduler.CosineLRScheduler(
        optimizer, t_initial=300, lr_min=lr_min, warmup_t=warmup, warmup_lr_init=5e-7
    )
    for number, epoch in enumerate(rates(train)):
        oracle.step(number)
        assert epoch == pytest.approx([optimizer.param_groups[0]["lr"]] * STEPS, rel=1e-9)


def test_a_cosine_by_step_and_one_by_epoch_agree_at_the_start_of_each_epoch():
    options = {"epochs": 30, "lr": 0.1, "lr_min": 0.01, "warmup": 3, "warmup_lr": 0.02}
    by_step, by_epoch = (rates(Train(schedule=name, **options)) for name in ("cosine", "epochs"))
    for one, other in zip(by_step, by_epoch, strict=True):
        assert one[0] == pytest.approx(other[0])
    falling = [rate for epoch in by_step[3:] for rate in epoch]
    assert falling == sorted(falling, reverse=True)
    assert by_step[0][0] == 0.02
    assert all(a < b for a, b in zip(by_step[0], by_step[0][1:], strict=False))


@pytest.mark.parametrize(
    "words",
    [
        ["train.optimizer=adam"],
        ["train.schedule=step"],
        ["train.nesterov=true", "train.momentum=0"],
        ["train.nesterov=true", "train.optimizer=adamw"],
        ["train.lr_min=1", "train.lr=0.1"],
        ["train.milestones=[0]", "train.schedule=steps"],
        ["train.milestones=[30]"],
        ["train.milestones=[30]", "train.schedule=epochs"],
        ["train.lr_min=0.001", "train.schedule=steps"],
        ["train.warmup=5", "train.schedule=steps"],
        ["train.warmup_lr=0.001", "train.schedule=steps"],
        ["train.warmup_lr=0.001"],
        ["train.warmup=240"],
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(words):
    with pytest.raises(ConfigError, match=f"^{words[0].partition('=')[0]}"):
        build(read(words))


@pytest.fixture
def words(cache_root) -> list[str]:
    return ["method.name=ce", f"cache={cache_root}", "train.epochs=4", "device=cpu"]


def weights_of(words, folder) -> dict[str, torch.Tensor]:
    return distill.run(build(read(words)), folder).network.state_dict()


class Stop(Exception):
    """The end of a run."""


@pytest.mark.parametrize(
    "recipe",
    [
        ["train.optimizer=adamw", "train.lr=0.001", "train.schedule=epochs", "train.warmup=2"],
        ["train.nesterov=true", "train.schedule=steps", "train.milestones=[2]"],
        ["train.momentum=0"],
    ],
    ids=["adamw", "nesterov", "plain"],
)
def test_a_run_that_is_gone_on_with_equals_the_straight_one(words, recipe, tmp_path):
    words = [*words, *recipe]
    expected = weights_of(words, tmp_path / "straight")

    def report(metrics, _):
        if metrics["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        distill.run(build(read(words)), tmp_path / "cut", report=report)
    found = distill.run(build(read(words)), tmp_path / "cut", resume=True).network.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    last = [checkpoint.load(tmp_path / name / "last").state for name in ("straight", "cut")]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(value, last[1][name]) for name, value in last[0].items())


def test_adamw_takes_the_steps_of_torch_s_plain_one_and_spares_vectors_and_tokens():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.ones(1, 1, 4))
            self.pos_embed = nn.Parameter(torch.ones(1, 3, 4))
            self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    config = build(read(["train.optimizer=adamw", "train.lr=0.01", "train.weight_decay=0.5"]))
    network = Tokens()
    before = copy.deepcopy(network)
    optimizer = distill.open_optimizer(config, network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)  # what is left is decay
    optimizer.step()
    for name, parameter in before.named_parameters():
        expected = parameter * (1 - 0.01 * 0.5) if name == "linear.weight" else parameter
        torch.testing.assert_close(network.get_parameter(name), expected)
    plain = torch.optim.AdamW(before.linear.parameters(), 0.01, weight_decay=0.5, foreach=False)
    fresh = distill.open_optimizer(config, alone := copy.deepcopy(before.linear))
    for each in (before.linear, alone):
        each.weight.grad = torch.arange(16.0).view(4, 4)
    plain.step(), fresh.step()
    torch.testing.assert_close(alone.weight, before.linear.weight)


def test_the_state_of_an_optimiser_survives_whatever_the_order_of_memory():
    config = build(read(["train.optimizer=adamw"]))
    networks = [nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    one, other = (distill.open_optimizer(config, network) for network in networks)
    networks[0](torch.randn(2, 3, 8, 8)).square().mean().backward()
    one.step()
    learners = [Learner(network) for network in networks]
    state = {
        n: v.clone(memory_format=torch.contiguous_format)
        for n, v in optimizer_state(learners[0], one).items()
    }
    assert {name.split()[0] for name in state} == {"exp_avg", "exp_avg_sq", "step"}
    networks[1].load_state_dict(networks[0].state_dict())
    set_state(learners[1], other, state | {"bank student": torch.zeros(3)})
    for network, optimizer in zip(networks, (one, other), strict=True):
        network.zero_grad()
        network(torch.ones(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    assert all(map(torch.equal, networks[0].parameters(), networks[1].parameters()))


def test_rows_that_fill_no_batch_are_left_out_where_that_is_asked_for(words):
    for drop_last, sizes in (("false", {32, 21}), ("true", {32})):
        config = build(
            read([*words, f"train.drop_last={drop_last}", "data.labelled_per_class=null"])
        )
        task = distill.open_task(config)
        batches = distill.open_batches(config, task, distilled=False)
        assert {len(rows) for rows, _, _ in batches.epoch(0)} == sizes
        assert sum(len(rows) for rows, _, _ in batches.epoch(0)) == batches.rows
        assert len(batches) == len(batches.order(0))


def test_a_second_worker_has_the_first_one_s_state():
    config = build(read(["train.optimizer=adamw"]))
    sent: list = []

    class First:
        first = True

        def from_first(self, value):
            sent.append(value)
            return value

        def copy_from_first(self, tensors):
            sent.append([tensor.clone() for tensor in tensors])

    class Second:
        first = False

        def from_first(self, value):
            return sent.pop(0)

        def copy_from_first(self, tensors):
            for tensor, value in zip(tensors, sent.pop(0), strict=True):
                tensor.detach().copy_(value)

    networks = [nn.Conv2d(3, 5, 3) for _ in range(2)]
    learners = [Learner(network) for network in networks]
    optimizers = [distill.open_optimizer(config, network) for network in networks]
    networks[0](torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizers[0].step()
    for group, learner, optimizer in zip((First(), Second()), learners, optimizers, strict=True):
        distill.share_state(group, learner, optimizer)
    one, other = map(optimizer_state, learners, optimizers)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_papers_recipe_and_its_pairs_fit_together():
    pairs = sorted(path.stem for path in (CONF / "pair").glob("*.yaml"))
    cifar = [pair for pair in pairs if not pair.startswith("imagenet-")]
    assert len(cifar) == 17
    for pair in cifar:
        config = build(read(["cifar100", "paper/recipe", f"pair/{pair}"]))
        assert pair == f"{config.teacher.name}-{config.student.name}"
        mobile = config.student.name.startswith(("mobilenet", "shufflenet"))
        assert config.train.lr == (0.01 if mobile else 0.05)
        assert (config.train.schedule, config.train.epochs) == ("steps", 240)
        for name in (config.teacher.name, config.student.name):
            assert name in NAMES
