"""The plugin manager: registers plugins, and calls their hooks in the order of registration.

Plugins use pluggy's markers, and pluggy runs the wrappers. The manager isn't pluggy's, which calls
the last registered plugin first (but ``trylast`` ones in their order), compares plugins by ``==``,
and may leave a plugin half-registered after an error.
"""

from __future__ import annotations

import functools
import inspect
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from pa_core import hookspecs
from pa_core.errors import (
    PluginConflictError,
    PluginLoadError,
    PluginNotFoundError,
    PluginValidationError,
    TrainingStateError,
    listed,
    nearest,
    shown,
)
from pa_core.plugins.blame import blame_note, blaming
from pa_core.plugins.callers import HookRelay, make_caller
from pa_core.plugins.discovery import PluginSource, code_source, find_claims
from pa_core.plugins.distributions import PLUGINS, REGISTRIES
from pa_core.plugins.implementations import (
    Call,
    Check,
    Hook,
    Implementation,
    implementations_of,
    specifications,
)
from pa_core.plugins.process_scope import main_process_only, runs_on
from pa_core.plugins.relations import in_order, missing


@dataclass(frozen=True, eq=False)
class _Registration:
    name: str
    plugin: object
    source: PluginSource
    implementations: tuple[Implementation, ...]
    is_quiet: bool = False  # no events and no runs, see `PluginManager.without_events`


_NOT_IN_TRIALS = ("run_training", "run_evaluation", "run_prediction", "create_scheduler")
"""Hooks that aren't events, and that `PluginManager.without_events` doesn't call either."""

_Registered = list[tuple[Implementation, Mapping[str, Any]]]
"""What the implementations of a registry hook returned."""


