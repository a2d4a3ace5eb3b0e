"""Packages of AOTInductor: pruned models without headwise, gated ones with its operators, run from
Python and from C++."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import headwise as hw
import pytest
import torch
from headwise.serialization import plain_program
from torch.utils.cpp_extension import include_paths

transformers = pytest.importorskip("transformers")
COMPILER = shutil.which("g++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="AOTInductor needs g++"),
]

ROOT = Path(__file__).parents[3]
DYNAMIC = torch.export.Dim.DYNAMIC
IDS = torch.arange(14).reshape(2, 7)
INPUTS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

#: Run by a Python that cannot import headwise.
READ = """
import sys, torch
import transformers.modeling_outputs  # the package gives one of these
sys.modules["headwise"] = None
ids = torch.arange(14).reshape(2, 7)
outputs = torch._inductor.aoti_load_package(sys.argv[1])(
    input_ids=ids, attention_mask=torch.ones_like(ids))
print(*outputs["logits"].flatten().tolist())
"""


def bert(gate=None):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    return hw.convert(transformers.BertForSequenceClassification(config).eval(), gate)


def numbers(command):
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.tensor([float(word) for word in done.stdout.split()])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """examples/cpp/package.cpp, linked with LibTorch and headwise."""
    maps = Path("/proc/self/maps")
    found = re.search(r"/\S+libheadwise\S*", maps.read_text()) if maps.exists() else None
    if found is None:
        pytest.skip("headwise is not linked as a library here")
    libraries = Path(torch.__file__).parent / "lib"
    out = tmp_path_factory.mktemp("program") / "package"
    subprocess.run(
        [
            COMPILER, "-std=c++20", ROOT / "examples" / "cpp" / "package.cpp", "-o", out,
            *(f"-I{path}" for path in include_paths()), f"-L{libraries}", "-Wl,--no-as-needed",
            found[0], "-ltorch", "-ltorch_cpu", "-lc10",
            *(f"-Wl,-rpath,{path}" for path in (libraries, Path(found[0]).parent)),
        ],
        check=True,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("kind", ["pruned", "gated"])
def test_a_package_computes_what_the_model_computes(kind, program, tmp_path):
    batch = {
        "input_ids": torch.randint(50, (3, 10)),
        "attention_mask": torch.ones(3, 10, dtype=torch.long),
    }
    shapes = {name: {0: DYNAMIC, 1: DYNAMIC} for name in batch}
    if kind == "pruned":
        model = hw.prune_heads(bert(), {0: [1, 2, 3]})
        exported = plain_program(model, kwargs=batch, dynamic_shapes=shapes)
    else:
        model = bert(hw.BudgetGate(budget=0.5))
        for layer in hw.attention_layers(model).values():
            torch.nn.init.normal_(layer.gate.relevance.weight)
        exported = torch.export.export(model, (), batch, dynamic_shapes=shapes)
    calls = {str(n.target) for n in exported.graph.nodes if "headwise" in str(n.target)}
    assert bool(calls) == (kind == "gated")
    path = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2")
    )
    with torch.no_grad():
        expected = model(**INPUTS).logits
    close = {"rtol": 1e-4, "atol": 1e-5}
    found = torch._inductor.aoti_load_package(path)(**INPUTS)["logits"]
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(numbers([program, path]), expected.flatten(), **close)
    if kind == "pruned":
        elsewhere = numbers([sys.executable, "-c", READ, path])
        torch.testing.assert_close(elsewhere, expected.flatten(), **close)
