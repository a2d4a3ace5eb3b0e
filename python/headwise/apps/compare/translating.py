"""Translations by a model, and their BLEU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwise.apps.tasks.examples import PairExamples

#: Tokens of a translation at most.
LONGEST = 48
#: BLEU counts n-grams up to this long (Papineni et al. 2002).
_ORDERS = 4
#: Numbers of :func:`bleu_counts`: matches and n-grams of each order, and two lengths.
COUNTS = 2 * _ORDERS + 2


@torch.no_grad()
def generate(model: nn.Module, inputs: dict[str, Tensor], least: int, most: int) -> Tensor:
    """Greedy translations, int64 [B, T].

    Args:
        least, most: their tokens.
    """
    translator: Any = model
    return translator.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        min_new_tokens=least,
        max_new_tokens=most,
        num_beams=1,
        do_sample=False,
        use_cache=True,
    )


def translations(
    model: nn.Module, examples: PairExamples, device: torch.device, batch_size: int = 64
) -> list[str]:
    """The greedy translation of each source."""
    model.eval()
    found = [""] * len(examples)
    for batch in examples.in_order(batch_size):
        tokens = generate(model, batch.to(device).inputs, 0, LONGEST)
        texts = examples.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for row, text in zip(batch.rows.tolist(), texts, strict=True):
            found[row] = text.strip()
    return found


def bleu_counts(texts: Sequence[str], references: Sequence[str]) -> Tensor:
    """What BLEU counts in each text, int64 [N, 10]; corpora are sums of rows.

    sacrebleu's tokenizer "13a" (Post, WMT 2018) makes words of the texts. The counts of a text
    itself are those of a perfect translation.
    """
    from sacrebleu.metrics import BLEU

    bleu = BLEU()
    rows = []
    for text, reference in zip(texts, references, strict=True):
        score = bleu.corpus_score([text], [[reference]])
        rows.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return torch.tensor(rows, dtype=torch.long).view(-1, COUNTS)


def bleu_of(counts: Tensor) -> float:
    """BLEU of the corpus that has these counts, in [0, 100], as sacrebleu computes it."""
    from sacrebleu.metrics import BLEU

    matches, totals, lengths = counts.sum(0).split([_ORDERS, _ORDERS, 2])
    own, reference = lengths.tolist()
    return BLEU.compute_bleu(
        matches.tolist(), totals.tolist(), own, reference, smooth_method="exp"
    ).score


def answers(
    model: nn.Module, examples: PairExamples, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The counts of a model's translations, and of the references, each [N, 10]."""
    right = examples.texts()
    own = bleu_counts(translations(model, examples, device), right)
    return own, bleu_counts(right, right)
