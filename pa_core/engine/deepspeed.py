"""The engine for DeepSpeed, which has its own backward pass, clipping and update."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor, nn

from pa_core.engine.base import Engine, broadcast
from pa_core.engine.wrappers import clean_state_dict

if TYPE_CHECKING:
    from accelerate import Accelerator

    from pa_core.run_config import TrainerRunConfig

# The entries of DeepSpeed's optimizer state that training changes: the state of the wrapped
# optimizer, the 32-bit weights that it updates, and the loss scale.
_TRAINED_ENTRIES = (
    *("base_optimizer_state", "single_partition_of_fp32_groups"),  # stages 1 and 2
    *("optimizer_state_dict", "fp32_flat_groups"),  # stage 3
    "overflow",
)
_SCALER_ENTRIES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class DeepSpeedEngine(Engine):
    """Runs the steps of the loop with DeepSpeed's engine, under any ZeRO stage.

    The loop weights the losses of an accumulated batch itself, so DeepSpeed is configured without
    accumulation. It only learns which backward pass is the last of an accumulated batch.
    """

    shows_gradients = False
    reduces_gradients_before_update = False
    sharded_by = "DeepSpeed"
    _engine: Any = None  # DeepSpeed's, once prepared
    _is_update = True

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        plugin = accelerator.deepspeed_plugin
        self._config: dict[str, Any] = plugin.deepspeed_config
        # An earlier trainer with the same plugin may have changed the configuration.
        given = vars(plugin).setdefault("_as_given", dict(self._config))
        self._accumulation = given.get("gradient_accumulation_steps", "auto")
        self._clip_norm = given.get("gradient_clipping", "auto")

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass needs all processes, as under ZeRO stage 3."""
        return self._engine is not None and self._engine.zero_optimization_partition_weights()

    def plan(self, config: TrainerRunConfig) -> None:
        """Copy the run's settings to DeepSpeed's configuration.

        The configuration's own clipping applies to runs that don't set any.

        Raises:
            ValueError: if the run clips by value, which DeepSpeed can't.
        """
        super().plan(config)
        if config.gradient_clip_value is not None:
            raise ValueError("DeepSpeed can only clip by norm: pass gradient_clip_norm instead")
        if self._accumulation not in (1, "auto", config.gradient_accumulation_steps):
            warnings.warn(
                f"DeepSpeed's configuration has gradient_accumulation_steps={self._accumulation}; "
                f"train() overrides it with {config.gradient_accumulation_steps}",
                stacklevel=3,
            )
        clip_norm = config.gradient_clip_norm
        if clip_norm is None:
            clip_norm = 0.0 if self._clip_norm == "auto" else self._clip_norm
        self._config["train_micro_batch_size_per_gpu"] = config.train_per_device_batch_size
        self._config["gradient_accumulation_steps"] = 1  # the loop accumulates
        self._config["gradient_clipping"] = clip_norm
        self._config.pop("train_batch_size", None)
        if self._engine is not None:  # a second run may clip differently
            self._engine._config.gradient_clipping = clip_norm
            if hasattr(self._engine.optimizer, "clip_grad"):
                self._engine.optimizer.clip_grad = clip_norm

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Hand model and optimizer to DeepSpeed, once; without an optimizer only move the model.

        Raises:
            ValueError: if the model or the optimizer isn't the one of the first call.
        """
        if optimizer is None:
            return model.to(self.device), None
        self.check_optimizer(optimizer)
        if self._engine is None:
            if self._config.get("train_micro_batch_size_per_gpu", "auto") == "auto":
                self._config["train_micro_batch_size_per_gpu"] = 1
            self._user_model, self._user_optimizer = model, optimizer
            self._groups = [list(group["params"]) for group in optimizer.param_groups]
            self.accelerator.prepare(model, optimizer)
            self._engine = self.accelerator.deepspeed_engine_wrapped.engine
            self._optimizer = DeepSpeedOptimizer(self._engine)
            self._trainable.remember(self._engine)
        known = (self._user_model, self._engine, self._engine.module)
        if model not in known or optimizer not in (self._user_optimizer, self._optimizer):
            raise ValueError(
                "Under DeepSpeed a Trainer can't change its model or optimizer after the first run"
            )
        return self._engine, self._optimizer

    def unwrap(self, model: nn.Module, keep_torch_compile: bool = True) -> nn.Module:
        """The model without DeepSpeed's wrapper."""
        if self._engine is not None and model is self._engine:
            model = cast("nn.Module", self._engine.module)
        return super().unwrap(model, keep_torch_compile)

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """The model in DeepSpeed's wrapper, once there is one."""
        is_trained = self._engine is not None and model in (self._engine, self._engine.module)
        return cast("nn.Module", self._engine) if is_trained else super().for_evaluation(model)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of rank 0; DeepSpeed does so only at the start."""
        if self.num_processes > 1:
            broadcast(model.buffers())

    def move(self, batch: Any) -> Any:
        """Move a batch to the device, its floats cast to the model's dtype if that has 16 bits."""
        batch = super().move(batch)
        dtype = torch.float32 if self._engine is None else next(self._user_model.parameters()).dtype
        if dtype == torch.float32:
            return batch
        return recursively_apply(lambda x: x.to(dtype), batch, test_type=_is_float)

    def accumulating(self, model: nn.Module, is_update: bool) -> AbstractContextManager[Any]:
        """Note whether the next backward pass is the last of the accumulated batch."""
        self._is_update = is_update
        if is_update and self._trainable.begin(model):
            return self._trainable.undone_on_error()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass; DeepSpeed reduces at the end of the accumulated batch."""
        self._engine.set_gradient_accumulation_boundary(self._is_update)
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor | None:
        """Do nothing: DeepSpeed clips in its update."""
        return None

    @property
    def sharding(self) -> str | None:
        """How the optimizer's state is sharded; None before the first run, and under stage 0."""
        stage = 0 if self._engine is None else self._engine.zero_optimization_stage()
        if stage == 0:
            return None
        dtype = str(next(self._user_model.parameters()).dtype).removeprefix("torch.")
        return f"divided by ZeRO stage {stage} in {dtype} among {self.num_processes} process(es)"

    def parameter_groups(self, optimizer: Any) -> list[list[nn.Parameter]]:
        """The user's groups: DeepSpeed's own hold flat shards of many parameters."""
        return super().parameter_groups(optimizer) if self._engine is None else self._groups

    def step_was_skipped(self, optimizer: Any) -> bool:
        """Whether the last update was skipped because of an overflow."""
        return not self._engine.was_step_applied()

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The full state dict of the model, gathered parameter by parameter if it is sharded."""
        model = self.unwrap(model, keep_torch_compile=False)
        if not _is_sharded(model):
            return super().weights(model)
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        full: dict[str, Any] = {}
        copies: dict[int, Tensor] = {}  # tied weights stay one tensor
        for name, value in clean_state_dict(model, keep_vars=True).items():
            if isinstance(value, Tensor) and id(value) not in copies:
                with GatheredParameters([value]):
                    copies[id(value)] = value.detach().cpu().clone()
            full[name] = copies[id(value)] if isinstance(value, Tensor) else value
        self._gather_persistent()
        return full

    def _shape(self, value: Any) -> tuple[int, ...] | None:
        return tuple(value.ds_shape) if hasattr(value, "ds_shape") else super()._shape(value)

    def load_weights(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Load a full state dict into the model and into the optimizer's 32-bit weights."""
        model = self.unwrap(model, keep_torch_compile=False)
        if _is_sharded(model):
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters

            with GatheredParameters(list(model.parameters()), modifier_rank=0):
                super().load_weights(model, weights)
            self._gather_persistent()
        else:
            super().load_weights(model, weights)
        if hasattr(getattr(self._engine, "optimizer", None), "refresh_fp32_params"):
            self._engine.optimizer.refresh_fp32_params()

    def _gather_persistent(self) -> None:
        """Gather the small parameters again, which ZeRO stage 3 keeps whole on every process."""
        self._engine.optimizer.checkpoint_event_epilogue()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


