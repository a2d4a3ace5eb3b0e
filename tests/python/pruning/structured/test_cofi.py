"""CoFi (Xia et al. 2022): its formulas against plain references, and training to a target."""

import copy
import math

import headwise as hw
import pytest
import torch
from support.architectures import EMBED, HEADS, _encoder, bert, bert_inputs
from support.structures import random_plan
from torch import nn
from torch.nn import functional as F

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
ops = torch.ops.headwise


def classifier():
    torch.manual_seed(0)
    return bert("BertForSequenceClassification", num_labels=3)


def encoder(layers=2, **kwargs):
    torch.manual_seed(0)
    return hw.convert(_encoder(layers, **kwargs))


def test_expected_size_is_the_sum_over_all_weights():
    torch.manual_seed(0)
    heads, neurons = [torch.rand(3), torch.rand(2)], [torch.rand(5), torch.rand(4)]
    attention, ffn, hidden = torch.rand(2), torch.rand(2), torch.rand(6)
    dims = [4, 3]
    expected = 0.0
    for k in range(6):  # every weight: the product of the probabilities of what it belongs to
        for layer in range(2):
            for head in heads[layer]:
                expected += 4 * dims[layer] * hidden[k] * attention[layer] * head
            for neuron in neurons[layer]:
                expected += 2 * hidden[k] * ffn[layer] * neuron
    found = ops.structure_size(heads, attention, neurons, ffn, hidden, dims)
    torch.testing.assert_close(found, torch.as_tensor(expected))
    with pytest.raises(ValueError, match="heads, attention and head_dims must have the same"):
        ops.structure_size(heads, attention[:1], neurons, ffn, hidden, dims)


def test_size_of_open_masks_is_that_of_the_model():
    model = encoder()
    cofi = hw.pruning.CoFi(model, 0.5)
    ones = cofi._each(lambda p, _: torch.ones_like(p))
    assert float(cofi._size_of(ones)) == hw.pruning.structure(model).size
    assert hw.pruning.structure(model).size == 2 * (4 * EMBED**2 + 2 * EMBED * 32)


def test_probability_of_an_open_mask():
    logit = torch.tensor([0.3])
    assert ops.hard_concrete_open(logit, BETA, GAMMA, ZETA).item() == pytest.approx(
        1 / (1 + math.exp(-(0.3 + 1.5986))), abs=1e-4
    )
    cofi = hw.pruning.CoFi(encoder(), 0.5, init_neurons=10.0)  # logits at 4.605
    assert cofi.expected_keep().item() > 0.98


def test_penalty_and_its_ascent():
    size = torch.tensor(30.0, requires_grad=True)
    multipliers = torch.tensor([2.0, 3.0], requires_grad=True)
    off = 1 - 0.3 - 0.5 * 0.25  # half of the warm-up
    loss = ops.sparsity_penalty(size, 100.0, torch.tensor(0.1), 0.25, 0.2, multipliers)
    assert loss.item() == pytest.approx(2 * off + 3 * off**2)
    loss.backward()
    assert size.grad.item() == pytest.approx(-(2 + 6 * off) / 100)
    torch.testing.assert_close(multipliers.grad, -torch.tensor([off, off**2]))
    whole = ops.sparsity_penalty(size, 100.0, torch.tensor(0.0), 0.25, 0.0, multipliers)
    assert whole.item() == pytest.approx(2 * 0.45 + 3 * 0.45**2)


def released_masks(logits):
    """The masks in evaluation of the authors' code: of one group ``[N]``, or of one block ``[1]``.

    A mask is 0 for the round(N - sum P(open)) smallest, P(open) = 1 - Q(0), and sigmoid(0.8 a /
    beta) for the others (their l0_module.py).
    """
    open_ = 1 - torch.sigmoid(math.log((0 - GAMMA) / (ZETA - 0)) * BETA - logits)
    soft = torch.sigmoid(logits / BETA * 0.8)
    closed = round(len(logits) - open_.sum().item())
    soft[soft.argsort()[:closed]] = 0.0
    return soft


