"""Banks: plans picked by the input, against the plain formula, and against separate models."""

import copy

import headwise as hw
import pytest
import torch
from headwise.gates.bank import router_features
from headwise.pruning.bank import k_means
from support.architectures import ARCHITECTURES, EMBED, HEADS, bert, bert_inputs, padding_mask


def tiny_bert(seed=0, **kwargs):
    torch.manual_seed(seed)
    return hw.convert(bert("BertForSequenceClassification", num_labels=3, **kwargs))


def two_kinds(count=6, seed=1):
    """Batches of inputs of two kinds, which have no token in common, and the kind of each input."""
    torch.manual_seed(seed)
    batches, kinds = [], []
    for _ in range(count):
        batch, kind = bert_inputs(), torch.randint(2, (3,))
        batch["input_ids"] = batch["input_ids"] % 25 + 25 * kind[:, None]
        batches.append(batch)
        kinds.append(kind)
    return batches, torch.cat(kinds)


def loss_of(model, batch):
    return model(**batch).logits.square().sum(1)  # [B]


def score(model, batches):
    return hw.score_heads(model, batches, loss_of)["michel"]


def fitted(model, batches, keep=0.5, plans=2, **kwargs):
    plans = None if "clusters" in kwargs else plans
    return hw.pruning.fit_bank(model, batches, score, keep, plans, **kwargs)


def logits_of(model, batches):
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches])


def set_plans(model, plans, at=0, seed=0):
    """A bank with random projections and a random router, of ``plans``: heads of each layer."""
    torch.manual_seed(seed)
    for layer in hw.attention_layers(model).values():
        layer.set_gate(hw.gates.BankGate(plans, at=at, features=["mean", "first", "max"]))
        layer.gate.train(layer.training)
        for parameter in layer.gate.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        weight = torch.randn_like(layer.gate.router_weight)
        layer.gate.set_router(weight, torch.randn(len(plans)))
    return hw.link_gates(model)


def plain_bank_attention(layer, x, padding, plans):
    """[B, L, D]: every head of every sequence, those of its plan, its plan's projection."""
    gate, d = layer.gate, layer.head_dim
    q, k, v = torch.nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    rows = []
    for b, plan in enumerate(plans.tolist()):
        heads = []
        for head in gate.plans[plan]:
            own = slice(head * d, (head + 1) * d)
            scores = q[b, :, own] @ k[b, :, own].T / d**0.5
            if padding is not None:
                scores = scores.masked_fill(padding[b], -torch.inf)
            heads.append(scores.softmax(-1) @ v[b, :, own])
        context = torch.cat(heads, -1) if heads else x.new_zeros(x.size(1), 0)
        rows.append(context @ gate.weights[plan].T + gate.biases[plan])
    return torch.stack(rows)


PLANS = [[0, 2], [1, 2, 3], []]


