"""Metrics beside accuracy: of a classifier by scikit-learn, of a translator by sacrebleu."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.analysis import metric_difference
from headwise.apps.compare.settings import BLEU
from headwise.apps.compare.statistics import mean_interval
from headwise.apps.compare.translating import bleu_of

#: Draws of a bootstrap; each computes the metric twice for every seed.
RESAMPLES = 500


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: as in ``--metric``.
        title: in tables and sentences.
        of: (answers [n, ...], right ones [n, ...]) -> the metric, at most 1. Answers are the
            predicted classes; of texts :func:`headwise.apps.compare.translating.bleu_counts`.
        package: what computes it.
    """

    name: str
    title: str
    of: Callable[[Tensor, Tensor], float]
    package: str = "sklearn"

    def mean(self, predicted: Tensor, labels: Tensor) -> float:
        """The mean over the models of ``predicted``, [n, models]."""
        values = [self.of(own, labels) for own in predicted.unbind(1)]
        return sum(values) / len(values)


def _macro_f1(predicted: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels.numpy(), predicted.numpy(), average="macro", zero_division=0.0))


def _matthews(predicted: Tensor, labels: Tensor) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels.numpy(), predicted.numpy()))


def _bleu(counts: Tensor, right: Tensor) -> float:
    return min(1.0, bleu_of(counts) / 100)


#: Without accuracy, which every study has.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("f1", "macro F1", _macro_f1),
        Metric("matthews", "Matthews correlation", _matthews),
        Metric(BLEU, "BLEU", _bleu, "sacrebleu"),
    )
}


def recorded(
    name: str, validation: Tensor, validation_labels: Tensor, test: Tensor, labels: Tensor
) -> dict:
    """The metric in a run's record, from the answers of both parts and the right ones."""
    metric = METRICS[name]
    return {
        "name": name,
        "value": metric.of(test, labels),
        "validation": metric.of(validation, validation_labels),
        "predicted": test.tolist(),
        "labels": labels.tolist(),
    }


def summarised(runs: Sequence[dict]) -> dict:
    """The metric over the seeds of a method: its mean and 95% interval (Student's t; of one seed a
    bootstrap over test inputs)."""
    own = [run["metric"] for run in runs]
    mean, low, high = mean_interval([one["value"] for one in own])
    if len(own) == 1:
        metric = METRICS[own[0]["name"]]
        predicted, labels = predictions(runs)
        # Against a second model that is always right: the metric of that one is 1.
        found = metric_difference(
            metric.mean, predicted, labels[:, None], labels, resamples=RESAMPLES
        )
        low, high = 1 + found.low, 1 + found.high
    return {
        "name": own[0]["name"],
        "title": METRICS[own[0]["name"]].title,
        "value": mean,
        "low": low,
        "high": high,
        "validation": sum(one["validation"] for one in own) / len(own),
    }


def predictions(runs: Sequence[dict]) -> tuple[Tensor, Tensor]:
    """The answers of some runs [N, runs, ...], and the right ones [N, ...]."""
    predicted = torch.tensor([run["metric"]["predicted"] for run in runs]).transpose(0, 1)
    return predicted, torch.tensor(runs[0]["metric"]["labels"])


def difference(first: Sequence[dict], second: Sequence[dict]) -> tuple[float, float, float]:
    """The metric of the runs of one method minus that of another, the means over seeds, with its
    95% interval by a paired bootstrap over test inputs."""
    metric = METRICS[first[0]["metric"]["name"]]
    (own, labels), (other, _) = predictions(first), predictions(second)
    found = metric_difference(metric.mean, own, other, labels, resamples=RESAMPLES)
    return found.difference, found.low, found.high
