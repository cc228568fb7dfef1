"""Run a script on processes that have imported torch already, which takes most of a short run.

For tests of what comes out. Those of the start itself, and of its end, are started cold, as a user
starts them.
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
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
# An optimizer's first instance imports the compiler, which takes as long as all the rest.
_CONTEXT.set_forkserver_preload(["torch._dynamo", "accelerate", "pa_core.trainer"])


def run_warm(
    script: Path,
    *arguments: object,
    processes: int | None = None,
    folder: Path | None = None,
    timeout: float = 240,
    **environment: str,
) -> str:
    """Run a script to its end as ``torchrun`` does, and see that it succeeds.

    Args:
        script: its path.
        *arguments: those of the script.
        processes: how many run together, connected by gloo; one that knows of no others if None.
        folder: the working directory, if not this process's own.
        timeout: seconds after which all are killed.
        **environment: more variables.

    Returns:
        What the first process has printed; not what it has written to stderr.
    """
    argv = [str(script), *map(str, arguments)]
    places = [{}] if processes is None else _places(processes)
    with tempfile.TemporaryDirectory() as name:
        logs = [Path(name, str(rank)) for rank in range(len(places))]
        running = [
            _CONTEXT.Process(target=_run, args=(argv, folder, log, environment | place))
            for place, log in zip(places, logs, strict=True)
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
        errors = [_read(log.with_suffix(".err"))[-6000:] for log in logs]
        printed = _read(logs[0].with_suffix(".out"))
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(errors)
    return printed


def _read(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def _places(processes: int) -> list[dict[str, str]]:
    """The variables of each process, by which they find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _wait(running: list[ForkServerProcess], timeout: float) -> None:
    """Until all have ended, or one has failed."""
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in running) and time.monotonic() < deadline:
        if any(process.exitcode for process in running):
            return
        time.sleep(0.02)


def _run(arguments: list[str], folder: Path | None, log: Path, variables: dict[str, str]) -> None:
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT, 0o644), stream)
    os.environ.update(variables)
    torch.set_num_threads(1)
    if folder is not None:
        os.chdir(folder)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # as at the end of any other process
        sys.stdout.flush()
        sys.stderr.flush()
