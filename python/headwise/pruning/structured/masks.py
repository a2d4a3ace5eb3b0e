"""Masks on the structure of a model: gates and hooks, which compaction removes.

One :class:`StructureMasks` holds the values that every gate and hook of a model reads, so they can
be constants (a plan), leaves with gradients, or samples drawn again in each forward.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates import Gate
from headwise.gates.selection import Selection
from headwise.io.printable import layer_called
from headwise.nn.attention_layer import AttentionLayer
from headwise.nn.layers import attention_layers, carry_hooks, replace_module
from headwise.pruning.structured.description import Structure
from headwise.pruning.structured.plan import StructurePlan


class StructureMasks:
    """The values of a model's masks; missing ones are 1.

    Attributes:
        heads: attention layer -> ``[H]``, multiplies its heads' outputs.
        neurons: feed-forward network -> ``[F]``, multiplies its activations.
        blocks: either's name -> ``[]``, multiplies the whole output, bias included.
        hidden: ``[D]`` or None: multiplies what is written to the residual stream. Layer norms are
            over its nonzero dimensions.
    """

    def __init__(self) -> None:
        self.heads: dict[str, Tensor] = {}
        self.neurons: dict[str, Tensor] = {}
        self.blocks: dict[str, Tensor] = {}
        self.hidden: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> StructureMasks:
        # Samples belong to a graph and cannot be copied; their values can.
        copied = StructureMasks()
        memo[id(self)] = copied
        for kind in ("heads", "neurons", "blocks"):
            own = {name: mask.detach().clone() for name, mask in getattr(self, kind).items()}
            setattr(copied, kind, own)
        copied.hidden = None if self.hidden is None else self.hidden.detach().clone()
        return copied

    @staticmethod
    def from_plan(plan: StructurePlan) -> StructureMasks:
        """The masks of a plan, float32."""
        masks = StructureMasks()
        for layer in plan.heads.layers:
            masks.heads[layer.name] = spread(layer.heads, layer.scale, layer.num_heads)
        for ffn in plan.ffn:
            masks.neurons[ffn.name] = spread(ffn.neurons, ffn.scale, ffn.num_neurons)
        for block in plan.blocks:
            masks.blocks[block.name] = torch.tensor(block.scale)
        if plan.hidden is not None:
            masks.hidden = spread(plan.hidden.dimensions, plan.hidden.scale, plan.hidden.size)
        return masks


def spread(units: list[int], scale: list[float], size: int) -> Tensor:
    """float32 [size]: the scale of each unit, 0 elsewhere."""
    mask = torch.zeros(size, dtype=torch.float64)
    mask[torch.tensor(units, dtype=torch.long)] = torch.tensor(scale, dtype=torch.float64)
    return mask.float()


def units(mask: Tensor) -> tuple[list[int], list[float]]:
    """The inverse of :func:`spread`: the units that are not 0, and their scales."""
    kept = mask.nonzero()[:, 0]
    return kept.tolist(), mask[kept].double().tolist()


class StructureGate(Gate):
    """Gives an attention layer the head mask of its :class:`StructureMasks`.

    Heads with mask 0 do not run, not even in training: no gradient would reach them.
    """

    def __init__(self, masks: StructureMasks, name: str, embed_dim: int, num_heads: int) -> None:
        super().__init__({}, execution="selected", embed_dim=embed_dim, num_heads=num_heads)
        self.masks = masks
        self.name = name

    def config(self) -> dict[str, Any]:
        raise ValueError(
            "a structure plan as a mask cannot be saved: compact the model first (headwise.prune)"
        )

    def extra_repr(self) -> str:
        return ""

    def static_weight(self) -> Tensor:
        return self.masks.heads[self.name].detach()

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        self._check_bound(x)
        weight = self.masks.heads[self.name].to(x).expand(x.size(0), -1)  # [B, H]
        index, count = torch.ops.headwise.select_nonzero(weight)
        return Selection(index, count, weight)


class _Hook:
    """A hook that reads a mask; an object, so that a copied model reads its own masks."""

    def __init__(self, masks: StructureMasks, name: str = "") -> None:
        self.masks = masks
        self.name = name


class _ScaleNeurons(_Hook):
    """Forward pre-hook of a network's second linear layer: its input is the activations."""

    def __call__(self, module: nn.Module, args: tuple) -> tuple | None:
        mask = self.masks.neurons.get(self.name)
        return None if mask is None else (args[0] * mask.to(args[0]), *args[1:])


