"""The plugin ``gradual_unfreezing``: more and more of a model is trained as a run goes on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from pa_core import TrainerCallback, hookimpl
from pa_core.durations import Duration
from pa_models.freezing import ModelFreezer
from pa_models.selection import select

if TYPE_CHECKING:
    from torch import nn

    from pa_core import Trainer

Parts = str | int | Sequence[str | int]

_NOTHING = re.compile(r"\s*0+(?:\.0+)?\s*([A-Za-z%]+)\s*")


class Step:
    """A step of the plan: from when on, and which parts."""

    def __init__(self, text: str, parts: Parts) -> None:
        self.text = text
        self.start = _parse_start(text)
        self.parts = (parts,) if isinstance(parts, str | int) else tuple(parts)
        if not self.parts:
            raise ValueError(f"The plan unfreezes nothing at {text!r}: name a part, or '*' for all")

    def parameters(self, freezer: ModelFreezer) -> dict[int, str]:
        """What the step unfreezes: parameters' names by their ids."""
        found: dict[int, str] = {}
        names = {id(p): name for name, p in freezer.model.named_parameters()}
        for part in self.parts:
            if isinstance(part, str):
                chosen = list(select(freezer.model, (part,)).parameters.values())
            else:
                chosen = freezer.group_parameters(part)
            found |= {id(p): names[id(p)] for p in chosen}
        return found

    def unfreeze(self, freezer: ModelFreezer) -> None:
        """Unfreeze the step's parts."""
        for part in self.parts:
            if isinstance(part, str):
                freezer.unfreeze_named(part)
            else:
                freezer.unfreeze(part, part)


def _parse_start(text: str) -> Duration:
    """A duration, or the start of the run: ``"0 epochs"``, which no duration is."""
    nothing = _NOTHING.fullmatch(text)
    if nothing:
        return Duration(0, Duration.parse(f"1 {nothing[1]}").unit)
    return Duration.parse(text)


def parse_plan(plan: Mapping[str, Parts]) -> list[Step]:
    """The steps of a plan, in the order of their times.

    Raises:
        ValueError: for a plan without a step at the start, with two at one time, or whose times
            have units that can't be compared.
    """
    steps = sorted((Step(text, parts) for text, parts in plan.items()), key=lambda s: s.start.value)
    if not steps or steps[0].start.value:
        raise ValueError("The plan trains nothing at first: say what is trained from '0 epochs' on")
    later = [step for step in steps if step.start.value]
    units = {step.start.unit: step for step in later}
    if len(units) > 1:
        raise ValueError(
            f"The plan's times {' and '.join(repr(s.text) for s in units.values())} have different "
            "units, so which comes first isn't known: give all in one unit"
        )
    for one, two in pairwise(steps):
        if one.start.value == two.start.value:
            raise ValueError(
                f"The plan has two steps at one time, {one.text!r} and {two.text!r}: "
                "make one list of them"
            )
    return steps


def _check_plan(plan: dict[str, Any]) -> dict[str, Any]:
    parse_plan(plan)
    return plan


class GradualUnfreezingSettings(BaseModel):
    """The table ``[tool.pa-core.gradual_unfreezing]``."""

    model_config = ConfigDict(extra="forbid")

    plan: Annotated[dict[str, str | int | list[str | int]], AfterValidator(_check_plan)] = Field(
        description="From when on which parts are trained: names, in which * stands for anything, "
        "or indices of layer groups."
    )
    freeze_batch_norms: bool = Field(
        False, description="Whether batch norms are frozen too, with their statistics."
    )
    set_modules_as_eval: bool = Field(
        False, description="Whether frozen modules are in evaluation mode, without dropout."
    )


