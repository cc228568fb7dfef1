"""Text that a model generates for a batch: the inputs, the call, and the references."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pa_core.predictions import PaddedRows
from pa_models.transformers_call import is_encoder_decoder
from pa_models.transformers_loss import IGNORED
from pa_models.transformers_predict import num_samples, without_labels

if TYPE_CHECKING:
    from torch import nn

    from pa_core import Trainer

_TEACHER_FORCING = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
"""Arguments that a collator makes of the labels; a decoder that got them would continue these."""


class _Special(NamedTuple):
    """The special tokens of a call."""

    start: int | None
    ends: frozenset[int]
    padding: int | None
    is_given: bool
    """Whether ``model.generate`` finds the padding token by itself."""


def generate(
    trainer: Trainer, batch: Mapping[str, Any], options: Mapping[str, Any], tokenizer: Any = None
) -> dict[str, Any]:
    """Call ``model.generate`` with all of a batch that isn't a label.

    A decoder-only model continues the prompt: the tokens before the first label that isn't -100,
    or all tokens of a batch without labels. Prompts of different lengths are padded on the left.
    The decoder of an encoder-decoder continues the part of ``decoder_input_ids`` whose labels are
    -100.

    Args:
        trainer: the trainer with the model.
        batch: its entries are the model's arguments.
        options: arguments of ``model.generate``.
        tokenizer: decodes tokens to texts; None for tokens only.

    Returns:
        ``generated``: tokens of shape ``(batch, tokens)``, without a prompt that the labels show;
        with ``num_return_sequences``, ``(batch, sequences, tokens)``. With a
        tokenizer also ``texts`` (with several sequences, a list for each sample) and, for labels
        of tokens, ``references``.

    Raises:
        ValueError: if the model can't generate, or if a sample has no prompt to continue.
    """
    model = trainer.get_model(keep_torch_compile=False)
    _check(trainer, model)
    labels = _token_labels(batch)
    special = _special_tokens(model, options, tokenizer)
    inputs = without_labels(model, batch)
    is_decoder_only = not is_encoder_decoder(model)
    forced, forced_lengths = inputs.get("decoder_input_ids"), None
    if not is_decoder_only:
        if labels is not None and _follows(forced, labels):
            inputs = {key: one for key, one in inputs.items() if key not in _TEACHER_FORCING}
            forced_lengths = _forced_lengths(forced, labels, special.padding)
    elif "input_ids" in inputs or "inputs_embeds" in inputs:
        inputs = _prompts(inputs, labels, special)
    if not special.is_given and special.padding is not None:
        options = {"pad_token_id": special.padding, **options}
    if is_decoder_only:
        sequences = _continue(model, inputs, options, special.padding or 0)
    elif forced_lengths is not None:
        inputs["decoder_input_ids"] = forced
        sequences = _continue_forced(model, inputs, options, forced_lengths, special.padding or 0)
    else:
        sequences = _call(model, inputs, options)
    size = num_samples(inputs) or len(sequences)
    output: dict[str, Any] = {"generated": sequences}
    if tokenizer is not None:
        output["texts"] = _decode(tokenizer, [_text(row, special) for row in sequences.tolist()])
    if several := len(sequences) // size - 1:
        output["generated"] = sequences.unflatten(0, (size, several + 1))
        if tokenizer is not None:
            texts, each = output["texts"], several + 1
            output["texts"] = [texts[i * each : (i + 1) * each] for i in range(size)]
    if tokenizer is not None and labels is not None:
        rows = [_reference(row, is_decoder_only=is_decoder_only) for row in labels.tolist()]
        output["references"] = _decode(tokenizer, rows)
    return output


def predict(
    trainer: Trainer, batch: Mapping[str, Any], options: Mapping[str, Any], tokenizer: Any = None
) -> dict[str, Any]:
    """As `generate`, without references; rows of tokens can be padded to those of other batches."""
    output = generate(trainer, batch, options, tokenizer)
    model = trainer.get_model(keep_torch_compile=False)
    padding = _special_tokens(model, options, tokenizer).padding
    output["generated"] = PaddedRows(output["generated"], padding or 0)
    output.pop("references", None)
    return output


def has_labels(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has anything that a loss could be calculated from."""
    return any("label" in name for name in batch)


