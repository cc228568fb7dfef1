"""Checks of arguments: an error says what is wrong and what would be right."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    ParamSpec,
    SupportsFloat,
    SupportsIndex,
    TypeAlias,
)

from accelerate import Accelerator
from torch import nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pa_core.control import TrainerControl
from pa_core.durations import Duration
from pa_core.engine.optimizers import (
    given_optimizers,
    given_schedulers,
    is_scheduler,
    unwrapped,
)
from pa_core.errors import listed, shown
from pa_core.tracking import Position

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

    from pa_core.settings.table import Settings
    from pa_core.trainer import Trainer

P = ParamSpec("P")
SchedulerSource: TypeAlias = "Callable[[Any], Any] | LRScheduler | str | None"
_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def check_model_and_optimizer(
    model: nn.Module | None,
    optimizer: Any,
    loss_func: Any = None,
    *,
    needs_optimizer: bool = False,
) -> None:
    """Check that the optimizer updates parameters of the model, or of the loss function.

    Without parameters, a model can be evaluated, but not trained.

    Raises:
        ValueError: if the optimizer holds other parameters, or training needs parameters or an
            optimizer and there are none.
    """
    if model is None and needs_optimizer:
        raise ValueError("The Trainer was given None as model: assign trainer.model")
    if optimizer is None and needs_optimizer:
        raise ValueError(
            "Training needs an optimizer: give the Trainer one, a function that makes one such as "
            "functools.partial(torch.optim.AdamW, lr=1e-3), or enable a plugin that creates it"
        )
    named = () if model is None else model.named_parameters()
    parameters = {id(parameter): name for name, parameter in named}
    if not parameters and not needs_optimizer:
        return
    if not parameters:
        raise ValueError(f"The model {type(model).__name__} has no parameters to train")
    if isinstance(loss_func, nn.Module):
        own = {id(p): f"loss_func.{name}" for name, p in loss_func.named_parameters()}
        parameters = own | parameters
    groups = getattr(optimizer, "param_groups", None)
    if groups is None or getattr(optimizer, "is_flat", False):
        return
    check_disjoint(given_optimizers(optimizer), parameters)
    foreign = sum(id(p) not in parameters for group in groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"The optimizer holds {foreign} parameters that aren't in the model. Create it from "
            f"the parameters of {type(model).__name__}: {type(optimizer).__name__}"
            "(model.parameters(), …). Parameters of a loss may be those of the loss_func, if that "
            "is a module, or of one module with the model"
        )


def check_model(model: Any) -> None:
    """Check that this is a model, and not its class or a function.

    Raises:
        TypeError: saying what to pass.
    """
    if isinstance(model, type):
        raise TypeError(f"model is the class {model.__name__}; pass an instance: {_call_of(model)}")
    if model is not None and not hasattr(model, "named_parameters"):
        raise TypeError(
            f"model is {shown(model)}; pass an nn.Module, or the name of a model that a plugin "
            "registers"
        )


def check_loss_func(loss_func: Any) -> None:
    """Check that a loss function can be called with outputs and targets; None is left to plugins.

    Raises:
        TypeError: saying what to pass.
    """
    if isinstance(loss_func, type) and issubclass(loss_func, nn.Module):
        raise TypeError(
            f"loss_func is the class {loss_func.__name__}; pass an instance: {_call_of(loss_func)}"
        )
    if hasattr(loss_func, "param_groups"):
        raise TypeError(
            f"loss_func is {shown(loss_func)}: the order is Trainer(model, loss_func, optimizer)"
        )
    if loss_func is not None and not callable(loss_func):
        raise TypeError(
            f"loss_func is {shown(loss_func)}; pass a function of the model's outputs and the "
            "targets that returns their mean loss, such as nn.CrossEntropyLoss()"
        )


def check_run_history(run_history: Any) -> None:
    """Check that this is a run history, and not its class.

    Raises:
        TypeError: saying what to pass.
    """
    if isinstance(run_history, type) or not hasattr(run_history, "update_metric"):
        raise TypeError(
            f"run_history is {shown(run_history)}; pass an instance of a RunHistory, such as "
            "InMemoryRunHistory()"
        )


def seed_of(settings: Settings, given: int | None) -> int:
    """The seed of a Trainer.

    Args:
        settings: those of the run.
        given: the argument of the Trainer.

    Raises:
        TypeError: if it isn't an integer.
    """
    seed = settings.argument("trainer", "seed", given)
    if seed is None:
        return 42
    if not isinstance(seed, SupportsIndex) or isinstance(seed, bool):
        raise TypeError(
            f"seed must be an integer, not {shown(seed)}: every random choice is a function of it"
        )
    return int(seed)


def check_optimizer(optimizer: Any, origin: str) -> None:
    """Check that this is an optimizer, or None.

    Args:
        optimizer: one optimizer, or several as one.
        origin: the start of the error's sentence, such as ``"create_optimizer returned"``.

    Raises:
        TypeError: saying what to pass.
    """
    if optimizer is not None and (
        isinstance(optimizer, type)
        or not hasattr(optimizer, "param_groups")
        or not hasattr(optimizer, "step")
    ):
        raise TypeError(
            f"{origin} {shown(optimizer)}; expected an optimizer of the model's parameters, such "
            "as torch.optim.AdamW(model.parameters(), lr=1e-3), or a list of optimizers"
        )


def check_scheduler(
    scheduler: Any, optimizers: Sequence[Any], origin: str, *, is_adapted: bool = False
) -> None:
    """Check that this is a learning-rate scheduler of the Trainer's optimizers, or None.

    Args:
        scheduler: one scheduler, or several as one.
        optimizers: the Trainer's.
        origin: the start of the error's sentence, such as ``"create_scheduler returned"``.
        is_adapted: whether a wrapper may still adapt one of another interface.

    Raises:
        TypeError: if it has no method ``step``.
        ValueError: if it was created with another optimizer.
    """
    if scheduler is None:
        return
    can_step = callable(getattr(scheduler, "step", None))
    if isinstance(scheduler, type) or not (
        can_step or (is_adapted and hasattr(scheduler, "optimizer"))
    ):
        raise TypeError(
            f"{origin} {shown(scheduler)}; expected a learning-rate scheduler, which has a method "
            "step(), or None"
        )
    for one in given_schedulers(scheduler):
        own = given_optimizers(getattr(one, "optimizer", None))
        foreign = [
            its
            for its in own
            if hasattr(its, "param_groups") and not any(its is each for each in optimizers)
        ]
        if foreign:
            raise ValueError(
                f"{origin} {shown(one)} of another {type(foreign[0]).__name__} than the "
                f"Trainer's {' and '.join(type(each).__name__ for each in optimizers)}, which "
                "would change nothing: create it with trainer.optimizer"
            )


def _call_of(kind: type) -> str:
    """A call of a class, for a message: with ``…`` where it needs arguments."""
    try:
        inspect.signature(kind).bind()
    except (TypeError, ValueError):
        return f"{kind.__name__}(…)"
    return f"{kind.__name__}()"


def check_own_attributes(trainer: Trainer) -> None:
    """Check that a subclass or a plugin hasn't replaced attributes that the loop needs.

    Raises:
        TypeError: naming the attribute.
    """
    for name, kind in (("control", TrainerControl), ("position", Position)):
        value = getattr(trainer, name)
        if not isinstance(value, kind):
            raise TypeError(
                f"{type(trainer).__name__}.{name} was replaced by a {type(value).__name__}, but it "
                f"belongs to the Trainer: the {kind.__name__} of its runs. Give your own attribute "
                "another name"
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
        TypeError: if this neither is a scheduler nor creates one.
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
    if not (source is None or is_scheduler(source) or callable(source) or isinstance(source, str)):
        raise TypeError(
            f"create_scheduler_fn is {shown(source)}; pass a function of the optimizer, the name "
            "of a scheduler that a plugin registers, or a scheduler of the Trainer's optimizer"
        )
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
        try:
            Duration.parse(self.num_epochs)
        except ValueError as error:
            raise ValueError(f"num_epochs: {error}") from None
        for name in ("per_device_batch_size", "gradient_accumulation_steps", "max_num_train_steps"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, SupportsIndex) or int(number) < 1):
                raise ValueError(f"{name} must be a positive integer, not {number!r}")
        for name in ("train_dataloader_kwargs", "eval_dataloader_kwargs"):
            check_kwargs(name, getattr(self, name))
        for name in ("gradient_clip_value", "gradient_clip_norm"):
            bound = getattr(self, name)
            is_number = isinstance(bound, SupportsFloat) and not isinstance(bound, bool | str)
            if bound is not None and not (is_number and bound > 0):
                raise ValueError(f"{name} must be a positive number, not {bound!r}")
        if self.gradient_clip_value is not None and self.gradient_clip_norm is not None:
            raise ValueError("Clip by gradient_clip_value or by gradient_clip_norm, not by both")


def check_kwargs(name: str, kwargs: Any) -> None:
    """Check that the arguments of a `DataLoader` are a dict, or None.

    Raises:
        TypeError: naming the argument.
    """
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"{name} is {shown(kwargs)}; it must be a dict of arguments of the DataLoader, such as "
            '{"num_workers": 4}'
        )


def check_collate(collate_fn: Any) -> None:
    """Check that a collate function can be called; None is torch's.

    Raises:
        TypeError: if it can't.
    """
    if collate_fn is not None and not callable(collate_fn):
        raise TypeError(
            f"collate_fn is {shown(collate_fn)}; it must be a function from a list of samples to a "
            "batch"
        )


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


def accelerator_arguments(
    settings: Settings,
    mixed_precision: str | None,
    accelerator: Accelerator | Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The arguments to create a Trainer's accelerator with; none if one was given.

    Args:
        settings: those of the run, which may have the mixed precision.
        mixed_precision: the argument of the Trainer.
        accelerator: an Accelerator, whose precision counts as given in code, or arguments.

    Raises:
        TypeError: if `accelerator` is something else.
        ValueError: if an Accelerator was given whose precision is another one.
    """
    if accelerator is not None and not isinstance(accelerator, Accelerator | Mapping):
        raise TypeError(
            f"accelerator is {shown(accelerator)}; pass an Accelerator, or a dict of its arguments"
        )
    if not isinstance(accelerator, Accelerator):
        kwargs = dict(accelerator or {})
        given = mixed_precision or kwargs.get("mixed_precision")
        precision = settings.argument("trainer", "mixed_precision", given)
        return kwargs if precision is None else kwargs | {"mixed_precision": precision}
    own = str(accelerator.mixed_precision)
    precision = settings.argument("trainer", "mixed_precision", mixed_precision or own)
    if precision != own:
        raise ValueError(
            f"mixed_precision is {precision!r}, but the given Accelerator has {own!r}: create it "
            f"with mixed_precision={precision!r}"
        )
    return {}


