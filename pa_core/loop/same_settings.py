"""The comparison of settings and arguments of all processes, which must train in the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pa_core.checkpoint.fingerprint import describe, describe_groups
from pa_core.engine.wrappers import clean_state_dict, uncompiled
from pa_core.errors import SettingsError
from pa_core.loop.waiting import expecting_all
from pa_core.settings.environment import added_items, left_out_names
from pa_core.settings.secrets import mask_secrets
from pa_core.settings.table import PLUGINS_VARIABLE, TABLE

if TYPE_CHECKING:
    from pa_core.trainer import Trainer


def check_same_settings(trainer: Trainer) -> None:
    """Check that all processes have the same settings, wherever they come from; a collective.

    A file that is another one on each machine, or a variable that a launcher doesn't pass on, would
    have each process train with its own settings.

    Raises:
        SettingsError: on every process, naming what differs, with secrets masked.
    """
    with expecting_all(trainer.rank, "build each Trainer"):
        problems = _differences(trainer._engine.gather_objects(_described(trainer)))
    if problems:
        advice = "Give every process the same settings file and environment variables"
        raise SettingsError([*problems, advice])


def check_same_arguments(trainer: Trainer, scheduler: Any) -> None:
    """Check that all processes train with the same arguments and optimizer; a collective.

    Otherwise they would wait for each other in vain, or their weights would drift apart.

    Args:
        trainer: the trainer, which has the other arguments.
        scheduler: what creates the learning-rate scheduler.

    Raises:
        ValueError: on every process, naming what differs.
    """
    arguments = trainer._arguments
    found = {name: value for name, value in vars(arguments).items() if not name.endswith("_kwargs")}
    for part in ("train", "eval"):
        given = getattr(arguments, f"{part}_dataloader_kwargs") or {}
        found |= {f"{part}_dataloader_kwargs[{one!r}]": given.get(one) for one in _OF_LOADERS}
    sources = scheduler if isinstance(scheduler, list | tuple) else [scheduler]
    found["create_scheduler_fn"] = [
        one if isinstance(one, str) else describe(one) for one in sources
    ]
    found["loss_func"] = _kind_of_loss(trainer.loss_func)
    for number, group in enumerate(describe_groups(trainer.optimizer)):
        found |= {f"{name} of the optimizer's group {number}": group[name] for name in group}
    shown = {name: (_digest(value), repr(value)) for name, value in found.items()}
    with expecting_all(trainer.rank, "call train()"):
        problems = _differences(trainer._engine.gather_objects(shown))
    if problems:
        raise ValueError(
            f"{'; '.join(problems)}. Call train() with the same arguments on every process, and "
            "give each the same loss and optimizer"
        )


_OF_LOADERS = ("batch_size", "shuffle", "drop_last")
"""Arguments of loaders that decide which samples are in a batch."""


def _kind_of_loss(loss_func: Any) -> Any:
    """A loss by its name, with the settings of one of PyTorch's.

    The attributes of any other may differ: a rank, a device, a count. So may the last bits of
    tensors, from one machine to another.
    """
    described, loss_func = describe(loss_func), uncompiled(loss_func)
    if not isinstance(described, dict) or "class" not in described:
        return described
    if not type(loss_func).__module__.startswith("torch.nn."):
        return described["class"]
    tensors = clean_state_dict(loss_func)
    return {name: value for name, value in described.items() if name not in tensors}


def _differences(everywhere: Sequence[Mapping[str, tuple[str, str]]]) -> list[str]:
    """What differs between processes, of what `_described` returned on each of them."""
    problems = []
    for name in dict.fromkeys(name for described in everywhere for name in described):
        values = [described.get(name, ("", "not set")) for described in everywhere]
        other = next((rank for rank, one in enumerate(values) if one[0] != values[0][0]), None)
        if other is not None:
            problems.append(
                f"{name} differs between processes: {values[0][1]} on rank 0 and "
                f"{values[other][1]} on rank {other}"
            )
    return problems


def _described(trainer: Trainer) -> dict[str, tuple[str, str]]:
    """The settings of this process by name: a digest of each, and what may be shown of it."""
    settings, plugins = trainer.settings, trainer.plugins.by_name
    found: dict[str, tuple[Any, Any]] = {
        f"[{TABLE}.{name}]": (table, settings.shown(name, plugins.get(name)))
        for name, table in settings.tables.items()
    }
    for name, table in settings.arguments.items():
        found[f"[{TABLE}.{name}]"] = table, mask_secrets(table)
    variable = [*added_items(), *(f"-{name}" for name in left_out_names())]
    for name, value in (
        (f"[{TABLE}] plugins", list(settings.plugins)),
        (f"[{TABLE}] disable", list(settings.disable)),
        (PLUGINS_VARIABLE, variable),
        ("the seed", trainer.seed),
        ("the mixed precision", trainer._accelerator.mixed_precision),
    ):
        found[name] = value, value
    return {name: (_digest(value), repr(shown)) for name, (value, shown) in found.items()}


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
