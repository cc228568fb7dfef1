"""The loss on mixed images and soft targets in training, and on plain targets in evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from pa_core import Trainer
    from pa_models.timm_settings import TimmSettings


class MixedLoss:
    """The loss of a classifier's batch ``(images, classes)`` according to the plugin's settings.

    Args:
        settings: the plugin's settings.
        num_classes: the number of classes of the model.
    """

    def __init__(self, settings: TimmSettings, num_classes: int) -> None:
        self.settings, self.num_classes = settings, num_classes
        self._mix = self._create_mix() if settings.mixes else None
        self._has_checked = False

    def _create_mix(self) -> Any:
        from timm.data import Mixup

        settings = self.settings
        return Mixup(
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            prob=settings.mix_prob,
            switch_prob=settings.mix_switch_prob,
            mode=settings.mix_mode,
            label_smoothing=settings.label_smoothing,
            num_classes=self.num_classes,
        )

    def training(self, trainer: Trainer, images: Tensor, classes: Tensor) -> dict[str, Any]:
        """The loss on soft targets.

        Returns:
            ``loss``, ``model_outputs`` (of the mixed images), ``batch_size``, and
            ``soft_targets``, shape ``(batch, classes)``. With label smoothing, ``log`` has the
            parts of the loss: ``unsmoothed_loss`` and ``uniform_loss``.
        """
        self._check(classes)
        images, soft = self._soften(trainer, images, classes)
        outputs = trainer.model(images)
        loss = self._loss(outputs, soft)
        output = {
            "loss": loss,
            "model_outputs": outputs,
            "batch_size": len(classes),
            "soft_targets": soft,
        }
        smoothing = self.settings.label_smoothing
        if smoothing:
            with torch.no_grad():  # both losses are linear in the targets
                uniform = self._loss(outputs, torch.full_like(soft, 1 / self.num_classes))
                unsmoothed = (loss - smoothing * uniform) / (1 - smoothing)
            output["log"] = {"unsmoothed_loss": unsmoothed, "uniform_loss": uniform}
        return output

    def _loss(self, outputs: Tensor, soft: Tensor) -> Tensor:
        if self.settings.bce:
            return functional.binary_cross_entropy_with_logits(outputs, soft)
        return functional.cross_entropy(outputs, soft)

    def evaluation(self, trainer: Trainer, images: Tensor, classes: Tensor) -> dict[str, Any]:
        """The trainer's ``loss_func`` on the plain targets; cross-entropy if it has none."""
        self._check(classes)
        with torch.no_grad():
            outputs = trainer.model(images)
            loss_func = trainer.loss_func or functional.cross_entropy
            loss = loss_func(outputs, classes)
        return {"loss": loss, "model_outputs": outputs, "batch_size": len(classes)}

    def _soften(self, trainer: Trainer, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        off = self.settings.mixup_off_epoch
        is_off = off is not None and trainer.run_history.current_epoch >= off
        even = len(images) // 2 * 2
        if self._mix is None or is_off or even == 0:
            return images, self._smoothed(classes)
        # A copy, because timm mixes in place and callbacks see the batch, too.
        mixed, soft = self._mix(images[:even].clone(), classes[:even])
        if even < len(images):  # images are mixed in pairs, so the last of an odd number isn't
            mixed = torch.cat([mixed, images[even:]])
            soft = torch.cat([soft, self._smoothed(classes[even:])])
        return mixed, soft

    def _smoothed(self, classes: Tensor) -> Tensor:
        smoothing = self.settings.label_smoothing
        hot = functional.one_hot(classes, self.num_classes).float()
        return hot * (1 - smoothing) + smoothing / self.num_classes

    def _check(self, classes: Tensor) -> None:
        """Check the first batch: its type, shape and range of classes."""
        if self._has_checked:
            return
        self._has_checked = True
        if classes.is_floating_point() or classes.ndim != 1:
            raise ValueError(
                "The timm plugin's loss expects classes, integers of shape (batch,), got "
                f"{classes.dtype} of shape {tuple(classes.shape)}"
            )
        largest = int(classes.max()) if len(classes) else 0
        if largest >= self.num_classes:
            raise ValueError(
                f"The targets have class {largest}, but the model has {self.num_classes} classes: "
                "set num_classes in model_options of [tool.pa-core.timm]"
            )
