"""The table ``[tool.pa-core.schedulers]``."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pa_core.errors import nearest
from pa_schedulers import builtin_schedulers, torch_schedulers
from pa_schedulers.run_length import LENGTH, Length, check_length
from pa_schedulers.spec import EVAL_LOSS, check_options


class SchedulerSettings(BaseModel):
    """A scheduler by name; keys that aren't listed here are its own options."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(
        None,
        description='Scheduler name: "cosine", "one_cycle", "timm/tanh", "transformers/linear" …',
    )
    warmup: Length = Field(0, description=f"Length of the warm-up: {LENGTH}")
    cooldown: Length = Field(0, description=f"Length of the cool-down at the minimum: {LENGTH}")
    watch_metric: str = Field(
        EVAL_LOSS,
        min_length=1,
        description="The metric of the run history that a metric-driven scheduler steps on.",
    )
    greater_is_better: bool = Field(
        False, description="Whether a greater value of that metric is better, as with accuracy."
    )

    @property
    def options(self) -> dict[str, Any]:
        """The options that are set."""
        lengths: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("warmup", "cooldown")
            if name in self.model_fields_set
        }
        return {**lengths, **(self.model_extra or {})}

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        """Check, before any run, the options that don't need timm or transformers to check."""
        name, known = self.name, set(type(self).model_fields)
        if name is None:
            for key in self.model_extra or {}:
                raise ValueError(
                    f"has no key {key!r}.{nearest(key, known)} Its keys are "
                    f"{', '.join(sorted(known))}, and with a name the options of that scheduler"
                )
        elif name in builtin_schedulers.BUILTIN_SCHEDULERS:
            check_options(name, self.options, builtin_schedulers.options_of(name))
        elif name in torch_schedulers.torch_scheduler_classes():
            check_options(name, self.options, torch_schedulers.options_of(name))
            for key in torch_schedulers.LENGTHS & self.options.keys():
                value = self.options[key]
                for length in value if isinstance(value, list | tuple) else [value]:
                    check_length(length)
        return self


class NamedSchedulerSettings(SchedulerSettings):
    """A scheduler whose name is required."""

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.name is None:
            raise ValueError("needs a name, such as 'cosine'")
        return self


class ParamGroupSettings(SchedulerSettings):
    """Schedulers for parameter groups: of the learning rate, weight decay and momentum."""

    weight_decay: NamedSchedulerSettings | None = Field(
        None, description="Scheduler of the weight decay: a table with a name and options."
    )
    momentum: NamedSchedulerSettings | None = Field(
        None, description="Scheduler of the momentum, or of Adam's first beta."
    )


class SchedulersSettings(ParamGroupSettings):
    """The table ``[tool.pa-core.schedulers]``."""

    groups: dict[str, ParamGroupSettings] = Field(
        default_factory=dict,
        description="Tables with the same keys for parameter groups, by their name or index.",
    )
