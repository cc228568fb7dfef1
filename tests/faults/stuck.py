"""Train, and get stuck where no signal handler of Python can run.

``stuck.py main``: the main thread; ``worker``: both workers, in their first batch; ``later``: both
workers, in their second one, while the main thread is busy with the first. A process that is stuck
has written a file ``stuck-PID``.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import torch

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import PreemptionCallback
from pa_core.testing import tiny_data, tiny_model

WHERE = sys.argv[-1]


def get_stuck() -> None:
    """Lock a mutex twice, which no signal interrupts, as a collective without its peers."""
    Path(f"stuck-{os.getpid()}").touch()
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


class Data(torch.utils.data.Dataset):
    """Gets workers stuck."""

    def __init__(self) -> None:
        self.data = tiny_data(8)
        self.fetched = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> object:
        self.fetched += 1
        if self.fetched == {"worker": 1, "later": 3}.get(WHERE):
            get_stuck()
        return self.data[index]


class Stuck(TrainerCallback):
    """Gets the main thread stuck."""

    def on_train_step_start(self, trainer: Trainer) -> None:
        if WHERE == "main":
            get_stuck()
        if WHERE == "later":
            time.sleep(5)


if __name__ == "__main__":
    model = tiny_model()
    trainer = Trainer(
        model,
        torch.nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[PreemptionCallback, Stuck],
        plugins=(),
    )
    trainer.train(Data(), 1, per_device_batch_size=2, train_dataloader_kwargs={"num_workers": 2})
