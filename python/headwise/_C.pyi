# Written by `make stubs` from the compiled extension: not to be edited.
"""
C++ core of headwise
"""

import collections.abc
import os
import pathlib
import torch
import typing

import headwise.io.display

__all__: list[str] = [
    "Backend",
    "BlockPlan",
    "ConfidenceStages",
    "Explanation",
    "FfnPlan",
    "FisherAccumulator",
    "FittedPolicy",
    "HeadPlan",
    "HeadScorer",
    "HeadScores",
    "HiddenPlan",
    "KeptUnits",
    "LatencyFit",
    "LayerPlan",
    "OptionRow",
    "OutputMoments",
    "RemovalOrder",
    "Repaired",
    "ScaleSolver",
    "StagedPrediction",
    "StructurePlan",
    "Trace",
    "TraceSummary",
    "backends",
    "compiled_torch_version",
    "find_threshold",
    "fit_latency",
    "folder_beside",
    "gate_options",
    "gate_tables",
    "head_macs",
    "hies",
    "load_safetensors",
    "may_be_recomputed",
    "narrowed",
    "nearest_by_halving",
    "neuron_macs",
    "plan",
    "prune_attention",
    "prune_ffn",
    "prune_hidden",
    "prune_projections",
    "pruning_counts",
    "read_json",
    "read_safetensors_metadata",
    "rearrange",
    "recomputing",
    "removal_order",
    "repair_projection",
    "replace_folder",
    "save_safetensors",
    "search_latency",
    "search_macs",
    "set_cuda_routes",
    "write_atomic",
]

class Explanation:
    def __init__(
        self,
        *,
        pairs: int,
        steps: int,
        all_maps: bool,
        maps: collections.abc.Sequence[tuple[int, int]],
    ) -> None: ...
    def add_effects(self, input: int, begin: int, logits: torch.Tensor) -> None: ...
    def add_layer(
        self,
        *,
        name: str,
        num_heads: int,
        gate: str,
        gate_tensors: collections.abc.Mapping[str, torch.Tensor],
        x: torch.Tensor,
        query_padding_mask: torch.Tensor | None,
        selection: tuple | None,
        q: torch.Tensor,
        k: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        added_keys: int,
    ) -> None: ...
    def set_inputs(
        self,
        texts: collections.abc.Sequence[str],
        tokens: collections.abc.Sequence[collections.abc.Sequence[str]],
    ) -> None: ...
    def set_prediction(
        self, logits: torch.Tensor, labels: collections.abc.Sequence[str]
    ) -> None: ...
    def switched(self, input: int, begin: int, end: int) -> list[torch.Tensor]: ...
    def to_json(self, indent: int = -1) -> str: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_inputs(self) -> int: ...

class HeadScores:
    @staticmethod
    def from_json(text: str) -> HeadScores: ...
    def __init__(
        self,
        metric: str,
        layers: collections.abc.Sequence[str],
        values: collections.abc.Sequence[collections.abc.Sequence[float]],
    ) -> None: ...
    def to_json(self) -> str: ...
    @property
    def layers(self) -> list[str]: ...
    @property
    def metric(self) -> str: ...
    @property
    def values(self) -> list[list[float]]: ...

class HeadScorer:
    def __init__(
        self,
        metrics: collections.abc.Sequence[str],
        absolute: str = "per_token",
        normalize: bool = True,
        alpha: float = 0.5,
        scope: str = "model",
    ) -> None: ...
    def add(self, loss: torch.Tensor | None) -> None: ...
    def scores(self) -> dict[str, HeadScores]: ...
    def see(
        self,
        layer: str,
        q: torch.Tensor,
        k: torch.Tensor,
        context: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        query_padding_mask: torch.Tensor | None,
        added_keys: int,
    ) -> None: ...
    @property
    def needs_gradients(self) -> bool: ...

class LayerPlan:
    """
    The heads of one layer that stay, and their scales.
    """

    __hash__: typing.ClassVar[None] = None  # type: ignore[assignment]
    def __eq__(self, arg0: object) -> bool: ...
    def __init__(
        self,
        name: str,
        num_heads: int,
        heads: collections.abc.Sequence[int],
        scale: collections.abc.Sequence[float] | None = None,
    ) -> None: ...
    def __repr__(self) -> str: ...
    @property
    def heads(self) -> list[int]:
        """
        Those that stay, ascending.
        """
    @property
    def name(self) -> str: ...
    @property
    def num_heads(self) -> int:
        """
        Heads of the layer, before.
        """
    @property
    def scale(self) -> list[float]:
        """
        What multiplies each one's output.
        """

