"""A run that fails and is resumed, logged to W&B and, for comparison, to a file."""

import sys
from contextlib import suppress
from pathlib import Path

from tests.plugins.tracking.runs import Fail, SaveAt, new_trainer, tracked, train
from tests.plugins.tracking.test_services import ShowSamples


def main(folder: Path) -> None:
    state = folder / "state"
    for save, fail in ((SaveAt(4, state), Fail(9)), (SaveAt(0, state), Fail(-1))):
        services = [tracked(folder, service=service, every=2) for service in ("wandb", "jsonl")]
        trainer = new_trainer(save, fail, ShowSamples(), *services)
        with suppress(RuntimeError):
            train(trainer, resume_from=state if fail.update < 0 else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
