"""Lost processes and changed world sizes: the run ends soon, and resumes exactly."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest

from tests.distributed.launch import flat
from tests.faults.launch import finish, launch, samples_by_update

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_killed_process_ends_the_others_with_the_cause(tmp_path):
    fault = {"kind": "kill", "place": "step", "update": 20}
    # The launcher ends the other process as soon as it looks, which may be before its last words.
    ended = launch(tmp_path / "run", 2, "--monitor-interval", "2", name="killed", fault=fault)
    assert ended.seconds is not None, f"nothing was killed:\n{ended.text}"
    assert ended.seconds < 30
    assert ended.code not in (0, 75)
    assert "SIGKILL" in ended.text
    assert "waited for the other processes, but one of them has ended" in ended.text


def test_restarts_after_a_kill_end_with_exactly_the_weights_of_the_uninterrupted_run(
    tmp_path, whole
):
    fault = {"kind": "kill", "place": "step", "update": 25}
    ended = launch(tmp_path / "run", 2, "--max-restarts", "2", name="again", every=20, fault=fault)
    assert ended.seconds is not None, f"nothing was killed:\n{ended.text}"
    assert ended.code == 0, ended.text
    assert "Resuming from" in ended.text
    for name in ("weights", "average"):
        assert ended.outcomes[0][name] == whole[1][name]
    assert samples_by_update(tmp_path / "run") == samples_by_update(whole[0])


@pytest.mark.parametrize("processes", [(2, 1), (1, 2)])
def test_a_different_world_size_resumes_with_the_same_global_batches(tmp_path, whole, processes):
    before, after = processes
    folder = tmp_path / "run"
    if before == 2:  # the first part exists already
        shutil.copytree(whole[0], folder)
        shutil.rmtree(folder / "states" / "final")
        shutil.rmtree(folder / "states" / "update_00000040")
    else:
        fault = {"kind": "one", "place": "step", "update": 20}
        paused = launch(folder, 1, name="paused", fault=fault)
        assert (paused.code, paused.outcomes[0]["updates"]) == (75, 20)
    for file in folder.glob("seen-*.jsonl"):  # the second run writes what comes after the state
        lines = file.read_text().splitlines()[:20]
        file.rename(folder / f"seen-before-{file.name}")
        (folder / f"seen-before-{file.name}").write_text("\n".join(lines) + "\n")
    text, outcome = finish(folder, after, name="resumed")
    assert "update 20" in text
    seen = samples_by_update(folder)
    assert seen == samples_by_update(whole[0])
    for epoch in (1, 2, 3):
        counts = Counter(n for (e, _), samples in seen.items() if e == epoch for n in samples)
        assert counts == Counter(range(61)), epoch
    for name in ("weights", "average"):
        assert flat(outcome[name]) == pytest.approx(flat(whole[1][name]), abs=1e-6), name
