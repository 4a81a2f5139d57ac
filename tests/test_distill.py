"""One run from start to end on the digits, with zero-shot logits made up from the labels."""

import contextlib
import json
import math
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from richkd import checkpoint, distill, load_student
from richkd.config import Config
from richkd.data import load
from richkd.errors import ConfigError, CorruptError, DataError, Interrupted, NonFiniteError
from richkd.evaluate import accuracy
from richkd.layers import build, read
from richkd.record import newest
from richkd.teachers import teacher_recipe


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """Zero-shot logits that are right on four rows in five."""
    labels = load(build(read([])).data).train.labels
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(labels), 10))
    told = np.where(rng.random(len(labels)) < 0.8, labels, rng.integers(10, size=len(labels)))
    logits[np.arange(len(labels)), told] += 4
    path = tmp_path_factory.mktemp("clip") / "clip.npy"
    np.save(path, logits.astype(np.float32))
    return str(path)


@pytest.fixture(scope="module")
def make(clip, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def config(*overrides: str) -> Config:
        short = ["train.epochs=3", "teacher.epochs=4", f"clip.logits={clip}", f"cache={cache}"]
        return build(read([*short, *overrides]))

    return config


def weights(folder: Path) -> bytes:
    return (folder / "last" / "weights.safetensors").read_bytes()


def lines(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]


def test_richkd_at_alpha_one_is_plain_distillation_bit_for_bit(make, tmp_path):
    distill.run(make("fusion.alpha=1"), tmp_path / "richkd")
    distill.run(make("method.name=kd"), tmp_path / "kd")
    assert weights(tmp_path / "richkd") == weights(tmp_path / "kd")
    assert lines(tmp_path / "richkd") == lines(tmp_path / "kd")


def test_a_runs_numbers_do_not_depend_on_what_ran_before(make, tmp_path):
    distill.run(make(), tmp_path / "first")
    distill.run(make("seed=7", "method.name=ce"), tmp_path / "between")
    torch.manual_seed(12345)
    np.random.seed(1)
    distill.run(make(), tmp_path / "again")
    assert weights(tmp_path / "first") == weights(tmp_path / "again")
    assert lines(tmp_path / "first") == lines(tmp_path / "again")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_changes_the_run(make, tmp_path, seed):
    distill.run(make(f"seed={seed}"), tmp_path / "one")
    distill.run(make(f"seed={seed + 1}"), tmp_path / "other")
    assert weights(tmp_path / "one") != weights(tmp_path / "other")


@pytest.mark.parametrize("after", [0, 1, 25, 40])
def test_an_interrupted_run_goes_on_to_the_same_bits(make, tmp_path, after):
    distill.run(make(), tmp_path / "straight")
    asked = iter(range(10_000))

    def stop() -> int | None:
        return signal.SIGINT if started and next(asked) >= after else None

    started = True
    with pytest.raises(Interrupted) as caught:
        distill.run(make(), tmp_path / "run", stop=stop)
    assert caught.value.exit_code == 130
    assert checkpoint.exists(tmp_path / "run" / "last")
    distill.run(make(), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert lines(tmp_path / "run") == lines(tmp_path / "straight")


class Died(BaseException):
    """What nobody catches: the process is gone."""


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("before", ["last", "best", "line", "torn line", "report"])
def test_a_run_that_died_between_two_writes_goes_on(make, tmp_path, monkeypatch, before, epoch):
    straight = distill.run(make(), tmp_path / "straight")
    folder = tmp_path / "run"
    save = checkpoint.save

    def dying(target: Path, weights: dict, state: dict, meta: dict) -> None:
        if target.name == before and meta["epoch"] == epoch:
            raise Died
        save(target, weights, state, meta)
        if target.name == "last" and before.endswith("line") and meta["epoch"] == epoch:
            better = meta["best"]["epoch"] == epoch
            if better:
                save(folder / "best", weights, {}, meta)
            if before == "torn line":
                with open(folder / "metrics.jsonl", "a") as file:
                    file.write('{"epoch": 3, "torn')
            raise Died

    def report(metrics: dict, _: Path) -> None:
        if before == "report" and metrics["epoch"] == epoch:
            raise Died

    monkeypatch.setattr(checkpoint, "save", dying)
    is_best = {
        row["epoch"]: row["val/top1"] == row["best_val_top1"]
        for row in lines(tmp_path / "straight")
    }
    assert before != "best" or is_best[epoch]  # else nothing would die
    with pytest.raises(Died):
        distill.run(make(), folder, report=report)
    monkeypatch.undo()
    again = distill.run(make(), folder, resume=True)
    assert lines(folder) == lines(tmp_path / "straight")
    for name in ("last", "best"):
        one, other = (checkpoint.load(f / name) for f in (folder, tmp_path / "straight"))
        assert one.sha256 == other.sha256
        assert one.meta["epoch"] == other.meta["epoch"]
    assert timeless(again.metrics) == timeless(straight.metrics)


def test_a_finished_run_resumed_trains_no_more(make, tmp_path):
    first = distill.run(make(), tmp_path / "run")

    def refuse(*_: object) -> None:
        raise AssertionError("an epoch ran again")

    again = distill.run(make(), tmp_path / "run", resume=True, report=refuse)
    assert again.metrics == first.metrics


def test_epochs_that_were_not_heard_of_are_reported_again_and_each_once(make, tmp_path):
    config, straight = make("train.epochs=5"), {}
    distill.run(
        config, tmp_path / "straight", report=lambda row, _: straight.update({row["epoch"]: row})
    )

    def cut(metrics: dict, _: Path) -> None:
        if metrics["epoch"] == 3:
            raise Died

    for heard, expected in {0: [1, 2, 3, 4, 5], 2: [3, 4, 5], None: [4, 5], 4: [5]}.items():
        folder, again = tmp_path / f"run-{heard}", []
        with pytest.raises(Died):
            distill.run(config, folder, report=cut)
        distill.run(
            *(config, folder),
            resume=True,
            heard=heard,
            report=lambda metrics, _, again=again: again.append(metrics),
        )
        assert [row["epoch"] for row in again] == expected
        assert all(row["val/top1"] == straight[row["epoch"]]["val/top1"] for row in again)


@pytest.fixture(scope="module")
def pair(make, tmp_path_factory) -> list[Path]:
    """Return the folders of two single runs, of seeds 3 and 4."""
    folders = [tmp_path_factory.mktemp("single") / str(seed) for seed in (3, 4)]
    for seed, folder in zip((3, 4), folders, strict=True):
        distill.test(distill.run(make(f"seed={seed}"), folder))
    return folders


def timeless(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if k not in ("seconds", "images_per_second")}


def check_pair(pair: list[Path], folder: Path, reported: list[dict]) -> None:
    """Check two seeds side by side against two single runs: their bytes, and the means of what was reported."""
    for k, single in enumerate(pair):
        for name in ("last", "best"):
            file = Path(name) / "weights.safetensors"
            assert (folder / f"seed{k}" / file).read_bytes() == (single / file).read_bytes()
        assert lines(folder / f"seed{k}") == lines(single)
    for row, one, other in zip(map(timeless, reported), *map(lines, pair), strict=True):
        assert row.pop("epoch") == one["epoch"]
        spread = abs(one["val/top1"] - other["val/top1"]) / math.sqrt(2)
        assert math.isclose(row.pop("val/top1_sd"), spread, rel_tol=1e-12, abs_tol=1e-12)
        assert row == {k: (one[k] + other[k]) / 2 for k in one if k != "epoch"}


def test_seeds_side_by_side_are_the_single_runs_and_report_their_mean(make, pair, tmp_path):
    reported: list[dict] = []
    outcomes = distill.run_seeds(
        make("seed=3"), tmp_path, 2, report=lambda metrics, _: reported.append(metrics)
    )
    check_pair(pair, tmp_path, reported)
    assert outcomes[0].task.train is outcomes[1].task.train  # one copy of the pixels
    tested = distill.mean([distill.test(outcome) for outcome in outcomes])
    alone = [json.loads((folder / "run.json").read_text())["metrics"] for folder in pair]
    assert set(tested) >= {"test/top1", "test/loss", "teacher/top1"}
    assert tested == {key: (alone[0][key] + alone[1][key]) / 2 for key in tested}


@pytest.mark.parametrize("died", [("seed0", "last"), ("seed1", "last"), ("seed1", "best")])
def test_seeds_that_a_kill_left_an_epoch_apart_catch_up(make, pair, tmp_path, monkeypatch, died):
    save = checkpoint.save
    epoch = checkpoint.load(pair[1] / "best").meta["epoch"] if died[1] == "best" else 2

    def dying(target: Path, weights: dict, state: dict, meta: dict) -> None:
        if (target.parent.name, target.name) == died and meta["epoch"] == epoch:
            raise Died
        save(target, weights, state, meta)

    reported: dict[int, dict] = {}
    report = lambda metrics, _: reported.update({metrics["epoch"]: metrics})  # noqa: E731
    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(Died):
        distill.run_seeds(make("seed=3"), tmp_path, 2, report=report)
    monkeypatch.undo()
    assert list(reported) == list(range(1, epoch))
    reached = [newest(tmp_path / f"seed{k}") for k in range(2)]
    assert reached == {"seed0": [1, 1], "seed1": [epoch, epoch - (died[1] == "last")]}[died[0]]
    assert newest(tmp_path, 2) == min(reached)
    again: list[dict] = []
    distill.run_seeds(
        *(make("seed=3"), tmp_path, 2),
        resume=True,
        heard=epoch - 1,
        report=lambda metrics, _: again.append(metrics),
    )
    check_pair(pair, tmp_path, [*reported.values(), *again])


def test_a_report_that_raises_ends_all_seeds_at_one_epoch(make, tmp_path):
    def report(metrics: dict, _: Path) -> None:
        if metrics["epoch"] == 2:
            raise Died

    with pytest.raises(Died):
        distill.run_seeds(make(), tmp_path, 3, report=report)
    assert [newest(tmp_path / f"seed{k}") for k in range(3)] == [2, 2, 2]


def test_a_run_folder_is_not_written_twice(make, tmp_path):
    distill.run(make(), tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run already"):
        distill.run(make(), tmp_path / "run")
    with pytest.raises(ConfigError, match="other settings"):
        distill.run(make("train.lr=0.01"), tmp_path / "run", resume=True)


HOLDER = """
import sys, time
from pathlib import Path
from richkd.record import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen]:
    """Let another process hold a run folder."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_run_folder_has_one_writer(make, tmp_path):
    config = make("method.name=ce", "train.epochs=1")
    with holder(tmp_path / "run") as process:
        with pytest.raises(ConfigError, match=f"{tmp_path}/run must have one writer"):
            distill.run(config, tmp_path / "run", resume=True, wait=0.1)
        assert not (tmp_path / "run" / "run.json").exists()
        killer = threading.Timer(1, process.kill)
        killer.start()
        began = time.monotonic()
        distill.run(config, tmp_path / "run", wait=30)  # until its holder dies
        assert 0.5 < time.monotonic() - began < 30
        assert process.wait() == -signal.SIGKILL


def test_a_run_that_ended_leaves_its_folder_though_its_error_is_kept(make, tmp_path):
    config = make("method.name=ce", "train.epochs=2")

    def report(metrics: dict, _: Path) -> None:
        with pytest.raises(ConfigError, match="must have one writer"):
            distill.run(config, tmp_path / "run", resume=True, wait=0.1)
        raise Died

    with pytest.raises(Died) as kept:
        distill.run(config, tmp_path / "run", report=report)
    outcome = distill.run(config, tmp_path / "run", resume=True, wait=0.1)
    assert outcome.metrics["epoch"] == 2
    assert kept.tb is not None  # and with it the frames of the run that raised


def test_a_run_that_another_began_meanwhile_is_not_overwritten(make, tmp_path, monkeypatch):
    config = make("method.name=ce", "train.epochs=1")
    opened = distill.open_student

    def slowly(*arguments: object) -> torch.nn.Module:
        monkeypatch.setattr(distill, "open_student", opened)
        distill.run(config, tmp_path / "run")
        return opened(*arguments)

    monkeypatch.setattr(distill, "open_student", slowly)
    with pytest.raises(ConfigError, match="holds a run already"):
        distill.run(config, tmp_path / "run")


@pytest.mark.parametrize("spoilt", ["", '{"epoch": 1, "to\n', '{"epoch": 2}\n', "[1]\n"])
def test_metrics_that_were_lost_are_named(make, tmp_path, spoilt):
    config = make("method.name=ce", "train.epochs=2")
    distill.run(config, tmp_path)
    (tmp_path / "metrics.jsonl").write_text(spoilt)
    with pytest.raises(CorruptError, match=r"metrics.jsonl must have a line for each of 2 epochs"):
        distill.run(config, tmp_path, resume=True)


def test_a_run_does_not_go_on_with_another_teacher_under_the_same_name(make, clip, tmp_path):
    path = tmp_path / "clip.npy"
    np.save(path, np.load(clip))
    distill.run(make(f"clip.logits={path}"), tmp_path / "run")
    np.save(path, 2 * np.load(clip))
    with pytest.raises(ConfigError, match="made with other teachers"):
        distill.run(make(f"clip.logits={path}"), tmp_path / "run", resume=True)


def test_the_best_epoch_is_the_one_with_the_highest_validation_accuracy(make, tmp_path):
    outcome = distill.run(make("train.epochs=6"), tmp_path / "run")
    rows = lines(tmp_path / "run")
    best = max(rows, key=lambda row: (row["val/top1"], -row["val/loss"]))
    assert checkpoint.load(tmp_path / "run" / "best").meta["epoch"] == best["epoch"]
    assert outcome.metrics["best_val_top1"] == best["val/top1"]


def test_divergence_names_epoch_step_and_term_and_is_never_the_best(make, tmp_path):
    with pytest.raises(
        NonFiniteError, match=r"loss\w* is .* at step \d+ of epoch 1; lower train.lr"
    ):
        distill.run(make("train.lr=100", "loss.logit=1000000"), tmp_path / "run")
    assert not checkpoint.exists(tmp_path / "run" / "best")
    saved = checkpoint.load(tmp_path / "run" / "last")
    assert all(value.isfinite().all() for value in saved.weights.values())


def test_without_a_target_unlabelled_rows_take_no_part(make, tmp_path):
    outcome = distill.run(make("method.name=ce"), tmp_path / "ce")
    assert outcome.teacher is None
    rows = lines(tmp_path / "ce")
    assert all(row["train/loss"] == row["train/loss_ce"] for row in rows)
    fused = distill.run(make(), tmp_path / "fused")
    assert len(fused.task.split.labelled) == 50
    assert len(fused.task.split.transfer) == 597


def test_the_trained_teacher_is_trained_once_a_seed(make, tmp_path, monkeypatch):
    config = make("teacher.epochs=2")
    task = distill.open_task(config)
    first = distill.trained_teacher(config, task)
    monkeypatch.setattr(distill, "run", None)  # training again would call it
    assert distill.trained_teacher(make("teacher.epochs=2", "fusion.alpha=0.2"), task) == first


def test_the_trained_teacher_does_not_depend_on_the_number_of_threads(make, tmp_path):
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        config = make("teacher.epochs=1", f"cache={tmp_path / str(threads)}")
        saved = checkpoint.load(distill.trained_teacher(config, distill.open_task(config)))
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
        found.append(saved.sha256)
    assert found[0] == found[1]


@pytest.mark.parametrize("key", ["train.batch_size=16", "train.weight_decay=0", "train.momentum=0"])
def test_the_students_recipe_is_not_the_teachers(make, key):
    assert teacher_recipe(make(key)) == teacher_recipe(make())
    assert teacher_recipe(make("teacher.batch_size=16")) != teacher_recipe(make())


def test_test_rows_are_evaluated_once_and_again_equal(make, tmp_path):
    outcome = distill.run(make(), tmp_path / "run")
    found = distill.test(outcome)
    assert (
        json.loads((tmp_path / "run" / "run.json").read_text())["metrics"]["test/top1"]
        == found["test/top1"]
    )
    again = distill.retest(tmp_path / "run" / "best")
    assert again.found["test"]["top1"] == found["test/top1"]
    assert again.found["val"]["top1"] == outcome.metrics["best_val_top1"]
    assert again.speed > 0


def test_a_loaded_student_takes_raw_pixels(make, tmp_path):
    found = distill.test(distill.run(make(), tmp_path / "run"))
    student = load_student(tmp_path / "run")
    test = load(make().data).test
    with torch.inference_mode():
        logits = student(torch.from_numpy(test.pixels).permute(0, 3, 1, 2))
    assert accuracy(logits, torch.from_numpy(test.labels))["top1"] == found["test/top1"]
    assert student.names[0] == "zero"
    for wrong in (torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"uint8 of shape \(N, 1, 8, 8\)"):
            student(wrong)
    assert not student.training


def test_a_student_teaches_another(make, tmp_path):
    distill.run(make("method.name=ce", "student.name=cnn16"), tmp_path / "teacher")
    outcome = distill.run(
        make(f"teacher.checkpoint={tmp_path / 'teacher'}", "method.name=kd"), tmp_path / "student"
    )
    rows = torch.arange(20)
    student = load_student(tmp_path / "teacher")
    pixels = torch.from_numpy(outcome.task.dataset.train.pixels[:20]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        assert torch.allclose(outcome.teacher.task.train[rows], student(pixels), atol=1e-5)


def test_an_untrained_transformer_knows_the_places_of_the_images(make):
    config = make("student.name=t2t_vit_7")
    # 8 x 8 pixels become one token, beside the class token
    assert distill.initial_student(config, load(config.data)).pos_embed.shape[1] == 1 + 1


def test_a_teacher_of_other_classes_is_refused_with_both_counts(make, tmp_path):
    distill.run(make("method.name=ce"), tmp_path / "teacher")
    saved = checkpoint.load(tmp_path / "teacher" / "best")
    meta = saved.meta | {"names": saved.meta["names"][:7]}
    checkpoint.save(tmp_path / "other", saved.weights, {}, meta)
    with pytest.raises(DataError, match=r"knows 7 classes .* has 10"):
        distill.run(make(f"teacher.checkpoint={tmp_path / 'other'}"), tmp_path / "run")


@pytest.mark.parametrize("alpha", ["0", "0.5", "1"])
def test_a_relative_temperature_keeps_the_target_as_sharp(make, tmp_path, alpha):
    config = make(f"fusion.alpha={alpha}", "loss.temperature_of=task", "loss.temperature=2")
    task = distill.open_task(config)
    teacher = distill.open_teacher(config, task)
    rows = task.split.transfer
    fused, alone = teacher.fused("train")[rows], teacher.task.train[rows]
    spread = [
        (z.double() - z.double().mean(1, keepdim=True)).square().mean().sqrt().item()
        for z in (fused, alone)
    ]
    assert math.isclose(spread[0] / teacher.temperature, spread[1] / 2, rel_tol=1e-5)


def test_fusing_repairs_more_of_the_teachers_errors_than_it_harms(miniature, cache_root):
    """The effect that the project exists for, on the teachers, over three seeds."""
    gains = []
    for seed in range(3):
        config = build(read([f"seed={seed}", f"cache={cache_root}"]))
        task = distill.open_task(config)
        teacher = distill.open_teacher(config, task)
        labels = torch.from_numpy(task.dataset.test.labels)
        top1 = {name: accuracy(z, labels)["top1"] for name, z in teacher.shown("test").items()}
        assert top1["fused"] > max(top1["teacher"], top1["clip"]), seed
        gains.append(top1["fused"] - top1["teacher"])
    assert np.mean(gains) > 2


@pytest.mark.parametrize("field", ["teacher.logits", "clip.logits"])
def test_logits_in_another_order_are_told_by_how_often_they_are_right(make, clip, tmp_path, field):
    path = tmp_path / "shifted.npy"
    np.save(path, np.roll(np.load(clip), 1, axis=1))  # each class in the place of the next
    config = make(f"{field}={path}")
    with pytest.warns(UserWarning, match=rf"^{field} is right on .* check the order"):
        distill.open_teacher(config, distill.open_task(config))


def test_a_last_batch_of_one_row_is_refused_where_batch_norm_cannot_take_it(make, tmp_path):
    # 597 rows: batches of 149 leave one
    one_pixel = ["student.name=torchvision/resnet18", "method.name=ce", "data.labelled_share=null"]
    data = ["data.labelled_per_class=null", "train.batch_size=149"]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (62, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(62) % 2)
    source = [
        *("data.source=arrays", f"data.path={tmp_path / 'data.npz'}", "data.folds=2"),
        *("data.validation=6", "train.batch_size=8"),
    ]
    with pytest.raises(ConfigError, match="train.batch_size=8 leaves a batch, .* of a single row"):
        distill.run(make(*one_pixel, *data, *source), tmp_path / "one")
    outcome = distill.run(make("method.name=ce", *data, "train.epochs=1"), tmp_path / "more")
    assert outcome.metrics["epoch"] == 1  # maps of several pixels can be normalised
