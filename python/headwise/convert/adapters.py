"""Attention of a custom class, described instead of programmed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headwise.convert.arguments import check_arguments
from headwise.convert.checks import first
from headwise.convert.masks import split
from headwise.convert.projections import Places, Projected, ProjectedReplacement, replaced_fault
from headwise.convert.registry import Architecture
from headwise.nn.grouped_query_attention import GroupedQueryAttention
from headwise.nn.proof import Draw, Trial

_NOTHING = (nn.Dropout, nn.Identity)


def qkv(
    *,
    output: str,
    num_heads: int | str,
    query: str | None = None,
    key: str | None = None,
    value: str | None = None,
    packed: str | None = None,
    per_head: bool = False,
    num_key_value_heads: int | str | None = None,
    head_dim: int | str | None = None,
    scale: float | str | None = None,
    dropout: float | str = 0.0,
    output_dropout: str | None = None,
    causal: bool = False,
    mask: str | None = None,
    additive: bool = True,
    pair: bool = False,
) -> Adapter:
    """Describes a class of plain self-attention to :func:`headwise.convert`.

    ::

        hw.convert(model, adapters={MyAttention: qkv(query="q", key="k", value="v", output="o",
                                                     num_heads="heads")})

    The description is checked: before anything is replaced, a module of the class and its
    replacement run on made-up tokens and must agree (``convert(..., verify=True)``).

    Args:
        output: name of the output projection, a ``torch.nn.Linear``.
        num_heads: query heads. A number, or the name of the module's attribute; the other sizes
            likewise.
        query: name of the projection to queries.
        key: of the projection to keys.
        value: of the projection to values.
        packed: name of one projection to all three, instead of the three names.
        per_head: the rows of ``packed`` are queries, keys and values of the first head, then of the
            second; default: all queries, then all keys, then all values.
        num_key_value_heads: default: ``num_heads``.
        head_dim: width of a head; default: the output projection's inputs, divided by
            ``num_heads``.
        scale: of the scores; default ``head_dim ** -0.5``.
        dropout: of the attention probabilities: a number, or the name of an attribute that is one
            or is a ``torch.nn.Dropout``.
        output_dropout: name of a ``torch.nn.Dropout`` after the output projection.
        causal: no query sees later keys.
        mask: name of the mask argument of ``forward``; None: it has none. Of shape ``[B or 1, H or
            1, L or 1, L]``; a class that takes ``[B, L]`` needs an :class:`Architecture`.
        additive: ``mask`` is floating and added to the scores; False: it is boolean, True = may
            attend.
        pair: ``forward`` returns a pair, of which only the first is a tensor (maps are None);
            default: the output alone. Its first argument is the input ``[B, L, D]``.

    Raises:
        ValueError: neither ``packed`` nor all of ``query``, ``key`` and ``value``, or both; or
            ``per_head`` without ``packed`` or with fewer key/value heads.
    """
    apart = [name for name in (query, key, value) if name is not None]
    if (packed is None) != (len(apart) == 3) or (packed is not None and apart):
        raise ValueError(
            f"packed must name one projection, or query, key and value one each, got packed="
            f"{packed!r}, query={query!r}, key={key!r} and value={value!r}"
        )
    if per_head and (packed is None or num_key_value_heads not in (None, num_heads)):
        raise ValueError(
            "per_head is for a packed projection with as many key/value heads as query heads"
        )
    first, second, third = apart or ["", "", ""]
    places = Places(first, second, third, output, packed, per_head)
    sizes = {
        "num_heads": num_heads,
        "num_key_value_heads": num_heads if num_key_value_heads is None else num_key_value_heads,
        "head_dim": head_dim,
        "scale": scale,
        "dropout": dropout,
    }
    call = {"is_causal": causal, "mask": mask, "additive": additive, "pair": pair}
    return Adapter(places, sizes, call, output_dropout)


class AdaptedAttention(ProjectedReplacement):
    """Replaces attention that :func:`qkv` describes, with the same call."""

    #: The description of the original.
    TOLD = ("places", "is_causal", "mask", "additive", "pair", "arguments", "defaults")

    is_causal: bool
    mask: str | None
    additive: bool
    pair: bool
    arguments: tuple[str, ...]  # of the original's forward
    defaults: dict[str, Any]

    def __init__(self, original: nn.Module, sizes: Mapping[str, Any], **factory: Any):
        GroupedQueryAttention.__init__(self, **sizes, **factory)
        self.output_dropout: nn.Module | None = None
        if isinstance(original, AdaptedAttention):
            self.output_dropout = original.output_dropout
            for name in self.TOLD:
                setattr(self, name, getattr(original, name))

    def forward(  # type: ignore[override]  # as the original is called
        self, *arguments: Any, **named: Any
    ) -> Tensor | tuple[Tensor, None]:
        """Like the original's, for the arguments that :func:`qkv` knows.

        Raises:
            TypeError: another argument is given that is neither None nor the original's default, or
                a mask of the other form.
        """
        if len(arguments) > len(self.arguments):
            raise TypeError(
                f"{type(self).__name__} takes {len(self.arguments)} arguments, got {len(arguments)}"
            )
        given = {**dict(zip(self.arguments, arguments, strict=False)), **named}
        if self.arguments[0] not in given:
            raise TypeError(f"{type(self).__name__} needs {self.arguments[0]}, got nothing")
        x = given.pop(self.arguments[0])
        mask = None if self.mask is None else given.pop(self.mask, None)
        check_arguments(self, {k: v for k, v in given.items() if v is not self.defaults.get(k)})
        if mask is not None and mask.is_floating_point() != self.additive:
            form = "floating" if self.additive else "boolean"
            raise TypeError(f"{self.mask} must be {form}, got {mask.dtype}")
        call = split(mask, x, self.is_causal)
        if mask is not None and self.is_causal:
            call = call._replace(is_causal=True)
        output, _ = GroupedQueryAttention.forward(
            self,
            x,
            key_padding_mask=call.key_padding_mask,
            query_padding_mask=call.query_padding_mask,
            attn_mask=call.attn_mask,
            is_causal=call.is_causal,
        )
        if self.output_dropout is not None:
            output = self.output_dropout(output)
        return (output, None) if self.pair else output


class Adapter(Projected):
    """The result of :func:`qkv`."""

    name = "an adapter"
    attributes = ()

    def __init__(
        self,
        places: Places,
        sizes: Mapping[str, Any],
        call: Mapping[str, Any],
        output_dropout: str | None,
    ):
        self.places = places
        self._sizes, self._call, self._output_dropout = sizes, call, output_dropout

    def refusal(self, module: nn.Module) -> str | None:
        try:
            linears = self.linears(module)
            if (fault := replaced_fault(linears)) is not None:
                return fault
            sizes = self.sizes(module)
            named = [self._sizes["dropout"], self._output_dropout]
            for name, child in module.named_children():
                if isinstance(child, nn.Dropout) and child.p > 0 and name not in named:
                    return f"it holds the Dropout '{name}', which the adapter does not mention"
        except (AttributeError, TypeError) as error:
            return f"the adapter does not fit ({error})"
        known = inspect.signature(type(module).forward).parameters
        if self._call["mask"] is not None and self._call["mask"] not in known:
            return f"the adapter does not fit (its forward takes no '{self._call['mask']}')"
        return first(self._faults(module, linears, sizes))

    def held(self, module: nn.Module) -> tuple[str, ...]:
        return tuple(n for n, child in module.named_children() if isinstance(child, _NOTHING))

    def sizes(self, module: nn.Module) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, said in self._sizes.items():
            value = getattr(module, said) if isinstance(said, str) else said
            found[name] = value.p if isinstance(value, nn.Dropout) else value
        if found["head_dim"] is None:
            found["head_dim"] = module.get_submodule(self.places.output).in_features // max(
                int(found["num_heads"]), 1
            )
        for name in ("num_heads", "num_key_value_heads", "head_dim"):
            if isinstance(found[name], bool) or not isinstance(found[name], int):
                raise TypeError(f"{name} must be an integer, got {type(found[name]).__name__}")
        return found

    def replacement(self, module: nn.Module, sizes: Mapping[str, Any]) -> AdaptedAttention:
        made = AdaptedAttention(module, sizes, device="meta")
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        known = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        made.places = self.places
        made.arguments = tuple(p.name for p in known)
        made.defaults = {p.name: p.default for p in known if p.default is not p.empty}
        for name, value in self._call.items():
            setattr(made, name, value)
        if self._output_dropout is not None:
            made.output_dropout = module.get_submodule(self._output_dropout)
        return made

    def trial(self, module: nn.Module) -> Trial:
        width = module.get_submodule(self.places.output).out_features
        mask, additive, pair = (self._call[name] for name in ("mask", "additive", "pair"))

        def run(own: nn.Module, draw: Draw) -> list[Tensor]:
            tokens = draw(2, 5, width)
            outputs = [own(tokens)]
            if mask is not None:
                unseen = draw.padding(2, 5)[:, None, None, :].expand(-1, -1, 5, -1)
                value = draw.added(unseen) if additive else ~unseen
                try:
                    outputs.append(own(tokens, **{mask: value}))
                except Exception as error:
                    raise TypeError(
                        f"it does not take {mask}= of shape [B, 1, L, L], {value.dtype}, and "
                        f"adapters describe no other, such as [B, L] "
                        f"({type(error).__name__}: {error})"
                    ) from error
            for output in outputs:
                if pair != isinstance(output, tuple):
                    given = "a tuple" if isinstance(output, tuple) else "no tuple"
                    raise TypeError(f"its forward returns {given}: use pair={not pair}")
            return [output[0] if pair else output for output in outputs]

        return run


def check_adapters(adapters: Any) -> Mapping[type, Architecture]:
    """``adapters`` of :func:`headwise.convert`, or none.

    Raises:
        TypeError: they are not a mapping from classes of modules to results of :func:`qkv`.
    """
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must be a mapping or None, got {type(adapters).__name__}")
    for kind, adapter in adapters.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"adapters must have classes of modules as keys, got {kind!r:.60}")
        if not isinstance(adapter, Architecture):
            raise TypeError(
                f"adapters[{kind.__name__}] must be made by headwise.convert.qkv, got "
                f"{type(adapter).__name__}"
            )
    return adapters
