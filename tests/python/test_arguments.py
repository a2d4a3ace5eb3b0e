"""What a hurried user mistypes raises one sentence that names the argument, or works."""

from __future__ import annotations

import importlib
import warnings

import headwise as hw
import numpy as np
import pytest
import torch
from headwise.apps.pages.page import page
from headwise.convert import qkv
from headwise.testing import check_architecture, check_gate
from torch import nn

explain = importlib.import_module("headwise.explain")  # hw.explain is the function
X = torch.randn(3, 5, 32)


def encoder(gate: hw.Gate | None = None, convert: bool = True) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    return hw.convert(model, gate) if convert else model


def scores(model: nn.Module, metric: str = "mine") -> hw.HeadScores:
    names = hw.attention_layers(model)
    return hw.HeadScores(metric, {name: torch.rand(4) for name in names})


def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean((1, 2))


@pytest.mark.parametrize("bad", [X.numpy(), X.tolist(), None, "x"])
def test_a_layer_names_an_input_that_is_no_tensor(bad):
    for gate in (None, hw.BudgetGate()):
        layer = hw.MultiheadAttention(32, 4, gate=gate, batch_first=True).eval()
        with pytest.raises(TypeError, match=r"^query must be a torch.Tensor, got"):
            layer(bad, bad, bad)
        with pytest.raises(TypeError, match=r"^key must be a torch.Tensor, got"):
            layer(X, bad, X)
    with pytest.raises(TypeError, match=r"^x must be a torch.Tensor, got"):
        hw.GroupedQueryAttention(32, 4, 2)(bad)


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
@pytest.mark.parametrize("bad", [np.zeros((3, 5), bool), [[False] * 5] * 3])
def test_a_layer_names_a_mask_that_is_no_tensor(name, bad):
    layer = hw.MultiheadAttention(32, 4, batch_first=True)
    with pytest.raises(TypeError, match=rf"^{name} must be a torch.Tensor, got"):
        layer(X, X, X, **{name: bad})
    with pytest.raises(TypeError, match=rf"^{name} must be a torch.Tensor, got"):
        hw.GroupedQueryAttention(32, 4, 2)(X, **{name: bad})


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((32.0, 4), "embed_dim"),
        (("32", 4), "embed_dim"),
        ((32, None), "num_heads"),
        ((32, True), "num_heads"),
    ],
)
def test_a_layer_names_a_size_that_is_no_whole_number(sizes, name):
    with pytest.raises(TypeError, match=rf"^{name} must be a whole number, got"):
        hw.MultiheadAttention(*sizes)
    with pytest.raises(TypeError, match=rf"^{name} must be a whole number, got"):
        hw.GroupedQueryAttention(*sizes, 2)


def test_training_calls_name_what_is_no_number():
    model = encoder(hw.RequestedBudgetGate())
    for bad in ("1", None, [0.5], encoder()):
        with pytest.raises(TypeError, match=r"^progress must be a number, got"):
            hw.anneal(model, bad)
        with pytest.raises(TypeError, match=r"^lr must be a number, got"):
            hw.parameter_groups(model, lr=bad)
    for bad in ("1", None, encoder()):
        with pytest.raises(TypeError, match=r"^budget must be a number or a tensor, got"):
            hw.request_budget(model, bad)
    with pytest.raises(ValueError, match=r"^lr must not be negative, got nan"):
        hw.parameter_groups(model, lr=float("nan"))


