"""A custom event: a trainer that calls a method of callbacks that isn't a hook.

    python train.py           # scikit-learn's 1,797 digits, in seconds
    python train.py --full    # MNIST's 70,000, downloaded by torchvision

`callback_handler.call_event` calls every callback that has a method of that name. Here a callback
receives the labels of each batch and counts the digits seen in training.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.trainer import DEFAULT_CALLBACKS
from pa_core.utils import local_process_zero_first


class DigitCounter(TrainerCallback):
    """Counts the digits of the event `digits_seen`."""

    def on_training_run_start(self, trainer: Trainer) -> None:
        self.counts = torch.zeros(10, dtype=torch.int64, device=trainer.device)

    def digits_seen(self, trainer: Trainer, digits: Tensor) -> None:
        self.counts += digits.bincount(minlength=10)

    def on_training_run_end(self, trainer: Trainer) -> None:
        counts = trainer.gather(self.counts[None]).sum(dim=0)  # over all processes
        shown = ", ".join(f"{digit}: {count}" for digit, count in enumerate(counts.tolist()))
        trainer.print(f"Digits seen: {shown}")


class DigitsTrainer(Trainer):
    """Calls the event `digits_seen` for each training batch."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        self.callback_handler.call_event("digits_seen", trainer=self, digits=batch[1])
        return super().calculate_train_batch_loss(batch)


@local_process_zero_first  # the other processes use its download
def load_mnist() -> TensorDataset:
    from torchvision.datasets import MNIST

    mnist = MNIST(Path(__file__).parent / "data", download=True)
    return TensorDataset(mnist.data / 255, mnist.targets)


def load_digits() -> TensorDataset:
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    return TensorDataset(images, torch.tensor(digits.target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="MNIST (a download)")
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    data = load_mnist() if arguments.full else load_digits()
    num_pixels = data[0][0].numel()
    torch.manual_seed(0)

    model = nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 64), nn.ReLU(), nn.Linear(64, 10))
    trainer = DigitsTrainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.AdamW(model.parameters(), lr=1e-2),
        callbacks=[DigitCounter, *DEFAULT_CALLBACKS],
        plugins=(),
    )
    trainer.train(data, arguments.epochs, per_device_batch_size=64)


if __name__ == "__main__":
    main()
