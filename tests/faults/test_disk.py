"""Full, read-only and missing disks: training continues, and earlier states are unchanged."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from pa_core import Trainer, TrainerCallback
from pa_core.checkpoint.storage import find_states, newest_intact_state, verify
from pa_core.control import SaveRequest
from tests.faults.tiny_states import look, train, trainer_with_states

MEGABYTES = 2


class Disk:
    """A small, separate file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs")

    def mount(self, *options: str) -> None:
        result = subprocess.run(
            ["mount", *options, str(self.folder)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            pytest.skip(f"this user may not mount a small disk: {result.stderr.strip()}")

    def unmount(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)

    @property
    def free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_bsize

    def leave(self, free: int) -> None:
        """Fill the disk until this many bytes are free."""
        ballast = self.folder / "ballast"
        ballast.unlink(missing_ok=True)
        ballast.write_bytes(bytes(max(self.free - free, 0)))


@pytest.fixture
def disk(tmp_path):
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    folder = tmp_path / "disk"
    folder.mkdir()
    disk = Disk(folder)
    yield disk
    disk.unmount()


@pytest.fixture
def trainer(tmp_path):
    return train(trainer_with_states(tmp_path / "none", save_every_n_steps=None))


def save(trainer: Trainer, path: Path, *, in_background: bool) -> list[str]:
    """Save as `on_save_error = "warn"` does; return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer._saver.save(path, SaveRequest(must=False, in_background=in_background), {})
        trainer._saver.wait()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("in_background", [False, True])
def test_on_a_full_disk_only_the_old_state_stays(disk, trainer, in_background):
    states = disk.folder / "states"
    before = disk.free
    trainer.save_training_state(states / "old")
    need, old = before - disk.free, look(states)
    page = os.sysconf("SC_PAGE_SIZE")
    failed = 0
    for level in range(20):
        disk.leave(need * level // 19 // page * page + (level == 19) * 8 * page)
        texts = save(trainer, states / "new", in_background=in_background)
        if texts:
            failed += 1
            assert "No space left on device" in texts[0]
            assert look(states) == old
        else:
            assert not verify(states / "new")
            shutil.rmtree(states / "new")
    assert 10 < failed < 20
    disk.leave(disk.free)  # space is freed
    (disk.folder / "ballast").unlink()
    assert not save(trainer, states / "new", in_background=in_background)
    assert newest_intact_state(states) == states / "new"


def test_training_continues_on_a_full_disk_and_saves_again_once_there_is_space(disk):
    states = disk.folder / "states"

    class Fills(TrainerCallback):
        def on_train_step_start(self, trainer):
            if trainer.updates == 2:
                disk.leave(4096)
            if trainer.updates == 5:
                (disk.folder / "ballast").unlink()

    trainer = trainer_with_states(states, in_background=False)
    trainer.plugins.register(Fills(), "fills")
    with pytest.warns(UserWarning, match="update_00000004: .*No space left on device"):
        train(trainer, 8)
    assert trainer.updates == 8
    assert [path.name for path in find_states(states)] == [
        *("update_00000008", "update_00000006", "update_00000002"),
    ]
    assert sorted(os.listdir(states)) == sorted(path.name for path in find_states(states))


@pytest.mark.parametrize("in_background", [False, True])
def test_on_a_disk_that_is_read_only_the_old_state_stays(disk, trainer, in_background):
    states = disk.folder / "states"
    trainer.save_training_state(states / "old")
    old = look(states)
    disk.mount("-o", "remount,ro")
    (text,) = save(trainer, states / "new", in_background=in_background)
    assert "Read-only file system" in text
    assert look(states) == old
    assert newest_intact_state(states) == states / "old"
    trainer.load_training_state(states / "old")
    disk.mount("-o", "remount,rw")
    assert not save(trainer, states / "new", in_background=in_background)
    assert newest_intact_state(states) == states / "new"


@pytest.mark.parametrize("in_background", [False, True])
def test_a_folder_that_vanishes_is_created_again_by_the_next_save(tmp_path, in_background):
    states = tmp_path / "states"

    class Removes(TrainerCallback):
        def on_save_training_state(self, trainer, state_dir):
            if trainer.updates == 4:
                assert state_dir.is_relative_to(states)
                shutil.rmtree(states)

    trainer = trainer_with_states(states, in_background=in_background)
    trainer.plugins.register(Removes(), "removes")
    with pytest.warns(UserWarning, match="update_00000004: .*No such file or directory"):
        train(trainer, 6)
    assert os.listdir(states) == ["update_00000006"]
    assert not verify(states / "update_00000006")


def test_a_file_in_place_of_the_folder_is_reported(tmp_path):
    (tmp_path / "states").write_text("not a folder")
    with (
        pytest.warns(UserWarning, match="can't be locked"),
        pytest.warns(UserWarning, match="update_00000002: .*Not a directory"),
    ):
        train(trainer_with_states(tmp_path / "states"), 3)
    assert (tmp_path / "states").read_text() == "not a folder"
