"""Vision transformers of timm: converted, masked, pruned, saved, gated, scored and repaired."""

import copy

import headwise as hw
import pytest
import torch
from support.architectures import HEADS
from support.families import randomised
from support.structures import make_plan

timm = pytest.importorskip("timm")

from timm.layers import Attention, AttentionRope, LayerNorm  # noqa: E402
from timm.models.beit import Beit  # noqa: E402
from timm.models.eva import Eva, EvaAttention  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

EMBED = 32  # two-dimensional rotary embeddings need heads of a multiple of four

SIZES = {
    "img_size": 8,
    "patch_size": 2,
    "embed_dim": EMBED,
    "depth": 2,
    "num_heads": HEADS,
    "num_classes": 5,
}


def eva(**options):
    return Eva(**SIZES, mlp_ratio=1, use_rot_pos_emb=True, **options)


def not_fused(model):
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return model


MODELS = {
    "ViT, DeiT": lambda: VisionTransformer(**SIZES, mlp_ratio=1),
    "norms, no biases": lambda: VisionTransformer(
        **SIZES, mlp_ratio=1, qk_norm=True, qkv_bias=False
    ),
    "not fused": lambda: not_fused(VisionTransformer(**SIZES, mlp_ratio=1)),
    "EVA": eva,
    "three projections": lambda: eva(qkv_fused=False),
    "halves, norms": lambda: eva(rope_rotate_half=True, qk_norm=True, num_reg_tokens=2),
    "plain rotary": lambda: eva(attn_type="rope"),
    "BEiT": lambda: Beit(**SIZES, mlp_ratio=1, use_rel_pos_bias=True),
    "BEiT, one bias": lambda: Beit(**SIZES, mlp_ratio=1, use_shared_rel_pos_bias=True),
}


def build(name):
    torch.manual_seed(0)
    model = randomised(MODELS[name]())
    with torch.no_grad():  # tables begin with zeros
        for key, parameter in model.named_parameters():
            if "bias_table" in key:
                parameter.normal_()
    return model


def images():
    torch.manual_seed(1)
    return torch.randn(3, 3, 8, 8)


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_every_head(name):
    original, x = build(name), images()
    expected = original(x)
    expected.square().mean().backward()
    model = hw.convert(copy.deepcopy(original), hw.FixedGate())
    layers = hw.attention_layers(model)
    assert len(layers) == 2
    output = model(x)
    close(output, expected)
    model.zero_grad()
    output.square().mean().backward()
    wanted = dict(original.named_parameters())
    shared = [(key, p) for key, p in model.named_parameters() if key in wanted]
    assert len(shared) > len(wanted) // 2
    for key, parameter in shared:
        if wanted[key].grad is not None:
            close(parameter.grad, wanted[key].grad)
    with torch.no_grad():
        close(hw.convert(copy.deepcopy(original))(x), expected)
        full = model(x)
        for layer in layers.values():
            for head in range(HEADS):
                layer.gate.scale[head] = 0.0
                assert (model(x) - full).abs().max() > 1e-5 * full.abs().max()
                layer.gate.scale[head] = 1.0


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kept", [[[0, 2], [3]], [[], [1, 2, 3]]], ids=str)
def test_pruned_equals_masked_and_is_saved(name, kept, tmp_path):
    original, x = build(name), images()
    model = hw.convert(copy.deepcopy(original))
    plan = make_plan(model, kept)
    small, masked = hw.prune(model, plan), hw.mask(copy.deepcopy(model), plan)
    with torch.no_grad():
        close(small(x), masked(x))
        hw.save(small, tmp_path / "m")
        torch.testing.assert_close(hw.load(tmp_path / "m", model=original)(x), small(x))


@pytest.mark.parametrize("name", ["ViT, DeiT", "EVA", "BEiT"])
def test_gates_scores_traces_and_repair(name):
    model, x = hw.convert(build(name)), images()
    scores = hw.score_heads(
        model, [x], lambda own, batch: own(batch).square().mean(), ["michel", "entropy"]
    )
    small = hw.prune(model, hw.plan(scores["michel"], keep=0.5), repair=[x])
    assert all(bool(p.isfinite().all()) for p in small.parameters())
    hw.convert(model, hw.BudgetGate(keep=0.5)).train()
    (model(x).square().mean() + hw.penalty(model)).backward()
    model.eval()
    with hw.trace(model) as trace, torch.no_grad():
        model(x)
    assert set(trace.layers) == set(hw.attention_layers(model))


@pytest.mark.parametrize("kind", [Attention, AttentionRope, EvaAttention])
def test_masks_and_arguments(kind):
    torch.manual_seed(0)
    more = {} if kind is Attention else {"num_prefix_tokens": 1}
    more |= {"scale_norm": False} if kind is EvaAttention else {}
    original = randomised(kind(EMBED, HEADS, qkv_bias=True, **more))
    layer = hw.convert(torch.nn.Sequential(copy.deepcopy(original)))[0]
    x, mask = torch.randn(2, 5, EMBED), torch.rand(2, 1, 5, 5) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    for own in (mask, torch.randn(5, 5)):
        close(layer(x, attn_mask=own), original(x, attn_mask=own))
    close(layer(x, is_causal=True), original(x, is_causal=True))
    with pytest.raises(ValueError, match="attn_mask must be None with is_causal=True"):
        layer(x, attn_mask=mask, is_causal=True)
    with pytest.raises(TypeError, match="takes x and .*attn_mask, is_causal, got 0 more by posi"):
        layer(x, memory=x)
    if kind is not Attention:
        with pytest.raises(ValueError, match=r"rope must have 2 dimensions, .*\[4, 4, 16\]"):
            layer(x, rope=torch.zeros(4, 4, 16))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"gated": True}, "gates of its own"),
        ({"scale_norm": True, "norm_layer": LayerNorm}, "normalises the outputs of all heads"),
        ({"dim_out": 12}, "not of one width"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_cannot_be_converted_says_why(options, why):
    with pytest.raises(ValueError, match=why):
        hw.convert(torch.nn.Sequential(Attention(EMBED, HEADS, **options)))
