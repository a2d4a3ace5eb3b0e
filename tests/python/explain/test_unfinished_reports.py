"""The parts of a report in a folder are used for this model, this data and these settings only; and
other threads may use a model that is being explained."""

from __future__ import annotations

import copy
import threading

import headwise as hw
import pytest
import torch
from headwise.apps.cli import main
from headwise.explain import RoleThresholds
from headwise.explain.annotated import annotate_texts
from headwise.explain.recording import own_copy
from headwise.io.store import locked
from support.compare_fixtures import write_model

TEXTS = ["the film is good", "a dull plot", "it is so fine and good", "the actor is bad"] * 3
OPTIONS = {"permutations": 10, "resamples": 10, "faithfulness_texts": 4}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return hw.convert(model.eval()), AutoTokenizer.from_pretrained(folder)


def with_gates(model, **options):
    return hw.convert(copy.deepcopy(model), hw.FixedGate(**options))


def exchanged(model):
    """Heads 0 and 1 of every layer exchanged: the sum of all weights stays as it was."""
    model = copy.deepcopy(model)
    for layer in hw.attention_layers(model).values():
        d, width = layer.head_dim, layer.embed_dim
        order = torch.arange(width)
        order[: 2 * d] = torch.cat([order[d : 2 * d], order[:d]])
        with torch.no_grad():
            for part in range(3):
                rows = slice(part * width, (part + 1) * width)
                layer.in_proj_weight[rows] = layer.in_proj_weight[rows][order].clone()
                layer.in_proj_bias[rows] = layer.in_proj_bias[rows][order].clone()
            layer.out_proj.weight.copy_(layer.out_proj.weight[:, order].clone())
    return model


def sum_of(model) -> float:
    tensors = [*model.parameters(), *model.buffers()]
    return float(sum(tensor.detach().double().sum() for tensor in tensors))


CHANGES = {
    "heads exchanged": (lambda model: with_gates(model, heads=[0, 2]), lambda model: with_gates(
        exchanged(model), heads=[0, 2])),
    "other heads of the gate": (
        lambda model: with_gates(model, heads=[0, 2]),
        lambda model: with_gates(model, heads=[1, 3]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parts_of_another_model_are_not_taken_over(classifier, tmp_path, change):
    plain, tokenizer = classifier
    first, second = (make(plain) for make in change)
    assert sum_of(first) == pytest.approx(sum_of(second), abs=1e-3)
    options = {**OPTIONS, "folder": tmp_path / "parts"}
    before = hw.explain_data(first, TEXTS, tokenizer, **options)
    after = hw.explain_data(second, TEXTS, tokenizer, **options)
    assert after == hw.explain_data(second, TEXTS, tokenizer, **OPTIONS)
    assert after["use"] != before["use"] or after["roles"] != before["roles"]
    assert len(list((tmp_path / "parts").iterdir())) == 1  # those of the first are removed


@pytest.mark.parametrize(
    "changes",
    [
        {"texts": TEXTS[::-1][:-1] + ["the plot is fine"]},
        {"batch_size": 3},
        {"max_length": 4},
        {"offsets": 1},
        {"faithfulness_texts": 6},
        {"thresholds": RoleThresholds(least_trials=2)},
        {"seed": 1},
    ],
    ids=str,
)
def test_parts_of_other_data_or_options_are_not_taken_over(classifier, tmp_path, changes):
    plain, tokenizer = classifier
    model = hw.convert(
        copy.deepcopy(plain), hw.HardConcreteGate(input_dependent=True, init_log_alpha=0.0)
    )
    for layer in hw.attention_layers(model).values():
        torch.nn.init.normal_(layer.gate.relevance.weight)
    changes = dict(changes)
    texts = changes.pop("texts", TEXTS)
    hw.explain_data(model, TEXTS, tokenizer, folder=tmp_path, **OPTIONS)
    options = {**OPTIONS, **changes}
    found = hw.explain_data(model, texts, tokenizer, folder=tmp_path, **options)
    assert found == hw.explain_data(model, texts, tokenizer, **options)


def test_roles_of_another_model_or_other_texts_are_not_taken_over(classifier, tmp_path):
    plain, tokenizer = classifier
    batches = annotate_texts(TEXTS, tokenizer)
    other_words = annotate_texts([text.replace("good", "poor") for text in TEXTS], tokenizer)
    assert [b.valid.shape for b in batches] == [b.valid.shape for b in other_words]
    thresholds = RoleThresholds(least_trials=1)
    options = {"thresholds": thresholds, "resamples": 10}
    for model, data in ((plain, batches), (exchanged(plain), batches), (plain, other_words)):
        found = hw.head_roles(model, data, folder=tmp_path, **options)
        assert found == hw.head_roles(model, data, **options)
        # The same once more, from the folder.
        assert found == hw.head_roles(model, data, folder=tmp_path, **options)


def test_one_run_at_a_time(classifier, tiny_model, tiny_texts, tmp_path, capsys):
    plain, tokenizer = classifier
    with locked(tmp_path / "parts"):
        with pytest.raises(RuntimeError, match="another run is using the folder '.*parts': wait"):
            hw.explain_data(plain, TEXTS, tokenizer, folder=tmp_path / "parts")
        with pytest.raises(RuntimeError, match="another run is using the folder '.*parts': wait"):
            hw.head_roles(plain, annotate_texts(TEXTS, tokenizer), folder=tmp_path / "parts")
    for command in (["explain", "--text-column", "review"], ["compare", "--text", "review",
                    "--label", "mood"]):  # fmt: skip
        command += ["--model", tiny_model, "--data", tiny_texts, "--out", tmp_path / "out"]
        with locked(tmp_path / "out"):
            assert main([str(argument) for argument in command]) == 2
        assert capsys.readouterr().err == (
            f"headwise {command[0]}: another run is using the folder '{tmp_path / 'out'}': wait "
            "until it has ended, or give another folder\n"
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_a_copy_for_explaining_shares_the_parameters(classifier):
    model, _ = classifier
    other = own_copy(model)
    assert [id(p) for p in other.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in other.buffers()] == [id(b) for b in model.buffers()]
    assert not {id(m) for m in other.modules()} & {id(m) for m in model.modules()}
    model.handle = threading.Lock()
    try:
        assert own_copy(model) is model
    finally:
        del model.handle


def test_other_threads_may_use_a_model_that_is_being_explained(classifier):
    plain, tokenizer = classifier
    model = hw.convert(
        copy.deepcopy(plain), hw.HardConcreteGate(input_dependent=True, init_log_alpha=0.0)
    ).eval()
    for layer in hw.attention_layers(model).values():
        torch.nn.init.normal_(layer.gate.relevance.weight)
    inputs = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs).logits
    calm = hw.explain(model, TEXTS[0], tokenizer=tokenizer).to_dict()
    stop, failures, runs = threading.Event(), [], [0]

    def serve() -> None:
        try:
            while not stop.is_set():
                with torch.no_grad():
                    found = model(**inputs).logits
                torch.testing.assert_close(found, expected)
                assert not model.training
                runs[0] += 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert hw.explain(model, TEXTS[0], tokenizer=tokenizer).to_dict() == calm
        hw.head_roles(model, annotate_texts(TEXTS, tokenizer))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures and runs[0] > 0
