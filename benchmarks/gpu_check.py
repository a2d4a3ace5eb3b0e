"""Checks headwise on a CUDA device against the oracle in float64, then times it.

    python benchmarks/gpu_check.py                      # writes results/gpu_<device>.json
    python benchmarks/gpu_check.py --device cpu --tiny  # small shapes, without a GPU

A layer that runs k of H heads, its gate included, is timed beside the dense layer that has only k
heads, beside the full dense layer, beside computing all heads and multiplying by a mask, and beside
FlexAttention with a mask of heads; then attention alone, decoding, and the gate (gpu_cases.py).
Nothing is timed that has not passed its check; a failed check ends with exit status 1. The goals of
each number stand beside it. Under --seconds the cases that are left are named and not run.
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
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_cases  # noqa: E402
import oracle  # noqa: E402
from gpu_cases import largest_error, replayed  # noqa: E402

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
    """Weights of a dense layer of H heads, a gate, and an input."""

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
        self.gate_weight = rand(H, D).detach()
        self.gates = {}

    def leaves(self):
        return [self.x, self.in_weight, self.in_bias, self.out_weight, self.out_bias]

    def select(self, k):
        """A budget gate in evaluation that gives every sequence its k most relevant heads."""
        D, H = self.shape[2:]
        if k not in self.gates:
            gate = hw.BudgetGate(
                budget=k / H, embed_dim=D, num_heads=H, device=self.device, dtype=self.dtype
            )
            gate.relevance.weight.data.copy_(self.gate_weight)
            self.gates[k] = gate.eval().requires_grad_(False)
        index, count, weight = self.gates[k](self.x.detach())[:3]
        # The budget is fixed, so k columns hold the selection, and memory is that of k heads.
        return index[:, :k], count, weight

    def headwise(self, k):
        return ops.selected_self_attention(*self.leaves(), self.shape[3], *self.select(k))

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


def check(shape, k, dtype, device):
    """Errors of output and gradients on two sequences: no sequence depends on another."""
    # Products in float32 and float64 run without tensor cores: shorter sequences show as much.
    length = shape[1] if dtype.itemsize == 2 else min(shape[1], 300)
    layer = Layer((min(2, shape[0]), length, *shape[2:]), dtype, device)
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
    "flex": "FlexAttention with a head mask",
}


def goals_of(shape, k, what, medians, peaks):
    """The rows that say which goals this layer reached."""
    H, rows = shape[3], []
    case = f"layer {shape}, k={k}"
    # Graph replays on both sides where both could be captured, else launches on both.
    route = "graph" if {("headwise", "graph"), ("dense", "graph")} <= medians.keys() else "events"
    ours = medians["headwise", route]

    def add(name, ratio, goal, lower_is_better=True):
        rows.append(gpu_cases.row(case, name, ours, ratio, goal, lower_is_better, timed_by=route))

    limit = 1.15 if what == "training" else (1.05 if k == H else 1.10)
    add(f"{what} over the dense layer of k heads", ours / medians["dense", route], limit)
    if peaks:
        add(f"{what}: peak memory over that layer's", peaks["headwise"] / peaks["dense"], 1.05)
    if what == "forward" and k == H // 2:
        for name in ("masked", "flex"):
            if (name, "events") in medians:
                faster = medians[name, "events"] / medians["headwise", "events"]
                add(f"times faster than {VARIANTS[name]}", faster, 1.5, False)
    return rows


def time_layer(shape, k, dtype, device, repeats):
    rows, goals = [], []
    for what, build in (("forward", forward_of), ("training", training_of)):
        layer = Layer(shape, dtype, device)
        medians, peaks = {}, {}
        for variant in VARIANTS:
            if variant == "flex":
                if device.type != "cuda" or what != "forward" or k != shape[3] // 2:
                    continue
                layer.flex, reason = gpu_cases.flex_layer(layer, k)
                if reason:
                    print(f"not compared with FlexAttention: {reason}", flush=True)
                    continue
            run = build(layer, variant, k)
            routes = {"events": run}
            note = None
            if device.type == "cuda" and variant in ("headwise", "dense"):
                graph, note = replayed(run)
                if graph:
                    routes["graph"] = graph
            if device.type == "cuda":
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
                run()
                # What the weights and the input take is the same for both.
                peaks[variant] = torch.cuda.max_memory_allocated(device) - before
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
                    row["peak_bytes"] = peaks[variant]
                rows.append(row)
        goals += goals_of(shape, k, what, medians, peaks)
        for row in rows:
            if row["what"] != what:
                continue
            route = row["timed_by"]
            # A variant that cannot be captured is held against the dense layer's own launches.
            dense = medians.get(("dense", route), medians["dense", "events"])
            row["ratio_to_dense"] = row["median_ms"] / dense
    return rows, goals


def other_cases(options, dtype, device, repeats, left):
    """Attention alone, decoding and the gate: rows, and the names of what was left out."""
    timer = gpu_cases.Timer(device, repeats, time.perf_counter)
    tolerance = TOLERANCE[dtype][0]
    shapes = TINY if options.tiny else SHAPES
    cases = [(f"attention alone {s}", lambda s=s: gpu_cases.attention_core(
        s, dtype, device, timer, tolerance)) for s in shapes]  # fmt: skip
    bandwidth = gpu_cases.copy_bandwidth(device, timer)
    print(f"copy bandwidth {bandwidth / 1e9:.0f} GB/s", flush=True)
    caches = [(1, 40), (2, 33)] if options.tiny else [
        (b, s) for b in (1, 16, 64) for s in (4096, 32768)]  # fmt: skip
    sizes = (8, 2, 16) if options.tiny else (32, 8, 128)
    cases += [(f"decode B={b}, {s} keys", lambda b=b, s=s: gpu_cases.decoding(
        b, s, dtype, device, timer, tolerance, bandwidth, sizes)) for b, s in caches]  # fmt: skip
    small = {"batch": 4, "heads": 4, "width": 16, "length": 5} if options.tiny else {}
    cases.append(("gate", lambda: gpu_cases.gate(dtype, device, timer, **small)))
    rows, left_out = [], []
    for name, run in cases:
        if left() <= 0:
            left_out.append(name)
            continue
        rows += run()
    return rows, left_out, bandwidth


def print_goal(row):
    if "failed" in row:
        print(f"FAILED {row['case']}: {row['failed']}", file=sys.stderr, flush=True)
        return
    note = f"  ({row['note']})" if row.get("note") else ""
    print(
        f"{row['case']:48} {row['what']:44} {row['ratio']:7.2f}  goal {row['goal_is']} "
        f"{row['goal']:<5} {'reached' if row['reached'] else 'MISSED'}{note}",
        flush=True,
    )


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
        "--seconds", type=float, default=330.0, help="starts no new case after this many"
    )
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
    checks, timings, goals, left_out = [], [], [], []
    begin = time.perf_counter()

    def left():
        return options.seconds - (time.perf_counter() - begin)

    rows, skipped, bandwidth = other_cases(options, dtype, device, repeats, left)
    goals += rows
    left_out += skipped
    for row in rows:
        print_goal(row)
    for shape in shapes:
        H = shape[3]
        for k in sorted({H // 4, H // 2, 3 * H // 4, H}):
            if left() <= 0:
                left_out.append(f"layer {shape}, k={k}")
                continue
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
            rows, reached = time_layer(shape, k, dtype, device, repeats)
            timings += rows
            goals += reached
            for row in reached:
                print_goal(row)
    for name in left_out:
        print(f"not run, no time left: {name}")
    checks += [{"case": row["case"], "passed": "failed" not in row} for row in goals
               if "failed" in row or "error" in row]  # fmt: skip
    passed = all(c["passed"] for c in checks)
    report = {
        "environment": environment(device), "dtype": options.dtype, "tiny": options.tiny,
        "passed": passed, "checks": checks, "timings": timings, "goals": goals,
        "left_out": left_out, "copy_bytes_per_second": bandwidth,
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
