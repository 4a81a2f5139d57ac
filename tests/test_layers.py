"""Layers, overrides and presets become one config or one clear line, and a config becomes text again."""

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from richkd import methods
from richkd.config import Config
from richkd.errors import ConfigError
from richkd.layers import (
    CONF,
    UNHASHED,
    Layers,
    build,
    command_of,
    digest,
    dump,
    flatten,
    from_dict,
    mistakes,
    read,
    read_layer,
    to_dict,
)
from tune.settings import Settings

LAUNCHES = ("runtime_env.yaml", "vms.yaml", "rayjob.yaml")  # are Ray's, and no layers of a run
SHIPPED = sorted(path for path in CONF.rglob("*.yaml") if path.name not in LAUNCHES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(CONF).as_posix())
def test_every_layer_under_conf_loads(path):
    layers = read([str(path)])
    assert build(layers) == build(read([path.relative_to(CONF).as_posix()]))
    build(layers, Settings)


def layer(folder: Path, text: str | bytes) -> str:
    path = folder / "layer.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_later_layers_and_overrides_win(tmp_path):
    one = layer(tmp_path, "train: {lr: 0.1, epochs: 7}\n")
    (tmp_path / "two.yaml").write_text("train:\n  lr: 0.2\n")
    assert build(read([one])).train.lr == 0.1
    found = build(read(["train.momentum=0.5", one, str(tmp_path / "two.yaml")])).train
    assert (found.lr, found.epochs, found.momentum) == (0.2, 7, 0.5)
    assert build(read([one, "train.lr=0.3"])).train.lr == 0.3


def test_a_method_lies_under_the_layers_whatever_their_order():
    found = build(read(["loss.temperature=2", "method.name=kd-crd"]))
    assert (found.loss.ce, found.loss.logit, found.loss.temperature) == (0.1, 0.9, 2.0)
    assert found.fusion.alpha == 1


@pytest.mark.parametrize("name", methods.METHODS)
def test_each_method_builds_as_its_table_says(name):
    shown = flatten(to_dict(build(read([f"method.name={name}"]))))
    assert {key: shown[key] for key in methods.METHODS[name].settings} == methods.METHODS[
        name
    ].settings


def test_digits_lie_under_unless_a_source_is_given(tmp_path):
    assert build(read([])).student.name == "cnn8"
    assert build(read(["data.source=digits"])).student.name == Config().student.name
    other = layer(tmp_path, "data: {source: digits}\n")
    assert build(read([other])).student.name == Config().student.name


@pytest.mark.parametrize(
    ("text", "value"),
    [("no", "no"), ("010", "010"), ("on", "on"), ("1e3", "1000.0"), ("~", None), ("'8'", "8")],
)
def test_text_stays_text(text, value):
    assert build(read([f"teacher.checkpoint={text}"])).teacher.checkpoint == value


BAD_LAYERS = {
    "train:\n  lr: 1\n  lr: 2\n": [":3", "twice"],
    "train:\n  lrr: 1\n": [":2", "train.lr"],
    "train:\n\tlr: 1\n": [":2"],
    "a: &a [x]\nb: *a\n": [":2", "alias"],
    "seed: !!python/name:os.system\n": [":1", "tag"],
    "- 1\n- 2\n": ["section"],
    "a: {a: {a: {a: {a: {a: {a: {a: {a: {a: 1}}}}}}}}}\n": ["nested"],
    "? [1]\n: 2\n": ["key"],
    "train:\n  epochs: ten\n": [":2", "train.epochs", "'ten'"],
    "data:\n  root: ${oc.env:HOME}\n": [":2", "${"],
    b"\xff\xfe\x00": ["UTF-8"],
    "#" * 1_100_000: ["1000000"],
    "seed: 2001-01-01\n": ["seed"],
    "[" * 1500: ["layer"],
}


@pytest.mark.parametrize("text", BAD_LAYERS, ids=range(len(BAD_LAYERS)))
def test_a_bad_layer_is_refused_with_its_line(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        build(read([layer(tmp_path, text)]))
    assert "\n" not in str(caught.value)
    for word in ["layer.yaml", *BAD_LAYERS[text]]:
        assert word in str(caught.value)


def test_a_byte_order_mark_and_empty_sections_are_fine(tmp_path):
    path = layer(tmp_path, b"\xef\xbb\xbfseed: 3\ntrain:\n")
    assert build(read([path])).seed == 3
    assert build(read([layer(tmp_path, "# nothing\n")])) == build(read([]))


def test_a_missing_layer_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"digist.yaml .* digits.yaml"):
        read(["digist.yaml"])


def test_what_makes_a_method_is_not_contradicted():
    with pytest.raises(ConfigError, match=r"method.name=kd means fusion.alpha=1.0 but got 0.5"):
        build(read(["method.name=kd", "fusion.alpha=0.5"]))
    with pytest.raises(ConfigError, match=r"means loss.standardise=false but got true"):
        build(read(["method.name=kd", "loss.standardise=true"]))


