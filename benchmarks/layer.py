"""What a layer costs that runs k of H heads, chosen at random for every sequence.

The yardstick is the dense layer that physically has k heads (linear, scaled_dot_product_attention,
linear). Beside it: the dense layer of all heads, and masking after computing all heads. Contenders
are checked against each other, then timed in turn, round after round, so that a busy machine slows
them alike; medians and quartiles are printed. ``--clock cpu`` counts processor time instead of wall
time, for machines that others use.

    python benchmarks/layer.py --shapes 8,128,768,12 --dtypes float32 --modes forward train
"""

import argparse
import json
import platform
import statistics
import time

import headwise  # noqa: F401
import torch
import torch.nn.functional as F

SHAPES = [
    (16, 128, 384, 12),
    (8, 128, 768, 12),
    (4, 512, 768, 12),
    (8, 197, 768, 12),
    (1, 128, 768, 12),
    (32, 32, 384, 12),
    (2, 2048, 1024, 16),
]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def dense_layer(x, in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias, num_heads):
    """The layer of all heads that its weights have. x [B, L, D] -> context [B, H, L, d], output."""
    batch, length, _ = x.shape
    qkv = F.linear(x, in_proj_weight, in_proj_bias).view(batch, length, 3, num_heads, -1)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))  # [B, H, L, d]
    context = F.scaled_dot_product_attention(q, k, v)

    def output(context):
        return F.linear(context.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)

    return context, output


def contenders(shape, heads, dtype, device, generator):
    """name -> function that gives y [B, L, D], and the leaves of all."""
    batch, length, width, num_heads = shape
    d = width // num_heads

    def rand(*sizes, scale):
        return (torch.randn(*sizes, generator=generator) * scale).to(device, dtype)

    x = rand(batch, length, width, scale=1.0)
    in_proj_weight = rand(3 * width, width, scale=width**-0.5)
    in_proj_bias, out_proj_bias = rand(3 * width, scale=0.1), rand(width, scale=0.1)
    out_proj_weight = rand(width, width, scale=width**-0.5)
    kept = torch.arange(heads * d)
    rows = torch.cat([kept + i * width for i in range(3)]).to(device)
    k_weights = [
        in_proj_weight[rows].clone(),
        in_proj_bias[rows].clone(),
        out_proj_weight[:, : heads * d].clone(),
        out_proj_bias.clone(),
    ]
    weights = [in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias]
    leaves = [x, *weights, *k_weights]
    for leaf in leaves:
        leaf.requires_grad_()
    scores = torch.rand(batch, num_heads, generator=generator)
    chosen = scores.argsort(1)[:, :heads].sort(1).values
    index = torch.full((batch, num_heads), -1).scatter(
        1, torch.arange(heads).expand(batch, -1), chosen
    )
    mask = torch.zeros(batch, num_heads).scatter(1, chosen, 1.0)
    index, mask = index.int().to(device), mask.to(device, dtype)
    count = torch.full((batch,), heads, dtype=torch.int32, device=device)

    def ours():
        return torch.ops.headwise.selected_self_attention(
            x, *weights, num_heads, index, count, mask
        )

    def k_heads():
        context, output = dense_layer(x, *k_weights, heads)
        return output(context)

    def dense():
        context, output = dense_layer(x, *weights, num_heads)
        return output(context)

    def masked():
        context, output = dense_layer(x, *weights, num_heads)
        return output(context * mask[:, :, None, None])

    functions = {"headwise": ours, "k heads": k_heads, "dense": dense, "mask after": masked}
    return functions, leaves


def step(function, leaves, mode, generator):
    """One call to time: the forward alone, or forward and backward."""
    if mode == "forward":

        def run():
            with torch.no_grad():
                function()

        return run
    upstream = torch.randn(function().shape, generator=generator)
    upstream = upstream.to(leaves[0].device, leaves[0].dtype)

    def run():
        function().backward(upstream)
        for leaf in leaves:
            leaf.grad = None

    return run


def check(functions):
    """Ours equals masking after computing: the benchmark times the right answer."""
    with torch.no_grad():
        got, want = functions["headwise"](), functions["mask after"]()
    error = ((got.double() - want.double()).abs().max() / want.abs().max()).item()
    limit = 1e-4 if got.dtype == torch.float32 else 3e-2
    if not error <= limit:
        raise SystemExit(f"headwise differs from mask-after-compute by {error:.2e}")
    return error


def measure(runs, rounds, clock, device):
    """Milliseconds of every round, per contender, in turn."""
    now = CLOCKS[clock]
    times = {name: [] for name in runs}
    for i in range(rounds + 2):  # two rounds warm up
        for name, run in runs.items():
            begin = now()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 2:
                times[name].append((now() - begin) * 1e3)
    return times


def case(shape, heads, dtype, mode, arguments):
    generator = torch.Generator().manual_seed(arguments.seed)
    functions, leaves = contenders(shape, heads, dtype, arguments.device, generator)
    error = check(functions)
    runs = {name: step(f, leaves, mode, generator) for name, f in functions.items()}
    times = measure(runs, arguments.rounds, arguments.clock, arguments.device)
    median = {name: statistics.median(t) for name, t in times.items()}
    quartiles = {name: statistics.quantiles(t, n=4)[::2] for name, t in times.items()}
    return {
        "shape": list(shape),
        "heads": heads,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "error": error,
        "median_ms": median,
        "quartiles_ms": quartiles,
        "ratio_to_k_heads": median["headwise"] / median["k heads"],
        "ratio_to_dense": median["headwise"] / median["dense"],
    }


def machine():
    try:
        with open("/proc/cpuinfo") as f:
            lines = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        processor = lines[0]
    except (OSError, IndexError):
        processor = platform.processor()
    return {
        "processor": processor,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", metavar="B,L,D,H", help="default: those of the docs")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=["forward", "train"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    return parser.parse_args(argv)


def main(argv=None):
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    shapes = SHAPES
    if arguments.shapes:
        shapes = [tuple(int(n) for n in text.split(",")) for text in arguments.shapes]
    environment = machine()
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    print(f"{'shape':>18} {'dtype':>8} {'mode':>7} {'k/H':>5} {'headwise ms':>20} {'k heads':>9}"
          f" {'dense':>9} {'mask after':>10} {'/k heads':>8} {'/dense':>7}")  # fmt: skip
    results = []
    for shape in shapes:
        for dtype in arguments.dtypes:
            for mode in arguments.modes:
                for fraction in arguments.fractions:
                    heads = max(1, round(fraction * shape[3]))
                    r = case(shape, heads, getattr(torch, dtype), mode, arguments)
                    results.append(r)
                    median, (low, high) = r["median_ms"], r["quartiles_ms"]["headwise"]
                    ours = f"{median['headwise']:.2f} [{low:.2f}, {high:.2f}]"
                    print(
                        f"{','.join(map(str, shape)):>18} {dtype:>8} {mode:>7}"
                        f" {heads:>2}/{shape[3]:<2} {ours:>20} {median['k heads']:>9.2f}"
                        f" {median['dense']:>9.2f} {median['mask after']:>10.2f}"
                        f" {r['ratio_to_k_heads']:>8.3f} {r['ratio_to_dense']:>7.3f}",
                        flush=True,
                    )
    if arguments.json:
        with open(arguments.json, "w") as f:
            json.dump({"environment": environment, "results": results}, f, indent=1)


if __name__ == "__main__":
    main()
