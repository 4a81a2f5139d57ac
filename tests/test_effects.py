"""A key of the command line that has no effect is named, and one that has is not."""

import warnings
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from richkd import distill
from richkd.effects import check_effects
from richkd.layers import build, flatten, read, to_dict

SILENT = {
    "method.name=kd contrast.negatives=64": "no features are contrasted",
    "method.name=kd loss.dkd_beta=3": "loss.logit_kind is kd",
    "method.name=kd clip.prompts=digits-photo": "CLIP has no weight",
    "method.name=kd fusion.weighting=class": "no logits are fused",
    "method.name=ce teacher.epochs=3": "it learns from labels alone",
    "method.name=ce loss.temperature=9": "loss.logit is 0",
    "method.name=crd loss.transform=channel": "no feature maps are compared",
    "method.name=richkd-l loss.feature_kind=maps": "loss.feature is 0",
    "method.name=richkd-l loss.ce=0 loss.smoothing=0.1": "loss.ce is 0",
}
HEARD = [
    "method.name=richkd-l clip.prompts=digits-photo fusion.alpha=0.5 teacher.epochs=3",
    "method.name=richkd-l loss.logit_kind=dkd loss.dkd_beta=3 loss.standardise=true",
    "method.name=richkd-f contrast.negatives=64 fusion.feature_alpha=0.5 clip.prompts=digits-photo",
    "method.name=richkd-l fusion.weighting=confidence",
    "method.name=autokd loss.transform=channel loss.distance=l1",
    "method.name=ce loss.smoothing=0.1",
]


def told(words: str) -> list[str]:
    layers = read(words.split())
    with warnings.catch_warnings(record=True, action="always") as caught:
        check_effects(build(layers), layers)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("words", SILENT)
def test_a_key_without_effect_is_named_with_the_reason(words):
    key, method = words.split()[-1].partition("=")[0], words.split()[0]
    assert told(words) == [f"{key} has no effect on {method}: {SILENT[words]}."]


@pytest.mark.parametrize("words", HEARD)
def test_a_key_with_an_effect_is_not_named(words):
    assert told(words) == []


def test_what_layers_set_for_other_methods_is_not_named(tmp_path):
    layer = tmp_path / "mine.yaml"
    layer.write_text("contrast: {negatives: 64}\nclip: {prompts: digits-photo}\n")
    assert told(f"{layer} method.name=kd") == []


def weights(words: str, folder: Path) -> dict:
    small = "student.name=cnn8 train.epochs=1 teacher.epochs=1"
    distill.run(build(read(f"{small} {words}".split())), folder)
    return load_file(folder / "last" / "weights.safetensors")


@pytest.mark.parametrize("words", [w for w in SILENT if "kd c" in w or "kd loss.d" in w])
def test_a_key_that_is_named_changes_no_weight(words, tmp_path):
    without = " ".join(words.split()[:-1])
    given, plain = (weights(each, tmp_path / str(k)) for k, each in enumerate((words, without)))
    assert flatten(to_dict(build(read(words.split())))) != flatten(
        to_dict(build(read(without.split())))
    )
    assert all((given[name] == plain[name]).all() for name in plain)
