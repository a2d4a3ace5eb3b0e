"""One layer that runs k of H heads: forward, and training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import headwise as hw
from headwise.apps.bench import memory
from headwise.apps.bench.cases import GOALS, layer_goal
from headwise.apps.bench.contenders import (
    Layer,
    Shape,
    dense,
    observed,
    random_gate,
    randomise,
)
from headwise.apps.bench.joules import energy
from headwise.apps.bench.settings import Settings
from headwise.apps.bench.timing import line
from headwise.apps.compare.measure import gate_macs
from headwise.apps.energy.windows import Work, head_bytes
from headwise.gates.optimizing import choosing_parameters

K_HEADS, DENSE, TORCH = "k heads", "dense", "nn.MultiheadAttention"
MASK_AFTER, COMPILED, FLEX = "mask after", "torch.compile", "FlexAttention"
OURS = "headwise"


def run(settings: Settings, training: bool) -> Iterator[dict]:
    """Every shape, dtype, number of threads and number of heads: one result each.

    Then, for each group of results that differ in the number of heads only, the line through time
    against heads, and (if requested) memory and the break-even batch and length.
    """
    what = "train" if training else "layer"
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            for threads in settings.threads:
                torch.set_num_threads(threads)
                found = []
                for heads in settings.head_counts(shape):
                    result = {**_about(what, shape, dtype, threads), "heads": heads}
                    result |= _case(settings, shape, dtype, heads, training)
                    found.append(result)
                    yield result
                if not training and shape.batch > 1 and settings.mixed:
                    about = _about("mixed", shape, dtype, threads)
                    yield about | _mixed_case(settings, shape, dtype)
                if len(found) > 2:
                    yield _about("line", shape, dtype, threads) | _line(what, found)
            if settings.memory:
                yield from _memory(settings, what, shape, dtype, training)
    if settings.break_even and not training:
        for dtype in settings.dtypes:
            torch.set_num_threads(settings.threads[-1])
            yield _break_even(settings, dtype)


def _about(what: str, shape: Shape, dtype: torch.dtype, threads: int) -> dict:
    name = str(dtype).removeprefix("torch.")
    return {"what": what, "shape": shape.as_list(), "dtype": name, "threads": threads}


def _case(settings: Settings, shape: Shape, dtype: torch.dtype, heads: int, training: bool) -> dict:
    layer = Layer(shape, dtype, settings.device, settings.seed, training)
    forms, error, notes, modules, mask = _forms(settings, layer, heads)
    if training:
        runs = {name: _step(form, layer, modules) for name, form in forms.items()}
    else:
        runs = {name: _forward(form) for name, form in forms.items()}
    times = settings.timer().measure(runs, layer.touch)
    all_heads = times.fastest([name for name in (DENSE, TORCH) if name in runs])
    yardstick = all_heads if heads == shape.heads else K_HEADS
    ratio = times.ratio(OURS, {yardstick: 1.0})
    ratios = {"yardstick": ratio, DENSE: times.ratio(OURS, {all_heads: 1.0})}
    for name in (MASK_AFTER, COMPILED, FLEX):
        if name in runs:
            ratios[name] = times.ratio(OURS, {name: 1.0})
    return {
        "error": error,
        "ms": times.milliseconds(),
        "yardstick": yardstick,
        "fastest_dense": all_heads,
        "ratio": ratios,
        "goal": layer_goal(shape, heads, training).judge(ratio["median"]),
        **({"notes": notes} if notes else {}),
        **energy(
            settings,
            {name: runs[name] for name in (OURS, K_HEADS, DENSE) if name in runs},
            lambda: _work(layer, heads, mask, modules[0]),
            layer.touch,
        ),
    }


def _work(layer: Layer, heads: int, mask: Tensor, module: torch.nn.Module) -> dict[str, Work]:
    """What one call does. A training step multiplies three times what a forward does (each product
    has two gradients) and reads the weights twice. The weights of heads that no sequence chose are
    not read.

    Args:
        mask: [B, H], not 0 for the heads that ran.
    """
    shape, size = layer.shape, layer.x.element_size()
    head_dim = shape.width // shape.heads
    macs = hw._C.head_macs(shape.length, shape.width, head_dim)
    each, bias = head_bytes(shape.width, head_dim, size), shape.width * size
    own = sum(p.numel() for p in choosing_parameters(module)) * size
    passes, reads = (3, 2) if layer.training else (1, 1)

    def work(ran: float, read: int, gate: float = 0.0, gate_bytes: int = 0) -> Work:
        return Work(passes * (ran * macs + gate), reads * (read * each + bias + gate_bytes))

    gate = shape.batch * gate_macs(module)
    ran, read = int(mask.count_nonzero()), int((mask != 0).any(0).sum())
    return {
        OURS: work(ran, read, gate, own),
        K_HEADS: work(shape.batch * heads, heads),
        DENSE: work(shape.batch * shape.heads, shape.heads),
    }


def _forms(
    settings: Settings, layer: Layer, heads: int
) -> tuple[dict[str, Callable[[], Tensor]], float, dict[str, str], list[torch.nn.Module], Tensor]:
    """The contenders, the error of ours, why others are missing, the modules with parameters, and
    the mask [B, H] of ours.

    The yardstick of k < H heads is ``F.linear`` and ``scaled_dot_product_attention``:
    ``nn.MultiheadAttention``'s fast path needs heads that fill the width of the model, so it cannot
    run a layer that physically has fewer.
    """
    x, w, module = layer.x, layer.weights, layer.module(heads)

    def ours() -> Tensor:
        return module(x, x, x, need_weights=False)[0]

    # Training and evaluation choose the same heads: the gate's training is at its end.
    output, mask = observed(module, ours)
    error = layer.check(output, mask)
    forms: dict[str, Callable[[], Tensor]] = {OURS: ours}
    modules: list[torch.nn.Module] = [module]
    if heads < layer.shape.heads:
        kept = layer.k_heads(heads)
        forms[K_HEADS] = lambda: dense(x, kept)
    forms[DENSE] = lambda: dense(x, w)
    torch_module = layer.torch_module()
    modules.append(torch_module)
    forms[TORCH] = lambda: torch_module(x, x, x, need_weights=False)[0]
    forms[MASK_AFTER] = lambda: dense(x, w, mask)
    notes: dict[str, str] = {}
    if settings.compiled:
        from headwise.apps.bench.compiled import compiled_forms

        more, notes = compiled_forms(layer, mask)
        forms |= more
    return forms, error, notes, modules, mask


def _forward(form: Callable[[], Tensor]) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            form()

    return call


def _step(
    form: Callable[[], Tensor], layer: Layer, modules: Sequence[torch.nn.Module]
) -> Callable[[], None]:
    """Forward and backward; gradients are dropped, as an optimiser's zero_grad does."""
    leaves = layer.leaves(*modules)
    upstream = layer.random(layer.shape.batch, layer.shape.length, layer.shape.width, scale=1.0)

    def call() -> None:
        form().backward(upstream)
        for leaf in leaves:
            leaf.grad = None

    return call


