"""Two inputs side by side: which heads ran for one of them only, and by which words."""

import copy

import headwise as hw
import pytest
import torch
from headwise.explain.document import Explanation
from support.architectures import bert, bert_inputs
from support.explain_documents import explanation
from support.explained import trained


def test_differences_are_the_heads_whose_choice_differs():
    torch.manual_seed(3)
    model = hw.convert(bert("BertForSequenceClassification", num_labels=3), hw.BudgetGate(keep=0.5))
    result = hw.explain(trained(model), bert_inputs())
    for first in range(3):
        for second in range(3):
            found = result.differences(first, second)
            expected = {
                (layer["site"], head["head"])
                for layer, other in zip(
                    result.inputs[first]["layers"], result.inputs[second]["layers"], strict=True
                )
                for head, twin in zip(layer["heads"], other["heads"], strict=True)
                if head["on"] != twin["on"]
            }
            assert {(entry["site"], entry["head"]) for entry in found} == expected
            both = [entry["margins"] for entry in found]
            apart = [0.0 if None in pair else abs(pair[0] - pair[1]) for pair in both]
            assert apart == sorted(apart, reverse=True)
            for entry in found:
                ran, slept = (first, second)[:: 1 - 2 * entry["ran_for"]]
                head = result.head(entry["site"], entry["head"], ran)
                twin = result.head(entry["site"], entry["head"], slept)
                assert head["on"] and not twin["on"]
                best = sorted((share for share in head["shares"] if share > 0), reverse=True)[:3]
                worst = sorted(share for share in twin["shares"] if share < 0)[:3]
                assert [share for _, share in entry["spoke_for"]] == best
                assert [share for _, share in entry["spoke_against"]] == worst


def test_words_are_tokens_and_heads_without_shares_have_none():
    document = explanation(["one", "two"])
    head = document["inputs"][1]["layers"][0]["heads"][0]
    head.update(on=False, shares=[-0.3, 0.2, -0.1, 0.0])
    (found,) = Explanation(document).differences()
    assert found["ran_for"] == 0
    assert found["spoke_against"] == [("two", -0.3), ("t2", -0.1)]
    bare = copy.deepcopy(document)
    bare["inputs"][1]["tokens"] = None
    head = bare["inputs"][0]["layers"][0]["heads"][0]
    head.update(shares=None, margin=None)
    (found,) = Explanation(bare).differences()
    assert found["spoke_for"] == [] and found["margins"][0] is None
    assert found["spoke_against"][0] == ("token 0", -0.3)


def test_inputs_of_different_models_are_refused():
    document = explanation(["one", "two"])
    document["inputs"][1]["layers"][0]["name"] = "another"
    with pytest.raises(ValueError, match="inputs must be of one model"):
        Explanation(document).differences()
    with pytest.raises(IndexError):
        Explanation(document).differences(0, 2)
