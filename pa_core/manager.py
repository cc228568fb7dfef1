"""The plugin manager: pluggy, with the order as written, and a name on every mistake.

pluggy calls the last registered plugin first, takes whatever it is given for a plugin, evaluates
its properties on the way, and leaves it half-registered after an error. So the manager looks at a
plugin itself, and shows pluggy a `_Registration`: an object that has nothing but its hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import pluggy

from pa_core import hookspecs
from pa_core.discovery import PluginSource
from pa_core.errors import (
    PluginConflictError,
    PluginLoadError,
    PluginNotFoundError,
    PluginValidationError,
    StopTrainingError,
    nearest,
)

_MARK = f"{hookspecs.PROJECT}_impl"


@dataclass(frozen=True, eq=False)
class Implementation:
    """One plugin's implementation of one hook.

    Attributes:
        hook: the hook's name.
        name: the plugin's name.
        plugin: the plugin.
        function: what is called, with the arguments that it takes.
        source: where the plugin comes from.
        wrapper: whether it surrounds the others.
    """

    hook: str
    name: str
    plugin: object
    function: Callable[..., Any]
    source: PluginSource
    wrapper: bool

    @property
    def code(self) -> CodeType | None:
        """The code of the plugin's own function, if it is written in Python."""
        function = getattr(self.function, "__wrapped_by_adapt__", self.function)
        return getattr(getattr(function, "__func__", function), "__code__", None)

    @property
    def file(self) -> str | None:
        """The file that it is written in."""
        return self.code and self.code.co_filename

    @property
    def line(self) -> int | None:
        """The line that it begins at."""
        return self.code and self.code.co_firstlineno

    def blame(self, error: BaseException) -> None:
        """Note on `error` that it was raised here; once, where hooks are nested."""
        if isinstance(error, StopTrainingError) or hasattr(error, "_pa_core_blamed"):
            return
        try:
            error._pa_core_blamed = True  # type: ignore[attr-defined]
        except AttributeError:
            return
        error.add_note(f"in hook {self.hook} of plugin {self.name!r} ({self.source})")


class _Registration:
    """What pluggy sees of a plugin."""

    def __init__(
        self,
        name: str,
        plugin: object,
        source: PluginSource,
        hooks: dict[str, Implementation],
        options: dict[str, dict[str, Any]],
    ) -> None:
        self.name, self.plugin, self.source = name, plugin, source
        self.implementations, self.options = hooks, options


class _Pluggy(pluggy.PluginManager):
    """pluggy's manager over registrations."""

    def __init__(self) -> None:
        super().__init__(hookspecs.PROJECT)

    def register(self, plugin: _Registration, name: str | None = None) -> str | None:
        for attribute, implementation in plugin.implementations.items():
            setattr(plugin, f"hook_{attribute}", implementation.function)
        return super().register(plugin, name)

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        return plugin.options.get(name.removeprefix("hook_")) if name.startswith("hook_") else None

    def _hookexec(
        self, hook_name: str, methods: Any, kwargs: Mapping[str, object], firstresult: bool
    ) -> Any:
        try:
            return super()._hookexec(hook_name, methods, kwargs, firstresult)
        except Exception as error:
            _blame_by_traceback(error, methods)
            raise


def _blame_by_traceback(error: BaseException, methods: Any) -> None:
    """Find the implementation whose code the exception came through."""
    by_code = {i.code: i for i in map(_implementation_of, methods)}
    traceback = error.__traceback__
    while traceback is not None:
        implementation = by_code.get(traceback.tb_frame.f_code)
        if implementation is not None:
            implementation.blame(error)
            return
        traceback = traceback.tb_next


