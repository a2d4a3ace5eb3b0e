"""Roles of heads: planted heads are found, the operators against plain loops, the annotations."""

import itertools
import math

import headwise as hw
import pytest
import torch
from headwise.explain import (
    AlignedPair,
    AnnotatedBatch,
    RoleThresholds,
    Sentence,
    annotate_texts,
    read_alignments,
    read_conllu,
)
from headwise.explain.questions import Questionnaire, fixed_offset_peaks
from support.explain_documents import CONLLU
from torch import Tensor, nn

OPS = torch.ops.headwise
WIDTH = 16  # of a planted head


class Planted(nn.Module):
    """Attention whose heads attend as prescribed: scores[h] [L, L] or a function of the ids."""

    def __init__(self, scores):
        super().__init__()
        self.mha = hw.MultiheadAttention(WIDTH * len(scores), len(scores), batch_first=True)
        self.scores = scores

    def forward(self, input_ids, attention_mask):
        batch, length = input_ids.shape
        x = torch.zeros(batch, length, self.mha.embed_dim)
        bias = torch.stack([score(input_ids, attention_mask) for score in self.scores], 1)
        padding = attention_mask == 0
        bias = bias.expand(batch, -1, length, length).reshape(-1, length, length)
        y, _ = self.mha(x, x, x, key_padding_mask=padding, need_weights=False, attn_mask=bias)
        return y


def looking(offset: int, strength: float = 9.0):
    def score(ids, mask):
        length = ids.size(1)
        return strength * torch.eye(length).roll(offset, 1).expand(len(ids), -1, -1)

    return score


def to_first(ids, mask):
    score = torch.zeros(len(ids), ids.size(1), ids.size(1))
    score[:, :, 0] = 9.0
    return score


def to_separator(ids, mask):
    return 9.0 * (ids == SEP)[:, None, :].float().expand(-1, ids.size(1), -1)


def to_same(ids, mask):
    same = (ids[:, :, None] == ids[:, None, :]).float()
    return 9.0 * (same - torch.eye(ids.size(1))) * same


def to_rarest(ids, mask):
    return 9.0 * (ids == RARE)[:, None, :].float().expand(-1, ids.size(1), -1)


def everywhere(ids, mask):
    return torch.zeros(len(ids), ids.size(1), ids.size(1))


PAD, CLS, SEP, RARE = 0, 1, 2, 3


def planted_batches(count=4, size=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        length = int(torch.randint(9, 14, (1,), generator=generator))
        ids = torch.randint(4, 8, (size, length), generator=generator)
        valid = torch.ones(size, length, dtype=torch.bool)
        ids[:, 0] = CLS
        for row in range(size):
            end = int(torch.randint(8, length, (1,), generator=generator))
            ids[row, 2 + row % 4] = RARE
            ids[row, end], ids[row, end + 1 :] = SEP, PAD
            valid[row, end + 1 :] = False
        batches.append(
            AnnotatedBatch(
                inputs={"input_ids": ids, "attention_mask": valid.long()},
                valid=valid,
                special=(ids == CLS) | (ids == SEP) | (ids == PAD),
                ids=ids,
            )
        )
    return batches


HEADS = {
    "offset -1": looking(-1),
    "offset +1": looking(1),
    "offset +2": looking(2),
    "first": to_first,
    "separator": to_separator,
    "same token": to_same,
    "rare token": to_rarest,
    "broad": everywhere,
}


def roles_of(document, site=0):
    return [
        {f"{role['role']} {role['detail']}".strip() for role in head["roles"]}
        for head in document["layers"][site]["heads"]
    ]


def test_planted_heads_are_found_with_their_evidence():
    torch.manual_seed(0)
    document = hw.head_roles(Planted(list(HEADS.values())), planted_batches(), resamples=200)
    assert (document["format"], document["version"]) == ("headwise.roles", 1)
    assert document["inputs"] == 80 and document["halves"] == [40, 40]
    found = roles_of(document)
    for name, roles in zip(HEADS, found, strict=True):
        assert name in roles, (name, roles)
    for name, head in zip(HEADS, document["layers"][0]["heads"], strict=True):
        if name == "broad":
            assert head["entropy"] > 0.99
            continue
        assert "broad" not in {role["role"] for role in head["roles"]}
        (role,) = [r for r in head["roles"] if f"{r['role']} {r['detail']}".strip() == name]
        assert role["share"] == pytest.approx(1.0, abs=0.02)
        assert role["low"] <= role["share"] <= role["high"]
        assert role["trials"] >= 20
        if name in ("same token", "rare token"):
            assert role["baseline"] < 0.6
    best = {(q["role"], q["detail"]): q["best"]["head"] for q in document["questions"]}
    for place, name in enumerate(HEADS):
        if name != "broad":
            role, _, detail = name.partition(" ") if name.startswith("offset") else (name, "", "")
            assert best[(role, detail)] == place


def test_a_head_without_a_habit_has_no_role():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 20, 20, generator=generator) * 2

    def wandering(ids, mask):
        shuffled = torch.randperm(20, generator=generator)[: ids.size(1)]
        return noise[:, shuffled][:, :, shuffled].expand(len(ids), -1, -1)

    document = hw.head_roles(Planted([wandering]), planted_batches(), resamples=10)
    assert roles_of(document) == [set()]


