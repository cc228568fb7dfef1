"""One run of ``pa verify-resume``: a script, run in its own process until a given update.

``python -m pa_lab.verify_resume_run PLAN SCRIPT [ARGS]`` runs the script as ``python SCRIPT`` does,
with one exception: the first call of `Trainer.train` saves training states at the updates that the
plan names, and then kills the process.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import runpy
import signal
import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from pa_core import Trainer, TrainerCallback, hookimpl
from pa_core.durations import Duration
from pa_core.errors import TrainingStateError
from pa_core.plugin import KeyedDataLoader, encode, named_modules, seed_host, tensor_bytes

NOTES = "notes.json"


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        folder: for the training states ``at`` and ``end``, and the notes on the run.
        output: the folder that plugins write to instead of the user's folders.
        at: the update at which the state ``at`` is saved.
        until: the update at which the run ends.
        resume_from: the training state to resume from.
    """

    folder: str
    output: str
    at: int
    until: int
    resume_from: str | None = None


class Probe(TrainerCallback):
    """Saves the states of a run, and notes what may explain why two runs differ.

    Args:
        plan: what the run does.
        duration: the length of the run.
    """

    changes_training = False

    def __init__(self, plan: Plan, duration: Duration) -> None:
        self.plan, self.duration = plan, duration
        self.at, self.end_state = Path(plan.folder, "at"), Path(plan.folder, "end")
        self.losses: list[tuple[int, str]] = []
        self.attributes: dict[str, str] = {}
        self.loader: Any = None
        self._requested: set[Path] = set()

    @hookimpl(wrapper=True)
    def create_train_dataloader(self, trainer: Trainer) -> Generator[None, Any, Any]:
        """Note whether the core makes the loader, and so knows its order."""
        self.loader = yield
        return self.loader

    def on_load_training_state(self, trainer: Trainer) -> None:
        """Note what a resumed run starts with."""
        if self.plan.resume_from is not None and not self.attributes:
            self.attributes = _attributes(trainer, self)

    @hookimpl(tryfirst=True)
    def on_backward_start(self, trainer: Trainer) -> None:
        """End the process if the last state is saved."""
        # Not in on_train_step_start: a hook there makes the loop seed all generators first, which
        # could hide what the script gets wrong.
        self._end_if_saved(trainer)

    def on_backward_end(self, trainer: Trainer, batch_output: dict[str, Any]) -> None:
        """Note a loss of training, bit for bit."""
        self.losses.append((trainer.updates + 1, float(batch_output["loss"]).hex()))

    @hookimpl(trylast=True)
    def on_train_step_end(self, trainer: Trainer) -> None:
        """Request the states that are due; the loop saves them at the end of the update."""
        if trainer.updates == self.plan.at and self.plan.resume_from is None:
            self._request(trainer, self.at)
        if trainer.updates == self.plan.until:
            self._request(trainer, self.end_state)

    @hookimpl(trylast=True)
    def on_save_training_state(self, trainer: Trainer) -> None:
        """Note what the first state is saved with."""
        if self.at in self._requested and not self.attributes:
            self.attributes = _attributes(trainer, self)

    @hookimpl(tryfirst=True)
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        """End the process if the last state is saved."""
        self._end_if_saved(trainer)

    @hookimpl(tryfirst=True)
    def on_stop_training_error(self, trainer: Trainer) -> None:
        """End the process if the last state is saved."""
        self._end_if_saved(trainer)

    def _request(self, trainer: Trainer, state: Path) -> None:
        if state not in self._requested:
            self._requested.add(state)
            trainer.control.save(state)

    def _end_if_saved(self, trainer: Trainer) -> None:
        if self.end_state.is_dir():
            self.end(trainer)

    def end(self, trainer: Trainer) -> NoReturn:
        """Save the last state if need be, write the notes, and kill the process."""
        if not self.end_state.is_dir():
            trainer.save_training_state(self.end_state)
        notes = {
            "updates": trainer.updates,
            "losses": self.losses,
            "attributes": self.attributes,
            "suspects": list(_suspects(trainer, self)),
            "savers": list(_savers(trainer)),
            "observers": [
                name
                for name, plugin in trainer.plugins.by_name.items()
                if not getattr(plugin, "changes_training", True)
            ],
            "scheduler": type(trainer.scheduler).__name__,
        }
        Path(self.plan.folder, NOTES).write_text(json.dumps(notes))
        sys.stdout.flush()
        sys.stderr.flush()
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        raise SystemExit("killed")  # where the signal isn't delivered at once


