"""The measured trainings are those of a run, and the loop beside them does the same job."""

import json
import signal

import numpy as np
import pytest
import torch

from richkd import bench, checkpoint, distill, models
from richkd.__main__ import ABOUT, VERBS
from richkd.bench import floors, show
from richkd.bench.reference import Reference
from richkd.bench.variants import Variant, open_loops, wanted
from richkd.command import main
from richkd.config import Config
from richkd.data import load
from richkd.errors import ConfigError, Interrupted
from richkd.layers import build, read
from richkd.steps import LOSS, Slice, Steps

NAMES = ["student", "kd", "richkd-l", "reference"]
DEFAULT = [*NAMES[:3], "kd+table", "richkd-l+table", "richkd-l+table+bf16", "reference"]
PLAIN = [Variant(name) for name in NAMES[:3]]


@pytest.fixture(autouse=True)
def _a_short_look_at_the_machine(monkeypatch):
    monkeypatch.setattr(floors, "SECONDS", 0.01)


@pytest.fixture(scope="module")
def logits(tmp_path_factory) -> str:
    """Logits of the digits that are mostly right, for a teacher of either kind."""
    labels = load(build(read([])).data).train.labels
    found = np.random.default_rng(0).normal(size=(len(labels), 10)).astype(np.float32)
    found[np.arange(len(labels)), labels] += 4
    path = tmp_path_factory.mktemp("logits") / "logits.npy"
    np.save(path, found)
    return str(path)


