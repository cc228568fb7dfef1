"""The schedulers of transformers' ``get_scheduler``: ``transformers/cosine_with_restarts``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from pa_core.errors import nearest
from pa_schedulers.adapters import FollowsMetric, SchedulerAdapter, StepsPerUpdate
from pa_schedulers.extras import import_library
from pa_schedulers.spec import SchedulerSpec, arguments_of, required

if TYPE_CHECKING:
    from pa_schedulers.param_groups import ParamGroupsProxy

PREFIX = "transformers/"
TRANSFORMERS_NAMES = tuple(
    PREFIX + name
    for name in (
        "linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt "
        "reduce_lr_on_plateau cosine_with_min_lr cosine_warmup_with_min_lr warmup_stable_decay "
        "greedy"
    ).split()
)
"""Those of transformers 5.23; earlier versions lack some, and building these raises an error."""

_NOT_OPTIONS = {"optimizer", "last_epoch", "num_warmup_steps", "num_training_steps"}
_LENGTHS = {"num_decay_steps", "num_stable_steps", "timescale"}


def build(optimizer: ParamGroupsProxy, spec: SchedulerSpec) -> SchedulerAdapter:
    """Build a transformers scheduler.

    The options are the arguments of its function; ``warmup`` is ``num_warmup_steps`` in any unit,
    and ``num_training_steps`` defaults to the run's length.

    Raises:
        ImportError: if transformers isn't installed.
        ValueError: for an unknown option, or if the run's length is needed but not known.
    """
    optimization = import_library("transformers.optimization", f"The scheduler {spec.name!r}")
    name, run, options = spec.name.removeprefix(PREFIX), spec.run, dict(spec.options)
    function = _scheduler_function(optimization, spec.name)
    takes = arguments_of(function, without=())
    if name in ("reduce_lr_on_plateau", "greedy"):
        scheduler_class = optimization.GreedyLR if name == "greedy" else ReduceLROnPlateau
        arguments = arguments_of(scheduler_class, without=_NOT_OPTIONS)
        spec.check_options(arguments, required(arguments))
        options.setdefault("mode", spec.mode)
        return FollowsMetric(function(optimizer, **options), spec.watch_metric)
    arguments = arguments_of(function, without=_NOT_OPTIONS)
    lengths = {
        "warmup": "num_warmup_steps" in takes,
        "num_training_steps": "num_training_steps" in takes,
    }
    needed = required(arguments)
    spec.check_options({*arguments, *(key for key, there in lengths.items() if there)}, needed)
    if lengths["warmup"]:
        options["num_warmup_steps"] = run.count(options.pop("warmup", 0))
    if lengths["num_training_steps"] and "num_stable_steps" not in options:
        given = options.get("num_training_steps")
        options["num_training_steps"] = run.total() if given is None else run.count(given)
    for key in _LENGTHS & options.keys():
        if options[key] is not None:
            options[key] = run.count(options[key])
    return StepsPerUpdate(function(optimizer, **options))


def _scheduler_function(optimization: Any, name: str) -> Any:
    """transformers' function that builds the scheduler."""
    functions = optimization.TYPE_TO_SCHEDULER_FUNCTION
    short = name.removeprefix(PREFIX)
    known = {str(getattr(key, "value", key)): function for key, function in functions.items()}
    if short not in known:
        hint = nearest(name, [PREFIX + other for other in known])
        raise ValueError(f"The installed transformers has no scheduler {name!r}.{hint}")
    return known[short]
