"""The parts of a model under the names that they have without wrappers.

`torch.compile`, the wrappers of distributed training and activation checkpointing put a module
inside another one, which adds ``_orig_mod.``, ``module.`` or ``_checkpoint_wrapped_module.`` to the
names of all that it holds. Whatever is saved, compared or shown has the names without them, so that
it doesn't depend on which parts of the model are wrapped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_COMPILED = "_orig_mod"
_ALWAYS_WRAPPED = (_COMPILED, "_checkpoint_wrapped_module")
_DISTRIBUTED = (DistributedDataParallel, DataParallel)


def wrapped_name(module: nn.Module) -> str | None:
    """The name under which a wrapper holds the wrapped module; None if it is not a wrapper."""
    children = module._modules
    if len(children) != 1:
        return None
    (name,) = children
    # An isinstance check of torch.compile's class would import the compiler.
    is_wrapper = name in _ALWAYS_WRAPPED or (name == "module" and isinstance(module, _DISTRIBUTED))
    return name if is_wrapper and children[name] is not None else None


def wrapped_module(module: nn.Module) -> nn.Module:
    """The module in all wrappers around it; a module without any is returned as it is."""
    while (name := wrapped_name(module)) is not None:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def uncompiled(value: Any) -> Any:
    """A module or function without the wrapper of `torch.compile`; anything else as it is."""
    if isinstance(value, nn.Module):
        return wrapped_module(value)
    if not isinstance(value, FunctionType):
        return value
    inner: Any = getattr(value, "_torchdynamo_orig_callable", value)
    # What isn't a function, such as a partial, is compiled within a function of the compiler's.
    code = getattr(inner, "__code__", None)
    is_compilers = code is not None and code.co_filename.endswith("external_utils.py")
    return inner.__wrapped__ if is_compilers else inner


def unwrap(model: nn.Module, *, keep_torch_compile: bool = False) -> nn.Module:
    """A model without the wrappers of distributed training and, unless kept, of `torch.compile`.

    A compiled wrapper around a distributed one is removed with it. (accelerate would replace what
    it wraps, and so change the wrapped model.)
    """
    while True:
        regions = model.__dict__.get(_COMPILED)  # the model whose regions accelerate has compiled
        name = wrapped_name(model)
        if regions is not None and (not keep_torch_compile or isinstance(model, _DISTRIBUTED)):
            model = regions
        elif isinstance(model, _DISTRIBUTED):
            model = model.module
        elif name == _COMPILED:
            inner = model._modules[_COMPILED]
            assert inner is not None
            if keep_torch_compile and wrapped_name(inner) is None:
                return model
            model = inner
        else:
            return model


def distributed_layer(model: nn.Module) -> DistributedDataParallel | None:
    """The `DistributedDataParallel` of a wrapped model, which may be compiled as a whole."""
    inner = model._modules.get("_orig_mod", model)
    for one in (model, inner):
        if isinstance(one, DistributedDataParallel):
            return one
    return None


def clean_name(model: nn.Module, name: str) -> str:
    """The name of a module, parameter or entry of the state dict, without those of wrappers.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))
    >>> clean_name(model, "0.module.weight")
    '0.weight'
    """
    kept = []
    module: nn.Module | None = model
    for part in name.split("."):
        # A wrapper may hide itself in the names of the state dict, so its part may be missing.
        while module is not None and (held := wrapped_name(module)) is not None:
            module = module._modules[held]
            if part == held:
                break
        else:
            kept.append(part)
            module = None if module is None else module._modules.get(part)
    return ".".join(kept)


def named_parameters(
    model: nn.Module, *, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model by the names that they have without wrappers.

    Args:
        model: the model.
        remove_duplicate: whether a tied parameter has only the first of its names.
    """
    for name, parameter in model.named_parameters(remove_duplicate=remove_duplicate):
        yield clean_name(model, name), parameter


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model except wrappers, by the names that they have without them."""
    for name, module in model.named_modules():
        if wrapped_name(module) is None:
            yield clean_name(model, name), module


def clean_state_dict(model: nn.Module, *, keep_vars: bool = False) -> dict[str, Any]:
    """The state dict of a model under the names that it has without wrappers.

    Raises:
        ValueError: if two entries then have the same name.
    """
    state = model.state_dict(keep_vars=keep_vars)
    names = _clean_names(model, state)
    if all(name == clean for name, clean in names.items()):
        return state
    cleaned = OrderedDict((names[name], value) for name, value in state.items())
    if len(cleaned) != len(state):
        twice = sorted(name for name, clean in names.items() if name != clean and clean in names)
        raise ValueError(
            f"{', '.join(twice)} of {type(model).__name__} would have the name of another entry "
            "without the wrapper around it: rename one of them"
        )
    metadata = getattr(state, "_metadata", {})  # the versions of modules
    cleaned._metadata = OrderedDict(  # type: ignore[attr-defined]
        (clean_name(model, name), entry) for name, entry in metadata.items()
    )
    return cleaned


def load_clean_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict into a model, whichever parts of either are wrapped.

    Raises:
        RuntimeError: if names or shapes don't fit.
    """
    present = _clean_names(model, model.state_dict(keep_vars=True))
    state = with_names_of(present.values(), state)
    own = {clean: name for name, clean in present.items()}
    if all(own.get(name, name) == name for name in state):
        model.load_state_dict(state)
        return
    renamed = OrderedDict((own.get(name, name), value) for name, value in state.items())
    model.load_state_dict(renamed)


def with_names_of(present: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict whose names with those of wrappers are replaced by names in `present`.

    Files of other programs have such names. A name that doesn't fit either way stays as it is.
    """
    known = set(present)
    renamed = {
        name: clean
        for name in state
        if name not in known and (clean := _without_wrappers(name, known)) is not None
    }
    if not renamed:
        return state
    cleaned = OrderedDict((renamed.get(name, name), value) for name, value in state.items())
    return cleaned if len(cleaned) == len(state) else state


def _without_wrappers(name: str, known: set[str]) -> str | None:
    parts = [part for part in name.split(".") if part not in _ALWAYS_WRAPPED]
    while True:
        if (clean := ".".join(parts)) in known:
            return clean
        if parts[0] != "module":
            return None
        parts = parts[1:]


def _clean_names(model: nn.Module, names: Mapping[str, Any]) -> dict[str, str]:
    if all(wrapped_name(module) is None for module in model.modules()):
        return {name: name for name in names}
    return {name: clean_name(model, name) for name in names}
