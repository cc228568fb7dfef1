"""The functions that make a batch of samples, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

COLLATORS = ("padding", "token_classification", "causal_lm", "masked_lm", "seq2seq")


def create_collator(
    name: str, tokenizer: Any, model: Any = None, mlm_probability: float = 0.15
) -> Callable[[Any], Any]:
    """transformers' collator of a name.

    Args:
        name: ``"padding"``, ``"token_classification"``, ``"causal_lm"``, ``"masked_lm"`` or
            ``"seq2seq"``.
        tokenizer: pads, and knows the special tokens.
        model: an encoder-decoder model prepares its decoder's inputs.
        mlm_probability: the share of tokens that are masked for ``"masked_lm"``. Which ones is a
            function of the seed and the place in the run.

    Raises:
        ValueError: for a tokenizer that can't pad, or has no mask.
    """
    import transformers

    if tokenizer.pad_token is None:
        raise ValueError(
            "The tokenizer has no padding token, and batches need one: set tokenizer.pad_token, "
            "often to tokenizer.eos_token, and save it"
        )
    if name == "padding":
        return transformers.DataCollatorWithPadding(tokenizer)
    if name == "token_classification":
        return transformers.DataCollatorForTokenClassification(tokenizer)
    if name == "seq2seq":
        return transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
    masked = name == "masked_lm"
    if masked and tokenizer.mask_token is None:
        raise ValueError("The tokenizer has no mask token, which a masked language model needs")
    return transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm=masked, mlm_probability=mlm_probability if masked else None
    )
