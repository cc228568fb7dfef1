"""A save that is killed or fails at any of its disk operations loses nothing."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pa_core import Trainer
from pa_core.checkpoint.restore import TrainingState
from pa_core.checkpoint.storage import newest_intact_state, remove_leftovers, verify
from pa_core.control import SaveRequest
from tests.faults.shim import Shim, die_at, fail_at, nothing
from tests.faults.tiny_states import folder_in_memory, train, trainer_with_states

OLD, NEW = "update_00000001", "update_00000002"
BESIDE = "beside an old one"
CASES = {
    BESIDE: (NEW, SaveRequest()),
    "replacing an old one": (OLD, SaveRequest()),
    "and the old one goes": (NEW, SaveRequest(keep=1)),
    "in the background": (NEW, SaveRequest(in_background=True, keep=1)),
}


@pytest.fixture(scope="module")
def memory():
    with folder_in_memory() as memory:
        yield memory


@pytest.fixture
def folder(memory):
    yield memory / "states"
    shutil.rmtree(memory / "states", ignore_errors=True)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer between two updates, with an earlier state on the disk."""
    return train(trainer_with_states(tmp_path_factory.mktemp("none"), save_every_n_steps=None))


@pytest.fixture(scope="module")
def before(trainer, memory):
    trainer.save_training_state(memory / "before" / OLD, {"is": "old"})
    return memory / "before"


def save(trainer: Trainer, folder: Path, name: str, request: SaveRequest) -> None:
    trainer._saver.save(folder / name, request, {"is": "new"})
    trainer._saver.wait()


def in_a_child(action: Callable[[], None]) -> int:
    """Do something in a fork of this process; return its exit code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has threads
        child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_operations(trainer: Trainer, before: Path, folder: Path, case: str) -> list[str]:
    shutil.copytree(before, folder)
    with Shim(folder, nothing) as shim:
        save(trainer, folder, *CASES[case])
    shutil.rmtree(folder)
    return shim.log


def what_is_kept(folder: Path) -> str:
    """Which of the two states resuming would find as the newest intact one."""
    found = newest_intact_state(folder)
    assert found is not None
    return str(TrainingState(found, 0).metadata["is"])


@pytest.mark.parametrize("case", CASES)
def test_a_save_that_is_killed_at_any_operation_leaves_the_old_state_or_the_new_one(
    trainer, before, folder, case
):
    operations = count_operations(trainer, before, folder, case)
    assert len(operations) > 25, operations
    kept = []
    for place in range(len(operations)):
        shutil.copytree(before, folder)

        def action(place: int = place) -> None:
            with Shim(folder, die_at(place)):
                save(trainer, folder, *CASES[case])

        assert in_a_child(action) == -signal.SIGKILL, f"operation {place} was never reached"
        kept.append(what_is_kept(folder))
        remove_leftovers(folder)
        assert {path.name for path in folder.iterdir()} <= {OLD, NEW}
        assert all(not verify(path) for path in folder.iterdir())
        assert what_is_kept(folder) == kept[-1]
        if case == BESIDE:
            assert (folder / OLD).exists()
        shutil.rmtree(folder)
    # From some operation on it is the new one, never the old one again.
    assert kept == sorted(kept, reverse=True)
    assert set(kept) == {"old", "new"}


def test_a_write_that_is_cut_off_leaves_nothing_that_is_used(trainer, before, folder):
    shutil.copytree(before, folder)
    writes = [
        n
        for n, name in enumerate(count_operations(trainer, before, folder / "x", BESIDE))
        if name == "write"
    ]
    write = os.write
    for place in writes:

        def action(place: int = place) -> None:
            shim = Shim(folder, nothing)
            with shim:
                counted = os.write

                def half(handle: int, content: bytes) -> int:
                    if len(shim.log) == place:
                        write(handle, content[: len(content) // 2])
                        os.kill(os.getpid(), signal.SIGKILL)
                    return counted(handle, content)

                os.write = half  # type: ignore[assignment]
                save(trainer, folder, *CASES[BESIDE])

        assert in_a_child(action) == -signal.SIGKILL
        assert any(path.name.startswith(".tmp") for path in folder.iterdir())
        assert what_is_kept(folder) == "old"
    assert len(remove_leftovers(folder)) == len(writes)


@pytest.mark.parametrize(
    ("case", "code", "from_then_on"),
    [
        *((BESIDE, code, False) for code in ("ENOSPC", "EIO", "EROFS", "EACCES")),
        *((BESIDE, code, True) for code in ("ENOSPC", "EROFS")),
        *((case, "EIO", False) for case in ("replacing an old one", "in the background")),
    ],
)
def test_an_error_of_the_disk_at_any_operation_costs_the_new_state_at_most(
    trainer, before, folder, case, code, from_then_on
):
    number = getattr(errno, code)
    name, request = CASES[case]
    operations = count_operations(trainer, before, folder, case)
    reported = 0
    for place in range(len(operations)):
        shutil.copytree(before, folder)
        request = SaveRequest(must=False, in_background=request.in_background, keep=request.keep)
        with (
            warnings.catch_warnings(record=True) as caught,
            Shim(folder, fail_at(place, number, from_then_on=from_then_on)) as shim,
        ):
            warnings.simplefilter("always")
            save(trainer, folder, name, request)  # training continues
        assert shim.has_fired, f"operation {place} was never reached"
        reported += bool(caught)
        if not caught:  # it concerned only durability or leftovers
            assert not verify(folder / name), operations[place]
        elif any("No training state was saved" in str(warning.message) for warning in caught):
            assert what_is_kept(folder) == "old", operations[place]
            assert not verify(folder / OLD)
        visible = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        assert visible <= {OLD, NEW}
        if not from_then_on and place < len(operations) // 2:
            assert {path.name for path in folder.iterdir()} == {OLD}, operations[place]
        save(trainer, folder, name, request)  # the disk works again
        assert what_is_kept(folder) == "new"
        shutil.rmtree(folder)
    assert reported > len(operations) // 2


def test_an_error_of_the_disk_is_raised_where_the_state_must_be_saved(trainer, before, folder):
    shutil.copytree(before, folder)
    for in_background in (False, True):
        request = SaveRequest(in_background=in_background)
        with Shim(folder, fail_at(3, errno.EIO)), pytest.raises(OSError, match="Input/output"):
            save(trainer, folder, NEW, request)
    assert os.listdir(folder) == [OLD]
