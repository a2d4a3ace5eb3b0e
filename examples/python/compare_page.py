"""Compares heads that are cut once with heads that every text chooses, and writes a page of it.

`headwise compare` lets MiniLM learn from a few made-up reviews, cuts it to half of its heads both
ways with the same training, and measures accuracy and time. So small a study shows how it is done;
give it the results.json of a larger one to see that. Open the file in a browser; it needs no
network.

    python examples/python/compare_page.py [PAGE.html [RESULTS.json of `headwise compare`]]
"""

import csv
import sys
import tempfile
from pathlib import Path

from headwise.apps.cli import main
from headwise.apps.pages import write_page

SUBJECTS = ("the film", "this comedy", "the plot", "the cast", "every scene", "the music",
            "the ending", "her first role", "the camera", "this remake")  # fmt: skip
PRAISE = ("is a delight", "is warm and funny", "is told with great care", "moved me to tears")
BLAME = ("is a waste of time", "makes no sense", "is dull and far too long", "fails from the start")


def compare(folder: Path) -> Path:
    """Runs the study in a folder; returns its results."""
    data = folder / "reviews.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label"))
        for subject in SUBJECTS:
            rows.writerows((f"{subject} {words}", "good") for words in PRAISE)
            rows.writerows((f"{subject} {words}", "bad") for words in BLAME)
    command = ["compare", "--data", data, "--methods", "michel-finetuned", "budget-gate"]
    command += ["--keep", 0.5, "--dense-steps", 16, "--steps", 16, "--batch-size", 16]
    status = main([str(part) for part in (*command, "--max-length", 16, "--out", folder)])
    if status != 0:
        sys.exit(status)
    return folder / "results.json"


page = Path(sys.argv[1] if len(sys.argv) > 1 else "compared.html")
with tempfile.TemporaryDirectory() as folder:
    write_page(page, sys.argv[2] if len(sys.argv) > 2 else compare(Path(folder)))
print(f"wrote {page}, {page.stat().st_size / 1e6:.1f} MB: open it in a browser")
