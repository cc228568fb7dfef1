"""A plugin that records which hooks are called, in which order and with which arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from pa_core import hookspecs
from pa_core.errors import nearest
from pa_core.plugins.implementations import specifications


@dataclass(frozen=True, eq=False)
class HookCall:
    """A call of a hook. Its arguments are also attributes: ``call.step``.

    Attributes:
        name: the hook's name.
        arguments: the arguments by name. Dicts are copied, with their content at the time.
    """

    name: str
    arguments: dict[str, Any] = field(repr=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self.arguments:
            raise AttributeError(f"{self.name} has no argument {name!r}")
        return self.arguments[name]


class HookRecorder:
    """A plugin that records every call of every hook, before any other plugin is called.

    It changes nothing: it returns None, or wraps a hook that must return a value. Tensors are not
    copied.

    Args:
        *specs: modules or classes with further hookspecs, for plugins that add hooks.

    Attributes:
        calls: the calls, in order.

    >>> from pa_core.testing import run_tiny
    >>> recorder = HookRecorder()
    >>> trainer = run_tiny(recorder, epochs=1)  # doctest: +ELLIPSIS
    Plugins: HookRecorder
    >>> recorder.count("on_optimizer_step_end")
    6
    >>> [call.step for call in recorder.of("on_eval_step_end")]
    [0, 1, 2, 3]
    >>> recorder.assert_order("on_train_epoch_end", "on_eval_epoch_start")
    """

    def __init__(self, *specs: Any) -> None:
        self.calls: list[HookCall] = []
        self._known: list[str] = []
        for spec in (hookspecs, *specs):
            for name, hook in specifications(spec).items():
                self._known.append(name)
                record = self._record_around(name) if hook.must_return else self._record(name)
                mark = hookspecs.hookimpl(
                    tryfirst=True, optionalhook=True, wrapper=hook.must_return
                )
                setattr(self, name, mark(record))

    def _record(self, name: str) -> Callable[..., None]:
        def record(**arguments: Any) -> None:
            now = {key: dict(v) if isinstance(v, dict) else v for key, v in arguments.items()}
            self.calls.append(HookCall(name, now))

        return record

    def _record_around(self, name: str) -> Callable[..., Generator[None, Any, Any]]:
        record = self._record(name)

        def wrapper(**arguments: Any) -> Generator[None, Any, Any]:
            record(**arguments)
            return (yield)

        return wrapper

    @property
    def names(self) -> list[str]:
        """The names of the hooks that were called, in the order of the calls."""
        return [call.name for call in self.calls]

    def of(self, name: str) -> list[HookCall]:
        """The calls of one hook.

        Raises:
            AttributeError: if there is no such hook; it suggests the closest name.
        """
        if name not in self._known:
            raise AttributeError(f"Unknown hook {name!r}.{nearest(name, self._known)}")
        return [call for call in self.calls if call.name == name]

    def count(self, name: str) -> int:
        """The number of calls of one hook."""
        return len(self.of(name))

    def clear(self) -> None:
        """Forget all calls."""
        self.calls.clear()

    def assert_called(self, name: str, times: int | None = None, **arguments: Any) -> None:
        """Fail unless a hook was called.

        Args:
            name: the hook.
            times: the number of calls; None for at least one.
            **arguments: count only the calls with these arguments.
        """
        calls = self.of(name)
        found = [c for c in calls if all(getattr(c, key) == v for key, v in arguments.items())]
        wanted = "at least once" if times is None else f"{times} times"
        with_these = f" with {arguments}" if arguments else ""
        assert found if times is None else len(found) == times, (
            f"{name} was called {len(found)} times{with_these}, not {wanted}; "
            f"{len(calls)} times in total. {self._summary()}"
        )

    def assert_order(self, *names: str) -> None:
        """Fail unless hooks were called in this order; other hooks may come between them."""
        rest = iter(self.names)
        for number, name in enumerate(names):
            self.of(name)  # raises for an unknown name
            assert name in rest, (
                f"{name} wasn't called after {' and '.join(names[:number]) or 'the start'}. "
                f"{self._summary()}"
            )

    def _summary(self) -> str:
        """The number of calls of each hook, in the order of the first calls."""
        counts = Counter(self.names).items()
        shown = [name if count == 1 else f"{name} × {count}" for name, count in counts]
        return f"Calls: {', '.join(shown) or 'none'}"
