"""An event of one's own: a trainer that tells its callbacks of something no hook knows of.

    python train.py

`callback_handler.call_event` reaches every callback that has a method of that name. Here each
batch is shown to a callback that keeps count of the digits that training has seen.
"""

from collections import Counter
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.trainer import DEFAULT_CALLBACKS


class DigitCounter(TrainerCallback):
    """Counts the digits of the batches that it is shown."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def digits_seen(self, trainer: Trainer, digits: torch.Tensor) -> None:
        self.counts.update(digits.tolist())

    def on_training_run_end(self, trainer: Trainer) -> None:
        shown = ", ".join(f"{digit}: {count}" for digit, count in sorted(self.counts.items()))
        trainer.print(f"Digits seen: {shown}")


class TellingTrainer(Trainer):
    """Tells of the digits of each training batch."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.callback_handler.call_event("digits_seen", trainer=self, digits=batch[1])
        return super().calculate_train_batch_loss(batch)


def main() -> None:
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    trainer = TellingTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.AdamW(model.parameters(), lr=1e-2),
        callbacks=[DigitCounter, *DEFAULT_CALLBACKS],
        plugins=(),
    )
    data = TensorDataset(images, torch.tensor(digits.target))
    trainer.train(data, num_epochs=1, per_device_batch_size=64)


if __name__ == "__main__":
    main()
