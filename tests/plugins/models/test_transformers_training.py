"""Collators, smoothing, names, adapters, generation and export, with real models."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from pa_core import Trainer, TrainerCallback
from pa_core.callbacks import SaveTrainingStateCallback
from pa_models import TransformersPlugin, create_collator, export
from tests.helpers import assert_identical, largest_difference, weights_of
from tests.plugins.models.test_transformers import (
    bert,
    build,
    gpt2,
    llama,
    sentences,
    t5,
    tagged,
)

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
    with pytest.raises(ValueError, match="Unknown task 'casual-lm'. Did you mean 'causal-lm'"):
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


@pytest.mark.parametrize(
    ("create", "shifts"), [(gpt2, True), (lambda: bert("ForTokenClassification"), False)]
)
def test_metrics_learn_whether_the_loss_shifts_labels(create, shifts):
    class Custom(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = create()

        def forward(self, **batch):
            return self.inner(**batch)

    class Penalised(Custom):
        def forward(self, **batch):
            outputs = super().forward(**batch)
            outputs.loss = outputs.loss + 0.1 * outputs.logits.square().mean()
            return outputs

    batch = torch.utils.data.default_collate(tagged(4))
    for model, options in ((Custom(), {}), (Penalised(), {"loss_mean": lambda *_: 1})):
        plugin = TransformersPlugin(**options)
        output = plugin.calculate_eval_batch_loss(trainer_for(model, plugin), batch)
        assert output["shifts_labels"] is shifts


class Ignoring(torch.nn.Module):
    """Its loss ignores the label 255."""

    def __init__(self):
        super().__init__()
        self.scores = torch.nn.Embedding(50, 2)

    def forward(self, input_ids, attention_mask, labels):
        logits = self.scores(input_ids)
        loss = torch.nn.functional.cross_entropy(logits.mT, labels, ignore_index=255)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("kind", ["mask", "label"])
def test_metrics_leave_out_labels_that_the_loss_ignores(kind):
    from pa_metrics import MetricsPlugin

    is_mask = kind == "mask"
    model = build("Electra", "ForPreTraining") if is_mask else Ignoring()
    model.eval()
    samples = []
    for i in range(4):  # the first batch has nothing to ignore
        mask = (torch.arange(6) < (6 if i < 2 else i)).long()
        labels = torch.randint(2, (6,), generator=torch.Generator().manual_seed(i))
        labels = labels.where(mask == 1, 0 if is_mask else 255)
        samples.append({"input_ids": torch.arange(6) + i, "attention_mask": mask, "labels": labels})
    batch = torch.utils.data.default_collate(samples)
    with torch.no_grad():
        logits = model(**batch)["logits"]
    found = logits > 0 if is_mask else logits.argmax(-1)
    expected = (found == batch["labels"])[batch["attention_mask"] == 1].float().mean().item()
    task = "binary" if is_mask else "multiclass"
    metrics = MetricsPlugin(metrics=["accuracy"], task=task, num_classes=2, average="micro")
    trainer = Trainer(model, None, None, callbacks=(), plugins=[TransformersPlugin(), metrics])
    values = trainer.evaluate(samples, per_device_batch_size=2)
    assert values["accuracy"] == pytest.approx(expected, abs=1e-6)


# -- Generation -----------------------------------------------------------------------------------


class Outputs(TrainerCallback):
    def __init__(self):
        self.texts, self.references, self.generated = [], [], []

    def on_eval_step_end(self, batch_output):
        self.texts += batch_output.get("texts", [])
        self.references += batch_output.get("references", [])
        self.generated.append(batch_output["generated"])


def vivid(model):
    """Larger weights, so that each prompt has a continuation of its own."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5, generator=draw)
    model.generation_config.pad_token_id = None
    model.generation_config.eos_token_id = None
    return model.eval()


