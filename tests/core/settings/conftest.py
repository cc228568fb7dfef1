"""An installed distribution with plugins that have settings."""

from __future__ import annotations

from textwrap import dedent

import pytest

from pa_core.settings.table import Settings, read_settings
from tests.fake_plugins import site_in

WEATHER = """
from enum import Enum
from pathlib import Path
from pydantic import BaseModel, Field
from pa_core import hookimpl

class Sky(Enum):
    CLEAR = "clear"
    GREY = "grey"

class Wind(BaseModel):
    speed: float = 0.0

class Weather:
    class Settings(BaseModel):
        degrees: int = 20
        sky: Sky = Sky.CLEAR
        file: Path | None = None
        wind: Wind = Wind()
        days: set[str] = set()
        either: int | list[str] = 1

    def __init__(self, settings):
        self.settings = settings
        if settings.degrees > 50:
            raise ValueError("too hot")

    @hookimpl
    def on_init_end(self, trainer): ...

class NoSettings:
    @hookimpl
    def on_init_end(self, trainer): ...

class Needy:
    class Settings(BaseModel):
        needed: int

    def __init__(self, settings): ...

    @hookimpl
    def on_init_end(self, trainer): ...

ready = NoSettings()
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.delenv("PA_CORE_CONFIG", raising=False)
    with site_in(tmp_path / "site", monkeypatch) as site:
        site.module("pa_weather", WEATHER)
        targets = {"weather": "Weather", "plain": "NoSettings", "needy": "Needy", "ready": "ready"}
        site.install("pa-weather", "2.1", **{k: f"pa_weather:{v}" for k, v in targets.items()})
        yield site


@pytest.fixture
def settings_of(site, tmp_path):
    def read(text: str) -> Settings:
        file = tmp_path / "pyproject.toml"
        file.write_text(dedent(text))
        return read_settings(file)

    return read
