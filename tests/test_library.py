"""Networks of timm and torchvision have our interface and keep what they compute."""

import subprocess
import sys
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision

from richkd import models
from richkd.errors import ConfigError
from richkd.models import library

NETWORKS = {  # pixels, features
    "timm/resnet18": (32, 512),
    "timm/resnet18.a1_in1k": (32, 512),
    "timm/vit_tiny_patch16_224": (224, 192),
    "timm/mobilenetv3_small_050": (32, 1024),
    "torchvision/resnet18": (32, 512),
    "torchvision/mobilenet_v2": (32, 1280),
    "torchvision/googlenet": (32, 1024),
}


def plain(name, classes):
    """Return the network as its library makes it."""
    source, _, bare = name.partition("/")
    if source == "timm":
        return timm.create_model(bare, num_classes=classes)
    options = {"aux_logits": True, "init_weights": True} if bare == "googlenet" else {}
    return torchvision.models.get_model(bare, weights=None, num_classes=classes, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_head_of_the_features_is_the_logits(name):
    size, width = NETWORKS[name]
    network = models.build(name, 7)
    images = torch.randn(2, 3, size, size)
    assert network(images).shape == (2, 7)  # while training, too
    network.eval()
    features = network.features(images)
    assert features.shape == (2, network.width) == (2, width)
    by_hand = features @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(network(images), by_hand)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("timm/resnet18", 32, [(64, 8), (128, 4), (256, 2), (512, 1)]),
        ("timm/mobilenetv3_small_050", 64, [(8, 16), (16, 8), (24, 4), (288, 2)]),
        ("timm/mobilenetv1_100", 64, [(128, 16), (256, 8), (512, 4), (1024, 2)]),
        ("timm/vit_tiny_patch16_224", 224, [(192, 14)] * 3),
        ("timm/pit_ti_224", 224, [(64, 27), (128, 14), (256, 7)]),
    ],
)
def test_stages_of_timm_are_told_beside_the_features(name, size, expected):
    network = models.build(name, 7).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        features, maps = network.staged(images)
        assert torch.equal(features, network.features(images))
    assert [tuple(each.shape) for each in maps] == [(2, c, side, side) for c, side in expected]


def test_blocks_of_tokens_are_the_first_the_middle_and_the_last():
    network, told = models.build("timm/vit_tiny_patch16_224", 7).eval(), []
    for block in network.body.blocks:
        block.register_forward_hook(lambda *found: told.append(found[2]))
    with torch.no_grad():
        _, maps = network.staged(torch.randn(1, 3, 224, 224))
    for each, block in zip(maps, (0, 6, 11), strict=True):
        assert torch.equal(each.flatten(2).transpose(1, 2), told[block][:, 1:])


def test_stages_that_a_network_does_not_tell_are_refused():
    network = models.build("torchvision/resnet18", 7)
    with pytest.raises(ConfigError, match="at, lg and autokd .* which ResNet does not tell; take"):
        network.staged(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("name", [*NETWORKS, "torchvision/vit_b_16"])
def test_weights_of_the_library_give_its_logits(name):
    trained = plain(name, 5).eval()
    network = models.build(name, 5).eval()
    network.load_state_dict(library.own_names(network, trained.state_dict()))
    size = NETWORKS.get(name, (224,))[0]
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(network(images), trained(images))


@pytest.mark.parametrize("name", ["timm/resnet18", "resnet8"])
def test_own_weights_keep_their_names(name):
    network = models.build(name, 5)
    weights = network.state_dict()
    assert library.own_names(network, weights) is weights


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("resnet8", "fc"),
        ("shufflenetv1", "linear"),
        ("vgg8", "classifier"),
        ("mobilenetv2", "classifier.0"),
    ],
)
def test_last_layer_of_published_weights_becomes_the_head(name, last):
    network = models.build(name, 5)
    weights = network.state_dict()
    published = {key.replace("head.", f"{last}."): value for key, value in weights.items()}
    found = library.own_names(network, published)
    assert found.keys() == weights.keys()
    assert found["head.bias"] is published[f"{last}.bias"]


def test_wrong_weights_are_not_renamed_into_right_ones():
    network = models.build("timm/resnet18", 5)
    other = models.build("resnet8", 5).state_dict()
    assert library.own_names(network, other).keys() != network.state_dict().keys()


def test_timm_takes_images_of_one_channel():
    network = models.build("timm/resnet18", 3, channels=1).eval()
    assert network(torch.randn(2, 1, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("timm/vit_tiny_patch16_224", "doesn't match model"),
        ("torchvision/vit_b_16", "Wrong image height"),
        ("torchvision/alexnet", "Output size is too small"),
    ],
)
def test_network_that_does_not_take_so_small_images_is_refused(name, why):
    network = models.build(name, 3)
    with pytest.raises(ConfigError, match=f"student.name=.* of 32 x 32 pixels .*{why}.*; take ano"):
        models.check_size(network, 3, (32, 32), field=f"student.name={name}")
    assert network.training


