"""Print the modules of the model and their sizes."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from pa_core.checkpoint.listing import readable_size
from pa_core.engine.wrappers import named_modules
from pa_core.plugin import CallbackSettings, ConfigurableCallback

if TYPE_CHECKING:
    from torch import nn

    from pa_core.trainer import Trainer


class ModelSummarySettings(CallbackSettings):
    """Settings of the built-in plugin `model_summary`."""

    depth: int = Field(
        1, ge=0, description="Levels of modules to show; 0 shows only the whole model."
    )


class ModelSummaryCallback(ConfigurableCallback):
    """Prints parameters, trainable parameters and size of each module when the trainer is built.

    Args:
        depth: how many levels of modules to show; 0 shows only the whole model.
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
                row["module"] or "whole model", row["class"], *numbers, readable_size(row["bytes"])
            )
        out = io.StringIO()
        Console(file=out, width=100, markup=False, highlight=False).print(table)
        trainer.print(f"\n{out.getvalue().rstrip()}")


def summary(model: nn.Module, depth: int) -> list[dict[str, Any]]:
    """A row for the whole model, then one for each module down to `depth`, submodules included.

    Args:
        model: the model.
        depth: how many levels of modules; 0 for only the whole model.

    Returns:
        ``module`` (its name), ``class``, ``parameters`` and ``trainable`` (numbers of elements;
        shared parameters are counted once per row) and ``bytes`` (of parameters and buffers).
    """
    rows = []
    for name, module in named_modules(model):
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
