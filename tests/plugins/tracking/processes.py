"""Tracked runs on one or more processes, one of them resumed."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from tests.plugins.tracking.runs import BATCH, Fail, SaveAt, new_trainer, tracked, train

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def main(folder: Path) -> None:
    size = BATCH // PROCESSES
    services = [
        tracked(folder, service="jsonl", every=2, run_name="jsonl"),
        tracked(folder, service="csv", every="1 epoch", run_name="csv"),
    ]
    trainer = train(new_trainer(*services), 2, per_device_batch_size=size)
    trainer.evaluate(trainer.eval_dataset, per_device_batch_size=size)

    state = folder / "state"

    def parts(*others):
        return new_trainer(*others, tracked(folder, every=2, run_name="parts"))

    with suppress(RuntimeError):  # on all processes
        train(parts(SaveAt(4, state), Fail(9)), 2, per_device_batch_size=size)
    train(parts(SaveAt(0, state), Fail(-1)), 2, per_device_batch_size=size, resume_from=state)
    (folder / f"done-{os.environ.get('RANK', '0')}").write_text("")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
