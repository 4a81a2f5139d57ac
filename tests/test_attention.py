"""Transformers that are written here compute what their papers define, against explicit float64 formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from richkd import models
from richkd.models.attention import Attention, Block, as_map, as_tokens, drops
from richkd.models.t2t import Performer, sinusoids


def test_tokens_lie_row_by_row_behind_the_class_token():
    maps = torch.randn(2, 3, 4, 5)
    tokens = as_tokens(maps)
    assert torch.equal(tokens[:, 2 * 5 + 3], maps[:, :, 2, 3])
    behind = torch.cat([torch.randn(2, 1, 3), tokens], 1)
    assert torch.equal(as_map(behind, (4, 5), prefix=1), maps)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_that_of_pytorch(bias):
    ours = Attention(24, 3, bias=bias)
    theirs = torch.nn.MultiheadAttention(24, 3, bias=bias, batch_first=True)
    theirs.out_proj = ours.out
    theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key_value.weight])
    if bias:
        theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key_value.bias])
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_keys_of_reduced_attention_are_normed_patches():
    layer, grid = Attention(8, 2, bias=True, reduction=2, grid=(4, 6)).double(), (4, 6)
    torch.nn.init.normal_(layer.norm.weight)
    x = torch.randn(1, 24, 8, dtype=torch.float64)
    places, seen = x[0].reshape(*grid, 8), []
    for i in range(0, 4, 2):
        for j in range(0, 6, 2):
            patch = sum(
                layer.reduce.weight[:, :, a, b] @ places[i + a, j + b]
                for a in range(2)
                for b in range(2)
            )
            patch = patch + layer.reduce.bias
            patch = (patch - patch.mean()) / (patch.var(correction=0) + 1e-6).sqrt()
            seen.append(patch * layer.norm.weight + layer.norm.bias)
    key, value = layer.key_value(torch.stack(seen)).chunk(2, 1)
    query = layer.query(x[0])
    found = []
    for head in (slice(0, 4), slice(4, 8)):
        weights = (query[:, head] @ key[:, head].T / math.sqrt(4)).softmax(1)
        found.append(weights @ value[:, head])
    torch.testing.assert_close(layer(x)[0], layer.out(torch.cat(found, 1)))


@pytest.mark.parametrize("spread", [0.3, 1, 20])
def test_a_performer_weighs_values_by_its_random_features(spread):
    layer = Performer(10, 64)
    query, key, value = (torch.randn(2, 9, 64) for _ in range(3))
    query, key = spread * query, spread * key
    found = layer.attend(query, key, value)
    rows = layer.directions.double()
    exponents = [
        x.double() @ rows.T - x.double().square().sum(2, keepdim=True) / 2 for x in (query, key)
    ]
    # of exp(query) . exp(key), summed over the 32 features
    kernel = torch.logsumexp(exponents[0][:, :, None] + exponents[1][:, None], 3)
    expected = kernel.softmax(2) @ value.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * spread)


def test_directions_of_a_performer_are_orthogonal_and_fixed():
    layer = Performer(10, 64)
    torch.testing.assert_close(layer.directions @ layer.directions.T, 32 * torch.eye(32))
    assert "directions" in layer.state_dict()
    assert "directions" not in dict(layer.named_parameters())


def test_random_features_are_computed_in_float32_under_autocast():
    layer = Performer(10, 64)
    parts = [torch.randn(2, 9, 64, dtype=torch.bfloat16) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.attend(*parts)
    assert torch.equal(found, layer.attend(*(part.float() for part in parts)))


def test_places_are_sines_and_cosines():
    table = sinusoids(5, 8)[0]
    for place in range(5):
        for i in range(4):
            angle = place / 10_000 ** (2 * i / 8)
            assert table[place, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[place, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_tokens_of_t2t_are_overlapping_patches():
    network = models.build("t2t_vit_7", 5, size=(32, 48))
    assert network.grids == [(8, 12), (4, 6), (2, 3)]
    images, seen = torch.randn(1, 3, 32, 48), []
    network.performers[0].register_forward_pre_hook(lambda _, found: seen.append(found[0]))
    network(images)
    patch = F.pad(images, (2, 2, 2, 2))[0, :, 4 * 3 : 4 * 3 + 7, 4 * 5 : 4 * 5 + 7]
    assert torch.equal(seen[0][0, 3 * 12 + 5], patch.flatten())


def test_a_branch_is_left_out_for_whole_images_and_only_while_training():
    torch.manual_seed(0)
    block = Block(Attention(4, 1, bias=True), 4, 2, 0.25)
    branch = torch.ones(4000, 2, 4)
    found = block._dropped(branch)
    assert torch.equal(found, found[:, :1, :1].expand(-1, 2, 4))
    assert {round(value, 4) for value in found.unique().tolist()} == {0, 1.3333}
    assert found.mean().item() == pytest.approx(1, abs=0.03)
    assert block.eval()._dropped(branch) is branch


@pytest.mark.parametrize(
    ("name", "blocks"), [("deit_ti", 12), ("pit_ti", 12), ("t2t_vit_7", 7), ("pvt_ti", 8)]
)
def test_branches_are_left_out_more_often_the_deeper_they_lie(name, blocks):
    expected = [0.1 * i / (blocks - 1) for i in range(blocks)]
    assert drops(blocks) == pytest.approx(expected)
    found = []
    for module in models.build(name, 5, size=(32, 32)).modules():
        if type(module).__name__ == "Block":
            left_out = getattr(module, "drop_path1", None)
            found.append(module.drop if left_out is None else getattr(left_out, "drop_prob", 0))
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", ["deit_ti", "pit_ti", "t2t_vit_7", "pvt_ti"])
def test_norms_have_the_epsilon_of_transformers(name):
    network = models.build(name, 5, size=(32, 32))
    norms = [module for module in network.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) > 14 and {norm.eps for norm in norms} == {1e-6}