class GradualUnfreezingCallback(TrainerCallback):
    """Freezes a model at the start of a run, and unfreezes it part by part.

    What the plan doesn't name stays frozen. The optimizer holds all parameters from the start: it
    leaves frozen ones alone, since they have no gradients, and needs no new groups, so a resumed
    run finds the optimizer's state as it was. An unfrozen parameter is trained at the learning
    rate that the schedule has reached.

    Args:
        plan: from when on what is trained: durations such as ``"0 epochs"``, ``"500 updates"`` or
            ``"10%"``, all in one unit, to names (``"head"``, ``"encoder.layer.[89]"``, ``"*"``) or
            indices of layer groups (``-1``), or lists of these. See `ModelFreezer`.
        freeze_batch_norms: whether batch norms are frozen too, with their running statistics.
            Otherwise they are trained from the start.
        set_modules_as_eval: whether frozen modules are in evaluation mode as well.

    Raises:
        ValueError: for a plan that makes no sense.

    >>> callback = GradualUnfreezingCallback({"0 epochs": "head", "1 epochs": ["body.2", "*.bias"]})
    """

    Settings: ClassVar[type[BaseModel]] = GradualUnfreezingSettings

    def __init__(
        self,
        plan: Mapping[str, Parts],
        freeze_batch_norms: bool = False,
        set_modules_as_eval: bool = False,
    ) -> None:
        self.steps = parse_plan(plan)
        self.freeze_batch_norms = freeze_batch_norms
        self.set_modules_as_eval = set_modules_as_eval
        self._freezer: Any = None
        self._done = 0  # steps that were taken
        self._loaded: int | None = None

    @classmethod
    def from_settings(cls, settings: BaseModel) -> Self:
        """Build the callback from its table."""
        return cls(**{name: getattr(settings, name) for name in sorted(settings.model_fields_set)})

    def on_training_run_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Freeze all but what is trained first."""
        self._begin(trainer, steps=1)
        self._tell(trainer)

    def on_train_epoch_start(self, trainer: Trainer, **kwargs: Any) -> None:
        """Take the steps that an epoch's start brings."""
        self._go_on(trainer)

    @hookimpl(tryfirst=True)
    def on_train_step_end(self, trainer: Trainer, step: int, **kwargs: Any) -> None:
        """Take the steps that an update brings; never in the middle of accumulated gradients."""
        if self._done < len(self.steps) and trainer.position.batch == step + 1:
            self._go_on(trainer)

    def _begin(self, trainer: Trainer, steps: int) -> None:
        model: nn.Module = trainer.get_model(keep_torch_compile=False)
        self._freezer = ModelFreezer(model, self.freeze_batch_norms)
        self._check(trainer)
        self._freezer.freeze(0, -1, self.set_modules_as_eval)
        self._done = 0
        self._take(trainer, steps)

    def _go_on(self, trainer: Trainer) -> None:
        progress = trainer.progress
        reached = self._done
        while reached < len(self.steps) and self.steps[reached].start.reached(progress):
            reached += 1
        if self._done < len(self.steps) and self.steps[self._done].start.unit == "seconds":
            # Clocks differ, but all processes must unfreeze at once.
            reached = max(trainer._engine.gather_objects(reached))
        if reached > self._done:
            self._take(trainer, reached)
            self._tell(trainer)

    def _take(self, trainer: Trainer, until: int) -> None:
        """Take the steps up to `until`, and let distributed training know."""
        for step in self.steps[self._done : until]:
            step.unfreeze(self._freezer)
        self._done = until
        trainer.rewrap_model()

    def _tell(self, trainer: Trainer) -> None:
        step, parameters = self.steps[self._done - 1], list(self._freezer.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        trainer.print(
            f"From {step.text} on, {', '.join(map(str, step.parts))} is trained: {trained:,} of "
            f"{sum(p.numel() for p in parameters):,} parameters"
        )

    def _check(self, trainer: Trainer) -> None:
        """See that the model has the plan's parts, and the optimizer their parameters."""
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        planned: dict[int, str] = {}
        for step in self.steps:
            parameters = step.parameters(self._freezer)
            if not parameters.keys() - planned.keys():
                raise ValueError(
                    f"The plan unfreezes {', '.join(map(repr, step.parts))} at {step.text!r}, all "
                    "of which has no parameters or is unfrozen before: the steps overlap"
                )
            planned |= parameters
        missing = [name for key, name in planned.items() if key not in held]
        if missing:
            raise ValueError(
                f"The plan unfreezes {len(missing)} parameters that the optimizer doesn't hold, "
                f"such as {missing[0]}: create it from all of the model's, model.parameters(), or "
                "from discriminative_param_groups(model, lr)"
            )

    # -- State ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """How many steps were taken."""
        return {"steps": self._done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take note of a state; it is put in once the whole state is back."""
        self._loaded = state["steps"]

    def on_load_training_state(self, trainer: Trainer, **kwargs: Any) -> None:
        """Freeze and unfreeze as it was when the state was saved."""
        steps, self._loaded = self._loaded, None
        if steps:
            self._begin(trainer, min(steps, len(self.steps)))
