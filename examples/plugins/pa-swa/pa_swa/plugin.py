"""The plugin ``swa``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pa_core import hookimpl
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from pathlib import Path

    from pa_core import Trainer
    from torch import nn
    from torch.optim.swa_utils import AveragedModel


class SwaPlugin:
    """Averages the weights at the end of epochs (stochastic weight averaging), and evaluates them.

    The mean of the weights at the end of each epoch from `start_epoch` on often generalises better
    than the last ones. Statistics of batch norms don't fit the averaged weights, so they are
    calculated again from the training data. Each evaluation evaluates the average, too, as ``swa``.
    Training itself isn't changed.

    Args:
        settings: the plugin's table.

    Attributes:
        average: the average, None before the first run; ``average.module`` is the model.

    Raises:
        ValueError: at the start of a run whose engine (DeepSpeed, FSDP) shards the weights.
    """

    follows_weights = ("average",)

    class Settings(BaseModel):
        """The table ``[tool.pa-core.swa]``."""

        model_config = ConfigDict(extra="forbid")

        start_epoch: int = Field(1, ge=1, description="The first epoch whose weights are averaged.")

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.average: AveragedModel | None = None
        self._loaded: dict[str, Any] = {}

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        from torch.optim.swa_utils import AveragedModel

        if trainer.sharded_by is not None:
            raise ValueError(
                f"swa needs all weights on each process, but {trainer.sharded_by} shards them: "
                "disable the plugin"
            )
        self.average = AveragedModel(trainer.get_model(keep_torch_compile=False))

    @hookimpl
    def on_train_epoch_end(self, trainer: Trainer) -> None:
        from pa_swa.batch_norm import refresh_batch_norms

        if trainer.position.epoch_of_run + 1 >= self.settings.start_epoch:
            assert self.average is not None
            self.average.update_parameters(trainer.get_model(keep_torch_compile=False))
            refresh_batch_norms(self.average.module, trainer)

    @hookimpl
    def register_eval_models(self) -> Mapping[str, nn.Module]:
        if self.average is None or not self.average.n_averaged:
            return {}
        return {"swa": self.average.module}

    # -- State ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The average, and how many weights are in it."""
        return {} if self.average is None else {"average": self.average.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state for `on_load_training_state`, which knows the model."""
        self._loaded = state

    @hookimpl
    def on_load_training_state(self, trainer: Trainer, state_dir: Path) -> None:
        self.on_training_run_start(trainer)
        state, self._loaded = self._loaded, {}
        if self.average is not None and "average" in state:
            self.average.load_state_dict(state["average"])
