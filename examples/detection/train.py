"""Object detection with torchvision's Faster R-CNN.

    python train.py           # squares and discs in generated images, a small backbone
    python train.py --full    # pretrained on COCO, fine-tuned on Penn-Fudan (downloads)

In training the model returns a dict of losses, in evaluation boxes: three overridden methods of the
Trainer handle this. The pyproject.toml next to this file enables mean average precision. `predict`
returns the boxes of each image, any number of them, in dataset order.
"""

import argparse
from functools import partial
from typing import Any

import torch
from detection_data import Pedestrians, Sample, Shapes, collate
from torch import Tensor, nn, optim
from torch.utils.data import Dataset

from pa_core import Trainer
from pa_core.utils import local_process_zero_first


class Backbone(nn.Sequential):
    """Features with a stride of 4 pixels."""

    out_channels = 32  # FasterRCNN needs it

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )


def small_model() -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.rpn import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    return FasterRCNN(
        Backbone(),
        min_size=64,
        max_size=64,
        rpn_anchor_generator=AnchorGenerator(sizes=((16, 24),), aspect_ratios=((1.0,),)),
        rpn_pre_nms_top_n_train=64,
        rpn_post_nms_top_n_train=32,
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
        box_head=TwoMLPHead(32 * 5 * 5, 128),
        box_predictor=FastRCNNPredictor(128, num_classes=3),
        box_batch_size_per_image=32,
        box_detections_per_img=8,
    )


@local_process_zero_first  # the other processes use its download
def pretrained_model_and_pedestrians() -> tuple[nn.Module, Dataset[Sample], Dataset[Sample]]:
    from torchvision.models.detection import (
        FasterRCNN_ResNet50_FPN_V2_Weights,
        fasterrcnn_resnet50_fpn_v2,
    )
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    model = fasterrcnn_resnet50_fpn_v2(weights=FasterRCNN_ResNet50_FPN_V2_Weights.DEFAULT)
    inputs = model.roi_heads.box_predictor.cls_score.in_features
    model.roi_heads.box_predictor = FastRCNNPredictor(inputs, num_classes=2)
    return model, Pedestrians(held_out=False), Pedestrians(held_out=True)


class DetectionTrainer(Trainer):
    """Handles the outputs of detection models."""

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        images, targets = batch
        losses = self.model(images, targets)
        loss = sum(losses.values())
        return {"loss": loss, "model_outputs": losses, "batch_size": len(images)}

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        images, _ = batch
        with torch.no_grad():
            predictions = self.model(images)
        # These models compute no loss in evaluation mode; the metrics measure the boxes.
        loss = torch.zeros((), device=self.device)
        return {"loss": loss, "model_outputs": predictions, "batch_size": len(images)}

    def calculate_predictions(self, batch: Any) -> list[dict[str, Tensor]]:
        return self.model(batch[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="pedestrians (downloads)")
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train_set: Dataset[Sample]
    held_out: Dataset[Sample]
    if arguments.full:
        model, train_set, held_out = pretrained_model_and_pedestrians()
    else:
        model, train_set, held_out = small_model(), Shapes(96, seed=0), Shapes(24, seed=1000)

    lr = 1e-4 if arguments.full else 4e-3
    trainer = DetectionTrainer(model, loss_func=None, optimizer=partial(optim.AdamW, lr=lr))
    trainer.train(
        train_set,
        arguments.epochs,
        eval_dataset=held_out,
        per_device_batch_size=4,
        collate_fn=collate,
    )
    found = trainer.predict(held_out, per_device_batch_size=4)[0]  # the highest score first
    trainer.print(f"First image: {found['boxes'][:1].tolist()}, {found['scores'][:1].tolist()}")
    precision = trainer.run_history.get_latest_metric("map_50")
    trainer.print(f"Mean average precision at 50 % overlap: {precision:.4f}")


if __name__ == "__main__":
    main()
