"""The recipe for transformers' Trainer (docs/convert.md), by what the gates learn."""

import copy

import headwise as hw
import pytest
import torch
from support.architectures import bert

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # a Trainer needs it

from headwise.serialization.trainer import GateCallback  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

TEXTS, LENGTH = 256, 8


class Texts(torch.utils.data.Dataset):
    """Label 1: a token of the first ten is among the others."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(10, 50, (TEXTS, LENGTH), generator=generator)
        self.labels = torch.randint(2, (TEXTS,), generator=generator)
        place = torch.randint(1, LENGTH, (TEXTS,), generator=generator)
        few = torch.randint(1, 10, (TEXTS,), generator=generator)
        rows = torch.arange(TEXTS)
        self.ids[rows, place] = torch.where(self.labels == 1, few, self.ids[rows, place])

    def __len__(self):
        return TEXTS

    def __getitem__(self, i):
        mask = torch.ones(LENGTH, dtype=torch.long)
        return {"input_ids": self.ids[i], "attention_mask": mask, "labels": self.labels[i]}


class GatedTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            loss = loss + hw.penalty(model)
        return (loss, outputs) if return_outputs else loss


def arguments(folder, steps=200, **kwargs):
    kwargs = {"save_strategy": "no", "logging_strategy": "no", **kwargs}
    return TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=32, report_to=[], seed=0,
        disable_tqdm=True, use_cpu=True, **kwargs,
    )  # fmt: skip


def model_to_train(target=0.5):
    torch.manual_seed(0)
    model = bert("BertForSequenceClassification", num_labels=2, hidden_dropout_prob=0.0,
                 attention_probs_dropout_prob=0.0)  # fmt: skip
    return hw.convert(model, hw.BudgetGate(keep=target)).train()


def trainer(model, folder, callbacks, **kwargs):
    groups = hw.parameter_groups(model, lr=2e-3)
    optimizers = (torch.optim.AdamW(groups), None)
    return GatedTrainer(model, arguments(folder, **kwargs), train_dataset=Texts(),
                        callbacks=callbacks, optimizers=optimizers)  # fmt: skip


def heads_of(model):
    """[texts]: how many heads run for each, and how many of its labels are right."""
    texts = Texts(1)
    model.eval()
    with torch.no_grad(), hw.trace(model) as trace:
        logits = model(texts.ids, attention_mask=torch.ones_like(texts.ids)).logits
    counts = sum(selection.count for selection in trace.selections.values())
    return counts.float(), (logits.argmax(-1) == texts.labels).float().mean()


def test_gates_learn_their_target_and_decide(tmp_path):
    model = model_to_train()
    trainer(model, tmp_path, [GateCallback()]).train()
    counts, accuracy = heads_of(model)
    layers = hw.attention_layers(model).values()
    assert all(float(layer.gate.progress) == 1.0 for layer in layers)
    assert accuracy > 0.95
    assert abs(counts.mean() / 8 - 0.5) < 0.12  # of 2 layers with 4 heads
    # Without schedule and rates of their own they learn neither.
    plain = model_to_train()
    before = {n: p.clone() for n, p in plain.named_parameters() if ".gate." in n}
    Trainer(plain, arguments(tmp_path), train_dataset=Texts()).train()
    moved = max((p - before[n]).abs().max() for n, p in plain.named_parameters() if n in before)
    assert moved < 0.05 and all(float(layer.gate.progress) == 0.0
                                for layer in hw.attention_layers(plain).values())  # fmt: skip


def test_a_trainer_resumes_from_its_checkpoints(tmp_path):
    steps = {"steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = model_to_train()
    start = copy.deepcopy(whole.state_dict())
    trainer(whole, tmp_path / "a", [GateCallback()], **steps).train()
    folder = tmp_path / "a" / "checkpoint-3"
    assert (folder / "model.safetensors").is_file()
    again = model_to_train()
    again.load_state_dict(start)
    trainer(again, tmp_path / "b", [GateCallback()], **steps).train(
        resume_from_checkpoint=str(folder)
    )
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)
    with pytest.raises(ValueError, match="Use headwise.save"):
        again.save_pretrained(tmp_path / "c")  # the Trainer is done
    hw.save(again, tmp_path / "d")
    loaded = hw.load(tmp_path / "d")
    counts, _ = heads_of(again)
    assert torch.equal(heads_of(loaded)[0], counts)


def test_a_checkpoint_is_a_model_to_load(tmp_path):
    model = model_to_train()
    steps = {"steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(model, tmp_path, [GateCallback()], **steps).train()
    last = hw.load(tmp_path / "checkpoint-4")
    assert torch.equal(heads_of(last)[0], heads_of(model)[0])
    early = hw.load(tmp_path / "checkpoint-2")
    assert not last.training and type(early) is type(model)
    progress = [
        [float(layer.gate.progress) for layer in hw.attention_layers(own).values()]
        for own in (early, last)
    ]
    assert progress == [[0.25, 0.25], [0.75, 0.75]]  # of the step that each was written after
    word = early.bert.embeddings.word_embeddings.weight
    assert not torch.equal(word, last.bert.embeddings.word_embeddings.weight)


def test_a_trainer_without_the_callback_is_told_of_it(tmp_path):
    model = model_to_train()
    with pytest.raises(ValueError, match="add headwise.serialization.trainer.GateCallback"):
        trainer(model, tmp_path, [], steps=1, save_strategy="steps", save_steps=1).train()


def test_a_model_without_gates_is_refused(tmp_path):
    model = hw.convert(bert("BertForSequenceClassification", num_labels=2))
    with pytest.raises(ValueError, match="has no gates: call headwise.convert"):
        trainer(model, tmp_path, [GateCallback()], steps=1).train()
