"""PVT-Tiny, the first version (Wang et al., 2021): a transformer in four stages, with attention to reduced maps.

Each stage makes tokens of patches of the stage before, a quarter as many. Shapes: N images of C channels, L tokens,
D features, K classes.
"""

import math

import torch
from torch import Tensor, nn

from richkd.models.attention import (
    EPSILON,
    SPREAD,
    Attention,
    Block,
    as_map,
    as_tokens,
    draw,
    drops,
)
from richkd.models.network import Network

STAGES = (  # side of a patch, numbers of a token, heads, expansion, reduction (Table 1 of the paper)
    (4, 64, 1, 8, 8),
    (2, 128, 2, 8, 4),
    (2, 320, 5, 4, 2),
    (2, 512, 8, 4, 1),
)
DEPTH = 2  # blocks of a stage
TOLD = (0, 3, 7)  # blocks, counted over all stages, whose outputs stand for stages


class Stage(nn.Module):
    """Patches as tokens, what is added for their places, and blocks.

    Args:
        patches: Makes a map of patches.
        blocks: Of tokens as wide as it.
        grid: H and W of that map.
        prefix: Tokens ahead of the map's.
    """

    def __init__(
        self, patches: nn.Conv2d, blocks: list[Block], grid: tuple[int, int], prefix: int
    ) -> None:
        super().__init__()
        self.patches, self.grid, self.prefix = patches, grid, prefix
        self.norm = nn.LayerNorm(patches.out_channels, EPSILON)
        places = prefix + math.prod(grid)
        self.pos_embed = nn.Parameter(SPREAD * torch.randn(1, places, patches.out_channels))
        self.blocks = nn.ModuleList(blocks)


class Pvt(Network):
    """PVT-Tiny, classified by a class token that joins in the last stage.

    Args:
        classes: K.
        channels: C.
        size: Height and width of the images.
    """

    def __init__(self, classes: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        dropped = iter(drops(DEPTH * len(STAGES)))
        stages, inside, grid = [], channels, size
        for patch, width, heads, expansion, reduction in STAGES:
            grid = grid[0] // patch, grid[1] // patch
            blocks = []
            for _ in range(DEPTH):
                attention = Attention(width, heads, bias=True, reduction=reduction, grid=grid)
                blocks.append(Block(attention, width, expansion, next(dropped)))
            prefix = 1 if len(stages) == len(STAGES) - 1 else 0
            stages.append(Stage(nn.Conv2d(inside, width, patch, patch), blocks, grid, prefix))
            inside = width
        self.stages = nn.ModuleList(stages)
        self.cls_token = nn.Parameter(SPREAD * torch.randn(1, 1, inside))
        self.norm = nn.LayerNorm(inside, EPSILON)
        self.head = nn.Linear(inside, classes)
        draw(self)

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the normed class token `(N, D)` of `images` `(N, C, H, W)`, and the tokens of three blocks as maps.

        They are the blocks 0, 3 and 7: the first of the first stage and the last of the second and fourth.
        """
        x, maps = images, []
        for stage in self.stages:
            tokens = stage.norm(as_tokens(stage.patches(x)))
            if stage.prefix:
                tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1)
            tokens = tokens + stage.pos_embed
            for block in stage.blocks:
                tokens = block(tokens)
                x = as_map(tokens, stage.grid, stage.prefix)
                maps.append(x)
        return self.norm(tokens[:, 0]), [maps[i] for i in TOLD]
