"""Methods that prune more than heads: Kwon et al. 2022 and CoFi.

Their budget is a share of the whole: of the multiply-accumulates, or of the weights, of heads and
feed-forward networks. ``share_kept`` in their notes is the resulting share.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import headwise as hw
from headwise.apps.compare.method import Outcome
from headwise.apps.compare.training import (
    autocast,
    disable_dropout,
    freeze_embeddings,
    learning_rate_factor,
    loss_of,
    precision_of,
)
from headwise.apps.compare.workbench import Workbench

#: Examples that the authors of "A Fast Post-Training Pruning Framework" calibrate on.
KWON_EXAMPLES = 2048
#: Share of the steps in which CoFi trains masks; then the compacted model trains on.
_SEARCH = 0.75


def kwon(bench: Workbench, keep: float, steps: int) -> Outcome:
    """Heads and neurons at ``keep`` of the multiply-accumulates, without training."""
    batches = list(bench.train.take(KWON_EXAMPLES).in_order(32))
    result = hw.pruning.kwon_prune(
        bench.converted(), batches, bench.losses, macs=keep, progress=False
    )
    return Outcome(result.model, 0, {"share_kept": result.report["macs"]})


def _fisher(bench: Workbench) -> dict[str, Tensor]:
    """Of every head and neuron of the dense model, once for all budgets."""
    if "fisher" not in bench.plans:
        bench.plans["fisher"] = hw.pruning.fisher_scores(
            bench.converted(), bench.scoring_batches(), bench.losses, progress=False
        )
    return bench.plans["fisher"]


def cofi(bench: Workbench, keep: float, steps: int) -> Outcome:
    """Masks of all five grains, from a ranking of heads and neurons, train down to ``keep`` of the
    weights; the rest trains further."""
    teacher = bench.converted().requires_grad_(False)
    masked = hw.pruning.CoFi(
        bench.converted(), keep, teacher=teacher, warmup=0.7, init_log_alpha=2.0, init_neurons=2.0
    )
    masked.start(_fisher(bench))
    searching = round(_SEARCH * steps)
    batches = bench.batches()
    _train(bench, masked, batches, searching, steps)
    masked.eval()
    kept = masked.plan().metadata["kept"]
    model = masked.compact()
    rest = (searching / steps if steps else 1.0, 1.0)
    bench.finetune(model, batches, steps - searching, rate_span=rest)
    return Outcome(model, steps, {"share_kept": kept})


def _train(bench: Workbench, cofi: hw.pruning.CoFi, batches, searching: int, steps: int) -> None:
    """The part of the training in which the masks are decided."""
    options = bench.settings.training
    dtype = precision_of(options.precision, bench.device)
    if options.freeze_embeddings:
        freeze_embeddings(cofi.model)
    if not options.dropout:
        disable_dropout(cofi.model)
    groups = cofi.parameter_groups(options.learning_rate, mask_lr=0.2, multiplier_lr=0.6)
    optimiser = torch.optim.AdamW(groups)
    cofi.train()
    for step in range(searching):
        cofi.anneal(step / max(1, searching - 1))
        # Masks and multipliers keep their rate: the size must be met at the end, not before.
        optimiser.param_groups[0]["lr"] = options.learning_rate * learning_rate_factor(
            step / steps, options.warmup
        )
        batch = next(batches)
        targets = bench.teacher(batch)
        batch = batch.to(bench.device)
        with autocast(dtype, bench.device):
            output = cofi(**batch.inputs)
        loss = loss_of(output.logits.float(), batch.labels, targets, options)
        loss = loss + cofi.layer_loss().float() + cofi.penalty()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(groups[0]["params"], options.max_gradient_norm)
        optimiser.step()
        bench.step_done()
