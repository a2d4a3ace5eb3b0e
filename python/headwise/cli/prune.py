"""``headwise prune``: removes the heads that a plan drops from a model, for good."""

from __future__ import annotations

import argparse
from pathlib import Path

from headwise.cli.common import add_common, use_device, use_threads, writable_file
from headwise.compare.errors import UsageError


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "prune",
        help="remove the heads that a plan drops from a model",
        description="Removes the heads that a plan drops from the weights of a model and writes "
        "the smaller model to --out (read it with headwise.load).",
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a transformers BERT"
    )
    parser.add_argument(
        "--plan", type=Path, required=True, metavar="FILE", help="from 'headwise score --keep'"
    )
    add_common(parser, out=None)
    return parser


def run(options: argparse.Namespace) -> None:
    import headwise as hw
    from headwise.compare.models import load_tokenizer, load_trained
    from headwise.compare.store import write_json

    if options.out is None:
        raise UsageError("prune needs --out DIR for the smaller model")
    if options.out.resolve() == options.model.resolve():
        raise UsageError("--out must not be the folder of the model that is pruned")
    if not options.plan.is_file():
        raise UsageError(f"there is no plan {options.plan}")
    writable_file(options.json)
    writable_file(options.out.parent / "out" if not options.out.exists() else None)
    device = use_device(options.device)
    use_threads(options.threads)
    try:
        plan = hw.HeadPlan.load(options.plan)
    except ValueError as error:
        raise UsageError(f"{options.plan} is not a plan: {error}") from None
    model = load_trained(options.model).to(device)
    try:
        small = hw.prune(model, plan)
        hw.save(small, options.out, tokenizer=load_tokenizer(options.model))
    except ValueError as error:
        raise UsageError(str(error)) from None

    def heads(model) -> int:
        return sum(layer.num_heads for layer in hw.attention_layers(model).values())

    def parameters(model) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    result = {
        "model": str(options.model),
        "out": str(options.out),
        "heads": [heads(model), heads(small)],
        "parameters": [parameters(model), parameters(small)],
        "heads_by_layer": {
            name: layer.num_heads for name, layer in hw.attention_layers(small).items()
        },
    }
    print(
        f"heads {result['heads'][0]} -> {result['heads'][1]}, "
        f"parameters {result['parameters'][0]:,} -> {result['parameters'][1]:,}; "
        f"wrote {options.out}"
    )
    if options.json is not None:
        write_json(options.json, result)
