"""What a run's record says about its model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headwise.apps.compare import measure, metrics, translating
from headwise.apps.compare.encoder_decoder import by_attention, mac_ratios
from headwise.apps.compare.selections import HeadUse, is_dynamic, predict_and_record, swapped
from headwise.apps.compare.settings import ACCURACY
from headwise.apps.compare.statistics import paired_difference, wilson_interval
from headwise.apps.compare.training import graded, predict
from headwise.apps.compare.workbench import Workbench
from headwise.apps.energy.counters import meter_of
from headwise.apps.tasks.examples import Examples, PairExamples


def measured(bench: Workbench, model: nn.Module, timed: nn.Module) -> dict:
    """What a run's record says about its model: the test, read once, and the cost.

    Args:
        model: converted.
        timed: the same, or the unconverted dense model that ratios of time are relative to.
    """
    settings = bench.settings
    options: dict[str, Any] = {
        "device": bench.device,
        "precision": settings.training.precision,
        "read": graded,
    }
    validation = predict(model, bench.validation, **options)  # [N, 2]
    test, use = predict_and_record(model, bench.test, bench.dense_layers, **options)
    right = test[:, 0].double()
    summary = use.summary()
    control = {}
    if is_dynamic(model):
        with swapped(model):
            other = predict(model, bench.test, **options)
        control["swapped_accuracy"] = _mean(other)
    times = measure.latency(
        bench.dense, timed, bench.test, settings.shapes, bench.device,
        settings.latency_s, measure.translate if bench.translates else measure.call,
    )  # fmt: skip
    further = {}
    if settings.energy is not None:
        further["energy"] = measure.energy(
            bench.dense, timed, bench.dense_layers, bench.test, settings.shapes[0],
            bench.device, meter_of(bench.device), settings.energy,
        )  # fmt: skip
    if settings.metric != ACCURACY:
        further["metric"] = metrics.recorded(
            settings.metric,
            *_answers(model, bench.validation, validation, bench.device),
            *_answers(model, bench.test, test, bench.device),
        )
    return {
        "heads_mean": summary.pop("heads_mean"),
        "accuracy": _mean(test),
        "latency_ms": times[0]["ms"],
        "latency_ratio_to_dense": times[0]["ratio"],
        **_mac_ratios(bench, model, use),
        **summary,
        **control,
        "accuracy_interval": list(_interval(right, bench.translates)),
        "validation_accuracy": _mean(validation),
        **_by_domain(bench.test, right, use),
        "latency": times,
        **further,
        **(by_attention(bench.converted(), use) if bench.translates else {}),
        "correct": right.tolist()
        if bench.translates
        else "".join("1" if value else "0" for value in right.tolist()),
    }


def _answers(
    model: nn.Module, examples: Examples, read: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What the metric reads of the model, and the right answers, [N, ...]."""
    if isinstance(examples, PairExamples):
        return translating.answers(model, examples, device)
    return read[:, 1].long(), examples.labels


def _mean(read: Tensor) -> float:
    """The mean share of right labels, of what :func:`headwise.apps.compare.training.graded` reads
    of all inputs."""
    return read[:, 0].double().mean().item()


def _interval(right: Tensor, shares: bool) -> tuple[float, float]:
    """95% interval of the accuracy, from each input's [N]: Wilson, or of shares a bootstrap."""
    if shares:
        return paired_difference(right, torch.zeros_like(right))[1:]
    return wilson_interval(int(right.sum()), len(right))


def _by_domain(test: Examples, right: Tensor, use: HeadUse) -> dict:
    """Accuracy and head use of each domain, if the task has several."""
    if test.domain_of is None:
        return {}
    found = []
    for number, name in enumerate(test.domains):
        own = test.domain_of == number  # [N]
        part = replace(use, chosen=use.chosen[own]).summary()
        found.append(
            {
                "name": name,
                "texts": int(own.sum()),
                "accuracy": right[own].double().mean().item(),
                **{key: part[key] for key in ("heads_mean", "heads_std", "heads_by_layer")},
            }
        )
    return {"domains": found}


def _mac_ratios(bench: Workbench, model: nn.Module, use: HeadUse) -> dict:
    if isinstance(bench.test, PairExamples):
        return mac_ratios(bench.converted(), model, use, bench.test)
    lengths = torch.tensor(bench.test.lengths)
    everything = replace(use, chosen=torch.ones_like(use.chosen))
    dense = measure.macs(bench.dense.config, everything, lengths)
    own = measure.macs(bench.dense.config, use, lengths, model)
    return {
        "macs_ratio_to_dense": own.total / dense.total,
        "attention_macs_ratio_to_dense": (own.attention + own.gates) / dense.attention,
    }
