"""Collators, smoothing, names, adapters, generation and export, with real models."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_models import TransformersPlugin, create_collator, export
from tests.helpers import assert_identical, largest_difference, weights_of
from tests.plugins.models.test_transformers import bert, gpt2, sentences, t5, tagged

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=40, special_tokens=SPECIAL)
    words.train_from_iterator(inspect.getsource(json.decoder).splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@pytest.fixture
def saved_tokenizer(tokenizer, tmp_path) -> str:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def trainer_for(model, plugin, *callbacks, **options) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, None, optimizer, callbacks=callbacks, plugins=[plugin], **options)


def texts(tokenizer, count: int = 10) -> list[dict]:
    """Lines of different lengths."""
    lines = [line for line in inspect.getsource(json.decoder).splitlines() if line.strip()]
    return [
        dict(tokenizer(line, truncation=True, max_length=3 + i))
        for i, line in enumerate(lines[:count])
    ]


class Watch(TrainerCallback):
    def on_training_run_start(self, trainer):
        self.batches = []

    def on_train_step_end(self, batch):
        self.batches.append({key: value.clone() for key, value in batch.items()})


# -- Collators ------------------------------------------------------------------------------------


def test_settings_choose_collator_and_tokenizer(tmp_path, saved_tokenizer, tokenizer):
    file = tmp_path / "pyproject.toml"
    file.write_text(
        f"""
        [tool.pa-core]
        plugins = ["transformers"]

        [tool.pa-core.transformers]
        collator = "padding"
        tokenizer = '{saved_tokenizer}'
        """
    )
    model = bert()
    samples = [sample | {"labels": i % 3} for i, sample in enumerate(texts(tokenizer))]
    trainer = Trainer(
        model, None, torch.optim.SGD(model.parameters(), lr=0.1), callbacks=(), settings=file
    )
    trainer.train(samples, 1, eval_dataset=samples, per_device_batch_size=4)
    assert trainer.run_history.get_latest_metric("eval_loss_epoch") > 0
    assert trainer.predict(samples).shape == (10, 3)


def test_a_custom_collate_function_overrides_the_settings(tokenizer):
    seen = []

    def collate(items):
        seen.append(len(items))
        return torch.utils.data.default_collate(items)

    plugin = TransformersPlugin(collator="padding", tokenizer=tokenizer)
    trainer_for(bert(), plugin).train(sentences(4), 1, collate_fn=collate)
    assert seen


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_tokens_are_masked_after_a_resume(tokenizer, tmp_path, workers):
    def run(folder, **options):
        watch = Watch()
        save = SaveTrainingStateCallback(folder, save_every_n_steps=2, save_at_end=False)
        plugin = TransformersPlugin(collator="masked_lm", tokenizer=tokenizer, mlm_probability=0.4)
        trainer = trainer_for(bert("ForMaskedLM"), plugin, watch, save)
        trainer.train(
            texts(tokenizer),
            2,
            per_device_batch_size=4,
            train_dataloader_kwargs={"num_workers": workers},
            **options,
        )
        return watch.batches, weights_of(trainer)

    batches, weights = run(tmp_path / "whole")
    resumed, resumed_weights = run(tmp_path, resume_from=tmp_path / "whole" / "update_00000002")
    assert_identical(resumed_weights, weights)
    for first, second in zip(batches[2:], resumed, strict=True):
        assert torch.equal(first["labels"], second["labels"])
    assert any((batch["labels"] != -100).any() for batch in batches)


@pytest.mark.parametrize(
    ("name", "model", "key"),
    [
        ("token_classification", lambda: bert("ForTokenClassification"), "labels"),
        ("causal_lm", gpt2, "labels"),
        ("seq2seq", t5, "decoder_input_ids"),
    ],
)
def test_each_collator_makes_batches_for_its_model(tokenizer, name, model, key):
    model, samples = model(), texts(tokenizer)
    if name != "causal_lm":
        samples = [
            {**sample, "labels": [token % 3 for token in sample["input_ids"]]} for sample in samples
        ]
    for sample in samples:
        sample.pop("token_type_ids", None)
    watch = Watch()
    plugin = TransformersPlugin(collator=name, tokenizer=tokenizer)
    trainer = trainer_for(model, plugin, watch)
    trainer.train(samples, 1, per_device_batch_size=4)
    assert all(key in batch for batch in watch.batches)


def test_a_tokenizer_without_a_needed_token_is_rejected(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.mask_token = None
    with pytest.raises(ValueError, match="no mask token"):
        create_collator("masked_lm", bare)
    bare.pad_token = None
    with pytest.raises(ValueError, match="no padding token.*tokenizer.pad_token"):
        create_collator("padding", bare)
    with pytest.raises(ValueError, match="collator: requires tokenizer"):
        TransformersPlugin(collator="padding")


def test_a_missing_collator_raises():
    samples = [{"input_ids": [1, 2, 3], "labels": 0} for _ in range(4)]
    with pytest.raises(ValueError, match="'input_ids' of the batch are lists.*need a collator"):
        trainer_for(bert(), TransformersPlugin()).train(samples, 1)


# -- Losses ---------------------------------------------------------------------------------------


def test_label_smoothing_equals_that_of_torch():
    plugin = TransformersPlugin(label_smoothing=0.2)
    model, batch = bert().eval(), torch.utils.data.default_collate(sentences(4))
    trainer = trainer_for(model, plugin)
    output = plugin.calculate_train_batch_loss(trainer, batch)
    expected = functional.cross_entropy(
        output["model_outputs"].logits, batch["labels"], label_smoothing=0.2
    )
    assert torch.allclose(output["loss"], expected)
    evaluated = plugin.calculate_eval_batch_loss(trainer, batch)
    expected = functional.cross_entropy(output["model_outputs"].logits, batch["labels"])
    assert torch.allclose(evaluated["loss"], expected)
    log = output["log"]
    assert torch.allclose(log["unsmoothed_loss"], expected)
    both = 0.8 * log["unsmoothed_loss"] + 0.2 * log["uniform_loss"]
    assert torch.allclose(both, output["loss"])
    assert "log" not in evaluated


@pytest.mark.parametrize(
    ("model", "shift"), [(gpt2, 1), (lambda: bert("ForTokenClassification"), 0)]
)
def test_label_smoothing_of_tokens_ignores_padding_and_shifts_like_the_model(model, shift):
    plugin = TransformersPlugin(label_smoothing=0.2)
    batch = torch.utils.data.default_collate(tagged(4, language=bool(shift)))
    trainer = trainer_for(model().eval(), plugin)
    output = plugin.calculate_train_batch_loss(trainer, batch)
    logits, labels = output["model_outputs"].logits, batch["labels"][:, shift:]
    logits = logits[:, :-1] if shift else logits
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2)
    assert torch.allclose(output["loss"], expected, atol=1e-6)


class TwoHeads(nn.Module):
    """Returns two losses beside its own, as mixtures of experts and detectors do."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, x, labels):
        logits = self.head(x)
        aux = logits.square().mean()
        loss = functional.cross_entropy(logits, labels) + 0.1 * aux
        parts = {"loss_box": logits.abs().mean(), "boxes": logits}
        return {"loss": loss, "logits": logits, "aux_loss": aux, "loss_dict": parts, "z_loss": None}


