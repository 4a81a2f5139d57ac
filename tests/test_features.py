"""Runs whose loss looks at features: what makes each method, what is kept, and that none of it depends on what ran before."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.fx.experimental.optimization import fuse

from richkd import bench, checkpoint, distill, estimate, fusion, load_student, models, teachers
from richkd.banks import Banks
from richkd.config import Config
from richkd.errors import ConfigError
from richkd.layers import build, read
from richkd.learner import Contrast, Learner
from richkd.record import seed_folders
from richkd.steps import LOSS, TERMS

SHORT = ("train.epochs=2", "teacher.epochs=4", "contrast.negatives=64", "contrast.width=16")


@pytest.fixture(scope="module")
def make(miniature, cache_root):
    def config(*words: str) -> Config:
        return build(read([*SHORT, f"cache={cache_root}", *words]))

    return config


def weights(folder) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last").weights


def state(folder) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last").state


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


@pytest.fixture
def first(tmp_path):
    """Return loss terms and gradients of a run's first batch."""

    def take(config: Config):
        with distill.Run(config, tmp_path / f"first-{len(list(tmp_path.iterdir()))}") as run:
            run.learner.train()
            if run.steps.banks is not None:
                run.steps.banks.begin(0)
            part = next(run.steps.blocks(0))[0]
            values, _ = run.steps.values(part)
            values[LOSS].backward()
            names = {name: p.grad for name, p in run.learner.trained()}
            return dict(zip(TERMS, values.tolist(), strict=True)), names

    return take


def test_richkd_of_features_at_alpha_one_is_crd(make, tmp_path):
    distill.run(make("method.name=richkd-f", "fusion.alpha=1"), tmp_path / "richkd")
    distill.run(make("method.name=crd"), tmp_path / "crd")
    one, other = weights(tmp_path / "richkd"), weights(tmp_path / "crd")
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-6, atol=1e-6)


def test_fused_features_at_weight_one_are_the_teachers_own_to_rounding():
    own, clip = (F.normalize(torch.randn(9, 128), dim=1) for _ in range(2))
    fused = fusion.fuse_features([own, clip], [1.0, 0.0])
    torch.testing.assert_close(fused, own, rtol=1e-6, atol=1e-6)


def test_fused_features_are_the_weighted_sum_at_unit_length():
    each = [F.normalize(torch.randn(9, 128).double(), dim=1) for _ in range(3)]
    fused = fusion.fuse_features(each, [0.7, 0.2, 0.1]).numpy()
    expected = sum(w * e.numpy() for w, e in zip([0.7, 0.2, 0.1], each, strict=True))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(fused, expected, rtol=1e-12)


@pytest.mark.parametrize("method", ["crd", "richkd-f", "richkd-lf", "at", "lg", "autokd"])
def test_the_feature_loss_reaches_every_weight_of_student_and_projections(make, first, method):
    terms, gradients = first(make(f"method.name={method}", "loss.ce=0", "loss.logit=0"))
    assert terms["loss_feature"] > 0
    assert terms["loss"] == pytest.approx(
        make(f"method.name={method}").loss.feature * terms["loss_feature"], rel=1e-5
    )
    head = {"head.weight", "head.bias"}
    untouched = {name for name, value in gradients.items() if value is None or not value.any()}
    assert untouched == head if method != "at" else untouched >= head
    projected = {"crd": 2, "richkd-f": 3, "richkd-lf": 3, "lg": 3}.get(method, 0)
    assert sum(name.startswith("comparison.") for name in gradients) == 2 * projected


@pytest.mark.parametrize("method", ["richkd-lf", "lg"])
def test_a_run_that_is_gone_on_with_ends_with_the_bits_of_the_straight_one(make, tmp_path, method):
    config = make(f"method.name={method}", "train.epochs=3")
    distill.run(config, tmp_path / "straight")

    class Stopped(Exception):
        pass

    def report(metrics, _):
        if metrics["epoch"] == 1:
            raise Stopped

    with pytest.raises(Stopped):
        distill.run(config, tmp_path / "cut", report=report)
    distill.run(config, tmp_path / "cut", resume=True)
    assert same(weights(tmp_path / "straight"), weights(tmp_path / "cut"))
    assert same(state(tmp_path / "straight"), state(tmp_path / "cut"))


def test_what_is_learnt_beside_a_student_is_in_last_and_not_in_best(make, tmp_path):
    config = make("method.name=richkd-lf", "data.labelled_share=null")
    outcome = distill.run(config, tmp_path / "run")
    kept = load_file(tmp_path / "run" / "last" / "state.safetensors")
    rows = len(outcome.task.split.transfer)
    assert kept["banks.student"].shape == kept["banks.teacher"].shape == (rows, 16)
    assert kept["banks.normalisers"].gt(0).all()
    # every row was seen, and so has unit length
    torch.testing.assert_close(kept["banks.student"].norm(dim=1), torch.ones(rows))
    projections = {name for name in kept if name.startswith("comparison.")}
    assert {
        f"comparison.{part}.{end}"
        for part in ("student", "teachers.0", "teachers.1")
        for end in ("weight", "bias")
    } == projections
    assert not checkpoint.load(tmp_path / "run" / "best").state
    assert load_student(tmp_path / "run").names


