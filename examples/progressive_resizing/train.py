"""Progressive resizing: small pictures first, larger ones later, one history.

    python train.py           # scikit-learn's digits, at 8, then 16, then 24 pixels
    python train.py --full    # Imagenette at 64, 128, then 192 pixels (a download)

Each size is a call of `train` of its own. With `reset_run_history=False` the epochs are counted
on, so that the losses are one curve.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, TensorDataset

from pa_core import Trainer


def digits_of(size: int) -> tuple[Dataset, Dataset]:
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


def imagenette_of(size: int) -> tuple[Dataset, Dataset]:
    from torchvision import transforms
    from torchvision.datasets import Imagenette

    folder = Path(__file__).parent / "data"
    resize = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    whole = [transforms.Resize(size), transforms.CenterCrop(size)]
    train, held_out = (
        Imagenette(
            folder,
            split=split,
            size="320px",
            download=not (folder / "imagenette2-320").exists(),
            transform=transforms.Compose([*steps, transforms.ToTensor()]),
        )
        for split, steps in (("train", resize), ("val", whole))
    )
    return train, held_out


def build_model(channels: int) -> nn.Module:
    """Convolutions with a mean over the picture at their end, which take pictures of any size."""

    def block(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    return nn.Sequential(
        block(channels, 16),
        nn.MaxPool2d(2),
        block(16, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="Imagenette (a download)")
    parser.add_argument("--epochs", type=int, default=2, help="at each size")
    arguments = parser.parse_args()
    load, sizes = (imagenette_of, (64, 128, 192)) if arguments.full else (digits_of, (8, 16, 24))

    model = build_model(channels=3 if arguments.full else 1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optim.AdamW(model.parameters(), lr=1e-2))
    for size in sizes:
        train_set, held_out = load(size)
        trainer.print(f"Pictures of {size} x {size} pixels")
        trainer.train(
            train_set,
            num_epochs=arguments.epochs,
            eval_dataset=held_out,
            per_device_batch_size=32,
            create_scheduler_fn="cosine",
            reset_run_history=False,
        )
    accuracies = trainer.run_history.get_metric_values("accuracy")
    trainer.print(f"Epochs: {len(accuracies)}, accuracy: {accuracies[-1]:.4f}")


if __name__ == "__main__":
    main()
