"""Heads that do not run contribute their mean instead of zero, at no cost at run time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates.linears import check_read
from headwise.io.printable import layer_called
from headwise.io.progress import with_progress
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.batches import batch_list, call_model
from headwise.nn.gate_proof import layer_outputs
from headwise.nn.instrumenting import without_gates
from headwise.nn.layers import attention_layers
from headwise.nn.proof import Proof
from headwise.nn.split_attention import SplitAttention
from headwise.pruning.reconstruction import calibration_tokens, catch_up
from headwise.pruning.replay import Replay

__all__ = ["LayerCompensation", "compensate"]


@dataclass(frozen=True)
class LayerCompensation:
    """What :func:`compensate` did to one layer.

    Attributes:
        name: of the attention layer.
        tokens: number of tokens that the means are of.
        explained: float64 ``[H]``: for each head, the share of the mean square of its output that
            its mean accounts for: 1 is a head that writes the same for every token, so that
            nothing is lost without it; 0 one whose mean is zero.
    """

    name: str
    tokens: int
    explained: Tensor


def compensate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    bias: bool = False,
    progress: bool | None = None,
    verify: bool = True,
) -> list[LayerCompensation]:
    r"""Lets every head that does not run contribute its mean output, instead of zero.

    With :math:`c_h` the mean of head h's output over the calibration tokens, a layer that runs the
    heads S of an input then computes

    .. math:: y = b_O + \sum_{h \in S} w_h W_h (o_h - c_h) + \sum_h W_h c_h

    With all heads (at weight 1) that is what it computed before. As the probabilities of a query
    sum to one, it only moves constants: :math:`c_h` is taken off the bias of the values, and
    :math:`\sum_h W_h c_h` is added to the output's bias. So it costs nothing at run time, and holds
    for gates, masks, and heads that are pruned afterwards, in both languages and on every device.
    Heads that share values share the mean of their means. The idea is FLAP's bias compensation (An
    et al. 2023, arXiv 2312.11983), here for each input.

    :func:`headwise.repair` fits the remaining heads to a plan and does more for a static one; this
    suits gates, of which every input runs other heads. Both may be used, this one first.

    Args:
        model: a converted model, changed in place: its biases. Its gates are not asked: the means
            are those of the model with all heads.
        batches: calibration data, no labels needed: 512 texts are enough. Each is an input of
            ``forward_fn``. All are kept in memory.
        forward_fn: ``(model, batch) -> output``; default: the model called with the batch, a
            mapping's items as keyword arguments, a tuple's as positional ones.
        bias: add a bias to output projections without one.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.
        verify: check that each layer with all heads computes on made-up tokens what it did.

    Returns:
        What was done to each layer, in the order in which they run.

    Raises:
        ValueError: no batches, activations that are NaN or infinite, values without a bias (most
            decoders have none), or an output projection without one unless ``bias``, keys that a
            layer adds itself, a bank of plans, or a layer whose probabilities do not sum to one
            (attention sinks), found by ``verify``. ``model`` is then unchanged.
        TypeError: a projection is wrapped.
    """
    batches = batch_list(batches)
    if not batches:
        raise ValueError("batches must not be empty: there is nothing to take means of")
    layers = attention_layers(model)
    if not layers:
        raise ValueError(
            f"model ({type(model).__name__}) has no headwise.MultiheadAttention: "
            f"call headwise.convert first"
        )
    for name, layer in layers.items():
        _check(name, layer, bias)
    with without_gates(model):
        replay = Replay(model, batches, call_model if forward_fn is None else forward_fn)
        names = [name for name in replay.sites if name in layers]
        means = {}
        with replay.running():
            for name in with_progress(names, "compensating", "layer", progress):
                catch_up(name, replay)
                means[name] = _means(replay, name, layers[name])
        with _biases_kept(layers.values()):
            for name in names:
                layer, (_, mean, _) = layers[name], means[name]
                proof = Proof.of(layer, name, layer_outputs) if verify else None
                _move(layer, mean)
                if proof is not None:
                    proof.check(layer)
    return [LayerCompensation(name, means[name][0], means[name][2]) for name in names]


def _check(name: str, layer: AttentionLayer, bias: bool) -> None:
    if isinstance(layer, SplitAttention):
        raise ValueError(f"{layer_called(name)} has split projections: compensate before")
    if layer.gate is not None and layer.gate.projects:
        raise ValueError(
            f"{layer_called(name)} has a {type(layer.gate).__name__}, whose plans have "
            f"projections of their own, each repaired"
        )
    if layer._added_keys:
        raise ValueError(f"{layer_called(name)} adds keys of its own (bias_k or add_zero_attn)")
    check_read(f"output projection of {layer_called(name)}", layer.output_projection)
    own = layer.value_bias
    if own is None or not bias and _is_held_at_zero(own, layer):
        raise ValueError(
            f"{layer_called(name)} must have a bias in its values, from which the means are taken "
            f"off"
        )
    output = layer.output_projection.bias
    if not bias and (output is None or _is_held_at_zero(output, layer)):
        raise ValueError(
            f"{layer_called(name)} must have a bias in its output projection, to which the means "
            f"are added: bias=True adds one"
        )


def _is_held_at_zero(bias: Tensor, layer: AttentionLayer) -> bool:
    """Whether the conversion of a model without biases added it."""
    weight = layer.output_projection.weight
    return weight.requires_grad and not bias.requires_grad and not bool(bias.any())


@contextlib.contextmanager
def _biases_kept(layers: Iterable[AttentionLayer]) -> Iterator[None]:
    """Restores the biases of the layers after an error."""
    before = []
    for layer in layers:
        values, output = layer.value_bias.detach(), layer.output_projection.bias
        before.append((layer, values.clone(), None if output is None else output.detach().clone()))
    try:
        with torch.no_grad():
            yield
    except BaseException:
        with torch.no_grad():
            for layer, values, output in before:
                layer.value_bias.detach().copy_(values)
                if output is None:
                    layer.output_projection.register_parameter("bias", None)
                else:
                    layer.output_projection.bias.copy_(output)
        raise


def _means(replay: Replay, name: str, layer: AttentionLayer) -> tuple[int, Tensor, Tensor]:
    """How many tokens, the means of the heads' outputs ``[H, d]``, and what they explain ``[H]``;
    float64, on the CPU."""
    heads, width = layer.num_heads, layer.head_dim
    tokens, total = 0, torch.zeros(heads, width, dtype=torch.float64)
    moments = torch.zeros(heads, width, width, dtype=torch.float64)
    for seen, _, valid, _ in calibration_tokens(replay, replay, name):
        outputs = seen.inputs[valid].double().cpu().unflatten(-1, (heads, width))  # [N, H, d]
        if not bool(outputs.isfinite().all()):
            raise ValueError(
                f"activations of {layer_called(name)} must be finite: got NaN or infinity"
            )
        tokens += len(outputs)
        total += outputs.sum(0)
        moments += torch.einsum("nhd,nhe->hde", outputs, outputs)
    if tokens == 0:
        raise ValueError(f"batches must have tokens that are not padding for {layer_called(name)}")
    own = total / tokens
    groups = torch.tensor(layer.head_groups)
    mean = torch.empty_like(own)
    for head, group in enumerate(layer.head_groups):
        mean[head] = own[groups == group].mean(0)
    weight = layer.output_projection.weight.detach().double().cpu()
    weight = weight.unflatten(1, (heads, width))  # [D, H, d]
    gram = torch.einsum("ohd,ohe->hde", weight, weight)
    # What is left without the head, against what would be: E|W (o - c)|^2 and E|W o|^2.
    whole = (gram * moments / tokens).sum((1, 2))
    cross, square = (
        torch.einsum("hd,hde,he->h", one, gram, other) for one, other in ((own, mean), (mean, mean))
    )
    explained = torch.where(whole > 0, (2 * cross - square) / whole, 0.0)
    return tokens, mean, explained


def _move(layer: AttentionLayer, mean: Tensor) -> None:
    """Takes the means ``[H, d]`` off the values and adds what they write to the output's bias."""
    linear, values = layer.output_projection, layer.value_bias.detach()
    added = linear.weight.double() @ mean.flatten().to(linear.weight.device)  # [D]
    groups = torch.tensor(layer.head_groups)
    shared = mean.new_zeros(values.numel() // max(1, layer.head_dim), layer.head_dim)
    shared[groups] = mean  # the heads of a group have one mean
    values.copy_(values.double() - shared.flatten().to(values.device))
    if linear.bias is None:
        zeros = linear.weight.new_zeros(linear.weight.size(0))
        linear.bias = nn.Parameter(zeros, requires_grad=linear.weight.requires_grad)
    linear.bias.copy_(linear.bias.double() + added)
