"""Any damage to a byte, file or name of a state is noticed before anything is restored.

``PA_FAULTS_CASES=50000 python -m pytest tests/faults/test_damage.py`` makes more of them; a failure
names the number that repeats it alone, as ``PA_FAULTS_DAMAGE=1234``.
"""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import pytest

from pa_core.checkpoint.restore import TrainingState
from pa_core.checkpoint.storage import newest_intact_state, verify
from pa_core.errors import TrainingStateError
from tests.faults.tiny_states import (
    Backup,
    folder_in_memory,
    look,
    make_states,
    train,
    trainer_with_states,
)
from tests.helpers import assert_identical, weights_of

DAMAGES = int(os.environ.get("PA_FAULTS_CASES", "400"))
ONE = os.environ.get("PA_FAULTS_DAMAGE")


def truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def flip_a_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def zero_a_block(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    while True:  # (a block that is zero already wouldn't be damaged)
        start = chance.randrange(len(content))
        block = content[start : start + 4096]
        if any(block):
            break
    content[start : start + len(block)] = bytes(len(block))
    path.write_bytes(content)


def extend(path: Path, chance: random.Random) -> None:
    with path.open("ab") as file:
        file.write(chance.choice([b"\0", b"\n", chance.randbytes(chance.randrange(1, 5000))]))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def add_a_file(path: Path, chance: random.Random) -> None:
    name = chance.choice(["more.bin", ".hidden", "manifest.json.bak", "STATE.JSON", "a b", "ü"])
    (path.parent / name).write_bytes(chance.randbytes(chance.randrange(20)))


def swap_with_another_state(path: Path, chance: random.Random) -> None:
    state = state_of(path)
    other = state.parent / "update_00000004" / path.relative_to(state)
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


def link_to_a_copy(path: Path, chance: random.Random) -> None:
    elsewhere = state_of(path).parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def link_to_nothing(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def turn_into_a_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


def state_of(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.name.startswith("update_"))


KINDS = [
    *(truncate, flip_a_bit, zero_a_block, extend, delete, add_a_file, swap_with_another_state),
    *(link_to_a_copy, link_to_nothing, turn_into_a_folder),
]


@pytest.fixture(scope="module")
def folder():
    with folder_in_memory() as memory:
        make_states(memory / "states")
        yield memory / "states"


@pytest.fixture
def backup(folder):
    backup = Backup(folder)
    yield backup
    backup.restore()


def test_every_damage_is_noticed_and_the_newest_intact_state_is_taken(folder, backup):
    newest, second, third = (folder / f"update_{number:08d}" for number in (6, 4, 2))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert (
        len(files) == 7
    )  # manifest, weights, two files each of state and process, a plugin's file
    before = look(folder)
    seen = set()
    numbers = range(DAMAGES) if ONE is None else [int(ONE)]
    for number in numbers:
        chance = random.Random(number)
        damage, path = KINDS[number % len(KINDS)], chance.choice(files)
        case = f"PA_FAULTS_DAMAGE={number}: {damage.__name__} of {path}"
        damage(path, chance)
        assert look(folder) != before, f"{case} has changed nothing"
        problems = verify(newest)
        assert problems, case
        if damage is not add_a_file:
            assert str(path) in " ".join(problems) or path.name == "manifest.json", case
        with pytest.raises(TrainingStateError):
            TrainingState(newest, 0)
        with pytest.warns(UserWarning, match="the newest intact state. Damaged: .*update_00000006"):
            found = newest_intact_state(folder)
        assert found == (third if damage is swap_with_another_state else second), case
        seen.add((damage, path))
        backup.restore()
    assert look(folder) == before
    if ONE is None and DAMAGES >= 400:
        assert len(seen) == len(KINDS) * len(files), "every file has met every kind of damage"
    assert verify(newest) == []


def test_if_nothing_is_intact_the_error_names_everything_damaged(folder, backup):
    paths = []
    for number, state in enumerate(sorted(folder.iterdir())):
        chance = random.Random(number)
        paths.append(chance.choice(sorted(state.glob("*.json"))))
        flip_a_bit(paths[-1], chance)
    with pytest.raises(TrainingStateError, match="No state in .* is intact") as caught:
        newest_intact_state(folder)
    assert all(str(path) in str(caught.value) for path in paths)
    with pytest.raises(TrainingStateError, match="No state in .* is intact"):
        train(trainer_with_states(folder), resume_from="auto")


@pytest.mark.parametrize("damage", KINDS, ids=lambda damage: damage.__name__)
def test_a_run_resumed_past_a_damaged_state_ends_as_the_uninterrupted_run(tmp_path, damage):
    whole = train(trainer_with_states(tmp_path, in_background=False))
    state = tmp_path / "update_00000006"
    damage(state / "model.safetensors", random.Random(1))
    resumed = trainer_with_states(tmp_path)
    with pytest.warns(UserWarning, match="update_00000006"):
        train(resumed, resume_from="auto")
    assert_identical(weights_of(resumed), weights_of(whole))
    assert verify(state) == []  # saved again


def test_loading_a_damaged_state_does_not_change_the_trainer(folder, backup):
    trainer = train(trainer_with_states(folder / "none"), 2)
    before = weights_of(trainer)
    flip_a_bit(folder / "update_00000006" / "words" / "list.txt", random.Random(0))
    with pytest.raises(TrainingStateError, match=r"list\.txt is damaged"):
        trainer.load_training_state(folder / "update_00000006")
    with warnings.catch_warnings(), pytest.raises(TrainingStateError, match=r"list\.txt"):
        train(trainer, resume_from=folder / "update_00000006")
    assert_identical(weights_of(trainer), before)