def test_what_most_heads_do_sets_no_head_apart():
    """All of eight heads look at the first token most of the time, one of them always."""

    def mostly(seed):
        def score(ids, mask):
            generator = torch.Generator().manual_seed(seed + ids.size(1))
            away = (torch.rand(len(ids), ids.size(1), generator=generator) < 0.3).float()
            ahead = torch.eye(ids.size(1)).roll(1, 1)
            return to_first(ids, mask) + 20.0 * away[:, :, None] * ahead

        return score

    model = Planted([to_first, *(mostly(seed) for seed in range(7))])
    document = hw.head_roles(model, planted_batches(), resamples=50)
    found = roles_of(document)
    assert "first" in found[0] and not any("first" in roles for roles in found[1:])
    (role,) = [r for r in document["layers"][0]["heads"][0]["roles"] if r["role"] == "first"]
    assert role["share"] == 1.0 and 0.6 < role["baseline"] < 0.8
    # If all heads do it always, it is a property of the model and not a head's role.
    document = hw.head_roles(Planted([to_first] * 3), planted_batches(), resamples=10)
    assert not any("first" in roles for roles in roles_of(document))
    (question,) = [q for q in document["questions"] if q["role"] == "first"]
    assert question["best"]["share"] == question["baseline"] == 1.0
    # A model of one head has no others.
    assert "first" in roles_of(hw.head_roles(Planted([to_first]), planted_batches()))[0]


def test_thresholds_decide():
    batches = planted_batches()
    model = Planted([looking(-1)])
    assert "offset -1" in roles_of(hw.head_roles(model, batches, resamples=10))[0]
    few = RoleThresholds(least_trials=10**6)
    document = hw.head_roles(model, batches, thresholds=few, resamples=10)
    assert roles_of(document) == [{"narrow"}]
    assert document["thresholds"]["least_trials"] == 10**6
    everything = RoleThresholds(broad=0.0)
    assert "broad" in roles_of(hw.head_roles(model, batches, thresholds=everything))[0]
    with pytest.raises(ValueError, match="offset must be between 0 and 1, got 1.2"):
        RoleThresholds(offset=1.2)


def test_syntactic_heads_beat_the_best_fixed_offset():
    """A head that looks from a verb to its object, one to three words later."""
    generator = torch.Generator().manual_seed(0)
    batches, target = [], {}
    for number in range(4):
        ids = torch.randint(4, 12, (20, 10), generator=generator)
        ids[:, 0], ids[:, -1] = CLS, SEP
        links = []
        for row in range(20):
            verb = int(torch.randint(1, 5, (1,), generator=generator))
            distance = int(torch.randint(1, 4, (1,), generator=generator))
            links.append([(verb + distance - 1, verb - 1, "obj")])  # words leave out CLS
            target[(number, row)] = (verb, verb + distance)
        batches.append(
            AnnotatedBatch(
                inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                valid=torch.ones_like(ids, dtype=torch.bool),
                special=(ids == CLS) | (ids == SEP),
                ids=ids,
                dependencies=links,
            )
        )

    def to_object(ids, mask):
        number = next(i for i, b in enumerate(batches) if torch.equal(b.inputs["input_ids"], ids))
        score = torch.zeros(20, 10, 10)
        for row in range(20):
            verb, found = target[(number, row)]
            score[row, verb, found] = 9.0
        return score

    document = hw.head_roles(Planted([looking(1), to_object]), batches, resamples=50)
    found = roles_of(document)
    assert "syntactic obj: head to dependent" in found[1]
    assert not any(role.startswith("syntactic") for role in found[0])
    (role,) = [r for r in document["layers"][0]["heads"][1]["roles"] if r["role"] == "syntactic"]
    assert role["share"] == 1.0 and 0.2 < role["baseline"] < 0.6


