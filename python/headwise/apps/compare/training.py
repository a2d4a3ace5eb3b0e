"""Fine-tuning, the same for every method: the same batches, steps, teacher and optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import headwise as hw
from headwise.apps.tasks.examples import IGNORED, Batch, Examples
from headwise.gates.optimizing import choosing_parameters


@dataclass(frozen=True)
class TrainingOptions:
    """The settings of a fine-tuning, besides the model and the data.

    Attributes:
        batch_size: inputs per step.
        learning_rate: of the model's weights; linear warm-up, then linear decay to 0.
        gate_learning_rate: of the gates' vectors (a gate's preference for a head, independent of
            the input); the same schedule.
        gate_matrix_learning_rate: of the gates' matrices (which read the input): a larger one makes
            selections differ more between inputs, and accuracy lower.
        weight_decay: of matrices; biases, layer norms and gates have none.
        warmup: share of the steps.
        distillation: weight of the KL divergence from the teacher's predictions, in [0, 1]; the
            rest is the labels' cross entropy. Without a teacher it is 0.
        temperature: of the distillation (Hinton et al. 2015).
        max_gradient_norm: gradients of the weights are scaled down to it; those of gates are left
            alone.
        freeze_embeddings: the embeddings (of words and positions, of patches) stay as they are.
        dropout: whether the model's dropout is on. With a teacher and less than an epoch of steps
            it only adds noise.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 if the processor has
            instructions for it.
    """

    batch_size: int = 32
    learning_rate: float = 5e-5
    gate_learning_rate: float = 5e-2
    gate_matrix_learning_rate: float = 1e-2
    weight_decay: float = 0.01
    warmup: float = 0.06
    distillation: float = 0.5
    temperature: float = 2.0
    max_gradient_norm: float = 1.0
    freeze_embeddings: bool = True
    dropout: bool = False
    precision: str = "auto"


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are faster than float32 ones on the device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def precision_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products in training and evaluation."""
    if name == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def autocast(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast to ``dtype``; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def gate_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The trained parameters that decide which heads run."""
    return {parameter for parameter in choosing_parameters(model) if parameter.requires_grad}


def _groups(model: nn.Module, options: TrainingOptions) -> list[dict]:
    return hw.parameter_groups(
        model,
        options.learning_rate,
        gate_lr=options.gate_learning_rate,
        gate_matrix_lr=options.gate_matrix_learning_rate,
        weight_decay=options.weight_decay,
    )


def learning_rate_factor(progress: float, warmup: float) -> float:
    """The factor of a learning rate at ``progress`` in [0, 1]."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return (1 - progress) / (1 - warmup)


def loss_of(
    logits: Tensor, labels: Tensor, teacher: Tensor | None, options: TrainingOptions
) -> Tensor:
    """Cross entropy with the labels, mixed with the divergence from the teacher.

    Args:
        logits: [B, C], or [B, T, C] of tokens.
        labels: int64 [B] or [B, T]; tokens labelled ``IGNORED`` do not count, others equally.
        teacher: of the shape of logits, the teacher's for the same inputs, or None.
    """
    known = labels.flatten() != IGNORED
    logits, labels = logits.flatten(0, -2)[known], labels.flatten()[known]
    hard = F.cross_entropy(logits, labels)
    if teacher is None or options.distillation == 0:
        return hard
    teacher = teacher.flatten(0, -2)[known]
    soft = torch.ops.headwise.distillation_loss(logits, teacher, options.temperature)
    return (1 - options.distillation) * hard + options.distillation * soft


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each input, [B]; of several tokens the mean. Shapes as in
    :func:`loss_of`."""
    losses = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=IGNORED
    ).view(labels.shape)
    if labels.dim() == 1:
        return losses
    return losses.sum(1) / (labels != IGNORED).sum(1)


def graded(logits: Tensor, labels: Tensor) -> Tensor:
    """What a model makes of each input, [B, 2]: the share of its labels (its tokens) that are
    predicted, and the predicted class (of its first token). Shapes as in :func:`loss_of`."""
    predicted = logits.argmax(-1)
    known = labels != IGNORED
    right = ((predicted == labels) & known).float()
    if labels.dim() == 1:
        return torch.stack([right, predicted.float()], 1)
    return torch.stack([right.sum(1) / known.sum(1), predicted[:, 0].float()], 1)


def has_gates(model: nn.Module) -> bool:
    return any(isinstance(module, hw.Gate) for module in model.modules())


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits of a model's call.

    Gates of a decoder see its first token alone, as they do in generation with
    ``keep_selection=True``: whole targets would tell them what is to be predicted.
    """
    with (
        hw.gates_see(model, 1)
        if "decoder_input_ids" in inputs and has_gates(model)
        else contextlib.nullcontext()
    ):
        return model(**inputs).logits


def freeze_embeddings(model: nn.Module) -> None:
    """Freezes the embeddings of words and positions, and what makes patches into vectors."""
    for name, module in model.named_modules():
        patches = "patch_embeddings" in name or hasattr(module, "patch_embeddings")
        if patches or isinstance(module, nn.Embedding):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def disable_dropout(model: nn.Module) -> None:
    """Switches off every dropout of the model, including that of the attention probabilities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            vars(module)["dropout"] = 0.0


def finetune(
    model: nn.Module,
    batches: Iterator[Batch],
    steps: int,
    options: TrainingOptions,
    *,
    device: torch.device,
    teacher: Callable[[Batch], Tensor] | None = None,
    gate_span: tuple[float, float] = (0.0, 1.0),
    rate_span: tuple[float, float] = (0.0, 1.0),
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Trains ``model`` in place for ``steps`` steps.

    Args:
        batches: an endless supply.
        teacher: batch -> the dense model's logits, on the device; None: there is no teacher.
        gate_span: the part of annealing that these steps cover, for methods that train in two
            phases.
        rate_span: the part of the learning rates' schedule that these steps cover.
        after_step: called when a step is done (progress bars).

    Raises:
        FloatingPointError: the loss is not finite.
    """
    dtype = precision_of(options.precision, device)
    if options.freeze_embeddings:
        freeze_embeddings(model)
    if not options.dropout:
        disable_dropout(model)
    groups = _groups(model, options)
    # fused: one pass over the parameters of a group instead of a dozen small operations each.
    optimiser = torch.optim.AdamW(groups, fused=True)
    base = [group["lr"] for group in optimiser.param_groups]
    gates, gated = gate_parameters(model), has_gates(model)
    weights = [p for p in model.parameters() if p.requires_grad and p not in gates]
    model.train()
    for step in range(steps):
        share = step / max(1, steps - 1)
        if gated:
            hw.anneal(model, gate_span[0] + (gate_span[1] - gate_span[0]) * share)
        progress = rate_span[0] + (rate_span[1] - rate_span[0]) * step / steps
        for group, rate in zip(optimiser.param_groups, base, strict=True):
            group["lr"] = rate * learning_rate_factor(progress, options.warmup)
        batch = next(batches)
        target = None if teacher is None else teacher(batch)
        batch = batch.to(device)
        with autocast(dtype, device):
            logits = logits_of(model, batch.inputs).float()  # [B, C] or [B, T, C]
        loss = loss_of(logits, batch.labels, target, options)
        if gates:
            loss = loss + hw.penalty(model)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, options.max_gradient_norm)
        if step % 20 == 0 and not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite at step {step} of {steps}")
        optimiser.step()
        after_step()
    model.eval()


@torch.no_grad()
def predict(
    model: nn.Module,
    examples: Examples,
    *,
    device: torch.device,
    precision: str = "auto",
    batch_size: int = 64,
    read: Callable[[Tensor, Tensor], Tensor] = graded,
    after_batch: Callable[[Batch], None] = lambda batch: None,
) -> Tensor:
    """What ``read`` makes of the logits of a model in evaluation mode, [N, ...], float32, on the
    CPU.

    Args:
        read: (logits, labels) -> [B, ...]; the sizes after B are the same in all batches, which
            those of logits of texts of different lengths are not.
    """
    dtype = precision_of(precision, device)
    model.eval()
    found: Tensor | None = None
    for batch in examples.in_order(batch_size):
        moved = batch.to(device)
        with autocast(dtype, device):
            logits = logits_of(model, moved.inputs)
        own = read(logits.float(), moved.labels).cpu()
        if found is None:
            found = torch.empty(len(examples), *own.shape[1:])
        found[batch.rows] = own
        after_batch(batch)
    if found is None:
        raise ValueError("examples must not be empty")
    return found
