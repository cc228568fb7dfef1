"""Hygiene for all tests and doctests: one thread each, and nothing left behind by any of them."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: tests run side by side, and more threads would only get in their way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# It marks the conformance suite's slow tests, and imports no torch.
pytest_plugins = ["pa_core.testing.pytest_plugin"]

# It imports the example plugins, which its test puts on the path.
collect_ignore = ["tests/distributed/plugin_contract.py"]

# What libraries write on import: accelerate, torch's compiler (through transformers), scikit-learn,
# and DeepSpeed, which accelerate imports where it is installed.
MAY_CHANGE = ("ACCELERATE_", "PYTEST_", "TORCHINDUCTOR_", "KMP_", "PYTORCH_NVML_")


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Fail a test that leaves an environment variable, a folder or a torch default changed."""
    before, folder = dict(os.environ), Path.cwd()
    dtype, deterministic = _torch_defaults()
    yield
    after = dict(os.environ)
    changed = sorted(
        name
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and not name.startswith(MAY_CHANGE)
    )
    for name in before.keys() | after.keys():  # mended first, so that one test fails and not all
        if name in before:
            os.environ[name] = before[name]
        else:
            os.environ.pop(name, None)
    left, dtype_after = Path.cwd(), _torch_defaults()
    os.chdir(folder)
    assert not changed, f"left environment variables changed: {', '.join(changed)}"
    assert left == folder, f"left the working directory at {left}"
    if dtype is not None:
        assert dtype_after == (dtype, deterministic), f"left torch's defaults at {dtype_after}"


def _torch_defaults() -> tuple[object, object]:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "are_deterministic_algorithms_enabled"):
        return None, None
    return torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator where there is none."""
    needy = [item for item in items if item.get_closest_marker("gpu")]
    if needy:
        import torch

        if not torch.accelerator.is_available():
            for item in needy:
                item.add_marker(pytest.mark.skip(reason="no accelerator"))
