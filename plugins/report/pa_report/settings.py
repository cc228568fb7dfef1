"""The plugin's table in the settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pa_core.plugin import LocalPath, UpdateDuration, check_file_name

if TYPE_CHECKING:
    from pa_core.durations import Duration


class ReportSettings(BaseModel):
    """The table ``[tool.pa-core.report]``."""

    model_config = ConfigDict(extra="forbid")

    folder: LocalPath = Field(
        Path("reports"), description="The folder that reports are written to."
    )
    name: str | None = Field(
        None,
        min_length=1,
        description="The file's name without `.html`; a later run with the same name overwrites "
        "it. By default the time at which the run starts.",
    )
    title: str | None = Field(
        None, min_length=1, description="The report's title; by default the file's name."
    )
    every: UpdateDuration | None = Field(
        None,
        description="Also record the training loss within epochs: a number of updates, or a "
        'duration such as "1%".',
    )

    @field_validator("name")
    @classmethod
    def _is_no_path(cls, value: str | None) -> str | None:
        return None if value is None else check_file_name(value)


class ReportOptions(TypedDict, total=False):
    """The options of `ReportPlugin`: the keys of its table, for type checkers."""

    folder: str | Path
    name: str | None
    title: str | None
    every: int | str | Duration | None
