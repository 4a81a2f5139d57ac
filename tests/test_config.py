"""A config takes what makes sense and refuses the rest, with the key and its rule."""

import json

import pytest

from richkd.errors import ConfigError
from richkd.layers import build, digest, dump, from_dict, read, to_dict


@pytest.mark.parametrize(
    ("text", "value"), [("100", 100.0), ("1e2", 100.0), ("100.", 100.0), ("none", "none")]
)
def test_a_scale_is_a_number_or_a_name(text, value):
    assert build(read([f"clip.scale={text}"])).clip.scale == value


BAD = {
    "train.lrr=1": ["train.lrr", "train.lr"],
    "trian.lr=1": ["train.lr"],
    "train.lr=x": ["train.lr", "number", "'x'"],
    "train.lr=nan": ["train.lr", "nan"],
    "train.lr=.inf": ["train.lr", "inf"],
    "train.lr=1e308": ["train.lr", "1e+308"],
    "train.lr=[1]": ["train.lr", "number"],
    "train.lr={a: 1}": ["train.lr.a"],
    "train.epochs=2.5": ["train.epochs", "whole number", "2.5"],
    "train.epochs=-1": ["train.epochs", "-1"],
    "train.epochs=1000000000000": ["train.epochs"],
    "train.epochs=true": ["train.epochs", "True"],
    "fusion.alpha=1.5": ["fusion.alpha", "0 to 1", "1.5"],
    "loss.temperature=1e-6": ["loss.temperature", "0.01"],
    "seed=": ["seed"],
    "seed=-1": ["seed", "-1"],
    "device=tpu": ["device", "'tpu'"],
    "clip.scale=modle": ["clip.scale", "match_std"],
    "clip={scale: 25, reduce: probs}": ["clip.reduce=probs", "clip.scale=25.0", "use"],
    "method.name=kdd": ["method.name", "kd"],
    "data=digits": ["data", "section"],
    "storage=${oc.env:HOME}": ["${"],
    "storage=???": ["storage", "???"],
    'storage="a\\0b"': ["storage", "one line"],
    "seed=010": ["seed", "whole number", "'010'"],
    "seed=1_000": ["seed", "1_000"],
    "train=": ["train", "section"],
    "train.lr=!!int ''": ["train.lr", "YAML"],
    "data.source=!!bool abc": ["data.source", "YAML"],
    "train.lr=" + 400 * "9": ["train.lr", "number"],
    "storage=!!python/object/apply:os.system ['x']": ["tag"],
    "storage=*anchor": ["alias"],
    "storage={": ["YAML"],
    "=1": ["key=value"],
    "_target_=os.system": ["_target_"],
}


@pytest.mark.parametrize("override", BAD)
def test_a_bad_override_is_refused_in_one_line(override):
    with pytest.raises(ConfigError) as caught:
        build(read([override]))
    assert "\n" not in str(caught.value)
    for word in BAD[override]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("[{}]", "must be a list of mappings"),
        ("null", "must be a list of mappings but got None"),
        ("[3]", "must be a list of mappings but got [3]"),
        ("x", "must be a list of mappings but got 'x'"),
        ("[{prompts: x}]", "weight must be given"),
        ("[{weight: a}]", "weight must be a number but got 'a'"),
        ("[{weight: .nan}]", "must lie in 0 to 1 but got nan"),
        ("[{weight: 1.1}]", "must lie in 0 to 1 but got 1.1"),
        ("[{weight: 0.1, reduce: x}]", "must be one of embedding, logits, probs but got 'x'"),
        ("[{weight: 0.1, promts: x}]", "there is no key promts; did you mean prompts?"),
        ("[{weight: 0.1, scale: 3}]", "there is no key scale"),
        ("[{weight: 0.6}, {weight: 0.5}]", "sum to 1.1; lower them"),
    ],
)
def test_a_further_zero_shot_teacher_is_refused_by_its_place(override, message):
    with pytest.raises(ConfigError) as caught:
        build(read([f"clip.extra={override}"]))
    assert message in str(caught.value)
    assert "clip.extra" in str(caught.value)
    later = f"clip.extra=[{{weight: 0.1}}, {override.strip('[]')}]"
    if override.startswith("[{") and "weight" in override and "}, {" not in override:
        with pytest.raises(ConfigError, match=r"^clip.extra\[1\]: "):
            build(read([later]))


