"""timm from the settings: model, optimizer, layer-wise learning rates, scheduler, loss.

    python train.py           # a small ResNet on scikit-learn's digits, in seconds
    python train.py --full    # ResNet-50 with pretrained weights on Imagenette (downloads)

The pyproject.toml next to this file configures the training; `--full` uses full.toml. The script
only loads the data, with the transforms that the model requires.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from pa_core import Trainer
from pa_core.utils import local_process_zero_first
from pa_models import create_transforms

HERE = Path(__file__).parent


class Digits(Dataset[Any]):
    """scikit-learn's digits as PIL images with the model's transforms."""

    def __init__(self, indices: list[int], transform: Any) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images, self.labels = digits.images[indices], digits.target[indices]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        image = Image.fromarray((self.images[index] * 15.9).astype("uint8")).convert("RGB")
        return self.transform(image), int(self.labels[index])


def digits_for(model: Any) -> tuple[Dataset[Any], Dataset[Any]]:
    """640 images for training, 200 held out."""
    augmented, plain = create_transforms(model, scale=(0.8, 1.0), hflip=0.0)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0)).tolist()
    return Digits(order[:640], augmented), Digits(order[-200:], plain)


@local_process_zero_first  # the other processes use its download
def imagenette_for(model: Any) -> tuple[Dataset[Any], Dataset[Any]]:
    from torchvision.datasets import Imagenette

    augmented, plain = create_transforms(model, auto_augment="rand-m9-mstd0.5", re_prob=0.25)
    train_set = Imagenette(HERE / "data", "train", "320px", download=True, transform=augmented)
    return train_set, Imagenette(HERE / "data", "val", "320px", download=True, transform=plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="ResNet-50 on Imagenette (downloads)")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    if arguments.full:
        settings, model, load = HERE / "full.toml", "timm/resnet50", imagenette_for
    else:
        settings, model, load = HERE / "pyproject.toml", "timm/test_resnet", digits_for
    trainer = Trainer(model, loss_func=None, optimizer=None, settings=settings)
    train_set, held_out = load(trainer.get_model())
    trainer.train(train_set, arguments.epochs, eval_dataset=held_out, per_device_batch_size=32)
    trainer.print(f"Accuracy: {trainer.evaluate(held_out)['accuracy']:.4f}")


if __name__ == "__main__":
    main()
