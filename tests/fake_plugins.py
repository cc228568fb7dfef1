"""Packages for the tests, as pip would install them, in a folder on the path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

import pytest


@dataclass
class Site:
    """A folder on the path."""

    folder: Path

    def install(
        self,
        name: str,
        version: str = "1.0",
        *,
        requires: str = "",
        group: str = "pa_core",
        **plugins: str,
    ) -> None:
        """Install a distribution with entry points."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        info.joinpath("METADATA").write_text(
            text + (f"Requires-Dist: {requires}\n" * bool(requires))
        )
        entries = "".join(f"{key} = {value}\n" for key, value in plugins.items())
        info.joinpath("entry_points.txt").write_text(f"[{group}]\n{entries}")
        importlib.invalidate_caches()

    def module(self, name: str, code: str) -> Path:
        file = self.folder / f"{name}.py"
        file.write_text(dedent(code))
        importlib.invalidate_caches()
        return file


@contextmanager
def site_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A site whose modules are removed from ``sys.modules`` at the end."""
    folder.mkdir(exist_ok=True)
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield Site(folder)
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]
