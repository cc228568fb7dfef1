"""The recipes of the how-to pages and the tutorials run as they are pasted."""

from pathlib import Path

import pytest

from tests.test_docs import RECIPES, each, run_page


@each(sorted(RECIPES))
def test_the_recipes_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_page(page, tmp_path, monkeypatch)