class HeadPlan(headwise.io.display.Shown):
    """
    Which heads of a model stay, layer by layer, with a scale each.

    Args:
        layers: a LayerPlan for each layer; layers may keep different numbers of heads, down to none.
        metric: what the plan was made from.
        metadata: anything that JSON can hold, kept with the plan.

    Raises:
        ValueError: heads that are not ascending, different and in range, a scale that is missing or not
            finite, a layer that occurs twice.
    """

    __hash__: typing.ClassVar[None] = None  # type: ignore[assignment]
    @staticmethod
    def from_json(text: str) -> HeadPlan:
        """
        Raises ValueError naming the key that is unknown, missing or wrong.
        """
    @staticmethod
    def load(path: os.PathLike | str | bytes) -> HeadPlan: ...
    def __deepcopy__(self, arg0: dict) -> HeadPlan: ...
    def __eq__(self, arg0: object) -> bool: ...
    def __getstate__(self) -> str: ...
    def __init__(
        self,
        layers: collections.abc.Sequence[LayerPlan],
        metric: str = "",
        metadata: typing.Any = None,
    ) -> None: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, arg0: str) -> None: ...
    def save(self, path: os.PathLike | str | bytes) -> None:
        """
        Writes the JSON to a file, atomically.
        """
    def to_json(self, indent: int = 1) -> str: ...
    @property
    def heads_kept(self) -> int:
        """
        Heads of all layers that stay.
        """
    @property
    def layers(self) -> list[LayerPlan]: ...
    @property
    def metadata(self) -> typing.Any: ...
    @property
    def metric(self) -> str: ...
    @property
    def num_heads(self) -> int:
        """
        Heads of all layers, before.
        """

class StagedPrediction:
    """
    What a ConfidencePolicy predicted for a batch, and why.
    """
    def reason(self, row: int) -> str:
        """
        Why input `row` ran this number of heads, in words.
        """
    @property
    def confidence(self) -> torch.Tensor:
        """
        float32 [S, B], after every stage; NaN if the input stopped before
        """
    @property
    def heads(self) -> torch.Tensor:
        """
        int64 [S, B], heads of all layers that each stage ran; 0 if it did not
        """
    @property
    def logits(self) -> torch.Tensor:
        """
        floating [B, C], of the stage at which each input stopped
        """
    @property
    def stage(self) -> torch.Tensor:
        """
        int64 [B], that stage
        """
    @property
    def threshold(self) -> float:
        """
        the required confidence
        """
    @property
    def total_heads(self) -> torch.Tensor:
        """
        int64 [B]: heads that each input ran, all stages together
        """

class FittedPolicy:
    """
    The result of ConfidencePolicy.fit_accuracy, on the given data.
    """
    def __repr__(self) -> str: ...
    @property
    def accuracy(self) -> float:
        """
        of the policy
        """
    @property
    def heads(self) -> float:
        """
        mean heads of an input, all stages together
        """
    @property
    def pays(self) -> bool:
        """
        Whether the policy runs fewer heads than the widest stage alone.
        """
    @property
    def threshold(self) -> float:
        """
        now set in the policy
        """
    @property
    def widest_accuracy(self) -> float:
        """
        of the widest stage alone
        """
    @property
    def widest_heads(self) -> float:
        """
        mean heads of the widest stage alone
        """

