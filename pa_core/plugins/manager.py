"""The plugin manager: pluggy, with the order as written, and a name on every mistake.

pluggy calls the last registered plugin first, evaluates a plugin's properties as it looks for
hooks, gives nothing to ``**kwargs``, compares plugins by ``==`` and leaves them half-registered
after an error. So plugins are looked at here, put in order here, and shown to pluggy as objects
that have a function for each hook and nothing else.
"""

from __future__ import annotations

import functools
import inspect
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pa_core import hookspecs
from pa_core.errors import (
    PluginConflictError,
    PluginLoadError,
    PluginNotFoundError,
    PluginValidationError,
    TrainingStateError,
    nearest,
)
from pa_core.plugins.discovery import PluginSource, code_source
from pa_core.plugins.implementations import (
    Call,
    Hook,
    Implementation,
    blame,
    blame_note,
    examine,
    specifications,
)
from pa_core.plugins.pluggy_bridge import as_pluggy_sees_it
from pa_core.plugins.process_scope import alone, runs_on

if TYPE_CHECKING:
    import pluggy


@dataclass(frozen=True, eq=False)
class _Registration:
    """A plugin, and what it implements."""

    name: str
    plugin: object
    source: PluginSource
    implementations: tuple[Implementation, ...]


class PluginManager:
    """The plugins of one trainer, called in the order in which they were registered.

    Args:
        defaults: the host's own implementations, always the last of all.

    Attributes:
        version: grows whenever plugins or hooks come or go; what `bind` gave before is out of date
            then.
    """

    def __init__(self, defaults: object | None = None) -> None:
        self.version = 0
        self._hooks = specifications(hookspecs)
        self._registrations: tuple[_Registration, ...] = ()
        self._defaults: _Registration | None = None
        self._relay: pluggy.PluginManager | None = None
        self._is_main_process = True
        self._around: tuple[Callable[[Implementation], Call], ...] = ()
        if defaults is not None:
            source = code_source(defaults)
            last = examine("pa_core", defaults, source, self._hooks, is_default=True)
            self._defaults = _Registration("pa_core", defaults, source, last)

    # -- Registering ----------------------------------------------------------------------------

    def register(
        self, plugin: Any, name: str | None = None, source: PluginSource | None = None
    ) -> str:
        """Register a plugin behind those that are there. After an error, all is as before.

        Args:
            plugin: an instance, a module, or a class that is built without arguments.
            name: its name; by default the built-in's, the module's or the class', the second of
                that name with ``:2`` behind it.
            source: where it comes from.

        Returns:
            The name that it has got.

        Raises:
            PluginLoadError: for a class that can't be built.
            PluginValidationError: for hooks and arguments that don't exist.
            PluginConflictError: where `name` is taken, or `plugin` is registered already.
        """
        plugin = build(plugin) if inspect.isclass(plugin) else plugin
        if inspect.isroutine(plugin) or isinstance(plugin, str):
            raise PluginValidationError(
                f"{plugin!r} is no plugin: that is a class, an instance or a module"
            )
        source = code_source(plugin) if source is None else source
        taken = self.plugins
        for other, registered in taken.items():
            if registered is plugin:
                raise PluginConflictError(f"{plugin!r} is registered already, as {other!r}")
        if name is None:
            name = free_name(source.name, taken)
        elif name in taken:
            raise PluginConflictError(
                f"The plugin name {name!r} is taken by the plugin of {self.sources[name]}. Give "
                f"this one of {source} another, such as {free_name(name, taken)!r}"
            )
        hooks = self._with_specs(plugin)
        implementations = examine(name, plugin, source, hooks)
        registration = _Registration(name, plugin, source, implementations)
        self._change((*self._registrations, registration), hooks)
        return name

    def unregister(self, name: str) -> object:
        """Take a plugin out, and return it. Hooks that it has specified stay.

        Raises:
            PluginNotFoundError: where there is none of that name.
        """
        plugins = self.plugins
        if name not in plugins:
            raise PluginNotFoundError(f"No plugin is named {name!r}.{nearest(name, plugins)}")
        self._change(tuple(r for r in self._registrations if r.name != name), self._hooks)
        return plugins[name]

    def add_hookspecs(self, specs: Any) -> None:
        """Add the hooks that a module, an object or a class specifies with `hookspec`.

        A plugin's own are added as it is registered. Others implement them with
        ``@hookimpl(optionalhook=True)``, and so need not come later.

        Raises:
            PluginConflictError: for a hook that there is.
            PluginValidationError: where there is no hookspec, or an implementation doesn't fit.
        """
        hooks = self._with_specs(specs)
        if len(hooks) == len(self._hooks):
            raise PluginValidationError(f"{specs!r} has no function marked with @hookspec")
        self._change(self._registrations, hooks)

    def _with_specs(self, specs: object) -> dict[str, Hook]:
        added = specifications(specs)
        for name, hook in added.items():
            known = self._hooks.get(name)
            # A plugin may come back, and be there under two names.
            if known is not None and _plain(known.function) is not _plain(hook.function):
                raise PluginConflictError(f"The hook {name!r} of {specs!r} is specified already")
        return self._hooks | added

    def _change(self, registrations: tuple[_Registration, ...], hooks: dict[str, Hook]) -> None:
        if len(hooks) != len(self._hooks):  # what was optional may be known now
            registrations = tuple(
                replace(r, implementations=examine(r.name, r.plugin, r.source, hooks))
                for r in registrations
            )
        self._registrations, self._hooks, self._relay = registrations, hooks, None
        self.version += 1

    def set_process(self, *, is_main: bool) -> None:
        """Say whether this is the main process, the only one for plugins that run there alone."""
        self._is_main_process = is_main
        self._change(self._registrations, self._hooks)

    def wrap_calls(self, around: Callable[[Implementation], Call]) -> None:
        """Call implementations through what `around` makes of each, to time or watch them."""
        self._around = (*self._around, around)
        self._change(self._registrations, self._hooks)

    def unwrap_calls(self, around: Callable[[Implementation], Call]) -> None:
        """End what `wrap_calls` has begun."""
        self._around = tuple(other for other in self._around if other != around)
        self._change(self._registrations, self._hooks)

    # -- Looking --------------------------------------------------------------------------------

    @property
    def plugins(self) -> dict[str, object]:
        """The plugins by name, in the order in which they are called."""
        return {registration.name: registration.plugin for registration in self._registrations}

    @property
    def sources(self) -> dict[str, PluginSource]:
        """Where each plugin comes from."""
        return {registration.name: registration.source for registration in self._registrations}

    @property
    def hooks(self) -> dict[str, Hook]:
        """The hooks by name, in the order of their specification."""
        return dict(self._hooks)

    def implementations(self, hook_name: str) -> list[Implementation]:
        """Who implements a hook, in the order of the calls; wrappers are set up before all.

        Without those that don't run on this process.

        Raises:
            AttributeError: where there is no such hook, with the nearest name.
        """
        self._hook(hook_name)
        last = (self._defaults,) if self._defaults else ()
        found = [
            implementation
            for registration in (*self._registrations, *last)
            for implementation in registration.implementations
            if implementation.hook == hook_name and self._runs_here(implementation.runs_on)
        ]
        for around in self._around:
            found = [replace(one, call=around(one)) for one in found]
        return sorted(found, key=lambda implementation: implementation.rank)

    def _runs_here(self, where: str) -> bool:
        return self._is_main_process or where == "all"

    def _hook(self, name: str) -> Hook:
        if name not in self._hooks:
            raise AttributeError(f"There is no hook {name!r}.{nearest(name, self._hooks)}")
        return self._hooks[name]

    # -- Calling --------------------------------------------------------------------------------

    @property
    def hook(self) -> Any:
        """pluggy's callers, one for each hook, as ``manager.hook.on_init_end(trainer=trainer)``."""
        if self._relay is None:
            self._relay = as_pluggy_sees_it(self._hooks, self.implementations)
        return self._relay.hook

    def bind(self, hook_name: str) -> Callable[..., Any] | None:
        """A fast caller of a hook; None where nobody implements it.

        It takes the hook's arguments by name and returns what pluggy does: a list of all results
        that aren't None; with ``firstresult``, the first of them. It is good until `version`
        changes. A hook with wrappers is left to pluggy.

        Raises:
            AttributeError: where there is no such hook, with the nearest name.
        """
        implementations = self.implementations(hook_name)
        if not implementations:
            return None
        if any(implementation.wrapper for implementation in implementations):
            return getattr(self.hook, hook_name)
        calls = tuple(implementation.call for implementation in implementations)

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

        return call_first if self._hooks[hook_name].firstresult else call_all

    def call_event(self, name: str, trainer: Any, /, **arguments: Any) -> None:
        """Call an event by name.

        Args:
            name: one of the hooks; any other name reaches each plugin that has such a method,
                which gets all the arguments.
            trainer: the trainer.
            **arguments: the event's other arguments.

        Raises:
            TypeError: where a hook's argument is missing.
        """
        if name in self._hooks:
            given = {"trainer": trainer, **arguments}
            missing = [key for key in self._hooks[name].arguments if key not in given]
            if missing:
                raise TypeError(f"The event {name} needs {', '.join(missing)}")
            bound = self.bind(name)
            if bound is not None:
                bound(**given)
            return
        for registration in self._registrations:
            static = inspect.getattr_static(registration.plugin, name, None)
            if static is None or isinstance(static, property | functools.cached_property):
                continue
            where = runs_on(registration.plugin)
            method = getattr(registration.plugin, name)
            if callable(method) and self._runs_here(where):
                method = alone(method, registration.name) if where == "main" else method
                try:
                    method(trainer, **arguments)
                except Exception as error:
                    blame(error, blame_note(f"hook {name}", registration.name, registration.source))
                    raise

    def call_each(self, name: str, cause: BaseException, /, **arguments: Any) -> None:
        """Call an event as `cause` passes: what fails in it is noted there, and hides nothing."""
        for implementation in self.implementations(name):
            try:
                implementation.call(arguments)
            except BaseException as error:  # noqa: BLE001 - it is told with its cause
                where = f"{name} of plugin {implementation.name!r} ({implementation.source})"
                cause.add_note(f"Then {where} has failed, too: {type(error).__name__}: {error}")

    # -- Registries -----------------------------------------------------------------------------

    def _mappings(
        self, hook_name: str, **arguments: Any
    ) -> list[tuple[Implementation, Mapping[str, Any]]]:
        mappings = []
        for implementation in self.implementations(hook_name):
            mapping = implementation.call(arguments)
            if mapping is None:
                continue
            if not isinstance(mapping, Mapping):
                raise PluginValidationError(
                    f"{hook_name} of plugin {implementation.name!r} ({implementation.source}) "
                    f"returned {type(mapping).__name__}; it must return a mapping from names"
                )
            mappings.append((implementation, mapping))
        return mappings

    def registry(self, hook_name: str, **arguments: Any) -> Mapping[str, Any]:
        """All that the plugins register in a registry hook; values are looked up when asked for.

        Args:
            hook_name: the hook.
            **arguments: the hook's own.

        Raises:
            PluginConflictError: where two plugins register one name, naming both.
        """
        owners: dict[str, Implementation] = {}
        mappings = self._mappings(hook_name, **arguments)
        for implementation, mapping in mappings:
            for key in mapping:
                other = owners.setdefault(key, implementation)
                if other is not implementation:
                    raise _registry_conflict(hook_name, key, [other, implementation])
        # (The values of some mappings cost an import each, so they aren't copied.)
        return MappingProxyType(ChainMap(*(mapping for _, mapping in mappings)))  # type: ignore[arg-type]

    def find(self, hook_name: str, key: str, **arguments: Any) -> Any:
        """What a plugin registers as `key` in a registry hook.

        Args:
            hook_name: the hook.
            key: the name.
            **arguments: the hook's own.

        Raises:
            PluginConflictError: where two plugins do, naming both.
            PluginNotFoundError: where none does, with the nearest name.
        """
        mappings = self._mappings(hook_name, **arguments)
        found = [(owner, mapping) for owner, mapping in mappings if key in mapping]
        if len(found) > 1:
            raise _registry_conflict(hook_name, key, [owner for owner, _ in found])
        if found:
            return found[0][1][key]
        kind = hook_name.removeprefix("register_")
        known = sorted({name for _, mapping in mappings for name in mapping})
        if not known:
            raise PluginNotFoundError(
                f"There is no {key!r} among the {kind}: no enabled plugin registers any "
                f"({hook_name}). Enable one in the plugins of [tool.pa-core]"
            )
        shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if known[12:] else "")
        raise PluginNotFoundError(
            f"There is no {key!r} among the {kind}.{nearest(key, known)} "
            f"The enabled plugins register {shown}"
        )

    # -- State ----------------------------------------------------------------------------------

    def _stateful(self) -> dict[str, _Registration]:
        return {
            registration.name: registration
            for registration in self._registrations
            if self._runs_here(runs_on(registration.plugin))
            and callable(getattr(registration.plugin, "state_dict", None))
            and callable(getattr(registration.plugin, "load_state_dict", None))
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of each plugin that has one on this process, by the plugin's name."""
        return {name: _ask(r, "state_dict") for name, r in self._stateful().items()}

    def load_state_dict(
        self, states: Mapping[str, Any], *, allow_missing: bool = False, allow_extra: bool = False
    ) -> None:
        """Give each plugin its state back, by its name.

        Raises:
            TrainingStateError: for states of plugins that aren't enabled, and for plugins whose
                state is missing, unless allowed; then no plugin has got any.
        """
        stateful = self._stateful()
        problems = []
        if not allow_extra:
            for name in sorted(states.keys() - stateful.keys()):
                hint = nearest(name, stateful.keys() - states.keys())
                problems.append(f"there is a state of {name!r}, which isn't enabled.{hint}")
        if not allow_missing:
            missing = sorted(stateful.keys() - states.keys())
            problems += [f"there is no state of {name!r}" for name in missing]
        if problems:
            raise TrainingStateError(f"The plugins' states don't fit: {'; '.join(problems)}")
        for name, registration in stateful.items():
            if name in states:
                _ask(registration, "load_state_dict", states[name])


# -- Parts of the above ---------------------------------------------------------------------------


def _plain(function: Any) -> object:
    return getattr(function, "__func__", function)


def _ask(registration: _Registration, method: str, *arguments: Any) -> Any:
    try:
        return getattr(registration.plugin, method)(*arguments)
    except Exception as error:
        blame(error, blame_note(method, registration.name, registration.source))
        raise


def _registry_conflict(
    hook_name: str, key: str, owners: list[Implementation]
) -> PluginConflictError:
    claims = " and by ".join(f"the plugin {owner.name!r} ({owner.source})" for owner in owners)
    return PluginConflictError(
        f"{key!r} among the {hook_name.removeprefix('register_')} is registered by {claims}"
    )


def free_name(name: str, taken: Mapping[str, Any]) -> str:
    """`name`, or with a number behind it where it is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}:{number}"
    return free


def build(plugin_class: type) -> object:
    """Build a plugin without arguments.

    Raises:
        PluginLoadError: where it needs some, or its constructor fails.
    """
    try:
        return plugin_class()
    except Exception as error:
        raise PluginLoadError(
            f"The plugin class {plugin_class.__qualname__} can't be built without arguments: "
            f"{type(error).__name__}: {error}. Give an instance instead"
        ) from error