@pytest.mark.parametrize("mode", ["packed", "with gradients", "training", "probed"])
def test_bank_computes_the_formula(mode):
    torch.manual_seed(0)
    layer = hw.MultiheadAttention(EMBED, HEADS, batch_first=True)
    set_plans(layer, PLANS)
    layer.train(mode == "training")
    x, padding = torch.randn(9, 7, EMBED), padding_mask([7, 2, 5, 1, 7, 3, 6, 4, 2])
    plans = layer.gate.scores(x, padding).argmax(1)
    assert len(plans.unique()) == 3
    if mode == "probed":
        layer._probe = lambda *args: None
    with torch.set_grad_enabled(mode in ("with gradients", "training")):
        y, weights = layer(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    expected = plain_bank_attention(layer, x, padding, plans)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    ran = weights.sum((2, 3)) > 0  # [B, H]
    for b, plan in enumerate(plans.tolist()):
        assert ran[b].nonzero()[:, 0].tolist() == PLANS[plan]
    if y.requires_grad:
        own = torch.autograd.grad(y.square().sum(), list(layer.parameters()), allow_unused=True)
        plain = torch.autograd.grad(
            expected.square().sum(), list(layer.parameters()), allow_unused=True
        )
        for a, b in zip(own, plain, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(
                zero if a is None else a, zero if b is None else b, rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"kdim": 5, "vdim": 6},
        {"head_dim": 3},
        {"add_zero_attn": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("plans", [PLANS, [[], []], [[0, 1, 2, 3], [0, 1, 2, 3], [1]]])
def test_mixed_batches_equal_every_head_masked(options, plans):
    torch.manual_seed(0)
    layer = hw.MultiheadAttention(EMBED, HEADS, batch_first=True, **options)
    set_plans(layer, plans).eval()
    dtype = layer.out_proj.weight.dtype
    x, memory = torch.randn(7, 5, EMBED, dtype=dtype), torch.randn(7, 6, EMBED, dtype=dtype)
    key, value = x, x
    if "kdim" in options:
        key, value = memory[..., :5], memory[..., :6]
    mask = torch.rand(7 * HEADS, 5, key.size(1)) < 0.2
    mask[..., 0] = False
    call = {"attn_mask": mask, "need_weights": False}
    layer.gate.forced = torch.arange(7) % len(plans)
    with torch.no_grad():
        y, _ = layer(x, key, value, **call)
    masked, _ = layer(x, key, value, **call)  # gradients may flow: every head is computed
    rtol, atol = (5e-2, 5e-2) if dtype == torch.bfloat16 else (1e-4, 1e-5)
    torch.testing.assert_close(y, masked.detach(), rtol=rtol, atol=atol)
    rest = layer.gate.biases if not any(plans) else ()
    for row, plan in zip(y, layer.gate.forced, strict=True):
        if len(rest):
            assert torch.equal(row, rest[plan].expand_as(row))


def test_router_features_leave_padding_out():
    x, padding = torch.randn(3, 5, 4), padding_mask([5, 2, 4])
    left = torch.stack([row.roll(int(p.sum()), 0) for row, p in zip(x, padding, strict=True)])
    found = router_features(x, padding, ("mean", "first", "max"))
    for b, length in enumerate([5, 2, 4]):
        own = x[b, :length]
        expected = torch.cat([own.mean(0), own[0], own.amax(0)])
        torch.testing.assert_close(found[b], expected)
    torch.testing.assert_close(
        router_features(left, padding.flip(1), ("mean", "first", "max")), found
    )
    floating = torch.zeros(3, 5).masked_fill(padding, -torch.inf)
    assert torch.equal(router_features(x, floating, ("max",)), found[:, 8:])


def test_weights_are_packed_once_and_again_when_they_change():
    torch.manual_seed(0)
    layer = set_plans(hw.MultiheadAttention(EMBED, HEADS, batch_first=True), PLANS).eval()
    x = torch.randn(6, 4, EMBED)
    with torch.no_grad():
        layer(x, x, x)
        first = {plan: held.layer for plan, held in layer.gate._packed.items()}
        layer(x, x, x)
        assert all(layer.gate._packed[plan].layer is held for plan, held in first.items())
        for change in (layer.in_proj_weight, *layer.gate.weights, *layer.gate.biases):
            change.mul_(2.0)
            plans = layer.gate.scores(x).argmax(1)
            y, _ = layer(x, x, x)
            torch.testing.assert_close(
                y, plain_bank_attention(layer, x, None, plans), rtol=1e-4, atol=1e-5
            )
    copied = copy.deepcopy(layer)
    assert copied.gate._packed is None
    with torch.no_grad():
        assert torch.equal(copied(x, x, x)[0], y)


def test_one_plan_is_static_pruning():
    dense, (batches, _) = tiny_bert(), two_kinds()
    bank = fitted(dense, batches, plans=1)
    small = hw.prune(dense, hw.plan(score(dense, batches), keep=0.5), repair=batches)
    torch.testing.assert_close(logits_of(bank.model, batches), logits_of(small, batches))
    assert bank.routed == 1.0 and len(bank.plans) == 1 and bank.clusters.unique().tolist() == [0]


@pytest.mark.parametrize("router", ["centroid", "softmax"])
def test_each_input_follows_the_plan_of_its_cluster(router):
    dense, (batches, kinds) = tiny_bert(num_hidden_layers=3), two_kinds(40)
    bank = fitted(dense, batches, clusters=kinds, at=1, router=router, names=["low", "high"])
    assert bank.routed > 0.8 and torch.equal(bank.clusters, kinds)
    for kind, typical in enumerate(bank.typical):
        assert len(typical) == len(set(typical)) == 5 and kinds[typical].unique().tolist() == [kind]
    layers = hw.attention_layers(bank.model)
    heads = [sum(len(layer.gate.plans[m]) for layer in layers.values()) for m in (0, 1)]
    assert heads == [6, 6] == [own.heads_kept for own in bank.plans]
    first, *rest = layers.values()
    assert first.gate.plans[0] == first.gate.plans[1]  # it runs before the decision
    torch.testing.assert_close(first.gate.weights[0], first.gate.weights[1])
    choices = [c for batch in batches for c in hw.pruning.plan_choices(bank.model, batch)]
    for choice in choices:
        assert choice.name == ["low", "high"][choice.plan] and choice.next_plan == 1 - choice.plan
        assert choice.margin >= 0.0
        assert list(choice.heads) == list(layers)
    # The router was fitted to what the layers before it write now that they are pruned.
    own = torch.tensor([choice.plan for choice in choices]) == kinds
    assert own.double().mean().item() == bank.routed
    # Every input alone, every plan forced: the same outputs as in the mixed batches.
    plans = torch.tensor([choice.plan for choice in choices])
    expected = logits_of(bank.model, batches)
    rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(3)]
    torch.testing.assert_close(logits_of(bank.model, rows), expected, rtol=1e-4, atol=1e-5)
    with hw.pruning.following(bank.model, 1 - plans[:3]):
        other = logits_of(bank.model, batches[:1])
    assert not torch.allclose(other, expected[:3])
    assert torch.equal(logits_of(bank.model, batches), expected)  # the router decides again


def test_the_router_is_fitted_anew_after_training():
    dense, (batches, kinds) = tiny_bert(num_hidden_layers=3), two_kinds(12)
    model = fitted(dense, batches, clusters=kinds, at=1, router="softmax").model
    first = next(iter(hw.attention_layers(model).values()))
    with torch.no_grad():  # as training might: the layer before the router writes something else
        for weight in first.gate.weights:
            weight.copy_(-3 * weight + 0.3)
    routed = hw.pruning.refit_router(model, batches, kinds)
    choices = [c.plan for batch in batches for c in hw.pruning.plan_choices(model, batch)]
    assert routed > 0.8 and routed == (torch.tensor(choices) == kinds).double().mean().item()
    with pytest.raises(ValueError, match="batches must not be empty"):
        hw.pruning.refit_router(model, [], kinds)
    with pytest.raises(ValueError, match="clusters must have inputs of each of the 2 plans"):
        hw.pruning.refit_router(model, batches, torch.zeros_like(kinds))
    with pytest.raises(ValueError, match="has no bank: call headwise.pruning.fit_bank"):
        hw.pruning.refit_router(dense, batches, kinds)


def test_the_trace_shows_the_plans_heads():
    dense, (batches, kinds) = tiny_bert(), two_kinds()
    model = fitted(dense, batches, clusters=kinds).model
    with hw.trace(model) as trace, torch.no_grad():
        model(**batches[0])
    choices = hw.pruning.plan_choices(model, batches[0])
    for name, selection in trace.selections.items():
        for b, choice in enumerate(choices):
            assert selection.index[b, : selection.count[b]].tolist() == choice.heads[name]


def test_banks_are_saved_and_loaded(tmp_path):
    dense, (batches, kinds) = tiny_bert(), two_kinds()
    model = fitted(dense, batches, clusters=kinds, features=["mean", "max"], names=["a", "b"]).model
    hw.save(model, tmp_path / "bank")
    loaded = hw.load(tmp_path / "bank")
    assert torch.equal(logits_of(loaded, batches), logits_of(model, batches))
    assert hw.pruning.plan_choices(loaded, batches[0]) == hw.pruning.plan_choices(model, batches[0])


def test_a_repaired_bank_is_nearer_to_the_dense_model():
    dense, (batches, kinds) = tiny_bert(num_hidden_layers=3), two_kinds(20)
    expected = logits_of(dense, batches)

    def distance(**kwargs):
        model = fitted(dense, batches, clusters=kinds, **kwargs).model
        return (logits_of(model, batches) - expected).square().sum()

    assert distance() < 0.7 * distance(repaired=False)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "TransformerEncoder", "GPT2LMHeadModel"])
