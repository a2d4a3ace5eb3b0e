"""A task and models small enough to train in seconds, without a network: for the notebooks.

A text is 8 tokens of 50. Its label is 1 if one of the tokens 1 to 9 is among the others.
"""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

LENGTH, TOKENS = 8, 50


def batches(number, size=64, seed=0):
    """``number`` batches of the task, as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        ids = torch.randint(10, TOKENS, (size, LENGTH), generator=generator)
        labels = torch.randint(2, (size,), generator=generator)
        place = torch.randint(1, LENGTH, (size,), generator=generator)
        few = torch.randint(1, 10, (size,), generator=generator)
        rows = torch.arange(size)
        ids[rows, place] = torch.where(labels == 1, few, ids[rows, place])
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def new_classifier():
    """A BERT with 2 layers of 4 heads and random weights."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = BertConfig(vocab_size=TOKENS, num_labels=2, **sizes, **still)
    return BertForSequenceClassification(config)


def trained_classifier(steps=150):
    """The same after ``steps`` steps on the task."""
    model = new_classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model, number=8):
    """The share of labels that are right, on batches that training did not see."""
    right = [
        (model(**batch).logits.argmax(1) == batch["labels"]).float().mean()
        for batch in batches(number, seed=1)
    ]
    return torch.stack(right).mean().item()


def new_decoder():
    """A Llama with 2 layers of 8 heads on 4 key/value heads and random weights."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=8, num_key_value_heads=4)
    config = LlamaConfig(vocab_size=100, **sizes, **heads, pad_token_id=0)
    return LlamaForCausalLM(config).eval()
