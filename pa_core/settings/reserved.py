"""The tables that no plugin has: defaults for arguments of `Trainer` and of `Trainer.train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
)

from pa_core.durations import Duration, json_schema


def _check_duration(given: Any) -> Any:
    Duration.parse(given)
    return given


class TrainerArguments(BaseModel):
    """``[tool.pa-core.trainer]``."""

    model_config = ConfigDict(extra="forbid")

    seed: int = 42
    mixed_precision: Literal["no", "fp16", "bf16", "fp8"] | None = None


class TrainArguments(BaseModel):
    """``[tool.pa-core.train]``: the arguments of `Trainer.train` that TOML can express."""

    model_config = ConfigDict(extra="forbid")

    num_epochs: Annotated[
        int | float | str, AfterValidator(_check_duration), WithJsonSchema(json_schema())
    ] = 1
    per_device_batch_size: PositiveInt = 8
    max_num_train_steps: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt = 1
    gradient_clip_value: PositiveFloat | None = None
    gradient_clip_norm: PositiveFloat | None = None
    create_scheduler_fn: str | None = None
    train_dataloader_kwargs: dict[str, Any] | None = None
    eval_dataloader_kwargs: dict[str, Any] | None = None
    reset_run_history: bool = True
    resume_from: str | None = None
    strict: bool = False


MODELS: dict[str, type[BaseModel]] = {"trainer": TrainerArguments, "train": TrainArguments}
"""The model of each table."""
