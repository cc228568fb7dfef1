"""The documentation matches the settings."""

import re
from pathlib import Path
from typing import get_args

import pytest

from pa_tracking.settings import PACKAGES, ServiceName, Topic, TrackingSettings
from pa_tracking.trackers import TRACKERS
from tests.distributed.launch import ROOT

PAGES = (ROOT / "docs" / "plugins" / "tracking.md", ROOT / "plugins" / "tracking" / "README.md")


def row(key):
    field = TrackingSettings.model_fields[key]
    default = field.default
    if key == "log":
        assert list(default) == list(get_args(Topic))
        shown = "all of them"
    else:
        shown = f'`"{default}"`' if isinstance(default, str | Path) else "none"
    return f"| `{key}` | {shown} | {field.description} |"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_documented_settings_match_the_code(page):
    text = page.read_text().partition("| key | default | meaning |\n")[2].partition("\n\n")[0]
    assert text.splitlines()[1:] == [row(key) for key in TrackingSettings.model_fields]


def test_the_page_lists_each_service_and_each_topic():
    text = PAGES[0].read_text()
    services = text.partition("## Services")[2].partition("\n\n`offline")[0]
    shown = [
        name
        for line in re.findall(r"^\| (`.+?) \|", services, re.MULTILINE)
        for name in line.split(", ")
    ]
    assert sorted(shown) == sorted(f"`{name}`" for name in get_args(ServiceName))
    topics = text.partition("| `log` | values |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", topics, re.MULTILINE) == list(get_args(Topic))


def test_each_service_has_a_package_an_extra_and_a_tracker():
    import tomllib

    project = tomllib.loads((ROOT / "plugins" / "tracking" / "pyproject.toml").read_text())
    extras = set(project["project"]["optional-dependencies"]) - {"images"}
    assert extras == set(PACKAGES) == set(TRACKERS) == set(get_args(ServiceName)) - {"csv", "jsonl"}
