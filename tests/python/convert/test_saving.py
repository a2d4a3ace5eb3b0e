"""save_pretrained of a converted model: what the original class reads, or a refusal."""

import copy
import json

import headwise as hw
import pytest
import torch
from headwise.convert.saving import SavePretrained
from support.architectures import ARCHITECTURES, HEADS
from support.structures import make_plan

transformers = pytest.importorskip("transformers")

ROWS = {n: r for n, r in ARCHITECTURES.items() if not n.startswith(("Multihead", "Transformer"))}


@pytest.fixture(params=ROWS.values(), ids=lambda row: row.name)
def row(request):
    torch.manual_seed(0)
    return request.param


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_without_a_gate_the_original_class_reads_it(row, tmp_path):
    original = row.build()
    inputs = row.inputs()
    expected = row.run(original, inputs)
    model = hw.convert(copy.deepcopy(original))
    model.save_pretrained(tmp_path)
    again, report = type(original).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(original)
    close(row.run(again.eval(), inputs), expected)
    for name, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    close(row.run(model, inputs), expected)  # what was saved is as it was
    assert "headwise" not in (tmp_path / "config.json").read_text()


def test_a_part_that_the_model_was_built_without_may_be_missing(tmp_path):
    """The base model of BERT for masked words has no pooler."""
    whole = ARCHITECTURES["BertModel"].build()
    model = hw.convert(transformers.BertForMaskedLM(whole.config).eval())
    model.base_model.save_pretrained(tmp_path / "base")
    again, report = transformers.BertForMaskedLM.from_pretrained(
        tmp_path / "base", output_loading_info=True
    )
    assert report["missing_keys"] and all(key.startswith("cls.") for key in report["missing_keys"])
    converted = hw.convert(again).bert.state_dict()
    for name, tensor in model.bert.state_dict().items():
        assert torch.equal(converted[name], tensor), name
    del model.bert.embeddings.LayerNorm.weight
    with pytest.raises(ValueError, match="'embeddings.LayerNorm.weight' is missing"):
        model.base_model.save_pretrained(tmp_path / "x")


def test_a_gate_is_refused_by_name(row, tmp_path):
    model = hw.convert(row.build(), hw.FixedGate([0, 1]))
    with pytest.raises(ValueError, match=r"has a FixedGate. Use headwise.save\(model, dir\)"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    hw.convert(model, lambda name, layer: None)
    model.save_pretrained(tmp_path / "x")


#: Their classes take the width of a head from the configuration; those of vision transformers do
#: since transformers has them in one module.
SIZED = ("Llama", "Mistral", "Qwen", "ViT", "DeiT", "Dinov2", "IJepa")


def test_a_pruned_model_is_read_by_its_class_where_that_can_be_built_so(row, tmp_path):
    model = hw.convert(row.build(), hw.FixedGate([2, 3]))  # one group, where heads share
    small = hw.prune(model)
    two_modules = any(
        type(part).__name__.endswith("SelfAttention") for part in row.build().modules()
    )
    if two_modules or not row.name.startswith(SIZED):
        with pytest.raises(ValueError, match="has shape .* Use headwise.save"):
            small.save_pretrained(tmp_path / "x")
        assert not (tmp_path / "x").exists()
    else:
        inputs = row.inputs()
        expected = row.run(small, inputs)
        heads = small.config.num_attention_heads
        small.save_pretrained(tmp_path)
        assert small.config.num_attention_heads == heads
        again, report = type(small).from_pretrained(tmp_path, output_loading_info=True)
        wrong = ("missing_keys", "unexpected_keys", "mismatched_keys")
        assert not any(report[key] for key in wrong)
        close(row.run(again.eval(), inputs), expected)
        assert again.config.num_attention_heads == 2
        assert sum(p.numel() for p in again.parameters()) < sum(
            p.numel() for p in row.build().parameters()
        )
        converted = hw.convert(again)
        close(row.run(converted, inputs), expected)
        assert all(layer.num_heads == 2 for layer in hw.attention_layers(converted).values())


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [
        ("LlamaForCausalLM", [[0, 1], [0, 1, 2, 3]], "different numbers of heads .2 in 'model.lay"),
        ("Qwen3ForCausalLM", [[0, 1, 2]] * 2, "do not share key/value heads in groups of one size"),
        ("Qwen3ForCausalLM", [[]] * 2, "cannot be built|has shape"),
        ("ViTForImageClassification", [[0], [0, 1]], "different numbers of heads"),
    ],
)
def test_pruned_models_that_no_configuration_describes_are_refused(name, heads, message, tmp_path):
    model = hw.convert(ROWS[name].build())
    small = hw.prune(model, make_plan(model, heads, scaled=False))
    with pytest.raises(ValueError, match=message) as caught:
        small.save_pretrained(tmp_path / "x")
    assert "Use headwise.save" in str(caught.value) and not (tmp_path / "x").exists()
    hw.save(small, tmp_path / "y")
    inputs = ROWS[name].inputs()
    close(ROWS[name].run(hw.load(tmp_path / "y"), inputs), ROWS[name].run(small, inputs))


