"""Running two models layer by layer, and recording the inputs and outputs of their output
projections."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates.padding import is_padding
from headwise.nn.attention_layer import AttentionLayer, AttentionProbe
from headwise.nn.decoder_inputs import forward_replaced
from headwise.nn.instrumenting import evaluating, replaced
from headwise.nn.layers import attention_layers
from headwise.nn.partial_forward import Stop, tokens_read
from headwise.pruning.structured.description import structure

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Site:
    """An output projection of a model: of an attention layer, or of a feed-forward network.

    Attributes:
        name: of the attention layer or the network, as in plans.
        module: the attention layer, or the network's second linear layer.
    """

    name: str
    module: nn.Module

    @property
    def linear(self) -> nn.Module:
        module = self.module
        return module.output_projection if isinstance(module, AttentionLayer) else module

    @property
    def group(self) -> int:
        """Inputs of a head, or of a neuron."""
        return self.module.head_dim if isinstance(self.module, AttentionLayer) else 1


@dataclass
class Seen:
    """The inputs and outputs of one call of a site, for the tokens that count.

    ``inputs`` [B, L, E], ``outputs`` [B, L, D], ``valid`` bool [B, L]: False for padding.
    """

    inputs: Tensor
    outputs: Tensor
    valid: Tensor


class Replay:
    """Runs one model on each of some batches, up to one of its sites at a time.

    If the model is a chain of blocks, each the only reader of the one before (checked on the first
    batch, by the identity of the tensors), :meth:`finish` keeps a block's output, and later runs
    begin there. Otherwise every run begins at the model's input. Both give the same values.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], forward_fn: Forward) -> None:
        self.model, self.batches, self._forward = model, batches, forward_fn
        self._layers = attention_layers(model)
        self._padding: Tensor | None = None  # bool [B, L], of the attention layer that ran last
        self._sequence_first = False
        self._state: list[Any] = []  # output of the last finished block on each batch
        sites = _sites(model)
        calls, self.blocks = self._explore(sites)
        #: The sites in the order of their first run, and how often each runs.
        self.sites = {name: sites[name] for name in calls}
        self.calls = calls
        #: How many blocks need not run again.
        self.finished = 0

    def block_of(self, name: str) -> int | None:
        """The block of a site; None: the model is not a chain of blocks."""
        module = self.sites[name].module
        for i, block in enumerate(self.blocks):
            if any(module is inner for inner in block.modules()):
                return i
        return None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Evaluation mode, with recorders of padding."""
        # A nested tensor has no rows of padding to leave out.
        nested = [
            module
            for module in self.model.modules()
            if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
        ]
        probed = replaced(self._layers.values(), "_probe", self._watch)
        plain = replaced(nested, "use_nested_tensor", False)
        with evaluating(self.model), torch.no_grad(), probed, plain:
            try:
                yield
            finally:
                for block in self.blocks:
                    block.__dict__.pop("forward", None)

    def run(self, name: str, i: int) -> list[Seen]:
        """The inputs and outputs of the site ``name`` on batch ``i``, call by call."""
        site, seen = self.sites[name], []

        def record(inputs: Tensor, outputs: Tensor) -> None:
            valid = torch.ones(inputs.shape[:-1], dtype=torch.bool, device=inputs.device)
            if self._padding is not None and self._padding.shape == valid.shape:
                valid = ~self._padding
            seen.append(Seen(inputs, outputs, valid))
            if len(seen) == self.calls[name]:
                raise Stop

        with self._recording(site, record), contextlib.suppress(Stop):
            self._go(i)
        return seen

    def finish(self, block: int) -> None:
        """Keeps the output of ``block`` for each batch; the next runs begin after it."""
        state = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            state.append(output)
            raise Stop

        for i in range(len(self.batches)):
            with self.blocks[block].register_forward_hook(keep), contextlib.suppress(Stop):
                self._go(i)
        self._state, self.finished = state, block + 1

    def read_tokens(self, i: int) -> Tensor | None:
        """bool [B, L]: the tokens of the last block's output that the model's output depends on (a
        classifier's first). None: all, or the model is not a chain of blocks."""
        if not self.blocks:
            return None

        def total() -> Tensor | None:
            output = _first_tensor(self._go(i))
            if output is None:
                return None
            # Not the sum: for normalised outputs (a softmax) it is constant.
            weights = torch.linspace(1.0, 2.0, output.numel(), device=output.device)
            return (output * weights.sin().view_as(output).to(output.dtype)).sum()

        read = tokens_read(self.blocks[-1], total)  # [B, L]
        return read if read is not None and read.dim() == 2 and bool(read.any()) else None

    def _go(self, i: int) -> Any:
        self._padding = None
        for block in self.blocks[: self.finished]:
            block.forward = _Returning(self._state[i])
        return self._forward(self.model, self.batches[i])

    def _watch(self, layer: AttentionLayer, probe: AttentionProbe) -> None:
        self._sequence_first = not getattr(layer, "batch_first", True)
        if probe.query_padding_mask is not None:
            self._padding = is_padding(probe.query_padding_mask)  # [B, L]

    @contextlib.contextmanager
    def _recording(self, site: Site, record: Callable) -> Iterator[None]:
        if isinstance(site.module, AttentionLayer):

            def probe(layer: AttentionLayer, seen: AttentionProbe) -> None:
                self._watch(layer, seen)
                context = seen.context  # [B, H, L, d]
                if seen.weight is not None:
                    context = context * seen.weight.to(context.dtype)[:, :, None, None]
                inputs = context.transpose(1, 2).flatten(2)  # [B, L, E]
                record(inputs, layer.output_projection(inputs))

            site.module._probe = probe
            try:
                yield
            finally:
                site.module._probe = self._watch
            return

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            # Attention sees [B, L, D] whatever the layout; here it is in the model's layout.
            order = (1, 0, 2) if self._sequence_first and output.dim() == 3 else None
            record(*(x if order is None else x.permute(order) for x in (args[0], output)))

        with site.module.register_forward_hook(hook):
            yield

    def _explore(self, sites: dict[str, Site]) -> tuple[dict[str, int], list[nn.Module]]:
        """How often each site runs, in the order of first runs; and the blocks of the chain."""
        calls: dict[str, int] = {}
        passed: dict[nn.Module, list[tuple[Any, Any]]] = {}  # block -> its input and output
        chains = [
            list(module)
            for module in self.model.modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1
        ]

        def count(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple) -> None:
                calls[name] = calls.get(name, 0) + 1

            return hook

        def watch(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()), None)
            passed.setdefault(module, []).append((given, output))

        with contextlib.ExitStack() as hooks:
            for name, site in sites.items():
                hooks.enter_context(site.module.register_forward_pre_hook(count(name)))
            for block in {block for chain in chains for block in chain}:
                hooks.enter_context(block.register_forward_hook(watch, with_kwargs=True))
            # With recorders, so that no fused path of torch leaves a layer out.
            self.blocks = []
            with self.running():
                self._forward(self.model, self.batches[0])
        missing = set(self._layers) - set(calls)
        if missing == set(self._layers):
            raise ValueError("forward_fn must run model: none of its attention layers was called")
        inside = [sites[name].module for name in calls]
        for chain in chains:
            if _is_chain(chain, passed, inside):
                return calls, chain
        return calls, []


class _Returning:
    """Replaces a finished block's forward."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.state


def _sites(model: nn.Module) -> dict[str, Site]:
    found = {name: Site(name, layer) for name, layer in attention_layers(model).items()}
    for name, network in structure(model).ffn.items():
        found[name] = Site(name, network.second)
    return found


def _is_chain(
    chain: list[nn.Module], passed: dict[nn.Module, list], sites: list[nn.Module]
) -> bool:
    inner = {module for block in chain for module in block.modules()}
    if not all(site in inner for site in sites):
        return False
    for block in chain:
        # A hook would see a finished block's output again; a replaced forward would be lost.
        own = block._forward_hooks or forward_replaced(block)
        if len(passed.get(block, ())) != 1 or own:
            return False
    return all(
        _tensor(passed[one][0][1]) is passed[two][0][0]
        for one, two in zip(chain, chain[1:], strict=False)
    )


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _first_tensor(output: Any) -> Tensor | None:
    """The first floating tensor of an output: the logits if there are any."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = output.values() if hasattr(output, "values") else output
    if not isinstance(values, (str, bytes)) and hasattr(values, "__iter__"):
        return next((x for value in values if (x := _first_tensor(value)) is not None), None)
    return None
