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
    """Measures the gradient noise scale: up to about which batch size larger batches pay.

    It compares the gradient of a whole update with those of its parts: the micro-batches of
    gradient accumulation, on all processes. Both are there anyway, so a measured update costs
    their norms, and memory for one number per parameter. Nothing waits for the device but a record.

    Args:
        settings: the plugin's table.

    Raises:
        ValueError: as a run starts whose updates have one part only, or whose engine (DeepSpeed,
            FSDP) shows no gradients.
    """

    changes_training = False

    class Settings(BaseModel):
        """The table ``[tool.pa-core.gradient_noise]``."""

        model_config = ConfigDict(extra="forbid")

        every: int = Field(10, ge=1, description="Updates from one measurement to the next.")
        decay: float = Field(
            0.95, ge=0, lt=1, description="Weight of the earlier measurements in the averages."
        )
        record_every: int | None = Field(
            None, ge=1, description="Updates between two records; by default one for each epoch."
        )

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._averages: Averages | None = None
        self._next_update = 0  # the first that may be measured
        self._window: Window | None = None  # while an update is measured
        self._update = -1  # the update that the micro-batches are of
        self._parts = 0  # of it, on this process
        self._squares: list[Tensor] = []
        self._weight: Tensor | None = None
        self._whole: Tensor | None = None
        self._watching = ExitStack()

    # -- Runs -----------------------------------------------------------------------------------

    @hookimpl(wrapper=True)
    def run_training(self) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            self._watching.close()

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        from pa_gradient_noise.estimate import Averages

        _check_parts(trainer)
        # A resumed run gets its state after this.
        self._averages, self._next_update = Averages(self.settings.decay, trainer.device), 0
        self._window, self._update = None, -1

    # -- The parts of an update -----------------------------------------------------------------

    @hookimpl(trylast=True)  # after whoever replaces the loss
    def on_backward_start(self, trainer: Trainer, batch_output: dict[str, Any]) -> None:
        if trainer.updates != self._update:
            self._update, self._parts = trainer.updates, 0
            self._window = self._new_window(trainer)
        self._parts += 1
        if self._window is not None:
            self._watch(trainer, batch_output["loss"])

    def _new_window(self, trainer: Trainer) -> Window | None:
        from pa_gradient_noise.estimate import Window

        is_due = trainer.updates >= self._next_update
        return Window.empty(trainer.device) if is_due else None

    def _watch(self, trainer: Trainer, loss: Any) -> None:
        """Let the backward pass show the gradients of this micro-batch alone.

        A tensor's hook gets the gradient before it is added to others, or to those of other
        processes. The gradient of the loss is the weight that the loss has in the update.
        """

        def see_weight(gradient: Tensor) -> None:
            self._weight = gradient.float()

        def see_gradient(gradient: Tensor) -> None:
            self._squares.append(_square(gradient))

        self._squares = []
        self._watching.callback(loss.register_hook(see_weight).remove)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                self._watching.callback(parameter.register_hook(see_gradient).remove)

    @hookimpl(tryfirst=True)  # before whoever changes the gradients
    def on_backward_end(self, trainer: Trainer, batch_output: dict[str, Any]) -> None:
        if self._window is None:
            return
        self._watching.close()
        if self._weight is None or not self._squares:
            raise RuntimeError(
                "The backward pass has shown gradient_noise no gradients. A backward_step that "
                "doesn't differentiate batch_output['loss'] can't be measured: disable the plugin"
            )
        size = batch_output.get("num_items_in_batch", batch_output["batch_size"])
        self._window.add(self._weight, size, _sum(self._squares))
        # After the last micro-batch these are the update's: reduced, and not yet clipped.
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        self._whole = _sum([_square(gradient) for gradient in gradients])
        self._squares, self._weight = [], None

    @hookimpl
    def on_optimizer_step_start(self, trainer: Trainer) -> None:
        window, processes = self._window, trainer.num_processes
        if window is None or self._whole is None or self._averages is None:
            return
        if self._parts * processes == 1:
            return  # an epoch's last update may have one part; the next one is measured
        if processes > 1:
            # Numbers of no dimension: for those of one, `gather` waits for the device.
            window = type(window)(*(part.sum() for part in trainer.gather(window.numbers)))
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
                "gradient_noise has measured nothing in this epoch: each of its updates was made "
                "of one micro-batch. Take smaller micro-batches, or disable the plugin",
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
        """What a training state keeps, so that a resumed run goes on where it was."""
        averages = self._averages and self._averages.state_dict()
        return {"averages": averages, "next_update": self._next_update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` has given."""
        self._next_update = state["next_update"]
        if self._averages is not None and state["averages"] is not None:
            self._averages.load_state_dict(state["averages"])


def _check_parts(trainer: Trainer) -> None:
    """See that updates have several parts, whose gradients this process can see."""
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState

    engine = AcceleratorState().distributed_type
    if engine in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"gradient_noise can't see whole gradients under {engine.value}, which divides them "
            "among processes: disable the plugin"
        )
    steps, processes = trainer.run_config.gradient_accumulation_steps, trainer.num_processes
    if steps * processes == 1:
        raise ValueError(
            "gradient_noise compares an update's gradient with those of its parts, and these have "
            "one part each. Accumulate, for the same update, with half the per_device_batch_size "
            "and gradient_accumulation_steps=2; or train on several processes; or disable the "
            "plugin"
        )


def _square(gradient: Tensor) -> Tensor:
    """The squared 2-norm, in single precision; shape ``()``."""
    import torch

    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float32)
    return norm.square()


def _sum(numbers: list[Tensor]) -> Tensor:
    import torch

    return torch.stack(numbers).sum()
