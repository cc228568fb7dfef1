"""What a plugin implements: its functions, matched with the hooks and checked.

pluggy's own search isn't used. It evaluates a plugin's properties (before pluggy 1.7), ignores
unmarked methods of callbacks, and passes nothing to ``**kwargs`` and keyword-only parameters.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partialmethod
from operator import itemgetter
from types import AsyncGeneratorType, CodeType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any

from pa_core.errors import PluginValidationError, nearest
from pa_core.hookspecs import PROJECT
from pa_core.plugins.blame import blame_note, blamed, blamed_wrapper
from pa_core.plugins.process_scope import RUNS_ON, main_process_only, runs_on
from pa_core.plugins.relations import wrong_relations

if TYPE_CHECKING:
    from pa_core.plugins.discovery import PluginSource

Call = Callable[[dict[str, Any]], Any]
"""Calls a function with those of a hook's arguments that it takes."""

Check = Callable[[Any, Mapping[str, Any]], None]
"""Raises an error if what an implementation returned is wrong; takes the hook's arguments too."""

_IMPLEMENTATION, _SPECIFICATION = f"{PROJECT}_impl", f"{PROJECT}_spec"
"""The attributes in which pluggy's markers keep their options."""

_ORDER = {"tryfirst": 0, None: 1, "trylast": 2}

_NO_CHECKS: Mapping[str, Check] = {}


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook, as its specification defines it.

    Attributes:
        name: the hook's name.
        arguments: the names of its arguments.
        firstresult: whether the first result that isn't None ends the call.
        function: the specification itself, whose docstring is the manual.
    """

    name: str
    arguments: tuple[str, ...]
    firstresult: bool
    function: Callable[..., Any]

    @property
    def must_return(self) -> bool:
        """Whether an implementation must return a value, so that the next one isn't called too."""
        return self.firstresult and not any(word in self._returns for word in ("None", "Any"))

    @property
    def registers_functions(self) -> bool:
        """Whether what an implementation registers by name is called."""
        return "Callable" in self._returns

    @property
    def _returns(self) -> str:
        return str(getattr(self.function, "__annotations__", {}).get("return", None))


@dataclass(frozen=True, eq=False)
class Implementation:
    """One plugin's implementation of one hook.

    Attributes:
        hook: the hook's name.
        plugin: the plugin.
        name: the plugin's name.
        function: the plugin's own function.
        source: where the plugin comes from.
        wrapper: whether it wraps the others.
        order: ``"tryfirst"``, ``"trylast"`` or None.
        runs_on: ``"all"`` processes or the ``"main"`` one.
        is_default: whether it is the Trainer's own, which is called last.
        call: calls the function with the hook's arguments, given as a dict. Its exceptions have a
            note that names the plugin.
    """

    hook: str
    plugin: object
    name: str
    function: Callable[..., Any]
    source: PluginSource
    wrapper: bool
    order: str | None
    runs_on: str
    is_default: bool
    call: Call

    @property
    def rank(self) -> tuple[bool, bool, int]:
        """Sorts the implementations of a hook; equals stay in the order of registration."""
        return not self.wrapper, self.is_default, _ORDER[self.order]

    @property
    def file(self) -> str | None:
        """The file that defines the function."""
        code = code_of(self.function)
        return code and code.co_filename

    @property
    def line(self) -> int | None:
        """The function's first line."""
        code = code_of(self.function)
        return code and code.co_firstlineno


# -- Searching a plugin ---------------------------------------------------------------------------


def is_callback(plugin: object) -> bool:
    """Whether `plugin` is a `TrainerCallback` or a subclass, without importing that class."""
    kind = plugin if inspect.isclass(plugin) else type(plugin)
    return getattr(kind, "_is_trainer_callback", False) is True


