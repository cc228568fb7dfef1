"""Checks of arguments and batch outputs: an error says what is wrong and what would be right."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, SupportsIndex, TypeAlias

from accelerate import Accelerator
from torch import Tensor, nn

from pa_core.control import UpdateResult
from pa_core.durations import Duration
from pa_core.engine.optimizers import given_optimizers, is_scheduler, unwrapped
from pa_core.errors import listed

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from pa_core.plugins.manager import PluginManager
    from pa_core.settings.table import Settings
    from pa_core.trainer import Trainer

P = ParamSpec("P")
SchedulerSource: TypeAlias = "Callable[[Any], Any] | LRScheduler | str | None"
_REQUIRED = ("loss", "model_outputs", "batch_size")
_KEYS = frozenset(_REQUIRED)


def check_model_and_optimizer(
    model: nn.Module, optimizer: Any, *, needs_optimizer: bool = False
) -> None:
    """Check that the optimizer updates parameters of the model.

    Raises:
        ValueError: if the model has no parameters, the optimizer holds others, or training needs
            an optimizer and there is none.
    """
    if optimizer is None and needs_optimizer:
        raise ValueError(
            "Training needs an optimizer: give the Trainer one, a function that makes one such as "
            "functools.partial(torch.optim.AdamW, lr=1e-3), or enable a plugin that creates it"
        )
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    if not parameters:
        raise ValueError(f"The model {type(model).__name__} has no parameters to train")
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or getattr(optimizer, "is_flat", False):
        return
    check_disjoint(given_optimizers(optimizer), parameters)
    foreign = sum(id(p) not in parameters for group in groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"The optimizer holds {foreign} parameters that aren't in the model. Create it from "
            f"the parameters of {type(model).__name__}: {type(optimizer).__name__}"
            "(model.parameters(), …). Put a loss that has parameters into one module with the "
            "model, so that its parameters are moved, reduced and saved too"
        )


def check_disjoint(optimizers: Sequence[Any], names: Mapping[int, str]) -> None:
    """Check that no parameter belongs to two optimizers, which would update it twice.

    Raises:
        ValueError: naming the optimizers and parameters.
    """
    owners: dict[int, int] = {}
    shared: dict[tuple[int, int], list[str]] = {}
    for number, optimizer in enumerate(optimizers if len(optimizers) > 1 else ()):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owner = owners.setdefault(id(parameter), number)
                if owner != number:
                    name = names.get(id(parameter), "?")
                    shared.setdefault((owner, number), []).append(name)
    for pair, found in shared.items():
        both = " and ".join(f"optimizer[{i}] ({type(optimizers[i]).__name__})" for i in pair)
        raise ValueError(f"{both} both hold {listed(found)}: give each its own parameters")


def check_scheduler_source(source: Any, optimizers: Sequence[Any]) -> None:
    """Check that the schedulers to create, or those that are given, fit the optimizers.

    Args:
        source: the argument ``create_scheduler_fn`` of `Trainer.train`.
        optimizers: the Trainer's.

    Raises:
        ValueError: if a list has another length, or a scheduler was created with another optimizer.
    """
    if isinstance(source, list | tuple):
        if len(source) != len(optimizers):
            raise ValueError(
                f"create_scheduler_fn has {len(source)} entries and the Trainer {len(optimizers)} "
                "optimizers: give one for each, or None for an optimizer without a scheduler"
            )
        for one, optimizer in zip(source, optimizers, strict=True):
            check_scheduler_source(one, [optimizer])
        return
    if not is_scheduler(source):
        return
    name, own = type(source).__name__, unwrapped(getattr(source, "optimizer", None))
    if own is None:
        raise ValueError(
            f"This {name} doesn't say which optimizer it was created with (it has no attribute "
            "optimizer): pass a function of the optimizer that creates it"
        )
    if not any(own is one for one in optimizers):
        raise ValueError(
            f"This {name} was created with another {type(own).__name__} than the Trainer's "
            f"{' and '.join(type(one).__name__ for one in optimizers)}, and would change nothing: "
            "create it with trainer.optimizers[0], or pass a function of the optimizer"
        )


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """How `Trainer.train` was asked to train; its docstring describes each.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """

    num_epochs: int | str | Duration
    per_device_batch_size: int
    gradient_accumulation_steps: int = 1
    max_num_train_steps: int | None = None
    gradient_clip_value: float | None = None
    gradient_clip_norm: float | None = None
    train_dataloader_kwargs: dict[str, Any] | None = None
    eval_dataloader_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        Duration.parse(self.num_epochs)
        for name in ("per_device_batch_size", "gradient_accumulation_steps", "max_num_train_steps"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, SupportsIndex) or int(number) < 1):
                raise ValueError(f"{name} must be a positive integer, not {number!r}")
        for name in ("gradient_clip_value", "gradient_clip_norm"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} must be a positive number, not {bound!r}")
        if self.gradient_clip_value is not None and self.gradient_clip_norm is not None:
            raise ValueError("Clip by gradient_clip_value or by gradient_clip_norm, not by both")


def settings_as_defaults(
    train: Callable[Concatenate[Trainer, P], None],
) -> Callable[Concatenate[Trainer, P], None]:
    """Take the arguments that code doesn't give from ``[tool.pa-core.train]``.

    What the environment sets overrides those that code gives, too.
    """
    names = list(inspect.signature(train).parameters)[1:]

    @wraps(train)
    def train_with_defaults(trainer: Trainer, /, *args: P.args, **kwargs: P.kwargs) -> None:
        table = trainer.settings.arguments.get("train", {})
        overrides = (trainer.settings.overrides or {}).get("train", {})
        positional, keywords = list(args), dict(kwargs)
        by_position = names[: len(positional)]
        for name, value in table.items():
            if name in by_position:
                if name in overrides:
                    positional[by_position.index(name)] = value
            elif name in overrides or name not in keywords:
                keywords[name] = value
        if table:
            given = dict(zip(names, positional, strict=False)) | keywords
            _check_with(given, trainer.settings)
        train(trainer, *positional, **keywords)  # type: ignore[arg-type]

    return train_with_defaults


def _check_with(given: Mapping[str, Any], settings: Settings) -> None:
    """Check arguments of which the settings give some, and name the settings in errors."""
    checked = {one.name: given[one.name] for one in fields(RunArguments) if one.name in given}
    try:
        RunArguments(**{"num_epochs": 1, "per_device_batch_size": 1, **checked})
    except ValueError as error:
        raise ValueError(
            f"{error}. {settings.place('train')} has {', '.join(settings.arguments['train'])}"
        ) from None


def check_length(num_epochs: int | str | Duration | None) -> int | str | Duration:
    """Check that the length of a run is given.

    Raises:
        TypeError: if it isn't.
    """
    if num_epochs is None:
        raise TypeError(
            "train() needs num_epochs: a number of epochs, or a duration such as '500 updates'. "
            "Or set num_epochs in [tool.pa-core.train]"
        )
    return num_epochs


def precision_of(
    settings: Settings, given: str | None, accelerator: Accelerator | Mapping[str, Any] | None
) -> str | None:
    """The mixed precision of a Trainer; None for accelerate's default.

    Args:
        settings: those of the run.
        given: the argument of the Trainer.
        accelerator: the Trainer's; its precision counts as given in code.

    Raises:
        ValueError: if an Accelerator was given whose precision is another one.
    """
    if isinstance(accelerator, Mapping):
        given = given or accelerator.get("mixed_precision")
    if not isinstance(accelerator, Accelerator):
        return settings.argument("trainer", "mixed_precision", given)
    own = str(accelerator.mixed_precision)
    precision = settings.argument("trainer", "mixed_precision", given or own)
    if precision != own:
        raise ValueError(
            f"mixed_precision is {precision!r}, but the given Accelerator has {own!r}: create it "
            f"with mixed_precision={precision!r}"
        )
    return None


def check_predict_arguments(dataloader_kwargs: Mapping[str, Any] | None) -> None:
    """Check that every sample is predicted, in the dataset's order.

    Raises:
        ValueError: naming the argument that would prevent it.
    """
    for name in ("shuffle", "drop_last", "sampler", "batch_sampler"):
        if (dataloader_kwargs or {}).get(name):
            raise ValueError(
                f"predict() returns outputs for every sample in the dataset's order: remove {name}"
            )


def check_batch_output(output: Any, method: str) -> Any:
    """Check that `method` returned what the loop needs.

    Returns:
        The output, with a loss of shape ``()`` in place of one with a single element.

    Raises:
        ValueError: naming the missing keys.
        TypeError: if it isn't a mapping, or its loss isn't a scalar tensor.
    """
    if (
        type(output) is dict
        and output.keys() >= _KEYS
        and isinstance(loss := output["loss"], Tensor)
        and loss.ndim == 0
    ):
        return output
    if not isinstance(output, Mapping):
        raise TypeError(
            f"{method} returned {'None' if output is None else type(output).__name__}, not a dict "
            f"with the keys {', '.join(_REQUIRED)}"
        )
    missing = [key for key in _REQUIRED if key not in output]
    if missing:
        raise ValueError(
            f"{method} returned a dict without {', '.join(missing)}; it has "
            f"{', '.join(map(str, output)) or 'no keys'} and needs {', '.join(_REQUIRED)}"
        )
    loss = check_loss(output["loss"], f"{method} returned")
    if loss is not output["loss"]:
        output = output if isinstance(output, MutableMapping) else dict(output)
        output["loss"] = loss
    return output


def check_loss(loss: Any, origin: str) -> Tensor:
    """Check that a loss is a scalar; one of shape ``(1,)`` becomes one of shape ``()``.

    Args:
        loss: the loss.
        origin: the start of the error's sentence, such as ``"My.method returned"``.

    Raises:
        TypeError: if it isn't a tensor with one element.
    """
    if isinstance(loss, Tensor) and loss.ndim == 0:
        return loss
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(())
    shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else None
    raise TypeError(
        f"{origin} {shape or type(loss).__name__} as the loss; it must be a scalar tensor "
        "(shape ()), such as the mean over the batch"
    )


def check_update(result: Any, plugins: PluginManager, *, is_applied: bool) -> None:
    """Check what the hook `run_update` did and returned.

    Raises:
        TypeError: if it isn't an `UpdateResult`.
        RuntimeError: if the update was neither made nor skipped by `Trainer.apply_update`.
    """
    if is_applied and isinstance(result, UpdateResult):
        return
    found = [one.name for one in plugins.implementations("run_update") if not one.is_default]
    hook = f"The hook run_update of {' or '.join(found)} returned"
    if not isinstance(result, UpdateResult):
        raise TypeError(
            f"{hook} {result!r}; a replacement or wrapper must return the UpdateResult of "
            "trainer.apply_update()"
        )
    raise RuntimeError(f"{hook} without calling trainer.apply_update()")
