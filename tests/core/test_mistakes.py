"""Each mistake of `tests.mistakes` gets an error that says what to write; the page has them all."""

import runpy
from pathlib import Path

import pytest

from tests.mistakes import MISTAKES, Mistake

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.make.__name__)
def test_a_mistake_gets_an_error_that_says_what_to_write(mistake: Mistake) -> None:
    for text in mistake.expected:
        assert text in mistake.message


def test_the_page_of_errors_has_the_message_of_each_mistake() -> None:
    page = runpy.run_path(str(DOCS / "errors.py"))["page"]()
    assert (DOCS / "reference" / "errors.md").read_text() == page, "run: python docs/errors.py"
