"""Run a script on processes that have already imported torch, which takes most of a short run.

Tests of results use this. Tests of how a run starts and ends launch a new Python, as users do.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
# Creating the first optimizer imports the compiler, which takes as long as everything else.
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "accelerate", "pa_core.trainer", "torchmetrics", "sklearn.datasets"]
)
_SUFFIXES = (".out", ".err")


class Ended(NamedTuple):
    """The exit code of a process (None if it took too long) and its output."""

    returncode: int | None
    stdout: str
    stderr: str


def run_warm(
    script: Path | str,
    *arguments: object,
    processes: int | None = None,
    folder: Path | None = None,
    **environment: str,
) -> str:
    """Run a script, check that it succeeds, and return the output of the first process.

    The arguments are those of `start_warm`.
    """
    ended = start_warm(
        script, *arguments, processes=processes, folder=folder, environment=environment
    )
    codes = [process.returncode for process in ended]
    shown = "\n".join(process.stderr[-6000:] for process in ended)
    assert codes == [0] * len(ended), f"exit codes {codes}\n{shown}"
    return ended[0].stdout


def start_warm(
    script: Path | str,
    *arguments: object,
    processes: int | None = None,
    folder: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    timeout: float = 400,
) -> list[Ended]:
    """Run a script to its end as ``torchrun`` does.

    Args:
        script: the path of the script, or the name of a module.
        *arguments: the arguments of the script.
        processes: the world size, connected by gloo; None for a single process without a group.
        folder: the working directory; by default that of this process.
        environment: additional environment variables.
        timeout: seconds after which all processes are killed.
    """
    argv = [str(script), *map(str, arguments)]
    variables = [{}] if processes is None else _rank_variables(processes)
    with tempfile.TemporaryDirectory() as name:
        logs = [Path(name, str(rank)) for rank in range(len(variables))]
        running = [
            _CONTEXT.Process(
                target=_run,
                args=(argv, folder or Path.cwd(), log, {**os.environ, **environment, **own}),
            )
            for own, log in zip(variables, logs, strict=True)
        ]
        try:
            for process in running:
                process.start()
            _wait(running, timeout)
            codes = [process.exitcode for process in running]
        finally:
            for process in running:
                process.kill()
                process.join()
        outputs = [[_read(log.with_suffix(suffix)) for suffix in _SUFFIXES] for log in logs]
    return [Ended(code, *output) for code, output in zip(codes, outputs, strict=True)]


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _rank_variables(processes: int) -> list[dict[str, str]]:
    """The environment variables by which the processes connect."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _wait(running: list[ForkServerProcess], timeout: float) -> None:
    """Wait until all have ended, or one has failed."""
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in running) and time.monotonic() < deadline:
        if any(process.exitcode for process in running):
            return
        time.sleep(0.02)


def _run(argv: list[str], folder: Path, log: Path, environment: dict[str, str]) -> None:
    """Run the script in this process."""
    for stream, suffix in enumerate(_SUFFIXES, 1):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT, 0o644), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    is_file = argv[0].endswith(".py")
    sys.argv = argv
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(Path(argv[0]).parent) if is_file else str(folder), *filter(None, paths)]
    try:
        if is_file:
            runpy.run_path(argv[0], run_name="__main__")
        else:
            runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # as a normal exit would
        sys.stdout.flush()
        sys.stderr.flush()