def test_further_zero_shot_teachers_survive_yaml_and_json_and_change_the_digest(tmp_path):
    made = build(
        read(["clip.extra=[{weight: 0.2, prompts: single}, {weight: 0.3, logits: x.npy}]"])
    )
    assert [(each.weight, each.prompts, each.logits) for each in made.clip.extra] == [
        (0.2, "single", None),
        (0.3, "digits", "x.npy"),
    ]
    (tmp_path / "config.yaml").write_text(dump(made))
    assert build(read([str(tmp_path / "config.yaml")])) == made
    assert from_dict(json.loads(json.dumps(to_dict(made)))) == made
    assert digest(made) != digest(build(read([])))


def test_a_further_zero_shot_teacher_takes_from_the_first_what_it_does_not_say():
    extra = "clip.extra=[{weight: 0.1}, {weight: 0.1, prompts: single, views: 3}, {weight: 0.1, logits: x.npy}]"
    made = build(read(["clip.prompts=digits", "clip.reduce=logits", "clip.views=9", extra]))
    assert [(each.prompts, each.reduce, each.views) for each in made.clip.extra] == [
        ("digits", "logits", 9),
        ("single", "logits", 3),
        ("digits", "logits", "whole"),
    ]


@pytest.mark.parametrize("shares", [(0.2, 0.4, 0.3, 0.1), (0.7, 0.2, 0.1), (1,), (0, 0)])
def test_shares_may_sum_to_one_however_they_are_rounded(shares):
    extra = ", ".join(f"{{weight: {share}}}" for share in shares)
    assert len(build(read([f"clip.extra=[{extra}]"])).clip.extra) == len(shares)


@pytest.mark.parametrize(
    "where", ["clip.reduce=probs", "clip.extra=[{weight: 0.1, reduce: probs}]"]
)
def test_probabilities_are_mixed_at_the_model_s_scale_by_any_teacher(where):
    with pytest.raises(ConfigError, match="clip.reduce=probs mixes .* got clip.scale=50.0"):
        build(read([where, "clip.scale=50"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.mean=[0.5]"], "belong together but only one is given; give both or none"),
        (["teacher.std=[0.5]"], "belong together"),
        (["teacher.mean=0.5", "teacher.std=[0.5]"], "must be a list of numbers or null"),
        (["teacher.mean=[0.5, 0.5]", "teacher.std=[1, 1]"], "1 or 3, but got 2"),
        (["teacher.mean=[]", "teacher.std=[]"], "1 or 3, but got 0"),
        (["teacher.mean=[125]", "teacher.std=[1]"], "teacher.mean must lie in -10 to 10"),
        (["teacher.mean=[0.5]", "teacher.std=[0]"], "teacher.std must lie in 1e-06 to 10"),
        (["teacher.size=4"], "teacher.size must lie in 8 to 4096"),
        (["teacher.logits=x.npy"], "exclude each other but are both given"),
    ],
)
def test_what_a_teacher_sees_is_a_list_a_channel(words, message):
    with pytest.raises(ConfigError) as caught:
        build(read(["teacher.checkpoint=x", *words]))
    assert message in str(caught.value)
    assert str(caught.value).startswith("teacher.")


def test_the_home_folder_is_put_in_place_of_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = build(read(["data.source=folder", "data.path=~/photos", "clip.logits=~/c.npz:en"]))
    assert (config.data.path, config.clip.logits) == ("/home/me/photos", "/home/me/c.npz:en")
