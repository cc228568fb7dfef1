"""Stop, skip the update or roll back on a NaN or infinite loss, or on such gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pa_core.engine.subclasses import plain_parts
from pa_core.hookspecs import hookimpl
from pa_core.plugin import CallbackSettings, ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

Policy = Literal["stop", "skip", "rollback"]
_LOSS = "the training loss is NaN or infinite"
_EVALUATION_LOSS = "the evaluation loss is NaN or infinite"
_GRADIENTS = "the loss is finite, but its gradients are NaN or infinite"


class TerminateOnNaNSettings(CallbackSettings):
    """Settings of the built-in plugin `terminate_on_nan`."""

    policy: Policy = Field(
        "stop",
        description="What to do about a NaN or infinite loss or gradient: stop, skip or rollback.",
    )
    limit: int = Field(
        5, ge=1, description="Skipped updates in a row, or rollbacks; the next one stops the run."
    )


class TerminateOnNaNCallback(ConfigurableCallback):
    """Acts on a NaN or infinite loss, and on such gradients, the same on every process.

    - ``"stop"`` ends the run, for a loss in training and in evaluation. On a CPU the loss is read
      at once, and the gradients before each update; the update isn't made. On another device the
      loss is copied asynchronously, and read a step or two later, and the weights at the end of the
      epoch: an update may have been made.
    - ``"skip"`` skips the update and continues with the next batch: for data with bad samples.
    - ``"rollback"`` skips it, restores weights, optimizer and learning-rate scheduler from the
      newest intact state that this run has saved, and continues with the next batch: for weights
      that have diverged. The batches since that state are not repeated, since the same data would
      lead to the same loss. Other plugins' state that follows the weights, such as a moving
      average, is restored with them; the rest of their state stays.

    The last two check the loss and the gradients before every update, which is a host-device
    synchronisation for each. They record ``skipped_updates``. Recorded losses are the true ones,
    NaN included.

    The mean over no items, such as the labelled tokens of a micro-batch, may be NaN: it counts for
    nothing, and isn't acted on. With a gradient scaler (fp16), the scaler decides about gradients.

    Args:
        policy: ``"stop"``, ``"skip"`` or ``"rollback"``.
        limit: how many updates in a row may be skipped, or how many rollbacks a run may have,
            before the next one stops it.

    Attributes:
        triggered: whether the current or last run had such a loss or gradient.

    Raises:
        ValueError: for a limit below 1.
    """

    Settings = TerminateOnNaNSettings

    # On the class, since a subclass' constructor may not call this one.
    policy: Policy = "stop"
    limit = 5
    triggered = False
    _watch: _DeviceWatch | None = None
    _reads_gradients = False  # before an update, with the policy "stop"
    _losses: float | Tensor = 0.0  # 0 if those of the coming update are finite, else NaN
    _update = -1  # the updates made or skipped before the coming one
    _in_a_row = _skipped = _rollbacks = 0
    _has_state = False

    def __init__(self, policy: Policy = "stop", limit: int = 5) -> None:
        self.policy, self.limit = policy, limit

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.triggered, self._watch, self._update = False, None, -1
        self._count = _BadCount()
        # On a CPU it costs little. A gradient scaler reads them itself, and DeepSpeed hides them.
        on_cpu, by_scaler = trainer.device.type == "cpu", trainer.scaler is not None
        self._reads_gradients = on_cpu and not by_scaler and trainer.sharded_by != "DeepSpeed"
        # In a resumed run, the counts are restored after this event.
        self._in_a_row = self._skipped = self._rollbacks = 0
        self._has_state = False
        if self.policy == "stop":
            return
        if trainer.scaler is not None or trainer.sharded_by == "DeepSpeed":
            raise ValueError(
                f'terminate_on_nan doesn\'t support policy = "{self.policy}" in fp16 or under '
                "DeepSpeed, whose gradient scaler skips updates itself: use bf16, or disable the "
                "plugin"
            )
        if self.policy == "rollback":
            from pa_core.checkpoint.resume import states_folder

            if states_folder(trainer) is None:
                raise ValueError(
                    'policy = "rollback" of terminate_on_nan needs the states of the plugin '
                    "checkpoint, which isn't enabled: enable it"
                )

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self.triggered, self._watch = False, None

    @hookimpl(trylast=True)  # after any plugin that replaces the loss
    def on_backward_start(
        self, trainer: Trainer, batch_output: dict[str, Any], **kwargs: Any
    ) -> None:
        if self.policy != "stop":
            self._add_loss(trainer, batch_output)
        elif self._is_bad(trainer, batch_output):
            self._trigger(trainer, _LOSS)
            if trainer.num_processes == 1:
                trainer.control.skip_update("non-finite")
            elif self._reads_gradients and batch_output["loss"].requires_grad:
                # The other processes notice it at the same update: by the reduced gradients.
                batch_output["loss"].register_hook(lambda gradient: gradient * math.nan)

    @hookimpl(trylast=True)
    def on_optimizer_step_start(self, trainer: Trainer, **kwargs: Any) -> None:
        if self.policy != "stop":
            self._check_update(trainer)
        elif self._reads_gradients:
            count = self._count(_gradients(trainer))
            is_bad = count.is_cpu and count.item() > 0
            if trainer.sharded_by == "FSDP":  # each process has read its shards
                is_bad = trainer.largest(int(is_bad))[0] > 0
            if is_bad:  # on every process, as gradients are reduced
                self._count = _BadCount()
                trainer.control.skip_update("non-finite")
                has_bad_loss = trainer.largest(int(self.triggered))[0]
                self._trigger(trainer, _LOSS if has_bad_loss else _GRADIENTS, everywhere=True)

    def on_train_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._check_device(trainer, _LOSS)
        # Where gradients aren't read, a bad one shows in the next loss, or at last in the weights.
        if self.policy == "stop" and trainer.device.type != "cpu" and not self.triggered:
            weights = (part for one in _parameters(trainer) for part in plain_parts(_local(one)))
            if not all(torch.isfinite(part).all() for part in weights):
                self._trigger(trainer, "the weights are NaN or infinite")

    @hookimpl(trylast=True)
    def on_eval_step_end(
        self, trainer: Trainer, batch_output: dict[str, Any], **kwargs: Any
    ) -> None:
        if self.policy == "stop" and self._is_bad(trainer, batch_output):
            self._trigger(trainer, _EVALUATION_LOSS)

    def on_eval_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        # A loss of training must not count as the evaluation's.
        self._check_device(trainer, _LOSS)

    def on_eval_epoch_end(self, trainer: Trainer, **kwargs: Any) -> None:
        self._check_device(trainer, _EVALUATION_LOSS)

    def on_save_training_state(self, trainer: Trainer, **kwargs: Any) -> None:
        self._has_state = True

    def on_load_training_state(self, trainer: Trainer, **kwargs: Any) -> None:
        self._has_state = True

    # -- "stop" -----------------------------------------------------------------------------------

    def _is_bad(self, trainer: Trainer, output: dict[str, Any]) -> bool:
        loss = output["loss"].detach()
        if loss.is_cpu:
            return not math.isfinite(loss.item()) and not math.isfinite(_counted(trainer, output))
        if self._watch is None or self._watch.device != loss.device:
            self._watch = _DeviceWatch(loss.device)
        return self._watch.add(_counted(trainer, output))

    def _check_device(self, trainer: Trainer, what: str) -> None:
        if self._watch is not None and self._watch.read():
            self._trigger(trainer, what)
        self._watch = None

    def _trigger(self, trainer: Trainer, what: str, *, everywhere: bool = False) -> None:
        self.triggered = True
        trainer.control.stop(f"Stopping: {what}", everywhere=everywhere)

    # -- "skip" and "rollback" --------------------------------------------------------------------

    def _add_loss(self, trainer: Trainer, output: dict[str, Any]) -> None:
        """Add a micro-batch's loss times 0 to those of the coming update: NaN if any is bad."""
        if self._update != trainer.position.attempts:
            self._update, self._losses = trainer.position.attempts, 0.0
        self._losses = self._losses + _counted(trainer, output) * 0

    def _check_update(self, trainer: Trainer) -> None:
        """Skip the coming update unless its losses and gradients are finite on every process."""
        bad = self._count(_gradients(trainer))
        losses = self._losses
        if isinstance(losses, Tensor):
            losses = losses.to(bad.device)
        is_bad = (bad + losses).item() != 0  # NaN, too
        if not trainer.largest(int(is_bad))[0]:
            self._in_a_row = 0
            return
        self._count = _BadCount()
        what = _LOSS if trainer.largest(int(math.isnan(float(losses))))[0] else _GRADIENTS
        self.triggered = True
        self._in_a_row, self._skipped = self._in_a_row + 1, self._skipped + 1
        trainer.control.skip_update("non-finite")
        trainer.print(f"Update {trainer.updates + 1} is skipped: {what}")
        trainer.run_history.update_metric("skipped_updates", self._skipped)
        reason = None
        if self.policy == "rollback":
            reason = self._roll_back(trainer)
        elif self._in_a_row > self.limit:
            reason = f"{self._in_a_row} updates in a row were skipped"
        if reason is not None:
            self._trigger(trainer, f"{what}, and {reason}", everywhere=True)

    def _roll_back(self, trainer: Trainer) -> str | None:
        """Roll back to the newest intact state; if that is impossible, return the reason."""
        from pa_core.checkpoint.resume import find_training_state, states_folder

        if self._rollbacks == self.limit:
            return f"the limit on rollbacks ({self.limit}) has been reached"
        if not self._has_state:
            return "this run has not saved a training state yet"
        trainer.wait_for_saves()  # the newest may not be complete yet
        state = find_training_state("auto", trainer)
        if state is None:
            return f"{states_folder(trainer)} contains no training state"
        state.roll_back(trainer)
        self._rollbacks += 1
        updates = trainer.updates - state.position.updates
        trainer.print(
            f"Rolled back to {state.directory} ({updates} update{'s' * (updates != 1)}), "
            f"rollback {self._rollbacks} of {self.limit}"
        )
        return None

    def state_dict(self) -> dict[str, Any]:
        return {
            "in_a_row": self._in_a_row,
            "skipped": self._skipped,
            "rollbacks": self._rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._in_a_row, self._skipped = state["in_a_row"], state["skipped"]
        self._rollbacks = state["rollbacks"]


def _counted(trainer: Trainer, output: dict[str, Any]) -> Tensor:
    """The loss of a batch; 0 for a mean over no items, which counts for nothing."""
    loss: Tensor = output["loss"].detach()
    items = output.get("num_items_in_batch", output["batch_size"])
    if trainer.is_padding_batch:
        items = 0
    if isinstance(items, Tensor) and items.device == loss.device:
        return torch.where(items > 0, loss, torch.zeros_like(loss))
    return loss if items > 0 else torch.zeros_like(loss)


def _parameters(trainer: Trainer) -> list[Tensor]:
    groups = trainer.optimizer.param_groups  # faster than searching the model's modules
    return [parameter for group in groups for parameter in group["params"]]


def _gradients(trainer: Trainer) -> list[Tensor]:
    return [one.grad for one in _parameters(trainer) if one.grad is not None]


def _local(tensor: Any) -> Tensor:
    """A tensor, or this process' shard of it."""
    shard: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return shard


class _BadCount:
    """Counts groups of tensors with a NaN or infinite element, over all calls.

    The check of a `torch.amp.GradScaler`, with the scale 1: one pass over all tensors of a kind.
    Unlike a norm, it doesn't overflow for large finite values.
    """

    def __init__(self) -> None:
        self._scalars: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        """The count, of shape ``()``, which isn't read here."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            tensor = tensor.coalesce().values() if tensor.is_sparse else _local(tensor)
            if tensor.is_complex():
                tensor = torch.view_as_real(tensor.resolve_conj())
            kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        if not kinds:
            return torch.zeros(())
        with torch.no_grad():
            for (device, _), group in kinds.items():
                if device not in self._scalars:
                    self._scalars[device] = (
                        torch.zeros((), device=device),
                        torch.ones((), device=device),
                    )
                torch._amp_foreach_non_finite_check_and_unscale_(group, *self._scalars[device])
        first, *others = (self._scalars[device][0] for device in {device for device, _ in kinds})
        return sum((count.to(first.device) for count in others), first)


class _DeviceWatch:
    """Detects NaN and infinite losses on a device without a host-device synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mark = torch.zeros((), device=device)
        self._arrived: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._copy = torch.zeros((), pin_memory=True)
            self._arrived = torch.cuda.Event()

    def add(self, loss: Tensor) -> bool:
        """Add a loss of shape ``()``; return whether an earlier one is known to be bad."""
        # A finite loss adds 0, any other adds NaN, and NaN stays.
        self._mark.add_(loss, alpha=0)
        if self._arrived is None or not self._arrived.query():
            return False  # it can't be read without waiting, or the copy is still being made
        is_bad = math.isnan(self._copy.item())
        self._copy.copy_(self._mark, non_blocking=True)
        self._arrived.record()
        return is_bad

    def read(self) -> bool:
        """Whether any loss so far was bad; a host-device synchronisation."""
        return math.isnan(self._mark.item())
