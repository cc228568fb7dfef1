"""A trained model as transformers' own folders, complete or absent."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pa_core import Trainer


def export(trainer: Trainer, folder: str | Path, tokenizer: Any = None) -> None:
    """Write the model, and the tokenizer, so that ``from_pretrained`` reads them.

    Called on every process; the main one writes. Of a model with adapters, the adapters are
    written.

    Args:
        trainer: its model is a model of transformers.
        folder: is replaced as a whole, once all is written.
        tokenizer: is written beside the model.

    Raises:
        ValueError: where the model isn't one of transformers, and where the folder is something
            else than an earlier export.
    """
    model = trainer.get_model(keep_torch_compile=False)
    if not hasattr(model, "save_pretrained"):
        raise ValueError(f"{type(model).__name__} can't be exported: it has no save_pretrained")
    if not trainer.is_main_process:
        return
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not list(folder.glob("*config.json")):
        if not folder.is_dir() or any(folder.iterdir()):
            raise ValueError(f"{folder} is there and is no exported model: it is left alone")
    beside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    old = folder.with_name(f".old-{folder.name}-{os.getpid()}")
    try:
        model.save_pretrained(beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if folder.exists():
            os.rename(folder, old)
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
