"""Run the jobs of the example plugins with a Trainer and in hand-written loops, and write both.

The loops use `DistributedDataParallel` and nothing of pa_core but the keys of its random numbers.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pa_curriculum import CurriculumPlugin
from pa_distillation import DistillationPlugin
from pa_gan import GanPlugin
from pa_gan.model import Gan
from pa_sam import SamPlugin
from pa_swa import SwaPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import TensorDataset

from pa_core import Trainer, hookimpl
from pa_core.data.rng import derive_key, key_at
from pa_core.testing import tiny_data, tiny_trainer
from tests.core.engine.test_optimizer_modes import ScheduleFree
from tests.deepspeed.run import fsdp_accelerator

RANK, PROCESSES = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
GLOBAL_BATCH, ACCUMULATION, EPOCHS, CLIP = 8, 2, 3, 0.2
RHO, TEMPERATURE, WEIGHT, LATENT = 0.2, 3.0, 0.3, 4
COUNTS = {1: 21, 2: 33, 3: 45}  # samples of each epoch of the curriculum

Micro = tuple[int, list[int]]
"""The number of a micro-batch in its epoch, and its samples on this process."""


def new_model(*, has_norm: bool = False, seed: int = 0, hidden: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        # Two values of each channel per sample, so that a batch of one sample has a variance.
        norm = nn.Unflatten(1, (-1, 2)), nn.BatchNorm1d(hidden // 2), nn.Flatten()
        layers: list[nn.Module] = [nn.Linear(6, hidden), *(norm if has_norm else ())]
        layers += [nn.Tanh(), nn.Dropout(0.2), nn.Linear(hidden, 3)]
        return nn.Sequential(*layers).double()


def new_gan() -> Gan:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh(), nn.Linear(8, 6))
        discriminator = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        return Gan(generator, discriminator).double()


def two_optimizers(model: Gan, *, has_modes: bool = False) -> list[torch.optim.Optimizer]:
    own = model.generator.parameters()
    return [
        ScheduleFree(own, lr=0.5) if has_modes else torch.optim.Adam(own, lr=0.01),
        torch.optim.SGD(model.discriminator.parameters(), lr=0.1, momentum=0.9),
    ]


def two_updates_each(optimizer: Any) -> StepLR:
    return StepLR(optimizer, 2, gamma=0.8)


def data(samples: int, seed: int = 7) -> TensorDataset:
    vectors, classes = tiny_data(samples, seed=seed).tensors
    return TensorDataset(vectors.double(), classes)


@dataclass
class Job:
    """A job: what it trains on, and how the loop by hand differs from an ordinary one.

    Attributes:
        kind: the plugin's name.
        samples: of the training data. The last global batch of 45 has five, which is uneven; that
            of 41 has one, so that a second process has none.
        has_norm: whether the model has a batch norm.
        has_modes: whether an optimizer has a training and an evaluation mode.
        is_sharded: whether FSDP shards the model of the Trainer between processes.
        mistake: what the loop by hand does wrong, to see that the comparison notices.
    """

    kind: str
    samples: int = 45
    has_norm: bool = False
    has_modes: bool = False
    is_sharded: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    mistake: str = ""

    def plugin(self) -> Any:
        if self.kind == "sam":
            return SamPlugin(SamPlugin.Settings(rho=RHO, **self.settings))
        if self.kind == "distillation":
            settings = DistillationPlugin.Settings(temperature=TEMPERATURE, weight=WEIGHT)
            return DistillationPlugin(settings, teacher())
        if self.kind == "gan":
            return GanPlugin(GanPlugin.Settings(latent=LATENT, **self.settings))
        if self.kind == "swa":
            return SwaPlugin(SwaPlugin.Settings(start_epoch=2))
        return CurriculumPlugin(CurriculumPlugin.Settings(start=21 / 45, epochs=3))

    def count(self, epoch: int) -> int:
        is_all = self.kind != "curriculum" or self.mistake == "all of the data"
        return self.samples if is_all else COUNTS[epoch]


def teacher() -> nn.Module:
    return new_model(seed=5, hidden=16)


# -- With a Trainer -------------------------------------------------------------------------------


class Saves:
    """Saves a training state at an update."""

    def __init__(self, update: int, folder: Path) -> None:
        self.update, self.folder = update, folder

    @hookimpl
    def on_optimizer_step_end(self, trainer: Trainer) -> None:
        if trainer.updates == self.update:
            trainer.control.save(self.folder, everywhere=True)


def by_trainer(job: Job, *plugins: Any, **arguments: Any) -> dict[str, Any]:
    accelerator = fsdp_accelerator() if job.is_sharded else {"cpu": True}
    options: dict[str, Any] = {"model": new_model(has_norm=job.has_norm)}
    if job.kind == "gan":
        model = new_gan()
        options = {"model": model, "optimizer": two_optimizers(model, has_modes=job.has_modes)}
        arguments["create_scheduler_fn"] = two_updates_each
    trainer = tiny_trainer(job.plugin(), *plugins, accelerator=accelerator, **options)
    trainer.train(
        data(job.samples),
        EPOCHS,
        data(14, seed=8),
        per_device_batch_size=GLOBAL_BATCH // PROCESSES,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_clip_norm=CLIP,
        train_dataloader_kwargs={"shuffle": False},
        **arguments,
    )
    history = trainer.run_history
    values = {name: list(history.get_metric_values(name)) for name in history.get_metric_names()}
    return values | weights_of(trainer.get_model()) | {"updates": trainer.updates}


def weights_of(model: nn.Module) -> dict[str, Any]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).tolist()
        for name, value in model.state_dict().items()
    }


# -- By hand --------------------------------------------------------------------------------------


def micro_batches(samples: int) -> Iterator[tuple[list[int], int]]:
    """The samples of this process in each global batch, and how many it has on all processes."""
    for start in range(0, samples, GLOBAL_BATCH):
        whole = range(start, min(start + GLOBAL_BATCH, samples))
        sizes = [len(whole[rank::PROCESSES]) for rank in range(PROCESSES)]
        first = start + sum(sizes[:RANK])
        yield list(range(first, first + sizes[RANK])), len(whole)


class Loop:
    """A training loop of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = new_model(has_norm=job.has_norm)
        self.wrapped: Any = DistributedDataParallel(self.model) if PROCESSES > 1 else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.x, self.y = data(job.samples).tensors
        self.teacher = teacher().eval()
        self.averaged: list[dict[str, Tensor]] = []  # the weights of each averaged epoch
        self.sums: dict[str, Tensor] = {}
        self.history: dict[str, list[float]] = {}

    def run(self) -> dict[str, Any]:
        updates = 0
        for epoch in range(1, EPOCHS + 1):
            self.model.train()
            self.sums, samples = {}, self.job.count(epoch)
            batches = list(enumerate(micro_batches(samples)))
            for first in range(0, len(batches), ACCUMULATION):
                group = batches[first : first + ACCUMULATION]
                micros = [(step, indices) for step, (indices, _) in group]
                self.update(epoch, micros, sum(size for _, (_, size) in group))
                updates += 1
            for name, total in self.sums.items():
                self.record(name, summed(total).item() / samples)
            if self.job.kind == "swa" and epoch >= 2:
                self.averaged.append(deepcopy(self.model.state_dict()))
            self.evaluate()
        return self.history | weights_of(self.model) | {"updates": updates}

    def record(self, name: str, value: float) -> None:
        self.history.setdefault(name, []).append(value)

    def update(self, epoch: int, micros: list[Micro], size: int) -> None:
        self.optimizer.zero_grad()
        self.accumulate(epoch, micros, size)
        parameters, mistake = list(self.model.parameters()), self.job.mistake
        if mistake == "clipped before":
            nn.utils.clip_grad_norm_(parameters, CLIP)
        if self.job.kind == "sam":
            self.take_second_pass(epoch, micros, size)
        if mistake != "clipped before":
            nn.utils.clip_grad_norm_(parameters, CLIP)
        self.optimizer.step()

    def accumulate(
        self, epoch: int, micros: list[Micro], size: int, *, is_first: bool = True
    ) -> None:
        """Add up the gradients of the mean over all samples of the micro-batches."""
        for step, indices in micros:
            key = key_at(derive_key(42, "model", epoch, RANK), step)
            torch.manual_seed(key + (self.job.mistake == "other masks" and not is_first))
            is_local = is_first and self.job.mistake == "local gradients"
            is_reduced = step == micros[-1][0] and not is_local
            wait = nullcontext() if is_reduced or PROCESSES == 1 else self.wrapped.no_sync()
            with wait:
                rows = torch.tensor(indices or [0])  # without samples, its loss counts for nothing
                loss = self.sum_of_losses(rows, counts=bool(indices), is_recorded=is_first)
                (loss * PROCESSES / size).backward()

    def sum_of_losses(self, rows: Tensor, *, counts: bool, is_recorded: bool) -> Tensor:
        outputs = self.wrapped(self.x[rows])
        loss = nn.functional.cross_entropy(outputs, self.y[rows], reduction="sum")
        parts = {"train_loss_epoch": loss}
        if self.job.kind == "distillation":
            with torch.no_grad():
                target = (self.teacher(self.x[rows]) / TEMPERATURE).softmax(1)
            found = (outputs / TEMPERATURE).softmax(1)
            divergence = TEMPERATURE**2 * (target * (target / found).log()).sum()
            weights = (1.0, 1.0) if self.job.mistake == "not weighted" else (1 - WEIGHT, WEIGHT)
            parts = {
                "train_loss_epoch": weights[0] * loss + weights[1] * divergence,
                "train_student_loss": loss,
                "train_distillation_loss": divergence,
            }
        for name, part in parts.items() if is_recorded else ():
            before = self.sums.get(name, torch.zeros((), dtype=torch.float64))
            self.sums[name] = before + part.detach() * counts
        return parts["train_loss_epoch"] * counts

    def take_second_pass(self, epoch: int, micros: list[Micro], size: int) -> None:
        """Replace the gradients by those at the perturbed weights."""
        parameters = list(self.model.parameters())
        gradients = [p.grad.clone() for p in parameters if p.grad is not None]
        before, buffers = deepcopy(parameters), deepcopy(list(self.model.buffers()))
        sizes = [p.detach().abs() if self.job.settings else torch.ones_like(p) for p in parameters]
        flat = torch.cat([(s * g).flatten() for s, g in zip(sizes, gradients, strict=True)])
        with torch.no_grad():
            for p, s, g in zip(parameters, sizes, gradients, strict=True):
                p.add_(RHO * s**2 * g / flat.norm())
        self.optimizer.zero_grad()
        self.accumulate(epoch, micros, size, is_first=False)
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
            if self.job.mistake != "statistics updated twice":
                for buffer, saved in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(saved)

    def evaluate(self) -> None:
        if PROCESSES > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        self.record("eval_loss_epoch", evaluated(self.model))
        if self.averaged:
            average = deepcopy(self.model)
            mean = {
                n: torch.stack([w[n] for w in self.averaged]).double().mean(0)
                for n in average.state_dict()
            }
            average.load_state_dict(mean)
            if self.job.mistake != "not refreshed":
                self.refresh(average)
            self.record("swa_eval_loss_epoch", evaluated(average))

    @torch.no_grad()
    def refresh(self, average: nn.Sequential) -> None:
        """Calculate the statistics of the batch norm, the layer with number 2."""
        batches = [average[:2](self.x[rows]) for rows, _ in micro_batches(self.job.samples) if rows]
        statistics = [torch.stack((x.mean((0, 2)), x.var((0, 2)))) for x in batches]
        count = summed(torch.tensor(len(batches)))
        mean, variance = summed(torch.stack(statistics).sum(0)) / count
        average[2].running_mean.copy_(mean)
        average[2].running_var.copy_(variance)


