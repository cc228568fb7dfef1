"""Recognize handwritten digits.

    python train.py            # scikit-learn's 1,797 digits, in seconds
    python train.py --full     # MNIST's 70,000, downloaded by torchvision

The pyproject.toml next to this file enables the metrics and the learning-rate scheduler.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset

from pa_core import Trainer
from pa_core.utils import local_process_zero_first


def build_model(num_pixels: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(num_pixels, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """Images (8 x 8, from 0 to 1) with their digits: 1,437 for training, 360 held out."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return TensorDataset(images[train], labels[train]), TensorDataset(
        images[held_out], labels[held_out]
    )


@local_process_zero_first  # the other processes use its download
def load_mnist() -> tuple[TensorDataset, TensorDataset]:
    """Images (28 x 28, from 0 to 1) with their digits: 60,000 for training, 10,000 held out."""
    from torchvision.datasets import MNIST

    def load(train: bool) -> TensorDataset:
        mnist = MNIST(Path(__file__).parent / "data", train=train, download=True)
        images: Tensor = mnist.data / 255
        return TensorDataset(images, mnist.targets)

    return load(train=True), load(train=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Recognize handwritten digits.")
    parser.add_argument("--full", action="store_true", help="train on MNIST (a download)")
    parser.add_argument("--epochs", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    train_dataset, held_out = load_mnist() if arguments.full else load_digits()
    torch.manual_seed(0)
    model = build_model(num_pixels=train_dataset.tensors[0][0].numel())

    trainer = Trainer(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.AdamW(model.parameters(), lr=3e-3),
    )
    trainer.train(
        train_dataset,
        num_epochs=arguments.epochs,
        eval_dataset=held_out,
        per_device_batch_size=32,
    )
    results = trainer.evaluate(held_out, per_device_batch_size=256)

    trainer.print(f"Accuracy on {len(held_out)} held-out digits: {results['accuracy']:.4f}")


if __name__ == "__main__":
    main()
