"""Effect of each option of the built-in plugin `speedups` on this machine.

Trains a small convolutional network and a wide perceptron with an option on and off, interleaved in
one process. The result is the median of the ratios of the rounds; below 1.00 the option is faster.
Options that the machine doesn't support (no C compiler, no TF32) are reported as not measured.

    python -m benchmarks.speedups --rounds 9
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import time
from typing import Any

from benchmarks.overhead import ROOT, describe_machine, versions

STEPS, BATCH_SIZE = 12, 32
SWITCHES: dict[str, dict[str, Any]] = {
    "fused_optimizer": {"fused_optimizer": True},
    "channels_last": {"channels_last": True},
    "tf32": {"tf32": True},
    "compile": {"compile": True},
}
MODELS = ("convolutions", "perceptron")


def make_model(name: str) -> Any:
    """The model, with the same weights each time."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "perceptron":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 32 * 32, 256), nn.ReLU(), nn.Linear(256, 10)
        )
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def make_run(model_name: str, options: dict[str, Any], device: str) -> Any:
    """A function that makes one run and returns milliseconds per step, called once to warm up."""
    import torch
    from torch.utils.data import TensorDataset

    from pa_core import Trainer
    from pa_core.callbacks import SpeedupsCallback

    generator = torch.Generator().manual_seed(0)
    samples = STEPS * BATCH_SIZE
    data = TensorDataset(
        torch.randn(samples, 3, 32, 32, generator=generator), torch.arange(samples) % 10
    )
    model = make_model(model_name)
    trainer = Trainer(
        model,
        torch.nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        callbacks=[SpeedupsCallback(**options)],
        plugins=(),
    )
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None

    def run() -> float:
        start = time.perf_counter()
        with contextlib.redirect_stdout(None):  # print only the table
            trainer.train(data, 1, per_device_batch_size=BATCH_SIZE)
        synchronize()
        return (time.perf_counter() - start) * 1e3 / STEPS

    run()  # compilation and other one-time work
    return run


def why_not(switch: str, device: str) -> str | None:
    """The reason why an option can't be measured here, or None if it can."""
    if switch == "compile" and not (shutil.which("cc") or shutil.which("gcc")):
        return "there is no C compiler"
    if switch == "tf32" and not device.startswith("cuda"):
        return "only GPUs have TF32"
    return None


def main() -> int:
    """Measure each option on and off, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of on and off (9)")
    parser.add_argument("--only", nargs="+", choices=SWITCHES, default=list(SWITCHES))
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| option | model | off, ms a step | on | on / off |\n| --- | --- | ---: | ---: | ---: |")
    for switch in args.only:
        reason = why_not(switch, device)
        for name in MODELS:
            if reason is not None:
                print(f"| `{switch}` | {name} | | | not measured: {reason} |")
                continue
            off, on = make_run(name, {}, device), make_run(name, SWITCHES[switch], device)
            pairs = [(off(), on()) for _ in range(args.rounds)]
            cells = [statistics.median(pair[i] for pair in pairs) for i in (0, 1)]
            ratio = statistics.median(second / first for first, second in pairs)
            print(f"| `{switch}` | {name} | {cells[0]:.2f} | {cells[1]:.2f} | {ratio:.2f} |")
    print(f"\nRounds: {args.rounds} of {STEPS} steps; batch {BATCH_SIZE}, AdamW, one thread.")
    described = describe_machine(device) | versions(["pa-core"])
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
