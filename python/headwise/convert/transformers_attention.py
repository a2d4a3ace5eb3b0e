"""The common parts of conversions of transformers models (version 5): masks, attention weights,
parameters.

A converted model names "headwise" as its attention implementation, which makes transformers pass
its layers the tokenizer's padding mask.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function

from headwise.convert.arguments import check_arguments, wants_maps
from headwise.convert.checks import (
    children_fault,
    copied_fault,
    first,
    forward_fault,
    hooks_fault,
    implementation_fault,
    projection_fault,
    renamed_fault,
)
from headwise.convert.masks import complete, for_each_sequence
from headwise.convert.older_versions import make_mask, register_mask
from headwise.convert.parameters import in_the_mode_of, remade
from headwise.convert.registry import Architecture
from headwise.io.printable import quoted
from headwise.nn.layers import carry_hooks
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.nn.proof import Draw, Trial

#: The attention implementation in the configuration of converted models.
IMPLEMENTATION = "headwise"


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    mask_function=bidirectional_mask_function,
    **options: Any,
) -> Tensor | None:
    """The tokenizer's mask for a bidirectional model, bool [B, S], True = token; any other mask in
    transformers' form, bool [B, 1, L, S], True = may be seen.

    The masks that transformers builds for its own implementations are [B, 1, L, S], in which
    padding is no longer distinguishable; a gate needs the padding.
    """
    if mask_function is not bidirectional_mask_function:
        return make_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **options,
        )
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def unconverted_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, L, d]
    key: Tensor,  # [B, Hkv, S, d]
    value: Tensor,  # [B, Hkv, S, d]
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """For attention that was not converted but shares the configuration of a converted model:
    transformers' implementation "sdpa"."""
    if attention_mask is not None and attention_mask.dim() == 2:  # [B, S], nonzero = token
        length, keys = query.size(2), key.size(2)
        padding = attention_mask[:, None, None, :].bool()
        attention_mask = padding.expand(-1, -1, length, -1)
        if getattr(module, "is_causal", False):  # the last query is aligned with the last key
            before = torch.ones(length, keys, dtype=torch.bool, device=query.device)
            attention_mask = attention_mask & before.tril(keys - length)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(IMPLEMENTATION, unconverted_attention)
register_mask(IMPLEMENTATION, _padding_mask)


