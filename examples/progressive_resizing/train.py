"""Progressive resizing: small images first, larger ones later, one history.

    python train.py           # scikit-learn's digits at 8, 12, then 16 pixels, in seconds
    python train.py --full    # a ResNet-18 on Imagenette at 64, 128, then 192 pixels (a download)

Each size is a separate call of `train`, with its own warm-up and cosine schedule. With
`reset_run_history=False` the epochs are numbered across calls, and the losses form one curve.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, TensorDataset

from pa_core import Trainer
from pa_core.utils import local_process_zero_first


def digits_of(size: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """1,437 images for training, 360 held out; the same images at each size."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[held_out], labels[held_out]),
    )


@local_process_zero_first  # the other processes use its download
def imagenette_of(size: int) -> tuple[Dataset[Any], Dataset[Any]]:
    from torchvision import transforms as t
    from torchvision.datasets import Imagenette

    folder = Path(__file__).parent / "data"
    colors = [t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    augmented = t.Compose([t.RandomResizedCrop(size), t.RandomHorizontalFlip(), *colors])
    plain = t.Compose([t.Resize(size * 8 // 7), t.CenterCrop(size), *colors])
    train_set = Imagenette(folder, "train", "320px", download=True, transform=augmented)
    return train_set, Imagenette(folder, "val", "320px", download=True, transform=plain)


def small_model() -> nn.Module:
    """Convolutions and adaptive pooling, so that images may have any size."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    return nn.Sequential(
        block(1, 16),
        nn.MaxPool2d(2),
        block(16, 32),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def resnet() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="Imagenette (a download)")
    parser.add_argument("--epochs", type=int, default=2, help="at each size")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.full:
        model, load, sizes, lr = resnet(), imagenette_of, (64, 128, 192), 1e-3
    else:
        model, load, sizes, lr = small_model(), digits_of, (8, 12, 16), 1e-2

    trainer = Trainer(model, nn.CrossEntropyLoss(), optim.AdamW(model.parameters(), lr=lr))
    for size in sizes:
        train_set, held_out = load(size)
        trainer.print(f"Images of {size} x {size} pixels")
        trainer.train(
            train_set,
            arguments.epochs,
            eval_dataset=held_out,
            per_device_batch_size=32,
            reset_run_history=False,
        )
    accuracies = list(trainer.run_history.get_metric_values("accuracy"))
    trainer.print(f"Epochs: {len(accuracies)}, accuracy: {accuracies[-1]:.4f}")


if __name__ == "__main__":
    main()
