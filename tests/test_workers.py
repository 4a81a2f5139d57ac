"""Several workers train what one trains: their batches, crops and counts, and without batch norm their weights."""

import json
import os
import socket
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from richkd import distill, models
from richkd.data import load
from richkd.layers import build, read
from richkd.models import Network
from richkd.steps import Steps
from richkd.workers import Group

EPOCHS = 3
BATCH = 7  # of 597 rows: the last batch has 2, too few for three workers


class Stopped(Exception):
    """The test's own end of a run."""


class Plain(Network):
    """A network without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(64, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return features `(N, 64)`."""
        return self.body(images)


def plain(*_: object) -> nn.Module:
    torch.manual_seed(0)
    return Plain()


@pytest.fixture(scope="module")
def overrides(tmp_path_factory) -> list[str]:
    """Both teachers given as logits, so that nothing is trained but the student."""
    folder = tmp_path_factory.mktemp("logits")
    labels = load(build(read([])).data).train.labels
    for k, name in enumerate(("teacher", "clip")):
        logits = np.random.default_rng(k).normal(size=(len(labels), 10)).astype(np.float32)
        logits[np.arange(len(labels)), labels] += 3
        np.save(folder / f"{name}.npy", logits)
    torch.manual_seed(0)
    torch.save(models.build("cnn8", 10, channels=1).state_dict(), folder / "cnn8.pt")
    return [
        *(f"{name}.logits={folder / name}.npy" for name in ("teacher", "clip")),
        *(f"train.epochs={EPOCHS}", f"train.batch_size={BATCH}", f"cache={folder}"),
        "data.labelled_share=null",
    ]


CONTRAST = [
    *("method.name=crd", "contrast.negatives=200", "contrast.width=8"),
    *("teacher.name=cnn8", "train.epochs=2", "train.batch_size=64"),
]


def contrast(group: Group, place: Path, overrides: list[str]) -> None:
    """Contrast features, in one go and in two, and write down what this worker's banks and projections came to."""
    own = [each for each in overrides if not each.startswith(("teacher.", "clip."))]
    weights = Path(build(read(own)).cache) / "cnn8.pt"
    config = build(read([*own, *CONTRAST, f"teacher.checkpoint={weights}"]))
    for name, cut in (("contrast", False), ("contrast-cut", True)):
        with distill.Run(config, place / name, group=group) as run:
            for _ in range(1 if cut else 2):
                run.advance()
        if cut:
            with distill.Run(config, place / name, group=group, resume=True) as run:
                run.advance()
        state = {k: v.clone() for k, v in run.learner.beside().items()} | dict(
            run.student.state_dict()
        )
        torch.save(state, place / f"{name}-{group.rank}.pt")


