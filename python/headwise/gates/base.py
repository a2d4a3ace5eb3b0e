"""What every gate has in common."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headwise.gates.linears import check_read
from headwise.gates.options import BINDING, TABLES, constructor, documented, without_defaults
from headwise.gates.recomputation import Replay, recomputing
from headwise.gates.selection import Selection
from headwise.io.printable import quoted

#: Gates inside gates.
MOST_NESTED = 8
_GATES: dict[str, type[Gate]] = {}


class Gate(nn.Module):
    """Chooses the heads of one attention layer, for every sequence of a batch.

    A gate is built *bound* to a layer's sizes (``embed_dim=768, num_heads=12``) or *unbound*, as a
    prototype from which :meth:`bind` makes bound copies: one prototype serves every layer of a
    model.

    Attributes:
        execution: in training, ``"all"`` runs every head, so that gradients reach the weights of
            heads that were not chosen; ``"selected"`` runs only the chosen ones, which makes a
            training step cheaper. In evaluation only the chosen heads ever run.
        embed_dim: width of the layer's input; None if unbound.
        num_heads: heads of the layer; None if unbound.
        expected_heads: ``[B]``, differentiable: the expected number of heads of the last training
            forward, or None.
    """

    embed_dim: Any  # int; None in a prototype
    num_heads: Any

    def __init_subclass__(cls, configured: bool | None = None, **kwargs: Any) -> None:
        """``configured``: :func:`gate_from_config` builds it. Default: gates of other packages and
        those that have a table of options; what gates only inherit from is not built."""
        super().__init_subclass__(**kwargs)
        if configured is None:
            configured = not cls.__module__.startswith("headwise.") or cls.__name__ in TABLES
        if configured:
            _GATES[cls.__name__] = cls
        if cls.__module__.startswith("headwise.gates.") and cls.__name__ in TABLES:
            cls.__doc__ = documented(cls.__name__, cls.__doc__ or "")
            if "__init__" not in cls.__dict__:
                cls.__init__ = constructor(cls.__name__, Gate.__init__)  # type: ignore[method-assign]

    if TYPE_CHECKING:
        # Options are rows of a table: they become a gate's arguments and attributes.
        def __init__(self, *options: Any, **named: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...

    def __init__(  # type: ignore[no-redef]
        self,
        options: Mapping[str, Any],
        *,
        execution: str | None = None,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        options = dict(options)
        if execution is not None:
            options["execution"] = execution
        if options.get("execution", "all") not in ("all", "selected"):
            raise ValueError(
                f"execution must be one of all, selected, got {quoted(options['execution'])}"
            )
        if (embed_dim is None) != (num_heads is None):
            raise ValueError("embed_dim and num_heads must be given together, or neither")
        if embed_dim is not None and (embed_dim <= 0 or (num_heads or 0) < 0):
            raise ValueError(
                "embed_dim must be positive and num_heads not negative, "
                f"got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        self._options = options
        for name, value in options.items():
            if not hasattr(self, name):  # a method may have the name of an option
                self.__dict__[name] = value
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.expected_heads: Tensor | None = None
        self._replay = Replay()
        #: Process groups whose inputs count as one batch for what the gate keeps of them.
        self._groups: tuple[Any, ...] = ()
        self._prepare()
        if embed_dim is not None:
            self._build(device, dtype)
            self.reset_parameters()

    def _prepare(self) -> None:
        """Attributes that a gate has beside its options, bound or not."""

    def _build(self, device, dtype) -> None:
        """Creates the parameters and buffers of a bound gate."""

    def reset_parameters(self) -> None:
        """Puts the gate back to its initial state."""

    def bind(self, embed_dim: int, num_heads: int, device=None, dtype=None) -> Gate:
        """A new gate of the same configuration, with fresh parameters for a layer of these sizes.

        Raises:
            ValueError: the configuration does not fit the sizes.
        """
        options = {key: value for key, value in self.config().items() if key != "type"}
        options = without_defaults(type(self).__name__, options)
        bound = type(self)(
            **options, embed_dim=embed_dim, num_heads=num_heads, device=device, dtype=dtype
        )
        return bound.train(self.training)

    def config(self) -> dict[str, Any]:
        """The gate's configuration, tagged with its type, as JSON values.

        :func:`gate_from_config` builds an unbound gate from it.
        """
        return {"type": type(self).__name__, **self._options}

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Selection:
        """Chooses heads.

        Args:
            x: the layer's input ``[B, L, D]``.
            key_padding_mask: ``[B, L]``; boolean (True = padding) or floating (added to scores).

        Returns:
            The selection. Its ``weight`` has the dtype of ``x``.
        """
        raise NotImplementedError

    def static_weight(self) -> Tensor | None:
        """``[H]``: the weights that evaluation gives the heads of every input, 0 = does not run.

        None if they depend on the input.
        """
        return None

    def penalty(self) -> Tensor:
        """The gate's regulariser for the last training forward: a scalar, 0 if it has none.

        Training loops call :func:`penalty`, which pools the gates of a model.
        """
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor.new_zeros(())
        return torch.zeros(())

    def anneal(self, progress: float) -> None:
        """Sets how far training has come, from 0 (exploration) to 1 (exploitation).

        Raises:
            ValueError: ``progress`` is outside [0, 1].
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must be between 0 and 1, got {progress}")

    def _check_bound(self, x: Tensor) -> None:
        if self.num_heads is None:
            raise RuntimeError(
                f"{type(self).__name__} is not bound to a layer: call bind(embed_dim, num_heads)"
            )
        if x.dim() != 3 or x.size(2) != self.embed_dim:
            raise ValueError(f"x must have shape [B, L, {self.embed_dim}], got {list(x.shape)}")
        for name in self._READ:
            if (linear := self._modules.get(name)) is not None:
                check_read(f"gate.{name}", linear)

    def _check_relevance(self, relevance: Tensor) -> None:
        """Of a ``start_from``: finite, of shape ``[H]``."""
        if relevance.shape != (self.num_heads,):
            raise ValueError(
                f"relevance must have shape [{self.num_heads}], got {list(relevance.shape)}"
            )
        if not bool(torch.isfinite(relevance).all()):
            raise ValueError("relevance must be finite")

    def _record(self, **values: Any) -> None:
        """Stores the results of a training forward for the penalty and for readers, as
        attributes."""
        if self.training and not recomputing():
            for name, value in values.items():
                setattr(self, name, value)

    #: The linear layers whose weights the gate's operators read.
    _READ: tuple[str, ...] = ()

    #: Whether the gate chooses by queries and keys: the layer then passes it ``HeadInputs``.
    reads_heads = False

    #: Whether it also changes how heads attend: the layer then calls its ``attend(heads, v)``.
    attends = False

    #: Whether every token chooses its heads: ``forward`` then returns a :class:`TokenSelection`.
    routes_tokens = False

    #: Whether the output projection depends on what it chose: the layer then calls its
    #: ``run(layer, ...)`` and ``project(context, selection)`` (:class:`headwise.gates.BankGate`).
    projects = False

    #: How it decides, in a sentence, for explanations of a gate that the core does not know.
    how: str | None = None

    #: Whether it only passes on what another gate inside it chose: then that one is annealed,
    #: linked and penalised.
    wraps = False

    #: Attributes that hold tensors of the last forward's graph: not part of a copy or a file.
    _RECORDED: tuple[str, ...] = ("expected_heads",)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(self._RECORDED), "_groups": ()}

    def _align(self) -> None:
        """Makes what the gate keeps of its inputs equal in the processes of ``_groups``."""

    def _config_key(self) -> str:
        return json.dumps(self.config(), sort_keys=True)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self._options.items())


