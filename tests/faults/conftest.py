"""Fixtures that several tests compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.launch import finish


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An uninterrupted run of `script.py` on two processes: its folder, and its outcome.

    It has states after 20 and 40 of its 48 updates, and at its end.
    """
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, finish(folder, 2, name="whole", every=20)[1]
