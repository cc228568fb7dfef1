"""The phases of a run, as calls that a plugin may time or watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

Around = Callable[[str, Callable[..., Any]], Callable[..., Any]]

_PHASES = {
    "calculate_train_batch_loss": "forward",
    "backward_step": "backward",
    "clip_gradients": "optimizer",
    "optimizer_step": "optimizer",
    "scheduler_step": "optimizer",
    "optimizer_zero_grad": "optimizer",
    "_run_eval_epochs": "evaluation",
    "save_checkpoint": "saving",
    "save_training_state": "saving",
    "_save_requested": "saving",
    "wait_for_saves": "saving",
    "_run_train_epoch": "loop",
}
"""The trainer's methods that are phases."""

_MISSING = object()


@contextmanager
def wrap_phases(trainer: Trainer, around: Around) -> Iterator[None]:
    """Replace each call that is a phase by ``around(phase, call)``, until the end of the block."""
    engine = trainer._engine
    kept: list[tuple[Any, str, Any]] = [
        (trainer, name, vars(trainer).get(name, _MISSING)) for name in _PHASES
    ]
    kept.append((engine, "moved", vars(engine).get("moved", _MISSING)))
    is_evaluating = False
    move = engine.moved

    def fetch(batches: Iterator[Any]) -> Iterator[Any]:
        """Fetch batches; those of an evaluation are part of that phase."""
        moved = iter(move(batches))
        return moved if is_evaluating else _calls(around("data", moved.__next__))

    def evaluate_apart(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal is_evaluating
            before, is_evaluating = is_evaluating, True
            try:
                return evaluate(*arguments, **keywords)
            finally:
                is_evaluating = before

        return call

    for name, phase in _PHASES.items():
        call = around(phase, getattr(trainer, name))
        setattr(trainer, name, evaluate_apart(call) if phase == "evaluation" else call)
    engine.moved = fetch  # type: ignore[method-assign]
    try:
        yield
    finally:
        for owner, name, value in kept:
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _calls(fetch: Callable[..., Any]) -> Iterator[Any]:
    """What the calls of a function return, until it raises `StopIteration`."""
    while True:
        try:
            batch = fetch()
        except StopIteration:
            return
        yield batch
