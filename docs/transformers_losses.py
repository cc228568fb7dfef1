"""Check what the losses of transformers' models are means over, and write the table of the docs.

``python docs/transformers_losses.py`` builds every model of the tasks below at a tiny size, with
random weights, and writes ``transformers_losses.md``. For each, the loss of a batch is compared
with the mean of the losses of its samples, weighted as the plugin weighs them. The samples have
different numbers of labels. ``python docs/transformers_losses.py Bert GPT2`` checks only models
whose names contain one of the words, and prints them.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pa_core import Trainer
from pa_models import TransformersPlugin
from pa_models.transformers_loss import BatchLosses

PAGE = Path(__file__).parent / "plugins" / "transformers_losses.md"
TOLERANCE = 1e-5
SAMPLES, TOKENS, VOCABULARY, CLASSES = 4, 9, 64, 3
MAX_PARAMETERS = 40_000_000

TASKS = {
    "Causal language models": "CAUSAL_LM",
    "Masked language models": "MASKED_LM",
    "Pre-training": "PRETRAINING",
    "Sequence to sequence": "SEQ_TO_SEQ_CAUSAL_LM",
    "Speech to text": "SPEECH_SEQ_2_SEQ",
    "CTC": "CTC",
    "Question answering": "QUESTION_ANSWERING",
    "Sequence classification": "SEQUENCE_CLASSIFICATION",
    "Token classification": "TOKEN_CLASSIFICATION",
    "Multiple choice": "MULTIPLE_CHOICE",
    "Next sentence prediction": "NEXT_SENTENCE_PREDICTION",
    "Image classification": "IMAGE_CLASSIFICATION",
    "Audio classification": "AUDIO_CLASSIFICATION",
    "Semantic segmentation": "SEMANTIC_SEGMENTATION",
    "Masked image modelling": "MASKED_IMAGE_MODELING",
}
"""Titles, and the names of transformers' mappings from configurations to models."""

