"""Time spent in calls, without the timed calls inside them, so that all times add up."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
WrapperCall = Callable[[dict[str, Any]], Generator[None, Any, Any]]


@dataclass
class Spent:
    """Time spent in the calls of one name.

    Attributes:
        count: number of calls.
        seconds: their total time, without the timed calls inside them.
    """

    count: int = 0
    seconds: float = 0.0


class Stopwatch:
    """Times laps, which may be nested.

    Attributes:
        spent: time by name.
        label: marks a lap in a profiler trace; None while no trace is recorded.

    Example:
        >>> watch = Stopwatch()
        >>> with watch.lap("outer"), watch.lap("inner"):
        ...     pass
        >>> watch.spent["inner"].count
        1
    """

    def __init__(self) -> None:
        self.spent: dict[str, Spent] = {}
        self.label: Callable[[str], AbstractContextManager[Any]] | None = None
        self._within = 0.0  # seconds of the laps inside the current one

    def lap(self, name: str) -> _Lap:
        """Time the ``with`` block."""
        return _Lap(self, name)

    def timed(self, name: str, function: Callable[..., T]) -> Callable[..., T]:
        """Wrap a function so that its calls are timed."""

        def call(*args: Any, **kwargs: Any) -> T:
            with _Lap(self, name):
                return function(*args, **kwargs)

        return call

    def timed_wrapper(self, name: str, call: WrapperCall) -> WrapperCall:
        """Wrap a hook wrapper so that its code before and after the yield is timed."""
        return within_parts(call, lambda: _Lap(self, name), lambda: _Lap(self, name, count=0))


def within_parts(
    call: WrapperCall,
    before: Callable[[], AbstractContextManager[Any]],
    after: Callable[[], AbstractContextManager[Any]],
) -> WrapperCall:
    """Wrap a hook wrapper so that its code runs within contexts, and what it wraps doesn't.

    Args:
        call: calls the hook wrapper with the hook's arguments.
        before: makes the context of the code before the yield.
        after: makes that of the code after it.
    """

    def wrap(arguments: dict[str, Any]) -> Generator[None, Any, Any]:
        wrapper = call(arguments)
        with before():
            next(wrapper)
        resume: Callable[[Any], Any]
        value: Any
        try:
            result = yield
        except BaseException as error:  # noqa: BLE001 - passed on to the wrapper
            resume, value = wrapper.throw, error
        else:
            resume, value = wrapper.send, result
        try:
            with after():
                resume(value)
        except StopIteration as stop:
            return stop.value
        raise AssertionError("a hook wrapper must yield exactly once")

    return wrap


class _Lap:
    """One lap; a class, because a generator costs twice as much."""

    __slots__ = ("_count", "_label", "_name", "_outer", "_start", "_watch")

    def __init__(self, watch: Stopwatch, name: str, count: int = 1) -> None:
        self._watch, self._name, self._count = watch, name, count

    def __enter__(self) -> None:
        watch = self._watch
        self._label = watch.label(self._name) if watch.label is not None else None
        if self._label is not None:
            self._label.__enter__()
        self._outer, watch._within = watch._within, 0.0
        self._start = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        seconds, watch = time.perf_counter() - self._start, self._watch
        spent = watch.spent.get(self._name)
        if spent is None:
            spent = watch.spent[self._name] = Spent()
        spent.count += self._count
        spent.seconds += seconds - watch._within
        watch._within = self._outer + seconds
        if self._label is not None:
            self._label.__exit__(kind, error, traceback)
