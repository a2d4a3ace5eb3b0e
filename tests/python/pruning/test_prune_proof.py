"""Structure plans and repairs verify their result, and are atomic."""

import copy

import headwise as hw
import pytest
import torch
from headwise import _C
from headwise.pruning import apply
from headwise.pruning.structured import compaction
from support.architectures import ARCHITECTURES, bert, bert_inputs
from support.structures import random_plan
from torch import nn

BOTH = r"would not compute what it did: .* is \S+ before and \S+ after"


def numbers(model):
    """What must be unchanged after a failed change: modules, parameters by identity, and their
    values."""
    parts = {name: (id(part), type(part)) for name, part in model.named_modules()}
    return parts, {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}


def same(before, after):
    assert before[0] == after[0] and before[1].keys() == after[1].keys()
    for name, (place, value) in before[1].items():
        assert place == after[1][name][0] and torch.equal(value, after[1][name][1]), name


def build(name):
    torch.manual_seed(0)
    return hw.convert(ARCHITECTURES[name].build())


def half(model, hidden):
    """As :func:`random_plan`, but every network keeps some neurons."""
    plan, found = random_plan(model, 4, hidden=hidden, blocks=False), hw.pruning.structure(model)
    networks = [
        hw.pruning.FfnPlan(name, count, list(range(0, count, 3)))
        for name, count in found.neurons.items()
    ]
    return hw.pruning.StructurePlan(plan.heads, networks, hidden=plan.hidden)


def spoiled(model, kind):
    """The last weight of ``kind`` that is left in ``model`` is made larger."""
    found = hw.pruning.structure(model)
    linears = {
        "attention": [layer.output_projection for layer in found.attention.values()],
        "network": [ffn.second for ffn in found.ffn.values()],
        "norm": [part for part in model.modules() if isinstance(part, nn.LayerNorm)],
    }[kind]
    with torch.no_grad():
        for linear in linears:
            if linear.weight.numel():
                linear.weight.mul_(1.5).add_(0.1)


CASES = [
    (name, kind, hidden)
    for name in (
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertModel",
        "TransformerEncoder",
        "TransformerEncoder, norm first, gelu",
    )
    for kind, hidden in (
        ("attention", True),
        ("attention", False),
        ("network", True),
        ("network", False),
        ("norm", True),
    )
] + [
    ("DistilBertForSequenceClassification", "network", False),
    ("TransformerDecoder", "network", False),
    ("TransformerDecoder", "attention", False),
    ("LlamaForCausalLM", "attention", False),
    ("ViTForImageClassification", "network", False),
    ("GPT2LMHeadModel", "attention", False),
]


@pytest.mark.parametrize("name, kind, hidden", CASES)
def test_a_structure_plan_that_breaks_a_weight_is_refused(name, kind, hidden, monkeypatch):
    model = build(name)
    plan = half(model, hidden)
    original = compaction.compact

    def wrong(own, plan):
        own = original(own, plan)
        spoiled(own, kind)
        return own

    monkeypatch.setattr(apply, "compact", wrong)
    before = numbers(model)
    with pytest.raises(ValueError, match=BOTH):
        hw.prune(model, plan, inplace=True)
    same(before, numbers(model))
    hw.prune(model, plan, verify=False)


def test_a_norm_that_should_have_gone_is_noticed(monkeypatch):
    model = build("BertModel")
    name = next(iter(hw.pruning.structure(model).ffn))
    plan = hw.pruning.StructurePlan(hw.HeadPlan([]), blocks=[hw.pruning.BlockPlan(name, 0.0)])
    monkeypatch.setattr(compaction, "skip_norms", lambda model, names: None)
    with pytest.raises(ValueError, match=BOTH):
        hw.prune(model, plan)


def test_a_masked_model_keeps_its_mask_when_pruning_fails(monkeypatch):
    model = build("BertForSequenceClassification")
    plan, inputs = random_plan(model, 4), bert_inputs()
    hw.mask(model, plan)
    expected = model(**inputs).logits

    def wrong(own, plan):
        raise RuntimeError("no")

    monkeypatch.setattr(apply, "compact", wrong)
    with pytest.raises(RuntimeError):
        hw.prune(model, plan, inplace=True)
    assert torch.equal(model(**inputs).logits, expected)


