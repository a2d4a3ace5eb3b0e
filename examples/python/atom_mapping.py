"""Finds the head of a chemistry model that maps the atoms of products to those of reactants.

rxnmapper (Schwaller et al., Science Advances 2021) reads atom mappings off one attention head of an
ALBERT that was trained on reactions: the sixth head of its eleventh layer. The alignment role finds
it, given a few reactions whose mapping is known.

    pip install --no-deps rxnmapper==0.4.3
    python examples/python/atom_mapping.py
"""

import re
from importlib.util import find_spec
from pathlib import Path

import headwise as hw
import torch
from headwise.explain import AnnotatedBatch, RoleThresholds
from transformers import AlbertModel, logging

# Reactions of textbooks; atoms of one number are the same atom before and after.
REACTIONS = [
    "[CH3:1][C:2](=[O:3])[OH:4].[CH3:5][CH2:6][OH:7]>>[CH3:1][C:2](=[O:3])[O:7][CH2:6][CH3:5]",
    "[CH3:1][CH2:2][Br:9].[OH:3][c:4]1[cH:5][cH:6][cH:7][cH:8][cH:10]1"
    ">>[CH3:1][CH2:2][O:3][c:4]1[cH:5][cH:6][cH:7][cH:8][cH:10]1",
    "[CH3:1][C:2](=[O:3])[Cl:4].[NH2:5][CH2:6][CH2:7][CH3:8]"
    ">>[CH3:1][C:2](=[O:3])[NH:5][CH2:6][CH2:7][CH3:8]",
    "[CH3:1][CH:2]([CH3:3])[CH:4]=[O:5].[NH2:6][CH2:7][CH3:8]"
    ">>[CH3:1][CH:2]([CH3:3])[CH2:4][NH:6][CH2:7][CH3:8]",
    "[O:1]=[C:2]([OH:9])[c:3]1[cH:4][cH:5][cH:6][cH:7][cH:8]1.[CH3:10][NH2:11]"
    ">>[CH3:10][NH:11][C:2](=[O:1])[c:3]1[cH:4][cH:5][cH:6][cH:7][cH:8]1",
    "[Br:1][c:2]1[cH:3][cH:4][cH:5][cH:6][n:7]1.[CH3:8][CH2:9][NH:10][CH2:11][CH3:12]"
    ">>[CH3:8][CH2:9][N:10]([CH2:11][CH3:12])[c:2]1[cH:3][cH:4][cH:5][cH:6][n:7]1",
    "[CH3:1][O:2][C:3](=[O:4])[CH2:5][CH2:6][CH3:7].[OH2:8]"
    ">>[OH:8][C:3](=[O:4])[CH2:5][CH2:6][CH3:7]",
    "[CH3:1][S:2](=[O:3])(=[O:4])[Cl:5].[OH:6][CH2:7][CH2:8][CH:9]([CH3:10])[CH3:11]"
    ">>[CH3:1][S:2](=[O:3])(=[O:4])[O:6][CH2:7][CH2:8][CH:9]([CH3:10])[CH3:11]",
    "[CH3:1][C:2](=[O:3])[CH2:4][CH3:5]>>[CH3:1][CH:2]([OH:3])[CH2:4][CH3:5]",
    "[N:1]#[C:2][c:3]1[cH:4][cH:5][cH:6][cH:7][cH:8]1.[OH2:9]"
    ">>[NH2:1][C:2](=[O:9])[c:3]1[cH:4][cH:5][cH:6][cH:7][cH:8]1",
]
ATOM = re.compile(r"\[[A-Za-z][a-z]?H?\d*:\d+\]")
TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|.")


def read(reaction: str) -> tuple[list[str], list[int]]:
    """Tokens as the model knows them, and for each the number of its atom, 0 for none."""
    tokens, atoms = [], []
    for token in TOKEN.findall(reaction):
        mapped = ATOM.fullmatch(token)
        tokens.append(re.sub(r"H?\d*:\d+|[\[\]]", "", token) if mapped else token)
        atoms.append(int(token[1:-1].partition(":")[2]) if mapped else 0)
    return tokens, atoms


def annotate(reaction: str, vocabulary: dict[str, int]) -> AnnotatedBatch:
    """One reaction: reactants are side 1, products side 2."""
    tokens, atoms = read(reaction)
    arrow = tokens.index(">>")
    ids = [vocabulary[token] for token in ("[CLS]", *tokens, "[SEP]")]
    atoms = [0, *atoms, 0]
    side = [0] + [1] * arrow + [0] + [2] * (len(tokens) - arrow - 1) + [0]
    before = {atom: place for place, atom in enumerate(atoms) if atom and side[place] == 1}
    pairs = [(before[a], place) for place, a in enumerate(atoms) if a and side[place] == 2]
    valid = torch.ones(1, len(ids), dtype=torch.bool)
    return AnnotatedBatch(
        inputs={"input_ids": torch.tensor([ids]), "attention_mask": valid.long()},
        valid=valid,
        special=torch.tensor([side]) == 0,
        alignment=[pairs],
        side=torch.tensor([side]),
    )


logging.set_verbosity_error()
package = Path(next(iter(find_spec("rxnmapper").submodule_search_locations)))
folder = package / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
model = hw.convert(AlbertModel.from_pretrained(folder).eval())
batches = [annotate(r, {word: place for place, word in enumerate(words)}) for r in REACTIONS]
found = hw.head_roles(model, batches, thresholds=RoleThresholds(least_trials=10))

for question in found["questions"]:
    if question["role"] == "alignment":
        best = question["best"]
        print(
            f"{question['detail']}: layer {best['site']} head {best['head']} looks at its atom "
            f"in {best['share']:.0%} of {question['trials']} cases "
            f"(best fixed offset {question['baseline']:.0%})"
        )
heads = [
    f"layer {layer['site']} head {head['head']} ({role['detail']}, {role['share']:.2f})"
    for layer in found["layers"]
    for head in layer["heads"]
    for role in head["roles"]
    if role["role"] == "alignment"
]
print("heads with the alignment role:", ", ".join(heads) or "none")
