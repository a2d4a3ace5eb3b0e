"""Adversaries: random inputs for everything that reads untrusted data.

``python tests/python/fuzz.py --cases 1000000`` runs that many cases, of every kind in turn;
test_adversaries.py runs some thousands. A case must return, or raise ValueError, TypeError or
RuntimeError (of indices IndexError, of files OSError) with one sentence of fewer than 500 printable
characters. What a case needs is drawn from a generator of its own, so a number is a case.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import resource
import struct
import time
from pathlib import Path

import headwise as hw
import safetensors.torch
import torch
from headwise.apps.tasks.tasks import task_from_file
from headwise.io.safetensors_files import load_safetensors

ALLOWED = (ValueError, TypeError, RuntimeError, IndexError, OSError)
LONGEST = 500
SECONDS = 30.0  # of a processor: what hangs, and not what a busy machine delays
MEGABYTES = 512  # that a case may add to the largest memory of the process so far


def judge(error: BaseException) -> str | None:
    """What is wrong with an error as an answer to bad input; None if nothing is."""
    if not isinstance(error, ALLOWED):
        return f"{type(error).__name__} is none of the errors for bad input"
    text = str(error)
    if "Declaration: headwise::" in text or "There were no tensor arguments" in text:
        return None  # PyTorch's own words about a type that an operator does not take
    if not text.strip():
        return "it says nothing"
    if len(text) >= LONGEST:
        return f"it is {len(text)} characters long"
    if not text.isprintable():
        return "it holds characters that cannot be printed"
    return None


class Failure(AssertionError):
    """A case with a wrong result or a bad error."""


def run_case(kind: str, number: int, folder: Path) -> bool:
    """Runs case ``number`` of ``kind``; True if it was accepted.

    Raises:
        Failure: the answer is neither a result nor an error that explains what is wrong.
    """
    # A text, which random turns into the same state in every process.
    rng = random.Random(f"{kind}/{number}")
    before, start = peak_memory(), time.process_time()
    accepted, fault = True, None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            KINDS[kind](rng, folder)
    except Failure as failure:
        fault = str(failure)
    except Exception as error:  # whether they are allowed is what is tested
        accepted, wrong = False, judge(error)
        fault = wrong and f"{wrong}: {type(error).__name__}: {str(error)[:700]!r}"
    seconds, grown = time.process_time() - start, peak_memory() - before
    if fault is None and seconds > SECONDS:
        fault = f"it took {seconds:.1f} s"
    if fault is None and grown > MEGABYTES:
        fault = f"it took {grown:.0f} MB"
    if fault is not None:
        raise Failure(f"{kind} {number}: {fault}")
    return accepted


def peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- Values ----


def strange(rng: random.Random, depth: int = 0):
    """An unexpected JSON value."""
    simple = [
        None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**53, 2**63, -(2**63) - 1, 10**30, 10**400,
        0.5, 4.0, -0.0, 1e-300, 1e300, math.inf, -math.inf, math.nan,
        "", "a", "0.5", "012", "\0", "\x1b[2J", "\u202e", "\ud800", "x" * 5000, "\n\n", "9" * 5000,
        [], {}, [None], [[]], {"": None}, list(range(40)), [0.1] * 40, {"type": "BudgetGate"},
    ]  # fmt: skip
    if depth < 3 and rng.random() < 0.2:
        inner = [strange(rng, depth + 1) for _ in range(rng.randrange(4))]
        return inner if rng.random() < 0.5 else {str(i): value for i, value in enumerate(inner)}
    if rng.random() < 0.02:
        deep = []
        for _ in range(rng.choice([40, 2000])):
            deep = [deep]
        return deep
    return rng.choice(simple)


def spoil(rng: random.Random, document):
    """``document``, a value of JSON, with one to three places changed."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.randint(1, 3)):
        place, path = document, []
        while isinstance(place, dict | list) and place and rng.random() < 0.8:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            path.append((place, key))
            place = place[key]
        if not path:
            if rng.random() < 0.1:
                document = strange(rng)
            continue
        holder, key = path[-1]
        action = rng.random()
        if action < 0.6:
            holder[key] = strange(rng)
        elif action < 0.75:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice(["", "extra", "x" * 3000, "\x1b"])] = strange(rng)
        else:
            holder.append(strange(rng))
    return document


def as_text(rng: random.Random, document) -> str:
    text = json.dumps(document)
    if rng.random() < 0.3 and text:
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text) + 1)
            new = rng.choice(["\0", "{", "}", "[", '"', ",", ":", "\\", "1", "e", " ", "\ud800"])
            text = text[:at] + new + text[at + rng.randrange(3) :]
    return text


# ---- Gate configurations ----