class PluginManager:
    """The plugins of one trainer, called in the order in which they were registered.

    Args:
        defaults: the Trainer's own implementations, which are called last.
        checks: checks of what the implementations of plugins return, by the hook's name.

    Attributes:
        version: increases whenever a plugin or a hook is added or removed; callers that `bind` made
            before are then out of date.
    """

    def __init__(
        self, defaults: object | None = None, checks: Mapping[str, Check] | None = None
    ) -> None:
        self.version = 0
        self._checks = checks or {}
        self._hooks = specifications(hookspecs)
        self._registrations: dict[str, _Registration] = {}
        self._callers: dict[str, Callable[..., Any] | None] = {}
        self._is_main_process = True
        self._instruments: tuple[Callable[[Implementation], Call], ...] = ()
        self._defaults: tuple[Implementation, ...] = ()
        if defaults is not None:
            source = code_source(defaults)
            self._defaults = implementations_of(
                hookspecs.PROJECT, defaults, source, self._hooks, is_default=True
            )

    @functools.cached_property
    def _claims(self) -> dict[str, list[PluginSource]]:
        """The installed plugins; finding them takes a while, and they stay the same."""
        return find_claims()

    # -- Registering ----------------------------------------------------------------------------

    def register(
        self, plugin: Any, name: str | None = None, source: PluginSource | None = None
    ) -> str:
        """Register a plugin after the others. An error leaves the manager as it was.

        Others stay behind it only if they declare that they come after it, in ``after_plugins``.

        Args:
            plugin: an instance, a module, or a class that is built without arguments.
            name: its name; by default that of the built-in, the module or the class, with ``:2``
                added for the second one of that name.
            source: where it comes from.

        Returns:
            The plugin's name.

        Raises:
            PluginLoadError: if the class can't be built.
            PluginValidationError: if the plugin has an unknown hook or argument.
            PluginConflictError: if the name is taken, the plugin is registered already, or plugins
                are to come after each other.
        """
        plugin = build(plugin) if inspect.isclass(plugin) else plugin
        if inspect.isroutine(plugin) or isinstance(plugin, str):
            hint = f". Enable one by its name: plugins=[{plugin!r}]" * isinstance(plugin, str)
            raise PluginValidationError(
                f"{plugin!r} is not a plugin; a plugin is a class, an instance or a module{hint}"
            )
        source = code_source(plugin) if source is None else source
        taken = self._registrations
        for other in taken.values():
            if other.plugin is plugin:
                raise PluginConflictError(f"{plugin!r} is registered already, as {other.name!r}")
        if name is None:
            name = free_name(source.name, taken)
        elif name in taken:
            raise PluginConflictError(
                f"The plugin name {name!r} is taken by the plugin of {taken[name].source}. Give "
                f"the one of {source} another name, such as {free_name(name, taken)!r}"
            )
        hooks = self._hooks_with(plugin)
        implementations = implementations_of(name, plugin, source, hooks, checks=self._checks)
        registration = _Registration(name, plugin, source, implementations)
        self._change(taken | {name: registration}, hooks)
        return name

    def unregister(self, name: str) -> object:
        """Remove a plugin, and return it. Hooks that it specifies stay.

        Raises:
            PluginNotFoundError: if no plugin has that name.
        """
        others = dict(self._registrations)
        if name not in others:
            raise PluginNotFoundError(f"No plugin is named {name!r}.{nearest(name, others)}")
        plugin = others.pop(name).plugin
        self._change(others, self._hooks)
        return plugin

    def check_required(self) -> None:
        """Check that what plugins require is enabled, also after some were added or removed.

        Raises:
            PluginNotFoundError: naming the plugins, and those that are missing.
        """
        plugins = {name: (r.plugin, r.source) for name, r in self._registrations.items()}
        problems = [
            f"the plugin {name!r} ({plugins[name][1]}) requires {other!r}, which isn't enabled"
            for name, other in missing(plugins, lambda: self._claims)
        ]
        if problems:
            raise PluginNotFoundError("; ".join(problems))

    def add_hookspecs(self, specs: Any) -> None:
        """Add the hooks that a module, an object or a class specifies with `hookspec`.

        Those of a plugin are added when it is registered. Other plugins implement them with
        ``@hookimpl(optionalhook=True)``, and may be registered before it.

        Raises:
            PluginConflictError: if there is a hook of that name.
            PluginValidationError: if nothing is specified, or an implementation doesn't fit.
        """
        hooks = self._hooks_with(specs)
        if len(hooks) == len(self._hooks):
            raise PluginValidationError(f"{specs!r} has no function marked with @hookspec")
        self._change(self._registrations, hooks)

    def _hooks_with(self, specs: object) -> dict[str, Hook]:
        added = specifications(specs)
        for name, hook in added.items():
            known = self._hooks.get(name)
            # A plugin may be registered again, or under two names, with the same hooks.
            if known is not None and _unbound(known.function) is not _unbound(hook.function):
                raise PluginConflictError(f"The hook {name!r} of {specs!r} is specified already")
        return self._hooks | added

    def _change(self, registrations: dict[str, _Registration], hooks: dict[str, Hook]) -> None:
        if len(hooks) != len(self._hooks):  # plugins registered before may implement the new ones
            registrations = {
                name: replace(
                    r,
                    implementations=implementations_of(
                        name, r.plugin, r.source, hooks, checks=self._checks
                    ),
                )
                for name, r in registrations.items()
            }
        plugins = {name: (r.plugin, r.source) for name, r in registrations.items()}
        order = in_order(plugins, lambda: self._claims)
        self._registrations = {name: registrations[name] for name in order}
        self._hooks, self._callers = hooks, {}
        self.version += 1

    def set_process(self, *, is_main: bool) -> None:
        """Set whether this is the main process, which alone calls ``runs_on = "main"`` events."""
        self._is_main_process = is_main
        self._change(self._registrations, self._hooks)

    def wrap_calls(self, around: Callable[[Implementation], Call]) -> None:
        """Replace each implementation's call by ``around(implementation)``, to time or watch it."""
        self._instruments = (*self._instruments, around)
        self._change(self._registrations, self._hooks)

    def without_events(self) -> PluginManager:
        """A manager of the same plugins, for trial runs: it calls no events of theirs and no runs.

        What they provide and register is called, except `create_scheduler`: a trial trains at the
        learning rate that its caller sets. Plugins that are registered later have all their hooks.
        """
        quiet = copy(self)
        quiet._instruments = ()
        registrations = {
            name: replace(registration, is_quiet=True)
            for name, registration in self._registrations.items()
        }
        quiet._change(registrations, self._hooks)
        return quiet

    def unwrap_calls(self, around: Callable[[Implementation], Call]) -> None:
        """Undo `wrap_calls`."""
        self._instruments = tuple(other for other in self._instruments if other != around)
        self._change(self._registrations, self._hooks)

    # -- Inspecting -----------------------------------------------------------------------------

    @property
    def by_name(self) -> dict[str, object]:
        """The plugins by name, in the order of the calls, apart from ``tryfirst`` and the like."""
        return {name: registration.plugin for name, registration in self._registrations.items()}

    @property
    def with_events(self) -> dict[str, object]:
        """The plugins whose events are called: none of the trainer's own in a trial run."""
        return {name: r.plugin for name, r in self._registrations.items() if not r.is_quiet}

    @property
    def sources(self) -> dict[str, PluginSource]:
        """Where each plugin comes from, by its name."""
        return {name: registration.source for name, registration in self._registrations.items()}

    @property
    def hooks(self) -> dict[str, Hook]:
        """The hooks by name, in the order of their specification."""
        return dict(self._hooks)

    def implementations(self, hook_name: str) -> list[Implementation]:
        """A hook's implementations on this process in the order of the calls, wrappers first.

        Raises:
            AttributeError: if there is no such hook, with the nearest name.
        """
        if hook_name not in self._hooks:
            raise AttributeError(f"Unknown hook {hook_name!r}.{nearest(hook_name, self._hooks)}")
        in_trials = not hook_name.startswith("on_") and hook_name not in _NOT_IN_TRIALS
        every = [
            one
            for r in self._registrations.values()
            if in_trials or not r.is_quiet
            for one in r.implementations
        ]
        found = [
            one
            for one in (*every, *self._defaults)
            if one.hook == hook_name and self._runs_here(one.runs_on)
        ]
        for around in self._instruments:
            found = [replace(one, call=around(one)) for one in found]
        return sorted(found, key=lambda one: one.rank)

    def _runs_here(self, processes: str) -> bool:
        return self._is_main_process or processes == "all"

    # -- Calling --------------------------------------------------------------------------------

    @property
    def hook(self) -> HookRelay:
        """The hooks as functions: ``manager.hook.on_init_end(trainer=trainer)``."""
        return HookRelay(self)

    def bind(self, hook_name: str) -> Callable[..., Any] | None:
        """The function that calls a hook, until `version` changes; None if no plugin implements it.

        It takes the hook's arguments by name. Like pluggy, it returns a list of all results that
        aren't None; with ``firstresult``, the first of them.

        Raises:
            AttributeError: if there is no such hook, with the nearest name.
        """
        if hook_name not in self._callers:
            implementations = self.implementations(hook_name)
            self._callers[hook_name] = make_caller(self._hooks[hook_name], implementations)
        return self._callers[hook_name]

    def call_event(self, name: str, /, *positional: Any, **arguments: Any) -> None:
        """Call an event by name.

        Args:
            name: a hook; any other name calls each plugin's method of that name, with all the
                arguments.
            *positional: for a hook, the trainer, unless it is given by name.
            **arguments: the other arguments by name.

        Raises:
            TypeError: if an argument of the hook is missing, or given by position.
        """
        if name in self._hooks:
            if len(positional) > 1:
                raise TypeError(
                    f"call_event({name!r}, …) takes the trainer by position and the other "
                    f"arguments by name, not {len(positional)} by position"
                )
            trainer = dict(zip(["trainer"], positional, strict=False))
            getattr(self.hook, name)(**trainer, **arguments)
            return
        for plugin_name, registration in self._registrations.items():
            plugin = registration.plugin
            static = inspect.getattr_static(plugin, name, None)
            if (
                registration.is_quiet
                or static is None
                or isinstance(static, property | functools.cached_property)
            ):
                continue
            method, processes = getattr(plugin, name), runs_on(plugin)
            if callable(method) and self._runs_here(processes):
                if processes == "main":
                    method = main_process_only(method, plugin_name)
                note = blame_note(f"hook {name}", plugin_name, registration.source)
                with blaming(note):
                    method(*positional, **arguments)

    def call_each(self, name: str, cause: BaseException, /, **arguments: Any) -> None:
        """Call an event while `cause` propagates; what the event raises becomes a note on it."""
        for one in self.implementations(name):
            try:
                one.call(arguments)
            except BaseException as error:  # noqa: BLE001 - must not hide the cause
                where = f"{name} of plugin {one.name!r} ({one.source})"
                cause.add_note(f"Then {where} failed too: {type(error).__name__}: {error}")

    def watchers(self) -> dict[str, list[str]]:
        """The names of the plugins that watch a metric, by the metric's name.

        A plugin with the event `on_watched_metric` lists its metrics in ``watched_metrics``. This
        is the same on every process, wherever the events of a plugin are called.
        """
        found: dict[str, list[str]] = {}
        for name, registration in self._registrations.items():
            hooks = {one.hook for one in registration.implementations}
            if registration.is_quiet or "on_watched_metric" not in hooks:
                continue
            names = getattr(registration.plugin, "watched_metrics", ())
            names = (names,) if isinstance(names, str) else names
            if not isinstance(names, Iterable):
                raise PluginValidationError(
                    f"watched_metrics of the plugin {name!r} ({registration.source}) is "
                    f"{shown(names)}; it must be a list of names of metrics"
                )
            for metric in names:
                found.setdefault(metric, []).append(name)
        return found

    # -- Registries -----------------------------------------------------------------------------

    def registry(self, hook_name: str, **arguments: Any) -> Mapping[str, Any]:
        """Everything that plugins register in a registry hook, by name.

        Args:
            hook_name: the hook.
            **arguments: the hook's arguments.

        Raises:
            PluginConflictError: if two plugins register one name, naming both.
        """
        registered = self._registered(hook_name, arguments)
        mappings = [mapping for _, mapping in registered]
        merged: Mapping[str, Any] = ChainMap(*mappings)  # type: ignore[arg-type]
        for key in merged:
            _check_unique(hook_name, key, registered)
        return MappingProxyType(merged)  # a view, as a value may cost an import

    def find(self, hook_name: str, key: str, **arguments: Any) -> Any:
        """Find what a plugin registers as `key` in a registry hook.

        Args:
            hook_name: the hook.
            key: the name.
            **arguments: the hook's arguments.

        Raises:
            PluginConflictError: if two plugins register it, naming both.
            PluginNotFoundError: if no plugin registers it, with the nearest name.
            PluginValidationError: if it must be a function that creates something, and isn't.
        """
        registered = self._registered(hook_name, arguments)
        _check_unique(hook_name, key, registered)
        for one, mapping in registered:
            if key in mapping:
                found = mapping[key]
                if self._hooks[hook_name].registers_functions and not callable(found):
                    raise PluginValidationError(
                        f"{hook_name} of {_owner(one)} registers {key!r} as {shown(found)}; it "
                        "must be a function or a class"
                    )
                return found
        kind = hook_name.removeprefix("register_")
        known = sorted({name for _, mapping in registered for name in mapping})
        if not known:
            plugin = REGISTRIES.get(hook_name)
            such = f", such as {plugin!r} of {PLUGINS[plugin]}" if plugin else ""
            raise PluginNotFoundError(
                f"No {key!r} among the {kind}: no enabled plugin registers any "
                f"({hook_name}). Enable one in the plugins of [tool.pa-core]{such}"
            )
        raise PluginNotFoundError(
            f"No {key!r} among the {kind}.{nearest(key, known)} "
            f"The enabled plugins register {listed(known, most=12)}"
        )

    def owner(self, hook_name: str, key: str, **arguments: Any) -> str:
        """The plugin that registers `key` in a registry hook, for a message."""
        registered = self._registered(hook_name, arguments)
        return next(_owner(one) for one, mapping in registered if key in mapping)

    def _registered(self, hook_name: str, arguments: dict[str, Any]) -> _Registered:
        found = [(one, one.call(arguments)) for one in self.implementations(hook_name)]
        for one, mapping in found:
            if mapping is not None and not isinstance(mapping, Mapping):
                raise PluginValidationError(
                    f"{hook_name} of {_owner(one)} returned {shown(mapping)}; it must return a "
                    "mapping from names"
                )
        return [(one, mapping) for one, mapping in found if mapping is not None]

    # -- State ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state of each plugin that has one on this process, by the plugin's name."""
        return {name: _call(r, "state_dict") for name, r in self._stateful().items()}

    def load_state_dict(
        self, states: Mapping[str, Any], *, allow_missing: bool = False, allow_extra: bool = False
    ) -> None:
        """Restore the plugins' states, by name.

        Raises:
            TrainingStateError: if there is a state of a plugin that isn't enabled, or none of one
                that is, unless that is allowed. Then no plugin's state has been restored.
        """
        stateful = self._stateful()
        problems = []
        if not allow_extra:
            for name in sorted(states.keys() - stateful.keys()):
                hint = nearest(name, stateful.keys() - states.keys())
                problems.append(f"there is a state of {name!r}, which isn't enabled.{hint}")
        if not allow_missing:
            missing = sorted(stateful.keys() - states.keys())
            problems += [f"no state of {name!r}" for name in missing]
        if problems:
            raise TrainingStateError(f"The plugins' states don't fit: {'; '.join(problems)}")
        for name, registration in stateful.items():
            if name in states:
                _call(registration, "load_state_dict", states[name])

    def _stateful(self) -> dict[str, _Registration]:
        return {
            name: registration
            for name, registration in self._registrations.items()
            if self._runs_here(runs_on(registration.plugin))
            and callable(getattr(registration.plugin, "state_dict", None))
            and callable(getattr(registration.plugin, "load_state_dict", None))
        }


def _unbound(function: Any) -> object:
    return getattr(function, "__func__", function)


def _call(registration: _Registration, method: str, *arguments: Any) -> Any:
    with blaming(blame_note(method, registration.name, registration.source)):
        return getattr(registration.plugin, method)(*arguments)


def _owner(implementation: Implementation) -> str:
    return f"the plugin {implementation.name!r} ({implementation.source})"


def _check_unique(hook_name: str, key: str, registered: _Registered) -> None:
    owners = [_owner(one) for one, names in registered if key in names]
    if len(owners) > 1:
        kind = hook_name.removeprefix("register_")
        raise PluginConflictError(
            f"{key!r} among the {kind} is registered by {' and by '.join(owners)}"
        )


def free_name(name: str, taken: Mapping[str, Any]) -> str:
    """`name`, with a number appended if it is taken."""
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}:{number}"
    return free


def build(plugin_class: type) -> object:
    """Build a plugin without arguments.

    Raises:
        PluginLoadError: if the constructor needs arguments or fails.
    """
    try:
        return plugin_class()
    except Exception as error:
        raise PluginLoadError(
            f"The plugin class {plugin_class.__qualname__} can't be built without arguments: "
            f"{type(error).__name__}: {error}. Give an instance instead"
        ) from error
