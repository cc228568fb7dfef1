"""Plugins that environment variables turn on, for trying a script out without an edit."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pa_core.builtins.fast_dev_run import FastDevRunCallback
from pa_core.builtins.limit_batches import LimitBatchesCallback
from pa_core.utils import LIMIT_BATCHES_ENV_VAR

FAST_DEV_RUN_VARIABLE = "PA_CORE_FAST_DEV_RUN"
CHECK_VARIABLE = "PA_CORE_CHECK"
"""Set by `pa check`: the file for what it wants to know of the run."""


def environment_plugins() -> Iterator[tuple[str, object]]:
    """Name and plugin of each that a variable asks for; they come before all others.

    Raises:
        ValueError: for a value that a variable can't have.
    """
    report = os.environ.get(CHECK_VARIABLE)
    if report:
        from pa_core.rehearsal import Rehearsal

        yield "rehearsal:environment", Rehearsal(report)
    limit = os.environ.get(LIMIT_BATCHES_ENV_VAR, "none")
    if limit.lower() != "none":
        if not limit.isdecimal() or int(limit) < 1:
            raise ValueError(f"{LIMIT_BATCHES_ENV_VAR} must be a positive integer, not {limit!r}")
        yield "limit_batches:environment", LimitBatchesCallback(int(limit))
    wanted = os.environ.get(FAST_DEV_RUN_VARIABLE, "0")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"{FAST_DEV_RUN_VARIABLE} must be 1 or 0, not {wanted!r}")
    if wanted == "1":
        yield "fast_dev_run:environment", FastDevRunCallback()
