"""Layer-wise relevance propagation (LRP) to heads: how much of a prediction came through each.

The rules conserve relevance: the relevance of a layer's output is passed on to its inputs in full.

- Linear maps, residual sums, averages: in proportion to each term (LRP-0). A bias is a separate
  term: its relevance ends there and is counted.
- Attention: its probabilities are constants, so relevance goes to the values (Ali et al. 2022,
  arXiv 2202.07304).
- Layer norm and RMS norm: their scale is a constant (the same).
- Elementwise functions with f(0) = 0 (ReLU, GELU, SiLU, tanh): all of it to their input.
- Products of two activations: half to each (Achtibat et al. 2024, arXiv 2402.05602).

All of them are gradient times input of the model with those parts held constant, which is linear in
its inputs and biases, so that the sum of their relevances is the explained output, by Euler's
theorem. The deviation from that, if a model computes something that the rules do not cover, is the
conservation error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter
from torch.overrides import TorchFunctionMode

from headwise.convert.conversion import converted
from headwise.io.progress import with_progress
from headwise.nn.attention_layer import AttentionLayer, AttentionProbe
from headwise.nn.batches import check_batches
from headwise.nn.instrumenting import instrument
from headwise.pruning.scores import HeadScores

__all__ = ["LrpScores", "lrp_scores"]

_ops = torch.ops.headwise


@dataclass(frozen=True)
class LrpScores:
    """How much of a model's predictions came through each head.

    Attributes:
        scores: mean share of the layer's relevance, in [-1, 1]; the absolute shares of one example
            sum to 1 over a layer. Below 0: the head opposed the prediction.
        conservation_error: |explained outputs - relevance of inputs and biases|, summed over
            batches, as a share of the outputs' absolute values. 0 if all rules apply.
        bias_share: relevance that ended in biases, as a share of the same.
    """

    scores: HeadScores
    conservation_error: float
    bias_share: float


def lrp_scores(
    model: nn.Module,
    batches: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Tensor],
    *,
    progress: bool | None = None,
) -> LrpScores:
    """Relevance of the top-1 logit that flows through each head (Voita et al. 2019).

    arXiv 1905.09418, section 4: summed over a head's neurons and tokens, normalised over the heads
    of its layer, averaged over examples. They normalise by the sum; since relevance may be
    negative, this divides by the sum of absolute values.

    Args:
        model: a converted or convertible model, run in evaluation mode and restored.
        batches: input of ``forward_fn``.
        forward_fn: ``(model, batch) -> logits``: ``[B, ..., C]``, of which the largest of the last
            dimension is explained, or ``[B]``, explained as it is. Not probabilities: a softmax
            does not conserve relevance.
        progress: a progress bar on stderr; None: after two seconds, on a terminal.

    Raises:
        ValueError: no batches, outputs that are not finite, or outputs that do not depend on the
            heads.
    """
    check_batches(batches)
    model = converted(model)
    calls: list[tuple[str, Tensor]] = []  # [B, H, L, d], of the current batch

    def see(name: str, layer: AttentionLayer, probe: AttentionProbe) -> None:
        context = probe.context
        if not context.requires_grad:  # the gradient starts here
            context.requires_grad_()
        calls.append((name, context))

    sums: dict[str, Tensor] = {}  # layer -> [H]
    examples: dict[str, int] = {}
    explained = error = absorbed = 0.0
    count = 0
    with instrument(model) as opened, _leaf_parameters(model) as parameters:
        opened.probe(see)
        for batch in with_progress(batches, "LRP", "batch", progress):
            count += 1
            calls.clear()
            with torch.enable_grad(), _Rules() as rules, rules.inputs_of(model):
                values = _explained(forward_fn(model, batch))  # [N]
            sources = [*rules.inputs, *parameters]
            contexts = [context for _, context in calls]
            if not contexts:
                raise ValueError("forward_fn must run model: none of its layers was called")
            if not values.requires_grad:
                raise ValueError("forward_fn must return outputs that depend on the heads")
            gradients = torch.autograd.grad(values.sum(), [*contexts, *sources], allow_unused=True)
            for (name, context), gradient in zip(calls, gradients, strict=False):
                if gradient is None:
                    gradient = torch.zeros_like(context)
                shares = _ops.relevance_shares(context.detach(), gradient).cpu()  # [B, H]
                sums[name] = sums.get(name, 0) + shares.sum(0)
                examples[name] = examples.get(name, 0) + len(shares)
            relevance = [
                0.0 if gradient is None else (source.detach().double() * gradient).sum().item()
                for source, gradient in zip(sources, gradients[len(contexts) :], strict=True)
            ]
            error += abs(values.double().sum().item() - sum(relevance))
            explained += values.double().abs().sum().item()
            absorbed += sum(relevance[len(rules.inputs) :])
    if count == 0:
        raise ValueError("batches must not be empty: there is nothing to explain")
    if not any(values.any() for values in sums.values()):
        raise ValueError("lrp is zero for every head: the outputs do not depend on the heads")
    scores = {name: values / examples[name] for name, values in sums.items()}
    return LrpScores(HeadScores("lrp", scores), error / explained, absorbed / explained)


def _explained(output: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() == 0 or not output.is_floating_point():
        raise ValueError(
            "forward_fn must return floating logits [B, ..., C], or one value per example [B], got "
            + (f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else repr(output))
        )
    values = output if output.dim() == 1 else output.amax(-1).flatten()
    if not torch.isfinite(values).all():
        raise ValueError("forward_fn must return finite logits, got NaN or infinity")
    return values


@contextlib.contextmanager
def _leaf_parameters(model: nn.Module) -> Iterator[list[Parameter]]:
    """The parameters of ``model``, all of them differentiable inside the context."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield parameters
    finally:
        for parameter, requires_grad in zip(parameters, before, strict=True):
            parameter.requires_grad_(requires_grad)


