"""Printing lines about a run, which a closed or missing stream must not end."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any


def print_line(*args: Any, **kwargs: Any) -> None:
    """Print as `print` does; without a stream that takes it, do nothing.

    Characters that the stream's encoding doesn't have are printed as ``?``.
    """
    stream = kwargs.get("file") or sys.stdout
    try:
        with _above_bars(stream, kwargs.get("end")):
            print(*args, **kwargs)
    except UnicodeEncodeError as error:
        codec = error.encoding
        shown = [str(arg).encode(codec, "replace").decode(codec) for arg in args]
        with suppress(OSError, ValueError):
            print(*shown, **kwargs)
    except BrokenPipeError:
        _discard_rest(stream)
    except (OSError, ValueError):  # closed, or on a terminal or disk that is gone
        pass


def _above_bars(stream: Any, end: str | None) -> AbstractContextManager[None]:
    """Print above the bars that other code, or `ProgressBarCallback`, shows on a terminal."""
    bars: Any = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    is_whole_line = end is None or end.endswith("\n")
    if is_whole_line and getattr(bars, "_instances", None) and getattr(stream, "isatty", bool)():
        return bars.external_write_mode(file=stream)
    return nullcontext()


def _discard_rest(stream: Any) -> None:
    """Let the rest of a pipe's output go nowhere: at exit, Python flushes the stream again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
