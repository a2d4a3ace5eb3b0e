"""``headwise compare --task translation``: every method, BLEU, what each head is worth, what is
refused; and that a decoder's gates choose in training as they do in generation."""

from __future__ import annotations

import dataclasses
import json
import random

import headwise as hw
import pytest
import sacrebleu
import torch
from headwise.apps.cli import main
from headwise.apps.compare import (
    encoder_decoder,
    heads_of_kinds,
    measure,
    metrics,
    settings,
    translating,
)
from headwise.apps.compare.methods import METHODS
from headwise.apps.compare.selections import predict_and_record
from headwise.apps.compare.training import graded, logits_of, loss_of, losses_of
from headwise.apps.compare.workbench import Workbench
from headwise.apps.tasks import registry, translation
from headwise.apps.tasks.examples import IGNORED
from headwise.apps.tasks.origins import origin_of
from support.messages import message_pairs

REFUSED = {"cofi", "threshold", "kwon"}
CPU = torch.device("cpu")

pytestmark = pytest.mark.slow


def small_task():
    return translation.pair_task("pairs", "pairs", message_pairs(150))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study of every method on a few messages."""
    folder = tmp_path_factory.mktemp("messages")
    original = settings.preset

    def preset(size: str, seed: int) -> settings.Settings:
        made = original(size, seed)
        return dataclasses.replace(made, latency_s=0.01, test_limit=20, validation_limit=12)

    small = dataclasses.replace(registry.BUNDLED["translation"], load=small_task)
    command = [
        "compare", "--task", "translation", "--out", folder / "out", "--quick", "--steps", 3,
        "--dense-steps", 6, "--score-limit", 40, "--methods", "all", "--keep-models",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "preset", preset)
        patch.setattr(metrics, "RESAMPLES", 5)
        patch.setattr(heads_of_kinds, "RESAMPLES", 5)
        patch.setattr(heads_of_kinds, "MESSAGES", 2)
        patch.setattr(translating, "LONGEST", 3)
        patch.setattr(measure, "_TRANSLATED", 2)
        patch.setitem(registry.BUNDLED, "translation", small)
        assert main([str(part) for part in command]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text())


def test_every_method_that_suits_runs(results):
    assert {run["method"] for run in results["runs"]} == {"dense", *METHODS} - REFUSED
    for run in results["runs"]:
        assert run["model"] == "small Marian" and 0 < run["macs_ratio_to_dense"] < 2
        assert set(run["metric"]) == {"name", "value", "validation"}
        assert run["metric"]["name"] == "bleu" and 0 <= run["accuracy"] <= 1
        shares = run["heads_by_attention"]
        assert set(shares) == {"encoder", "decoder", "cross"}
        assert sum(shares.values()) / 3 == pytest.approx(run["heads_mean"])
        if "kept" in run:
            assert sum(map(len, run["kept"].values())) == 36 == 72 * run["heads_mean"]
    assert results["model"] == {"name": "small Marian", "layers": 6, "heads": 72, "width": 128}
    assert results["tasks"][0]["examples"] == "messages"


def test_what_each_head_is_worth_is_in_the_results(finished, results):
    (found,) = results["attention"]
    assert found["messages"] == 2
    kinds = [layer["attention"] for layer in found["layers"]]
    assert sorted(kinds) == ["cross"] * 3 + ["decoder"] * 3 + ["encoder"] * 3
    for layer in found["layers"]:
        for key in ("without", "only", "without_p", "only_p", "roles"):
            assert len(layer[key]) == 8
    rows = heads_of_kinds.stay_rows(found, results["runs"])
    assert rows[0][0] == "dense" and rows[0][2:5] == ["24", "24", "24"]
    assert all(sum(map(int, row[2:5])) == 36 for row in rows[1:])
    assert len(heads_of_kinds.ablation_rows(found)) == 9
    page = (finished / "index.html").read_text()
    assert "Heads that stay, by kind of attention" in page and "Change of BLEU without" in page
    assert any("Without one head the dense model's BLEU" in s for s in results["findings"])


def test_models_that_translate_are_kept(finished):
    for name in ("michel-finetuned", "budget-gate"):
        folder = finished / "models" / f"pairs-{name}-0.5-0"
        model = hw.load(folder)
        tokens = torch.tensor([[5, 6, 7, 1]])
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        assert translating.generate(model, inputs, least=3, most=3).shape == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "threshold"], "threshold is not for a small Marian: it reads queries and"),
        (["--methods", "kwon"], "kwon is not for a small Marian: it counts the operations of one"),
        (["--methods", "cofi"], "the method cofi is for text encoders, not for a small Marian"),
        (["--metric", "f1"], "translations are compared by bleu: leave out --metric f1"),
        (["--metric", "accuracy"], "compared by bleu: leave out --metric accuracy"),
        (["--energy"], "--energy is for encoders, not for a small Marian"),
    ],
)
def test_what_translations_cannot_have_is_refused(tmp_path, arguments, says, capsys):
    command = ["compare", "--task", "translation", "--out", str(tmp_path / "out"), *arguments]
    assert main(command) == 2
    assert says in capsys.readouterr().err


def test_bleu_is_of_translations(tmp_path, capsys):
    command = ["compare", "--task", "digits", "--metric", "bleu", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "bleu is of translations: leave out --metric bleu" in capsys.readouterr().err


def test_bleu_of_counts_is_that_of_the_corpus():
    generator = random.Random(0)
    words = ["der", "die", "Tür", "zu", "auf.", "ist,", "nicht"]
    texts, references = (
        [" ".join(generator.choices(words, k=generator.randint(k, 9))) for _ in range(40)]
        for k in (0, 1)
    )
    counts = translating.bleu_counts(texts, references)
    assert counts.shape == (40, translating.COUNTS)
    right = sacrebleu.corpus_bleu(texts, [references]).score
    assert 0 < right == pytest.approx(translating.bleu_of(counts))
    some = sacrebleu.corpus_bleu(texts[:9], [references[:9]]).score
    assert some == pytest.approx(translating.bleu_of(counts[:9]))
    perfect = translating.bleu_counts(references, references)
    assert metrics.METRICS["bleu"].of(perfect, perfect) == pytest.approx(1.0)


def test_losses_and_shares_are_of_tokens_without_padding():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 4, IGNORED], [2, 0, 3]])
    each = -logits.log_softmax(-1)
    first = (each[0, 0, 1] + each[0, 1, 4]) / 2
    second = (each[1, 0, 2] + each[1, 1, 0] + each[1, 2, 3]) / 3
    torch.testing.assert_close(losses_of(logits, labels), torch.stack([first, second]))
    options = settings.TrainingOptions()
    torch.testing.assert_close(loss_of(logits, labels, None, options), (2 * first + 3 * second) / 5)
    teacher = torch.randn(2, 3, 5)
    moved = teacher.clone()
    moved[0, 2] += torch.randn(5)  # padding
    assert loss_of(logits, labels, teacher, options) == loss_of(logits, labels, moved, options)
    logits[0, 0, 1] = logits[1, 2, 3] = 9.0
    logits[0, 1, 4] = logits[1, 0, 2] = logits[1, 1, 0] = -9.0
    torch.testing.assert_close(graded(logits, labels)[:, 0], torch.tensor([1 / 2, 1 / 3]))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    task = small_task()
    origin = origin_of([task], None, 0)
    torch.manual_seed(0)
    model = origin.model(task).eval()
    with torch.no_grad():  # attention that differs from token to token
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    own = dataclasses.replace(
        settings.Settings(),
        steps=2,
        score_limit=16,
        training=settings.TrainingOptions(precision="float32", batch_size=8),
    )
    parts = (origin.examples(task, range(i, i + 24), 48) for i in (0, 24, 48))
    folder = tmp_path_factory.mktemp("bench")
    return Workbench("pairs", model, *parts, own, 0, CPU, folder)


@pytest.mark.parametrize("method", ["budget-gate", "dynamic-hard-concrete", "bank", "fitted-gates"])
def test_gates_choose_in_training_what_they_choose_in_generation(bench, method):
    model = METHODS[method].run(bench, 0.5, 2).model.eval()
    batch = bench.test.batch(range(6))
    with torch.no_grad(), hw.trace(model) as told:
        logits_of(model, batch.inputs)
    with torch.no_grad(), hw.trace(model) as generated:
        translating.generate(model, batch.inputs, least=3, most=3)
    for name, selections in generated.history.items():
        for own in selections:
            assert torch.equal(own.count, told.selections[name].count)
            assert torch.equal(_sets(own), _sets(told.selections[name]))


def _sets(selection: hw.Selection) -> torch.Tensor:
    return torch.ops.headwise.selection_mask(selection.index, selection.count, torch.float32)


def test_gates_do_not_see_what_is_to_be_generated(bench):
    model = METHODS["budget-gate"].run(bench, 0.5, 2).model.eval()
    inputs = bench.test.batch(range(6)).inputs
    other = dict(inputs, decoder_input_ids=inputs["decoder_input_ids"].clone())
    other["decoder_input_ids"][:, 1:] = 7
    found = []
    for given in (inputs, other):
        with torch.no_grad(), hw.trace(model) as trace:
            logits_of(model, given)
        found.append({name: _sets(own) for name, own in trace.selections.items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(own, found[1][name]) for name, own in found[0].items())


def test_batches_of_different_lengths_are_graded(bench):
    model = METHODS["dynamic-hard-concrete"].run(bench, 0.5, 1).model
    labels = [batch.labels for batch in bench.test.in_order(2)]
    assert len({own.size(1) for own in labels}) > 1
    graded, use = predict_and_record(
        model, bench.test, bench.dense_layers, device=CPU, precision="float32", batch_size=2
    )
    whole, _ = predict_and_record(
        model, bench.test, bench.dense_layers, device=CPU, precision="float32", batch_size=24
    )
    torch.testing.assert_close(graded, whole)
    assert 0.0 < use.fractions().mean() <= 1.0


def test_the_teacher_is_the_dense_model(bench):
    batch = next(bench.batches())
    with torch.no_grad():
        torch.testing.assert_close(bench.teacher(batch), bench.dense(**batch.inputs).logits)


def test_kinds_and_operations_of_the_heads(bench):
    model = bench.converted()
    kinds = encoder_decoder.kinds_of(model)
    assert [kinds[name] for name in kinds if "encoder.layers" in name] == ["encoder"] * 3
    assert [kinds[name] for name in kinds if "encoder_attn" in name] == ["cross"] * 3
    n, m = torch.tensor([5.0]), torch.tensor([7.0])
    cost = {
        kind: encoder_decoder._head_macs(kind, n, m, 128, 16).item()
        for kind in ("encoder", "decoder", "cross")
    }
    assert cost["encoder"] == hw._C.head_macs(5, 128, 16)
    assert cost["decoder"] == hw._C.head_macs(7, 128, 16)
    assert cost["cross"] == 128 * 16 * (7 + 5 + 5 + 7) + 2 * 7 * 5 * 16


def test_repeated_words_are_aligned_with_the_step_that_generates_them(bench):
    examples = bench.test
    batch = heads_of_kinds.annotated(examples, range(len(examples)))
    found = 0
    for row, pairs in enumerate(batch.alignment):
        for source, step in pairs:
            assert examples.sources[row][source] == examples.targets[row][step]
            assert step > 0 and bool(batch.target.content[row, step])
        texts = examples.tokenizer.batch_decode([examples.sources[row]], skip_special_tokens=True)
        found += texts[0].split().count("router") == 1 and len(pairs) > 0
        assert batch.words[row].max() + 1 == len(texts[0].split())
    assert found
