"""Call a function on several processes that train together, and collect their results."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_POLL_SECONDS = 0.05


def run_on_processes(
    function: Callable[..., Any] | str | Path,
    processes: int = 2,
    *arguments: Any,
    timeout: float = 240.0,
) -> list[Any]:
    """Run a function, or a script, on processes of this machine that train together on the CPU.

    The processes are new ones, with one thread each, connected by gloo. A `Trainer` that is created
    there uses all of them. If one fails, the others are killed at once.

    Args:
        function: a function at the top level of a module, which each process imports, or the path
            of a script.
        processes: the number of processes.
        *arguments: arguments of the function, as plain data and tensors; or the command-line
            arguments of the script.
        timeout: seconds after which all processes are killed.

    Returns:
        What the function returned on each process, by rank, as plain data and tensors; for a
        script, what each process printed.

    Raises:
        RuntimeError: if a process fails, with its output.
        ValueError: if the function can't be imported.
        TimeoutError: if they take longer than `timeout`.
    """
    if torch.distributed.is_initialized():  # e.g. a script without a __main__ guard
        raise RuntimeError("run_on_processes was called on one of several processes")
    with tempfile.TemporaryDirectory(prefix="pa-core-") as name:
        folder = Path(name)
        if isinstance(function, str | Path):
            task: dict[str, Any] = {"script": str(Path(function).resolve())}
        else:
            task = {"function": place_of(function)}
        torch.save(task | {"arguments": list(arguments)}, folder / "task.pt")
        _wait_for_all([_start(rank, processes, folder) for rank in range(processes)], timeout)
        if "script" in task:
            return [_output(folder, rank) for rank in range(processes)]
        return [torch.load(folder / f"result-{r}.pt", weights_only=True) for r in range(processes)]


def place_of(thing: Any) -> tuple[str, str, str]:
    """File, module and qualified name of a function or a class, for `find`.

    Raises:
        ValueError: if it is nested in a function, or not in a file.
    """
    name = thing.__qualname__
    try:
        file = inspect.getsourcefile(inspect.unwrap(thing))
    except TypeError:  # its module has no file
        file = None
    if "<" in name or file is None or not Path(file).is_file():
        raise ValueError(
            f"{name} can't be imported by another process: define it at the top level of a file"
        )
    return str(Path(file).resolve()), thing.__module__, name


# -- Starting and waiting -------------------------------------------------------------------------


class _Process(subprocess.Popen[bytes]):
    """One of the processes, with its rank and the folder of its output."""

    rank: int
    folder: Path


def _start(rank: int, processes: int, folder: Path) -> _Process:
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",  # required by accelerate; the processes use a file to connect
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with (folder / f"out-{rank}.txt").open("wb") as out:
        process = _Process(
            [sys.executable, "-m", "pa_core.testing.processes", str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    process.rank, process.folder = rank, folder
    return process


def _wait_for_all(running: list[_Process], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    try:
        while True:
            codes = [process.poll() for process in running]
            for process, code in zip(running, codes, strict=True):
                if code:
                    raise RuntimeError(f"Process {process.rank} failed:\n{_tail(process)}")
            if None not in codes:
                return
            if time.monotonic() > deadline:
                tails = "\n".join(f"Process {p.rank}:\n{_tail(p)}" for p in running)
                raise TimeoutError(f"The processes took more than {timeout:g} s.\n{tails}")
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()


def _output(folder: Path, rank: int) -> str:
    return (folder / f"out-{rank}.txt").read_text(errors="replace")


def _tail(process: _Process) -> str:
    return _output(process.folder, process.rank)[-6000:]


# -- On each of the processes ---------------------------------------------------------------------


def find(file: str, module: str, name: str) -> Any:
    """The function or class with the file, module and name that `place_of` returned."""
    found: Any = _load(file, module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _load(file: str, name: str) -> ModuleType:
    """Import a file's module: by name if that name resolves to the file, otherwise by path."""
    if name == "__main__":  # the script of the calling process; here it would be this module
        name = Path(file).stem
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).samefile(file):
            return import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _work(folder: Path) -> None:
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    task = torch.load(folder / "task.pt", weights_only=True)
    # A file instead of a port, which another program may take in the meantime.
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=processes)
    if "script" in task:
        sys.argv = [task["script"], *map(str, task["arguments"])]
        sys.path.insert(0, str(Path(task["script"]).parent))
        runpy.run_path(task["script"], run_name="__main__")
    else:
        function = find(*task["function"])
        torch.save(function(*task["arguments"]), folder / f"result-{rank}.pt")
    from pa_core.engine.process_group import close_process_group

    torch.distributed.barrier()
    close_process_group()


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