def _mixed_case(settings: Settings, shape: Shape, dtype: torch.dtype) -> dict:
    """Head counts that differ within the batch, uniform in 1..H.

    The gate runs, and drawn heads replace its choice. The dense layer with the same total of heads
    may need part of a head: its time is interpolated between the neighbouring integers.
    """
    layer = Layer(shape, dtype, settings.device, settings.seed)
    counts = layer.drawn_counts()  # [B]
    selection = layer.drawn_heads(counts)
    gate = random_gate(1.0).bind(shape.width, shape.heads, device=settings.device, dtype=dtype)
    randomise(gate, layer.generator)
    gate.eval()
    x, w = layer.x, layer.weights
    mean = counts.double().mean().item()
    low = int(mean)
    kept = {heads: layer.k_heads(heads) for heads in (low, min(low + 1, shape.heads))}

    def ours() -> Tensor:
        gate(x)
        return torch.ops.headwise.selected_self_attention(
            x, *w.tensors(), shape.heads, selection.index, selection.count, selection.weight
        )

    def k_heads(heads: int) -> Callable[[], Tensor]:
        return lambda: dense(x, kept[heads])

    error = layer.check(ours(), selection.weight)
    names = {heads: f"{heads} heads" for heads in kept}
    runs = {OURS: _forward(ours)} | {names[h]: _forward(k_heads(h)) for h in kept}
    times = settings.timer().measure(runs, layer.touch)
    parts = {names[low]: 1 - (mean - low), names[max(kept)]: mean - low}
    if len(kept) == 1:
        parts = {names[low]: 1.0}
    ratio = times.ratio(OURS, parts)
    return {
        "heads": mean,
        "counts": counts.tolist(),
        "error": error,
        "ms": times.milliseconds(),
        "yardstick": K_HEADS,
        "ratio": {"yardstick": ratio},
        "goal": GOALS["mixed"].judge(ratio["median"]),
    }