_TOKENS = {
    "vocab_size": VOCABULARY,
    "n_words": VOCABULARY,
    "tgt_vocab_size": VOCABULARY,
    "src_vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "entity_vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_EXACT = _TOKENS | {
    "rotary_dim": 4,
    "attention_types": [[["global", "local"], 1]],
    "head_dim": 8,
    "kv_channels": 8,
    "d_kv": 8,
    "d_head": 8,
    "n_positions": 64,
    "max_position_embeddings": 64,
    "n_ctx": 64,
    "image_size": 32,
    "patch_size": 8,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "embedding_size": 16,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
    "num_mel_bins": 8,
    "ctc_loss_reduction": "mean",
    "is_decoder": False,
}
_WIDTHS = {
    "hidden_size",
    "d_model",
    "emb_dim",
    "n_embd",
    "dim",
    "embed_dim",
    "encoder_hidden_dim",
    "n_embed",
}
_FEED_FORWARD = {"intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "n_inner", "d_inner"}


def main(*words: str) -> None:
    """Check the models, and write the page unless only some are asked for."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import transformers
    from transformers.models.auto import modeling_auto

    sections: dict[str, list[tuple[str, str]]] = {}
    for title, task in TASKS.items():
        names: set[str] = set()
        for found in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values():
            names |= {found} if isinstance(found, str) else set(found)
        rows = []
        for name in sorted(names):
            if words and not any(word in name for word in words):
                continue
            rows.append((name, check(name, task)))
            print(*rows[-1], sep="\t", flush=True)
        sections[title] = rows
    if not words:
        PAGE.write_text(page(sections, transformers.__version__))


def page(sections: Mapping[str, list[tuple[str, str]]], version: str) -> str:
    """The page: for each task, models by what their losses are means over."""
    lines = [
        "# Losses of transformers' models",
        "",
        "<!-- Written by docs/transformers_losses.py: nox -s families -->",
        "",
        f"What the models of transformers {version} return as loss, built at tiny sizes with",
        "random weights. If a mean is named, the loss of a batch is the mean of its samples'",
        f"losses, as the plugin weighs them, to a relative {TOLERANCE:g}. If it isn't known,",
        "training stops at the first batch and asks for `loss_mean`; see",
        "[the plugin](transformers.md).",
    ]
    unbuilt = []
    for title, rows in sections.items():
        by_mean: dict[str, list[str]] = {}
        for name, mean in rows:
            if mean.startswith("not built"):
                unbuilt.append(name)
            else:
                by_mean.setdefault(mean, []).append(name)
        lines += ["", f"## {title}", "", "| mean over | models |", "|---|---|"]
        lines += [
            f"| {mean} | {', '.join(f'`{name}`' for name in names)} |"
            for mean, names in sorted(by_mean.items(), key=lambda item: -len(item[1]))
        ]
    lines += [
        "",
        "## Not in the tables",
        "",
        "These models need a configuration or inputs that the script doesn't make:",
        f"{', '.join(f'`{name}`' for name in sorted(set(unbuilt)))}.",
    ]
    return "\n".join(lines) + "\n"


def check(name: str, task: str) -> str:
    """What a model's loss is a mean over, or why that isn't known."""
    import transformers

    problem = "no loss"
    without_heads = {key: value for key, value in _EXACT.items() if key != "head_dim"}
    for exact, layers in (
        (_EXACT, 2),
        (without_heads, 2),
        (without_heads, 8),
        (_TOKENS, None),
    ):
        try:
            model = build(getattr(transformers, name), task, exact, layers)
        except Exception as error:  # noqa: BLE001
            problem = _short(error)
            continue
        for batch in batches(model, task):
            try:
                with torch.no_grad():
                    loss = model(**batch).loss
            except Exception as error:  # noqa: BLE001
                problem = _short(error)
                continue
            if isinstance(loss, Tensor) and loss.numel() == 1 and loss.isfinite():
                return compare(model, batch)
    return f"not built: {problem}"


def build(model_class: Any, task: str, exact: Mapping[str, Any], layers: int | None) -> nn.Module:
    """Build a model at a tiny size, in evaluation mode; arguments as for `shrink`.

    Raises:
        ValueError: if it isn't tiny.
    """
    config = shrink(model_class.config_class, exact, layers)
    config.num_labels = 2 if task in ("QUESTION_ANSWERING", "PRETRAINING") else CLASSES
    for name, value in _TOKENS.items():
        if getattr(config, name, None) is None and name != "eos_token_id":
            setattr(config, name, value)
    if hasattr(config, "languages"):
        config.default_language = config.languages[0]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    return model_class(config).eval()


def shrink(config_class: Any, exact: Mapping[str, Any], layers: int | None, depth: int = 0) -> Any:
    """A configuration of a tiny model.

    Args:
        config_class: its class.
        exact: values by key.
        layers: the number of layers; None leaves all other sizes as they are.
        depth: how many configurations it is a part of.
    """
    default = config_class()
    values: dict[str, Any] = {}
    parts = getattr(config_class, "sub_configs", None) or {}
    for key, value in default.to_dict().items():
        part = getattr(default, key, None)
        if key in parts and part is not None and depth < 3:
            values[key] = shrink(type(part), exact, layers, depth + 1).to_dict()
        elif (small := _small(key, value, exact, layers)) is not None:
            values[key] = small
    return config_class(**values)


def _small(key: str, value: Any, exact: Mapping[str, Any], layers: int | None) -> Any:
    """A small value of a key of a configuration; None to leave it as it is."""
    if key in exact and value is not None:
        is_list = isinstance(value, list | tuple)
        return exact[key] if is_list == isinstance(exact[key], list | tuple) else None
    if not isinstance(value, int) or isinstance(value, bool) or value <= 2:
        if isinstance(value, float) and ("drop" in key or "mask_time_prob" in key):
            return 0.0
        return False if key == "apply_spec_augment" else None
    if layers is None:
        return None
    if key in _WIDTHS:
        return 16
    if key in _FEED_FORWARD:
        return 32
    if "head" in key and ("num" in key or key.startswith("n_") or "heads" in key):
        return 2
    if "layers" in key or key in ("depth", "n_layer", "num_blocks"):
        return layers
    return None


def batches(model: nn.Module, task: str) -> Iterator[dict[str, Tensor]]:
    """Batches to try, whose samples have different numbers of labels."""
    draw = torch.Generator().manual_seed(3)

    def numbers(*shape: int, low: int = 3, high: int = VOCABULARY) -> Tensor:
        return torch.randint(low, high, shape, generator=draw)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    ids = numbers(SAMPLES, TOKENS)
    lengths = torch.tensor([9, 8, 3, 2])
    mask = (torch.arange(TOKENS) < lengths[:, None]).long()
    ids[torch.arange(SAMPLES), lengths - 1] = 2  # the end of each text
    text = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    tokens = ids.masked_fill(mask == 0, -100)
    of_samples = torch.tensor([0, 2, 1, 2])
    config = model.config
    if task in ("CAUSAL_LM", "MASKED_LM"):
        yield text | {"labels": tokens}
    elif task == "PRETRAINING":
        yield text | {"labels": tokens, "next_sentence_label": of_samples.clamp(max=1)}
        yield text | {"labels": tokens, "sentence_order_label": of_samples.clamp(max=1)}
        yield text | {"labels": ids % 2}
        yield text | {"labels": tokens}
    elif task == "SEQ_TO_SEQ_CAUSAL_LM":
        yield text | {"labels": tokens.flip(0)}
    elif task == "QUESTION_ANSWERING":
        positions = {
            "start_positions": torch.tensor([0, 3, 1, TOKENS + 2]),
            "end_positions": torch.tensor([2, 4, 1, TOKENS + 2]),
        }
        yield text | positions
    elif task == "SEQUENCE_CLASSIFICATION":
        yield text | {"labels": torch.tensor([0, 2, 1, -100])}
        yield text | {"labels": of_samples}
    elif task == "TOKEN_CLASSIFICATION":
        labels = (ids % CLASSES).masked_fill(mask == 0, -100)
        labels[0, 2:5] = -100
        yield text | {"labels": labels}
    elif task == "MULTIPLE_CHOICE":
        choices = {key: torch.stack([value, value.flip(0)], 1) for key, value in text.items()}
        yield choices | {"labels": torch.tensor([0, 1, 1, 0])}
    elif task == "NEXT_SENTENCE_PREDICTION":
        yield text | {"labels": torch.tensor([0, 1, 1, 0])}
    elif task in ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "MASKED_IMAGE_MODELING"):
        size = getattr(config, "image_size", 32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = {"pixel_values": noise(SAMPLES, getattr(config, "num_channels", 3), height, width)}
        if task == "IMAGE_CLASSIFICATION":
            yield pixels | {"labels": of_samples}
        elif task == "SEMANTIC_SEGMENTATION":
            labels = numbers(SAMPLES, height, width, low=0, high=2)
            labels[0, :, :3], labels[1, :2] = 255, 255
            yield pixels | {"labels": labels}
        else:
            patches = (height // config.patch_size) ** 2
            chosen = torch.rand(SAMPLES, patches, generator=draw) < 0.5
            yield pixels | {"bool_masked_pos": chosen}
    else:  # sound
        of_text = torch.randint(3, 12, (SAMPLES, 3), generator=draw)
        of_text[1, 2:], of_text[2, 1:] = -100, -100
        labels = of_samples if task == "AUDIO_CLASSIFICATION" else of_text
        mels = getattr(config, "num_mel_bins", 8)
        features = getattr(config, "feature_projection_input_dim", 8)
        frames = 2 * getattr(config, "max_source_positions", 32)
        for sound in (
            {"input_values": noise(SAMPLES, 800)},
            {"input_features": noise(SAMPLES, 64, features)},
            {"input_features": noise(SAMPLES, mels, frames)},
            {"input_features": noise(SAMPLES, 64, mels)},
            {"input_values": noise(SAMPLES, getattr(config, "max_length", 64), mels)},
        ):
            yield sound | {"labels": labels}


def compare(model: nn.Module, batch: dict[str, Tensor]) -> str:
    """What the loss is a mean over, or why it isn't known.

    Raises:
        AssertionError: if the losses of the samples don't add up to that of the batch.
    """
    losses = BatchLosses()
    trainer = Trainer(model, None, None, callbacks=(), plugins=[TransformersPlugin])

    def loss_of(part: dict[str, Tensor]) -> tuple[float, float]:
        output = losses.calculate(trainer, part)
        items = output.get("num_items_in_batch", output["batch_size"])
        return output["loss"].item(), float(items)

    with torch.no_grad():
        try:
            whole, _ = loss_of(batch)
        except ValueError as error:
            return "not known: " + str(error).partition(": ")[2].partition(". ")[0]
        total = count = 0.0
        for start, end in ((0, 1), (1, SAMPLES)):
            loss, items = loss_of({key: value[start:end] for key, value in batch.items()})
            total, count = total + loss * items, count + items
        if not abs(total / count - whole) <= TOLERANCE * max(1.0, abs(whole)):
            first = {key: value[:1] for key, value in batch.items()}
            if not torch.allclose(model(**batch).logits[:1], model(**first).logits, atol=1e-4):
                return "not comparable: a sample's outputs depend on the rest of its batch"
            raise AssertionError(f"{type(model).__name__}: {total / count} instead of {whole}")
    (found,) = set(losses.found(model))
    return "samples" if found is None else found.describe()


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:90]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(*sys.argv[1:])
