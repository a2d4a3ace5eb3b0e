"""Metrics beside accuracy: what they are, and their paired intervals."""

from __future__ import annotations

import pytest
import torch
from headwise.apps.compare import findings, metrics, table
from headwise.apps.compare.metrics import METRICS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def by_hand(predicted: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Macro F1 over the classes that occur, and the correlation of Matthews (Gorodkin 2004)."""
    classes = sorted({*predicted.tolist(), *labels.tolist()})
    counts = torch.zeros(len(classes), len(classes), dtype=torch.float64)
    for own, right in zip(predicted.tolist(), labels.tolist(), strict=True):
        counts[classes.index(right), classes.index(own)] += 1
    hits, rows, columns = counts.diagonal(), counts.sum(1), counts.sum(0)
    f1 = (2 * hits / (rows + columns)).mean().item()
    n = counts.sum()
    over = n * hits.sum() - (rows * columns).sum()
    under = ((n**2 - (columns**2).sum()) * (n**2 - (rows**2).sum())).sqrt()
    return f1, (over / under).item() if under > 0 else 0.0


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(metrics, "RESAMPLES", 60)


@given(seed=st.integers(0, 10_000), classes=st.integers(1, 5), rows=st.integers(2, 40))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_metrics_are_those_of_the_books(seed, classes, rows):
    generator = torch.Generator().manual_seed(seed)
    predicted, labels = torch.randint(classes, (2, rows), generator=generator)
    f1, matthews = by_hand(predicted, labels)
    assert METRICS["f1"].of(predicted, labels) == pytest.approx(f1)
    assert METRICS["matthews"].of(predicted, labels) == pytest.approx(matthews, abs=1e-12)


def run(method: str, seed: int, wrong: int, kind: str) -> dict:
    """A run on 60 inputs, the first ``wrong`` of which it takes for class 0."""
    labels = torch.arange(60) % 3
    predicted = torch.where(torch.arange(60) < wrong, 0, labels)
    right = (predicted == labels).double().mean().item()
    return {
        "task": "t", "method": method, "title": method, "kind": kind, "seed": seed,
        "keep_target": 1.0 if kind == "dense" else 0.5, "train_steps": 1, "latency": [],
        "accuracy": right, "accuracy_interval": [right - 0.1, right + 0.1],
        "heads_mean": 0.5, "heads_std": 0.0, "jaccard_distance": 0.0, "latency_ms": 1.0,
        "latency_ratio_to_dense": 1.0, "macs_ratio_to_dense": 1.0,
        "attention_macs_ratio_to_dense": 1.0, "validation_accuracy": right,
        "correct": "".join("01"[int(hit)] for hit in predicted == labels),
        "metric": metrics.recorded("f1", predicted, labels, predicted, labels),
    }  # fmt: skip


def test_methods_are_compared_by_the_metric():
    runs = [
        *(run("dense", seed, 6, "dense") for seed in (0, 1)),
        *(run("worse", seed, 30 + seed, "static") for seed in (0, 1)),
        *(run("better", seed, 12, "static") for seed in (0, 1)),
        *(run("gate", seed, 24, "dynamic") for seed in (0, 1)),
    ]
    labels = torch.arange(60) % 3
    value = {name: by_hand(torch.where(torch.arange(60) < wrong, 0, labels), labels)[0]
             for name, wrong in {"dense": 6, "better": 12, "gate": 24}.items()}  # fmt: skip
    summary = findings.summarise(runs)
    found = {entry["method"]: entry["metric"] for entry in summary}
    assert found["better"]["title"] == "macro F1"
    assert found["better"]["value"] == pytest.approx(value["better"])
    (comparison,) = findings.compare(runs, summary)
    assert comparison["static"] == "better"
    for key, points in {
        "static_minus_dense": value["better"] - value["dense"],
        "dynamic_minus_static": value["gate"] - value["better"],
    }.items():
        assert comparison[key]["points"] == pytest.approx(100 * points)
        assert comparison[key]["low"] < 100 * points < comparison[key]["high"] <= 0
    result = {"summary": summary, "comparisons": [comparison], "runs": runs}
    sentence = findings.sentences(result)[0]
    assert f"keeps {100 * value['better']:.1f} of macro F1" in sentence
    assert [name for name, _ in table.columns(summary)][:3] == ["method", "accuracy", "macro F1"]


def test_the_interval_of_one_seed_is_a_bootstrap_over_inputs():
    found = metrics.summarised([run("gate", 0, 24, "dynamic")])
    assert found["low"] < found["value"] < found["high"] < 1
    certain = metrics.summarised([run("gate", 0, 0, "dynamic")])
    assert certain["low"] == certain["value"] == certain["high"] == 1
