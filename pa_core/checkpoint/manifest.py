"""The run's manifest: all that says which run this was, written into every training state."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pa_core.checkpoint.fingerprint import describe_run

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

_PACKAGES = ("pa-core", "torch", "accelerate", "numpy", "safetensors", "pluggy")


def run_manifest(trainer: Trainer) -> dict[str, Any]:
    """Describe a run as plain data: plugins, packages, seed, commit, hardware, and its numbers."""
    return {
        "plugins": {name: _describe_plugin(trainer, name) for name in trainer.plugins.by_name},
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
        "run": trainer._identity or describe_run(trainer),
    }


def _describe_plugin(trainer: Trainer, name: str) -> dict[str, Any]:
    source = trainer.plugins.sources.get(name)
    plugin = trainer.plugins.by_name[name]
    settings = trainer.settings.shown(name, plugin)
    return {
        "origin": source and source.origin,
        "changes_training": bool(getattr(plugin, "changes_training", True)),
        "distribution": source and source.distribution,
        "version": source and source.version,
        "target": source and source.target,
        "settings": {key: _as_json(value) for key, value in settings.items()},
    }


def _as_json(value: Any) -> Any:
    """TOML holds dates and infinities beside what JSON has."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) else str(value)


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
    """Commit of the running script's repository, and whether it has uncommitted changes."""
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
