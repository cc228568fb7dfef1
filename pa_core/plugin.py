"""What plugins import from the core, in addition to the `Trainer` that their hooks receive.

Import from here, from the other files at the top of `pa_core`, and from `pa_core.testing`; the
folders are internal. Names that need torch are loaded when they are first used, so that a plugin
that adds a command starts as quickly as `pa` itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict

from pa_core.callbacks import TrainerCallback
from pa_core.durations import Duration
from pa_core.lazy import import_on_use
from pa_core.settings.options import checking_options, settings_from_options
from pa_core.settings.paths import local_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pa_core.checkpoint.atomic_io import save_file
    from pa_core.checkpoint.codec import decode, encode
    from pa_core.checkpoint.listing import readable_size
    from pa_core.checkpoint.lock import RunLock
    from pa_core.checkpoint.restore import TrainingState
    from pa_core.checkpoint.safetensors_io import tensor_bytes
    from pa_core.checkpoint.storage import MANIFEST, StateReader, newest_intact_state, state_folders
    from pa_core.control import UpdateResult
    from pa_core.data.keyed_loader import KeyedDataLoader
    from pa_core.data.ready import is_loader
    from pa_core.data.rng import seed_host
    from pa_core.diagnostics.device_syncs import watch_device_syncs
    from pa_core.diagnostics.preserve import preserved
    from pa_core.diagnostics.stopwatch import Spent, Stopwatch
    from pa_core.display.epochs import greater_is_better, unambiguous_names
    from pa_core.display.metric_names import MetricName, numbers_of, parse_metric_names
    from pa_core.display.notebook import NotebookOutput
    from pa_core.display.plot import plot_records
    from pa_core.display.streams import in_notebook
    from pa_core.engine.optimizers import SchedulerList
    from pa_core.engine.wrappers import (
        clean_state_dict,
        load_clean_state_dict,
        named_modules,
        named_parameters,
        unwrap,
        wrapped_module,
    )
    from pa_core.plugins.explain import describe_loop, loop_as_text
    from pa_core.plugins.implementations import Implementation
    from pa_core.plugins.manager import PluginManager
    from pa_core.settings.environment import FAST_DEV_RUN_VARIABLE, build_all_plugins
    from pa_core.settings.secrets import is_secret, mask_secrets
    from pa_core.settings.table import PLUGINS_VARIABLE, find_settings_file, read_settings
    from pa_core.settings.validation import check_table

__all__ = [
    "FAST_DEV_RUN_VARIABLE",
    "MANIFEST",
    "PLUGINS_VARIABLE",
    "CallbackSettings",
    "ConfigurableCallback",
    "Implementation",
    "KeyedDataLoader",
    "LocalPath",
    "MetricName",
    "NotebookOutput",
    "PluginManager",
    "RunLock",
    "SchedulerList",
    "Spent",
    "StateReader",
    "Stopwatch",
    "TrainingState",
    "UpdateDuration",
    "UpdateResult",
    "build_all_plugins",
    "check_file_name",
    "check_table",
    "clean_state_dict",
    "decode",
    "describe_loop",
    "encode",
    "find_settings_file",
    "greater_is_better",
    "in_notebook",
    "is_loader",
    "is_secret",
    "load_clean_state_dict",
    "local_path",
    "loop_as_text",
    "mask_secrets",
    "named_modules",
    "named_parameters",
    "newest_intact_state",
    "numbers_of",
    "parse_metric_names",
    "plot_records",
    "preserved",
    "read_settings",
    "readable_size",
    "save_file",
    "seed_host",
    "settings_from_options",
    "state_folders",
    "tensor_bytes",
    "to_uint8_images",
    "unambiguous_names",
    "unwrap",
    "watch_device_syncs",
    "wrapped_module",
]

_HOMES = {
    "FAST_DEV_RUN_VARIABLE": "pa_core.settings.environment",
    "MANIFEST": "pa_core.checkpoint.storage",
    "PLUGINS_VARIABLE": "pa_core.settings.table",
    "Implementation": "pa_core.plugins.implementations",
    "KeyedDataLoader": "pa_core.data.keyed_loader",
    "MetricName": "pa_core.display.metric_names",
    "NotebookOutput": "pa_core.display.notebook",
    "PluginManager": "pa_core.plugins.manager",
    "RunLock": "pa_core.checkpoint.lock",
    "SchedulerList": "pa_core.engine.optimizers",
    "Spent": "pa_core.diagnostics.stopwatch",
    "StateReader": "pa_core.checkpoint.storage",
    "Stopwatch": "pa_core.diagnostics.stopwatch",
    "TrainingState": "pa_core.checkpoint.restore",
    "UpdateResult": "pa_core.control",
    "build_all_plugins": "pa_core.settings.environment",
    "check_table": "pa_core.settings.validation",
    "clean_state_dict": "pa_core.engine.wrappers",
    "decode": "pa_core.checkpoint.codec",
    "describe_loop": "pa_core.plugins.explain",
    "encode": "pa_core.checkpoint.codec",
    "find_settings_file": "pa_core.settings.table",
    "greater_is_better": "pa_core.display.epochs",
    "in_notebook": "pa_core.display.streams",
    "is_loader": "pa_core.data.ready",
    "is_secret": "pa_core.settings.secrets",
    "load_clean_state_dict": "pa_core.engine.wrappers",
    "loop_as_text": "pa_core.plugins.explain",
    "mask_secrets": "pa_core.settings.secrets",
    "named_modules": "pa_core.engine.wrappers",
    "named_parameters": "pa_core.engine.wrappers",
    "newest_intact_state": "pa_core.checkpoint.storage",
    "numbers_of": "pa_core.display.metric_names",
    "parse_metric_names": "pa_core.display.metric_names",
    "unambiguous_names": "pa_core.display.epochs",
    "plot_records": "pa_core.display.plot",
    "preserved": "pa_core.diagnostics.preserve",
    "read_settings": "pa_core.settings.table",
    "readable_size": "pa_core.checkpoint.listing",
    "save_file": "pa_core.checkpoint.atomic_io",
    "seed_host": "pa_core.data.rng",
    "state_folders": "pa_core.checkpoint.storage",
    "tensor_bytes": "pa_core.checkpoint.safetensors_io",
    "unwrap": "pa_core.engine.wrappers",
    "watch_device_syncs": "pa_core.diagnostics.device_syncs",
    "wrapped_module": "pa_core.engine.wrappers",
}

__getattr__ = import_on_use(__name__, _HOMES)


UpdateDuration = Annotated[
    Duration, BeforeValidator(lambda given: Duration.parse(given, "updates"))
]
"""The type of a setting: a duration, where a plain number means updates."""


def _without_scheme(given: Any) -> Any:
    if isinstance(given, str | Path):
        local_path(given)
    return given


LocalPath = Annotated[Path, BeforeValidator(_without_scheme)]
"""The type of a setting: a path, as opposed to an address such as ``s3://bucket/run``."""


