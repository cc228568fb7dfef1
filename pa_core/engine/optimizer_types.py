"""Restore an optimizer's state in the types that it was saved with.

PyTorch's `Optimizer.load_state_dict` converts it to the types of the parameters. That would round
32-bit copies of 16-bit weights, make floats of 8-bit codes, and end the rounding of a momentum in
16 bits, so that a resumed run would have other numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pa_core.engine.optimizers import given_optimizers


def restore_types(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Replace what PyTorch has converted by what was saved, on the device of the parameter.

    Args:
        optimizer: an optimizer, or several as one, that has loaded `state`.
        state: what its `state_dict` had returned. The parameters had the types that they have now.
    """
    for one, saved in zip(
        given_optimizers(optimizer), state.get("optimizers", [state]), strict=True
    ):
        entries = saved.get("state")
        if not entries or not isinstance(one, Optimizer) or getattr(one, "is_flat", False):
            continue
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        parameters = [parameter for group in one.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in entries and parameter in one.state:
                one.state[parameter] = _as_saved(entries[number], one.state[parameter], parameter)


def _as_saved(saved: Any, loaded: Any, parameter: Tensor) -> Any:
    if isinstance(saved, Tensor) and isinstance(loaded, Tensor):
        is_converted = loaded.dtype == parameter.dtype != saved.dtype
        return saved.to(loaded.device) if is_converted else loaded
    if isinstance(saved, Mapping) and isinstance(loaded, dict):
        both = {key: value for key, value in loaded.items() if key in saved}
        loaded.update({key: _as_saved(saved[key], one, parameter) for key, one in both.items()})
    elif isinstance(saved, list | tuple) and type(loaded) is type(saved):
        return type(saved)(_as_saved(*pair, parameter) for pair in zip(saved, loaded, strict=True))
    return loaded
