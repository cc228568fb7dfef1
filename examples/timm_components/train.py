"""All that timm has, each a line of settings: model, transforms, optimizer, schedule, loss.

    python train.py           # a tiny ViT on scikit-learn's digits as pictures, in seconds
    python train.py --full    # ResNet-50 with pretrained weights on Imagenette (downloads)

The pyproject.toml beside this file names optimizer, layer-wise learning rates, label smoothing and
timm's cosine schedule.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from pa_core import Trainer
from pa_models import TimmPlugin, create_transforms


class Digits(Dataset[Any]):
    """scikit-learn's digits as pictures of PIL, transformed as the model wants them."""

    def __init__(self, places: list[int], transform: Any) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images, self.labels = digits.images[places], digits.target[places]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        picture = Image.fromarray((self.images[index] * 15.9).astype("uint8")).convert("RGB")
        return self.transform(picture), int(self.labels[index])


def digits_for(model: Any) -> tuple[Dataset[Any], Dataset[Any]]:
    transforms = create_transforms(model, scale=(0.8, 1.0), hflip=0.0)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0)).tolist()
    return Digits(order[:480], transforms[0]), Digits(order[480:600], transforms[1])


def imagenette_for(model: Any) -> tuple[Dataset[Any], Dataset[Any]]:
    from torchvision.datasets import Imagenette

    folder = Path(__file__).parent / "data"
    transforms = create_transforms(model, auto_augment="rand-m9-mstd0.5", re_prob=0.25)
    train, held_out = (
        Imagenette(
            folder,
            split=split,
            size="320px",
            download=not (folder / "imagenette2-320").exists(),
            transform=transform,
        )
        for split, transform in zip(("train", "val"), transforms, strict=True)
    )
    return train, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="ResNet-50 on Imagenette (downloads)")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # What is built for the occasion: all else is in the settings.
    name, options = (
        ("timm/resnet50", {"pretrained": True, "num_classes": 10})
        if arguments.full
        else ("timm/test_vit", {"img_size": 32, "in_chans": 3, "num_classes": 10})
    )
    model = TimmPlugin(model_options=options).register_models()[name]()
    if not arguments.full:
        model.pretrained_cfg["input_size"] = (3, 32, 32)
    train_set, held_out = (imagenette_for if arguments.full else digits_for)(model)

    trainer = Trainer(model, loss_func=None, optimizer=None)
    trainer.train(train_set, arguments.epochs, eval_dataset=held_out, per_device_batch_size=32)
    trainer.print(f"Accuracy: {trainer.evaluate(held_out)['accuracy']:.4f}")


if __name__ == "__main__":
    main()
