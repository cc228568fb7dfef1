"""Fine-tuning with freezing: a network trained on some digits learns the others.

    python train.py              # scikit-learn's digits: trained on 0 to 4, fine-tuned on 5 to 9
    python train.py --by-hand    # the same, step by step
    python train.py --full       # ResNet-34 with pretrained weights on Oxford pets (downloads)

First only the new head is trained, with everything else frozen; then all layers, with smaller
learning rates for the earlier ones. `fine_tune` does this in one line; `by_hand` shows the steps.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn, optim
from torch.utils.data import Dataset, TensorDataset

from pa_core import Trainer
from pa_core.utils import local_process_zero_first
from pa_metrics import MetricsPlugin
from pa_models import ModelFreezer, discriminative_param_groups, fine_tune

Data = Dataset[Any]


def digits_between(first: int, last: int) -> tuple[Data, Data]:
    """The images of some of the digits, for training and held out."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = torch.tensor(digits.target)
    chosen = (first <= labels) & (labels <= last)
    images = torch.tensor(digits.images, dtype=torch.float32)[chosen, None] / 16
    labels = labels[chosen] - first
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[180:], order[:180]
    return (
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[held_out], labels[held_out]),
    )


def build_head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5))


def trained_on_five_digits() -> tuple[nn.Module, Data, Data, int]:
    """A model with a new head, the training and held-out data, and the number of classes."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        build_head(),
    )
    train_set, _ = digits_between(0, 4)
    optimizer = optim.AdamW(model.parameters(), lr=3e-3)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=(), plugins=())
    trainer.train(train_set, num_epochs=5, per_device_batch_size=32)
    model[-1] = build_head()
    return model, *digits_between(5, 9), 5


@local_process_zero_first  # the other processes use its download
def trained_on_imagenet() -> tuple[nn.Module, Data, Data, int]:
    from torchvision.datasets import OxfordIIITPet
    from torchvision.models import ResNet34_Weights, resnet34

    weights = ResNet34_Weights.DEFAULT
    model = resnet34(weights=weights)
    model.fc = nn.Linear(model.fc.in_features, 37)
    pets = partial(OxfordIIITPet, Path(__file__).parent / "data", download=True)
    transform = weights.transforms()
    train_set = pets(split="trainval", transform=transform)
    return model, train_set, pets(split="test", transform=transform), 37


def by_hand(trainer: Trainer, train_set: Data, held_out: Data, epochs: int) -> None:
    """Two runs: only the head, then all layers with different learning rates."""
    options: Any = {"eval_dataset": held_out, "per_device_batch_size": 32}
    freezer = ModelFreezer(trainer.get_model())
    freezer.freeze(to_index=-2)
    trainer.train(train_set, 1, **options)
    freezer.unfreeze()
    groups = discriminative_param_groups(trainer.get_model(), lr=slice(3e-4, 3e-3))
    trainer.optimizer = optim.AdamW(groups)
    trainer.train(train_set, epochs, reset_run_history=False, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="ResNet-34 on pets (downloads)")
    parser.add_argument("--by-hand", action="store_true", help="without fine_tune")
    parser.add_argument("--epochs", type=int, default=3, help="after one epoch of the head only")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    load = trained_on_imagenet if arguments.full else trained_on_five_digits
    model, train_set, held_out, num_classes = load()

    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        optim.AdamW(model.parameters(), lr=6e-3),
        plugins=[MetricsPlugin(task="multiclass", num_classes=num_classes)],
    )
    if arguments.by_hand:
        by_hand(trainer, train_set, held_out, arguments.epochs)
    else:
        fine_tune(
            trainer,
            train_set,
            arguments.epochs,
            lr_mult=10,
            eval_dataset=held_out,
            per_device_batch_size=32,
        )
    trainer.print(f"Accuracy: {trainer.evaluate(held_out)['accuracy']:.4f}")


if __name__ == "__main__":
    main()
