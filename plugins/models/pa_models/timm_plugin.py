"""The plugin ``timm``: models and optimizers by name, and training on mixed images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

from pa_core import hookimpl
from pa_core.errors import nearest
from pa_core.plugin import settings_from_options
from pa_models.timm_models import TimmModels
from pa_models.timm_settings import TimmOptions, TimmSettings

if TYPE_CHECKING:
    from torch import nn

    from pa_core import Trainer
    from pa_models.timm_loss import MixedLoss


class TimmPlugin:
    """Builds timm's models and optimizers by name, and trains classifiers on soft targets.

    With ``mixup``, ``cutmix``, ``label_smoothing`` or ``bce``, training uses the loss on soft
    targets; evaluation uses the Trainer's ``loss_func`` on the plain targets. Mixing is a function
    of the seed and the position in the run, so a resumed run mixes the same.

    Args:
        settings: the plugin's table.
        options: keys of the table, instead of `settings`.

    Raises:
        SettingsError: for mistakes in the options, as for those in the table.

    >>> TimmPlugin(optimizer="adamw", lr=1e-3, mixup=0.2).settings.mixes
    True
    """

    Settings = TimmSettings

    def __init__(
        self, settings: TimmSettings | None = None, **options: Unpack[TimmOptions]
    ) -> None:
        self.settings = settings_from_options(TimmSettings, settings, options, type(self).__name__)
        self._loss: MixedLoss | None = None

    @hookimpl
    def register_models(self) -> Mapping[str, Callable[..., nn.Module]]:
        """timm's models, as ``"timm/resnet18"``, with the arguments of the settings."""
        return TimmModels(self.settings.model_options)

    @hookimpl
    def create_optimizer(self, trainer: Trainer) -> Any:
        """The optimizer that the settings name.

        Raises:
            ValueError: for an optimizer that timm doesn't have, or ``layer_decay`` without ``lr``.
        """
        settings = self.settings
        if settings.optimizer is None:
            return None
        from timm import optim

        names = [str(name) for name in optim.list_optimizers()]
        if settings.optimizer.lower() not in names:
            raise ValueError(
                f"timm has no optimizer {settings.optimizer!r}."
                f"{nearest(settings.optimizer, names)} See timm.optim.list_optimizers()"
            )
        model, weight_decay = trainer.model, settings.weight_decay
        if settings.layer_decay is not None:
            from pa_models.layer_decay import param_groups_layer_decay

            if settings.lr is None:
                raise ValueError("[tool.pa-core.timm] layer_decay: requires lr")
            model = param_groups_layer_decay(model, settings.lr, weight_decay, settings.layer_decay)
            weight_decay = 0.0
        return optim.create_optimizer_v2(
            model,
            opt=settings.optimizer,
            lr=settings.lr,
            weight_decay=weight_decay,
            **settings.optimizer_options,
        )

    @hookimpl
    def calculate_train_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any] | None:
        """The loss on soft targets, if the settings need it."""
        loss = self._find_loss(trainer, batch)
        return None if loss is None else loss.training(trainer, batch[0], batch[1])

    @hookimpl
    def calculate_eval_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any] | None:
        """The loss on the plain targets."""
        loss = self._find_loss(trainer, batch)
        return None if loss is None else loss.evaluation(trainer, batch[0], batch[1])

    def _find_loss(self, trainer: Trainer, batch: Any) -> MixedLoss | None:
        settings = self.settings
        if not (settings.mixes or settings.label_smoothing or settings.bce):
            return None
        if not isinstance(batch, list | tuple) or len(batch) < 2:
            return None
        if self._loss is None:
            from pa_models.timm_loss import MixedLoss

            self._loss = MixedLoss(settings, self._num_classes(trainer))
        return self._loss

    def _num_classes(self, trainer: Trainer) -> int:
        given = self.settings.model_options.get("num_classes")
        known = given or getattr(trainer.get_model(), "num_classes", None)
        if not isinstance(known, int):
            raise ValueError(
                "Soft targets need the number of classes, but the model has no num_classes: "
                "set it in model_options of [tool.pa-core.timm]"
            )
        return known
