"""Small transformers and timm models, built from their configurations, in real runs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.utils.data import TensorDataset

from pa_core import Trainer, TrainerCallback
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
    "Electra": {
        "embedding_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
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


def build(family: str, head: str, **options) -> nn.Module:
    """A small model with the same random weights each time."""
    import transformers

    torch.manual_seed(0)
    values = {"vocab_size": VOCABULARY, **SMALL[family], **options}
    config = getattr(transformers, f"{family}Config")(**values)
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


def trainer_for(model: nn.Module, loss_func: Any = None, **options) -> Trainer:
    return Trainer(
        model,
        loss_func,
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


# -- What a loss is a mean over -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "mean"),
    [
        ("BartForCausalLM", "CAUSAL_LM", "labels"),  # a causal model that doesn't shift them
        ("GPTNeoXForCausalLM", "CAUSAL_LM", "shifted_labels"),
        ("XLMWithLMHeadModel", "MASKED_LM", "labels"),
        ("ElectraForPreTraining", "PRETRAINING", "attention_mask"),
        ("BertForPreTraining", "PRETRAINING", "not known: it is the sum of means over different"),
        ("MarianMTModel", "SEQ_TO_SEQ_CAUSAL_LM", "labels"),
        ("ViTForImageClassification", "IMAGE_CLASSIFICATION", "labels"),
        ("HubertForCTC", "CTC", "samples"),
        ("BertForQuestionAnswering", "QUESTION_ANSWERING", "start_positions and end_positions"),
        ("DebertaV2ForSequenceClassification", "SEQUENCE_CLASSIFICATION", "labels"),
        ("YosoForTokenClassification", "TOKEN_CLASSIFICATION", "not known: the target of its"),
        ("SegformerForSemanticSegmentation", "SEMANTIC_SEGMENTATION", "labels"),
    ],
)
def test_losses_of_real_models_are_exact_or_not_known(losses_script, name, task, mean):
    assert losses_script["check"](name, task).startswith(mean)


@pytest.fixture(scope="module")
def losses_script() -> dict[str, Any]:
    import runpy

    return runpy.run_path(str(Path(__file__).parents[3] / "docs" / "transformers_losses.py"))


class Custom(nn.Module):
    """A user's model, whose loss is a function of logits and labels."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
        self.loss = loss

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.embedding(input_ids))
        return {"loss": self.loss(logits, labels), "logits": logits}


def token_loss(logits, labels, **options):
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


KNOWN = {
    "labels": token_loss,
    "shifted": lambda logits, labels: token_loss(logits[:, :-1], labels[..., 1:]),
    "selected": lambda logits, labels: functional.cross_entropy(
        logits[labels != -100], labels[labels != -100]
    ),
    "scaled": lambda logits, labels: 0.5 * token_loss(logits, labels) + 1,
    "not reduced": lambda logits, labels: token_loss(logits, labels, reduction="none").mean(),
    "squares": lambda logits, labels: (logits.mean(-1) - labels).square().mean(),
    "weighted elements": lambda logits, labels: functional.binary_cross_entropy_with_logits(
        logits.mean(-1), labels.float(), weight=logits.detach().exp().mean(-1)
    ),
}

UNKNOWN = {
    "ignored in place": lambda logits, labels: token_loss(
        logits, labels.view(-1).masked_fill_(labels.view(-1) == 7, -100)
    ),
    "replaced": lambda logits, labels: token_loss(logits, labels.clone().clamp(max=9)),
    "rolled": lambda logits, labels: token_loss(logits, labels.roll(-1, 1)),
    "by the batch": lambda logits, labels: token_loss(logits, labels) * len(labels),
    "by a fraction of labels": lambda logits, labels: (
        token_loss(logits, labels) * ((labels != -100).sum().item() / labels.numel())
    ),
    "by the shape": lambda logits, labels: token_loss(logits, labels) * (len(labels) / 9),
    "two means": lambda logits, labels: (
        KNOWN["labels"](logits, labels) + KNOWN["shifted"](logits, labels)
    ),
    "another term": lambda logits, labels: token_loss(logits, labels) + logits.square().mean(),
    "weights": lambda logits, labels: token_loss(logits, labels, weight=torch.ones(VOCABULARY)),
    "sum": lambda logits, labels: token_loss(logits, labels, reduction="sum"),
    "sum of elements": lambda logits, labels: (
        token_loss(logits, labels, reduction="none") * logits.detach().exp().mean(-1).flatten()
    ).sum(),
    "sum of each": lambda logits, labels: (
        token_loss(logits, labels, reduction="none").sum() / len(labels)
    ),
    "sum of own": lambda logits, labels: (
        token_loss(logits, labels, reduction="sum") / (labels != -100).sum()
    ),
}


