"""All schedules of transformers' ``get_scheduler``: ``transformers/cosine_with_restarts``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from pa_core.errors import nearest
from pa_schedulers.driven import DrivenSchedule, FollowsMetric, StepsPerUpdate
from pa_schedulers.options import Request, arguments_of, import_library, required

if TYPE_CHECKING:
    from pa_schedulers.groups import GroupsStand

PREFIX = "transformers/"
TRANSFORMERS_NAMES = tuple(
    PREFIX + name
    for name in (
        "linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt "
        "reduce_lr_on_plateau cosine_with_min_lr cosine_warmup_with_min_lr warmup_stable_decay "
        "greedy"
    ).split()
)
"""Those of transformers 5.23; earlier versions lack some, which is said when one is asked for."""

_GIVEN_HERE = {"optimizer", "last_epoch", "num_warmup_steps", "num_training_steps"}
_LENGTHS = {"num_decay_steps", "num_stable_steps", "timescale"}


def build(optimizer: GroupsStand, request: Request) -> DrivenSchedule:
    """Build one of transformers' schedules.

    The options are the arguments of its function; ``warmup`` is ``num_warmup_steps`` in any unit,
    and ``num_training_steps`` the run's length, where it isn't given.

    Raises:
        ImportError: without transformers.
        ValueError: for options that the schedule doesn't have, and where the run's length is
            needed and not known.
    """
    optimization = import_library("transformers.optimization", f"The schedule {request.name!r}")
    name, run, options = request.name.removeprefix(PREFIX), request.run, dict(request.options)
    function = _function(optimization, request.name)
    takes = arguments_of(function, without=())
    if name in ("reduce_lr_on_plateau", "greedy"):
        schedule = optimization.GreedyLR if name == "greedy" else ReduceLROnPlateau
        arguments = arguments_of(schedule, without=_GIVEN_HERE)
        request.check_options(arguments, required(arguments))
        options.setdefault("mode", request.mode)
        return FollowsMetric(function(optimizer, **options), request.watch_metric)
    arguments = arguments_of(function, without=_GIVEN_HERE)
    lengths = {
        "warmup": "num_warmup_steps" in takes,
        "num_training_steps": "num_training_steps" in takes,
    }
    needed = required(arguments)
    request.check_options({*arguments, *(key for key, there in lengths.items() if there)}, needed)
    if lengths["warmup"]:
        options["num_warmup_steps"] = run.count(options.pop("warmup", 0))
    if lengths["num_training_steps"] and "num_stable_steps" not in options:
        given = options.get("num_training_steps")
        options["num_training_steps"] = run.total() if given is None else run.count(given)
    for key in _LENGTHS & options.keys():
        if options[key] is not None:
            options[key] = run.count(options[key])
    return StepsPerUpdate(function(optimizer, **options))


def _function(optimization: Any, name: str) -> Any:
    """transformers' function of a schedule."""
    functions = optimization.TYPE_TO_SCHEDULER_FUNCTION
    short = name.removeprefix(PREFIX)
    known = {str(getattr(key, "value", key)): function for key, function in functions.items()}
    if short not in known:
        hint = nearest(name, [PREFIX + other for other in known])
        raise ValueError(f"The installed transformers has no schedule {name!r}.{hint}")
    return known[short]
