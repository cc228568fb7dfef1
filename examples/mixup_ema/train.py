"""Mixup and CutMix, and a moving average of the weights that is evaluated beside them.

    python train.py           # convolutions on scikit-learn's digits, in seconds
    python train.py --full    # ResNet-50 from scratch on Imagenette (a download)

The pyproject.toml beside this file switches both on. `accuracy` is the trained model's,
`ema_accuracy` the average's.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from pa_core import Trainer


class Network(nn.Module):
    num_classes = 10  # for the soft targets

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def small() -> tuple[Any, Dataset[Any], Dataset[Any]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return (
        Network(),
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[held_out], labels[held_out]),
    )


def full() -> tuple[Any, Dataset[Any], Dataset[Any]]:
    import timm
    from torchvision.datasets import Imagenette

    from pa_models import create_transforms

    model = timm.create_model("resnet50", num_classes=10)
    folder = Path(__file__).parent / "data"
    parts = [
        Imagenette(
            folder,
            split=split,
            size="320px",
            download=not (folder / "imagenette2-320").exists(),
            transform=transform,
        )
        for split, transform in zip(("train", "val"), create_transforms(model), strict=True)
    ]
    return model, parts[0], parts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="Imagenette (a download)")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, train_set, held_out = full() if arguments.full else small()

    trainer = Trainer(model, loss_func=nn.CrossEntropyLoss(), optimizer=None)
    trainer.train(train_set, arguments.epochs, eval_dataset=held_out, per_device_batch_size=32)
    for name in ("accuracy", "ema_accuracy"):
        values = trainer.run_history.get_metric_values(name)
        trainer.print(f"{name}: {' '.join(f'{value:.3f}' for value in values)}")
    trainer.print(f"Best accuracy of the average: {max(values):.4f}")


if __name__ == "__main__":
    main()