def test_training_calls_warn_about_a_model_that_was_not_converted():
    model = encoder(convert=False)
    for call in (lambda: hw.penalty(model), lambda: hw.anneal(model, 0.5)):
        with pytest.warns(UserWarning, match="call headwise.convert first"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hw.penalty(encoder()) == 0.0  # converted, without gates
        hw.anneal(encoder(), 0.5)


def test_scores_name_a_layer_or_a_value_of_the_wrong_kind():
    with pytest.raises(TypeError, match="values must have layer names as keys, got 0"):
        hw.HeadScores("mine", {0: [1.0, 2.0]})
    for bad in (["1", "2"], torch.ones(2, dtype=torch.cfloat), None, object()):
        with pytest.raises(TypeError, match="values of layer 'a' must be real numbers, got"):
            hw.HeadScores("mine", {"a": bad})
    with pytest.raises(TypeError, match="groups must map layer names to groups"):
        hw.plan(hw.HeadScores("mine", {"a": [1.0, 2.0]}), groups=2)


def test_score_heads_names_what_it_got():
    model = encoder()
    with pytest.raises(TypeError, match="metrics must be names, of michel"):
        hw.score_heads(model, [X], loss_fn, [output_norm])
    with pytest.raises(TypeError, match="batches must be a list of batches"):
        hw.score_heads(model, None, loss_fn)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"outside of torch.inference_mode"),
    ):
        hw.score_heads(model, [X], loss_fn)


def output_norm(model, batches):
    raise AssertionError("never called")


def test_score_heads_works_under_no_grad():
    model = encoder()
    expected = hw.score_heads(model, [X], loss_fn)["michel"]
    with torch.no_grad():
        got = hw.score_heads(model, [X], loss_fn)["michel"]
    for name, values in expected.values.items():
        torch.testing.assert_close(got.values[name], values)