class DeepSpeedOptimizer(torch.optim.Optimizer):
    """DeepSpeed's optimizer as learning-rate schedulers and the loop expect one.

    Args:
        engine: DeepSpeed's engine, which makes the update.
    """

    is_flat = True
    """Its groups hold flat shards of many parameters instead of the model's parameters."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.defaults = getattr(engine.optimizer, "defaults", {})
        self._step_count = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the wrapped optimizer, where a scheduler sets the learning rate."""
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the wrapped optimizer."""
        return self._engine.optimizer.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Clip, update, and zero the gradients."""
        self._engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients; DeepSpeed also does so after an update."""
        self._engine.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state as plain data and tensors; under ZeRO, this process' shard."""
        state: dict[str, Any] = self._engine.optimizer.state_dict()
        if self._engine.zero_optimization_stage() == 0:
            return state
        shard = {name: state[name] for name in _TRAINED_ENTRIES if name in state}
        if "loss_scaler" in state:
            shard["loss_scaler"] = {
                name: value
                for name, value in vars(state["loss_scaler"]).items()
                if name in _SCALER_ENTRIES
            }
        return shard

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        optimizer = self._engine.optimizer
        if self._engine.zero_optimization_stage() == 0:
            optimizer.load_state_dict(state_dict)
            return
        # Entries that aren't saved, such as the offsets of the flat parameters, are this run's.
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
