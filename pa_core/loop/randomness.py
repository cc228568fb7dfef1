"""Keyed randomness of an epoch's steps: what the model and plugins draw depends on the step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pa_core.data.rng import derive_key, key_at, seed_all, seed_model

if TYPE_CHECKING:
    import torch


class EpochRandomness:
    """Seeds the global generators for each step, so that other draws change nothing.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        rank: of this process.
        device: of the model.
        seeds_host: whether a forward pass may draw from Python's and NumPy's generators. Models
            made of torch's modules don't, and seeding these generators costs time.
    """

    def __init__(
        self, seed: int, epoch: int, rank: int, device: torch.device, *, seeds_host: bool
    ) -> None:
        self._key, self._device = derive_key(seed, "model", epoch, rank), device
        self._seed = seed_all if seeds_host else seed_model

    def seed_model(self, step: int) -> None:
        """Seed what the forward pass of a step draws from."""
        self._seed(key_at(self._key, step), self._device)

    def seed_plugins(self, step: int) -> None:
        """Seed what plugins draw from at the start of a step, whatever fetching drew."""
        # No step has a negative number, so the model never gets this key.
        seed_all(key_at(self._key, ~step), self._device)
