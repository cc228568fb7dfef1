"""Train a network on MNIST in three lines: a model, a trainer, a run.

    python train.py           # scikit-learn's 1,797 digits, in seconds
    python train.py --full    # MNIST's 70,000, downloaded by torchvision

The pyproject.toml next to this file enables the accuracy.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.utils.data import Dataset, TensorDataset, random_split

from pa_core import Trainer
from pa_core.utils import local_process_zero_first


@local_process_zero_first  # the other processes use its download
def load_mnist() -> tuple[Dataset[Any], Dataset[Any]]:
    """Images (1 x 28 x 28, from 0 to 1) with their digits, for training and held out."""
    from torchvision import transforms
    from torchvision.datasets import MNIST

    folder, to_tensor = Path(__file__).parent / "data", transforms.ToTensor()
    train_set = MNIST(folder, train=True, download=True, transform=to_tensor)
    return train_set, MNIST(folder, train=False, download=True, transform=to_tensor)


def load_digits() -> tuple[Dataset[Any], Dataset[Any]]:
    """The same with images of 1 x 8 x 8."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    generator = torch.Generator().manual_seed(0)
    train_set, held_out = random_split(data, [0.8, 0.2], generator)
    return train_set, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="MNIST (a download)")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    train_set, held_out = load_mnist() if arguments.full else load_digits()
    num_pixels = train_set[0][0].numel()
    torch.manual_seed(0)

    model = nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 128), nn.ReLU(), nn.Linear(128, 10))
    trainer = Trainer(model, nn.CrossEntropyLoss(), optim.AdamW(model.parameters(), lr=3e-3))
    trainer.train(train_set, arguments.epochs, eval_dataset=held_out, per_device_batch_size=32)

    trainer.print(f"Accuracy: {trainer.evaluate(held_out)['accuracy']:.4f}")


if __name__ == "__main__":
    main()
