"""What a cache keeps of the prompt's selection goes wherever the keys go (keep_selection=True)."""

import copy
import pickle

import headwise as hw
import pytest
import torch
from headwise.gates import Gate, Selection
from support.architectures import decoder_config
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, EncoderDecoderCache, StaticCache  # noqa: E402
from transformers.cache_utils import DynamicLayer, QuantizedLayer, StaticLayer  # noqa: E402

EMBED, HEADS, GROUPS, LENGTH = 24, 4, 2, 6


class TokenGate(Gate):
    """Other heads for other first tokens; by the prompt's mean."""

    def __init__(self, *, execution="all", **binding):
        super().__init__({}, execution=execution, **binding)

    def forward(self, x, key_padding_mask=None):
        score = (x.mean(1) @ self.mix.to(x.dtype))[:, : self.num_heads]
        weight = torch.where(score > score.median(1, keepdim=True).values, score.abs() + 0.5, 0.0)
        index, count = torch.ops.headwise.select_nonzero(weight)
        return Selection(index, count, weight)

    def _build(self, device, dtype):
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("mix", torch.randn(self.embed_dim, HEADS, generator=generator))


def build(kind="Llama", gate=None, **kwargs):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": EMBED,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "intermediate_size": 32,
        **kwargs,
    }
    if kind == "GPT2":
        sizes.update(intermediate_size=None)
    model = getattr(transformers, f"{kind}Model")(decoder_config(kind, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return hw.convert(model.eval(), gate or TokenGate(), keep_selection=True)


def rows(seed=1, batch=4, length=LENGTH):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 50, (batch, length), generator=generator)


class Int8Layer(QuantizedLayer):
    """Quantized keys without a library: enough to go through their code."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax().clamp(min=1e-9)
        return (tensor / scale * 32767).round().to(torch.int16), scale

    def _dequantize(self, quantized):
        tensor, scale = quantized
        return tensor.float() / 32767 * scale


def quantized(model):
    return transformers.Cache(layers=[Int8Layer(residual_length=2) for _ in range(2)])


CACHES = {
    "dynamic": lambda model: DynamicCache(),
    "dynamic of a configuration": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
    "encoder-decoder": lambda model: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "quantized": quantized,
}


# What transformers itself could not do before: reorder a quantized cache, empty a dynamic one.
REORDERED = [k for k in CACHES if k != "quantized" or "reorder_cache" in vars(QuantizedLayer)]
EMPTIED = [k for k in CACHES if k == "static" or "reset" in vars(DynamicLayer)]


def step(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]


def alone(model, prompt, rest):
    """Row by row, from nothing: what each sequence must get."""
    outputs = []
    for own, more in zip(prompt, rest, strict=True):
        cache = DynamicCache()
        step(model, own[None], cache)
        outputs.append([step(model, token[None, None], cache) for token in more][-1])
    return torch.cat(outputs)


def close(actual, expected, cache="dynamic"):
    tolerance = 3e-3 if cache == "quantized" else 1e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def selections(cache):
    return [layer.headwise_kept for layer in getattr(cache, "self_attention_cache", cache).layers]


PERMUTATION = torch.tensor([2, 0, 3, 1])
MOVES = {
    "reorder": (lambda cache: cache.reorder_cache(PERMUTATION), PERMUTATION),
    "reorder with repetition": (
        lambda cache: cache.reorder_cache(torch.tensor([1, 1, 3, 0])),
        torch.tensor([1, 1, 3, 0]),
    ),
    "select": (lambda cache: cache.batch_select_indices(PERMUTATION), PERMUTATION),
    "fewer rows": (
        lambda cache: cache.batch_select_indices(torch.tensor([3, 1])),
        torch.tensor([3, 1]),
    ),
    "repeat": (
        lambda cache: cache.batch_repeat_interleave(3),
        torch.arange(4).repeat_interleave(3),
    ),
    "repeat, then reorder": (
        lambda cache: [
            cache.batch_repeat_interleave(2),
            cache.reorder_cache(torch.arange(8).flip(0)),
        ],
        torch.arange(4).repeat_interleave(2).flip(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("gate", [TokenGate(), hw.GroupGate(TokenGate())], ids=["heads", "groups"])
@pytest.mark.parametrize(
    "kind, move",
    [
        (kind, move)
        for kind in REORDERED
        for move in MOVES
        # transformers moves the rows of the others by reorder_cache alone
        if kind not in ("static", "quantized") or move.startswith("reorder")
    ],
)
@pytest.mark.parametrize("prefix", ["Llama", "GPT2"])
def test_rows_move_with_their_selection(prefix, kind, move, gate):
    model = build(prefix, gate)
    function, order = MOVES[move]
    prompt, tokens = rows(), rows(seed=2, batch=len(order), length=2)
    cache = CACHES[kind](model)
    step(model, prompt, cache)
    function(cache)
    outputs = [step(model, token[:, None], cache) for token in tokens.T]
    close(outputs[-1], alone(model, prompt[order], tokens), kind)


@pytest.mark.parametrize("kind", REORDERED)
@pytest.mark.parametrize("copies", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
def test_copies_keep_their_selection(kind, copies):
    model = build(gate=hw.GroupGate(TokenGate()))
    prompt, tokens = rows(), rows(seed=2, length=2)
    cache = CACHES[kind](model)
    step(model, prompt, cache)
    copied = copies(cache)
    assert type(copied) is type(cache)
    cache.reorder_cache(PERMUTATION)  # the copy has rows of its own
    outputs = [step(model, token[:, None], copied) for token in tokens.T]
    close(outputs[-1], alone(model, prompt, tokens), kind)
    outputs = [step(model, token[:, None], cache) for token in tokens.T]
    close(outputs[-1], alone(model, prompt[PERMUTATION], tokens), kind)


@pytest.mark.parametrize("kind", ["dynamic", *["static"] * hasattr(StaticLayer, "crop")])
def test_cropping_forgets_tokens_and_keeps_the_choice(kind):
    model = build(gate=hw.GroupGate(TokenGate()))
    prompt, tokens = rows(), rows(seed=2, length=2)
    cache = CACHES[kind](model)
    step(model, prompt, cache)
    for token in rows(seed=9, length=3).T:  # drafts that are taken back
        step(model, token[:, None], cache)
    cache.crop(-3)
    outputs = [step(model, token[:, None], cache) for token in tokens.T]
    close(outputs[-1], alone(model, prompt, tokens))


@pytest.mark.parametrize("kind", EMPTIED)
def test_an_emptied_cache_serves_other_sequences(kind):
    """Of another number, with other selections, wider or narrower."""
    model = build(gate=hw.GroupGate(TokenGate()))
    cache = CACHES[kind](model)
    batches = (4, 4, 4) if kind == "static" else (4, 1, 3, 4)
    widths = set()
    for seed, batch in enumerate(batches, 5):
        prompt, tokens = rows(seed, batch), rows(seed + 50, batch, 2)
        step(model, prompt, cache)
        outputs = [step(model, token[:, None], cache) for token in tokens.T]
        close(outputs[-1], alone(model, prompt, tokens), kind)
        widths.add(tuple(k.slots is None for k in selections(cache)))
        cache.reset()
        assert all(kept is None for kept in selections(cache))
    assert widths


def test_a_static_cache_changes_its_width_when_it_is_used_again():
    one, both = hw.GroupGate(hw.FixedGate([1])), hw.GroupGate(hw.FixedGate([0, 1]))
    model = build(gate=one)
    cache = CACHES["static"](model)
    for gate, width in ((one, 1), (both, 2), (one, 2), (both, 2)):
        hw.convert(model, gate, keep_selection=True)
        prompt, tokens = rows(), rows(seed=2, length=2)
        step(model, prompt, cache)
        outputs = [step(model, token[:, None], cache) for token in tokens.T]
        close(outputs[-1], alone(model, prompt, tokens))
        assert cache.layers[0].keys.size(1) == width
        cache.reset()


def test_offloaded_layers_keep_their_selection():
    model = build(gate=hw.GroupGate(TokenGate()))
    prompt, tokens = rows(), rows(seed=2, length=2)
    cache = DynamicCache()
    step(model, prompt, cache)
    outputs = []
    for token in tokens.T:
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        outputs.append(step(model, token[:, None], cache))
    close(outputs[-1], alone(model, prompt, tokens))


def test_sliding_windows():
    model = build("Mistral", TokenGate(), sliding_window=4, head_dim=None)
    prompt, tokens = rows(), rows(seed=2, length=3)
    cache = DynamicCache(config=model.config)
    step(model, prompt, cache)
    cache.reorder_cache(PERMUTATION)
    outputs = [step(model, token[:, None], cache) for token in tokens.T]
    close(outputs[-1], alone(model, prompt[PERMUTATION], tokens))


def test_prompts_in_pieces_are_chosen_for_by_the_first():
    model = build()
    prompt = rows(length=9)
    cache = DynamicCache()
    step(model, prompt[:, :5], cache)
    kept = [k.selection.index for k in selections(cache)]
    step(model, prompt[:, 5:], cache)
    assert all(
        torch.equal(a, k.selection.index) for a, k in zip(kept, selections(cache), strict=True)
    )


def test_caches_that_were_filled_otherwise_are_refused():
    model = build()
    cache = DynamicCache()
    for layer in hw.attention_layers(model).values():
        layer.keep_selection = False
    step(model, rows(), cache)
    for layer in hw.attention_layers(model).values():
        layer.keep_selection = True
    with pytest.raises(ValueError, match="cache has 6 tokens in layer 0 and no selection of heads"):
        step(model, rows(length=1), cache)
    own = hw.GroupedQueryAttention(8, 2, gate=hw.FixedGate()).eval()
    held = hw.KeyValueCache()
    own(torch.randn(1, 3, 8), cache=held)
    own.keep_selection = True
    with pytest.raises(ValueError, match="cache has 3 tokens and no selection of heads"):
        own(torch.randn(1, 1, 8), cache=held)


def test_classes_of_transformers_stay_registered():
    model = build()
    cache = DynamicCache(config=model.config)
    step(model, rows(), cache)
    assert repr(cache.layers[0]) == repr(DynamicLayer())
    assert isinstance(cache.layers[0], DynamicLayer)
    assert type(DynamicCache(config=model.config).layers[0]) is DynamicLayer


def test_headwises_own_cache_moves_rows():
    torch.manual_seed(0)
    layer = hw.GroupedQueryAttention(
        EMBED, HEADS, GROUPS, gate=hw.GroupGate(TokenGate()), keep_selection=True
    ).eval()
    x = torch.randn(4, 6, EMBED)
    expected = []
    for row in x:
        cache = hw.KeyValueCache()
        layer(row[None, :5], cache=cache)
        expected.append(layer(row[None, 5:], cache=cache)[0])
    expected = torch.cat(expected)
    for order in (PERMUTATION, torch.tensor([3]), torch.tensor([0, 0, 2, 1, 1])):
        cache = hw.KeyValueCache()
        layer(x[:, :5], cache=cache)
        cache.select_rows(order)
        close(layer(x[order, 5:], cache=cache)[0], expected[order])
    cache = hw.KeyValueCache()
    layer(x[:, :5], cache=cache)
    layer(torch.randn(4, 3, EMBED), cache=cache)
    cache.crop(5)
    assert len(cache) == 5
    close(layer(x[:, 5:], cache=cache)[0], expected)
    cache.crop(0)
    assert len(cache) == 0 and cache.selection is None and cache.slots is None
    layer(x[:2, :5], cache=cache)
    close(layer(x[:2, 5:], cache=cache)[0], expected[:2])
    with pytest.raises(ValueError, match="length must not be negative, got -1"):
        cache.crop(-1)


def test_weights_of_the_gate_move_too():
    model = build()
    cache = DynamicCache()
    step(model, rows(), cache)
    before = [kept.selection.weight for kept in selections(cache)]
    cache.reorder_cache(PERMUTATION)
    for kept, weight in zip(selections(cache), before, strict=True):
        assert torch.equal(kept.selection.weight, weight[PERMUTATION])
    assert not isinstance(cache.layers[0], nn.Module)
