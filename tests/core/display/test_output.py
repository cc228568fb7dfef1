"""A run continues if its output can't be written."""

from __future__ import annotations

import io
import os
import sys
import warnings

import pytest

from pa_core.callbacks import (
    ProgressBarCallback,
    ProgressTableCallback,
    SaveBestModelCallback,
)
from pa_core.display.streams import print_line
from pa_core.testing import tiny_data, tiny_trainer


def _closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


class _Gone(io.TextIOBase):
    """A stream whose disk or terminal is gone."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


STREAMS = {"none": lambda: None, "closed": _closed, "gone": _Gone}


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_run_goes_on_without_a_stream(name, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, name, STREAMS[kind]())
    best = SaveBestModelCallback(tmp_path / "best.pt", "train_loss_epoch")
    bars = ProgressBarCallback(interval=0.001), ProgressTableCallback(interval=0.001)
    trainer = tiny_trainer(*bars, best)
    trainer.train(tiny_data(32), 2, per_device_batch_size=2)
    assert trainer.updates == 32
    assert (tmp_path / "best.pt").is_file()


def test_the_rest_of_a_broken_pipe_goes_nowhere(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print_line("first", flush=True)
        print_line("second", flush=True)
        stream.flush()  # as Python does at exit


def test_characters_that_the_encoding_lacks_are_replaced(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    print_line("5 × faster", 1, sep="|")
    stream.flush()
    assert stream.buffer.getvalue() == b"5 ? faster|1\n"


def test_print_takes_the_arguments_of_print(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        print_line("a", "b", sep="-", end="!")
    assert capsys.readouterr().out == "a-b!"
