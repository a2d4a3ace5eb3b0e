"""The task of translations: its archive, its tokenizer, its batches and its model."""

from __future__ import annotations

import pytest
import torch
from headwise.apps.tasks import translation
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.examples import IGNORED
from headwise.apps.tasks.origins import origin_of
from headwise.apps.tasks.registry import load_task
from headwise.apps.tasks.tasks import split
from support.messages import message_pairs, write_wheel


def test_the_messages():
    task = load_task("translation")
    assert len(task) > 15000 and len(set(task.inputs)) == len(task) == len(task.targets)
    assert {len(text.split()) for text in task.inputs} == set(range(3, 17))
    parts = split(task, 0)
    kinds = [{task.groups[row] for row in rows} for rows in (parts.train, parts.test)]
    assert not kinds[0] & kinds[1]


def test_the_archive_is_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(translation, "_folder", lambda: tmp_path)
    with pytest.raises(UsageError, match="pip download homeassistant==2026.11.0 --no-deps"):
        translation.translation()
    english = {
        "a": "Close the door now", "b": {"c": "Close the door 2 now!", "d": "The router is on"},
        "e": "Two words", "f": "Open the {name} now", "g": "See http://x for more",
        "h": "Not in German yet", "i": "Same in both languages",
    }  # fmt: skip
    german = {
        "a": "Schließe die Tür", "b": {"c": "Schließe Tür 2!", "d": "Der Router ist an"},
        "e": "Zwei Wörter", "f": "Öffne {name}", "g": "Mehr unter http://x",
        "i": "Same in both languages",
    }  # fmt: skip
    often = ({"a": "The router is on"}, {"a": "Router ist an"})
    parts = {"a": (english, german), "b": often, "c": often, "d": (english, None)}
    write_wheel(tmp_path / translation._WHEEL, parts)
    task = translation.translation()
    assert dict(zip(task.inputs, task.targets, strict=True)) == {
        "Close the door now": "Schließe die Tür",
        "Close the door 2 now!": "Schließe Tür 2!",
        "The router is on": "Router ist an",  # the most frequent translation
    }
    assert task.groups == ("close the door now", "close the door now", "the router is on")


def test_an_archive_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.whl").write_text("hello")
    with pytest.raises(UsageError, match=r"a.whl cannot be read: File is not a zip file"):
        translation.catalogue(tmp_path / "a.whl")


@pytest.fixture(scope="module")
def origin_and_task():
    task = translation.pair_task("pairs", "pairs", message_pairs(60))
    return origin_of([task], None, 0), task


def test_the_tokenizer_learns_from_the_training_part_and_gives_texts_back(origin_and_task):
    origin, task = origin_and_task
    texts = [*task.targets[:5], "Größe: 5 µm → ✓"]
    tokens = origin.tokenizer(texts)["input_ids"]
    assert all(own[-1] == origin.tokenizer.eos_token_id for own in tokens)
    back = origin.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert [text.strip() for text in back] == texts
    same, other = (origin_of([task], None, seed) for seed in (0, 1))
    assert same.digest == origin.digest != other.digest


def test_a_batch_shifts_the_target_and_marks_padding(origin_and_task):
    origin, task = origin_and_task
    examples = origin.examples(task, [4, 9, 2], 48)
    batch = examples.rows([2, 0]).batch([0, 1])
    pad, end = origin.tokenizer.pad_token_id, origin.tokenizer.eos_token_id
    assert examples.texts()[1].strip() == task.targets[9]
    for row, number in enumerate((2, 4)):
        target = origin.tokenizer(task.targets[number])["input_ids"]
        size = len(target)
        assert batch.labels[row, :size].tolist() == target and target[-1] == end
        assert (batch.labels[row, size:] == IGNORED).all()
        assert batch.inputs["decoder_input_ids"][row, :size].tolist() == [pad, *target[:-1]]
        assert batch.inputs["decoder_attention_mask"][row].sum() == size
        source = origin.tokenizer(task.inputs[number])["input_ids"]
        assert batch.inputs["input_ids"][row, : len(source)].tolist() == source
        assert batch.inputs["attention_mask"][row].sum() == len(source)
    both = batch.inputs["attention_mask"].sum(1) + batch.inputs["decoder_attention_mask"].sum(1)
    assert examples.positions_of(batch.inputs).tolist() == both.tolist() == [
        examples.lengths[2], examples.lengths[0],
    ]  # fmt: skip


def test_long_texts_are_cut_and_keep_their_end(origin_and_task):
    origin, task = origin_and_task
    examples = origin.examples(task, range(20), 4)
    assert max(map(len, examples.sources)) == max(map(len, examples.targets)) == 4
    assert all(text[-1] == origin.tokenizer.eos_token_id for text in examples.targets)


def test_the_model_has_three_kinds_of_attention(origin_and_task):
    origin, task = origin_and_task
    assert origin.size(task) == {"layers": 6, "heads": 72, "width": 128}
    torch.manual_seed(0)
    model = origin.model(task).eval()
    batch = origin.examples(task, range(5), 48).batch(range(5))
    with torch.no_grad():
        logits = model(**batch.inputs).logits
    assert logits.shape == (*batch.labels.shape, len(origin.tokenizer))
