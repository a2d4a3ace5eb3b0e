"""Pruned models that transformers reads without headwise."""

import copy
import json
import os
import subprocess
import sys
import textwrap

import headwise as hw
import pytest
import torch
from headwise.serialization import for_transformers, save_for_transformers
from support.architectures import ARCHITECTURES
from support.families import FAMILIES
from support.structures import make_plan

transformers = pytest.importorskip("transformers")

ROWS = {n: r for n, r in ARCHITECTURES.items() if not n.startswith(("Multihead", "Transformer"))}


def pruned(row, heads=None):
    """A pruned model of which the second layer has no head and the first one lacks one."""
    torch.manual_seed(0)
    model = hw.convert(row.build())
    sizes = [layer.num_heads for layer in hw.attention_layers(model).values()]
    kept = heads or [list(range(1, size)) if n == 0 else [] for n, size in enumerate(sizes)]
    return hw.prune(model, make_plan(model, kept, scaled=False))


#: Run by a Python that cannot import headwise.
READ = """
import sys, json, torch, transformers
sys.modules["headwise"] = None
folder, auto = sys.argv[1:3]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
inputs = torch.load(f"{folder}/../inputs.pt")
with torch.no_grad():
    torch.save(model(**inputs)[0], f"{folder}/../outputs.pt")
if len(sys.argv) > 3:  # fine-tune, save and read again
    rows = [{"input_ids": [i + 1, 2, 3], "labels": i % 2} for i in range(8)]
    arguments = transformers.TrainingArguments(
        f"{folder}/../run", max_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(f"{folder}/../tuned")
    again = getattr(transformers, auto).from_pretrained(
        f"{folder}/../tuned", trust_remote_code=True).eval()
    with torch.no_grad():
        tuned, read = model.eval()(**inputs)[0], again(**inputs)[0]
    torch.save([tuned, read], f"{folder}/../tuned.pt")
    assert "headwise" not in str(sorted(k for k, v in sys.modules.items() if v is not None))
"""


def read_elsewhere(folder, auto, *more):
    place = folder.parent
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, str(folder), auto, *more]
    done = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(place / "outputs.pt")


def test_a_pruned_bert_is_read_fine_tuned_and_saved_without_headwise(tmp_path):
    small = pruned(ROWS["BertForSequenceClassification"])
    plan = hw.plan(hw.HeadScores("mine", {n: [0.0] for n in hw.attention_layers(small)}), 1.0)
    folder = tmp_path / "small"
    card = {"metrics": {"accuracy": 0.82}, "plan": plan, "base_model": "alice/bert"}
    assert save_for_transformers(small, folder, card=card)
    inputs = {"input_ids": torch.randint(1, 50, (3, 6))}
    inputs["attention_mask"] = torch.ones(3, 6, dtype=torch.long)
    inputs["attention_mask"][1, 4:] = 0
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        expected = small(**inputs).logits
    found = read_elsewhere(folder, "AutoModelForSequenceClassification", "tune")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    tuned, again = torch.load(tmp_path / "tuned.pt")
    torch.testing.assert_close(tuned, again)
    assert not torch.allclose(tuned, expected, atol=1e-3)
    readme = (folder / "README.md").read_text()
    assert "library_name: transformers" in readme and "headwise.load" not in readme
    assert (
        'AutoModelForSequenceClassification.from_pretrained("PATH", trust_remote_code=True)'
        in readme
    )
    for told in ("| accuracy | 0.82 |", 'base_model: "alice/bert"', "pruned by `mine`"):
        assert told in readme
    assert (folder / "modeling_pruned.py").read_text().count("\n") < 40
    # Without trust in the code the sizes do not fit, which transformers says.
    with pytest.raises((RuntimeError, ValueError)):
        transformers.BertForSequenceClassification.from_pretrained(folder)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_every_family_is_written_or_its_class_reads_it(row, tmp_path):
    """Encoders of texts and images, and decoders: uneven layers, one without heads, and query heads
    that share key/value heads in groups of different sizes."""
    small = pruned(row)
    assert save_for_transformers(small, tmp_path / "a")  # which reads it and compares
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["auto_map"] and set(config["auto_map"].values()) == {
        f"modeling_pruned.{type(small).__name__}"
    }
    whole = hw.convert(row.build())
    assert not save_for_transformers(whole, tmp_path / "b")
    assert not (tmp_path / "b" / "modeling_pruned.py").exists()
    type(whole).from_pretrained(tmp_path / "b")


