"""MixtureOfHeadsGate (MoH, arXiv 2410.11842), by the sums of its released code written out."""

from __future__ import annotations

import copy
import json

import headwise as hw
import pytest
import torch
from headwise.gates import TokenSelection, gate_from_config
from torch import nn

ops = torch.ops.headwise
D, H = 16, 6


def released(gate, x):
    """Weights [B, L, H] of shared heads first, then routed ones, and the balance loss."""
    always, routed = len(gate.shared), gate.num_heads - len(gate.shared)
    rows = x.flatten(0, -2)
    p = torch.softmax(rows @ gate.router.weight.T, 1)
    best = p.topk(gate.routed, 1).indices
    mask = torch.zeros_like(p).scatter_(1, best, 1.0)
    balance = (p.mean(0) * mask.mean(0)).mean() * routed * routed
    of_routed = p * mask
    of_routed = of_routed / of_routed.sum(1, keepdim=True) * gate.routed
    if always == 0:
        return of_routed.view(*x.shape[:-1], -1), balance
    of_shared = torch.ones(len(rows), always, dtype=x.dtype)
    if always > 1:
        of_shared = torch.softmax(rows @ gate.shared_router.weight.T, 1) * always
    kinds = torch.softmax(rows @ gate.kind_router.weight.T, 1) * 2
    weights = torch.cat([of_shared * kinds[:, :1], of_routed * kinds[:, 1:]], 1)
    return weights.view(*x.shape[:-1], -1), balance


def bound(seed=0, dtype=torch.float64, scale=1.0, **options):
    torch.manual_seed(seed)
    gate = hw.MixtureOfHeadsGate(**options).bind(D, H, dtype=dtype)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.normal_(0.0, scale)
    return gate


@pytest.mark.parametrize("shared", [0, 1, 3])
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_weights_and_balance_equal_the_released_code(shared, keep):
    gate = bound(shared=shared, keep=keep)
    x = torch.randn(3, 5, D, dtype=torch.float64)
    selection = gate.train()(x)
    assert isinstance(selection, TokenSelection)
    want, balance = released(gate, x)
    torch.testing.assert_close(selection.weight, want)
    assert torch.equal(selection.chosen, want.ne(0))
    assert selection.chosen.sum(-1).eq(max(round(keep * H), shared + 1)).all()
    torch.testing.assert_close(gate.penalty(), 0.01 * balance)
    torch.testing.assert_close(hw.penalty(gate), 0.01 * balance)
    parameters = list(gate.parameters())
    direction = torch.randn_like(want)
    got = torch.autograd.grad((selection.weight * direction).sum() + gate.penalty(), parameters)
    expected = torch.autograd.grad((want * direction).sum() + 0.01 * balance, parameters)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_mean_weight_of_a_kind_is_its_share():
    """Half of the shared heads' weight to each kind, where the third router is undecided."""
    gate = bound(shared=2, keep=0.8)
    nn.init.zeros_(gate.kind_router.weight)
    weight = gate(torch.randn(2, 7, D, dtype=torch.float64)).weight
    torch.testing.assert_close(weight[..., :2].mean(-1), torch.ones(2, 7, dtype=torch.float64))
    torch.testing.assert_close(weight.sum(-1), torch.full((2, 7), 5.0, dtype=torch.float64))


def test_shared_heads_anywhere():
    first, other = bound(shared=[0, 1]), bound(shared=[4, 2])
    other.load_state_dict({**first.state_dict(), "shared": other.shared})
    x = torch.randn(2, 5, D, dtype=torch.float64)
    order = [2, 4, 0, 1, 3, 5]
    for one, two in zip(first(x), other(x), strict=True):
        assert torch.equal(one, two[..., order])


