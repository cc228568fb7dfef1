"""Call an optimizer's step without what PyTorch wraps around it, where that does nothing.

PyTorch wraps the `step` of each class of optimizers in a mark for its profiler and in loops over
hooks, which takes a quarter of the update of a small network. A learning-rate scheduler wraps the
`step` of its optimizer again, to note that it was called. Whether anything else has wrapped
`step`, whether anybody profiles and whether there are hooks is checked at each call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.autograd import profiler
from torch.optim import Optimizer, lr_scheduler
from torch.optim import optimizer as _optimizer

_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
_KNOWN_IN_WRAPPER = {
    *("Optimizer", "cast", "__class__", "__name__", "_optimizer_step_code", *_HOOKS),
    *("torch", "autograd", "profiler", "record_function"),
    *("chain", "values", "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
    *("isinstance", "tuple", "len", "RuntimeError"),
}
_KNOWN_IN_SCHEDULER = {"_opt_called", "__get__", "__class__"}
_is_profiling: Any = getattr(torch.autograd, "_profiler_enabled", None)
_KINETO_MAY_START = "KINETO_USE_DAEMON" in os.environ  # a profiler that PyTorch doesn't know of


def step_optimizer(optimizer: Any) -> None:
    """Do what ``optimizer.step()`` does; directly, where PyTorch's wrappers would do nothing."""
    wrapper = type(optimizer).step
    if _WRAPPER is None or getattr(wrapper, "__code__", None) is not _WRAPPER:
        optimizer.step()  # not a class of PyTorch's, or a patched one
        return
    patch = vars(optimizer).get("step")
    if (
        (patch is not None and not _only_counts(patch, wrapper))
        or profiler._is_profiler_enabled
        or _is_profiling()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _optimizer._global_optimizer_pre_hooks
        or _optimizer._global_optimizer_post_hooks
    ):
        optimizer.step()
        return
    if patch is not None:
        optimizer._opt_called = True
    wrapper.__wrapped__(optimizer)


def _only_counts(patch: Any, wrapper: Any) -> bool:
    """Whether an optimizer's own `step` is the class's, with the mark of a scheduler."""
    code = getattr(patch, "__code__", None)
    return (
        code is not None
        and code.co_filename == lr_scheduler.__file__
        and _KNOWN_IN_SCHEDULER.issuperset(code.co_names)
        and patch.__wrapped__ is wrapper
    )


def _code_of_wrapper() -> CodeType | None:
    """The code that PyTorch wraps around `step`; None if it does what this module doesn't know."""
    wrap: Callable[[Any], Any] | None = getattr(Optimizer, "profile_hook_step", None)
    code = getattr(wrap and wrap(lambda optimizer: None), "__code__", None)
    is_known = (
        isinstance(code, CodeType)
        and _KNOWN_IN_WRAPPER.issuperset(code.co_names)
        and hasattr(profiler, "_is_profiler_enabled")
        and _is_profiling is not None
        and all(hasattr(_optimizer, name) for name in _HOOKS)
    )
    return code if is_known and not _KINETO_MAY_START else None


_WRAPPER = _code_of_wrapper()
