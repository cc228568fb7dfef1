"""What the loop needs of FSDP, which divides weights, gradients and optimizer among processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from pa_core.engine.base import Engine, share
from pa_core.errors import TrainingStateError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn


class FsdpEngine(Engine):
    """Drive a model that accelerate's plugin divides with torch's `fully_shard` (FSDP2).

    Raises:
        ValueError: for FSDP1, whose flat parameters have no place in a training state.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        if not accelerator.is_fsdp2:
            raise ValueError(
                "FSDP1 isn't supported: give FullyShardedDataParallelPlugin(fsdp_version=2), or "
                "answer so in accelerate config"
            )
        self._is_divided = False

    forwards_together = True

    @property
    def division(self) -> str | None:
        """How the optimizer's state is divided; None before the first run."""
        return (
            f"divided by FSDP among {self.num_processes} process(es)" if self._is_divided else None
        )

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Divide model and optimizer, once; without an optimizer a model stays in one piece."""
        if optimizer is None:
            return model.to(self.device), None
        self._is_divided = True
        return super().prepare(model, optimizer)

    def unwrap(self, model: nn.Module, keep_torch_compile: bool = True) -> nn.Module:
        """The model, each process holding its part: an evaluation leaves some weights gathered."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return super().unwrap(model, keep_torch_compile)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of the first; FSDP never does."""
        if self.num_processes > 1:
            share(model.buffers())

    def for_evaluation(self, model: nn.Module) -> nn.Module:
        """The model as it is: its modules gather their weights by themselves."""
        return model.to(self.device)

    def clip_norm(self, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor | None:
        """Clip the gradients' total 2-norm over all processes' parts, and return what it was."""
        norm = super().clip_norm(parameters, max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def weights(self, model: nn.Module) -> dict[str, Any]:
        """The model's whole weights, gathered one by one."""
        return {
            name: value.full_tensor().cpu() if isinstance(value, DTensor) else value
            for name, value in super().weights(model).items()
        }

    def load_weights(self, model: nn.Module, weights: Mapping[str, Any]) -> None:
        """Put whole weights into the model: each process takes its part of them."""
        bare = self.unwrap(model, keep_torch_compile=False)
        divided = {
            name: _share_of(weights[name], value)
            for name, value in bare.state_dict().items()
            if isinstance(value, DTensor)
        }
        super().load_weights(model, {**weights, **divided})

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """This process' part of the optimizer's state."""
        state = super().optimizer_state(optimizer)
        parameters = _flat(self.parameter_groups(optimizer))
        parts = {
            index: {name: _part_of(value, parameters[index]) for name, value in entry.items()}
            for index, entry in state["state"].items()
        }
        return state | {"state": parts}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Put back the part that `optimizer_state` has given on this process."""
        parameters = _flat(self.parameter_groups(optimizer))
        entries = {
            index: {name: _whole_of(value, parameters[index]) for name, value in entry.items()}
            for index, entry in state["state"].items()
        }
        super().load_optimizer_state(optimizer, state | {"state": entries})


def _share_of(whole: Tensor, like: DTensor) -> DTensor:
    """Divide a tensor as another one is; every process has it, so nothing is sent."""
    placed = whole.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def _flat(groups: list[list[nn.Parameter]]) -> list[Any]:
    return [parameter for group in groups for parameter in group]


def _part_of(value: Any, parameter: Any) -> Any:
    """What this process has of an entry of a parameter's state, if the entry is divided."""
    if not isinstance(value, DTensor):
        return value
    if (value.shape, value.placements) != (parameter.shape, parameter.placements):
        raise TrainingStateError(
            "The optimizer's state isn't divided as the parameters are, which can't be saved yet"
        )
    return {"part": value.to_local()}


def _whole_of(value: Any, parameter: Any) -> Any:
    """What `_part_of` was given, on this process' device."""
    if not isinstance(value, dict):
        return value
    return DTensor.from_local(
        value["part"].to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
