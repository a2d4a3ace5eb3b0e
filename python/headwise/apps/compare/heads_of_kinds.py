"""What the heads of an encoder-decoder are worth, one by one, and what they do: Michel et al. 2019
and Voita et al. 2019 on the dense model of a study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

import headwise as hw
from headwise.analysis import metric_difference
from headwise.analysis.ablation import all_but, each_head, only
from headwise.apps.compare.encoder_decoder import kinds_of
from headwise.apps.compare.metrics import METRICS, RESAMPLES
from headwise.apps.compare.settings import BLEU
from headwise.apps.compare.training import logits_of
from headwise.apps.compare.translating import bleu_counts, bleu_of, translations
from headwise.apps.compare.workbench import Workbench
from headwise.apps.tasks.examples import PairExamples
from headwise.explain import AnnotatedBatch
from headwise.explain.role_counts import KINDS
from headwise.nn.instrumenting import instrument, scaled_heads

#: Messages that are translated without each head, and with it alone.
MESSAGES = 150
#: As in Michel et al. 2019: a difference counts if it is as unlikely by chance as this.
SIGNIFICANT = 0.01


def measure(bench: Workbench) -> dict:
    """The part ``attention`` of the results.

    ``bleu`` is that of the dense model on ``messages`` validation messages. Of each of the
    ``layers``: its ``name``, its kind (``attention``), ``without``, the change of BLEU without each
    head, ``only``, that with no other head in the layer, ``without_p`` and ``only_p``, two-sided by
    a paired bootstrap, and the ``roles`` of each head.
    """
    examples = bench.validation.take(MESSAGES)
    assert isinstance(examples, PairExamples)
    model = bench.converted().eval()
    references = examples.texts()
    right = bleu_counts(references, references)

    def counts() -> Tensor:
        return bleu_counts(translations(model, examples, bench.device), references)

    layers: dict[str, dict] = {
        name: {"name": name, "attention": kind} for name, kind in kinds_of(model).items()
    }
    with instrument(model) as opened:
        scales = scaled_heads(opened)
        whole = counts()
        for key, factors in (("without", all_but), ("only", only)):
            for name, _ in each_head(scales, factors, f"BLEU {key}"):
                found = metric_difference(
                    METRICS[BLEU].of, counts(), whole, right, resamples=RESAMPLES
                )
                layers[name].setdefault(key, []).append(100 * found.difference)
                layers[name].setdefault(f"{key}_p", []).append(found.p_value)
    for name, roles in _roles(bench).items():
        layers[name]["roles"] = roles
    return {
        "task": bench.task,
        "messages": len(examples),
        "bleu": bleu_of(whole),
        "layers": list(layers.values()),
    }


def _roles(bench: Workbench) -> dict[str, list[list[str]]]:
    """Layer -> the roles of each head of the dense model, over the messages that heads are scored
    on."""
    examples = bench.train.take(bench.settings.score_limit)
    assert isinstance(examples, PairExamples)
    document = hw.head_roles(
        bench.converted(),
        [annotated(examples, rows) for rows in torch.arange(len(examples)).split(32)],
        forward_fn=lambda model, inputs: logits_of(model, inputs),
        progress=False,
    )
    return {
        layer["name"]: [
            [f"{role['role']} {role['detail']}".strip() for role in head["roles"]]
            for head in layer["heads"]
        ]
        for layer in document["layers"]
    }


def annotated(examples: PairExamples, rows: Sequence[int] | Tensor) -> AnnotatedBatch:
    """Some examples as :func:`headwise.head_roles` takes them.

    No one has aligned the messages. Known is where the target repeats a token of the source, a
    name for example, if it occurs once on each side: the step that generates it is aligned with it.
    """
    rows = [int(row) for row in rows]
    inputs = examples.collate(rows)
    end = examples.tokenizer.eos_token_id

    def side(ids: Tensor, mask: Tensor, special: Tensor) -> dict:
        begins = [
            [token.startswith("Ġ") for token in examples.tokenizer.convert_ids_to_tokens(text)]
            for text in ids.tolist()
        ]
        words = torch.tensor(begins).long().cumsum(1) - 1
        valid = mask.bool()
        return {
            "valid": valid,
            "ids": ids,
            "special": special & valid,
            "words": words.clamp(min=0).masked_fill(special | ~valid, -1),
        }

    source, target = inputs["input_ids"], inputs["decoder_input_ids"]
    first = torch.zeros_like(target, dtype=torch.bool)
    first[:, 0] = True  # with which generation begins
    return AnnotatedBatch(
        inputs=inputs,
        alignment=[_repeated(examples.sources[row], examples.targets[row], end) for row in rows],
        target=AnnotatedBatch(inputs=None, **side(target, inputs["decoder_attention_mask"], first)),
        **side(source, inputs["attention_mask"], source == end),
    )


def _repeated(source: Sequence[int], target: Sequence[int], end: int) -> list[tuple[int, int]]:
    """(Place in the source, step of the decoder that generates it) of tokens that occur once on
    each side. The first step has no token of its own to ask about."""
    once = {token for token in source if source.count(token) == 1 == target.count(token)} - {end}
    return [
        (source.index(token), step) for step, token in enumerate(target) if token in once and step
    ]


#: Headings of :func:`ablation_rows` after the layer and its heads.
WORTH = ("sure", "one alone")


def ablation_rows(found: dict) -> list[list[str]]:
    """One row for each layer: the change of BLEU without each head, how many of these losses are no
    chance, and the change with only the best head, which is named."""
    rows = []
    layers = sorted(found["layers"], key=lambda layer: KINDS.index(layer["attention"]))
    for kind, own in groupby(layers, key=lambda layer: layer["attention"]):
        for place, layer in enumerate(own):
            best = max(range(len(layer["only"])), key=lambda head: layer["only"][head])
            sure = sum(
                p < SIGNIFICANT and change < 0
                for p, change in zip(layer["without_p"], layer["without"], strict=True)
            )
            changes = [f"{change:+.1f}" for change in layer["without"]]
            alone = f"{layer['only'][best]:+.1f} (head {best})"
            rows.append([f"{kind} {place}", *changes, str(sure), alone])
    return rows


def stay_rows(found: dict, runs: Sequence[dict]) -> list[list[str]]:
    """One row for each plan of the first seed, and for the dense model: BLEU, how many heads of
    each kind stay, and how many of those with each role."""
    kinds = {layer["name"]: layer["attention"] for layer in found["layers"]}
    names = roles_of(found)

    def counts(kept: dict) -> list[str]:
        own = [(name, head) for name, heads in kept.items() for head in heads]
        roles = {layer["name"]: layer["roles"] for layer in found["layers"]}
        has = [{_short(role) for role in roles[name][head]} for name, head in own]
        by_kind = [sum(kinds[name] == kind for name, _ in own) for kind in KINDS]
        return [str(n) for n in (*by_kind, *(sum(role in each for each in has) for role in names))]

    whole = {layer["name"]: range(len(layer["roles"])) for layer in found["layers"]}
    rows = []
    for run in runs:
        if run["task"] == found["task"] and (run["method"] == "dense" or "kept" in run):
            share = f"{run['title']}, {run['keep_target']:.0%}" if "kept" in run else "dense"
            bleu = f"{100 * run['metric']['value']:.1f}"
            rows.append([share, bleu, *counts(run.get("kept", whole))])
    return rows


def roles_of(found: dict) -> list[str]:
    """The roles that any head has, in the order of their frequency."""
    every = [
        role
        for layer in found["layers"]
        for own in layer["roles"]
        for role in sorted({_short(role) for role in own})
    ]
    return [role for role, _ in Counter(every).most_common()]


def _short(role: str) -> str:
    """A role without the offset or relation that it is about."""
    return " ".join(word for word in role.split() if word.isalpha() and word not in _DETAILS)


#: Words of a role's detail.
_DETAILS = {"target", "to", "source"}


def sentences(found: dict) -> list[str]:
    """What the ablation says."""
    layers = found["layers"]
    changes = [change for layer in layers for change in layer["without"]]
    sure = sum(
        p < SIGNIFICANT and change < 0
        for layer in layers
        for p, change in zip(layer["without_p"], layer["without"], strict=True)
    )
    best = {kind: [max(o["only"]) for o in layers if o["attention"] == kind] for kind in KINDS}
    alone = ", ".join(f"{sum(v) / len(v):+.1f} in {kind} attention" for kind, v in best.items())
    return [
        f"Without one head the dense model's BLEU of {found['bleu']:.1f} changes by "
        f"{min(changes):+.1f} to {max(changes):+.1f}; for {sure} of {len(changes)} heads a loss is "
        f"no chance (p < {SIGNIFICANT}). With only its best head, a layer costs on average {alone}."
    ]
