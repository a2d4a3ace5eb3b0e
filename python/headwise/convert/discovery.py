"""Finding a model's attention modules, and whether each can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from headwise.convert.registry import (
    REFUSED,
    Architecture,
    class_path,
    find_architecture,
    known_base,
    overridden,
)
from headwise.nn.attention_layer import AttentionLayer

# Usual names of projections: to queries, to keys, to both at once, and others of attention.
_QUERY = frozenset("q q_proj query q_lin to_q wq query_proj q_a_proj q_attn".split())
_KEY = frozenset("k k_proj key k_lin to_k wk key_proj".split())
_FUSED = frozenset(
    "Wqkv qkv qkv_proj c_attn query_key_value to_qkv in_proj_qkv attn_qkv kqv c_qkv".split()
)
_PROJECTIONS = _QUERY | _KEY | _FUSED | frozenset("v value v_proj v_lin to_v wv in_proj".split())


@dataclass
class Candidate:
    """A module that can be converted, and its architecture."""

    name: str
    module: nn.Module
    architecture: Architecture


@dataclass
class Refused:
    """A module that looks like attention and cannot be converted."""

    name: str
    kind: str
    reason: str


@dataclass
class Found:
    """The attention of a model; every module once, however often it occurs."""

    supported: list[Candidate] = field(default_factory=list)
    converted: list[AttentionLayer] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def _looks_like_attention(module: nn.Module) -> bool:
    """A module with projections to queries and to keys, whatever its class is called; or a class
    that calls itself attention, with any such projection."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    names = {name for name, child in module.named_children() if hasattr(child, "weight")}
    names |= {name.removesuffix("_weight") for name, _ in module.named_parameters(recurse=False)}
    if (names & _QUERY and names & _KEY) or names & _FUSED:
        return True
    return "attention" in type(module).__name__.lower() and bool(names & _PROJECTIONS)


def _owners(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter."""
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def find_attention(model: nn.Module, adapters: Mapping[type, Architecture] | None = None) -> Found:
    """Walks ``model`` from the outside in, and not into modules that were found."""
    found = Found()
    seen: set[int] = set()
    owners = _owners(model)

    def walk(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, AttentionLayer):
            found.converted.append(module)
            return
        architecture = find_architecture(module, adapters)
        if architecture is not None and not architecture.is_converted(module):
            reason = architecture.refusal(module)
            if reason is None and any(
                owners[id(p)] > 1 for p in architecture.copied_parameters(module)
            ):
                reason = "it shares a parameter with another module"
            if reason is None:
                found.supported.append(Candidate(name, module, architecture))
            else:
                found.refused.append(Refused(name, type(module).__name__, reason))
            return
        if _looks_like_attention(module) or _overrides(module):
            found.refused.append(Refused(name, type(module).__name__, _why_unknown(module)))
            return
        for child_name, child in module.named_children():
            walk(child, f"{name}.{child_name}" if name else child_name)

    walk(model, "")
    return found


def _overrides(module: nn.Module) -> bool:
    """Whether it is of a known class except for what it overrides (as our own replacements do)."""
    ours = any(isinstance(part, AttentionLayer) for part in module.modules())
    base = known_base(type(module))
    return not ours and base is not None and overridden(type(module), base) is not None


def _why_unknown(module: nn.Module) -> str:
    reason = REFUSED.get(class_path(type(module)))
    if reason is not None:
        return reason
    base = known_base(type(module))
    if base is not None:
        name = overridden(type(module), base)
        return f"a subclass of {base.__name__} with its own {name} may compute something else"
    return (
        f"no conversion is known for {class_path(type(module))} (if it is plain "
        f"attention, describe it by adapters=)"
    )


def refusals_text(model: nn.Module, found: Found) -> str:
    """The error message: one line, then each reason with its modules."""
    groups: dict[tuple[str, str], list[str]] = {}
    for refused in found.refused:
        groups.setdefault((refused.kind, refused.reason), []).append(refused.name or "(the model)")
    lines = [
        f"model ({type(model).__name__}) has attention that headwise cannot convert "
        f"({len(found.refused)} of {len(found.refused) + len(found.supported)} modules):"
    ]
    for (kind, reason), names in groups.items():
        lines.append(f"  {kind}: {reason}")
        lines.extend(f"    {name}" for name in names)
    if found.supported:
        lines.append("strict=False converts the others and leaves these as they are.")
    return "\n".join(lines)
