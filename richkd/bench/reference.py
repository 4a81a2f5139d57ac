"""Training as it is usually written: PIL images in a DataLoader, teacher online, fp32, a host read every step."""

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from richkd import distill
from richkd.config import Config
from richkd.data import Dataset, Views
from richkd.data.pictures import picture
from richkd.distill import Task
from richkd.teachers import FusedTeacher, looked_up


def augmentation(dataset: Dataset) -> Callable[[Image.Image], Tensor]:
    """Return torchvision's transforms that draw the views of `dataset`, from a PIL image to a normalised tensor."""
    from torchvision import transforms

    flip = [transforms.RandomHorizontalFlip()] if dataset.flip else []
    return transforms.Compose(
        [
            transforms.RandomCrop(dataset.size, padding=dataset.pad),
            *flip,
            transforms.ToTensor(),
            transforms.Normalize(dataset.mean, dataset.std),
        ]
    )


class Pictures(torch.utils.data.Dataset):
    """Transfer rows as PIL images under `transform`, each with its visible label and its row."""

    def __init__(self, task: Task, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pixels, self.transform = task.dataset.train.pixels, transform
        self.rows, self.labels = task.split.transfer, task.split.labels

    def __len__(self) -> int:
        return len(self.rows)

    def view(self, row: int) -> Tensor:
        """Return a random view `(C, H, W)` of a row."""
        return self.transform(picture(self.pixels[row]))

    def __getitem__(self, k: int) -> tuple[Tensor, int, int]:
        row = self.rows[k]
        return self.view(row), self.labels[row], row


class Reference:
    """The job of a variant as it is usually written, for comparison: the same loss from the same crops.

    Rows come as they fall, since the share of labelled ones in a batch changes no speed.

    Args:
        config: The run.
        task: Its data.
        teacher: Whose network and zero-shot logits are used.
    """

    def __init__(self, config: Config, task: Task, teacher: FusedTeacher) -> None:
        self.config, self.device = config, task.device
        self.student = distill.initial_student(config, task.dataset).to(task.device).train()
        self.temperature, self.alpha = teacher.temperature, teacher.alpha
        self.clip = teacher.zero_shot["train"]
        self.given, self.teacher = teacher.task.given, None
        if teacher.task.network is not None:
            network = copy.deepcopy(teacher.task.network)
            self.teacher = network.to(memory_format=torch.contiguous_format)
        self.adapt = renormalisation(task.train, teacher.task.train_views)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=config.train.lr,
            momentum=config.train.momentum,
            weight_decay=config.train.weight_decay,
        )
        self.loader = DataLoader(
            Pictures(task, augmentation(task.dataset)),
            batch_size=config.train.batch_size,
            shuffle=True,
        )
        self.batches = self._endless()

    def _endless(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def teacher_logits(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return the task teacher's logits `(B, K)` of `images`, or those given for their rows."""
        if self.teacher is None:
            return looked_up(self.given[0], rows, self.device)
        with torch.no_grad():
            return self.teacher(self.adapt(images))

    def loss(self, images: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of a batch; a label of -1 marks a row that has none."""
        logits = self.student(images)
        target = self.teacher_logits(images, rows)
        if self.clip is not None:
            clip = looked_up(self.clip, rows, self.device)
            target = self.alpha * target + (1 - self.alpha) * clip
        labelled = labels >= 0
        ce = logits.new_zeros(())
        if labelled.any():
            ce = F.cross_entropy(logits[labelled], labels[labelled])
        t = self.temperature
        student, target = F.log_softmax(logits / t, 1), F.softmax(target / t, 1)
        kd = F.kl_div(student, target, reduction="batchmean") * t**2
        return self.config.loss.ce * ce + self.config.loss.logit * kd

    def burst(self, steps: int) -> int:
        """Take `steps` steps and return how many images they saw."""
        images, total = 0, 0.0
        for _ in range(steps):
            batch, labels, rows = (part.to(self.device) for part in next(self.batches))
            loss = self.loss(batch, labels, rows)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
            images += len(batch)
        return images


def renormalisation(own: Views, wanted: Views) -> Callable[[Tensor], Tensor]:
    """Return what brings images normalised as in `own` to the normalisation of `wanted`."""
    if torch.equal(own.mean, wanted.mean) and torch.equal(own.std, wanted.std):
        return nn.Identity()
    scale = (own.std / wanted.std).view(-1, 1, 1)
    shift = ((own.mean - wanted.mean) / wanted.std).view(-1, 1, 1)
    return lambda images: images * scale + shift
