"""Attention layers whose heads can be chosen, their cache, and changing what their heads do."""

from headwise.nn.attention_layer import AttentionLayer, AttentionProbe
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.instrumenting import Instrumented, evaluating, instrument, scaled_heads
from headwise.nn.intervention import example_losses
from headwise.nn.key_value_cache import KeyValueCache
from headwise.nn.layers import attention_layers, head_groups
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.nn.split_attention import split_projections
from headwise.nn.visibility import gates_see

__all__ = [
    "AttentionLayer",
    "AttentionProbe",
    "GroupedQueryAttention",
    "Instrumented",
    "KeyValueCache",
    "MultiheadAttention",
    "attention_layers",
    "evaluating",
    "example_losses",
    "gates_see",
    "head_groups",
    "instrument",
    "scaled_heads",
    "split_projections",
]