class CallbackSettings(BaseModel):
    """Settings of a `ConfigurableCallback`: one field for each argument of its constructor."""

    model_config = ConfigDict(extra="forbid")


class ConfigurableCallback(TrainerCallback):
    """A callback that can be built from a table of the settings.

    Arguments given in code are checked like the keys of the table: a class that defines both
    `Settings` and a constructor raises a `SettingsError` that names all mistakes.
    """

    Settings: ClassVar[type[CallbackSettings]] = CallbackSettings
    changes_training: ClassVar[bool] = True
    """Whether resuming a run without it, or with other settings, may change the run's numbers."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if {"Settings", "__init__"} <= vars(cls).keys():
            checked = checking_options(vars(cls)["__init__"], cls.Settings)
            cls.__init__ = checked  # type: ignore[method-assign]

    @classmethod
    def from_settings(cls, settings: BaseModel) -> Self:
        """Build the callback from validated settings.

        Only the settings that were given are passed on. A subclass whose constructor takes fewer
        arguments therefore works as long as the settings don't name the others.
        """
        return cls(**{name: getattr(settings, name) for name in sorted(settings.model_fields_set)})


def check_file_name(name: str) -> str:
    """Check that a text from settings or a training state can be the name of a file or folder.

    Args:
        name: the text.

    Returns:
        The name.

    Raises:
        ValueError: if it isn't a text, is empty, ``.`` or ``..``, or contains a path separator or
            another character that some operating system doesn't allow in names.

    >>> check_file_name("run-1")
    'run-1'
    """
    forbidden = set('/\\:*?"<>|')
    is_text = isinstance(name, str) and name not in ("", ".", "..")
    if not is_text or any(char in forbidden or ord(char) < 32 for char in name):
        raise ValueError(f"{name!r} can't name a file or folder; leave out {' '.join('/:*?<>|')}")
    return name


def to_uint8_images(images: Tensor, *, limit: int | None = None) -> list[NDArray[np.uint8]]:
    """Convert a tensor of images to the 8-bit RGB arrays that image libraries expect.

    Floats are clamped to 0 to 1, multiplied by 255 and rounded; NaN becomes 0. A single channel is
    repeated for red, green and blue. A tensor on an accelerator is copied to the CPU, which
    synchronises.

    Args:
        images: shape ``(samples, channels, height, width)`` or ``(channels, height, width)`` with 1
            or 3 channels; floats from 0 to 1, or integers from 0 to 255.
        limit: convert only this many images from the start; all by default.

    Returns:
        One array of shape ``(height, width, 3)`` per image.

    Raises:
        ValueError: if the tensor has another shape.
    """
    import torch

    batch = images.detach()
    batch = batch[None] if batch.ndim == 3 else batch
    if batch.ndim != 4 or batch.shape[1] not in (1, 3):
        raise ValueError(
            "Expected images of shape (samples, channels, height, width) or (channels, height, "
            f"width) with 1 or 3 channels, got {tuple(images.shape)}"
        )
    batch = batch[:limit]
    if batch.is_floating_point():
        batch = (batch.float().nan_to_num(0.0).clamp(0, 1) * 255).round()
    batch = batch.to("cpu", torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    return list(batch.contiguous().numpy())
