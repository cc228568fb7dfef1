"""Two machines in one: network namespaces, joined by a cable as it were, with nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

INTERFACE = "cable"


def address(machine: int) -> str:
    return f"10.0.0.{machine + 1}"


@contextmanager
def two_machines() -> Iterator[tuple[list[str], list[str]]]:
    """The beginnings of the commands that run something on the one and on the other machine.

    Skips the test where there is no `ip`, or where it may not make a namespace.
    """
    if shutil.which("ip") is None:
        pytest.skip("there is no `ip`; on Debian it is in the package iproute2")
    names = [f"pa-core-{os.getpid()}-{machine}" for machine in range(2)]
    try:
        for name in names:
            made = _ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"no network namespace may be made here: {made.stderr.strip()}")
        ends = ["type", "veth", "peer", "name", INTERFACE, "netns", names[1]]
        _must("-n", names[0], "link", "add", INTERFACE, *ends)
        for machine, name in enumerate(names):
            _must("-n", name, "addr", "add", f"{address(machine)}/24", "dev", INTERFACE)
            _must("-n", name, "link", "set", INTERFACE, "up")
            _must("-n", name, "link", "set", "lo", "up")
        first, second = (["ip", "netns", "exec", name] for name in names)
        yield first, second
    finally:
        for name in names:
            _ip("netns", "delete", name)  # the cable goes with its ends


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


def _must(*arguments: str) -> None:
    done = _ip(*arguments)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
