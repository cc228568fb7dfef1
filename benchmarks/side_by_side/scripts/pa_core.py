"""pa-core, with the accuracy of its plugin `metrics`."""

import torch
from digits import EPOCHS, test_set, train_set
from torch import nn

from pa_core import Trainer

network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
trainer = Trainer(
    network,
    nn.CrossEntropyLoss(),
    torch.optim.Adam(network.parameters(), lr=1e-3),
    plugins=["metrics"],
    settings={"metrics": {"task": "multiclass", "num_classes": 10, "metrics": {"accuracy": {}}}},
)
trainer.train(train_set, num_epochs=EPOCHS, eval_dataset=test_set, per_device_batch_size=32)
