"""Hooks and their implementations: what a plugin offers, and how it is called.

A plugin's functions are found without evaluating anything, and may take a hook's arguments as they
like: a subset of them, with defaults, by keyword only, the trainer under any name, ``**kwargs``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partialmethod
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from pa_core.errors import PluginValidationError, StopTrainingError, nearest
from pa_core.plugins.process_scope import RUNS_ON, alone, runs_on

if TYPE_CHECKING:
    from pa_core.plugins.discovery import PluginSource

Call = Callable[[dict[str, Any]], Any]
"""Calls a function with those of a hook's arguments that it takes."""

IMPLEMENTATION_MARK = "pa_core_impl"
SPECIFICATION_MARK = "pa_core_spec"

_FIRST, _NORMAL, _LAST, _DEFAULT = range(4)
_BLAME = re.compile(r"in (hook )?\w+ of plugin ")


@dataclass(frozen=True, eq=False)
class Hook:
    """A hook, as its specification says it.

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


@dataclass(frozen=True, eq=False)
class Implementation:
    """One plugin's implementation of one hook.

    Attributes:
        hook: the hook's name.
        plugin: the plugin.
        name: the plugin's name.
        function: the plugin's own function.
        source: where the plugin comes from.
        wrapper: whether it surrounds the others.
        runs_on: ``"all"`` processes or the ``"main"`` one.
        rank: the lower, the earlier; among equals, the order of registration decides.
        call: calls the function, and notes on an exception whose it is.
    """

    hook: str
    plugin: object
    name: str
    function: Callable[..., Any]
    source: PluginSource
    wrapper: bool
    runs_on: str
    rank: int
    call: Call

    @property
    def order(self) -> str | None:
        """``"tryfirst"`` or ``"trylast"``, where it is marked so; the core's own is neither."""
        rank = self.rank + _DEFAULT * self.wrapper
        return {_FIRST: "tryfirst", _LAST: "trylast"}.get(rank)

    @property
    def file(self) -> str | None:
        """The file that the function is written in."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        return code and code.co_filename

    @property
    def line(self) -> int | None:
        """The line that it begins at."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        return code and code.co_firstlineno


# -- Finding --------------------------------------------------------------------------------------


def is_callback(plugin: object) -> bool:
    """Whether `plugin` is a `TrainerCallback`, or a class of them; told without importing it."""
    kind = plugin if inspect.isclass(plugin) else type(plugin)
    return getattr(kind, "_is_trainer_callback", False) is True


def functions_of(plugin: object) -> Iterator[tuple[str, object]]:
    """The names of a plugin's functions, each with what carries its mark, if it has one.

    Nothing is evaluated: a property stays a property. What the base class of callbacks itself
    defines is left out.
    """
    lineage = inspect.getmro(plugin if inspect.isclass(plugin) else type(plugin))
    for name in dir(plugin):
        if name.startswith("__"):  # what every object has
            continue
        static = inspect.getattr_static(plugin, name, None)
        if inspect.isclass(static) or not (
            callable(static) or isinstance(static, classmethod | partialmethod)
        ):
            continue
        owner = next((kind for kind in lineage if name in vars(kind)), object)
        if "_is_trainer_callback" in vars(owner) and name not in getattr(plugin, "__dict__", {}):
            continue
        has_mark = mark(static) is not None or mark(static, SPECIFICATION_MARK) is not None
        yield name, static if has_mark else getattr(static, "__func__", static)


def hook_names(plugin: object, hooks: Iterable[str]) -> list[str]:
    """The hooks that a plugin implements, in the order of `hooks`; a class isn't built for it."""
    counts_unmarked = is_callback(plugin)
    found = set()
    for name, static in functions_of(plugin):
        options = mark(static)
        if options is not None or (counts_unmarked and name.startswith("on_")):
            found.add((options or {}).get("specname") or name)
    return [name for name in hooks if name in found]


def mark(function: object, name: str = IMPLEMENTATION_MARK) -> dict[str, Any] | None:
    """The options that `hookimpl` or `hookspec` has put on a function."""
    # Statically, as an object that makes its attributes up would claim any.
    options = inspect.getattr_static(function, name, None)
    return options if isinstance(options, dict) else None


