"""attention_entropy over the attention that it describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headwise.apps.bench import memory
from headwise.apps.bench.cases import GOALS
from headwise.apps.bench.contenders import Shape, compare
from headwise.apps.bench.settings import Settings

OURS, SDPA = "attention_entropy", "scaled_dot_product_attention"


def run(settings: Settings) -> Iterator[dict]:
    """Every shape, dtype and number of threads; memory at the longest shape and twice that."""
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            for threads in settings.threads:
                torch.set_num_threads(threads)
                yield _case(settings, shape, dtype, threads)
    if settings.memory and settings.device.type == "cpu" and memory.measurable():
        yield _memory(settings)


def _heads(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    """q, k and v [B, H, L, d]."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.heads, shape.length, shape.width // shape.heads)
    return [torch.randn(size, generator=generator).to(device, dtype) for _ in range(3)]


def oracle(q: Tensor, k: Tensor) -> Tensor:
    """Mean over rows of the row's entropy over the log of the number of keys: float64 [B, H].

    Head by head, because all attention weights may not fit.
    """
    found = q.new_zeros(q.shape[:2], dtype=torch.float64)
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            scores = q[b, h].double() @ k[b, h].double().T / math.sqrt(q.size(3))  # [L, S]
            p = scores.softmax(-1)
            found[b, h] = -(p * p.clamp_min(1e-300).log()).sum(-1).mean()
    return found / max(math.log(k.size(2)), 1e-300)


def _case(settings: Settings, shape: Shape, dtype: torch.dtype, threads: int) -> dict:
    q, k, v = _heads(shape, dtype, settings.device, settings.seed)
    entropy = torch.ops.headwise.attention_entropy
    error = compare(entropy(q[:1], k[:1]), oracle(q[:1], k[:1]), dtype)
    times = settings.timer().measure(
        {
            OURS: lambda: entropy(q, k),
            SDPA: lambda: scaled_dot_product_attention(q, k, v),
        }
    )
    ratio = times.ratio(OURS, {SDPA: 1.0})
    return {
        "what": "entropy",
        "shape": shape.as_list(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "error": error,
        "ms": times.milliseconds(),
        "yardstick": SDPA,
        "ratio": {"yardstick": ratio},
        "goal": GOALS["entropy"].judge(ratio["median"]),
    }


def memory_runs(shape: Shape, dtype: torch.dtype, seed: int) -> dict[str, Callable[[], object]]:
    """The calls whose memory is measured (in a separate process)."""
    q, k, v = _heads(shape, dtype, torch.device("cpu"), seed)
    return {
        OURS: lambda: torch.ops.headwise.attention_entropy(q, k),
        SDPA: lambda: scaled_dot_product_attention(q, k, v),
    }


def _memory(settings: Settings) -> dict:
    longest = max(settings.shapes, key=lambda shape: shape.length)
    found = []
    for length in (longest.length, 2 * longest.length):
        shape = Shape(longest.batch, length, longest.width, longest.heads)
        found.append(
            memory.peaks(
                "entropy",
                [OURS],
                shape=shape.as_list(),
                dtype="float32",
                threads=settings.threads[-1],
                seed=settings.seed,
            )[OURS]["call_bytes"]
        )
    # Below a page or two the system's record is meaningless.
    ratio = max(found[1], 1 << 20) / max(found[0], 1 << 20)
    map_bytes = longest.batch * longest.heads * longest.length**2 * 4
    return {
        "what": "memory",
        "of": "entropy",
        "shape": longest.as_list(),
        "dtype": "float32",
        "threads": settings.threads[-1],
        "call_bytes": {"once": found[0], "twice the length": found[1], "a map": map_bytes},
        "ratio": {"call": ratio},
        "goal": GOALS["entropy memory"].judge(ratio),
    }