def test_banks_of_other_architectures(name):
    torch.manual_seed(0)
    row = ARCHITECTURES[name]
    dense = hw.convert(row.build())
    batches = [row.inputs() for _ in range(4)]
    extra = {} if name == "TransformerEncoder" else {"use_cache": False}
    batches = [{**batch, **extra} for batch in batches]
    bank = hw.pruning.fit_bank(
        dense,
        batches,
        lambda model, own: hw.HeadScores(
            "size", {n: torch.rand(m.num_heads) for n, m in hw.attention_layers(model).items()}
        ),
        0.5,
        2,
        at=0,
        forward_fn=row.run,
    )
    packed = row.run(bank.model, batches[0])
    for layer in hw.attention_layers(bank.model).values():
        layer._probe = lambda *args: None  # every head, and the plain formula
    with torch.no_grad():
        torch.testing.assert_close(row.run(bank.model, batches[0]), packed, rtol=1e-3, atol=1e-4)


def test_a_decoder_keeps_the_plan_that_the_prompt_chose():
    torch.manual_seed(0)
    layer = hw.GroupedQueryAttention(EMBED, HEADS, 2).eval()
    set_plans(layer, [[0, 2], [1, 2, 3]])
    followed = set()
    for _ in range(8):
        x, cache = torch.randn(1, 9, EMBED), hw.KeyValueCache()
        plan = layer.gate.scores(x[:, :6]).argmax(1)
        with torch.no_grad():
            steps = [layer(x[:, :6], cache=cache)[0]]
            steps += [layer(x[:, i : i + 1], cache=cache)[0] for i in range(6, 9)]
            with hw.pruning.following(layer, plan):
                whole, _ = layer(x)
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
        followed.add(plan.item())
    assert followed == {0, 1}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("plans", [[[0, 2], [1, 2, 3]], [[0, 1], [3]], [[0], [], [1, 2, 3]]])