def functions_of(plugin: object) -> Iterator[tuple[str, object]]:
    """The names of a plugin's functions, each with the static attribute; evaluates no property.

    What `TrainerCallback` itself defines is left out.
    """
    lineage = inspect.getmro(plugin if inspect.isclass(plugin) else type(plugin))
    for name in dir(plugin):
        if name.startswith("__"):
            continue
        static = inspect.getattr_static(plugin, name, None)
        if inspect.isclass(static) or not (
            callable(static) or isinstance(static, classmethod | partialmethod)
        ):
            continue
        owner = next((kind for kind in lineage if name in vars(kind)), object)
        if "_is_trainer_callback" in vars(owner) and name not in getattr(plugin, "__dict__", {}):
            continue
        yield name, static


def declared(plugin: object) -> dict[str, dict[str, Any]]:
    """The functions that a plugin declares as implementations, with the options of the marker.

    These are the functions marked with `hookimpl`, and all ``on_…`` methods of a callback.
    """
    found = {name: _options(static, _IMPLEMENTATION) for name, static in functions_of(plugin)}
    counts_unmarked = is_callback(plugin)
    return {
        name: options or {}
        for name, options in found.items()
        if options is not None or (counts_unmarked and name.startswith("on_"))
    }


def hook_names(plugin: object, hooks: Iterable[str]) -> list[str]:
    """The hooks that a plugin implements, in the order of `hooks`; a class isn't instantiated."""
    found = {options.get("specname") or name for name, options in declared(plugin).items()}
    return [name for name in hooks if name in found]


def _options(function: object, marker: str) -> dict[str, Any] | None:
    """The options that a marker has put on a function, or on the one in a bound or static method.

    They are read statically, as an object with `__getattr__` may have any attribute.
    """
    for holder in (function, getattr(function, "__func__", None)):
        options = inspect.getattr_static(holder, marker, None)
        if isinstance(options, dict):
            return options
    return None


def code_of(function: Any) -> CodeType | None:
    """The code of a function, or of the one that it wraps."""
    return getattr(inspect.unwrap(function), "__code__", None)


# -- Specifications -------------------------------------------------------------------------------


def specifications(specs: Any) -> dict[str, Hook]:
    """The hooks that a module, an object or a class specifies with `hookspec`.

    Raises:
        PluginValidationError: for a historic hook, or arguments other than plain ones.
    """
    hooks = {}
    for name, static in functions_of(specs):
        options = _options(static, _SPECIFICATION)
        if options is None:
            continue
        function = getattr(specs, name)
        parameters = list(inspect.signature(function).parameters.values())
        if inspect.isclass(specs) and not isinstance(static, staticmethod | classmethod):
            parameters = parameters[1:]
        if options.get("historic"):
            raise PluginValidationError(
                f"The hookspec {name!r} can't be added: historic hooks keep their arguments alive"
            )
        # pluggy would accept these, and not pass them to all implementations.
        wrong = [
            parameter.name
            for parameter in parameters
            if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD
            or parameter.default is not parameter.empty
        ]
        if wrong:
            raise PluginValidationError(
                f"The hookspec {name!r} can't be added: {', '.join(wrong)} must be plain, without "
                "a default and without *"
            )
        arguments = tuple(parameter.name for parameter in parameters)
        hooks[name] = Hook(name, arguments, bool(options.get("firstresult")), function)

    def line(hook: Hook) -> int:
        code = code_of(hook.function)
        return code.co_firstlineno if code else 0

    # In the order of the file, which is that of a run; `dir` sorts by name.
    return {hook.name: hook for hook in sorted(hooks.values(), key=line)}


# -- Implementations ------------------------------------------------------------------------------


