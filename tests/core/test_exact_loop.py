"""The Trainer gives the weights of a loop written by hand, bit for bit."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from pa_core import Trainer
from pa_core.data.rng import derive_key
from tests.helpers import assert_identical, tiny_data, tiny_model, weights_of

SEED, EPOCHS, BATCH = 5, 3, 8


def hand_written_loop(accumulation: int) -> dict[str, torch.Tensor]:
    """Forty lines as accelerate's tutorial has them, with the same order of samples."""
    accelerator = Accelerator(cpu=True)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    model, optimizer = accelerator.prepare(model, optimizer)
    data, loss_func = tiny_data(48), nn.CrossEntropyLoss()
    model.train()
    for epoch in range(1, EPOCHS + 1):
        generator = torch.Generator().manual_seed(derive_key(SEED, "order", epoch))
        order = torch.randperm(len(data), generator=generator)
        for step, indices in enumerate(order.split(BATCH)):
            x, y = (tensor[indices].to(accelerator.device) for tensor in data.tensors)
            loss = loss_func(model(x), y) / accumulation
            accelerator.backward(loss)
            if (step + 1) % accumulation == 0:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return dict(accelerator.unwrap_model(model).state_dict())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bit_identical_to_a_hand_written_accelerate_loop(accumulation):
    model = tiny_model()
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=0.01),
        plugins=(),
        seed=SEED,
        accelerator={"cpu": True},
    )
    trainer.train(
        tiny_data(48),
        num_epochs=EPOCHS,
        per_device_batch_size=BATCH,
        gradient_accumulation_steps=accumulation,
        gradient_clip_norm=0.5,
        create_scheduler_fn=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, T_max=20
        ),
    )
    assert_identical(hand_written_loop(accumulation), weights_of(trainer))
