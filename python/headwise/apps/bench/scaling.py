"""One layer on one thread and on more."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headwise.apps.bench.contenders import Layer, Shape, dense, observed
from headwise.apps.bench.settings import Settings

OURS, K_HEADS, DENSE = "headwise", "k heads", "dense"


def run(settings: Settings) -> Iterator[dict]:
    """Every shape and dtype, half of the heads, every number of threads: one result each.

    One thread is always included, and two if only one was requested.
    """
    threads = sorted({1, *settings.threads})
    if threads == [1]:
        threads = [1, 2]
    for shape in settings.shapes:
        for dtype in settings.dtypes:
            yield from _case(settings, shape, dtype, threads)


def _case(
    settings: Settings, shape: Shape, dtype: torch.dtype, threads: list[int]
) -> Iterator[dict]:
    heads = max(1, shape.heads // 2)
    layer = Layer(shape, dtype, settings.device, settings.seed)
    module, kept, x = layer.module(heads), layer.k_heads(heads), layer.x
    error = layer.check(*observed(module, lambda: module(x, x, x, need_weights=False)[0]))
    forms = {
        OURS: lambda: module(x, x, x, need_weights=False),
        K_HEADS: lambda: dense(x, kept),
        DENSE: lambda: dense(x, layer.weights),
    }
    # All numbers of threads alternate in one measurement, so that they see the same machine.
    runs = {_name(form, n): call for form, call in forms.items() for n in threads}
    number = {_name(form, n): n for form in forms for n in threads}

    def before(name: str) -> None:
        torch.set_num_threads(number[name])
        layer.touch()  # also wakes the threads

    with torch.no_grad():
        times = settings.timer().measure(runs, before)
    ms = times.milliseconds()
    for n in threads:
        yield {
            "what": "scaling",
            "shape": shape.as_list(),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": n,
            "heads": heads,
            "error": error,
            "ms": {form: ms[_name(form, n)] for form in forms},
            "yardstick": K_HEADS,
            "ratio": {"yardstick": times.ratio(_name(OURS, n), {_name(K_HEADS, n): 1.0})},
            "speed_up": {
                form: times.ratio(_name(form, 1), {_name(form, n): 1.0})["median"] for form in forms
            },
            "goal": None,
        }


def _name(form: str, threads: int) -> str:
    return f"{form}, {threads}"
