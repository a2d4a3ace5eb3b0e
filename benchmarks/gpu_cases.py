"""What gpu_check times beside the layer: attention alone, decoding, the gate with its work list.

Each case checks itself against the oracle in float64 before it is timed, and passes every row to
`emit` as soon as it is measured.
"""

import contextlib
import math

import headwise as hw
import torch
from gpu_machine import checked_part, first_line
from support import oracle
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

ops = torch.ops.headwise


def largest_error(actual, expected):
    scale = expected.abs().max().clamp_min(1e-30)
    return ((actual.double() - expected).abs().max() / scale).item()


def ends(batch):
    """The first and the last sequence: an index that outgrew 32 bits would show in the last."""
    return sorted({0, batch - 1})


def selection(batch, heads, k, device):
    """k random heads for every sequence."""
    relevance = torch.rand(batch, heads, device=device)
    count = torch.full((batch,), k, dtype=torch.int32, device=device)
    return ops.select_heads(relevance, count), count


def attention_core(emit, shape, dtype, timer, tolerance, route):
    """k = H/2 of the heads, beside all heads by each of LibTorch's fused attentions."""
    batch, length, width, heads = shape
    d, device = width // heads, timer.machine.device
    q, k, v = (torch.randn(batch, heads, length, d, device=device).to(dtype) for _ in range(3))
    index, count = selection(batch, heads, heads // 2, device)
    for backend in ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
        if timer.machine.rehearsal and backend != "default":
            continue
        kernels = contextlib.nullcontext()
        if backend != "default":
            kernels = sdpa_kernel(getattr(SDPBackend, backend))
        try:
            with kernels:
                ms = timer(lambda: scaled_dot_product_attention(q, k, v))
            emit({"variant": f"all heads, {backend}", "median_ms": ms})
        except RuntimeError as error:
            emit({"variant": f"all heads, {backend}", "note": first_line(error)})
    sequences, rows = checked_part(timer.machine, batch, heads, length)
    few = ends(batch)[-sequences:]
    # Of the rows before `rows`, so that the oracle fits; over all keys.
    expected = oracle.attention(q[few, :, :rows].double(), k[few].double(), v[few].double())
    expected = expected * ops.selection_mask(index, count, torch.float64)[few, :, None, None]
    for way in ("kernels", "flash"):
        with route(way):
            y = ops.selected_attention(q, k, v, index, count)[few, :, :rows]
            error = largest_error(y, expected)
            emit({"check": str(dtype)[6:], "variant": way, "forward_error": error,
                  "passed": error <= tolerance})  # fmt: skip
            if error <= tolerance:
                ms = timer(lambda: ops.selected_attention(q, k, v, index, count))
                emit({"variant": way, "median_ms": ms})


def copy_bandwidth(timer, size=1 << 30):
    """Bytes per second of a large copy, bytes read plus bytes written."""
    size = 1 << 16 if timer.machine.rehearsal else size
    a = torch.empty(size, dtype=torch.uint8, device=timer.machine.device).random_()
    b = torch.empty_like(a)
    return 2 * size / (timer(lambda: b.copy_(a)) * 1e-3)


def decoding(emit, batch, keys, dtype, timer, tolerance, sizes=(32, 8, 128)):
    """Half of 32 query heads on 8 groups; the bytes of the groups that some chosen head reads."""
    heads, groups, d = sizes
    device = timer.machine.device
    element = torch.empty(0, dtype=dtype).element_size()
    one_set = 2 * batch * groups * keys * d * element
    # Several caches in turn, so that none is still in the L2 of the device.
    sets = 2 if timer.machine.rehearsal else max(1, min(16, math.ceil(4e8 / one_set)))
    inputs = []
    for _ in range(sets):
        q = torch.randn(batch, heads, 1, d, device=device).to(dtype)
        k = torch.randn(batch, groups, keys, d, device=device, dtype=dtype)
        v = torch.randn(batch, groups, keys, d, device=device, dtype=dtype)
        inputs.append((q, k, v, *selection(batch, heads, heads // 2, device)))
    q, k, v, index, count = inputs[0]
    few = ends(batch)
    expected = oracle.attention(q[few].double(), k[few].double(), v[few].double())
    expected *= ops.selection_mask(index, count, torch.float64)[few, :, None, None]
    error = largest_error(ops.selected_attention(q, k, v, index, count)[few], expected)
    emit({"check": str(dtype)[6:], "forward_error": error, "passed": error <= tolerance})
    if not error <= tolerance:
        return
    chosen = torch.stack([ops.selection_mask(i, c, torch.bool) for *_, i, c in inputs])
    read = chosen.unflatten(2, (groups, heads // groups)).any(3).double().sum((1, 2)).mean().item()
    bytes_read = read * keys * 2 * d * element
    ms, note = timer.replay(*(lambda x=x: ops.selected_attention(*x) for x in inputs))
    emit({"variant": "kernels", "median_ms": ms, "bytes": bytes_read, "no_graph": note,
          "bytes_per_second": bytes_read / (ms * 1e-3)})  # fmt: skip


def gate(emit, dtype, timer, batch=64, heads=16, width=1024, length=128):
    """The budget gate of an evaluated layer with its work list, by a graph's replay."""
    device = timer.machine.device
    x = torch.randn(batch, length, width, device=device).to(dtype)
    module = hw.BudgetGate(embed_dim=width, num_heads=heads, device=device, dtype=dtype).eval()
    module.requires_grad_(False)
    module.relevance.weight.normal_()
    module.budget_out.weight.normal_()
    index, count, weight, relevance, budget = module(x)
    means = x.double().mean(1)  # [B, D]; the running statistics are those of a new gate
    features = (means - module.feature_mean) / (module.feature_variance.double() + 1e-4).sqrt()
    expected = linear(features, module.relevance.weight.double()) / math.sqrt(width)
    error = largest_error(relevance, expected + module.base.double())
    picked = ops.select_heads(relevance, (budget * heads + 0.5).floor().int())
    passed = error < 2e-2 and torch.equal(index, picked)
    emit({"check": str(dtype)[6:], "forward_error": error, "passed": passed})

    def both():
        index, count, *_ = module(x)
        ops._work_list(index, count, heads)

    if passed:
        with torch.no_grad():
            for variant, run in (("gate and work list", both), ("gate", lambda: module(x))):
                ms, note = timer.replay(run)
                emit({"variant": variant, "median_ms": ms, "no_graph": note})


def flex_layer(layer, k):
    """All heads projected, FlexAttention with a mask of heads; None and the reason if it fails."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        batch, length, _, heads = layer.shape
        # Uncompiled in a rehearsal: compiling would take longer than all the rest.
        attend = torch.compile(flex_attention, dynamic=False)
        if layer.device.type == "cpu":
            attend = flex_attention

        def run(_):
            mask = layer.select(k)[2] != 0  # [B, H]
            blocks = create_block_mask(
                lambda b, h, i, j: mask[b, h], batch, heads, length, length, device=layer.device
            )
            qkv = linear(layer.x, layer.in_weight, layer.in_bias)
            q, key, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, 2))
            context = attend(q, key, v, block_mask=blocks).transpose(1, 2).flatten(2)
            return linear(context, layer.out_weight, layer.out_bias)

        with torch.no_grad():
            run(k)
        return run, None
    except Exception as error:  # noqa: BLE001  (a comparison only: reported, not raised)
        return None, first_line(error)
