"""``headwise.explain.head_roles``: what each head does over a data set, with the evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise._C import __version__
from headwise.explain.annotated import AnnotatedBatch
from headwise.explain.document import Roles
from headwise.explain.questions import Question
from headwise.explain.recording import own_copy
from headwise.explain.role_counts import RoleCounts, asked, count_roles, questions_for
from headwise.explain.use import number
from headwise.io.fingerprint import fingerprint
from headwise.io.printable import quoted
from headwise.io.store import Store, locked
from headwise.nn.batches import batch_list
from headwise.nn.intervention import ForwardFunction

_ops = torch.ops.headwise


@dataclass(frozen=True)
class RoleThresholds:
    """When a head has a role. Shares are of a head's trials, in [0, 1].

    Attributes:
        offset: least share of tokens whose strongest key (without special tokens) is the one at the
            offset. Voita et al. (2019) require 0.9.
        first: least share whose strongest key of all is the first token. As for offsets, Voita et
            al. require 0.9 of heads that attend by position.
        separator: ... is a separator.
        same_token: ... of tokens that occur again, that look at another occurrence.
        rare_token: ... that look at the rarest token of the input.
        syntactic: least share of a relation's words that look at the word it joins them to.
        alignment: least share of aligned tokens that look at their counterpart.
        grid_offset: least share of patches that look at the neighbour.
        margin: how far same-token, rare-token, syntactic and alignment shares must be above the
            best fixed offset (Voita et al.: 10 points), and first and separator shares above the
            mean of the other heads.
        broad: least mean entropy of attention, over the largest possible.
        narrow: largest mean entropy.
        least_trials: roles with fewer trials in either half are not given.
    """

    offset: float = 0.6
    first: float = 0.9
    separator: float = 0.9
    same_token: float = 0.3
    rare_token: float = 0.5
    syntactic: float = 0.0
    alignment: float = 0.5
    grid_offset: float = 0.5
    margin: float = 0.1
    broad: float = 0.9
    narrow: float = 0.3
    least_trials: int = 20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "least_trials" and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if self.least_trials < 1:
            raise ValueError(f"least_trials must be positive, got {self.least_trials}")

    def of(self, role: str) -> float:
        return getattr(self, role.replace(" ", "_"))


#: Roles that must beat the best fixed offset.
AGAINST_OFFSETS = ("same token", "rare token", "syntactic", "alignment")
#: Roles that must beat the other heads. A head with nothing to look for looks at a token without
#: information (Clark et al. 2019, section 3.2), and in some models most heads do so most of the
#: time: that is the model's habit, and a role must set a head apart.
AGAINST_HEADS = ("first", "separator")


def head_roles(
    model: nn.Module,
    batches: Sequence[AnnotatedBatch],
    *,
    thresholds: RoleThresholds | None = None,
    offsets: int = 2,
    grid: tuple[int, int] | None = None,
    forward_fn: ForwardFunction | None = None,
    seed: int = 0,
    resamples: int = 1000,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> Roles:
    """Finds what each head looks at, over a data set.

    Every role is a yes/no question about each token: is its strongest key the one that the role
    predicts? (Voita et al. 2019, arXiv 1905.09418; Clark et al. 2019, arXiv 1906.04341.) The inputs
    are split in two halves at random. A head gets a role if its share of yes passes the threshold
    in the first half, in which heads and offsets are chosen, *and* in the second; the reported
    share, its interval (bootstrap over inputs) and its baseline are the second's. The baseline is
    the fixed offset, in words, that fits the first half best; for the first token and separators,
    which heads fall back on, it is the mean of the other heads. A head may have several roles, or
    none. All heads are examined, whether or not a gate would run them.

    In an encoder-decoder, whose batches have a ``target``, the encoder's self-attention is asked
    about the tokens of the batch, the decoder's about those of the target, and cross-attention
    whether a target token looks at the token that it is aligned with.

    No attention weights are kept: memory is O(B L) per batch.

    Args:
        model: a converted or convertible model.
        batches: a list of annotated batches (:func:`annotate_texts` makes them of texts).
        thresholds: when a head has a role.
        offsets: token offsets to ask about, up to this far.
        grid: (rows, columns) of images: asks about 2-D offsets too.
        forward_fn: ``(model, inputs)`` runs the given model; its result is not used.
        seed: of the halves and of the bootstrap.
        resamples: of the bootstrap.
        folder: finished batches are saved here, and the same call resumes from them. Those of
            another model, other batches or other questions are removed; ``forward_fn`` must be the
            same.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Returns:
        A document (a dictionary) of format ``headwise.roles`` (docs/interpretability.md).

    Raises:
        ValueError: no batches, fewer than two inputs, or options out of range.
        RuntimeError: another run is using ``folder``.
    """
    thresholds = thresholds or RoleThresholds()
    batches = batch_list(batches)
    for batch in batches:
        if not isinstance(batch, AnnotatedBatch):
            raise TypeError(f"batches must hold AnnotatedBatch only, got {quoted(batch)}")
    if sum(len(batch.valid) for batch in batches) < 2:
        raise ValueError("batches must hold at least two inputs: one for each half")
    questions = questions_for(
        batches, offsets=offsets, grid=grid, least_trials=thresholds.least_trials
    )
    model = own_copy(model)
    with locked(folder):
        key = {} if folder is None else {
            "model": fingerprint(model), "data": fingerprint(batches),
            "questions": asked(questions), "version": __version__,
        }  # fmt: skip
        counts = count_roles(
            model,
            batches,
            questions,
            forward_fn=forward_fn,
            store=Store.in_folder(folder, "head-roles", key, only=True),
            progress=progress,
        )
    return score_roles(counts, thresholds, seed=seed, resamples=resamples)


def score_roles(
    counts: Sequence[RoleCounts],
    thresholds: RoleThresholds,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> Roles:
    """The roles that the counts support, as a document."""
    generator = torch.Generator().manual_seed(seed)
    inputs = len(counts[0].trials)
    order = torch.randperm(inputs, generator=generator)
    choosing, scoring = order[: inputs // 2], order[inputs // 2 :]
    layers: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    for own in counts:
        first, second = _Half(own, choosing), _Half(own, scoring)
        labels = _label(own, thresholds, first, second)
        _add_intervals(labels, own, scoring, resamples, seed)
        _add_entropy_roles(labels, own, thresholds, choosing, scoring, resamples, seed)
        layers += _layers(own, labels)
        questions += _question_table(own, first, second)
    return Roles(
        {
            "format": "headwise.roles",
            "version": 1,
            "inputs": inputs,
            "halves": [len(choosing), len(scoring)],
            "seed": seed,
            "resamples": resamples,
            "thresholds": asdict(thresholds),
            "questions": questions,
            "layers": sorted(layers, key=lambda layer: layer["site"]),
        }
    )


def _layers(counts: RoleCounts, labels: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    layers, start = [], 0
    for site in counts.sites:
        layers.append(
            {
                "site": site.place,
                "name": site.name,
                "call": site.call,
                "attention": counts.kind,
                "num_heads": site.heads,
                "heads": [
                    {
                        "head": head,
                        "entropy": number(counts.entropy[:, start + head].mean().item()),
                        "roles": [_public(label) for label in labels[start + head]],
                    }
                    for head in range(site.heads)
                ],
            }
        )
        start += site.heads
    return layers


class _Half:
    """Shares over some of the inputs."""

    def __init__(self, counts: RoleCounts, rows: Tensor):
        self.trials = counts.trials[rows].sum(0).double()  # [F]
        safe = self.trials.clamp(min=1)
        self.share = counts.hits[rows].sum(0).double() / safe  # [M, F]
        self.baseline = counts.baseline[rows].sum(0).double() / safe  # [O, F]
        others = max(1, len(self.share) - 1)
        self.habit = (self.share.sum(0) - self.share) / others  # [M, F]: mean of the other heads

    def against(self, question: Question, column: int, offset: int | Tensor) -> Tensor:
        """``[M]``: the share that a head must beat to have the role."""
        if question.role in AGAINST_HEADS:
            return self.habit[:, column]
        return self.baseline[offset, column].expand(len(self.share))


def _label(
    counts: RoleCounts, thresholds: RoleThresholds, first: _Half, second: _Half
) -> list[list[dict[str, Any]]]:
    """The roles of each head that pass in both halves."""
    heads = counts.hits.size(1)
    labels: list[list[dict[str, Any]]] = [[] for _ in range(heads)]
    offset = first.baseline.argmax(0)  # [F]: the fixed offset that fits the first half best
    for column, question in enumerate(counts.questions):
        if min(first.trials[column], second.trials[column]) < thresholds.least_trials:
            continue
        least = thresholds.of(question.role)
        best = second.against(question, column, offset[column])  # [M]
        both = torch.ones(heads, dtype=torch.bool)
        for half in (first, second):
            limit = torch.full((heads,), least, dtype=torch.float64)
            if question.role in AGAINST_OFFSETS + AGAINST_HEADS:
                against = half.against(question, column, offset[column])
                limit = limit.maximum(against + thresholds.margin)
            both &= half.share[:, column] >= limit  # [M]
        for head in both.nonzero().flatten().tolist():
            labels[head].append(
                {
                    "role": question.role,
                    "detail": question.detail,
                    "share": second.share[head, column].item(),
                    "low": None,
                    "high": None,
                    "chosen_share": first.share[head, column].item(),
                    "baseline": best[head].item(),
                    "trials": int(second.trials[column]),
                    "_question": column,
                }
            )
    return labels


def _add_intervals(
    labels: list[list[dict[str, Any]]],
    counts: RoleCounts,
    rows: Tensor,
    resamples: int,
    seed: int,
) -> None:
    flat = [(head, label) for head, found in enumerate(labels) for label in found]
    if not flat:
        return
    heads = torch.tensor([head for head, _ in flat])
    numbers = torch.tensor([label["_question"] for _, label in flat])
    hits = counts.hits[rows][:, heads, numbers]  # [N, labels]
    trials = counts.trials[rows][:, numbers]
    _, low, high = _ops.share_interval(hits, trials, resamples, seed)
    for place, (_, label) in enumerate(flat):
        label["low"], label["high"] = low[place].item(), high[place].item()


def _add_entropy_roles(
    labels: list[list[dict[str, Any]]],
    counts: RoleCounts,
    thresholds: RoleThresholds,
    choosing: Tensor,
    scoring: Tensor,
    resamples: int,
    seed: int,
) -> None:
    """Broad and narrow heads: the mean entropy is used as the share."""
    chosen = counts.entropy[choosing].double().mean(0)  # [M]
    entropy = counts.entropy[scoring].double()  # [N, M]
    mean, low, high = _ops.share_interval(entropy, torch.ones_like(entropy), resamples, seed)
    for head, found in enumerate(labels):
        for role in ("broad", "narrow"):
            limit, values = thresholds.of(role), (chosen[head].item(), mean[head].item())
            if all(v >= limit if role == "broad" else v <= limit for v in values):
                found.append(
                    {
                        "role": role,
                        "detail": "",
                        "share": values[1],
                        "low": low[head].item(),
                        "high": high[head].item(),
                        "chosen_share": values[0],
                        "baseline": None,
                        "trials": len(scoring),
                    }
                )


def _question_table(counts: RoleCounts, first: _Half, second: _Half) -> list[dict[str, Any]]:
    """For each question, the head with the best answers: chosen in the first half."""
    rows = []
    sites = [(site.place, head) for site in counts.sites for head in range(site.heads)]
    for column, question in enumerate(counts.questions):
        if min(first.trials[column], second.trials[column]) < 1 or not sites:
            continue
        head = int(first.share[:, column].argmax())
        offset = int(first.baseline[:, column].argmax())
        rows.append(
            {
                "role": question.role,
                "detail": question.detail,
                "attention": counts.kind,
                "trials": int(second.trials[column]),
                "best": {
                    "site": sites[head][0],
                    "head": sites[head][1],
                    "share": number(second.share[head, column].item()),
                },
                "baseline": number(second.against(question, column, offset)[head].item()),
            }
        )
    return rows


def _public(label: dict[str, Any]) -> dict[str, Any]:
    return {
        key: number(value) if isinstance(value, float) else value
        for key, value in label.items()
        if not key.startswith("_")
    }
