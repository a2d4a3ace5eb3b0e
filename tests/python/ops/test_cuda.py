"""Everything that runs on a CUDA device, against the oracle in float64. Skipped without one."""

import os

import headwise as hw
import pytest
import torch
from support import attention_cases as cases
from support.attention_cases import (  # noqa: F401  (collected again, on the device)
    test_core_attention,
    test_dropout_does_not_depend_on_padding_or_selection,
    test_heads_never_chosen_get_exactly_no_gradient,
    test_long_keys_take_several_tiles,
    test_long_layer_takes_several_tiles,
    test_multihead_attention,
    test_no_heads_give_the_output_bias,
    test_non_contiguous_inputs,
    test_random_shapes,
    test_self_attention,
    test_tiny_sizes,
    test_what_was_not_chosen_is_not_read,
)
from support.attention_statistics import DTYPES, KINDS, SHAPES, masks, plain
from support.kernel_cases import *  # noqa: F403  (collected again, on the device)
from support.operator_calls import CASES as TRACED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: no CUDA device"
    ),
]
ops = torch.ops.headwise


def move(x, device):
    return x.to(device) if torch.is_tensor(x) else x


class DeviceOps:
    """torch.ops.headwise with the arguments on the device; results and gradients come back."""

    def __init__(self, operators=ops):
        self.operators = operators

    def __getattr__(self, name):
        operator = getattr(self.operators, name)

        def call(*arguments, **options):
            arguments = [move(x, "cuda") for x in arguments]
            y = operator(*arguments, **{k: move(x, "cuda") for k, x in options.items()})
            return move(y, "cpu")

        return call


@pytest.fixture(autouse=True)
def on_the_device(monkeypatch):
    monkeypatch.setattr(cases, "ops", DeviceOps())