def hand_update(model: nn.Module, data: list[Any], loss_of: Any) -> tuple[torch.Tensor, float]:
    """The weights after an update with all data, and the loss after it."""
    optimizer, batch = SGD(model.parameters(), lr=0.1), torch.utils.data.default_collate(data)
    loss_of(model, batch).backward()
    optimizer.step()
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    with torch.no_grad():
        return weights, loss_of(model.eval(), batch).item()


def assert_equals_by_hand(make: Any, data: list[Any], loss_of: Any, **options) -> None:
    """Whole and accumulated batches, evaluated at two sizes, give the results of plain PyTorch."""
    expected, expected_loss = hand_update(make(), data, loss_of)
    for size, accumulation in ((len(data), 1), (2, len(data) // 2)):
        trainer = trainer_for(make(), **options)
        trainer.train(
            data,
            1,
            eval_dataset=data,
            per_device_batch_size=size,
            gradient_accumulation_steps=accumulation,
            train_dataloader_kwargs={"shuffle": False},
        )
        found = nn.utils.parameters_to_vector(trainer.get_model().parameters())
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        loss = trainer.run_history.get_latest_metric("eval_loss_epoch")
        assert loss == pytest.approx(expected_loss, rel=1e-5)


def own_loss(model, batch):
    return model(**batch)["loss"]


@pytest.mark.parametrize("name", KNOWN)
def test_the_loss_of_a_custom_model_is_watched(name):
    assert_equals_by_hand(lambda: Custom(KNOWN[name]), tagged(8, language=True), own_loss)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_loss_that_is_not_known_is_asked_for(name):
    def train(**options):
        trainer = trainer_for(Custom(UNKNOWN[name]), plugins=[TransformersPlugin(**options)])
        trainer.train(tagged(8, language=True), 1, per_device_batch_size=5)

    with pytest.raises(ValueError, match=r"isn't known what the loss of Custom is a mean over.*"):
        train()
    if name in ("sum", "sum of elements"):
        with pytest.raises(ValueError, match="is a sum, which grows with the batch"):
            train(loss_mean="labels")
    else:
        train(loss_mean="labels")


def test_the_loss_is_watched_for_each_task_and_in_each_epoch():
    class Tasks(Custom):
        epoch = 0

        def forward(self, input_ids, labels=None, attention_mask=None, task="tokens"):
            name = "shifted" if task == "next tokens" or self.epoch else "labels"
            self.loss = KNOWN[name]
            return super().forward(input_ids, labels)

    class Counts(TrainerCallback):
        def __init__(self):
            self.items = []

        def on_train_step_end(self, trainer, batch_output):
            self.items.append(int(batch_output["num_items_in_batch"]))

        def on_train_epoch_end(self, trainer):
            trainer.get_model().epoch += 1

    def collate(samples):
        task = "next tokens" if samples[0]["input_ids"][0] % 2 else "tokens"
        return torch.utils.data.default_collate(samples) | {"task": task}

    data, counts = tagged(8, language=True), Counts()
    trainer = trainer_for(Tasks(None), plugins=[TransformersPlugin, counts])
    options = {"collate_fn": collate, "train_dataloader_kwargs": {"shuffle": False}}
    trainer.train(data, 2, per_device_batch_size=1, **options)
    labelled = [int((sample["labels"] != -100).sum()) for sample in data]
    odd = [int(sample["input_ids"][0] % 2) for sample in data]
    assert 0 < sum(odd) < 8
    expected = [n - one for n, one in zip(labelled, odd, strict=True)]
    assert counts.items == expected + [n - 1 for n in labelled]


def count_labels(batch, outputs):
    assert outputs["logits"].ndim == 3
    return (batch["labels"] != -100).sum()


@pytest.mark.parametrize("declared", ["labels", count_labels, f"{__name__}.count_labels"])
def test_a_declared_mean_is_used(declared):
    plugins = [TransformersPlugin(loss_mean=declared)]
    data = tagged(8, language=True)
    assert_equals_by_hand(lambda: Custom(UNKNOWN["sum of own"]), data, own_loss, plugins=plugins)


def test_mistakes_in_a_declared_mean_are_reported():
    from pa_core.errors import SettingsError

    with pytest.raises(SettingsError, match="no 'lables'. Did you mean 'labels'"):
        TransformersPlugin(loss_mean="lables")
    with pytest.raises(SettingsError, match=r"loss_mean: can't import 'pa_models.nothing'"):
        TransformersPlugin(loss_mean="pa_models.nothing")
    batch = torch.utils.data.default_collate(tagged(2, language=True))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is a mean over shifted_labels"):
        items_of(gpt2(), batch, loss_mean="labels")
    batch = torch.utils.data.default_collate(sentences(2))
    with pytest.raises(ValueError, match='"shifted_labels" needs .labels. in the batch'):
        items_of(
            Custom(lambda *_: torch.zeros(())),
            {"input_ids": batch["input_ids"]},
            loss_mean="shifted_labels",
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's compiler asks
@pytest.mark.parametrize("part", ["whole", "part", "in place", "loss"])
def test_compiled_models_are_watched_as_they_were_written(part):
    def make():
        model = Custom(KNOWN["shifted"])
        if part == "loss":
            model.loss = torch.compile(KNOWN["shifted"], backend="eager", fullgraph=True)
        if part == "part":
            model.embedding.compile(backend="eager")
        elif part == "in place":
            model.compile(backend="eager")
        return torch.compile(model, backend="eager") if part == "whole" else model

    assert_equals_by_hand(make, tagged(8, language=True), own_loss)


def test_answers_of_which_only_one_position_is_in_the_text_are_reported():
    data = sentences(4)
    for i, sample in enumerate(data):
        del sample["labels"]
        sample["start_positions"] = sample["end_positions"] = torch.tensor((1, 9)[i % 2])

    def make():
        return build("Bert", "ForQuestionAnswering", num_labels=2)

    assert_equals_by_hand(make, data, own_loss)
    data[0]["end_positions"] = torch.tensor(9)
    with pytest.raises(ValueError, match="only one of their positions is in the sequence"):
        trainer_for(make()).evaluate(data)


# -- Given losses, and tuples ---------------------------------------------------------------------


def test_a_given_loss_function_is_used_and_counts_the_weights_of_its_classes():
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 50.0, 2.0]))

    def by_hand(model, batch):
        return weighted(model(input_ids=batch["input_ids"]).logits, batch["labels"])

    assert_equals_by_hand(bert, sentences(), by_hand, loss_func=weighted)
    trainer = trainer_for(bert(), weighted)
    first = trainer.evaluate(sentences())["evaluation_loss"]
    weighted.weight = torch.tensor([1.0, 0.0, 0.0])
    other = trainer.evaluate(sentences(), per_device_batch_size=2)["evaluation_loss"]
    with torch.no_grad():
        right = by_hand(bert().eval(), torch.utils.data.default_collate(sentences())).item()
    assert other == pytest.approx(right) != first


