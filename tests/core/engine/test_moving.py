"""Batches are moved by the engine's own method, on a CPU too."""

from __future__ import annotations

from accelerate import Accelerator

from pa_core.engine.base import Engine


def test_an_engine_that_converts_batches_does_so_on_a_cpu():
    class Doubles(Engine):
        def move(self, batch):
            return batch * 2

    accelerator = Accelerator(cpu=True)
    assert list(Doubles(accelerator).moved(iter([1, 2]))) == [2, 4]
    assert list(Engine(accelerator).moved(iter([1, 2]))) == [1, 2]