def test_padding_chooses_nothing_and_is_left_out_of_the_balance():
    gate = bound(shared=2).train()
    x = torch.randn(2, 6, D, dtype=torch.float64)
    padding = torch.arange(6) >= torch.tensor([4, 6])[:, None]
    selection = gate(x, padding)
    assert not selection.chosen[padding].any()
    assert selection.weight[padding].eq(0).all()
    _, balance = released(gate, x[~padding])
    torch.testing.assert_close(gate.balance, balance)
    floating = torch.zeros(2, 6, dtype=torch.float64).masked_fill(padding, -torch.inf)
    for one, two in zip(selection, gate(x, floating), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("shared", [0, 2])
def test_one_choice_for_a_sequence(shared):
    gate = bound(shared=shared, routing="sequence").train()
    x = torch.randn(4, 5, D, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([2, 5, 1, 3])[:, None]
    selection = gate(x, padding)
    means = torch.stack([row[~hidden].mean(0) for row, hidden in zip(x, padding, strict=True)])
    want, balance = released(gate, means)
    torch.testing.assert_close(selection.weight, want)
    torch.testing.assert_close(gate.balance, balance)
    assert torch.equal(ops.selection_mask(selection.index, selection.count, torch.bool), want.ne(0))


def layer_of(gate, seed=0, heads=H, width=D, **options):
    torch.manual_seed(seed)
    layer = hw.MultiheadAttention(
        width, heads, head_dim=8, gate=gate, batch_first=True, dtype=torch.float64, **options
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.4)
    return layer


def masked(layer, x, padding=None, **options):
    """Every head for every token; the gate's weights afterwards."""
    plain = copy.deepcopy(layer)
    plain._probe = lambda *_: None
    return plain(x, x, x, key_padding_mask=padding, need_weights=False, **options)[0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_a_layer_equals_the_one_of_every_head_masked(training, added):
    layer = layer_of(hw.MixtureOfHeadsGate(shared=2), add_bias_kv=added, add_zero_attn=added).train(
        training
    )
    x = torch.randn(3, 7, D, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(7) >= torch.tensor([4, 7, 1])[:, None]
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1)
    output = layer(x, x, x, key_padding_mask=padding, attn_mask=causal, need_weights=False)[0]
    want = masked(layer, x, padding, attn_mask=causal)
    torch.testing.assert_close(output, want)
    got, expected = (
        torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (output, want)
    )
    torch.testing.assert_close(got, expected)


def oracle(layer, x, padding, causal):
    """Every head for every token, in plain PyTorch, times the weights by the released code."""
    weight, _ = released(layer.gate, x)  # [B, L, H]
    q, k, v = (
        part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
        for part in nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, 2)
    )
    scores = q @ k.transpose(2, 3) / layer.head_dim**0.5
    scores = scores.masked_fill(padding[:, None, None], -torch.inf)
    if causal:
        later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    weight = weight.masked_fill(padding[..., None], 0.0)
    context = (scores.softmax(3) @ v).transpose(1, 2) * weight[..., None]
    return nn.functional.linear(context.flatten(2), layer.out_proj.weight, layer.out_proj.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [0, 1, 3])
def test_outputs_and_gradients_equal_the_plain_oracle(shared, causal, dtype):
    """The released code's formulas; lengths beyond a block of causal queries."""
    layer = layer_of(hw.MixtureOfHeadsGate(shared=shared), bias=True).train()
    torch.manual_seed(1)
    x = torch.randn(2, 600, D, dtype=torch.float64)
    if dtype != torch.float64:  # the values that the narrow layer has
        layer.to(dtype).double()
        x = x.to(dtype).double()
    padding = torch.arange(600) >= torch.tensor([520, 600])[:, None]
    mask = torch.ones(600, 600, dtype=torch.bool).triu(1) if causal else None
    wide = [x.clone().requires_grad_(), *layer.parameters()]
    want = oracle(layer, wide[0], padding, causal)
    direction = torch.randn_like(want)
    expected = torch.autograd.grad((want * direction).sum(), wide)
    chosen = layer.gate(x, padding).chosen
    narrow = copy.deepcopy(layer).to(dtype)
    y = wide[0].detach().to(dtype).requires_grad_()
    same = (narrow.gate(y, padding).chosen == chosen).all(-1)  # rounding may move a choice
    assert same.double().mean() > 0.98
    output = narrow(y, y, y, padding, need_weights=False, attn_mask=mask, is_causal=causal)[0]
    bound = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}[dtype]
    error = (output.double() - want)[same].abs().max()
    assert output.dtype == dtype and error <= bound * want.abs().max()
    assert torch.equal(output[padding], narrow.out_proj.bias.expand(80, -1))
    got = torch.autograd.grad((output * direction.to(dtype)).sum(), [y, *narrow.parameters()])
    if dtype == torch.bfloat16:
        return  # of sums over 1,100 tokens, some of which chose otherwise
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other).abs().max() <= 50 * bound * max(1.0, other.abs().max())