class GanLoop:
    """A training loop of a GAN, whose parts are wrapped one by one.

    Args:
        job: the job.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.model = job, new_gan()
        parts = {"generator": self.model.generator, "discriminator": self.model.discriminator}
        self.parts = parts
        self.wrapped = {
            name: DistributedDataParallel(part) if PROCESSES > 1 else part
            for name, part in parts.items()
        }
        optimizers = two_optimizers(self.model, has_modes=job.has_modes)
        self.optimizers = dict(zip(parts, optimizers, strict=True))
        self.schedulers = [two_updates_each(one) for one in self.optimizers.values()]
        self.x = data(job.samples).tensors[0]
        self.history: dict[str, list[float]] = {}

    def run(self) -> dict[str, Any]:
        turns, updates = self.job.settings["discriminator_updates"] + 1, 0
        for epoch in range(1, EPOCHS + 1):
            self.sums: dict[str, Tensor] = {}
            self.set_mode("train")
            batches = list(enumerate(micro_batches(self.job.samples)))
            for first in range(0, len(batches), ACCUMULATION):
                part = "discriminator" if (updates + 1) % turns else "generator"
                self.update(part, epoch, batches[first : first + ACCUMULATION])
                updates += 1
            for name in sorted(self.sums):
                total, count = summed(self.sums[name]).tolist()
                self.history.setdefault(name, []).append(total / count)
            if self.job.mistake != "not switched":
                self.set_mode("eval")
            self.evaluate()
        return self.history | weights_of(self.model) | {"updates": updates}

    def set_mode(self, mode: str) -> None:
        for optimizer in self.optimizers.values():
            getattr(optimizer, mode, lambda: None)()

    def update(
        self, part: str, epoch: int, batches: list[tuple[int, tuple[list[int], int]]]
    ) -> None:
        self.model.zero_grad()
        size, last = sum(size for _, (_, size) in batches), batches[-1][0]
        for step, (indices, _) in batches:
            torch.manual_seed(key_at(derive_key(42, "model", epoch, RANK), step))
            wrapped = self.wrapped[part]
            is_reduced = step == last or PROCESSES == 1
            with nullcontext() if is_reduced else wrapped.no_sync():
                rows = torch.tensor(indices or [0])
                loss = self.loss(part, self.x[rows], wrapped) * bool(indices)
                (loss * PROCESSES / size).backward()
            for name in ("train_loss_epoch", f"train_{part}_loss"):
                before = self.sums.get(name, torch.zeros(2, dtype=torch.float64))
                self.sums[name] = before + torch.stack(
                    (loss.detach(), torch.tensor(float(len(indices)), dtype=torch.float64))
                )
        clipped = self.model if self.job.mistake == "others clipped" else self.parts[part]
        nn.utils.clip_grad_norm_(clipped.parameters(), CLIP)
        for name, optimizer in self.optimizers.items():
            if name == part or self.job.mistake == "both stepped":
                optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler before its optimizer's first step
            for scheduler in self.schedulers:
                scheduler.step()

    def loss(self, part: str, real: Tensor, wrapped: nn.Module) -> Tensor:
        """The sum over the samples."""
        noise = torch.randn(len(real), LATENT, dtype=torch.float64)
        if part == "generator":
            found = self.parts["discriminator"](wrapped(noise)).sigmoid()
            return -found.log().sum()
        found = wrapped(self.parts["generator"](noise).detach()).sigmoid()
        return -((1 - found).log() + wrapped(real).sigmoid().log()).sum()

    def evaluate(self) -> None:
        x = data(14, seed=8).tensors[0]
        sums = torch.zeros(2, dtype=torch.float64)
        torch.manual_seed(derive_key(42, "eval", RANK))
        for indices, _ in micro_batches(14):
            with torch.no_grad():
                noise = torch.randn(len(indices), LATENT, dtype=torch.float64)
                found = self.model.discriminator(self.model.generator(noise)).sigmoid()
                truth = self.model.discriminator(x[indices]).sigmoid()
                other = -((1 - found).log() + truth.log()).sum()
                sums += torch.stack((other, -found.log().sum()))
        other, own = (summed(sums) / 14).tolist()
        for name, value in (
            ("eval_loss_epoch", other),
            ("eval_discriminator_loss", other),
            ("eval_generator_loss", own),
        ):
            self.history.setdefault(name, []).append(value)


def evaluated(model: nn.Module) -> float:
    """The mean loss over all of the evaluation data."""
    x, y = data(14, seed=8).tensors
    with torch.no_grad():
        return nn.functional.cross_entropy(model.eval()(x), y).item()


def summed(tensor: Tensor) -> Tensor:
    if PROCESSES > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


# -- Both -----------------------------------------------------------------------------------------

JOBS = {
    "sam": Job("sam"),
    "sam 41": Job("sam", samples=41),
    "sam adaptive": Job("sam", settings={"adaptive": True}),
    "sam batch norm": Job("sam", has_norm=True),
    "sam batch norm 41": Job("sam", samples=41, has_norm=True),
    "distillation": Job("distillation"),
    "distillation 41": Job("distillation", samples=41),
    "curriculum": Job("curriculum"),
    "gan": Job("gan", settings={"discriminator_updates": 1}),
    "gan 41": Job("gan", samples=41, settings={"discriminator_updates": 2}),
    "gan modes": Job("gan", has_modes=True, settings={"discriminator_updates": 1}),
    "swa": Job("swa", has_norm=True),
    "swa 41": Job("swa", samples=41, has_norm=True),
}
if PROCESSES > 1:
    JOBS["sam sharded"] = Job("sam", samples=41, is_sharded=True)
    JOBS["sam adaptive sharded"] = Job("sam", is_sharded=True, settings={"adaptive": True})
MISTAKES = {
    "sam": ["clipped before", "other masks", "local gradients"],
    "sam batch norm": ["statistics updated twice"],
    "distillation": ["not weighted"],
    "curriculum": ["all of the data"],
    "gan": ["others clipped", "both stepped"],
    "gan modes": ["not switched"],
    "swa": ["not refreshed"],
}


def results(name: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The results of a job: of a Trainer, after a resume, by hand, and by hand with mistakes."""
    job, state = JOBS[name], folder / name.replace(" ", "-")
    found = {"trainer": by_trainer(job, Saves(5, state))}
    found["resumed"] = by_trainer(job, resume_from=state)
    loop = GanLoop if job.kind == "gan" else Loop
    found["by hand"] = loop(job).run()
    for mistake in MISTAKES.get(name, []):
        if mistake == "local gradients" and PROCESSES == 1:
            continue
        found[mistake] = loop(Job(**(vars(job) | {"mistake": mistake}))).run()
    return found


class Assigns:
    """Assigns a dataset with this many samples, None for no assignment, before an epoch."""

    def __init__(self, samples: int | None) -> None:
        self.samples = samples

    @hookimpl
    def on_train_epoch_start(self, trainer: Trainer) -> None:
        if trainer.position.epoch == 2 and self.samples is not None:
            trainer.train_dataset = data(self.samples)


def refused(samples: int | None, *, first: int = 16) -> str:
    """The error if a process assigns a dataset with this many samples."""
    trainer = tiny_trainer(Assigns(samples), model=new_model(), accelerator={"cpu": True})
    with pytest.raises(RuntimeError) as caught:
        trainer.train(data(first), 2)
    return str(caught.value)


if __name__ == "__main__":
    outcome: dict[str, Any] = {name: results(name, Path(sys.argv[1])) for name in JOBS}
    outcome["refused"] = {
        "changed on one": refused(16 if RANK else None),
        "changed differently": refused(16 + RANK),
        "different": refused(None, first=16 + RANK),
    }
    if RANK == 0:
        (Path(sys.argv[1]) / "outcome.json").write_text(json.dumps(outcome))
