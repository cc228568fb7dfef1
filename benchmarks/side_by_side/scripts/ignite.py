"""Ignite, which leaves to its users what is printed after an epoch."""

import torch
from digits import EPOCHS, test_set, train_set
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import ProgressBar
from ignite.metrics import Accuracy, Loss, RunningAverage
from torch import nn
from torch.utils.data import DataLoader

network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
loss_func = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
trainer = create_supervised_trainer(network, optimizer, loss_func)
evaluator = create_supervised_evaluator(
    network, metrics={"loss": Loss(loss_func), "accuracy": Accuracy()}
)
RunningAverage(output_transform=lambda loss: loss).attach(trainer, "loss")
bar = ProgressBar()
bar.attach(trainer, ["loss"])
test_loader = DataLoader(test_set, batch_size=32)


@trainer.on(Events.EPOCH_COMPLETED)
def evaluate(trainer):
    metrics = evaluator.run(test_loader).metrics
    bar.log_message(
        f"epoch {trainer.state.epoch}: train loss {trainer.state.metrics['loss']:.4f}, "
        f"eval loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.4f}"
    )


trainer.run(DataLoader(train_set, batch_size=32, shuffle=True), max_epochs=EPOCHS)
