"""States that an earlier version has written can be resumed, exactly.

``state-format-1.zip`` holds a state that `run` has saved after 5 of its 8 updates, with the code of
commit 691ca48, before its modules were moved into folders. It was written by `write_archive`.

All numbers of the run are multiples of small powers of two, so that neither the processor nor the
version of PyTorch makes a difference.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_core.checkpoint.codec import decode
from pa_core.checkpoint.compatibility import differences
from pa_core.checkpoint.storage import StateReader, read_manifest

ARCHIVE = Path(__file__).with_name("state-format-1.zip")
SETTINGS = """\
[tool.pa-core]
plugins = ["early_stopping", "checkpoint"]
disable = ["progress_bar"]

[tool.pa-core.early_stopping]
early_stopping_patience = 9

[tool.pa-core.checkpoint]
save_dir = "FOLDER"
save_every_n_steps = 1
save_at_end = false
"""


class HalfMasked(nn.Linear):
    """A linear layer that randomly masks half of its inputs in training."""

    def forward(self, x):
        return super().forward(x * (torch.rand_like(x) < 0.5) if self.training else x)


class LossSum(TrainerCallback):
    """A plugin with state."""

    def __init__(self) -> None:
        self.total, self.losses = torch.zeros(1, dtype=torch.float64), []

    def on_train_step_end(self, trainer, batch_output):
        self.total += batch_output["loss"].detach()
        self.losses.append(batch_output["loss"].item())

    def state_dict(self):
        return {"total": self.total, "losses": tuple(self.losses)}

    def load_state_dict(self, state):
        self.total, self.losses = state["total"].clone(), list(state["losses"])


def run(folder: Path, resume_from: Path | None = None, *, strict: bool = False) -> Trainer:
    """Train for 8 updates in two epochs, with a state in `folder` after each."""
    settings = folder / "pyproject.toml"
    settings.write_text(SETTINGS.replace("FOLDER", (folder / "states").as_posix()))
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-1, 2, (16, 3), generator=generator).double()
    data = TensorDataset(
        x, x.sum(1, keepdim=True) + torch.randint(0, 2, (16, 1), generator=generator)
    )
    model = HalfMasked(3, 1).double()
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    loss_func = nn.MSELoss()
    trainer = Trainer(
        model,
        loss_func,
        optimizer,
        callbacks=[LossSum()],
        settings=settings,
        accelerator={"cpu": True},
    )
    trainer.train(
        data,
        2,
        eval_dataset=data,
        per_device_batch_size=2,
        gradient_accumulation_steps=2,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5),
        resume_from=resume_from,
        strict=strict,
    )
    return trainer


def outcome(trainer: Trainer) -> dict:
    """Everything that a run has led to, without the time it has taken."""
    records = [record | {"seconds": None} for record in trainer.run_history.records]
    return {
        "weights": {name: value.tolist() for name, value in trainer.model.state_dict().items()},
        "momentum": [
            state["momentum_buffer"].tolist()
            for state in trainer.optimizer.state_dict()["state"].values()
        ],
        "scheduler": trainer.scheduler.state_dict(),
        "history": records,
        "position": vars(trainer.position) | {"seconds": None},
        "plugins": {
            name: {
                key: value.tolist() if isinstance(value, torch.Tensor) else value
                for key, value in state.items()
            }
            for name, state in trainer.plugins.state_dict().items()
        },
    }


def write_archive(folder: Path) -> None:
    """Write the archive anew, into `folder`; call it with the code of the earlier version."""
    run(folder)
    with zipfile.ZipFile(folder / ARCHIVE.name, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((folder / "states" / "update_00000005").iterdir()):
            archive.write(path, f"update_00000005/{path.name}")


def earlier_state(folder: Path) -> Path:
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder / "update_00000005"


def skip_with_another_torch(state: Path) -> None:
    """Another version may have other settings of optimizers and schedulers."""
    version = read_manifest(state)["packages"]["torch"]
    if version != metadata.version("torch"):
        pytest.skip(f"the state was written with PyTorch {version}")


def test_a_run_resumed_from_an_earlier_state_ends_as_the_uninterrupted_one(tmp_path):
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole = run(tmp_path / "whole")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = run(tmp_path / "resumed", earlier_state(tmp_path))
    assert outcome(resumed) == outcome(whole)
    texts = [str(warning.message) for warning in caught]
    assert not [text for text in texts if "has no state of" in text or "has a state of" in text]


def test_no_difference_from_an_earlier_state_is_reported_but_versions_and_hardware(tmp_path):
    before = earlier_state(tmp_path)
    skip_with_another_torch(before)
    found = differences(read_manifest(before), run(tmp_path).manifest, strict=True)
    expected = ("the version of ", "the hardware's ", "the git commit")
    assert not [difference for difference in found if not difference.startswith(expected)]


def test_states_are_written_as_before(tmp_path):
    before, now = earlier_state(tmp_path), tmp_path / "states" / "update_00000005"
    skip_with_another_torch(before)
    run(tmp_path)
    assert {path.name for path in now.iterdir()} == {path.name for path in before.iterdir()}
    manifests = read_manifest(before), read_manifest(now)
    assert manifests[1].keys() - manifests[0].keys() == {"run_id"}
    new = manifests[1]["run"].keys() - manifests[0]["run"].keys()
    assert new == {"loss_parts", "scheduler_parts", "frozen", "eval_data"}
    assert manifests[0]["run"].items() <= manifests[1]["run"].items()
    name = "model.safetensors"
    assert (now / name).read_bytes() == (before / name).read_bytes()
    readers = [StateReader(path) for path in (before, now)]
    tensors = [reader.read_tensors("state.safetensors") for reader in readers]
    states = [reader.read_json("state.json") for reader in readers]
    # The history was JSON. Its records are now columns among the tensors.
    histories = [
        decode(state.pop("run_history"), named)
        for state, named in zip(states, tensors, strict=True)
    ]
    for history in histories:
        records = [record | {"seconds": None} for record in history.pop("records")]
        assert [(record["metric"], record["epoch"]) for record in records] == [
            ("train_loss_epoch", 1),
            ("eval_loss_epoch", 1),
        ]
        history["records"] = records
    assert histories[0] == histories[1]
    others = {name: value for name, value in tensors[1].items() if "run_history" not in name}
    assert others.keys() == tensors[0].keys()
    assert all(torch.equal(value, tensors[0][name]) for name, value in others.items())
    for state in states:
        state.pop("scheduled_for", None)
        state["position"]["seconds"] = None
        state["metadata"].pop("global_step", None)
        for added in ("skipped", "skipped_in_a_row"):
            state["position"].pop(added, None)
    assert list(states[0]) == list(states[1])
    assert states[0] == states[1]
    processes = [json.loads((path / "process-00000.json").read_text()) for path in (before, now)]
    assert processes[0]["plugins"] == processes[1]["plugins"]
    assert processes[0]["loss"] == processes[1]["loss"]
