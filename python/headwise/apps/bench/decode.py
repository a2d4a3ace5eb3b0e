"""One decoding step behind a long cache: a model of made-up weights in the shape of SmolLM2-135M,
with 4 layers.

A shape is B sequences, the tokens in their caches, and the model's width and query heads, of which
three share a key/value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import headwise as hw
from headwise.apps.bench.cases import GOALS, SHAPES
from headwise.apps.bench.contenders import CheckFailed, Shape
from headwise.apps.bench.settings import Settings
from headwise.pruning import LayerPlan

LAYERS, EACH = 4, 3  #: layers; query heads per key/value head
CASES = tuple(Shape(batch, held, 576, 9) for batch in (1, 8) for held in (256, 2000, 8000))
#: Where attention itself and the cache's memory are compared.
LONGEST = CASES[-1]

ALL, CONVERTED, KEPT, PRUNED = "unconverted", "converted", "kept groups", "pruned alike"


def run(settings: Settings) -> Iterator[dict]:
    """Every shape, dtype and number of threads."""
    shapes = CASES if settings.shapes == SHAPES else settings.shapes
    for dtype in settings.dtypes:
        for threads in settings.threads:
            torch.set_num_threads(threads)
            for shape in shapes:
                yield from _cases(settings, shape, dtype, threads, shape == shapes[-1])


class Step:
    """One more token for a model whose cache is full: the same step again at every call."""

    def __init__(
        self, model: nn.Module, groups: Sequence[tuple[Tensor, ...]], token: Tensor
    ) -> None:
        from transformers import DynamicCache

        from headwise.convert.decoder import cache_word

        self.model, self.token = model.eval(), token
        self.word = cache_word(model)
        # A first token decides what a layer with keep_selection keeps; then the cache is filled.
        self.cache: Any = DynamicCache()
        self.model(token, **{self.word: self.cache})
        self.held = []
        layers: list[Any] = list(self.cache.layers)
        for layer, whole in zip(layers, groups, strict=True):
            self.held.append(tuple(part[:, : layer.keys.size(1)].clone() for part in whole))
        self.reset()

    def reset(self) -> None:
        for layer, (keys, values) in zip(self.cache.layers, self.held, strict=True):
            layer.keys, layer.values = keys, values

    def __call__(self) -> Tensor:
        return self.model(self.token, **{self.word: self.cache}).logits

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for layer in self.held for part in layer)

    def attention(self) -> Callable[[], object]:
        """The step of the attention layers alone, behind the same caches."""
        calls: list[tuple[nn.Module, tuple, dict[str, Any]]] = []
        layers = hw.attention_layers(self.model).values()
        hooks = [
            layer.register_forward_pre_hook(lambda *call: calls.append(call), with_kwargs=True)
            for layer in layers
        ]
        self()
        for hook in hooks:
            hook.remove()
        self.reset()

        def step() -> None:
            for layer, arguments, named in calls:
                layer(*arguments, **named)

        return step


def build(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> nn.Module:
    """The unconverted model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=shape.width,
        intermediate_size=shape.width * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // EACH,
        max_position_embeddings=shape.length + 2,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.to(device=device, dtype=dtype)


def _cases(
    settings: Settings, shape: Shape, dtype: torch.dtype, threads: int, longest: bool
) -> Iterator[dict]:
    def model() -> nn.Module:
        return build(shape, dtype, settings.device, settings.seed)

    groups, size = shape.heads // EACH, shape.width // shape.heads
    some = max(1, round(groups / 3))
    heads = list(range(some * EACH))
    plan = [LayerPlan(name, shape.heads, heads, [1.0] * len(heads))
            for name in hw.attention_layers(hw.convert(model()))]  # fmt: skip
    token = torch.full((shape.batch, 1), 5, device=settings.device)
    whole = (2, shape.batch, groups, shape.length, size)  # keys and values
    cached = [
        torch.randn(whole, device=settings.device, dtype=dtype).unbind() for _ in range(LAYERS)
    ]
    gate = hw.GroupGate(hw.FixedGate(list(range(some))))
    with torch.no_grad():
        steps = {
            ALL: Step(model(), cached, token),
            CONVERTED: Step(hw.convert(model()), cached, token),
            KEPT: Step(hw.convert(model(), gate, keep_selection=True), cached, token),
            PRUNED: Step(hw.prune(hw.convert(model()), hw.HeadPlan(plan)), cached, token),
        }
        errors = {
            CONVERTED: _error(steps[CONVERTED](), steps[ALL](), dtype),
            KEPT: _error(steps[KEPT](), steps[PRUNED](), dtype),
        }
        for step in steps.values():
            step.reset()
        times = settings.timer().measure(steps, lambda name: steps[name].reset())
        parts = {name: steps[name].attention() for name in (CONVERTED, KEPT)} if longest else {}
        apart = settings.timer().measure(parts, lambda name: steps[name].reset())
    common = {
        "shape": shape.as_list(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
    }

    def result(of: str, over: str, goal: str, count: int, measured: Any) -> dict:
        ratio = measured.ratio(of, {over: 1.0})
        ms = measured.milliseconds()
        return {
            "what": goal,
            **common,
            "heads": count,
            "error": errors[of],
            "ms": {name: ms[name] for name in (of, over)},
            "yardstick": over,
            "ratio": {"yardstick": ratio},
            "goal": GOALS[goal].judge(ratio["median"]),
        }

    yield result(CONVERTED, ALL, "decode", shape.heads, times)
    yield result(KEPT, PRUNED, "kept", len(heads), times)
    if longest:
        yield result(KEPT, CONVERTED, "attend", len(heads), apart)
        memory = {name: steps[name].bytes for name in (KEPT, ALL)}
        share = memory[KEPT] / memory[ALL]
        yield {
            "what": "memory",
            **common,
            "of": f"cache, {len(heads)} of {shape.heads} heads",
            "call_bytes": memory,
            "ratio": {"call": share},
            "goal": GOALS["cache"].judge(share),
        }


def _error(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> float:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    if not error < (0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-4):
        raise CheckFailed(f"a decoding step differs from its oracle by {error:.2g} of its largest")
    return error