def implementations_of(
    name: str,
    plugin: object,
    source: PluginSource,
    hooks: Mapping[str, Hook],
    *,
    checks: Mapping[str, Check] = _NO_CHECKS,
    is_default: bool = False,
) -> tuple[Implementation, ...]:
    """Find what a plugin implements, and check its hooks, arguments and options.

    Args:
        name: the plugin's name.
        plugin: an instance or a module.
        source: where it comes from.
        hooks: all hooks by name.
        checks: checks of what the implementations return, by the hook's name.
        is_default: whether it is the Trainer's own, which is called last and gets no notes.

    Raises:
        PluginValidationError: with all problems of the plugin.
    """
    found: list[Implementation] = []
    problems: list[str] = []
    if runs_on(plugin) not in RUNS_ON:
        problems.append(f'runs_on must be "all" or "main", not {runs_on(plugin)!r}')
    problems += wrong_relations(plugin)
    functions, marked = dict(functions_of(plugin)), declared(plugin)
    specified = {name for name in functions if _options(functions[name], _SPECIFICATION)}
    problems += [
        f"{attribute} has a hook's name, but isn't marked @hookimpl"
        for attribute in functions
        if attribute in hooks and attribute not in (*marked, *specified)
    ]
    for attribute, options in marked.items():
        hook_name = options.get("specname") or attribute
        if hook_name in hooks:
            try:
                found.append(
                    _implement(
                        name,
                        plugin,
                        source,
                        hooks[hook_name],
                        attribute,
                        options,
                        is_default,
                        None if is_default else checks.get(hook_name),
                    )
                )
            except (TypeError, ValueError) as error:
                problems.append(f"{attribute} {error}")
        elif not options.get("optionalhook"):
            problems.append(
                f"unknown hook {hook_name!r}.{nearest(hook_name, hooks)} (Mark an "
                "implementation of another plugin's hook @hookimpl(optionalhook=True))"
            )
    if ("state_dict" in functions) != ("load_state_dict" in functions):
        problems.append("its state needs both state_dict and load_state_dict")
    if not (is_callback(plugin) or marked or specified or "state_dict" in functions):
        problems.append("it has no function marked with @hookimpl")
    if problems:
        raise PluginValidationError(f"The plugin {name!r} ({source}): {'; '.join(problems)}")
    return tuple(found)


def _implement(
    name: str,
    plugin: object,
    source: PluginSource,
    hook: Hook,
    attribute: str,
    options: Mapping[str, Any],
    is_default: bool,
    check: Check | None,
) -> Implementation:
    """Check one function and make its call; a TypeError states what is wrong with it."""
    function = getattr(plugin, attribute)
    wrapper = bool(options.get("wrapper"))
    _check_kind(function, hook, options)
    call = adapt(function, hook)
    if hook.must_return and not (wrapper or is_default):
        call = _refusing_none(call, hook)
    note = blame_note(f"hook {hook.name}", name, source)
    # A hook that returns a value is called on every process, since each needs the value.
    processes = runs_on(plugin) if hook.name.startswith("on_") else "all"
    if wrapper:
        call = blamed_wrapper(call, getattr(function, "__qualname__", attribute), note, check)
    elif not is_default:
        call = main_process_only(call, name) if processes == "main" else call
        # An event returns nothing: what is checked is what it has left in its arguments.
        verify_none = check is not None and hook.name.startswith("on_")
        call = blamed(call, note, _verification(hook, check), verify_none=verify_none)
    marks = [mark for mark in ("tryfirst", "trylast") if options.get(mark)]
    order = marks[0] if marks and not is_default else None
    _warn_of_deprecated(hook, function)
    return Implementation(
        hook.name, plugin, name, function, source, wrapper, order, processes, is_default, call
    )


def _refusing_none(call: Call, hook: Hook) -> Call:
    def call_and_check(arguments: dict[str, Any]) -> Any:
        result = call(arguments)
        if result is None:
            returns = hook.function.__annotations__["return"]
            raise TypeError(
                f"{hook.name} returned None; it must return {returns}. To add to the others "
                "instead of replacing them, mark it @hookimpl(wrapper=True)"
            )
        return result

    return call_and_check


def _verification(hook: Hook, check: Check | None) -> Check:
    """Checks a result that isn't None: that it is finished, and then with `check`.

    What returns a coroutine may not look like a coroutine function, if it is decorated.
    """
    unfinished: tuple[type, ...] = (CoroutineType, AsyncGeneratorType)
    if not hook.name.startswith(("create_", "calculate_", "register_")):
        unfinished = (*unfinished, GeneratorType)

    def verify(result: Any, arguments: Mapping[str, Any]) -> None:
        if isinstance(result, unfinished):
            kind = "generator" if isinstance(result, GeneratorType) else "coroutine"
            if isinstance(result, CoroutineType):
                result.close()  # it would warn that it was never awaited
            raise TypeError(
                f"{hook.name} returned a {kind}, of which nothing has run: the loop doesn't await "
                "hooks or iterate over them, so use a plain def"
            )
        if check is not None:
            check(result, arguments)

    return verify


