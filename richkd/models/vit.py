"""DeiT-Ti and PiT-Ti through timm, classified by their class token, as they are distilled from CNNs.

Drop-path grows linearly to 0.1; there is no distillation token. Shapes: N images of C channels, D features, K classes.
"""

import torch
from torch import Tensor, nn

from richkd.errors import ConfigError
from richkd.models.attention import DROP_PATH, as_map, as_tokens
from richkd.models.library import FIELDS, LibraryNetwork

PATCH = 16  # pixels of a side
TOLD = (0, 6, 11)  # blocks of PiT-Ti, counted over all stages, whose outputs stand for stages


class Deit(LibraryNetwork):
    """DeiT-Ti (Touvron et al., 2021), whose maps are the tokens of the blocks 0, 6 and 11.

    Args:
        classes: K.
        channels: C.
        size: Height and width of the images.
    """

    def __init__(self, classes: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__(_body("deit_ti", "deit_tiny_patch16_224", classes, channels, size), "head")


class Pit(LibraryNetwork):
    """PiT-Ti (Heo et al., 2021): a transformer in three stages, between which tokens are pooled.

    Args:
        classes: K.
        channels: C.
        size: Height and width of the images.
    """

    def __init__(self, classes: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__(_body("pit_ti", "pit_ti_224", classes, channels, size), "head")

    def staged(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the normed class token `(N, D)` of `images` `(N, C, H, W)`, and the tokens of three blocks as maps.

        They are the blocks 0, 6 and 11: the first of the first stage, the fifth of the second, the last of the third.
        """
        body, maps = self.body, []
        x = body.pos_drop(body.patch_embed(images) + body.pos_embed)
        token = body.cls_token.expand(x.shape[0], -1, -1)
        for stage in body.transformers:
            if stage.pool is not None:
                x, token = stage.pool(x, token)
            grid = tuple(x.shape[2:])
            tokens = stage.norm(torch.cat([token, as_tokens(x)], 1))
            for block in stage.blocks:
                tokens = block(tokens)
                x = as_map(tokens, grid, prefix=1)
                maps.append(x)
            token = tokens[:, :1]
        return body.forward_head(body.norm(token)), [maps[i] for i in TOLD]


def _body(name: str, of_timm: str, classes: int, channels: int, size: tuple[int, int]) -> nn.Module:
    import timm

    if min(size) < PATCH:
        raise ConfigError(
            f"{FIELDS}: {name} must see images of at least {PATCH} x {PATCH} pixels, a patch, but these have "
            f"{size[0]} x {size[1]}; take another network, such as cnn8, or larger images (the digits are 8 x 8)."
        )
    return timm.create_model(
        of_timm, num_classes=classes, in_chans=channels, img_size=size, drop_path_rate=DROP_PATH
    )
