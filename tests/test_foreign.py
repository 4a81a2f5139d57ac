"""Weights of other projects load as they are, and nothing in their files is run."""

import argparse
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from richkd import models
from richkd.errors import ConfigError
from richkd.models import foreign

FIELD = "teacher.checkpoint"
CLASSES = 7


def network(name="resnet8", seed=0, **options):
    """Return a small network whose statistics are not the initial ones."""
    torch.manual_seed(seed)
    made = models.build(name, CLASSES, **options)
    for value in made.state_dict().values():
        if value.is_floating_point():
            value += 0.1 * torch.rand_like(value)
    return made.eval()


def renamed(weights, last="fc", prefix=""):
    """Return weights of ours as another project names them."""
    return OrderedDict(
        (prefix + key.replace("head.", f"{last}."), value) for key, value in weights.items()
    )


def logits(made):
    with torch.no_grad():
        return made(torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def loaded(path, name="resnet8", **options):
    made = models.build(name, CLASSES, **options).eval()
    foreign.load(made, path, field=FIELD, name=name)
    return made


def refused(path, **options):
    with pytest.raises(ConfigError) as caught:
        loaded(path, **options)
    text = str(caught.value)
    assert text.startswith(f"{FIELD}={path} ")
    assert "\n" not in text
    assert "\x1b" not in text
    return text


@pytest.mark.parametrize(
    ("suffix", "keys"),
    [
        (".pth", ()),
        (".pt", ("model",)),
        (".th", ("state_dict",)),
        ("", ("net",)),
        (".pth", ("state_dict", "model")),
    ],
)
@pytest.mark.parametrize("new", [True, False])
def test_a_state_dict_is_found_by_itself_or_under_its_usual_keys(tmp_path, suffix, new, keys):
    made, content = network(), renamed(network().state_dict())
    for key in keys:
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / f"w{suffix}", _use_new_zipfile_serialization=new)
    assert torch.equal(logits(loaded(tmp_path / f"w{suffix}")), logits(made))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("last", ["fc", "linear", "classifier", "head"])
def test_names_of_other_projects_become_ours(tmp_path, prefix, last):
    made = network()
    torch.save(renamed(made.state_dict(), last, prefix), tmp_path / "w.pth")
    assert torch.equal(logits(loaded(tmp_path / "w.pth")), logits(made))


def test_resnets_without_parameters_in_their_shortcuts_are_akamaster_s(tmp_path):
    made = network("resnet20", shortcut="A")
    weights = renamed(made.state_dict(), "linear", "module.")
    assert {key.split(".")[1] for key in weights} == {
        *("conv1", "bn1", "layer1", "layer2", "layer3", "linear"),
    }
    torch.save({"state_dict": weights, "best_prec1": 91.73}, tmp_path / "w.th")
    assert torch.equal(logits(loaded(tmp_path / "w.th", "resnet20", shortcut="A")), logits(made))
    assert "teacher.shortcut" in refused(tmp_path / "w.th", name="resnet20", shortcut="B")


def test_safetensors_are_read(tmp_path):
    made = network()
    save_file(dict(renamed(made.state_dict(), prefix="module.")), tmp_path / "w.safetensors")
    assert torch.equal(logits(loaded(tmp_path / "w.safetensors")), logits(made))


def test_files_of_old_versions_have_no_counters(tmp_path):
    made = network()
    weights = {k: v for k, v in made.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(weights) < len(made.state_dict())
    torch.save(weights, tmp_path / "w.pth")
    assert torch.equal(logits(loaded(tmp_path / "w.pth")), logits(made))


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.int64])
@pytest.mark.parametrize("numpy_1", [False, True])
def test_a_number_of_numpy_may_lie_beside_the_weights(tmp_path, kind, numpy_1):
    made, path = network(), tmp_path / "w.pth"
    content = {"best_acc": kind(79), "model": made.state_dict()}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    if numpy_1:  # which had another name for the same function
        old = path.read_bytes().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
        assert old != path.read_bytes()
        path.write_bytes(old)
    assert torch.equal(logits(loaded(path)), logits(made))


def test_repdistiller_s_options_may_lie_beside_the_weights(tmp_path):
    made = network()
    options = argparse.Namespace(lr=0.05, lr_decay_epochs=[150, 180, 210], model="resnet8")
    torch.save({"opt": options, "model": renamed(made.state_dict())}, tmp_path / "w.pth")
    assert torch.equal(logits(loaded(tmp_path / "w.pth")), logits(made))


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def payloads(evil):
    weights = OrderedDict(network().state_dict())
    named = OrderedDict(weights)
    named["fc.bias"] = evil
    inside = argparse.Namespace()
    inside.lr = evil
    return {
        "alone": evil,
        "beside": {"model": weights, "opt": evil},
        "before": {"opt": evil, "model": weights},
        "as a weight": named,
        "deep": {"model": weights, "log": [{"a": (1, [evil])}]},
        "in options": {"model": weights, "opt": inside},
        "in a list": [weights, evil],
    }


