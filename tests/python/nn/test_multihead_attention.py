"""headwise.MultiheadAttention against torch.nn.MultiheadAttention and the oracle."""

import copy
import io
import itertools
import pickle

import headwise as hw
import pytest
import torch
from support import oracle
from support.distributed import train_one_process
from torch import nn

EMBED_DIM, NUM_HEADS = 24, 4


def make_pair(gate=None, **options):
    """A torch module and ours with the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(EMBED_DIM, NUM_HEADS, **options).double()
    ours = hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, **options, gate=gate).double()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert unexpected == [] and all(key.startswith("gate.") for key in missing)
    for bias in (theirs.in_proj_bias, theirs.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    return theirs, ours


def make_inputs(batch=3, queries=5, keys=7, kdim=EMBED_DIM, vdim=EMBED_DIM, batch_first=False):
    shapes = [(batch, queries, EMBED_DIM), (batch, keys, kdim), (batch, keys, vdim)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if not batch_first:
        tensors = [tensor.transpose(0, 1).contiguous() for tensor in tensors]
    return [tensor.requires_grad_() for tensor in tensors]


def run(module, inputs, **arguments):
    """Output, weights and every gradient of a forward."""
    for tensor in inputs:
        tensor.grad = None
    module.zero_grad()
    output, weights = module(*inputs, **arguments)
    generator = torch.Generator().manual_seed(1)
    loss = (output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum()
    if weights is not None:
        loss = (
            loss
            + (weights * torch.randn(weights.shape, generator=generator, dtype=output.dtype)).sum()
        )
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    gradients.update({str(i): t.grad for i, t in enumerate(inputs)})
    return output, weights, gradients


def assert_same(theirs, ours):
    torch.testing.assert_close(theirs[0], ours[0])
    assert (theirs[1] is None) == (ours[1] is None)
    if theirs[1] is not None:
        torch.testing.assert_close(theirs[1], ours[1])
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(gradient, ours[2][name], msg=lambda m, n=name: f"{n}: {m}")


def masks(kind, batch=3, queries=5, keys=7):
    generator = torch.Generator().manual_seed(2)
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[0, 4:] = padding[1, 6:] = True
    blocked = torch.rand(queries, keys, generator=generator) < 0.3
    blocked[:, 0] = False
    each = torch.rand(batch * NUM_HEADS, queries, keys, generator=generator) < 0.3
    each[..., 0] = False
    scores = torch.randn(queries, keys, generator=generator, dtype=torch.float64)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float_padding": {"key_padding_mask": padding.double() * -2.5},
        "mask": {"attn_mask": blocked},
        "float_mask": {"attn_mask": scores},
        "mask_3d": {"attn_mask": each, "key_padding_mask": padding},
        "causal": {
            "attn_mask": torch.ones(queries, keys, dtype=torch.bool).triu(1),
            "is_causal": True,
        },
    }[kind]


MASKS = ("none", "padding", "float_padding", "mask", "float_mask", "mask_3d", "causal")
LAYERS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False},
    "added_keys": {"add_bias_kv": True, "add_zero_attn": True},
    "other_widths": {"kdim": 10, "vdim": 14, "batch_first": True},
}
# `None`: torch's own code; the others run headwise's operators with every head open.
GATES = {"no_gate": None, "open_gate": hw.FixedGate(), "open_budget": hw.BudgetGate(keep=1.0)}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_equals_torch_when_every_head_runs(layer, mask, gate):
    options = LAYERS[layer]
    theirs, ours = make_pair(GATES[gate], **options)
    widths = {key: options[key] for key in ("kdim", "vdim") if key in options}
    inputs = make_inputs(**widths, batch_first=options.get("batch_first", False))
    for need_weights, average in ((False, True), (True, True), (True, False)):
        arguments = {"need_weights": need_weights, "average_attn_weights": average, **masks(mask)}
        got = run(ours, inputs, **arguments)
        if layer == "added_keys" and mask == "causal" and gate != "no_gate":
            # With the hint (and need_weights=False) torch drops the mask, and its causal kernel
            # hides the added keys, which its mask shows. Ours follows the mask.
            arguments["is_causal"] = False
        assert_same(run(theirs, inputs, **arguments), got)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("mask", [False, True])
def test_self_attention_and_unbatched(gate, mask):
    theirs, ours = make_pair(GATES[gate])
    x = torch.randn(6, EMBED_DIM, dtype=torch.float64)
    padding = torch.tensor([False] * 4 + [True] * 2) if mask else None
    for need_weights in (False, True):
        expected = theirs(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        got = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        torch.testing.assert_close(expected, got)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("heads", "scale"), [([0, 2], None), ([], None), (None, [0.5, 0.0, 0.0, 2.0])]
)
def test_chosen_heads_equal_the_oracle(heads, scale, training):
    gate = hw.FixedGate(heads, scale=scale)
    _, ours = make_pair(gate, batch_first=True)
    ours.train(training)
    x = torch.randn(3, 6, EMBED_DIM, dtype=torch.float64)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 3:] = True
    selection = ours.gate(x, padding)
    expected = oracle.self_attention(
        x,
        ours.in_proj_weight,
        ours.in_proj_bias,
        ours.out_proj.weight,
        ours.out_proj.bias,
        NUM_HEADS,
        selection.index,
        selection.count,
        selection.weight,
        key_padding_mask=padding,
    )
    got, weights = ours(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close(got, expected)
    chosen = ours.gate.scale != 0
    assert (weights[:, ~chosen] == 0).all()
    if chosen.any():
        torch.testing.assert_close(
            weights[:, chosen].sum(-1), torch.ones(3, int(chosen.sum()), 6, dtype=torch.float64)
        )


def test_state_dict_is_torchs():
    options = {"add_bias_kv": True, "batch_first": True}
    theirs, ours = make_pair(**options)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    gated = hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, gate=hw.BudgetGate(), **options)
    missing, unexpected = gated.load_state_dict(theirs.state_dict(), strict=False)
    assert unexpected == []
    assert missing and all(key.startswith("gate.") for key in missing)


@pytest.mark.parametrize(
    "gate", [None, hw.FixedGate([1]), hw.BudgetGate(), hw.HardConcreteGate(input_dependent=True)]
)
def test_copies_and_files(gate):
    _, ours = make_pair(gate, batch_first=True)
    x = torch.randn(2, 5, EMBED_DIM, dtype=torch.float64)
    ours(x, x, x)[0].sum().backward()  # the gate now holds tensors of a graph
    ours._observers.append(lambda *_: None)
    ours.eval()
    expected = ours(x, x, x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert copied._observers == []
        torch.testing.assert_close(copied(x, x, x), expected)


def test_to_and_hooks():
    _, ours = make_pair(hw.BudgetGate(), batch_first=True)
    calls = []
    ours.register_forward_hook(lambda module, args, output: calls.append(output[0].dtype))
    ours.gate.register_forward_hook(lambda module, args, output: calls.append(output.index.dtype))
    ours.to(torch.float32)
    x = torch.randn(2, 5, EMBED_DIM)
    ours(x, x, x)
    assert calls == [torch.int32, torch.float32]
    assert ours.gate.base.dtype == torch.float32
    ours.to(torch.bfloat16).eval()
    output, _ = ours(x.bfloat16(), x.bfloat16(), x.bfloat16())
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
# torch.jit.script cannot compile torch's own module without biases.
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "no_bias"])
def test_script_without_a_gate(layer, monkeypatch):
    options = LAYERS[layer]
    _, ours = make_pair(**options)
    monkeypatch.setattr(nn, "MultiheadAttention", hw.MultiheadAttention)  # its other name
    widths = {key: options[key] for key in ("kdim", "vdim") if key in options}
    inputs = make_inputs(**widths, batch_first=options.get("batch_first", False))
    expected, weights = ours(*inputs)
    output, scripted = torch.jit.script(ours)(*inputs)
    torch.testing.assert_close((output, scripted), (expected, weights))
    ours.set_gate(hw.FixedGate())
    with pytest.raises(RuntimeError, match="torch.jit.script cannot compile a layer with a gate"):
        torch.jit.script(ours)


class Adapted(nn.Module):
    """Like an adapter: the wrapped layer, and a bit more."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight = base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + 1.0