@pytest.fixture(scope="module")
def words(logits, tmp_path_factory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return [
        *("train.epochs=2", "teacher.epochs=4", "device=cpu"),
        *(f"clip.logits={logits}", f"cache={cache}"),
    ]


@pytest.fixture(scope="module")
def make(words):
    def config(*overrides: str) -> Config:
        return build(read([*words, *overrides]))

    return config


def weights(variant: bench.Ours | Reference) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in variant.student.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.filterwarnings("ignore:teacher.checkpoint is right on")
@pytest.mark.parametrize("rows", ["labelled", "unlabelled", "mixed"])
@pytest.mark.parametrize("method", ["kd", "richkd-l"])
@pytest.mark.parametrize("teacher", ["trained", "given", "of another normalisation"])
def test_the_references_loss_is_that_of_our_step(make, logits, tmp_path, method, rows, teacher):
    torch.save(models.build("cnn24", 10, channels=1).state_dict(), tmp_path / "weights.pt")
    overrides = {
        "trained": [],
        "given": [f"teacher.logits={logits}"],
        "of another normalisation": [
            *(f"teacher.checkpoint={tmp_path / 'weights.pt'}", "teacher.name=cnn24"),
            *("teacher.mean=[0.2]", "teacher.std=[0.5]"),
        ],
    }
    config = make(f"method.name={method}", *overrides[teacher])
    task = distill.open_task(config)
    fused = distill.open_teacher(config, task)
    known = torch.from_numpy(task.split.labels[task.split.transfer] >= 0)
    some = torch.from_numpy(task.split.transfer)
    some = {
        "labelled": some[known][:32],
        "unlabelled": some[~known][:32],
        "mixed": torch.cat([some[known][:5], some[~known][:27]]),
    }[rows]
    labels = torch.from_numpy(task.split.labels)[some]
    views = task.train.draw(32, torch.Generator().manual_seed(1))
    images = task.train.images(some, views)
    learner = distill.open_learner(config, task, fused).train()
    batches = distill.open_batches(config, task, distilled=True)
    steps = Steps(config, learner, fused, distill.open_optimizer(config, learner), batches)
    known = (labels >= 0).sum()
    part = Slice(some, labels, views, fused.said(some, views).target, known, len(some))
    ours = steps.values(part)[0][LOSS]
    theirs = Reference(config, task, fused).loss(images.contiguous(), labels, some)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.parametrize(
    "augmentation", [[], ["data.flip=true", "data.pad=2"], ["data.pad=0"]], ids=str
)
def test_the_references_pictures_are_our_views(make, augmentation):
    config = make(*augmentation)
    task = distill.open_task(config)
    reference = Reference(config, task, distill.open_teacher(config, task))
    images, labels, rows = next(reference.batches)
    assert len(rows) == config.train.batch_size
    assert labels.tolist() == task.split.labels[rows].tolist()
    crops = range(2 * task.train.pad + 1)
    views = [(dy, dx, flip) for dy in crops for dx in crops for flip in range(task.train.flips)]
    apart = []
    for view in views:
        ours = task.train.images(rows, torch.tensor(view).expand(len(rows), 3))
        apart.append((ours - images).abs().amax((1, 2, 3)))
    apart = torch.stack(apart)
    assert apart.amin(0).max() < 1e-5
    assert len(apart.argmin(0).unique()) > 1 or len(views) == 1


@pytest.mark.parametrize(
    ("variant", "method"), [("student", "ce"), ("kd", "kd"), ("richkd-l", "richkd-l")]
)
def test_a_variant_takes_the_steps_of_a_run_whatever_runs_between_them(
    make, tmp_path, variant, method
):
    config = make()
    task = distill.open_task(config)
    variants = open_loops(config, task, PLAIN)
    network = variants["kd"].teacher.task.network
    taught = {name: value.clone() for name, value in network.state_dict().items()}
    seen, rows = 0, config.train.epochs * variants[variant].steps.batches.rows
    while seen < rows:
        seen += variants[variant].burst(1)
        variants["reference"].burst(1)
    assert same(taught, network.state_dict())
    assert not any(value.requires_grad for value in network.parameters())
    outcome = distill.run(make(f"method.name={method}"), tmp_path / "run")
    assert same(checkpoint.load(outcome.folder / "last").weights, weights(variants[variant]))
    assert seen == rows
    variants[variant].burst(1)  # where a run would have ended a measurement goes on


def test_variants_start_alike_and_have_students_of_their_own(make):
    config = make()
    variants = open_loops(config, distill.open_task(config), PLAIN)
    assert list(variants) == [*NAMES, "fill", "augment", "pil"]
    before = weights(variants["student"])
    assert all(same(before, weights(variants[name])) for name in NAMES)
    for trained in NAMES[1:]:
        variants[trained].burst(1)
        assert not same(before, weights(variants[trained]))
        assert same(before, weights(variants["student"]))


@pytest.mark.parametrize("settings", [[], ["method.name=ce"], ["clip.scale=calibrated"]], ids=str)
def test_what_is_measured_does_not_depend_on_the_method_of_the_config(make, settings):
    for method in ("ce", "kd", "richkd-l"):
        wanted = make(f"method.name={method}")
        assert bench.of_method(make(*settings), method) == wanted


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("kd", ["kd"]),
        ("kd+table,richkd-l+live+table", ["kd+table", "richkd-l+table+live"]),
        ("student+bf16,student+bf16", ["student+bf16"]),
    ],
)
def test_variants_are_those_named(make, names, found):
    assert [str(each) for each in wanted(make(), names)] == found


@pytest.mark.parametrize(
    ("names", "error"),
    [
        ("", "but got ''"),
        ("ce", "must be of student, kd, richkd-l"),
        ("kd+fast", "any of \\+table, \\+bf16, \\+live"),
        ("kd+", "but got 'kd\\+'"),
        ("reference", "but got 'reference'"),
        ("student+table", "student has no such teacher"),
        ("kd+table+live", "asks for \\+live, but kd has no such teacher"),
    ],
)
def test_variants_that_are_none_are_refused(make, names, error):
    with pytest.raises(ConfigError, match=error):
        wanted(make(), names)


