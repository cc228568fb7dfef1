"""Two network namespaces that stand for two machines, joined by a virtual cable."""

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
    """The command prefixes that run a program on the first and on the second machine.

    Skips the test if there is no `ip` command, or if it isn't allowed to create a namespace.
    """
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command; on Debian, the package iproute2 has it")
    names = [f"pa-core-{os.getpid()}-{machine}" for machine in range(2)]
    try:
        for name in names:
            made = _ip("netns", "add", name)
            if made.returncode:
                pytest.skip(f"can't create a network namespace: {made.stderr.strip()}")
        ends = ["type", "veth", "peer", "name", INTERFACE, "netns", names[1]]
        _check("-n", names[0], "link", "add", INTERFACE, *ends)
        for machine, name in enumerate(names):
            _check("-n", name, "addr", "add", f"{address(machine)}/24", "dev", INTERFACE)
            _check("-n", name, "link", "set", INTERFACE, "up")
            _check("-n", name, "link", "set", "lo", "up")
        first, second = (["ip", "netns", "exec", name] for name in names)
        yield first, second
    finally:
        for name in names:
            _ip("netns", "delete", name)  # this removes the cable too


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


def _check(*arguments: str) -> None:
    done = _ip(*arguments)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