@pytest.mark.parametrize("spread", [0.5, 2.0, 4.0])
def test_masks_of_evaluation_are_those_of_the_released_code(spread):
    torch.manual_seed(0)
    logits = (torch.randn(5, 40, dtype=torch.float64) - 0.5) * spread
    found = ops.hard_concrete_keep(logits, BETA, GAMMA, ZETA)
    torch.testing.assert_close(found, torch.stack([released_masks(row) for row in logits]))
    each = ops.hard_concrete_keep(logits[0, :, None], BETA, GAMMA, ZETA)[:, 0]
    torch.testing.assert_close(each, torch.cat([released_masks(a[None]) for a in logits[0]]))
    shifted = ops.hard_concrete_keep(logits, BETA, GAMMA, ZETA, 1.0)  # more units, values as before
    assert ((shifted != 0).sum(1) > (found != 0).sum(1)).all()
    torch.testing.assert_close(shifted[found != 0], found[found != 0])


def test_how_many_masks_close():
    low = ops.hard_concrete_keep(torch.full((20,), -2.5), BETA, GAMMA, ZETA)
    # P(open) is 0.289 each, so 14 close: the last ones, since all are alike.
    assert low[:6].tolist() == pytest.approx([1 / (1 + math.exp(3))] * 6) and not low[6:].any()
    assert not ops.hard_concrete_keep(torch.tensor([[-1.7]]), BETA, GAMMA, ZETA).any()
    assert ops.hard_concrete_keep(torch.tensor([[-1.5]]), BETA, GAMMA, ZETA).all()
    with pytest.raises(ValueError, match="log_alpha must have at least one dimension"):
        ops.hard_concrete_keep(torch.tensor(1.0), BETA, GAMMA, ZETA)


def test_blocks_open_and_close_each_alone():
    """Twelve layers whose blocks are all a little more likely open than closed: all stay."""
    torch.manual_seed(0)
    cofi = hw.pruning.CoFi(hw.convert(_encoder(12)), 0.9).eval()
    with torch.no_grad():
        for group in ("attention", "ffn"):
            cofi.log_alpha[group][0].fill_(-1.19)
    plan = cofi.plan(tolerance=1.0)
    assert [b.scale for b in plan.blocks] == pytest.approx([1 / (1 + math.exp(1.2 * 1.19))] * 24)
    with torch.no_grad():
        cofi.log_alpha["ffn"][0][3] = -1.7
    assert [b.name for b in cofi.plan(tolerance=1.0).blocks if b.scale == 0] == ["layers.3.linear1"]


def test_masks_start_where_the_released_code_starts_them():
    cofi = hw.pruning.CoFi(encoder(), 0.9)
    for group, logits in cofi.log_alpha.items():
        every = torch.cat([p.detach() for p in logits])
        if group == "neurons":  # ln(1 - 0.5) - ln(0.5), std 0.01
            assert every.abs().max() < 0.06 and every.std() > 0.005
        else:
            assert (every == torch.tensor(4.605)).all()


def released_layer(x, layer, z, heads):
    """A post-norm layer under masks, as the authors' modeling_bert.py computes it.

    ``z``: masks of the ``heads``, of the ``attention`` block, ``neurons``, ``ffn`` and ``hidden``.
    """

    def finish(y, block, norm):
        y = y * block
        if y.sum() == 0:  # the block is dropped, and its norm with it
            return x + y
        kept = z["hidden"].nonzero()[:, 0]
        summed = (y * z["hidden"] + x)[..., kept]
        out = (y * z["hidden"] + x).clone()
        out[..., kept] = F.layer_norm(
            summed, [len(kept)], norm.weight[kept], norm.bias[kept], norm.eps
        )
        return out * z["hidden"]

    attention = layer.self_attn
    parts = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, -1)
    q, k, v = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts)  # [B, H, L, d]
    context = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1) @ v * z["heads"][:, None, None]
    y = attention.out_proj(context.transpose(1, 2).flatten(2))
    x = finish(y, z["attention"], layer.norm1)
    return finish(layer.linear2(F.relu(layer.linear1(x)) * z["neurons"]), z["ffn"], layer.norm2)


