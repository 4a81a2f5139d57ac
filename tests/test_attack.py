"""FGSM and PGD, and what an answer costs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from richkd.evaluate.attack import fgsm, pgd
from richkd.evaluate.costs import macs

MEAN, STD = 120.0, 60.0


@pytest.fixture(scope="module")
def trained():
    """A small net that tells bright squares by their quarter, with images `(80, 1, 8, 8)` and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    images = torch.randint(100, (80, 1, 8, 8), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        y, x = divmod(label, 2)
        image[0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] += 40
    images = images.byte()
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network((images.float() - MEAN) / STD), labels).backward()
        optimizer.step()
    optimizer.zero_grad()

    def logits_of(pixels: torch.Tensor) -> torch.Tensor:
        return network((pixels - MEAN) / STD)

    return network, logits_of, images, labels


def loss(logits_of, pixels, labels):
    with torch.no_grad():
        return F.cross_entropy(logits_of(pixels.float()), labels).item()


@settings(deadline=None, max_examples=15)
@given(eps=st.floats(0, 300), steps=st.integers(1, 5), seed=st.integers(0, 9))
def test_changes_stay_within_their_bound_and_the_range_of_a_pixel(trained, eps, steps, seed):
    _, logits_of, images, labels = trained
    for found in (
        fgsm(logits_of, images, labels, eps),
        pgd(logits_of, images, labels, eps, steps, seed),
    ):
        assert (found - images.float()).abs().max() <= eps + 1e-4
        assert found.min() >= 0
        assert found.max() <= 255


def test_the_loss_rises_and_more_steps_find_more(trained):
    _, logits_of, images, labels = trained
    for eps in (1, 4, 8):
        clean = loss(logits_of, images, labels)
        once = loss(logits_of, fgsm(logits_of, images, labels, eps), labels)
        often = loss(logits_of, pgd(logits_of, images, labels, eps), labels)
        assert clean < once <= often + 1e-3
    right = [
        (logits_of(found).argmax(1) == labels).double().mean()
        for found in (images.float(), pgd(logits_of, images, labels, 40))
    ]
    assert right[0] > 0.9 > 0.2 > right[1]


def test_nothing_is_changed_by_an_attack_of_no_size(trained):
    _, logits_of, images, labels = trained
    assert torch.equal(fgsm(logits_of, images, labels, 0), images.float())
    assert torch.equal(pgd(logits_of, images, labels, 0), images.float())


def test_one_step_of_a_linear_net_is_the_sign_of_its_weights():
    weights = torch.randn(2, 12, generator=torch.Generator().manual_seed(3))

    def logits_of(pixels):
        return pixels.flatten(1) @ weights.T / 255

    images, labels = torch.full((5, 3, 2, 2), 128, dtype=torch.uint8), torch.zeros(5).long()
    away = (weights[1] - weights[0]).sign().view(3, 2, 2)
    torch.testing.assert_close(
        fgsm(logits_of, images, labels, 8), 128 + 8 * away.expand(5, 3, 2, 2)
    )


def test_weights_have_no_gradient_afterwards_also_where_gradients_are_off(trained):
    network, logits_of, images, labels = trained
    with torch.no_grad():
        pgd(logits_of, images, labels, 4, 2)
    assert all(each.grad is None for each in network.parameters())


def test_the_same_seed_gives_the_same_attack(trained):
    _, logits_of, images, labels = trained
    first, again, other = (pgd(logits_of, images, labels, 8, 1, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_multiply_adds_are_counted_as_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).eval()
    wanted = 64 * 8 * 3 * 9 + 16 * 8 * 9 + 8 * 16 * 5
    assert macs(network, torch.zeros(1, 3, 8, 8)) == wanted


class Fused(nn.Module):
    """Attention that one kernel computes, without matrix products of its own."""

    def forward(self, image: Tensor) -> Tensor:
        """Return 4 heads of 5 tokens of 8 numbers."""
        query = image.view(1, 4, 5, 8)
        return F.scaled_dot_product_attention(query, query, query)


def test_attention_is_counted_whichever_kernel_computes_it():
    # queries by keys, and the result by values: 5 x 5 x 8 each, of 4 heads
    assert macs(Fused(), torch.zeros(1, 1, 16, 10)) == 4 * 2 * 5 * 5 * 8
    width, tokens = 16, 5
    layer = nn.TransformerEncoderLayer(width, 4, 32, batch_first=True).eval()
    projections = tokens * (4 * width * width + 2 * width * 32)
    wanted = projections + 2 * tokens * tokens * width
    assert macs(layer, torch.zeros(1, tokens, width)) == wanted
    assert torch.backends.mha.get_fastpath_enabled()