class PluginManager:
    """The plugins of one trainer, called in the order in which they were registered.

    Args:
        defaults: the host's own implementations, always the last of all.
    """

    def __init__(self, defaults: object | None = None) -> None:
        self._specs: list[Any] = [hookspecs]
        self._registrations: list[_Registration] = []
        self._defaults: _Registration | None = None
        self.version = 0
        self._pluggy = self._assemble([])
        if defaults is not None:
            source = PluginSource("pa_core", "pa_core.defaults:Defaults", "built-in", "pa-core")
            self._defaults = self._examine("pa_core", defaults, source)
            self._pluggy = self._assemble([])

    # -- Registering ----------------------------------------------------------------------------

    def register(
        self, plugin: Any, name: str | None = None, source: PluginSource | None = None
    ) -> str:
        """Register a plugin behind those that are there.

        Args:
            plugin: an instance, a module, or a class that is built without arguments.
            name: its name; by default the built-in's, the module's or the class'.
            source: where it comes from.

        Returns:
            The name it has got.

        Raises:
            PluginLoadError: for a class that can't be built.
            PluginValidationError: for hooks and arguments that don't exist.
            PluginConflictError: where `name` is taken.
        """
        if isinstance(plugin, type):
            plugin = build(plugin)
        source = source or source_of(plugin, name)
        if name is None:
            name = self._free_name(source.name)
        elif name in self.plugins:
            raise PluginConflictError(f"Two plugins are named {name!r}; give one another name")
        if any(registration.plugin is plugin for registration in self._registrations):
            raise PluginConflictError(f"The plugin {name!r} is registered already: {plugin!r}")
        registration = self._examine(name, plugin, source)
        self._change([*self._registrations, registration])
        return name

    def unregister(self, name: str) -> None:
        """Take a plugin out.

        Raises:
            PluginNotFoundError: where there is none of that name.
        """
        if name not in self.plugins:
            raise PluginNotFoundError(f"No plugin is named {name!r}.{nearest(name, self.plugins)}")
        self._change([r for r in self._registrations if r.name != name])

    def add_hookspecs(self, specs: Any) -> None:
        """Add the hooks that a module or object specifies with `hookspec`."""
        self._specs.append(specs)
        try:
            self._change(self._registrations)
        except Exception:
            self._specs.pop()
            raise

    def _change(self, registrations: list[_Registration]) -> None:
        self._pluggy = self._assemble(registrations)
        self._registrations = registrations
        self.version += 1

    def _assemble(self, registrations: list[_Registration]) -> _Pluggy:
        """Make a pluggy manager that calls in this order; pluggy takes the last one first."""
        manager = _Pluggy()
        for specs in self._specs:
            manager.add_hookspecs(specs)
        in_order = [*registrations, *([self._defaults] if self._defaults else [])]
        for registration in reversed(in_order):
            manager.register(registration, registration.name)
        return manager

    def _free_name(self, name: str) -> str:
        taken, number, free = self.plugins, 1, name
        while free in taken:
            number += 1
            free = f"{name}:{number}"
        return free

    def _examine(self, name: str, plugin: object, source: PluginSource) -> _Registration:
        """Find a plugin's hooks and see that each is known and takes known arguments."""
        hooks, options, problems = {}, {}, []
        for attribute, marked in _candidates(plugin):
            opts = marked if marked is not None else {}
            hook = opts.get("specname") or attribute
            caller = getattr(self._pluggy.hook, hook, None)
            if caller is None or not caller.has_spec():
                if not opts.get("optionalhook"):
                    problems.append(
                        f"{attribute} is no hook.{nearest(hook, self._hook_names())}"
                        + (
                            ""
                            if marked is not None
                            else " A helper's name shouldn't begin with on_"
                        )
                    )
                continue
            try:
                function = adapt(getattr(plugin, attribute), caller.spec.argnames)
            except TypeError as error:
                problems.append(f"{attribute} {error}")
                continue
            wrapper = bool(opts.get("wrapper"))
            hooks[attribute] = Implementation(hook, name, plugin, function, source, wrapper)
            options[attribute] = {**opts, "specname": hook}
        if problems:
            raise PluginValidationError(f"The plugin {name!r} ({source}): " + "; ".join(problems))
        return _Registration(name, plugin, source, hooks, options)

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
    def hook(self) -> Any:
        """pluggy's callers, a hook each: ``manager.hook.on_init_end(trainer=trainer)``."""
        return self._pluggy.hook

    def _hook_names(self) -> list[str]:
        return [name for name, caller in vars(self._pluggy.hook).items() if caller.has_spec()]

    def implementations(self, hook_name: str) -> list[Implementation]:
        """Who implements a hook, in the order of the calls; wrappers are set up first."""
        return [
            _implementation_of(impl) for impl in reversed(self._caller(hook_name).get_hookimpls())
        ]

    def _caller(self, hook_name: str) -> Any:
        caller = getattr(self._pluggy.hook, hook_name, None)
        if caller is None:
            raise AttributeError(
                f"There is no hook {hook_name!r}.{nearest(hook_name, self._hook_names())}"
            )
        return caller

    # -- Calling --------------------------------------------------------------------------------

    def bind(self, hook_name: str) -> Callable[..., Any] | None:
        """A fast caller of a hook, for the loop; None where nobody implements it.

        Good until plugins come or go, which `version` tells. A hook with wrappers is left to
        pluggy; the others are called in the same order, without its set-up for every call.
        """
        caller = self._caller(hook_name)
        implementations = self.implementations(hook_name)
        if not implementations:
            return None
        if any(implementation.wrapper for implementation in implementations):
            return caller  # type: ignore[no-any-return]
        calls = [
            (implementation.function, tuple(impl.argnames), implementation)
            for impl, implementation in zip(
                reversed(caller.get_hookimpls()), implementations, strict=True
            )
        ]
        if caller.spec.opts.get("firstresult"):
            return _first_result_caller(calls)
        return _single_caller(*calls[0]) if len(calls) == 1 else _event_caller(calls)

    def call_event(self, name: str, trainer: Any, **arguments: Any) -> None:
        """Call an event by name; one that no hookspec has reaches every plugin with that method."""
        if name in self._hook_names():
            getattr(self.hook, name)(trainer=trainer, **arguments)
            return
        for registration in self._registrations:
            method = getattr(registration.plugin, name, None)
            if callable(method):
                try:
                    method(trainer, **arguments)
                except Exception as error:
                    Implementation(
                        name,
                        registration.name,
                        registration.plugin,
                        method,
                        registration.source,
                        False,
                    ).blame(error)
                    raise

    def _registered(self, hook_name: str) -> Iterator[tuple[Implementation, Mapping[str, Any]]]:
        for implementation in self.implementations(hook_name):
            yield implementation, implementation.function()

    def find(self, hook_name: str, key: str) -> Any:
        """What a plugin registers as `key` in a registry hook.

        Raises:
            PluginConflictError: where two plugins do, naming both.
            PluginNotFoundError: where none does, with the nearest name.
        """
        found = [(who, names[key]) for who, names in self._registered(hook_name) if key in names]
        what = hook_name.removeprefix("register_")
        if len(found) > 1:
            owners = " and ".join(f"{who.name!r} ({who.source})" for who, _ in found)
            raise PluginConflictError(f"{key!r} in {what} is registered by {owners}")
        if found:
            return found[0][1]
        known = [name for _, names in self._registered(hook_name) for name in names]
        raise PluginNotFoundError(
            f"No enabled plugin registers {key!r} in {what}.{nearest(key, known)}"
            + (
                f" Known are {', '.join(sorted(known)[:12])}{' …' if len(known) > 12 else ''}"
                if known
                else " None registers any: enable one in the plugins of [tool.pa-core]"
            )
        )

    def registry(self, hook_name: str) -> dict[str, Any]:
        """All that the plugins register in a registry hook.

        Raises:
            PluginConflictError: where two plugins register one name, naming both.
        """
        merged: dict[str, Any] = {}
        for _, names in self._registered(hook_name):
            for key in names:
                merged[key] = self.find(hook_name, key) if key in merged else names[key]
        return merged

    # -- State ----------------------------------------------------------------------------------

    def _stateful(self) -> dict[str, Any]:
        return {
            name: plugin
            for name, plugin in self.plugins.items()
            if callable(getattr(plugin, "state_dict", None))
            and callable(getattr(plugin, "load_state_dict", None))
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of each plugin that has one, by the plugin's name."""
        return {name: plugin.state_dict() for name, plugin in self._stateful().items()}

    def load_state_dict(
        self, states: Mapping[str, Any], *, allow_missing: bool = False, allow_extra: bool = False
    ) -> None:
        """Give each plugin its state back.

        Raises:
            PluginNotFoundError: for states of plugins that aren't enabled, and for plugins whose
                state is missing, unless allowed; then no plugin has got any.
        """
        stateful = self._stateful()
        extra, missing = sorted(states.keys() - stateful), sorted(stateful.keys() - states.keys())
        if extra and not allow_extra:
            raise PluginNotFoundError(f"States of plugins that aren't enabled: {', '.join(extra)}")
        if missing and not allow_missing:
            raise PluginNotFoundError(f"No state of the plugins {', '.join(missing)}")
        for name, plugin in stateful.items():
            if name in states:
                plugin.load_state_dict(states[name])


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
            f"{error}. Give an instance instead"
        ) from error


