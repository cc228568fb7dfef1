"""The plugin ``gradual_unfreezing``: unfreezes a model part by part during a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from pa_core import hookimpl
from pa_core.durations import Duration
from pa_core.plugin import CallbackSettings, ConfigurableCallback, named_parameters
from pa_models.freezing import ModelFreezer
from pa_models.layer_groups import tied_as_text
from pa_models.selection import select

if TYPE_CHECKING:
    from torch import nn

    from pa_core import Trainer

Parts = str | int | Sequence[str | int]

_ZERO = re.compile(r"\s*0+(?:\.0+)?\s*([A-Za-z%]+)\s*")


class Stage:
    """A stage of the plan: when it starts, and which parts it unfreezes."""

    def __init__(self, text: str, parts: Parts) -> None:
        self.text = text
        self.start = _parse_start(text)
        self.parts = (parts,) if isinstance(parts, str | int) else tuple(parts)
        if not self.parts:
            raise ValueError(
                f"The plan unfreezes nothing at {text!r}: name a part, or use '*' for all"
            )

    def parameters(self, freezer: ModelFreezer) -> dict[int, str]:
        """The names of the parameters that the stage unfreezes, by their ids."""
        found: dict[int, str] = {}
        names = {id(p): name for name, p in named_parameters(freezer.model)}
        for part in self.parts:
            if isinstance(part, str):
                chosen = list(select(freezer.model, (part,)).parameters.values())
            else:
                chosen = freezer.group_parameters(part)
            found |= {id(p): names[id(p)] for p in chosen}
        return found

    def unfreeze(self, freezer: ModelFreezer) -> None:
        """Unfreeze the parts of the stage."""
        for part in self.parts:
            if isinstance(part, str):
                freezer.unfreeze_named(part)
            else:
                freezer.unfreeze(part, part)


def _parse_start(text: str) -> Duration:
    """Parse a duration, or a zero such as ``"0 epochs"``, which `Duration.parse` rejects."""
    zero = _ZERO.fullmatch(text)
    if zero:
        return Duration(0, Duration.parse(f"1 {zero[1]}").unit)
    return Duration.parse(text)


def parse_plan(plan: Mapping[str, Parts]) -> list[Stage]:
    """The stages of a plan, in order.

    Raises:
        ValueError: for a plan without a stage at the start, with two stages at the same time, or
            with times whose units can't be compared.
    """
    stages = [Stage(text, parts) for text, parts in plan.items()]
    stages.sort(key=lambda stage: stage.start.value)
    if not stages or stages[0].start.value:
        raise ValueError("The plan trains nothing at first: add what is trained from '0 epochs' on")
    units = {stage.start.unit: stage for stage in stages if stage.start.value}
    if len(units) > 1:
        times = " and ".join(repr(stage.text) for stage in units.values())
        raise ValueError(
            f"The plan's times {times} have different units and can't be ordered: use one unit"
        )
    for one, two in pairwise(stages):
        if one.start.value == two.start.value:
            raise ValueError(
                f"The plan has two stages at the same time, {one.text!r} and {two.text!r}: "
                "merge them into one list"
            )
    return stages


def _check_plan(plan: dict[str, Any]) -> dict[str, Any]:
    parse_plan(plan)
    return plan


class GradualUnfreezingSettings(CallbackSettings):
    """The table ``[tool.pa-core.gradual_unfreezing]``."""

    plan: Annotated[dict[str, str | int | list[str | int]], AfterValidator(_check_plan)] = Field(
        description="Times, and the parts that are trained from then on: names, in which * matches "
        "anything, or indices of layer groups."
    )
    freeze_batch_norms: bool = Field(
        False, description="Whether to freeze batch norms as well, with their running statistics."
    )
    set_modules_as_eval: bool = Field(
        False, description="Whether frozen modules are in evaluation mode, without dropout."
    )


class GradualUnfreezingCallback(ConfigurableCallback):
    """Freezes a model at the start of a run, and unfreezes it part by part.

    Parts that the plan doesn't name stay frozen. The optimizer has all parameters from the start:
    it doesn't change frozen ones, since they have no gradients. It needs no new groups, so its
    state fits in a resumed run. An unfrozen parameter is trained with the current learning rate of
    the schedule.

    Args:
        plan: maps durations such as ``"0 epochs"``, ``"500 updates"`` or ``"10%"``, all in one
            unit, to the parts that are trained from then on: names (``"head"``,
            ``"encoder.layer.[89]"``, ``"*"``), indices of layer groups (``-1``), or lists of these.
            See `ModelFreezer`.
        freeze_batch_norms: whether to freeze batch norms as well, with their running statistics.
            Otherwise they are trained from the start.
        set_modules_as_eval: whether frozen modules are in evaluation mode as well.

    Raises:
        ValueError: for an invalid plan.

    >>> callback = GradualUnfreezingCallback({"0 epochs": "head", "1 epochs": ["body.2", "*.bias"]})
    """

    Settings = GradualUnfreezingSettings

    def __init__(
        self,
        plan: Mapping[str, Parts],
        freeze_batch_norms: bool = False,
        set_modules_as_eval: bool = False,
    ) -> None:
        self.stages = parse_plan(plan)
        self.freeze_batch_norms = freeze_batch_norms
        self.set_modules_as_eval = set_modules_as_eval
        self._freezer: Any = None
        self._done = 0  # number of stages that have started
        self._loaded: int | None = None

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Freeze everything except the parts of the first stage."""
        self._freeze(trainer, num_stages=1)
        self._print_stage(trainer)

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Start the stages whose time has come."""
        self._start_due_stages(trainer)

    @hookimpl(tryfirst=True)
    def on_train_step_end(self, trainer: Trainer, step: int, **kwargs: Any) -> None:
        """Start the stages whose time has come, but not between accumulated micro-batches."""
        if self._done < len(self.stages) and trainer.position.batch == step + 1:
            self._start_due_stages(trainer)

    def _freeze(self, trainer: Trainer, num_stages: int) -> None:
        """Freeze the model except the parts of the first `num_stages` stages."""
        model: nn.Module = trainer.get_model(keep_torch_compile=False)
        # What the user has frozen, such as batch norms, stays frozen.
        self._freezer = ModelFreezer(
            model, self.freeze_batch_norms, keep_frozen=True, verbose=False
        )
        self._check_plan_fits(trainer)
        self._freezer.freeze(0, -1, self.set_modules_as_eval)
        self._done = 0
        self._start_stages(trainer, num_stages)

    def _start_due_stages(self, trainer: Trainer) -> None:
        progress = trainer.progress
        reached = self._done
        while reached < len(self.stages) and self.stages[reached].start.reached(progress):
            reached += 1
        if self._done < len(self.stages) and self.stages[self._done].start.unit == "seconds":
            # Clocks differ, but all processes must unfreeze at the same update.
            (reached,) = trainer.largest(reached)
        if reached > self._done:
            self._start_stages(trainer, reached)
            self._print_stage(trainer)

    def _start_stages(self, trainer: Trainer, until: int) -> None:
        """Unfreeze the parts of the stages up to `until`, and re-wrap the model."""
        for stage in self.stages[self._done : until]:
            stage.unfreeze(self._freezer)
        self._done = until
        trainer.rewrap_model()

    def _print_stage(self, trainer: Trainer) -> None:
        stage, parameters = self.stages[self._done - 1], list(self._freezer.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        trainer.print(
            f"From {stage.text} on, {', '.join(map(str, stage.parts))} is trained: {trained:,} of "
            f"{sum(p.numel() for p in parameters):,} parameters"
            + tied_as_text(self._freezer.model, (p for p in parameters if p.requires_grad))
        )

    def _check_plan_fits(self, trainer: Trainer) -> None:
        """Check that the model has the plan's parts, and the optimizer their parameters."""
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        planned: dict[int, str] = {}
        for stage in self.stages:
            parameters = stage.parameters(self._freezer)
            if not parameters.keys() - planned.keys():
                again = [p for p in self._freezer.model.parameters() if id(p) in parameters]
                raise ValueError(
                    f"The plan unfreezes {', '.join(map(repr, stage.parts))} at {stage.text!r}, "
                    "which has no parameters or is unfrozen earlier: the stages overlap"
                    + tied_as_text(self._freezer.model, again)
                )
            planned |= parameters
        missing = [name for key, name in planned.items() if key not in held]
        if missing:
            raise ValueError(
                f"The plan unfreezes {len(missing)} parameters that the optimizer lacks, such as "
                f"{missing[0]}: create it from model.parameters(), or from "
                "discriminative_param_groups(model, lr)"
            )

    # -- State ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """The number of stages that have started."""
        return {"steps": self._done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Keep the state until `on_load_training_state`, when the model is restored, too."""
        self._loaded = state["steps"]

    def on_load_training_state(self, trainer: Trainer, **kwargs: Any) -> None:
        """Freeze and unfreeze the parts as they were when the state was saved."""
        num_stages, self._loaded = self._loaded, None
        if num_stages:
            self._freeze(trainer, min(num_stages, len(self.stages)))
