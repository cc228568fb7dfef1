"""Notes on exceptions: the plugin, its distribution and version, and the hook they come from."""

from __future__ import annotations

import re
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from pa_core.errors import StopTrainingError

if TYPE_CHECKING:
    from pa_core.plugins.discovery import PluginSource
    from pa_core.plugins.implementations import Call, Check

_BLAME = re.compile(r"in (hook )?\w+ of plugin ")


class BlameNote(str):
    """The note on an exception; `plugin` is the plugin's name."""

    __slots__ = ("plugin",)
    plugin: str


def blame_note(place: str, name: str, source: PluginSource) -> BlameNote:
    """The note on an exception: the place, the plugin, its distribution and version."""
    note = BlameNote(f"in {place} of plugin {name!r} ({source})")
    note.plugin = name
    return note


_CALLERS = (__name__, "pa_core.plugins.manager")
_LOOP = "pa_core.trainer"


def running_plugin() -> str | None:
    """The name of the plugin whose hook is running, the innermost.

    It is None in other code that the loop calls, such as a method of the Trainer, and empty in code
    that the loop doesn't call. It is found on the stack, where each call of a hook holds the note
    for its exceptions, so that calling hooks costs nothing more. The loop, which a plugin may run,
    isn't part of that plugin.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__")
        if module in _CALLERS:
            note = frame.f_locals.get("note")
            if isinstance(note, BlameNote):
                return note.plugin
        elif module == _LOOP:
            return None
        frame = frame.f_back
    return ""


def blame(error: BaseException, note: str) -> None:
    """Add a note to an exception, unless a hook further inside has added one."""
    if isinstance(error, StopTrainingError):  # a request, not a mistake
        return
    if not any(_BLAME.match(other) for other in getattr(error, "__notes__", ())):
        error.add_note(str(note))


@contextmanager
def blaming(note: str) -> Iterator[None]:
    """Add `note` to an exception that is raised inside."""
    try:
        yield
    except Exception as error:
        blame(error, note)
        raise


def blamed(call: Call, note: str, verify: Check, *, verify_none: bool = False) -> Call:
    """The same call, which adds `note` to its exceptions; free unless one is raised.

    Args:
        call: the call.
        note: names the plugin and the hook.
        verify: raises an exception for a wrong result.
        verify_none: whether to verify None, too.
    """

    def call_or_blame(arguments: dict[str, Any]) -> Any:
        try:
            result = call(arguments)
            if result is not None or verify_none:
                verify(result, arguments)
            return result
        except StopIteration as stop:
            # Raised through a wrapper, which is a generator, it would look like its return.
            error: Exception = RuntimeError("StopIteration was raised")
            blame(error, note)
            raise error from stop
        except Exception as error:
            blame(error, note)
            raise

    return call_or_blame


def blamed_wrapper(call: Call, qualified_name: str, note: str, check: Check | None = None) -> Call:
    """The same wrapper, which adds `note` to exceptions that it raises, not to those it passes on.

    A wrapper that returns None leaves the result as it is; pluggy would replace it with None. Any
    other result is checked, and so is one that was right before and that it may have changed.
    """

    def is_right(result: Any, arguments: dict[str, Any]) -> bool:
        if check is None or result is None:
            return False
        try:
            check(result, arguments)
        except Exception:  # noqa: BLE001 - raised where it is used
            return False
        return True

    def wrap(arguments: dict[str, Any]) -> Generator[None, Any, Any]:
        wrapper = call(arguments)
        inner: BaseException | None = None
        result: Any = None
        has_yielded = was_right = False
        try:
            next(wrapper)
            has_yielded = True
            try:
                result = yield
            except BaseException as error:  # noqa: BLE001 - passed on to the wrapper
                inner = error
                wrapper.throw(error)
            else:
                was_right = is_right(result, arguments)
                wrapper.send(result)
            wrapper.close()
        except StopIteration as stop:
            if has_yielded:
                returned = result if stop.value is None else stop.value
                if check is not None and (was_right or returned is not result):
                    with blaming(note):
                        check(returned, arguments)
                return returned
        except Exception as error:
            if error is not inner:
                blame(error, note)
            raise
        # pluggy's message would name this function instead of the plugin's.
        mistake = RuntimeError(f"The wrapper {qualified_name} must yield exactly once")
        blame(mistake, note)
        raise mistake

    return wrap