def source_of(plugin: Any, name: str | None = None) -> PluginSource:
    """The source of a plugin that was given in code."""
    from pa_core.discovery import builtin_sources

    if isinstance(plugin, ModuleType):
        return PluginSource(name or plugin.__name__.rpartition(".")[2], plugin.__name__, "code")
    kind = type(plugin)
    target = f"{kind.__module__}:{kind.__qualname__}"
    for source in builtin_sources().values():
        if source.target == target:
            return source.named(name) if name else source
    return PluginSource(name or kind.__name__, target, "code")


def adapt(function: Callable[..., Any], spec_arguments: tuple[str, ...]) -> Callable[..., Any]:
    """Let pluggy call `function`, which may take arguments in ways that pluggy doesn't know.

    pluggy gives arguments by position to parameters without a default. Here a parameter with a
    default gets the real value too, ``**kwargs`` gets all the rest, and the first parameter is the
    trainer whatever its name is.

    Raises:
        TypeError: for a parameter without a default that the hook doesn't offer.
    """
    parameters = list(inspect.signature(function).parameters.values())
    simple = all(
        parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.default is parameter.empty
        and parameter.name in spec_arguments
        for parameter in parameters
    )
    if simple:
        return function
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    leading: tuple[str, ...] = ()
    if (
        positional
        and spec_arguments[:1] == ("trainer",)
        and "trainer" not in names
        and positional[0].name not in spec_arguments
    ):
        leading = ("trainer",)
        names.discard(positional[0].name)
    unknown = sorted(
        p.name
        for p in parameters
        if p.name in names and p.name not in spec_arguments and p.default is p.empty
    )
    if unknown:
        raise TypeError(
            f"takes {', '.join(unknown)}, but the hook offers {', '.join(spec_arguments)}."
            + nearest(unknown[0], spec_arguments)
        )
    by_name = tuple(
        name for name in spec_arguments if (takes_rest or name in names) and name not in leading
    )

    # pluggy reads a function's parameters off its code, so it must be given real ones. They are the
    # hookspec's own names; a named tuple's constructor is made in the same way.
    given = [*leading, *(f"{name}={name}" for name in by_name)]
    implementation: Callable[..., Any] = eval(  # noqa: S307
        f"lambda {', '.join((*leading, *by_name))}: function({', '.join(given)})",
        {"function": function},
    )
    implementation.__wrapped_by_adapt__ = function  # type: ignore[attr-defined]
    return implementation