def _check_kind(function: Callable[..., Any], hook: Hook, options: Mapping[str, Any]) -> None:
    if options.get("hookwrapper"):
        raise TypeError("is an old-style hookwrapper; write it as a wrapper=True")
    if _is(inspect.iscoroutinefunction, function) or _is(inspect.isasyncgenfunction, function):
        raise TypeError("is async; the loop calls hooks without awaiting them, so use a plain def")
    # Unwrapped, as most decorators pass a generator on without running it.
    has_yield = _is(inspect.isgeneratorfunction, inspect.unwrap(function))
    if not options.get("wrapper"):
        if has_yield:
            raise TypeError(
                "has a yield, so calling it would run none of it. Mark a wrapper "
                "@hookimpl(wrapper=True), or return the value"
            )
    elif hook.name.startswith("register_"):
        raise TypeError("is a wrapper, but a registry can't be wrapped")
    elif not has_yield:
        raise TypeError("is a wrapper, but has no yield")


def _is(kind: Callable[[object], bool], function: Callable[..., Any]) -> bool:
    """Whether a function is of a kind, or the ``__call__`` of an object."""
    return kind(function) or kind(type(function).__call__)


def _warn_of_deprecated(hook: Hook, function: Callable[..., Any]) -> None:
    """Emit the warning of ``hookspec(warn_on_impl=…)``, with the place of the implementation."""
    warning = (_options(hook.function, _SPECIFICATION) or {}).get("warn_on_impl")
    code = code_of(function)
    if warning is not None and code is not None:
        warnings.warn_explicit(warning, type(warning), code.co_filename, code.co_firstlineno)


def adapt(function: Callable[..., Any], hook: Hook) -> Call:
    """Make a call that gives `function` those of the hook's arguments that it takes.

    A parameter with a default gets the hook's value, and ``**kwargs`` all that is left. If the hook
    has a trainer, the function's first parameter is the trainer, whatever its name.

    Raises:
        TypeError: for a parameter that isn't one of the hook's arguments.
    """
    offered = hook.arguments
    parameters = list(inspect.signature(function).parameters.values())
    positional = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    takes_rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes_args = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    by_position = takes_args or any(p.kind is p.POSITIONAL_ONLY for p in parameters)
    if offered[:1] == ("trainer",) and "trainer" not in (*positional, *keywords):
        if not positional and takes_args:
            positional = ["trainer"]
        elif positional and positional[0] not in offered:
            # A first parameter `bacth` is a mistyped batch, not a trainer.
            if not get_close_matches(positional[0], offered[1:], n=1, cutoff=0.7):
                positional[0], by_position = "trainer", True
    unknown = [name for name in (*positional, *keywords) if name not in offered]
    if unknown:
        raise TypeError(
            f"takes {', '.join(unknown)}, which the hook doesn't offer."
            f"{nearest(unknown[0], offered)} It offers {', '.join(offered) or 'no arguments'}"
        )

    def call_with_rest(arguments: dict[str, Any]) -> Any:
        rest = dict(arguments)
        return function(*[rest.pop(name) for name in positional], **rest)

    def call_with_keywords(arguments: dict[str, Any]) -> Any:
        given = {name: arguments[name] for name in keywords}
        return function(*[arguments[name] for name in positional], **given)

    if takes_rest:
        return call_with_rest if by_position else lambda arguments: function(**arguments)
    if keywords:
        return call_with_keywords
    if not positional:
        return lambda arguments: function()
    if len(positional) == 1:
        name = positional[0]
        return lambda arguments: function(arguments[name])
    pick = itemgetter(*positional)
    return lambda arguments: function(*pick(arguments))
