"""Small transformers and timm models, built from their configurations, in real runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import TensorDataset

from pa_core import Trainer
from pa_models import TransformersPlugin
from pa_models.transformers_loss import get_batch_size

VOCABULARY, LABELS = 40, 3


SMALL: dict[str, dict[str, Any]] = {
    "Bert": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": LABELS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "GPT2": {
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "Llama": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "T5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
}


def build(family: str, head: str) -> nn.Module:
    """A small model with the same random weights each time."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, **SMALL[family])
    model: nn.Module = getattr(transformers, family + head)(config)
    return model


def bert(head: str = "ForSequenceClassification") -> nn.Module:
    return build("Bert", head)


def gpt2() -> nn.Module:
    return build("GPT2", "LMHeadModel")


def llama() -> nn.Module:
    return build("Llama", "ForCausalLM")


def t5() -> nn.Module:
    return build("T5", "ForConditionalGeneration")


def sentences(samples: int = 12, length: int = 6) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": (tokens := torch.randint(2, VOCABULARY, (length,), generator=generator)),
            "attention_mask": torch.ones_like(tokens),
            "labels": tokens[0] % LABELS,
        }
        for _ in range(samples)
    ]


def tagged(samples: int = 12, *, language: bool = False) -> list[dict[str, torch.Tensor]]:
    """Labels of one to all tokens; their number differs between micro-batches."""
    items = sentences(samples)
    for i, item in enumerate(items):
        tokens = item["input_ids"]
        item["labels"] = tokens.clone() if language else tokens % LABELS
        item["labels"][1 + i % 5 :] = -100
    return items


def trainer_for(model: nn.Module, **options) -> Trainer:
    return Trainer(
        model,
        None,
        SGD(model.parameters(), lr=0.1),
        callbacks=(),
        **{"plugins": [TransformersPlugin]} | options,
    )


def test_settings_alone_enable_batches_that_are_dicts(tmp_path: Path):
    from transformers import BatchEncoding, default_data_collator

    settings = tmp_path / "pyproject.toml"
    settings.write_text('[tool.pa-core]\nplugins = ["transformers"]\n')
    model, data = bert(), sentences()
    trainer = trainer_for(model, settings=settings, plugins=None)
    trainer.train(
        data,
        num_epochs=6,
        eval_dataset=data,
        per_device_batch_size=4,
        collate_fn=lambda items: BatchEncoding(default_data_collator(items)),
    )
    history = trainer.run_history
    losses = list(history.get_metric_values("train_loss_epoch"))
    assert losses[-1] < losses[0]

    model.eval()
    whole = default_data_collator(data)
    with torch.no_grad():
        outputs = model(**whole)
    assert history.get_latest_metric("eval_loss_epoch") == pytest.approx(outputs.loss.item())
    logits = trainer.predict(data, per_device_batch_size=5)
    torch.testing.assert_close(logits, outputs.logits)


def hand_written_loop(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    optimizer = SGD(model.parameters(), lr=0.1)
    for batch in batches:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("family", "head", "language"),
    [
        ("Bert", "ForTokenClassification", False),
        ("GPT2", "LMHeadModel", True),  # has no loss_type
        ("Llama", "ForCausalLM", True),
        ("T5", "ForConditionalGeneration", True),
    ],
)
def test_accumulated_token_losses_are_the_mean_over_all_labelled_tokens(family, head, language):
    from transformers import default_data_collator

    data = tagged(12, language=language)
    expected = build(family, head)
    hand_written_loop(expected, [default_data_collator(data[:8]), default_data_collator(data[8:])])
    model = build(family, head)
    trainer = trainer_for(model)
    trainer.train(
        data,
        num_epochs=1,
        per_device_batch_size=2,
        gradient_accumulation_steps=4,
        train_dataloader_kwargs={"shuffle": False},
        eval_dataset=data,
    )
    for (name, found), wanted in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5, msg=name)
    model.eval()
    with torch.no_grad():
        loss = model(**default_data_collator(data)).loss.item()
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") == pytest.approx(loss, rel=1e-5)


