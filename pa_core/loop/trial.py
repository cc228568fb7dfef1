"""A copy of a trainer for trial runs, which leave no trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import TYPE_CHECKING, Any

from pa_core.control import TrainerControl
from pa_core.diagnostics.preserve import preserved
from pa_core.engine.local import LocalEngine
from pa_core.loop.means import EpochMeans
from pa_core.loop.run_data import RunData
from pa_core.loop.run_scheduler import RunScheduler
from pa_core.plugins.callers import BoundHooks
from pa_core.tracking import InMemoryRunHistory, Position

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


@contextmanager
def trial(trainer: Trainer, plugins: Iterable[Any], *, data: Any, alone: bool) -> Iterator[Trainer]:
    """See `Trainer.trial`."""
    if trainer.sharded_by not in (None, "FSDP"):
        raise ValueError(
            f"Trial runs aren't supported under {trainer.sharded_by}, whose copies of the weights "
            "can't be restored"
        )
    probe = copy(trainer)
    if alone:
        probe._engine = LocalEngine(trainer._engine)
    # Before the parameters are copied, since FSDP replaces them; and on every process, since
    # wrapping a model the first time needs them all.
    probe.model, probe.optimizer = probe._engine.prepare(probe.model, probe.optimizer)
    probe.plugins = trainer.plugins.without_events()
    for plugin in plugins:
        probe.plugins.register(plugin)
    on_stop = probe._request_stop if probe.num_processes > 1 else None
    probe._hooks = BoundHooks(probe.plugins, on_stop)
    probe._callback_handler = probe._create_callback_handler()
    probe.print = _print_nothing  # type: ignore[method-assign]
    # What a run changes in place, or reads from the run before.
    probe.run_history, probe.control, probe.position = (
        InMemoryRunHistory(),
        TrainerControl(),
        Position(),
    )
    probe.scheduler, probe.eval_dataset, probe.eval_name = None, None, None
    probe._means, probe._data = EpochMeans(), RunData(probe)
    probe._run_scheduler = RunScheduler(probe)
    probe._save_metadata, probe._in_run = {}, False
    vars(probe).pop("_saver", None)  # it belongs to the trainer
    with preserved(trainer, data):
        yield probe


def _print_nothing(*args: Any, **kwargs: Any) -> None:
    """Print nothing."""
