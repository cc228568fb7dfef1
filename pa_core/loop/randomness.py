"""Keyed randomness of a run: what is drawn depends on the place, not on earlier draws.

The events between steps each have a key. A step has three parts that may draw: the hook
`on_train_step_start`, the model with its loss, and the hooks after it. Each has its own key; the
model's depends on the rank, those of hooks don't, so that plugins draw alike on every process.

PyTorch's generators are seeded for every step. Seeding Python's and NumPy's costs more, and most
code doesn't draw from them, so they are seeded only for code that has drawn before, which the
training state records.

Otherwise they rest: they are in the state in which a key of the epoch leaves them, and a step that
doesn't draw leaves them there. So the first draw of a run gives the same numbers wherever the run
was resumed, and so does every draw after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pa_core.data.rng import (
    derive_key,
    generator_positions,
    key_at,
    seed_all,
    seed_model,
    seed_python_and_numpy,
)

if TYPE_CHECKING:
    import torch


_EVENTS = frozenset(
    {
        *("on_training_run_start", "on_training_run_end", "on_training_run_epoch_end"),
        *("on_train_epoch_start", "on_train_epoch_end"),
        *("on_eval_epoch_start", "on_eval_epoch_end"),
    }
)


def seed_event(name: str, seed: int, epoch: int, updates: int, device: torch.device) -> None:
    """Seed what plugins draw from in an event of a run between its steps.

    A resumed run draws the same at its start, and when its epoch starts again. The generators are
    seeded even if no plugin implements the event, so that the enabled plugins make no difference.
    """
    places = {"on_training_run_start": (), "on_train_epoch_start": (epoch,)}
    if name in _EVENTS:
        seed_all(derive_key(seed, name, *places.get(name, (epoch, updates))), device)


class EpochRandomness:
    """Seeds the global generators for each part of a step, so that other draws change nothing.

    The parts, in this order: ``seed_plugins(step)``, ``seed_model(step)``, ``seed_hooks(step)`` and
    ``end_step()``. A step that is computed again has the same numbers as before.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        rank: of this process.
        device: of the model.
        drawing: whose code has drawn from Python's or NumPy's generator in this run: ``"model"``,
            ``"plugins"``. It is added to.
    """

    def __init__(
        self, seed: int, epoch: int, rank: int, device: torch.device, drawing: set[str]
    ) -> None:
        self._model_key, self._device = derive_key(seed, "model", epoch, rank), device
        self._hooks_key = derive_key(seed, "hooks", epoch)
        self._rest_key = derive_key(seed, "rest", epoch)
        self._rest: tuple[Any, ...] | None = None  # the generators' positions at rest
        self._drawing = drawing
        self._first_draw = dict.fromkeys(drawing, -1)  # the step of it, in this epoch
        self._part: str | None = None  # what runs now, if the generators were at rest before
        self._step = 0

    def seed_plugins(self, step: int) -> None:
        """Seed what plugins draw from at the start of a step, whatever fetching drew."""
        key = key_at(self._hooks_key, ~step)  # no step has a negative number
        seed_model(key, self._device)
        self._begin("plugins", step, key)

    def seed_model(self, step: int) -> None:
        """Seed what the forward pass of a step draws from."""
        key = key_at(self._model_key, step)
        seed_model(key, self._device)
        self._begin("model", step, key)

    def seed_hooks(self, step: int) -> None:
        """Seed what the hooks after the forward pass of a step draw from."""
        key = key_at(self._hooks_key, step)
        seed_model(key, self._device)
        self._begin("plugins", step, key)

    def end_step(self) -> None:
        """Note whether the hooks have drawn; what runs until the next step isn't part of it."""
        if self._part is not None and generator_positions() != self._rest:
            self._note_draw()
        self._part = None

    def _begin(self, part: str, step: int, key: int) -> None:
        """Seed for a part of the step that has drawn in an earlier one; else let generators rest.

        Within the step of its first draw, a part isn't seeded: computed again, it draws the same.
        """
        is_at_rest = generator_positions() == self._rest
        if self._part is not None and not is_at_rest:
            self._note_draw()
        if step > self._first_draw.get(part, step):
            seed_python_and_numpy(key)
            self._part = None
            return
        if not is_at_rest:
            seed_python_and_numpy(self._rest_key)
            self._rest = generator_positions()
        self._part, self._step = part, step

    def _note_draw(self) -> None:
        assert self._part is not None
        self._first_draw.setdefault(self._part, self._step)
        self._drawing.add(self._part)
