"""Distances of stage outputs against numpy, with gradients, and how stages are paired and brought to one size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from richkd.config import Loss
from richkd.losses import maps

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def stages(seed: int, channels: tuple[int, ...] = (3, 5)) -> list[torch.Tensor]:
    return [drawn(4, c, 6 - 2 * k, 6 - 2 * k, seed=seed + k) for k, c in enumerate(channels)]


def same(count: int) -> list[None]:
    """Maps that have their size already."""
    return [None] * count


def attention(each: np.ndarray) -> np.ndarray:
    flat = (each**2).mean(1).reshape(len(each), -1)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def test_attention_transfer_is_the_mean_square_between_normalised_attention_maps():
    own, other = stages(0), stages(9, (7, 2))
    student, teacher = (maps.transformed(each, same(2), "attention") for each in (own, other))
    found = maps.distance(student, teacher, "mse", 4)
    expected = sum(
        ((attention(s.numpy()) - attention(t.numpy())) ** 2).mean()
        for s, t in zip(own, other, strict=True)
    )
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_locality_guidance_is_the_sum_of_mean_squares_of_the_maps():
    own, other = stages(0), stages(9)
    student, teacher = (maps.transformed(each, same(2), "projection") for each in (own, other))
    found = maps.distance(student, teacher, "mse", 4)
    assert found.item() == pytest.approx(
        sum(F.mse_loss(s, t).item() for s, t in zip(own, other, strict=True)), rel=1e-10
    )


def test_channels_are_means_over_places():
    (each,) = maps.transformed([drawn(2, 3, 4, 5)], same(1), "channel")
    np.testing.assert_allclose(each, drawn(2, 3, 4, 5).numpy().mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mse", lambda s, t: ((s - t) ** 2).mean()),
        ("l1", lambda s, t: np.abs(s - t).mean()),
        ("cosine", lambda s, t: 1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t)),
        (
            "kl",
            lambda s, t: (
                np.exp(t - np.log(np.exp(t).sum()))
                * (t - np.log(np.exp(t).sum()) - s + np.log(np.exp(s).sum()))
            ).sum(),
        ),
    ],
)
def test_a_distance_is_its_formula_row_by_row(kind, expected):
    student, teacher = drawn(5, 7), drawn(5, 7, seed=1)
    found = maps.DISTANCES[kind](student, teacher)
    rows = [expected(s, t) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    np.testing.assert_allclose(found, rows, rtol=1e-10)
    assert maps.distance([student], [teacher], kind, 5).item() == pytest.approx(np.mean(rows))
    assert maps.DISTANCES[kind](teacher, teacher).abs().max() < 1e-12


def test_the_config_names_all_transforms_and_distances():
    for transform in maps.TRANSFORMS:
        for distance in maps.DISTANCES:
            Loss(transform=transform, distance=distance)


@pytest.mark.parametrize("transform", maps.TRANSFORMS)
@pytest.mark.parametrize("kind", maps.DISTANCES)
def test_distances_of_maps_have_the_gradient_of_finite_differences(transform, kind):
    (resize,) = maps.resizings([(2, 2)], [(3, 3)], CPU)
    resizes = [tuple(each.double() for each in resize)]
    teacher = maps.transformed([drawn(2, 3, 2, 2, seed=5)], resizes, transform)

    def loss(each):
        return maps.distance(maps.transformed([each], resizes, transform), teacher, kind, 2)

    assert torch.autograd.gradcheck(loss, drawn(2, 3, 2, 2).requires_grad_())


def test_stages_are_paired_from_the_last_backwards_at_the_larger_size():
    assert maps.paired_sizes([(16, 16), (8, 8), (4, 4)], [(14, 7), (7, 7)]) == [(14, 8), (7, 7)]
    own = [drawn(1, 1, 4, 4), drawn(1, 2, 2, 2, seed=1)]
    (last,) = maps.transformed(own, same(1), "projection")
    assert torch.equal(last, own[1].flatten(1))


@pytest.mark.parametrize(
    ("own", "wanted"), [((8, 8), (14, 14)), ((7, 7), (56, 28)), ((1, 1), (4, 4))]
)
def test_maps_are_brought_to_a_size_as_pytorch_interpolates(own, wanted):
    each = drawn(2, 3, *own).float()
    (found,) = maps.transformed([each], maps.resizings([own], [wanted], CPU), "projection")
    expected = F.interpolate(each, wanted, mode="bilinear", align_corners=False).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert maps.resizings([own], [own], CPU) == [None]


def test_slices_of_a_batch_add_up_to_the_whole():
    student, teacher = drawn(6, 7), drawn(6, 7, seed=1)
    whole = maps.distance([student], [teacher], "mse", 6)
    parts = [maps.distance([student[a:b]], [teacher[a:b]], "mse", 6) for a, b in ((0, 2), (2, 6))]
    torch.testing.assert_close(sum(parts), whole)