def _gates() -> list[dict]:
    made = [
        hw.BudgetGate(),
        hw.BudgetGate(keep=0.5),
        hw.FixedGate([0, 2]),
        hw.RandomGate(0.5),
        hw.HardConcreteGate(),
        hw.GumbelSigmoidGate(),
        hw.SubsetGate(k=2),
        hw.RequestedBudgetGate(),
        hw.SleepGate(),
        hw.ThresholdGate(),
        hw.SharedHeadsGate(hw.BudgetGate(keep=0.5), shared=[1]),
    ]
    return [gate.config() for gate in made]


CONFIGS = _gates()


def gate_configuration(rng: random.Random, folder: Path) -> None:
    config = spoil(rng, rng.choice(CONFIGS)) if rng.random() < 0.9 else strange(rng)
    gate = hw.gates.gate_from_config(config)
    layer = hw.MultiheadAttention(8, 4, batch_first=True, gate=gate).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        layer(x, x, x, need_weights=False)


# ---- Plans ----

PLAN = {
    "format": "headwise.plan",
    "version": 1,
    "metric": "taylor",
    "layers": [
        {"name": "a", "num_heads": 4, "heads": [0, 2], "scale": [1.0, 0.5]},
        {"name": "b", "num_heads": 4, "heads": [], "scale": []},
    ],
    "metadata": {"keep": 0.5},
}


def plan(rng: random.Random, folder: Path) -> None:
    hw.HeadPlan.from_json(as_text(rng, spoil(rng, PLAN)))


def structure_plan(rng: random.Random, folder: Path) -> None:
    document = {
        "format": "headwise.structure",
        "version": 1,
        "heads": PLAN,
        "ffn": [{"name": "f", "num_neurons": 4, "neurons": [0, 3], "scale": [1.0, 1.0]}],
        "blocks": [{"name": "a", "scale": 1.0}],
        "hidden": {"size": 4, "dimensions": [0, 1], "scale": [1.0, 1.0]},
        "metadata": {},
    }
    hw.pruning.StructurePlan.from_json(as_text(rng, spoil(rng, document)))


# ---- Model folders ----


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = hw.MultiheadAttention(8, 4, batch_first=True, gate=hw.BudgetGate())
        self.out = torch.nn.Linear(8, 2)


def saved_model(folder: Path) -> tuple[dict, bytes]:
    place = folder / "sound"
    if not (place / "headwise.json").exists():
        hw.save(Tiny(), place)
    return json.loads((place / "headwise.json").read_text()), (
        place / "model.safetensors"
    ).read_bytes()


def model_folder(rng: random.Random, folder: Path) -> None:
    document, weights = saved_model(folder)
    place = folder / "spoiled"
    place.mkdir(exist_ok=True)
    text = as_text(rng, spoil(rng, document))
    (place / "headwise.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    (place / "model.safetensors").write_bytes(weights)
    hw.load(place, Tiny())


# ---- safetensors ----


def _entry(rng: random.Random, begin: int) -> tuple[dict, int]:
    shape = [rng.choice([0, 1, 2, 3]) for _ in range(rng.randrange(3))]
    dtype, size = rng.choice([("F32", 4), ("F64", 8), ("BF16", 2), ("U8", 1), ("I64", 8)])
    end = begin + size * math.prod(shape)
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}, end


def safetensors_file(rng: random.Random, folder: Path) -> None:
    """We refuse whatever the reference refuses; it accepts whatever we accept, with the same
    result."""
    header, end = {}, 0
    for i in range(rng.randrange(4)):
        header[f"t{i}"], end = _entry(rng, end)
    if rng.random() < 0.3:
        header["__metadata__"] = {"format": "pt"}
    if rng.random() < 0.6:
        header = spoil(rng, header)
    text = as_text(rng, header).encode("utf-8", errors="surrogatepass")
    text = rng.choice([b"", b"", b" ", b"\n"]) + text + rng.choice([b"", b"", b" ", b"\0", b"x"])
    data = bytes(rng.getrandbits(8) for _ in range(max(0, end + rng.choice([0, 0, 0, 0, 1, -1]))))
    length = len(text) + rng.choice([0, 0, 0, 0, 0, 1, -1, 2**62])
    content = struct.pack("<Q", max(0, length)) + text + data
    path = folder / "w.safetensors"
    path.write_bytes(content)
    theirs = None
    with contextlib.suppress(Exception):
        theirs = safetensors.torch.load(content)
    mine = load_safetensors(path)
    if theirs is None:
        raise Failure(f"the reference refuses {content!r}")
    if theirs.keys() != mine.keys():
        raise Failure(f"the reference finds {sorted(theirs)}, we {sorted(mine)}")
    for name, tensor in theirs.items():
        same = tensor.dtype == mine[name].dtype and tensor.shape == mine[name].shape
        if (
            not same
            or tensor.numpy(force=True).tobytes() != mine[name].numpy().tobytes()
            and (tensor.dtype != torch.bfloat16)
        ):
            raise Failure(f"tensor {name!r} differs from the reference's")


