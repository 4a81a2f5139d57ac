"""A CLIP small enough to be made on the spot: for digits of 8 x 8 pixels, pre-trained on rendered ones.

It is open_clip's own CLIP class with small towers. Its images are digits drawn from the fonts that ship
with matplotlib, bent and thickened at random; its captions come from templates. It never sees handwriting:
on it, it is used zero-shot, as the paper uses CLIP.

Shapes: N images, M texts, D features.
"""

import math
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from richkd import cache
from richkd.errors import DataError
from richkd.files import sha256_of, to_json, write_synced
from richkd.progress import Progress
from richkd.threads import one_thread

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

TEMPLATES = (
    "a photo of the digit {}",
    "a picture of the number {}",
    "the digit {}",
    "a handwritten {}",
    "a drawing of a {}",
    "an image of the number {}",
    "a scan of a written {}",
    "a small {}",
)
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STYLES = ("bold", "slanted", "mono", "serif", "thick", "thin", "wide", "narrow")
SYMBOLS = (  # faces without plain digits
    *("STIXSiz", "STIXNon", "cmex", "cmsy", "cmmi"),
    *("DejaVuSansDisplay", "DejaVuSerifDisplay"),
)
CONTEXT, WIDTH = 12, 48  # tokens of a text, D
IMAGES, EPOCHS, BATCH, LR, WARMUP = 6000, 6, 100, 3e-3, 20
NOISE = 0.1  # standard deviation of what is added to grey values in 0 to 1
MEAN, STD = 0.3, 0.38  # of digits in 0 to 1
# pixels: of the drawing, of the bitmap that is counted, of the image
CANVAS, BITMAP, SIZE = 96, 32, 8
FILE = "miniature.safetensors"


def recipe() -> dict[str, Any]:
    """Return all that the weights depend on."""
    constants = (IMAGES, EPOCHS, BATCH, LR, WARMUP, NOISE, MEAN, STD, CONTEXT, WIDTH)
    return {
        "format": 1,
        "constants": constants,
        "templates": TEMPLATES,
        "versions": {
            name: version(name) for name in ("torch", "open_clip_torch", "matplotlib", "pillow")
        },
    }


def identity(root: Path, progress: Progress | None = None) -> str:
    """Return a name that changes with the weights."""
    return f"miniature {sha256_of(weights(root, progress))}"


def weights(root: Path, progress: Progress | None = None) -> Path:
    """Return the file of the trained weights; the first to ask trains them, within a minute, into the cache.

    Args:
        root: Cache folder.
        progress: Told how far the pre-training is.
    """
    from safetensors.torch import save

    def build(folder: Path) -> None:
        with one_thread():
            trained = pretrain(progress)
        write_synced(folder / FILE, save(trained))
        write_synced(folder / "recipe.json", to_json(recipe()))

    return cache.folder(root, "miniature", recipe(), build, progress=progress) / FILE


class Tokenizer:
    """Words to numbers; a word that no caption of the training held means nothing, so it is refused."""

    def __init__(self) -> None:
        words = {*STYLES, *NAMES, *map(str, range(10))}
        for template in TEMPLATES:
            words |= set(template.replace("{}", "").split())
        self.numbers = {word: k + 2 for k, word in enumerate(sorted(words))}
        # 0 is padding; open_clip reads a text at its highest number
        self.begin, self.end = 1, len(words) + 2
        self.size = self.end + 1

    def __call__(self, texts: list[str]) -> Tensor:
        """Return `(M, CONTEXT)`.

        Raises:
            DataError: If a text has a word that is unknown, or more words than fit.
        """
        tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            words = re.findall(r"\w+", text.lower())
            if unknown := [word for word in words if word not in self.numbers]:
                raise DataError(
                    f"the miniature CLIP does not know {', '.join(unknown)} in {text!r}; it was made "
                    "for digits: use the prompts digits, digits-photo or digits-written, or a model of open_clip's."
                )
            if len(words) > CONTEXT - 2:
                raise DataError(
                    f"the miniature CLIP reads {CONTEXT - 2} words but {text!r} has {len(words)}; "
                    "shorten it."
                )
            numbers = [self.begin, *(self.numbers[word] for word in words), self.end]
            row[: len(numbers)] = torch.tensor(numbers)
        return tokens