def test_sequences_of_several_plans_decode_together(groups, grad, plans):
    torch.manual_seed(0)
    layer = hw.GroupedQueryAttention(EMBED, HEADS, groups).eval()
    set_plans(layer, plans)
    x, cache = torch.randn(6, 9, EMBED), hw.KeyValueCache()
    padding = torch.zeros(6, 9, dtype=torch.bool)
    padding[1, :3] = padding[4, :1] = True  # on the left
    plan = torch.arange(6) % len(plans)
    with torch.set_grad_enabled(grad), hw.pruning.following(layer, plan):
        steps = [layer(x[:, :6], key_padding_mask=padding[:, :6], cache=cache)[0]]
    with torch.set_grad_enabled(grad):  # later steps keep the plans
        for i in range(6, 9):
            step, weights = layer(
                x[:, i : i + 1],
                key_padding_mask=padding[:, : i + 1],
                cache=cache,
                need_weights=i == 8,
            )
            steps.append(step)
    found = torch.cat(steps, 1)
    for row in range(6):
        with torch.no_grad(), hw.pruning.following(layer, plan[row : row + 1]):
            alone, maps = layer(
                x[row : row + 1], key_padding_mask=padding[row : row + 1], need_weights=True
            )
        valid = ~padding[row]
        torch.testing.assert_close(found[row, valid], alone[0, valid], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[row], maps[0, :, -1:], rtol=1e-4, atol=1e-5)
    # One of them goes on alone as it began.
    cache.select_rows(torch.tensor([1]))
    with torch.no_grad():
        step, _ = layer(
            x[1:2, :1], cache=cache, key_padding_mask=torch.cat([padding[1:2], padding[:1, :1]], 1)
        )
        with hw.pruning.following(layer, plan[1:2]):
            whole, _ = layer(
                torch.cat([x[1:2], x[1:2, :1]], 1),
                key_padding_mask=torch.cat([padding[1:2], padding[:1, :1]], 1),
            )
    torch.testing.assert_close(step, whole[:, -1:], rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_stores_the_heads_that_some_plan_reads():
    torch.manual_seed(0)
    layer = hw.GroupedQueryAttention(EMBED, HEADS, 4).eval()
    set_plans(layer, [[0], [2, 3]])
    x, cache = torch.randn(3, 5, EMBED), hw.KeyValueCache()
    with torch.no_grad(), hw.pruning.following(layer, torch.tensor([0, 1, 0])):
        layer(x, cache=cache)
    assert cache.k.size(1) == 2  # as many as the plan that reads the most


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_prompts_of_several_plans_generate_as_they_do_alone(name, options):
    torch.manual_seed(0)
    dense = hw.convert(ARCHITECTURES[name].build()).eval()
    prompts = torch.randint(1, 50, (12, 6))
    kinds = torch.arange(12) % 2
    prompts[kinds == 1, :] %= 9
    bank = hw.pruning.fit_bank(
        dense,
        [{"input_ids": prompts, "use_cache": False}],
        lambda model, own: hw.HeadScores(
            "size", {n: torch.rand(m.num_heads) for n, m in hw.attention_layers(model).items()}
        ),
        0.5,
        clusters=kinds,
        at=0,
        router="softmax",
    ).model

    def generated(ids):
        return bank.generate(
            ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options
        )

    assert len({choice.plan for choice in hw.pruning.plan_choices(
        bank, {"input_ids": prompts[:4], "use_cache": False}
    )}) == 2  # fmt: skip
    together = generated(prompts[:4])
    for row in range(4):
        assert torch.equal(together[row : row + 1], generated(prompts[row : row + 1]))


def test_beams_keep_the_plan_of_their_prompt():
    torch.manual_seed(0)
    layer = hw.GroupedQueryAttention(EMBED, HEADS, 2).eval()
    set_plans(layer, [[0, 2], [1, 2, 3]])
    x, cache, rows = torch.randn(2, 5, EMBED), hw.KeyValueCache(), torch.tensor([1, 0, 1])
    with torch.no_grad(), hw.pruning.following(layer, torch.ones(2, dtype=torch.long)):
        layer(x[:, :4], cache=cache)
    cache.select_rows(rows)
    with torch.no_grad():
        step, _ = layer(x[rows, 4:], cache=cache)
        with hw.pruning.following(layer, torch.ones(3, dtype=torch.long)):
            whole, _ = layer(x[rows])
    torch.testing.assert_close(step, whole[:, 4:], rtol=1e-4, atol=1e-5)


def test_k_means_finds_what_is_apart():
    torch.manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]]).double()
    true = torch.randint(3, (60,))
    x = centres[true] + torch.randn(60, 2).double()
    where, centroids = k_means(x, 3)
    for cluster in range(3):
        assert len(true[where == cluster].unique()) == 1
        torch.testing.assert_close(centroids[cluster], x[where == cluster].mean(0))
    assert torch.equal(k_means(x, 3)[0], where)
    assert k_means(x, 1)[0].unique().tolist() == [0]