def work(rank: int, size: int, port: int, folder: str, overrides: list[str]) -> None:
    """Do all that one worker does in these tests, and write down what it saw."""
    torch.set_num_threads(1)
    group = Group()
    if size > 1:
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        group = Group.of_process_group()
    place, seen = Path(folder), []
    original, resting = Steps.values, Steps.idle

    def values(steps, part):
        total = [part.total, int(part.labelled)]
        seen.append([part.rows.tolist(), part.labels.tolist(), part.views.tolist(), total])
        return original(steps, part)

    def idle(steps, part):
        seen.append([[], [], [], None])
        return resting(steps, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "values", values)
        patch.setattr(Steps, "idle", idle)
        patch.setattr(distill, "initial_student", plain)
        config = build(read(overrides))
        outcome = distill.run(config, place / "plain", group=group)
        (place / f"seen-{rank}.json").write_text(json.dumps(seen))
        torch.save(outcome.network.state_dict(), place / f"plain-{rank}.pt")

        def report(metrics, _):
            if metrics["epoch"] == 2:
                raise Stopped

        with pytest.raises(Stopped):
            distill.run(config, place / "cut", group=group, report=report)
        again: list[int] = []
        distill.run(
            config,
            place / "cut",
            group=group,
            resume=True,
            heard=1,
            report=lambda metrics, _: again.append(metrics["epoch"]),
        )
        assert again == [2, 3], again  # heard of 1, cut in 2
        with warnings.catch_warnings(action="ignore"):  # the teacher knows nothing
            contrast(group, place, overrides)
    short = build(read([*overrides, "train.epochs=2", "train.batch_size=64", "seed=5"]))
    told: list[dict] = []

    def tell(metrics, _):
        told.append(metrics)
        if len(told) == 1:
            raise Stopped

    for k in range(2):
        distill.run(replace(short, seed=5 + k), place / f"single{k}", group=group)
    with pytest.raises(Stopped):
        distill.run_seeds(short, place / "pair", 2, group=group, report=tell)
    distill.run_seeds(short, place / "pair", 2, group=group, report=tell, resume=True, heard=0)
    (place / f"told-{rank}.json").write_text(json.dumps(told))
    normed = build(read([*overrides, "train.epochs=1", "train.batch_size=64"]))
    outcome = distill.run(normed, place / "normed", group=group)
    torch.save(outcome.network.state_dict(), place / f"normed-{rank}.pt")
    tested = distill.test(outcome) if group.first else {}
    assert bool(tested) == group.first
    if size > 1:
        dist.barrier()  # the first one tests its student: nobody leaves before it
        dist.destroy_process_group()
        # all is written; threads of the process group that outlive the interpreter have aborted a worker on its way out
        os._exit(0)


@pytest.fixture(scope="module")
def results(overrides, tmp_path_factory) -> dict[int, Path]:
    """Return the folder of what 1, 2 and 3 workers did."""
    found = {}
    for size in (1, 2, 3):
        found[size] = tmp_path_factory.mktemp(f"workers-{size}")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (size, port, str(found[size]), overrides)
        if size == 1:
            work(0, *arguments)
        else:
            torch.multiprocessing.spawn(work, arguments, nprocs=size)
    return found


def seen(folder: Path, size: int) -> list[list]:
    """Return rows, labels and views of each global batch, put together from the workers' slices."""
    each = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(size)]
    whole = []
    for parts in zip(*each, strict=True):
        totals = {tuple(part[3]) for part in parts if part[3] is not None}
        assert len(totals) == 1
        whole.append(
            [*(sum((part[k] for part in parts), []) for k in range(3)), list(totals.pop())]
        )
    return whole


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.mark.parametrize("size", [2, 3])
def test_workers_see_the_batches_crops_and_labels_of_one(results, size):
    one, several = seen(results[1], 1), seen(results[size], size)
    assert len(one) == EPOCHS * 86  # 597 rows in batches of 7, the last of 2
    assert several == one
    for rows, labels, views, (count, labelled) in one:
        assert len(rows) == len(labels) == len(views) == count
        assert labelled == sum(label >= 0 for label in labels)
    assert {count for *_, (count, _) in one} == {7, 2}
    assert 0 in {labelled for *_, (_, labelled) in one}  # few of the rows are labelled


def test_slices_are_as_equal_as_can_be(results):
    each = [json.loads((results[3] / f"seen-{rank}.json").read_text()) for rank in range(3)]
    assert {tuple(len(part[0]) for part in parts) for parts in zip(*each, strict=True)} == {
        (3, 2, 2),
        (1, 1, 0),
    }


