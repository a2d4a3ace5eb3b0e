"""A whole model with a gate in every layer, relative to the pruned model with the same number of
heads."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import headwise as hw
from headwise.apps.bench.cases import GOALS
from headwise.apps.bench.contenders import CheckFailed, compare, random_gate, randomise
from headwise.apps.bench.joules import energy
from headwise.apps.bench.settings import Settings
from headwise.apps.compare.measure import Turns, Work, model_work
from headwise.apps.tasks.examples import TextExamples, encode
from headwise.apps.tasks.models import (
    load_classifier,
    load_config,
    load_tokenizer,
    model_folder,
    model_name,
)
from headwise.apps.tasks.registry import load_task
from headwise.apps.tasks.tasks import task_from_file
from headwise.explain.texts import longest
from headwise.nn.instrumenting import instrument
from headwise.nn.layers import attention_layers

OURS, PRUNED, DENSE = "headwise", "pruned", "dense"
BATCHES = 8


def dynamic_model(model: nn.Module, share: float) -> nn.Module:
    """``model`` (of :func:`headwise.convert`) with gates: every text runs the given share of the
    heads of each layer, of its own choice.

    The gates' relevance is random: this measures the cost of texts that differ.
    """
    model = hw.convert(model, random_gate(share))
    generator = torch.Generator().manual_seed(11)
    for layer in attention_layers(model).values():
        randomise(layer.gate, generator)
    return model.eval()


def static_model(model: nn.Module, share: float) -> nn.Module:
    """The same number of heads of each layer, the same heads for every text, the rest removed."""
    values = {
        name: torch.arange(layer.num_heads, 0, -1, dtype=torch.float64)
        for name, layer in attention_layers(model).items()
    }
    plan = hw.plan(hw.HeadScores("first", values), keep=share, scope="layer")
    return hw.prune(model, plan).eval()


def run(settings: Settings) -> Iterator[dict]:
    """Texts in their order, padded to the longest of their batch; half of the heads of every layer.

    The dense model is transformers'; the pruned one has only the remaining heads.
    """
    folder = model_folder(settings.model)
    batches, lengths = _batches(settings, folder)
    dense = load_classifier(folder, 2).to(settings.device).eval()
    share = 0.5
    for dtype in settings.dtypes:
        whole = copy.deepcopy(dense).to(dtype)
        models = {
            OURS: dynamic_model(hw.convert(copy.deepcopy(whole)), share),
            PRUNED: static_model(hw.convert(copy.deepcopy(whole)), share),
            DENSE: whole,
        }
        layers = {name: own.num_heads for name, own in attention_layers(models[OURS]).items()}
        heads = [layer.num_heads for layer in attention_layers(models[PRUNED]).values()]
        for threads in settings.threads:
            torch.set_num_threads(threads)
            error = _check(models[OURS], batches[0], dtype)
            turns = {name: Turns(model, batches) for name, model in models.items()}
            times = settings.timer().measure(turns)
            ratio = times.ratio(OURS, {PRUNED: 1.0})
            yield {
                "what": "model",
                "model": model_name(settings.model),
                "shape": [settings.batch_size, None, dense.config.hidden_size, None],
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads,
                "heads_a_layer": heads,
                "tokens": lengths,
                "error": error,
                "ms": times.milliseconds(),
                "yardstick": PRUNED,
                "ratio": {"yardstick": ratio, DENSE: times.ratio(OURS, {DENSE: 1.0})},
                "goal": GOALS["model"].judge(ratio["median"]),
                **energy(
                    settings,
                    {name: Turns(model, batches) for name, model in models.items()},
                    partial(_works, models, dense.config, layers, batches),
                ),
            }


def _works(
    models: dict[str, nn.Module],
    config,
    layers: dict[str, int],
    batches: Sequence[dict[str, Tensor]],
) -> dict[str, Work]:
    return {
        name: model_work(model, config, layers, batches, TextExamples.positions_of)
        for name, model in models.items()
    }


def _batches(settings: Settings, folder) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
    """Batches of texts drawn at random, and what lengths they have."""
    if settings.data is None:
        task = load_task("reviews")
    else:
        task = task_from_file(settings.data, settings.text, settings.label)
    rows = list(range(len(task)))
    random.Random(settings.seed).shuffle(rows)
    rows = rows[: BATCHES * settings.batch_size]
    tokenizer = load_tokenizer(folder)
    length = longest(load_config(folder), tokenizer, settings.max_length)
    examples = encode(task, rows, tokenizer, length)
    found = []
    for start in range(0, len(rows), settings.batch_size):
        batch = examples.batch(range(start, min(len(rows), start + settings.batch_size)))
        found.append(batch.to(settings.device).inputs)
    tokens = examples.lengths
    return found, {
        "mean": sum(tokens) / len(tokens),
        "longest": max(tokens),
        "mean_padded": sum(batch["input_ids"].size(1) for batch in found) / len(found),
    }


@torch.no_grad()
def _check(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> float:
    """Compares the model with itself with every head computed and weighted.

    Rounding differs between the two, so if two heads are almost equally relevant, a deeper layer
    may choose another one: only texts for which all choices agree are compared.
    """
    got, chosen = _traced(model, batch)
    with instrument(model, evaluate=False) as opened:
        opened.probe(lambda name, layer, probe: None)  # so that every head is computed
        want, again = _traced(model, batch)
    same = (chosen == again).flatten(1).all(1)  # [B]
    if 2 * int(same.sum()) < same.numel():
        raise CheckFailed(
            f"headwise and the oracle chose the same heads for {int(same.sum())} of "
            f"{same.numel()} texts only"
        )
    return compare(got[same], want[same].double(), dtype)


def _traced(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits [B, C], and the heads that every layer chose: [B, layers, H]."""
    with hw.trace(model) as trace:
        logits = model(**batch).logits
    return logits, torch.stack([found.index for found in trace.selections.values()], dim=1)
