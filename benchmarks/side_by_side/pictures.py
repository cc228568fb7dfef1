"""The picture of the README: a terminal in the middle of an epoch.

    python -m benchmarks.side_by_side.pictures

The run trains a small convolutional network on scikit-learn's digits. `docs/report_picture.py`
takes the picture of the report.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from rich.text import Text

from benchmarks.side_by_side.frameworks import SCRIPTS
from benchmarks.side_by_side.terminal import Recording, draw, record

IMAGES = Path(__file__).parent.parent.parent / "docs" / "images"
COLUMNS = 92
EPOCH, PERCENT = 8, 60  # when the picture of the terminal is taken
JOB = """\
import torch
from digits import test_set, train_set
from torch import nn

from pa_core import Trainer

model = nn.Sequential(
    nn.Unflatten(1, (1, 8, 8)),
    nn.Conv2d(1, 32, 3, padding=1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3, padding=1),
    nn.BatchNorm2d(64),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Flatten(),
    nn.Dropout(0.3),
    nn.Linear(1024, 10),
)
trainer = Trainer(model, nn.CrossEntropyLoss(), torch.optim.AdamW(model.parameters(), lr=3e-3))
trainer.train(train_set, num_epochs=12, eval_dataset=test_set, per_device_batch_size=32)
"""
SETTINGS = """\
[tool.pa-core]
plugins = ["metrics", "ema", "schedulers", "save_best_model", "report"]

[tool.pa-core.metrics]
metrics = ["accuracy"]
task = "multiclass"
num_classes = 10

[tool.pa-core.ema]
decay = 0.95

[tool.pa-core.schedulers]
name = "cosine"
warmup = "1 epoch"
"""


def main() -> None:
    """Train in a pseudo-terminal, and draw its screen."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        (folder / "digits.py").write_text((SCRIPTS / "digits.py").read_text())
        (folder / "train.py").write_text(JOB)
        (folder / "pyproject.toml").write_text(SETTINGS)
        run = record(
            [sys.executable, "train.py"],
            folder,
            {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            columns=COLUMNS,
            names={str(folder): "/home/me/digits"},
        )
        if run.code:
            raise SystemExit("\n".join(row.plain for row in run.screen()))
        prompt = Text.assemble(("$ ", "green"), "python train.py")
        draw([prompt, *_in_progress(run)], "pa-core", IMAGES / "terminal.svg", COLUMNS)


def _in_progress(run: Recording) -> list[Text]:
    """The screen in the middle of an epoch, when its bar has reached a certain share."""
    for seconds, _ in run.output:
        rows = run.screen(seconds)
        last = rows[-1].plain if rows else ""
        if re.search(rf"Epoch {EPOCH}/", last) and (found := re.search(r"(\d+)%", last)):
            if int(found[1]) >= PERCENT:
                return rows
    raise SystemExit("the bar was never seen: " + last)


if __name__ == "__main__":
    main()