def test_gradcheck():
    layer = layer_of(hw.MixtureOfHeadsGate(keep=0.5, shared=1), heads=4, width=6)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(5) >= torch.tensor([3, 5])[:, None]
    names, tensors = zip(*layer.named_parameters(), strict=True)

    def call(x, *parameters):
        own = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            layer, own, (x, x, x), {"key_padding_mask": padding, "need_weights": False}
        )[0]

    torch.autograd.gradcheck(call, (x, *tensors))


class Given(nn.Module):
    """Chooses what it was given."""

    reads_heads = attends = projects = False
    routes_tokens = True

    def __init__(self, selection):
        super().__init__()
        self.selection = selection

    def forward(self, x, padding):
        return self.selection


def given(layer, chosen):
    layer.gate = None
    del layer.gate
    weight = torch.where(chosen, torch.randn(chosen.shape, dtype=torch.float64), 0.0)
    layer.gate = Given(TokenSelection(chosen, weight))
    return layer


def test_ragged_counts_heads_that_no_token_chose_and_tokens_without_a_head():
    chosen = torch.zeros(3, 9, H, dtype=torch.bool)
    chosen[0, 5, 0] = True  # one token
    chosen[0, :, 1] = True  # all of them
    chosen[1, 6:, 2] = True  # of one sequence only; heads 3 and up, sequence 2: none
    layer = given(layer_of(None), chosen)
    x = torch.randn(3, 9, D, dtype=torch.float64)
    output = layer(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(output, masked(layer, x))
    assert torch.equal(output[2], layer.out_proj.bias.expand(9, -1))
    (grad,) = torch.autograd.grad(output.sum(), layer.in_proj_weight)
    by_head = grad.abs().sum(1).unflatten(0, (3, H, 8)).sum((0, 2))
    assert by_head[:3].gt(0).all() and by_head[3:].eq(0).all()
    with torch.no_grad():  # heads that no token chose are not read
        for part in range(3):
            layer.in_proj_weight[part * 48 + 24 : part * 48 + 48] = torch.nan
        layer.out_proj.weight[:, 24:] = torch.nan
    assert torch.equal(layer(x, x, x, need_weights=False)[0], output)


@pytest.mark.parametrize("kind", ["boolean", "floating", "by head"])
def test_masks_and_other_keys(kind):
    layer = layer_of(hw.MixtureOfHeadsGate(shared=2), add_bias_kv=True, kdim=D, vdim=D)
    x, memory = torch.randn(2, 7, D).double(), torch.randn(2, 9, D).double()
    mask = torch.randn(7, 9).double()
    if kind == "boolean":
        mask = mask > 0.8
    elif kind == "by head":
        mask = torch.randn(2 * H, 7, 9).double()
    plain = copy.deepcopy(layer)
    plain._probe = lambda *_: None
    for call in (layer, plain):
        call.eval()
    arguments = (x, memory, memory)
    output = layer(*arguments, need_weights=False, attn_mask=mask)[0]
    torch.testing.assert_close(output, plain(*arguments, need_weights=False, attn_mask=mask)[0])


def test_dropout_and_autocast():
    layer = layer_of(hw.MixtureOfHeadsGate(shared=2), dropout=0.5).train()
    x = torch.randn(2, 30, D, dtype=torch.float64)
    torch.manual_seed(0)
    first = layer(x, x, x, need_weights=False)[0]
    assert not torch.equal(first, layer(x, x, x, need_weights=False)[0])
    torch.manual_seed(0)
    assert torch.equal(first, layer(x, x, x, need_weights=False)[0])
    layer.float().eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(*3 * [x.float()], need_weights=False)[0].dtype == torch.bfloat16


def test_attention_weights_are_zero_for_tokens_that_did_not_choose():
    layer = layer_of(hw.MixtureOfHeadsGate(shared=1)).eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    _, weights = layer(x, x, x, average_attn_weights=False)
    chosen = layer.gate(x).chosen.transpose(1, 2)  # [B, H, L]
    torch.testing.assert_close(weights.sum(-1), chosen.double())


def test_a_layer_learns_which_tokens_need_which_head():
    """Two kinds of token; each has to be mapped by a head of its own."""
    torch.manual_seed(0)
    layer = hw.MultiheadAttention(
        8, 4, gate=hw.MixtureOfHeadsGate(keep=0.5, shared=0), batch_first=True
    )
    maps, kinds = torch.randn(2, 8, 8) / 3, torch.randn(2, 8)
    optimizer = torch.optim.Adam(hw.parameter_groups(layer, lr=5e-3), eps=1e-6)
    for _ in range(250):
        kind = torch.randint(2, (16, 6))
        x = torch.randn(16, 6, 8) * 0.3 + 2 * kinds[kind]
        target = torch.einsum("blij,blj->bli", maps[kind], kinds[kind])
        loss = nn.functional.mse_loss(layer(x, x, x, need_weights=False)[0], target)
        (loss + hw.penalty(layer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    chosen = layer.eval().gate(x).chosen.float()
    assert loss < 0.05
    apart = chosen[kind == 0].mean(0) - chosen[kind == 1].mean(0)
    assert apart.abs().max() > 0.8


def test_the_configuration_makes_the_same_gate(tmp_path):
    gate = hw.MixtureOfHeadsGate(keep=0.75, shared=[1, 4], strength=0.1)
    again = gate_from_config(json.loads(json.dumps(gate.config())))
    assert again.config() == gate.config()
    layer = layer_of(gate).eval()
    hw.save(layer, tmp_path / "layer")
    loaded = hw.load(tmp_path / "layer", model=layer_of(None, seed=1)).eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    assert torch.equal(layer(x, x, x)[0], loaded(x, x, x)[0])
    assert torch.equal(copy.deepcopy(layer)(x, x, x)[0], layer(x, x, x)[0])


def test_start_gates_shares_the_most_important_heads():
    layer = layer_of(hw.MixtureOfHeadsGate(shared=2))
    scores = {"": torch.tensor([0.1, 0.9, 0.2, 0.3, 0.8, 0.0], dtype=torch.float64)}
    hw.start_gates(layer, scores, 0.5)
    assert layer.gate.shared.tolist() == [1, 4]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\]"),
        ({"routing": "layer"}, "routing must be one of token, sequence"),
        ({"strength": -1.0}, "strength must be"),
        ({"shared": [1, 1]}, "1 again"),
    ],
)
def test_options_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        hw.MixtureOfHeadsGate(**options)
    with pytest.raises(ValueError, match=r"shared must be in 0\.\.5, got 6"):
        hw.MixtureOfHeadsGate(shared=[6]).bind(D, H)


