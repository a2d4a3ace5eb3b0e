"""ThresholdGate (hybrid dynamic pruning), against plain Python."""

import math

import headwise as hw
import pytest
import torch
from support import oracle

ops = torch.ops.headwise


def reference(q, k, padding, causal, resolution, block):
    """Block sums of |I_q I_k^T| and how many visible scores each has, number by number."""
    batch, heads, rows, _ = q.shape
    columns = k.shape[2]
    shape = (batch, heads, -(-rows // block), -(-columns // block))
    sums, seen = torch.zeros(shape), torch.zeros(shape)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                for j in range(columns):
                    hidden = padding is not None and (bool(padding[b, j]) or bool(padding[b, i]))
                    if hidden or (causal and j > i):
                        continue
                    product = 0.0
                    for x, y in zip(q[b, h, i].tolist(), k[b, h, j].tolist(), strict=True):
                        product += math.trunc(resolution * x) * math.trunc(resolution * y)
                    sums[b, h, i // block, j // block] += abs(product)
                    seen[b, h, i // block, j // block] += 1
    return sums, seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "block", "resolution"), [(4, 2, 1.0), (5, 2, 3.0), (7, 3, 1.0)])
def test_importance_against_plain_python(causal, length, block, resolution):
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 3, length, 4).mul(2).unbind(0)
    padding = torch.arange(length) >= torch.tensor([[length], [length - 2]])
    mask = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    sums, seen = reference(q, k, padding, causal, resolution, block)
    for normalize in (False, True):
        blocks, visible, head = ops.integer_importance(
            q, k, padding, padding, mask, False, resolution, block, normalize
        )
        torch.testing.assert_close(blocks, sums)
        torch.testing.assert_close(visible, seen)
        total = sums.sum((2, 3))
        expected = total / seen.sum((2, 3)) if normalize else total
        torch.testing.assert_close(head, expected)


def test_length_normalised_importance_does_not_grow_with_length():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 6, 8).mul(2).unbind(0)
    for normalize, ratio in ((True, 1.0), (False, 16.0)):
        once = ops.integer_importance(q, k, normalize=normalize)[2]
        often = ops.integer_importance(
            q.repeat(1, 1, 4, 1), k.repeat(1, 1, 4, 1), normalize=normalize
        )[2]
        torch.testing.assert_close(often, ratio * once)


@pytest.mark.parametrize("ratio", [-0.5, 0.0, 0.3, 0.9])
def test_kept_blocks_against_plain_python(ratio):
    torch.manual_seed(0)
    blocks = torch.rand(1, 2, 4, 5)
    visible = (torch.rand(1, 2, 4, 5) > 0.3).float()
    kept = ops.kept_blocks(blocks, visible, ratio)
    for h in range(2):
        for row in range(4):
            pairs = zip(blocks[0, h, row].tolist(), visible[0, h, row].tolist(), strict=True)
            seen = [value for value, there in pairs if there]
            if not seen:
                assert not kept[0, h, row].any()
                continue
            mean = sum(seen) / len(seen)
            edge = max(seen) if ratio >= 0 else min(seen)
            limit = abs(ratio) * edge + (1 - abs(ratio)) * mean
            for column in range(5):
                there = bool(visible[0, h, row, column])
                stays = there and blocks[0, h, row, column].item() >= limit - 1e-7
                assert bool(kept[0, h, row, column]) == stays


def test_three_products_leave_out_the_fractions():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 3, 4, dtype=torch.float64).mul(3).unbind(0)
    for resolution in (1.0, 4.0):
        integer_q, integer_k = (q * resolution).trunc(), (k * resolution).trunc()
        fraction_q, fraction_k = q * resolution - integer_q, k * resolution - integer_k
        expected = (
            integer_q @ integer_k.mT + integer_q @ fraction_k.mT + fraction_q @ integer_k.mT
        ) / resolution**2
        torch.testing.assert_close(ops.three_product_scores(q, k, resolution), expected)
    exact = q @ k.mT
    coarse = (ops.three_product_scores(q, k, 1.0) - exact).abs().max()
    fine = (ops.three_product_scores(q, k, 64.0) - exact).abs().max()
    assert fine < coarse / 100


def test_hybrid_attention_without_pruning_is_attention():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64).unbind(0)
    padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    expected = ops.dense_attention(q, k, v, padding)
    torch.testing.assert_close(ops.hybrid_attention(q, k, v, padding), expected)


def layer(gate):
    torch.manual_seed(1)
    built = hw.MultiheadAttention(12, 3, batch_first=True, gate=gate).eval()
    with torch.no_grad():
        built.in_proj_weight.mul_(4.0)
    return built


