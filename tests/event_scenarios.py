"""Small runs, and every event and method of the Trainer that they call, in order.

`python -m tests.event_scenarios` writes `tests/event_order.txt`, the golden file, again. Read the
difference: it is a change of the contract with plugins.
"""

from __future__ import annotations

import contextlib
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from pa_core import Trainer, TrainerCallback
from pa_core.hookspecs import hookimpl
from pa_core.plugins.explain import loop_rows
from pa_core.plugins.manager import PluginManager
from tests.helpers import tiny_data, tiny_model

GOLDEN = Path(__file__).parent / "event_order.txt"
METHODS = [row.method for row in loop_rows() if row.method]
EVENTS = [name for name in PluginManager().hooks if name.startswith("on_")]


class Recorded(Trainer):
    """Notes each method that a subclass may override, as it is called."""

    log: list[str]


def _noting_method(name: str) -> Callable[..., Any]:
    def call(self: Recorded, *args: Any, **kwargs: Any) -> Any:
        self.log.append(f"{name}()")
        return getattr(Trainer, name)(self, *args, **kwargs)

    return call


for _name in METHODS:
    setattr(Recorded, _name, _noting_method(_name))


class Notes(TrainerCallback):
    """Notes each event as it fires, after the other plugins, and what is special about it."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def note(self, name: str, trainer: Trainer, arguments: dict[str, Any]) -> None:
        marks = []
        if name.startswith(("on_train_step", "on_backward")):
            marks += ["padding"] * trainer.is_padding_batch
        marks += ["resuming"] * trainer.is_resuming
        marks += ["intermediate"] * bool(arguments.get("is_intermediate"))
        marks += [str(arguments["reason"])] if "reason" in arguments else []
        self.log.append(f"{name}({','.join(marks)})" if marks else name)


def _noting_event(name: str) -> Callable[..., None]:
    def call(self: Notes, trainer: Trainer, **arguments: Any) -> None:
        self.note(name, trainer, arguments)

    return hookimpl(trylast=True)(call)


for _name in EVENTS:
    setattr(Notes, _name, _noting_event(_name))


def new_trainer(*plugins: Any, accelerator: Any = None) -> Recorded:
    """A trainer that notes its calls in ``trainer.log``."""
    log: list[str] = []
    trainer = Recorded.__new__(Recorded)
    trainer.log = log
    model = tiny_model()
    Trainer.__init__(
        trainer,
        model,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[*plugins, Notes(log)],
        plugins=(),
        accelerator=accelerator,
    )
    log.clear()
    return trainer


def train(trainer: Recorded, samples: int = 12, epochs: int = 1, **options: Any) -> list[str]:
    """Three micro-batches an epoch, of which two make an update, and an evaluation batch."""
    given: dict[str, Any] = {
        "eval_dataset": tiny_data(4),
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "create_scheduler_fn": torch.optim.lr_scheduler.ConstantLR,
    }
    trainer.train(tiny_data(samples), epochs, **(given | options))
    return trainer.log


class Does(TrainerCallback):
    """Does something in an event of the first accumulated batch."""

    def __init__(self, event: str, action: Callable[[Trainer], None]) -> None:
        def call(trainer: Trainer, **arguments: Any) -> None:
            if trainer.position.attempts == 0 or "epoch" in event or "run" in event:
                action(trainer)

        setattr(self, event, call)


def accumulation() -> list[str]:
    return train(new_trainer(), epochs=2)


def skipped_update() -> list[str]:
    return train(new_trainer(Does("on_backward_end", lambda t: t.control.skip_update())))


def skipped_in_the_last_moment() -> list[str]:
    return train(new_trainer(Does("on_optimizer_step_start", lambda t: t.control.skip_update("x"))))


def overflow() -> list[str]:
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"

    def overflow(trainer: Trainer) -> None:
        next(trainer.get_model().parameters()).grad.fill_(float("inf"))

    return train(new_trainer(Does("on_backward_end", overflow), accelerator=accelerator))


def evaluation_inside_an_epoch() -> list[str]:
    return train(new_trainer(Does("on_train_step_end", lambda t: t.control.evaluate())))


def evaluation_outside_a_run() -> list[str]:
    trainer = new_trainer()
    trainer.evaluate(tiny_data(4))
    return trainer.log


def stop() -> list[str]:
    return train(new_trainer(Does("on_train_step_end", lambda t: t.control.stop("enough"))))


def _fail(trainer: Trainer) -> None:
    raise ValueError("broken")


def exception() -> list[str]:
    trainer = new_trainer(Does("on_train_step_end", _fail))
    with contextlib.suppress(ValueError):
        train(trainer)
    return trainer.log


def saving() -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        save = Does("on_train_step_end", lambda t: t.control.save(Path(folder, "state")))
        return train(new_trainer(save))


def _resumed(event: str) -> list[str]:
    """A run of two epochs, resumed from a state that an event of the first has requested."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder, "state")

        def save(trainer: Trainer) -> None:
            if trainer.run_history.current_epoch == 1:
                trainer.control.save(state)

        train(new_trainer(Does(event, save)), epochs=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the plugin that saves isn't enabled any more
            return train(new_trainer(), epochs=2, resume_from=state)


def resumed_within_the_training_part() -> list[str]:
    return _resumed("on_train_step_end")


def resumed_before_the_evaluation() -> list[str]:
    return _resumed("on_train_epoch_end")


def resumed_between_epochs() -> list[str]:
    return _resumed("on_training_run_epoch_end")


def padding_batch() -> list[str]:
    """On two processes: the last global batch has one sample, so rank 1 pads."""
    trainer = new_trainer(accelerator={"cpu": True})
    return train(trainer, samples=5, per_device_batch_size=2, gradient_accumulation_steps=1)


SCENARIOS = (
    *(accumulation, skipped_update, skipped_in_the_last_moment, overflow),
    *(evaluation_inside_an_epoch, evaluation_outside_a_run, stop, exception, saving),
    *(resumed_within_the_training_part, resumed_before_the_evaluation, resumed_between_epochs),
)


def as_text(calls: list[str]) -> str:
    """Calls as lines of the golden file."""
    return textwrap.fill(" ".join(calls), 100, break_long_words=False, break_on_hyphens=False)


def golden() -> dict[str, str]:
    """The sections of the golden file by title."""
    sections = GOLDEN.read_text().strip().split("\n\n")
    return {title.strip("# "): text for title, _, text in (s.partition("\n") for s in sections)}


def title_of(scenario: Callable[[], list[str]]) -> str:
    return scenario.__name__.replace("_", " ")


def _sections() -> Iterator[tuple[str, str]]:
    for scenario in SCENARIOS:
        yield title_of(scenario), as_text(scenario())


if __name__ == "__main__":
    kept = {title: text for title, text in golden().items() if title.startswith("padding")}
    sections = dict(_sections()) | kept
    GOLDEN.write_text("\n\n".join(f"# {title}\n{text}" for title, text in sections.items()) + "\n")