@pytest.fixture(autouse=True)
def alive():
    """A kernel that dies takes the context of its process along, and with it every later test:
    where pytest-xdist replaces processes, this one ends here."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


@pytest.fixture
def compiled_kernels():
    """Skips if the library has no CUDA kernels, only the paths through LibTorch."""
    for backend in hw.backends():
        if backend.name == "cuda_kernels" and not backend.available:
            pytest.skip(backend.reason)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("shape", [(1, 1), (64, 16), (5, 33), (0, 4), (3, 0), (2, 300)])
def test_select_heads_equals_the_cpu(dtype, shape):
    relevance = torch.randn(shape)
    relevance[::2] = relevance[::2].round()  # ties
    relevance = relevance.to(dtype)
    count = torch.randint(0, shape[1] + 1, (shape[0],), dtype=torch.int32)
    expected = ops.select_heads(relevance, count)
    index = ops.select_heads(relevance.cuda(), count.cuda())
    assert torch.equal(index.cpu(), expected)
    for mask_type in (dtype, torch.bool):
        mask = ops.selection_mask(index, count.cuda(), mask_type)
        assert torch.equal(mask.cpu(), ops.selection_mask(expected, count, mask_type))


def test_nan_ranks_lowest_and_counts_are_clamped(compiled_kernels):
    relevance = torch.tensor([[float("nan"), -float("inf"), 1.0]] * 2, device="cuda")
    index = ops.select_heads(relevance, torch.tensor([2, 9], device="cuda"))
    assert index.tolist() == [[1, 2, -1], [0, 1, 2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [*DTYPES, (torch.bfloat16, 1e-4)])
def test_attention_statistics(kind, shape, dtype, tolerance):
    B, H, Hkv, L, S, d = shape
    q, k = torch.randn(B, H, L, d).to(dtype) * 2, torch.randn(B, Hkv, S, d).to(dtype)
    arguments = masks(kind, B, H, L, S)
    device = {name: move(x, "cuda") for name, x in arguments.items()}
    got = ops.attention_statistics(q.cuda(), k.cuda(), **device)
    for value, expected in zip(got, plain(q, k, **arguments), strict=True):
        torch.testing.assert_close(value.double().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_selection_and_statistics_do_not_wait_and_replay(compiled_kernels):
    """Captured in a CUDA graph, which a wait for the device would abort; replayed on new values."""
    relevance, count = torch.randn(8, 12, device="cuda"), torch.full((8,), 4, device="cuda")
    q, k = torch.randn(8, 12, 33, 16, device="cuda"), torch.randn(8, 12, 65, 16, device="cuda")

    def run():
        index = ops.select_heads(relevance, count)
        mask = ops.selection_mask(index, count, torch.float32)
        return index, mask, *ops.attention_statistics(q, k)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        relevance.normal_()
        count.random_(0, 13)
        q.normal_()
        graph.replay()
        for a, b in zip(captured, run(), strict=True):
            assert torch.equal(a, b)


class Replayed:
    """A layer whose selection, input and padding are changed in place between replays."""

    batch, length, width, heads, d = 5, 150, 64, 6, 32

    def __init__(self, dtype, padded):
        self.rand = cases.Random(3, dtype)
        self.x = self.rand(self.batch, self.length, self.width).detach().cuda().requires_grad_()
        weights = cases.layer_weights(self.rand, self.heads, self.d, self.width)
        self.weights = [w.detach().cuda().requires_grad_() for w in weights]
        self.selection = [t.cuda() for t in self.draw()]
        self.padding = None
        if padded:
            self.padding = torch.zeros(self.batch, self.length, dtype=torch.bool, device="cuda")

    def draw(self):
        index, count, weight = self.rand.selection(self.batch, self.heads)
        return index, count, weight.detach()

    def change(self):
        """Another selection (0 and all heads among them), another input, other lengths."""
        counts = torch.randint(0, self.heads + 1, (self.batch,))
        counts[:2] = torch.tensor([0, self.heads])
        drawn = self.rand.selection(self.batch, self.heads, count=counts)
        for old, new in zip(self.selection, drawn, strict=True):
            old.copy_(new.detach())
        with torch.no_grad():
            self.x.normal_(0, 0.3)  # larger scores would turn rounding into errors of the softmax
        if self.padding is not None:
            lengths = torch.randint(1, self.length + 1, (self.batch, 1), device="cuda")
            self.padding.copy_(torch.arange(self.length, device="cuda") >= lengths)

    def run(self):
        y = ops.selected_self_attention(
            self.x, *self.weights, self.heads, *self.selection, self.padding
        )
        return [y.detach(), *torch.autograd.grad(y.sum(), [self.x, *self.weights])]

    def expected(self):
        leaves = [t.detach().double().requires_grad_() for t in (self.x, *self.weights)]
        index, count, weight = self.selection
        y = cases.oracle.self_attention(
            *leaves, self.heads, index, count, weight.double(), key_padding_mask=self.padding
        )
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]


@pytest.mark.parametrize("way", ["kernels", "padded", "flash", "warpgroups"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_a_captured_layer_replays_with_other_selections(compiled_kernels, dtype, way, cuda_routes):
    """Forward and backward in one CUDA graph, replayed: each equals the oracle."""
    padded = way == "padded"
    cuda_routes(
        "flash" if way == "flash" else "kernels", "warpgroups" if way == "warpgroups" else "warps"
    )
    layer = Replayed(dtype, padded)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.run()
    for _ in range(3):
        layer.change()
        graph.replay()
        wanted = layer.expected()
        scale = 0.1 * max(cases.largest(t) for t in wanted)
        for actual, expected in zip(captured, wanted, strict=True):
            cases.close(actual, expected, cases.BACKWARD[dtype], scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_waits_for_the_device(compiled_kernels, dtype):
    layer = Replayed(dtype, padded=True)
    q = torch.randn(3, 6, 1, 64, device="cuda").to(dtype)
    k, v = (torch.randn(3, 2, 500, 64, device="cuda").to(dtype) for _ in range(2))
    relevance, count = torch.randn(3, 6, device="cuda"), torch.full((3,), 4, device="cuda")
    seed = torch.tensor([7], device="cuda")
    layer.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.run()
        index = ops.select_heads(relevance, count)
        ops.selected_attention(q, k, v, index, count)  # decoding
        ops.selected_attention(q, k, v, index, count, None, None, None, False, 0.5, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_results_do_not_change_from_run_to_run(compiled_kernels):
    """No sum depends on the order in which blocks finish."""
    layer = Replayed(torch.bfloat16, padded=True)
    layer.change()
    first = layer.run()
    for _ in range(3):
        for a, b in zip(first, layer.run(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [None, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_evaluated_budget_gate(compiled_kernels, dtype, budget, padded):
    """Two launches on the device, the composition on the CPU; captured, it replays."""
    torch.manual_seed(0)
    gate = hw.BudgetGate(budget=budget, embed_dim=300, num_heads=37, dtype=dtype).eval()
    gate.requires_grad_(False)
    for parameter in gate.parameters():
        parameter.normal_()
    x = torch.randn(5, 140, 300, dtype=dtype)
    padding = torch.arange(140) >= torch.randint(1, 141, (5, 1)) if padded else None
    expected = gate(x, padding)
    gate = gate.cuda()
    x, padding = x.cuda(), None if padding is None else padding.cuda()
    with torch.no_grad():
        gate(x, padding)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = gate(x, padding)
    graph.replay()
    assert torch.equal(got.index.cpu(), expected.index)
    assert torch.equal(got.count.cpu(), expected.count)
    assert torch.equal(got.weight.cpu(), expected.weight)
    for a, b in ((got.relevance, expected.relevance), (got.budget, expected.budget)):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRACED)
def test_opcheck(name):
    """What tracing expects, and what compiled graphs compute, is what the device returns."""
    operator, arguments, options = TRACED[name]
    arguments = [move(x.detach(), "cuda").requires_grad_(x.requires_grad) if torch.is_tensor(x)
                 else x for x in arguments]  # fmt: skip
    options = {key: move(x.detach() if torch.is_tensor(x) else x, "cuda")
               for key, x in options.items()}  # fmt: skip
    torch.library.opcheck(operator.default, arguments, options)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_and_another_stream_than_the_current_ones():
    layers = []
    for device in ("cuda:0", "cuda:1"):
        layer = Replayed(torch.bfloat16, padded=True)
        layer.x, *layer.weights = (
            t.detach().to(device).requires_grad_() for t in (layer.x, *layer.weights)
        )
        layer.selection = [t.to(device) for t in layer.selection]
        layer.padding = layer.padding.to(device)
        layers.append(layer.run())  # cuda:0 is the current device
        torch.cuda.synchronize(device)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            layers.append(layer.run())
            torch.cuda.synchronize(device)
    for same in zip(*layers, strict=True):
        for other in same[1:]:
            assert torch.equal(same[0].cpu(), other.cpu())


def test_wide_heads_take_the_aten_route():
    rand = cases.Random(3, torch.float32)
    q, k, v = rand(2, 2, 9, 264), rand(2, 2, 9, 264), rand(2, 2, 9, 264)
    index, count, weight = rand.selection(2, 2, count=[1, 2])
    cases.check(cases.ops.selected_attention, cases.core_reference, [q, k, v, weight],
                torch.float32, q, k, v, index, count, weight)  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_module_equals_itself_on_the_cpu(training):
    torch.manual_seed(0)
    gate = hw.FixedGate(scale=torch.tensor([1.0, 0.0, 0.5, 2.0]))
    mha = hw.MultiheadAttention(32, 4, gate=gate, batch_first=True, dtype=torch.float64)
    mha.train(training)
    x = torch.randn(3, 17, 32, dtype=torch.float64)
    padding = torch.arange(17) >= torch.tensor([[17], [5], [9]])
    results = []
    for device in ("cpu", "cuda"):
        module = mha.to(device)
        module.zero_grad()
        leaf = x.detach().to(device).requires_grad_()
        y, _ = module(leaf, leaf, leaf, key_padding_mask=padding.to(device), need_weights=False)
        y.square().sum().backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        results.append([t.detach().cpu() for t in (y, leaf.grad, *gradients)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