def check_predict_arguments(dataloader_kwargs: Mapping[str, Any] | None) -> None:
    """Check that every sample is predicted, in the dataset's order.

    Raises:
        ValueError: naming the argument that would prevent it.
    """
    check_kwargs("dataloader_kwargs", dataloader_kwargs)
    for name in ("shuffle", "drop_last", "sampler", "batch_sampler"):
        if (dataloader_kwargs or {}).get(name):
            raise ValueError(
                f"predict() returns outputs for every sample in the dataset's order: remove {name}"
            )


def check_predict_loader(loader: Any, dataset: Any) -> None:
    """Check that a loader which the Trainer made has every sample, in the dataset's order.

    A subclass may have changed the defaults. A ready loader has the order that the user gave it,
    and that of another sampler can't be known.

    Raises:
        ValueError: if the loader shuffles or drops samples.
    """
    if loader is dataset or not isinstance(loader, DataLoader):
        return
    batches = loader.batch_sampler
    order = batches if hasattr(batches, "shuffle") else loader.sampler
    shuffles = isinstance(order, _SHUFFLING) or getattr(order, "shuffle", False) is True
    if shuffles or _drops_samples(loader):
        option, what = ("shuffle", "shuffles") if shuffles else ("drop_last", "drops")
        raise ValueError(
            "predict() returns outputs for every sample in the dataset's order, but the evaluation "
            f"loader that the Trainer's methods or plugins create {what} samples: remove {option} "
            "there, or pass a ready loader to predict()"
        )


def _drops_samples(loader: DataLoader[Any]) -> bool:
    batches: Any = loader.batch_sampler
    if getattr(batches, "drop_last", False) is not True:
        return False
    size = getattr(batches, "global_batch_size", None) or getattr(batches, "batch_size", None)
    try:
        return size is None or len(loader.dataset) % size != 0  # type: ignore[arg-type]
    except TypeError:  # a stream has no length
        return True