def test_beside_a_student_lies_what_the_published_code_keeps():
    # 256 and 256 features, CLIP's 768, 50,000 images; the published code has five scalars, of which two are kept here
    config = build(read(["cifar100", "method.name=richkd-f"]))
    banks = Banks(torch.arange(50_000) // 500, config.contrast, 0, torch.device("cpu"))
    beside = Contrast(config, 256, [256, 768], [0.7, 0.3], banks)
    learner = Learner(torch.nn.Identity(), beside)
    assert sum(value.numel() for value in learner.beside().values()) == 12_964_229 - 3


def test_projections_of_task_teacher_and_student_start_alike_with_and_without_clip(make, tmp_path):
    kept = []
    for method in ("crd", "richkd-f"):
        with distill.Run(make(f"method.name={method}"), tmp_path / method) as run:
            kept.append(run.learner.beside())
    for name in kept[0]:
        assert torch.equal(kept[0][name], kept[1][name])
    assert "comparison.teachers.1.weight" in kept[1].keys() - kept[0].keys()


def test_several_clips_each_have_a_projection_and_their_share(make, tmp_path):
    extra = "clip.extra=[{model: miniature, pretrained: null, prompts: digits-bad, weight: 0.25}]"
    with distill.Run(make("method.name=richkd-lf", extra), tmp_path / "run") as run:
        assert run.learner.comparison.weights == pytest.approx((0.7, 0.225, 0.075))
        assert len(run.learner.comparison.teachers) == 3
        run.advance()


def test_features_have_a_weight_of_their_own(make, tmp_path):
    words = ("method.name=richkd-lf", "fusion.feature_alpha=0.2")
    with distill.Run(make(*words), tmp_path / "run") as run:
        assert run.learner.comparison.weights == pytest.approx((0.2, 0.8))
        assert run.teacher.alpha == 0.7
    with distill.Run(make("method.name=richkd-f", "fusion.alpha=0"), tmp_path / "clip") as run:
        assert run.teacher.task is None
        assert run.learner.comparison.weights == (1.0,)


def test_logits_alone_cannot_be_asked_for_features(make, tmp_path):
    task = distill.open_task(make())
    path = tmp_path / "logits.npy"
    np.save(path, np.random.default_rng(0).normal(size=(len(task.dataset.train), 10)).astype("f4"))
    for words, said in (
        (("method.name=crd", f"teacher.logits={path}"), "more than teacher.logits knows"),
        (("method.name=at", "teacher.views=single"), "more than teacher.views=single knows"),
        (("method.name=richkd-f", f"clip.logits={path}"), "clip.logits gives logits alone"),
    ):
        with warnings.catch_warnings(action="ignore"), pytest.raises(ConfigError, match=said):
            distill.run(make(*words), tmp_path / "run")


def test_standardised_logits_compose_with_fusion(make, first, tmp_path):
    config = make("method.name=richkd-l", "loss.standardise=true", "train.lr=0.01")
    with distill.Run(config, tmp_path / "run") as run:
        part = next(run.steps.blocks(0))[0]
        rows, views = part.rows, part.views
        task, clip = run.teacher.task.logits(rows, views), run.teacher.zero_shot_logits(rows, views)
        mixed = (0.7 * task + 0.3 * clip).double()
        scored = (mixed - mixed.mean(1, keepdim=True)) / mixed.std(1, keepdim=True)
        torch.testing.assert_close(
            part.target.double(), torch.log_softmax(scored / 3, 1), rtol=1e-4, atol=1e-4
        )
        run.student.eval()
        with torch.no_grad():
            logits = run.student(run.task.train.images(rows, views)).double()
            own = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True)
            divergence = F.kl_div(
                torch.log_softmax(own / 3, 1),
                torch.log_softmax(scored / 3, 1),
                reduction="batchmean",
                log_target=True,
            )
            values, _ = run.steps.values(part)
    assert values[TERMS.index("loss_logit")].item() == pytest.approx(
        9 * divergence.item(), rel=1e-3
    )


def test_standardised_teachers_have_one_spread_whatever_alpha(make, tmp_path):
    words = ("loss.standardise=true", "loss.temperature_of=task", "fusion.alpha=0.3")
    with distill.Run(make(*words), tmp_path / "run") as run:
        assert run.teacher.temperature == pytest.approx(3.0, rel=1e-3)


