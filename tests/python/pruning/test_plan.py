"""Plans against a ranking by hand, what is refused, and pruned weights against masks."""

import copy
import json
import pickle

import headwise as hw
import pytest
import torch
from headwise import _C
from hypothesis import given, settings
from hypothesis import strategies as st


def kept(plan: hw.HeadPlan) -> dict[str, list[int]]:
    return {layer.name: layer.heads for layer in plan.layers}


def ranked_by_hand(values: dict[str, list[float]], count: int) -> dict[str, list[int]]:
    """Drops the least important head, the last of equals first, until ``count`` are left."""
    left = [(s, -i, -h) for i, name in enumerate(values) for h, s in enumerate(values[name])]
    while len(left) > count:
        left.remove(min(left))
    names = list(values)
    return {name: sorted(-h for _, i, h in left if -i == names.index(name)) for name in names}


scores_of_layers = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(-1, 1), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
).map(lambda layers: {f"layer.{i}": scores for i, scores in enumerate(layers)})


@settings(deadline=None)
@given(values=scores_of_layers, keep=st.floats(0.01, 1.0))
def test_a_plan_of_the_model_is_the_ranking(values, keep):
    total = sum(map(len, values.values()))
    plan = hw.plan(hw.HeadScores("m", values), keep)
    count = max(1, int(keep * total + 0.5))
    assert plan.heads_kept == count
    assert plan.num_heads == total
    assert kept(plan) == ranked_by_hand(values, count)


@settings(deadline=None)
@given(values=scores_of_layers, keep=st.floats(0.01, 1.0))
def test_layer_plan_is_a_ranking_of_each_layer(values, keep):
    plan = hw.plan(hw.HeadScores("m", values), keep, scope="layer")
    for name, scores in values.items():
        count = max(1, int(keep * len(scores) + 0.5))
        assert kept(plan)[name] == ranked_by_hand({name: scores}, count)[name]


@settings(deadline=None)
@given(values=scores_of_layers, keep=st.floats(0.3, 1.0), least=st.integers(0, 2))
def test_minimum_of_heads_per_layer(values, keep, least):
    scores = hw.HeadScores("m", values)
    count = max(1, int(keep * sum(map(len, values.values())) + 0.5))
    floor = {name: min(least, len(v)) for name, v in values.items()}
    if sum(floor.values()) > count:
        with pytest.raises(ValueError, match="asks for"):
            hw.plan(scores, keep, min_heads_per_layer=least)
        return
    plan = hw.plan(scores, keep, min_heads_per_layer=least)
    assert plan.heads_kept == count
    for layer in plan.layers:
        assert len(layer.heads) >= floor[layer.name]
        # No dropped head is better than a kept one, within a layer.
        dropped = set(range(layer.num_heads)) - set(layer.heads)
        best = max((values[layer.name][h] for h in dropped), default=-2)
        assert all(values[layer.name][h] >= best for h in layer.heads)


def test_entropy_keeps_the_smallest_and_ties_keep_the_first():
    values = {"a": [0.9, 0.1, 0.5], "b": [0.1, 0.5]}
    assert kept(hw.plan(hw.HeadScores("entropy", values), 0.6)) == {"a": [1, 2], "b": [0]}
    assert kept(hw.plan(hw.HeadScores("m", {"a": [1, 1], "b": [1, 1]}), 0.75)) == {
        "a": [0, 1],
        "b": [0],
    }


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\], got"):
        hw.plan(hw.HeadScores("m", {"a": [1.0, 2.0]}), keep)


