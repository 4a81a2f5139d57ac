"""The loss of contrast beside the form in which it is usually written, which copies the rows that it needs of a bank."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from richkd.banks import Banks
from richkd.config import Config
from richkd.distill import Task
from richkd.losses import contrast


def gathered(embeddings: Tensor, bank: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """Return what `losses.similarities` returns, by one product for each embedding with its own copy of the chosen rows."""
    return (bank[chosen] @ embeddings[:, :, None]).squeeze(2) / temperature


class Contrasted:
    """Both sides of contrast, forward and backward, for a batch of random embeddings again and again.

    Args:
        config: The run.
        task: Its data.
        form: `similarities` or `gathered`.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        form: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    ) -> None:
        self.form, self.temperature = form, config.contrast.temperature
        rows = torch.arange(len(task.split.transfer))
        classes = torch.from_numpy(task.split.labels[task.split.transfer])
        self.banks = Banks(classes, config.contrast, 0, task.device)
        self.banks.begin(0)
        self.chosen = self.banks.draw(rows[: config.train.batch_size].to(task.device))
        drawn = torch.Generator(task.device).manual_seed(0)
        size = (2, len(self.chosen), config.contrast.width)
        self.embeddings = F.normalize(
            torch.randn(size, generator=drawn, device=task.device), dim=2
        ).requires_grad_()

    def burst(self, steps: int) -> int:
        """Take `steps` steps and return how many images they saw."""
        rows = len(self.chosen)
        normaliser = self.embeddings.new_tensor(float(self.banks.rows))
        for _ in range(steps):
            self.embeddings.grad = None
            sides = zip(self.embeddings, (self.banks.teacher, self.banks.student), strict=True)
            loss = sum(
                contrast(
                    self.form(own, bank, self.chosen, self.temperature),
                    *(normaliser, self.banks.rows, rows),
                )
                for own, bank in sides
            )
            loss.backward()
        return steps * rows