class _ScaleOutput(_Hook):
    """Forward hook of an attention layer or a second linear layer."""

    def __init__(self, masks: StructureMasks, name: str, writes_stream: bool) -> None:
        super().__init__(masks, name)
        self.writes_stream = writes_stream

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output  # [B, L, D]
        scale = self.masks.blocks.get(self.name)
        if scale is not None:
            y = y * scale.to(y)
        if self.writes_stream and self.masks.hidden is not None:
            y = y * self.masks.hidden.to(y)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class _ScaleInput(_Hook):
    """Forward pre-hook of an encoder: its input is written to the stream."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if self.masks.hidden is None:
            return None
        if "src" in kwargs:
            return args, {**kwargs, "src": kwargs["src"] * self.masks.hidden.to(kwargs["src"])}
        return (args[0] * self.masks.hidden.to(args[0]), *args[1:]), kwargs


class MaskedLayerNorm(nn.LayerNorm):
    """A layer norm over the dimensions of the stream that are not masked out.

    Attributes:
        masks: the masks of the stream and of ``block``.
        scaled: multiplies its output by the mask of the stream.
        reads_stream: whether its input is masked already; else it is multiplied by the mask.
        block: attention layer or network whose output it normalises: if that block's mask is 0, the
            norm is skipped. "": it is on the input of a block, or on embeddings.
    """

    masks: StructureMasks
    scaled: bool
    reads_stream: bool
    block: str

    @classmethod
    def around(
        cls,
        norm: nn.LayerNorm,
        masks: StructureMasks,
        scaled: bool,
        reads_stream: bool = True,
        block: str = "",
    ) -> MaskedLayerNorm:
        """Shares the parameters of ``norm``."""
        made = cls(list(norm.normalized_shape), norm.eps, norm.elementwise_affine, device="meta")
        made.weight, made.bias = norm.weight, norm.bias
        made.masks, made.scaled = masks, scaled
        made.reads_stream, made.block = reads_stream, block
        carry_hooks(norm, made)
        return made.train(norm.training)

    def original(self) -> nn.LayerNorm:
        norm = nn.LayerNorm(
            list(self.normalized_shape), self.eps, self.elementwise_affine, device="meta"
        )
        norm.weight, norm.bias = self.weight, self.bias
        carry_hooks(self, norm)
        return norm.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        block = self.masks.blocks.get(self.block)
        y = self._normalised(x)
        return y if block is None else torch.where(block.to(x.device) == 0, x, y)

    def _normalised(self, x: Tensor) -> Tensor:
        if self.masks.hidden is None:
            return super().forward(x)
        mask = self.masks.hidden.to(x.device)
        if not self.reads_stream:
            x = x * mask.to(x.dtype)
        return torch.ops.headwise.masked_layer_norm(
            x, mask, self.weight, self.bias, self.eps, self.scaled
        )


def attach(model: nn.Module, found: Structure, masks: StructureMasks, hidden: bool) -> nn.Module:
    """Puts gates and hooks that read ``masks`` on ``model``, in place; returns it.

    Args:
        found: the structure of ``model``, which has no masks yet.
        hidden: also mask the residual stream.
    """
    for name in masks.heads:
        layer = found.attention[name]
        gate = StructureGate(masks, name, layer.embed_dim, layer.num_heads)
        layer.set_gate(gate.train(layer.training))
    for name, layer in found.attention.items():
        layer.register_forward_hook(_ScaleOutput(masks, name, hidden))
    for name, ffn in found.ffn.items():
        ffn.second.register_forward_pre_hook(_ScaleNeurons(masks, name))
        ffn.second.register_forward_hook(_ScaleOutput(masks, name, hidden))
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
            # A nested tensor has no dimension to mask.
            module.use_nested_tensor = False
            vars(module)["_nested_before_masks"] = True
    after = {norm: block for block, norm in norms_after(model, found).items()}
    on_stream: list[str] = []
    stream = found.stream if hidden else None
    if hidden:
        assert stream is not None
        if stream.kind == "encoder":
            encoder = model.get_submodule(stream.entry)
            encoder.register_forward_pre_hook(_ScaleInput(masks), with_kwargs=True)
        on_stream = [*stream.extra_norms, *(n for layer in stream.layers for n in layer.norms)]
    skippable = [norm for norm, block in after.items() if block in masks.blocks]
    for name in dict.fromkeys((*on_stream, *skippable)):
        norm = model.get_submodule(name)
        if not isinstance(norm, nn.LayerNorm):
            continue  # removed with its block, which writes nothing
        masked = MaskedLayerNorm.around(
            norm,
            masks,
            scaled=stream is not None and not stream.norm_first,
            reads_stream=not (stream and stream.kind == "bert" and name in stream.extra_norms),
            block=after.get(name, ""),
        )
        replace_module(model, norm, masked)
    return model


def norms_after(model: nn.Module, found: Structure) -> dict[str, str]:
    """Attention layer or network -> the layer norm on its sum with the stream (post-norm layers).

    This norm is removed with its block, as in the released code of CoFi.
    """
    pairs = [
        (block, norm)
        for layer in found.layers
        if not layer.norm_first
        for block, norm in zip((layer.attention, layer.ffn), layer.norms, strict=True)
    ]
    return {
        block: norm for block, norm in pairs if isinstance(model.get_submodule(norm), nn.LayerNorm)
    }


def detach(model: nn.Module) -> nn.Module:
    """Removes every mask from ``model``, in place; returns it."""
    for module in list(model.modules()):
        if isinstance(module, MaskedLayerNorm):
            replace_module(model, module, module.original())
        elif isinstance(getattr(module, "gate", None), StructureGate):
            module.set_gate(None)
        for hooks, options in (
            (module._forward_hooks, ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")),
            (module._forward_pre_hooks, ("_forward_pre_hooks_with_kwargs",)),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
                del hooks[key]
                for option in options:
                    getattr(module, option).pop(key, None)
        if vars(module).pop("_nested_before_masks", False):
            vars(module)["use_nested_tensor"] = True
    return model


def masks_of(model: nn.Module) -> StructureMasks | None:
    """The masks on ``model``, if there are any."""
    for module in model.modules():
        if isinstance(module, (MaskedLayerNorm, StructureGate)):
            return module.masks
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, _Hook):
                return hook.masks
    return None


def unmasked(model: nn.Module) -> nn.Module:
    """A copy of ``model`` without masks."""
    return detach(copy.deepcopy(model))


def refuse_gates(model: nn.Module) -> None:
    """Raises ValueError: a model with gates, or under a structure plan as a mask."""
    if masks_of(model) is not None:
        raise ValueError("model must not have a structure plan as a mask: headwise.unmask it")
    for name, layer in attention_layers(model).items():
        if layer.gate is not None:
            raise has_gate(name, layer)


def has_gate(name: str, layer: AttentionLayer) -> ValueError:
    """The error for a layer that must have no gate."""
    return ValueError(
        f"{layer_called(name)} has a {type(layer.gate).__name__}: remove it first "
        "(layer.set_gate(None))"
    )
