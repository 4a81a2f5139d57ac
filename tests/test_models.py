"""Networks have the published sizes and one interface."""

import pytest
import torch
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

from richkd import models
from richkd.errors import ConfigError
from richkd.models.resnet import Block, Pad
from richkd.models.shufflenet import shuffle

PUBLISHED = {  # with 100 classes, shortcut B: parameters, pooled width, millions of multiplications at 32 px
    "resnet8": (83_892, 64, 12.5),
    "resnet14": (181_108, 64, 26.7),
    "resnet20": (278_324, 64, 40.8),
    "resnet32": (472_756, 64, 69.1),
    "resnet44": (667_188, 64, 97.4),
    "resnet56": (861_620, 64, 125.8),
    "resnet110": (1_736_564, 64, 253.2),
    "resnet8x4": (1_233_540, 256, 177.1),
    "resnet32x4": (7_433_860, 256, 1083.0),
    "resnet18": (11_220_132, 512, 555.5),
    "resnet50": (23_705_252, 2048, 1298.0),
    "wrn_16_1": (180_916, 64, 26.7),
    "wrn_16_2": (703_284, 128, 101.1),
    "wrn_40_1": (569_780, 64, 83.3),
    "wrn_40_2": (2_255_156, 128, 327.6),
    "vgg8": (3_965_028, 512, 96.2),
    "vgg11": (9_277_284, 512, 209.4),
    "vgg13": (9_462_180, 512, 284.9),
    "vgg16": (14_774_436, 512, 398.2),
    "vgg19": (20_086_692, 512, 511.4),
    "mobilenetv2": (812_836, 1280, 6.5),
    "shufflenetv1": (949_258, 960, 38.7),
    "shufflenetv2": (1_355_528, 1024, 44.5),
}
THREE_STAGES = [name for name in PUBLISHED if name.startswith("resnet")][:9]
REPDISTILLER = {  # number of keys, their last layer, some other keys and the shapes under them
    "resnet8x4": (
        62,
        "fc",
        {"conv1.weight": (32, 3, 3, 3), "layer1.0.downsample.1.running_var": (64,)},
    ),
    "resnet18": (
        122,
        "linear",
        {"layer2.0.shortcut.0.weight": (128, 64, 1, 1), "layer4.1.bn2.bias": (512,)},
    ),
    "resnet50": (
        320,
        "linear",
        {"layer1.0.shortcut.0.weight": (256, 64, 1, 1), "layer4.2.conv3.weight": (2048, 512, 1, 1)},
    ),
    "wrn_16_2": (
        83,
        "fc",
        {
            "block1.layer.0.convShortcut.weight": (32, 16, 1, 1),
            "block3.layer.1.bn2.num_batches_tracked": (),
            "bn1.weight": (128,),
        },
    ),
    "vgg13": (
        72,
        "classifier",
        {
            "block0.0.weight": (64, 3, 3, 3),
            "block0.1.bias": (64,),
            "block4.3.bias": (512,),
            "block4.4.running_mean": (512,),
        },
    ),
    "mobilenetv2": (
        320,
        "classifier.0",
        {
            "conv1.0.weight": (16, 3, 3, 3),
            "blocks.0.0.conv.6.weight": (8, 16, 1, 1),
            "blocks.6.0.conv.3.weight": (480, 1, 3, 3),
            "conv2.1.weight": (1280,),
        },
    ),
    "shufflenetv1": (
        296,
        "linear",
        {
            "conv1.weight": (24, 3, 1, 1),
            "layer1.0.conv1.weight": (54, 24, 1, 1),
            "layer1.0.conv3.weight": (216, 18, 1, 1),
            "layer2.7.bn3.weight": (480,),
        },
    ),
    "shufflenetv2": (
        338,
        "linear",
        {
            "layer1.0.conv5.weight": (58, 58, 1, 1),
            "layer3.3.conv2.weight": (232, 1, 3, 3),
            "conv2.weight": (1024, 464, 1, 1),
            "bn2.bias": (1024,),
        },
    ),
}
TRANSFORMERS = {  # with 100 classes at 224 px: parameters, those and what is fixed, width, told blocks, channels and pixels
    "deit_ti": (5_543_716, 5_543_716, 192, (0, 6, 11), ((192, 14),) * 3),
    "pit_ti": (4_615_972, 4_615_972, 256, (0, 6, 11), ((64, 27), (128, 14), (256, 7))),
    "t2t_vit_7": (4_024_394, 4_078_922, 256, (0, 3, 6), ((256, 14),) * 3),
    "pvt_ti": (12_767_588, 12_767_588, 512, (0, 3, 7), ((64, 56), (128, 28), (512, 7))),
}
MAPS = {  # channels and pixels of the stages' outputs at 32 px
    "resnet20": ((16, 32), (32, 16), (64, 8)),
    "resnet8x4": ((64, 32), (128, 16), (256, 8)),
    "resnet18": ((64, 32), (128, 16), (256, 8), (512, 4)),
    "resnet50": ((256, 32), (512, 16), (1024, 8), (2048, 4)),
    "wrn_16_2": ((32, 32), (64, 16), (128, 8)),
    "vgg8": ((128, 16), (256, 8), (512, 4), (512, 4)),
    "mobilenetv2": ((12, 16), (16, 8), (48, 4), (160, 2)),
    "shufflenetv1": ((240, 16), (480, 8), (960, 4)),
    "shufflenetv2": ((116, 16), (232, 8), (464, 4)),
    "cnn8": ((8, 32), (16, 16), (16, 8)),
}
SMALL = ["resnet8", "resnet8x4", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_sizes_and_cost(name):
    macs = []

    def count(module, _, output):
        macs.append(module.weight.numel() * output[0, 0].numel())

    with torch.device("meta"):  # shapes without numbers
        network = models.build(name, 100)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(count)
        # a linear layer's output has no pixels: output[0, 0] is one number, as is right
        network(torch.zeros(1, 3, 32, 32))
    assert (parameters(network), network.width, round(sum(macs) / 1e6, 1)) == PUBLISHED[name]


def test_every_network_is_tested_by_its_size():
    assert set(models.NAMES) == {*PUBLISHED, *TRANSFORMERS, "cnn8", "cnn16", "cnn24"}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_have_the_published_sizes_and_tell_the_blocks_of_their_papers(name):
    trained, kept, width, told, shapes = TRANSFORMERS[name]
    network, outputs = models.build(name, 100).eval(), []
    assert parameters(network) == trained
    assert sum(value.numel() for value in network.state_dict().values()) == kept
    assert network.width == width
    for module in network.modules():
        if type(module).__name__ == "Block":
            module.register_forward_hook(lambda *found: outputs.append(found[2]))
    with torch.no_grad():
        features, maps = network.staged(torch.randn(2, 3, 224, 224))
    assert features.shape == (2, width)
    assert [tuple(each.shape) for each in maps] == [(2, c, side, side) for c, side in shapes]
    for each, block in zip(maps, told, strict=True):
        tokens = each.flatten(2).transpose(1, 2)
        assert torch.equal(tokens, outputs[block][:, -tokens.shape[1] :])


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_follow_the_size_of_the_images_and_refuse_another(name):
    network = models.build(name, 5, channels=1, size=(32, 64)).eval()
    images = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        features, maps = network.staged(images)
        assert torch.equal(features, network.features(images))
        assert torch.equal(network(images), network.head(features))
    assert [each.shape[2] < each.shape[3] for each in maps] == [True] * 3
    with pytest.raises(ConfigError, match="must take images of 48 x 48 pixels but does not"):
        models.check_size(network, 1, (48, 48), field="student.name")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_parameter_of_a_transformer_gets_a_gradient_in_bf16(name):
    torch.manual_seed(0)
    network = models.build(name, 5, size=(64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        features, maps = network.staged(torch.randn(4, 3, 64, 64))
        loss = network.head(features).square().sum() + sum(each.mean() for each in maps)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("name", ["deit_ti", "pit_ti"])
def test_a_transformer_that_sees_less_than_a_patch_is_refused(name):
    with pytest.raises(
        ConfigError, match="at least 16 x 16 pixels, a patch, but these have 4 x 20"
    ):
        models.build(name, 5, size=(4, 20))


@pytest.mark.parametrize("name", REPDISTILLER)
def test_weights_of_repdistiller_fit_by_name_and_shape(name):
    total, last, shapes = REPDISTILLER[name]
    with torch.device("meta"):
        own = models.build(name, 100).state_dict()
    assert len(own) == total
    assert {key: tuple(own[key].shape) for key in shapes} == shapes
    theirs = {key.replace("head.", f"{last}."): value for key, value in own.items()}
    assert theirs.keys() - own.keys() == {f"{last}.weight", f"{last}.bias"}


def test_resnet20_of_he_et_al_has_269722_parameters():
    assert parameters(models.build("resnet20", 10, shortcut="A")) == 269_722


@pytest.mark.parametrize("name", THREE_STAGES)
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


@pytest.mark.parametrize(
    ("name", "shortcut"),
    [
        *((name, "B") for name in (*SMALL, "resnet14", "resnet18", "cnn8", "cnn16", "cnn24")),
        *((name, "A") for name in ("resnet8", "resnet14", "resnet8x4", "resnet18", "resnet50")),
    ],
)
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


class Told(torch.nn.Module):
    """A network as distillation of its stages calls it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        """Return logits, features and maps."""
        features, maps = self.network.staged(images)
        return [self.network.head(features), features, *maps]


@pytest.mark.parametrize("name", MAPS)
def test_stages_are_told_beside_the_features_and_survive_the_folding_of_norms(name):
    network = models.build(name, 7).eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    images = torch.randn(2, 3, 32, 32)
    logits, features, *maps = found = Told(network)(images)
    assert [tuple(each.shape) for each in maps] == [(2, c, side, side) for c, side in MAPS[name]]
    assert torch.equal(features, network.features(images))
    assert torch.equal(logits, network(images))
    folded = fuse(Told(network))
    assert len(list(folded.modules())) < len(list(network.modules()))
    for each, wanted in zip(folded(images), found, strict=True):
        assert (each - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet18", "wrn_16_2", "vgg8", "shufflenetv1", "cnn8"]
)
def test_features_are_the_mean_of_the_last_stage(name):
    network = models.build(name, 7).eval()
    features, maps = network.staged(torch.randn(2, 3, 32, 32))
    assert torch.equal(features, maps[-1].mean((2, 3)))


@pytest.mark.parametrize("name", MAPS)
def test_each_stage_is_a_function_of_the_one_before(name):
    network = models.build(name, 7)
    _, maps = network.staged(torch.randn(2, 3, 32, 32))
    for before, after in zip(maps, maps[1:], strict=False):
        (gradient,) = torch.autograd.grad(after.square().sum(), before, retain_graph=True)
        assert gradient.any()


@pytest.mark.parametrize("name", [*SMALL, "cnn8"])
def test_same_seed_gives_the_same_network(name):
    networks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        networks.append(models.build(name, 10))
    a, b, c = (network.state_dict() for network in networks)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["head.weight"], c["head.weight"])


@pytest.mark.parametrize("name", [*SMALL, "cnn8"])
def test_memory_format_changes_no_logit(name):
    network = models.build(name, 10).eval()
    images = torch.randn(2, 3, 16, 16)
    expected = network(images)
    network = network.to(memory_format=torch.channels_last)
    found = network(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*SMALL, "resnet18", "cnn8"])
def test_every_parameter_gets_a_gradient(name):
    network = models.build(name, 10)
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    convolutions = (module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
    # VGGs have them for the sake of published weights: the norm behind takes them off again
    cancelled = {id(module.bias) for module in convolutions}
    assert all(p.grad.any() for p in network.parameters() if id(p) not in cancelled)


@pytest.mark.parametrize("name", ["wrn_16_2", "vgg13", "mobilenetv2"])
def test_convolutions_start_with_the_spread_of_their_fan_out(name):
    network = models.build(name, 10)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            size = module.kernel_size[0] ** 2 * module.out_channels
            assert module.weight.std().item() == pytest.approx((2 / size) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("size", "pools"), [(32, 3), (63, 3), (64, 4)])
def test_vgg_pools_the_fourth_block_of_large_images_only(size, pools):
    network, pixels = models.build("vgg8", 10), []
    network.block4.register_forward_hook(lambda *found: pixels.append(found[2].shape[-1]))
    network.features(torch.randn(2, 3, size, size))
    assert pixels == [size // 2**pools]


def test_shuffle_deals_channels_out():
    channels = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffle(channels, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(
    ("name", "shortcut"),
    [
        ("resnet8", "A"),
        *((name, "B") for name in ("resnet8", "wrn_16_1", "vgg8", "shufflenetv2", "cnn8")),
    ],
)
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
    ("name", "near"),
    [("resnet8x", "resnet8x4"), ("ResNet20", "resnet20"), ("vgg12", "vgg1"), ("cnn", "cnn8")],
)
def test_unknown_name_is_answered_with_the_nearest(name, near):
    with pytest.raises(ConfigError, match=rf"student\.name.*teacher\.name.*did you mean {near}"):
        models.build(name, 10)


def test_name_near_to_none_is_answered_with_all():
    with pytest.raises(
        ConfigError, match="resnet8, .*vgg8, .*torchvision/NAME but got 'transformer'; take one"
    ):
        models.build("transformer", 10)


def test_unknown_shortcut_is_refused():
    with pytest.raises(ConfigError, match="must be A or B but got 'C'"):
        models.build("resnet8", 10, shortcut="C")
