"""The gradient noise scale, estimated from the gradients of the parts of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Window:
    """Sums over the parts of one update's batch; all of shape ``()``, on the device.

    A part's loss counts in the accumulated one with a weight, which is whatever its gradients were
    multiplied with: its share of the batch, and the scale of mixed precision. Each sum is over the
    parts that count, whose weight isn't zero.

    Attributes:
        parts: how many parts there are.
        weights: the sum of their weights.
        sizes: the sum of their sizes: samples, or tokens.
        inverse_sizes: the sum of one over each size.
        squares: the sum of the squared 2-norms of their own gradients.
    """

    parts: Tensor
    weights: Tensor
    sizes: Tensor
    inverse_sizes: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> Window:
        """A window without any part yet."""
        return cls(*(torch.zeros((), device=device) for _ in range(5)))

    @property
    def numbers(self) -> list[Tensor]:
        """All sums, to be added up over processes."""
        return [self.parts, self.weights, self.sizes, self.inverse_sizes, self.squares]

    def add(self, weight: Tensor, size: Tensor | float, square: Tensor) -> None:
        """Add a part.

        Args:
            weight: what its gradients were multiplied with.
            size: how many samples or tokens its loss is the mean of.
            square: the squared 2-norm of its gradients, multiplied as they are.
        """
        absent = weight == 0
        if not isinstance(size, Tensor):
            size = torch.full_like(square, size)  # made on the device, which nobody waits for
        self.parts += ~absent
        self.weights += weight
        size = size.float()
        self.sizes += size.masked_fill(absent, 0.0)
        self.inverse_sizes += (1 / size).masked_fill(absent, 0.0)
        self.squares += (square / weight.square()).masked_fill(absent, 0.0)

    def estimates(self, square: Tensor, processes: int = 1) -> tuple[Tensor, Tensor]:
        r"""Unbiased estimates of the squared norm of the gradient, and of its noise.

        The expected squared norm of the mean gradient over :math:`B` samples is
        :math:`|G|^2 + \operatorname{tr}(\Sigma) / B`, with the true gradient :math:`G` and the
        covariance :math:`\Sigma` of one sample's. Two batch sizes give two equations: the whole
        batch, and the mean over its parts, for which :math:`1 / B` is the mean over theirs.
        (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1.)

        Args:
            square: the squared 2-norm of the accumulated gradients, not yet clipped.
            processes: over how many processes they are averaged.

        Returns:
            :math:`|G|^2` and :math:`\operatorname{tr}(\Sigma)`, each of shape ``()``. They are NaN
            or infinite where the batch has only one part.
        """
        whole = square / (self.weights / processes).square()
        part = self.squares / self.parts
        inverse_whole, inverse_part = 1 / self.sizes, self.inverse_sizes / self.parts
        noise = (part - whole) / (inverse_part - inverse_whole)
        return whole - noise * inverse_whole, noise


class Averages:
    """Exponential averages of both estimates, whose ratio is the noise scale.

    Each estimate varies much, and a ratio of averages is less biased than an average of ratios.

    Args:
        decay: weight of what was before.
        device: where the estimates are.
    """

    def __init__(self, decay: float, device: torch.device) -> None:
        self._decay = decay
        self._sums = torch.zeros(3, device=device)  # of both, and of the weights

    def add(self, signal: Tensor, noise: Tensor) -> None:
        """Add the estimates of one batch; what isn't finite, as after an overflow, is left out."""
        newest = torch.stack((signal, noise, torch.ones_like(signal)))
        mixed = self._decay * self._sums + (1 - self._decay) * newest
        self._sums = torch.where(newest.isfinite().all(), mixed, self._sums)

    def read(self) -> dict[str, float]:
        """The averages and their ratio, which waits for the device; nothing before the first.

        The scale is NaN as long as the squared norm's average isn't positive: then the gradient
        can't be told from its noise yet.
        """
        signal, noise, weight = self._sums.tolist()
        if not weight:
            return {}
        scale = noise / signal if signal > 0 else float("nan")
        return {
            "gradient_noise_scale": scale,
            "gradient_norm_squared": signal / weight,
            "gradient_variance": noise / weight,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """The weighted sums."""
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self._sums = state["sums"].to(self._sums.device)