def words(*, pad: str | None = "w0"):
    """A tokenizer of the words w0 to w39, of which only `pad` is special."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w1"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **({} if pad is None else {"pad_token": pad})
    )


def evaluated(model, samples, *, size=4, tokenizer=None, **options):
    outputs = Outputs()
    plugin = TransformersPlugin(
        tokenizer=tokenizer or words(), generate={"max_new_tokens": 4, **options}
    )
    recorded = trainer_for(model, plugin, outputs).evaluate(samples, per_device_batch_size=size)
    return outputs, recorded


def rwkv():
    from transformers import RwkvConfig, RwkvForCausalLM

    return RwkvForCausalLM(
        RwkvConfig(vocab_size=40, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    )


PROMPTS = [torch.tensor(row) for row in ([5, 6, 7], [8, 9, 10, 11, 12], [13], [14, 15])]
ANSWERS = [torch.tensor(row) for row in ([20, 21], [22], [23, 24, 25], [26, 27])]


def filled(row, length, value, side):
    rest = row.new_full((length - len(row),), value)
    return torch.cat([row, rest] if side == "right" else [rest, row])


def prompted(*, labelled, side="right"):
    samples = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        tokens = torch.cat([prompt, answer]) if labelled else prompt
        sample = {
            "input_ids": filled(tokens, 8, 0, side),
            "attention_mask": filled(torch.ones_like(tokens), 8, 0, side),
        }
        if labelled:
            labels = torch.cat([torch.full_like(prompt, -100), answer])
            sample["labels"] = filled(labels, 8, -100, side)
        samples.append(sample)
    return samples


@pytest.mark.parametrize("create", [gpt2, llama, rwkv])
def test_a_decoder_continues_each_prompt_as_it_does_alone(create):
    model = vivid(create())
    with torch.no_grad():
        alone = [model.generate(prompt[None], max_new_tokens=4)[0] for prompt in PROMPTS]
    right = torch.stack([row[-4:] for row in alone])
    assert len(right.unique(dim=0)) == 4
    tokenizer = words()
    for side in ("right", "left"):
        outputs, _ = evaluated(model, prompted(labelled=True, side=side))
        assert torch.equal(torch.cat(outputs.generated), right)
        assert outputs.texts == tokenizer.batch_decode(right)
        assert outputs.references == [tokenizer.decode(answer) for answer in ANSWERS]
        plugin = TransformersPlugin(generate={"max_new_tokens": 4})
        for labelled in (True, False):
            found = trainer_for(model, plugin).predict(prompted(labelled=labelled, side=side), 2)
            assert torch.equal(found["generated"], right)


def test_of_several_turns_the_first_answer_is_the_reference():
    tokens = torch.arange(5, 13)
    labels = torch.tensor([-100, -100, 7, 8, -100, -100, 11, 12])
    outputs, _ = evaluated(vivid(gpt2()), [{"input_ids": tokens, "labels": labels}])
    assert outputs.references == ["w7 w8"]


def test_without_a_prompt_or_a_method_generate_the_error_says_so():
    tokens, labels = torch.arange(5, 9), torch.tensor([-100, 6, 7, 8])
    samples = [{"input_ids": tokens, "labels": labels}, {"input_ids": tokens, "labels": tokens}]
    with pytest.raises(ValueError, match="sample 1 of the batch has no prompt.*the prompt to -100"):
        evaluated(gpt2(), samples)
    plugin = TransformersPlugin(generate={})
    with pytest.raises(ValueError, match="BertForSequenceClassification has no method generate"):
        trainer_for(bert(), plugin).predict(sentences(2))


def captioner():
    from transformers import (
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
    )

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(image_size=16, patch_size=8, intermediate_size=16, **sizes),
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True),
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = vivid(VisionEncoderDecoderModel(config))
    model.generation_config.decoder_start_token_id = 1
    return model


def test_pictures_are_captioned():
    model, draw = captioner(), torch.Generator().manual_seed(0)
    pictures = torch.randn(4, 3, 16, 16, generator=draw)
    samples = [{"pixel_values": one, "labels": torch.tensor([5, 6, -100])} for one in pictures]
    outputs, _ = evaluated(model, samples)
    with torch.no_grad():
        right = model.generate(pixel_values=pictures, max_new_tokens=4)
    assert torch.equal(torch.cat(outputs.generated), right)
    assert outputs.texts == words().batch_decode(right[:, 1:])  # the first starts the decoder
    assert outputs.references == ["w5 w6"] * 4


def test_neither_padding_nor_what_the_collator_made_of_the_labels_is_in_the_texts():
    """The tokenizer has no padding token, so that w0, the model's own, is a word like others."""
    model = vivid(t5())
    stops = [2, 4, 9, 11, 16, 23, 30]
    model.generation_config.eos_token_id = stops  # some end early
    model.generation_config.pad_token_id = 0
    tokens = torch.stack([item["input_ids"] for item in sentences(8)])
    with torch.no_grad():
        right = model.generate(tokens, max_new_tokens=4)
    ends = [
        next((i for i, token in enumerate(row[1:].tolist(), 1) if token in stops), 4)
        for row in right
    ]
    assert len(set(ends)) > 1
    samples = [
        {
            "input_ids": row,
            "labels": torch.tensor([8, 9, -100]),
            "decoder_input_ids": torch.tensor([0, 8, 9]),
        }
        for row in tokens
    ]
    tokenizer = words(pad=None)
    outputs, _ = evaluated(model, samples, tokenizer=tokenizer, size=8)
    assert outputs.references == ["w8 w9"] * 8
    assert outputs.texts == [
        tokenizer.decode(row[1 : end + 1]) for row, end in zip(right, ends, strict=True)
    ]
    # Predictions have the padding of the longest text, however the samples are batched.
    for size in (1, 3):
        plugin = TransformersPlugin(tokenizer=tokenizer, generate={"max_new_tokens": 4})
        found = trainer_for(model, plugin).predict(samples, size)
        assert torch.equal(found["generated"], right)
        assert found["texts"] == outputs.texts