def test_a_variant_is_a_run_with_some_keys_changed(make):
    config = make("train.precision=bf16", "teacher.views=exact", "method.name=ce")
    plain = make("train.precision=fp32", "teacher.views=online", "method.name=kd")
    assert Variant.named("kd").config(config) == plain
    found = Variant.named("kd+bf16+table").config(config)
    assert (found.train.precision, found.teacher.views) == ("bf16", "exact")
    config = make("clip.logits=null", "clip.views=2")
    assert Variant.named("richkd-l").config(config).clip.views == "whole"
    assert Variant.named("richkd-l+live").config(config).clip.views == "online"


def test_a_full_table_is_asked_for_nothing_new(make):
    config = make("train.epochs=3")
    task = distill.open_task(config)
    ours = open_loops(config, task, [Variant.named("kd+table")])["kd+table"]
    table = ours.teacher.task.table
    before = table.known()
    assert before > 0
    for _ in range(3):
        ours.burst(20)
    assert table.known() == before


def test_table_12_has_clip_live_and_cached(miniature, cache_root, logits, capsys):
    words = [f"cache={cache_root}", f"teacher.logits={logits}", "device=cpu"]
    flags = ["--seconds=0.1", "--variants=kd,richkd-l", "--table12", "--json"]
    assert main("richkd", ABOUT, VERBS, ["bench", *words, *flags]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])
    assert list(found["variants"]) == ["kd", "richkd-l", "richkd-l+live", "reference"]
    cached, live = found["variants"]["richkd-l"], found["variants"]["richkd-l+live"]
    assert live["memory"] > cached["memory"] + 4e6  # the miniature's 1.4 million weights
    more = found["work"]["clip"]["flops"] / found["rates"]["fp32"]
    assert live["floor"]["flops"] == pytest.approx(cached["floor"]["flops"] + more)
    lines = told.err.splitlines()
    first = next(k for k, line in enumerate(lines) if "Table 12" in line)
    shown = [line.split()[0] for line in lines[first + 2 : first + 6]]
    assert shown == list(found["variants"])


def test_live_clip_is_measured_where_it_is_asked_for_alone(make):
    assert [str(each) for each in wanted(make())] == DEFAULT[:-1]
    live = [str(each) for each in wanted(make(), "kd", live=True)]
    assert live == ["kd", "richkd-l", "richkd-l+live"]


def test_a_teacher_of_given_logits_has_no_table(make, logits):
    named = [str(each) for each in wanted(make(f"teacher.logits={logits}"))]
    assert named == ["student", "kd", "richkd-l", "richkd-l+bf16"]


@pytest.mark.parametrize("teacher", ["trained", "given"])
def test_all_is_measured_and_the_global_generator_is_left_alone(make, logits, teacher):
    config = make(*([f"teacher.logits={logits}"] if teacher == "given" else []))
    variants = wanted(config)
    before, told = torch.get_rng_state(), []
    found = bench.measure(config, variants, 0.5, lambda *progress: told.append(progress))
    assert torch.equal(before, torch.get_rng_state())
    assert list(found["variants"]) == [*map(str, variants), "reference"]
    for own in found["variants"].values():
        assert 0 < own["low"] <= own["images_per_second"] <= own["high"]
        assert min(own["ratio"], own["memory"], own["floor"]["images_per_second"]) > 0
        assert own["floor"]["binds"] in ("flops", "bytes")
    assert found["variants"]["reference"]["ratio"] == 1
    assert found["rounds"] >= bench.LEAST_ROUNDS
    names = ["richkd-l/reference:bf16", "richkd-l/reference:fp32", "richkd-l/kd", "augment/pil"]
    assert list(found["ratios"]) == list(found["errors"]) == names
    assert list(found["parts"]) == ["fill"] * (teacher == "trained") + ["augment", "pil"]
    assert list(found["work"]) == ["student"] + ["teacher"] * (teacher == "trained")
    assert bool(found["computed"]) == (teacher == "trained")
    assert (found["device"], found["threads"]) == ("cpu", torch.get_num_threads())
    assert (found["data"], found["size"], found["batch_size"]) == ("digits", [8, 8], 32)
    assert found["teacher"] == ("given logits" if teacher == "given" else "cnn24")
    assert ("measurement", 100, 100) in told
    assert json.loads(json.dumps(found)) == found


