"""``headwise score``: how much each head of a trained model matters, and plans made of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from headwise.cli.common import (
    add_common,
    positive,
    share,
    use_device,
    use_threads,
    writable_file,
)
from headwise.compare.errors import UsageError

METRICS = ("michel", "entropy", "confidence", "hies")


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "score",
        help="score the heads of a trained model on labelled texts",
        description="Scores every attention head of a trained text classifier on labelled texts, "
        "prints a table, and with --keep writes a plan for 'headwise prune'.",
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a fine-tuned transformers BERT"
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FILE", help="labelled texts: .csv or .jsonl"
    )
    parser.add_argument("--text", default="text", metavar="COLUMN", help="default: text")
    parser.add_argument("--label", default="label", metavar="COLUMN", help="default: label")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=["michel", "entropy", "hies"],
        help="default: michel entropy hies",
    )
    parser.add_argument(
        "--keep", type=share, metavar="SHARE", help="also write a plan that keeps this share"
    )
    parser.add_argument(
        "--limit", type=positive, default=512, metavar="N", help="texts (default: 512)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: 32")
    parser.add_argument("--max-length", type=positive, default=128, metavar="N", help="tokens")
    add_common(parser, out=None)
    return parser


def run(options: argparse.Namespace) -> None:
    import random

    import torch
    from torch.nn import functional as F

    import headwise as hw
    from headwise.compare.examples import encode
    from headwise.compare.models import load_tokenizer, load_trained
    from headwise.compare.store import writable_folder, write_json
    from headwise.compare.tasks import task_from_file

    if options.keep is not None and options.out is None:
        raise UsageError("--keep writes plans, so it needs --out DIR")
    writable_file(options.json)
    if options.out is not None:
        writable_folder(options.out)
    device = use_device(options.device)
    use_threads(options.threads)
    torch.manual_seed(options.seed)
    model = load_trained(options.model).to(device)
    task = task_from_file(options.data, options.text, options.label)
    classes = model.config.num_labels
    if len(task.classes) > classes:
        raise UsageError(
            f"{options.data} has {len(task.classes)} different labels, but the model in "
            f"{options.model} was trained for {classes}"
        )
    task = task.with_labels_of(model.config.label2id)
    rows = list(range(len(task)))
    random.Random(options.seed).shuffle(rows)
    tokenizer = load_tokenizer(options.model)
    examples = encode(task, rows[: options.limit], tokenizer, options.max_length)

    def loss(model, batch):
        batch = batch.to(device)
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return F.cross_entropy(logits.float(), batch.labels, reduction="none")  # [B]

    batches = list(examples.in_order(options.batch_size))
    scores = hw.score_heads(model.eval(), batches, loss, metrics=options.metrics)
    result = {
        "model": str(options.model),
        "data": options.data.name,
        "texts": len(examples),
        "scores": {
            metric: {name: values.tolist() for name, values in found.values.items()}
            for metric, found in scores.items()
        },
    }
    for metric, found in result["scores"].items():
        print(f"{metric}\n{table(found)}\n")
    if options.json is not None:
        write_json(options.json, result)
    if options.out is not None:
        write_json(options.out / "scores.json", result)
        print(f"wrote {options.out / 'scores.json'}")
        for metric in options.metrics if options.keep is not None else ():
            # Entropy says how spread attention is, not how much a head matters.
            if metric in ("michel", "hies"):
                path = options.out / f"plan-{metric}.json"
                hw.plan(scores[metric], keep=options.keep).save(path)
                print(f"wrote {path}")


def table(scores: dict[str, list[float]]) -> str:
    """A row a layer, a column a head."""
    width = max(len(name) for name in scores)
    heads = max(len(values) for values in scores.values())
    lines = [" " * width + "".join(f"{head:>8}" for head in range(heads))]
    for name, values in scores.items():
        lines.append(name.ljust(width) + "".join(f"{value:8.4f}" for value in values))
    return "\n".join(lines)
