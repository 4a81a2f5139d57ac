"""Blocks, precision, memory order and graphs change how fast a step is, and its result as little as is said here."""

import contextlib
import itertools

import numpy as np
import pytest
import torch

from richkd import checkpoint, distill, models
from richkd.config import Train
from richkd.data import load
from richkd.errors import ConfigError
from richkd.layers import build, read
from richkd.steps import BLOCK, EAGER, LOSS, TERMS, Graph, Steps


@pytest.fixture(scope="module")
def given(cache_root, tmp_path_factory) -> list[str]:
    """Zero-shot logits that are mostly right, so that no CLIP is needed."""
    labels = load(build(read([])).data).train.labels
    logits = np.random.default_rng(0).normal(size=(len(labels), 10)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += 3
    path = tmp_path_factory.mktemp("logits") / "clip.npy"
    np.save(path, logits)
    return [f"clip.logits={path}", f"cache={cache_root}"]


@pytest.fixture
def words(given) -> list[str]:
    return [*given, "train.epochs=2", "device=cpu"]


def weights_of(words, folder, *more: str) -> dict[str, torch.Tensor]:
    distill.run(build(read([*words, *more])), folder)
    return checkpoint.load(folder / "last").weights


def same(one, other) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def opened(words, *more: str) -> Steps:
    """Return the steps of a run that has not begun."""
    config = build(read([*words, *more]))
    task = distill.open_task(config)
    teacher = distill.open_teacher(config, task)
    learner = distill.open_learner(config, task, teacher)
    optimizer = distill.open_optimizer(config, learner)
    return Steps(
        config, learner, teacher, optimizer, distill.open_batches(config, task, distilled=True)
    )


@pytest.mark.parametrize("views", ["online", "exact"])
def test_how_many_batches_are_a_block_changes_no_bit(words, tmp_path, monkeypatch, views):
    found = []
    for rows in (1, 256, 10**6):
        monkeypatch.setitem(BLOCK, "cpu", rows)
        found.append(weights_of(words, tmp_path / str(rows), f"teacher.views={views}"))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_a_block_holds_the_batches_that_are_drawn_and_their_target(words):
    ours = opened(words, "data.labelled_share=0.3")
    parts = list(itertools.chain(*ours.blocks(1)))
    drawn = list(ours.batches.epoch(1))
    assert [len(block) for block in ours.blocks(1)][:2] == [8, 8]
    assert len(parts) == len(drawn) == len(ours.batches)
    for part, (rows, labels, views) in zip(parts, drawn, strict=True):
        assert torch.equal(part.rows, rows)
        assert torch.equal(part.labels, labels)
        assert torch.equal(part.views, views)
        assert (part.total, int(part.labelled)) == (len(rows), int((labels >= 0).sum()))
        torch.testing.assert_close(part.target, ours.teacher.said(rows, views).target)


def gradients(words, **changes) -> tuple[float, torch.Tensor]:
    """Return loss and gradient of a first batch."""
    ours = opened(words, *(f"train.{key}={value}" for key, value in changes.items()))
    part = next(ours.blocks(0))[0]
    loss = ours.values(part)[0][LOSS]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in ours.student.parameters()])


def test_bf16_gives_the_loss_and_gradient_of_fp32_within_its_digits(words):
    (loss, exact), (half_loss, half) = (gradients(words, precision=p) for p in ("fp32", "bf16"))
    assert half_loss != loss
    assert half_loss == pytest.approx(loss, rel=1e-2)
    assert torch.cosine_similarity(exact, half, dim=0) > 0.99
    assert half.dtype == torch.float32


def test_precision_is_fp32_on_a_cpu_unless_bf16_is_asked_for(words):
    assert not opened(words).half
    assert opened(words, "train.precision=bf16").half
    with pytest.raises(ConfigError, match="train.precision must be one of auto, fp32, bf16"):
        Train(precision="half")


def test_a_run_in_bf16_learns_and_keeps_weights_in_fp32(words, tmp_path):
    outcome = distill.run(
        build(read([*words, "train.precision=bf16", "train.epochs=4"])), tmp_path / "run"
    )
    assert outcome.metrics["val/top1"] > 60
    assert {value.dtype for value in outcome.network.parameters()} == {torch.float32}