def test_banks_say_what_is_wrong():
    dense, (batches, kinds) = tiny_bert(), two_kinds(2)
    with pytest.raises(ValueError, match="batches must not be empty: there is nothing to fit"):
        fitted(dense, [])
    with pytest.raises(ValueError, match="batches must have an input for each of 7 plans, got 6"):
        fitted(dense, batches, plans=7)
    with pytest.raises(ValueError, match="plans must be a positive number, got 0"):
        fitted(dense, batches, plans=0)
    with pytest.raises(ValueError, match="cluster 1 has no members: ask for fewer plans"):
        fitted(dense, batches, clusters=[0, 2, 0, 2, 0, 2])
    with pytest.raises(ValueError, match="plans and clusters must not both be given: there is one"):
        hw.pruning.fit_bank(dense, batches, score, 0.5, 2, clusters=kinds)
    with pytest.raises(ValueError, match="clusters must be a number for each of the 6 inputs"):
        fitted(dense, batches, clusters=[0, 1])
    with pytest.raises(ValueError, match="at must be one of the 2 attention layers, got 2"):
        fitted(dense, batches, at=2)
    with pytest.raises(ValueError, match="router must be 'centroid' or 'softmax', got 'nearest'"):
        fitted(dense, batches, router="nearest")
    with pytest.raises(ValueError, match="features must be some of mean, first, max, got 'last'"):
        fitted(dense, batches, features=["last"])
    with pytest.raises(ValueError, match="has a FixedGate: remove it first"):
        fitted(hw.convert(copy.deepcopy(dense), gate=hw.FixedGate()), batches)
    same = [{key: value[:1].expand(3, -1) for key, value in batches[0].items()}]
    with pytest.raises(ValueError, match="at least 2 inputs that differ where the router reads"):
        fitted(dense, same)
    row = ARCHITECTURES["AlbertModel"]
    with pytest.raises(ValueError, match="layers must run once for each input, and layer"):
        hw.pruning.fit_bank(row.build(), [row.inputs()], score, 0.5, 1, at=0)
    with pytest.raises(ValueError, match="has no bank: call headwise.pruning.fit_bank"):
        hw.pruning.plan_choices(dense, batches[0])
    with pytest.raises(ValueError, match="plans must not be empty"):
        hw.gates.BankGate([])
    with pytest.raises(ValueError, match=r"plans must be ascending heads, got \[2, 1\]"):
        hw.gates.BankGate([[2, 1]])
    with pytest.raises(ValueError, match=r"plans must be of heads in 0\.\.3, got 4"):
        hw.gates.BankGate([[4]]).bind(EMBED, HEADS)
    with pytest.raises(ValueError, match=r"names must have one entry per plan \(1\), got 2"):
        hw.gates.BankGate([[0]], names=["a", "b"])
    bank = fitted(dense, batches, clusters=kinds)
    last = list(hw.attention_layers(bank.model).values())[-1]
    with pytest.raises(RuntimeError, match="follows what layer 1 decided|which has not run"):
        alone = set_plans(tiny_bert(), [[0], [1]], at=0)
        layer = list(hw.attention_layers(alone).values())[-1]
        layer(torch.randn(2, 3, EMBED), *(torch.randn(2, 3, EMBED) for _ in range(2)))
    assert last.gate.at == 1
    with pytest.raises(ValueError, match="projections belong to its own choice"):
        hw.explain(bank.model, {k: v[:1] for k, v in batches[0].items()}, effects=True)
    with pytest.raises(
        ValueError, match="has a BankGate, whose plans have projections of their own"
    ):
        hw.repair(bank.model, batches, dense)
    for small in (hw.prune, hw.pruning.plan_from_gates):
        with pytest.raises(ValueError, match="BankGate"):
            small(bank.model)


def test_projections_of_a_bank_learn_like_the_models_own_weights():
    dense, (batches, kinds) = tiny_bert(), two_kinds()
    model = fitted(dense, batches, clusters=kinds).model
    rates = {
        id(parameter): group["lr"]
        for group in hw.parameter_groups(model, 1e-4, gate_lr=1.0, gate_matrix_lr=1.0)
        for parameter in group["params"]
    }
    assert set(rates) == {id(p) for p in model.parameters()} and set(rates.values()) == {1e-4}
