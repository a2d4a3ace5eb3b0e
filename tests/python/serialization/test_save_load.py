"""headwise.save and headwise.load: what was saved comes back; what does not fit raises an error."""

import copy
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES, EMBED, HEADS, bert, bert_inputs
from support.structures import make_plan
from torch import nn

GATES = {
    "no gate": None,
    "FixedGate": hw.FixedGate(heads=[0, 3]),
    "BudgetGate": hw.BudgetGate(keep=0.5),
    "HardConcreteGate": hw.HardConcreteGate(keep=0.5, input_dependent=True),
    "SubsetGate": hw.SubsetGate(keep=0.5),
    "RequestedBudgetGate": hw.RequestedBudgetGate(0.5),
    "GumbelSigmoidGate": hw.GumbelSigmoidGate(0.5),
    "SleepGate": hw.SleepGate(0.5),
    "ThresholdGate": hw.ThresholdGate(0.2),
    "SharedHeadsGate": hw.SharedHeadsGate(hw.BudgetGate(keep=0.5), shared=[1]),
}


@pytest.fixture(params=ARCHITECTURES.values(), ids=lambda row: row.name)
def architecture(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def folder(tmp_path):
    """A saved classifier, for tests that damage it."""
    torch.manual_seed(0)
    model = hw.convert(bert("BertForSequenceClassification"), hw.FixedGate(heads=[1, 2]))
    hw.save(model, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    path = folder / "headwise.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def same(model, other, architecture):
    inputs = architecture.inputs()
    with torch.no_grad():
        expected, actual = architecture.run(model, inputs), architecture.run(other, inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    state, loaded = model.state_dict(), other.state_dict()
    assert list(state) == list(loaded)
    assert all(torch.equal(state[name], loaded[name]) for name in state)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_round_trip(architecture, gate, tmp_path):
    model = hw.convert(architecture.build())
    grouped = any(isinstance(m, hw.GroupedQueryAttention) for m in model.modules())
    if grouped and isinstance(gate, hw.ThresholdGate):
        pytest.skip("decoders refuse gates that read queries and keys")
    hw.convert(model, gate)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    hw.save(model, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "headwise.json",
        "model.safetensors",
    ]
    if architecture.name.startswith("Bert"):
        loaded = hw.load(tmp_path / "m")
        assert not loaded.training and type(loaded) is type(model)
    else:
        loaded = hw.load(tmp_path / "m", model=architecture.build())
    same(model, loaded, architecture)
    for a, b in zip(
        hw.attention_layers(model).values(), hw.attention_layers(loaded).values(), strict=True
    ):
        assert (a.gate and a.gate.config()) == (b.gate and b.gate.config())


def test_pruned_round_trip(architecture, tmp_path):
    model = hw.convert(architecture.build())
    small = hw.prune(model, make_plan(model, [[0, 2, 3], []]))
    hw.save(small, tmp_path / "m")
    original = None if architecture.name.startswith("Bert") else architecture.build()
    loaded = hw.load(tmp_path / "m", original)
    same(small, loaded, architecture)
    heads = [layer.num_heads for layer in hw.attention_layers(loaded).values()]
    assert heads == [[3, 0][i % 2] for i in range(len(heads))]


def test_uneven_gated_model_goes_through_a_converted_one(tmp_path):
    torch.manual_seed(1)
    model = hw.convert(bert("BertModel"))
    small = hw.prune(model, make_plan(model, [[0, 2, 3], [1]]))
    hw.convert(small, lambda name, layer: hw.BudgetGate() if layer.num_heads > 1 else None)
    hw.save(small, tmp_path / "m")
    loaded = hw.load(tmp_path / "m", model=hw.convert(bert("BertModel"), hw.RandomGate()))
    same(small, loaded, ARCHITECTURES["BertModel"])
    assert [type(layer.gate).__name__ for layer in hw.attention_layers(loaded).values()] == [
        "BudgetGate",
        "NoneType",
    ]


def test_configuration_and_dtype_come_back(tmp_path):
    model = hw.convert(bert("BertForSequenceClassification", num_labels=3).to(torch.bfloat16))
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    hw.save(model, tmp_path / "m")
    loaded = hw.load(tmp_path / "m")
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert "headwise" not in json.dumps(
        json.loads((tmp_path / "m" / "headwise.json").read_text())["architecture"]["config"]
    )


def test_tied_tensors_are_written_once(tmp_path):
    model = hw.convert(bert("BertForMaskedLM"))
    hw.save(model, tmp_path / "m")
    document = json.loads((tmp_path / "m" / "headwise.json").read_text())
    assert document["aliases"]["cls.predictions.decoder.weight"] == (
        "bert.embeddings.word_embeddings.weight"
    )
    loaded = hw.load(tmp_path / "m")
    decoder = loaded.cls.predictions.decoder.weight
    assert decoder is loaded.bert.embeddings.word_embeddings.weight
    layer = nn.MultiheadAttention(8, 2)
    tied = hw.convert(nn.ModuleList([layer, nn.Sequential(layer)]))
    hw.save(tied, tmp_path / "t")
    again = nn.MultiheadAttention(8, 2)
    loaded = hw.load(tmp_path / "t", nn.ModuleList([again, nn.Sequential(again)]))
    assert loaded[0] is loaded[1][0]
    assert torch.equal(loaded[0].in_proj_weight, layer.in_proj_weight)


def test_a_saved_folder_is_replaced_and_others_are_not(folder, tmp_path):
    model = hw.load(folder)
    hw.save(model, folder)
    hw.save(model, tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    hw.save(model, tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="dir must not exist, be empty, or be a folder that"):
        hw.save(model, tmp_path / "other")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"
    names = ["empty", "model", "new", "other"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def refuse(path, content):
    raise OSError(13, "Permission denied")


def test_nothing_is_left_when_writing_fails(folder, tmp_path, monkeypatch):
    model = hw.load(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Tokenizer:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="No space left on device"):
            hw.save(model, target, tokenizer=Tokenizer())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    monkeypatch.setattr("headwise.serialization.save_load.write_atomic", refuse)
    with pytest.raises(OSError, match="Permission denied"):
        hw.save(model, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_other_files_in_the_folder_are_kept(folder):
    model = hw.load(folder)
    (folder / "tokenizer.json").write_text("words")
    (folder / "notes" / "deep").mkdir(parents=True)
    (folder / "notes" / "deep" / "today").write_text("read me")
    (folder / "link").symlink_to("tokenizer.json")
    folder.chmod(0o750)
    nn.init.constant_(model.classifier.bias, 3.0)
    hw.save(model, folder)
    assert (folder / "tokenizer.json").read_text() == "words"
    assert (folder / "notes" / "deep" / "today").read_text() == "read me"
    assert (folder / "link").is_symlink()
    assert folder.stat().st_mode & 0o777 == 0o750
    assert hw.load(folder).classifier.bias.eq(3).all()


def test_a_symbolic_link_stays_one(folder, tmp_path):
    model = hw.load(folder)
    link, dangling = tmp_path / "latest", tmp_path / "next"
    link.symlink_to("model")
    dangling.symlink_to(tmp_path / "not yet")
    nn.init.constant_(model.classifier.bias, 2.0)
    hw.save(model, link)
    hw.save(model, dangling)
    assert link.is_symlink() and dangling.is_symlink()
    assert hw.load(folder).classifier.bias.eq(2).all()
    assert hw.load(tmp_path / "not yet").classifier.bias.eq(2).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "model", "next", "not yet"]


def test_a_name_of_250_letters(folder, tmp_path):
    hw.save(hw.load(folder), tmp_path / ("x" * 250))
    assert (tmp_path / ("x" * 250) / "headwise.json").is_file()


WRITER = """
import sys, torch, headwise as hw
model = torch.nn.ModuleDict({"a": hw.MultiheadAttention(8, 4), "b": torch.nn.Linear(64, 512)})
torch.nn.init.constant_(model["b"].weight, float(sys.argv[2]))
torch.nn.init.constant_(model["a"].in_proj_weight, float(sys.argv[2]))
hw.save(model, sys.argv[1])  # the first takes longer: it imports
print("ready", flush=True)
while True:
    hw.save(model, sys.argv[1])
"""


def test_a_killed_writer_leaves_a_whole_model(tmp_path):
    """Two processes write one folder over and over, and are killed in the middle of it."""
    place = tmp_path / "model"
    model = nn.ModuleDict({"a": hw.MultiheadAttention(8, 4), "b": nn.Linear(64, 512)})
    hw.save(model, place)
    (place / "notes").write_text("mine")
    for attempt in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(place), str(value)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for value in (1, 2)
        ]
        try:
            for writer in writers:
                assert writer.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 0.5 + 0.1 * attempt
            while time.monotonic() < deadline:
                hw.load(place, model)  # whole at every moment
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()
                writer.stdout.close()
        loaded = hw.load(place, model)
        value = loaded["b"].weight[0, 0]
        assert value in (1, 2) and loaded["b"].weight.eq(value).all()
        assert loaded["a"].in_proj_weight.eq(value).all()
        assert (place / "notes").read_text() == "mine"


def test_sharded_models_are_gathered(tmp_path):
    torch.manual_seed(0)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = hw.MultiheadAttention(8, 4, gate=hw.BudgetGate())
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        hw.save(model, tmp_path / "model")
        with pytest.raises(TypeError, match="must hold its own data, got a subclass of Tensor"):
            hw.io.save_safetensors(tmp_path / "w", {"a": model.in_proj_weight})
    finally:
        torch.distributed.destroy_process_group()
    again = hw.MultiheadAttention(8, 4, gate=hw.BudgetGate())
    loaded = hw.load(tmp_path / "model", again).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_models_that_cannot_be_saved():
    with pytest.raises(ValueError, match="has no headwise.MultiheadAttention to save"):
        hw.save(nn.Linear(2, 2), "never-written")
    assert not os.path.exists("never-written")


# --- loading what does not fit --------------------------------------------------------------------


def test_missing_pieces(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="dir must be a folder, got '.*nowhere'"):
        hw.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a headwise model: '.*headwise.json' does not"):
        hw.load(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="dir has no weights: '.*model.safetensors' does"):
        hw.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "must have format 'headwise.model'"),
        (lambda d: d.update(version=2), "must have version 1, got 2"),
        (lambda d: d.update(extra=1), "has an unknown key 'extra'"),
        (lambda d: d.pop("layers"), "lacks the key 'layers'"),
        (lambda d: d.update(layers={}), "'layers' of '.*' must be a list"),
        (lambda d: d["layers"].append(3), "layer 2 of '.*' must be an object, got 3"),
        (lambda d: d["layers"][0].update(size=3), "layer 0 of '.*' has an unknown key 'size'"),
        (lambda d: d["layers"][0].pop("gate"), "layer 0 of '.*' lacks the key 'gate'"),
        (lambda d: d["layers"][0].update(num_heads="4"), "'num_heads' of layer 0 .* wrong type"),
        (lambda d: d["layers"][0].update(num_heads=True), "'num_heads' of layer 0 .* wrong type"),
        (lambda d: d["layers"][0].update(num_heads=-1), "num_heads must be positive"),
        (lambda d: d["layers"][0].update(name="x"), "has no attention layer 'x'; it has 'bert"),
        (lambda d: d["layers"][0].update(embed_dim=8), "embed_dim of layer '.*' is 24 in model"),
        (lambda d: d["layers"][0]["gate"].update(type="Magic"), "gate of layer '.*': gate type"),
        (lambda d: d["layers"][0]["gate"].update(magic=1), "gate of layer '.*'magic'"),
        (lambda d: d["layers"][0].update(num_heads=3), "gate of layer '.*': scale must have 3"),
        (lambda d: d["layers"][0].update(head_dim=3), "has shape .* in '.*' and .* in model"),
        (lambda d: d["architecture"].update({"class": "os"}), "must be a model class of transf"),
        (lambda d: d["architecture"].pop("config"), "lacks the key 'config'"),
        (lambda d: d.update(aliases={"a": "b"}), "name 'b', which is missing"),
        (
            lambda d: d["layers"][0].update(gate=None),
            "has 'bert.*gate.scale', which model does not have",
        ),
    ],
)
def test_descriptions_that_do_not_fit(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=message):
        hw.load(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[]", b""])
def test_descriptions_that_are_not_json(folder, content):
    (folder / "headwise.json").write_bytes(content)
    with pytest.raises(ValueError, match="is not valid JSON|must have format"):
        hw.load(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -8])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises((ValueError, RuntimeError)) as error:
        hw.load(folder)
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_model(folder, tmp_path):
    hw.save(hw.convert(bert("BertModel", num_hidden_layers=1)), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", folder)
    with pytest.raises(ValueError, match="does not fit model .BertForSequenceClassification.: it"):
        hw.load(folder)


def test_generic_models_need_their_code(tmp_path):
    model = hw.convert(ARCHITECTURES["TransformerEncoder"].build())
    hw.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match="holds the weights of a .*TransformerEncoder, .* model="):
        hw.load(tmp_path / "m")
    with pytest.raises(ValueError, match="has no attention layer 'layers.0.self_attn'; it has ''"):
        hw.load(tmp_path / "m", nn.MultiheadAttention(EMBED, HEADS))


def test_tokenizer_travels_along(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    hw.save(hw.load(folder), folder, tokenizer=tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("good bad")["input_ids"] == tokenizer("good bad")["input_ids"]
    hw.load(folder)


def test_loading_leaves_the_saved_model_alone(folder):
    model = hw.load(folder)
    inputs = bert_inputs()
    expected = copy.deepcopy(model)(**inputs).logits
    torch.testing.assert_close(hw.load(folder)(**inputs).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda d: d["architecture"]["config"].update(hidden_size=10**9),
            "config of .* (is|builds)",
        ),
        (lambda d: d["architecture"]["config"].update(num_hidden_layers=10**7), "more than the we"),
        (lambda d: d["architecture"]["config"].update(vocab_size=10**11), "more than 1000 times"),
        (lambda d: d["architecture"]["config"].update(num_labels=10**9), "more than the weights"),
        (lambda d: d["architecture"]["config"].update(hidden_act="\x1b[2J"), "builds no Bert"),
        (
            lambda d: d["architecture"]["config"].update(attn_implementation="org/kernel"),
            "must not name code to fetch",
        ),
        (lambda d: d["layers"][0].update(embed_dim=10**9), "'embed_dim' of layer .* do not have"),
        (lambda d: d["layers"][0].update(num_heads=10**9), "'num_heads' of layer .* do not have"),
        (lambda d: d["layers"][0].update(kdim=10**12), "'kdim' of layer .* do not have"),
        (lambda d: d["layers"].append(dict(d["layers"][0])), "unique names, got .* twice"),
        (lambda d: d.update(version=True), "must have version 1, got True"),
        (lambda d: d.update(aliases={"a": ["b"]}), "which is missing"),
        (lambda d: d["layers"][0].update({"class": ["a"]}), "must be one of"),
        (lambda d: d["layers"][0].update({"x" * 5000: 1}), "has an unknown key 'xxx"),
    ],
)
def test_sizes_are_compared_before_they_are_allocated(folder, change, message):
    edit(folder, change)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as error:
        hw.load(folder)
    assert len(str(error.value)) < 500 and str(error.value).isprintable()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize("tail", ["\0", "\0{}", " {}", ",", "\0" * 100])
def test_nothing_may_follow_the_description(folder, tail):
    path = folder / "headwise.json"
    path.write_text(path.read_text() + tail)
    with pytest.raises(ValueError, match="is not valid JSON"):
        hw.load(folder)