@pytest.mark.parametrize("dropped", [(), ("attention",), ("ffn",), ("attention", "ffn")])
def test_forward_under_masks_is_that_of_the_released_code(dropped):
    torch.manual_seed(0)
    plain = _encoder(2, activation="relu")
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    cofi = hw.pruning.CoFi(hw.convert(copy.deepcopy(plain)), 0.9).eval()
    with torch.no_grad():
        for logits in cofi.mask_parameters():
            logits.normal_(0.0, 2.0)
        for group in ("attention", "ffn"):
            cofi.log_alpha[group][0][:] = torch.tensor([2.0, -3.0 if group in dropped else 3.0])
    plan = cofi.plan(tolerance=1.0)
    hidden = released_masks(cofi.log_alpha["hidden"][0].detach())
    x = torch.randn(3, 5, EMBED)
    expected = x * hidden
    for i, layer in enumerate(plain.layers):
        z = {g: released_masks(cofi.log_alpha[g][i].detach()) for g in ("heads", "neurons")}
        z |= {
            g: released_masks(cofi.log_alpha[g][0][i : i + 1].detach())[0]
            for g in ("attention", "ffn")
        }
        expected = released_layer(expected, layer, z | {"hidden": hidden}, HEADS)
    with torch.no_grad():
        torch.testing.assert_close(cofi(x), expected, rtol=1e-4, atol=1e-5)
        small = cofi.compact(tolerance=1.0)
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
    assert {b.name for b in plan.blocks if b.scale == 0} == {
        {"attention": "layers.1.self_attn", "ffn": "layers.1.linear1"}[name] for name in dropped
    }


def test_the_hidden_mask_multiplies_embeddings_before_their_norm():
    model = hw.convert(classifier().eval())
    cofi = hw.pruning.CoFi(model, 0.9).eval()
    with torch.no_grad():
        cofi.log_alpha["hidden"][0].normal_(0.0, 2.0)
    z = released_masks(cofi.log_alpha["hidden"][0].detach())
    kept = z.nonzero()[:, 0]
    seen = {}
    embeddings = cofi.model.bert.embeddings
    embeddings.register_forward_hook(lambda m, a, y: seen.update(output=y))
    embeddings.LayerNorm.register_forward_pre_hook(lambda m, a: seen.update(summed=a[0]))
    with torch.no_grad():
        cofi(**bert_inputs())
    norm = embeddings.LayerNorm
    expected = torch.zeros_like(seen["summed"])
    expected[..., kept] = z[kept] * F.layer_norm(
        (seen["summed"] * z)[..., kept], [len(kept)], norm.weight[kept], norm.bias[kept], norm.eps
    )
    torch.testing.assert_close(seen["output"], expected)


def test_the_layer_loss_is_the_sum_over_four_layers():
    """MSE of the teacher's layers 2, 5, 8 and 11 to the student's nearest layers, in order."""
    teacher = encoder(12)
    cofi = hw.pruning.CoFi(copy.deepcopy(teacher), 0.9, teacher=teacher, init_log_alpha=1.0)
    outputs = {0: [], 1: []}
    for which, model in enumerate((cofi.model, teacher)):
        for layer in model.layers:
            layer.register_forward_hook(lambda m, a, y, which=which: outputs[which].append(y))
    with torch.no_grad():
        cofi.transform.bias.normal_()
    torch.manual_seed(2)
    cofi.train()(torch.randn(2, 4, EMBED))
    mapped = [cofi.transform(y) for y in outputs[0]]
    distances = torch.stack(
        [torch.stack([F.mse_loss(own, outputs[1][i]) for own in mapped]) for i in (2, 5, 8, 11)]
    )
    alive = [i for i in range(12) if cofi._masks.blocks[f"layers.{i}.linear1"] != 0]
    expected, last = 0.0, 11
    for row in distances.flip(0):
        last = min((i for i in alive if i <= last), key=lambda i: row[i].item())
        expected += row[last]
    torch.testing.assert_close(cofi.layer_loss(), expected)
    cofi = hw.pruning.CoFi(encoder(3), 0.9, teacher=encoder(3), teacher_layers=[2])
    x = torch.randn(2, 4, EMBED)
    cofi.train()(x)
    with torch.no_grad():
        nearest = min(F.mse_loss(y, encoder(3).eval()(x)).item() for y in cofi._outputs[0].values)
    assert cofi.layer_loss().item() == pytest.approx(nearest, rel=1e-5)


