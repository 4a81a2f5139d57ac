"""What a network does at least, against networks whose work is counted by hand."""

import copy

import pytest
import torch
from torch import nn

from richkd import models
from richkd.bench import floors

CPU = torch.device("cpu")


@pytest.mark.parametrize("batch", [1, 4])
def test_a_linear_layer(batch):
    found = floors.work(nn.Linear(30, 7), torch.randn(batch, 30), training=False)
    assert (found.flops, found.outputs) == (2 * 30 * 7, 2 * 7)
    assert (found.weights, found.launches) == (31 * 7, 1)
    found = floors.work(nn.Linear(30, 7), torch.randn(batch, 30), training=True)
    # its input needs no gradient
    assert (found.flops, found.outputs, found.weights) == (2 * 2 * 30 * 7, 5 * 7, 8 * 31 * 7)


def test_two_convolutions():
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    images = torch.randn(2, 3, 10, 10)
    first, second = 2 * 100 * 8 * 3 * 9, 2 * 25 * 16 * 8 * 9
    found = floors.work(network, images, training=False)
    assert (found.flops, found.outputs) == (first + second, 2 * (100 * 8 + 25 * 16))
    found = floors.work(network, images, training=True)
    assert (found.flops, found.outputs) == (2 * first + 3 * second, 5 * (100 * 8 + 25 * 16))


def test_the_backward_pass_of_grouped_convolutions_is_twice_the_forward_pass():
    network = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = floors.work(network, torch.randn(2, 8, 10, 10), training=True)
    assert found.flops == 3 * (2 * 64 * 8 * 9)


def test_the_papers_pair_does_what_is_known_of_it():
    images = torch.randn(2, 3, 32, 32)
    student = floors.work(models.build("resnet8x4", 100), images, training=True)
    teacher = floors.work(models.build("resnet32x4", 100), images, training=False)
    assert round(student.flops / 1e6) == 1061
    assert round(teacher.flops / 1e6) == 2166


def test_attention_is_counted():
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True).eval()
    found = floors.work(layer, torch.randn(2, 5, 16), training=False)
    # projections, scores and values, then the two layers behind
    assert found.flops == 2 * 5 * (4 * 16 * 16 + 2 * 5 * 16 + 2 * 16 * 32)


def test_counting_leaves_a_network_as_it_was():
    network = models.build("cnn8", 10, channels=1).eval().requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    floors.work(network, torch.randn(4, 1, 8, 8), training=True)
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not network.training and not any(each.requires_grad for each in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_the_resource_that_takes_longest_binds():
    rates = {"fp32": 1000.0, "bf16": 4000.0, "copy": 500.0, "launches": None}
    student = floors.Work(flops=600, outputs=50, weights=250, launches=12)
    teacher = floors.Work(flops=200, outputs=10, weights=100, launches=4)
    found = floors.floor([(student, "fp32")], 10, rates)
    assert found == {
        "flops": pytest.approx(0.6),
        "bytes": pytest.approx((4 * 50 + 4 * 250 / 10) / 500),
        "images_per_second": pytest.approx(1 / 0.6),
        "binds": "flops",
    }
    both = [(student, "bf16"), (teacher, "fp32")]
    found = floors.floor(both, 10, rates)
    assert found["flops"] == pytest.approx(600 / 4000 + 200 / 1000)
    assert found["bytes"] == pytest.approx((2 * 50 + 100 + 4 * 10 + 40) / 500)
    assert found["binds"] == "bytes"
    found = floors.floor(both, 10, rates | {"launches": 2.0})
    assert found["launches"] == pytest.approx(16 / 10 / 2)
    assert (found["binds"], found["images_per_second"]) == ("launches", pytest.approx(1.25))


def test_this_machine_has_rates(monkeypatch):
    monkeypatch.setattr(floors, "SIDE", {"cpu": 64})
    monkeypatch.setattr(floors, "SECONDS", 0.01)
    found = floors.rates(CPU)
    assert found.pop("tf32") is found.pop("launches") is None
    assert list(found) == ["fp32", "bf16", "copy"] and min(found.values()) > 0


def test_of_two_measurements_the_faster_counts():
    one = {"fp32": 2.0, "bf16": 3.0, "launches": None}
    assert floors.faster(one, {"fp32": 1.0, "bf16": 4.0, "launches": None}) == one | {"bf16": 4.0}
