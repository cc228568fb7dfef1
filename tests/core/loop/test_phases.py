"""Wrapping the phases of a run: each is called through the wrapper, and restored afterwards."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pa_core import hookimpl
from tests.builtin_trainer import Interrupts, make_trainer
from tests.helpers import assert_identical, tiny_data, weights_of


class Counts:
    """Counts the calls of each phase, and the phases that are open when it is called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.ends = 0
        self.within: set[tuple[str, ...]] = set()
        self._open: list[str] = []

    @hookimpl(wrapper=True)
    def run_training(self, trainer):
        with trainer.wrap_phases(self.around):
            return (yield)

    def around(self, phase, call):
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._open.append(phase)
            self.within.add(tuple(self._open))
            try:
                result = call(*args, **kwargs)
            except StopIteration:
                self.ends += 1
                raise
            finally:
                self._open.pop()
            self.calls[phase] += 1
            return result

        return counted


def test_each_phase_is_called_through_the_wrapper():
    counts = Counts()
    trainer = make_trainer(plugins=[counts])
    trainer.train(
        tiny_data(44),
        2,
        eval_dataset={"a": tiny_data(12), "b": tiny_data(12)},
        gradient_accumulation_steps=2,
        gradient_clip_norm=1.0,
    )
    assert counts.calls["data"] == counts.calls["forward"] == counts.calls["backward"] == 12
    assert counts.ends <= 2
    assert counts.calls["loop"] == 2
    assert counts.calls["evaluation"] == 2
    assert counts.calls["optimizer"] >= 6
    assert {("loop", "data"), ("loop", "forward"), ("loop", "optimizer")} <= counts.within
    assert ("evaluation",) in counts.within
    assert not [phases for phases in counts.within if phases[-2:] == ("evaluation", "data")]


def test_the_end_of_data_of_unknown_length_reaches_the_wrapper():
    counts = Counts()
    make_trainer(plugins=[counts]).train(iter_twice(), 1)
    assert (counts.calls["data"], counts.ends) == (2, 1)


def iter_twice() -> Any:
    class Loader:
        def __iter__(self):
            inputs, targets = tiny_data(8).tensors
            yield from [(inputs, targets), (inputs, targets)]

    return Loader()


def test_saving_is_a_phase(tmp_path):
    counts = Counts()
    trainer = make_trainer(plugins=[counts])
    trainer.plugins.register(Saves(tmp_path))
    trainer.train(tiny_data(16), 1)
    assert counts.calls["saving"] >= 2
    assert (tmp_path / "state").is_dir()
    assert (tmp_path / "model.pt").is_file()


class Saves:
    def __init__(self, folder) -> None:
        self.folder = folder

    @hookimpl
    def on_train_epoch_end(self, trainer):
        trainer.save_checkpoint(self.folder / "model.pt")
        trainer.save_training_state(self.folder / "state")


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_everything_is_as_before(fails):
    trainers = [make_trainer(), make_trainer(plugins=[Counts()])]
    for trainer in trainers:
        if fails:
            trainer.plugins.register(Interrupts(2))
            with pytest.raises(KeyboardInterrupt):
                trainer.train(tiny_data(44), 1)
        else:
            trainer.train(tiny_data(44), 1)
    assert_identical(*map(weights_of, trainers))
    assert vars(trainers[1]).keys() == vars(trainers[0]).keys()
    assert "moved" not in vars(trainers[1]._engine)


def test_wrappers_may_be_nested_and_keep_what_was_set_on_the_trainer():
    trainer, outer, inner = make_trainer(), Counts(), Counts()
    step = trainer.optimizer_step
    trainer.optimizer_step = step
    with trainer.wrap_phases(outer.around):
        with trainer.wrap_phases(inner.around):
            trainer.train(tiny_data(16), 1)
        trainer.train(tiny_data(16), 1)
    assert trainer.optimizer_step is step
    assert outer.calls["forward"] == 4
    assert inner.calls["forward"] == 2