def test_a_whole_pruned_model_is_written(row, tmp_path):
    whole = hw.prune(hw.convert(row.build(), hw.FixedGate()))
    whole.save_pretrained(tmp_path / "x")


def test_copies_and_parts_save_themselves(tmp_path):
    row = ROWS["BertForSequenceClassification"]
    model = hw.convert(row.build())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2.0)
    copied.save_pretrained(tmp_path / "copy")
    torch.save(model, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False).save_pretrained(tmp_path / "pickle")
    model.bert.save_pretrained(tmp_path / "part")
    inputs = row.inputs()
    kind = type(model)
    close(row.run(kind.from_pretrained(tmp_path / "copy").eval(), inputs), row.run(copied, inputs))
    close(row.run(kind.from_pretrained(tmp_path / "pickle").eval(), inputs), row.run(model, inputs))
    again = transformers.BertModel.from_pretrained(tmp_path / "part").eval()
    close(again(**inputs)[0], model.bert(**inputs)[0])


def test_adapters_around_layers_are_refused(tmp_path):
    model = hw.convert(ROWS["BertModel"].build())
    attention = model.encoder.layer[0].attention.self
    attention.mha = torch.nn.Sequential(attention.mha)
    with pytest.raises(ValueError, match="is missing .an adapter may be around it."):
        model.save_pretrained(tmp_path)


def test_a_state_dict_that_is_handed_in_is_written(tmp_path):
    row = ROWS["GPT2LMHeadModel"]
    model = hw.convert(row.build())
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state, max_shard_size="20KB")
    again = type(model).from_pretrained(tmp_path)
    double = row.build()
    torch.manual_seed(0)
    double.load_state_dict({n: 2 * t for n, t in row.build().state_dict().items()})
    assert again.transformer.h[0].attn.c_attn.weight.shape == (24, 72)
    close(again.transformer.wpe.weight, 2 * model.transformer.wpe.weight)
    own = model.transformer.h[0].attn
    close(again.transformer.h[0].attn.c_proj.weight, 2 * own.o_proj.weight.t())


def test_decoders_keep_the_names_of_their_projections():
    """So that tensor-parallel plans of transformers, which are lists of such names, fit."""
    for name in ("LlamaForCausalLM", "Qwen3ForCausalLM", "MistralModel, sliding window"):
        original = ROWS[name].build()
        names = [n for n, _ in original.named_parameters()]
        assert [n for n, _ in hw.convert(original).named_parameters()] == names


def test_what_a_trainer_resumes_from_is_refused_by_from_pretrained(tmp_path):
    for name in ("BertModel", "LlamaForCausalLM", "DistilBertForSequenceClassification"):
        folder = tmp_path / name
        model = hw.convert(ROWS[name].build(), hw.BudgetGate(keep=0.5))
        model.save_pretrained.checkpoints = True
        model.save_pretrained(folder)
        tensors = hw.io.load_safetensors(folder / "model.safetensors")
        assert tensors.keys() == model.state_dict().keys()
        for kind in (type(model), transformers.AutoModel):
            with pytest.raises(ValueError, match="headwise_gates"):
                kind.from_pretrained(folder)
        transformers.PreTrainedConfig.from_json_file(folder / "config.json")  # as a Trainer does


def test_models_that_were_not_converted_save_as_ever(tmp_path):
    model = ROWS["BertModel"].build()
    hw.convert(ROWS["BertModel"].build())
    assert not isinstance(model.save_pretrained, SavePretrained)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_attention_heads"] == HEADS
