"""Cost of starting: imports, building a Trainer, the first step, and how much code a run imports.

Each figure comes from a new process. Those of pa-core and of accelerate alone take turns,
so that a slow phase of the machine affects both.

    python benchmarks/cold_start.py --rounds 9

README.md in this folder has the details.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

IMPORT = """
import json, time
start = time.perf_counter(), time.process_time()
import torch
torch_done = time.perf_counter(), time.process_time()
from {module} import {name}
done = time.perf_counter(), time.process_time()
print(json.dumps({{
    "time": done[0] - torch_done[0], "processor time": done[1] - torch_done[1],
    "time, with torch": done[0] - start[0], "processor time, with torch": done[1] - start[1],
}}))
"""

RUN = """
import json, sys, time, torch
from pa_core import Trainer

torch.set_num_threads(1)
model = torch.nn.Linear(4, 2)
data = torch.utils.data.TensorDataset(torch.rand(64, 4), torch.randint(2, (64,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
steps = []
optimizer.register_step_post_hook(lambda *_: steps.append(time.perf_counter()))
start = time.perf_counter()
trainer = Trainer(model, torch.nn.functional.cross_entropy, optimizer)
built = time.perf_counter()
trainer.train(data, 1, eval_dataset=data, per_device_batch_size=8)
files = [
    module.__file__
    for name, module in sys.modules.items()
    if name.partition(".")[0] == "pa_core" and getattr(module, "__file__", None)
]
lines = sum(len(open(file, encoding="utf-8").readlines()) for file in files)
figures = {"build": built - start, "first_step": steps[0] - built}
print(json.dumps(figures | {"modules": len(files), "lines": lines}))
"""


def in_a_process(code: str) -> dict[str, float]:
    """Run the code in a new process, and read the last line that it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="Also write the figures to this file.")
    options = parser.parse_args()
    codes = {
        "accelerate": IMPORT.format(module="accelerate", name="Accelerator"),
        "pa_core": IMPORT.format(module="pa_core", name="Trainer"),
        "run": RUN,
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in codes}
    for number in range(options.rounds + 1):  # the first fills the caches
        for name, code in codes.items():
            figures = in_a_process(code)
            if number:
                found[name].append(figures)

    def median(name: str, figure: str) -> float:
        return statistics.median(figures[figure] for figures in found[name])

    print("| import | accelerate, s | pa_core, s | ratio | min to max |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for figure in found["accelerate"][0]:
        pairs = zip(found["accelerate"], found["pa_core"], strict=True)
        ratios = [ours[figure] / alone[figure] for alone, ours in pairs]
        print(
            f"| {figure} | {median('accelerate', figure):.3f} | {median('pa_core', figure):.3f} "
            f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
        )
    print(f"\nTrainer(): {1000 * median('run', 'build'):.1f} ms")
    print(f"train() until the first step is done: {1000 * median('run', 'first_step'):.1f} ms")
    modules, lines = median("run", "modules"), median("run", "lines")
    print(f"a plain run imports {modules:.0f} modules of pa_core, {lines:,.0f} lines")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
