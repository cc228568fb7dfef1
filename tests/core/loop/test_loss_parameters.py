"""A loss function with parameters, which the optimizer trains together with the model's."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_core.engine.loss_parameters import check_loss_parameters
from pa_core.errors import TrainingStateError
from tests.helpers import assert_identical, tiny_data


class Centres(nn.Module):
    """The mean distance to the centre of the sample's class."""

    def __init__(self, size=2):
        super().__init__()
        self.centres = nn.Parameter(torch.arange(3.0 * size).reshape(3, size) / 4)

    def forward(self, outputs, targets):
        return (outputs - self.centres[targets]).square().sum(1).mean()


def parts():
    torch.manual_seed(3)
    model, loss = nn.Linear(6, 2), Centres()
    parameters = [*model.parameters(), *loss.parameters()]
    return model, loss, torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def trainer_of(*callbacks):
    return Trainer(*parts(), callbacks=callbacks, plugins=())


def values(trainer):
    found = dict(trainer.model.named_parameters()) | {"centres": trainer.loss_func.centres}
    return {name: parameter.detach().clone() for name, parameter in found.items()}


RUN = {
    "per_device_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "gradient_clip_norm": 1.5,
    "train_dataloader_kwargs": {"shuffle": False},
}


def test_a_run_equals_a_loop_by_hand():
    """With a last group that is smaller, and a norm over all parameters."""
    trainer, data = trainer_of(), tiny_data(18)
    trainer.train(data, 2, **RUN)
    model, loss, optimizer = parts()
    for _ in range(2):
        for start in (0, 8, 16):
            inputs, targets = (column[start : start + 8] for column in data.tensors)
            loss(model(inputs), targets).backward()
            parameters = [*model.parameters(), *loss.parameters()]
            clip_grad_norm_(parameters, 1.5)
            optimizer.step()
            optimizer.zero_grad()
    right = {name: p.detach() for name, p in model.named_parameters()}
    right["centres"] = loss.centres.detach()
    torch.testing.assert_close(values(trainer), right, rtol=1e-6, atol=1e-6)


def test_it_is_part_of_states_and_checkpoint_files(tmp_path):
    whole = trainer_of()
    whole.train(tiny_data(18), 3, **RUN)
    saving = SaveTrainingStateCallback(tmp_path, save_every_n_steps=4)
    trainer_of(saving).train(tiny_data(18), 3, **RUN)
    resumed = trainer_of(saving)
    nn.init.normal_(resumed.loss_func.centres)  # what the script creates doesn't matter
    resumed.train(tiny_data(18), 3, resume_from=tmp_path / "update_00000004", **RUN)
    assert_identical(values(whole), values(resumed))
    whole.save_checkpoint(tmp_path / "whole.pt")
    other = Trainer(nn.Linear(6, 2), Centres(), None, callbacks=(), plugins=())
    other.load_checkpoint(tmp_path / "whole.pt", load_optimizer=False)
    assert_identical(values(whole), values(other))
    evaluating = Trainer(nn.Linear(6, 2), Centres(), None, callbacks=(), plugins=())
    whole.save_training_state(tmp_path / "whole")
    evaluating.load_training_state(tmp_path / "whole")
    assert_identical(values(whole), values(evaluating))


def test_another_loss_function_is_named(tmp_path):
    trainer = trainer_of()
    trainer.train(tiny_data(8), 1)
    trainer.save_training_state(tmp_path / "state")
    trainer.save_checkpoint(tmp_path / "file.pt")
    other = trainer_of()
    other.loss_func.centres.data = torch.zeros(3, 1)
    before = values(other)
    with pytest.raises(TrainingStateError, match="parameters of another loss function"):
        other.train(tiny_data(8), 2, resume_from=tmp_path / "state")  # changes nothing
    assert_identical(before, values(other))
    plain = Trainer(nn.Linear(6, 2), nn.CrossEntropyLoss(), None, callbacks=(), plugins=())
    with pytest.warns(UserWarning, match="of another loss function, which are not restored"):
        plain.load_training_state(tmp_path / "state")
    with pytest.warns(UserWarning, match="of another loss function, which are not loaded"):
        plain.load_checkpoint(tmp_path / "file.pt", load_optimizer=False)


def test_a_trial_restores_it():
    trainer = trainer_of()
    before = values(trainer)
    with trainer.trial() as probe:
        probe.train(tiny_data(8), 1)
        assert not torch.equal(before["centres"], probe.loss_func.centres)
    assert_identical(before, values(trainer))


def test_a_start_event_that_changes_it_is_noticed(tmp_path):
    class Resets(TrainerCallback):
        def on_training_run_start(self, trainer):
            nn.init.zeros_(trainer.loss_func.centres)

    trainer = trainer_of()
    trainer.train(tiny_data(8), 1)
    trainer.save_training_state(tmp_path / "state")
    resumed = trainer_of(Resets())
    with pytest.warns(UserWarning, match="changed|enabled") as caught:
        resumed.train(tiny_data(8), 1, resume_from=tmp_path / "state")
    texts = [str(warning.message) for warning in caught]
    assert any("'Resets' has changed weights" in text for text in texts)
    assert_identical(values(trainer), values(resumed))


def test_several_processes_refuse_it():
    trainer = trainer_of()
    assert check_loss_parameters(trainer) == (trainer.loss_func.centres,)
    found = vars(trainer) | {"num_processes": 2, "sharded_by": None}
    two = SimpleNamespace(**found, optimizers=trainer.optimizers, get_model=trainer.get_model)
    with pytest.raises(ValueError, match="loss function Centres, which nothing reduces over"):
        check_loss_parameters(two)
    # Without the loss function's parameters, there is nothing to refuse.
    two.optimizers = (torch.optim.SGD(trainer.model.parameters(), lr=0.1),)
    assert check_loss_parameters(two) == ()
