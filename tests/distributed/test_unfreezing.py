"""Parameters that are frozen, unfrozen or replaced within a run, on two processes.

The runs on one process are the reference; one of them is compared with a loop by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pa_core import Trainer, TrainerCallback
from tests.distributed.launch import flat, outcome_of
from tests.distributed.unfreezing import exchange, model_of
from tests.helpers import tiny_data

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("unfreezing") / "one", "unfreezing.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return outcome_of(tmp_path_factory.mktemp("unfreezing") / "two", "unfreezing.py", 2)


def names_of(outcome: dict[str, Any], *starts: str) -> list[str]:
    return [name for name in outcome if name.startswith(starts)]


def test_replicas_stay_equal_and_are_those_of_one_process(one, two):
    names = [name for name in one if name not in ("hooks", "warnings")]
    assert len(names) == 16
    for name in names:
        first, second = two[name]
        assert first == second, name
        assert flat(first) == pytest.approx(flat(one[name][0]), abs=1e-6), name
    different = {str(one[name][0]["0.weight"]) for name in names_of(one, "exchange")}
    assert len(different) > 3  # the hook and the step matter


def test_a_run_equals_the_loop_by_hand(one):
    batches: list[tuple[Tensor, Tensor]] = []

    class Sees(TrainerCallback):
        def on_train_step_start(self, trainer, batch):
            batches.append((batch[0].clone(), batch[1].clone()))

    trainer = Trainer(
        model := model_of((0,)),
        nn.CrossEntropyLoss(),
        torch.optim.SGD(model.parameters(), lr=0.0),
        callbacks=[Sees()],
        plugins=(),
    )
    trainer.train(tiny_data(45), 2, per_device_batch_size=8, gradient_accumulation_steps=2)

    model = model_of((0,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(0, len(batches), 2):
        window = batches[number : number + 2]
        samples = sum(len(y) for _, y in window)
        for step, (x, y) in enumerate(window):
            (nn.functional.cross_entropy(model(x), y) * len(y) / samples).backward()
            if number == 6 and step == 0:
                exchange(model)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = [value.tolist() for value in model.state_dict().values()]
    assert flat(one["exchange in on_backward_end 0"][0]) == pytest.approx(flat(expected), abs=1e-6)


def test_a_change_on_one_process_is_refused_on_all(two):
    names = names_of(two, "alone")
    assert len(names) == 7
    for name in names:
        first, second = two[name]
        assert first == second
        assert first.startswith("Processes differ in")
        assert ("0.weight" if "unfreeze" in name else "2.weight") in first


def test_modules_are_not_replaced_within_an_epoch(two):
    first, second = two["adapted within"]
    assert first == second
    assert first.startswith("2.down.weight, 2.up.weight came to the optimizer within an epoch")


def test_communication_hooks_are_kept(one, two):
    sizes = two["hooks"]["sizes"]
    assert sizes[0] == 8 * 8 + 8 + 8 * 3 + 3
    assert sizes[-1] == sizes[0] + 6 * 8 + 8
    assert two["hooks"]["kept"] == ["fp16_compress_hook"] * 2
    first, second = two["hooks"]["weights"]
    assert first == second
    assert flat(first) == pytest.approx(flat(one["hooks"]["weights"][0]), abs=1e-3)


def test_what_the_optimizer_lacks_is_reported(one, two):
    for outcome in (one, two):
        (warning,) = outcome["warnings"]
        assert warning.startswith("0.weight, 0.bias need gradients now, but the optimizer")
