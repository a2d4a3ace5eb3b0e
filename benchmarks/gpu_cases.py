"""What gpu_check times beside the layer: attention alone, decoding, the gate with its work list.

Each case checks itself against the oracle in float64 before it is timed, and hands every row to
`emit` as soon as it stands.
"""

import contextlib
import math
import statistics

import headwise as hw
import oracle
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

ops = torch.ops.headwise


def largest_error(actual, expected):
    scale = expected.abs().max().clamp_min(1e-30)
    return ((actual.double() - expected).abs().max() / scale).item()


def first_line(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def replayed(run):
    """(the same work as a CUDA graph, None), or (None, why it cannot be captured)."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay, None
    except RuntimeError as error:
        torch.cuda.synchronize()
        return None, first_line(error)


class Timer:
    """Milliseconds of a call: CUDA events on a GPU, the clock elsewhere."""

    def __init__(self, device, repeats, clock):
        self.device, self.repeats, self.clock = device, repeats, clock

    def times(self, *runs):
        """Several runs are taken in turn, so that what one leaves in the cache does not help it."""
        for run in runs:
            run()
            run()
        times = []
        for n in range(max(self.repeats, len(runs))):
            run = runs[n % len(runs)]
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            else:
                begin = self.clock()
                run()
                times.append(1e3 * (self.clock() - begin))
        return times

    def __call__(self, *runs):
        return statistics.median(self.times(*runs))

    def replay(self, *runs):
        """The same of CUDA graphs; (milliseconds, None) or (of the launches, why)."""
        if self.device.type != "cuda":
            return self(*runs), "no CUDA graphs on this device"
        graphs = [replayed(run) for run in runs]
        reasons = [reason for _, reason in graphs if reason]
        if reasons:
            return self(*runs), reasons[0]
        return self(*(graph for graph, _ in graphs)), None


def selection(batch, heads, k, device):
    """k random heads for every sequence."""
    relevance = torch.rand(batch, heads, device=device)
    count = torch.full((batch,), k, dtype=torch.int32, device=device)
    return ops.select_heads(relevance, count), count


def attention_core(emit, shape, dtype, device, timer, tolerance, route):
    """k = H/2 of the heads, beside all heads by each of LibTorch's fused attentions."""
    batch, length, width, heads = shape
    d = width // heads
    q, k, v = (torch.randn(batch, heads, length, d, device=device).to(dtype) for _ in range(3))
    index, count = selection(batch, heads, heads // 2, device)
    for backend in ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
        if device.type != "cuda" and backend != "default":
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
    few = slice(0, min(2, batch))
    expected = oracle.attention(q[few].double(), k[few].double(), v[few].double())
    expected = expected * ops.selection_mask(index, count, torch.float64)[few, :, None, None]
    for way in ("kernels", "flash"):
        with route(way):
            error = largest_error(ops.selected_attention(q, k, v, index, count)[few], expected)
            emit({"check": str(dtype)[6:], "variant": way, "forward_error": error,
                  "passed": error <= tolerance})  # fmt: skip
            if error <= tolerance:
                ms = timer(lambda: ops.selected_attention(q, k, v, index, count))
                emit({"variant": way, "median_ms": ms})


def copy_bandwidth(device, timer, size=1 << 30):
    """Bytes a second of a large copy, bytes read plus bytes written."""
    size = size if device.type == "cuda" else 1 << 22
    a = torch.empty(size, dtype=torch.uint8, device=device).random_()
    b = torch.empty_like(a)
    return 2 * size / (timer(lambda: b.copy_(a)) * 1e-3)


def decoding(emit, batch, keys, dtype, device, timer, tolerance, sizes=(32, 8, 128)):
    """Half of 32 query heads on 8 groups; the bytes of the groups that some chosen head reads."""
    heads, groups, d = sizes
    element = torch.empty(0, dtype=dtype).element_size()
    one_set = 2 * batch * groups * keys * d * element
    # Several caches in turn, so that none is still in the L2 of the device.
    sets = max(1, min(16, math.ceil(4e8 / one_set))) if device.type == "cuda" else 1
    inputs = []
    for _ in range(sets):
        q = torch.randn(batch, heads, 1, d, device=device).to(dtype)
        k = torch.randn(batch, groups, keys, d, device=device, dtype=dtype)
        v = torch.randn(batch, groups, keys, d, device=device, dtype=dtype)
        inputs.append((q, k, v, *selection(batch, heads, heads // 2, device)))
    q, k, v, index, count = inputs[0]
    few = slice(0, min(2, batch))
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


def gate(emit, dtype, device, timer, batch=64, heads=16, width=1024, length=128):
    """The budget gate of an evaluated layer with its work list, by a graph's replay."""
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
        if device.type == "cuda":
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
        attend = torch.compile(flex_attention, dynamic=False)

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
    except Exception as error:  # noqa: BLE001  (a comparison only: said, not raised)
        return None, first_line(error)
