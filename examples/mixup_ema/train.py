"""Mixup and CutMix, and an exponential moving average (EMA) of the weights that is also evaluated.

    python train.py           # a small CNN on scikit-learn's digits, in seconds
    python train.py --full    # ResNet-50 from scratch on Imagenette (a download)

The pyproject.toml next to this file enables both; `--full` uses full.toml. `accuracy` is that of
the trained model, `ema_accuracy` that of the average.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from pa_core import Trainer
from pa_core.utils import local_process_zero_first

HERE = Path(__file__).parent


class Network(nn.Module):
    num_classes = 10  # timm's models have it too; the plugin needs it for soft targets

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

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def load_digits(model: nn.Module) -> tuple[Dataset[Any], Dataset[Any]]:
    """1,437 images for training, 360 held out."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[held_out], labels[held_out]),
    )


@local_process_zero_first  # the other processes use its download
def load_imagenette(model: nn.Module) -> tuple[Dataset[Any], Dataset[Any]]:
    from torchvision.datasets import Imagenette

    from pa_models import create_transforms

    augmented, plain = create_transforms(model)
    train_set = Imagenette(HERE / "data", "train", "320px", download=True, transform=augmented)
    return train_set, Imagenette(HERE / "data", "val", "320px", download=True, transform=plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="Imagenette (a download)")
    parser.add_argument("--epochs", type=int, help="by default 8, or 40 with --full")
    arguments = parser.parse_args()
    torch.manual_seed(0)

    loss = nn.CrossEntropyLoss()  # for evaluation; training uses the loss on soft targets
    if arguments.full:
        trainer = Trainer("timm/resnet50", loss, None, settings=HERE / "full.toml")
        train_set, held_out = load_imagenette(trainer.get_model())
    else:
        trainer = Trainer(Network(), loss, optimizer=None)
        train_set, held_out = load_digits(trainer.get_model())
    epochs = arguments.epochs or (40 if arguments.full else 8)
    trainer.train(train_set, epochs, eval_dataset=held_out, per_device_batch_size=32)

    for name in ("accuracy", "ema_accuracy"):
        values = " ".join(f"{value:.3f}" for value in trainer.run_history.get_metric_values(name))
        trainer.print(f"{name}: {values}")


if __name__ == "__main__":
    main()
