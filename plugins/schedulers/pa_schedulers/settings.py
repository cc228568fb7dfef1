"""The table ``[tool.pa-core.schedulers]``."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pa_core.errors import nearest
from pa_schedulers import ours, torch_schedules
from pa_schedulers.lengths import LENGTH, Length, check_length
from pa_schedulers.options import EVAL_LOSS, check_options


class ScheduleSettings(BaseModel):
    """A schedule by name; the keys that aren't told here are its own options."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(
        None,
        description='The schedule: "cosine", "one_cycle", "timm/tanh", "transformers/polynomial" …',
    )
    warmup: Length = Field(0, description=f"Length of the warm-up: {LENGTH}")
    cooldown: Length = Field(0, description=f"How long the minimum is held at the end: {LENGTH}")
    watch_metric: str = Field(
        EVAL_LOSS,
        min_length=1,
        description="The metric that a schedule goes by which needs one, as in the run history.",
    )
    greater_is_better: bool = Field(
        False, description="Whether more of that metric is better, as with accuracy."
    )

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given."""
        lengths: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("warmup", "cooldown")
            if name in self.model_fields_set
        }
        return {**lengths, **(self.model_extra or {})}

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        """What can be told without importing timm or transformers is told before any run."""
        name, known = self.name, set(type(self).model_fields)
        if name is None:
            for key in self.model_extra or {}:
                raise ValueError(
                    f"has no key {key!r}.{nearest(key, known)} Without a name it takes "
                    f"{', '.join(sorted(known))}; with one, that schedule's options, too"
                )
        elif name in ours.OURS:
            check_options(name, self.options, ours.options_of(name))
        elif name in torch_schedules.torch_schedules():
            check_options(name, self.options, torch_schedules.options_of(name))
            for key in torch_schedules.LENGTHS & self.options.keys():
                value = self.options[key]
                for length in value if isinstance(value, list | tuple) else [value]:
                    check_length(length)
        return self


class NamedScheduleSettings(ScheduleSettings):
    """A schedule that must have a name."""

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.name is None:
            raise ValueError("needs a name, such as 'cosine'")
        return self


class GroupSettings(ScheduleSettings):
    """The schedules of parameter groups: of the learning rate, weight decay and momentum."""

    weight_decay: NamedScheduleSettings | None = Field(
        None, description="A schedule of the weight decay: a table with name and options."
    )
    momentum: NamedScheduleSettings | None = Field(
        None, description="A schedule of the momentum, or of Adam's first beta."
    )


class SchedulersSettings(GroupSettings):
    """The table ``[tool.pa-core.schedulers]``."""

    groups: dict[str, GroupSettings] = Field(
        default_factory=dict,
        description="Tables like this one for single parameter groups, by their name or place.",
    )
