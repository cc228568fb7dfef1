"""Object detection with torchvision's Faster R-CNN.

    python train.py           # squares and discs in generated pictures, a small backbone
    python train.py --full    # pretrained on COCO, fine-tuned on Penn-Fudan (a download)

In training the model returns a dict of losses, in evaluation boxes: two methods of the Trainer say
so. Predictions of any number of boxes are gathered from all processes in the dataset's order.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils.data import Dataset

from pa_core import Trainer
from pa_metrics import MetricsPlugin

Sample = tuple[Tensor, dict[str, Tensor]]


class Shapes(Dataset[Sample]):
    """Pictures (3 x 64 x 64) with one or two bright squares (1) or discs (2) on a dark ground."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(self.seed + index)
        picture = torch.rand(3, 64, 64, generator=generator) * 0.2
        y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        boxes, labels = [], []
        for half in range(1 + index % 2):  # in the left half, and perhaps in the right one
            radius = int(torch.randint(7, 12, (), generator=generator))
            row = int(torch.randint(radius, 64 - radius, (), generator=generator))
            column = 16 + 32 * half
            label = 1 + int(torch.randint(0, 2, (), generator=generator))
            square = ((y - row).abs() <= radius) & ((x - column).abs() <= radius)
            disc = (y - row) ** 2 + (x - column) ** 2 <= radius**2
            picture[:, square if label == 1 else disc] += 0.8
            boxes.append([column - radius, row - radius, column + radius, row + radius])
            labels.append(label)
        return picture, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}


class Pedestrians(Dataset[Sample]):
    """https://www.cis.upenn.edu/~jshi/ped_html, unpacked beside this file."""

    def __init__(self, held_out: bool) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        folder = Path(__file__).parent / "data"
        address = "https://www.cis.upenn.edu/~jshi/ped_html/PennFudanPed.zip"
        download_and_extract_archive(address, folder)
        pictures = sorted((folder / "PennFudanPed" / "PNGImages").iterdir())
        self.pictures = pictures[:34] if held_out else pictures[34:]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        from torchvision.io import decode_image
        from torchvision.ops import masks_to_boxes

        path = self.pictures[index]
        mask = decode_image(str(path.parents[1] / "PedMasks" / f"{path.stem}_mask.png"))
        people = mask.unique()[1:]
        boxes = masks_to_boxes((mask == people[:, None, None]).byte())
        picture = decode_image(str(path), mode="RGB").float() / 255
        return picture, {"boxes": boxes, "labels": torch.ones(len(people), dtype=torch.int64)}


def small_model() -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator

    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
    )
    backbone.out_channels = 32
    return FasterRCNN(
        backbone,
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(((16, 24),), ((1.0,),)),
        rpn_pre_nms_top_n_train=64,
        rpn_post_nms_top_n_train=32,
        box_batch_size_per_image=32,
        box_detections_per_img=8,
    )


def pretrained_model() -> nn.Module:
    from torchvision.models.detection import (
        FasterRCNN_ResNet50_FPN_V2_Weights,
        fasterrcnn_resnet50_fpn_v2,
    )
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    model = fasterrcnn_resnet50_fpn_v2(weights=FasterRCNN_ResNet50_FPN_V2_Weights.DEFAULT)
    inputs = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FastRCNNPredictor(inputs, num_classes=2)
    return model


class DetectionTrainer(Trainer):
    """Knows what a detection model returns."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        pictures, targets = batch
        losses = self.model(pictures, targets)
        loss = sum(losses.values())
        return {"loss": loss, "model_outputs": losses, "batch_size": len(pictures)}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        pictures, _ = batch
        with torch.no_grad():
            predictions = self.model(pictures)
        # In evaluation these models calculate no loss; the metrics say how good the boxes are.
        loss = torch.zeros((), device=self.device)
        return {"loss": loss, "model_outputs": predictions, "batch_size": len(pictures)}

    def calculate_predictions(self, batch: Any) -> list[dict[str, Tensor]]:
        return self.model(batch[0])


def collate(samples: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Pictures of different sizes and numbers of boxes stay lists."""
    pictures, targets = zip(*samples, strict=True)
    return list(pictures), list(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="pedestrians (a download)")
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.full:
        model, train_set, held_out = pretrained_model(), Pedestrians(False), Pedestrians(True)
    else:
        model, train_set, held_out = small_model(), Shapes(96, seed=0), Shapes(24, seed=1000)

    trainer = DetectionTrainer(
        model,
        loss_func=None,
        optimizer=optim.AdamW(model.parameters(), lr=1e-4 if arguments.full else 2e-3),
        plugins=[MetricsPlugin(metrics={"boxes": "MeanAveragePrecision"}), "schedulers"],
    )
    trainer.train(
        train_set,
        arguments.epochs,
        eval_dataset=held_out,
        per_device_batch_size=4,
        create_scheduler_fn="cosine",
        collate_fn=collate,
    )
    predictions = trainer.predict(held_out, per_device_batch_size=4)
    best = [float(found["scores"].max()) if len(found["scores"]) else 0.0 for found in predictions]
    trainer.print(f"Pictures with a sure box: {sum(score > 0.5 for score in best)} of {len(best)}")
    results = trainer.evaluate(held_out, per_device_batch_size=4)
    trainer.print(f"Mean average precision at 50 % overlap: {results['map_50']:.4f}")


if __name__ == "__main__":
    main()
