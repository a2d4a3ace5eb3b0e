"""Every input chooses how many attention heads run, and which; the others cost nothing.

The names of daily work are here; more is in the packages ``headwise.nn``, ``gates``, ``pruning``,
``analysis`` and ``io``, and, of the same names as the functions, ``headwise.convert`` and
``headwise.explain`` (``from headwise.explain import RoleThresholds``).
"""

from headwise import (
    _load,  # first: it registers torch.ops.headwise.*
    analysis,
    gates,
    io,
    nn,
    pruning,
    serialization,
)
from headwise import (
    testing as testing,
)
from headwise.analysis import calibrate_threshold
from headwise.convert import convert
from headwise.explain import Trace, explain, explain_data, head_roles, log_heads, trace
from headwise.gates import (
    BudgetGate,
    FixedGate,
    Gate,
    GroupGate,
    GumbelSigmoidGate,
    HardConcreteGate,
    MixtureOfHeadsGate,
    RandomGate,
    RequestedBudgetGate,
    Selection,
    SharedHeadsGate,
    SleepGate,
    SubsetGate,
    ThresholdGate,
    anneal,
    link_gates,
    parameter_groups,
    penalty,
    request_budget,
    start_gates,
)
from headwise.nn import (
    GroupedQueryAttention,
    KeyValueCache,
    MultiheadAttention,
    attention_layers,
    gates_see,
)
from headwise.pruning import (
    HeadPlan,
    HeadScores,
    head_mask,
    headroom,
    mask,
    plan,
    plan_from_gates,
    prune,
    prune_heads,
    repair,
    score_heads,
    unmask,
)
from headwise.serialization import load, save

__version__ = _load.core.__version__
backends = _load.core.backends
set_cuda_routes = _load.core.set_cuda_routes

__all__ = [
    "BudgetGate",
    "FixedGate",
    "Gate",
    "GroupGate",
    "GroupedQueryAttention",
    "GumbelSigmoidGate",
    "HardConcreteGate",
    "HeadPlan",
    "HeadScores",
    "KeyValueCache",
    "MixtureOfHeadsGate",
    "MultiheadAttention",
    "RandomGate",
    "RequestedBudgetGate",
    "Selection",
    "SharedHeadsGate",
    "SleepGate",
    "SubsetGate",
    "ThresholdGate",
    "Trace",
    "analysis",
    "anneal",
    "attention_layers",
    "backends",
    "calibrate_threshold",
    "convert",
    "explain",
    "explain_data",
    "gates",
    "gates_see",
    "head_mask",
    "head_roles",
    "headroom",
    "io",
    "link_gates",
    "load",
    "log_heads",
    "mask",
    "nn",
    "parameter_groups",
    "penalty",
    "plan",
    "plan_from_gates",
    "prune",
    "prune_heads",
    "pruning",
    "repair",
    "request_budget",
    "save",
    "score_heads",
    "serialization",
    "start_gates",
    "trace",
    "unmask",
]
