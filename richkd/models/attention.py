"""What the transformers that are written here are made of: attention, blocks, and tokens as maps.

Shapes: N images, L tokens of D numbers, which lie on a grid of H x W behind a class token or none.
"""

from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6  # of layer norms
SPREAD = 0.02  # of linear layers and tokens at the start
DROP_PATH = 0.1  # share of images for which a branch of the last block is left out while training


def drops(blocks: int) -> list[float]:
    """Return of how many images each of the blocks leaves out a branch: of none in the first, growing linearly."""
    return [DROP_PATH * i / (blocks - 1) for i in range(blocks)]


def as_map(tokens: Tensor, grid: tuple[int, int], prefix: int = 0) -> Tensor:
    """Return tokens `(N, prefix + H W, D)` in their places, `(N, D, H, W)`, without the prefix."""
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, grid)


def as_tokens(maps: Tensor) -> Tensor:
    """Return maps `(N, D, H, W)` as tokens `(N, H W, D)`."""
    return maps.flatten(2).transpose(1, 2)


def draw(network: nn.Module) -> None:
    """Draw weights of linear layers with standard deviation 0.02; biases are 0."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=SPREAD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Attention(nn.Module):
    """Attention of several heads, to all tokens or to their map made `reduction` times smaller.

    Args:
        width: D.
        heads: Among which D is divided.
        bias: Whether queries, keys and values have one.
        reduction: Size and stride of the convolution ahead of keys and values; 1 is none.
        grid: H and W of the map that is reduced.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool,
        reduction: int = 1,
        grid: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        self.heads, self.grid, self.reduced = heads, grid, reduction > 1
        self.query = nn.Linear(width, width, bias)
        self.key_value = nn.Linear(width, 2 * width, bias)
        self.out = nn.Linear(width, width)
        if self.reduced:
            self.reduce = nn.Conv2d(width, width, reduction, reduction)
            self.norm = nn.LayerNorm(width, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, L, D)` of `(N, L, D)`."""
        seen = self.norm(as_tokens(self.reduce(as_map(x, self.grid)))) if self.reduced else x
        query, key, value = (
            each.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for each in (self.query(x), *self.key_value(seen).chunk(2, 2))
        )
        found = F.scaled_dot_product_attention(query, key, value)
        return self.out(found.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and two linear layers with a GELU between, each behind a norm and beside a shortcut.

    Args:
        attention: Of tokens with D numbers.
        width: D.
        expansion: How many times wider it is between the linear layers.
        drop: Of how many images, while training, a branch is left out; others count 1 / (1 - drop) times.
    """

    def __init__(self, attention: Attention, width: int, expansion: int, drop: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, EPSILON), nn.LayerNorm(width, EPSILON)
        self.attention, self.drop = attention, drop
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return `(N, L, D)` of `(N, L, D)`."""
        x = x + self._dropped(self.attention(self.norm1(x)))
        return x + self._dropped(self.mlp(self.norm2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return branch
        return branch * F.dropout(branch.new_ones(branch.shape[0], 1, 1), self.drop)
