"""The model of a GAN."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gan(nn.Module):
    """A generator and a discriminator as one model, which is wrapped, moved and saved as a whole.

    Args:
        generator: makes samples from noise of shape ``(samples, latent)``.
        discriminator: gives one score for each sample: the higher, the more it looks real. Shape
            ``(samples,)`` or ``(samples, 1)``.
    """

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator = generator
        self.discriminator = discriminator

    def forward(self, noise: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The discriminator's scores of generated samples, and of real ones if there are any.

        Without real samples, gradients reach the generator through the discriminator. With real
        ones they only reach the discriminator.

        Args:
            noise: for the generator, shape ``(samples, latent)``.
            real: real samples.

        Returns:
            The scores of the generated and of the real samples, each of shape ``(samples,)``.
        """
        if real is None:
            return self.discriminator(self.generator(noise)).reshape(-1), None
        with torch.no_grad():
            generated = self.generator(noise)
        scores = self.discriminator(generated).reshape(-1)
        # DistributedDataParallel waits for a gradient of every parameter: here it is zero.
        unused = sum(parameter.sum() for parameter in self.generator.parameters())
        return scores + 0 * unused, self.discriminator(real).reshape(-1)
