"""Images augmented one by one with timm's transforms, made ahead by worker processes: for what no table of crops can hold.

    resized     random resized crop and flip, as for ImageNet
    strong      those, RandAugment (2 of 9, deviation 0.5) and random erasing of a quarter of the images: transformers

What is done to an image is a function of one seed alone, so that a run that is gone on with, and several workers, meet the
same pixels. An erased part holds normal noise about the mean of the normalisation, which leaves the range of a byte: pixels
of `strong` are grey levels as int16, in which the noise is rounded to a hundredth of its deviation or two, and nothing is
clipped. So augmented pixels can be shared by networks with a normalisation each.
"""

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from richkd import threads
from richkd.data.dataset import Dataset, Images
from richkd.data.pictures import centre
from richkd.data.views import Normalised, sent

RAND = "rand-m9-mstd0.5-inc1"  # timm's words for RandAugment's strength
ERASED = 0.25  # share of images a part of which is erased
CHUNK = 32  # images that a worker process makes at a time: a batch of them may not fit into shared memory
FEW = 512  # images: fewer are made sooner than processes start


class Stream(Normalised):
    """All views of some images, on one device; it has the face of `Views`, but for what needs them all at hand.

    A view is a seed `(1,)`.

    Args:
        images: N images of any size, files or pixels, of 3 channels.
        dataset: Says how they are augmented, to which size, and gives the normalisation.
        device: Where batches are made.
    """

    view = None
    streamed = True

    def __init__(self, images: Images, dataset: Dataset, device: torch.device) -> None:
        self.source, self.device = images, device
        self.shape = (*dataset.size, 3)
        self.resample, self.border = dataset.resample, dataset.border
        self.transform = transform_of(dataset)
        self._normalise_by(dataset.mean, dataset.std)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return `count` random views `(count, 1)`."""
        return torch.randint(2**32, (count, 1), generator=generator)

    def pixels(self, rows: Tensor, views: Tensor | None = None) -> Tensor:
        """Return those views of images `(B, H, W, 3)`, augmented as integers; the whole images, uint8, without `views`."""
        return sent(self._made(rows.cpu(), None if views is None else views.cpu()), self.device)

    def loader(self, batches: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Yield the pixels of each of `batches`, rows `(B,)` and views `(B, 1)`, in order, on the CPU.

        They are made ahead by `processes`, which end with the iterator, or with this process; here, where there are none.
        """
        chunks = [
            chunk
            for rows, views in batches
            for chunk in zip(rows.split(CHUNK), views.split(CHUNK), strict=True)
        ]
        made: Iterable[Tensor] = (self._made(*chunk) for chunk in chunks)
        if count := processes(self.device, sum(len(rows) for rows, _ in batches)):
            made = DataLoader(
                Chunks(self, chunks),
                batch_size=None,
                num_workers=count,
                multiprocessing_context="fork",  # which copies neither images nor rows
                generator=torch.Generator(),  # else a number is drawn from the global one
            )
        made = iter(made)
        for rows, _ in batches:
            # of no row there is one chunk, too
            yield torch.cat([next(made) for _ in range(max(math.ceil(len(rows) / CHUNK), 1))])

    def _made(self, rows: Tensor, views: Tensor | None = None) -> Tensor:
        if views is None:
            made = list(threads.ahead(self._whole, rows.tolist()))
        else:
            made = list(map(self._augmented, rows.tolist(), views[:, 0].tolist()))
        return torch.stack(made) if made else torch.empty(0, *self.shape, dtype=torch.uint8)

    def _whole(self, row: int) -> Tensor:
        picture = self.source.picture(row)
        return torch.from_numpy(centre(picture, self.shape[0], self.resample, self.border))

    def _augmented(self, row: int, seed: int) -> Tensor:
        picture = self.source.picture(row)
        with seeded(seed):
            return self.transform(picture)


def processes(device: torch.device, images: int) -> int:
    """Return how many processes make so many images: as many as this one was granted threads, or none.

    Beside training on a CPU they would only take its cores: two of them made it eight times slower on two busy cores.
    """
    return threads.GRANTED if device.type == "cuda" and images >= FEW and threads.GRANTED > 1 else 0


class Chunks:
    """What worker processes make: by number, the pixels of a chunk.

    Args:
        stream: Makes them.
        chunks: Rows and views of each.
    """

    def __init__(self, stream: Stream, chunks: list[tuple[Tensor, Tensor]]) -> None:
        self.stream, self.chunks = stream, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, k: int) -> Tensor:
        return self.stream._made(*self.chunks[k])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the three global generators that timm's transforms draw from, and restore them afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def transform_of(dataset: Dataset) -> Callable[[Image.Image], Tensor]:
    """Return what makes of a picture its augmented pixels `(H, W, 3)`, drawing from the global generators."""
    from timm.data import create_transform

    options: dict[str, Any] = {"color_jitter": None, "normalize": False}
    if dataset.augment == "strong":
        options = {"auto_augment": RAND, "re_prob": ERASED, "re_mode": "pixel"}
    transform = create_transform(
        dataset.size,
        is_training=True,
        hflip=0.5 * dataset.flip,
        interpolation=dataset.resample,
        mean=dataset.mean,
        std=dataset.std,
        **options,
    )
    for each in transform.transforms:
        for operation in getattr(each, "ops", ()):  # of RandAugment
            if operation.name == "PosterizeIncreasing":
                operation.aug_fn = posterised
    if dataset.augment == "resized":
        return lambda picture: transform(picture).permute(1, 2, 0)
    mean, std = (torch.tensor(each).mul(255).view(3, 1, 1) for each in (dataset.mean, dataset.std))

    def grey_levels(picture: Image.Image) -> Tensor:
        return (transform(picture) * std + mean).round_().short().permute(1, 2, 0)

    return grey_levels


def posterised(picture: Image.Image, bits: int, **_: object) -> Image.Image:
    """Return a picture with so many bits of each channel.

    In one of some forty draws timm asks for none, which Pillow 13 refuses; before, that made the picture black.
    """
    return picture.point(lambda level: level & (0xFF << (8 - bits)) & 0xFF)