def test_more_shared_heads_than_the_share_leaves_one_to_route():
    gate = bound(shared=4, keep=0.1)
    assert gate(torch.randn(1, 3, D, dtype=torch.float64)).chosen.sum(-1).eq(5).all()
    everything = bound(shared=H, keep=0.1)
    selection = everything(torch.randn(1, 3, D, dtype=torch.float64))
    assert selection.chosen.all()
    torch.testing.assert_close(selection.weight.mean(-1), torch.ones(1, 3, dtype=torch.float64))


READERS = {
    "trace": lambda model, x: hw.trace(model).__enter__(),
    "explain": lambda model, x: hw.explain(model, {"query": x, "key": x, "value": x}),
    "score_heads": lambda model, x: hw.score_heads(
        model, [x], lambda m, b: m(b, b, b)[0].square().sum(), metrics=["michel"]
    ),
    "headroom": lambda model, x: hw.nn.instrument(model).__enter__().override(lambda *_: None),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_reads_a_choice_for_every_sequence_refuses(reader):
    layer = layer_of(hw.MixtureOfHeadsGate())
    x = torch.randn(2, 5, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"chooses for every token.*routing='sequence'"):
        READERS[reader](layer, x)
    assert not layer._observers
    assert layer._probe is None
    layer.set_gate(hw.MixtureOfHeadsGate(routing="sequence"))
    with hw.trace(layer) as trace:
        layer(x, x, x)
    assert trace.selections[""].count.eq(3).all()


def test_layers_and_gates_that_choose_for_sequences_refuse_it():
    gate = hw.MixtureOfHeadsGate()
    for make in (
        lambda: hw.GroupedQueryAttention(D, 4, num_key_value_heads=2, gate=gate),
        lambda: hw.SharedHeadsGate(gate),
        lambda: hw.GroupGate(gate),
        lambda: hw.nn.split_projections(layer_of(gate)),
    ):
        with pytest.raises(ValueError, match=r"for every token.*routing='sequence'"):
            make()


def test_a_plan_from_observed_use_counts_tokens():
    layer = layer_of(hw.MixtureOfHeadsGate(keep=0.5, shared=[3]))
    x = torch.randn(4, 9, D, dtype=torch.float64)
    padding = torch.arange(9) >= torch.tensor([3, 9, 5, 1])[:, None]
    plan = hw.pruning.plan_from_use(
        layer, [x], lambda model, batch: model(batch, batch, batch, key_padding_mask=padding)
    )
    share = layer.gate.eval()(x, padding).chosen[~padding].double().mean(0)  # [H]
    kept = plan.layers[0].heads
    assert 3 in kept and len(kept) == 3
    assert share[kept].min() >= max(share[h] for h in range(H) if h not in kept)


def test_compiled_and_exported():
    layer = layer_of(hw.MixtureOfHeadsGate(shared=2)).eval()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    want = layer(x, x, x, need_weights=False)[0]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], want)

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x, x, need_weights=False)[0]

    batch = torch.export.Dim("batch", min=2, max=8)
    program = torch.export.export(Self(), (x,), dynamic_shapes={"x": {0: batch}}, strict=False)
    longer = torch.randn(4, 5, D, dtype=torch.float64)
    torch.testing.assert_close(program.module()(longer), Self()(longer))
    layer.train()
    y = compiled(x, x, x, need_weights=False)[0]
    got = torch.autograd.grad(y.sum(), layer.in_proj_weight)[0]
    plain = layer(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(got, torch.autograd.grad(plain.sum(), layer.in_proj_weight)[0])


def test_checkpointing_gives_the_same_gradients():
    layer = layer_of(hw.MixtureOfHeadsGate(shared=2)).train()
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)

    def run(x):
        return layer(x, x, x, need_weights=False)[0]

    again = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    (got,) = torch.autograd.grad(again.sum() + hw.penalty(layer), x)
    (want,) = torch.autograd.grad(run(x).sum() + hw.penalty(layer), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_models_convert(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
             "intermediate_size": 64}  # fmt: skip
    if kind == "bert":
        config = transformers.BertConfig(vocab_size=50, **sizes)
        model = transformers.BertForSequenceClassification(config)
        mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
        inputs = {"input_ids": torch.randint(50, (2, 7)), "attention_mask": mask.long()}
    else:
        config = transformers.ViTConfig(image_size=16, patch_size=4, **sizes)
        model = transformers.ViTForImageClassification(config)
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    plain = copy.deepcopy(model).eval()
    model = hw.convert(model, gate=hw.MixtureOfHeadsGate(shared=2)).train()
    loss = model(**inputs, labels=torch.tensor([0, 1])).loss + hw.penalty(model)
    loss.backward()
    gates = [layer.gate for layer in hw.attention_layers(model).values()]
    assert all(gate.router.weight.grad.abs().sum() > 0 for gate in gates)
    torch.testing.assert_close(hw.penalty(model), 0.01 * sum(g.balance for g in gates) / 2)
    with torch.no_grad():
        output = model.eval()(**inputs).logits
        for layer in hw.attention_layers(model).values():
            layer._probe = lambda *_: None  # every head, masked
        torch.testing.assert_close(output, model(**inputs).logits, atol=1e-5, rtol=1e-4)
        for layer in hw.attention_layers(model).values():
            layer._probe = None
        hw.save(model, tmp_path / "model")
        loaded = hw.load(tmp_path / "model", model=copy.deepcopy(plain)).eval()
        assert torch.equal(loaded(**inputs).logits, output)
