"""The plugin ``distillation``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core import hookimpl
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pa_core import Trainer
    from torch import Tensor, nn


class DistillationPlugin:
    """Trains a model to give the outputs of a teacher, as well as the right ones.

    The loss of a training batch becomes ``(1 - weight) * student_loss + weight *
    distillation_loss``. Both parts are recorded as means over the epoch, ``train_student_loss`` and
    ``train_distillation_loss``. Evaluations aren't changed.

    Args:
        settings: the plugin's table.
        teacher: the teacher; by default the model of `Settings.teacher`.

    Raises:
        ValueError: at the start of a run without a teacher.
    """

    class Settings(BaseModel):
        """The table ``[tool.pa-core.distillation]``."""

        model_config = ConfigDict(extra="forbid")

        teacher: str | None = Field(
            None, description="The name of the teacher, a model that a plugin registers."
        )
        weights: Path | None = Field(
            None, description="A file with its weights: a state dict or a checkpoint file."
        )
        temperature: float = Field(
            2.0, gt=0, description="The divisor of both models' scores before the softmax."
        )
        weight: float = Field(
            0.5, ge=0, le=1, description="The weight of the distillation loss in the sum."
        )

    def __init__(self, settings: Settings, teacher: nn.Module | None = None) -> None:
        self.settings = settings
        self.teacher = teacher

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        if self.teacher is None:
            self.teacher = self.create_teacher(trainer)
        self.teacher.to(trainer.device).eval().requires_grad_(False)

    @hookimpl
    def on_backward_start(self, trainer: Trainer, batch: Any, batch_output: dict[str, Any]) -> None:
        import torch

        with torch.no_grad():
            target = self.run_teacher(batch)
        student_loss = batch_output["loss"]
        distillation_loss = self.distillation_loss(batch_output["model_outputs"], target)
        trainer.record_mean("student_loss", student_loss)
        trainer.record_mean("distillation_loss", distillation_loss)
        batch_output["loss"] = torch.lerp(student_loss, distillation_loss, self.settings.weight)

    # -- To override ----------------------------------------------------------------------------

    def create_teacher(self, trainer: Trainer) -> nn.Module:
        """Create the teacher from the settings."""
        import torch

        if self.settings.teacher is None:
            raise ValueError(
                "distillation has no teacher: name a registered model in the setting teacher, or "
                "pass one to DistillationPlugin(settings, teacher=model)"
            )
        factory: Any = trainer.plugins.find("register_models", self.settings.teacher)
        teacher: nn.Module = factory()
        if self.settings.weights is not None:
            content = torch.load(self.settings.weights, map_location="cpu", weights_only=True)
            teacher.load_state_dict(content.get("model_state_dict", content))
        return teacher

    def run_teacher(self, batch: Any) -> Tensor:
        """The teacher's scores for a batch; shape ``(samples, classes)``."""
        assert self.teacher is not None
        scores: Tensor = self.teacher(batch[0])
        return scores

    def distillation_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        r"""The mean of :math:`T^2 \, \mathrm{KL}(p_\text{teacher} \| p_\text{student})`.

        The probabilities are those at the temperature :math:`T`, whose square keeps the size of the
        gradients (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

        Args:
            student: the model's scores, shape ``(samples, classes)``.
            teacher: the teacher's scores, of the same shape.

        Returns:
            The mean over the samples, shape ``()``.
        """
        from torch.nn import functional

        temperature = self.settings.temperature
        divergence = functional.kl_div(
            functional.log_softmax(student / temperature, dim=-1),
            functional.log_softmax(teacher / temperature, dim=-1),
            reduction="batchmean",
            log_target=True,
        )
        return temperature**2 * divergence