def specifications(specs: Any) -> dict[str, Hook]:
    """The hooks that a module, an object or a class specifies.

    Raises:
        PluginValidationError: for arguments that couldn't be given by name, always and to all.
    """
    hooks = {}
    for attribute, static in functions_of(specs):
        options = mark(static, SPECIFICATION_MARK)
        if options is None:
            continue
        function = getattr(specs, attribute)
        parameters = list(inspect.signature(function).parameters.values())
        if inspect.isclass(specs) and not isinstance(
            inspect.getattr_static(specs, attribute), staticmethod | classmethod
        ):
            parameters = parameters[1:]
        wrong = [
            parameter.name
            for parameter in parameters
            if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD
            or parameter.default is not parameter.empty
        ]
        if wrong or options.get("historic"):
            raise PluginValidationError(
                f"The hookspec {attribute!r} can't be added: "
                + (
                    f"{', '.join(wrong)} must be plain, without default and without *"
                    if wrong
                    else "historic hooks keep their arguments alive for ever"
                )
            )
        names = tuple(parameter.name for parameter in parameters)
        hooks[attribute] = Hook(attribute, names, bool(options.get("firstresult")), function)
    # In the order in which they are written, which is that of a run.
    return dict(sorted(hooks.items(), key=lambda item: _first_line(item[1].function)))


def _first_line(function: Callable[..., Any]) -> int:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_firstlineno if code else 0


# -- Examining ------------------------------------------------------------------------------------


def examine(
    name: str,
    plugin: object,
    source: PluginSource,
    hooks: Mapping[str, Hook],
    *,
    is_default: bool = False,
) -> tuple[Implementation, ...]:
    """Find what a plugin implements, and see that each hook and argument exists.

    Args:
        name: the plugin's name.
        plugin: an instance or a module.
        source: where it comes from.
        hooks: all hooks that there are.
        is_default: whether it is the host's own, which comes last and is never blamed.

    Raises:
        PluginValidationError: everything that is wrong with it.
    """
    found: list[Implementation] = []
    problems: list[str] = []
    counts_unmarked = is_callback(plugin)
    is_empty = not counts_unmarked
    if runs_on(plugin) not in RUNS_ON:
        problems.append(f'runs_on must be "all" or "main", not {runs_on(plugin)!r}')
    for attribute, static in functions_of(plugin):
        options = mark(static)
        is_spec = mark(static, SPECIFICATION_MARK) is not None
        is_empty &= options is None and not is_spec and attribute != "state_dict"
        if options is None:
            if counts_unmarked and attribute.startswith("on_"):
                options = {}
            else:
                if attribute in hooks and not is_spec:
                    problems.append(f"{attribute} has a hook's name, but isn't marked @hookimpl")
                continue
        hook_name = options.get("specname") or attribute
        if hook_name not in hooks:
            if not options.get("optionalhook"):
                problems.append(
                    f"there is no hook {hook_name!r}.{nearest(hook_name, hooks)} (A hook that "
                    "another plugin specifies is marked @hookimpl(optionalhook=True))"
                )
            continue
        try:
            found.append(
                _implement(name, plugin, source, hooks[hook_name], attribute, options, is_default)
            )
        except (TypeError, ValueError) as error:
            problems.append(f"{attribute} {error}")
    if is_empty:
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
) -> Implementation:
    function = getattr(plugin, attribute)
    where = blame_note(f"hook {hook.name}", name, source)
    call = adapt(function, hook)
    # What returns a value is called everywhere: all processes need the same answer.
    processes = runs_on(plugin) if hook.name.startswith("on_") else "all"
    rank = _FIRST if options.get("tryfirst") else _LAST if options.get("trylast") else _NORMAL
    if options.get("hookwrapper"):
        raise TypeError("is an old-style hookwrapper; write it as a wrapper=True")
    if options.get("wrapper"):
        if hook.name.startswith("register_"):
            raise TypeError("is a wrapper, but a registry can't be wrapped")
        if not inspect.isgeneratorfunction(inspect.unwrap(function)):
            raise TypeError("is a wrapper, but has no yield")
        rank -= _DEFAULT  # before all that aren't
        call = surrounding(function, call, where)
    elif is_default:
        rank = _DEFAULT
    else:
        call = blamed(alone(call, name) if processes == "main" else call, where)
    wrapper = bool(options.get("wrapper"))
    return Implementation(hook.name, plugin, name, function, source, wrapper, processes, rank, call)


