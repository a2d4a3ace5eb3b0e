"""What conversions of transformers models (version 5) share: masks, attention maps, parameters.

A converted model names "headwise" as its attention implementation, which makes transformers hand
its layers the padding mask as the tokenizer made it.
"""

from __future__ import annotations

import copy
import importlib

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from headwise.convert.registry import Architecture
from headwise.convert.torch_attention import carry_hooks, replaced_text
from headwise.gates.linears import check_read
from headwise.nn.multihead_attention import MultiheadAttention

#: The attention implementation that converted models name in their configuration.
IMPLEMENTATION = "headwise"


def _padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    **unused,
) -> Tensor | None:
    """The mask of a bidirectional model as the tokenizer made it, bool [B, S], True = token.

    The masks that transformers builds for its own implementations are [B, 1, L, S], in which
    padding can no longer be told from any other mask; a gate has to know what is padding.
    """
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def unconverted_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, L, d]
    key: Tensor,  # [B, H, S, d]
    value: Tensor,  # [B, H, S, d]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **unused,
) -> tuple[Tensor, None]:
    """For attention that was not converted but shares the configuration of a model that was."""
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return output.transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, unconverted_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)


def attend(
    mha: MultiheadAttention,
    hidden_states: Tensor,  # [B, L, D]
    attention_mask: Tensor | None,
    config,
    options: dict,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention with the masks of transformers -> [B, L, D] and, where asked for, the maps."""
    layer = mha
    while not isinstance(layer, MultiheadAttention):  # an adapter stands around it
        layer = layer.base_layer
    if layer is mha:  # without a gate, torch's own code runs, which does not check this
        check_read("out_proj", layer.out_proj)
    key_padding_mask, attn_mask = split_masks(layer, attention_mask, hidden_states.size(1))
    need_weights = options.get("output_attentions")
    if need_weights is None:
        need_weights = getattr(config, "output_attentions", False)
    return mha(
        hidden_states,
        hidden_states,
        hidden_states,
        key_padding_mask=key_padding_mask,
        need_weights=bool(need_weights),
        attn_mask=attn_mask,
        average_attn_weights=False,
    )


def split_masks(
    mha: MultiheadAttention, mask: Tensor | None, length: int
) -> tuple[Tensor | None, Tensor | None]:
    """key_padding_mask [B, L] and attn_mask [B * H, L, L], as ``mha`` takes them."""
    if mask is None:
        return None, None
    if mask.dim() == 2:  # [B, L]
        padding = mask == 0
        if mha.gate is None:
            # torch's own module gives NaN for a sequence that is nothing but padding.
            padding = padding & ~padding.all(dim=1, keepdim=True)
        return padding, None
    if mask.dim() != 4:
        raise ValueError(
            f"attention_mask must have 2 or 4 dimensions, got {mask.dim()} "
            f"(shape {tuple(mask.shape)})"
        )
    if mask.dtype == torch.bool:
        mask = ~mask  # True = may not attend
        unseen = mask
    else:
        # transformers writes 'may not attend' as the lowest finite number.
        lowest = torch.finfo(mask.dtype).min / 2
        unseen = mask < lowest
        mask = mask.masked_fill(unseen, float("-inf"))
    if mask.size(1) == 1 and mask.size(2) == 1:  # the same for every head and query
        return mask[:, 0, 0, :], None
    padding = unseen.all(dim=2).all(dim=1)  # [B, L]: keys that no query sees
    if mask.dtype != torch.bool:
        padding = torch.zeros_like(padding, dtype=mask.dtype).masked_fill(padding, float("-inf"))
    batch, heads = mask.size(0), mha.num_heads
    return padding, mask.expand(batch, heads, length, -1).reshape(batch * heads, length, -1)


def name_implementation(
    model: nn.Module, configs: list, implementation: str = IMPLEMENTATION
) -> None:
    """Makes ``model`` hand its converted layers, which have these configurations, their masks."""
    # The configuration decides what mask the layers get. It may be shared with another model that
    # was not converted, so the converted one gets its own.
    copies: dict[int, object] = {}
    for config in configs:
        if id(config) not in copies:
            copies[id(config)] = copy.deepcopy(config)
            copies[id(config)]._attn_implementation = implementation
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


class SeparateProjections(Architecture):
    """Attention that keeps query, key, value and output in four linear layers.

    ``module`` is what the registry found; in most models it holds the four itself and is replaced.
    """

    def projections(self, module: nn.Module) -> dict[str, nn.Linear]:
        """Query, key, value and output of ``module``, in this order, by the names they go by."""
        raise NotImplementedError

    def attention(self, module: nn.Module) -> nn.Module:
        """What gives way to :meth:`successor`, and has the hooks."""
        return module

    def successor(self, old: nn.Module, mha: MultiheadAttention) -> nn.Module:
        """What stands where ``old`` stood."""
        raise NotImplementedError

    def shape(self, module: nn.Module) -> tuple[int, int, float]:
        """Number of heads, width of a head, dropout of the attention weights."""
        raise NotImplementedError

    def refusal(self, module: nn.Module) -> str | None:
        try:
            linears = self.projections(module)
        except AttributeError as error:
            return f"another version of transformers lays it out otherwise ({error})"
        for name, linear in linears.items():
            if type(linear) is not nn.Linear:
                return replaced_text(name, linear)
        inputs = list(linears.values())[:3]
        if len({linear.bias is None for linear in inputs}) > 1:
            return "only some of its query, key and value have a bias"
        states = {(p.dtype, p.device, p.requires_grad) for q in inputs for p in q.parameters()}
        if len(states) > 1:
            return "its query, key and value differ in dtype, device or requires_grad"
        return None

    def copied_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        inputs = list(self.projections(module).values())[:3]
        return [p for linear in inputs for p in linear.parameters()]

    def convert(self, module: nn.Module) -> tuple[nn.Module, MultiheadAttention]:
        *inputs, dense = self.projections(module).values()
        heads, head_dim, dropout = self.shape(module)
        mha = MultiheadAttention(
            dense.out_features,
            heads,
            dropout=dropout,
            batch_first=True,
            device="meta",
            head_dim=head_dim,
        )
        weight = inputs[0].weight
        with torch.no_grad():
            mha.in_proj_weight = nn.Parameter(
                torch.cat([p.weight for p in inputs]), requires_grad=weight.requires_grad
            )  # [3E, D]
            if inputs[0].bias is None:  # zeros that no training changes: the model has no such bias
                mha.in_proj_bias = nn.Parameter(
                    weight.new_zeros(3 * weight.size(0)), requires_grad=False
                )  # [3E]
            else:
                mha.in_proj_bias = nn.Parameter(
                    torch.cat([p.bias for p in inputs]), requires_grad=weight.requires_grad
                )  # [3E]
            if dense.bias is None:
                dense.bias = nn.Parameter(
                    dense.weight.new_zeros(dense.out_features), requires_grad=False
                )
        mha.out_proj.weight = dense.weight  # [D, E]
        mha.out_proj.bias = dense.bias  # [D]
        old = self.attention(module)
        successor = self.successor(old, mha)
        successor.train(old.training)
        carry_hooks(old, successor)
        return self.put(module, successor), mha

    def put(self, module: nn.Module, successor: nn.Module) -> nn.Module:
        """What stands where ``module`` stood, after ``successor`` was made."""
        return successor

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        name_implementation(model, [self.attention(module).config for module in converted])


def named(path: str) -> type:
    """The class ``package.module.Class``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