def test_two_dimensional_offsets_of_images():
    rows, columns = 3, 4

    def above(x):
        length = rows * columns + 1
        score = torch.zeros(len(x), length, length)
        for place in range(columns, rows * columns):
            score[:, place + 1, place + 1 - columns] = 9.0
        return score

    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = hw.MultiheadAttention(8, 1, batch_first=True)

        def forward(self, x):
            zero = torch.zeros(*x.shape[:2], 8)
            return self.mha(zero, zero, zero, attn_mask=above(x), need_weights=False)[0]

    length = rows * columns + 1
    special = torch.zeros(6, length, dtype=torch.bool)
    special[:, 0] = True
    batch = AnnotatedBatch(
        inputs=torch.zeros(6, length, 8),
        valid=torch.ones(6, length, dtype=torch.bool),
        special=special,
    )
    document = hw.head_roles(Image(), [batch, batch], grid=(rows, columns), resamples=10)
    assert "grid offset -1,+0" in roles_of(document)[0]
    with pytest.raises(ValueError, match=r"grid must have one place .* \(12\), got 5 x 5"):
        hw.head_roles(Image(), [batch], grid=(5, 5))


def test_alignment_of_two_sides():
    generator = torch.Generator().manual_seed(0)
    batches, order = [], {}
    for number in range(3):
        side = torch.tensor([0] + [1] * 5 + [0] + [2] * 5).expand(10, -1).contiguous()
        pairs = []
        for row in range(10):
            shuffled = torch.randperm(5, generator=generator)
            pairs.append([(1 + i, 7 + int(j)) for i, j in enumerate(shuffled)])
            order[(number, row)] = pairs[-1]
        batches.append(
            AnnotatedBatch(
                inputs={
                    "input_ids": torch.full((10, 12), 4 + number),
                    "attention_mask": torch.ones(10, 12, dtype=torch.long),
                },
                valid=torch.ones(10, 12, dtype=torch.bool),
                special=side == 0,
                alignment=pairs,
                side=side,
            )
        )

    def aligned(ids, mask):
        score = torch.zeros(10, 12, 12)
        for row in range(10):
            for left, right in order[(int(ids[0, 0]) - 4, row)]:
                score[row, right, left] = 6.0
                score[row, right, right] = 9.0  # looks at itself even more: its own side is out
        return score

    document = hw.head_roles(Planted([everywhere, aligned]), batches, resamples=20)
    assert "alignment 2 to 1" in roles_of(document)[1]
    assert "alignment 1 to 2" not in roles_of(document)[1]
    assert not any("alignment" in role for role in roles_of(document)[0])


