"""One layer whose tokens choose their heads (mixture of heads, arXiv 2410.11842)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import headwise as hw
from headwise.apps.bench.cases import GOALS
from headwise.apps.bench.contenders import Layer, Shape, dense
from headwise.apps.bench.settings import Settings

K_HEADS, DENSE, MASK_AFTER, OURS = "k heads", "dense", "mask after", "headwise"


def run(settings: Settings) -> Iterator[dict]:
    """Every shape, dtype, number of threads and number of heads below all."""
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            for threads in settings.threads:
                torch.set_num_threads(threads)
                for heads in settings.head_counts(shape):
                    if heads < shape.heads:
                        yield _case(settings, shape, dtype, threads, heads)


def mixture_layer(layer: Layer, heads: int) -> hw.MultiheadAttention:
    """headwise's layer; every token chooses its own ``heads`` heads, one of them shared if there
    are more."""
    shape = layer.shape
    gate = hw.MixtureOfHeadsGate(keep=heads / shape.heads, shared=min(1, heads - 1))
    module = hw.MultiheadAttention(
        shape.width,
        shape.heads,
        batch_first=True,
        gate=gate,
        device=layer.device,
        dtype=layer.dtype,
    )
    layer.load(module)
    return module.eval()


def multiplications(shape: Shape, heads: int) -> float:
    """Multiplications of ``heads`` heads per token over those of a layer of so many heads: keys and
    values are of all heads."""
    tokens, width = shape.batch * shape.length, shape.width
    inner = width * heads // shape.heads
    attention = 2 * tokens * shape.length * inner
    few = attention + 4 * tokens * width * inner
    return (few + 2 * tokens * width * (width - inner)) / few


def _case(settings: Settings, shape: Shape, dtype: torch.dtype, threads: int, heads: int) -> dict:
    layer = Layer(shape, dtype, settings.device, settings.seed)
    x, w, module = layer.x, layer.weights, mixture_layer(layer, heads)
    kept, gate = layer.k_heads(heads), module.gate
    assert gate is not None
    with torch.no_grad():
        mask: Tensor = gate(x).weight  # [B, L, H]
        error = layer.check(module(x, x, x, need_weights=False)[0], mask)
    forms: dict[str, Callable[[], object]] = {
        OURS: lambda: module(x, x, x, need_weights=False)[0],
        K_HEADS: lambda: dense(x, kept),
        DENSE: lambda: dense(x, w),
        MASK_AFTER: lambda: dense(x, w, gate(x).weight),
    }
    with torch.no_grad():
        times = settings.timer().measure(forms, layer.touch)
    ratio = times.ratio(OURS, {K_HEADS: 1.0})
    return {
        "what": "tokens",
        "shape": shape.as_list(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "heads": heads,
        "error": error,
        "ms": times.milliseconds(),
        "yardstick": K_HEADS,
        "ratio": {
            "yardstick": ratio,
            DENSE: times.ratio(OURS, {DENSE: 1.0}),
            MASK_AFTER: times.ratio(OURS, {MASK_AFTER: 1.0}),
        },
        "multiplications": multiplications(shape, heads),
        "goal": GOALS["tokens"].judge(ratio["median"]),
    }
