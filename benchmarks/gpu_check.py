"""Checks headwise on a CUDA device against the oracle in float64, then times it.

    python benchmarks/gpu_check.py                      # writes results/gpu_<device>.json
    python benchmarks/gpu_check.py --device cpu --tiny  # small shapes, without a GPU

A layer that runs k of H heads, its gate included, is timed beside the dense layer that has only k
heads, beside the full dense layer, and beside computing all heads and multiplying by a mask.
Nothing is timed that has not passed its check; a failed check ends with exit status 1.
"""

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import headwise as hw
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "python"))
import oracle  # noqa: E402

ops = torch.ops.headwise
# B sequences, L tokens, D model width, H heads
SHAPES = [(32, 512, 1024, 16), (16, 2048, 1024, 16), (8, 4096, 2048, 16), (64, 197, 768, 12)]
TINY = [(2, 9, 16, 4), (3, 5, 12, 4)]
# Largest error over the largest value of the float64 reference, forward and gradients.
TOLERANCE = {
    torch.float64: (1e-11, 1e-10),
    torch.float32: (2e-5, 1e-4),
    torch.bfloat16: (2e-2, 5e-2),
    torch.float16: (4e-3, 1e-2),
}


class Layer:
    """Weights of a dense layer of H heads, a linear gate, and an input."""

    def __init__(self, shape, dtype, device):
        self.shape, self.dtype, self.device = shape, dtype, device
        B, L, D, H = shape
        generator = torch.Generator().manual_seed(sum(shape))

        def rand(*size, scale=1.0):
            values = torch.randn(*size, generator=generator) * scale
            return values.to(device, dtype).requires_grad_()

        self.x = rand(B, L, D)  # [B, L, D]
        self.in_weight = rand(3 * D, D, scale=1 / math.sqrt(D))
        self.in_bias = rand(3 * D, scale=0.1)
        self.out_weight = rand(D, D, scale=1 / math.sqrt(D))
        self.out_bias = rand(D, scale=0.1)
        self.gate_weight = rand(H, D)

    def leaves(self):
        return [self.x, self.in_weight, self.in_bias, self.out_weight, self.out_bias]

    def select(self, k):
        """The gate: mean over tokens, linear relevance, the k most relevant heads at weight 1."""
        relevance = linear(ops.masked_mean(self.x), self.gate_weight)  # [B, H]
        count = torch.full((self.shape[0],), k, dtype=torch.int32, device=self.device)
        index = ops.select_heads(relevance.detach(), count)
        return index, count, ops.selection_mask(index, count, self.dtype)

    def headwise(self, k):
        index, count, weight = self.select(k)
        return ops.selected_self_attention(*self.leaves(), self.shape[3], index, count, weight)

    def attend(self, qkv, heads, mask=None):
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
        context = scaled_dot_product_attention(q, k, v)  # [B, heads, L, d]
        if mask is not None:
            context = context * mask[:, :, None, None]
        return context.transpose(1, 2).flatten(2)

    def dense(self, k):
        """The layer that physically has k heads, with weights of its own."""
        D, H = self.shape[2:]
        e = D // H * k
        if getattr(self, "small_heads", None) != k:
            rows = [self.in_weight.detach()[i * D : i * D + e] for i in range(3)]
            self.small = [torch.cat(rows), self.in_bias.detach()[: 3 * e].clone()]
            self.small += [self.out_weight.detach()[:, :e].contiguous()]
            self.small = [t.requires_grad_() for t in self.small]
            self.small_heads = k
        weight, bias, out = self.small
        return linear(self.attend(linear(self.x, weight, bias), k), out, self.out_bias)

    def full(self, k):
        qkv = linear(self.x, self.in_weight, self.in_bias)
        return linear(self.attend(qkv, self.shape[3]), self.out_weight, self.out_bias)

    def masked(self, k):
        """All heads, then a mask: what a gate costs where nothing is skipped."""
        qkv = linear(self.x, self.in_weight, self.in_bias)
        context = self.attend(qkv, self.shape[3], self.select(k)[2])
        return linear(context, self.out_weight, self.out_bias)


def largest_error(actual, expected):
    scale = expected.abs().max().clamp_min(1e-30)
    return ((actual.double() - expected).abs().max() / scale).item()


def check(shape, k, dtype, device):
    """Errors of output and gradients on two sequences: no sequence depends on another."""
    layer = Layer((min(2, shape[0]), *shape[1:]), dtype, device)
    H = shape[3]
    selection = [t.detach() for t in layer.select(k)]
    y = ops.selected_self_attention(*layer.leaves(), H, *selection)
    upstream = torch.randn(y.shape, device=device, dtype=dtype)
    gradients = torch.autograd.grad(y, layer.leaves(), upstream)
    doubles = [t.detach().double().requires_grad_() for t in layer.leaves()]
    expected = oracle.self_attention(*doubles, H, *selection[:2], selection[2].double())
    wanted = torch.autograd.grad(expected, doubles, upstream.double())
    backward = max(largest_error(a, b) for a, b in zip(gradients, wanted, strict=True))
    forward = largest_error(y, expected)
    passed = forward <= TOLERANCE[dtype][0] and backward <= TOLERANCE[dtype][1]
    return {"forward_error": forward, "gradient_error": backward, "passed": passed}