def test_a_run_passes_over_the_sections_of_a_sweep_and_a_sweep_does_not():
    layers = read(["sweep.trialz=3"])
    build(layers)
    with pytest.raises(ConfigError, match=r"sweep.trialz; did you mean sweep.trials"):
        build(layers, Settings)


def test_tables_are_merged_key_by_key():
    space = build(
        read(["sweep.space.train.lr={loguniform: [0.01, 0.1]}", "sweep.space.loss.logit="]),
        Settings,
    )
    assert space.sweep.space["train.lr"] == {"loguniform": [0.01, 0.1]}
    assert "loss.logit" not in space.sweep.space
    assert "fusion.alpha" in space.sweep.space


def test_every_mistake_is_told_at_once_with_its_line(tmp_path):
    path = layer(
        tmp_path,
        "train:\n  lrr: 1\n  epochs: ten\n  momentum: 2\ndata:\n  pad: x\nfusoin:\n  alpha: 1\n",
    )
    sound, told = mistakes(read([path, "seed=-1", "train.lr=0.2"]))
    expected = {":2: ": "train.lrr", ":3: ": "train.epochs", ":4: ": "train.momentum"}
    expected |= {":6: ": "data.pad", ":8: ": "fusoin.alpha"}
    assert len(told) == 6
    for line, key in expected.items():
        assert [text for text in told if text.startswith(f"{path}{line}") and key in text], line
    assert [text for text in told if text.startswith("seed must lie in 0")]
    assert build(sound).train.lr == 0.2


def test_without_a_mistake_nothing_is_told_and_nothing_taken_out():
    layers = read(["train.lr=0.2"])
    assert mistakes(layers) == (layers, [])


@pytest.mark.parametrize(
    ("words", "count"),
    [
        # without its mean the deviation is alone, which is no mistake of its own
        (["teacher.checkpoint=x", "teacher.mean=[125]", "teacher.std=[1]"], 1),
        (["teacher.checkpoint=[1]", "teacher.mean=[1]", "teacher.std=[1]"], 1),
        (["clip.reduce=probs", "clip.scale=50"], 1),
        (["method.name=kd", "fusion.alpha=0.5"], 1),
        (["train.lr=200", "loss.ce=0", "loss.logit=0"], 2),
        (["train.lr=x", "train.lr=200"], 2),
    ],
)
def test_what_follows_from_a_mistake_is_none_of_its_own(words, count):
    sound, told = mistakes(read(["data.source=digits", *words]))
    assert len(told) == count
    if count == 1:
        with pytest.raises(ConfigError) as caught:
            build(read(["data.source=digits", *words]))
        assert told == [str(caught.value)]


def test_what_no_entry_is_to_blame_for_is_told_once():
    def refuse(_: Layers) -> None:
        raise ConfigError("the disk is gone")

    layers = read(["train.lr=0.2"])
    assert mistakes(layers, refuse) == (layers, ["the disk is gone"])


VALUES = {
    "train.lr": st.floats(1e-6, 10),
    "train.epochs": st.integers(1, 1000),
    "fusion.alpha": st.floats(0, 1),
    "loss.temperature": st.floats(0.01, 1000),
    "seed": st.integers(0, 2**31 - 1),
    "clip.scale": st.one_of(st.floats(0.01, 1000), st.sampled_from(["model", "none"])),
    "clip.prompts": st.text(
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$"), min_size=1
    ).filter(lambda text: text != "???"),  # which is refused
    "data.labelled_share": st.one_of(st.none(), st.floats(0.01, 1)),
}


@settings(deadline=None)
@given(st.fixed_dictionaries({}, optional=VALUES))
def test_a_config_survives_yaml_json_and_layers(tmp_path_factory, found):
    made = build(read([]).over("here", found))
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    path.write_text(dump(made))
    assert build(read([str(path)])) == made
    assert from_dict(json.loads(json.dumps(to_dict(made)))) == made


@pytest.mark.parametrize("text", ["1e0", "1e3", "no", "010", "1_000", "null", "~", "1.", "+1"])
def test_text_that_looks_like_something_else_is_written_as_text(tmp_path, text):
    made = build(Layers().over("", {"clip.prompts": text}))
    (tmp_path / "c.yaml").write_text(dump(made))
    assert build(read_layer(tmp_path / "c.yaml")) == made


def test_layers_survive_json():
    layers = read(["train.lr=0.3", "sweep.space.train.lr={uniform: [0, 1]}"])
    assert Layers.from_list(json.loads(json.dumps(layers.to_list()))) == layers


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(flatten(to_dict(Config())))), JUNK)
def test_any_value_is_taken_or_refused_by_our_own_error(key, value):
    try:
        build(Layers().over("here", {key: value}))
    except ConfigError as error:
        assert str(error)


