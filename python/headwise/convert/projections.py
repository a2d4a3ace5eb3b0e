"""Attention with its projections in linear layers, and its replacement: the common part of the
conversions to :class:`headwise.GroupedQueryAttention`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

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
from headwise.convert.parameters import in_the_mode_of, remade
from headwise.convert.registry import Architecture
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.layers import carry_hooks

_OWN = ("q_proj", "k_proj", "v_proj", "o_proj")


class Places(NamedTuple):
    """The names of a module's projections.

    Attributes:
        query: the projection to queries; unused if ``packed`` is given, like the next two.
        key: to keys.
        value: to values.
        output: the output projection.
        packed: one linear layer that projects to all three.
        per_head: its rows are queries, keys and values of the first head, then of the second
            (GPT-NeoX), not all queries, all keys, all values.
    """

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    packed: str | None = None
    per_head: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        if self.packed is not None:
            return (self.packed, self.output)
        return (self.query, self.key, self.value, self.output)

    def cut(self, tensor: Tensor, sizes: Mapping[str, int]) -> list[Tensor]:
        """A packed weight or bias ``[(H + 2 Hkv) d, ...]`` -> those of queries, keys and values."""
        heads, groups, width = (
            sizes[name] for name in ("num_heads", "num_key_value_heads", "head_dim")
        )
        if self.per_head:
            parts = tensor.unflatten(0, (heads, 3, width)).unbind(1)  # each [H, d, ...]
            return [part.flatten(0, 1).contiguous() for part in parts]
        rows = [heads * width, groups * width, groups * width]
        return [part.clone() for part in tensor.split(rows)]

    def join(self, parts: Sequence[Tensor], head_dim: int) -> Tensor:
        """The inverse of :meth:`cut`."""
        if not self.per_head:
            return torch.cat(list(parts))
        heads = [part.unflatten(0, (-1, head_dim)) for part in parts]  # each [H, d, ...]
        return torch.stack(heads, dim=1).flatten(0, 2)


class ProjectedReplacement(GroupedQueryAttention):
    """Replaces attention with its projections at :attr:`places`.

    It has the original's attributes, and separate projections keep their names.
    """

    places = Places()

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        super().__init__(**sizes, **factory)
        for name, value in vars(original).items():  # config, layer_idx, is_causal, scaling, ...
            if not name.startswith("_") and name not in (*self.__dict__, *self._modules, "forward"):
                setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        places = self.places
        if places.packed is None and name in places.names:
            name = _OWN[places.names.index(name)]
        return super().__getattr__(name)

    def _resized(self, sizes: Mapping[str, Any], **factory: Any) -> ProjectedReplacement:
        return type(self)(self, sizes, **factory)

    def original_state(self, name: str, state: dict[str, Tensor]) -> None:
        """Gives the tensors of this module, at ``name``, the names and layout of the original's
        state dict."""
        places = self.places
        for kind in ("weight", "bias"):
            own = [f"{name}.{projection}.{kind}" for projection in _OWN]
            found = [state.pop(key) if key in state else None for key in own]
            if kind == "weight" and None in found:
                raise KeyError(own[found.index(None)])
            inputs = [tensor for tensor in found[:3] if tensor is not None]
            if places.packed is not None and inputs:
                found[:3] = [places.join(inputs, self.head_dim)]
            for place, tensor in zip(places.names, found[-len(places.names) :], strict=True):
                if tensor is not None:
                    state[f"{name}.{place}.{kind}"] = tensor


def replaced_fault(linears: Mapping[str, nn.Module]) -> str | None:
    """Why one of some projections cannot be reused."""
    return first(projection_fault(name, linear) for name, linear in linears.items())


class Projected(Architecture):
    """Attention that becomes a :class:`ProjectedReplacement`.

    Separate projections are reused; those of a packed one are copies of its rows.
    """

    #: The places of the module's projections.
    places = Places()
    #: Other children that it may have.
    children: tuple[str, ...] = ()
    #: Its own parameters and buffers.
    parameters: tuple[str, ...] = ()
    #: The attributes that the replacement needs.
    attributes: tuple[str, ...] = ("config", "is_causal")

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        """``num_heads``, ``num_key_value_heads``, ``head_dim``, ``dropout`` and ``scale``."""
        return {
            "num_heads": module.num_heads,
            "num_key_value_heads": module.num_heads,
            "head_dim": module.head_dim,
            "dropout": module.dropout,
            "scale": module.scaling,
        }

    def widths(self, sizes: Mapping[str, int]) -> list[int]:
        """The outputs of the projections to queries, keys and values."""
        heads, groups = sizes["num_heads"], sizes["num_key_value_heads"]
        return [heads * sizes["head_dim"], *[groups * sizes["head_dim"]] * 2]

    def replacement(self, module: nn.Module, sizes: Mapping[str, Any]) -> ProjectedReplacement:
        """The replacement of ``module``, on the meta device, with empty projections."""
        raise NotImplementedError

    def linears(self, module: nn.Module) -> dict[str, nn.Module]:
        return {name: module.get_submodule(name) for name in self.places.names}

    def held(self, module: nn.Module) -> tuple[str, ...]:
        """The children of ``module`` that are not projections."""
        return self.children

    def refusal(self, module: nn.Module) -> str | None:
        try:
            linears = self.linears(module)
            if (fault := replaced_fault(linears)) is not None:  # it may have no sizes to read
                return fault
            sizes = self.sizes(module)
            [getattr(module, name) for name in self.attributes]
        except AttributeError as error:
            return f"another version of the library lays it out otherwise ({error})"
        return first(self._faults(module, linears, sizes))

    def _faults(
        self, module: nn.Module, linears: Mapping[str, nn.Module], sizes: Mapping[str, Any]
    ) -> Iterator[str | None]:
        yield forward_fault("", module)
        yield children_fault("", module, (*self.places.names, *self.held(module)), self.parameters)
        yield implementation_fault(getattr(module, "config", None))
        heads, groups, width = (
            sizes[name] for name in ("num_heads", "num_key_value_heads", "head_dim")
        )
        if groups <= 0 or heads % groups:
            yield f"its {groups} key/value heads do not divide its {heads} query heads"
        *inputs, output = linears.values()
        rows = self.widths(sizes)
        if [own.out_features for own in inputs] != (rows if len(inputs) == 3 else [sum(rows)]):
            yield f"its projections are not as wide as whole heads of {width}"
        if output.in_features != heads * width:
            yield f"its output projection does not read {heads} heads of {width}"
        if {own.in_features for own in inputs} != {output.out_features}:
            yield "its queries, keys, values and output are not of one width"
        if (name := self.places.packed) is not None:
            yield from self._packed_faults(module, name, linears[name])
        elif self.places.names != _OWN:
            yield renamed_fault(module)

    def _packed_faults(
        self, module: nn.Module, name: str, linear: nn.Module
    ) -> Iterator[str | None]:
        yield hooks_fault(name, linear)
        for kind, parameter in linear.named_parameters():
            yield copied_fault(f"{name}.{kind}", parameter)
        yield renamed_fault(module)

    def copied_parameters(self, module: nn.Module) -> list[nn.Parameter]:
        if self.places.packed is None:
            return []
        return list(module.get_submodule(self.places.packed).parameters())

    def convert(self, module: nn.Module) -> tuple[nn.Module, GroupedQueryAttention]:
        # Anything but nn.Linear was refused.
        *inputs, output = cast("Iterable[nn.Linear]", self.linears(module).values())
        sizes = {
            **self.sizes(module),
            "embed_dim": output.out_features,
            "bias": inputs[0].bias is not None,
            "output_bias": output.bias is not None,
        }
        replacement = self.replacement(module, sizes)
        replacement.o_proj = output
        if self.places.packed is None:
            replacement.q_proj, replacement.k_proj, replacement.v_proj = inputs
        else:
            own = [getattr(replacement, name) for name in _OWN[:3]]
            for kind, tensor in inputs[0].named_parameters():
                for i, linear in enumerate(own):
                    cut = functools.partial(self._part, sizes, i)
                    setattr(linear, kind, remade([tensor], cut))
            in_the_mode_of(module, *own)
        in_the_mode_of(module, replacement)
        carry_hooks(module, replacement)
        return replacement, replacement

    def _part(self, sizes: Mapping[str, Any], i: int, tensors: Sequence[Tensor]) -> Tensor:
        return self.places.cut(tensors[0], sizes)[i]
