"""``torch.nn.MultiheadAttention``, alone or in other modules.

``torch.nn.TransformerEncoderLayer``, ``TransformerDecoderLayer``, ``Transformer`` and
``TransformerEncoder`` contain nothing else, so they need no files: the converted layer tells their
fused kernels that it must be called (``MultiheadAttention._qkv_same_embed_dim``).
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from headwise.convert.checks import (
    children_fault,
    first,
    forward_fault,
    projection_fault,
)
from headwise.convert.registry import Architecture
from headwise.nn.layers import carry_hooks
from headwise.nn.multihead_attention import MultiheadAttention
from headwise.nn.proof import Trial, multihead_outputs

_PARAMETERS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)


class TorchMultiheadAttention(Architecture):
    name = "torch.nn.MultiheadAttention"

    def refusal(self, module: nn.MultiheadAttention) -> str | None:
        return first(
            (
                forward_fault("", module),
                children_fault("", module, ("out_proj",), _PARAMETERS),
                projection_fault("out_proj", module.out_proj, NonDynamicallyQuantizableLinear),
            )
        )

    def trial(self, module: nn.MultiheadAttention) -> Trial:
        widths = module.embed_dim, module.kdim, module.vdim
        return lambda own, draw: multihead_outputs(own, draw, widths, module.batch_first)

    def convert(self, module: nn.MultiheadAttention) -> tuple[nn.Module, MultiheadAttention]:
        mha = MultiheadAttention(
            module.embed_dim,
            module.num_heads,
            dropout=module.dropout,
            bias=module.in_proj_bias is not None,
            add_bias_kv=module.bias_k is not None,
            add_zero_attn=module.add_zero_attn,
            kdim=module.kdim,
            vdim=module.vdim,
            batch_first=module.batch_first,
            device="meta",
        )
        for name in _PARAMETERS:
            setattr(mha, name, getattr(module, name))
        mha.out_proj = module.out_proj
        mha.training = module.training
        carry_hooks(module, mha)
        return mha, mha


ARCHITECTURE = TorchMultiheadAttention()
