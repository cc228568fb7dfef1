"""No step reads a value from the device: shown on a device without values.

A tensor on torch's device ``meta`` has a shape but no data. Any operation that needs a value, for
Python or for the shape of a result, raises there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[3]

SCRIPT = """
    import torch
    from torch import nn
    from pa_core import Trainer
    from pa_core.builtins.log_metrics import LogMetricsCallback
    from pa_core.builtins.progress_table import ProgressTableCallback
    from pa_core.builtins.terminate_on_nan import TerminateOnNaNCallback
    from tests.helpers import tiny_data, tiny_model

    def run(data, **options):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters())
        plugins = [TerminateOnNaNCallback(), LogMetricsCallback(), ProgressTableCallback()]
        trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=plugins, plugins=())
        assert trainer.device.type == "meta"
        try:
            trainer.train(data, 1, per_device_batch_size=8, **options)
        except (RuntimeError, NotImplementedError) as error:
            assert "meta" in str(error), error
            return trainer.updates
        raise AssertionError("the loss of the epoch was read without an error")

    # The first read is that of the epoch's mean loss, after all updates.
    assert run(tiny_data(44)) == 6
    assert run(tiny_data(44), gradient_accumulation_steps=4, gradient_clip_norm=1.0) == 2
    assert run(tiny_data(44), gradient_clip_value=1.0) == 6
    loader = torch.utils.data.DataLoader(tiny_data(44), batch_size=8)
    assert run(loader, gradient_accumulation_steps=4) == 2

    class Reads(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            loss = super().forward(outputs, targets)
            loss.item()
            return loss

    nn.CrossEntropyLoss = Reads  # a loss that reads fails in the first step
    assert run(tiny_data(44)) == 0
"""


def test_no_step_of_an_epoch_reads_a_value_or_has_a_shape_that_depends_on_one():
    done = subprocess.run(
        [sys.executable, "-c", dedent(SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ACCELERATE_TORCH_DEVICE": "meta", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