def test_start_gates_takes_scores_and_knows_which_end_is_important():
    def started(importance) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = encoder(hw.BudgetGate(keep=0.5))
        hw.start_gates(model, importance, keep=0.5)
        return [layer.gate.base.detach() for layer in hw.attention_layers(model).values()]

    torch.manual_seed(1)
    mine = scores(encoder())
    opposite = hw.HeadScores("entropy", {name: -own for name, own in mine.values.items()})
    for importance in (mine.values, opposite):
        for one, other in zip(started(mine), started(importance), strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(TypeError, match=r"take one of its metrics, importance\['michel'\]"):
        started({"michel": mine})
    with pytest.raises(TypeError, match="importance must be a headwise.HeadScores, got 0.5"):
        started(0.5)
    with pytest.raises(TypeError, match="keep must be a number, got"):
        hw.start_gates(encoder(hw.BudgetGate()), mine, mine)


def test_a_head_mask_that_nothing_holds_warns():
    model = encoder()
    before = model(X)
    with pytest.warns(UserWarning, match="write `with headwise.head_mask"):
        hw.head_mask(model, torch.zeros(2, 4))
    torch.testing.assert_close(model(X), before)


def test_gates_see_without_a_block_warns():
    layer = hw.GroupedQueryAttention(32, 4, 2, gate=hw.BudgetGate())
    with pytest.warns(UserWarning, match="write `with headwise.gates_see"):
        hw.gates_see(layer, 2)
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        hw.gates_see(layer, 0)  # at once, not when a block is entered
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limit = hw.gates_see(layer, 2)
        with limit:
            assert layer._seen == 2
        assert layer._seen is None
        with pytest.raises(RuntimeError, match="called for each"):
            limit.__enter__()
        del limit


def test_files_name_a_path_that_is_none():
    for bad in (None, 5):
        with pytest.raises(TypeError, match="dir must be a path, got"):
            hw.save(encoder(), bad)
        with pytest.raises(TypeError, match="dir must be a path, got"):
            hw.load(bad)


def test_an_explanation_names_what_does_not_exist():
    found = hw.explain(encoder(hw.BudgetGate()), X)
    assert found.head(site=1, head=3)["head"] == 3
    for call, text in (
        (lambda: found.head(9, 0), r"site must be in 0\.\.1, got 9"),
        (lambda: found.head(0, 9), r"head must be in 0\.\.3, got 9"),
        (lambda: found.head(-1, 0), r"site must be in 0\.\.1, got -1"),
        (lambda: found.differences(0, 3), r"second must be in 0\.\.2, got 3"),
        (lambda: found.summary(3), r"input must be in 0\.\.2, got 3"),
    ):
        with pytest.raises(IndexError, match=text):
            call()
    with pytest.raises(TypeError, match="site must be a whole number, got 'layers"):
        found.head("layers.0.self_attn", 0)


class Own(nn.Module):
    """Attention that an adapter describes, except for a mask ``[B, L]``."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x, mask=None):
        q, k, v = (w(x).unflatten(-1, (4, 8)).transpose(1, 2) for w in (self.q, self.k, self.v))
        keys = None if mask is None else mask[:, None, None].expand(-1, -1, x.size(1), -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, keys)
        return self.o(y.transpose(1, 2).flatten(2))


def adapters(**more):
    return {Own: qkv(query="q", key="k", value="v", output="o", num_heads="heads", **more)}


def test_adapters_reach_the_check_and_load(tmp_path):
    check_architecture(nn.Sequential(Own(), Own()), X, adapters=adapters())
    model = hw.convert(nn.Sequential(Own()).eval(), hw.FixedGate([1]), adapters=adapters())
    hw.save(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="describe it by adapters="):
        hw.load(tmp_path / "saved", model=nn.Sequential(Own()))
    read = hw.load(tmp_path / "saved", model=nn.Sequential(Own()).eval(), adapters=adapters())
    torch.testing.assert_close(read(X), model(X))


def test_an_adapter_says_which_masks_it_describes():
    with pytest.raises(ValueError, match=r"does not take mask= of shape \[B, 1, L, L\]"):
        hw.convert(nn.Sequential(Own()), adapters=adapters(mask="mask", additive=False))


def test_check_gate_says_which_layer_a_gate_cannot_run_in():
    class Slices(hw.RandomGate):
        def forward(self, x, key_padding_mask=None):
            x.unflatten(-1, (self.num_heads, -1))
            return super().forward(x, key_padding_mask)

    with pytest.raises(AssertionError, match="num_heads need not divide embed_dim"):
        check_gate(Slices(), compiles=False)


def test_a_card_names_no_folder_of_this_machine(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = hw.convert(BertModel(config))
    model.config._name_or_path = str(tmp_path)
    assert str(tmp_path) not in hw.serialization.model_card(model)
    model.config._name_or_path = "someone/bert"
    assert 'base_model: "someone/bert"' in hw.serialization.model_card(model)


LOADERS = {
    "plan": hw.HeadPlan.load,
    "structure plan": hw.pruning.StructurePlan.load,
    "scores": hw.HeadScores.load,
    "latency table": hw.pruning.LatencyTable.load,
    "safetensors": hw.io.load_safetensors,
    "conllu": explain.read_conllu,
    "alignments": explain.read_alignments,
    "page": page,
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_a_loader_names_what_is_no_file(load, tmp_path):
    with pytest.raises(IsADirectoryError, match=r"^path must be a file, got '.*', which is a fol"):
        load(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        load(tmp_path / "missing")
    with pytest.raises(OSError, match="File name too long") as error:
        load("x" * 5000)
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match="path must not hold a null character"):
        load("a\0b")
    if load is not page:  # which takes documents too
        with pytest.raises(TypeError, match="^path must be a path, got None"):
            load(None)


@pytest.mark.parametrize("name", ["plan", "structure plan", "scores", "latency table"])
@pytest.mark.parametrize("content", [b"\xff\xfe", b"[1]", b"{", b"null"])
def test_a_loader_names_what_is_no_document(name, content, tmp_path):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match="must be a JSON object|not valid JSON|is not UTF-8 text"):
        LOADERS[name](tmp_path / "file.json")


def test_what_is_written_must_not_be_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError, match="^path must be a file, got"):
        scores(encoder()).save(tmp_path)
    with pytest.raises(TypeError, match="^path must be a path, got None"):
        scores(encoder()).save(None)


ON_BATCHES = {
    "score_heads": lambda batches: hw.score_heads(encoder(), batches, loss_fn),
    "ablate_heads": lambda batches: hw.analysis.ablate_heads(encoder(), batches, loss_fn),
    "head_interactions": lambda batches: hw.analysis.head_interactions(encoder(), batches, loss_fn),
    "head_similarity": lambda batches: hw.analysis.head_similarity(encoder(), batches, loss_fn),
    "causal_heads": lambda batches: hw.analysis.causal_heads(encoder(), batches, loss_fn),
    "lrp_scores": lambda batches: hw.analysis.lrp_scores(encoder(), batches, loss_fn),
    "example_losses": lambda batches: hw.nn.example_losses(encoder(), batches, loss_fn),
    "pruning_path": lambda batches: hw.pruning.pruning_path(encoder(), batches, loss_fn),
    "fisher_scores": lambda batches: hw.pruning.fisher_scores(encoder(), batches, loss_fn),
    "divergence_scores": lambda batches: hw.pruning.divergence_scores(encoder(), batches),
    "repair_scores": lambda batches: hw.pruning.repair_scores(encoder(), batches),
    "compensate": lambda batches: hw.pruning.compensate(encoder(), batches),
    "repair": lambda batches: hw.repair(encoder(), batches, encoder()),
    "plan_from_use": lambda batches: hw.pruning.plan_from_use(
        encoder(hw.BudgetGate()), batches, loss_fn
    ),
    "fit_gates": lambda batches: hw.pruning.fit_gates(encoder(), batches, 0.5),
    "fit_bank": lambda batches: hw.pruning.fit_bank(encoder(), batches, loss_fn, 0.5),
    "headroom": lambda batches: hw.headroom(encoder(), batches, [X], loss_fn, loss_fn),
    "head_roles": lambda batches: hw.head_roles(encoder(), batches),
}


@pytest.mark.parametrize("run", ON_BATCHES.values(), ids=ON_BATCHES.keys())
def test_one_batch_is_no_list_of_batches(run):
    with pytest.raises(TypeError, match="^batches must be a list of batches, got one mapping: put"):
        run({"src": X})
    for bad in (None, 3, "x"):
        with pytest.raises(TypeError, match="^batches must be a list of batches or an iterator"):
            run(bad)


@pytest.mark.parametrize(
    ("inputs", "options", "kind", "message"),
    [
        (None, {}, TypeError, "inputs must be a mapping or tuple of tensors, a tensor, or texts"),
        ([], {}, TypeError, "inputs must be a mapping or tuple of tensors, a tensor, or texts, go"),
        ({}, {}, TypeError, "inputs must be a mapping or tuple of tensors, a tensor, or texts, go"),
        (
            X[:0],
            {},
            ValueError,
            r"inputs must have at least one row and one token, got shape \[0, ",
        ),
        (X[:, :0], {}, ValueError, r"inputs must have at least one row and one token, got shape"),
        (["a"], {}, ValueError, "inputs that are texts need tokenizer=, got None"),
        (["a"], {"tokenizer": 5}, TypeError, "tokenizer must be a tokenizer of transformers, got"),
        (X, {"maps": [3]}, ValueError, r"maps must be 'all', 'none' or \(site, head\) pairs, got"),
        (X, {"maps": 5}, ValueError, r"maps must be 'all', 'none' or \(site, head\) pairs, got 5"),
        (X, {"batch_size": "a"}, TypeError, "batch_size must be a whole number, got 'a'"),
        (X, {"roles": {"format": "headwise.roles"}}, ValueError, "roles must be a whole document"),
    ],
)
def test_explain_names_what_it_cannot_explain(inputs, options, kind, message):
    with pytest.raises(kind, match=f"^{message}"):
        hw.explain(encoder(), inputs, **options)


def test_explain_needs_a_model():
    with pytest.raises(TypeError, match="^model must be a torch.nn.Module, got NoneType"):
        hw.explain(None, X)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", "b"], "tokenizer must be a tokenizer of transformers, got None"),
        ("ab", "texts must be a list of texts, got 'ab'"),
        (None, "texts must be a list of texts, got None"),
    ],
)
def test_explain_data_needs_texts_and_a_tokenizer(texts, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        hw.explain_data(encoder(), texts, None)
