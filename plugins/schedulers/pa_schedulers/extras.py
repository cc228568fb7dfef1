"""Import of the optional libraries, which the extras of pa-schedulers install."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def import_library(module: str, needed_by: str) -> Any:
    """Import a module of an optional library.

    Raises:
        ImportError: if it isn't installed, with the pip command that installs it.
    """
    library = module.partition(".")[0]
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        extra = "plot" if library == "matplotlib" else library
        raise ImportError(
            f"{needed_by} needs {library}, which isn't installed: "
            f"pip install 'pa-schedulers[{extra}]'"
        ) from error
