"""Cheap checks that a change of a model did not change its outputs: a layer of each kind, before
and after, on a few made-up tokens; and changes that are undone if they fail.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headwise.nn.decoder_inputs import forward_replaced

#: Relative tolerance between two ways of computing the same, of the largest output.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}

#: A call of a layer on made-up tokens: ``trial(layer, draw)`` -> its outputs.
Trial = Callable[[nn.Module, "Draw"], list[Tensor]]


_HELD = (dict, OrderedDict, list, set)


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Undoes what the block did to the modules of ``model`` if it raises.

    That is their attributes, children, parameters, buffers and hooks, not the numbers in tensors.
    """
    before = [
        (
            module,
            dict(vars(module)),
            [(held, type(held)(held)) for held in vars(module).values() if type(held) in _HELD],
        )
        for module in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, attributes, contents in before:
            vars(module).clear()
            vars(module).update(attributes)
            for held, content in contents:  # in place: handles of hooks know these very objects
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)
        raise


class Draw:
    """Made-up numbers, the same for each ``Draw`` of one type and device; no global generator is
    touched."""

    def __init__(self, dtype: torch.dtype, device: torch.device, cast: torch.dtype | None = None):
        self.device, self._dtype, self._cast = device, dtype, cast or dtype
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        """Normal, rounded to the layer's dtype."""
        numbers = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return numbers.to(self._dtype).to(self.device, self._cast)

    def rope(self, length: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of made-up angles, each ``[1, length, width]``."""
        angle = 3 * torch.rand((1, length, width // 2), generator=self._generator)
        angle = torch.cat([angle, angle], dim=-1).double()
        tables = (angle.cos(), angle.sin())
        cos, sin = (table.to(self._dtype).to(self.device, self._cast) for table in tables)
        return cos, sin

    def padding(self, batch: int, length: int, padded: int = 2) -> Tensor:
        """bool ``[B, L]``, True = padding: the last tokens of the last sequence."""
        mask = torch.zeros(batch, length, dtype=torch.bool, device=self.device)
        mask[-1, length - padded :] = True
        return mask

    def added(self, unseen: Tensor) -> Tensor:
        """bool, True = may not be seen -> the mask that is added to the scores."""
        zeros = torch.zeros(unseen.shape, dtype=self._cast, device=self.device)
        return zeros.masked_fill(unseen, torch.finfo(self._cast).min)


def bare(
    module: nn.Module, dtype: torch.dtype | None = None, _made: dict[int, Any] | None = None
) -> nn.Module:
    """A temporary copy in evaluation mode without hooks and recorders.

    It shares the parameters of ``module``; with ``dtype`` they are copies. Buffers are copies.
    """
    made = {} if _made is None else _made
    if id(module) in made:
        return made[id(module)]
    new = made[id(module)] = object.__new__(type(module))
    held = vars(new)
    held.update(vars(module))
    if not forward_replaced(module):
        held.pop("forward", None)
    for name, value in vars(module).items():
        if "hooks" in name and isinstance(value, dict):
            held[name] = OrderedDict()

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    held.update(training=False, _is_full_backward_hook=None)
    held["_parameters"] = {
        name: p if p is None or dtype is None else nn.Parameter(cast(p.detach()), False)
        for name, p in module._parameters.items()
    }
    held["_buffers"] = {
        name: b if b is None else cast(b.detach().clone()) for name, b in module._buffers.items()
    }
    held["_modules"] = {
        name: child if child is None else bare(child, dtype, made)
        for name, child in module._modules.items()
    }
    if "_observers" in held:
        held.update(_observers=[], _probe=None)
    return new


class Place(NamedTuple):
    """The dtype and device of a module.

    ``mixed``: its parameters have several dtypes, or an unknown one, so that copies in float64 are
    compared.
    """

    dtype: torch.dtype
    device: torch.device
    mixed: bool = False

    def bare(self, module: nn.Module) -> nn.Module:
        """A :func:`bare` copy that can be run on made-up tokens."""
        return bare(module, self.dtype if self.mixed else None)

    def draw(self) -> Draw:
        return Draw(self.dtype, self.device)


def place_of(module: nn.Module) -> Place | None:
    """None: it has no parameters, or they are on several devices, or on none."""
    places = {(p.dtype, p.device) for p in module.parameters() if p.is_floating_point()}
    devices = {device for _, device in places}
    if len(devices) != 1 or any(device.type == "meta" for device in devices):
        return None
    dtype, device = next(iter(places))
    if len(places) > 1 or dtype not in TOLERANCE:
        return Place(torch.float64, device, mixed=True)
    return Place(dtype, device)


def outputs(module: nn.Module, trial: Trial, draw: Draw) -> list[Tensor]:
    """The outputs of ``trial`` on a :func:`bare` module."""
    with torch.no_grad(), torch.autocast(draw.device.type, enabled=False):
        return [output for output in trial(module, draw) if output is not None]


def disagreement(
    expected: list[Tensor], actual: list[Tensor], exact: Callable[[], list[Tensor]] | None = None
) -> str | None:
    """How the outputs of two modules differ by more than rounding; None if they do not.

    Args:
        expected: of the module before the change.
        actual: of the module after it.
        exact: the outputs before the change, in float64; asked only if the others differ by more
            than :data:`TOLERANCE`. An output within a few times the error of ``expected`` differs
            only by rounding.
    """
    if not all(bool(output.isfinite().all()) for output in expected):
        return None  # NaN weights prove nothing
    worst = _largest_difference(expected, actual)
    if worst is None:
        shapes = [[list(o.shape) for o in side] for side in (expected, actual)]
        return f"its outputs have shapes {shapes[0]} before and {shapes[1]} after"
    difference, before, after = worst
    scale = max(float(output.abs().max()) for output in expected if output.numel())
    tolerance = TOLERANCE[expected[0].dtype] * scale
    if difference <= tolerance:
        return None
    if exact is not None:
        true = exact()
        own, new = _largest_difference(true, expected), _largest_difference(true, actual)
        if own is not None and new is not None and new[0] <= 4 * own[0] + tolerance:
            return None
    return (
        f"on made-up tokens an output is {before:.6g} before and {after:.6g} after, and "
        f"{tolerance:.2g} is what rounding explains"
    )


def _largest_difference(
    expected: list[Tensor], actual: list[Tensor]
) -> tuple[float, float, float] | None:
    """The largest difference and the two numbers; None: shapes differ. NaN counts as infinite."""
    if [output.shape for output in expected] != [output.shape for output in actual]:
        return None
    worst = (0.0, 0.0, 0.0)
    for before, after in zip(expected, actual, strict=True):
        if not before.numel():
            continue
        before, after = before.double().flatten(), after.double().flatten()
        apart = (before - after).abs().nan_to_num(nan=float("inf"))
        at = int(apart.argmax())
        if float(apart[at]) > worst[0]:
            worst = (float(apart[at]), float(before[at]), float(after[at]))
    return worst


def multihead_outputs(
    mha: nn.Module, draw: Draw, widths: tuple[int, int, int], batch_first: bool, maps: bool = True
) -> list[Tensor]:
    """A trial of ``torch.nn.MultiheadAttention`` and its replacements: with padding, with a mask,
    with queries of another sequence; with or without attention weights."""

    def sequence(length: int, width: int) -> Tensor:
        tokens = draw(2, length, width)
        return tokens if batch_first else tokens.transpose(0, 1)

    padding = draw.padding(2, 5)
    query, key, value = (sequence(n, w) for n, w in zip((3, 5, 5), widths, strict=True))
    seen = mha(query, key, value, key_padding_mask=padding, need_weights=maps)
    if len(set(widths)) > 1:
        return list(seen)
    causal = torch.ones(5, 5, dtype=torch.bool, device=key.device).triu(1)
    own = mha(key, key, key, key_padding_mask=padding, need_weights=False)
    masked = mha(key, key, key, attn_mask=causal, need_weights=False)
    return [*seen, own[0], masked[0]]


def called(module: nn.Module, name: str) -> str:
    """The module ``name`` of a model, as errors call it."""
    return f"'{name}' ({type(module).__name__})" if name else type(module).__name__


def refusal(name: str, reason: str) -> ValueError:
    """The error of a change that would change a module's outputs."""
    return ValueError(
        f"{name} would not compute what it did: {reason}; model is as it was "
        f"(verify=False changes it all the same)"
    )


class Proof:
    """A module's outputs on made-up tokens, to be compared with its replacement's."""

    def __init__(self, module: nn.Module, name: str, trial: Trial, place: Place):
        self._name = called(module, name)
        self._trial, self._place = trial, place
        self._before = place.bare(module)  # now: the change may be in place
        self._expected = outputs(self._before, trial, place.draw())

    @staticmethod
    def of(module: nn.Module, name: str, trial: Trial | None) -> Proof | None:
        """None: it cannot be tried, because it has no trial or no single device.

        Raises:
            ValueError: it cannot be called like its class.
        """
        place = place_of(module)
        if trial is None or place is None:
            return None
        try:
            return Proof(module, name, trial, place)
        except Exception as error:
            raise ValueError(
                f"{type(module).__name__} '{name}' cannot be called as its class is, so nothing "
                f"proves that its replacement computes the same ({_brief(error)}); verify=False "
                f"changes it all the same"
            ) from error

    def check(self, after: nn.Module, trial: Trial | None = None) -> None:
        """Compares ``after``, called by ``trial`` (default: like the first module).

        Raises:
            ValueError: its outputs differ, or it cannot be called.
        """
        try:
            actual = outputs(self._place.bare(after), trial or self._trial, self._place.draw())
        except Exception as error:
            raise ValueError(
                f"what came in the place of {self._name} cannot be called as it was: "
                f"{_brief(error)}"
            ) from error
        text = disagreement(self._expected, actual, self._exact)
        if text is not None:
            raise refusal(self._name, text)

    def _exact(self) -> list[Tensor]:
        exact = bare(self._before, torch.float64)
        draw = Draw(self._place.dtype, self._place.device, cast=torch.float64)
        return outputs(exact, self._trial, draw)


def kind_of(module: nn.Module) -> Hashable:
    """Equal for modules that differ at most in the values of their tensors: one check covers
    all."""
    config = vars(module).get("config")
    return (
        type(module),
        getattr(config, "_attn_implementation", None),
        tuple(
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str, type(None)))
            and not name.startswith("_")
            and name not in ("layer_idx", "training")
        ),
        tuple(
            (name, p.shape, p.dtype, p.device)
            for name, p in module._parameters.items()
            if p is not None
        ),
        tuple((name, kind_of(m)) for name, m in module._modules.items() if m is not None),
    )


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}"
