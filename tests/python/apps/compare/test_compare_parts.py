"""The parts of the study: splits, batches, statistics, calibration, files, measuring."""

from __future__ import annotations

import random
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import headwise as hw
import pytest
import torch
from headwise.apps.compare import planned
from headwise.apps.compare.measure import inputs_of, macs
from headwise.apps.compare.selections import HeadUse, swapped
from headwise.apps.compare.statistics import (
    mean_interval,
    mean_jaccard_distance,
    paired_difference,
    wilson_interval,
)
from headwise.apps.compare.training import TrainingOptions, learning_rate_factor, loss_of
from headwise.apps.tasks import corpora, registry, tasks
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.examples import TextExamples
from headwise.apps.tasks.models import folder_digest
from headwise.apps.tasks.shapes import Shape
from hypothesis import given, settings
from hypothesis import strategies as st


def some_task(rows: int = 300, documents: int = 40, seed: int = 0) -> tasks.Task:
    generator = random.Random(seed)
    return tasks.Task(
        "t",
        "t",
        tuple(f"text {row}" for row in range(rows)),
        tuple(row % 2 for row in range(rows)),
        tuple(f"d{generator.randrange(documents)}" for _ in range(rows)),
        ("no", "yes"),
    )


@given(seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_a_split_takes_every_row_once_and_whole_documents(seed):
    task = some_task()
    split = tasks.split(task, seed)
    rows = [*split.train, *split.validation, *split.test]
    assert sorted(rows) == list(range(len(task)))
    parts = [
        {task.groups[row] for row in part} for part in (split.train, split.validation, split.test)
    ]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert split == tasks.split(task, seed)
    assert 0.15 < len(split.test) / len(task) < 0.3


def test_a_split_that_lacks_a_class_is_refused():
    task = some_task(documents=1)
    with pytest.raises(UsageError, match=r"the training part of t \(0 rows\) has no row labelled"):
        tasks.split(task, 0)


def test_the_bundled_reviews():
    task = registry.load_task("reviews")
    assert len(task) == 12808
    assert Counter(task.labels) == {0: 5405, 1: 7403}
    assert len(set(task.groups)) == 508


def test_the_snippets_name_the_command_that_fetches_them(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora, "_vader_folders", lambda: [tmp_path])
    with pytest.raises(UsageError, match="pip download vaderSentiment --no-deps --no-binary :all:"):
        registry.load_task("snippets")


def test_the_snippets_come_out_of_a_source_distribution(monkeypatch, tmp_path):
    import io
    import tarfile

    def packed(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    lines = [f"{i}\t{(-1) ** i * 1.5}\tsnippet {i}" for i in range(1, 41)] + ["41\t0.0\tneither"]
    inner = packed(
        "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", "\n".join(lines).encode()
    )
    outer = packed("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)
    (tmp_path / "vaderSentiment-3.3.2.tar.gz").write_bytes(outer)
    monkeypatch.setattr(corpora, "_vader_folders", lambda: [tmp_path])
    task = registry.load_task("snippets")
    assert len(task) == 40
    assert task.classes == ("negative", "positive")
    assert task.labels[:2] == (0, 1)


def test_the_mixture_of_domains():
    task = registry.load_task("mixed")
    assert task.domains == ("reviews", "products", "tweets", "topics")
    assert len(task.classes) == 11 and task.classes[0] == "reviews: rotten"
    assert max(Counter(task.domain_of).values()) == 4000
    for label, domain in zip(task.labels, task.domain_of, strict=True):
        assert task.classes[label].startswith(task.domains[domain] + ": ")
    # Shuffled: the first rows, which scores are computed on, show every domain.
    assert len(set(task.domain_of[:40])) == 4
    parts = tasks.split(task, 0)
    rows = [set(task.groups[row] for row in part) for part in (parts.train, parts.test)]
    assert not rows[0] & rows[1]
    assert task == registry.load_task("mixed")


def check_mixture(task):
    for label, domain in zip(task.labels, task.domain_of, strict=True):
        assert task.classes[label].startswith(task.domains[domain] + ": ")
    assert len(set(task.domain_of[:60])) == len(task.domains)
    parts = tasks.split(task, 0)
    rows = [set(task.groups[row] for row in part) for part in (parts.train, parts.test)]
    assert not rows[0] & rows[1]
    assert task == registry.load_task(task.name)


def test_unrelated_domains_in_one():
    task = registry.load_task("mixed-domains")
    assert task.domains == ("reviews", "thesaurus", "topics", "docstrings")
    assert len(task.classes) == 2 + 24 + 5 + 20
    assert max(Counter(task.domain_of).values()) == 4000
    check_mixture(task)


def test_docstrings_say_what_functions_do_without_their_names():
    task = registry.load_task("docstrings")
    assert len(task.classes) == 20 and len(task) > 3000 and len(set(task.inputs)) == len(task)
    assert max(Counter(task.labels).values()) == 400
    assert min(len(text.split()) for text in task.inputs) >= 5
    label = task.labels[task.inputs.index("Return the ith prime greater than n.")]
    assert task.classes[label] == "ntheory"


def test_the_thesaurus_uses_each_word_once():
    task = registry.load_task("thesaurus")
    words = [word for text in task.inputs for word in text.split(", ")]
    assert len(words) == 3 * len(task) == len(set(words))
    assert "plants" in task.classes and "music" in task.classes


def test_instructions_ask_one_text_several_questions():
    task = registry.load_task("instructions")
    assert task.domains[0] == "opinion" and len(task.domains) == 11 and len(task.classes) == 29
    check_mixture(task)
    asked: dict[str, set[str]] = {}
    right: Counter[str] = Counter()
    for text, label, domain in zip(task.inputs, task.labels, task.domain_of, strict=True):
        asks, sentence = text.split(": ", 1)
        question, *about = [task.domains[domain], *asks.split(" ")[1:]]
        answer = task.classes[label].removeprefix(f"{question}: ")
        words = re.findall(r"[a-z][a-z'-]*", sentence.lower())
        asked.setdefault(sentence, set()).add(task.classes[label])
        if question == "commas":
            assert answer == ("none", "one", "several")[min(sentence.count(","), 2)]
        elif question == "contains":
            assert (answer == "yes") == (about[0] in words)
        elif question == "before":
            first, _, second = asks.split(" ")
            assert (answer == "yes") == (words.index(first) < words.index(second))
        elif question == "after":
            assert (answer == "yes") == (words[words.index(about[0]) + 1] == about[1])
        elif question == "where":
            third = 3 * words.index(about[0]) // len(words)
            assert answer == ("beginning", "middle", "end")[third]
        else:
            continue
        right[question] += 1
    assert min(right.values()) > 2500 and len(right) == 5
    assert Counter(map(len, asked.values())).most_common(1)[0][0] == 4


@pytest.mark.parametrize(("best", "alpha"), [("michel", 1.0), ("entropy", 0.0)])
def test_hies_may_be_importance_or_entropy_alone(monkeypatch, best, alpha):
    values = {"michel": [4.0, 3.0, 2.0, 1.0], "entropy": [0.9, 0.8, 0.1, 0.2]}
    scores = {metric: hw.HeadScores(metric, {"a": v}) for metric, v in values.items()}
    wanted = hw.plan(scores[best], keep=0.5).layers

    def best_of(model, batches, loss_fn, importance, entropy, keep, *, alphas):
        found = [hw.plan(hw.pruning.hies(importance, entropy, a), keep=keep) for a in alphas]
        return SimpleNamespace(plan=next(plan for plan in found if plan.layers == wanted))

    monkeypatch.setattr(hw.pruning, "select_alpha", best_of)
    bench = SimpleNamespace(
        plans={},
        scores=lambda absolute: scores,
        converted=lambda: None,
        validation=SimpleNamespace(in_order=lambda size: []),
        errors=None,
    )
    assert planned.hies_plan(bench, 0.5).layers == wanted
    assert alpha in planned.ALPHAS


def test_domains_follow_their_rows():
    examples = TextExamples([[1], [2], [3]], [0, 1, 0], domains=("a", "b"), domain_of=[1, 0, 1])
    assert examples.rows([2, 1]).domain_of.tolist() == [1, 0]
    assert examples.take(1).domains == ("a", "b")
    assert TextExamples([[1]], [0]).domain_of is None


def test_a_csv_with_a_byte_order_mark_and_a_group(tmp_path):
    path = tmp_path / "a.csv"
    body = "".join(f"text {i},{i % 2},{i // 5}\n" for i in range(100))
    path.write_text("text,label,doc\n" + body, encoding="utf-8-sig")
    task = tasks.task_from_file(path, group="doc")
    assert len(task) == 100 and len(set(task.groups)) == 20
    assert task.classes == ("0", "1")


def test_what_files_of_people_hold(tmp_path):
    """Separators of lines inside strings, spaces around labels, rows that were left empty."""
    path = tmp_path / "A.JSONL"
    row = '{"text": "one\u2028two\x85", "label": %s}\n'
    path.write_text("".join(row % (i % 2) for i in range(20)), encoding="utf-8")
    task = tasks.task_from_file(path)
    assert task.inputs[0] == "one\u2028two\x85" and task.classes == ("0", "1")
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + 'x, up\n"y, ""z""\n",down \n,\n' * 10)
    task = tasks.task_from_file(path)
    assert task.classes == ("down", "up") and set(task.inputs) == {"x", 'y, "z"\n'}
    path.write_text("text,label\nx,up\ny,\n")
    with pytest.raises(UsageError, match="line 3 of a.csv has no value for 'label'"):
        tasks.task_from_file(path)
    path.write_text("text,label\nx,up\n")
    assert tasks.task_from_file(path, least=1).classes == ("up",)


def test_no_more_tokens_than_the_model_takes():
    from headwise.explain.texts import longest

    known = {"max_position_embeddings": 514, "pad_token_id": 1}
    roberta = SimpleNamespace(model_type="roberta", **known)
    assert longest(roberta, SimpleNamespace(model_max_length=10**30), 1000) == 512
    assert longest(roberta, SimpleNamespace(model_max_length=100), 1000) == 100
    assert longest(SimpleNamespace(model_type="bert", **known), None, 1000) == 514
    assert longest(SimpleNamespace(), None, None) is None
    assert Shape(8, 128).within(64) == Shape(8, 64) and Shape(8).within(64) == Shape(8)


def test_a_model_trained_on_is_another_model(tiny_model, tmp_path):
    """Of the same sizes, but not of the same weights: earlier runs are not taken over."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    before = folder_digest(folder)
    assert before == folder_digest(tiny_model)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert folder_digest(folder) != before


def test_labels_in_a_trained_models_numbers():
    task = some_task()
    assert task.with_labels_of({"yes": 0, "no": 1}).labels[:2] == (1, 0)
    with pytest.raises(UsageError, match="label 'no' is none of the model's classes: 'a', 'b'"):
        task.with_labels_of({"a": 0, "b": 1})


def examples(count: int, seed: int = 0) -> TextExamples:
    generator = random.Random(seed)
    ids = [[101, *([7] * generator.randint(1, 30)), 102] for _ in range(count)]
    return TextExamples(ids, [i % 2 for i in range(count)])


def test_batches_are_padded_on_the_right_and_cover_everything():
    data = examples(50)
    seen = []
    for batch in data.in_order(8):
        input_ids, attention_mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        lengths = attention_mask.sum(1)
        assert input_ids.shape == attention_mask.shape
        assert lengths.max() == input_ids.size(1)
        for row, ids, length in zip(batch.rows, input_ids, lengths, strict=True):
            assert ids[:length].tolist() == data.ids[row]
            assert not ids[length:].any()
        assert torch.equal(batch.labels, data.labels[batch.rows])
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(50))


def test_shuffled_batches_are_full_differ_by_epoch_and_repeat_by_seed():
    data = examples(64)
    first, second = data.shuffled(16, seed=3), data.shuffled(16, seed=3)
    epochs = [[next(first).rows.tolist() for _ in range(4)] for _ in range(2)]
    assert epochs == [[next(second).rows.tolist() for _ in range(4)] for _ in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(row for rows in epoch for row in rows) == list(range(64))


def test_fewer_examples_than_a_batch():
    assert len(next(examples(3).shuffled(16, seed=0)).rows) == 3


@given(trials=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_interval_holds_the_rate(trials, share):
    successes = int(share * trials)
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials + 1e-12 and successes / trials - 1e-12 <= high <= 1


def test_wilson_interval_by_hand():
    low, high = wilson_interval(81, 263)
    assert low == pytest.approx(0.2553, abs=1e-4) and high == pytest.approx(0.3662, abs=1e-4)
    with pytest.raises(ValueError, match="successes must be in"):
        wilson_interval(3, 2)


def test_mean_interval_of_three():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and high - mean == pytest.approx(4.303 / 3**0.5) and low == 4.0 - high
    assert mean_interval([5.0]) == (5.0, 5.0, 5.0)


def test_paired_difference():
    first = (torch.arange(400) % 4 > 0).float()
    mean, low, high = paired_difference(first, torch.zeros(400))
    assert mean == 0.75 and 0.68 < low < 0.75 < high < 0.82
    assert paired_difference(first, first) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="the same shape"):
        paired_difference(first, first[:3])


def test_jaccard_distance_by_definition():
    generator = torch.Generator().manual_seed(5)
    chosen = torch.rand(12, 9, generator=generator) < 0.4
    chosen[0] = chosen[1] = False
    distances = []
    for i in range(12):
        for j in range(i):
            either = int((chosen[i] | chosen[j]).sum())
            same = int((chosen[i] & chosen[j]).sum())
            distances.append(1 - same / either if either else 0.0)
    assert mean_jaccard_distance(chosen) == pytest.approx(sum(distances) / len(distances))
    assert mean_jaccard_distance(chosen[2:3].expand(20, -1)) == pytest.approx(0, abs=1e-12)


def test_swapped_texts_run_each_others_heads():
    torch.manual_seed(0)
    layer = hw.MultiheadAttention(16, 4, gate=hw.BudgetGate(keep=0.5), batch_first=True).eval()
    x = torch.randn(6, 5, 16)
    with torch.no_grad():
        chosen = layer.gate(x)
        with swapped(layer):
            moved = layer.gate(x)
            layer(x, x, x)
        assert torch.equal(moved.index, chosen.index.roll(3, 0))
        assert torch.equal(moved.weight, chosen.weight.roll(3, 0))
        assert torch.equal(layer.gate(x).index, chosen.index)


def test_head_use_summary():
    chosen = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    summary = HeadUse(chosen, (2, 2)).summary()
    assert summary["heads_mean"] == 0.375 and summary["heads_std"] == 0.125
    assert summary["heads_by_layer"] == [0.75, 0.0]
    assert summary["heads_always"] == 1 and summary["heads_never"] == 2


def test_macs_of_one_layer_by_hand():
    class Config:
        hidden_size, num_attention_heads, intermediate_size = 8, 2, 16

    use = HeadUse(torch.tensor([[True, False]]), (2,))
    found = macs(Config, use, torch.tensor([5]))
    assert found.attention == 4 * 5 * 8 * 4 + 2 * 25 * 4
    assert found.rest == 2 * 5 * 8 * 16 + 64 + 16


@pytest.mark.parametrize("shape", [Shape(4), Shape(4, 40), Shape(1), Shape(1, 16)])
def test_inputs_of_a_shape(shape):
    found = inputs_of(examples(40), shape, torch.device("cpu"), count=3)
    assert len(found) == 3
    for inputs in found:
        assert inputs["input_ids"].size(0) == shape.batch
        if shape.length is not None:
            assert inputs["input_ids"].size(1) == shape.length
            assert inputs["attention_mask"].all()


def test_learning_rates():
    assert 0 < learning_rate_factor(0.0, 0.1) < 0.05
    assert learning_rate_factor(0.1, 0.1) == 1.0
    assert learning_rate_factor(0.55, 0.1) == pytest.approx(0.5)
    assert learning_rate_factor(1.0, 0.1) == 0.0


def test_loss_is_cross_entropy_and_distillation():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 6, 3, generator=generator)
    labels = torch.randint(3, (6,), generator=generator)
    options = TrainingOptions(distillation=0.3, temperature=2.0)
    hard = torch.nn.functional.cross_entropy(logits, labels)
    p, q = (teacher / 2).softmax(1), (logits / 2).softmax(1)
    soft = (p * (p / q).log()).sum(1).mean() * 4
    assert torch.allclose(loss_of(logits, labels, teacher, options), 0.7 * hard + 0.3 * soft)
    assert torch.equal(loss_of(logits, labels, None, options), hard)


def test_the_table_of_domains():
    from headwise.apps.compare import findings, table

    domains = [
        {"name": "films", "accuracy": 0.8, "heads_mean": 0.3, "texts": 6},
        {"name": "news", "accuracy": 0.9, "heads_mean": 0.2, "texts": 4},
    ]
    run = {
        "task": "mixed", "method": "budget-gate", "title": "BudgetGate", "kind": "dynamic",
        "keep_target": 0.25, "accuracy": 0.84, "accuracy_interval": [0.8, 0.9], "train_steps": 3,
        "heads_mean": 0.26, "heads_std": 0.05, "jaccard_distance": 0.3, "latency_ms": 1.0,
        "latency_ratio_to_dense": 0.9, "macs_ratio_to_dense": 0.8, "seed": 0,
        "attention_macs_ratio_to_dense": 0.4, "validation_accuracy": 0.8, "domains": domains,
        "latency": [],
    }  # fmt: skip
    entry = findings.summarise([run])[0]
    assert entry["domains"][1] == {"name": "news", "accuracy": 0.9, "heads_mean": 0.2}
    assert table.domain_columns([entry]) == ["method", "films", "news"]
    assert table.domain_cells(entry) == ["BudgetGate", "80.0% 30%h", "90.0% 20%h"]
    assert findings._domain_sentences([entry]) == [
        "BudgetGate on mixed at 25% gives films the most heads (30.0%) and news the fewest (20.0%)."
    ]
