"""An engine that takes no part in collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pa_core.engine.base import Engine

if TYPE_CHECKING:
    from torch import nn


class LocalEngine(Engine):
    """An engine for this process alone: it reduces nothing and needs no other process.

    Args:
        engine: the engine of all processes; it prepares the model.

    Raises:
        ValueError: if that engine may shard the model.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.sharded_by is not None:
            raise ValueError(
                f"A process can't train alone: {engine.sharded_by} shards the model between "
                "processes"
            )
        vars(self).update(vars(engine))
        self._of_all = engine
        self.num_processes, self.rank, self._follows_parameters = 1, 0, False

    def prepare(self, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
        """Place model and optimizer, without `DistributedDataParallel`.

        The first time this needs all processes.
        """
        model, optimizer = self._of_all.prepare(model, optimizer)
        return self.unwrap(model), optimizer