def test_layers_are_matched_in_order():
    distances = torch.tensor([[0.1, 0.5, 0.9], [0.9, 0.2, 0.4], [0.3, 0.1, 0.6]])
    every = torch.ones(3, dtype=torch.bool)
    # From the last down: 1 is nearest to the last, so the others may not lie above it.
    assert ops.match_layers(distances, every).tolist() == [0, 1, 1]
    assert ops.match_layers(distances, torch.tensor([True, False, True])).tolist() == [0, 0, 0]
    assert ops.match_layers(distances, ~every).tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match=r"distances must have shape \[T, S\] and alive \[S\]"):
        ops.match_layers(distances, every[:2])


def test_distillation_loss_is_the_divergence():
    student, teacher = torch.randn(2, 4, 3)
    expected = 4 * F.kl_div(
        F.log_softmax(student / 2, -1), F.softmax(teacher / 2, -1), reduction="batchmean"
    )
    torch.testing.assert_close(ops.distillation_loss(student, teacher, 2.0), expected)


def train(cofi, loss, steps, lr=1e-3):
    optimiser = torch.optim.Adam(cofi.parameter_groups(lr, mask_lr=0.2, multiplier_lr=0.6))
    cofi.train()
    for step in range(steps):
        cofi.anneal(step / (steps - 1))
        total = loss() + cofi.penalty()
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    return cofi.eval()


@pytest.mark.parametrize("keep", [0.7, 0.4, 0.2])
def test_training_reaches_the_share_and_compaction_keeps_what_was_computed(keep):
    torch.manual_seed(3)
    teacher = encoder()
    starts = {"init_log_alpha": 2.0, "init_neurons": 2.0}
    cofi = hw.pruning.CoFi(copy.deepcopy(teacher), keep, teacher=teacher, warmup=0.7, **starts)
    x = torch.randn(8, 6, EMBED)
    with torch.no_grad():
        wanted = teacher(x)
    train(cofi, lambda: (cofi(x) - wanted).square().mean() + cofi.layer_loss(), 150)
    assert cofi.expected_keep().item() == pytest.approx(keep, abs=0.05)
    plan = cofi.plan()
    assert plan.metadata["kept"] == pytest.approx(keep, abs=0.01)
    small = cofi.compact()
    with torch.no_grad():
        torch.testing.assert_close(small(x), cofi(x), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in teacher.parameters())
    kept = hw.pruning.structure(small).size / hw.pruning.structure(teacher).size
    assert kept == pytest.approx(plan.metadata["kept"])
    masked = hw.mask(copy.deepcopy(teacher), plan)
    assert type(masked(x)) is torch.Tensor


def test_five_grains_of_bert_are_compacted_and_saved(tmp_path):
    model = classifier()
    cofi = hw.pruning.CoFi(hw.convert(model), 0.3)
    torch.manual_seed(1)
    with torch.no_grad():
        for group, logits in cofi.log_alpha.items():
            for parameter in logits:
                parameter.normal_(2.0 if group in ("attention", "ffn") else 0.0, 3.0)
        cofi.log_alpha["attention"][0][0] = -4.0  # one block of each kind is removed
        cofi.log_alpha["ffn"][0][1] = -4.0
        cofi.log_alpha["attention"][0][1] = 4.0
        cofi.log_alpha["ffn"][0][0] = 4.0
    cofi.eval()
    small = cofi.compact()
    inputs = bert_inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            small(**inputs).logits, cofi(**inputs).logits, rtol=1e-5, atol=1e-5
        )
    plan = cofi.plan()
    assert plan.metadata["kept"] == pytest.approx(0.3, abs=0.01)
    assert plan.hidden is not None and len(plan.hidden.dimensions) < EMBED
    sizes = hw.pruning.structure(small)
    assert sizes.size == pytest.approx(
        0.3 * hw.pruning.structure(hw.convert(classifier())).size, rel=0.04
    )
    hw.save(small, tmp_path / "small")
    with torch.no_grad():
        loaded = hw.load(tmp_path / "small")(**inputs).logits
        assert torch.equal(loaded, small(**inputs).logits)


