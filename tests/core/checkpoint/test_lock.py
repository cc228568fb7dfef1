"""Only one live run writes to a place: locks of processes here, on other hosts, and of the dead."""

from __future__ import annotations

import json
import os
import signal
import time
from threading import Event, Thread, Timer

import pytest

from pa_core.checkpoint import lock as lock_module
from pa_core.checkpoint.lock import RunLock, check_held
from pa_core.errors import TrainingStateError


def a_lock(folder, **options):
    return RunLock(folder, is_folder=True, **options)


def acquire(folder, **options):
    """Take the lock in this process; what was reported, and what was taken over."""
    told = []
    one = a_lock(folder, **options)
    taken_over = one.acquire(told.append)
    return one, told, taken_over


def in_child(action):
    """Run an action in a forked process that then sleeps; returns its pid once it is done."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action()
            os.write(writing, b"y")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"y"
    os.close(reading)
    return child


def end(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def left_by(folder, **changes):
    """The lock of a run on another host, or with other changes."""
    one = a_lock(folder)
    content = json.loads(one._content) | {"host": "node-7", "machine": "node-7 boot"} | changes
    folder.mkdir(exist_ok=True)
    one.file.write_text(json.dumps(content))
    return one.file


def test_a_second_run_is_refused_by_name_until_the_first_has_ended(tmp_path):
    first, told, taken_over = acquire(tmp_path / "new" / "states")
    with pytest.raises(TrainingStateError, match=rf"in use by another run \(process {os.getpid()}"):
        acquire(tmp_path / "new" / "states")
    assert first.file.exists()
    first.release()
    assert (told, taken_over) == ([], None)
    assert not (tmp_path / "new").exists()  # it was made for the lock, and nothing was written
    again, _, taken_over = acquire(tmp_path / "new" / "states")
    (tmp_path / "new" / "states" / "kept").touch()
    again.release()
    assert taken_over is None
    assert os.listdir(tmp_path / "new" / "states") == ["kept"]


def test_a_lock_of_a_killed_process_of_this_host_is_taken_over_at_once(tmp_path):
    child = in_child(lambda: acquire(tmp_path))
    with pytest.raises(TrainingStateError, match=f"process {child} on"):
        acquire(tmp_path)
    end(child)
    since = time.monotonic()
    one, told, taken_over = acquire(tmp_path)
    assert time.monotonic() - since < 1
    assert not told
    assert f"process {child}" in taken_over
    one.release()
    assert not os.listdir(tmp_path)


def test_a_process_number_that_was_reused_is_no_owner(tmp_path):
    here = json.loads(a_lock(tmp_path)._content)
    left_by(tmp_path, machine=here["machine"], pid=os.getppid(), started="1")
    one, _, taken_over = acquire(tmp_path)
    assert taken_over is not None
    one.release()


def test_an_earlier_run_of_this_process_that_left_its_lock_is_no_owner(tmp_path):
    file = left_by(tmp_path, **{**json.loads(a_lock(tmp_path)._content), "key": "x"})
    one, _, taken_over = acquire(tmp_path)
    assert taken_over is not None
    assert file == one.file
    one.release()


def test_an_owner_on_another_host_is_dead_once_its_heartbeat_is_old(tmp_path):
    file = left_by(tmp_path)
    since = time.monotonic()
    one, told, taken_over = acquire(tmp_path, stale=0.6)
    assert 0.3 < time.monotonic() - since < 5
    assert [text for text in told if "process" in text and "node-7" in text] == told
    assert len(told) == 1
    assert "node-7" in taken_over
    one.release()
    left_by(tmp_path)
    long_ago = file.stat().st_mtime - 3600
    os.utime(file, (long_ago, long_ago))
    one, told, taken_over = acquire(tmp_path)
    assert told == []
    assert taken_over is not None
    one.release()


def test_a_heartbeat_of_another_host_is_seen_and_refuses(tmp_path):
    file = left_by(tmp_path)
    stop = Event()

    def beat():
        while not stop.wait(0.1):
            with file.open("r+b") as opened:
                opened.write(b"{")

    thread = Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(TrainingStateError, match="in use by another run.*node-7"):
            acquire(tmp_path, stale=30.0)
    finally:
        stop.set()
        thread.join()


def test_an_owner_on_another_host_that_ends_properly_is_waited_for(tmp_path):
    file = left_by(tmp_path)
    thread = Timer(0.4, file.unlink)
    thread.start()
    one, told, taken_over = acquire(tmp_path, stale=30.0)
    thread.join()
    assert len(told) == 1
    assert taken_over is None
    one.release()


def test_the_owner_gives_signs_of_life_by_itself(tmp_path):
    one, *_ = acquire(tmp_path, beat=0.05)
    before, content = one.file.stat().st_mtime_ns, one.file.read_bytes()
    deadline = time.monotonic() + 5
    while one.file.stat().st_mtime_ns == before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert one.file.stat().st_mtime_ns > before
    assert one.file.read_bytes() == content
    one.release()


def test_one_of_several_racers_takes_a_stale_lock_over(tmp_path):
    """The winner holds it until all are done, so any second winner would be a wrong one."""
    for number in range(8):
        folder = tmp_path / str(number)
        here = json.loads(a_lock(folder)._content)
        left_by(folder, machine=here["machine"], pid=2**22 - 1, started="1")
        start, results = os.pipe(), os.pipe()
        children = []
        for _ in range(5):
            child = os.fork()
            if child == 0:
                try:
                    os.close(start[1])
                    os.read(start[0], 1)  # all start when the pipe is closed
                    acquire(folder)
                    os.write(results[1], b"w")
                except TrainingStateError:
                    os.write(results[1], b"r")
                finally:
                    time.sleep(0.3)
                    os._exit(0)
            children.append(child)
        os.close(start[0])
        os.close(start[1])
        os.close(results[1])
        outcome = b""
        while len(outcome) < 5 and (more := os.read(results[0], 5)):
            outcome += more
        os.close(results[0])
        for child in children:
            os.waitpid(child, 0)
        assert sorted(outcome) == sorted(b"wrrrr")
        assert os.listdir(folder) == [".lock"]


def test_a_run_whose_lock_was_taken_over_writes_nothing_more(tmp_path):
    one, *_ = acquire(tmp_path)
    check_held(tmp_path)
    one.file.unlink()  # by someone who tidied up
    check_held(tmp_path)
    assert one.file.exists()
    left_by(tmp_path)
    with pytest.raises(TrainingStateError, match="taken over by another run.*node-7"):
        check_held(tmp_path)
    one.release()
    assert one.file.exists()  # it is the other run's
    check_held(tmp_path)  # nothing is held any more


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"pid": 1}'])
def test_a_lock_file_that_makes_no_sense_is_judged_by_its_age(content, tmp_path):
    file = a_lock(tmp_path).file
    file.write_bytes(content)
    one, told, taken_over = acquire(tmp_path, stale=0.3)
    assert told
    assert taken_over is not None
    one.release()


def test_a_file_system_without_links_is_enough(tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError("no links here")

    monkeypatch.setattr(lock_module.os, "link", refuse)
    one, *_ = acquire(tmp_path)
    with pytest.raises(TrainingStateError, match="in use"):
        acquire(tmp_path)
    one.release()
    assert not os.listdir(tmp_path)


def test_the_lock_of_a_file_lies_beside_it(tmp_path):
    first = RunLock(tmp_path / "best.pt", is_folder=False)
    first.acquire(print)
    other = RunLock(tmp_path / "other.pt", is_folder=False)
    other.acquire(print)
    with pytest.raises(TrainingStateError, match=r"best\.pt is in use"):
        RunLock(tmp_path / "best.pt", is_folder=False).acquire(print)
    first.release()
    other.release()
    assert not os.listdir(tmp_path)
