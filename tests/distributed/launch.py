"""Start a script of this folder on one or several processes, and read its outcome."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.warm import run_warm

ROOT = Path(__file__).parents[2]


def torchrun(processes: int) -> tuple[str, ...]:
    """The Python arguments that start this many processes on this machine."""
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))


def environment(**more: str) -> dict[str, str]:
    """The current environment, for processes with one thread each and no GPU."""
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return os.environ | fixed | more


def run(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with `more` in its environment, and check that it succeeds."""
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=folder,
        env=environment(**more),
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done


def read_outcome(folder: Path) -> dict[str, Any]:
    """The content of ``outcome.json`` in `folder`."""
    outcome: dict[str, Any] = json.loads((folder / "outcome.json").read_text())
    return outcome


def outcome_of(folder: Path, script: str | Path, processes: int | None = None) -> dict[str, Any]:
    """Run a script, relative to this folder, and return the content of its ``outcome.json``."""
    folder.mkdir()
    run_warm(Path(__file__).parent / script, folder, processes=processes, folder=folder)
    return read_outcome(folder)


def flat(value: Any) -> list[Any]:
    """The values in nested lists and dicts, as one list."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in flat(item)]
    return [value]
