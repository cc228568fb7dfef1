"""One run of ``pa verify-resume``: a script in a process of its own, cut short at an update.

``python -m pa_core.verifying PLAN SCRIPT [ARGS]`` runs the script as ``python SCRIPT`` would, but
that the first call of `Trainer.train` saves a training state at the updates that the plan names
and then ends the process, as hard as SIGKILL does. No other run knows anything of this.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pa_core import Trainer
from pa_core.checkpoint.codec import encode
from pa_core.checkpoint.safetensors_io import tensor_bytes
from pa_core.checkpoint.save import save_training_state
from pa_core.data.loader import KeyedDataLoader
from pa_core.data.rng import seed_host
from pa_core.durations import Duration
from pa_core.errors import TrainingStateError

NOTES = "notes.json"


@dataclass(frozen=True)
class Plan:
    """What a run is to do.

    Attributes:
        folder: gets the states ``at`` and ``end``, and what is noted of the run.
        output: where plugins write what they would write into the user's folders.
        at: the update at which a state is saved.
        until: the update that is the run's last.
        resume_from: the state that it goes on from.
    """

    folder: str
    output: str
    at: int
    until: int
    resume_from: str | None = None


class Probe:
    """Saves the states of a run, and notes what may tell why two runs differ."""

    def __init__(self, trainer: Trainer, plan: Plan) -> None:
        self.trainer, self.plan, self.folder = trainer, plan, Path(plan.folder)
        self.losses: list[tuple[int, str]] = []
        self.attributes: dict[str, str] = {}
        self._handle, self._restore = trainer._handle_requests, trainer._restore_after_start
        self._track = trainer._update_loss_tracker
        # The loop's own boundary: whatever plugins have asked for was granted before.
        trainer._handle_requests = self.at_boundary  # type: ignore[method-assign]
        trainer._restore_after_start = self.restore  # type: ignore[method-assign]
        trainer._update_loss_tracker = self.note_loss  # type: ignore[method-assign]

    def note_loss(self, batch_loss: torch.Tensor, batch_size: Any) -> None:
        """Note a loss of training, bit for bit."""
        self._track(batch_loss, batch_size)
        if self.trainer.model.training:
            self.losses.append((self.trainer.updates + 1, float(batch_loss).hex()))

    def restore(self) -> None:
        """Note what a resumed run begins with."""
        self._restore()
        self.attributes = _attributes(self.trainer)

    def at_boundary(self, now: bool = False) -> None:
        """Save where the plan says so, after all that happens at this boundary."""
        self._handle(now)
        if self.trainer.updates == self.plan.at and not (self.folder / "at").exists():
            self.attributes = _attributes(self.trainer)
            save_training_state(self.trainer, self.folder / "at", {})
        if self.trainer.updates == self.plan.until:
            self.end()

    def end(self) -> None:
        """Save the last state and what was noted, and end the process at once."""
        save_training_state(self.trainer, self.folder / "end", {})
        notes = {
            "updates": self.trainer.updates,
            "losses": self.losses,
            "attributes": self.attributes,
            "suspects": list(_suspects(self.trainer)),
            "savers": list(_savers(self.trainer)),
            "schedule": type(self.trainer.scheduler).__name__,
        }
        (self.folder / NOTES).write_text(json.dumps(notes))
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def _attributes(trainer: Trainer) -> dict[str, str]:
    """Attributes of the script's own objects that are plain data, as text or with a hash."""
    objects: dict[str, Any] = {
        f"the plugin {name!r}": plugin for name, plugin in trainer.plugins.by_name.items()
    }
    objects |= {"the schedule": trainer.scheduler, "the optimizer": trainer.optimizer}
    objects |= {"the loss": trainer.loss_func, "the training data": trainer.train_dataset}
    for name, module in trainer.get_model(keep_torch_compile=False).named_modules():
        objects[f"the module {name!r}" if name else "the model"] = module
    found = {}
    for owner, thing in objects.items():
        if type(thing).__module__.startswith(("torch.", "accelerate.", "pa_core.")):
            continue  # whose state is known to be whole
        for name, value in getattr(thing, "__dict__", {}).items():
            text = _text_of(value)
            if text is not None and name not in ("_parameters", "_buffers"):
                found[f"`{name}` of {owner} ({type(thing).__name__})"] = text
    return found


def _text_of(value: Any) -> str | None:
    """Plain data as short text that tells it from other data; None for what is none."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        text = json.dumps(encode(value, tensors, ""))
    except (TrainingStateError, RecursionError):
        return None
    if not tensors and len(text) <= 40:
        return text
    digest = hashlib.sha256(text.encode() + tensor_bytes(tensors)).hexdigest()
    return f"{text[:30]}… (hash {digest[:8]})"


def _suspects(trainer: Trainer) -> Iterator[str]:
    """What of this run can't be repeated, whatever its state holds."""
    dataset = trainer.train_dataset
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        samples = []
        for _ in range(2):
            seed_host(0)
            samples.append(_text_of(dataset[0]))
        if samples[0] != samples[1]:
            yield (
                f"The training data ({type(dataset).__name__}) has another sample 0 each time, "
                "whatever the seed: it draws from a source that no seed reaches, such as secrets, "
                "os.urandom, a clock, or a generator of its own"
            )
    if not isinstance(trainer._train_dataloader, KeyedDataLoader):
        yield (
            "The data are a stream, or have a loader or sampler of the script's own, whose order "
            "only it knows: an epoch is replayed up to the place, and so must be the same again"
        )
    if trainer._length.is_timed:
        yield f"A clock ends the run ({trainer._length.duration})"
    for name, plugin in trainer.plugins.by_name.items():
        for value in getattr(plugin, "__dict__", {}).values():
            duration = getattr(value, "duration", value)  # of an `Every`
            if isinstance(duration, Duration) and duration.unit == "seconds":
                if name not in _savers(trainer):
                    yield f"The plugin {name!r} acts by the clock ({duration})"
    if trainer.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
        yield (
            f"Kernels on {trainer.device.type} needn't be deterministic: "
            "torch.use_deterministic_algorithms(True) makes them so"
        )


def _savers(trainer: Trainer) -> list[str]:
    """Plugins that save states, and may do so by a clock, which changes nothing else."""
    return [
        name
        for name, plugin in trainer.plugins.by_name.items()
        if getattr(type(plugin), "saves_training_states", False)
    ]


def _keep_off_the_users_files(trainer: Trainer, output: Path) -> None:
    """Let plugins write their states and models elsewhere."""
    for name, plugin in trainer.plugins.by_name.items():
        for attribute in ("save_dir", "save_path"):
            value = getattr(plugin, attribute, None)
            if isinstance(value, str | Path):
                where = output / name.replace(":", "-") / Path(value).name
                setattr(plugin, attribute, where if isinstance(value, Path) else str(where))


def main(arguments: list[str]) -> None:
    """Run the script of the command line by its plan."""
    plan = Plan(**json.loads(arguments[0]))
    train = Trainer.train

    def probed(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        Trainer.train = train  # type: ignore[method-assign]
        _keep_off_the_users_files(trainer, Path(plan.output))
        probe = Probe(trainer, plan)
        given = inspect.signature(train).bind(trainer, *args, **kwargs)
        given.arguments["resume_from"] = plan.resume_from
        train(*given.args, **given.kwargs)
        probe.end()  # the run has ended by itself

    Trainer.train = probed  # type: ignore[assignment,method-assign]
    script = arguments[1]
    sys.argv = arguments[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
