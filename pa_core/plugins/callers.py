"""How a hook is called: one function per hook, made once.

That function is a loop over the hook's implementations. If a hook has wrappers, pluggy runs them
around the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pluggy

from pa_core.errors import StopTrainingError
from pa_core.hookspecs import PROJECT, hookimpl, hookspec

if TYPE_CHECKING:
    from pa_core.plugins.implementations import Call, Hook, Implementation
    from pa_core.plugins.manager import PluginManager


def make_caller(hook: Hook, implementations: Sequence[Implementation]) -> Callable[..., Any] | None:
    """Make the function that calls a hook's implementations in their order; None without any.

    It takes the hook's arguments by name. It returns all results that aren't None as a list; with
    ``firstresult``, the first of them.
    """
    if not implementations:
        return None
    # This loop is pluggy's without its costs per call: it copies the list of implementations,
    # compares the arguments with the hookspec, and looks for wrappers.
    calls = tuple(one.call for one in implementations if not one.wrapper)

    def call_first(**arguments: Any) -> Any:
        for call in calls:
            result = call(arguments)
            if result is not None:
                return result
        return None

    def call_all(**arguments: Any) -> list[Any]:
        results = []
        for call in calls:
            result = call(arguments)
            if result is not None:
                results.append(result)
        return results

    caller = call_first if hook.firstresult else call_all
    wrappers = [one.call for one in implementations if one.wrapper]
    return _surround(caller, wrappers) if wrappers else caller


class _Specification:
    """What pluggy sees of any hook with wrappers: one argument and one result."""

    @staticmethod
    @hookspec(firstresult=True)
    def call(arguments: dict[str, Any]) -> Any: ...


def _surround(caller: Callable[..., Any], wrappers: Sequence[Call]) -> Callable[..., Any]:
    """Let pluggy run wrappers around a caller, the first one as the outermost."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(_Specification)
    manager.register(SimpleNamespace(call=hookimpl(lambda arguments: caller(**arguments))))
    for wrapper in reversed(wrappers):  # pluggy calls the last registered first
        manager.register(SimpleNamespace(call=hookimpl(_as_generator(wrapper), wrapper=True)))
    call_surrounded = manager.hook.call

    def call_with_wrappers(**arguments: Any) -> Any:
        return call_surrounded(arguments=arguments)

    return call_with_wrappers


def _as_generator(call: Call) -> Callable[..., Any]:
    def wrapper(arguments: dict[str, Any]) -> Generator[None, Any, Any]:
        return (yield from call(arguments))

    return wrapper


class HookRelay:
    """All hooks as attributes; each can be called whether or not a plugin implements it.

    Like pluggy's class of this name, except that a missing argument is a `TypeError`.
    """

    def __init__(self, plugins: PluginManager) -> None:
        self._plugins = plugins

    def __getattr__(self, name: str) -> Callable[..., Any]:
        caller, hook = self._plugins.bind(name), self._plugins.hooks[name]

        def call(**arguments: Any) -> Any:
            missing = [argument for argument in hook.arguments if argument not in arguments]
            if missing:
                raise TypeError(f"The hook {name} needs {', '.join(missing)}")
            if caller is None:
                return None if hook.firstresult else []
            return caller(**arguments)

        return call


class BoundHooks:
    """The hooks' callers as attributes, None where no plugin implements one; for the loop.

    They are bound when first used and kept until `refresh`, so that a step costs no look-up and all
    processes see plugins come and go at the same update.

    Args:
        plugins: the plugin manager.
        on_stop: called with a `StopTrainingError` that an event raises, instead of raising it.
    """

    def __init__(
        self, plugins: PluginManager, on_stop: Callable[[StopTrainingError], None] | None = None
    ) -> None:
        self._plugins, self._version, self._on_stop = plugins, plugins.version, on_stop

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask before `__init__` has run
            raise AttributeError(name)
        caller = self._plugins.bind(name)
        if caller is not None and self._on_stop is not None and name.startswith("on_"):
            caller = _catching_stop(caller, self._on_stop)
        self.__dict__[name] = caller
        return caller

    def refresh(self) -> None:
        """Bind anew if plugins were registered or unregistered since."""
        if self._version != self._plugins.version:
            kept = {name: value for name, value in vars(self).items() if name.startswith("_")}
            self.__dict__ = kept | {"_version": self._plugins.version}


def _catching_stop(
    caller: Callable[..., Any], on_stop: Callable[[StopTrainingError], None]
) -> Callable[..., None]:
    def call(**arguments: Any) -> None:
        try:
            caller(**arguments)
        except StopTrainingError as error:
            on_stop(error)

    return call