def test_the_decoder_of_an_encoder_decoder_continues_a_prompt():
    model, tokenizer = vivid(t5()), words()
    tokens, prompt = torch.arange(5, 9), torch.tensor([0, 20, 21])
    with torch.no_grad():
        right = [
            model.generate(tokens[None], decoder_input_ids=prompt[None, :n], max_new_tokens=4)[0]
            for n in (1, 2, 3)
        ]
    sample = {"input_ids": tokens, "decoder_input_ids": prompt}
    # Prompts are the decoder's inputs whose labels are -100; the first sample has none.
    rows = [torch.tensor(row) for row in ([20, 21, 8], [-100, 21, 8], [-100, -100, 8])]
    outputs, _ = evaluated(model, [sample | {"labels": row} for row in rows], tokenizer=tokenizer)
    assert outputs.references == ["w20 w21 w8", "w21 w8", "w8"]
    assert outputs.texts == [tokenizer.decode(row[-4:]) for row in right]
    # Those that the labels don't follow are a prompt, too.
    outputs, _ = evaluated(model, [sample | {"labels": torch.arange(9, 12)}])
    assert torch.equal(outputs.generated[0], right[2][None])


def test_without_labels_texts_are_generated_and_no_loss_is_recorded(tmp_path):
    model, samples = vivid(t5()), [{"input_ids": torch.arange(5, 9) + i} for i in range(6)]
    with pytest.warns(UserWarning, match="No evaluation_loss"):
        outputs, recorded = evaluated(model, samples)
    assert recorded == {}
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    with torch.no_grad():
        stacked = torch.stack([sample["input_ids"] for sample in samples])
        right = model.generate(stacked, max_new_tokens=4)
        several = model.generate(stacked, **options)
    assert torch.equal(torch.cat(outputs.generated), right)
    plugin = TransformersPlugin(generate=options, tokenizer=words())
    written = trainer_for(model, plugin).predict(samples, 2, to=tmp_path / "made").load()
    assert torch.equal(written["generated"].flatten(0, 1), several)
    assert [len(texts) for texts in written["texts"]] == [2] * 6