def test_layer_equals_the_oracle_on_the_heads_it_chose():
    built = layer(hw.ThresholdGate(7.5))
    x = torch.randn(16, 5, 12)
    padding = torch.arange(5) >= torch.tensor([5, 4, 3, 5] * 4)[:, None]
    chosen = {}
    built.gate.register_forward_hook(lambda m, a, selection: chosen.update(s=selection))
    with torch.no_grad():
        y, _ = built(x, x, x, key_padding_mask=padding, need_weights=False)
    selection = chosen["s"]
    assert set(selection.count.tolist()) == {1, 2, 3}
    above = (selection.relevance > 7.5).sum(1).clamp(min=1)
    assert torch.equal(selection.count.long(), above)
    expected = oracle.self_attention(
        x,
        built.in_proj_weight,
        built.in_proj_bias,
        built.out_proj.weight,
        built.out_proj.bias,
        3,
        *selection[:3],
        key_padding_mask=padding,
    )
    torch.testing.assert_close(y[~padding], expected[~padding], atol=1e-5, rtol=1e-5)


def test_pruned_blocks_change_the_output_little_and_dropped_heads_nothing_else():
    x = torch.randn(4, 8, 12)
    with torch.no_grad():
        exact = layer(hw.ThresholdGate(0.0))(x, x, x, need_weights=False)[0]
        dense = layer(None)(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(exact, dense, atol=1e-5, rtol=1e-5)
        rough = layer(hw.ThresholdGate(0.0, block_ratio=-0.9))(x, x, x, need_weights=False)[0]
        near = layer(hw.ThresholdGate(0.0, approximate=True, resolution=32.0))(
            x, x, x, need_weights=False
        )[0]
    assert not torch.equal(rough, dense)
    assert (near - dense).abs().max() < 0.05


@pytest.mark.parametrize("execution", ["all", "selected"])
def test_weights_still_train_around_it(execution):
    built = layer(hw.ThresholdGate(7.5, execution=execution)).train()
    x = torch.randn(4, 5, 12)
    built(x, x, x, need_weights=False)[0].square().sum().backward()
    assert built.in_proj_weight.grad.isfinite().all() and built.in_proj_weight.grad.any()


@pytest.mark.parametrize("keep", [0.4, 0.75])
def test_calibration_finds_the_share(keep):
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(24, 6, 32, batch_first=True, dropout=0.0), 2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    model = hw.convert(model, hw.ThresholdGate())
    batches = [torch.randn(8, 6, 24) for _ in range(3)]
    threshold = hw.calibrate_threshold(model, batches, keep)
    assert threshold > 0
    ran = 0.0
    with torch.no_grad(), hw.trace(model.eval()) as trace:
        for x in batches:
            model(x)
    for calls in trace.history.values():
        ran += sum(selection.count.sum().item() for selection in calls) / (2 * 3 * 8 * 6)
    assert abs(ran - keep) < 0.06


def test_a_share_that_cannot_be_reached_names_the_nearest():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 12)
    built = layer(hw.ThresholdGate(0.5, min_heads=2))
    heads = built.num_heads
    run = {"forward_fn": lambda model, x: model(x, x, x, need_weights=False)}
    message = rf"keep=0.1 cannot be reached: the nearest share of heads is {2 / heads:.4f} \(thr"
    with pytest.raises(ValueError, match=message):
        hw.calibrate_threshold(built, [x], 0.1, **run)
    assert built.gate.threshold.item() == 0.5  # as it was
    assert hw.calibrate_threshold(built, [x], 0.1, tolerance=1.0, **run) > 0.5
    small = layer(hw.ThresholdGate(0.5, min_heads=0))
    with torch.no_grad():
        small.in_proj_weight.mul_(1e-3)
    with pytest.raises(ValueError, match="nearest share of heads is 0.0000 .* gates' resolution"):
        hw.calibrate_threshold(small, [x], 0.5, **run)

    def interrupted(model, x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hw.calibrate_threshold(built, [x], 0.9, forward_fn=interrupted)
    assert built.gate.threshold.item() > 0.5 and not built.gate._forward_hooks


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: hw.ThresholdGate(-1.0),
            ValueError,
            "threshold must be finite and not negative, got -1.0",
        ),
        (lambda: hw.ThresholdGate(block=0), ValueError, "block must be at least 1, got 0"),
        (
            lambda: hw.ThresholdGate(block_ratio=1.0),
            ValueError,
            "block_ratio must be in (-1, 1), got 1.0",
        ),
        (
            lambda: hw.ThresholdGate().bind(4, 2)(torch.randn(1, 2, 4)),
            RuntimeError,
            "ThresholdGate chooses by queries and keys: it works as the gate of a layer",
        ),
        (
            lambda: hw.calibrate_threshold(layer(hw.ThresholdGate()), [], 0.5),
            ValueError,
            "batches must not be empty",
        ),
    ],
)
def test_errors(build, error, message):
    with pytest.raises(error) as raised:
        build()
    assert str(raised.value) == message
