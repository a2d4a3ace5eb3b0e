"""What gpu_check times of a layer: k of H heads chosen by the input, beside dense layers.

A case checks one (shape, k) against the oracle in float64, then times its variants one after
another. Every number is passed to `emit` as soon as it is measured.
"""

import math
import statistics
from contextlib import contextmanager

import gpu_cases
import headwise as hw
import torch
from gpu_cases import largest_error
from gpu_machine import checked_part
from support import oracle
from torch.nn.functional import linear, scaled_dot_product_attention

ops = torch.ops.headwise
# Largest error over the largest value of the float64 reference, forward and gradients.
TOLERANCE = {
    torch.float64: (1e-11, 1e-10),
    torch.float32: (2e-5, 1e-4),
    torch.bfloat16: (2e-2, 5e-2),
    torch.float16: (4e-3, 1e-2),
}
# Attention and products, each in two ways (docs/backends.md).
ROUTES = {
    "kernels": ("kernels", "warps"),
    "flash": ("flash", "warps"),
    "warpgroups": ("flash", "warpgroups"),
}


@contextmanager
def route(name):
    before = hw.set_cuda_routes(*ROUTES[name])
    try:
        yield
    finally:
        hw.set_cuda_routes(*before)


class Layer:
    """Weights of a dense layer of H heads, a gate, and an input."""

    def __init__(self, shape, dtype, device):
        self.shape, self.dtype, self.device = shape, dtype, device
        B, L, D, H = shape
        generator = torch.Generator(device).manual_seed(sum(shape))

        def rand(*size, scale=1.0):
            values = torch.randn(*size, generator=generator, device=device) * scale
            return values.to(dtype).requires_grad_()

        self.x = rand(B, L, D)  # [B, L, D]
        self.in_weight = rand(3 * D, D, scale=1 / math.sqrt(D))
        self.in_bias = rand(3 * D, scale=0.1)
        self.out_weight = rand(D, D, scale=1 / math.sqrt(D))
        self.out_bias = rand(D, scale=0.1)
        self.gate_weight = rand(H, D).detach()
        self.upstream = rand(B, L, D).detach()
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

    def kernels(self, k):
        with route("kernels"):
            return self.headwise(k)

    def flash(self, k):
        with route("flash"):
            return self.headwise(k)

    def warpgroups(self, k):
        with route("warpgroups"):
            return self.headwise(k)

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
        """All heads, then a mask: the cost of a gate if nothing is skipped."""
        qkv = linear(self.x, self.in_weight, self.in_bias)
        context = self.attend(qkv, self.shape[3], self.select(k)[2])
        return linear(context, self.out_weight, self.out_bias)


def check(shape, k, dtype, machine, way):
    """Errors of output and gradients on two sequences: no sequence depends on another."""
    H, device = shape[3], machine.device
    # Products in float32 and float64 run without tensor cores: shorter sequences show as much.
    length = shape[1] if dtype.itemsize == 2 else min(shape[1], 300)
    layer = Layer((*checked_part(machine, shape[0], H, length), *shape[2:]), dtype, device)
    selection = [t.detach() for t in layer.select(k)]
    with route(way):
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


def run_of(layer, what, variant, k):
    """The timed call: a forward, or a forward and the gradients of input and weights."""
    operator = getattr(layer, variant)

    def forward():
        with torch.no_grad():
            return operator(k)

    def training():
        # The backward reads the choice of attention too.
        with route(variant if variant in ROUTES else "kernels"):
            y = operator(k)
            weights = layer.small if variant == "dense" else layer.leaves()[1:4]
            leaves = [layer.x, *weights, layer.out_bias]
            return torch.autograd.grad(y, leaves, layer.upstream)

    return forward if what == "forward" else training


def measure(emit, layer, what, variant, k, timer):
    run = run_of(layer, what, variant, k)
    routes, row = {"events": run}, {"what": what, "variant": variant}
    if variant in ("dense", *ROUTES):
        graph, row["no_graph"] = timer.machine.captured(run)
        if graph:
            routes["graph"] = graph
    # The weights and the input take the same for all.
    row["peak_bytes"] = timer.machine.peak_bytes(run)
    for timed_by, call in routes.items():
        times = timer.times(call)
        emit({**row, "timed_by": timed_by, "median_ms": statistics.median(times),
              "fastest_ms": min(times), "slowest_ms": max(times)})  # fmt: skip


def case(emit, what, shape, k, dtype, timer):
    """Checks, then times; a route that fails its check is not timed."""
    layer = Layer(shape, dtype, timer.machine.device)
    measure(emit, layer, what, "dense", k, timer)
    for way in ROUTES:
        # The other dtypes need no separate check if LibTorch does not support them.
        dtypes = (torch.float64, torch.float32, dtype) if way == "kernels" else (dtype,)
        passed = True
        for checked in dict.fromkeys(dtypes):
            torch.manual_seed(0)
            result = check(shape, k, checked, timer.machine, way)
            emit({"check": str(checked)[6:], "variant": way, **result})
            passed &= result["passed"]
        if passed:
            measure(emit, layer, what, way, k, timer)
    for variant in ("masked", "full"):
        measure(emit, layer, what, variant, k, timer)


def flex_case(emit, shape, dtype, timer):
    """FlexAttention with a mask of heads; a comparison only, so a failure is reported, not
    raised."""
    k = shape[3] // 2
    layer = Layer(shape, dtype, timer.machine.device)
    layer.flex, reason = gpu_cases.flex_layer(layer, k)
    if reason:
        emit({"variant": "flex", "note": reason})
    else:
        measure(emit, layer, "forward", "flex", k, timer)
