"""Any model of open_clip as a zero-shot teacher, with its own preprocessing and tokenizer.

Shapes: N images, M texts, D features.
"""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.errors import ConfigError
from richkd.files import sha256_of

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 64  # images or texts at once
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
AGAIN = 600.0  # seconds after which a download that failed is tried again: without internet each try takes most of a minute

_failed: dict[tuple[str, str | None], tuple[str, float]] = {}  # downloads: what was said, and when


def identity(model: str, pretrained: str | None, file: str | None = None) -> str:
    """Return what the features depend on: the installed open_clip fixes architecture and preprocessing."""
    weights = pretrained or "no tag"
    if file is not None:
        if not Path(file).is_file():
            raise ConfigError(f"clip.file must be a file of weights but {file} is missing.")
        weights += f", {sha256_of(Path(file))}"
    elif pretrained is None:
        weights = f"random weights of seed 0, torch {torch.__version__}"
    return f"{model}, {weights}, open_clip {version('open_clip_torch')}"


class OpenClip:
    """A model of open_clip.

    Args:
        model: Architecture.
        pretrained: Tag of the weights, which fixes activation and preprocessing. None: those of the
            architecture alone, and weights drawn at random, from a seed of their own, unless there is a file.
        file: Where the weights lie on this machine; without it those of the tag are downloaded.
        device: Where it runs.

    Raises:
        ConfigError: If there is no such model, tag or file, if it cannot be had, or if weights and
            activation do not fit.
    """

    def __init__(
        self, model: str, pretrained: str | None, file: str | None, device: torch.device
    ) -> None:
        import open_clip

        self.device = device
        _check(open_clip, model, pretrained)
        failed, when = _failed.get((model, pretrained), ("", -math.inf))
        if file is None and time.monotonic() - when < AGAIN:
            raise ConfigError(failed)
        # given a file open_clip asks no tag, and would take the plain preprocessing
        tag = (open_clip.get_pretrained_cfg(model, pretrained) or {}) if pretrained and file else {}
        preprocessing = {f"image_{key}": tag[key] for key in PREPROCESSING if key in tag}
        # drawn from a fixed seed where weights are random, and without a trace in the caller's stream
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(0)
            try:
                self.network, _, self.transform = open_clip.create_model_and_transforms(
                    model,
                    pretrained=file or pretrained,
                    device=device,
                    weights_only=True,
                    **preprocessing,
                )
            except Exception as error:  # of the network, of the hub, or of a foreign file
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                what = f"clip.file={file}" if file else f"clip.pretrained={pretrained}"
                hint = (
                    "give open_clip's own file of these weights"
                    if file
                    else "download it on a machine with internet and give clip.file too"
                )
                said = f"{what} of {model} could not be loaded ({reason}); {hint}, or give clip.logits."
                if file is None:
                    _failed[model, pretrained] = said, time.monotonic()
                raise ConfigError(said) from error
        self.network.eval().requires_grad_(False)
        self.tokenize = open_clip.get_tokenizer(model)

    @property
    def logit_scale(self) -> float:
        """The model's exp(logit_scale); its bias, where it has one, changes nothing."""
        return self.network.logit_scale.exp().item()

    @torch.no_grad()
    def encode_images(self, pictures: "Iterable[Image]") -> Tensor:
        """Return unit-norm features `(N, D)`; grey becomes RGB. Few pictures are held at a time."""
        parts, left = [], iter(pictures)
        while images := [self.transform(picture) for picture in islice(left, BATCH)]:
            batch = torch.stack(images).to(self.device)
            parts.append(self.network.encode_image(batch).float().cpu())
        return F.normalize(torch.cat(parts), dim=1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Return unit-norm features `(M, D)`; texts longer than the context are cut, with a warning."""
        longest = getattr(self.tokenize, "context_length", None)
        encode = getattr(self.tokenize, "encode", None)
        if longest and encode:
            cut = [text for text in texts if len(encode(text)) > longest - 2]  # begin and end
            if cut:
                warnings.warn(
                    f"{len(cut)} of {len(texts)} captions are longer than the model's {longest} "
                    f"tokens and are cut, the first is {cut[0][:60]!r}.",
                    stacklevel=2,
                )
        tokens = self.tokenize(texts)
        parts = [
            self.network.encode_text(part.to(self.device)).float().cpu()
            for part in tokens.split(BATCH)
        ]
        return F.normalize(torch.cat(parts), dim=1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the libraries say while a model is made: of random weights, and of each try of a download."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what matters comes as an exception
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check(open_clip: Any, model: str, pretrained: str | None) -> None:
    """Refuse what open_clip would answer with a traceback, or with a warning that is easily missed."""
    config = open_clip.get_model_config(model)
    if config is None:
        near = get_close_matches(model, [*open_clip.list_models(), "miniature"], 1)
        hint = f"did you mean {near[0]}?" if near else "see open_clip.list_models()."
        raise ConfigError(
            f"clip.model must be a name of open_clip's, or miniature, but got {model!r}; {hint}"
        )
    if pretrained is None:
        return
    plain = model.removesuffix("-quickgelu")
    other = f"{plain}-quickgelu" if model == plain else plain
    known = open_clip.get_pretrained_cfg(model, pretrained)
    weights = known or open_clip.get_pretrained_cfg(other, pretrained)
    if weights and weights.get("quick_gelu", False) != config.get("quick_gelu", False):
        trained = "with" if weights.get("quick_gelu", False) else "without"
        raise ConfigError(
            f"clip.pretrained={pretrained} was trained {trained} the QuickGELU activation but "
            f"clip.model={model} {'has' if trained == 'without' else 'lacks'} it; use clip.model={other}."
        )
    if not known:
        tags = open_clip.list_pretrained_tags_by_model(model)
        near = get_close_matches(pretrained, tags, 1)
        hint = f"did you mean {near[0]}?" if near else f"tags: {', '.join(tags) or 'none'}."
        raise ConfigError(
            f"clip.pretrained must be a tag of {model} but got {pretrained!r}; {hint} A file of weights is "
            "clip.file, beside the tag that it is a copy of, or beside clip.pretrained=null."
        )
