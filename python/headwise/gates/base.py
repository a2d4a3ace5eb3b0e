"""What every gate has in common."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates.linears import check_read
from headwise.gates.options import Check, choice
from headwise.gates.selection import Selection

EXECUTIONS = ("all", "selected")
_GATES: dict[str, type[Gate]] = {}


class Gate(nn.Module):
    """Chooses the heads of one attention layer, for every sequence of a batch.

    A gate is built *bound* to a layer's sizes (``embed_dim=768, num_heads=12``) or *unbound*, as a
    prototype that :meth:`bind` makes bound copies of: one prototype serves every layer of a model.

    Attributes:
        execution: in training, ``"all"`` runs every head, so that gradients reach the weights of
            heads that were not chosen; ``"selected"`` runs only the chosen ones, which makes a
            training step cheaper. In evaluation only the chosen heads ever run.
        embed_dim: width of the layer's input, or None where unbound.
        num_heads: heads of the layer, or None where unbound.
        expected_heads: ``[B]``, differentiable: the expected number of heads of the last training
            forward, or None.
    """

    #: Arguments of ``__init__`` that describe the layer, not the gate.
    _BINDING = ("embed_dim", "num_heads", "device", "dtype")
    #: What each option must be, in the order of :meth:`config`. A gate that declares its options
    #: here, its parent's among them, ends its ``__init__`` with ``super().__init__(
    #: **self._declared(locals()))``: they are checked, and become attributes.
    _OPTIONS: Mapping[str, Check] = {}

    embed_dim: int | None
    num_heads: int | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _GATES[cls.__name__] = cls

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        execution: str,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        checks = {**self._OPTIONS, "execution": choice(*EXECUTIONS)}
        options = {
            name: checks[name](name, value) if name in checks else value
            for name, value in {**options, "execution": execution}.items()
        }
        if (embed_dim is None) != (num_heads is None):
            raise ValueError("embed_dim and num_heads must be given together, or neither")
        if embed_dim is not None and (embed_dim <= 0 or num_heads < 0):
            raise ValueError(
                "embed_dim must be positive and num_heads not negative, "
                f"got embed_dim={embed_dim} and num_heads={num_heads}"
            )
        self._options = options
        for name in checks:
            if not hasattr(type(self), name):  # a method may have the name of an option
                self.__dict__[name] = options[name]
        self._check_options()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.expected_heads: Tensor | None = None
        if embed_dim is not None:
            self._build(device, dtype)
            self.reset_parameters()

    @classmethod
    def _declared(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What ``__init__`` of this class is given, from the arguments of a gate's own."""
        held = {name: arguments[name] for name in ("execution", *cls._BINDING)}
        return {"options": {name: arguments[name] for name in cls._OPTIONS}, **held}

    def _check_options(self) -> None:
        """Checks what single options do not show."""

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
        bound = type(self)(
            **options, embed_dim=embed_dim, num_heads=num_heads, device=device, dtype=dtype
        )
        return bound.train(self.training)

    def config(self) -> dict[str, Any]:
        """The gate's configuration, tagged with its type; JSON can hold it.

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

        None where they depend on the input.
        """
        return None

    def penalty(self) -> Tensor:
        """The gate's regulariser for the last training forward: a scalar, 0 where it has none.

        :func:`penalty` is what a training loop needs: it pools the gates of a model.
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

    #: The linear layers whose weights the gate's operators read.
    _READ: tuple[str, ...] = ()

    #: Whether the gate chooses by queries and keys: the layer then hands it ``HeadInputs``.
    reads_heads = False

    #: Whether it also changes how heads attend: the layer then calls its ``attend(heads, v)``.
    attends = False

    #: Whether the output projection depends on what it chose: the layer then calls its
    #: ``run(layer, ...)`` and ``project(context, selection)`` (:class:`headwise.gates.BankGate`).
    projects = False

    #: Whether it only passes on what another gate inside it chose: then that one is annealed,
    #: linked and penalised.
    wraps = False

    #: Attributes that hold tensors of the last forward's graph: not part of a copy or a file.
    _RECORDED: tuple[str, ...] = ("expected_heads",)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **dict.fromkeys(self._RECORDED)}

    def _config_key(self) -> str:
        return json.dumps(self.config(), sort_keys=True)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self._options.items())


def gate_from_config(config: Mapping[str, Any]) -> Gate:
    """An unbound gate from what :meth:`Gate.config` returned.

    Raises:
        ValueError: no or an unknown ``type``, or a key that the type does not have, by name.
    """
    name = config.get("type")
    if name not in _GATES:
        raise ValueError(f"gate type must be one of {', '.join(sorted(_GATES))}, got {name!r}")
    accepted = set(inspect.signature(_GATES[name].__init__).parameters)
    accepted -= {"self", *Gate._BINDING}
    options = {key: value for key, value in config.items() if key != "type"}
    for key in options:
        if key not in accepted:
            raise ValueError(f"{name} has no option {key!r}; it has {', '.join(sorted(accepted))}")
    return _GATES[name](**options)
