"""Atomic export of a trained model in the format of ``save_pretrained``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.plugin import clean_state_dict, local_path

if TYPE_CHECKING:
    from pa_core import Trainer


def export(trainer: Trainer, folder: str | Path, tokenizer: Any = None) -> None:
    """Write the model and the tokenizer in a folder for ``from_pretrained``.

    Call it on every process; the main process writes. For a model with adapters, it writes the
    adapters.

    Args:
        trainer: its model is a model of transformers.
        folder: the folder; an earlier export is replaced once everything is written.
        tokenizer: is written to the same folder.

    Raises:
        ValueError: if the model isn't one of transformers, or if the folder exists and isn't an
            export.
    """
    model = trainer.get_model(keep_torch_compile=False)
    if not hasattr(model, "save_pretrained"):
        raise ValueError(f"{type(model).__name__} can't be exported: it has no save_pretrained")
    if not trainer.is_main_process:
        return
    folder = Path(os.path.abspath(local_path(folder)))
    if folder.exists() and not list(folder.glob("*config.json")):
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(
                f"{folder} already exists and isn't an exported model; not overwritten"
            )
    new = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    try:
        weights = clean_state_dict(model)
        is_compiled = weights.keys() != model.state_dict().keys()  # some part of it
        model.save_pretrained(new, **({"state_dict": weights} if is_compiled else {}))
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
