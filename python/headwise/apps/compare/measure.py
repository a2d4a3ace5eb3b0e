"""The cost of a model: measured time relative to the dense model, and multiply-accumulates."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import headwise as hw
from headwise.apps.compare.selections import HeadUse
from headwise.apps.compare.translating import generate
from headwise.apps.energy.counters import Meter, NotMeasured
from headwise.apps.energy.windows import Windows, Work, head_bytes
from headwise.apps.energy.windows import measure as measure_energy
from headwise.apps.energy.windows import ratio as energy_ratio
from headwise.apps.tasks.examples import Examples
from headwise.apps.tasks.shapes import Shape
from headwise.gates.optimizing import choosing_parameters
from headwise.nn.layers import attention_layers


def inputs_of(
    examples: Examples, shape: Shape, device: torch.device, count: int = 1
) -> list[dict[str, Tensor]]:
    """``count`` different batches of the given shape, from real inputs.

    Real inputs, because a gate's choice depends on them. If the shape has a length, texts are
    concatenated and cut to it; otherwise a batch has inputs of neighbouring lengths.
    """
    need = min(len(examples), shape.batch * count * 8)
    lengths = examples.lengths
    rows = sorted(range(need), key=lambda row: lengths[row])
    found = []
    for position in range(count):
        start = (2 * position + 1) * len(rows) // (2 * count) - shape.batch // 2
        start = max(0, min(start, len(rows) - shape.batch))
        part = [rows[(start + i) % len(rows)] for i in range(shape.batch)]
        if shape.length is None:
            inputs = examples.collate(part)
        else:
            inputs = examples.of_length(part, shape.length)
        found.append({name: value.to(device) for name, value in inputs.items()})
    return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


#: How a model runs on a batch.
Call = Callable[[nn.Module, dict[str, Tensor]], object]

#: Tokens of each translation whose time is measured: lengths of their own would compare texts.
_TRANSLATED = 16


def call(model: nn.Module, inputs: dict[str, Tensor]) -> object:
    return model(**inputs)


def translate(model: nn.Module, inputs: dict[str, Tensor]) -> object:
    """Translations with the same number of tokens."""
    return generate(model, inputs, least=_TRANSLATED, most=_TRANSLATED)


@torch.no_grad()
def interleaved_seconds(
    models: Sequence[nn.Module],
    inputs: Sequence[dict[str, Tensor]],
    device: torch.device,
    run: Call = call,
    *,
    budget_s: float = 1.5,
    least: int = 5,
    most: int = 60,
) -> list[list[float]]:
    """Seconds of each call, a list for each model; the models alternate.

    By alternating, each model sees the same noise of the machine: ratios are steadier than times.
    Stops after ``budget_s`` seconds, but not before ``least`` rounds.
    """
    for model in models:
        model.eval()
        for batch in inputs[:2]:
            run(model, batch)
    seconds: list[list[float]] = [[] for _ in models]
    start = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - start > budget_s:
            break
        batch = inputs[turn % len(inputs)]
        for model, found in zip(models, seconds, strict=True):
            began = _now(device)
            run(model, batch)
            found.append(_now(device) - began)
    return seconds


def latency(
    dense: nn.Module,
    model: nn.Module,
    examples: Examples,
    shapes: Sequence[Shape],
    device: torch.device,
    budget_s: float = 1.5,
    run: Call = call,
) -> list[dict]:
    """Median milliseconds of ``model`` and of ``dense`` for each shape, measured alternately.

    ``ratio`` is the median over rounds of this model's time divided by the dense model's time in
    the same round; ``ratio_low`` and ``ratio_high`` are its quartiles. If ``model`` is ``dense``
    itself, ``ratio`` is 1 by definition, and the quartiles are those of a second measurement of it
    over the first: the noise of the machine.
    """
    found = []
    for shape in shapes:
        inputs = inputs_of(examples, shape, device, count=4)
        base, own = interleaved_seconds([dense, model], inputs, device, run, budget_s=budget_s)
        ratios = sorted(b / a for a, b in zip(base, own, strict=True))
        found.append(
            {
                **asdict(shape),
                "ms": statistics.median(own) * 1e3,
                "dense_ms": statistics.median(base) * 1e3,
                "ratio": 1.0 if model is dense else statistics.median(ratios),
                "ratio_low": ratios[len(ratios) // 4],
                "ratio_high": ratios[(3 * len(ratios)) // 4],
                "rounds": len(ratios),
            }
        )
    return found


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a data set, in total."""

    attention: float
    rest: float
    gates: float

    @property
    def total(self) -> float:
        return self.attention + self.rest + self.gates


def gate_macs(model: nn.Module) -> int:
    """Multiply-accumulates of the gates for one input: the matrices that meet its pooled input."""
    matrices = {parameter for parameter in choosing_parameters(model) if parameter.dim() > 1}
    return sum(parameter.numel() for parameter in matrices)