def test_ratios_of_what_was_not_measured_are_left_out(make):
    found = bench.measure(make(), wanted(make(), "kd"), 0.1)
    assert list(found["variants"]) == ["kd", "reference"]
    assert list(found["ratios"]) == ["augment/pil"]
    assert found["computed"] == {}


def test_medians_quartiles_and_ratios_are_those_of_the_rounds(make, monkeypatch):
    rounds = {"kd+table": 40.0, "richkd-l+table": 50.0, "reference": 10.0, "augment": 90.0}
    names, asked = {}, {}

    def opened(*given):
        loops = open_loops(*given)
        names.update({id(loop): name for name, loop in loops.items()})
        return loops

    def speed(loop, steps, device):
        name = names[id(loop)]
        asked[name] = asked.get(name, 0) + 1
        return rounds.get(name, 30.0) * asked[name] ** 2  # each time faster

    monkeypatch.setattr(bench, "open_loops", opened)
    monkeypatch.setattr(bench, "speed", speed)
    found = bench.measure(make(), wanted(make()), 1e-9)
    assert found["rounds"] == bench.LEAST_ROUNDS == 3
    student = found["variants"]["student"]
    assert (student["low"], student["images_per_second"], student["high"]) == (75, 120, 195)
    assert student["ratio"] == pytest.approx(3)
    rows = found["variants"]["student"]["seconds_per_epoch"] * 120
    assert found["variants"]["reference"]["seconds_per_epoch"] == pytest.approx(rows / 40)
    assert found["ratios"]["richkd-l/kd"] == pytest.approx(50 / 40)
    assert found["errors"]["richkd-l/kd"] == pytest.approx(0)
    assert asked["kd+table"] == asked["richkd-l+table"] == 6
    assert found["ratios"]["augment/pil"] == pytest.approx(3)


def test_the_error_of_a_ratio_is_that_of_a_median():
    draws = np.random.default_rng(0).normal(10, 1, size=(2000, 101))
    medians, errors = zip(*(bench.ratio([(each, 1) for each in own]) for own in draws), strict=True)
    assert np.mean(errors) == pytest.approx(np.std(medians), rel=0.1)


def test_the_views_that_occur_are_those_of_random_draws():
    generator = np.random.default_rng(0)
    drawn = generator.integers(162, size=(2000, 240))
    occurred = np.mean([len(np.unique(row)) for row in drawn])
    assert bench.filled(torch.tensor([240]), 162) == pytest.approx(occurred, rel=2e-3)
    both = bench.filled(torch.tensor([1, 0, 3]), 1)
    assert both == 2  # an image with one view needs one row, if it is drawn at all


def test_a_first_run_and_a_sweep_are_computed_from_rates(make):
    config = make("data.labelled_per_class=null", "data.labelled_share=null", "data.flip=true")
    task = distill.open_task(config)
    rows = len(task.split.transfer)
    variants = {
        "richkd-l+table": {"seconds_per_epoch": 10.0},
        "reference": {"seconds_per_epoch": 50.0},
    }
    order = torch.cat(distill.open_batches(config, task, distilled=True).order(0))
    parts = {"fill": {"images_per_second": 20.0}}
    found = bench.computed(config, task, order, variants, parts)
    fills = 18 * (1 - (1 - 1 / 18) ** 2)  # 3 x 3 crops, two flips, two epochs
    filling = fills * rows / 20 / 2
    assert (found["epochs"], found["views"]) == (2, 18)
    assert found["fills"] == pytest.approx(fills)
    assert found["first_run"] == pytest.approx(50 / (10 + filling))
    assert found["sweep_of_10"] == pytest.approx(50 / (10 + filling / 10))
    assert found["seconds_per_epoch"]["first_run"] == pytest.approx(10 + filling)
    variants["richkd-l+table+bf16"] = {"seconds_per_epoch": 5.0}
    found = bench.computed(config, task, order, variants, parts)
    assert found["variant"] == "richkd-l+table+bf16"
    assert found["first_run"] == pytest.approx(50 / (5 + filling))