def _check(trainer: Trainer, model: nn.Module) -> None:
    if not callable(getattr(model, "generate", None)):
        raise ValueError(
            f"generate is set in [tool.pa-core.transformers], but {type(model).__name__} has no "
            "method generate: remove the setting, or use a model that generates, such as one of "
            "the task causal-lm or seq2seq-lm"
        )
    is_sharded = trainer.sharded_by == "FSDP" or any(
        hasattr(parameter, "ds_id")
        for parameter in model.parameters()  # of ZeRO stage 3
    )
    if is_sharded:
        # Each forward pass is a collective, and processes generate different numbers of tokens.
        raise ValueError(
            f"generate isn't supported while {trainer.sharded_by} shards the weights: export the "
            "model and generate on one process, or use DDP"
        )


def _token_labels(batch: Mapping[str, Any]) -> Tensor | None:
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return labels
    return None


def _follows(tokens: Tensor | None, labels: Tensor) -> bool:
    """Whether the decoder's inputs are the labels, shifted to the right; a prompt isn't."""
    if tokens is None:
        return True
    if tokens.shape != labels.shape:
        return False
    follows = (tokens[:, 1:] == labels[:, :-1]) | (labels[:, :-1] == IGNORED)
    return bool(follows.all())


def _forced_lengths(tokens: Tensor | None, labels: Tensor, padding: int | None) -> Tensor | None:
    """How many tokens after the decoder's first are the prompt of each sample; None for none."""
    if tokens is None:
        return None
    is_prompt = ((labels != IGNORED).cumsum(1) == 0)[:, :-1]
    is_token = tokens[:, 1:] != padding  # a collator's padding isn't a prompt
    lengths = is_prompt.sum(1) * (is_prompt & is_token).any(1)
    return lengths if lengths.any() else None


def _special_tokens(model: nn.Module, options: Mapping[str, Any], tokenizer: Any) -> _Special:
    """The special tokens, from where ``model.generate`` looks for them, then from the tokenizer."""
    sources = [options.get("generation_config"), getattr(model, "generation_config", None)]

    def find(name: str) -> Any:
        if options.get(name) is not None:
            return options[name]
        return next((one for s in sources if (one := getattr(s, name, None)) is not None), None)

    ends = find("eos_token_id")
    ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
    padding = find("pad_token_id")
    is_given = padding is not None
    if padding is None:
        padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None and ends:
        padding = ends[0]
    return _Special(find("decoder_start_token_id"), frozenset(ends), padding, is_given)


