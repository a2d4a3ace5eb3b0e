"""MPNet of transformers version 5: a relative position bias that the encoder makes for all layers,
and attention that gets the mask to add to its scores."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwise.convert.decoder import TransformersProjected
from headwise.convert.projections import Places
from headwise.convert.relative_bias import SelectedBiasedAttention
from headwise.convert.replacements import replacement_classes
from headwise.nn.proof import Draw, Trial

PLACES = Places("q", "k", "v", "o")


class MPNetReplacement(SelectedBiasedAttention):
    """Replaces ``MPNetSelfAttention``."""

    places = PLACES
    is_causal = False
    config = None

    def forward(  # type: ignore[override]  # as transformers calls it
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """As :meth:`SelectedDecoderAttention.attend`; attention weights only if asked for."""
        options["output_attentions"] = bool(output_attentions)
        bias = None if position_bias is None else lambda *_: self.own_bias(position_bias)
        output, maps = self.attend(hidden_states, attention_mask, None, options, bias=bias)
        return (output,) if maps is None else (output, maps)


selected, __getattr__ = replacement_classes(__name__, MPNetReplacement)


class MPNet(TransformersProjected):
    name = "transformers MPNet"
    replacement_class = staticmethod(selected)
    places = PLACES
    children = ("dropout",)
    attributes = ()

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        heads = module.num_attention_heads
        return {
            "num_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": module.attention_head_size,
            "dropout": module.dropout.p,
            "scale": module.attention_head_size**-0.5,
        }

    def trial(self, module: nn.Module) -> Trial:
        width, heads = module.o.out_features, module.num_attention_heads

        def run(own: nn.Module, draw: Draw) -> list[Tensor]:
            tokens, bias = draw(2, 5, width), draw(2, heads, 5, 5)
            mask = draw.added(draw.padding(2, 5)[:, None, None, :])
            return [own(tokens, mask, bias)[0], own(tokens)[0]]

        return run


ARCHITECTURE = MPNet()
