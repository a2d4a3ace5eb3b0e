"""The arguments of a module that replaces another: each is either understood or raises an error by
name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Arguments that models of transformers pass to their attention and that change nothing in it: name
#: -> why.
WITHOUT_EFFECT = {
    "position_ids": "the model has made position embeddings and a mask from them",
    "cache_position": "the cache counts its tokens itself, or gets this",
    "use_cache": "the model has decided whether there is a cache",
    "num_items_in_batch": "the loss is divided by it",
    "shift_labels": "the loss is of them",
    "ignore_index": "the loss leaves these labels out",
    "output_hidden_states": "the model collects them",
    "output_router_logits": "the model collects them",
    "return_dict": "the model packs its own output",
}

#: Arguments that :func:`given` reads for the attention itself.
_READ = ("output_attentions", "is_causal")


def check_arguments(module: object, options: Mapping[str, Any]) -> None:
    """Raises an error for arguments that might change what the original computes, and that
    ``module`` ignores.

    Raises:
        TypeError: an argument that is not None and neither read nor known to change nothing.
    """
    for name, value in options.items():
        if value is not None and name not in _READ and name not in WITHOUT_EFFECT:
            raise TypeError(
                f"{type(module).__name__} does not understand the argument '{name}' "
                f"({_brief(value)}), which the attention that it replaced may have used: leave it "
                f"out, or leave this model unconverted"
            )


def one_cache(module: object, cache: Any, past_key_values: Any) -> Any:
    """The cache under either of its names: transformers has renamed ``past_key_values``.

    Raises:
        TypeError: two different caches, or what is no cache of transformers.
    """
    if cache is None or past_key_values is None or cache is past_key_values:
        past = past_key_values if cache is None else cache
        if past is not None and not hasattr(past, "get_seq_length"):
            raise TypeError(
                f"cache must be a cache of transformers or None, got {type(past).__name__}"
            )
        return past
    raise TypeError(
        f"{type(module).__name__} takes one cache, as cache or as past_key_values, got two"
    )


def handed_on(options: Mapping[str, Any]) -> dict[str, Any]:
    """Information about the call for a cache: older ones need the positions of its tokens."""
    position = options.get("cache_position")
    return {} if position is None else {"cache_position": position}


def wants_maps(config: Any, options: Mapping[str, Any]) -> bool:
    """Whether attention weights are asked for, by the call or by the configuration."""
    wanted = options.get("output_attentions")
    if wanted is None:
        wanted = getattr(config, "output_attentions", False)
    return bool(wanted)


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {list(shape)}"
    return f"a {type(value).__name__}"
