"""Metrics in a subclass that overrides steps of the loop.

    python metrics_by_subclass.py           # scikit-learn's 1,797 digits, in seconds
    python metrics_by_subclass.py --full    # MNIST's 70,000, downloaded by torchvision

`plugins=()` disables the plugins of pyproject.toml: everything is in this file.
"""

from typing import Any

import torch
from torch import nn, optim
from torchmetrics import Accuracy, MetricCollection, Precision, Recall
from train import build_model, load_digits, load_mnist, parse_arguments

from pa_core import Trainer


class TrainerWithMetrics(Trainer):
    def __init__(self, *args: Any, num_classes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options: dict[str, Any] = {"task": "multiclass", "num_classes": num_classes}
        # A default callback moves modules such as this one to the trainer's device.
        self.metrics = MetricCollection(
            {
                "accuracy": Accuracy(**options),
                "precision": Precision(**options, average="macro"),
                "recall": Recall(**options, average="macro"),
            }
        )

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        batch_output = super().calculate_eval_batch_loss(batch)
        self.metrics.update(batch_output["model_outputs"], batch[1])
        return batch_output

    def eval_epoch_end(self) -> None:
        for name, value in self.metrics.compute().items():
            self.run_history.update_metric(name, value)
        self.metrics.reset()


def main() -> None:
    arguments = parse_arguments()
    train_dataset, held_out = load_mnist() if arguments.full else load_digits()
    torch.manual_seed(0)
    model = build_model(num_pixels=train_dataset.tensors[0][0].numel())
    trainer = TrainerWithMetrics(
        model,
        loss_func=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        plugins=(),
        num_classes=10,
    )
    trainer.train(
        train_dataset,
        num_epochs=arguments.epochs,
        eval_dataset=held_out,
        per_device_batch_size=32,
    )
    results = trainer.evaluate(held_out, per_device_batch_size=256)
    trainer.print(f"Accuracy on {len(held_out)} held-out digits: {results['accuracy']:.4f}")


if __name__ == "__main__":
    main()
