"""What is asked for when a schedule is asked for by name, and what is wrong with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pa_core.errors import nearest

if TYPE_CHECKING:
    from pa_schedulers.lengths import RunLength

EVAL_LOSS = "eval_loss_epoch"


@dataclass(frozen=True)
class Request:
    """A schedule by name, for a run.

    Attributes:
        name: with the prefix of its library, where it has one.
        run: the run's length.
        options: the schedule's own arguments, and ``warmup`` and ``cooldown``.
        watch_metric: what a schedule that goes by a metric goes by.
        greater_is_better: whether more of it is better.
    """

    name: str
    run: RunLength
    options: Mapping[str, Any] = field(default_factory=dict)
    watch_metric: str = EVAL_LOSS
    greater_is_better: bool = False

    @property
    def mode(self) -> str:
        """``"min"`` or ``"max"``, as schedules that go by a metric have it."""
        return "max" if self.greater_is_better else "min"

    def check_options(self, allowed: Iterable[str], required: Iterable[str] = ()) -> None:
        """Tell which options the schedule doesn't know, or needs.

        Raises:
            ValueError: with the nearest name.
        """
        check_options(self.name, self.options, allowed, required)


def check_options(
    name: str, options: Mapping[str, Any], allowed: Iterable[str], required: Iterable[str] = ()
) -> None:
    """Tell which options the schedule `name` doesn't know, or needs.

    Raises:
        ValueError: with the nearest name.
    """
    known = sorted(set(allowed))
    for option in options:
        if option not in known:
            takes = f"It takes {', '.join(known)}" if known else "It takes none"
            raise ValueError(
                f"The schedule {name!r} has no option {option!r}.{nearest(option, known)} {takes}"
            )
    missing = [option for option in required if option not in options]
    if missing:
        raise ValueError(f"The schedule {name!r} needs {', '.join(missing)}")


def arguments_of(function: Callable[..., Any], without: Collection[str]) -> dict[str, Any]:
    """A function's named arguments with their defaults, `inspect.Parameter.empty` for none."""
    if inspect.isclass(function):  # (a metaclass may hide its constructor's arguments)
        function = function.__init__
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in kinds and name not in without and name != "self"
    }


def required(arguments: Mapping[str, Any]) -> list[str]:
    """The arguments that have no default."""
    return [name for name, default in arguments.items() if default is inspect.Parameter.empty]


def import_library(module: str, needed_by: str) -> Any:
    """Import what an extra installs.

    Raises:
        ImportError: with the pip line, where it is missing.
    """
    library = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        extra = "plot" if library == "matplotlib" else library
        raise ImportError(
            f"{needed_by} needs {library}, which isn't installed: "
            f"pip install 'pa-schedulers[{extra}]'"
        ) from error
