"""The example plugins give the numbers of hand-written loops: alone, on two processes, resumed."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import ROOT, flat, outcome_of

pytestmark = pytest.mark.slow
PACKAGES = sorted((ROOT / "examples" / "plugins").iterdir())


@pytest.fixture(scope="module")
def importable() -> Any:
    """The packages can be imported during this module only: other tests count them as missing."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for package in PACKAGES:
            patch.syspath_prepend(str(package))
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, *PACKAGES))))
        yield
    names = {package.name.replace("-", "_") for package in PACKAGES}
    for module in set(sys.modules) - before:
        if module.partition(".")[0] in names or module == "tests.distributed.plugin_contract":
            del sys.modules[module]


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.distributed)])
def outcome(importable, request, tmp_path_factory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("contract")
    if request.param == 2:
        return outcome_of(folder / "two", "plugin_contract.py", 2)
    from tests.distributed import plugin_contract

    return {name: plugin_contract.results(name, folder) for name in plugin_contract.JOBS}


@pytest.fixture
def results(outcome) -> dict[str, Any]:
    return {name: found for name, found in outcome.items() if name != "refused"}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    found = flat(one), flat({name: other[name] for name in one})
    if len(found[0]) != len(found[1]):
        return float("inf")
    return max(abs(first - second) for first, second in zip(*found, strict=True))


def test_the_plugins_give_the_numbers_of_the_loops_by_hand(results):
    found = {
        (name, way): difference(job[way], job["by hand"])
        for name, job in results.items()
        for way in ("trainer", "resumed")
    }
    print(*sorted(f"{value:.1e}: {name}" for name, value in found.items()), sep="\n")
    assert all(value < 1e-9 for value in found.values()), found


def test_the_comparison_notices_each_mistake(results):
    found = {
        mistake: difference(job[mistake], job["by hand"])
        for job in results.values()
        for mistake in job.keys() - {"trainer", "resumed", "by hand"}
    }
    assert len(found) == (10 if "local gradients" in found else 9)
    assert all(value > 1e-4 for value in found.values()), found


def test_processes_must_change_their_data_in_the_same_way(outcome):
    if "refused" not in outcome:
        pytest.skip("one process")
    refused = outcome["refused"]
    assert "train data were changed on some processes only" in refused["changed on one"]
    for name in ("changed differently", "different"):
        assert "has 16 samples on process 0, and more or fewer on others" in refused[name]