def _line(what: str, found: Sequence[dict]) -> dict:
    """Milliseconds against heads: the intercept is the cost of gate and call."""
    heads = [result["heads"] for result in found]
    ms = [result["ms"][OURS]["median"] for result in found]
    return {"of": what, "heads": heads, "ms": ms, **line(heads, ms)}


def memory_runs(
    shape: Shape, dtype: torch.dtype, heads: int, training: bool, seed: int
) -> dict[str, Callable[[], object]]:
    """The calls whose memory is measured (in a separate process)."""
    layer = Layer(shape, dtype, torch.device("cpu"), seed, training)
    module = layer.module(heads)
    kept, x = layer.k_heads(heads), layer.x
    forms = {
        OURS: lambda: module(x, x, x, need_weights=False)[0],
        K_HEADS: lambda: dense(x, kept),
        DENSE: lambda: dense(x, layer.weights),
    }
    if training:
        return {name: _step(form, layer, [module]) for name, form in forms.items()}
    return {name: _forward(form) for name, form in forms.items()}


def _memory(
    settings: Settings, what: str, shape: Shape, dtype: torch.dtype, training: bool
) -> Iterator[dict]:
    heads = max(1, shape.heads // 2)
    about = _about("memory", shape, dtype, settings.threads[-1]) | {"of": what, "heads": heads}
    if settings.device.type != "cpu" or not memory.measurable():
        yield about | {"skipped": "peak memory is measured on a CPU under Linux only"}
        return
    found = memory.peaks(
        "layer",
        [OURS, K_HEADS, DENSE],
        shape=shape.as_list(),
        dtype=about["dtype"],
        heads=heads,
        training=training,
        threads=about["threads"],
        seed=settings.seed,
    )
    size = torch.empty((), dtype=dtype).element_size()
    weights = (4 * shape.width + 4) * shape.width * size
    x = shape.batch * shape.length * shape.width * size
    ratio = found[OURS]["call_bytes"] / max(1, found[DENSE]["call_bytes"])
    yield about | {
        "call_bytes": {name: entry["call_bytes"] for name, entry in found.items()},
        "weight_bytes": weights,
        "input_bytes": x,
        "ratio": {"call": ratio},
        "goal": GOALS["memory"].judge(ratio) if not training else None,
    }


#: Cases of the break-even search: half of the heads, this width, these batches and lengths.
BREAK_EVEN_WIDTH, BREAK_EVEN_HEADS = 768, 12  # of BERT
BREAK_EVEN_BATCHES, BREAK_EVEN_LENGTHS = (1, 2, 4, 8), (4, 8, 16, 32, 64, 128)


def _break_even(settings: Settings, dtype: torch.dtype) -> dict:
    """The batch (of 128 tokens) and the length (of 8 sequences) from which half of the heads cost
    less than PyTorch's layer of all heads, gate included."""
    width, heads = BREAK_EVEN_WIDTH, BREAK_EVEN_HEADS
    settings = replace(settings, compiled=False)

    def ratio(batch: int, length: int) -> float:
        shape = Shape(batch, length, width, heads)
        result = _case(settings, shape, dtype, max(1, heads // 2), training=False)
        return result["ratio"][DENSE]["median"]

    batches = {batch: ratio(batch, 128) for batch in BREAK_EVEN_BATCHES}
    lengths = {length: ratio(8, length) for length in BREAK_EVEN_LENGTHS}
    return {
        "what": "break-even",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "width": width,
        "of_heads": heads,
        "heads": max(1, heads // 2),
        "batches": batches,
        "lengths": lengths,
        "batch": _from_where(batches),
        "length": _from_where(lengths),
    }


def _from_where(ratios: dict[int, float]) -> int | None:
    """The smallest size from which every ratio stays below 1."""
    found = None
    for size in sorted(ratios, reverse=True):
        if ratios[size] >= 1:
            break
        found = size
    return found
