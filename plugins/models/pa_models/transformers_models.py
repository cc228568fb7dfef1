"""transformers' models by name; transformers is imported when one is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pa_core.errors import nearest

if TYPE_CHECKING:
    from torch import nn

PREFIX = "transformers/"

TASKS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
}
"""The values of ``task``, and the class for each."""


class TransformersModels(Mapping[str, Callable[..., "nn.Module"]]):
    """Maps ``"transformers/PATH"`` to a function that loads the model from a folder or the hub.

    Args:
        task: the task, which determines the model's head; one of `TASKS`.
        options: arguments of ``from_pretrained``, such as ``num_labels``.
        finish: is called with each model and returns it, for example with adapters.
    """

    def __init__(
        self,
        task: str | None,
        options: Mapping[str, Any],
        finish: Callable[[nn.Module], nn.Module],
    ) -> None:
        self._task, self._options, self._finish = task, dict(options), finish

    def __getitem__(self, name: str) -> Callable[..., nn.Module]:
        if name not in self:
            raise KeyError(name)

        def load(**options: Any) -> nn.Module:
            path = name.removeprefix(PREFIX)
            return self._finish(load_model(path, self._task, **self._options | options))

        return load

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.startswith(PREFIX)

    def __iter__(self) -> Iterator[str]:
        return iter(())  # the hub has too many to list

    def __len__(self) -> int:
        return 0


def load_model(path: str, task: str | None, **options: Any) -> nn.Module:
    """Load a model from a folder or the hub.

    Args:
        path: the folder, or the name on the hub.
        task: one of `TASKS`.
        **options: arguments of ``from_pretrained``.

    Raises:
        ValueError: for a missing or unknown task, or a folder without a model.
    """
    if task is None:
        raise ValueError(
            f"The model {path!r} needs a task: set task in [tool.pa-core.transformers] to one of "
            f"{', '.join(TASKS)}"
        )
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}.{nearest(task, TASKS)}")
    check_folder(path)
    import transformers

    loaded: nn.Module = getattr(transformers, TASKS[task]).from_pretrained(path, **options)
    return loaded


def load_tokenizer(path: str) -> Any:
    """Load a tokenizer from a folder or the hub.

    Raises:
        ValueError: for a folder without a tokenizer.
    """
    if Path(path).is_dir() and not any(Path(path).glob("*token*")):
        raise ValueError(
            f"{path} is a folder without a tokenizer: write one with tokenizer.save_pretrained"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def check_folder(path: str) -> None:
    """Check that a folder contains a model; names on the hub aren't checked.

    Raises:
        ValueError: if it doesn't.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{path} is a folder without a config.json, so it isn't a model of transformers: "
            "write one with model.save_pretrained"
        )


def add_lora(model: nn.Module, **options: Any) -> nn.Module:
    """Freeze a model and add low-rank adapters, so that only these are trained.

    See `LoRA <https://arxiv.org/abs/2106.09685>`_.

    Args:
        model: a model of transformers.
        **options: arguments of `peft.LoraConfig`: ``r``, ``lora_alpha``, ``target_modules``, ….

    Raises:
        ImportError: if peft isn't installed, with the pip command.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'pa-models[lora]'") from None
    adapted: nn.Module = get_peft_model(model, LoraConfig(**options))
    return adapted
