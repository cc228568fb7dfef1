"""What a report says about a run beyond its manifest: sizes, command line, platform."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.plugin import is_loader, mask_secrets

if TYPE_CHECKING:
    from pa_core import Trainer


def facts_of(trainer: Trainer) -> dict[str, Any]:
    """Parameters, samples for evaluation, command line, settings file and platform of a run.

    What isn't known is left out, such as the parameters of a model sharded over processes.
    """
    file = trainer.settings.file
    facts = {
        **_parameters(trainer),
        "eval_samples": _eval_samples(trainer.eval_dataset),
        "command": trainer.settings.masked(command_line(sys.orig_argv), trainer.plugins.by_name),
        "settings_file": None if file is None else file.name,
        "platform": platform.system(),
    }
    return {name: value for name, value in facts.items() if value}


def command_line(arguments: list[str]) -> str:
    """The command that runs a script, without folders of programs and with secrets masked.

    >>> command_line(["/usr/bin/python", "train.py", "--token", "abc", "--lr", "0.1"])
    'python train.py --token ********** --lr 0.1'
    """
    if any("ipykernel" in argument for argument in arguments):
        return "a notebook"
    shown = [Path(arguments[0]).name, *arguments[1:]] if arguments else []
    if len(shown) > 1 and Path(shown[1]).parent.name in ("bin", "Scripts"):
        shown = [Path(shown[1]).name, *shown[2:]]  # an installed command, such as `pa`
    return shlex.join(mask_secrets(shown)).replace("'**********'", "**********")


def _parameters(trainer: Trainer) -> dict[str, int]:
    if trainer.sharded_by is not None:
        return {}
    parameters = list(trainer.get_model().parameters())
    try:
        return {
            "parameters": sum(one.numel() for one in parameters),
            "trainable_parameters": sum(one.numel() for one in parameters if one.requires_grad),
        }
    except ValueError:  # a lazy parameter that has no shape yet
        return {}


def _eval_samples(datasets: Any) -> dict[str, int | None]:
    """The number of samples of each evaluation set by its name; empty for the only one."""
    if datasets is None:
        return {}
    named = datasets if isinstance(datasets, Mapping) else {"": datasets}
    return {str(name): _length(dataset) for name, dataset in named.items()}


def _length(dataset: Any) -> int | None:
    try:
        if is_loader(dataset):
            dataset = dataset.dataset
        return len(dataset)
    except (AttributeError, NotImplementedError, TypeError):
        return None
