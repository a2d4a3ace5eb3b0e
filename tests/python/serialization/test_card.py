"""The model card: heads, gates, method, plan and what was measured."""

import headwise as hw
import pytest
from headwise.serialization import model_card, write_card
from support.architectures import ARCHITECTURES, bert
from support.structures import make_plan


def test_a_card_says_what_was_pruned_and_measured(tmp_path):
    model = hw.convert(bert("BertModel"))
    plan = make_plan(model, [[0, 2], [3]], scaled=False)
    small = hw.prune(model, plan)
    hw.save(small, tmp_path / "m")
    write_card(tmp_path / "m", small, plan=plan, metrics={"accuracy": 0.8216}, base_model="a/b")
    text = (tmp_path / "m" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: headwise\n") and 'base_model: "a/b"' in text
    assert "3 of 8 attention heads are left." in text and "# a/b, 3 heads" in text
    names = list(hw.attention_layers(small))
    assert f"| `{names[0]}` | 2 | 4 |" in text and f"| `{names[1]}` | 1 | 4 |" in text
    assert "| accuracy | 0.8216 |" in text and f"pruned by `{plan.metric}`" in text
    block = text.split("```json\n")[1].split("\n```")[0]
    assert hw.HeadPlan.from_json(block) == plan
    assert 'hw.load("PATH")' in text
    hw.load(tmp_path / "m")  # the card is not part of the model


def test_a_card_of_gates_and_of_a_folder_of_transformers(tmp_path):
    gated = model_card(hw.convert(bert("BertModel"), hw.BudgetGate(keep=0.5)))
    assert "All 8 attention heads are there." in gated
    assert "Every input chooses which of them run (BudgetGate)." in gated
    small = hw.prune_heads(
        hw.convert(ARCHITECTURES["LlamaForCausalLM"].build()), {0: [0, 1], 1: [0, 1]}
    )
    small.save_pretrained(tmp_path)
    write_card(tmp_path, small)
    text = (tmp_path / "README.md").read_text()
    assert "library_name: transformers" in text and "hw.load" not in text
    assert 'LlamaForCausalLM.from_pretrained("PATH")' in text


def test_save_writes_a_card_with_the_model(tmp_path):
    model = hw.convert(bert("BertModel"))
    plan = make_plan(model, [[0, 2], [3]], scaled=False)
    small = hw.prune(model, plan)
    hw.save(small, tmp_path / "m", card={"plan": plan, "metrics": {"accuracy": 0.5}})
    text = (tmp_path / "m" / "README.md").read_text()
    assert text == model_card(small, plan=plan, metrics={"accuracy": 0.5})
    assert "3 of 8 attention heads are left." in text and "| accuracy | 0.5 |" in text
    hw.save(small, tmp_path / "m")  # a card that is there is kept
    assert (tmp_path / "m" / "README.md").read_text() == text
    with pytest.raises(ValueError, match="metrics must map names to numbers"):
        hw.save(small, tmp_path / "n", card={"metrics": {"accuracy": "good"}})
    assert not (tmp_path / "n").exists()


def test_names_cannot_break_the_table():
    model = hw.convert(bert("BertModel"))
    text = model_card(model, metrics={"a|b<script>`\x1b": 1}, base_model='x"\n---')
    assert "<script" not in text and "\x1b" not in text and 'base_model: "x\\"\\n---"' in text
    assert "| a¦b‹script>'\\x1b | 1 |" in text


def test_what_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"call headwise\.convert first"):
        model_card(bert("BertModel"))
    model = hw.convert(bert("BertModel"))
    with pytest.raises(ValueError, match="metrics must map names to numbers, got 'good'"):
        model_card(model, metrics={"accuracy": "good"})
    with pytest.raises(FileNotFoundError, match="dir must be a folder"):
        write_card(tmp_path / "none", model)