def test_the_weight_of_logits_rises_over_the_warm_up(make, tmp_path):
    config = make("method.name=dkd", "train.epochs=4", "loss.warmup=2")
    with distill.Run(config, tmp_path / "run") as run:
        seen = []
        for _ in range(3):
            run.advance()
            seen.append(run.steps.rise.item())
            row = run.rows[-1]
            total = row["train/loss_ce"] + seen[-1] * row["train/loss_logit"]
            assert row["train/loss"] == pytest.approx(total, rel=1e-5)
    assert seen == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("words", [("method.name=dkd",), ("loss.logit_kind=dkd",)])
def test_fusion_composes_with_dkd_by_one_key(make, tmp_path, words):
    with distill.Run(make(*words, "fusion.alpha=0.7"), tmp_path / "run") as run:
        assert run.teacher.alpha == 0.7
        run.advance()


def test_pseudo_labels_are_the_fused_teachers_and_true_labels_are_not_read(make, tmp_path):
    words = ("method.name=richkd-f", "contrast.pseudo_labels=true")
    with distill.Run(make(*words), tmp_path / "run") as run:
        rows, labels = run.task.split.transfer, run.task.dataset.train.labels
        found = distill.classes_of(run.config, run.task, run.teacher)
        known = run.task.split.labels[rows] >= 0
        assert found[known].tolist() == labels[rows][known].tolist()
        likeliest = run.teacher.fused("train").argmax(1)[rows].tolist()
        assert [f for f, k in zip(found.tolist(), known, strict=True) if not k] == [
            f for f, k in zip(likeliest, known, strict=True) if not k
        ]
        hidden = rows[~known]
        labels[hidden] = (labels[hidden] + 1) % 10  # what nobody may look at
        try:
            for config in (run.config, make("method.name=crd")):
                again = distill.classes_of(config, run.task, run.teacher)
                assert set(again[~torch.from_numpy(known)].tolist()) <= (
                    {-1} if config.method.name == "crd" else set(likeliest)
                )
            assert torch.equal(distill.classes_of(run.config, run.task, run.teacher), found)
        finally:
            labels[hidden] = (labels[hidden] - 1) % 10


def test_seeds_side_by_side_are_the_single_runs(make, tmp_path):
    config = make("method.name=richkd-lf")
    distill.run_seeds(config, tmp_path / "both", 2)
    distill.run(make("method.name=richkd-lf", "seed=1"), tmp_path / "single")
    assert same(state(seed_folders(tmp_path / "both", 2)[1]), state(tmp_path / "single"))


@pytest.mark.parametrize("method", ["crd", "richkd-lf", "at", "lg"])
@pytest.mark.parametrize("views", ["online", "exact"])
def test_a_teacher_that_stands_in_for_one_says_as_much(make, method, views):
    config = make(f"method.name={method}", f"teacher.views={views}")
    task = distill.open_task(config)
    rows, crops = torch.from_numpy(task.split.transfer)[:9], torch.zeros(9, 3, dtype=torch.long)
    real = distill.open_teacher(config, task).said(rows, crops)
    own = estimate.stand_in(config, task)
    found = own.said(rows, crops)
    assert (found.target is None) == (real.target is None)
    features = [part.shape for part in real.beside]
    if method == "richkd-lf":  # of CLIP's features the width is not known before it is there
        features[1] = (9, estimate.WIDTH)
    assert [part.shape for part in found.beside] == features
    assert bench.Ours(config, task, own).burst(1) > 0


@pytest.mark.parametrize("words", [("kd",), ("richkd-l", "loss.standardise=true")])
def test_what_is_composed_is_stood_in_for_as_it_is(make, words):
    config = make(f"method.name={words[0]}", *words[1:])
    task = distill.open_task(config)
    own = estimate.stand_in(config, task)
    assert own.standardised == config.loss.standardise
    assert bench.Ours(estimate.plain(config), task, own).burst(1) > 0


@pytest.mark.parametrize(
    "words",
    [
        ("fusion.feature_alpha=0", "clip.scale=match_std"),
        ("fusion.feature_alpha=0", "loss.temperature_of=task"),
        ("fusion.alpha=0", "loss.temperature_of=task"),
        ("fusion.feature_alpha=0", "contrast.pseudo_labels=true", "clip.scale=match_std"),
    ],
)
def test_a_scale_of_logits_that_nobody_asks_for_asks_for_no_teacher(make, tmp_path, words):
    with distill.Run(make("method.name=richkd-f", *words), tmp_path / "run") as run:
        assert (run.teacher.task is None) == ("contrast.pseudo_labels=true" not in words)
        run.advance()


@pytest.mark.parametrize("transform", [None, "attention", "channel", "projection"])
def test_batch_norms_are_folded_whatever_is_asked_beside_logits(transform):
    with torch.random.fork_rng():
        network = models.build("resnet8", 10).eval()
    image = torch.zeros(1, 3, 32, 32)
    beside = teachers.Beside(transform=transform, student=((32, 32), (20, 20), (14, 14)))
    outputs = teachers.Outputs(network, beside, image)
    folded = fuse(outputs)
    assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in folded.modules())
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), outputs(images), rtol=1e-3, atol=1e-4)
