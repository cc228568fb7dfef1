"""The engine for FSDP, which shards weights, gradients and optimizer between processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from pa_core.engine.base import Engine, broadcast
from pa_core.engine.wrappers import clean_state_dict, with_names_of
from pa_core.errors import TrainingStateError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn


class FsdpEngine(Engine):
    """Trains a model that accelerate's plugin shards with torch's `fully_shard` (FSDP2).

    Raises:
        ValueError: for FSDP1, whose flat parameters can't be saved in a training state.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        if not accelerator.is_fsdp2:
            raise ValueError(
                "FSDP1 is not supported: pass FullyShardedDataParallelPlugin(fsdp_version=2), or "
                "choose FSDP version 2 in `accelerate config`"
            )
        self._is_sharded = False

    forward_is_collective = True
    sharded_by = "FSDP"

    @property
    def sharding(self) -> str | None:
        """How the optimizer's state is sharded; None before the first run."""
        return (
            f"divided by FSDP among {self.num_processes} process(es)" if self._is_sharded else None
        )

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Shard model and optimizer, once; without an optimizer the model stays whole."""
        if optimizer is None:
            return model.to(self.device), None
        self.check_optimizer(optimizer)
        self._is_sharded = True
        return super().prepare(model, optimizer)

    def unwrap(self, model: nn.Module, keep_torch_compile: bool = True) -> nn.Module:
        """The model, resharded, because an evaluation leaves some weights gathered."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().unwrap(model, keep_torch_compile)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of rank 0; FSDP never does."""
        if self.num_processes > 1:
            broadcast(model.buffers())

    def gradient_leaves(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters at which a backward pass ends: gathered ones instead of sharded ones."""
        wrapped = [module for module in model.modules() if isinstance(module, FSDPModule)]
        states: list[Any] = [module._get_fsdp_state() for module in wrapped]
        groups = [group for state in states for group in _parameter_groups(state)]
        sharded = [one for group in groups for one in group.fsdp_params]
        # A module that hasn't run yet has gathered none.
        gathered = [getattr(one, "_unsharded_param", None) for one in sharded]
        leaves = [one for one in model.parameters() if not isinstance(one, DTensor)]
        leaves += [one for one in gathered if one is not None]
        return [one for one in dict.fromkeys(leaves) if one.requires_grad]

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """The wrapped model, whose modules gather their weights."""
        return model.to(self.device)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor | None:
        """Clip the total 2-norm of the gradients over all shards; returns the norm before."""
        norm = super().clip_norm(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The full state dict of the model, gathered tensor by tensor."""
        return {
            name: value.full_tensor().cpu() if isinstance(value, DTensor) else value
            for name, value in super().weights(model).items()
        }

    def load_weights(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Load a full state dict into the model: each process takes its shards."""
        bare = self.unwrap(model, keep_torch_compile=False)
        present = clean_state_dict(bare)
        weights = with_names_of(present, weights)
        sharded = {
            name: _shard_like(weights[name], value)
            for name, value in present.items()
            if isinstance(value, DTensor)
        }
        super().load_weights(model, {**weights, **sharded})

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """This process' shard of the optimizer's state."""
        state = super().optimizer_state(optimizer)
        parameters = _flat(self.parameter_groups(optimizer))
        entries = {
            index: {name: _local_shard(value, parameters[index]) for name, value in entry.items()}
            for index, entry in state["state"].items()
        }
        return state | {"state": entries}

    def load_optimizer_state(
        self, optimizer: Any, state: dict[str, Any], *, keeps_types: bool = True
    ) -> None:
        """Restore the shard that `optimizer_state` returned on this process."""
        parameters = _flat(self.parameter_groups(optimizer))
        entries = {
            index: {name: _from_shard(value, parameters[index]) for name, value in entry.items()}
            for index, entry in state["state"].items()
        }
        super().load_optimizer_state(optimizer, state | {"state": entries}, keeps_types=keeps_types)


def _parameter_groups(state: Any) -> list[Any]:
    """The groups of parameters that a wrapped module gathers; PyTorch 2.11 allows several."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _shard_like(full: Tensor, like: DTensor) -> DTensor:
    """Shard a tensor like another one; every process has all of it, so nothing is sent."""
    placed = full.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def _flat(groups: list[list[nn.Parameter]]) -> list[Any]:
    return [parameter for group in groups for parameter in group]


def _local_shard(value: Any, parameter: Any) -> Any:
    """This process' shard of an entry of a parameter's state; other entries as they are."""
    if not isinstance(value, DTensor):
        return value
    if (value.shape, value.placements) != (parameter.shape, parameter.placements):
        raise TrainingStateError(
            "The optimizer's state isn't sharded like the parameters, which can't be saved yet"
        )
    return {"part": value.to_local()}


def _from_shard(value: Any, parameter: Any) -> Any:
    """The inverse of `_local_shard`, on this process' device."""
    if not isinstance(value, dict):
        return value
    return DTensor.from_local(
        value["part"].to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
