"""Networks have the published sizes and one interface."""

import pytest
import torch
from torch.nn import functional as F

from richkd import models
from richkd.errors import ConfigError
from richkd.models.resnet import Block, Pad

PUBLISHED = {  # parameters with 100 classes, shortcut B; pooled width
    "resnet8": (83_892, 64),
    "resnet14": (181_108, 64),
    "resnet20": (278_324, 64),
    "resnet32": (472_756, 64),
    "resnet44": (667_188, 64),
    "resnet56": (861_620, 64),
    "resnet110": (1_736_564, 64),
    "resnet8x4": (1_233_540, 256),
    "resnet32x4": (7_433_860, 256),
}
MACS = {"resnet8": 12.5, "resnet20": 40.8, "resnet56": 125.8, "resnet8x4": 177.1}  # in millions


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_resnets_have_the_published_sizes(name):
    network = models.build(name, 100)
    assert (parameters(network), network.width) == PUBLISHED[name]


@pytest.mark.parametrize("name", MACS)
def test_resnets_have_the_published_cost(name):
    network, macs = models.build(name, 100), []

    def count(module, _, output):
        macs.append(module.weight.numel() * output[0, 0].numel())

    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    # a linear layer's output has no pixels: output[0, 0] is one number, as is right
    network(torch.zeros(1, 3, 32, 32))
    assert round(sum(macs) / 1e6, 1) == MACS[name]


def test_every_resnet_is_tested_by_its_size():
    assert set(models.NAMES) == {*PUBLISHED, "cnn8", "cnn16", "cnn24"}


def test_resnet20_of_he_et_al_has_269722_parameters():
    assert parameters(models.build("resnet20", 10, shortcut="A")) == 269_722


@pytest.mark.parametrize("name", PUBLISHED)
def test_shortcut_b_costs_its_convolutions_and_their_norms(name):
    widths = (32, 64, 128, 256) if name.endswith("x4") else (16, 32, 64)
    extra = sum(a * b + 2 * b for a, b in zip(widths, widths[1:], strict=False))
    a, b = (parameters(models.build(name, 100, shortcut=shortcut)) for shortcut in "AB")
    assert b - a == extra


@pytest.mark.parametrize("stride", [1, 2])
def test_shortcut_a_is_every_other_pixel_between_zeros(stride):
    x = torch.randn(2, 4, 8, 8)
    found = Pad(6, stride)(x)
    assert found.shape == (2, 10, 8 // stride, 8 // stride)
    assert torch.equal(found[:, 3:7], F.avg_pool2d(x, 1, stride))
    assert not found[:, :3].any()
    assert not found[:, 7:].any()


def test_block_without_convolutions_is_its_shortcut():
    block = Block(4, 4, 1, "B").eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize("shortcut", ["A", "B"])
@pytest.mark.parametrize("name", ["resnet8", "resnet14", "resnet8x4", "cnn8", "cnn16", "cnn24"])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_head_of_the_features_is_the_logits(name, shortcut, channels, size):
    network = models.build(name, 7, channels=channels, shortcut=shortcut).eval()
    images = torch.randn(4, channels, size, size)
    features = network.features(images)
    assert features.shape == (4, network.width)
    assert isinstance(network.head, torch.nn.Linear)
    by_hand = features @ network.head.weight.T + network.head.bias
    logits = network(images)
    assert logits.shape == (4, 7)
    torch.testing.assert_close(logits, by_hand)


@pytest.mark.parametrize("name", ["resnet8", "cnn8"])
def test_same_seed_gives_the_same_network(name):
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        networks.append(models.build(name, 10))
    a, b, c = (network.state_dict() for network in networks)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "cnn8"])
def test_memory_format_changes_no_logit(name):
    network = models.build(name, 10).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = network(images)
    network = network.to(memory_format=torch.channels_last)
    found = network(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet8", "resnet8x4", "cnn8"])
def test_every_parameter_gets_a_gradient(name):
    network = models.build(name, 10)
    network(torch.randn(4, 3, 16, 16)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["resnet8", "cnn8"])
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_network_can_be_exported_for_any_batch(name, shortcut):
    network = models.build(name, 10, shortcut=shortcut).eval()
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(
        network, (torch.randn(2, 3, 16, 16),), dynamic_shapes=shapes
    ).module()
    images = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(program(images), network(images))


def test_cnn_has_the_sizes_of_the_digits_recipe():
    # 3x3 convolutions 1 -> w -> 2w -> 2w, a scale and a shift each, and the head
    for name, w in (("cnn8", 8), ("cnn16", 16), ("cnn24", 24)):
        network = models.build(name, 10, channels=1)
        convolutions = 9 * (w + w * 2 * w + 2 * w * 2 * w)
        assert parameters(network) == convolutions + 2 * 5 * w + (2 * w + 1) * 10
        assert network.width == 2 * w


@pytest.mark.parametrize(
    ("name", "near"), [("resnet8x", "resnet8x4"), ("ResNet20", "resnet20"), ("cnn", "cnn8")]
)
def test_unknown_name_is_answered_with_the_nearest(name, near):
    with pytest.raises(ConfigError, match=rf"student\.name.*teacher\.name.*did you mean {near}"):
        models.build(name, 10)


def test_name_near_to_none_is_answered_with_all():
    with pytest.raises(ConfigError, match="resnet8, .*cnn24 but got 'transformer'; take one"):
        models.build("transformer", 10)


def test_unknown_shortcut_is_refused():
    with pytest.raises(ConfigError, match="must be A or B but got 'C'"):
        models.build("resnet8", 10, shortcut="C")
