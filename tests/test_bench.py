"""The measured trainings are those of a run, and the loop beside them does the same job."""

import json
import signal

import numpy as np
import pytest
import torch

from richkd import bench, checkpoint, distill, models
from richkd.__main__ import ABOUT, VERBS
from richkd.command import main
from richkd.config import Config, build, read
from richkd.data import load
from richkd.errors import Interrupted
from richkd.steps import Slice, Steps

NAMES = ["student", "kd", "richkd-l", "reference"]


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


def weights(variant: bench.Ours | bench.Reference) -> dict[str, torch.Tensor]:
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
    student = distill.open_student(config, task).train()
    batches = distill.open_batches(config, task, distilled=True)
    steps = Steps(config, student, fused, distill.open_optimizer(config, student), batches)
    known = (labels >= 0).sum()
    part = Slice(some, labels, views, fused.target(some, views), known, len(some))
    ours = steps.values(part)[2]
    theirs = bench.Reference(config, task, fused).loss(images.contiguous(), labels, some)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)


@pytest.mark.parametrize(
    "augmentation", [[], ["data.flip=true", "data.pad=2"], ["data.pad=0"]], ids=str
)
def test_the_references_pictures_are_our_views(make, augmentation):
    config = make(*augmentation)
    task = distill.open_task(config)
    reference = bench.Reference(config, task, distill.open_teacher(config, task))
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
    variants = bench.open_variants(config, task)
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
    variants = bench.open_variants(config, distill.open_task(config))
    assert list(variants) == NAMES
    before = weights(variants["student"])
    assert all(same(before, weights(variant)) for variant in variants.values())
    for trained in NAMES[1:]:
        variants[trained].burst(1)
        assert not same(before, weights(variants[trained]))
        assert same(before, weights(variants["student"]))


@pytest.mark.parametrize("settings", [[], ["method.name=ce"], ["clip.scale=calibrated"]], ids=str)
def test_what_is_measured_does_not_depend_on_the_method_of_the_config(make, settings):
    for method in ("ce", "kd", "richkd-l"):
        wanted = make(f"method.name={method}")
        assert bench.of_method(make(*settings), method) == wanted


@pytest.mark.parametrize("teacher", ["trained", "given"])
def test_every_variant_has_a_speed_and_the_global_generator_is_left_alone(make, logits, teacher):
    config = make(*([f"teacher.logits={logits}"] if teacher == "given" else []))
    before, told = torch.get_rng_state(), []
    found = bench.measure(config, 0.5, lambda *progress: told.append(progress))
    assert torch.equal(before, torch.get_rng_state())
    assert list(found["variants"]) == NAMES
    for own in found["variants"].values():
        assert 0 < own["low"] <= own["images_per_second"] <= own["high"]
        assert own["ratio"] > 0
    assert found["variants"]["reference"]["ratio"] == 1
    assert found["rounds"] >= bench.LEAST_ROUNDS
    assert (found["device"], found["threads"]) == ("cpu", torch.get_num_threads())
    assert (found["data"], found["size"], found["batch_size"]) == ("digits", [8, 8], 32)
    assert found["teacher"] == ("given logits" if teacher == "given" else "cnn24")
    assert ("measurement", 100, 100) in told


def test_median_quartiles_and_ratio_are_those_of_the_rounds():
    found = bench.summary([10.0, 20.0, 30.0, 40.0, 100.0], [10.0, 10.0, 10.0, 10.0, 100.0])
    assert found == {"images_per_second": 30, "low": 20, "high": 40, "ratio": 2}


def test_a_table_fits_80_columns_also_with_long_names():
    own = {"images_per_second": 123456.78, "low": 100000.0, "high": 200000.0, "ratio": 123.4}
    found = {
        "device": "cuda",
        "device_name": "A Device With a Rather Long Name, 80GB HBM3",
        "threads": 16,
        "torch": "2.14.1+cu130",
        "data": "photographs-of-many-things",
        "size": [224, 224],
        "student": "timm/mobilenetv4_conv_small.e2400_r224_in1k",
        "teacher": "runs/" + 90 * "x",
        "clip": "ViT-H-14-378-quickgelu",
        "batch_size": 1024,
        "rounds": 10,
        "variants": {name: own for name in NAMES},
    }
    lines = bench.table(found)
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[-5:-1]] == NAMES


def test_json_is_the_last_line(words, capsys):
    assert main("richkd", ABOUT, VERBS, ["bench", *words, "--seconds=0.1", "--json"]) == 0
    told = capsys.readouterr()
    assert list(json.loads(told.out.splitlines()[-1])["variants"]) == NAMES
    assert "against reference" in told.err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "a minute", ""])
def test_seconds_that_are_none_are_refused(seconds, capsys):
    assert main("richkd", ABOUT, VERBS, ["bench", f"--seconds={seconds}"]) == 2
    assert f"--seconds must be a positive number but got {seconds!r}" in capsys.readouterr().err


@pytest.mark.parametrize("after", [0, 2, 6])
def test_a_signal_ends_a_measurement_between_two_bursts(make, after):
    config, asked = make(), 0
    bench.measure(config, 0.1)  # so that nothing is prepared below

    def stop() -> int | None:
        nonlocal asked
        asked += 1
        return signal.SIGINT if asked > after else None

    before = torch.get_rng_state()
    with pytest.raises(Interrupted, match="measuring") as caught:
        bench.measure(config, 0.1, stop=stop)
    assert caught.value.exit_code == 130
    assert asked == after + 1
    assert torch.equal(before, torch.get_rng_state())