def test_a_projection_with_something_around_it_is_refused():
    x = torch.randn(2, 5, EMBED_DIM)
    layer = hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, gate=hw.BudgetGate())
    # Quantization by type passes both by.
    assert type(layer.gate.relevance) is type(layer.out_proj) is not nn.Linear
    layer.gate.relevance = Adapted(layer.gate.relevance)
    with pytest.raises(TypeError, match="gate.relevance must be a torch.nn.Linear, .*Adapted"):
        layer(x, x, x)
    layer = hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, gate=hw.FixedGate())
    layer.out_proj = Adapted(layer.out_proj)
    message = "out_proj must be a torch.nn.Linear, whose weight is read without calling it, got "
    with pytest.raises(TypeError, match=message):
        layer(x, x, x)


def test_dropout_is_seeded_and_keeps_the_mean():
    _, ours = make_pair(hw.FixedGate([0, 3]), batch_first=True, dropout=0.4)
    x = torch.randn(2, 6, EMBED_DIM, dtype=torch.float64)
    torch.manual_seed(5)
    first = ours(x, x, x, need_weights=False)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(ours(x, x, x, need_weights=False)[0], first)
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], first)
    with torch.no_grad():
        mean = torch.stack([ours(x, x, x, need_weights=False)[0] for _ in range(1500)]).mean(0)
    expected = ours.eval()(x, x, x, need_weights=False)[0]
    assert (mean - expected).abs().max() < 0.1


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(EMBED_DIM, NUM_HEADS, 32, 0.0, batch_first=True, **options)


