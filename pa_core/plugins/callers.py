"""The hooks as the loop calls them: one function for each, or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pa_core.errors import StopTrainingError

if TYPE_CHECKING:
    from pa_core.plugins.manager import PluginManager

Stop = Callable[[StopTrainingError], None]


class BoundHooks:
    """The hooks' callers as attributes, None where nobody implements one; bound when first used.

    Args:
        plugins: who implements them.
        on_stop: called with each `StopTrainingError` of an event, which ends the event alone.
    """

    def __init__(self, plugins: PluginManager, on_stop: Stop | None = None) -> None:
        self._plugins, self._version, self._on_stop = plugins, plugins.version, on_stop

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by copy and pickle, before there is anything
            raise AttributeError(name)
        caller = self._plugins.bind(name)
        if caller is not None and self._on_stop is not None and name.startswith("on_"):
            caller = _handing(caller, self._on_stop)
        self.__dict__[name] = caller
        return caller

    def refresh(self) -> None:
        """Bind anew where plugins have come or gone since."""
        if self._version != self._plugins.version:
            kept = {name: value for name, value in vars(self).items() if name.startswith("_")}
            self.__dict__ = kept | {"_version": self._plugins.version}


def _handing(caller: Callable[..., Any], on_stop: Stop) -> Callable[..., None]:
    """The same caller, which hands a `StopTrainingError` over in place of raising it."""

    def call(**arguments: Any) -> None:
        try:
            caller(**arguments)
        except StopTrainingError as error:
            on_stop(error)

    return call