def gate_from_config(config: Mapping[str, Any]) -> Gate:
    """An unbound gate from what :meth:`Gate.config` returned.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: ``config`` is not a mapping, has no or an unknown ``type``, lacks an option or
            has one that the type does not have or that is out of its range, by name.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a gate's configuration must be a mapping, got {quoted(config)}")
    name = config.get("type")
    if not isinstance(name, str) or name not in _GATES:
        known = ", ".join(sorted(_GATES))
        raise ValueError(f"gate type must be one of {known}, got {quoted(name)}")
    inner: Any = config
    depth = 0
    while isinstance(inner, Mapping):
        inner, depth = inner.get("gate"), depth + 1
        if depth > MOST_NESTED:
            raise ValueError(f"gates must not be nested more than {MOST_NESTED} deep")
    parameters = inspect.signature(_GATES[name].__init__).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    accepted = {
        key
        for key, parameter in parameters.items()
        if key not in ("self", *BINDING) and parameter.kind not in several
    }
    options = {key: value for key, value in config.items() if key != "type"}
    for key in options:
        if key not in accepted:
            listed = ", ".join(sorted(accepted))
            raise ValueError(f"{name} has no option {quoted(key)}; it has {listed}")
    for key in sorted(accepted - set(options)):
        if parameters[key].default is inspect.Parameter.empty:
            raise ValueError(f"{name} must be given its option {key!r}")
    return _GATES[name](**without_defaults(name, options))


def inner_gate(gate: Any, of: str) -> Gate:
    """The unbound gate that another one is to wrap, from a gate or its configuration."""
    if isinstance(gate, Mapping):
        gate = gate_from_config(gate)
    if not isinstance(gate, Gate):
        kind = "None" if gate is None else type(gate).__name__
        raise TypeError(f"gate must be a headwise.Gate, got {kind}")
    if gate.num_heads is not None:
        raise ValueError(f"gate must not be bound: it is bound to {of}")
    if gate.reads_heads:
        raise ValueError(
            "gate must choose by the layer's input, and this one reads queries and keys"
        )
    if gate.routes_tokens:
        raise ValueError(
            "gate must choose for every sequence, and this one does for every token: give it "
            "routing='sequence'"
        )
    return gate