def test_what_does_nothing_is_pruned():
    """Two heads and half the neurons of each layer write next to nothing to the stream."""
    model = encoder()
    size = EMBED // HEADS
    with torch.no_grad():
        for layer in model.layers:
            layer.self_attn.out_proj.weight[:, size : 3 * size] *= 1e-3
            layer.linear2.weight[:, ::2] *= 1e-3
    teacher = copy.deepcopy(model)
    torch.manual_seed(0)
    grains = {"attention_blocks": False, "ffn_blocks": False, "hidden": False}
    cofi = hw.pruning.CoFi(model, 0.5, init_log_alpha=2.0, init_neurons=2.0, warmup=0.7, **grains)
    x = torch.randn(32, 6, EMBED)
    with torch.no_grad():
        wanted = teacher(x)
    train(cofi, lambda: 10 * (cofi(x) - wanted).square().mean(), 150, lr=0.0)
    plan = cofi.plan()
    assert [entry.heads for entry in plan.heads.layers] == [[0, 3], [0, 3]]
    odd = sum(n % 2 for entry in plan.ffn for n in entry.neurons)
    assert odd >= 0.9 * plan.neurons_kept
    assert torch.nn.functional.mse_loss(cofi.compact()(x), wanted) < 0.02


def test_an_interrupted_training_goes_on_from_its_state():
    torch.manual_seed(0)
    x = torch.randn(8, 5, EMBED)

    def begin():
        cofi = hw.pruning.CoFi(encoder(), 0.5, teacher=encoder(), init_log_alpha=2.0)
        return cofi, torch.optim.Adam(cofi.parameter_groups(1e-3, 0.2))

    def steps(cofi, optimiser, which):
        for step in which:
            torch.manual_seed(step)
            cofi.train().anneal(step / 11)
            loss = cofi(x).square().mean() + cofi.layer_loss() + cofi.penalty()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    whole, optimiser = begin()
    steps(whole, optimiser, range(12))
    first, optimiser = begin()
    steps(first, optimiser, range(5))
    kept = copy.deepcopy([first.state_dict(), optimiser.state_dict()])
    second, optimiser = begin()
    second.load_state_dict(kept[0])
    optimiser.load_state_dict(kept[1])
    steps(second, optimiser, range(5, 12))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0)
    assert second.eval().plan() == whole.eval().plan()


def test_a_share_that_the_blocks_leave_out_of_reach_is_told():
    cofi = hw.pruning.CoFi(encoder(), 0.75).eval()
    with torch.no_grad():
        cofi.log_alpha["attention"][0].fill_(-4.6)
    share = 2 * 32 / (4 * EMBED + 2 * 32)  # of the networks: attention is removed
    text = f"the plan keeps {share:.4f} of the weights, the nearest to keep=0.75 that the blocks wh"
    with pytest.warns(UserWarning, match=text):
        plan = cofi.plan()
    assert plan.metadata["kept"] == pytest.approx(share)


