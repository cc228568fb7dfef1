"""What the loop needs of DeepSpeed, which has its own backward pass, clipping and update."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn

from pa_core.engine.base import Engine, share

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pa_core.run_config import TrainerRunConfig

# What changes as DeepSpeed's optimizers train, by its names: the state of the optimizer within,
# the 32-bit weights that it updates, and the loss scale.
_PART = (
    *("base_optimizer_state", "single_partition_of_fp32_groups"),  # stages 1 and 2
    *("optimizer_state_dict", "fp32_flat_groups"),  # stage 3
    "overflow",
)
_OF_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine(Engine):
    """Drive DeepSpeed's engine through the steps of the loop, under any ZeRO stage.

    The loop weighs the losses of an accumulated batch itself, so DeepSpeed is told of no
    accumulation; it is only told which backward pass is a batch's last.
    """

    shows_gradients = False
    _engine: Any = None  # DeepSpeed's, once prepared
    _is_update = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        plugin = accelerator.deepspeed_plugin
        self._told: dict[str, Any] = plugin.deepspeed_config  # what DeepSpeed will hear
        given = vars(plugin).setdefault("_as_given", dict(self._told))  # may be another trainer's
        self._accumulation = given.get("gradient_accumulation_steps", "auto")
        self._clip_norm = given.get("gradient_clipping", "auto")

    @property
    def forwards_together(self) -> bool:
        """Whether a forward pass needs all processes, as under ZeRO stage 3."""
        return self._engine is not None and self._engine.zero_optimization_partition_weights()

    def plan(self, config: TrainerRunConfig) -> None:
        """Take the run's sizes over into DeepSpeed's configuration.

        What the configuration itself says of clipping holds for a run that says nothing of it.

        Raises:
            ValueError: for clipping by value, which DeepSpeed hasn't.
        """
        if config.gradient_clip_value is not None:
            raise ValueError("DeepSpeed clips by norm alone: give gradient_clip_norm")
        if self._accumulation not in (1, "auto", config.gradient_accumulation_steps):
            warnings.warn(
                f"DeepSpeed's configuration says gradient_accumulation_steps={self._accumulation}, "
                f"and train() says {config.gradient_accumulation_steps}, which counts",
                stacklevel=3,
            )
        clip_norm = config.gradient_clip_norm
        if clip_norm is None:
            clip_norm = 0.0 if self._clip_norm == "auto" else self._clip_norm
        told = self._told
        told["train_micro_batch_size_per_gpu"] = config.train_per_device_batch_size
        told["gradient_accumulation_steps"] = 1  # the loop accumulates
        told["gradient_clipping"] = clip_norm
        told.pop("train_batch_size", None)
        if self._engine is not None:  # a second run may clip otherwise
            self._engine._config.gradient_clipping = clip_norm
            if hasattr(self._engine.optimizer, "clip_grad"):
                self._engine.optimizer.clip_grad = clip_norm

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Give model and optimizer to DeepSpeed, once; without an optimizer there is no need.

        Raises:
            ValueError: for another model or optimizer than before.
        """
        if optimizer is None:
            return model.to(self.device), None
        if self._engine is None:
            if self._told.get("train_micro_batch_size_per_gpu", "auto") == "auto":
                self._told["train_micro_batch_size_per_gpu"] = 1
            self._bare, self._given = model, optimizer
            self._groups = [list(group["params"]) for group in optimizer.param_groups]
            self.accelerator.prepare(model, optimizer)
            self._engine = self.accelerator.deepspeed_engine_wrapped.engine
            self._optimizer = DeepSpeedOptimizer(self._engine)
        known = (self._bare, self._engine, self._engine.module)
        if model not in known or optimizer not in (self._given, self._optimizer):
            raise ValueError("Under DeepSpeed a Trainer has one model and one optimizer for good")
        return self._engine, self._optimizer

    def unwrap(self, model: nn.Module, keep_torch_compile: bool = True) -> nn.Module:
        """The model without DeepSpeed's container."""
        if self._engine is not None and model is self._engine:
            model = cast("nn.Module", self._engine.module)
        return super().unwrap(model, keep_torch_compile)

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """The model in DeepSpeed's container, once there is one."""
        is_trained = self._engine is not None and model in (self._engine, self._engine.module)
        return cast("nn.Module", self._engine) if is_trained else super().for_evaluation(model)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of the first; DeepSpeed does so at the start alone."""
        if self.num_processes > 1:
            share(model.buffers())

    def move(self, batch: Any) -> Any:
        """Put a batch on the device, its floats in the 16 bits of the model, if it has 16."""
        batch = super().move(batch)
        dtype = torch.float32 if self._engine is None else next(self._bare.parameters()).dtype
        if dtype == torch.float32:
            return batch
        return recursively_apply(lambda x: x.to(dtype), batch, test_type=_is_float)

    def accumulating(self, model: nn.Module, is_update: bool) -> AbstractContextManager[Any]:
        """Note whether the backward pass that follows is the accumulated batch's last."""
        self._is_update = is_update
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Differentiate; DeepSpeed reduces at the accumulated batch's end."""
        self._engine.set_gradient_accumulation_boundary(self._is_update)
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor | None:
        """Nothing: DeepSpeed clips as it updates."""
        return None

    @property
    def division(self) -> str | None:
        """How the optimizer's state is divided; None before the first run, and under stage 0."""
        stage = 0 if self._engine is None else self._engine.zero_optimization_stage()
        if stage == 0:
            return None
        dtype = str(next(self._bare.parameters()).dtype).removeprefix("torch.")
        return f"divided by ZeRO stage {stage} in {dtype} among {self.num_processes} process(es)"

    def parameter_groups(self, optimizer: Any) -> list[list[nn.Parameter]]:
        """The groups as they were given: DeepSpeed's own hold flat parts of many parameters."""
        return super().parameter_groups(optimizer) if self._engine is None else self._groups

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last update was dropped because of an overflow."""
        return not self._engine.was_step_applied()

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The model's whole weights, gathered one by one where ZeRO has divided them."""
        model = self.unwrap(model, keep_torch_compile=False)
        if not _is_divided(model):
            return super().weights(model)
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        whole: dict[str, Any] = {}
        copies: dict[int, Tensor] = {}  # tied weights stay one tensor
        for name, value in model.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor) and id(value) not in copies:
                with GatheredParameters([value]):
                    copies[id(value)] = value.detach().cpu().clone()
            whole[name] = copies[id(value)] if isinstance(value, Tensor) else value
        self._gather_small()
        return whole

    def _shape(self, value: Any) -> tuple[int, ...] | None:
        return tuple(value.ds_shape) if hasattr(value, "ds_shape") else super()._shape(value)

    def load_weights(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Put whole weights into the model, divided anew, and into what the optimizer updates."""
        model = self.unwrap(model, keep_torch_compile=False)
        if _is_divided(model):
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters

            with GatheredParameters(list(model.parameters()), modifier_rank=0):
                super().load_weights(model, weights)
            self._gather_small()
        else:
            super().load_weights(model, weights)
        if hasattr(getattr(self._engine, "optimizer", None), "refresh_fp32_params"):
            self._engine.optimizer.refresh_fp32_params()

    def _gather_small(self) -> None:
        """Gather again the parameters that ZeRO stage 3 keeps whole on every process."""
        self._engine.optimizer.checkpoint_event_epilogue()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_divided(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


class DeepSpeedOptimizer(torch.optim.Optimizer):
    """DeepSpeed's optimizer as schedules and the loop know one; its step is the engine's.

    Args:
        engine: DeepSpeed's.
    """

    is_flat = True
    """Its groups hold flat parts of many parameters, and not the model's own."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.defaults = getattr(engine.optimizer, "defaults", {})
        self._step_count = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The real ones: what a schedule sets in them counts."""
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the optimizer within."""
        return self._engine.optimizer.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip, update, and drop the gradients."""
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; after an update DeepSpeed has done so."""
        self._engine.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state as plain data and tensors; under ZeRO, this process' part of it."""
        state: dict[str, Any] = self._engine.optimizer.state_dict()
        if self._engine.zero_optimization_stage() == 0:
            return state
        part = {name: state[name] for name in _PART if name in state}
        if "loss_scaler" in state:
            part["loss_scaler"] = {
                name: value
                for name, value in vars(state["loss_scaler"]).items()
                if name in _OF_SCALER
            }
        return part

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` has given."""
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() == 0:
            optimizer.load_state_dict(state_dict)
            return
        # All that isn't state, such as where each parameter lies in the flat ones, is this run's.
        state = optimizer.state_dict() | state_dict
        if "loss_scaler" in state_dict:
            state["loss_scaler"] = optimizer.loss_scaler
            vars(optimizer.loss_scaler).update(state_dict["loss_scaler"])
        by_rank = {self._engine.global_rank: state}
        if self._engine.zero_optimization_partition_weights():
            optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict(by_rank, load_from_fp32_weights=True)
        if self._engine.zero_optimization_partition_weights():
            optimizer.checkpoint_event_epilogue()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._engine.optimizer!r})"
