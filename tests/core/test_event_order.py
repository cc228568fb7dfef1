"""The golden test: every event and method of small runs, in order."""

from __future__ import annotations

import pytest

from tests.event_scenarios import SCENARIOS, as_text, golden, title_of

GOLDEN = golden()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.__name__)
def test_the_events_are_those_of_the_golden_file(scenario):
    assert as_text(scenario()) == GOLDEN[title_of(scenario)]


def test_the_golden_file_has_no_other_scenario():
    others = GOLDEN.keys() - set(map(title_of, SCENARIOS))
    assert others == {
        "padding batch on two processes, rank 0",
        "padding batch on two processes, rank 1",
    }