# -- Calling --------------------------------------------------------------------------------------


def adapt(function: Callable[..., Any], hook: Hook) -> Call:
    """Make a call that gives `function` those of the hook's arguments that it takes.

    A parameter with a default gets the real value, ``**kwargs`` gets all the rest, and where the
    hook gives a trainer, the first parameter is the trainer, whatever its name.

    Raises:
        TypeError: for a parameter that the hook has nothing for.
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
    by_position = any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters)
    if offered[:1] == ("trainer",) and "trainer" not in (*positional, *keywords):
        if not positional and any(p.kind is p.VAR_POSITIONAL for p in parameters):
            positional = ["trainer"]
        elif positional and positional[0] not in offered:
            # A mistyped `bacth` is no trainer.
            if not get_close_matches(positional[0], offered[1:], n=1, cutoff=0.7):
                positional[0], by_position = "trainer", True
    unknown = [name for name in (*positional, *keywords) if name not in offered]
    if unknown:
        raise TypeError(
            f"takes {', '.join(unknown)}, which the hook doesn't offer."
            f"{nearest(unknown[0], offered)} It offers {', '.join(offered) or 'no arguments'}"
        )
    if takes_rest:
        if by_position:
            return _call_with_rest(function, positional)
        return lambda arguments: function(**arguments)
    if keywords:
        return _call_with_keywords(function, positional, keywords)
    if not positional:
        return lambda arguments: function()
    if len(positional) == 1:
        name = positional[0]
        return lambda arguments: function(arguments[name])
    pick = itemgetter(*positional)
    return lambda arguments: function(*pick(arguments))


def _call_with_keywords(
    function: Callable[..., Any], positional: list[str], keywords: list[str]
) -> Call:
    def call(arguments: dict[str, Any]) -> Any:
        given = {name: arguments[name] for name in keywords}
        return function(*[arguments[name] for name in positional], **given)

    return call


def _call_with_rest(function: Callable[..., Any], positional: list[str]) -> Call:
    def call(arguments: dict[str, Any]) -> Any:
        rest = dict(arguments)
        return function(*[rest.pop(name) for name in positional], **rest)

    return call


def blamed(call: Call, where: str) -> Call:
    """The same call, with `where` noted on what it raises; free while nothing is raised."""

    def call_or_blame(arguments: dict[str, Any]) -> Any:
        try:
            return call(arguments)
        except StopIteration as stop:
            # To the generators that surround a run it would mean that they are at their end.
            error: Exception = RuntimeError("StopIteration was raised")
            blame(error, where)
            raise error from stop
        except Exception as error:
            blame(error, where)
            raise

    return call_or_blame


def surrounding(function: Callable[..., Any], call: Call, where: str) -> Call:
    """A wrapper's call: a generator, with `where` noted on what the wrapper itself raises.

    What is raised inside and comes through it is not its own. A wrapper that returns nothing
    leaves the result as it is.
    """

    def wrap(arguments: dict[str, Any]) -> Generator[None, Any, Any]:
        wrapper = call(arguments)
        thrown: BaseException | None = None
        result: Any = None
        has_yielded = False
        try:
            next(wrapper)
            has_yielded = True
            try:
                result = yield
            except BaseException as error:  # noqa: BLE001 - the wrapper sees it, and decides
                thrown = error
                wrapper.throw(error)
            else:
                wrapper.send(result)
            wrapper.close()
        except StopIteration as stop:
            if has_yielded:
                return result if stop.value is None else stop.value
        except Exception as error:
            if error is not thrown:
                blame(error, where)
            raise
        mistake = RuntimeError(f"The wrapper {function.__qualname__} must yield exactly once")
        blame(mistake, where)
        raise mistake

    return wrap


def blame(error: BaseException, where: str) -> None:
    """Note on an exception where it was raised; once, however many hooks it comes through."""
    if isinstance(error, StopTrainingError):  # no mistake of anybody's
        return
    if not any(_BLAME.match(note) for note in getattr(error, "__notes__", ())):
        error.add_note(where)


def blame_note(place: str, name: str, source: PluginSource) -> str:
    """What `blame` notes: the place, the plugin, its distribution and version."""
    return f"in {place} of plugin {name!r} ({source})"