@settings(deadline=None, max_examples=500)
@given(st.text(max_size=60))
def test_any_text_is_a_layer_or_refused_by_our_own_error(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("fuzz") / "layer.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        build(read([str(path)]))
    except ConfigError as error:
        assert str(error)


CHANGED = {
    "data.validation": 300,
    "data.seed": 1,
    "data.labelled_per_class": 3,
    "student.name": "cnn16",
    "teacher.epochs": 3,
    "clip.model": "RN50",
    "clip.prompts": "single",
    "clip.scale": 50.0,
    "fusion.alpha": 0.5,
    "fusion.space": "probs",
    "loss.ce": 0.5,
    "loss.temperature_of": "task",
    "train.epochs": 3,
    "train.lr": 0.01,
    "seed": 5,
}


@pytest.mark.parametrize("key", CHANGED)
def test_the_digest_changes_with_what_changes_a_result(key):
    base = read([])
    assert digest(build(base)) != digest(build(base.over("", {key: CHANGED[key]})))


def test_the_digest_covers_every_key_but_where_things_lie():
    shown = flatten(to_dict(Config()))
    base = digest(Config())

    def changed_in(part, name, value):  # past the checks: any other value will do
        other = object.__new__(type(part))
        for field in part.__dataclass_fields__:
            object.__setattr__(other, field, getattr(part, field))
        object.__setattr__(other, name, value)
        return other

    for key in shown:
        section, _, name = key.rpartition(".")
        if section:
            own = changed_in(getattr(Config(), section), name, "another value")
            changed = changed_in(Config(), section, own)
        else:
            changed = changed_in(Config(), name, "another value")
        assert (digest(changed) == base) == (key in UNHASHED), key


def test_a_scale_has_one_digest_however_it_is_written():
    assert (
        len({digest(build(read([f"clip.scale={text}"]))) for text in ("100", "1e2", "100.0")}) == 1
    )


# what a shell, YAML, or a parser of flags would take for something else
TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=200) | (
    st.sampled_from(
        [
            "no",
            "010",
            "1e3",
            "null",
            "~",
            "",
            "- a",
            "--json",
            "-x",
            "a b",
            " a ",
            "a'b",
            'a"b',
            "a=b",
        ]
        + ["a: b", "a #b", "[a, b]", "{a: 1}", "!!int 1", "&a", "*a", "$(id)", "`id`", "\\n", "é😀"]
        + ["\ufeffa", "\uffff", "x" * 300, "a " * 150]
    )
)
SAID = VALUES | {
    key: TEXTS
    for key in (
        *("data.source", "data.root", "data.path", "student.name", "teacher.name", "clip.model"),
        *("clip.pretrained", "clip.file", "clip.prompts", "clip.logits", "storage", "cache"),
    )
}
SAID |= {
    "method.name": st.sampled_from(("richkd-l", "kd", "ce")),
    "clip.extra": st.lists(
        st.fixed_dictionaries({"weight": st.floats(0, 0.1)}, optional={"prompts": TEXTS}),
        max_size=3,
    ),
    "teacher.pretrained": TEXTS,
    "data.memory": st.floats(0, 1e6),
}


@settings(deadline=None, max_examples=50)
@given(st.fixed_dictionaries({}, optional=SAID), st.integers(1, 3))
def test_a_command_runs_its_config_again(found, workers):
    try:
        made = build(Layers().over("", found))
    except ConfigError:
        assume(False)
    line = command_of(made, threads=2, workers=workers, name="again")
    environment, *command = shlex.split(line)
    verb = ["richkd", "distill"] if workers == 1 else ["tune", "train"]
    assert (environment, command[:4]) == ("OMP_NUM_THREADS=2", ["python", "-m", *verb])
    assert command[-2:] == ["--name", "again"]
    layers = read(command[4:-2])
    assert build(layers, Settings).resources.workers == workers
    again = build(layers)
    assert digest(again) == digest(made)
    assert replace(again, storage=made.storage, cache=made.cache) == made


def test_a_command_says_what_differs_from_the_source_and_the_method_alone():
    assert command_of(Config()) == (
        "python -m richkd distill method.name=richkd-l data.source=digits"
    )
    made = build(Layers().over("", {"method.name": "kd", "train.lr": 0.1, "clip.prompts": "a b"}))
    assert command_of(made, threads=1, name="kd 1") == (
        "OMP_NUM_THREADS=1 python -m richkd distill method.name=kd data.source=digits "
        "'clip.prompts=a b' train.lr=0.1 --name 'kd 1'"
    )


def test_a_shell_gives_the_words_of_a_command_on_as_they_are():
    made = build(Layers().over("", {"clip.prompts": 'it\'s "$HOME" `id` \\ *', "seed": 3}))
    line = command_of(made).replace("python -m richkd distill", "printf '%s\\0'")
    printed = subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout
    assert build(read(printed.decode().split("\0")[:-1])) == made