def test_other_losses_of_a_model_are_recorded_as_means():
    torch.manual_seed(0)
    x, y, model = torch.randn(11, 2), torch.arange(11) % 3, TwoHeads()
    samples = [{"x": one, "labels": label} for one, label in zip(x, y, strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    plugin = TransformersPlugin(loss_mean="samples")  # the sum of two
    trainer = Trainer(model, None, optimizer, callbacks=(), plugins=[plugin])
    trainer.train(samples, 1, eval_dataset=samples, per_device_batch_size=4)
    logits = model(x, y)["logits"]
    latest = trainer.run_history.get_latest_metric
    for split in ("train", "eval"):
        found = latest(f"{split}_aux_loss"), latest(f"{split}_loss_box")
        right = logits.square().mean().item(), logits.abs().mean().item()
        assert found == pytest.approx(right, rel=1e-5)


def test_labels_that_are_not_classes_cannot_be_smoothed():
    batch = torch.utils.data.default_collate(sentences(4))
    batch["labels"] = torch.rand(4, 3)
    model = bert()
    model.config.problem_type = "multi_label_classification"
    plugin = TransformersPlugin(label_smoothing=0.1)
    with pytest.raises(ValueError, match="can't be smoothed: they aren't classes"):
        plugin.calculate_train_batch_loss(trainer_for(model, plugin), batch)


def test_smoothed_token_losses_accumulate_exactly():
    def run(batch_size, accumulation):
        plugin = TransformersPlugin(label_smoothing=0.1)
        trainer = trainer_for(bert("ForTokenClassification").eval(), plugin)
        trainer.train(
            tagged(16),
            2,
            per_device_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            train_dataloader_kwargs={"shuffle": False},
        )
        return weights_of(trainer)

    assert largest_difference(run(2, 4), run(8, 1)) < 1e-6


def test_gradient_checkpointing_changes_no_values_and_needs_a_model_that_supports_it():
    def run(**options):
        model = bert()
        trainer = trainer_for(model, TransformersPlugin(**options))
        trainer.train(sentences(), 1, per_device_batch_size=4)
        return model, weights_of(trainer)

    model, weights = run(
        gradient_checkpointing=True, gradient_checkpointing_options={"use_reentrant": False}
    )
    layers = model.bert.encoder.layer
    assert all(layer.gradient_checkpointing for layer in layers)
    assert largest_difference(weights, run()[1]) < 1e-6
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear doesn't support gradient checkpointing"):
        trainer_for(plain, TransformersPlugin(gradient_checkpointing=True)).train(sentences(), 1)


# -- Names and folders ----------------------------------------------------------------------------


def test_a_model_is_loaded_by_name_with_the_head_of_the_task(tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    plugin = TransformersPlugin(task="sequence-classification", model_options={"num_labels": 3})
    name = f"transformers/{tmp_path / 'bert'}"
    trainer = Trainer(
        name,
        None,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        callbacks=(),
        plugins=[plugin],
    )
    assert_identical(weights_of(trainer), bert().state_dict())
    trainer.train(sentences(), 1)


def test_invalid_models_tasks_and_folders_are_rejected(tmp_path):
    (tmp_path / "empty").mkdir()

    def load(task, folder):
        plugin = TransformersPlugin(task=task)
        return Trainer(f"transformers/{folder}", None, None, plugins=[plugin])

    with pytest.raises(ValueError, match="without a config.json, so it isn't a model"):
        load("causal-lm", tmp_path / "empty")
    with pytest.raises(ValueError, match="no task 'casual-lm'. Did you mean 'causal-lm'"):
        load("casual-lm", tmp_path / "empty")
    with pytest.raises(ValueError, match="needs a task: set task"):
        load(None, tmp_path / "empty")
    with pytest.raises(ValueError, match="a folder without a tokenizer"):
        _ = TransformersPlugin(tokenizer=str(tmp_path / "empty")).tokenizer


def test_the_model_is_exported_with_its_tokenizer_at_the_end_of_a_run(tmp_path, saved_tokenizer):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    target = tmp_path / "exported"
    options = {"tokenizer": saved_tokenizer}
    plugin = TransformersPlugin.Settings(export_to=target, **options)
    model = bert()
    for _ in range(2):  # an earlier export is replaced
        trainer_for(model, TransformersPlugin(plugin)).train(sentences(), 1)
    loaded = AutoModelForSequenceClassification.from_pretrained(target)
    assert_identical(loaded.state_dict(), model.state_dict())
    assert AutoTokenizer.from_pretrained(target).vocab_size == 40
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_export_overwrites_only_an_earlier_export(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    trainer = trainer_for(bert(), TransformersPlugin())
    with pytest.raises(ValueError, match="exists and isn't an exported model"):
        export(trainer, tmp_path / "precious")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear can't be exported"):
        export(trainer_for(other, TransformersPlugin()), tmp_path / "linear")


# -- Adapters and generation ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks
def test_only_adapters_are_trained(tmp_path):
    bert().save_pretrained(tmp_path / "bert")
    plugin = TransformersPlugin(
        task="sequence-classification",
        model_options={"num_labels": 3},
        lora={"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]},
        export_to=tmp_path / "adapters",
    )
    trainer = Trainer(
        f"transformers/{tmp_path / 'bert'}",
        None,
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        callbacks=(),
        plugins=[plugin],
    )
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    trainer.train(sentences(), 1)
    assert (tmp_path / "adapters" / "adapter_config.json").is_file()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks
def test_adapters_train_as_in_a_loop_by_hand_resume_exactly_and_load_again(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    bert().save_pretrained(tmp_path / "bert")
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
    samples = sentences()

    def by_plugin(*callbacks, **arguments):
        torch.manual_seed(5)  # of the adapters
        plugin = TransformersPlugin(
            task="sequence-classification",
            model_options={"num_labels": 3},
            lora=options,
            export_to=tmp_path / "adapters",
        )
        trainer = Trainer(
            f"transformers/{tmp_path / 'bert'}",
            None,
            lambda parameters: torch.optim.SGD(
                [parameter for parameter in parameters if parameter.requires_grad], lr=0.5
            ),
            callbacks=callbacks,
            plugins=[plugin],
        )
        in_order = {"shuffle": False}
        trainer.train(
            samples, 2, per_device_batch_size=4, train_dataloader_kwargs=in_order, **arguments
        )
        return trainer

    torch.manual_seed(5)
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=3)
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**options))
    assert set(model.state_dict()) == set(by_plugin().model.state_dict())
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        for start in range(0, len(samples), 4):
            parts = samples[start : start + 4]
            batch = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    saving = SaveTrainingStateCallback(tmp_path / "states", save_every_n_steps=2)
    whole = by_plugin(saving)
    assert largest_difference(weights_of(whole), model.state_dict()) < 1e-6
    untouched = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): value
        for name, value in weights_of(whole).items()
        if "lora_" not in name
    }
    assert_identical({name: untouched[name] for name in frozen}, frozen)
    resumed = by_plugin(
        SaveTrainingStateCallback(tmp_path / "again"),
        resume_from=tmp_path / "states" / "update_00000002",
    )
    assert_identical(weights_of(resumed), weights_of(whole))
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert", num_labels=3),
        tmp_path / "adapters",
    )
    inputs = {key: value[None] for key, value in samples[0].items() if key != "labels"}
    whole.model.eval()
    again.eval()
    assert torch.equal(again(**inputs).logits, whole.model(**inputs).logits)


def test_without_peft_the_error_has_the_pip_command(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    from pa_models import add_lora

    with pytest.raises(ImportError, match=r"pip install 'pa-models\[lora\]'"):
        add_lora(bert(), r=2)


def test_texts_are_generated_during_evaluation_for_the_metrics(tokenizer):
    seen = []

    class See(TrainerCallback):
        def on_eval_step_end(self, batch_output):
            seen.append(batch_output)

    plugin = TransformersPlugin(
        tokenizer=tokenizer, generate={"max_new_tokens": 4, "do_sample": False}
    )
    samples = [
        {key: value for key, value in item.items() if key != "token_type_ids"}
        for item in tagged(4, language=True)
    ]
    trainer_for(t5(), plugin, See()).evaluate(samples)
    (output,) = seen
    assert output["generated"].shape[0] == len(output["texts"]) == len(output["references"]) == 4
    assert all(isinstance(text, str) for text in output["texts"])
