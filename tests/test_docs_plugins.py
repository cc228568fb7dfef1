"""The code on the pages about plugins and hooks runs."""

from pathlib import Path

import pytest

from tests.test_docs import PLUGINS, each, run_page


@each(PLUGINS)
def test_the_code_on_a_page_about_plugins_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, tmp_path, monkeypatch)
