"""What the output of this process goes to: a notebook, a terminal or a file; and printing to it."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from textwrap import fill
from typing import Any


def kernel() -> Any:
    """The kernel that runs the cells of a notebook in this process; None if there is none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None)


def in_notebook() -> bool:
    """Whether this process runs the cells of a notebook, and can show HTML and pictures there."""
    return kernel() is not None


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that is to show a bar, rather than a file or a CI's log."""
    if os.environ.get("NO_COLOR"):
        return False
    if hasattr(stream, "rich_proxied_file"):  # rich shows something live, and takes whole lines
        return False
    if os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return False
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False


def shows_bars() -> bool:
    """Whether bars can be shown: in a notebook, and where the errors go to a terminal."""
    return in_notebook() or is_terminal(sys.stderr)


def folded(text: str) -> str:
    """A line cut between words where standard output is a terminal; as it is elsewhere."""
    if not is_terminal(sys.stdout):
        return text
    width = shutil.get_terminal_size().columns
    return fill(text, width, break_on_hyphens=False, break_long_words=False)


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
