"""``torch.nn.MultiheadAttention``, wherever it stands.

``torch.nn.TransformerEncoderLayer``, ``TransformerDecoderLayer``, ``Transformer`` and
``TransformerEncoder`` hold nothing else, so they need no files of their own: the converted layer
tells their fused kernels that it must be called (``MultiheadAttention._qkv_same_embed_dim``).
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from headwise.convert.registry import Architecture, class_path
from headwise.nn.multihead_attention import MultiheadAttention

_PARAMETERS = (
    "in_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Moves the hooks that were registered on ``old`` to ``new``."""
    for attribute, hooks in old.__dict__.items():
        if "hooks" in attribute and isinstance(hooks, dict) and hooks:
            new.__dict__[attribute].update(hooks)


def replaced_text(name: str, linear: nn.Module) -> str:
    """Why attention whose projection is not a plain linear layer is refused."""
    return (
        f"its {name} was replaced by a {class_path(type(linear))} (merge or remove what stands "
        f"around the linear layer)"
    )


class TorchMultiheadAttention(Architecture):
    name = "torch.nn.MultiheadAttention"

    def refusal(self, module: nn.MultiheadAttention) -> str | None:
        if type(module.out_proj) is not NonDynamicallyQuantizableLinear:
            return replaced_text("out_proj", module.out_proj)
        return None

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
        mha.train(module.training)
        carry_hooks(module, mha)
        return mha, mha


ARCHITECTURE = TorchMultiheadAttention()
