"""T2T-ViT-7 (Yuan et al., 2021): overlapping patches that become tokens step by step, then a narrow transformer.

Three times patches of what there is are unfolded into tokens; after the first two a layer of attention with random
features (Choromanski et al., 2021, of which it costs no L x L products) makes them narrow again. Shapes: N images of C
channels, L tokens, D features, K classes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from richkd.models.attention import (
    EPSILON,
    SPREAD,
    Attention,
    Block,
    as_map,
    draw,
    drops,
)
from richkd.models.network import Network

UNFOLDED = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # size of a patch, stride, padding
TOKEN, FEATURES = 64, 32  # numbers of a token between the steps; random features
DROPOUT = 0.1  # within those layers, as its authors train it
WIDTH, DEPTH, HEADS, EXPANSION = 256, 7, 4, 2
TOLD = (0, 3, 6)  # blocks whose outputs stand for stages


class Performer(nn.Module):
    """Attention of one head by positive random features, then two linear layers.

    The weight of key j for query i is f(q_i) . f(k_j) over its sum for all keys, f(x) = exp(W x - |x|^2 / 2). It is
    computed as the chance of each feature given the query times that of each key given the feature, two softmaxes that
    nothing overflows, and in float32 under autocast, too. W `(m, D)` is drawn once, has orthogonal rows of length sqrt(m)
    and is kept beside the weights.

    Args:
        inside: Numbers of a token that comes in.
        outside: D, numbers of a token that comes out.
    """

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(inside, EPSILON), nn.LayerNorm(outside, EPSILON)
        self.qkv = nn.Linear(inside, 3 * outside)
        self.out = nn.Linear(outside, outside)
        self.mlp = nn.Sequential(
            nn.Linear(outside, outside), nn.GELU(), nn.Linear(outside, outside), nn.Dropout(DROPOUT)
        )
        self.dropout = nn.Dropout(DROPOUT)
        drawn = nn.init.orthogonal_(torch.empty(FEATURES, outside))
        self.register_buffer("directions", math.sqrt(FEATURES) * drawn)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, L, outside)` of `(N, L, inside)`."""
        query, key, value = self.qkv(self.norm1(x)).chunk(3, 2)
        # x is wider, so the values are the shortcut
        x = value + self.dropout(self.out(self.attend(query, key, value)))
        return x + self.mlp(self.norm2(x))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return for each of the queries the weighted mean of the values; all are `(N, L, D)`."""
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = (x.to(self.directions.dtype) for x in (query, key, value))
            key = key @ self.directions.T - key.square().sum(2, keepdim=True) / 2
            query = (query @ self.directions.T + key.logsumexp(1, keepdim=True)).softmax(2)
            return query @ (key.softmax(1).transpose(1, 2) @ value)


class T2t(Network):
    """T2T-ViT-7, classified by a class token.

    Args:
        classes: K.
        channels: C.
        size: Height and width of the images.
    """

    def __init__(self, classes: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.grids = []
        for patch, stride, padding in UNFOLDED:
            size = tuple((side + 2 * padding - patch) // stride + 1 for side in size)
            self.grids.append(size)
        wide, narrow = channels * UNFOLDED[0][0] ** 2, TOKEN * UNFOLDED[1][0] ** 2
        self.performers = nn.ModuleList([Performer(wide, TOKEN), Performer(narrow, TOKEN)])
        self.project = nn.Linear(narrow, WIDTH)
        self.cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.register_buffer("pos_embed", sinusoids(1 + math.prod(size), WIDTH))
        self.blocks = nn.ModuleList(
            Block(Attention(WIDTH, HEADS, bias=False), WIDTH, EXPANSION, drop)
            for drop in drops(DEPTH)
        )
        self.norm = nn.LayerNorm(WIDTH, EPSILON)
        self.head = nn.Linear(WIDTH, classes)
        draw(self)
        nn.init.normal_(self.cls_token, std=SPREAD)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the normed class token `(N, D)` of `images` `(N, C, H, W)`, and the tokens of three blocks as maps.

        They are the blocks 0, 3 and 6, without class token.
        """
        x = images
        for i, performer in enumerate(self.performers):
            x = as_map(performer(_unfolded(x, i)), self.grids[i])
        x = self.project(_unfolded(x, 2))
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        maps = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TOLD:
                maps.append(as_map(x, self.grids[-1], prefix=1))
        return self.norm(x[:, 0]), maps


def _unfolded(x: Tensor, step: int) -> Tensor:
    """Return the patches of `x` `(N, C, H, W)` as tokens `(N, L, C patch patch)`."""
    patch, stride, padding = UNFOLDED[step]
    return F.unfold(x, patch, padding=padding, stride=stride).transpose(1, 2)


def sinusoids(count: int, width: int) -> Tensor:
    """Return what is added to tokens at places 0 to `count`, `(1, count, width)` (Vaswani et al., 2017, Sec. 3.5)."""
    rates = 10_000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).float()[None]