def test_memory_order_changes_a_gradient_by_rounding_alone(words, monkeypatch):
    loss, last = gradients(words)
    (weight, *_) = (
        p for p in opened(words).student.parameters() if p.dim() == 4 and p.shape[1] > 1
    )
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    monkeypatch.setattr(
        distill, "open_student", lambda config, task: distill.initial_student(config, task.dataset)
    )
    other, first = gradients(words)
    assert other == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(first, last, rtol=1e-3, atol=1e-5)


def test_the_fused_optimiser_takes_the_steps_of_the_plain_one(words, tmp_path, monkeypatch):
    fused = weights_of(words, tmp_path / "fused", "train.lr=0.001")
    assert opened(words).optimizer.defaults["fused"]

    def plain(config, student):
        wanted = {"momentum": config.train.momentum, "weight_decay": config.train.weight_decay}
        return torch.optim.SGD(student.parameters(), config.train.lr, foreach=False, **wanted)

    monkeypatch.setattr(distill, "open_optimizer", plain)
    for name, value in weights_of(words, tmp_path / "plain", "train.lr=0.001").items():
        torch.testing.assert_close(fused[name], value, rtol=1e-3, atol=1e-5)


class Recording:
    """What stands for torch.cuda's graph on a CPU: nothing is computed as it is captured, all as it is replayed."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        """Take the step."""
        self.replays += 1
        graph = self.steps.graph
        graph.values.copy_(self.steps.step(graph.part))


@contextlib.contextmanager
def undone(graph: Recording, student, optimizer):
    """Undo what is done inside."""
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    momentum = {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
    yield
    student.load_state_dict(weights)
    for parameter, value in momentum.items():
        optimizer.state[parameter]["momentum_buffer"].copy_(value)


def test_a_graph_takes_the_steps_that_would_be_taken_one_by_one(words, tmp_path, monkeypatch):
    expected = weights_of(words, tmp_path / "one by one")
    made = []

    class Aside:
        def wait_stream(self, other):
            """Wait for nothing: there is one stream."""

    class Replayed(Steps):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            self.graph = Graph(self.optimizer)
            self.graph.graph.steps = self
            made.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", Aside)
    monkeypatch.setattr(torch.cuda, "current_stream", Aside)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "graph", lambda graph: undone(graph, made[0].student, made[0].optimizer)
    )
    monkeypatch.setattr(distill, "Steps", Replayed)
    found = weights_of(words, tmp_path / "replayed")
    assert same(expected, found)
    full = sum(len(rows) == 32 for epoch in (0, 1) for rows, _, _ in made[0].batches.epoch(epoch))
    assert made[0].graph.graph.replays == full - EAGER


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("views", ["online", "exact"])
def test_no_step_waits_for_a_gpu(given, views):
    ours = opened([*given, "device=cuda", f"teacher.views={views}"])
    ours.epoch(0, lambda: None)  # the table is filled, the graph captured
    terms = torch.zeros(len(TERMS), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in ours.blocks(0):
            for part in block:
                terms += ours.take(part, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert terms.isfinite().all()


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replayed_graph_ends_with_the_weights_of_single_launches(given, tmp_path, precision):
    words = [*given, "device=cuda", "train.epochs=2", f"train.precision={precision}"]
    launched = weights_of(words, tmp_path / "launched", "train.graphs=false")
    for name, value in weights_of(words, tmp_path / "replayed").items():
        torch.testing.assert_close(launched[name], value, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.filterwarnings("ignore:teacher.checkpoint is right on")
def test_a_gpu_s_table_holds_what_a_cpu_s_does(tmp_path):
    torch.manual_seed(0)
    torch.save(models.build("resnet20", 10, channels=1).state_dict(), tmp_path / "weights.pt")
    words = ["method.name=kd", f"teacher.checkpoint={tmp_path / 'weights.pt'}"]
    words += ["teacher.name=resnet20", "teacher.views=exact", "teacher.table=fp32"]
    found = []
    for device in ("cpu", "cuda"):
        ours = opened([*words, f"device={device}", f"cache={tmp_path / device}"])
        views = ours.views.draw(100, torch.Generator().manual_seed(0))
        found.append(ours.teacher.task.logits(torch.arange(100), views).cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