def _prompts(inputs: dict[str, Any], labels: Tensor | None, special: _Special) -> dict[str, Any]:
    """The inputs with the prompts alone, padded on the left."""
    tokens = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    shape, ids = tokens.shape[:2], inputs.get("input_ids")
    mask = inputs.get("attention_mask")
    if mask is None and ids is not None and special.padding not in special.ends:
        # As model.generate infers it.
        mask = ids != special.padding if special.is_given else None
    is_prompt = torch.ones(shape, dtype=torch.bool, device=tokens.device) if mask is None else mask
    if is_prompt.shape != shape:
        raise ValueError(
            f"generate needs an attention_mask of shape {tuple(shape)}, (batch, tokens), to find "
            f"the prompts; this one has shape {tuple(is_prompt.shape)}"
        )
    is_prompt = is_prompt.bool()
    if labels is not None:
        if labels.shape != shape:
            raise ValueError(
                f"generate finds the prompts by labels of shape {tuple(shape)}, as the tokens "
                f"have; these have shape {tuple(labels.shape)}"
            )
        is_prompt = is_prompt & ((labels != IGNORED).cumsum(1) == 0)
    lengths = is_prompt.sum(1).tolist()

    def follows_tokens(name: str, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.shape[:2] != shape:
            return False
        return name == "inputs_embeds" or (value.ndim == 2 and not value.is_floating_point())

    follows = {name for name, value in inputs.items() if follows_tokens(name, value)}
    rest = {key: one for key, one in inputs.items() if key not in follows}
    if not any(lengths) and any(isinstance(one, Tensor) for one in rest.values()):
        return rest  # the prompt is a picture or a sound
    if 0 in lengths:
        raise ValueError(
            f"generate: sample {lengths.index(0)} of the batch has no prompt. A decoder-only model "
            "continues the tokens that come before the first label: set the labels of the prompt "
            "to -100, so that the loss and the references leave them out too"
        )
    # A stable sort moves the prompts to the right, in their order.
    order = is_prompt.int().argsort(dim=1, stable=True)[:, -max(lengths) :]
    is_kept = is_prompt.gather(1, order)

    def pick(value: Tensor, padding: int) -> Tensor:
        ones = (1,) * (value.ndim - 2)
        places = order.view(*order.shape, *ones).expand(*order.shape, *value.shape[2:])
        return value.gather(1, places).masked_fill(~is_kept.view(*order.shape, *ones), padding)

    follows.discard("position_ids")  # model.generate counts them by the mask
    for name in follows:
        rest[name] = pick(inputs[name], (special.padding or 0) if name == "input_ids" else 0)
    if "attention_mask" in inputs or min(lengths) < max(lengths):
        rest["attention_mask"] = is_kept.long()
    return rest


def _call(model: nn.Module, inputs: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
    generate: Any = model.generate
    with torch.no_grad():
        found = generate(**inputs, **options)
    sequences: Tensor = found if isinstance(found, Tensor) else found.sequences
    return sequences


def _continue(
    model: nn.Module, inputs: Mapping[str, Any], options: Mapping[str, Any], padding: int
) -> Tensor:
    """What a decoder-only model generates after the prompts, which are padded on the left."""
    prompts, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if prompts is None or mask is None or not getattr(model, "_is_stateful", False):
        return _without_prompt(_call(model, inputs, options), prompts)

    def generate(some: dict[str, Any], length: int) -> Tensor:
        shape = len(some["input_ids"]), mask.shape[1]
        for name, value in some.items():
            if isinstance(value, Tensor) and value.shape[:2] == shape:
                some[name] = value[:, -length:]
        return _without_prompt(_call(model, some, options), some["input_ids"])

    # A recurrent model may read the padding, so that it gets prompts of one length at a time.
    return _by_length(mask.sum(1), inputs, generate, padding)


def _continue_forced(
    model: nn.Module,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any],
    lengths: Tensor,
    padding: int,
) -> Tensor:
    """What the decoder of an encoder-decoder generates after its prompts."""

    def generate(some: dict[str, Any], length: int) -> Tensor:
        prompts = some.pop("decoder_input_ids")[:, : length + 1]
        if length:
            some["decoder_input_ids"] = prompts
        return _without_prompt(_call(model, some, options), prompts)

    return _by_length(lengths, inputs, generate, padding)


def _by_length(
    lengths: Tensor,
    inputs: Mapping[str, Any],
    generate: Callable[[dict[str, Any], int], Tensor],
    padding: int,
) -> Tensor:
    """Generate for the samples of each length alone; the rows are in the order of the samples."""
    rows: list[Tensor] = [lengths[:0]] * len(lengths)
    for length in set(lengths.tolist()):
        chosen = (lengths == length).nonzero()[:, 0]
        some = {
            name: value[chosen]
            if isinstance(value, Tensor) and value.shape[:1] == lengths.shape
            else value
            for name, value in inputs.items()
        }
        found = generate(some, length)
        for place, row in zip(chosen.tolist(), found.unflatten(0, (len(chosen), -1)), strict=True):
            rows[place] = row
    longest = max(row.shape[1] for row in rows)
    padded = [functional.pad(row, (0, longest - row.shape[1]), value=padding) for row in rows]
    return torch.cat(padded)


def _without_prompt(sequences: Tensor, prompts: Tensor | None) -> Tensor:
    if prompts is None:
        return sequences
    length = prompts.shape[1]
    start = sequences[:, :length]
    each = len(sequences) // len(prompts)
    # Some models with a custom generate return the new tokens only.
    is_there = start.shape[1] == length and torch.equal(start, prompts.repeat_interleave(each, 0))
    return sequences[:, length:] if is_there else sequences


def _text(tokens: list[int], special: _Special) -> list[int]:
    """What a row of generated tokens says: without the decoder's start token and the padding."""
    if tokens and tokens[0] == special.start:
        tokens = tokens[1:]
    end = next((i for i, token in enumerate(tokens, 1) if token in special.ends), None)
    return tokens[:end]


def _reference(labels: list[int], *, is_decoder_only: bool) -> list[int]:
    """The labelled tokens; of a decoder-only model, those that follow the first prompt."""
    if is_decoder_only:
        first = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
        rest = labels[first:]
        return rest[: rest.index(IGNORED)] if IGNORED in rest else rest
    return [label for label in labels if label != IGNORED]


def _decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts
