"""Documents for the tests of the page, made by hand after the schemas of docs/."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "compare-reviews" / "results.json"

HOSTILE = (
    '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
    "<a href='javascript:window.hacked=1'>&lt;b&gt;</a>{{ 7 * 7 }} $x^2$ <!--<script> \u2028 \u2029"
)


def explanation(
    texts=("a fine film", "a dull plot"),
    *,
    layers: int = 2,
    heads: int = 3,
    label: str = "up",
    tokens: int = 4,
    gated: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Of format ``headwise.explanation``; ``gated=False``: as of a model without gates."""
    draw = random.Random(seed)
    inputs = []
    for place, text in enumerate(texts):
        words = [text, *(f"t{n}" for n in range(1, tokens))]
        layer_list = []
        for site in range(layers):
            own = []
            for head in range(heads):
                rows = [[draw.random() ** 3 for _ in range(tokens)] for _ in range(tokens)]
                rows = [[weight / sum(row) for weight in row] for row in rows]
                own.append(
                    {
                        "head": head,
                        "on": head != 1 or not gated,
                        "weight": 1.0 if head != 1 or not gated else 0.0,
                        "relevance": draw.gauss(0, 1) if gated else None,
                        "rank": head + 1 if gated else None,
                        "margin": draw.gauss(0, 1) if gated else None,
                        "budget_needed": (head + 1) / heads if gated else None,
                        "constant": 0.1 if gated else None,
                        "shares": [draw.gauss(0, 1) for _ in words] if gated else None,
                        "effect": draw.gauss(0, 0.1),
                        "changes_prediction": head == 2,
                        "entropy": draw.random(),
                        "confidence": draw.random(),
                        "pairs": [{"query": 1, "key": 0, "weight": 0.5}],
                        "attention": rows,
                        "roles": None,
                    }
                )
            budget = {
                "value": 0.66, "asked": 0.7, "min": 0.1, "max": 1.0,
                "attribution": {
                    "method": "integrated gradients", "steps": 32, "baseline": 0.5,
                    "tokens": [0.05] * tokens, "completeness_error": 1e-9,
                },
            }  # fmt: skip
            layer_list.append(
                {
                    "site": site, "name": f"layers.{site}", "call": 0, "num_heads": heads,
                    "queries": tokens, "keys": tokens, "heads": own,
                    "gate": {
                        "type": "BudgetGate" if gated else "none",
                        "how": "A network gives every input a budget." if gated else "No gate.",
                        "ranked": heads if gated else None,
                        "rule": "rank" if gated else "none",
                        "threshold": None,
                        "count": heads - 1 if gated else None,
                        "budget": budget if gated else None,
                    },
                }
            )  # fmt: skip
        on = sum(head["on"] for layer in layer_list for head in layer["heads"])
        labels = [label, f"not {label}"]
        inputs.append(
            {
                "text": text,
                "tokens": words,
                "prediction": {
                    "class": place % 2, "label": labels[place % 2], "log_probability": -0.1,
                    "probabilities": [0.9, 0.1] if place % 2 == 0 else [0.1, 0.9],
                    "labels": labels,
                },
                "heads": layers * heads,
                "heads_on": on,
                "agreement": {"sites": [0.5] * layers, "mean": 0.5} if gated else None,
                "layers": layer_list,
            }
        )  # fmt: skip
    model = {"class": "Model", "layers": layers, "sites": layers, "heads": layers * heads}
    return {"format": "headwise.explanation", "version": 1, "model": model, "inputs": inputs}