def test_masks_start_from_a_ranking():
    cofi = hw.pruning.CoFi(encoder(), 0.5, init_log_alpha=1.0, init_neurons=0.5)
    before = cofi.log_alpha["hidden"][0].clone()
    torch.manual_seed(0)
    found = hw.pruning.structure(cofi.model)
    scores = {name: torch.rand(n) for name, n in {**found.heads, **found.neurons}.items()}
    cofi.start(scores, sharpness=4.0)
    for group, sizes in (("heads", found.heads), ("neurons", found.neurons)):
        every = torch.cat([scores[name] for name in sizes])
        logits = torch.cat([p.detach() for p in cofi.log_alpha[group]])
        assert torch.equal(logits.argsort(), every.argsort())
        reach = 4.0 * (0.5 - 0.5 / len(every))  # ranks are the middles of equal parts of [0, 1]
        middle = 1.0 if group == "heads" else 0.5
        assert logits.min().item() == pytest.approx(middle - reach)
        assert logits.max().item() == pytest.approx(middle + reach)
    assert torch.equal(cofi.log_alpha["hidden"][0], before)
    name = next(iter(found.heads))
    for wrong, message in (
        ({}, f"importance must have scores for '{name}'"),
        ({**scores, name: torch.ones(2)}, f"importance of '{name}' must have 4 scores, got shape"),
        ({**scores, name: torch.full((4,), math.nan)}, f"importance of '{name}' must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            cofi.start(wrong)
    with pytest.raises(ValueError, match="sharpness must be finite and not negative, got -1"):
        cofi.start(scores, sharpness=-1)


def test_gradients_reach_every_mask():
    cofi = hw.pruning.CoFi(hw.convert(classifier()), 0.5, init_log_alpha=0.0)
    torch.manual_seed(0)
    for _ in range(6):  # samples may be 0 or 1, where the gradient is 0
        cofi(**bert_inputs()).logits.square().sum().backward()
    for group, logits in cofi.log_alpha.items():
        for parameter in logits:
            assert parameter.grad.abs().sum() > 0, group


def test_a_teacher_is_left_alone_and_layers_that_went_are_not_matched():
    teacher = encoder(3)
    cofi = hw.pruning.CoFi(copy.deepcopy(teacher), 0.7, teacher=teacher, init_log_alpha=4.0)
    assert not any(name.startswith("_teacher") for name in cofi.state_dict())
    with pytest.raises(RuntimeError, match="layer_loss needs a teacher and a forward in training"):
        cofi.layer_loss()
    with torch.no_grad():
        cofi.log_alpha["ffn"][0][:] = torch.tensor([-4.6, -4.6, 4.6])
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    torch.manual_seed(2)
    cofi.train()(torch.randn(2, 4, EMBED))
    cofi.layer_loss().backward()
    assert cofi.transform.weight.grad.abs().sum() > 0
    assert all(torch.equal(before[n], p) for n, p in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    copied = copy.deepcopy(cofi.eval())
    x = torch.randn(2, 4, EMBED)
    assert torch.equal(copied(x), cofi(x))


def test_refusals():
    with pytest.raises(ValueError, match=r"keep=1e-05 cannot be reached: .* nearest is keep="):
        hw.pruning.CoFi(encoder(), 1e-5)
    heads = {"neurons": False, "ffn_blocks": False, "attention_blocks": False, "hidden": False}
    with pytest.raises(ValueError, match=r"keep=0.3 cannot be reached: .* keep=0\.4283"):
        hw.pruning.CoFi(encoder(), 0.3, **heads)
    with pytest.raises(ValueError, match="at least one of the masks must be on"):
        hw.pruning.CoFi(encoder(), 0.9, heads=False, **heads)
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got 0.0"):
        hw.pruning.CoFi(encoder(), 0.0)
    with pytest.raises(ValueError, match="hidden dimensions of model cannot be pruned: "):
        hw.pruning.CoFi(nn.MultiheadAttention(EMBED, HEADS), 0.9, hidden=True)
    with pytest.raises(ValueError, match="has a RandomGate: remove it first"):
        hw.pruning.CoFi(hw.convert(bert("BertModel"), hw.RandomGate()), 0.9)
    masked = hw.convert(bert("BertModel"))
    hw.mask(masked, random_plan(masked))
    with pytest.raises(ValueError, match="model must not have a structure plan as a mask"):
        hw.pruning.CoFi(masked, 0.9)
    with pytest.raises(ValueError, match="teacher has no layer 'layers.2', which model has"):
        hw.pruning.CoFi(encoder(3), 0.9, teacher=encoder(2))
    with pytest.raises(ValueError, match=r"teacher_layers must be between 0 and 1, got \[2\]"):
        hw.pruning.CoFi(encoder(), 0.9, teacher=encoder(), teacher_layers=[2])
    with pytest.raises(ValueError, match="init_neurons must be finite, got inf"):
        hw.pruning.CoFi(encoder(), 0.9, init_neurons=math.inf)
    cofi = hw.pruning.CoFi(encoder(), 0.9)
    with pytest.raises(ValueError, match="progress must be between 0 and 1, got 2.0"):
        cofi.anneal(2.0)
    with torch.no_grad():
        cofi.log_alpha["hidden"][0][0] = float("nan")
    with pytest.raises(ValueError, match="logits of the masks must be finite, got NaN or infin"):
        cofi(torch.randn(1, 2, EMBED))