def test_masks_of_hidden_dimensions_skip_the_norms_that_went():
    model = build("BertForSequenceClassification")
    name = next(iter(hw.pruning.structure(model).ffn))
    gone = hw.pruning.StructurePlan(hw.HeadPlan([]), blocks=[hw.pruning.BlockPlan(name, 0.0)])
    small = hw.prune(model, gone)
    size = hw.pruning.structure(small).hidden_size
    hidden = hw.pruning.StructurePlan(
        hw.HeadPlan([]), hidden=hw.pruning.HiddenPlan(size, [0, 3, 4, 9, 20])
    )
    inputs = bert_inputs()
    masked = hw.mask(copy.deepcopy(small), hidden)
    torch.testing.assert_close(
        masked(**inputs).logits, hw.prune(small, hidden)(**inputs).logits, rtol=1e-5, atol=1e-5
    )


# --- repair ---


def pruned():
    torch.manual_seed(0)
    dense = hw.convert(bert("BertForSequenceClassification", num_labels=3))
    plan = hw.HeadPlan(
        [
            hw.pruning.LayerPlan(name, layer.num_heads, [1, 2])
            for name, layer in hw.attention_layers(dense).items()
        ]
    )
    return dense, plan, hw.prune(dense, plan), [bert_inputs() for _ in range(4)]


class Spoiled:
    """What the solver found, with other weights."""

    def __init__(self, found):
        self.found, self.weight = found, 3.0 * found.weight

    def __getattr__(self, name):
        return getattr(self.found, name)


def test_a_repair_that_makes_it_worse_is_refused(monkeypatch):
    dense, plan, small, batches = pruned()
    solve, calls = _C.repair_projection, []

    def wrong(*arguments):
        calls.append(1)
        found = solve(*arguments)
        return found if len(calls) == 1 else Spoiled(found)  # the second layer

    monkeypatch.setattr(_C, "repair_projection", wrong)
    before = numbers(small)
    with pytest.raises(ValueError, match=r"further from the dense layer: .* is \S+ before and"):
        hw.repair(small, batches, dense)
    same(before, numbers(small))
    calls.clear()
    hw.repair(small, batches, dense, verify=False)
    calls.clear()
    before = numbers(dense)
    with pytest.raises(ValueError, match="further from the dense layer"):
        hw.prune(dense, plan, repair=batches, inplace=True)
    same(before, numbers(dense))


def test_a_layer_that_does_not_write_what_its_weights_say_is_refused():
    dense, _, small, batches = pruned()
    projection = next(iter(hw.attention_layers(small).values())).out_proj
    projection.register_forward_hook(lambda module, args, output: 2 * output)
    before = numbers(small)
    with pytest.raises(ValueError, match=r"should be \S+ and is \S+; model is as it was"):
        hw.repair(small, batches, dense)
    same(before, numbers(small))


def test_an_interrupted_repair_changes_nothing():
    dense, _, small, batches = pruned()
    batches[0] = {**batches[0]}
    second = list(hw.attention_layers(small).values())[1]
    calls = []

    def interrupt(module, args):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt

    handle = second.register_forward_pre_hook(interrupt)
    before = numbers(small)
    with pytest.raises(KeyboardInterrupt):
        hw.repair(small, batches, dense)
    same(before, numbers(small))
    handle.remove()


def test_masked_blocks_are_not_repaired():
    dense, _, small, batches = pruned()
    name = next(iter(hw.attention_layers(small)))
    plan = hw.pruning.StructurePlan(hw.HeadPlan([]), blocks=[hw.pruning.BlockPlan(name, 1.25)])
    hw.mask(small, plan)
    with pytest.raises(ValueError, match="must not have blocks or hidden dimensions masked"):
        hw.repair(small, batches, dense)
