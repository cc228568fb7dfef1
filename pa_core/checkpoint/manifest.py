"""The manifest of a run, for every training state: what ran, from what code, and where."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pa_core.checkpoint.fingerprint import run_fingerprint
from pa_core.settings.environment import overridden

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_PACKAGES = ("pa-core", "torch", "accelerate", "numpy", "safetensors", "pluggy")


def run_manifest(trainer: Trainer) -> dict[str, Any]:
    """Describe a run: plugins, packages, seed, commit, hardware, and the fingerprint."""
    run = dict(trainer._fingerprint or run_fingerprint(trainer))
    plugins = run.pop("plugins")
    by_environment = overridden(trainer.settings, trainer.plugins.by_name)
    return {
        "plugins": plugins,
        "packages": {"python": platform.python_version()} | _versions(trainer),
        "seed": trainer.seed,
        "git": _git_commit(),
        "hardware": {
            "device": str(trainer.device),
            "name": _device_name(trainer.device),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "run": run,
        **({"overridden": by_environment} if by_environment else {}),
    }


def _versions(trainer: Trainer) -> dict[str, str]:
    distributions = {source.distribution for source in trainer.plugins.sources.values()}
    versions = {}
    for name in sorted(set(_PACKAGES) | {name for name in distributions if name}):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git_commit() -> dict[str, Any] | None:
    """The commit of the running script's repository, and whether it has uncommitted changes."""
    script = Path(getattr(sys.modules.get("__main__"), "__file__", None) or Path.cwd() / "x")
    git = ["git", "-C", str(script.resolve().parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
