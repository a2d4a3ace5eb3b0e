"""A tiny random BERT and a tiny task that it can learn, for the tests of the command line."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch

GOOD = ("good", "fine", "great", "lovely")
BAD = ("bad", "poor", "awful", "dull")
PLAIN = ("the", "film", "is", "a", "and", "plot", "actor", "very", "so", "it")


def write_model(folder: Path, seed: int = 0, num_labels: int = 2, layers: int = 2) -> Path:
    """A BERT of 4 heads per layer, width 32, with a word-level tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *PLAIN]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=num_labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def write_texts(path: Path, rows: int = 240, seed: int = 0) -> Path:
    """Texts with more good than bad words are labelled 'up', the others 'down'."""
    generator = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "mood", "film"])
        for row in range(rows):
            up = row % 2 == 0
            words = [generator.choice(PLAIN) for _ in range(generator.randint(2, 12))]
            words += [generator.choice(GOOD if up else BAD) for _ in range(2)]
            generator.shuffle(words)
            writer.writerow([" ".join(words), "up" if up else "down", f"film {row // 4}"])
    return path