# ---- Data files ----


def data_file(rng: random.Random, folder: Path) -> None:
    cells = [
        "text", "label", "0", "1", "a b", "", '"', '""', "\t", ",", "\0", "\x1b[2J", "é", "\u2028",
        "x" * 3000, "NaN", "[1]", "-1", "1.5", "positive", "\r", "\ufeff",
    ]  # fmt: skip
    lines = ["text,label"] if rng.random() < 0.7 else []
    for _ in range(rng.randrange(6)):
        if rng.random() < 0.5:
            lines.append(",".join(rng.choice(cells) for _ in range(rng.randint(1, 3))))
        else:
            lines.append(json.dumps(spoil(rng, {"text": "a b", "label": 1})))
    path = folder / rng.choice(["d.csv", "d.csv", "d.jsonl", "d.jsonl", "d.txt"])
    content = rng.choice(["\n", "\n", "\r\n"]).join(lines).encode("utf-8", errors="surrogatepass")
    path.write_bytes(content if rng.random() < 0.9 else content[: rng.randrange(len(content) + 1)])
    task_from_file(path, "text", "label", least=1)


# ---- Operators ----

# A build with CUDA has operators that no CPU has: PyTorch itself refuses them, at length.
SCHEMAS = sorted(
    (
        s
        for s in torch._C._jit_get_all_schemas()
        if s.name.startswith("headwise::")
        and torch._C._dispatch_has_computed_kernel_for_dispatch_key(s.name, "CPU")
    ),
    key=lambda s: s.name,
)
DTYPES = [
    torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int32, torch.int64, torch.int64, torch.bool, torch.uint8, torch.complex64,
]  # fmt: skip
B, H, L, D, d, K = 2, 3, 4, 6, 2, 3
#: Sizes that arguments of these names have in a sound call; others are drawn.
SHAPES = {
    "x": (B, L, D), "query": (B, L, D), "key": (B, L, D), "value": (B, L, D),
    "in_proj_weight": (3 * H * d, D), "in_proj_bias": (3 * H * d,),
    "q_weight": (H * d, D), "k_weight": (H * d, D), "v_weight": (H * d, D),
    "q_bias": (H * d,), "k_bias": (H * d,), "v_bias": (H * d,), "bias_k": (H * d,),
    "bias_v": (H * d,), "out_proj_weight": (D, H * d), "out_proj_bias": (D,),
    "index": (B, K), "count": (B,), "weight": (B, H), "head_weight": (B, H),
    "key_padding_mask": (B, L), "query_padding_mask": (B, L), "attn_mask": (L, L),
    "dropout_seed": (1,), "q": (B, H, L, d), "k": (B, H, L, d), "v": (B, H, L, d),
    "heads": (B, H, L, d), "context": (B, H, L, d), "output": (B, H, L, d), "lse": (B, H, L),
    "grad_output": (B, L, D), "relevance": (B, H), "scores": (B, H), "mass": (B,),
    "budget": (B,), "features": (B, D), "mean": (D,), "variance": (D,), "base": (H,),
    "relevance_weight": (H, D), "hidden_weight": (5, D), "hidden_bias": (5,),
    "out_weight": (1, 5), "out_bias": (1,), "progress": (), "temperature": (), "logits": (B, H),
    "log_alpha": (B, H), "uniform": (B, H), "noise": (B, H), "shared": (1,), "awake": (H,),
}  # fmt: skip
OF_OPERATOR = {
    "selected_projection": {"weight": (H * d, D), "bias": (H * d,)},
    "_selected_projection_backward": {"weight": (H * d, D), "grad_output": (B, H, L, d)},
    "_aten_projection": {"weight": (H * d, D), "bias": (H * d,)},
    "_aten_projection_backward": {"weight": (H * d, D), "grad_output": (B, H, L, d)},
    "selected_output_projection": {"weight": (D, H * d), "bias": (D,)},
    "_selected_output_projection_backward": {"weight": (D, H * d)},
    "_aten_output_projection": {"weight": (D, H * d), "bias": (D,)},
    "_aten_output_projection_backward": {"weight": (D, H * d)},
    "_selected_attention_backward": {"grad_output": (B, H, L, d)},
    "_aten_attention_backward": {"grad_output": (B, H, L, d)},
    "awake_heads": {"score": (H,)},
    "update_head_score": {"score": (H,), "gradient": (B, H)},
}
WHOLE = {"index", "count", "dropout_seed", "shared", "trials", "group", "label", "rank"}


