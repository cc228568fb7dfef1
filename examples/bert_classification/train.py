"""Text classification with BERT: which of two Python modules does a line come from?

    python train.py           # a small BERT on lines of the standard library, in seconds
    python train.py --full    # bert-base-cased on GLUE's MRPC (downloads; pip install datasets)

The batches are dicts. The plugin `transformers` passes them to the model and trains with the
model's own loss, without any subclass.
"""

import argparse
import inspect
import json
import random
import unittest.case
from functools import partial
from typing import Any

import torch
from torch import nn, optim

from pa_core import Trainer
from pa_core.utils import local_process_zero_first

Samples = list[Any]  # dicts of token ids, of different lengths, with their label
MAX_LENGTH = 32


def small_model_and_lines() -> tuple[nn.Module, Any, Samples, Samples]:
    """The model, its tokenizer, and lines for training and held out."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    sources = [inspect.getsource(module).splitlines() for module in (json.decoder, unittest.case)]
    lines = [(line, label) for label, text in enumerate(sources) for line in text if line.strip()]
    random.Random(0).shuffle(lines)

    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    learner = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    held_out = len(lines) // 5
    words.train_from_iterator([line for line, _ in lines[held_out:]], learner)
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
    samples: Samples = [
        tokenizer(line, truncation=True, max_length=MAX_LENGTH) | {"labels": label}
        for line, label in lines
    ]
    model = BertForSequenceClassification(config)
    return model, tokenizer, samples[held_out:], samples[:held_out]


@local_process_zero_first  # the other processes use its download
def bert_and_mrpc() -> tuple[nn.Module, Any, Samples, Samples]:
    """The same with pairs of sentences: do both have the same meaning?"""
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    name = "google-bert/bert-base-cased"
    tokenizer = AutoTokenizer.from_pretrained(name)
    train_set, held_out = (
        [
            tokenizer(pair["sentence1"], pair["sentence2"], truncation=True)
            | {"labels": pair["label"]}
            for pair in load_dataset("nyu-mll/glue", "mrpc", split=split)
        ]
        for split in ("train", "validation")
    )
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    return model, tokenizer, train_set, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="BERT on MRPC (downloads)")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    load, lr = (bert_and_mrpc, 2e-5) if arguments.full else (small_model_and_lines, 2e-3)
    model, tokenizer, train_set, held_out = load()

    from transformers import DataCollatorWithPadding

    trainer = Trainer(model, loss_func=None, optimizer=partial(optim.AdamW, lr=lr))
    trainer.train(
        train_set,
        arguments.epochs,
        eval_dataset=held_out,
        per_device_batch_size=32,
        gradient_clip_norm=1.0,
        collate_fn=DataCollatorWithPadding(tokenizer),
    )
    results = trainer.evaluate(held_out)
    trainer.print(f"Accuracy: {results['accuracy']:.4f}, F1: {results['f1_score']:.4f}")


if __name__ == "__main__":
    main()
