"""Tests of the harnesses: each passes on this build and catches those that break its promise."""

from __future__ import annotations

import dataclasses

import pytest

from tests.faults.broken import BUILDS
from tests.faults.harness import HARNESSES, SHORT, cut_everywhere
from tests.faults.test_kill import campaign

CAUGHT_BY = {
    "no_flush": ("watch_the_disk", "was renamed before it was flushed"),
    "no_manifest_check": ("damage_everywhere", "was not noticed"),
    "rotate_before_save": ("watch_the_states", "no state exists while"),
    "no_key": ("cut_everywhere", "differs in digest"),
    "same_order": ("cut_everywhere", "differs in ids, digest"),
    "cursor": ("cut_everywhere", "differs in ids, digest"),
    "no_plugin_state": ("cut_everywhere", "plugin 'early_stopping'"),
    "no_schedule": ("cut_everywhere", "last_epoch"),
    "no_history": ("cut_everywhere", "run history, train_loss_epoch of epoch 1"),
    "flag_not_reduced": ("campaign", ""),
}


@pytest.mark.parametrize("name", HARNESSES)
def test_this_build_keeps_the_promise(tmp_path, name):
    assert HARNESSES[name](tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "every"),
    [
        (dataclasses.replace(SHORT, mixed_precision="bf16"), 1),
        (dataclasses.replace(SHORT, workers=2), 3),
    ],
    ids=["bf16", "workers"],
)
def test_every_cut_is_exact_in_other_configurations(tmp_path, config, every):
    assert cut_everywhere(tmp_path, config, every=every) == []


def test_every_broken_build_has_a_harness_to_catch_it():
    assert CAUGHT_BY.keys() == BUILDS.keys()


@pytest.mark.parametrize("build", sorted(CAUGHT_BY.keys() - {"flag_not_reduced"}))
def test_a_broken_build_is_caught(tmp_path, monkeypatch, build):
    harness, sign = CAUGHT_BY[build]
    BUILDS[build](monkeypatch.setattr)
    problems = HARNESSES[harness](tmp_path)
    assert any(sign in problem for problem in problems), problems[:10]


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_do_not_agree_are_caught():
    found = campaign(
        *("--configs", "two", "--kills", "1", "--broken", "flag_not_reduced", "--limit", "20")
    )
    assert found["lost"] == 1
    assert "fails by itself" in found["output"]
