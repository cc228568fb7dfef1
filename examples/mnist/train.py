"""The MNIST network in three lines.

python train.py           # scikit-learn's 1,797 digits, in seconds
python train.py --full    # MNIST's 70,000, downloaded by torchvision
"""

import argparse
from pathlib import Path

import torch
from torch import nn, optim
from torch.utils.data import Dataset, TensorDataset, random_split

from pa_core import Trainer


def load_data(full: bool) -> tuple[Dataset, Dataset, int]:
    """Training and evaluation data, and how many pixels a picture has."""
    if full:
        from torchvision import transforms
        from torchvision.datasets import MNIST

        folder = Path(__file__).parent / "data"
        parts = [
            MNIST(folder, train=train, download=True, transform=transforms.ToTensor())
            for train in (True, False)
        ]
        return parts[0], parts[1], 28 * 28
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    generator = torch.Generator().manual_seed(0)
    return *random_split(data, [0.8, 0.2], generator=generator), 8 * 8


class Network(nn.Module):
    def __init__(self, num_pixels: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(num_pixels, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.main(images.flatten(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="MNIST (a download)")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    train_set, held_out, num_pixels = load_data(arguments.full)

    model = Network(num_pixels)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optim.AdamW(model.parameters(), lr=3e-3))
    trainer.train(train_set, arguments.epochs, eval_dataset=held_out, per_device_batch_size=32)

    trainer.print(f"Accuracy: {trainer.evaluate(held_out)['accuracy']:.4f}")


if __name__ == "__main__":
    main()
