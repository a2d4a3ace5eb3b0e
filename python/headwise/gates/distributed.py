"""Gates of a model that is trained by several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headwise.gates.base import Gate


def whole(parameter: Tensor) -> Tensor:
    """A parameter of another layer's gate: gathered, if FSDP2 keeps only a shard of it here.

    Its gradient is averaged over the processes, as FSDP2 does with a layer's own.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    sharded: Any = parameter
    mesh = sharded.device_mesh
    gathered = sharded.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    return gathered.detach() + (gathered - gathered.detach()) / mesh.size()


def pooled(summed: Tensor, groups: tuple[Any, ...]) -> Tensor:
    """The sum over the processes of these groups; ``summed`` itself without any."""
    for group in groups:
        torch.distributed.all_reduce(summed, group=group)
    return summed


def share_statistics(model: nn.Module, *groups: Any) -> None:
    """From now on, gates sum their statistics over the processes of these groups.

    Running statistics of a gate's input and the scores of :class:`SleepGate` are state that each
    training forward changes; with different data on each process, gates would come to choose
    different heads. :func:`headwise.anneal` and :func:`headwise.penalty` call this for models that
    FSDP2 shards (with the groups of their mesh), because FSDP2 does not synchronise buffers.
    ``DistributedDataParallel`` broadcasts those of the first process before each forward, so it
    needs this only with ``broadcast_buffers=False``.

    Each training forward then sums one small tensor per gate over the processes: all of them must
    run the same number of training forwards, as FSDP2 requires too. Evaluation communicates
    nothing.

    Args:
        model: has gates.
        groups: process groups; none: the default group.
    """
    groups = groups or (torch.distributed.group.WORLD,)
    for module in model.modules():
        if isinstance(module, Gate) and module.num_heads is not None:
            module._groups = groups
            module._align()


def share_if_sharded(model: nn.Module, gates: list[Gate]) -> None:
    """:func:`share_statistics` for a model that FSDP2 shards, the first time."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if all(gate._groups for gate in gates):
        return
    for parameter in model.parameters():
        if (mesh := getattr(parameter, "device_mesh", None)) is not None:
            share_statistics(model, *(mesh.get_group(i) for i in range(mesh.ndim)))
            return
