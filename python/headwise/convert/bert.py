"""BERT of transformers version 5: every encoder model that is built on ``BertAttention``.

``BertAttention.self`` (query, key, value) and ``BertAttention.output.dense`` become one
:class:`headwise.MultiheadAttention`; the rest of ``output`` (dropout, residual, layer norm) stays.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.bert.modeling_bert import BertAttention, BertSelfAttention

from headwise.convert.registry import Architecture
from headwise.convert.torch_attention import carry_hooks
from headwise.multihead_attention import MultiheadAttention

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


def _unconverted_attention(
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


AttentionInterface.register(IMPLEMENTATION, _unconverted_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)


class SelectedBertSelfAttention(BertSelfAttention):
    """Stands where ``BertSelfAttention`` stood; its output is already projected.

    It is a ``BertSelfAttention`` so that transformers finds it when it collects attention maps
    (``output_attentions=True``).
    """

    def __init__(self, original: BertSelfAttention, mha: MultiheadAttention):
        nn.Module.__init__(self)
        self.config = original.config
        self.is_decoder = original.is_decoder
        self.is_causal = original.is_causal
        self.layer_idx = original.layer_idx
        self.mha = mha

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, L, D] -> output [B, L, D] and, where asked for, maps [B, H, L, L].

        ``attention_mask`` is None, [B, L] (nonzero = token), or [B, 1 or H, 1 or L, L]: boolean
        (True = may attend) or floating (added to the scores).
        """
        if past_key_values is not None:
            raise ValueError("past_key_values must be None: a converted BERT is an encoder")
        return attend(self.mha, hidden_states, attention_mask, self.config, kwargs)


def attend(
    mha: MultiheadAttention,
    hidden_states: Tensor,  # [B, L, D]
    attention_mask: Tensor | None,
    config,
    options: dict,
) -> tuple[Tensor, Tensor | None]:
    """Self-attention with the masks of transformers -> [B, L, D] and, where asked for, the maps."""
    key_padding_mask, attn_mask = split_masks(mha, attention_mask, hidden_states.size(1))
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


def name_implementation(model: nn.Module, configs: list) -> None:
    """Makes ``model`` hand its converted layers, which have these configurations, their masks."""
    # The configuration decides what mask the layers get. It may be shared with another model that
    # was not converted, so the converted one gets its own.
    copies: dict[int, object] = {}
    for config in configs:
        if id(config) not in copies:
            copies[id(config)] = copy.deepcopy(config)
            copies[id(config)]._attn_implementation = IMPLEMENTATION
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


class Bert(Architecture):
    name = "transformers BERT (encoder)"

    def is_converted(self, module: BertAttention) -> bool:
        return isinstance(module.self, SelectedBertSelfAttention)

    def refusal(self, module: BertAttention) -> str | None:
        if module.is_cross_attention or type(module.self) is not BertSelfAttention:
            return f"its self-attention is a {type(module.self).__name__}, not a BertSelfAttention"
        if module.self.is_decoder:
            return "it belongs to a decoder (config.is_decoder), which caches keys and values"
        linears = {
            "self.query": module.self.query,
            "self.key": module.self.key,
            "self.value": module.self.value,
            "output.dense": module.output.dense,
        }
        for name, linear in linears.items():
            if type(linear) is not nn.Linear:
                return f"its {name} was replaced by a {type(linear).__name__}"
        states = {
            (p.dtype, p.device, p.requires_grad)
            for name, linear in linears.items()
            if name != "output.dense"
            for p in linear.parameters()
        }
        if len(states) > 1:
            return "its query, key and value differ in dtype, device or requires_grad"
        return None

    def copied_parameters(self, module: BertAttention) -> list[nn.Parameter]:
        projections = (module.self.query, module.self.key, module.self.value)
        return [p for projection in projections for p in projection.parameters()]

    def convert(self, module: BertAttention) -> tuple[nn.Module, MultiheadAttention]:
        old, dense = module.self, module.output.dense
        projections = (old.query, old.key, old.value)
        mha = MultiheadAttention(
            dense.out_features,
            old.num_attention_heads,
            dropout=old.dropout.p,
            batch_first=True,
            device="meta",
            head_dim=old.attention_head_size,
        )
        with torch.no_grad():
            weight = torch.cat([p.weight for p in projections])  # [3E, D]
            bias = torch.cat([p.bias for p in projections])  # [3E]
        trained = old.query.weight.requires_grad
        mha.in_proj_weight = nn.Parameter(weight, requires_grad=trained)
        mha.in_proj_bias = nn.Parameter(bias, requires_grad=trained)
        mha.out_proj.weight = dense.weight  # [D, E]
        mha.out_proj.bias = dense.bias  # [D]
        successor = SelectedBertSelfAttention(old, mha)
        successor.train(old.training)
        carry_hooks(old, successor)
        module.self = successor
        module.output.dense = nn.Identity()
        return module, mha

    def finish(self, model: nn.Module, converted: list[nn.Module]) -> None:
        name_implementation(model, [attention.self.config for attention in converted])


ARCHITECTURE = Bert()