QUIET = """
    import sys, headwise as hw, transformers
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=8)
    model = hw.convert(transformers.BertModel(config).eval())
    entry = hw.pruning.LayerPlan("encoder.layer.0.attention.self.mha", 2, [1])
    small = hw.prune(model, hw.HeadPlan([entry]))
    before = transformers.logging.get_verbosity()
    assert hw.serialization.save_for_transformers(small, sys.argv[1])
    assert transformers.logging.get_verbosity() == before
"""


def test_nothing_else_of_transformers_is_imported(tmp_path):
    """Some of its modules have effects: one turns on the log of the whole process."""
    command = [sys.executable, "-c", textwrap.dedent(QUIET), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_decoder_generates_without_headwise(tmp_path):
    small = pruned(ROWS["Qwen3ForCausalLM"], [[0, 1, 2], [3]])
    folder = tmp_path / "small"
    assert save_for_transformers(small, folder)
    inputs = {"input_ids": torch.randint(1, 50, (2, 6))}
    torch.save(inputs, tmp_path / "inputs.pt")
    with torch.no_grad():
        expected = small(**inputs).logits
    found = read_elsewhere(folder, "AutoModelForCausalLM")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    torch.testing.assert_close(
        again.generate(**inputs, **options), small.generate(**inputs, **options)
    )


def test_removed_neurons_are_written_too(tmp_path):
    torch.manual_seed(0)
    dense = hw.convert(ROWS["BertForSequenceClassification"].build())
    inputs = [{"input_ids": torch.randint(1, 50, (4, 6))} for _ in range(2)]
    small = hw.pruning.kwon_prune(
        dense, inputs, lambda m, b: m(**b).logits.square().mean(), macs=0.6, tune=False
    ).model
    assert sum(hw.pruning.structure(small).neurons.values()) < sum(
        hw.pruning.structure(dense).neurons.values()
    )
    assert save_for_transformers(small, tmp_path / "small")


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    row = ROWS["BertForSequenceClassification"]
    small = pruned(row)
    with pytest.raises(ValueError, match="cannot write this model: layer '.*' has a FixedGate"):
        save_for_transformers(hw.convert(row.build(), hw.FixedGate([0])), tmp_path / "x")
    with pytest.raises(ValueError, match="model must be a converted model of transformers, got L"):
        save_for_transformers(torch.nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(ValueError, match="got BertForSequenceClassification: call headwise.con"):
        save_for_transformers(row.build(), tmp_path / "x")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="dir must not exist, be empty, or be a folder that save"):
        save_for_transformers(small, tmp_path / "own")
    assert not (tmp_path / "x").exists() and [p.name for p in tmp_path.iterdir()] == ["own"]
    save_for_transformers(small, tmp_path / "y")
    save_for_transformers(small, tmp_path / "y")  # its own folder may be written again


def test_attention_that_depends_on_all_heads_is_refused(tmp_path):
    """T5's position biases have one number per head of the first layer."""
    small = pruned(FAMILIES["T5"])
    with pytest.raises(ValueError, match="cannot write this model: it does not run at these sizes"):
        save_for_transformers(small, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["Bart", "Whisper", "ModernBert", "Wav2Vec2", "GPTNeoX", "Gemma3"])
def test_other_families(name, tmp_path):
    assert save_for_transformers(pruned(FAMILIES[name]), tmp_path / "x")


def test_what_computes_something_else_is_refused(tmp_path, monkeypatch):
    small = pruned(ROWS["BertForSequenceClassification"])
    wrong = for_transformers.CODE.replace(
        "setattr(module, own, nn.Parameter(part, whole.requires_grad))",
        "setattr(module, own, nn.Parameter(part, whole.requires_grad))\n"
        "        self.register_forward_hook(lambda m, a, out: (out[0] + 1.0,))",
    )
    monkeypatch.setattr(for_transformers, "CODE", wrong)
    with pytest.raises(ValueError, match="read again, it computes something else"):
        save_for_transformers(copy.deepcopy(small), tmp_path / "x")
    assert not list(tmp_path.iterdir())