def test_a_given_loss_function_of_outputs_and_batch_is_watched_too():
    def loss_func(outputs, batch):
        weight = torch.arange(1.0, VOCABULARY + 1)
        return token_loss(outputs["logits"], batch["labels"], weight=weight, label_smoothing=0.1)

    def by_hand(model, batch):
        return loss_func(model(**batch), batch)

    data = tagged(8, language=True)
    make = partial(Custom, lambda *_: None)
    assert_equals_by_hand(make, data, by_hand, loss_func=loss_func)


@pytest.mark.parametrize("part", ["encoder-decoder", "tagger"])
def test_parts_of_a_custom_model_get_the_labels_that_they_need(part):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = t5() if part == "encoder-decoder" else bert("ForTokenClassification")

        def forward(self, **batch):
            return self.inner(**batch)

    class Tagger(Around):
        def forward(self, input_ids, labels, attention_mask=None):  # type: ignore[override]
            return self.inner(input_ids=input_ids, labels=labels)

    def by_hand(model, batch):
        return token_loss(model(**batch).logits, batch["labels"])

    data = tagged(8)
    make = Around if part == "encoder-decoder" else Tagger
    assert_equals_by_hand(make, data, by_hand, loss_func=token_loss)
    model = make().eval()
    expected = model(**torch.utils.data.default_collate(data)).logits.detach()
    torch.testing.assert_close(trainer_for(model).predict(data), expected)