def test_what_plan_refuses():
    scores = hw.HeadScores("m", {"a": [1.0, 2.0], "b": [1.0, 2.0]})
    nan = hw.HeadScores("m", {"a": [1.0, float("nan")]})
    with pytest.raises(ValueError, match="finite, got nan for head 1 of layer 'a'"):
        hw.plan(nan)
    with pytest.raises(ValueError, match="scope must be 'model' or 'layer', got 'net'"):
        hw.plan(scores, scope="net")
    with pytest.raises(ValueError, match="min_heads_per_layer must not be negative, got -1"):
        hw.plan(scores, min_heads_per_layer=-1)
    with pytest.raises(ValueError, match="=2 asks for 4 heads, more than .* leaves, which is 2"):
        hw.plan(scores, 0.5, min_heads_per_layer=2)
    with pytest.raises(ValueError, match="=2 is more than .* leaves of layer 'a', which is 1"):
        hw.plan(scores, 0.5, min_heads_per_layer=2, scope="layer")
    with pytest.raises(ValueError, match="at least one head, got none"):
        hw.plan(hw.HeadScores("m", {}))
    with pytest.raises(TypeError, match="must be a headwise.HeadScores, got dict: take one of its"):
        hw.plan({"michel": scores})


def example() -> hw.HeadPlan:
    layers = [
        hw.pruning.LayerPlan("a", 4, [0, 3], [1.0, 0.1]),
        hw.pruning.LayerPlan('naïve "b"', 2, []),
        hw.pruning.LayerPlan("c", 12, range(12)),
    ]
    return hw.HeadPlan(layers, metric="michel", metadata={"keep": 0.5, "nested": {"a": [1, None]}})


def test_round_trips(tmp_path):
    plan = example()
    plan.save(tmp_path / "plan.json")
    loaded = hw.HeadPlan.load(tmp_path / "plan.json")
    assert loaded == plan == pickle.loads(pickle.dumps(plan)) == copy.deepcopy(plan)
    assert loaded.metadata == {"keep": 0.5, "nested": {"a": [1, None]}}
    assert loaded.layers[0].scale == [1.0, 0.1]
    assert loaded != hw.HeadPlan(plan.layers[:2], metric="michel", metadata=plan.metadata)
    assert json.loads(plan.to_json())["layers"][0] == {
        "name": "a",
        "num_heads": 4,
        "heads": [0, 3],
        "scale": [1.0, 0.1],
    }
    assert repr(plan) == "HeadPlan(metric='michel', layers=3, heads=14 of 18)"


def without(key):
    return lambda document: document.pop(key)


def put(*path):
    *keys, last, value = path

    def edit(document):
        for key in keys:
            document = document[key]
        document[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (put("version", 2), 'must have "version": 1'),
        (put("format", "x"), 'must have "format": "headwise.plan"'),
        (without("format"), 'must have "format": "headwise.plan"'),
        (without("metric"), 'plan lacks the key "metric"'),
        (put("extra", 1), 'plan has an unknown key "extra"'),
        (put("layers", {}), '"layers" of plan must be an array, got object'),
        (put("layers", 0, 3), "layer 0 of plan must be a JSON object, got number"),
        (put("layers", 0, "x", 1), 'layer 0 of plan has an unknown key "x"'),
        (put("layers", 0, "name", 1), '"name" of layer 0 of plan must be a string'),
        (put("layers", 0, "name", "c"), 'must have different names, got "c" twice'),
        (put("layers", 0, "num_heads", 3), "heads in plan of layer 'a' .* between 0 and 2, got 3"),
        (put("layers", 0, "num_heads", -1), "must not be negative, got -1"),
        (put("layers", 0, "num_heads", 4.0), '"num_heads" .* must be integers, got 4.0'),
        (put("layers", 0, "heads", [3, 0]), "must be ascending and different, got 0 after 3"),
        (put("layers", 0, "heads", [3, 3]), "must be ascending and different, got 3 after 3"),
        (put("layers", 0, "heads", [-1, 3]), "must be between 0 and 3, got -1"),
        (put("layers", 0, "heads", [0, 2**64]), "must be (between|integers)"),
        (put("layers", 0, "heads", ["0"]), "\"heads\" .* must be integers, got '0'"),
        (put("layers", 0, "scale", [1.0]), "a number for each of its 2 heads, got 1"),
        (put("layers", 0, "scale", [1.0, None]), '"scale" .* must hold numbers, got None'),
        (put("metadata", []), "metadata of a plan must be a JSON object, got array"),
    ],
)
def test_bad_plan_files_are_refused_by_name(tmp_path, edit, text):
    document = json.loads(example().to_json())
    edit(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=text) as error:
        hw.HeadPlan.load(tmp_path / "plan.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "plan is not valid JSON"),
        ("{", "plan is not valid JSON"),
        ("[" * 100, "plan must not be nested deeper than 32"),
        ('{"format": 1, "format": 2}', 'plan has the key "format" twice'),
        ("[]", "plan must be a JSON object, got array"),
    ],
)
def test_what_is_no_plan(content, text):
    with pytest.raises(ValueError, match=text):
        hw.HeadPlan.from_json(content)