def attend(
    replacement: nn.Module,  # has `mha` and `config`
    hidden_states: Tensor,  # [B, L, D]
    attention_mask: Tensor | None,
    options: dict[str, Any],
    key: Tensor | None = None,
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention with the masks of transformers -> [B, L, D] and, if asked for, the attention
    weights; ``key`` and ``value`` [B, S, D] are by default ``hidden_states``."""
    check_arguments(replacement, options)
    if options.get("is_causal"):
        raise ValueError(
            f"is_causal must be None or False, got {quoted(options['is_causal'])}: "
            f"{type(replacement).__name__} is an encoder's"
        )
    layer = mha = replacement.mha
    while not isinstance(layer, MultiheadAttention):  # it is wrapped by an adapter
        layer = layer.base_layer
    if layer is mha:  # without a gate, torch's own code runs, which does not check this
        layer.check_projections()
    key_padding_mask, attn_mask = split_masks(layer, attention_mask, hidden_states)
    return mha(
        hidden_states,
        hidden_states if key is None else key,
        hidden_states if value is None else value,
        key_padding_mask=key_padding_mask,
        need_weights=wants_maps(replacement.config, options),
        attn_mask=attn_mask,
        average_attn_weights=False,
    )


def split_masks(
    mha: MultiheadAttention, mask: Tensor | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """key_padding_mask [B, S] and attn_mask [B * H, L, S], as ``mha`` takes them for x [B, L, D];
    ``mask`` [B or 1, S] or [B or 1, H or 1, L or 1, S]."""
    if mask is None:
        return None, None
    mask = for_each_sequence(mask, x)
    if mask.dim() == 2:  # [B, L]
        padding = mask == 0
        if mha.gate is None:
            # torch's own module gives NaN for a sequence that is all padding.
            padding = padding & ~padding.all(dim=1, keepdim=True)
        return padding, None
    mask, unseen = complete(mask)
    if mask.size(1) == 1 and mask.size(2) == 1:  # the same for every head and query
        return mask[:, 0, 0, :], None
    padding = unseen.all(dim=2).all(dim=1)  # [B, L]: keys that no query sees
    if mask.dtype != torch.bool:
        padding = torch.zeros_like(padding, dtype=mask.dtype).masked_fill(padding, float("-inf"))
    batch, length = x.shape[:2]
    heads = mha.num_heads
    return padding, mask.expand(batch, heads, length, -1).reshape(batch * heads, length, -1)


def name_implementation(
    model: nn.Module, configs: list, implementation: str = IMPLEMENTATION
) -> None:
    """Makes ``model`` pass masks to its converted layers, which have these configurations."""
    # The configuration decides which mask the layers get. It may be shared with a model that was
    # not converted, so the converted one gets a copy.
    copies: dict[int, Any] = {}
    for config in configs:
        if id(config) not in copies:
            copies[id(config)] = copy.deepcopy(config)
            copies[id(config)]._attn_implementation = implementation
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in copies:
            vars(module)["config"] = copies[id(config)]


class EncoderReplacement(nn.Module):
    """Replaces an encoder's attention, around one :class:`headwise.MultiheadAttention`.

    Attributes:
        mha: the layer, or an adapter around it.
        config: the model's configuration.
        without_bias: which of the original's projections have no bias; here they have zeros.
    """

    #: Names of the original's query, key, value and output.
    PROJECTIONS: tuple[str, str, str, str]

    def __init__(self, original: nn.Module, mha: MultiheadAttention):
        nn.Module.__init__(self)
        self.config = original.config
        self.is_causal = original.is_causal
        self.mha = mha
        self.without_bias: list[str] = []

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, L, D] -> output [B, L, D] and, if asked for, attention weights [B, H,
        L, L].

        ``attention_mask`` is None, [B, L] (nonzero = token), or [B or 1, H or 1, L or 1, L]:
        boolean (True = may attend) or floating (added to the scores).
        """
        return attend(self, hidden_states, attention_mask, options)

    def original_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Gives the tensors of this module, at ``name``, the names and layout of the original's
        state dict."""
        own = f"{name}.mha."
        parts = {
            kind: (*state.pop(f"{own}in_proj_{kind}").chunk(3), state.pop(f"{own}out_proj.{kind}"))
            for kind in ("weight", "bias")
        }
        for kind, tensors in parts.items():
            for projection, tensor in zip(self.PROJECTIONS, tensors, strict=True):
                if kind == "weight" or projection not in self.without_bias:
                    state[f"{self._place(name)}{projection}.{kind}"] = tensor.contiguous()

    def _place(self, name: str) -> str:
        """The prefix of the original's projections."""
        return f"{name}."


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


class SeparateProjections(Architecture):
    """Attention with query, key, value and output in four linear layers.

    ``module`` is the one in the registry; in most models it holds the four itself and is replaced.
    """

    #: The children of ``module`` and of the modules in it, by name.
    children: Mapping[str, tuple[str, ...]]

    def projections(self, module: Any) -> dict[str, nn.Linear]:
        """Query, key, value and output of ``module``, in this order, by name."""
        raise NotImplementedError

    def attention(self, module: nn.Module) -> nn.Module:
        """The module that :meth:`replacement` replaces, which has the hooks."""
        return module

    def replacement(self, old: Any, mha: MultiheadAttention) -> Any:
        """The replacement of ``old``."""
        raise NotImplementedError

    def shape(self, module: Any) -> tuple[int, int, float]:
        """Number of heads, width of a head, dropout of the attention weights."""
        raise NotImplementedError

    def refusal(self, module: nn.Module) -> str | None:
        try:
            linears = self.projections(module)
            self.shape(module)
            own = self.attention(module)
            [getattr(own, name) for name in ("config", "is_causal")]
        except AttributeError as error:
            return f"another version of transformers lays it out otherwise ({error})"
        return first(self._faults(module, linears))

    def _faults(self, module: nn.Module, linears: dict[str, nn.Linear]) -> Iterator[str | None]:
        for name, linear in linears.items():
            yield projection_fault(name, linear)
            yield hooks_fault(name, linear)
        yield implementation_fault(self.attention(module).config)
        for name, expected in self.children.items():
            part = module.get_submodule(name)
            yield forward_fault(name, part)
            yield children_fault(name, part, expected)
        yield renamed_fault(self.attention(module))
        *inputs, _ = linears.items()
        if len({linear.bias is None for _, linear in inputs}) > 1:
            yield "only some of its query, key and value have a bias"
        parameters = [(f"{n}.{k}", p) for n, q in inputs for k, p in q.named_parameters()]
        if len({(p.dtype, p.device, p.requires_grad) for _, p in parameters}) > 1:
            yield "its query, key and value differ in dtype, device or requires_grad"
        for name, parameter in parameters:
            yield copied_fault(name, parameter)

    def copied_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        inputs = list(self.projections(module).values())[:3]
        return [p for linear in inputs for p in linear.parameters()]

    def trial(self, module: nn.Module) -> Trial:
        width = next(iter(self.projections(module).values())).in_features

        def run(own: nn.Module, draw: Draw) -> list[Tensor]:
            use_plain_implementation(own)
            tokens, padding = draw(2, 5, width), draw.padding(2, 5)
            mask = draw.added(padding[:, None, None, :].expand(-1, -1, 5, -1))
            calls = (own(tokens, mask), own(tokens, None))
            return [call[0] if isinstance(call, tuple) else call for call in calls]

        return run

    def convert(self, module: nn.Module) -> tuple[nn.Module, MultiheadAttention]:
        linears = self.projections(module)
        *inputs, dense = linears.values()
        heads, head_dim, dropout = self.shape(module)
        mha = MultiheadAttention(
            dense.out_features,
            heads,
            dropout=dropout,
            batch_first=True,
            device="meta",
            head_dim=head_dim,
        )

        def zeros(size: int) -> nn.Parameter:  # not trained: there is no such bias
            return nn.Parameter(dense.weight.new_zeros(size), requires_grad=False)

        mha.in_proj_weight = remade([p.get_parameter("weight") for p in inputs], _joined)  # [3E, D]
        if inputs[0].bias is None:
            mha.in_proj_bias = zeros(mha.in_proj_weight.size(0))  # [3E]
        else:
            mha.in_proj_bias = remade([p.get_parameter("bias") for p in inputs], _joined)  # [3E]
        mha.out_proj.weight = dense.weight  # [D, E]
        mha.out_proj.bias = zeros(dense.out_features) if dense.bias is None else dense.bias  # [D]
        old = self.attention(module)
        replacement = self.replacement(old, mha)
        replacement.without_bias = [
            name
            for name, linear in zip(replacement.PROJECTIONS, linears.values(), strict=True)
            if linear.bias is None
        ]
        in_the_mode_of(old, replacement, *mha.modules())
        carry_hooks(old, replacement)
        return self.put(module, replacement), mha

    def put(self, module: nn.Module, replacement: nn.Module) -> nn.Module:
        """What takes the place of ``module``, given the replacement of its attention."""
        return replacement

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        name_implementation(model, [self.attention(module).config for module in converted])


def use_plain_implementation(module: nn.Module) -> None:
    """Lets a temporary module compute attention on any device, in any dtype."""
    for part in module.modules():
        config = vars(part).get("config")
        if config is None:
            continue
        known = ["sdpa", "eager"]
        if getattr(part, "attn_logit_softcapping", None) is not None or hasattr(part, "sinks"):
            known = ["eager"]  # "sdpa" leaves them out
        if config._attn_implementation not in known:
            own = copy.deepcopy(config)
            own._attn_implementation = known[0]
            vars(part)["config"] = own