def test_a_given_loss_function_that_does_not_fit_is_refused():
    batch = torch.utils.data.default_collate(sentences(4))

    def loss_of(loss_func, batch, **options):
        model = bert()
        plugin = TransformersPlugin(**options)
        trainer = Trainer(model, loss_func, None, callbacks=(), plugins=[plugin])
        return plugin.calculate_train_batch_loss(trainer, batch)

    with pytest.raises(ValueError, match="label_smoothing.*the Trainer has a loss_func"):
        loss_of(nn.CrossEntropyLoss(), batch, label_smoothing=0.1)
    with pytest.raises(ValueError, match="the batch has no 'labels'. Name its second parameter"):
        loss_of(nn.CrossEntropyLoss(), {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="what the loss_func is a mean over: .* is a sum"):
        loss_of(nn.CrossEntropyLoss(reduction="sum"), batch)
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    with pytest.raises(ValueError, match="is a mean over labels by the weights of their classes"):
        loss_of(weighted, batch, loss_mean="samples")
    with pytest.raises(AttributeError, match="no attribute 'loss'") as raised:
        loss_of(lambda outputs, inputs: outputs.loss, batch)
    assert "named 'batch'" in " ".join(raised.value.__notes__)


@pytest.mark.parametrize("kind", ["of transformers", "custom", "unpacking"])
def test_models_may_return_tuples(kind):
    class Tuples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bert()

        def forward(self, **batch):
            return self.inner(**batch).to_tuple()

    class Unpacks(Tuples):
        def __init__(self) -> None:
            super().__init__()
            self.config = self.inner.config
            self.config.return_dict = False

        def forward(self, **batch):
            *loss, logits = self.inner(**batch)
            return *loss, 2 * logits

    def make():
        if kind != "of transformers":
            return Tuples() if kind == "custom" else Unpacks()
        model = bert()
        model.config.return_dict = False
        return model

    data = sentences(8)
    assert_equals_by_hand(make, data, lambda model, batch: model(**batch)[0])
    logits = bert().eval()(**torch.utils.data.default_collate(data)).logits.detach()
    expected = 2 * logits if kind == "unpacking" else logits
    torch.testing.assert_close(trainer_for(make()).predict(data), expected)


def test_parts_of_a_model_may_return_tuples():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    pictures = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    texts = LlamaConfig(vocab_size=60, **sizes)
    model = Llava(
        LlavaConfig(vision_config=pictures, text_config=texts, image_token_index=59)
    ).eval()
    tokens = torch.tensor([59, 59, 59, 59, 3, 4, 5])
    sample = {"input_ids": tokens, "pixel_values": torch.randn(3, 8, 8), "labels": tokens}
    expected = model(**torch.utils.data.default_collate([sample]))
    for configs in ([model.config.text_config], [model.config, model.config.text_config]):
        for config in configs:
            config.return_dict = False
        trainer = trainer_for(model)
        found = trainer.evaluate([sample])["evaluation_loss"]
        assert found == pytest.approx(expected.loss.item(), abs=1e-6)
        torch.testing.assert_close(trainer.predict([sample]), expected.logits.detach())
        assert not any(config.return_dict for config in configs)


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
    for item in data:
        del item["labels"]
    with pytest.raises(ValueError, match="input_ids") as raised:
        trainer_for(t5()).predict(data)
    assert "neither labels nor decoder_input_ids" in raised.value.__notes__[0]


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

    page = Path(__file__).parents[3] / "docs" / "coming_from" / "hf_trainer.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    missing = {field.name for field in fields(TrainingArguments)} - set(named)
    assert not missing
