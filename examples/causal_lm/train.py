"""A causal language model of the Python standard library's own text.

    python train.py           # a small GPT-2 on the letters of a few modules, in seconds
    python train.py --full    # GPT-2 from the hub on WikiText-2 (downloads; pip install datasets)

The loss is the mean over all tokens of an update, however they are spread over its micro-batches
and processes; the plugin counts them.
"""

import argparse
import heapq
import inspect
import json
import random
import textwrap
from functools import partial
from typing import Any

import torch
from torch import nn, optim
from torch.utils.data import Dataset

from pa_core import Trainer


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """A long text in blocks of the same length, to be continued token by token."""

    def __init__(self, tokens: torch.Tensor, length: int) -> None:
        self.blocks = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def small_model_and_text() -> tuple[nn.Module, torch.Tensor, int, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    modules = (json.decoder, textwrap, heapq, random)
    text = "\n".join(inspect.getsource(module) for module in modules)
    letters = sorted(set(text))
    numbers = {letter: number for number, letter in enumerate(letters)}
    size = {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": numbers["\n"], "eos_token_id": numbers["\n"]}
    config = GPT2Config(vocab_size=len(letters), **size, **ends)
    tokens = torch.tensor([numbers[letter] for letter in text])
    return GPT2LMHeadModel(config), tokens, 64, lambda ids: "".join(letters[i] for i in ids)


def gpt2_and_wikitext() -> tuple[nn.Module, torch.Tensor, int, Any]:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
    text = "\n".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1")["train"]["text"])
    model = AutoModelForCausalLM.from_pretrained("openai-community/gpt2")
    return model, torch.tensor(tokenizer(text)["input_ids"]), 512, tokenizer.decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="GPT-2 on WikiText-2 (downloads)")
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, tokens, length, decode = (
        gpt2_and_wikitext() if arguments.full else small_model_and_text()
    )
    held_out = len(tokens) // 10
    train_set, eval_set = Blocks(tokens[held_out:], length), Blocks(tokens[:held_out], length)

    trainer = Trainer(model, loss_func=None, optimizer=partial(optim.AdamW, lr=3e-3))
    trainer.train(
        train_set,
        arguments.epochs,
        eval_dataset=eval_set,
        per_device_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_clip_norm=1.0,
    )
    results = trainer.evaluate(eval_set)

    start = tokens[None, :8].to(trainer.device)
    written = trainer.get_model().eval().generate(start, max_new_tokens=40, pad_token_id=0)
    trainer.print(f"It writes: {decode(written[0].tolist())!r}")
    trainer.print(f"Perplexity: {results['perplexity']:.2f} of {model.config.vocab_size} words")


if __name__ == "__main__":
    main()