def test_torchvision_is_refused_images_of_one_channel():
    with pytest.raises(ConfigError, match="3 channels but the images have 1; take timm/NAME"):
        models.build("torchvision/resnet18", 3, channels=1)


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/mobilenet_v2"])
def test_network_can_be_exported_for_any_batch(name):
    network = models.build(name, 10).eval()
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(
        network, (torch.randn(2, 3, 32, 32),), dynamic_shapes=shapes
    ).module()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program(images), network(images))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm/resnet81", "timm/resnet"),
        ("timm/resnet18.a9_in1k", r"timm/resnet18\.a\d_in1k"),
        ("torchvision/mobilenet_v22", "torchvision/mobilenet_v2"),
        ("torchvision/ResNet18", "torchvision/resnet18"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(name, near):
    with pytest.raises(ConfigError, match=rf"student\.name.*teacher\.name.*did you mean {near}"):
        models.build(name, 10)


@pytest.mark.parametrize("name", ["timm/", "torchvision/?"])
def test_name_near_to_none_is_answered_with_where_names_are(name):
    with pytest.raises(ConfigError, match=r"\.models\.list_models\(\) names them"):
        models.build(name, 10)


@pytest.mark.parametrize(
    "name",
    [
        "timm/deit_tiny_distilled_patch16_224",  # two heads
        "timm/dpn48b",  # a convolution
        "timm/volo_d1_224",  # an auxiliary head
        "torchvision/squeezenet1_1",  # a convolution
    ],
)
def test_network_without_one_linear_layer_at_its_end_is_refused(name):
    with torch.device("meta"), pytest.raises(ConfigError, match=f"one linear layer but {name}"):
        models.build(name, 10)


def test_network_whose_weights_have_a_version_is_refused():
    with pytest.raises(ConfigError, match="torchvision/mnasnet0_5 reads only weights"):
        models.build("torchvision/mnasnet0_5", 10)


def test_what_timm_cannot_build_is_refused(monkeypatch):
    def create_model(name, **options):
        raise TypeError("no argument in_chans")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ConfigError, match="cannot build resnet18 .* 1 channels .*in_chans"):
        models.build("timm/resnet18", 10, channels=1)


def test_body_that_returns_no_features_is_refused():
    network = models.build("timm/resnet18", 10).eval()
    network.body.global_pool = torch.nn.Identity()
    with pytest.raises(
        ConfigError, match=r"\(images, 512\) before fc but ResNet returned \(1, 512, 1"
    ):
        network(torch.zeros(1, 3, 32, 32))


def test_published_weights_of_torchvision_come_with_what_they_expect(monkeypatch):
    trained, asked = torchvision.models.resnet18().eval(), {}

    def load(url, **options):
        asked.update(options, url=url)
        return trained.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", load)
    network, wanted = library.pretrained("torchvision/resnet18", "IMAGENET1K_V1")
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(network.eval()(images), trained(images))
    assert wanted == library.Preprocessing(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=224
    )
    assert asked["check_hash"] and asked["weights_only"]
    assert asked["url"].endswith("resnet18-f37072fd.pth")


def test_published_weights_of_timm_come_with_what_they_expect(monkeypatch):
    create_model, asked = timm.create_model, []

    def create(name, *, pretrained):
        asked.append((name, pretrained))
        return create_model(name)

    monkeypatch.setattr(timm, "create_model", create)
    network, wanted = library.pretrained("timm/vit_tiny_patch16_224", "augreg_in21k_ft_in1k")
    assert asked == [("vit_tiny_patch16_224.augreg_in21k_ft_in1k", True)]
    assert (network.head.out_features, network.width) == (1000, 192)
    assert wanted == library.Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, size=224)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("timm/resnet18", "timm.create_model"),
        ("torchvision/resnet18", "torchvision.models._api.load_state_dict_from_url"),
    ],
)
def test_weights_that_cannot_be_loaded_are_named_with_the_way_round(name, place, monkeypatch):
    def fail(*_, **__):
        raise URLError("no route\nto host")

    monkeypatch.setattr(place, fail)
    with pytest.raises(
        ConfigError,
        match=rf"default weights of {name} .*URLError.*no route.*machine with internet.*teacher\.checkpoint=FILE",
    ) as found:
        library.pretrained(name)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "tag", "reason"),
    [
        ("resnet20", "", "timm/NAME or torchvision/NAME but got 'resnet20'"),
        ("timm/resnet18", "a9", r"did you mean timm/resnet18\.a"),
        ("torchvision/resnet81", "", "did you mean torchvision/resnet"),
        ("torchvision/resnet18", "V9", "one of IMAGENET1K_V1, DEFAULT but got 'V9'"),
    ],
)
def test_published_weights_that_do_not_exist_are_refused(name, tag, reason):
    with pytest.raises(ConfigError, match=reason):
        library.pretrained(name, tag)


def test_libraries_are_imported_only_when_asked_for():
    code = """
import sys
from richkd import models
models.build("resnet8", 10)
assert not {"timm", "torchvision"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
