"""A model's modules, and how large they are."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from pa_core.builtins.base import BuiltinCallback, BuiltinSettings
from pa_core.checkpoint.listing import readable_size

if TYPE_CHECKING:
    from torch import nn

    from pa_core.trainer import Trainer


class ModelSummarySettings(BuiltinSettings):
    """Settings of the built-in plugin `model_summary`."""

    depth: int = Field(1, ge=0, description="How deep modules are shown; 0 shows the whole alone.")


class ModelSummaryCallback(BuiltinCallback):
    """Prints the model's modules as the trainer is built: parameters, trainable ones, and size.

    Args:
        depth: how deep modules are shown; with 0 only the whole model is.
    """

    Settings = ModelSummarySettings
    changes_training = False

    def __init__(self, depth: int = 1) -> None:
        self.depth = depth

    def on_init_end(self, trainer: Trainer, **kwargs: Any) -> None:
        rows = summary(trainer.get_model(), self.depth)
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("module", overflow="fold")
        table.add_column("class", overflow="fold")
        for column in ("parameters", "trainable", "frozen", "size"):
            table.add_column(column, justify="right")
        for row in rows:
            counts = (row["parameters"], row["trainable"], row["parameters"] - row["trainable"])
            numbers = [f"{count:,}" for count in counts]
            table.add_row(
                row["module"] or "the whole", row["class"], *numbers, readable_size(row["bytes"])
            )
        out = io.StringIO()
        Console(file=out, width=100, markup=False, highlight=False).print(table)
        trainer.print(f"\n{out.getvalue().rstrip()}")


def summary(model: nn.Module, depth: int) -> list[dict[str, Any]]:
    """A row for each module down to `depth`, with all that is below it; the whole model first.

    Args:
        model: the model.
        depth: 0 for the whole alone.

    Returns:
        ``module`` (its name), ``class``, ``parameters`` and ``trainable`` (their elements, shared
        ones counted once in each row) and ``bytes`` of parameters and buffers.
    """
    rows = []
    for name, module in model.named_modules():
        if name and name.count(".") >= depth:
            continue
        parameters, buffers = list(module.parameters()), list(module.buffers())
        rows.append(
            {
                "module": name,
                "class": type(module).__name__,
                "parameters": sum(one.numel() for one in parameters),
                "trainable": sum(one.numel() for one in parameters if one.requires_grad),
                "bytes": sum(one.numel() * one.element_size() for one in parameters + buffers),
            }
        )
    return rows
