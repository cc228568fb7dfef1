"""Draw the pictures of the page about reports: ``python docs/report_picture.py`` writes them.

It trains a small network on scikit-learn's digits with three learning rates, and takes pictures of
the report of a run and of the comparison of all three. It needs Chromium and playwright.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from playwright.sync_api import sync_playwright
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
from pa_metrics import MetricsPlugin
from pa_report import ReportPlugin, read_run
from pa_report.comparison_page import comparison_page

IMAGES = Path(__file__).parent / "images"
WIDTH = 1120
EPOCHS, BATCH_SIZE = 12, 32


class DigitNet(nn.Sequential):
    """A convolutional network for images of 8 by 8 pixels."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)),
        )


class ShowMistakes(TrainerCallback):
    """Sends the digits that the network gets wrong to the report."""

    @torch.no_grad()
    def on_training_run_end(self, trainer: Trainer, **kwargs: Any) -> None:
        images, labels = trainer.eval_dataset.tensors
        wrong = trainer.get_model().eval()(images).argmax(1) != labels
        call = trainer.callback_handler.call_event
        call("log_images", trainer, name="wrong digits", images=images[wrong])


def write_reports(folder: Path) -> dict[str, Path]:
    """Train, and write the pages by the names of their pictures."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = (TensorDataset(*data[part]) for part in (slice(1437), slice(1437, None)))
    names = {"accuracy": {}, "f1_score": {"average": "macro"}, "confusion_matrix": {}}
    on = ["eval", "train"]
    files = []
    for rate in (0.001, 0.003, 0.01):
        torch.manual_seed(0)
        model = DigitNet()
        report = ReportPlugin(folder=folder, name=f"lr-{rate}", title="Digits, one-cycle schedule")
        metrics = MetricsPlugin(metrics=names, on=on, task="multiclass", num_classes=10)
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(),
            torch.optim.AdamW(model.parameters(), lr=rate),
            callbacks=[ShowMistakes()],
            plugins=[metrics, report],
        )
        trainer.train(
            train,
            EPOCHS,
            eval_dataset=test,
            per_device_batch_size=BATCH_SIZE,
            create_scheduler_fn=lambda optimizer, rate=rate: OneCycleLR(
                optimizer, rate, total_steps=EPOCHS * -(-len(train) // BATCH_SIZE)
            ),
        )
        files.append(report.path)
    comparison = folder / "comparison.html"
    comparison.write_text(
        comparison_page([read_run(file) for file in files], "Three learning rates"),
        encoding="utf-8",
    )
    return {"page": files[-1], "comparison": comparison}


def main() -> None:
    """Write the pictures."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, file in write_reports(Path(folder)).items():
            page = browser.new_page(viewport={"width": WIDTH, "height": 1600})
            page.goto(file.as_uri())
            curves = page.locator("figure").first.bounding_box()
            height = curves["y"] + curves["height"] + 20
            clip = {"x": 0, "y": 0, "width": WIDTH, "height": height}
            page.screenshot(path=IMAGES / f"report_{name}.png", clip=clip)
        browser.close()


if __name__ == "__main__":
    main()
