"""A cache after an error is the cache before the call."""

import headwise as hw
import pytest
import torch
from support.architectures import decoder_config

D, H, GROUPS = 24, 6, 3


def build(keep=True, **options):
    torch.manual_seed(0)
    gate = hw.GroupGate(hw.BudgetGate(budget=0.4))
    layer = hw.GroupedQueryAttention(D, H, GROUPS, gate=gate, keep_selection=keep, **options)
    return layer.eval()


def contents(cache):
    selection = cache.selection
    parts = (cache.k, cache.v, cache.slots, selection and selection.index)
    return [None if part is None else part.clone() for part in parts]


def same(cache, before):
    now = contents(cache)
    assert [part is None for part in now] == [part is None for part in before]
    return all(torch.equal(a, b) for a, b in zip(now, before, strict=True) if a is not None)


WRONG = {
    "padding as wide as the call": ({"key_padding_mask": torch.zeros(2, 2).bool()}, "columns"),
    "a mask of another width": ({"attn_mask": torch.zeros(2, 3)}, "must be broadcastable to"),
    "a mask of other heads": ({"attn_mask": torch.zeros(H + 1, 1, 1)}, "must be broadcastable to"),
    "padding of other queries": ({"query_padding_mask": torch.zeros(2, 7).bool()}, "query_padding"),
}


@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("case", WRONG)
def test_an_error_leaves_the_cache_as_it_was(case, filled):
    layer, cache = build(), hw.KeyValueCache()
    x = torch.randn(2, 7, D)
    with torch.no_grad():
        if filled:
            layer(x[:, :5], cache=cache)
        before, length = contents(cache), 2
        wrong, text = WRONG[case]
        if not filled and case == "padding as wide as the call":
            length = 3
        with pytest.raises(ValueError, match=text):
            layer(x[:, 5 - length : 5], cache=cache, **wrong)
        assert same(cache, before)
        # A cache that kept a choice without keys would give it to another sequence.
        y, _ = layer(x[:, 5:], cache=cache)
        sound = hw.KeyValueCache()
        if filled:
            layer(x[:, :5], cache=sound)
        torch.testing.assert_close(y, layer(x[:, 5:], cache=sound)[0])


@pytest.mark.parametrize("filled", [False, True])
def test_an_error_after_the_keys_were_appended_takes_them_out_again(filled, monkeypatch):
    layer, cache = build(), hw.KeyValueCache()
    x = torch.randn(2, 5, D)
    with torch.no_grad():
        if filled:
            layer(x, cache=cache)
        before = contents(cache)
        monkeypatch.setattr(layer, "_merge_chosen", lambda *call: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            layer(x[:, :1], cache=cache)
    assert same(cache, before)


def test_statistics_of_a_gate_are_not_moved_by_a_call_that_is_refused():
    layer = build(keep=False).train()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(ValueError, match="key_padding_mask must have 4 columns"):
        layer(torch.randn(2, 4, D), key_padding_mask=torch.zeros(2, 5).bool())
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_keys_and_values_that_do_not_fit():
    cache = hw.KeyValueCache()
    cache.update(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5))
    before = contents(cache)
    with pytest.raises(RuntimeError):
        cache.update(torch.randn(2, 3, 1, 5), torch.randn(2, 2, 1, 5))
    cache.slots = torch.zeros(1, 3, dtype=torch.long)
    before[2] = cache.slots.clone()
    with pytest.raises((RuntimeError, IndexError)):
        cache.select_rows(torch.tensor([1]))
    assert same(cache, before)


@pytest.mark.parametrize("cache", [3, "x", {}, torch.zeros(2)], ids=lambda c: type(c).__name__)
def test_what_is_no_cache_is_refused(cache):
    text = f"cache must be a headwise.KeyValueCache or None, got {type(cache).__name__}"
    with pytest.raises(TypeError, match=text):
        build()(torch.randn(2, 4, D), cache=cache)


def small_llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = decoder_config(num_hidden_layers=1)
    return hw.convert(transformers.LlamaForCausalLM(config).eval()), transformers


@pytest.mark.parametrize("cache", [3, (1, 2)], ids=lambda c: type(c).__name__)
def test_what_is_no_cache_of_transformers_is_refused(cache):
    model, _ = small_llama()
    (layer,) = hw.attention_layers(model).values()
    angles = (torch.ones(1, 4, 4), torch.zeros(1, 4, 4))
    text = f"cache must be a cache of transformers or None, got {type(cache).__name__}"
    with pytest.raises(TypeError, match=text):
        layer(torch.randn(2, 4, 32), angles, None, cache)


@pytest.mark.parametrize("kind", ["DynamicCache", "StaticCache"])
def test_a_wrong_mask_leaves_a_cache_of_transformers_as_it_was(kind):
    model, transformers = small_llama()
    (layer,) = hw.attention_layers(model).values()
    static = kind == "StaticCache"
    cache = transformers.StaticCache(model.config, max_cache_len=9) if static else None
    cache = cache or transformers.DynamicCache()
    x, angles = torch.randn(2, 4, 32), (torch.ones(1, 4, 4), torch.zeros(1, 4, 4))
    with torch.no_grad():
        layer(x, angles, None, cache)
        keys, held = cache.layers[0].keys.clone(), int(cache.get_seq_length())
        for wrong in (torch.ones(2, 6).bool(), torch.ones(2, 1, 4, 6).bool()):
            with pytest.raises(ValueError, match="mask must have . columns"):
                layer(x, angles, wrong, cache)
            assert int(cache.get_seq_length()) == held == 4
            assert torch.equal(cache.layers[0].keys, keys)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_whole_groups_behind_a_cache_are_those_of_a_pruned_layer(length, padded, masked):
    """Every sequence runs all heads of its slots: the attention of all heads, of fewer groups."""
    layer = build()
    layer.set_gate(hw.GroupGate(hw.FixedGate([1])))
    entry = hw.pruning.LayerPlan("", H, [2, 3], [1.0, 1.0])
    small = hw.prune(layer, hw.HeadPlan([entry]))
    x = torch.randn(2, 5 + length, D)
    padding = torch.zeros(2, 5 + length).bool()
    padding[1, :2] = padded
    mask = torch.randn(2, H, length, 5 + length) if masked else None
    outputs = []
    for own, heads in ((layer, slice(None)), (small, slice(2, 4))):
        cache = hw.KeyValueCache()
        with torch.no_grad():
            own(x[:, :5], cache=cache, key_padding_mask=padding[:, :5] if padded else None)
            y, _ = own(
                x[:, 5:],
                cache=cache,
                key_padding_mask=padding if padded else None,
                attn_mask=None if mask is None else mask[:, heads],
            )
        assert cache.k.shape == (2, 1, 5 + length, D // H)
        outputs.append(y)
    torch.testing.assert_close(*outputs)