def use(classes=("down", "up"), *, layers: int = 2, heads: int = 3) -> dict[str, Any]:
    """Of format ``headwise.use``."""
    shape = [
        {"site": site, "name": f"layers.{site}", "call": 0, "num_heads": heads}
        for site in range(layers)
    ]
    others = len(classes) - 1
    role = {
        "role": "offset", "detail": "-1", "share": 0.9, "low": 0.8, "high": 0.95,
        "chosen_share": 0.91, "baseline": 0.3, "trials": 400,
    }  # fmt: skip
    test = {"correlation": 0.25, "p": 0.01, "q": 0.04}
    roles = {
        "format": "headwise.roles", "version": 1, "inputs": 60, "halves": [30, 30], "seed": 0,
        "resamples": 100, "thresholds": {"offset": 0.6},
        "questions": [
            {"role": "offset", "detail": "-1", "trials": 400, "baseline": 0.3,
             "best": {"site": 0, "head": 0, "share": 0.9}},
        ],
        "layers": [
            {**one, "heads": [
                {"head": head, "entropy": 0.5, "roles": [role] if head == 0 else []}
                for head in range(heads)
            ]}
            for one in shape
        ],
    }  # fmt: skip
    used = [
        {
            "head": head,
            "frequency": (1.0, 0.5, 0.0)[head % 3],
            "by_class": [(1.0, 0.25, 0.0)[head % 3], *[(1.0, 0.75, 0.0)[head % 3]] * others],
            "information": {"bits": 0.2, "by_chance": 0.01, "p": 0.001, "q": 0.003}
            if head == 1
            else None,
            **{key: test if head == 1 else None for key in ("length", "entropy", "confidence")},
        }
        for head in range(heads)
    ]  # fmt: skip
    return {
        "format": "headwise.use", "version": 1,
        "model": {"class": "Model", "layers": layers, "sites": layers, "heads": layers * heads},
        "data": {
            "texts": 60, "classes": list(classes), "predicted": [20, *[40] * others],
            "accuracy": 0.75, "tokens_mean": 9.5,
        },
        "settings": {
            "batch_size": 32, "max_length": 128, "permutations": 10, "resamples": 10, "seed": 0,
        },
        "roles": roles,
        "use": {
            "heads": layers * heads, "heads_mean": 3.0, "heads_std": 0.5, "heads_min": 2,
            "heads_max": 4, "always": 2, "never": 2,
            "by_length": [
                {"from": 3, "to": 8, "inputs": 30, "heads_mean": 2.5},
                {"from": 8, "to": 20, "inputs": 30, "heads_mean": 3.5},
            ],
            "heads_and": {"length": 0.2, "entropy": 0.1, "confidence": None},
            "layers": [{**one, "heads": used} for one in shape],
            "together": [{"first": [0, 1], "second": [1, 1], "phi": -0.4}],
            "substitutes": [{"site": 0, "heads": [1, 2], "phi_min": -0.5}],
        },
        "role_use": [
            {"role": "offset", "heads": 2, "others": 4, "property": "frequency", "mean": 1.0,
             "mean_of_others": 0.25, "correlation": 1.0, "p": 0.02, "q": 0.04},
        ],
        "stability": [
            {"kind": "noise", "name": "capitals", "jaccard": 0.8, "low": 0.7, "high": 0.9,
             "jaccard_other_inputs": 0.5, "same_prediction": 0.9, "accuracy": 0.7,
             "texts_changed": 55},
        ],
        "faithfulness": {
            "inputs": 30, "removed": [0.0, 0.5, 1.0], "stated": [-0.1, -0.2, -0.7],
            "random": [-0.1, -0.4, -0.7], "random_orders": 3, "area": 0.1, "low": 0.05,
            "high": 0.15,
        },
    }  # fmt: skip


def compared() -> dict[str, Any]:
    """``results.json`` of a study that was run."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def hostile(document: Any) -> Any:
    """The document with a hostile ending to every text in it that is not a word of the schema."""
    kept = ("format", "type", "rule", "role", "kind", "method", "task", "static", "dynamic")
    if isinstance(document, dict):
        return {name: value if name in kept else hostile(value) for name, value in document.items()}
    if isinstance(document, list):
        return [hostile(value) for value in document]
    return f"{document} {HOSTILE}" if isinstance(document, str) else document


def hostile_study() -> dict[str, Any]:
    """The study with hostile texts, in which methods and tasks still go by their names."""
    shown = hostile(compared())
    for task, own in zip(shown["tasks"], compared()["tasks"], strict=True):
        task["name"] = own["name"]
    return shown


CONLLU = """\
# sent_id = 1
1\tThe\tthe\tDET\t_\t_\t2\tdet\t_\t_
2-3\tfilms\t_\t_\t_\t_\t_\t_\t_\t_
2\tfilm\tfilm\tNOUN\t_\t_\t4\tnsubj\t_\t_
3\tis\tbe\tAUX\t_\t_\t4\tcop\t_\t_
4\tgood\tgood\tADJ\t_\t_\t0\troot\t_\t_

1\tFine\tfine\tADJ\t_\t_\t0\troot\t_\t_
1.1\tx\t_\t_\t_\t_\t_\t_\t_\t_
"""
