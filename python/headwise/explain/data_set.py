"""``headwise.explain_data``: what the heads of a text classifier do over a data set."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headwise._C import __version__
from headwise.explain.annotated import (
    AlignedPair,
    AnnotatedBatch,
    Input,
    Sentence,
    annotate_texts,
)
from headwise.explain.faithfulness import forwards_of, measure_faithfulness
from headwise.explain.noise import NOISES
from headwise.explain.one_input import labels_of
from headwise.explain.recording import own_copy
from headwise.explain.role_counts import count_roles, questions_for, to_device
from headwise.explain.role_use import role_use
from headwise.explain.roles import RoleThresholds, score_roles
from headwise.explain.substitutes import joint_ablation as measure_joint_ablation
from headwise.explain.texts import check_one_label, check_texts, check_tokenizer, longest
from headwise.explain.use import (
    Use,
    chosen_heads,
    describe_use,
    number,
    token_entropy,
    watching,
)
from headwise.io.fingerprint import fingerprint
from headwise.io.printable import quoted
from headwise.io.progress import Stages
from headwise.io.store import Store, file_in, locked
from headwise.nn.batches import run_model
from headwise.nn.instrumenting import evaluating
from headwise.nn.layers import attention_layers

_ops = torch.ops.headwise

#: The name of this kind of unfinished work.
WORK = "explanation-of-data"


def explain_data(
    model: nn.Module,
    texts: Sequence[str],
    tokenizer: Any,
    *,
    labels: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    sentences: Sequence[Sentence] | None = None,
    alignments: Sequence[AlignedPair] | None = None,
    grid: tuple[int, int] | None = None,
    others: dict[str, nn.Module] | None = None,
    thresholds: RoleThresholds | None = None,
    offsets: int = 2,
    batch_size: int = 32,
    max_length: int = 128,
    faithfulness_texts: int = 256,
    joint_ablation: int = 0,
    joint_ablation_texts: int = 128,
    permutations: int = 1000,
    resamples: int = 1000,
    seed: int = 0,
    folder: str | Path | None = None,
    key: dict[str, Any] | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """What the heads of a text classifier do over a data set, and for which inputs they run.

    Roles of heads (:func:`headwise.head_roles`), how often each runs and for which inputs, whether
    heads with a role are used differently, how stable the selection is when texts change a little,
    and whether the gates' ranking matches the heads' measured effect.

    Args:
        model: a converted or convertible text classifier of transformers.
        texts: the data set.
        tokenizer: its tokenizer.
        labels: the class of each text, to compute the accuracy.
        classes: names of the classes; default: those of the model's configuration.
        sentences: sentences with dependencies, for syntactic roles (:func:`read_conllu`,
            :func:`parse_with_spacy`); default: roles are measured on ``texts``, without syntax.
        alignments: aligned pairs of texts, for alignment roles (:func:`read_alignments`); roles are
            then measured on these.
        grid: (rows, columns) of texts that are images with one token per patch, in reading order:
            asks about 2-D offsets.
        others: other models by name (other seeds, other tasks) with the same heads, whose
            selections are compared on the same texts.
        thresholds: when a head has a role.
        offsets: token offsets to ask about, up to this far.
        batch_size: texts per batch.
        max_length: tokens at which texts are truncated, at most the model's maximum.
        faithfulness_texts: texts on which heads are removed.
        joint_ablation: pairs of heads to ablate jointly, to find those that can replace each other;
            each takes a forward over ``joint_ablation_texts``. 0: none.
        joint_ablation_texts: texts on which pairs are ablated.
        permutations: of the tests.
        resamples: of the bootstrap.
        seed: of all random choices.
        folder: finished parts are saved here, and the same call resumes from them; those of another
            model (its weights, gates and their settings), data or options are removed.
        key: what the parts depend on besides the arguments, as JSON values.
        progress: progress bars on stderr; None: after two seconds, on a terminal.

    Returns:
        A document of format ``headwise.use`` (docs/interpretability.md).

    Raises:
        TypeError: ``texts`` are not texts, or ``tokenizer`` is not a tokenizer of transformers.
        ValueError: fewer than two texts, labels that do not fit, both sentences and alignments, a
            model without class scores or with several labels per text, or an option out of range.
        RuntimeError: another run is using ``folder``.
    """
    check_texts("texts", texts)
    if len(texts) < 2:
        raise ValueError(f"texts must be at least two, got {len(texts)}")
    check_tokenizer(tokenizer)
    check_one_label(getattr(model, "config", None))
    if labels is not None and len(labels) != len(texts):
        raise ValueError(f"labels must have one entry per text ({len(texts)}), got {len(labels)}")
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if joint_ablation < 0:
        raise ValueError(f"joint_ablation must not be negative, got {joint_ablation}")
    if sentences is not None and alignments is not None:
        raise ValueError("sentences and alignments must not be given together")
    for name, own in (("sentences", sentences), ("alignments", alignments)):
        if own is not None and len(own) < 2:
            raise ValueError(f"{name} must be at least two, one for each half, got {len(own)}")
    model = own_copy(model)
    others = {name: own_copy(other) for name, other in (others or {}).items()}
    thresholds = thresholds or RoleThresholds()
    encoding = {
        "batch_size": batch_size,
        "max_length": longest(getattr(model, "config", None), tokenizer, max_length),
    }
    annotated: Sequence[Input] = sentences or alignments or texts
    parts_key = {**(key or {}), **encoding, "seed": seed, "version": __version__}
    if folder is not None:
        parts_key["data"] = fingerprint([list(texts), list(annotated)])
    faithful, ablated = texts[:faithfulness_texts], texts[:joint_ablation_texts]
    passes = 1 + len(NOISES) + len(others) + any(map(_draws, _gates_of(model)))
    stages = Stages(
        passes * len(texts) + 2 * len(annotated) + forwards_of() * len(faithful), progress
    )
    study = _Study(model, tokenizer, encoding, folder, parts_key, seed, stages)
    with locked(folder), evaluating(model), torch.no_grad():
        study.open()
        torch.manual_seed(seed)  # gates that draw at random
        use = study.use("use", texts, labels, model)
        number_of_classes = use.logits.size(1)
        classes = list(
            classes or labels_of(model, number_of_classes) or map(str, range(number_of_classes))
        )
        roles = study.roles(annotated, offsets, grid, thresholds, resamples)
        described = describe_use(use, classes, permutations=permutations, seed=seed)
        document = {
            "format": "headwise.use",
            "version": 1,
            "model": {
                "class": type(model).__name__,
                "layers": len(attention_layers(model)),
                "sites": len(use.sites),
                "heads": int(use.chosen.size(1)),
            },
            "data": {
                "texts": len(texts),
                "classes": classes,
                "predicted": torch.bincount(use.predicted, minlength=len(classes)).tolist(),
                "accuracy": _accuracy(use),
                "tokens_mean": number(use.length.double().mean()),
                "tokens_unknown": study.unknown_share(texts),
            },
            "settings": {
                **encoding,
                "permutations": permutations,
                "resamples": resamples,
                "seed": seed,
            },
            "roles": roles,
            "use": described,
            "role_use": role_use(roles, described, permutations, seed),
            "stability": study.stability(texts, labels, use, others, resamples),
            "faithfulness": study.faithfulness(faithful, resamples),
            "joint_ablation": None,
        }
        stages.close()
        if joint_ablation:
            document["joint_ablation"] = study.joint_ablation(ablated, joint_ablation, progress)
    return document


class _Study:
    """The measurements of one call and their shared state."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        encoding: dict[str, Any],
        folder: str | Path | None,
        key: dict[str, Any],
        seed: int,
        stages: Stages,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.folder = folder
        self.key = key
        self.seed = seed
        self.stages = stages
        self.store = Store(None, WORK, {})
        self.device = next(model.parameters()).device

    def batches(self, texts: Sequence[Input]) -> list[AnnotatedBatch]:
        return annotate_texts(texts, self.tokenizer, **self.encoding)

    def open(self) -> None:
        """Resumes from the parts of this model, data and settings in the folder."""
        self.store = self._store(WORK, self.model, only=True)

    def _store(self, work: str, model: nn.Module, only: bool = False) -> Store:
        key = {} if self.folder is None else {**self.key, "model": fingerprint(model)}
        return Store.in_folder(self.folder, work, key, only=only)

    def inputs(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Texts as batches on the model's device."""
        return [to_device(batch.inputs, self.device) for batch in self.batches(texts)]

    def use(
        self, name: str, texts: Sequence[str], labels: Sequence[int] | None, model: nn.Module
    ) -> Use:
        """Which heads ran for each text, in the order of the texts."""
        batches: list[Any] = self.batches(texts)  # with ids and rows
        store = self.store
        if model is not self.model:
            store = self._store(f"{WORK}-{name}", model, only=True)
        sites: list[tuple[str, int, int]] = []
        found = []
        self.stages.begin(name)
        with evaluating(model), torch.no_grad():
            for batch in batches:

                def compute(batch=batch) -> dict[str, Tensor]:
                    with watching(model) as seen:
                        logits = self.forward(model, batch)
                    sites[:], chosen = chosen_heads(seen, model, len(batch.valid))
                    return {"chosen": chosen, "logits": logits}

                found.append(store.tensors(f"{name}/{fingerprint(batch)}", compute))
                self.stages.done(len(batch.valid))
            if not sites:
                with watching(model) as seen:
                    self.forward(model, batches[0])
                sites = chosen_heads(seen, model, len(batches[0].valid))[0]
        # Batches hold texts by length: back to the order of the texts.
        lengths = torch.cat([batch.valid.sum(1) for batch in batches])
        entropy = torch.cat([token_entropy(batch.ids, batch.content) for batch in batches])
        place = torch.cat([batch.rows for batch in batches]).argsort()
        return Use(
            sites=sites,
            chosen=torch.cat([part["chosen"] for part in found])[place],
            logits=torch.cat([part["logits"] for part in found])[place],
            length=lengths[place],
            entropy=entropy[place],
            labels=None if labels is None else torch.tensor(list(labels)),
        )

    def changed_use(
        self,
        name: str,
        texts: Sequence[str],
        changed: Sequence[str],
        use: Use,
    ) -> Use:
        """:meth:`use` of the changed texts, given ``use`` of ``texts``: texts that tokenize the
        same (often with capitals) are not run again."""
        rows = list(range(len(texts)))
        if not any(map(_draws, _gates_of(self.model))):
            before, after = self._ids(texts), self._ids(changed)
            rows = [row for row in rows if before[row] != after[row]]
        self.stages.done(len(texts) - len(rows))
        if not rows:
            return use
        part = self.use(name.replace(" ", "-"), [changed[row] for row in rows], None, self.model)
        merged = {}
        for key in ("chosen", "logits", "length", "entropy"):
            merged[key] = getattr(use, key).clone()
            merged[key][rows] = getattr(part, key)
        return Use(sites=use.sites, labels=use.labels, **merged)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        limit = self.encoding["max_length"]
        return self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]

    def unknown_share(self, texts: Sequence[str]) -> float | None:
        """Share of the texts' tokens that are unknown to the tokenizer; None if it has no unknown
        token."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return None
        ids = self._ids(texts)
        special = self.tokenizer.num_special_tokens_to_add()
        total = sum(len(row) - special for row in ids)
        return number(sum(row.count(unknown) for row in ids) / max(1, total))

    def forward(self, model: nn.Module, batch: AnnotatedBatch) -> Tensor:
        """Class scores, float32 ``[B, C]`` on the host."""
        logits = run_model(model, to_device(batch.inputs, self.device))
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.size(1) < 2:
            raise ValueError("model must give class scores [B, C] with C >= 2")
        return logits.float().cpu()

    def roles(
        self,
        texts: Sequence[Input],
        offsets: int,
        grid: tuple[int, int] | None,
        thresholds: RoleThresholds,
        resamples: int,
    ) -> dict[str, Any]:
        batches = self.batches(texts)
        questions = questions_for(
            batches, offsets=offsets, grid=grid, least_trials=thresholds.least_trials
        )
        self.stages.begin("roles")
        counts = count_roles(
            self.model,
            batches,
            questions,
            store=self.store,
            progress=False,
            done=lambda texts: self.stages.done(2 * texts),
        )
        return score_roles(counts, thresholds, seed=self.seed, resamples=resamples)

    def stability(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | None,
        use: Use,
        others: dict[str, nn.Module],
        resamples: int,
    ) -> list[dict[str, Any]]:
        rows = []
        for name, noise in NOISES.items():
            generator = random.Random(self.seed)
            changed = [noise(text, generator) for text in texts]
            again = self.changed_use(name, texts, changed, use)
            rows.append(_compared("noise", name, use, again, resamples, self.seed))
            rows[-1]["texts_changed"] = sum(a != b for a, b in zip(texts, changed, strict=True))
        if any(map(_draws, _gates_of(self.model))):
            torch.manual_seed(self.seed + 1)
            again = self.use("another-seed", texts, labels, self.model)
            rows.append(_compared("seed", "another draw", use, again, resamples, self.seed))
        for place, (name, other) in enumerate(others.items()):
            again = self.use(f"other-{place}", texts, labels, other)  # a name may be a path
            if again.chosen.shape != use.chosen.shape:
                raise ValueError(
                    f"others must have the heads of model, {use.chosen.size(1)}, but "
                    f"{quoted(name)} has "
                    f"{again.chosen.size(1)}"
                )
            rows.append(_compared("model", name, use, again, resamples, self.seed))
        return rows

    def faithfulness(self, texts: Sequence[str], resamples: int) -> dict[str, Any] | None:
        self.stages.begin("removing heads")
        batches = self.inputs(texts)
        rows = iter([len(batch["input_ids"]) for batch in batches])
        return measure_faithfulness(
            self.model,
            batches,
            run_model,
            resamples=resamples,
            seed=self.seed,
            store=self.store,
            done=lambda forwards: self.stages.done(forwards * next(rows)),
        )

    def joint_ablation(
        self, texts: Sequence[str], pairs: int, progress: bool | None
    ) -> dict[str, Any] | None:
        journal = None
        if self.folder is not None:
            key = {**self.key, "model": fingerprint(self.model), "texts": len(texts)}
            journal = file_in(self.folder, "joint-ablation", key, only=True)
        return measure_joint_ablation(
            self.model,
            self.inputs(texts),
            run_model,
            pairs=pairs,
            journal=journal,
            seed=self.seed,
            progress=progress,
        )


def _compared(
    kind: str, name: str, first: Use, second: Use, resamples: int, seed: int
) -> dict[str, Any]:
    overlap = _ops.selection_overlap(first.chosen, second.chosen)[:, None]  # [N, 1]
    mean, low, high = _ops.share_interval(overlap, torch.ones_like(overlap), resamples, seed)
    # The overlap of two different texts, for comparison.
    shifted = _ops.selection_overlap(first.chosen, second.chosen.roll(1, 0))
    return {
        "kind": kind,
        "name": name,
        "jaccard": number(mean[0]),
        "low": number(low[0]),
        "high": number(high[0]),
        "jaccard_other_inputs": number(shifted.mean()),
        "same_prediction": number((first.predicted == second.predicted).double().mean()),
        "accuracy": _accuracy(second),
    }


def _accuracy(use: Use) -> float | None:
    if use.labels is None:
        return None
    return number((use.predicted == use.labels).double().mean())


def _gates_of(model: nn.Module) -> list[Any]:
    return [layer.gate for layer in attention_layers(model).values()]


def _draws(gate: Any) -> bool:
    return gate is not None and bool(getattr(gate, "per_input", False))
