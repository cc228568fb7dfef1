"""Lightning, which shows what is logged with `prog_bar=True` beside its bar."""

import torch
from digits import EPOCHS, test_set, train_set
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


class Classifier(LightningModule):
    """The network, its loss, its accuracy and its optimizer."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.network(images), labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.network(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", (logits.argmax(-1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


trainer = Trainer(max_epochs=EPOCHS)
trainer.fit(
    Classifier(network),
    DataLoader(train_set, batch_size=32, shuffle=True),
    DataLoader(test_set, batch_size=32),
)