def network(tokenizer: Tokenizer) -> torch.nn.Module:
    """Return the untrained towers: a ModifiedResNet of width 12 and two transformer layers."""
    import open_clip

    made = open_clip.CLIP(
        embed_dim=WIDTH,
        vision_cfg={"image_size": BITMAP, "layers": [1, 1, 1, 1], "width": 12, "head_width": 32},
        text_cfg={
            "context_length": CONTEXT,
            "vocab_size": tokenizer.size,
            "width": 48,
            "heads": 4,
            "layers": 2,
        },
    )
    # open_clip's own start is for long training: so few steps would not move texts apart
    torch.nn.init.normal_(made.token_embedding.weight, std=0.3)
    torch.nn.init.normal_(made.positional_embedding, std=0.1)
    with torch.no_grad():
        made.logit_scale.fill_(math.log(10))
    made.visual.to(memory_format=torch.channels_last)  # faster on a CPU
    return made


def prepare(images: Tensor) -> Tensor:
    """Turn grey values in 0 to 1 `(N, 8, 8)` into the tower's input `(N, 3, 32, 32)`."""
    images = ((images - MEAN) / STD)[:, None].expand(-1, 3, -1, -1)
    images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return images.contiguous(memory_format=torch.channels_last)


class Miniature:
    """The trained miniature.

    Args:
        device: Where it runs.
        file: As `weights` returns it.
    """

    def __init__(self, device: torch.device, file: Path) -> None:
        from safetensors.torch import load_file

        self.device, self.tokenizer = device, Tokenizer()
        with torch.random.fork_rng(devices=[]):
            self.network = network(self.tokenizer)
        self.network.load_state_dict(load_file(file))
        self.network.eval().requires_grad_(False).to(device)

    @property
    def logit_scale(self) -> float:
        """The trained exp(logit_scale)."""
        return self.network.logit_scale.exp().item()

    @torch.no_grad()
    def encode_images(self, pictures: "Iterable[Picture]") -> Tensor:
        """Return unit-norm features `(N, D)` of pictures brought to grey and 8 x 8."""
        grey = torch.stack([_grey(picture) for picture in pictures]).to(self.device)
        parts = [self.network.encode_image(prepare(part)) for part in grey.split(256)]
        return F.normalize(torch.cat(parts).float(), dim=1).cpu()

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """Return unit-norm features `(M, D)`."""
        features = self.network.encode_text(self.tokenizer(texts).to(self.device))
        return F.normalize(features.float(), dim=1).cpu()


def _grey(picture: "Picture") -> Tensor:
    """Return the grey values of a picture in 0 to 1, `(8, 8)`."""
    pixels = np.array(picture, np.float32)
    grey = torch.from_numpy(pixels if pixels.ndim == 2 else pixels.mean(2)) / 255
    if grey.shape == (SIZE, SIZE):
        return grey
    return F.interpolate(grey[None, None], (SIZE, SIZE), mode="area")[0, 0]


def pretrain(progress: Progress | None = None) -> dict[str, Tensor]:
    """Return the weights after contrastive training on rendered digits.

    Captions that name the same digit share the target's mass: with one caption in ten naming the same
    digit, calling the others wrong would teach little else than the styles.
    """
    steps, done = EPOCHS * (IMAGES // BATCH), 0

    def tell(share: float) -> None:
        if progress is not None:
            progress("miniature CLIP", round(100 * share), 100)

    rng = np.random.default_rng(0)
    images, labels, styles = render(IMAGES, rng, lambda share: tell(0.1 * share))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = Tokenizer()
        clip = network(tokenizer)
        optimizer = torch.optim.AdamW(
            clip.parameters(), lr=LR, weight_decay=0.1, betas=(0.9, 0.98), fused=True
        )
        for _ in range(EPOCHS):
            for rows in rng.permutation(IMAGES).reshape(-1, BATCH):
                for group in optimizer.param_groups:
                    warm = min(1, (done + 1) / WARMUP)
                    group["lr"] = LR * warm * (0.5 + 0.5 * math.cos(math.pi * done / steps))
                batch = images[rows]
                batch = (batch + NOISE * torch.randn_like(batch)).clamp(0, 1)
                shift = [int(rng.integers(-1, 2)) * int(rng.random() < 0.3) for _ in range(2)]
                texts = [caption(styles[row], int(labels[row]), rng) for row in rows]
                unique = {text: k for k, text in enumerate(dict.fromkeys(texts))}
                told = clip.encode_text(tokenizer(list(unique)), normalize=True)
                logits = clip.logit_scale.exp().clamp(max=100) * (
                    clip.encode_image(prepare(batch.roll(shift, (1, 2))), normalize=True)
                    @ told[[unique[text] for text in texts]].T
                )
                digit = torch.from_numpy(labels[rows])
                same = (digit[:, None] == digit).float()
                same /= same.sum(1, keepdim=True)
                loss = F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)
                optimizer.zero_grad(set_to_none=True)
                (loss / 2).backward()
                optimizer.step()
                done += 1
                if done % 10 == 0:
                    tell(0.1 + 0.9 * done / steps)
    return {name: value.contiguous() for name, value in clip.state_dict().items()}


