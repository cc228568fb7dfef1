"""Train a causal language model on the source code of the Python standard library.

    python train.py           # a small GPT-2 on the characters of a few modules, in seconds
    python train.py --full    # GPT-2 from the hub on WikiText-2 (downloads; pip install datasets)

The loss is the mean over all tokens of an update, across its micro-batches and processes: the
plugin `transformers` counts them.
"""

import argparse
import heapq
import inspect
import json
import random
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, optim
from torch.utils.data import Dataset

from pa_core import Trainer
from pa_core.utils import local_process_zero_first


class Blocks(Dataset[dict[str, Tensor]]):
    """A long text in blocks of equal length; the target of each token is the next one."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.blocks = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def small_model_and_text() -> tuple[Any, Tensor, Callable[[list[int]], str]]:
    """The model, the tokens of the text, and a function that decodes tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    modules = (json.decoder, textwrap, heapq, random)
    text = "\n".join(inspect.getsource(module) for module in modules)
    letters = sorted(set(text))
    numbers = {letter: number for number, letter in enumerate(letters)}
    config = GPT2Config(
        vocab_size=len(letters),
        n_positions=64,
        n_embd=64,
        n_layer=1,
        n_head=4,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    tokens = torch.tensor([numbers[letter] for letter in text])
    return GPT2LMHeadModel(config), tokens, lambda ids: "".join(letters[i] for i in ids)


@local_process_zero_first  # the other processes use its download
def gpt2_and_wikitext() -> tuple[Any, Tensor, Callable[[list[int]], str]]:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "openai-community/gpt2"
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = "".join(load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train")["text"])
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])  # split into blocks later
    model = AutoModelForCausalLM.from_pretrained(name)
    return model, tokens, lambda ids: str(tokenizer.decode(ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="GPT-2 on WikiText-2 (downloads)")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, tokens, decode = gpt2_and_wikitext() if arguments.full else small_model_and_text()
    length, lr = (512, 5e-5) if arguments.full else (64, 3e-3)
    held_out = len(tokens) // 10
    train_set, eval_set = Blocks(tokens[held_out:], length), Blocks(tokens[:held_out], length)

    trainer = Trainer(model, loss_func=None, optimizer=partial(optim.AdamW, lr=lr))
    trainer.train(
        train_set,
        arguments.epochs,
        eval_dataset=eval_set,
        per_device_batch_size=8,
        gradient_accumulation_steps=2,
        gradient_clip_norm=1.0,
    )

    start = tokens[None, :8].to(trainer.device)
    written = (
        trainer.get_model()
        .eval()
        .generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=40, do_sample=True, top_k=3
        )
    )
    trainer.print(f"Generated text: {decode(written[0].tolist())!r}")
    perplexities = trainer.run_history.get_metric_values("perplexity")
    shown = ", ".join(f"{perplexity:.2f}" for perplexity in perplexities)
    trainer.print(f"Perplexity with {model.config.vocab_size} tokens: {shown}")


if __name__ == "__main__":
    main()
