"""What a training takes at most, against tensors that are counted by hand."""

import torch
from torch import nn

from richkd import distill
from richkd.bench import memory
from richkd.bench.variants import Ours, Variant
from richkd.layers import build, read

CPU = torch.device("cpu")


def test_tensors_count_as_long_as_they_live():
    before = torch.zeros(1000)
    with memory.Living() as living:
        one = torch.zeros(100)  # 400 bytes
        two = torch.zeros(200, dtype=torch.float64)  # 1600
        assert living.bytes == 2000
        half = two[:100]
        del two  # lives on in its half
        assert living.bytes == 2000
        del half
        assert living.bytes == 400
        before.add_(1)
        view = before[:10]
        assert living.bytes == 400
        del one, view
    assert (living.bytes, living.peak) == (0, 2000)


def test_a_step_of_a_linear_network_by_hand():
    network, rows = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 20)), 40
    images = torch.zeros(rows, 30)
    with memory.Living() as living:
        hidden = network[0](images)
        seen = network[1](hidden)
        del hidden  # ReLU goes back through its output alone
        logits = network[2](seen)
        assert living.bytes == 4 * rows * (50 + 20)
        assert living.peak == 4 * rows * (50 + 50)  # before and after ReLU
        loss = logits.sum()
        del seen, logits
        loss.backward()
        del loss
    weights = count(network)
    assert living.bytes == 4 * weights  # the gradients
    # in the backward pass of ReLU: its output, two gradients as large, and what the layer behind has got
    behind = 50 * 20 + 20
    assert 4 * (3 * rows * 50 + behind) <= living.peak <= 4 * (3 * rows * 50 + behind + rows * 20)


def test_storages_count_once():
    values = torch.zeros(100)
    layer = nn.BatchNorm1d(10)
    assert memory.size([values, values[:5], {"again": (values,)}, None, "text"]) == 400
    assert memory.size({"layer": layer}) == 4 * 4 * 10 + 8  # and the number of batches seen


def test_most_is_told_at_the_end():
    with memory.measured(CPU) as most:
        torch.zeros(100)
        torch.zeros(50)
    assert most == [400]


def test_a_training_holds_its_student_and_its_images():
    config = Variant("student").config(build(read(["device=cpu", "data.flip=true", "data.pad=2"])))
    task = distill.open_task(config)
    ours = Ours(config, task, None)
    weights = memory.size(ours.student)
    pixels = len(task.dataset.train) * 2 * 12 * 12
    assert memory.held(ours, CPU) == weights + pixels
    images = 4 * config.train.batch_size * 8 * 8
    # gradients and momentum come on top
    assert memory.peak(ours, CPU) > weights + pixels + 2 * 4 * count(ours.student) + images


def count(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())
