"""Hugging Face's Trainer, which reports losses and evaluates once per epoch."""

from digits import EPOCHS, test_set, train_set
from torch import nn
from transformers import Trainer, TrainingArguments


class Classifier(nn.Module):
    """The network, with the loss in its output, as this Trainer expects."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images, labels):
        logits = self.network(images)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
trainer = Trainer(
    Classifier(network),
    TrainingArguments(
        num_train_epochs=EPOCHS,
        learning_rate=1e-3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        eval_strategy="epoch",
        logging_strategy="epoch",
    ),
    train_dataset=[{"images": image, "labels": label} for image, label in train_set],
    eval_dataset=[{"images": image, "labels": label} for image, label in test_set],
    compute_metrics=lambda output: {
        "accuracy": (output.predictions.argmax(-1) == output.label_ids).mean()
    },
)
trainer.train()
