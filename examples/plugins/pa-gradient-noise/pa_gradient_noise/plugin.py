"""The plugin ``gradient_noise``."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from pa_core import hookimpl
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pa_core import Trainer
    from torch import Tensor

    from pa_gradient_noise.estimate import Averages, Window


class GradientNoisePlugin:
    """Measures the gradient noise scale: the batch size up to which larger batches pay off.

    It compares the gradient of an update with those of its micro-batches, on all processes. Both
    are computed anyway: a measured update only adds their norms, and memory for one number per
    parameter. Only records synchronise the host with the device.

    Args:
        settings: the plugin's table.

    Raises:
        ValueError: at the start of a run whose updates have only one micro-batch, or whose engine
            (DeepSpeed, FSDP) shards gradients.
    """

    changes_training = False

    class Settings(BaseModel):
        """The table ``[tool.pa-core.gradient_noise]``."""

        model_config = ConfigDict(extra="forbid")

        every: int = Field(10, ge=1, description="The number of updates between measurements.")
        decay: float = Field(
            0.95,
            ge=0,
            lt=1,
            description="The weight of earlier measurements in the moving averages.",
        )
        record_every: int | None = Field(
            None,
            ge=1,
            description="The number of updates between records; by default once per epoch.",
        )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._averages: Averages | None = None
        self._next_update = 0  # the first update that may be measured
        self._window: Window | None = None  # set while an update is measured
        self._update = -1  # the current update
        self._count = 0  # its micro-batches so far, on this process
        self._squares: list[Tensor] = []
        self._weight: Tensor | None = None
        self._whole: Tensor | None = None
        self._tensor_hooks = ExitStack()

    # -- Runs -----------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def run_training(self) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            self._tensor_hooks.close()

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        from pa_gradient_noise.estimate import Averages

        _check_support(trainer)
        # A resumed run restores the state after this event.
        self._averages, self._next_update = Averages(self.settings.decay, trainer.device), 0
        self._window, self._update = None, -1

    # -- Micro-batches --------------------------------------------------------------------------

    @hookimpl(trylast=True)  # after plugins that replace the loss
    def on_backward_start(self, trainer: Trainer, batch_output: dict[str, Any]) -> None:
        if trainer.updates != self._update:
            self._update, self._count = trainer.updates, 0
            self._window = self._new_window(trainer)
        self._count += 1
        if self._window is not None:
            self._add_tensor_hooks(trainer, batch_output["loss"])

    def _new_window(self, trainer: Trainer) -> Window | None:
        from pa_gradient_noise.estimate import Window

        is_due = trainer.updates >= self._next_update
        return Window.empty(trainer.device) if is_due else None

    def _add_tensor_hooks(self, trainer: Trainer, loss: Any) -> None:
        """Capture the gradients of this micro-batch in its backward pass.

        A tensor hook receives the gradient before it is accumulated or reduced over processes. The
        gradient of the loss is the weight of the micro-batch in the update.
        """

        def save_weight(gradient: Tensor) -> None:
            self._weight = gradient.float()

        def add_square(gradient: Tensor) -> None:
            self._squares.append(_square(gradient))

        self._squares = []
        self._tensor_hooks.callback(loss.register_hook(save_weight).remove)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                self._tensor_hooks.callback(parameter.register_hook(add_square).remove)

    @hookimpl(tryfirst=True)  # before plugins that change the gradients
    def on_backward_end(self, trainer: Trainer, batch_output: dict[str, Any]) -> None:
        if self._window is None:
            return
        self._tensor_hooks.close()
        if self._weight is None or not self._squares:
            raise RuntimeError(
                "gradient_noise saw no gradients in the backward pass. It doesn't support a "
                "backward_step that doesn't differentiate batch_output['loss']: disable the plugin"
            )
        size = batch_output.get("num_items_in_batch", batch_output["batch_size"])
        self._window.add(self._weight, size, _sum(self._squares))
        # After the last micro-batch these are the update's gradients: reduced, not yet clipped.
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        self._whole = _sum([_square(gradient) for gradient in gradients])
        self._squares, self._weight = [], None

    @hookimpl
    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        window, processes = self._window, trainer.num_processes
        if window is None or self._whole is None or self._averages is None:
            return
        if self._count * processes == 1:
            return  # an epoch's last update may have one micro-batch; measure the next one
        if processes > 1:
            # Tensors of shape (): with one dimension, `gather` would synchronise with the device.
            window = type(window)(*(sums.sum() for sums in trainer.gather(window.numbers)))
        self._averages.add(*window.estimates(self._whole, processes))
        self._next_update = trainer.updates + self.settings.every

    # -- Records --------------------------------------------------------------------------------

    @hookimpl
    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        every = self.settings.record_every
        if every is not None and trainer.updates % every == 0:
            self._record(trainer)

    @hookimpl
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        if self._next_update == 0 and trainer.updates:
            warnings.warn(
                "gradient_noise measured nothing in this epoch: each update had only one "
                "micro-batch. Use smaller micro-batches, or disable the plugin",
                stacklevel=2,
            )
        if self.settings.record_every is None:
            self._record(trainer)

    def _record(self, trainer: Trainer) -> None:
        if self._averages is not None:
            for name, value in self._averages.read().items():
                trainer.run_history.update_metric(name, value)

    # -- State ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The plugin's part of a training state."""
        averages = self._averages and self._averages.state_dict()
        return {"averages": averages, "next_update": self._next_update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the value of `state_dict`."""
        self._next_update = state["next_update"]
        if self._averages is not None and state["averages"] is not None:
            self._averages.load_state_dict(state["averages"])


def _check_support(trainer: Trainer) -> None:
    """Check that updates have several micro-batches and that gradients aren't sharded."""
    if not trainer.has_whole_gradients:
        raise ValueError(
            f"gradient_noise doesn't support {trainer.sharded_by}, which shards gradients between "
            "processes: disable the plugin"
        )
    steps, processes = trainer.run_config.gradient_accumulation_steps, trainer.num_processes
    if steps * processes == 1:
        raise ValueError(
            "gradient_noise needs at least two micro-batches per update. For the same updates, use "
            "half the per_device_batch_size and gradient_accumulation_steps=2; or train on several "
            "processes; or disable the plugin"
        )


def _square(gradient: Tensor) -> Tensor:
    """The squared 2-norm in single precision; shape ``()``."""
    import torch

    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
    return norm.square()


def _sum(numbers: list[Tensor]) -> Tensor:
    import torch

    return torch.stack(numbers).sum()