@pytest.mark.parametrize("masked", ["none", "padding", "boolean", "floating", "causal", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_peaks_are_those_of_the_map(masked, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 7, 4, dtype=dtype), torch.randn(2, 3, 7, 4, dtype=dtype)
    excluded = torch.rand(2, 7) < 0.3
    padding = torch.arange(7) >= torch.tensor([7, 4])[:, None]
    forbid = torch.rand(7, 7) < 0.3
    masks = {
        "none": (None, None, False),
        "padding": (padding, None, False),
        "boolean": (None, forbid, False),
        "floating": (None, torch.randn(2, 3, 7, 7).to(dtype), False),
        "causal": (None, None, True),
        "both": (padding, forbid, True),
    }[masked]
    for left_out in (None, excluded):
        key, weight = OPS.attention_peaks(q, k, *masks, left_out)
        wide = torch.float32 if dtype == torch.bfloat16 else dtype
        float_masks = [m if m is None or m is True or m is False or m.dtype == torch.bool
                       else m.to(wide) for m in masks]  # fmt: skip
        full = OPS.attention_probabilities(q.to(wide), k.to(wide), *float_masks)
        if left_out is not None:
            full = full.masked_fill(left_out[:, None, None], 0.0)
        best, where = full.max(-1)
        assert torch.equal(key, where.masked_fill(best <= 0, -1).int())
        torch.testing.assert_close(weight, best)


def test_long_inputs_are_taken_in_blocks():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 1500, 4), torch.randn(1, 2, 1500, 4)  # more than one block
    key, weight = OPS.attention_peaks(q, k, None, None, True)
    best, where = OPS.attention_probabilities(q, k, None, None, True).max(-1)
    assert torch.equal(key, where.int())
    torch.testing.assert_close(weight, best)


def test_hits_are_counted_by_their_definition():
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(-1, 6, (3, 2, 5), generator=generator).int()
    group = torch.randint(0, 3, (3, 6), generator=generator)
    trials = torch.stack(
        [torch.randint(0, high, (40,), generator=generator) for high in (3, 4, 5, 6)], 1
    )
    for others_only in (False, True):
        hits, asked = OPS.peak_hits(key, trials, group, 4, others_only)
        expected = torch.zeros(3, 2, 4, dtype=torch.int32)
        counted = torch.zeros(3, 4, dtype=torch.int32)
        for b, f, i, j in trials.tolist():
            counted[b, f] += 1
            for h in range(2):
                seen = int(key[b, h, i])
                if seen >= 0 and group[b, seen] == group[b, j] and not (others_only and seen == i):
                    expected[b, h, f] += 1
        assert torch.equal(hits, expected) and torch.equal(asked, counted)
    with pytest.raises(IndexError, match=r"trials must be .* within \[3, 4, 5, 6\]"):
        OPS.peak_hits(key, torch.tensor([[0, 4, 0, 0]]), group, 4)
    with pytest.raises(ValueError, match=r"trials must be int64 \[T, 4\], got \[2, 3\]"):
        OPS.peak_hits(key, torch.zeros(2, 3, dtype=torch.long), group, 4)


def test_share_intervals_cover_and_narrow():
    generator = torch.Generator().manual_seed(0)
    trials = torch.randint(1, 6, (400, 1), generator=generator).double()
    hits = torch.binomial(trials, torch.full_like(trials, 0.3), generator=generator)
    share, low, high = OPS.share_interval(hits, trials)
    assert share.item() == pytest.approx((hits.sum() / trials.sum()).item())
    assert low < 0.3 < high and high - low < 0.15
    # The normal approximation for a ratio of means.
    spread = (hits - share * trials).std() / trials.mean() / math.sqrt(400)
    assert (high - low).item() == pytest.approx(2 * 1.96 * spread.item(), rel=0.15)
    none = OPS.share_interval(torch.zeros(3, 1), torch.zeros(3, 1))
    assert all(value.isnan().all() for value in none)


def test_an_interrupted_count_goes_on(tmp_path):
    batches, model = planted_batches(), Planted(list(HEADS.values()))
    whole = hw.head_roles(model, batches, resamples=20)
    calls = []

    def stopping(model, inputs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(**inputs)

    options = {"forward_fn": stopping, "folder": tmp_path, "resamples": 20}
    with pytest.raises(KeyboardInterrupt):
        hw.head_roles(model, batches, **options)
    (kept,) = tmp_path.iterdir()
    assert len(kept.read_text().splitlines()) == 3  # what it is of, and two batches
    assert not model.mha._observers and model.mha._probe is None
    calls[:] = [1] * 10
    assert hw.head_roles(model, batches, **options) == whole
    assert len(calls) == 12  # two batches were left
    assert hw.head_roles(model, batches, **options) == whole


def test_annotation_of_texts(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    sentence = Sentence(("the", "film", "is", "good"), ((0, 1, "det"), (3, 1, "amod")))
    (batch,) = annotate_texts(["a good film", sentence], tokenizer)
    assert batch.valid.sum(1).tolist() == [5, 6]
    assert batch.content.sum(1).tolist() == [3, 4]
    assert batch.word_of.tolist()[1] == [-1, 0, 1, 2, 3, -1]
    assert batch.dependencies[0] == () and batch.dependencies[1] == sentence.dependencies
    peaks = fixed_offset_peaks(batch)  # [B, 20, L]
    offsets = [o for o in range(-10, 11) if o]
    assert peaks[1, offsets.index(-1)].tolist() == [-1, -1, 1, 2, 3, -1]
    assert peaks[1, offsets.index(2)].tolist() == [-1, 3, 4, -1, -1, -1]
    questions = Questionnaire([batch], least_trials=1)
    names = {(q.role, q.detail) for q in questions.questions}
    assert ("syntactic", "det: dependent to head") in names
    with pytest.raises(ValueError, match="texts must not be empty"):
        annotate_texts([], tokenizer)


def test_conllu(tmp_path):
    path = tmp_path / "some.conllu"
    path.write_text(CONLLU)
    first, second = read_conllu(path)
    assert first.words == ("The", "film", "is", "good")
    assert first.dependencies == ((0, 1, "det"), (1, 3, "nsubj"), (2, 3, "cop"))
    assert second == Sentence(("Fine",))
    assert read_conllu(path, limit=1) == [first]
    for text, message in (
        ("1\tThe\n", "line 1 of .* is not CoNLL-U: it has 2 columns, not 10"),
        (
            CONLLU.replace("\t4\tcop", "\t9\tcop"),
            "word 3 of sentence 1 has head 9, which is none of its 4 words",
        ),
        ("# nothing\n", "has no sentence"),
        (CONLLU.replace("1\tThe", "7\tThe"), "line 2 of .* its ID must be 1, got '7'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_conllu(path)


def conllu(path, *rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def word(number, form, head="0"):
    return (number, form, "_", "_", "_", "_", head, "dep", "_", "_")


def test_conllu_fields_may_hold_any_white_space_but_tabs(tmp_path):
    """U+2028, U+0085, form feeds and no-break spaces are characters of a word."""
    forms = ("a\u2028b", "c\x85d", "e\x0cf", "1\xa0000")
    path = conllu(tmp_path / "a", *(word(str(n), form) for n, form in enumerate(forms, 1)))
    assert read_conllu(path) == [Sentence(forms)]
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_conllu(path) == [Sentence(forms)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (word("3x", "z"), "line 3 of .* is not CoNLL-U: its ID must be 3, got '3x'"),
        (word("4", "z"), "its ID must be 3, got '4'"),
        (word("", "z"), "its ID must be 3, got ''"),
        (word("\u0663", "z"), "its ID must be 3, got"),
        (word("3", "z", "x"), "line 3 of .* its HEAD must be a number, got 'x'"),
        (word("3", "z", "9" * 5000), "its HEAD must be a number, got '9+'…"),
        (word("3", "z", "3"), "word 3 of sentence 1 has head 3, which is itself"),
        (word("3\x1b[2J", "z"), r"got '3\\x1b\[2J'"),
    ],
)
def test_conllu_drops_no_word(tmp_path, row, message):
    path = conllu(tmp_path / "a", word("1", "x"), word("2", "y"), row)
    with pytest.raises(ValueError, match=message) as refused:
        read_conllu(path)
    assert len(str(refused.value)) < 500


def test_alignments_split_words_at_spaces_alone(tmp_path):
    """A no-break space inside a word used to shift the indices after it."""
    path = tmp_path / "a"
    path.write_text("10\xa0000 \u3000 b ||| x\u2028y\t z\x0c ||| 0-0 2-1\r\n", encoding="utf-8")
    pair = AlignedPair(("10\xa0000", "\u3000", "b"), ("x\u2028y", "z\x0c"), ((0, 0), (2, 1)))
    assert read_alignments(path) == [pair]
    for line, message in (
        ("a ||| b ||| 0-\u0660", "line 1 of .* has the alignment '0-٠', not 0-0"),
        ("a ||| b ||| 0-" + "9" * 5000, "line 1 of .* has the alignment '0-9+'…, not 0-0"),
        ("a ||| b ||| 0-1", "line 1 of .* aligns 0-1, but has 1 and 1 words"),
    ):
        path.write_text(line, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as refused:
            read_alignments(path)
        assert len(str(refused.value)) < 500


def test_refusals():
    valid = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"valid must be boolean \[B, L\]"):
        AnnotatedBatch(inputs=None, valid=valid.long())
    with pytest.raises(ValueError, match=r"ids must have the shape of valid, \[2, 3\], got \[2\]"):
        AnnotatedBatch(inputs=None, valid=valid, ids=torch.zeros(2))
    with pytest.raises(ValueError, match="dependencies must have one entry per sequence, 2, got 1"):
        AnnotatedBatch(inputs=None, valid=valid, dependencies=[()])
    with pytest.raises(ValueError, match="at least two inputs"):
        hw.head_roles(Planted([everywhere]), [])
    with pytest.raises(TypeError, match="batches must hold AnnotatedBatch only, got 'a text'"):
        hw.head_roles(Planted([everywhere]), ["a text"])
    batches = planted_batches(1)
    cut = [AnnotatedBatch(inputs=b.inputs, valid=b.valid[:, :5]) for b in batches]
    with pytest.raises(ValueError, match="roles need self-attention over the 5 tokens"):
        hw.head_roles(Planted([everywhere]), cut)


def plain(chosen: Tensor, value: Tensor) -> list[float]:
    """P(higher where chosen) - P(lower), pair by pair."""
    found = []
    for column in chosen.T:
        pairs = list(itertools.product(value[column].tolist(), value[~column].tolist()))
        signs = [(a > b) - (a < b) for a, b in pairs]
        found.append(sum(signs) / len(signs) if signs else 0.0)
    return found


def test_associations_and_their_tests():
    generator = torch.Generator().manual_seed(0)
    value = torch.randint(0, 8, (60,), generator=generator).double()
    chosen = torch.rand(60, 4, generator=generator) < 0.4
    chosen[:, 1] = value > 4
    chosen[:, 2] = True
    correlation, p = OPS.selection_association(chosen, value, 500)
    assert correlation.tolist() == pytest.approx(plain(chosen, value), abs=1e-9)
    assert correlation[1] == pytest.approx(1.0) and p[1] == pytest.approx(1 / 501)
    assert correlation[2] == 0.0 and p[2] == 1.0
    ps = torch.cat([
        OPS.selection_association(torch.rand(60, 50, generator=generator) < 0.5, value, 200, s)[1]
        for s in range(4)
    ])  # fmt: skip
    assert 0.4 < ps.mean() < 0.6 and (ps < 0.05).double().mean() < 0.12


def test_information_and_its_test():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (90,), generator=generator)
    chosen = torch.stack([label == 0, torch.rand(90, generator=generator) < 0.5], 1)
    chosen = torch.cat([chosen, torch.ones(90, 1, dtype=torch.bool)], 1)
    bits, chance, p = OPS.selection_information(chosen, label, 3, 300)
    share = (label == 0).double().mean()
    entropy = -(share * share.log2() + (1 - share) * (1 - share).log2())
    assert bits[0].item() == pytest.approx(entropy.item(), abs=1e-9)  # label 0 decides it
    assert p[0] == pytest.approx(1 / 301) and p[1] > 0.02
    assert 0 < chance[0] < 0.1
    assert bits[2] == 0 and p[2] == 1.0
    with pytest.raises(ValueError, match="label must be in 0..1, got 2"):
        OPS.selection_information(chosen, label, 2, 10)


def test_small_statistics():
    p = torch.tensor([0.01, 0.04, 0.03, 0.5, float("nan")], dtype=torch.float64)
    q = OPS.false_discovery_rate(p)
    assert q[:4].tolist() == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5]) and q[4].isnan()
    chosen = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 1], [0, 1, 1]]).bool()
    phi = OPS.co_selection(chosen)
    expected = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(phi, expected)
    overlap = OPS.selection_overlap(chosen, chosen.roll(1, 0))
    assert overlap.tolist() == pytest.approx([1 / 3] * 4)
    assert OPS.selection_overlap(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 1.0
    x = torch.tensor([0.0, 0.5, 1.0])
    area = OPS.area_between(x, torch.zeros(3), torch.tensor([0.0, 1.0, 1.0]))
    assert area.item() == pytest.approx(0.75)
    with pytest.raises(ValueError, match="x must be ascending"):
        OPS.area_between(x.flip(0), x, x)