@pytest.mark.parametrize("where", payloads(None))
@pytest.mark.parametrize("new", [True, False, None])
def test_a_file_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, where, new):
    sentinel, path = tmp_path / "sentinel", tmp_path / "w.pth"
    content = payloads(Evil(sentinel))[where]
    if new is None:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=new)
    text = refused(path)
    assert "can be read without running code but cannot" in text
    assert "torch.save(model.state_dict(), FILE)" in text
    if new:
        assert "it holds posix.mkdir" in text
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(Evil(sentinel)))  # it would have
    assert sentinel.exists()


def test_a_whole_module_is_refused_by_name(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    assert "it holds torch.nn.modules.linear.Linear" in refused(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world\n", b"\x80", b"PK\x03\x04", b"\0\0\0"])
def test_a_file_of_another_kind_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    assert "torn, or of another format" in refused(path)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_torn_file_is_refused(tmp_path, new, share):
    path = tmp_path / "w.pth"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=new)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path)


@pytest.mark.parametrize(
    ("content", "holds"),
    [
        ({}, "nothing"),
        ({"model": {}}, "nothing"),
        ({"epoch": 3, "lr": 0.1}, "epoch, lr"),
        ({0: torch.zeros(2)}, "0"),
        ([torch.zeros(2)], "list"),
        (torch.zeros(2), "Tensor"),
        ({"model": None}, "model"),
    ],
)
def test_what_is_no_state_dict_says_what_it_is(tmp_path, content, holds):
    torch.save(content, tmp_path / "w.pth")
    text = refused(tmp_path / "w.pth")
    assert text.endswith(f"under state_dict, model, net, but holds {holds}.")


def test_a_file_that_holds_itself_ends(tmp_path):
    content = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    assert "but holds model" in refused(tmp_path / "w.pth")


def test_another_number_of_classes_is_named_with_both_shapes(tmp_path):
    torch.save(models.build("resnet8", 100).state_dict(), tmp_path / "w.pth")
    text = refused(tmp_path / "w.pth")
    assert "head.weight (100, 64) instead of (7, 64)" in text
    assert "2 of another shape" in text
    assert "give a teacher of this task's classes and channels" in text


def test_shortcuts_without_parameters_are_recognised(tmp_path):
    torch.save(models.build("resnet8", 7, shortcut="A").state_dict(), tmp_path / "w.pth")
    assert "give teacher.shortcut=A" in refused(tmp_path / "w.pth")
    torch.save(models.build("resnet14", 7).state_dict(), tmp_path / "w.pth")
    assert "give another teacher.name" in refused(tmp_path / "w.pth")


def test_missing_and_unexpected_weights_are_named_and_counted(tmp_path):
    weights = network().state_dict()
    del weights["conv1.weight"]
    weights |= {f"other{k}": torch.zeros(1) for k in range(7)}
    torch.save(weights, tmp_path / "w.pth")
    text = refused(tmp_path / "w.pth")
    assert "1 missing (conv1.weight)" in text
    assert "7 unexpected (other0, other1, other2, other3, other4, ...)" in text


def test_another_network_is_refused(tmp_path):
    torch.save(network("vgg8").state_dict(), tmp_path / "w.pth")
    assert "does not hold the weights of resnet8" in refused(tmp_path / "w.pth")


def test_a_refused_file_leaves_the_network_as_it_was(tmp_path):
    torch.save(models.build("resnet8", 100).state_dict(), tmp_path / "w.pth")
    made = network()
    before = logits(made)
    with pytest.raises(ConfigError):
        foreign.load(made, tmp_path / "w.pth", field=FIELD, name="resnet8")
    assert torch.equal(logits(made), before)


@pytest.mark.parametrize(
    "name", ["torchvision/resnet18", "timm/resnet18", "timm/mobilenetv3_small_050"]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_of_the_libraries_own_networks_give_their_logits(tmp_path, name, suffix):
    library, _, bare = name.partition("/")
    torch.manual_seed(1)
    if library == "timm":
        trained = timm.create_model(bare, num_classes=CLASSES)
    else:
        trained = torchvision.models.get_model(bare, num_classes=CLASSES)
    trained.train()(torch.rand(4, 3, 64, 64))  # statistics of its own
    trained.eval()
    weights = {f"module.{key}": value for key, value in trained.state_dict().items()}
    path = tmp_path / f"w{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"model": weights}, path)
    assert torch.equal(logits(loaded(path, name)), logits(trained))
