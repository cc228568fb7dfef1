"""The plugin ``gan``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pa_core import hookimpl
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pa_core import Trainer
    from torch import Tensor, nn


class GanPlugin:
    """Trains a generator and a discriminator in turn, each with its own optimizer.

    The model is a `pa_gan.model.Gan`, and the Trainer gets a list of two optimizers, one of each
    part. Each update trains one of the two. Both losses are recorded as means over their turns:
    ``train_generator_loss`` and ``train_discriminator_loss``.

    Args:
        settings: the plugin's table.

    Raises:
        ValueError: at the start of a run without an optimizer for each part.
    """

    class Settings(BaseModel):
        """The table ``[tool.pa-core.gan]``."""

        model_config = ConfigDict(extra="forbid")

        latent: int = Field(16, ge=1, description="How many random numbers make a sample.")
        discriminator_updates: int = Field(
            1, ge=1, description="The discriminator's updates before each of the generator's."
        )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        for part in ("generator", "discriminator"):
            self.optimizer_of(trainer, part)

    @hookimpl
    def calculate_train_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any]:
        real = self.samples(batch)
        noise = self.noise(real)
        part = self.turn(trainer)
        trainer.update_only(self.optimizer_of(trainer, part))
        scores, real_scores = trainer.model(noise, None if part == "generator" else real)
        loss = self.loss(scores, real_scores)
        log = {f"{part}_loss": loss}
        return {"loss": loss, "model_outputs": scores, "batch_size": len(real), "log": log}

    @hookimpl
    def calculate_eval_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any]:
        real = self.samples(batch)
        scores, real_scores = trainer.model(self.noise(real), real)
        loss, generator_loss = self.loss(scores, real_scores), self.loss(scores, None)
        log = {"discriminator_loss": loss, "generator_loss": generator_loss}
        return {"loss": loss, "model_outputs": scores, "batch_size": len(real), "log": log}

    @hookimpl
    def calculate_predictions(self, trainer: Trainer, batch: Any) -> Tensor:
        """The samples that the generator makes of a batch of noise."""
        generated: Tensor = trainer.get_model().generator(self.samples(batch))
        return generated

    def turn(self, trainer: Trainer) -> str:
        """The part that the coming update trains.

        It follows from the number of updates, made or skipped, so a resumed run needs no state.
        """
        place = trainer.position.attempts % (self.settings.discriminator_updates + 1)
        return "generator" if place == self.settings.discriminator_updates else "discriminator"

    def optimizer_of(self, trainer: Trainer, part: str) -> Any:
        """The optimizer of a part of the model: the one that holds its parameters."""
        module: nn.Module = getattr(trainer.get_model(), part)
        parameters = {id(parameter) for parameter in module.parameters()}
        for optimizer in trainer.optimizers:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if held and held <= parameters:
                return optimizer
        raise ValueError(
            f"gan finds no optimizer of the {part} alone. Give the Trainer one for each part: "
            "optimizer=[Adam(model.generator.parameters()), Adam(model.discriminator.parameters())]"
        )

    # -- To override ----------------------------------------------------------------------------

    def samples(self, batch: Any) -> Tensor:
        """The real samples of a batch; or in `predict`, the noise."""
        if isinstance(batch, Mapping):
            batch = list(batch.values())
        samples: Tensor = batch[0] if isinstance(batch, list | tuple) else batch
        return samples

    def noise(self, real: Tensor) -> Tensor:
        """The noise for as many samples as there are real ones; shape ``(samples, latent)``."""
        import torch

        return torch.randn(len(real), self.settings.latent, device=real.device, dtype=real.dtype)

    def loss(self, scores: Tensor, real_scores: Tensor | None) -> Tensor:
        r"""The non-saturating logistic loss (Goodfellow et al. 2014, arXiv:1406.2661).

        With scores :math:`s` and :math:`\zeta(s) = \log(1 + e^s)`, it is
        :math:`\zeta(s_\text{generated}) + \zeta(-s_\text{real})` for the discriminator, and
        :math:`\zeta(-s_\text{generated})` for the generator.

        Args:
            scores: of generated samples, shape ``(samples,)``.
            real_scores: of real samples; None for the generator's loss.

        Returns:
            The mean over the samples, shape ``()``.
        """
        from torch.nn import functional

        if real_scores is None:
            return functional.softplus(-scores).mean()
        return (functional.softplus(scores) + functional.softplus(-real_scores)).mean()