@pytest.mark.parametrize("probe", [False, True])
def test_encoder_layer_fast_path_calls_the_gate(probe):
    torch.manual_seed(0)
    layer = encoder_layer().eval()
    ours = hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours.eval()
    x = torch.randn(2, 5, EMBED_DIM)
    seen = []
    with torch.no_grad():
        dense = layer(x)
        if probe:
            ours._probe = lambda module, probe: seen.append(probe.context.shape)
            torch.testing.assert_close(layer(x), dense, atol=1e-5, rtol=1e-5)
            assert seen == [(2, NUM_HEADS, 5, EMBED_DIM // NUM_HEADS)]
        else:
            ours.set_gate(hw.FixedGate([1]))
            assert not torch.allclose(layer(x), dense, atol=1e-3)


@pytest.mark.parametrize("convert", [False, True])
def test_encoder_with_nested_tensors_calls_the_gate(convert):
    """``nn.TransformerEncoder`` turns a padded batch into a nested one for its fast path."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(encoder_layer(), 2).eval()
    for layer in encoder.layers:
        ours = hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True).eval()
        ours.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = ours
        if convert:
            ours.set_gate(hw.FixedGate([0, 2]))
    x = torch.randn(3, 6, EMBED_DIM)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, 4:] = padding[2, 1:] = True
    with_gradient = encoder(x, src_key_padding_mask=padding)  # the slow path
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=padding)
    valid = ~padding
    torch.testing.assert_close(fast[valid], with_gradient[valid], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "gate", [hw.BudgetGate(), hw.HardConcreteGate(input_dependent=True), hw.FixedGate([1, 2])]
)
@pytest.mark.parametrize("training", [False, True])
def test_compile_fullgraph(gate, training):
    torch.manual_seed(0)
    ours = hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, gate=gate).train(training)
    hw.anneal(ours, 1.0)  # no noise: both runs draw the same
    reference = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 7)):
        x = torch.randn(batch, length, EMBED_DIM)
        padding = torch.zeros(batch, length, dtype=torch.bool)
        padding[0, 3:] = True
        expected, _ = reference(x, x, x, key_padding_mask=padding, need_weights=False)
        got, _ = compiled(x, x, x, key_padding_mask=padding, need_weights=False)
        torch.testing.assert_close(got, expected)
        if training:
            got.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(ours.in_proj_weight.grad, reference.in_proj_weight.grad)


def test_export():
    ours = hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, gate=hw.BudgetGate())

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = ours

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 5, EMBED_DIM)
    layer = Layer().eval()
    dynamic = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    program = torch.export.export(layer, (x,), dynamic_shapes=dynamic).module()
    for shape in ((2, 5), (4, 9)):
        x = torch.randn(*shape, EMBED_DIM)
        torch.testing.assert_close(program(x), layer(x))


def test_distributed_data_parallel(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = [(rank, 2, str(tmp_path / "store"), queue) for rank in range(2)]
    workers = [context.Process(target=train_one_process, args=a) for a in arguments]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    for first, second in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(torch.from_numpy(first), torch.from_numpy(second))


@pytest.mark.parametrize("gate", [None, hw.FixedGate([])])
def test_no_heads_left(gate):
    layer = hw.MultiheadAttention(EMBED_DIM, 0, head_dim=6, batch_first=True, gate=gate)
    nn.init.normal_(layer.out_proj.bias)
    x = torch.randn(2, 5, EMBED_DIM)
    output, weights = layer(x, x, x)
    torch.testing.assert_close(output, layer.out_proj.bias.expand(2, 5, -1))
    assert weights.shape == (2, 5, 5) and (weights == 0).all()


@pytest.mark.parametrize("gate", [None, hw.FixedGate(), hw.BudgetGate(), hw.HardConcreteGate()])
def test_narrow_layer_equals_the_masked_one(gate):
    """Three heads of width 6 in a model of width 24: what pruning leaves of four."""
    torch.manual_seed(0)
    wide = hw.MultiheadAttention(EMBED_DIM, 4, batch_first=True, gate=hw.FixedGate([0, 1, 2]))
    narrow = hw.MultiheadAttention(EMBED_DIM, 3, head_dim=6, batch_first=True, gate=gate).eval()
    rows = torch.cat([torch.arange(18) + 24 * i for i in range(3)])
    with torch.no_grad():
        narrow.in_proj_weight.copy_(wide.in_proj_weight[rows])
        narrow.in_proj_bias.copy_(wide.in_proj_bias[rows])
        narrow.out_proj.weight.copy_(wide.out_proj.weight[:, :18])
        narrow.out_proj.bias.copy_(wide.out_proj.bias)
        if isinstance(narrow.gate, hw.BudgetGate):
            narrow.gate.budget_out.bias.fill_(30.0)
    x = torch.randn(2, 5, EMBED_DIM)
    torch.testing.assert_close(
        narrow(x, x, x, need_weights=False), wide(x, x, x, need_weights=False)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "embed_dim must be positive, got 0"),
        ((24, 0), "num_heads must be positive (or 0 if head_dim is given), got 0"),
        ((24, 5), "num_heads must divide embed_dim=24 (or head_dim be given), got 5"),
        ((24, 4, 1.5), "dropout must be between 0 and 1, got 1.5"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError) as error:
        hw.MultiheadAttention(*arguments)
    assert str(error.value) == message


def test_bad_inputs():
    layer = hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, batch_first=True, gate=hw.FixedGate())
    x = torch.randn(2, 5, EMBED_DIM)
    with pytest.raises(ValueError, match="query must have 24 features, got 10"):
        layer(x[..., :10], x, x)
    with pytest.raises(TypeError, match="query must be floating, got torch.int32"):
        layer(x.int(), x.int(), x.int())
    with pytest.raises(
        ValueError, match=r"key_padding_mask must have shape \(2, 5\), got \(2, 4\)"
    ):
        layer(x, x, x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(5, 5\), got \(5, 4\)"):
        layer(x, x, x, attn_mask=torch.zeros(5, 4))
    with pytest.raises(TypeError, match="attn_mask must be boolean or floating, got torch.int64"):
        layer(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.long))
    with pytest.raises(RuntimeError, match="is_causal is a hint about attn_mask"):
        layer(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="must agree in batch"):
        layer(x, x[:1], x[:1])
    nothing = torch.nested.nested_tensor([])
    with pytest.raises(ValueError, match="a nested tensor of one sequence or more, got none"):
        layer(nothing, nothing, nothing)
    with pytest.raises(TypeError, match=r"gate must be a headwise.Gate or None, got str"):
        hw.MultiheadAttention(EMBED_DIM, NUM_HEADS, gate="budget")
    with pytest.raises(ValueError, match="gate must be bound to embed_dim=24 and num_heads=4"):
        hw.MultiheadAttention(
            EMBED_DIM, NUM_HEADS, gate=hw.FixedGate(embed_dim=EMBED_DIM, num_heads=6)
        )


@pytest.mark.parametrize(
    ("dtype", "batch", "length"), itertools.product((torch.float32, torch.bfloat16), (0, 1), (1, 3))
)
def test_small_shapes_and_dtypes(dtype, batch, length):
    layer = hw.MultiheadAttention(
        EMBED_DIM, NUM_HEADS, batch_first=True, gate=hw.BudgetGate(), dtype=dtype
    )
    x = torch.randn(batch, length, EMBED_DIM, dtype=dtype)
    for training in (False, True):
        output, weights = layer.train(training)(x, x, x)
        assert output.shape == x.shape and output.dtype == dtype
        assert weights.shape == (batch, length, length)
        assert output.isfinite().all()