def test_lines_fit_80_columns_also_with_long_names_and_numbers():
    own = {
        "images_per_second": 123456.78,
        "low": 100000.0,
        "high": 200000.0,
        "ratio": 123.4,
        "memory": 70 * 2**30,
        "seconds_per_epoch": 12345.6,
        "floor": {"images_per_second": 1234567.8, "binds": "launches"},
    }
    names = [*DEFAULT, "richkd-l+live", "richkd-l+table+bf16+live"]
    ratios = ["richkd-l/reference:bf16", "richkd-l/reference:fp32", "richkd-l/kd", "augment/pil"]
    found = {
        "device": "cuda",
        "device_name": "A Device With a Rather Long Name, 80GB HBM3",
        "threads": 16,
        "cores": 128,
        "versions": {
            "torch": "2.14.1+cu130",
            "torchvision": "0.29.1+cu130",
            "pillow": "13.0.0",
            "python": "3.12.10",
        },
        "rates": {"fp32": 5e13, "tf32": 4e14, "bf16": 8e14, "copy": 4e12, "launches": 1e6},
        "data": "photographs-of-many-things",
        "size": [224, 224],
        "student": "timm/mobilenetv4_conv_small.e2400_r224_in1k",
        "teacher": "runs/" + 90 * "x",
        "clip": "ViT-H-14-378-quickgelu",
        "batch_size": 1024,
        "rounds": 10,
        "variants": {name: own for name in names},
        "parts": {name: own for name in ("fill", "augment", "pil")},
        "ratios": dict.fromkeys(ratios, 123.456789),
        "errors": dict.fromkeys(ratios, 12.3456),
        "computed": {
            "epochs": 240,
            "views": 162,
            "fills": 125.3,
            "variant": "richkd-l+table+bf16",
            "first_run": 2.2,
            "sweep_of_10": 4.5,
            "seconds_per_epoch": {"first_run": 12345.6, "sweep_of_10": 1234.5},
        },
    }
    lines = [*show.table(found), *show.table12(found)]
    assert max(map(len, lines)) <= 80
    for name in names:
        assert sum(line.split(" ")[0] == name for line in lines) == 2
    shown = {line.split()[0]: line.split()[1:] for line in lines[-len(names) :]}
    assert shown["kd"][2:] == ["7", "2.278"]
    assert shown["richkd-l+live"] == ["12346", "70", "41", "3.048"]
    assert len(shown["richkd-l"]) == 2  # the paper has no time with CLIP cached


def test_json_is_the_last_line(words, capsys):
    arguments = ["bench", *words, "--seconds=0.1", "--variants=kd", "--json"]
    assert main("richkd", ABOUT, VERBS, arguments) == 0
    told = capsys.readouterr()
    assert list(json.loads(told.out.splitlines()[-1])["variants"]) == ["kd", "reference"]
    assert "images/s" in told.err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "a minute", ""])
def test_seconds_that_are_none_are_refused(seconds, capsys):
    assert main("richkd", ABOUT, VERBS, ["bench", f"--seconds={seconds}"]) == 2
    assert f"--seconds must be a positive number but got {seconds!r}" in capsys.readouterr().err


@pytest.mark.parametrize("after", [0, 2, 6])
def test_a_signal_ends_a_measurement_between_two_bursts(make, after):
    config, asked = make(), 0
    bench.measure(config, PLAIN, 0.1)  # so that nothing is prepared below

    def stop() -> int | None:
        nonlocal asked
        asked += 1
        return signal.SIGINT if asked > after else None

    before = torch.get_rng_state()
    with pytest.raises(Interrupted, match="measuring") as caught:
        bench.measure(config, PLAIN, 0.1, stop=stop)
    assert caught.value.exit_code == 130
    assert asked == after + 1
    assert torch.equal(before, torch.get_rng_state())