class ConfidenceStages:
    def __init__(
        self, factors: collections.abc.Sequence[float], threshold: float, measure: str
    ) -> None: ...
    def fit(
        self,
        runs: collections.abc.Sequence[
            collections.abc.Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
        ],
        heads: float,
    ) -> float: ...
    def fit_accuracy(
        self,
        runs: collections.abc.Sequence[
            collections.abc.Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
        ],
        labels: collections.abc.Sequence[torch.Tensor | None],
        loss: float,
        certainty: float | None,
    ) -> FittedPolicy: ...
    def predict(
        self,
        run: collections.abc.Callable[[torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]],
    ) -> StagedPrediction: ...
    @property
    def factors(self) -> list[float]: ...
    @property
    def measure(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @threshold.setter
    def threshold(self, arg1: float) -> None: ...

class Backend:
    """
    One way to execute a selection.
    """
    def __repr__(self) -> str: ...
    @property
    def available(self) -> bool:
        """
        whether it runs on this machine, with this build
        """
    @property
    def device(self) -> str:
        """
        'cuda' or 'cpu'
        """
    @property
    def name(self) -> str: ...
    @property
    def reason(self) -> str:
        """
        why it cannot run, or what is known of it
        """

class OptionRow:
    """
    One option of a gate.
    """
    @property
    def default(self) -> typing.Any: ...
    @property
    def doc(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def rule(self) -> str:
        """
        'in (0, 1]', for example; empty if the type is the only rule
        """
    @property
    def type(self) -> str:
        """
        as in Python: 'float', 'int | None', ...
        """

class FisherAccumulator:
    def __init__(self) -> None: ...
    def add(self, layer: str, gradient: torch.Tensor) -> None: ...
    def gradients(self, layer: str) -> torch.Tensor: ...
    def scores(self, layer: str) -> list[float]: ...

class KeptUnits:
    @property
    def cost(self) -> float: ...
    @property
    def heads(self) -> list[list[int]]: ...
    @property
    def neurons(self) -> list[list[int]]: ...
    @property
    def score(self) -> float: ...

class LatencyFit:
    """
    Time of a layer: `base` seconds up to `threshold` units, `slope` more for each beyond.
    """
    def __init__(self, base: float, threshold: int, slope: float) -> None: ...
    def __repr__(self) -> str: ...
    def seconds(self, units: int) -> float: ...
    @property
    def base(self) -> float: ...
    @property
    def slope(self) -> float: ...
    @property
    def threshold(self) -> int: ...

class ScaleSolver:
    def __init__(self, weight: torch.Tensor, group: int) -> None: ...
    def add(self, inputs: torch.Tensor, residual: torch.Tensor) -> None: ...
    def error(self, scale: collections.abc.Sequence[float]) -> float: ...
    def solve(self, damp: float) -> list[float] | None: ...
    def solve_released(self, intercept: bool) -> list[float] | None: ...

class OutputMoments:
    def __init__(self, inputs: int, outputs: int) -> None: ...
    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None: ...
    def error(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> float: ...
    def merge(self, other: OutputMoments) -> None: ...
    def select(self, columns: collections.abc.Sequence[int]) -> OutputMoments: ...
    def solve(
        self, weight: torch.Tensor, bias: torch.Tensor | None, ridge: float
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...
    def variance(self) -> float: ...
    @property
    def inputs(self) -> int: ...
    @property
    def outputs(self) -> int: ...
    @property
    def tokens(self) -> int: ...

class Repaired:
    @property
    def bias(self) -> torch.Tensor | None: ...
    @property
    def error_after(self) -> float: ...
    @property
    def error_before(self) -> float: ...
    @property
    def ridge(self) -> float | None: ...
    @property
    def variance(self) -> float: ...
    @property
    def weight(self) -> torch.Tensor: ...

class RemovalOrder:
    @property
    def error(self) -> list[float]: ...
    @property
    def units(self) -> list[int]: ...

class FfnPlan:
    """
    The neurons of one feed-forward network that stay, and their scales.
    """

    __hash__: typing.ClassVar[None] = None  # type: ignore[assignment]
    def __eq__(self, arg0: object) -> bool: ...
    def __init__(
        self,
        name: str,
        num_neurons: int,
        neurons: collections.abc.Sequence[int],
        scale: collections.abc.Sequence[float] | None = None,
    ) -> None: ...
    def __repr__(self) -> str: ...
    @property
    def name(self) -> str:
        """
        Of the network's first linear layer.
        """
    @property
    def neurons(self) -> list[int]:
        """
        Those that stay, ascending.
        """
    @property
    def num_neurons(self) -> int:
        """
        Neurons of the network, before.
        """
    @property
    def scale(self) -> list[float]:
        """
        What multiplies each one's activation.
        """

class BlockPlan:
    """
    What multiplies the whole output of an attention or feed-forward block.
    """

    __hash__: typing.ClassVar[None] = None  # type: ignore[assignment]
    def __eq__(self, arg0: object) -> bool: ...
    def __init__(self, name: str, scale: float = 0.0) -> None: ...
    def __repr__(self) -> str: ...
    @property
    def name(self) -> str:
        """
        Of the attention layer, or of the first linear layer.
        """
    @property
    def scale(self) -> float:
        """
        0: the block is removed, its bias included.
        """

class HiddenPlan:
    """
    The dimensions of the residual stream that stay.
    """

    __hash__: typing.ClassVar[None] = None  # type: ignore[assignment]
    def __eq__(self, arg0: object) -> bool: ...
    def __init__(
        self,
        size: int,
        dimensions: collections.abc.Sequence[int],
        scale: collections.abc.Sequence[float] | None = None,
    ) -> None: ...
    def __repr__(self) -> str: ...
    @property
    def dimensions(self) -> list[int]:
        """
        Those that stay, ascending.
        """
    @property
    def scale(self) -> list[float]:
        """
        What multiplies what is written to each.
        """
    @property
    def size(self) -> int:
        """
        Of the stream, before.
        """

class StructurePlan(headwise.io.display.Shown):
    """
    What of a transformer stays: a HeadPlan, and neurons, blocks and hidden dimensions.

    What the plan does not name stays as it is.

    Args:
        heads: the heads that stay (HeadPlan).
        ffn: an FfnPlan for each feed-forward network with fewer neurons.
        blocks: a BlockPlan for each attention or feed-forward block whose whole output is scaled; with
            scale 0 the block is removed, bias included.
        hidden: a HiddenPlan, or None: the residual stream keeps its width.
        metadata: anything that JSON can hold, kept with the plan.

    Raises:
        ValueError: units that are not ascending, different and in range, a scale that is missing or
            not finite, a name that occurs twice, no hidden dimension left, or a block of scale 0 with
            heads or neurons left.
    """

    __hash__: typing.ClassVar[None] = None  # type: ignore[assignment]
    @staticmethod
    def from_json(text: str) -> StructurePlan:
        """
        Also reads the JSON of a HeadPlan. Raises ValueError naming the key that is unknown, missing or wrong.
        """
    @staticmethod
    def load(path: os.PathLike | str | bytes) -> StructurePlan: ...
    def __deepcopy__(self, arg0: dict) -> StructurePlan: ...
    def __eq__(self, arg0: object) -> bool: ...
    def __getstate__(self) -> str: ...
    def __init__(
        self,
        heads: HeadPlan,
        ffn: collections.abc.Sequence[FfnPlan] = [],
        blocks: collections.abc.Sequence[BlockPlan] = [],
        hidden: HiddenPlan | None = None,
        metadata: typing.Any = None,
    ) -> None: ...
    def __repr__(self) -> str: ...
    def __setstate__(self, arg0: str) -> None: ...
    def block_scale(self, name: str) -> float:
        """
        What multiplies the output of the block: 1 where the plan does not name it.
        """
    def save(self, path: os.PathLike | str | bytes) -> None:
        """
        Writes the JSON to a file, atomically.
        """
    def to_json(self, indent: int = 1) -> str: ...
    @property
    def blocks(self) -> list[BlockPlan]: ...
    @property
    def ffn(self) -> list[FfnPlan]: ...
    @property
    def heads(self) -> HeadPlan: ...
    @property
    def hidden(self) -> HiddenPlan | None: ...
    @property
    def metadata(self) -> typing.Any: ...
    @property
    def neurons_kept(self) -> int: ...
    @property
    def num_neurons(self) -> int: ...

class TraceSummary:
    """
    How heads were spread over the inputs of a trace
    """
    def __repr__(self) -> str: ...
    @property
    def mean_fraction(self) -> float: ...
    @property
    def mean_heads(self) -> float: ...
    @property
    def mean_jaccard_distance(self) -> float | None: ...
    @property
    def sequences(self) -> int: ...
    @property
    def std_fraction(self) -> float: ...

class Trace:
    def __init__(self) -> None: ...
    def clear(self) -> None: ...
    def history(
        self, layer: str
    ) -> list[
        tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
    ]: ...
    def num_heads(self, layer: str) -> int: ...
    def record(
        self,
        layer: str,
        num_heads: int,
        index: torch.Tensor,
        count: torch.Tensor,
        weight: torch.Tensor,
        relevance: torch.Tensor | None = None,
        budget: torch.Tensor | None = None,
    ) -> None: ...
    @typing.overload
    def summary(self) -> TraceSummary | None: ...
    @typing.overload
    def summary(self, layer: str) -> TraceSummary: ...
    def to_json(self, indent: int = -1) -> str: ...
    @property
    def layers(self) -> list[str]: ...

def backends() -> list[Backend]:
    """
    Every backend of the attention operators, for each device the fastest first: the order in which they are tried, each with the reason why it cannot run, or what is known of it.
    """

def find_threshold(
    run: collections.abc.Callable[[float], tuple[int, int, float]],
    keep: float,
    passes: int,
    tolerance: float,
) -> float: ...
def fit_latency(
    units: collections.abc.Sequence[int], seconds: collections.abc.Sequence[float]
) -> LatencyFit: ...
def folder_beside(arg0: os.PathLike | str | bytes) -> pathlib.Path: ...
def gate_options(type: str, options: dict) -> typing.Any:
    """
    All options of a gate, those that are not given with their defaults.
    """

def gate_tables() -> list[tuple[str, list[OptionRow]]]:
    """
    [(name of a gate, its options)], for every gate.
    """

def head_macs(tokens: float, width: int, head_dim: int) -> float: ...
def hies(
    importance: HeadScores, entropy: HeadScores, alpha: float = 0.5, scope: str = "model"
) -> HeadScores: ...
def load_safetensors(path: os.PathLike | str | bytes) -> dict[str, torch.Tensor]: ...
def may_be_recomputed() -> bool:
    """
    Whether saved-tensor hooks are set or gradients are off, as in activation checkpointing.
    """

def narrowed(
    before: HeadPlan, scores: HeadScores, count: int, min_heads_per_layer: int = 0
) -> HeadPlan: ...
def nearest_by_halving(
    value: collections.abc.Callable[[float], float],
    target: float,
    low: float,
    high: float,
    passes: int,
    start: tuple[float, float],
) -> tuple[float, float]: ...
def neuron_macs(tokens: float, width: int) -> float: ...
def plan(scores: HeadScores, keep: float, min_heads_per_layer: int, scope: str) -> HeadPlan: ...
def prune_attention(
    parameters: collections.abc.Mapping[str, torch.Tensor], layer: LayerPlan, block_scale: float
) -> dict[str, torch.Tensor]: ...
def prune_ffn(
    parameters: collections.abc.Mapping[str, torch.Tensor], plan: FfnPlan, block_scale: float
) -> dict[str, torch.Tensor]: ...
def prune_hidden(
    parameter: torch.Tensor, dim: int, plan: HiddenPlan, scaled: bool
) -> torch.Tensor: ...
def prune_projections(
    parameters: collections.abc.Mapping[str, torch.Tensor], layer: LayerPlan
) -> dict[str, torch.Tensor]: ...
def pruning_counts(total: int, keep: float, step: float) -> list[int]: ...
def read_json(arg0: os.PathLike | str | bytes, arg1: int) -> bytes: ...
def read_safetensors_metadata(path: os.PathLike | str | bytes) -> dict[str, str]: ...
def rearrange(gradients: torch.Tensor, kept: collections.abc.Sequence[int]) -> list[int]: ...
def recomputing() -> bool:
    """
    Whether this thread is inside a backward: a forward there repeats an earlier one.
    """

def removal_order(
    moments: OutputMoments, weight: torch.Tensor, group: int, ridge: float
) -> RemovalOrder: ...
def repair_projection(
    fit: OutputMoments,
    held_out: OutputMoments,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ridges: collections.abc.Sequence[float],
) -> Repaired: ...
def replace_folder(arg0: os.PathLike | str | bytes, arg1: os.PathLike | str | bytes) -> None: ...
def save_safetensors(
    path: os.PathLike | str | bytes,
    tensors: collections.abc.Mapping[str, torch.Tensor],
    metadata: collections.abc.Mapping[str, str],
) -> None: ...
def search_latency(
    heads: collections.abc.Sequence[collections.abc.Sequence[float]],
    neurons: collections.abc.Sequence[collections.abc.Sequence[float]],
    head_time: LatencyFit,
    neuron_time: LatencyFit,
    limit: float,
) -> KeptUnits: ...
def search_macs(
    heads: collections.abc.Sequence[collections.abc.Sequence[float]],
    neurons: collections.abc.Sequence[collections.abc.Sequence[float]],
    head_cost: float,
    neuron_cost: float,
    limit: float,
) -> KeptUnits: ...
def set_cuda_routes(attention: str = "kernels", products: str = "warps") -> tuple[str, str]:
    """
    Sets how attention ("kernels", or "flash": LibTorch's FlashAttention for what it takes) and matrix products ("warps", or on Hopper "warpgroups") run on CUDA devices, for every later call in the process. Returns the two until now: ``set_cuda_routes(*before)`` restores them.
    """

def write_atomic(path: os.PathLike | str | bytes, content: bytes) -> None: ...

__version__: str
compiled_torch_version: str
