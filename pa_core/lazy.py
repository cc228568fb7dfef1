"""Import the names of a package on first use, so that importing the package itself is fast."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def import_on_use(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose names are defined elsewhere.

    Args:
        module: its ``__name__``.
        homes: the module of each name.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807 - so that tracebacks call it what it is
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[module], name, value)
        return value

    return __getattr__