def _sound_tensor(rng: random.Random, operator: str, name: str) -> torch.Tensor:
    shape = OF_OPERATOR.get(operator, {}).get(name) or SHAPES.get(name)
    if shape is None:
        shape = tuple(rng.choice([1, 2, 3]) for _ in range(rng.randint(1, 3)))
    if name == "index":
        return torch.arange(K).expand(B, -1).contiguous()
    if name == "count":
        return torch.tensor([2, 3])
    if name in WHOLE:
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith("padding_mask"):
        return torch.zeros(shape, dtype=torch.bool)
    return torch.rand(shape)


def _spoilt_tensor(rng: random.Random, tensor: torch.Tensor) -> torch.Tensor:
    action = rng.randrange(8)
    if action == 0:
        return tensor.to(rng.choice(DTYPES))
    if action == 1:
        return torch.empty(0, dtype=tensor.dtype)
    if action == 2:
        shape = [max(0, size + rng.choice([-1, 0, 0, 1])) for size in tensor.shape]
        return torch.zeros(shape, dtype=tensor.dtype)
    if action == 3:
        return tensor.unsqueeze(0) if rng.random() < 0.5 or tensor.dim() == 0 else tensor[0]
    if action == 4 and tensor.dim() > 1:
        return tensor.transpose(0, -1)
    if action == 5 and tensor.dim() > 0:
        return tensor[:, None].expand(tensor.shape[0], 2, *tensor.shape[1:])
    if action == 6 or tensor.numel() == 0:
        return torch.empty(rng.choice([(0, 3), (2, 0), (1,), (2, 3, 4, 2, 1)]), dtype=tensor.dtype)
    spoilt = tensor.clone().flatten()
    if tensor.dtype.is_floating_point:
        value = rng.choice([math.nan, math.inf, -math.inf, 1e38, -1.0, 0.0])
    elif tensor.dtype == torch.int64:
        value = rng.choice([-1, 3, 2**31, 2**32, 2**33 + 3, -(2**32), 2**63 - 1, -(2**63)])
    else:
        value = 1
    with contextlib.suppress(RuntimeError):
        spoilt[rng.randrange(spoilt.numel())] = value
    return spoilt.view(tensor.shape)


def _argument(rng: random.Random, operator: str, argument, spoilt: bool):
    kind = str(argument.type)
    optional = kind.startswith("Optional[")
    kind = kind.removeprefix("Optional[").removesuffix("]") if optional else kind
    if optional and rng.random() < (0.3 if spoilt else 0.6):
        return None
    if kind == "Tensor":
        tensor = _sound_tensor(rng, operator, argument.name)
        return _spoilt_tensor(rng, tensor) if spoilt else tensor
    if kind == "List[Tensor]":
        each = [_sound_tensor(rng, operator, argument.name) for _ in range(rng.randrange(4))]
        return [_spoilt_tensor(rng, tensor) if spoilt else tensor for tensor in each]
    if kind == "int":
        if argument.name in ("resamples", "permutations"):
            return rng.choice([10, 10, -1, 0, 10**12]) if spoilt else 5
        if spoilt:
            return rng.choice([-1, 0, 1, 2, 3, 4, 7, 2**31, 2**62, -(2**63)])
        return H if argument.name == "num_heads" else 1
    if kind == "float":
        return rng.choice([0.5, 0.0, 1.0, -1.0, 1e308, math.nan, math.inf]) if spoilt else 0.5
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "str":
        words = ["round", "ceil", "squared", "lagrangian", "l0", "spearman", "probability"]
        return rng.choice([*words, "", "\x1b[2J", "x" * 5000] if spoilt else words)
    if kind == "List[int]":
        return [rng.choice([1, 3, -1, 2**62] if spoilt else [3]) for _ in range(rng.randrange(4))]
    if kind == "List[bool]":
        return [rng.random() < 0.7 for _ in range(argument.N or 3)]
    return torch.float32 if argument.name == "dtype" else None


def operator_arguments(rng: random.Random, folder: Path) -> None:
    schema = rng.choice(SCHEMAS)
    operator = schema.name.removeprefix("headwise::")
    wrong = {a.name for a in schema.arguments if rng.random() < 1.5 / len(schema.arguments)}
    arguments = {a.name: _argument(rng, operator, a, a.name in wrong) for a in schema.arguments}
    if operator == "selection_mask":
        arguments["dtype"] = rng.choice(DTYPES)
    getattr(torch.ops.headwise, operator)(**arguments)


KINDS = {
    "gate_configuration": gate_configuration,
    "plan": plan,
    "structure_plan": structure_plan,
    "model_folder": model_folder,
    "safetensors_file": safetensors_file,
    "data_file": data_file,
    "operator_arguments": operator_arguments,
}
