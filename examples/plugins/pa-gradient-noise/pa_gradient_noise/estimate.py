"""Estimate the gradient noise scale from the gradients of the micro-batches of an update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Window:
    """Sums over the micro-batches of one update; all of shape ``()``, on the device.

    The weight of a micro-batch is the factor that its gradients are multiplied by: its fraction of
    the update's batch, times the loss scale of mixed precision. Micro-batches with weight zero are
    padding and don't count.

    Attributes:
        count: the number of micro-batches.
        weights: the sum of their weights.
        sizes: the sum of their sizes in samples or tokens.
        inverse_sizes: the sum of their inverse sizes.
        squares: the sum of the squared 2-norms of their gradients, without the weight.
    """

    count: Tensor
    weights: Tensor
    sizes: Tensor
    inverse_sizes: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, device: torch.device) -> Window:
        """A window without micro-batches."""
        return cls(*(torch.zeros((), device=device) for _ in range(5)))

    @property
    def numbers(self) -> list[Tensor]:
        """All sums, to be added up over processes."""
        return [self.count, self.weights, self.sizes, self.inverse_sizes, self.squares]

    def add(self, weight: Tensor, size: Tensor | float, square: Tensor) -> None:
        """Add a micro-batch.

        Args:
            weight: the factor that its gradients are multiplied by.
            size: the number of samples or tokens that its loss is a mean over.
            square: the squared 2-norm of its gradients, including the weight.
        """
        is_padding = weight == 0
        if not isinstance(size, Tensor):
            size = torch.full_like(square, size)  # created on the device: no synchronisation
        self.count += ~is_padding
        self.weights += weight
        size = size.float()
        self.sizes += size.masked_fill(is_padding, 0.0)
        self.inverse_sizes += (1 / size).masked_fill(is_padding, 0.0)
        self.squares += (square / weight.square()).masked_fill(is_padding, 0.0)

    def estimates(self, square: Tensor, processes: int = 1) -> tuple[Tensor, Tensor]:
        r"""Unbiased estimates of the gradient's squared norm and of its variance.

        The expected squared norm of the mean gradient over :math:`B` samples is
        :math:`|G|^2 + \operatorname{tr}(\Sigma) / B`, with the true gradient :math:`G` and the
        covariance :math:`\Sigma` of a single sample's gradient. Two batch sizes give two equations:
        that of the whole batch, and the mean over its micro-batches, where :math:`1 / B` is the
        mean of their inverse sizes.
        (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1.)

        Args:
            square: the squared 2-norm of the accumulated gradients, before clipping.
            processes: the number of processes that they are averaged over.

        Returns:
            :math:`|G|^2` and :math:`\operatorname{tr}(\Sigma)`, each of shape ``()``. They are NaN
            or infinite if there is only one micro-batch.
        """
        whole = square / (self.weights / processes).square()
        micro = self.squares / self.count
        inverse_whole, inverse_micro = 1 / self.sizes, self.inverse_sizes / self.count
        noise = (micro - whole) / (inverse_micro - inverse_whole)
        return whole - noise * inverse_whole, noise


class Averages:
    """Exponential moving averages of both estimates; their ratio is the noise scale.

    Single estimates vary strongly, and a ratio of averages is less biased than an average of
    ratios.

    Args:
        decay: the weight of earlier estimates.
        device: the device of the estimates.
    """

    def __init__(self, decay: float, device: torch.device) -> None:
        self._decay = decay
        self._sums = torch.zeros(3, device=device)  # of both estimates, and of the weights

    def add(self, signal: Tensor, noise: Tensor) -> None:
        """Add the estimates of one update; NaN and infinite ones (overflow) are skipped."""
        newest = torch.stack((signal, noise, torch.ones_like(signal)))
        mixed = self._decay * self._sums + (1 - self._decay) * newest
        self._sums = torch.where(newest.isfinite().all(), mixed, self._sums)

    def read(self) -> dict[str, float]:
        """Return the averages and their ratio; empty before the first estimate.

        Synchronises the host with the device. The scale is NaN while the average of the squared
        norm isn't positive: the gradient can't be distinguished from its noise yet.
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
        """Restore the value of `state_dict`."""
        self._sums = state["sums"].to(self._sums.device)
