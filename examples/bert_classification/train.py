"""Text classification with a BERT: which of two modules of Python does a line come from?

    python train.py           # a small BERT, lines of the standard library, in seconds
    python train.py --full    # bert-base-cased on GLUE's MRPC (downloads; pip install datasets)

The batches are dicts. The `transformers` plugin passes them to the model, and the model's own loss
is trained, without a subclass of anything.
"""

import argparse
import inspect
import json
import unittest.case
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from pa_core import Trainer

MAX_LENGTH = 32


def small_model_and_lines() -> tuple[nn.Module, list[dict[str, Any]], Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    sources = [inspect.getsource(module).splitlines() for module in (json.decoder, unittest.case)]
    lines = [(line, label) for label, text in enumerate(sources) for line in text if line.strip()]
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words.train_from_iterator(
        [line for line, _ in lines],
        trainers.WordPieceTrainer(vocab_size=600, special_tokens=special),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=MAX_LENGTH,
    )
    samples = [
        tokenizer(line, truncation=True, max_length=MAX_LENGTH) | {"labels": label}
        for line, label in lines
    ]
    return BertForSequenceClassification(config), samples, tokenizer


def bert_and_mrpc() -> tuple[nn.Module, list[dict[str, Any]], Any]:
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = "google-bert/bert-base-cased"
    tokenizer = AutoTokenizer.from_pretrained(name)
    pairs = load_dataset("nyu-mll/glue", "mrpc")["train"]
    samples = [
        tokenizer(pair["sentence1"], pair["sentence2"], truncation=True) | {"labels": pair["label"]}
        for pair in pairs
    ]
    return AutoModelForSequenceClassification.from_pretrained(name), samples, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="BERT on MRPC (downloads)")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, samples, tokenizer = bert_and_mrpc() if arguments.full else small_model_and_lines()
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = [samples[i] for i in order[: len(order) // 5]]
    train_set = [samples[i] for i in order[len(order) // 5 :]]

    from transformers import DataCollatorWithPadding

    lr = 2e-5 if arguments.full else 2e-3
    trainer = Trainer(model, loss_func=None, optimizer=partial(optim.AdamW, lr=lr))
    trainer.train(
        train_set,
        arguments.epochs,
        eval_dataset=held_out,
        per_device_batch_size=32,
        gradient_clip_norm=1.0,
        create_scheduler_fn="linear",
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    results = trainer.evaluate(held_out)
    trainer.print(f"Accuracy: {results['accuracy']:.4f}, F1: {results['f1_score']:.4f}")


if __name__ == "__main__":
    main()
