"""sentence-transformers: the same sentences before and after, and through files."""

import headwise as hw
import pytest
import torch
from support.architectures import bert

sentence_transformers = pytest.importorskip("sentence_transformers")

TEXTS = ["a small film", "the film is long and the end is small", "long"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a small film the is long and end".split()


@pytest.fixture
def model(tmp_path):
    from sentence_transformers import SentenceTransformer
    from transformers import BertTokenizerFast

    torch.manual_seed(0)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    bert("BertModel").save_pretrained(tmp_path / "bert")
    BertTokenizerFast(vocab={w: i for i, w in enumerate(WORDS)}).save_pretrained(tmp_path / "bert")
    return SentenceTransformer(str(tmp_path / "bert"), device="cpu")


def embeddings(model):
    return torch.as_tensor(model.encode(TEXTS, batch_size=2))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_sentences_are_encoded_as_before(model):
    before = embeddings(model)
    hw.convert(model)
    assert len(hw.attention_layers(model)) == 2
    close(embeddings(model), before)
    hw.convert(model, hw.FixedGate([0, 2]))
    assert not torch.allclose(embeddings(model), before, atol=1e-3)
    with hw.trace(model) as trace:
        embeddings(model)
    assert all(len(calls) == 2 for calls in trace.history.values())  # two batches


def test_padding_of_a_batch_changes_nothing(model):
    hw.convert(model, hw.BudgetGate(keep=0.5))
    close(embeddings(model)[2], torch.as_tensor(model.encode(TEXTS[2:]))[0])


def test_saving(model, tmp_path):
    from sentence_transformers import SentenceTransformer

    hw.convert(model)
    expected = embeddings(model)
    model.save_pretrained(str(tmp_path / "plain"))
    close(embeddings(SentenceTransformer(str(tmp_path / "plain"), device="cpu")), expected)

    fresh = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    hw.convert(model, hw.FixedGate([1]))
    with pytest.raises(ValueError, match="headwise.save"):
        model.save_pretrained(str(tmp_path / "gated"))
    hw.save(model, tmp_path / "ours")
    close(embeddings(hw.load(tmp_path / "ours", model=fresh)), embeddings(model))