def caption(styles: list[str], digit: int, rng: np.random.Generator) -> str:
    """Return one of a digit's captions: some of its styles, its word or its numeral, a template."""
    name = (NAMES[digit], str(digit))[rng.integers(2)]
    kept = rng.permutation(styles)[: rng.integers(0, 3)]
    return TEMPLATES[rng.integers(len(TEMPLATES))].replace("{}", " ".join([*kept, name]))


def render(
    count: int, rng: np.random.Generator, tell: Callable[[float], None] = lambda share: None
) -> tuple[Tensor, np.ndarray, list[list[str]]]:
    """Draw digits the way the handwritten set was made: bitmaps of 32 x 32, counted in blocks of 4 x 4.

    Returns:
        Grey values in 0 to 1 `(count, 8, 8)`, digits `(count,)`, and words that describe the style.
    """
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    faces = [(face, ImageFont.truetype(str(face), CANVAS // 2)) for face in fonts()]
    labels = rng.integers(0, 10, count)
    images, styles = np.zeros((count, SIZE, SIZE), np.float32), []
    half = CANVAS // 2
    y, x = np.mgrid[0:CANVAS, 0:CANVAS] - float(half)
    for k, digit in enumerate(labels):
        face, font = faces[rng.integers(len(faces))]
        drawn = Image.new("L", (CANVAS, CANVAS), 0)
        ImageDraw.Draw(drawn).text((half, half), str(digit), fill=255, font=font, anchor="mm")
        turn, shear = math.radians(rng.uniform(-15, 15)), rng.uniform(-0.35, 0.35)
        stretch = rng.uniform(0.75, 1.3)
        cos, sin = math.cos(turn), math.sin(turn)
        # a smooth displacement of some pixels, from 5 x 5 points
        bend = [
            np.asarray(Image.fromarray(points).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))
            for points in rng.normal(0, 4, (2, 5, 5)).astype(np.float32)
        ]
        from_x = cos * stretch * x + (cos * shear - sin) * y + half + bend[0]
        from_y = sin * stretch * x + (sin * shear + cos) * y + half + bend[1]
        pick = [np.clip(np.rint(v), 0, CANVAS - 1).astype(int) for v in (from_y, from_x)]
        bent = Image.fromarray(np.asarray(drawn)[pick[0], pick[1]])
        words = style_of(face)
        stroke = rng.integers(5)
        if stroke == 0:
            bent, words = bent.filter(ImageFilter.MaxFilter(5)), [*words, "thick"]
        elif stroke == 1:
            bent, words = bent.filter(ImageFilter.MinFilter(3)), [*words, "thin"]
        elif stroke == 2:
            bent = bent.filter(ImageFilter.MaxFilter(3))
        bent = bent.crop(bent.getbbox() or (0, 0, CANVAS, CANVAS))
        width = round(bent.width * BITMAP / bent.height * rng.uniform(0.85, 1.15))
        width = max(6, min(BITMAP, width))
        words += ["wide"] * (width > 24) + ["narrow"] * (width < 14)
        bitmap = Image.new("L", (BITMAP, BITMAP), 0)
        bent = bent.resize((width, BITMAP), Image.Resampling.BILINEAR)
        bitmap.paste(bent, ((BITMAP - width) // 2 + int(rng.integers(-1, 2)), 0))
        ink = np.asarray(bitmap) > rng.integers(90, 160)
        images[k] = ink.reshape(SIZE, 4, SIZE, 4).mean((1, 3))
        styles.append(words)
        if k % 500 == 0:
            tell(k / count)
    return torch.from_numpy(images), labels, styles


def fonts() -> list[Path]:
    """Return matplotlib's faces that have plain digits, in a fixed order."""
    import matplotlib

    faces = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    return [face for face in faces if not face.name.startswith(SYMBOLS)]


def style_of(face: Path) -> list[str]:
    """Return the words that a face's file name tells of its style."""
    name = face.name.lower()
    signs = {
        "bold": ("bold", "bol.ttf", "bx"),
        "slanted": ("obl", "ital"),
        "mono": ("mono", "cmtt"),
        "serif": ("serif", "stix", "cmr"),
    }
    return [word for word, found in signs.items() if any(sign in name for sign in found)]