def _attributes(trainer: Trainer, probe: Probe) -> dict[str, str]:
    """Attributes of the script's own objects that are plain data, as text or with a hash."""
    objects: dict[str, Any] = {
        f"the plugin {name!r}": plugin
        for name, plugin in trainer.plugins.by_name.items()
        if plugin is not probe
    }
    objects |= {"the scheduler": trainer.scheduler, "the optimizer": trainer.optimizer}
    objects |= {"the loss": trainer.loss_func, "the training data": trainer.train_dataset}
    for name, module in named_modules(trainer.get_model(keep_torch_compile=False)):
        objects[f"the module {name!r}" if name else "the model"] = module
    found = {}
    for owner, thing in objects.items():
        if type(thing).__module__.startswith(("torch.", "accelerate.", "pa_core.", "pa_lab.")):
            continue  # these save all of their state
        for name, value in getattr(thing, "__dict__", {}).items():
            text = _text_of(value)
            if text is not None and name not in ("_parameters", "_buffers"):
                found[f"`{name}` of {owner} ({type(thing).__name__})"] = text
    return found


def _text_of(value: Any) -> str | None:
    """Plain data as short text that is unique to it; None for anything else."""
    tensors: dict[str, torch.Tensor] = {}
    try:
        text = json.dumps(encode(value, tensors, ""))
    except (TrainingStateError, RecursionError):
        return None
    if not tensors and len(text) <= 40:
        return text
    digest = hashlib.sha256(text.encode() + tensor_bytes(tensors)).hexdigest()
    return f"{text[:30]}… (hash {digest[:8]})"


def _suspects(trainer: Trainer, probe: Probe) -> Iterator[str]:
    """What makes this run impossible to repeat, whatever its state holds."""
    dataset = trainer.train_dataset
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        samples = []
        for _ in range(2):
            seed_host(0)
            samples.append(_text_of(dataset[0]))
        if samples[0] != samples[1]:
            yield (
                f"Sample 0 of the training data ({type(dataset).__name__}) differs each time, "
                "whatever the seed: it draws from a source that no seed reaches, such as secrets, "
                "os.urandom, a clock, or its own generator"
            )
    if not isinstance(probe.loader, KeyedDataLoader):
        yield (
            "The data is a stream, or has a custom loader or sampler. On resume, the epoch is "
            "replayed up to its position, so its order must be the same each time"
        )
    if probe.duration.unit == "seconds":
        yield f"A clock ends the run ({probe.duration})"
    for name, plugin in trainer.plugins.by_name.items():
        for value in getattr(plugin, "__dict__", {}).values():
            duration = getattr(value, "duration", value)  # of an `Every`
            if isinstance(duration, Duration) and duration.unit == "seconds":
                if name not in _savers(trainer):
                    yield f"The plugin {name!r} depends on a clock ({duration})"
    if trainer.device.type != "cpu" and not torch.are_deterministic_algorithms_enabled():
        yield (
            f"Kernels on {trainer.device.type} may be nondeterministic: call "
            "torch.use_deterministic_algorithms(True)"
        )


def _savers(trainer: Trainer) -> list[str]:
    """Plugins that save states. They may do so by a clock, which changes nothing else."""
    return [
        name
        for name, plugin in trainer.plugins.by_name.items()
        if getattr(type(plugin), "saves_training_states", False)
    ]


def _redirect_output(trainer: Trainer, output: Path) -> None:
    """Let plugins write their states and models to `output`, not to the user's folders."""
    for name, plugin in trainer.plugins.by_name.items():
        for attribute in ("save_dir", "save_path"):
            value = getattr(plugin, attribute, None)
            if isinstance(value, str | Path):
                where = output / name.replace(":", "-") / Path(value).name
                setattr(plugin, attribute, where if isinstance(value, Path) else str(where))


def main(arguments: list[str]) -> None:
    """Run a script by a plan: ``[PLAN as JSON, SCRIPT, ARGS…]``."""
    plan = Plan(**json.loads(arguments[0]))
    train = Trainer.train

    def probed(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        Trainer.train = train  # type: ignore[method-assign]
        _redirect_output(trainer, Path(plan.output))
        given = inspect.signature(train).bind(trainer, *args, **kwargs)
        given.arguments["resume_from"] = plan.resume_from
        probe = Probe(plan, Duration.parse(given.arguments["num_epochs"]))
        trainer.callback_handler.add_callback(probe)
        train(*given.args, **given.kwargs)
        probe.end(trainer)  # the run has ended before the plan does

    Trainer.train = probed  # type: ignore[method-assign]
    script = arguments[1]
    sys.argv = arguments[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
