"""hw.head_mask and hw.prune_heads: what version 4 of transformers had, on every supported model."""

import copy
import threading

import headwise as hw
import numpy as np
import pytest
import torch
from headwise.pruning import plan_from_mask
from support.architectures import ARCHITECTURES, EMBED, HEADS, bert, bert_inputs
from torch import nn


@pytest.fixture(params=ARCHITECTURES.values(), ids=lambda row: row.name)
def architecture(request):
    torch.manual_seed(0)
    return request.param


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def scaled_by_hand(model, mask):
    """The oracle: the columns of the output projections multiplied by the factors."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, row in zip(hw.attention_layers(model).values(), mask, strict=True):
            layer.output_projection.weight.mul_(row.repeat_interleave(layer.head_dim))
    return model


def test_a_mask_multiplies_the_output_of_every_head(architecture):
    model = hw.convert(architecture.build())
    mask = torch.rand(len(hw.attention_layers(model)), HEADS)
    mask[0, 1] = mask[-1, 3] = 0.0
    inputs = architecture.inputs()
    with torch.no_grad():
        before = architecture.run(model, inputs)
        expected = architecture.run(scaled_by_hand(model, mask), inputs)
        with hw.head_mask(model, mask):
            close(architecture.run(model, inputs), expected)
        close(architecture.run(model, inputs), before, 0)
        close(architecture.run(hw.mask(model, plan_from_mask(model, mask)), inputs), expected)


def test_the_gradient_of_a_factor_is_michels(architecture):
    model = hw.convert(architecture.build())
    layers = hw.attention_layers(model)
    mask = torch.ones(len(layers), HEADS)
    mask[0, 1] = 0.0
    mask.requires_grad_(True)
    inputs = architecture.inputs()
    with hw.head_mask(model, mask):
        architecture.run(model, inputs).square().sum().backward()
    # <W, dL/dW> over a head's columns, of weights that carry the factor, is the factor's gradient.
    reference = copy.deepcopy(model)
    factors = mask.detach().clone().requires_grad_(True)
    parameters = {}
    for (name, layer), row in zip(hw.attention_layers(reference).items(), factors, strict=True):
        own = next(n for n, m in layer.named_modules() if m is layer.output_projection)
        weight = layer.output_projection.weight.detach()
        place = ".".join(part for part in (name, own, "weight") if part)
        parameters[place] = weight * row.repeat_interleave(layer.head_dim)

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = reference

        def forward(self):
            return architecture.run(self.model, inputs)

    names = {f"model.{place}": weight for place, weight in parameters.items()}
    torch.func.functional_call(Called(), names, ()).square().sum().backward()
    close(mask.grad, factors.grad, 1e-4)
    assert mask.grad[0, 1] != 0


def test_layers_by_position_or_name_and_other_kinds_of_numbers():
    torch.manual_seed(0)
    model = hw.convert(bert("BertModel"))
    inputs = bert_inputs()

    def run(mask):
        with torch.no_grad(), hw.head_mask(model, mask):
            return model(**inputs).last_hidden_state

    name = list(hw.attention_layers(model))[1]
    mask = torch.tensor([[1.0] * 4, [1, 0, 0, 1]])
    expected = run(mask)
    for same in (mask.bool(), mask.int(), mask.double(), mask.half(), {1: [1, 0, 0, 1]}):
        close(run(same), expected)
    close(run({name: np.array([1, 0, 0, 1])}), expected)
    close(run({name: mask[1].tolist()}), expected)
    close(run(torch.tensor([1, 0, 0, 1])), run(torch.tensor([[1, 0, 0, 1]] * 2)))


def test_a_mask_multiplies_what_a_gate_gives():
    torch.manual_seed(0)
    model = hw.convert(bert("BertModel"), hw.BudgetGate(keep=0.5))
    inputs = bert_inputs()
    mask = torch.tensor([[1.0, 0, 1, 1], [0.5, 1, 1, 0]])
    with torch.no_grad(), hw.trace(model) as own:
        model(**inputs)
    with torch.no_grad(), hw.trace(model) as masked, hw.head_mask(model, mask):
        model(**inputs)
    first = next(iter(own.layers))  # what later layers choose depends on what earlier ones give
    close(masked.selections[first].weight, own.selections[first].weight * mask[0])
    assert [type(layer.gate) for layer in hw.attention_layers(model).values()] == [
        hw.BudgetGate
    ] * 2


def test_masks_nest_and_come_off_in_reverse_order():
    torch.manual_seed(0)
    model = hw.convert(bert("BertModel").train())
    inputs = bert_inputs()
    model.eval()
    a, b = torch.rand(2, HEADS), torch.rand(2, HEADS)
    with torch.no_grad(), hw.head_mask(model, a * b):
        expected = model(**inputs).last_hidden_state
    outer = hw.head_mask(model, a)
    inner = hw.head_mask(model, b)
    with torch.no_grad():
        close(model(**inputs).last_hidden_state, expected)
    with pytest.raises(RuntimeError, match="in the reverse order"):
        outer.remove()
    inner.remove()
    outer.remove()
    outer.remove()
    assert all(layer.gate is None for layer in hw.attention_layers(model).values())


def test_an_error_in_the_block_takes_the_mask_off_and_modes_stay():
    model = hw.convert(bert("BertModel")).train()
    with pytest.raises(KeyError), hw.head_mask(model, torch.ones(2, HEADS)):
        assert model.training
        raise KeyError
    assert model.training
    assert all(layer.gate is None for layer in hw.attention_layers(model).values())


def test_another_thread_does_not_get_masked_results_unawares():
    model = hw.convert(bert("BertModel"))
    errors = []

    def run():
        try:
            model(**bert_inputs())
        except RuntimeError as error:
            errors.append(str(error))

    with hw.head_mask(model, torch.ones(HEADS)):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(errors) == 1 and "another thread" in errors[0]


@pytest.mark.parametrize("by_name", [False, True])
def test_prune_heads_removes_them(architecture, by_name):
    model = hw.convert(architecture.build())
    names = list(hw.attention_layers(model))
    removed = {names[0] if by_name else 0: [3, 1], names[-1] if by_name else len(names) - 1: {1, 3}}
    small = hw.prune_heads(model, removed)
    mask = torch.ones(len(names), HEADS)
    for index in {0, len(names) - 1}:
        mask[index, [1, 3]] = 0
        layer = hw.attention_layers(small)[names[index]]
        assert layer.num_heads == 2 and layer.output_projection.weight.shape == (EMBED, 12)
    inputs = architecture.inputs()
    with torch.no_grad(), hw.head_mask(model, mask):
        close(architecture.run(small, inputs), architecture.run(model, inputs))


def test_prune_heads_hands_its_options_on():
    model = hw.convert(bert("BertModel"))
    assert hw.prune_heads(model, {0: [1], 1: range(4)}, inplace=True) is model
    assert [layer.num_heads for layer in hw.attention_layers(model).values()] == [3, 0]
    assert hw.prune_heads(model, {}) is not model
    mask = hw.head_mask(model, {0: [1, 0, 1], 1: []})
    mask.remove()
    with pytest.raises(ValueError, match="one factor per head"):
        hw.head_mask(model, torch.ones(2, 4))


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        ([[1.0]], TypeError, "mask must be a tensor or a mapping, got list"),
        (
            torch.ones(3, 4),
            ValueError,
            r"\[layers, heads\] \(\[2, ...\]\) or \[heads\], got \[3, 4\]",
        ),
        (torch.ones(2, 4, 1), ValueError, "mask must have shape"),
        (torch.ones(()), ValueError, "mask must have shape"),
        (torch.ones(2, 5), ValueError, r"mask of layer '.*' must have shape \[4\]"),
        (torch.full((4,), float("nan")), ValueError, "must be finite"),
        (torch.ones(4, dtype=torch.complex64), TypeError, "real numbers"),
        ({2: [1] * 4}, ValueError, r"layer must be in 0\.\.1, got 2"),
        ({-1: [1] * 4}, ValueError, r"layer must be in 0\.\.1, got -1"),
        ({True: [1] * 4}, ValueError, "layer must be a position or a name"),
        ({"x" * 1000: [1] * 4}, ValueError, "layer must be a position or a name"),
        ({0: "heads"}, TypeError, "must be a tensor or a list of numbers, got 'heads'"),
        ({0: [[1], [1, 2]]}, TypeError, "must be a tensor or a list of numbers"),
    ],
    ids=str,
)
def test_wrong_masks_are_refused(mask, kind, message):
    model = hw.convert(bert("BertModel"))
    with pytest.raises(kind, match=message) as caught:
        hw.head_mask(model, mask)
    assert len(str(caught.value)) < 500
    assert all(layer.gate is None for layer in hw.attention_layers(model).values())


@pytest.mark.parametrize(
    ("heads", "kind", "message"),
    [
        ([[1]], TypeError, "heads must map layers to heads, got list"),
        ({0: 1}, TypeError, "must be a list, got 1"),
        ({0: "1"}, TypeError, "must be a list, got '1'"),
        ({0: [1.0]}, TypeError, "must be whole numbers, got 1.0"),
        ({0: [True]}, TypeError, "must be whole numbers, got True"),
        ({0: [4]}, ValueError, r"must be in 0\.\.3, got 4"),
        ({0: [-1]}, ValueError, r"must be in 0\.\.3, got -1"),
    ],
    ids=str,
)
def test_wrong_heads_are_refused(heads, kind, message):
    with pytest.raises(kind, match=message):
        hw.prune_heads(hw.convert(bert("BertModel")), heads)


def test_what_is_not_converted_or_named_twice_is_refused():
    with pytest.raises(ValueError, match=r"call headwise\.convert first"):
        hw.head_mask(bert("BertModel"), torch.ones(4))
    with pytest.raises(ValueError, match=r"call headwise\.convert first"):
        hw.prune_heads(bert("BertModel"), {0: [1]})
    model = hw.convert(bert("BertModel"))
    name = next(iter(hw.attention_layers(model)))
    with pytest.raises(ValueError, match="must be named once"):
        hw.prune_heads(model, {0: [1], name: [2]})