def _whole_activation(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return _ops.held_slope(args[0], output)


def _all_but(kept: set[int], arguments: tuple) -> tuple:
    return tuple(
        value.detach() if isinstance(value, Tensor) and place not in kept else value
        for place, value in enumerate(arguments)
    )


class _Rules(TorchFunctionMode):
    """Runs torch's functions so that gradient times input is relevance."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def leaf(self, tensor: Tensor) -> Tensor:
        """An input of the model: relevance ends there."""
        leaf = tensor.detach().clone().requires_grad_()
        self.inputs.append(leaf)
        return leaf

    @contextlib.contextmanager
    def inputs_of(self, model: nn.Module) -> Iterator[None]:
        """Floating tensors that ``model`` is called with are inputs."""

        def leaf(value: Any) -> Any:
            return (
                self.leaf(value)
                if isinstance(value, Tensor) and value.is_floating_point()
                else value
            )

        seen: dict[int, Tensor] = {}  # one tensor passed twice is one input

        def replaced(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            def once(value: Any) -> Any:
                if id(value) not in seen:
                    seen[id(value)] = leaf(value)
                return seen[id(value)]

            return tuple(map(once, args)), {key: once(value) for key, value in kwargs.items()}

        with contextlib.ExitStack() as hooks:
            hooks.enter_context(model.register_forward_pre_hook(replaced, with_kwargs=True))
            for module in model.modules():
                if type(module).__name__ in _ACTIVATIONS:
                    hooks.enter_context(module.register_forward_hook(_whole_activation))
            yield

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _HELD:
            return func(*args, **kwargs).detach()
        if func in _ELEMENTWISE:
            if kwargs.get("inplace"):
                kwargs = {**kwargs, "inplace": False}
            return _ops.held_slope(args[0], func(*args, **kwargs))
        if func is F.embedding:
            return self.leaf(func(*args, **kwargs))
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func in _KEPT:
            return func(*_all_but(_KEPT[func], args), **kwargs)
        if func in _PRODUCTS:
            return _product(func, args, kwargs)
        if func in _QUOTIENTS:
            return func(args[0], *(_constant(value) for value in args[1:]), **kwargs)
        return func(*args, **kwargs)


def _constant(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _product(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """Parameters are constants; of two activations each carries half."""
    one, other = args[:2]
    if not (_differentiable(one) and _differentiable(other)):
        return func(*args, **kwargs)
    if isinstance(one, Parameter) or isinstance(other, Parameter):
        kept = 1 if isinstance(one, Parameter) else 0
        return func(*_all_but({kept}, args), **kwargs)
    first = func(one, other.detach(), *args[2:], **kwargs)
    second = func(one.detach(), other, *args[2:], **kwargs)
    return (first + second) / 2


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    shape = tuple(normalized_shape)
    flat = input.flatten(-len(shape)) if len(shape) > 1 else input  # [..., D]
    if len(shape) > 1:
        weight = None if weight is None else weight.flatten()
        bias = None if bias is None else bias.flatten()
    return _ops.held_layer_norm(flat, weight, bias, eps).view_as(input)


#: Modules of transformers that write an elementwise function with f(0) = 0 as several operations:
#: the rule is for the whole.
_ACTIVATIONS = {
    "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "AccurateGELUActivation",
}  # fmt: skip
#: Their results are constants.
_HELD = {
    F.softmax, torch.softmax, Tensor.softmax, torch.sigmoid, Tensor.sigmoid, F.sigmoid,
    torch.rsqrt, Tensor.rsqrt, torch.sqrt, Tensor.sqrt, torch.var, Tensor.var, torch.std,
    Tensor.std, torch.reciprocal, Tensor.reciprocal, torch.exp, Tensor.exp,
}  # fmt: skip
#: f(0) = 0.
_ELEMENTWISE = {
    F.gelu, F.relu, torch.relu, Tensor.relu, F.silu, F.tanh, torch.tanh, Tensor.tanh,
    F.leaky_relu, F.elu, F.mish, F.hardswish,
}  # fmt: skip
#: Arguments by position that relevance goes to; all others are constants.
_KEPT = {
    F.linear: {0, 2},
    F.conv1d: {0, 2},
    F.conv2d: {0, 2},
    F.scaled_dot_product_attention: {2},
    _ops.project_heads: {0, 1, 2, 6, 7, 8, 10, 11},
    _ops.dense_attention: {2},
    _ops.combine_heads: {0, 3},
}
_PRODUCTS = {
    torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.matmul, Tensor.matmul,
    Tensor.__matmul__, torch.bmm, Tensor.bmm,
}  # fmt: skip
_QUOTIENTS = {torch.div, Tensor.div, Tensor.__truediv__}
