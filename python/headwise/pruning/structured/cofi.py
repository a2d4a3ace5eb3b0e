"""Structured pruning in training, after Xia et al. 2022 (CoFi, arXiv 2204.00408)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from headwise import _C
from headwise.convert import convert
from headwise.nn.layers import attention_layers
from headwise.pruning.plans import HeadPlan, LayerPlan
from headwise.pruning.structured.compaction import compact
from headwise.pruning.structured.description import Structure, structure
from headwise.pruning.structured.distillation import LayerOutputs, layer_distillation
from headwise.pruning.structured.masks import StructureMasks, attach, refuse_gates, units, unmasked
from headwise.pruning.structured.plan import BlockPlan, FfnPlan, HiddenPlan, StructurePlan

__all__ = ["CoFi"]

_ops = torch.ops.headwise
#: Logits of the masks are clamped to +-this, so that no mask is ever certain: ln(100).
_CLAMP = 4.605
_GROUPS = ("heads", "attention", "neurons", "ffn", "hidden")


class CoFi(nn.Module):
    r"""Trains a model together with masks on its heads, neurons, blocks and hidden dimensions.

    Every mask is a hard-concrete variable (:math:`\beta = 2/3`, limits -0.1 and 1.1) with its own
    logit. A forward in training samples all masks and runs the model under them. In evaluation,
    the N masks of a layer's heads, of a network's neurons and of the hidden dimensions are each
    rounded together: round(N - sum P(open)) of them are 0, the others sigmoid(0.8 logit /
    :math:`\beta`); a block is open if P(open) >= 1/2. The expected size

    .. math:: s = \sum_k P(hidden_k) \Big(4 d \sum_l P(attention_l) \sum_h P(head_{lh})
              + 2 \sum_l P(ffn_l) \sum_j P(neuron_{lj})\Big)

    is held to the target by :math:`\lambda_1 (\hat s - t) + \lambda_2 (\hat s - t)^2`, where
    :math:`\hat s` is the sparsity, 1 minus the share of the size, and both :math:`\lambda` grow by
    gradient ascent; t grows linearly from 0 to 1 - ``keep`` while training warms up.
    :meth:`compact` makes the smaller model.

    Args:
        model: a converted or convertible model without gates; changed in place.
        keep: the share of the weights of heads and feed-forward networks that stays, in (0, 1];
            the paper's sparsity is 1 - ``keep``.
        heads: mask heads.
        attention_blocks: mask whole attention layers.
        neurons: mask neurons of the feed-forward networks.
        ffn_blocks: mask whole feed-forward networks.
        hidden: mask dimensions of the residual stream; None: if :func:`headwise.pruning.structure`
            finds one.
        teacher: a model of the same architecture for :meth:`layer_loss`; it is not changed, and not
            a submodule of this module.
        teacher_layers: positions of the teacher's layers that :meth:`layer_loss` compares; None:
            four, evenly spaced, including the last one (of 12: 2, 5, 8 and 11, like the authors).
        warmup: progress, in [0, 1], at which t has reached 1 - ``keep``.
        init_log_alpha: mean of the logits at the start, std 0.01; held within +-4.605. A short
            training does better at 2 than at the authors' 10.
        init_neurons: the same for the logits of neurons, which start half open in the authors'
            code.
        beta: temperature of the samples.
        gamma: lower end of the stretch, below 0.
        zeta: upper end of the stretch, above 1.

    Raises:
        ValueError: a share that the masks cannot reach (the text names the nearest), no masks at
            all, a model with gates, one without the residual stream that ``hidden=True`` needs, or
            ``teacher_layers`` that the teacher does not have.

    Example:
        >>> cofi = CoFi(model, keep=0.5, teacher=copy.deepcopy(model))
        >>> optimiser = torch.optim.AdamW(cofi.parameter_groups(lr=2e-5))
        >>> loss = task_loss(cofi(**batch)) + cofi.penalty() + 0.9 * cofi.layer_loss()
        >>> small = cofi.compact()
    """

    progress: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        keep: float = 0.5,
        *,
        heads: bool = True,
        attention_blocks: bool = True,
        neurons: bool = True,
        ffn_blocks: bool = True,
        hidden: bool | None = None,
        teacher: nn.Module | None = None,
        teacher_layers: Sequence[int] | None = None,
        warmup: float = 0.2,
        init_log_alpha: float = 10.0,
        init_neurons: float = 0.0,
        beta: float = 2.0 / 3.0,
        gamma: float = -0.1,
        zeta: float = 1.1,
    ) -> None:
        super().__init__()
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        if not 0.0 <= warmup <= 1.0:
            raise ValueError(f"warmup must be between 0 and 1, got {warmup}")
        for name, start in (("init_log_alpha", init_log_alpha), ("init_neurons", init_neurons)):
            if not math.isfinite(start):
                raise ValueError(f"{name} must be finite, got {start}")
        refuse_gates(model)
        if not attention_layers(model):
            model = convert(model)
        found = structure(model)
        if hidden and found.stream is None:
            raise ValueError(f"hidden dimensions of model cannot be pruned: {found.no_stream}")
        self.keep, self.warmup = float(keep), float(warmup)
        self._constants = (float(beta), float(gamma), float(zeta))
        self._size = float(found.size)
        self._head_dims = [layer.head_dim for layer in found.attention.values()]
        self._names = (list(found.attention), list(found.ffn))
        self._make_masks(found, heads, attention_blocks, neurons, ffn_blocks, hidden)
        like = next(model.parameters())
        self.to(like.device)
        self.reset_masks(init_log_alpha, init_neurons)
        self._check_reachable()
        self._masks = StructureMasks()
        self._set_values(self._constant_values())
        with_stream = self.log_alpha["hidden"] is not None
        self.model = attach(model, found, self._masks, hidden=with_stream)
        self._outputs: tuple[LayerOutputs, LayerOutputs] | None = None
        # In a list, so that the teacher is not a submodule.
        self._teacher = [] if teacher is None else [teacher.eval()]
        if teacher is not None:
            self._prepare_teacher(teacher, found, teacher_layers)

    # --- masks ---

    def _make_masks(
        self,
        found: Structure,
        heads: bool,
        attention_blocks: bool,
        neurons: bool,
        ffn_blocks: bool,
        hidden: bool | None,
    ) -> None:
        def each(sizes: list[int]) -> nn.ParameterList:
            return nn.ParameterList([Parameter(torch.empty(size)) for size in sizes])

        self._sizes = {
            "heads": list(found.heads.values()),
            "attention": [len(found.attention)],
            "neurons": list(found.neurons.values()),
            "ffn": [len(found.ffn)],
            "hidden": [found.hidden_size or self._width(found)],
        }
        wanted = {
            "heads": heads,
            "attention": attention_blocks,
            "neurons": neurons and bool(found.ffn),
            "ffn": ffn_blocks and bool(found.ffn),
            "hidden": found.stream is not None if hidden is None else hidden,
        }
        if not any(wanted.values()):
            raise ValueError("at least one of the masks must be on: there is nothing to prune")
        self.logits = nn.ModuleDict(
            {group: each(self._sizes[group]) for group in _GROUPS if wanted[group]}
        )
        self.multipliers = Parameter(torch.zeros(2))
        self.register_buffer("progress", torch.zeros(()))
        self.register_buffer("shift", torch.zeros(2))
        fine = [g for g in ("neurons", "hidden", "heads") if g in self.logits]
        self._finest = fine[0] if fine else None

    @staticmethod
    def _width(found: Structure) -> int:
        return next(iter(found.attention.values())).embed_dim

    @property
    def log_alpha(self) -> dict[str, Any]:
        """The logits of the masks by group, a ``ParameterList``; None if it is not masked."""
        return {group: self.logits[group] if group in self.logits else None for group in _GROUPS}

    @torch.no_grad()
    def reset_masks(self, init_log_alpha: float = 10.0, init_neurons: float = 0.0) -> None:
        """Resets all masks."""
        self._init = {group: float(init_log_alpha) for group in _GROUPS}
        self._init["neurons"] = float(init_neurons)
        for group, parameters in self.logits.items():
            for parameter in parameters.parameters():
                parameter.normal_(self._init[group], 0.01).clamp_(-_CLAMP, _CLAMP)
        self.multipliers.zero_()
        self.shift.zero_()

    @torch.no_grad()
    def start(self, importance: Mapping[str, Tensor], sharpness: float = 6.0) -> None:
        """Starts the masks of heads and neurons from a ranking, such as :func:`fisher_scores`.

        The logits of each kind become their starting point (``init_log_alpha``, ``init_neurons``)
        + ``sharpness (rank - 1/2)`` with rank in [0, 1] over all layers, within +-4.605: the least
        important closes first. Ours; masks that all start alike are all half open on the way to the
        target, and a short training does not tell them apart.

        Args:
            importance: attention layer or feed-forward network -> scores of its heads ``[H]`` or
                neurons ``[F]``; kinds that are not masked are left out.
            sharpness: range of the logits.

        Raises:
            ValueError: missing scores, a wrong number of scores, or scores that are not finite.
        """
        if not 0.0 <= sharpness < float("inf"):
            raise ValueError(f"sharpness must be finite and not negative, got {sharpness}")
        for group, names in zip(("heads", "neurons"), self._names, strict=True):
            logits = self.log_alpha[group]
            if logits is None:
                continue
            scores = []
            for name, parameter in zip(names, logits, strict=True):
                if name not in importance:
                    raise ValueError(f"importance must have scores for '{name}'")
                score = torch.as_tensor(importance[name]).double().cpu()
                if score.shape != parameter.shape:
                    raise ValueError(
                        f"importance of '{name}' must have {len(parameter)} scores, "
                        f"got shape {list(score.shape)}"
                    )
                if not bool(torch.isfinite(score).all()):
                    raise ValueError(f"importance of '{name}' must be finite, got NaN or infinity")
                scores.append(score)
            if not sum(map(len, scores)):
                continue
            offset = _ops.importance_start(torch.cat(scores), 0.5, sharpness)  # [N]
            parts = offset.split([len(score) for score in scores])
            for parameter, part in zip(logits, parts, strict=True):
                parameter.copy_((self._init[group] + part).clamp(-_CLAMP, _CLAMP))

    def mask_parameters(self) -> list[Parameter]:
        """The logits of all masks."""
        return list(self.logits.parameters())

    def parameter_groups(
        self,
        lr: float,
        mask_lr: float = 0.1,
        multiplier_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser: the model's weights, the masks, the multipliers.

        ``multiplier_lr`` defaults to that of the masks.
        """
        own = [p for p in self.model.parameters() if p.requires_grad]
        if hasattr(self, "transform"):
            own += list(self.transform.parameters())
        return [
            {"params": own, "lr": lr, "weight_decay": weight_decay},
            {"params": self.mask_parameters(), "lr": mask_lr, "weight_decay": 0.0},
            {
                "params": [self.multipliers],
                "lr": mask_lr if multiplier_lr is None else multiplier_lr,
                "weight_decay": 0.0,
            },
        ]

    def _each(self, make: Callable[[Tensor, str], Tensor]) -> dict[str, list[Tensor]]:
        """For each group the values of each of its parameters; ones if it is not masked."""
        device = self.progress.device
        return {
            group: [torch.ones(size, device=device) for size in self._sizes[group]]
            if logits is None
            else [make(parameter, group) for parameter in logits]
            for group, logits in self.log_alpha.items()
        }

    def _set_values(self, values: dict[str, list[Tensor]]) -> None:
        masked = self.log_alpha
        attention, ffn = self._names
        masks = self._masks
        masks.heads = dict(zip(attention, values["heads"], strict=True))
        masks.neurons = dict(zip(ffn, values["neurons"], strict=True))
        masks.blocks = {}
        if masked["attention"] is not None:
            masks.blocks |= dict(zip(attention, values["attention"][0], strict=True))
        if masked["ffn"] is not None:
            masks.blocks |= dict(zip(ffn, values["ffn"][0], strict=True))
        masks.hidden = None if masked["hidden"] is None else values["hidden"][0]

    def _sampled_values(self) -> dict[str, list[Tensor]]:
        return self._each(
            lambda logits, _: _ops.hard_concrete(logits, torch.rand_like(logits), *self._constants)
        )

    @torch.no_grad()
    def _constant_values(self) -> dict[str, list[Tensor]]:
        def keep(logits: Tensor, group: str) -> Tensor:
            if group in ("attention", "ffn"):  # each block separately, as trained
                return _ops.hard_concrete_keep(logits[:, None], *self._constants)[:, 0]
            shift = self.shift[0] + (self.shift[1] if group == self._finest else 0.0)
            return _ops.hard_concrete_keep(logits, *self._constants, float(shift))

        values = self._each(keep)
        hidden = values["hidden"][0]
        if not bool(hidden.any()):
            hidden[self.log_alpha["hidden"][0].argmax()] = 1.0
        return values

    def _size_of(self, values: dict[str, list[Tensor]]) -> Tensor:
        return _ops.structure_size(
            values["heads"],
            values["attention"][0],
            values["neurons"],
            values["ffn"][0],
            values["hidden"][0],
            self._head_dims,
        )

    def _open(self, logits: Tensor, _: str = "") -> Tensor:
        return _ops.hard_concrete_open(logits, *self._constants)

    def _check_reachable(self) -> None:
        with torch.no_grad():
            size = self._size_of(self._each(lambda p, _: self._open(torch.full_like(p, -_CLAMP))))
        least = float(size) / self._size
        if self.keep < least:
            raise ValueError(
                f"keep={self.keep:.6g} cannot be reached: with every mask as closed as it gets "
                f"{least:.4f} of the weights are expected to stay, so the nearest is "
                f"keep={least:.4f}"
            )

    # --- training ---

    def expected_keep(self) -> Tensor:
        """Share of the weights that is expected to stay, differentiable: a scalar."""
        return self._size_of(self._each(self._open)) / self._size

    def penalty(self) -> Tensor:
        """The term that holds the expected share at ``keep``; add it to the loss."""
        return _ops.sparsity_penalty(
            self._size_of(self._each(self._open)),
            self._size,
            self.progress,
            1.0 - self.keep,
            self.warmup,
            self.multipliers,
        )

    def anneal(self, progress: float) -> None:
        """Sets how far training has come, from 0 to 1.

        Raises:
            ValueError: ``progress`` is outside [0, 1].
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress must be between 0 and 1, got {progress}")
        self.progress.fill_(progress)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model under sampled masks in training, and under those of :meth:`plan` otherwise.

        Raises:
            ValueError: the logits of the masks are not finite.
        """
        with torch.no_grad():
            for parameter in self.mask_parameters():
                if not bool(torch.isfinite(parameter).all()):
                    raise ValueError("logits of the masks must be finite, got NaN or infinity")
                if self.training:
                    parameter.clamp_(-_CLAMP, _CLAMP)
        self._set_values(self._sampled_values() if self.training else self._constant_values())
        if not (self.training and self._outputs):
            return self.model(*args, **kwargs)
        student, teacher = self._outputs
        with torch.no_grad(), teacher:
            self._teacher[0](*args, **kwargs)
        with student:
            return self.model(*args, **kwargs)

    def _prepare_teacher(
        self, teacher: nn.Module, found: Structure, layers: Sequence[int] | None
    ) -> None:
        own = [layer.module for layer in found.layers]
        if not own:
            raise ValueError("teacher needs transformer layers in model that headwise knows")
        missing = [layer.name for layer in found.layers if not _has(teacher, layer.name)]
        if missing:
            raise ValueError(f"teacher has no layer '{missing[0]}', which model has")
        if layers is None:
            parts = min(4, len(own))
            layers = [(i + 1) * len(own) // parts - 1 for i in range(parts)]
        for i in layers:
            if not 0 <= i < len(own):
                raise ValueError(
                    f"teacher_layers must be between 0 and {len(own) - 1}, got {list(layers)}"
                )
        others = [teacher.get_submodule(found.layers[i].name) for i in sorted(set(layers))]
        width = self._width(found)
        self.transform = nn.Linear(width, width, device=self.progress.device)
        nn.init.eye_(self.transform.weight)
        nn.init.zeros_(self.transform.bias)
        self._outputs = (LayerOutputs(own), LayerOutputs(others))

    def layer_loss(self) -> Tensor:
        """Distance of the layers' outputs from the teacher's, in the last training forward.

        The sum over ``teacher_layers`` of the mean squared error between the teacher's layer and an
        affine map (one for all, the identity at first) of the student's nearest layer, in order.
        Layers whose feed-forward network is removed are not matched (the paper's section 3.2; the
        authors' code leaves out those whose attention is).

        Raises:
            RuntimeError: there is no teacher, or no training forward yet.
        """
        if self._outputs is None or not self._outputs[0].values:
            raise RuntimeError("layer_loss needs a teacher and a forward in training")
        alive = torch.ones(len(self._outputs[0].values), dtype=torch.bool)
        for i, name in enumerate(self._names[1][: len(alive)]):
            block = self._masks.blocks.get(name)
            alive[i] = block is None or bool(block != 0)
        student, teacher = (outputs.values for outputs in self._outputs)
        return layer_distillation(student, teacher, self.transform, alive)

    # --- the result ---

    def kept(self) -> float:
        """Share of the weights that stays with the masks of evaluation."""
        return self._kept_of(self._constant_values())

    def _kept_of(self, values: dict[str, list[Tensor]]) -> float:
        kept = {group: [(v != 0).double() for v in each] for group, each in values.items()}
        return float(self._size_of(kept)) / self._size

    def plan(self, tolerance: float = 0.005) -> StructurePlan:
        """The plan, with the values of the masks as scales.

        If the masks of evaluation miss ``keep`` by more than ``tolerance``, heads, neurons and
        hidden dimensions are counted as if all their logits were larger by one number (``shift``)
        that brings the plan nearest to it, then those of neurons by another. Block masks stay as
        trained; if no shift reaches ``keep``, a warning names the nearest share. The shift is ours;
        ``tolerance=1`` skips it.
        """
        if abs(self.kept() - self.keep) > tolerance:
            self.shift.zero_()
            for position in range(2):
                self._find_shift(position)
            found = self.kept()
            if abs(found - self.keep) > tolerance:
                warnings.warn(
                    f"the plan keeps {found:.4f} of the weights, the nearest to keep="
                    f"{self.keep:.6g} that the blocks which training kept allow: train on",
                    stacklevel=2,
                )
        values = self._constant_values()
        self._set_values(values)
        attention, ffn = self._names

        scales = dict(zip(attention, values["attention"][0].double().tolist(), strict=True))
        scales |= dict(zip(ffn, values["ffn"][0].double().tolist(), strict=True))
        layers, networks = [], []
        for name, mask in zip(attention, values["heads"], strict=True):
            layers.append(LayerPlan(name, len(mask), *(units(mask) if scales[name] else ([], []))))
        for name, mask in zip(ffn, values["neurons"], strict=True):
            networks.append(FfnPlan(name, len(mask), *(units(mask) if scales[name] else ([], []))))
        hidden = None
        if self.log_alpha["hidden"] is not None:
            mask = values["hidden"][0]
            hidden = HiddenPlan(len(mask), *units(mask))
        return StructurePlan(
            HeadPlan(layers, "cofi"),
            networks,
            [BlockPlan(name, scale) for name, scale in scales.items() if scale != 1.0],
            hidden,
            {"method": "cofi", "keep": self.keep, "kept": self._kept_of(values)},
        )

    def _find_shift(self, position: int) -> None:
        """Sets one number of ``shift`` so that the share kept is nearest to ``keep``."""

        def shifted(value: float) -> float:
            self.shift[position] = value
            return -self.kept()  # falls as the shift grows

        start = (0.0, shifted(0.0))
        found, _ = _C.nearest_by_halving(shifted, -self.keep, -16.0, 16.0, 50, start)
        self.shift[position] = found

    def compact(self, tolerance: float = 0.005) -> nn.Module:
        """A physically smaller copy of the model, which computes the same as evaluation, without
        masks.

        ``tolerance`` is that of :meth:`plan`.
        """
        return compact(unmasked(self.model), self.plan(tolerance))


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