def measure(run, device, repeats):
    """Milliseconds, one number a run: CUDA events on a GPU, the clock elsewhere."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
    return times


def replayed(run):
    """The same work as a CUDA graph, or the sentence that says why it cannot be captured."""
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
        return None, str(error).splitlines()[0]


def forward_of(layer, variant, k):
    operator = getattr(layer, variant)

    def run():
        with torch.no_grad():
            return operator(k)

    return run


def training_of(layer, variant, k):
    """Forward and the gradients of the input and of all weights."""
    operator = getattr(layer, variant)

    def run():
        y = operator(k)
        weights = layer.small if variant == "dense" else layer.leaves()[1:4]
        return torch.autograd.grad(y.sum(), [layer.x, *weights, layer.out_bias])

    return run


VARIANTS = {
    "headwise": "k heads chosen by the input",
    "dense": "a dense layer of k heads",
    "masked": "all heads, then a mask",
    "full": "a dense layer of all heads",
}


def time_layer(shape, k, dtype, device, repeats):
    rows = []
    for what, build in (("forward", forward_of), ("training", training_of)):
        layer = Layer(shape, dtype, device)
        medians = {}
        for variant in VARIANTS:
            run = build(layer, variant, k)
            routes = {"events": run}
            note = None
            if device.type == "cuda" and what == "forward":
                graph, note = replayed(run)
                if graph:
                    routes["graph"] = graph
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            for route, call in routes.items():
                times = measure(call, device, repeats)
                medians[variant, route] = statistics.median(times)
                row = {
                    "shape": list(shape), "heads_run": k, "what": what, "variant": variant,
                    "timed_by": route, "median_ms": medians[variant, route],
                    "fastest_ms": min(times), "slowest_ms": max(times), "repeats": repeats,
                }  # fmt: skip
                if note and variant == "headwise":
                    row["no_graph"] = note
                if device.type == "cuda":
                    row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
                rows.append(row)
        for row in rows:
            if row["what"] != what:
                continue
            route = row["timed_by"]
            # A variant that cannot be captured is held against the dense layer's own launches.
            row["ratio_to_dense"] = row["median_ms"] / medians["dense", route]
    return rows


def environment(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "headwise": hw.__version__,
        "backends": [
            {"name": b.name, "device": b.device, "available": b.available, "reason": b.reason}
            for b in hw.backends()
        ],
    }


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes: tries the code, not speed"
    )
    parser.add_argument("--repeats", type=int, default=30, help="timed runs of each")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16, float32 or float64")
    parser.add_argument(
        "--json", type=Path, help="where to write; default: results/gpu_<device>.json"
    )
    return parser.parse_args()


def main():
    options = arguments()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device; try --device cpu --tiny", file=sys.stderr)
        return 2
    dtype = getattr(torch, options.dtype, None)
    if dtype not in TOLERANCE:
        print(
            f"gpu_check: --dtype must be one of {[str(d)[6:] for d in TOLERANCE]}", file=sys.stderr
        )
        return 2
    shapes = TINY if options.tiny else SHAPES
    repeats = min(options.repeats, 3) if options.tiny else options.repeats
    checks, timings = [], []
    for shape in shapes:
        H = shape[3]
        for k in sorted({H // 4, H // 2, 3 * H // 4, H}):
            case = {"shape": list(shape), "heads_run": k}
            for checked in dict.fromkeys((torch.float64, torch.float32, dtype)):
                torch.manual_seed(0)
                result = check(shape, k, checked, device)
                checks.append(
                    {"shape": list(shape), "heads_run": k, "dtype": str(checked)[6:], **result}
                )
                if not result["passed"]:
                    print(f"FAILED {checks[-1]}", file=sys.stderr)
            if not all(c["passed"] for c in checks if c.items() >= case.items()):
                continue
            rows = time_layer(shape, k, dtype, device, repeats)
            timings += rows
            for row in rows:
                print(
                    f"{shape!s:24} k={k:<3} {row['what']:8} {VARIANTS[row['variant']]:28} "
                    f"{row['timed_by']:6} {row['median_ms']:9.3f} ms  "
                    f"{row['ratio_to_dense']:5.2f} of dense k heads",
                    flush=True,
                )
    passed = all(c["passed"] for c in checks)
    report = {
        "environment": environment(device), "dtype": options.dtype, "tiny": options.tiny,
        "passed": passed, "checks": checks, "timings": timings,
    }  # fmt: skip
    name = report["environment"]["device"].lower().replace(" ", "_")
    path = options.json or ROOT / "benchmarks" / "results" / f"gpu_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    beside.replace(path)
    print(f"{'passed' if passed else 'FAILED'}: {len(checks)} checks; written to {path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
