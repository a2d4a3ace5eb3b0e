"""Whether scores rank heads alike: across metrics, halves of the texts, seeds and tasks.

    python benchmarks/score_agreement.py --tasks reviews mixed --out agreement \
        --json benchmarks/results/agreement.json

Fine-tunes the bundled model once for each task and seed (or takes what `headwise compare` left in
`OUT/runs`: give the same --out), scores its heads on validation texts by every metric, and compares
the rankings with `headwise.analysis.score_agreement`. Every model and every set of scores is kept
in --out, so an interrupted run resumes. The figures are printed as the tables of
docs/analyses.md.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import headwise as hw
import torch
from headwise.apps.compare import measure
from headwise.apps.compare.settings import preset
from headwise.apps.compare.training import finetune, predict
from headwise.apps.compare.workbench import dense_options
from headwise.apps.tasks.examples import Batch, TextExamples, encode
from headwise.apps.tasks.models import load_classifier, load_tokenizer, model_folder
from headwise.apps.tasks.registry import load_task
from headwise.apps.tasks.tasks import Split, Task, split
from headwise.io.files import write_atomic, write_json
from headwise.io.store import Store
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

METRICS = (
    "michel per token", "michel per example", "michel per batch",
    "entropy", "attention_confidence", "hies", "lrp",
)  # fmt: skip
METHODS = ("spearman", "kendall")
PARTS = ("all", "first half", "second half")
LENGTH = 48  # tokens; longer texts are cut, as `headwise compare` does
CPU = torch.device("cpu")

Scores = dict[str, hw.HeadScores]  # "METRIC, PART" -> scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["reviews", "mixed"], metavar="TASK")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--texts", type=int, default=256, metavar="N", help="scored, of a task")
    parser.add_argument("--dense-steps", type=int, default=420, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if len(set(options.seeds)) < 2:
        parser.error("--seeds must be at least two different ones")
    torch.set_num_threads(options.threads)
    scores: dict[tuple[str, int], Scores] = {}
    models = []
    for task in [load_task(name) for name in options.tasks]:
        parts = split(task, options.seeds[0])
        for seed in options.seeds:
            scores[task.name, seed], about = scores_of(task, parts, seed, options)
            models.append({"task": task.name, "seed": seed, **about})
    found = {
        "environment": measure.environment(CPU, options.threads),
        "settings": {"texts": options.texts, "seeds": options.seeds, "tasks": options.tasks},
        "models": models,
        "agreement": compared(scores, options.tasks, options.seeds),
    }
    print(tables(found))
    if options.json is not None:
        write_json(options.json, found)


def scores_of(
    task: Task, parts: Split, seed: int, options: argparse.Namespace
) -> tuple[Scores, dict]:
    """The scores of one fine-tuned model, and how well it does; computed once."""
    texts = encode(
        task, parts.validation[: options.texts], load_tokenizer(model_folder(None)), LENGTH
    )
    weights = fine_tuned(task, parts, seed, options.dense_steps, options.out)
    key = {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "texts": hashlib.sha256(repr([texts.ids, texts.labels.tolist()]).encode()).hexdigest(),
        "versions": [hw.__version__, torch.__version__],
    }
    name = f"{task.name}-{seed}"
    store = Store.in_folder(options.out / "scores", name, key)
    record = store.get(name)
    if record is None:
        model = load(weights, len(task.classes))
        right = predict(model, texts, device=CPU, precision="float32")[:, 0].mean().item()
        model = hw.convert(model)
        found = {label: scores.to_json() for label, scores in score(model, texts).items()}
        record = {"about": {"accuracy": right, "texts": len(texts)}, "scores": found}
        store.add(name, record)
    print(f"{name}: {record['about']['accuracy']:.3f}", flush=True)
    return (
        {label: hw.HeadScores.from_json(text) for label, text in record["scores"].items()},
        record["about"],
    )


def fine_tuned(task: Task, parts: Split, seed: int, steps: int, out: Path) -> Path:
    """The bundled model as `headwise compare` fine-tunes the dense one, trained if it is not in
    ``out`` yet."""
    path = out / "runs" / f"{task.name}-dense-{seed}.safetensors"
    if path.is_file():
        return path
    settings, folder = preset("full", 0), model_folder(None)
    torch.manual_seed(seed)
    model = load_classifier(folder, len(task.classes))
    texts = encode(task, parts.train, load_tokenizer(folder), LENGTH)
    batches = texts.shuffled(settings.training.batch_size, seed=1000 * seed)
    finetune(model, batches, steps, dense_options(settings), device=CPU)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, to_safetensors(state))
    return path


def load(weights: Path, classes: int) -> nn.Module:
    model = load_classifier(model_folder(None), classes)
    model.load_state_dict(load_file(weights))
    return model.eval()


def logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch.inputs).logits


def losses(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(logits(model, batch), batch.labels, reduction="none")


def score(model: nn.Module, texts: TextExamples) -> Scores:
    """Every metric, on all texts and on each half of them."""
    found: Scores = {}
    rows = (range(len(texts)), range(0, len(texts), 2), range(1, len(texts), 2))
    for part, own in zip(PARTS, rows, strict=True):
        batches = list(texts.rows(own).in_order(32))
        scores = hw.score_heads(model, batches, losses, ("entropy", "attention_confidence", "hies"))
        for absolute in ("per token", "per example", "per batch"):
            scores[f"michel {absolute}"] = hw.score_heads(
                model, batches, losses, absolute=absolute.replace(" ", "_")
            )["michel"]
        scores["lrp"] = hw.analysis.lrp_scores(model, batches, logits).scores
        found |= {f"{metric}, {part}": scores[metric] for metric in METRICS}
    return found


def compared(
    scores: Mapping[tuple[str, int], Scores], tasks: list[str], seeds: list[int]
) -> dict[str, dict]:
    """Every comparison of interest: method -> kind -> rows of value, low, high and common heads."""
    return {
        method: {
            "metrics": across_metrics(scores, tasks, seeds, method),
            "texts": [
                {"task": task, "metric": metric}
                | summary(
                    pair(scores[task, seed], metric, "first half", "second half", method)
                    for seed in seeds
                )
                for task in tasks
                for metric in METRICS
            ],
            "seeds": [
                {"task": task, "metric": metric}
                | summary(
                    between(scores[task, a], scores[task, b], metric, method)
                    for a, b in itertools.combinations(seeds, 2)
                )
                for task in tasks
                for metric in METRICS
            ],
            "tasks": [
                {"tasks": [one, other], "metric": metric}
                | summary(
                    between(scores[one, a], scores[other, b], metric, method)
                    for a in seeds
                    for b in seeds
                )
                for one, other in itertools.combinations(tasks, 2)
                for metric in METRICS
            ],
        }
        for method in METHODS
    }


def across_metrics(scores, tasks: list[str], seeds: list[int], method: str) -> list[dict]:
    found = []
    for task in tasks:
        tables = [
            hw.analysis.score_agreement(
                {m: scores[task, seed][f"{m}, all"] for m in METRICS}, method
            )
            for seed in seeds
        ]
        for (i, one), (j, other) in itertools.combinations(enumerate(METRICS), 2):
            cells = [
                (table.value[i, j].item(), table.low[i, j].item(), table.high[i, j].item(),
                 common(scores[task, seed][f"{one}, all"], scores[task, seed][f"{other}, all"]))
                for table, seed in zip(tables, seeds, strict=True)
            ]  # fmt: skip
            found.append({"task": task, "metrics": [one, other]} | summary(cells))
    return found


def pair(scores: Scores, metric: str, one: str, other: str, method: str) -> tuple:
    return agreement(scores[f"{metric}, {one}"], scores[f"{metric}, {other}"], method)


def between(one: Scores, other: Scores, metric: str, method: str) -> tuple:
    return agreement(one[f"{metric}, all"], other[f"{metric}, all"], method)


def agreement(one: hw.HeadScores, other: hw.HeadScores, method: str) -> tuple:
    """Correlation, its interval, and the share of heads that both would keep."""
    found = hw.analysis.score_agreement({"one": one, "other": other}, method)
    ends = (table[0, 1].item() for table in (found.value, found.low, found.high))
    return (*ends, common(one, other))


def common(one: hw.HeadScores, other: hw.HeadScores) -> float:
    """The share of the heads kept by one score's half plan that the other's keeps too."""
    kept = [
        {(layer.name, head) for layer in hw.plan(scores, keep=0.5).layers for head in layer.heads}
        for scores in (one, other)
    ]
    return len(kept[0] & kept[1]) / len(kept[0])


def summary(cells: Iterable[tuple]) -> dict:
    """Means over pairs of models, with the lowest and the highest end of the intervals."""
    value, low, high, kept = zip(*cells, strict=True)
    return {
        "value": round(sum(value) / len(value), 3),
        "least": round(min(value), 3),
        "most": round(max(value), 3),
        "low": round(min(low), 3),
        "high": round(max(high), 3),
        "common": round(sum(kept) / len(kept), 3),
        "pairs": len(value),
    }


def tables(found: dict) -> str:
    """Markdown, with Spearman's rho and Kendall's tau in each cell."""
    rho, tau = (found["agreement"][method] for method in METHODS)

    def cell(row: dict, other: dict) -> str:
        return (
            f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]; {other['value']:.2f} "
            f"[{other['low']:.2f}, {other['high']:.2f}]; {100 * row['common']:.0f}%"
        )

    tasks = found["settings"]["tasks"]
    lines = ["", "| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    cells = {}
    for row, other in zip(rho["metrics"], tau["metrics"], strict=True):
        cells.setdefault(" and ".join(row["metrics"]), []).append(cell(row, other))
    lines += [f"| {label} | " + " | ".join(row) + " |" for label, row in cells.items()]
    across = [f"{' and '.join(row['tasks'])}" for row in rho["tasks"][:: len(METRICS)]]
    heads = [f"{task}: {kind}" for task in tasks for kind in ("halves", "seeds")] + across
    lines += ["", "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for metric in METRICS:
        columns = [
            cell(row, other)
            for task in tasks
            for kind in ("texts", "seeds")
            for row, other in zip(rho[kind], tau[kind], strict=True)
            if row["task"] == task and row["metric"] == metric
        ]
        columns += [
            cell(row, other)
            for row, other in zip(rho["tasks"], tau["tasks"], strict=True)
            if row["metric"] == metric
        ]
        lines.append(f"| {metric} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
