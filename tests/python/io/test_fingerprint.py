"""Fingerprints are of contents: equal contents have one, any difference another."""

from __future__ import annotations

import copy
import threading

import headwise as hw
import numpy as np
import pytest
import torch
from headwise.io.fingerprint import fingerprint
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@given(VALUES, VALUES)
def test_equal_values_and_no_others_have_the_same(first, second):
    same = repr(first) == repr(second)  # -0.0 is not 0.0, and True is not 1
    assert (fingerprint(first) == fingerprint(second)) == same
    assert fingerprint(copy.deepcopy(first)) == fingerprint(first)


def test_the_parts_of_a_tensor():
    x = torch.arange(6.0)
    different = [
        x, x.view(2, 3), x.double(), x.int(), -x, x.flip(0), x[:0], x[:0].int(), [x], (x, x),
        x.to_sparse().to_dense() + 1, {"x": x}, nn.Linear(2, 3), np.arange(6.0), list(range(6)),
    ]  # fmt: skip
    assert len({fingerprint(value) for value in different}) == len(different)
    assert fingerprint(x.view(2, 3).T.contiguous().T) == fingerprint(x.view(2, 3))
    assert fingerprint(x.to_sparse()) == fingerprint(x)
    assert fingerprint(x.requires_grad_()) == fingerprint(torch.arange(6.0))


def layer(**gate):
    torch.manual_seed(0)
    return hw.MultiheadAttention(8, 4, gate=hw.FixedGate(**gate) if gate else None)


def permuted(module):
    """The same weights with two heads exchanged: every sum is the same."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        rows = torch.tensor([2, 3, 0, 1, 4, 5, 6, 7])
        for part in range(3):
            block = slice(8 * part, 8 * part + 8)
            other.in_proj_weight[block] = module.in_proj_weight[block][rows]
        other.out_proj.weight.copy_(module.out_proj.weight[:, rows])
    return other


def test_what_makes_a_model_another():
    plain = layer()
    buffered = layer()
    buffered.register_buffer("extra", torch.ones(2), persistent=False)
    other_buffer = layer()
    other_buffer.register_buffer("extra", torch.zeros(2), persistent=False)
    models = [
        plain, permuted(plain), layer(heads=[0, 1]), layer(heads=[0, 2]), buffered, other_buffer,
        layer().double(), nn.Sequential(plain), nn.Sequential(nn.ReLU(), plain),
        nn.Sequential(nn.GELU(), plain),
    ]  # fmt: skip
    assert len({fingerprint(model) for model in models}) == len(models)
    assert fingerprint(layer()) == fingerprint(plain) == fingerprint(copy.deepcopy(plain))
    assert fingerprint(plain.train()) == fingerprint(plain.eval())
    exchanged = permuted(plain)
    sums = [sum(p.double().sum() for p in model.parameters()) for model in (plain, exchanged)]
    torch.testing.assert_close(*sums)  # what a sum of the weights takes for the same model


class Holder:
    def __init__(self, value):
        self.value = value


class Slotted:
    __slots__ = ("value",)


def test_objects():
    assert fingerprint(Holder(1)) == fingerprint(Holder(1)) != fingerprint(Holder(2))
    slotted = Slotted()
    slotted.value = 1
    assert fingerprint(slotted) != fingerprint(Holder(1))
    assert fingerprint({1, "a"}) == fingerprint({"a", 1}) != fingerprint({"a"})
    circle: list = []
    circle.append(circle)
    for value in (threading.Lock(), torch.ones(2, device="meta"), circle):
        with pytest.raises(ValueError, match="to(ld| tell)"):
            fingerprint(value)
