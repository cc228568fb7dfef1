"""Start `script.py` on some processes, wait for it with a time limit, and leave no process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.launch import ROOT, environment, torchrun
from tests.warm import run_warm

SCRIPT = Path(__file__).with_name("script.py")


@dataclass
class Ended:
    """How a launch has ended.

    Attributes:
        code: the launcher's exit code.
        text: everything that it and its processes have printed.
        seconds: from the fault to the end; None if there was none.
        outcomes: what each process has written, by rank; a killed one writes nothing.
    """

    code: int
    text: str
    seconds: float | None
    outcomes: dict[int, dict[str, Any]]


def launch(
    folder: Path, processes: int, *arguments: str, limit: float = 240, **options: Any
) -> Ended:
    """Run the script in `folder` with `options` until it ends.

    Args:
        folder: for states and outcomes.
        processes: how many; a single one is started without a launcher.
        arguments: further arguments of the launcher.
        limit: seconds after which everything is killed and the test fails.
        options: of the script.
    """
    folder.mkdir(exist_ok=True)
    launcher = (*torchrun(processes), *arguments) if processes > 1 else ()
    mark = f"pa_core_test_{os.getpid()}_{time.monotonic_ns()}"
    process = subprocess.Popen(
        [sys.executable, *launcher, str(SCRIPT), str(folder), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        # Restarted processes must not find the addresses of earlier ones.
        env=environment(PA_CORE_TEST_MARK=mark, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit)
        ended = time.time()
    finally:
        left = survivors(mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.wait(10)
    assert not left, f"{len(left)} processes have outlived their launcher:\n{text}"
    fired = folder / f"fired-{options['fault']['kind']}" if "fault" in options else None
    outcomes = {}
    for rank in range(processes):
        file = folder / f"{options['name']}-{rank}.json"
        if file.exists():
            outcomes[rank] = json.loads(file.read_text())
    return Ended(
        process.returncode,
        text,
        ended - fired.stat().st_mtime if fired and fired.exists() else None,
        outcomes,
    )


def finish(folder: Path, processes: int, **options: Any) -> tuple[str, dict[str, Any]]:
    """Run the script in `folder`, with no fault, to its end.

    Returns:
        What the first process has printed, and what it has written.
    """
    folder.mkdir(exist_ok=True)
    together = processes if processes > 1 else None
    text = run_warm(SCRIPT, folder, json.dumps(options), processes=together)
    return text, json.loads((folder / f"{options['name']}-0.json").read_text())


def survivors(mark: str) -> list[int]:
    """The processes that still have the launch's mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # another user's, or ended meanwhile
    return found


def samples_by_update(folder: Path) -> dict[tuple[int, int], list[int]]:
    """The samples of each update on all processes, those of repeated updates included.

    Returns:
        Sorted sample numbers by epoch and update.
    """
    parts: dict[tuple[int, int], dict[str, set[tuple[int, ...]]]] = {}
    for file in sorted(folder.glob("seen-*.jsonl")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            place = parts.setdefault((record["epoch"], record["update"]), {})
            place.setdefault(file.name, set()).add(tuple(record["samples"]))
    return {
        place: sorted({sample for part in files.values() for samples in part for sample in samples})
        for place, files in sorted(parts.items())
    }