def macs(config, use: HeadUse, lengths: Tensor, model: nn.Module | None = None) -> Macs:
    """Multiply-accumulates of a BERT-like encoder over some inputs, without padding.

    All heads of a model cost the same (``head_macs``: 4 n D d + 2 n^2 d for n tokens), so the
    number of heads that ran decides.

    Args:
        config: of the dense transformers model.
        use: the heads that ran for each input.
        lengths: int [N], positions (tokens, patches) of each input.
        model: if given, its gates are counted, and its widths are used: fewer neurons or hidden
            dimensions cost less.
    """
    n = lengths.double()  # [N]
    inner = getattr(config, "intermediate_size", None) or config.hidden_dim  # DistilBERT's name
    width, neurons = config.hidden_size, len(use.layers) * inner
    pooled = config.hidden_size
    head = width // config.num_attention_heads
    if model is not None:
        found = hw.pruning.structure(model)
        width = next(iter(found.attention.values())).embed_dim
        neurons = sum(found.neurons.values())
    macs = [hw._C.head_macs(tokens, width, head) for tokens in n.tolist()]
    each = torch.tensor(macs, dtype=torch.float64)  # [N]
    attention = (use.chosen.double().sum(1) * each).sum().item()
    # The feed-forward networks; then the pooler and the classifier of each input.
    rest = neurons * sum(hw._C.neuron_macs(tokens, width) for tokens in n.tolist())
    rest += len(lengths) * (width * pooled + pooled * 2)
    if hasattr(config, "patch_size"):  # what makes a patch into a vector
        channels = getattr(config, "num_channels", 1)
        rest += n.sum().item() * channels * config.patch_size**2 * width
    gates = len(lengths) * gate_macs(model) if model is not None else 0
    if model is not None and any(isinstance(m, hw.ThresholdGate) for m in model.modules()):
        # It decides by the queries, keys and integer scores of every head.
        dropped = use.chosen.shape[1] - use.chosen.double().sum(1)  # [N]
        decisions = dropped * 2 * n * width * head + use.chosen.shape[1] * n * n * head
        gates += decisions.sum().item()
    return Macs(attention, rest, gates)


@torch.no_grad()
def model_work(
    model: nn.Module,
    config,
    layers: dict[str, int],
    inputs: Sequence[dict[str, Tensor]],
    positions: Callable[[dict[str, Tensor]], Tensor],
) -> Work:
    """What a call of a BERT-like encoder does, the mean over ``inputs``.

    Weights are read once per call: all but the embeddings and the heads that no text of the batch
    chose. An encoder has no cache.

    Args:
        model: the dense transformers model, or a converted one.
        config: of the dense model.
        layers: name and number of heads of each attention layer of the dense model.
        inputs: batches, the model's arguments.
        positions: batch -> [B], positions of each input.
    """
    present = attention_layers(model)
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = sum(p.numel() * p.element_size() for p in set(model.parameters()) - embeddings)
    total, unread = 0.0, 0
    for batch in inputs:
        seen: dict[str, Tensor] = {}
        if present:
            with hw.trace(model) as trace:
                model(**batch)
            seen = {
                name: torch.ops.headwise.selection_mask(own.index, own.count, torch.float32).cpu()
                for name, own in trace.selections.items()
            }
        lengths = positions(batch).cpu()
        parts = []  # [B, H] of each layer
        for name, heads in layers.items():
            heads = present[name].num_heads if name in present else 0 if present else heads
            parts.append(seen.get(name, torch.ones(len(lengths), heads)) > 0)
        for name, chosen in zip(layers, parts, strict=True):
            if name in seen:
                layer = present[name]
                size = next(layer.parameters()).element_size()
                each = head_bytes(layer.embed_dim, layer.head_dim, size)
                unread += int((~chosen.any(0)).sum()) * each
        use = HeadUse(torch.cat(parts, 1), tuple(layers.values()))
        total += macs(config, use, lengths, model if present else None).total
    return Work(total / len(inputs), weights - unread / len(inputs))


def energy(
    dense: nn.Module,
    model: nn.Module,
    layers: dict[str, int],
    examples: Examples,
    shape: Shape,
    device: torch.device,
    meter: Meter | NotMeasured,
    windows: Windows,
) -> dict:
    """The result of :func:`headwise.apps.energy.windows.measure` for ``model`` and ``dense`` on
    batches of this shape, with their ``ratio`` and the inputs of a call (``batch``)."""
    inputs = inputs_of(examples, shape, device, count=4)
    models = {"dense": dense, "model": model}
    turns = {name: Turns(own.eval(), inputs) for name, own in models.items()}
    work = {
        name: model_work(own, dense.config, layers, inputs, examples.positions_of)
        for name, own in models.items()
    }
    found = measure_energy(turns, work, meter, windows, device)
    return {"batch": shape.batch, **found, "ratio": energy_ratio(found, "model", "dense")}


class Turns:
    """Calls a model, with the next batch in every call: contenders see the same batches."""

    def __init__(self, model: nn.Module, batches: Sequence[dict[str, Tensor]]):
        self._model, self._batches, self._turn = model, batches, 0

    @torch.no_grad()
    def __call__(self) -> None:
        self._model(**self._batches[self._turn % len(self._batches)])
        self._turn += 1


def _cpuinfo(field: str) -> str | None:
    """A line of the first processor's description under Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith(field):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return None


def _instructions() -> str:
    """The widest instruction set of this run, such as "AVX512 with AMX". A limit that oneDNN was
    given, which does most of the products, is named."""
    found = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    if limit:
        return f"{found}, oneDNN limited to {limit}"
    if "amx_tile" in (_cpuinfo("flags") or "").split():
        return f"{found} with AMX"
    return found


def environment(device: torch.device, threads: int) -> dict:
    """The machine and the versions of a result."""
    import transformers

    found = {
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": str(device),
        "system": f"{platform.system()} {platform.machine()}",
        "instructions": _instructions(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "headwise": hw._C.__version__,
    }
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found
