"""Move the modules that the trainer and its plugins hold to the device of the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from pa_core.plugin import ConfigurableCallback

if TYPE_CHECKING:
    from pa_core.trainer import Trainer

# Not searched: datasets may be long lists, and have no modules.
_DATA = {"train_dataset", "eval_dataset", "_data"}


class MoveModulesToDeviceCallback(ConfigurableCallback):
    """Moves every module except the model to the trainer's device when a run starts.

    It finds modules, such as loss functions with weights, metrics and teacher models, in the
    attributes of the trainer and of its plugins, and in lists, tuples, sets and dictionaries there.
    Properties aren't evaluated. The model and its submodules are left to accelerate.
    """

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self._move_modules_to_device(trainer)

    def on_evaluation_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        self._move_modules_to_device(trainer)

    def _move_modules_to_device(self, trainer: Trainer) -> None:
        for module in self._get_modules(trainer):
            module.to(trainer.device)

    def _get_modules(self, trainer: Trainer) -> list[nn.Module]:
        # Submodules of the model are skipped even as attributes: an engine may have sharded them.
        model = trainer.model
        seen = {id(each) for each in model.modules()} if isinstance(model, nn.Module) else set()
        attributes = [value for name, value in vars(trainer).items() if name not in _DATA]
        plugins = [
            plugin if isinstance(plugin, nn.Module) else getattr(plugin, "__dict__", None)
            for plugin in trainer.plugins.by_name.values()
        ]
        return list(_find_modules([attributes, plugins], seen))


def _find_modules(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules in nested containers, each once; without those whose ids are in `seen`."""
    if not isinstance(value, nn.Module | dict | list | tuple | set | frozenset):
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        return
    for item in value.values() if isinstance(value, dict) else value:
        yield from _find_modules(item, seen)
