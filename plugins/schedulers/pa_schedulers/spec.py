"""A scheduler as it is requested by name, and the check of its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pa_core.errors import nearest

if TYPE_CHECKING:
    from pa_schedulers.run_length import RunLength

EVAL_LOSS = "eval_loss_epoch"


@dataclass(frozen=True)
class SchedulerSpec:
    """A scheduler requested by name for a run.

    Attributes:
        name: with the prefix of its library, if it has one.
        run: the run's length.
        options: the scheduler's own arguments, and ``warmup`` and ``cooldown``.
        watch_metric: the metric that a metric-driven scheduler steps on.
        greater_is_better: whether a greater value of it is better.
    """

    name: str
    run: RunLength
    options: Mapping[str, Any] = field(default_factory=dict)
    watch_metric: str = EVAL_LOSS
    greater_is_better: bool = False

    @property
    def mode(self) -> str:
        """``"min"`` or ``"max"``, as metric-driven schedulers call it."""
        return "max" if self.greater_is_better else "min"

    def check_options(self, allowed: Iterable[str], required: Iterable[str] = ()) -> None:
        """Check the options; see the function `check_options`."""
        check_options(self.name, self.options, allowed, required)


def check_options(
    name: str, options: Mapping[str, Any], allowed: Iterable[str], required: Iterable[str] = ()
) -> None:
    """Check that the scheduler `name` accepts all options, and has all that it requires.

    Raises:
        ValueError: for an unknown option, with the closest name, or for a missing one.
    """
    known = sorted(set(allowed))
    for option in options:
        if option not in known:
            accepted = f"Its options: {', '.join(known)}" if known else "It has no options"
            raise ValueError(
                f"The scheduler {name!r} has no option {option!r}."
                f"{nearest(option, known)} {accepted}"
            )
    missing = [option for option in required if option not in options]
    if missing:
        raise ValueError(f"The scheduler {name!r} requires {', '.join(missing)}")


def arguments_of(function: Callable[..., Any], without: Collection[str]) -> dict[str, Any]:
    """A function's named arguments with their defaults, `inspect.Parameter.empty` for none."""
    if inspect.isclass(function):  # a metaclass may hide the arguments of __init__
        function = function.__init__
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in kinds and name not in without and name != "self"
    }


def required(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments without a default."""
    return [name for name, default in arguments.items() if default is inspect.Parameter.empty]