def _candidates(plugin: object) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """The names of a plugin's hooks, each with the options of its mark; None if it has no mark.

    Nothing is evaluated: a property stays a property.
    """
    unmarked_too = getattr(type(plugin), "_is_trainer_callback", False)
    for name in dir(plugin):
        static = inspect.getattr_static(plugin, name, None)
        function = static.__func__ if isinstance(static, staticmethod | classmethod) else static
        if not inspect.isroutine(function):
            continue
        marked = getattr(function, _MARK, None)
        if marked is not None:
            yield name, dict(marked)
        elif unmarked_too and name.startswith("on_"):
            yield name, None


def _implementation_of(impl: Any) -> Implementation:
    found: Implementation = next(
        implementation
        for implementation in impl.plugin.implementations.values()
        if implementation.function is impl.function
    )
    return found


_Call = tuple[Callable[..., Any], tuple[str, ...], Implementation]


def _single_caller(
    function: Callable[..., Any], names: tuple[str, ...], implementation: Implementation
) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        try:
            function(*[arguments[name] for name in names])
        except Exception as error:
            implementation.blame(error)
            raise

    return call


def _event_caller(calls: list[_Call]) -> Callable[..., Any]:
    def call(**arguments: Any) -> None:
        for function, names, implementation in calls:
            try:
                function(*[arguments[name] for name in names])
            except Exception as error:
                implementation.blame(error)
                raise

    return call


def _first_result_caller(calls: list[_Call]) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        for function, names, implementation in calls:
            try:
                result = function(*[arguments[name] for name in names])
            except Exception as error:
                implementation.blame(error)
                raise
            if result is not None:
                return result
        return None

    return call
