"""Functions of separate processes: a spawned process imports them from here."""

import headwise as hw
import torch
from torch import nn


def train_one_process(rank, world, path, queue):
    """Puts the gradients of one step on the queue: of the projections and of the gate."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world
    )
    torch.manual_seed(0)
    layer = hw.MultiheadAttention(24, 4, batch_first=True, gate=hw.BudgetGate())
    parallel = nn.parallel.DistributedDataParallel(layer)
    x = torch.full((2, 5, 24), 1.0 + rank)
    (parallel(x, x, x, need_weights=False)[0].square().sum() + hw.penalty(layer)).backward()
    queue.put((rank, layer.in_proj_weight.grad.numpy(), layer.gate.base.grad.numpy()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