# -- Predictions ----------------------------------------------------------------------------------


def bart():
    from transformers import BartConfig, BartForSequenceClassification

    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    both = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in sizes.items()}
    return BartForSequenceClassification(BartConfig(vocab_size=40, d_model=16, **both))


def answering():
    model = bert("ForQuestionAnswering")
    model.qa_outputs = torch.nn.Linear(16, 2)
    return model


END = {"input_ids": torch.tensor([5, 6, 2])}


@pytest.mark.parametrize(
    ("create", "sample", "labels", "names"),
    [
        (
            answering,
            {},
            {"start_positions": torch.tensor(99), "end_positions": torch.tensor(99)},
            ("start_logits", "end_logits"),
        ),
        (lambda: build("GPT2", "Model"), {}, {}, ("last_hidden_state",)),
        (lambda: bert("Model"), {}, {}, ("last_hidden_state", "pooler_output")),
        (
            lambda: build("T5", "Model"),
            {"decoder_input_ids": torch.arange(3)},
            {},
            ("last_hidden_state", "encoder_last_hidden_state"),
        ),
        (
            lambda: build("GPT2", "DoubleHeadsModel"),
            {"mc_token_ids": torch.tensor(2)},
            {"mc_labels": torch.tensor(99)},
            ("logits", "mc_logits"),
        ),
        (bert, {}, {"labels": torch.tensor(99)}, "logits"),
        (bart, END, {"labels": torch.tensor(99)}, "logits"),
    ],
)
@pytest.mark.parametrize("return_dict", [True, False])
def test_predictions_are_what_the_model_returns_for_each_sample(
    create, sample, labels, names, return_dict
):
    model = create().eval()
    samples = [{"input_ids": torch.arange(4) + i} | sample for i in range(5)]
    with torch.no_grad():
        outputs = model(**torch.utils.data.default_collate(samples))
    model.config.return_dict = return_dict
    trainer = trainer_for(model, TransformersPlugin())
    found = trainer.predict([one | labels for one in samples], 2)
    if isinstance(names, str):
        torch.testing.assert_close(found, outputs[names])
        return
    assert set(found) == set(names)
    for name in names:
        torch.testing.assert_close(found[name], outputs[name])


def test_predictions_of_other_models_leave_out_what_is_not_per_sample():
    class Scores(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.linear, self.kind = torch.nn.Linear(2, 3), kind

        def forward(self, x, labels=None):
            scores = self.linear(x)
            if self.kind is tuple:
                return scores.mean(), scores
            if self.kind is SimpleNamespace:
                return SimpleNamespace(loss=scores.mean(), logits=scores)
            texts = [str(row.tolist()) for row in x]
            kept = {"scores": scores, "texts": texts}
            return {"loss": scores.mean(), "cache": object(), "heads": None, "n": [1], **kept}

    samples = [{"x": torch.randn(2), "labels": torch.tensor(9)} for _ in range(5)]
    for kind in (tuple, dict, SimpleNamespace):
        model = Scores(kind)
        found = trainer_for(model, TransformersPlugin()).predict(samples, 2)
        if kind is dict:
            assert set(found) == {"scores", "texts"}
            assert found["texts"] == [str(one["x"].tolist()) for one in samples]
            found = found["scores"]
        torch.testing.assert_close(found, model.linear(torch.stack([one["x"] for one in samples])))


def test_a_model_without_predictions_per_sample_is_named():
    class Mean(torch.nn.Linear):
        def forward(self, x):
            return {"mean": super().forward(x).mean()}

    samples = [{"x": torch.randn(2)} for _ in range(5)]
    with pytest.raises(
        TypeError, match=r"Mean returned no tensor with a row for each sample.*mean"
    ):
        trainer_for(Mean(2, 2), TransformersPlugin()).predict(samples)