@pytest.mark.parametrize("size", [2, 3])
def test_without_batch_norm_workers_train_the_weights_of_one(results, size):
    one = torch.load(results[1] / "plain-0.pt", weights_only=True)
    start = plain().state_dict()
    for rank in range(size):
        found = torch.load(results[size] / f"plain-{rank}.pt", weights_only=True)
        for name, value in found.items():
            torch.testing.assert_close(value, one[name], atol=2e-5, rtol=1e-4)
            assert (value - start[name]).abs().max() > 0.01, "it was trained"
    for a, b in zip(metrics(results[1] / "plain"), metrics(results[size] / "plain"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("size", [2, 3])
def test_banks_and_projections_are_equal_on_all_workers_and_those_of_one(results, size):
    one = torch.load(results[1] / "contrast-0.pt", weights_only=True)
    first = torch.load(results[size] / "contrast-0.pt", weights_only=True)
    assert {"banks.student", "banks.teacher", "banks.normalisers"} <= first.keys()
    for rank in range(1, size):
        found = torch.load(results[size] / f"contrast-{rank}.pt", weights_only=True)
        assert all(torch.equal(value, found[name]) for name, value in first.items())
    for name, value in first.items():
        torch.testing.assert_close(value, one[name], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_contrast_goes_on_bit_for_bit_on_every_worker(results, size):
    for rank in range(size):
        straight, cut = (
            torch.load(results[size] / f"{name}-{rank}.pt", weights_only=True)
            for name in ("contrast", "contrast-cut")
        )
        assert all(torch.equal(value, cut[name]) for name, value in straight.items())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_resumed_run_of_several_workers_is_the_straight_one_bit_for_bit(results, size):
    folder = results[size]
    straight, cut = (folder / name / "last" / "weights.safetensors" for name in ("plain", "cut"))
    assert straight.read_bytes() == cut.read_bytes()
    assert metrics(folder / "plain") == metrics(folder / "cut")


@pytest.mark.parametrize("size", [1, 2])
def test_seeds_side_by_side_are_single_runs_over_several_workers_too(results, size):
    folder = results[size]
    for k in range(2):
        single, one = (folder / name for name in (f"single{k}", f"pair/seed{k}"))
        files = [run / "last" / "weights.safetensors" for run in (single, one)]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert metrics(single) == metrics(one)
    both = list(zip(*(metrics(folder / f"single{k}") for k in range(2)), strict=True))
    for rank in range(size):
        told = json.loads((folder / f"told-{rank}.json").read_text())
        assert [row["epoch"] for row in told] == [
            1,
            1,
            2,
        ]  # cut after the first, of which nobody heard
        for row, (one, other) in zip(told[1:], both, strict=True):
            assert row["val/top1"] == (one["val/top1"] + other["val/top1"]) / 2


@pytest.mark.parametrize("size", [2, 3])
def test_with_batch_norm_all_workers_end_with_the_network_that_is_kept(results, size):
    networks = [
        torch.load(results[size] / f"normed-{rank}.pt", weights_only=True) for rank in range(size)
    ]
    for network in networks[1:]:
        assert all(torch.equal(value, network[name]) for name, value in networks[0].items())
    # each normalises its own slice, so that it is near one worker's network, and not the same
    one, several = (metrics(results[k] / "normed")[-1]["train/loss"] for k in (1, size))
    assert several == pytest.approx(one, rel=0.1)


def test_the_folder_says_how_many_worked_on_it(results):
    for size, folder in results.items():
        state = json.loads((folder / "normed" / "run.json").read_text())
        assert state["workers"] == size
        assert "test/top1" in state["metrics"]


@given(rows=st.integers(0, 1000), size=st.integers(1, 40))
def test_slices_part_the_rows_in_order(rows, size):
    slices = [Group(rank=rank, size=size).slice(rows) for rank in range(size)]
    assert [row for part in slices for row in range(rows)[part]] == list(range(rows))
    lengths = [part.stop - part.start for part in slices]
    assert max(lengths) - min(lengths) <= 1


def test_one_worker_alone_needs_no_process_group():
    group = Group()
    network = nn.Linear(2, 2)
    assert group.wrap(network) is network
    values = torch.arange(3)
    assert group.total(values) is values
    assert group.gather(values, 3) is values
    assert group.from_first({"a": 1}) == {"a": 1}
    group.copy_from_first([values])
