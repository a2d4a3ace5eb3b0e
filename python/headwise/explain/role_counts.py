"""Answering the role questions for every head, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwise.explain.annotated import AnnotatedBatch
from headwise.explain.questions import (
    CrossQuestions,
    Question,
    Questionnaire,
    excluded_keys,
    fixed_offset_peaks,
)
from headwise.explain.recording import recording
from headwise.io.fingerprint import fingerprint
from headwise.io.printable import layer_called
from headwise.io.progress import with_progress
from headwise.io.store import Store
from headwise.nn.batches import run_model
from headwise.nn.instrumenting import evaluating
from headwise.nn.intervention import ForwardFunction

_ops = torch.ops.headwise

#: The kinds of attention of an encoder-decoder. A model of one sequence has only "self".
KINDS = ("encoder", "decoder", "cross")

Questions = Mapping[str, "Questionnaire | CrossQuestions"]


class Site(NamedTuple):
    """A call of a layer: its place among all calls of a forward, the layer's name, the number of
    its call, and its heads."""

    place: int
    name: str
    call: int
    heads: int


@dataclass(frozen=True)
class RoleCounts:
    """Answers to the questions about one kind of attention.

    Attributes:
        kind: "self", or of an encoder-decoder one of :data:`KINDS`.
        questions: F of them.
        sites: those of this kind.
        hits: int32 ``[N, M, F]``, M heads of all sites together.
        trials: int32 ``[N, F]``.
        baseline: int32 ``[N, O, F]``: hits of heads that always look at a fixed offset.
        entropy: float32 ``[N, M]``, mean entropy of attention over the largest possible.
    """

    kind: str
    questions: list[Question]
    sites: list[Site]
    hits: Tensor
    trials: Tensor
    baseline: Tensor
    entropy: Tensor


def questions_for(
    batches: Sequence[AnnotatedBatch],
    *,
    offsets: int,
    grid: tuple[int, int] | None,
    least_trials: int,
) -> Questions:
    """The questions of every kind of attention that the model has.

    Raises:
        ValueError: only some of the batches have a target.
    """
    options: dict[str, Any] = {"offsets": offsets, "least_trials": least_trials}
    targets = [batch.target for batch in batches if batch.target is not None]
    if not targets:
        return {"self": Questionnaire(batches, grid=grid, **options)}
    if len(targets) < len(batches):
        raise ValueError(
            f"batches must all have a target or none, got {len(targets)} of {len(batches)}"
        )
    return {
        "encoder": Questionnaire(batches, grid=grid, **options),
        "decoder": Questionnaire(targets, **options),
        "cross": CrossQuestions(batches),
    }


class _Answers:
    """The answers about one kind of attention in one batch."""

    def __init__(self, kind: str, questions: Questionnaire | CrossQuestions, batch: AnnotatedBatch):
        self.kind = kind
        target: Any = batch.target
        self.queries: AnnotatedBatch = batch if kind in ("self", "encoder") else target
        self.keys: AnnotatedBatch = target if kind == "decoder" else batch
        self.questions = len(questions.questions)
        self.trials = questions.trials(self.keys)
        self.sites: list[Site] = []
        self.hits: list[Tensor] = []  # int32 [B, H, F] each
        self.entropy: list[Tensor] = []  # [B, H] each

    def add(self, site: Site, layer, probe) -> None:
        lengths = (self.queries.valid.size(1), self.keys.valid.size(1))
        if (probe.q.size(2), probe.k.size(2) - layer._added_keys) != lengths:
            raise ValueError(
                f"{layer_called(site.name)} attends {probe.k.size(2)} keys with {probe.q.size(2)} "
                f"queries; roles need {self.kind}-attention over the {lengths[1]} tokens of valid "
                f"with {lengths[0]} queries"
            )
        self.sites.append(site)
        q, k = probe.q, probe.k[:, :, : lengths[1]]
        masks = (probe.key_padding_mask, probe.attn_mask, probe.is_causal)
        peaks = {}
        for looks in dict.fromkeys(trials.looks for trials in self.trials):
            excluded = excluded_keys(self.keys, looks)
            excluded = None if excluded is None else excluded.to(q.device)
            peaks[looks] = _ops.attention_peaks(q, k, *masks, excluded)[0].cpu()  # [B, H, L]
        self.hits.append(self._answer(peaks, layer.num_heads))
        # Rows of padding do not count.
        padding = ~self.queries.valid.to(q.device)
        entropy, _ = _ops.attention_statistics(q, k, masks[0], padding, masks[1], masks[2])
        self.entropy.append(entropy.float().cpu())

    def _answer(self, peaks: dict[str, Tensor], heads: int) -> Tensor:
        found = torch.zeros(len(self.queries.valid), heads, self.questions, dtype=torch.int32)
        for trials in self.trials:
            rows, group = trials.tensor(), trials.group
            hits, _ = _ops.peak_hits(
                peaks[trials.looks], rows, group, self.questions, trials.others_only
            )
            found = found + hits
        return found

    def result(self) -> dict[str, Tensor]:
        batch = len(self.queries.valid)
        fixed = fixed_offset_peaks(self.queries, self.keys)  # [B, O, L]
        baseline = self._answer({trials.looks: fixed for trials in self.trials}, fixed.size(1))
        asked = torch.zeros(batch, self.questions, dtype=torch.int32)
        for trials in self.trials:
            asked += _ops.peak_hits(fixed, trials.tensor(), trials.group, self.questions)[1]
        no_heads = torch.zeros(batch, 0, self.questions, dtype=torch.int32)
        return {
            "hits": torch.cat([no_heads, *self.hits], 1),
            "trials": asked,
            "baseline": baseline.contiguous(),
            "entropy": torch.cat([torch.zeros(batch, 0), *self.entropy], 1),
        }


class _Counter:
    """Receives the layers of one batch and answers its questions.

    Args:
        decoders: names of a decoder's layers (:func:`_decoders`).
    """

    def __init__(self, questions: Questions, batch: AnnotatedBatch, decoders: set[str]):
        self.answers = {kind: _Answers(kind, own, batch) for kind, own in questions.items()}
        self._decoders = decoders
        self._calls: dict[str, int] = {}
        self._place = 0

    def __call__(self, name, layer, selection, x, probe) -> None:
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        site = Site(self._place, name, call, layer.num_heads)
        self._place += 1
        if "self" not in self.answers:
            # Some know it; in T5 the two kinds of a decoder's attention have different parents.
            decoder = getattr(layer, "is_decoder", _parent(name) in self._decoders)
            kind = "decoder" if decoder else "encoder"
            self.answers[kind if probe.self_attention else "cross"].add(site, layer, probe)
        elif probe.self_attention:
            self.answers["self"].add(site, layer, probe)
        else:
            raise ValueError(
                f"{layer_called(name)} attends to another sequence than its own: batches of an "
                "encoder-decoder need target, the annotated tokens of the decoder"
            )

    @property
    def sites(self) -> dict[str, list[Site]]:
        return {kind: own.sites for kind, own in self.answers.items()}

    def result(self) -> dict[str, Tensor]:
        return {
            f"{kind}.{name}": value
            for kind, own in self.answers.items()
            for name, value in own.result().items()
        }


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _decoders(model: nn.Module, forward_fn: ForwardFunction, inputs: Any) -> set[str]:
    """Names of the modules with both self- and cross-attention: a decoder's layers, whose
    self-attention is over the target."""
    found = set()

    def receive(name, layer, selection, x, probe) -> None:
        if not probe.self_attention:
            found.add(_parent(name))

    with recording(model, receive):
        forward_fn(model, inputs)
    return found


def asked(questions: Questions) -> dict[str, list[Any]]:
    """The questions of each kind, as JSON."""
    return {
        kind: [own.grid, *([q.role, q.detail] for q in own.questions)]
        for kind, own in questions.items()
    }


def count_roles(
    model: nn.Module,
    batches: Sequence[AnnotatedBatch],
    questions: Questions,
    *,
    forward_fn: ForwardFunction | None = None,
    store: Store | None = None,
    progress: bool | None = None,
    done: Callable[[int], None] = lambda inputs: None,
) -> list[RoleCounts]:
    """Runs the model on ``batches`` and answers the questions for every head.

    Args:
        questions: of :func:`questions_for`.
        store: keeps the answers of finished batches, for this model, these batches and questions.
        done: called with the number of finished inputs after each batch.

    Returns:
        The answers of each kind of attention that the model has.
    """
    forward_fn = forward_fn or run_model
    store = Store(None, "head-roles", {}) if store is None else store
    prefix = f"roles/{fingerprint(asked(questions))}"
    sites: dict[str, list[Site]] = {}
    found: list[dict[str, Tensor]] = []
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        decoders: set[str] = set()
        if "self" not in questions:
            decoders = _decoders(model, forward_fn, to_device(batches[0].inputs, device))

        def count(batch: AnnotatedBatch) -> _Counter:
            counter = _Counter(questions, batch, decoders)
            with recording(model, counter):
                forward_fn(model, to_device(batch.inputs, device))
            if not any(counter.sites.values()):
                raise ValueError("model must call its attention layers: forward_fn called none")
            sites.update(counter.sites)
            return counter

        for batch in with_progress(batches, "roles", "batch", progress):

            def compute(batch: AnnotatedBatch = batch) -> dict[str, Tensor]:
                return count(batch).result()

            found.append(store.tensors(f"{prefix}/{fingerprint(batch)}", compute))
            done(len(batch.valid))
        if not sites:  # everything was in the store
            count(batches[0])
    return [
        RoleCounts(
            kind,
            list(own.questions),
            sites[kind],
            **{
                name: torch.cat([part[f"{kind}.{name}"] for part in found])
                for name in ("hits", "trials", "baseline", "entropy")
            },
        )
        for kind, own in questions.items()
        if sites[kind]
    ]


def to_device(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    if isinstance(inputs, dict):
        return {name: to_device(value, device) for name, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs
