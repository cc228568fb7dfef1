"""The plugin ``transformers``: batches that are dicts, and models that compute their loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pa_core import hookimpl
from pa_core.errors import SettingsError, nearest
from pa_core.plugin import LocalPath, settings_from_options
from pa_models.transformers_loss import LOSS_MEANS, BatchLosses
from pa_models.transformers_models import TransformersModels, add_lora, load_tokenizer

if TYPE_CHECKING:
    from torch import nn

    from pa_core import Trainer
    from pa_models.transformers_loss import CountItems


class TransformersSettings(BaseModel):
    """The table ``[tool.pa-core.transformers]``."""

    model_config = ConfigDict(extra="forbid")

    task: str | None = Field(
        None, description="The task of models by name: sequence-classification, causal-lm, …"
    )
    model_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of from_pretrained for models by name, such as num_labels.",
    )
    tokenizer: str | None = Field(
        None, description="A folder or a name on the hub, for the collator and the export."
    )
    collator: (
        Literal["padding", "token_classification", "causal_lm", "masked_lm", "seq2seq"] | None
    ) = Field(None, description="The data collator, if the Trainer has no collate_fn.")
    mlm_probability: float = Field(
        0.15, gt=0, lt=1, description="The fraction of tokens that masked_lm masks."
    )
    loss_mean: str | None = Field(
        None,
        description="What the model's loss is a mean over, if that can't be seen: samples, labels, "
        "shifted_labels, attention_mask, or the dotted path of a function of the batch and the "
        "outputs that returns the number of items.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="The fraction of the target that is spread over all classes."
    )
    gradient_checkpointing: bool = Field(
        False, description="Whether to recompute activations in the backward pass to save memory."
    )
    gradient_checkpointing_options: dict[str, Any] | None = Field(
        None, description="Arguments of torch.utils.checkpoint, such as use_reentrant."
    )
    lora: dict[str, Any] | None = Field(
        None, description="Arguments of peft.LoraConfig, for low-rank adapters of models by name."
    )
    generate: dict[str, Any] | None = Field(
        None, description="Arguments of model.generate, to generate text during evaluation."
    )
    export_to: LocalPath | None = Field(
        None, description="The folder to export the model to at the end of a run."
    )

    @field_validator("loss_mean")
    @classmethod
    def _check_loss_mean(cls, name: str | None) -> str | None:
        if name is not None and name not in LOSS_MEANS and "." not in name:
            raise ValueError(
                f"there is no {name!r}.{nearest(name, LOSS_MEANS)} Expected "
                f"{', '.join(LOSS_MEANS)}, or the dotted path of a function"
            )
        return name

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.collator is not None and self.tokenizer is None:
            raise ValueError("collator: requires tokenizer")
        return self


class TransformersOptions(TypedDict, total=False):
    """The options of `TransformersPlugin`: the keys of its table, for type checkers."""

    task: str | None
    model_options: Mapping[str, Any]
    collator: Literal["padding", "token_classification", "causal_lm", "masked_lm", "seq2seq"] | None
    mlm_probability: float
    label_smoothing: float
    gradient_checkpointing: bool
    gradient_checkpointing_options: Mapping[str, Any] | None
    lora: Mapping[str, Any] | None
    generate: Mapping[str, Any] | None
    export_to: str | Path | None


class TransformersPlugin:
    """Trains with batches that are mappings.

    A batch that is a mapping (a dict, a ``BatchEncoding``) is passed to the model as keyword
    arguments, and the model returns its loss, as transformers' models do. Other batches are left
    to the trainer.

    Args:
        settings: the plugin's table.
        tokenizer: a tokenizer object, instead of a name in the settings.
        loss_mean: as in the settings, or a function instead of its path.
        options: keys of the table, instead of `settings`.

    Raises:
        SettingsError: for mistakes in the options, as for those in the table.

    >>> TransformersPlugin(label_smoothing=0.1).settings.label_smoothing
    0.1
    """

    Settings = TransformersSettings

    def __init__(
        self,
        settings: TransformersSettings | None = None,
        *,
        tokenizer: Any = None,
        loss_mean: str | CountItems | None = None,
        **options: Unpack[TransformersOptions],
    ) -> None:
        given: dict[str, Any] = {**options}
        if isinstance(tokenizer, str):
            given["tokenizer"], tokenizer = tokenizer, None
        if tokenizer is not None and settings is None:
            given["tokenizer"] = str(getattr(tokenizer, "name_or_path", "given"))
        if callable(loss_mean):
            if settings is None:
                name = getattr(loss_mean, "__qualname__", type(loss_mean).__qualname__)
                given["loss_mean"] = f"{loss_mean.__module__}.{name}"
        elif loss_mean is not None:
            given["loss_mean"] = loss_mean
        self.settings = settings_from_options(
            TransformersSettings, settings, given, type(self).__name__
        )
        self._tokenizer = tokenizer
        named = self.settings.loss_mean
        is_path = named is not None and named not in LOSS_MEANS and not callable(loss_mean)
        self._losses = BatchLosses(
            _import_function(named) if is_path and named else loss_mean or named
        )

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when it is first needed, or None."""
        if self._tokenizer is None and self.settings.tokenizer is not None:
            self._tokenizer = load_tokenizer(self.settings.tokenizer)
        return self._tokenizer

    @hookimpl
    def register_models(self) -> Mapping[str, Callable[..., nn.Module]]:
        """transformers' models, as ``"transformers/FOLDER-OR-NAME"``."""
        settings = self.settings

        def finish(model: nn.Module) -> nn.Module:
            return model if settings.lora is None else add_lora(model, **settings.lora)

        return TransformersModels(settings.task, settings.model_options, finish)

    @hookimpl(tryfirst=True)
    def create_train_dataloader(self, trainer: Trainer) -> None:
        """Set the collator; the trainer creates the loader."""
        self._choose_collator(trainer)

    @hookimpl(tryfirst=True)
    def create_eval_dataloader(self, trainer: Trainer) -> None:
        """Set the collator; the trainer creates the loader."""
        self._choose_collator(trainer)

    @hookimpl
    def on_training_run_start(self, trainer: Trainer) -> None:
        """Turn gradient checkpointing on."""
        if not self.settings.gradient_checkpointing:
            return
        model = trainer.get_model(keep_torch_compile=False)
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise ValueError(f"{type(model).__name__} doesn't support gradient checkpointing")
        # The method was renamed in transformers 5.x.
        new = getattr(model, "activation_checkpointing_enable", None)
        enable = new or model.gradient_checkpointing_enable
        enable(self.settings.gradient_checkpointing_options)

    @hookimpl(trylast=True)
    def on_training_run_end(self, trainer: Trainer) -> None:
        """Export the model, after plugins that restore the best weights."""
        if self.settings.export_to is not None:
            from pa_models.transformers_export import export

            export(trainer, self.settings.export_to, self.tokenizer)

    @hookimpl
    def calculate_train_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any] | None:
        """The loss that the model returns, for a batch that is a mapping."""
        if not isinstance(batch, Mapping):
            return None
        return self._losses.calculate(trainer, batch, self.settings.label_smoothing)

    @hookimpl
    def calculate_eval_batch_loss(self, trainer: Trainer, batch: Any) -> dict[str, Any] | None:
        """The same without gradients and smoothing, and with generated text if the settings ask.

        Without labels, there is generated text and no loss.
        """
        if not isinstance(batch, Mapping):
            return None
        if self.settings.generate is None:
            with torch.no_grad():
                return self._losses.calculate(trainer, batch)
        from pa_models.transformers_generate import generate, has_labels

        output = generate(trainer, batch, self.settings.generate, self.tokenizer)
        if has_labels(batch):
            with torch.no_grad():
                return self._losses.calculate(trainer, batch) | output
        tokens = output["generated"]
        none = torch.zeros((), device=tokens.device)  # of a weight of 0
        output |= {"loss": none, "num_items_in_batch": none.long()}
        return output | {"model_outputs": tokens, "batch_size": len(tokens)}

    @hookimpl
    def on_train_epoch_start(self) -> None:
        """See in the first batch whether the loss is calculated as in the last epoch."""
        self._losses.forget(training=True)

    @hookimpl
    def on_eval_epoch_start(self) -> None:
        """See in the first batch whether the loss is calculated as in the last evaluation."""
        self._losses.forget(training=False)

    @hookimpl
    def on_train_epoch_end(self) -> None:
        """Check what isn't read from the device in a step."""
        self._losses.check_positions()

    @hookimpl
    def on_eval_epoch_end(self) -> None:
        """Check what isn't read from the device in a step."""
        self._losses.check_positions()

    @hookimpl
    def calculate_predictions(self, trainer: Trainer, batch: Any) -> Any:
        """What the model predicts, or generates if the settings ask, for a batch that is a mapping.

        Of generated text, ``generated`` are the tokens and ``texts``, with a tokenizer, the texts.
        """
        if not isinstance(batch, Mapping):
            return None
        if self.settings.generate is None:
            from pa_models.transformers_predict import calculate_predictions

            return calculate_predictions(trainer, batch)
        from pa_models.transformers_generate import predict

        return predict(trainer, batch, self.settings.generate, self.tokenizer)

    def _choose_collator(self, trainer: Trainer) -> None:
        settings = self.settings
        if settings.collator is not None and trainer.collate_fn is None:
            from pa_models.transformers_collators import create_collator

            model = trainer.get_model(keep_torch_compile=False)
            trainer.collate_fn = create_collator(
                settings.collator, self.tokenizer, model, settings.mlm_probability
            )


def _import_function(path: str) -> CountItems:
    module, _, name = path.rpartition(".")
    try:
        function: CountItems = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError([f"loss_mean: can't import {path!r}: {error}"]) from error
    return function
