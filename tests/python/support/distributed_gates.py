"""Functions of the processes of test_distributed_gates; a spawned process imports them from
here."""

import copy

import headwise as hw
import torch
import torch.distributed as dist
from headwise.gates.distributed import share_statistics
from torch import nn

D, H = 16, 4
GATES = {
    "budget": hw.BudgetGate(static_until=0.0, hidden_dim=8),
    "hard concrete": hw.HardConcreteGate(input_dependent=True, init_log_alpha=0.0),
    "subset": hw.SubsetGate(keep=0.5, temperature=2.0),
    "requested": hw.RequestedBudgetGate(static_until=0.0),
    "sleep": hw.SleepGate(0.5, every=2, asleep_by=0.0),
}


class Model(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.layers = nn.ModuleList(
            hw.MultiheadAttention(D, H, batch_first=True, gate=gate) for _ in range(2)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


def train(model, x, steps):
    for step in range(steps):
        hw.anneal(model, step / steps)
        (model(x[step]).square().mean() + hw.penalty(model)).backward()


def run(rank, folder, how):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/{how}", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {}
    for name, gate in GATES.items():
        torch.manual_seed(0)
        model = hw.link_gates(Model(gate))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        plain = hw.link_gates(copy.deepcopy(model))
        share_statistics(plain)
        if how == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh("cpu", (2,))
            for layer in model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            share_statistics(model)
        for trained in (model, plain):
            torch.manual_seed(1 + rank)
            x = torch.randn(6, 5, 3, D) * (1 + rank) + rank
            train(trained, x, 6)
        torch.manual_seed(9)
        x = torch.randn(8, 3, D)
        seen = []
        for layer in model.layers:
            layer.gate.register_forward_hook(
                lambda gate, x, choice, seen=seen: seen.append(choice.index)
            )
        with torch.no_grad():
            model.eval()(x)
        found[name] = torch.cat(seen)
        found |= {f"{name}: {n}": b.clone() for n, b in model.named_buffers()}
        sharded = dict(model.named_parameters())
        for n, p in plain.named_parameters():
            if p.grad is not None and how == "fsdp2":
                dist.all_reduce(p.grad)
                torch.testing.assert_close(
                    sharded[n].grad.full_tensor(),
                    p.grad / 2,
                    rtol=1e-3,  # the sums of two processes are in another order
                    atol=1e-4,
                    msg=lambda m, where=f"{name}, {n}": f"{where}: {m}",
                )
    torch.save(found, f"{folder}/{how}.{rank}")
    dist.barrier()  # no process leaves while gloo's threads of the other still talk to it
    dist.destroy_process_group()
