"""Compensation: heads that do not run write their mean, against plain formulas."""

import copy

import headwise as hw
import pytest
import torch
from headwise.pruning import compensate
from support.architectures import ARCHITECTURES, EMBED, HEADS, bert, bert_inputs
from torch import nn


class Heads(nn.Module):
    """One layer of either kind, called with its tokens and their padding."""

    def __init__(self, groups=None, **options):
        super().__init__()
        if groups is None:
            self.layer = hw.MultiheadAttention(EMBED, HEADS, batch_first=True, **options)
        else:
            self.layer = hw.GroupedQueryAttention(EMBED, HEADS, groups, bias=True, **options)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.eval().double()

    def forward(self, x, padding=None):
        if isinstance(self.layer, hw.MultiheadAttention):
            return self.layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.layer(x, key_padding_mask=padding, query_padding_mask=padding)[0]


def written_by_each(model, x, padding):
    """``[B, H, L, D]``: what every head adds to the output, from a run with it alone."""
    layer, parts = model.layer, []
    bias = layer.output_projection.bias
    for head in range(HEADS):
        layer.set_gate(hw.FixedGate([head]))
        parts.append(model(x, padding) - bias)
        layer.set_gate(None)
    return torch.stack(parts, dim=1)


def batches_of(count=3):
    generator = torch.Generator().manual_seed(1)
    padding = torch.arange(7) >= torch.tensor([7, 4, 5])[:, None]
    return [
        (torch.randn(3, 7, EMBED, generator=generator, dtype=torch.float64), padding)
        for _ in range(count)
    ]


@pytest.mark.parametrize("groups", [None, HEADS, 2, 1])
def test_heads_that_do_not_run_write_their_mean(groups):
    torch.manual_seed(0)
    model = Heads(groups)
    batches = batches_of()
    with torch.no_grad():
        written = [written_by_each(model, *batch) for batch in batches]
        before = [model(*batch) for batch in batches]
        valid = torch.cat([~padding for _, padding in batches])  # [N, L]
        means = torch.cat(written).transpose(1, 2)[valid].mean(0)  # [H, D]
        if groups is not None and groups < HEADS:  # heads of a group share the mean of o_h
            means = shared_means(model, batches, valid)
        bias = model.layer.output_projection.bias.clone()
        (found,) = compensate(model, batches)
        for (x, padding), parts, whole in zip(batches, written, before, strict=True):
            torch.testing.assert_close(model(x, padding)[~padding], whole[~padding])
            for chosen in ([1], [0, 2], [], [3, 1, 0]):
                model.layer.set_gate(hw.FixedGate(chosen))
                actual = model(x, padding)
                model.layer.set_gate(None)
                expected = bias + parts[:, chosen].sum(1)
                expected = expected + means[[h for h in range(HEADS) if h not in chosen]].sum(0)
                torch.testing.assert_close(actual[~padding], expected[~padding])
    assert found.tokens == int(valid.sum())
    if groups is None:
        every = torch.cat(written).transpose(1, 2)[valid]  # [N, H, D]
        left = (every - means).square().sum((0, 2)) / every.square().sum((0, 2))
        torch.testing.assert_close(found.explained, 1 - left)


def shared_means(model, batches, valid):
    """``[H, D]``: what a head writes if its output is the mean over its group's heads."""
    with torch.no_grad(), hw.nn.instrument(model) as opened:
        contexts = []
        opened.probe(lambda name, layer, probe: contexts.append(probe.context))
        for batch in batches:
            model(*batch)
    own = torch.cat(contexts).transpose(1, 2)[valid].mean(0)  # [H, d]
    groups = torch.tensor(model.layer.head_groups)
    mean = torch.stack([own[groups == group].mean(0) for group in groups.tolist()])
    weight = model.layer.output_projection.weight.unflatten(1, (HEADS, -1))
    return torch.einsum("ohd,hd->ho", weight, mean)


@pytest.mark.parametrize("case", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_every_architecture_computes_what_it_did_or_is_refused(case):
    torch.manual_seed(0)
    model, inputs = hw.convert(case.build()), case.inputs()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = case.run(model, inputs)

        def forward(model, batch):
            return case.run(model, batch)

        try:
            found = compensate(model, [inputs], forward_fn=forward)
        except ValueError as error:
            assert any(word in str(error) for word in ("bias", "keys of its own", "compute what"))
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name])
            found = []
        torch.testing.assert_close(case.run(model, inputs), expected, atol=2e-4, rtol=2e-4)
    assert all(0 <= float(one.explained.min()) for one in found)
    if "Bert" in case.name or "GPT2" in case.name or case.name.startswith("ViT"):
        assert len(found) == len(hw.attention_layers(model))


def test_pruning_keeps_the_means(tmp_path):
    torch.manual_seed(0)
    model = hw.convert(bert("BertModel").double())
    batches = [bert_inputs() for _ in range(2)]
    compensate(model, batches)
    plan = hw.plan(hw.score_heads(model, batches, loss, ["entropy"])["entropy"], keep=0.5)
    masked = copy.deepcopy(model)
    hw.mask(masked, plan)
    small = hw.prune(model, plan)
    with torch.no_grad():
        expected = masked(**batches[0])[0]
        torch.testing.assert_close(small(**batches[0])[0], expected)
        hw.save(small, tmp_path / "small")
        loaded = hw.load(tmp_path / "small", model=hw.convert(bert("BertModel").double()))
        torch.testing.assert_close(loaded(**batches[0])[0], expected)


def loss(model, batch):
    return model(**batch)[0].square().mean((1, 2))


def test_gates_stay_and_are_not_asked():
    torch.manual_seed(0)
    batches = batches_of()
    plain, gated = Heads(), Heads()
    gated.load_state_dict(plain.state_dict())
    gate = hw.FixedGate([0])
    gated.layer.set_gate(gate)
    held = gated.layer.gate
    compensate(plain, batches)
    compensate(gated, batches)
    assert gated.layer.gate is held
    torch.testing.assert_close(gated.layer.in_proj_bias, plain.layer.in_proj_bias)
    torch.testing.assert_close(gated.layer.out_proj.bias, plain.layer.out_proj.bias)


def test_doing_it_twice_changes_nothing_more():
    torch.manual_seed(0)
    model, batches = Heads(), batches_of()
    compensate(model, batches)
    once = copy.deepcopy(model.state_dict())
    (again,) = compensate(model, batches)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, once[name])
    torch.testing.assert_close(again.explained, torch.zeros(HEADS, dtype=torch.float64))


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (Heads(), [], "batches must not be empty"),
        (nn.Linear(2, 2), [torch.zeros(1, 2)], "call headwise.convert first"),
        (Heads(add_zero_attn=True), batches_of(), "adds keys of its own"),
        (Heads(bias=False), batches_of(), "must have a bias in its values"),
        (Heads(2, output_bias=False), batches_of(), "bias=True adds one"),
        (Heads(), [(torch.full((1, 3, EMBED), torch.nan).double(), None)], "must be finite"),
        (Heads(), [(torch.zeros(2, 0, EMBED).double(), None)], "tokens that are not padding"),
    ],
)
def test_what_cannot_be_compensated_is_refused(model, batches, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compensate(model, batches)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_output_bias_is_added_on_request():
    torch.manual_seed(0)
    model, batches = Heads(2, output_bias=False), batches_of()
    with torch.no_grad():
        before = model(*batches[0])
        compensate(model, batches, bias=True)
        padding = batches[0][1]
        torch.testing.assert_close(model(*batches[0])[~padding], before[~padding])
    assert model.layer.o_proj.bias is not None and bool(model.layer.o_proj.bias.any())
