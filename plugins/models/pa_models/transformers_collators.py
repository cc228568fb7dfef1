"""transformers' data collators, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

COLLATORS = ("padding", "token_classification", "causal_lm", "masked_lm", "seq2seq")


def create_collator(
    name: str, tokenizer: Any, model: Any = None, mlm_probability: float = 0.15
) -> Callable[[Any], Any]:
    """Create a data collator of transformers by name.

    Args:
        name: ``"padding"``, ``"token_classification"``, ``"causal_lm"``, ``"masked_lm"`` or
            ``"seq2seq"``.
        tokenizer: the tokenizer that pads and defines the special tokens.
        model: for ``"seq2seq"``, the model that prepares the decoder's inputs.
        mlm_probability: the fraction of tokens that ``"masked_lm"`` masks. The choice of tokens is
            a function of the seed and the position in the run.

    Raises:
        ValueError: for a tokenizer without a padding token, or without a mask token for
            ``"masked_lm"``.
    """
    import transformers

    if tokenizer.pad_token is None:
        raise ValueError(
            "The tokenizer has no padding token, which batches need: set tokenizer.pad_token, "
            "often to tokenizer.eos_token, and save the tokenizer"
        )
    if name == "padding":
        return transformers.DataCollatorWithPadding(tokenizer)
    if name == "token_classification":
        return transformers.DataCollatorForTokenClassification(tokenizer)
    if name == "seq2seq":
        return transformers.DataCollatorForSeq2Seq(tokenizer, model=model)
    masked = name == "masked_lm"
    if masked and tokenizer.mask_token is None:
        raise ValueError("The tokenizer has no mask token, which masked_lm needs")
    return transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm=masked, mlm_probability=mlm_probability if masked else None
    )
