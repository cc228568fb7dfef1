"""Saving in the background: a copy of the boundary's state, one at a time, nothing lost."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
import torch

from pa_core import StopTrainingError, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.checkpoint import atomic_io, background, save
from pa_core.checkpoint.safetensors_io import HostMemory
from pa_core.checkpoint.storage import StateReader, find_states, verify
from pa_core.control import SaveRequest, TrainerControl
from pa_core.testing import HookRecorder
from tests.builtin_trainer import Interrupts, make_trainer
from tests.helpers import assert_identical, tiny_data, weights_of


class Gate:
    """Blocks every write to the disk outside the main thread until it is opened."""

    def __init__(self, monkeypatch) -> None:
        self.opened, self.waiting = threading.Event(), threading.Event()
        write_file = atomic_io.write_file

        def held(path, chunks):
            if threading.current_thread() is not threading.main_thread():
                self.waiting.set()
                assert self.opened.wait(60)
            return write_file(path, chunks)

        monkeypatch.setattr(atomic_io, "write_file", held)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def names(folder):
    return [path.name for path in sorted(folder.iterdir()) if not path.name.startswith(".")]


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name == "pa-core-save"]


def train(folder, *more, samples=44, epochs=1, **settings):
    settings = {"save_every_n_steps": 2, "save_at_end": False, **settings}
    trainer = make_trainer(SaveTrainingStateCallback(folder, **settings), *more)
    trainer.train(tiny_data(samples), epochs, per_device_batch_size=4)
    return trainer


def test_training_continues_while_a_state_is_written_and_does_not_change_it(tmp_path, gate):
    kept = {}

    class Watches(TrainerCallback):
        def on_train_step_end(self, trainer):
            kept[trainer.updates] = weights_of(trainer)
            if trainer.updates == 3:
                assert gate.waiting.wait(60)
                assert names(tmp_path) == []  # still being written, and the loop is beyond it
                gate.opened.set()

    train(tmp_path, Watches())
    assert no_thread_is_left()
    assert names(tmp_path) == [f"update_{number:08d}" for number in (2, 4, 6, 8, 10)]
    for update in (2, 4, 6, 8, 10):
        trainer = make_trainer(SaveTrainingStateCallback(tmp_path))
        trainer.load_training_state(tmp_path / f"update_{update:08d}")
        assert_identical(weights_of(trainer), kept[update])


def test_at_most_one_state_is_saved_at_a_time(tmp_path, gate):
    class Watches(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 3:
                # The request of update 4 has to wait for the one of update 2.
                threading.Timer(0.2, gate.opened.set).start()
            if trainer.updates >= 5:
                assert "update_00000002" in names(tmp_path)

    train(tmp_path, Watches())


@pytest.mark.parametrize("leave", [KeyboardInterrupt, ZeroDivisionError, StopTrainingError])
def test_the_pending_save_is_complete_however_the_run_ends(tmp_path, gate, leave):
    class Leaves(TrainerCallback):
        def on_train_step_start(self, trainer):
            if trainer.updates == 3:
                assert names(tmp_path) == []
                threading.Timer(0.2, gate.opened.set).start()
                raise leave("enough")

    if leave is StopTrainingError:
        train(tmp_path, Leaves())
    else:
        with pytest.raises(leave):
            train(tmp_path, Leaves())
    assert no_thread_is_left()
    assert names(tmp_path) == ["update_00000002"]
    assert verify(tmp_path / "update_00000002") == []


def test_a_run_that_evaluates_and_predicts_afterwards_has_its_states(tmp_path):
    trainer = train(tmp_path)
    assert no_thread_is_left()
    trainer.evaluate(tiny_data(8))
    assert len(find_states(tmp_path)) == 5


def test_an_interrupted_run_resumes_exactly_from_the_save_that_was_pending(tmp_path):
    whole = make_trainer()
    whole.train(tiny_data(44), 2, per_device_batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Interrupts(7), epochs=2)
    resumed = make_trainer(SaveTrainingStateCallback(tmp_path))
    resumed.train(tiny_data(44), 2, per_device_batch_size=4, resume_from="auto")
    assert_identical(weights_of(resumed), weights_of(whole))


class FullDisk:
    """Fails to write some files for lack of space."""

    def __init__(self, monkeypatch, times=1) -> None:
        self.times, self.failed_in = times, []
        write_file = atomic_io.write_file

        def failing(path, chunks):
            if path.name == "model.safetensors" and len(self.failed_in) < self.times:
                self.failed_in.append(threading.current_thread().name)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write_file(path, chunks)

        monkeypatch.setattr(atomic_io, "write_file", failing)


def test_a_failure_in_the_background_is_a_warning_and_training_continues(tmp_path, monkeypatch):
    full, recorder = FullDisk(monkeypatch), HookRecorder()
    with pytest.warns(UserWarning, match="No training state was saved at .*update_00000002.*space"):
        trainer = train(tmp_path, recorder)
    (call,) = recorder.of("on_save_training_state_error")
    assert call.state_dir == tmp_path / "update_00000002"
    assert call.error.errno == errno.ENOSPC
    assert full.failed_in == ["pa-core-save"]
    assert trainer.updates == 11
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        f"update_{number:08d}" for number in (4, 6, 8, 10)
    ]


def test_a_failure_in_the_background_stops_the_run_where_the_state_must_be_saved(
    tmp_path, monkeypatch
):
    full, seen = FullDisk(monkeypatch), []

    class Waits(TrainerCallback):
        def on_train_step_end(self, trainer):
            seen.append(trainer.updates)
            while trainer.updates == 3 and not no_thread_is_left():
                time.sleep(0.01)

    with pytest.raises(OSError, match="No space left") as caught:
        train(tmp_path, Waits(), on_save_error="stop")
    assert full.failed_in == ["pa-core-save"]
    assert seen == [1, 2, 3]  # reported at the next boundary
    assert "No training state was saved at" in caught.value.__notes__[0]
    assert "update_00000002" in caught.value.__notes__[0]
    assert [path.name for path in tmp_path.iterdir()] == [".run.json"]  # no state yet


def test_a_failure_of_the_last_state_is_reported_at_the_end_of_the_run(tmp_path, monkeypatch):
    FullDisk(monkeypatch)
    with pytest.warns(UserWarning, match="No training state was saved at .*update_00000011"):
        train(tmp_path, save_every_n_steps=11)


def test_an_exception_that_ends_the_run_notes_a_failure_of_the_pending_save(tmp_path, monkeypatch):
    FullDisk(monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tmp_path, Interrupts(2))
    assert "No training state was saved at" in caught.value.__notes__[0]
    assert no_thread_is_left()


@pytest.mark.filterwarnings("ignore:.* has training states of another run")
def test_old_states_are_removed_only_when_the_new_one_is_complete(tmp_path, gate):
    gate.opened.set()
    train(tmp_path, max_checkpoints=1)
    assert names(tmp_path) == ["update_00000010"]
    gate.opened.clear(), gate.waiting.clear()

    class Watches(TrainerCallback):
        def on_train_step_end(self, trainer):
            if trainer.updates == 3:
                assert gate.waiting.wait(60)
                assert names(tmp_path) == ["update_00000010"]
                gate.opened.set()

    train(tmp_path, Watches(), max_checkpoints=1, samples=12)
    assert names(tmp_path) == ["update_00000002"]


def test_a_failure_to_remove_old_states_is_a_warning(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(background.Retention, "apply", refuse)
    with pytest.warns(UserWarning, match="Old training states could not be removed.*Read-only"):
        train(tmp_path, max_checkpoints=1, on_save_error="stop", samples=16)
    assert len(names(tmp_path)) == 2


def test_files_of_plugins_are_written_at_the_boundary_and_are_part_of_the_state(tmp_path):
    threads = []

    class Writes(TrainerCallback):
        def on_save_training_state(self, trainer, state_dir):
            threads.append(threading.current_thread())
            (state_dir / "more").mkdir()
            (state_dir / "more" / "vocabulary.txt").write_text(f"{trainer.updates}")

    train(tmp_path, Writes())
    assert set(threads) == {threading.main_thread()}
    for path in find_states(tmp_path):
        assert "more/vocabulary.txt" in StateReader(path)
        assert (path / "more" / "vocabulary.txt").read_text() == str(int(path.name[-8:]))


def test_a_hook_that_fails_leaves_nothing_behind(tmp_path):
    class Fails(TrainerCallback):
        def on_save_training_state(self, trainer, state_dir):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, Fails(), on_save_error="stop")
    assert [path.name for path in tmp_path.iterdir()] == [".run.json"]  # no state yet


def test_a_link_that_a_plugin_puts_into_a_state_is_refused(tmp_path):
    class Links(TrainerCallback):
        def on_save_training_state(self, trainer, state_dir):
            (state_dir / "link").symlink_to(__file__)

    from pa_core.errors import TrainingStateError

    with pytest.raises(TrainingStateError, match="link can't be part of a state"):
        train(tmp_path, Links(), on_save_error="stop")


class Fails:
    """Writing a state raises an error once, in the thread that writes."""

    def __init__(self, monkeypatch, error):
        write_file = atomic_io.write_file
        errors = [error]

        def failing(path, chunks):
            if path.name == "model.safetensors" and errors:
                raise errors.pop()
            return write_file(path, chunks)

        monkeypatch.setattr(atomic_io, "write_file", failing)


ERRORS = [MemoryError("no memory"), RuntimeError("of some library"), ValueError(), KeyError("a")]


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_of_writing_is_a_warning_and_training_continues(
    error, in_background, tmp_path, monkeypatch
):
    Fails(monkeypatch, error)
    recorder = HookRecorder()
    what = f"No training state was saved at .*update_00000002: {type(error).__name__}"
    with pytest.warns(UserWarning, match=what) as caught:
        trainer = train(tmp_path, recorder, in_background=in_background)
    (call,) = recorder.of("on_save_training_state_error")
    assert call.error is error
    assert trainer.updates == 11
    assert names(tmp_path) == [f"update_{number:08d}" for number in (4, 6, 8, 10)]
    advised = "needs no copy of the state" in str(caught[0].message)
    assert advised == (in_background and isinstance(error, MemoryError))


@pytest.mark.parametrize("in_background", [True, False])
def test_any_error_of_writing_stops_a_run_whose_states_must_be_saved(
    in_background, tmp_path, monkeypatch
):
    Fails(monkeypatch, MemoryError("no memory"))
    with pytest.raises(MemoryError) as caught:
        train(tmp_path, on_save_error="stop", in_background=in_background)
    (note,) = (text for text in caught.value.__notes__ if "update_00000002" in text)
    assert ("needs no copy of the state" in note) == in_background
    assert not any("per_device_batch_size" in text for text in caught.value.__notes__)


class Fragile(TrainerCallback):
    """Raises once, where a state is collected."""

    def __init__(self, place):
        self.place, self.is_broken = place, True

    def fail(self, place):
        if self.is_broken and place == self.place:
            self.is_broken = False
            raise KeyError(place)

    def state_dict(self):
        self.fail("state_dict")
        return {}

    def load_state_dict(self, state):
        pass

    def on_save_training_state(self, trainer, state_dir):
        (state_dir / "mine.txt").write_text("half")
        self.fail("on_save_training_state")


@pytest.mark.parametrize("place", ["state_dict", "on_save_training_state"])
def test_a_plugin_that_fails_while_a_state_is_collected_follows_the_policy(place, tmp_path):
    recorder, match = HookRecorder(), f"No training state .* KeyError: '{place}' .*{place}.*Fragile"
    with pytest.warns(UserWarning, match=match):
        trainer = train(tmp_path / "warn", Fragile(place), recorder)
    (call,) = recorder.of("on_save_training_state_error")
    assert isinstance(call.error, KeyError)
    assert trainer.updates == 11
    assert names(tmp_path / "warn") == [f"update_{number:08d}" for number in (4, 6, 8, 10)]
    assert len(list((tmp_path / "warn").iterdir())) == 4  # nothing is half-written
    with pytest.raises(KeyError) as caught:
        train(tmp_path / "stop", Fragile(place), on_save_error="stop")
    assert any("No training state was saved" in note for note in caught.value.__notes__)
    assert names(tmp_path / "stop") == []


def test_without_memory_on_the_gpu_to_collect_a_state_training_continues(tmp_path, monkeypatch):
    def fails(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(save, "_state_files", fails)
    with pytest.warns(UserWarning, match="No training state was saved .* CUDA out of memory"):
        assert train(tmp_path).updates == 11
    assert names(tmp_path) == []


def test_without_memory_for_a_copy_that_seemed_to_be_free_the_state_is_saved_at_once(
    tmp_path, monkeypatch
):
    def fails(*args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(HostMemory, "copy", fails)
    train(tmp_path)
    assert names(tmp_path) == [f"update_{number:08d}" for number in (2, 4, 6, 8, 10)]


def test_without_memory_for_a_copy_the_state_is_saved_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "has_room_in_memory", lambda size: False)
    monkeypatch.setattr(HostMemory, "copy", None)
    train(tmp_path)
    assert len(find_states(tmp_path)) == 5


def test_copies_are_independent_and_their_memory_is_reused():
    memory = HostMemory()
    tensors = {"whole": torch.arange(6.0), "turned": torch.arange(6.0).reshape(2, 3).T}
    copies = memory.copy({"a": tensors})["a"]
    for name, copy in copies.items():
        assert torch.equal(copy, tensors[name])
        assert copy.is_contiguous()
        tensors[name] += 1
        assert not torch.equal(copy, tensors[name])
    tensors["whole"] = torch.arange(7)
    again = memory.copy({"a": tensors})["a"]
    assert all(torch.equal(copy, tensors[name]) for name, copy in again.items())
    assert again["turned"].data_ptr() == copies["turned"].data_ptr()
    assert again["whole"].data_ptr() != copies["whole"].data_ptr()


def test_the_memory_of_copies_is_freed_at_the_end_of_a_run(tmp_path):
    assert not train(tmp_path)._saver._memory._held


def test_requests_for_one_state_combine_to_the_strictest():
    control = TrainerControl()
    control.save("a", must=False, in_background=True, keep=3)
    control.save("a", everywhere=True)
    (request,) = control.pending.saves.values()
    assert request == SaveRequest(must=True, in_background=False, keep=3)
