"""Multi-head attention that runs only the heads its gate chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import Parameter

from headwise import _C
from headwise.gates.base import Gate
from headwise.gates.linears import check_read
from headwise.gates.recomputation import recomputing
from headwise.gates.selection import Selection, TokenSelection
from headwise.gates.threshold import HeadInputs
from headwise.io.checked import check_tensor
from headwise.nn.attention_inputs import AttentionInputs, canonical_inputs, check_sizes
from headwise.nn.attention_layer import AttentionLayer, AttentionProbe
from headwise.nn.visible_keys import attend_every_head

if TYPE_CHECKING:
    from headwise._C import LayerPlan

__all__ = ["AttentionProbe", "MultiheadAttention"]

_ops = torch.ops.headwise
# Torch's own class, even if someone replaces it in torch.nn by this module.
_TorchMultiheadAttention = nn.MultiheadAttention


class MultiheadAttention(AttentionLayer, nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention`` with heads chosen by every input.

    The arguments, their defaults, the parameters and the keys of ``state_dict`` are those of
    :class:`torch.nn.MultiheadAttention` ("Attention Is All You Need", arXiv 1706.03762); without a
    gate it *is* that module. With a gate, a layer computes for each sequence

    .. math:: y = W_O\,[w_1 A_1(x), \dots, w_H A_H(x)] + b_O

    where :math:`w_h` is 0 for a head that the gate did not choose; in evaluation such a head is not
    computed at all. The gate sees the query and, in self-attention, its padding.

    Args:
        embed_dim: width of the model, D.
        num_heads: heads of the layer, H.
        dropout: dropout probability on the attention probabilities.
        bias: whether the input and output projections have a bias.
        add_bias_kv: add a learned row of keys and values.
        add_zero_attn: add a row of zeros to keys and values.
        kdim: features of the keys; default ``embed_dim``.
        vdim: features of the values; default ``embed_dim``.
        batch_first: inputs and output are ``[B, L, D]`` instead of ``[L, B, D]``.
        device: of the parameters.
        dtype: of the parameters.
        gate: a gate; an unbound one (``hw.BudgetGate(keep=0.5)``) is bound to this layer's sizes.
        head_dim: width of a head, if not ``embed_dim / num_heads`` (a pruned layer). ``num_heads``
            may then be 0: the output is the output bias.

    Raises:
        ValueError: sizes that are not positive, a head count that does not divide ``embed_dim``
            (when ``head_dim`` is not given), or a gate bound to other sizes.

    Note:
        The attention weights that ``need_weights=True`` (torch's default) returns are zeros for
        heads that did not run. They cost an extra dense ``[B, H, L, S]`` computation; pass
        ``need_weights=False`` if you do not need them. They are the probabilities before dropout.

    Example:
        >>> mha = MultiheadAttention(768, 12, gate=BudgetGate(keep=0.5), batch_first=True)
        >>> y, _ = mha(x, x, x, key_padding_mask=mask, need_weights=False)
    """

    DESCRIBED = {
        "embed_dim": int,
        "num_heads": int,
        "head_dim": int,
        "kdim": int,
        "vdim": int,
        "dropout": (int, float),
        "bias": bool,
        "add_bias_kv": bool,
        "add_zero_attn": bool,
        "batch_first": bool,
    }

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        gate: Gate | None = None,
        head_dim: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_sizes(embed_dim, num_heads, head_dim, dropout)
        factory = {"device": device, "dtype": dtype}
        self.embed_dim = embed_dim
        self.kdim = embed_dim if kdim is None else kdim
        self.vdim = embed_dim if vdim is None else vdim
        self._same_embed_dim = self.kdim == embed_dim and self.vdim == embed_dim
        self.num_heads = num_heads
        self.dropout = dropout
        self.batch_first = batch_first
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.add_zero_attn = add_zero_attn

        width = self.num_heads * self.head_dim  # E
        # Registered in torch's order: the keys of state_dict come in the same order too.
        if self._same_embed_dim:
            self.in_proj_weight = Parameter(torch.empty((3 * width, embed_dim), **factory))
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.q_proj_weight = Parameter(torch.empty((width, embed_dim), **factory))
            self.k_proj_weight = Parameter(torch.empty((width, self.kdim), **factory))
            self.v_proj_weight = Parameter(torch.empty((width, self.vdim), **factory))
            self.register_parameter("in_proj_weight", None)
        self.register_parameter(
            "in_proj_bias", Parameter(torch.empty(3 * width, **factory)) if bias else None
        )
        if width > 0:
            self.out_proj = NonDynamicallyQuantizableLinear(width, embed_dim, bias=bias, **factory)
        else:  # the initialisation of an empty matrix divides by its width
            self.out_proj = NonDynamicallyQuantizableLinear(1, embed_dim, bias=bias, **factory)
            self.out_proj.in_features = 0
            self.out_proj.weight = Parameter(torch.empty((embed_dim, 0), **factory))
        if add_bias_kv:
            self.bias_k = Parameter(torch.empty((1, 1, width), **factory))
            self.bias_v = Parameter(torch.empty((1, 1, width), **factory))
        else:
            self.bias_k = self.bias_v = None
        if width > 0:
            self._reset_parameters()
        elif bias:
            init.constant_(self.out_proj.bias, 0.0)

        self._init_choosing(gate)

    @property
    def output_projection(self) -> nn.Module:
        return self.out_proj

    @property
    def value_bias(self) -> Tensor | None:
        if self.in_proj_bias is None:
            return None
        with torch.enable_grad():  # the view then tells whether the parameter is trained
            return self.in_proj_bias[2 * self.num_heads * self.head_dim :]

    def describe(self) -> dict[str, Any]:
        return {
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
            "kdim": self.kdim,
            "vdim": self.vdim,
            "dropout": self.dropout,
            "bias": self.in_proj_bias is not None,
            "add_bias_kv": self.bias_k is not None,
            "add_zero_attn": self.add_zero_attn,
            "batch_first": self.batch_first,
        }

    def fitted(self, described: Mapping[str, Any], name: str = "") -> MultiheadAttention:
        self._check_same(described, ("embed_dim", "kdim", "vdim"), name)
        if self.describe() == described:
            return self
        weight = self.out_proj.weight
        fitted = MultiheadAttention(**described, device=weight.device, dtype=weight.dtype)
        return fitted.train(self.training)

    def pruned(self, entry: LayerPlan) -> MultiheadAttention:
        sizes = {**self.describe(), "num_heads": len(entry.heads)}
        smaller = MultiheadAttention(**sizes, device="meta")
        parameters = {
            name: parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("gate.")
        }
        kept = _C.prune_projections(parameters, entry)
        for name, old in parameters.items():
            module = smaller.get_submodule(name.rpartition(".")[0])
            new = nn.Parameter(kept[name], requires_grad=old.requires_grad)
            setattr(module, name.rpartition(".")[2], new)
        return smaller.train(self.training)

    def with_heads_of(self, layers: Sequence[MultiheadAttention]) -> MultiheadAttention:
        """A layer like this one that has the heads of all ``layers``, one layer after the other,
        and no bias in its output projection."""
        count = sum(layer.num_heads for layer in layers)
        whole = MultiheadAttention(**{**self.describe(), "num_heads": count}, device="meta")
        query, key, value, *biases = zip(*(layer._projections() for layer in layers), strict=True)
        joined: dict[str, Tensor] = {}
        if whole._same_embed_dim:
            joined["in_proj_weight"] = torch.cat([*query, *key, *value])
        else:
            for name, own in (("q", query), ("k", key), ("v", value)):
                joined[f"{name}_proj_weight"] = torch.cat(own)
        if whole.in_proj_bias is not None:
            joined["in_proj_bias"] = torch.cat([part for own in biases for part in own])
        for name, tensor in joined.items():
            setattr(whole, name, nn.Parameter(tensor))
        output = torch.cat([layer.out_proj.weight for layer in layers], 1)
        width, size = output.size(1), output.size(0)
        whole.out_proj = NonDynamicallyQuantizableLinear(width, size, bias=False, device="meta")
        whole.out_proj.weight = nn.Parameter(output)
        return whole

    def check_projections(self) -> None:
        """Raises TypeError if a projection whose weight is read computes more than its weight."""
        check_read("out_proj", self.out_proj)

    @property
    def _is_plain(self) -> bool:
        """Whether torch's own module computes the same thing."""
        return self.gate is None and self._probe is None

    # torch.nn.TransformerEncoderLayer reads this attribute, and if it is True it may pass this
    # layer's weights to one fused kernel without calling this module. A layer with a gate or a
    # recorder must be called, so it is False here.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return self._same_embed_dim and self._is_plain and self._has_standard_width

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self._same_embed_dim = value

    @property
    def _has_standard_width(self) -> bool:
        return self.num_heads > 0 and self.num_heads * self.head_dim == self.embed_dim

    def _reset_parameters(self) -> None:
        if self._same_embed_dim:
            init.xavier_uniform_(self.in_proj_weight)
        else:
            init.xavier_uniform_(self.q_proj_weight)
            init.xavier_uniform_(self.k_proj_weight)
            init.xavier_uniform_(self.v_proj_weight)
        if self.in_proj_bias is not None:
            init.constant_(self.in_proj_bias, 0.0)
            init.constant_(self.out_proj.bias, 0.0)
        if self.bias_k is not None:
            init.xavier_normal_(self.bias_k)
        if self.bias_v is not None:
            init.xavier_normal_(self.bias_v)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)

    def __prepare_scriptable__(self) -> nn.MultiheadAttention:
        # torch.jit.script compiles what this returns: torch's module, with the same parameters.
        if not (self._is_plain and self._has_standard_width):
            raise RuntimeError(
                "torch.jit.script cannot compile a layer with a gate or a pruned layer: use "
                "torch.jit.trace, torch.export or torch.compile"
            )
        sizes = self.describe()
        del sizes["head_dim"]  # the standard one
        plain = _TorchMultiheadAttention(**sizes, device="meta").train(self.training)
        plain._parameters.update(self._parameters)
        plain.out_proj = self.out_proj
        return plain

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"dropout={self.dropout}, batch_first={self.batch_first}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`, on the chosen heads.

        Args:
            query: ``[L, B, D]``, ``[B, L, D]`` with ``batch_first``, or ``[L, D]`` unbatched.
            key: the same with S rows of ``kdim`` features.
            value: the same with S rows of ``vdim`` features.
            key_padding_mask: ``[B, S]`` (``[S]`` unbatched); boolean (True = padding) or floating
                (added to the scores).
            need_weights: also return the attention weights.
            attn_mask: ``[L, S]`` or ``[B * H, L, S]``; boolean (True = may not attend) or floating.
            average_attn_weights: average the weights over the H heads.
            is_causal: a hint that ``attn_mask`` is the causal mask.

        Returns:
            The output, shaped as ``query``, and the weights: ``[B, L, S']`` averaged, ``[B, H, L,
            S']`` per head, without B if the input is unbatched, or None.

        Raises:
            ValueError: a shape that does not fit, or (on a CPU) a gate whose relevance is not
                finite.
            TypeError: an input that is no floating tensor, a mask that is neither boolean nor
                floating. Or a wrapped ``out_proj``: its weight is read.
            RuntimeError: ``is_causal`` without ``attn_mask``.
        """
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, tensor)
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None:
                check_tensor(name, mask)
        if self._is_plain and self._has_standard_width:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        self.check_projections()
        if query.is_nested:
            return self._forward_nested(query, key, value, key_padding_mask, attn_mask)

        inputs = canonical_inputs(self, query, key, value, key_padding_mask, attn_mask, is_causal)
        heads, values = self._head_inputs(inputs)
        selection, gate = self._select(inputs, heads), self.gate
        if self._probe is not None or selection is None or gate is None:
            output = self._run_all(inputs, selection, heads)
        elif gate.attends:
            context = gate.attend(heads, values)  # [B, H, L, d]
            output = self._combine(context, selection.weight)
        elif isinstance(selection, TokenSelection):
            output = self._run_tokens(inputs, selection)  # [B, L, D]
        elif gate.projects:
            output = self._run_bank(gate, inputs, selection)  # [B, L, D]
        else:
            output = self._run_selected(inputs, selection)  # [B, L, D]
        weights = self._attention_weights(inputs, selection) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1) if self.num_heads else weights.sum(1)  # [B, L, S']

        if query.dim() == 2:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _head_inputs(self, inputs: AttentionInputs) -> tuple[HeadInputs | None, Tensor | None]:
        """The inputs of a gate that chooses by queries and keys, and values ``[B, H, S', d]``."""
        if self.gate is None or not self.gate.reads_heads:
            return None, None
        if not self.gate.attends:  # values are projected later, for the chosen heads only
            inputs = inputs._replace(value=inputs.value[:, :0])
        q, k, v = self._project(inputs)
        padding = inputs.key_padding_mask
        heads = HeadInputs(
            q,
            k,
            padding,
            padding if inputs.query_is_key else None,
            inputs.attn_mask,
            inputs.is_causal,
            self._added_keys,
        )
        return heads, v

    def _select(
        self, inputs: AttentionInputs, heads: HeadInputs | None
    ) -> Selection | TokenSelection | None:
        """The gate's choice; observers are called."""
        if self.gate is None:
            return None
        # The mask is about keys: it applies to queries only if they are the same sequence.
        padding = inputs.key_padding_mask if inputs.query_is_key else None
        selection = self.gate(inputs.query, padding, *(() if heads is None else (heads,)))
        if self._observers and not recomputing():
            for observer in tuple(self._observers):
                observer(self, selection, inputs.query, padding)
        return selection

    def _projections(self) -> tuple[Tensor | None, ...]:
        """Query, key and value weights, each ``[E, features]``, and biases ``[E]`` or None."""
        if self._same_embed_dim:
            weights = self.in_proj_weight.chunk(3) if self.num_heads else (self.in_proj_weight,) * 3
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_bias is None:
            return (*weights, None, None, None)
        biases = self.in_proj_bias.chunk(3) if self.num_heads else (self.in_proj_bias,) * 3
        return (*weights, *biases)

    @property
    def _added_keys(self) -> int:  # type: ignore[override]
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _project(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        return _ops.project_heads(
            inputs.query,
            inputs.key,
            inputs.value,
            *self._projections(),
            self.num_heads,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
        )

    def _run_all(
        self,
        inputs: AttentionInputs,
        selection: Selection | TokenSelection | None,
        heads: HeadInputs | None,
    ) -> Tensor:
        """Every head, with plain operators; a recorder sees each head's output."""
        q, k, v = self._project(inputs)
        gate = None if selection is None else self.gate
        if gate is not None and gate.attends:
            context = gate.attend(heads, v)  # [B, H, L, d]
        else:
            context = attend_every_head(
                q,
                k,
                v,
                inputs.key_padding_mask,
                inputs.attn_mask,
                inputs.is_causal,
                self.dropout if self.training else 0.0,
                added_keys=self._added_keys,
            )
        weight = None if selection is None else selection.weight
        if self._probe is not None and not recomputing():
            probe = AttentionProbe(
                q,
                k,
                v,
                context,
                weight,
                inputs.key_padding_mask,
                inputs.attn_mask,
                inputs.is_causal,
                inputs.key_padding_mask if inputs.query_is_key else None,
                inputs.query_is_key,
            )
            self._probe(self, probe)
        if gate is not None and gate.projects:
            return gate.project(context, selection)
        if isinstance(selection, TokenSelection):
            factor = selection.weight.masked_fill(~selection.chosen, 0.0).transpose(1, 2)
            return self._combine(context * factor[..., None].to(context.dtype), None)
        return self._combine(context, weight)

    def _combine(self, context: Tensor, weight: Tensor | None) -> Tensor:
        """[B, H, L, d] -> [B, L, D]"""
        return _ops.combine_heads(context, weight, self.out_proj.weight, self.out_proj.bias)

    def _run_bank(self, gate: Any, inputs: AttentionInputs, selection: Any) -> Tensor:
        """A batch of one plan by a dense layer of the plan's heads, one of several by the layer
        that has the heads of all plans."""
        if not gate.can_pack(self, selection):
            return self._run_all(inputs, selection, None)
        output: Any = None
        groups = gate.groups(selection)
        if len(groups) > 1 and any(gate.plans) and not self._added_keys:
            layer = gate.merged(self)
            every = [head for heads in gate.plans for head in heads]
            chosen = gate.merged_selection(selection)
            y = layer._run_selected(inputs.part(None, every), chosen)
            return y + torch.stack([*gate.biases])[selection.plan].to(y.dtype)[:, None]
        for plan, rows in groups:
            layer, heads = gate.packed(self, plan), gate.plans[plan]
            y = layer._run_all(inputs.part(rows, heads), None, None)  # [b, L, D]
            if rows is None:
                return y
            if output is None:
                output = y.new_empty(inputs.query.size(0), *y.shape[1:])
            output.index_copy_(0, rows, y)
        return output

    def _run_selected(self, inputs: AttentionInputs, selection: Selection) -> Tensor:
        """The chosen heads and no others."""
        chosen = (selection.index, selection.count, selection.weight)
        if inputs.self_attention and self._same_embed_dim and self._added_keys == 0:
            return _ops.selected_self_attention(
                inputs.query,
                self.in_proj_weight,
                self.in_proj_bias,
                self.out_proj.weight,
                self.out_proj.bias,
                self.num_heads,
                *chosen,
                *self._masks(inputs),
            )
        return _ops.selected_multihead_attention(
            *inputs[:3],
            *self._projections(),
            self.out_proj.weight,
            self.out_proj.bias,
            self.num_heads,
            *chosen,
            *self._added_rows(),
            *self._masks(inputs),
        )

    def _added_rows(self) -> tuple[Tensor | None, Tensor | None, bool]:
        """What an operator appends to keys and values: bias_k and bias_v ``[E]``, a zero row."""
        if self.bias_k is None or self.bias_v is None:
            return None, None, self.add_zero_attn
        return self.bias_k.reshape(-1), self.bias_v.reshape(-1), self.add_zero_attn

    def _masks(self, inputs: AttentionInputs) -> tuple[Any, ...]:
        """The masks of an operator, its dropout and that one's seed."""
        dropout = self.dropout if self.training else 0.0
        seed = None
        if dropout > 0.0:
            seed = torch.randint(2**63 - 1, (1,), device=inputs.query.device)
        return inputs.key_padding_mask, inputs.attn_mask, inputs.is_causal, dropout, seed

    def _run_tokens(self, inputs: AttentionInputs, selection: TokenSelection) -> Tensor:
        """For every token the heads that it chose and no others."""
        return _ops.routed_multihead_attention(
            *inputs[:3],
            *self._projections(),
            self.out_proj.weight,
            self.out_proj.bias,
            self.num_heads,
            selection.chosen,
            selection.weight,
            *self._added_rows(),
            *self._masks(inputs),
        )

    def _attention_weights(
        self, inputs: AttentionInputs, selection: Selection | TokenSelection | None
    ) -> Tensor:
        """``[B, H, L, S']``, zeros for the heads that did not run."""
        q, k, _ = self._project(inputs)
        weights = _ops.attention_probabilities(
            q,
            k,
            inputs.key_padding_mask,
            inputs.attn_mask,
            inputs.is_causal,
            added_keys=self._added_keys,
        )
        if selection is None:
            return weights
        if isinstance(selection, TokenSelection):
            return weights * selection.chosen.transpose(1, 2)[..., None]
        mask = _ops.selection_mask(selection.index, selection.count, weights.dtype)  # [B, H]
        return weights * mask[:, :, None, None]

    def _forward_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> tuple[Tensor, None]:
        """A nested batch, as ``nn.TransformerEncoder`` makes of a padded one in evaluation."""
        if query is not key or key is not value:
            raise ValueError("nested tensors are supported in self-attention only")
        if key_padding_mask is not None or attn_mask is not None:
            raise ValueError(
                "a nested query carries its own lengths; masks cannot be given with it"
            )
        if query.size(0) == 0:
            raise ValueError("query must be a nested tensor of one sequence or more, got none")
        lengths = [sequence.size(0) for sequence in query.unbind()]
        padded = query.to_padded_tensor(0.0)  # [B, L, D]
        position = torch.arange(padded.size(1), device=padded.device)
        padding = position >= torch.tensor(lengths, device=padded.device)[:, None]  # [B, L]
        x = padded if self.batch_first else padded.transpose(0, 1)
        output, _ = self.forward(x, x, x, key_padding_mask=padding, need_weights=False)
        rows = output if self.batch_first else output.transpose(0, 1)
        kept = [row[:length] for row, length in zip(rows.unbind(0), lengths, strict=True)]
        return torch.nested.as_nested_tensor(kept, layout=query.layout), None