def test_scale_must_be_finite_and_files_must_exist(tmp_path):
    with pytest.raises(ValueError, match="scale in plan of layer 'a' must be finite, got inf"):
        hw.HeadPlan([hw.pruning.LayerPlan("a", 2, [0], [float("inf")])])
    with pytest.raises(FileNotFoundError):
        hw.HeadPlan.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        example().save(tmp_path / "none" / "plan.json")


H, D, KD, VD = 5, 15, 7, 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("heads", [[0, 3], [1], [], [0, 1, 2, 3, 4]], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
def test_pruned_projections_compute_what_the_masked_layer_does(packed, heads, dtype):
    options = {} if packed else {"kdim": KD, "vdim": VD}
    mha = torch.nn.MultiheadAttention(D, H, add_bias_kv=True, dtype=dtype, **options)
    for parameter in mha.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    scale = [0.5 + 0.25 * h for h in heads]
    layer = hw.pruning.LayerPlan("x", H, heads, scale)
    pruned = _C.prune_projections(dict(mha.named_parameters()), layer)

    width = D // H
    masked = copy.deepcopy(mha)  # each head's output multiplied before the output projection
    with torch.no_grad():
        for h in range(H):
            factor = scale[heads.index(h)] if h in heads else 0.0
            masked.out_proj.weight[:, h * width : (h + 1) * width] *= factor
    q = torch.randn(6, 2, D, dtype=dtype)
    k = torch.randn(4, 2, D if packed else KD, dtype=dtype)
    v = torch.randn(4, 2, D if packed else VD, dtype=dtype)
    expected = masked(q, k, v, need_weights=False)[0]
    if not heads:
        actual = pruned["out_proj.bias"].expand_as(expected)
        assert pruned["out_proj.weight"].shape == (D, 0)
    else:
        small = hw.MultiheadAttention(
            D, len(heads), head_dim=width, add_bias_kv=True, dtype=dtype, **options
        )
        small.load_state_dict(pruned)
        actual = small(q, k, v, need_weights=False)[0]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert all(tensor.dtype == dtype for tensor in pruned.values())


def test_what_pruning_refuses():
    mha = torch.nn.MultiheadAttention(D, H)
    with pytest.raises(ValueError, match='must be those of an attention layer, got "gate.weight"'):
        _C.prune_projections({"gate.weight": torch.ones(2)}, hw.pruning.LayerPlan("x", H, [0]))
    with pytest.raises(ValueError, match="size 0 of in_proj_bias .* of 3 x 4 heads, got 45"):
        _C.prune_projections({"in_proj_bias": mha.in_proj_bias}, hw.pruning.LayerPlan("x", 4, [0]))
    with pytest.raises(ValueError, match="out_proj.weight must have at least 2 dimensions, got 1"):
        _C.prune_projections({"out_proj.weight": torch.ones(H)}, hw.pruning.LayerPlan("x", H, [0]))


@pytest.mark.parametrize("keep", ["half", None, True, [0.5]])
def test_the_share_is_a_number(keep):
    with pytest.raises(TypeError, match=r"keep must be a number in \(0, 1\], got "):
        hw.plan(hw.HeadScores("mine", {"a": [0.1, 0.9]}), keep=keep)
