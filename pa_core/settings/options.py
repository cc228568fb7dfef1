"""Options given in code, checked like the keys of a table."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pa_core.errors import SettingsError
from pa_core.settings.validation import check_options

if TYPE_CHECKING:
    from pydantic import BaseModel

    S = TypeVar("S", bound=BaseModel)


def settings_from_options(
    model: type[S], settings: S | None, options: Mapping[str, Any], where: str
) -> S:
    """The settings of a plugin that takes either its settings or its options by name.

    Args:
        model: the plugin's settings.
        settings: the settings, if they were given.
        options: the options that were given by name: keys of the plugin's table.
        where: the plugin's class, for messages.

    Raises:
        SettingsError: with all mistakes in the options; if both are given; or if `settings` is
            something else.
    """
    if settings is None:
        values, problems = check_options(model, options)
        if values is None:
            raise _errors(where, problems)
        return values
    if not isinstance(settings, model):
        problem = (
            f"settings: expected {model.__name__}, got {settings!r}. Pass options by name: "
            f"{where}({next(iter(model.model_fields), 'option')}=…)"
        )
        raise _errors(where, [problem])
    if options:
        problem = f"has both settings and {', '.join(options)}: pass one or the other"
        raise _errors(where, [problem])
    return settings


def checking_options(construct: Callable[..., None], model: type[BaseModel]) -> Callable[..., None]:
    """A constructor that first checks those of its arguments that are keys of a table.

    Args:
        construct: the ``__init__`` of a class.
        model: the settings of the class, with a field for each argument.
    """
    parameters = dict(inspect.signature(construct).parameters)
    del parameters[next(iter(parameters))]  # self
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @functools.wraps(construct)
    def check_and_construct(self: Any, *args: Any, **kwargs: Any) -> None:
        options = {}
        for key, value in {**dict(zip(parameters, args, strict=False)), **kwargs}.items():
            # A default of the constructor may be a value that the table can't have, such as None.
            if key in parameters and value is parameters[key].default:
                continue
            if key in model.model_fields or (key not in parameters and not takes_any):
                options[key] = value
        _, problems = check_options(model, options, complete=False)
        if problems:
            raise _errors(type(self).__name__, problems)
        construct(self, *args, **kwargs)

    return check_and_construct


def _errors(where: str, problems: list[str]) -> SettingsError:
    return SettingsError(f"{where}(…) {problem}" for problem in problems)