def items_of(model: nn.Module, batch: dict[str, Any], **options) -> Any:
    """What a mean over the items of a batch is weighted by; None for its samples."""
    plugin = TransformersPlugin(**options)
    output = plugin.calculate_train_batch_loss(trainer_for(model, plugins=[plugin]), batch)
    assert output is not None
    items = output.get("num_items_in_batch")
    return items if items is None else int(items)


def test_labels_are_counted_as_the_loss_counts_them():
    labels = torch.tensor([[0, 2, -100, 1], [2, -100, -100, -100]])
    batch = {"input_ids": labels.clamp(min=3), "labels": labels}
    assert items_of(bert("ForTokenClassification"), batch) == 4
    assert items_of(bert("ForMaskedLM"), batch) == 4
    assert items_of(t5(), batch) == 4
    assert items_of(gpt2(), batch) == 2  # no prediction for the first token
    assert items_of(llama(), batch) == 2
    assert items_of(llama(), batch | {"shift_labels": labels}) == 4
    assert items_of(bert(), batch | {"labels": torch.tensor([1, -100])}) == 1


def test_the_evaluation_loss_has_no_graph():
    from transformers import default_data_collator

    trainer, batch = (
        trainer_for(bert()),
        default_data_collator(sentences()),
    )
    training = TransformersPlugin().calculate_train_batch_loss(trainer, batch)
    evaluation = TransformersPlugin().calculate_eval_batch_loss(trainer, batch)
    assert training is not None
    assert evaluation is not None
    assert training["loss"].requires_grad
    assert not evaluation["loss"].requires_grad
    assert evaluation["batch_size"] == 12


def test_predictions_neither_need_nor_use_labels():
    model, data = bert(), sentences()
    trainer = trainer_for(model)
    expected = trainer.predict(data)
    unlabelled = [{k: v for k, v in item.items() if k != "labels"} for item in data]
    assert torch.equal(trainer.predict(unlabelled), expected)
    impossible = [item | {"labels": torch.tensor(99)} for item in data]
    assert torch.equal(trainer.predict(impossible), expected)


def test_an_encoder_decoder_predicts_from_labels():
    data = tagged(4, language=True)
    for item in data:
        item["labels"][:] = item["input_ids"]
    assert trainer_for(t5()).predict(data).shape == (4, 6, VOCABULARY)


def test_a_model_that_returns_no_loss_raises_with_its_name():
    trainer = trainer_for(bert())
    unlabelled = [{k: v for k, v in item.items() if k != "labels"} for item in sentences()]
    with pytest.raises(
        ValueError, match=r"BertForSequenceClassification returned no loss.*'labels'"
    ):
        trainer.train(unlabelled, num_epochs=1)


def test_any_model_that_returns_a_mapping_with_a_loss_works():
    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x, y):
            prediction = self.linear(x)
            return {"loss": (prediction - y).square().mean(), "prediction": prediction}

    data = [{"x": torch.randn(2), "y": torch.ones(1)} for _ in range(8)]
    trainer = trainer_for(Regression())
    trainer.train(data, num_epochs=3, eval_dataset=data, per_device_batch_size=4)
    values = list(trainer.run_history.get_metric_values("eval_loss_epoch"))
    assert values[-1] < values[0]


def test_other_batches_are_left_to_the_trainer():
    plugin, trainer = TransformersPlugin(), trainer_for(nn.Linear(2, 1))
    batch = (torch.zeros(4, 2), torch.zeros(4, 1))
    assert plugin.calculate_train_batch_loss(trainer, batch) is None
    assert plugin.calculate_eval_batch_loss(trainer, batch) is None
    assert plugin.calculate_predictions(trainer, batch) is None
    trainer.loss_func = nn.MSELoss()
    trainer.train(TensorDataset(*batch), num_epochs=1)


def test_a_batch_without_tensors_is_rejected():
    with pytest.raises(ValueError, match="'text' has no tensors"):
        get_batch_size({"text": ["a", "b"]})


def test_the_hf_trainer_page_lists_each_of_its_arguments():
    import re
    from dataclasses import fields

    from transformers import TrainingArguments

    page = Path(__file__).parents[3] / "docs" / "from_hf_trainer.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    missing = {field.name for field in fields(TrainingArguments)} - set(named)
    assert not missing
