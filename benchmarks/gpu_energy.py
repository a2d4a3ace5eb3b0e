"""What gpu_check measures of energy: a layer that runs k of H heads beside dense layers."""

import gpu_layer
import headwise as hw
from headwise.apps.energy.windows import Work, head_bytes, measure, ratio

VARIANTS = ("kernels", "dense", "full")


def work_of(layer, k):
    """What a forward does; the gate is that of `kernels`."""
    batch, length, width, heads = layer.shape
    head_dim, size = width // heads, layer.x.element_size()
    read = (layer.select(k)[2] != 0).any(0).sum().item()
    gate = list(layer.gates[k].parameters())
    macs = batch * hw._C.head_macs(length, width, head_dim)
    each, bias = head_bytes(width, head_dim, size), width * size
    return {
        "kernels": Work(
            k * macs + batch * sum(p.numel() for p in gate if p.dim() > 1),
            read * each + bias + sum(p.numel() for p in gate) * size,
        ),
        "dense": Work(k * macs, k * each + bias),
        "full": Work(heads * macs, heads * each + bias),
    }


def case(emit, shape, k, dtype, machine):
    """Checks, then measures in alternating windows; a row for each variant, relative to `full`."""
    result = gpu_layer.check(shape, k, dtype, machine, "kernels")
    emit({"check": str(dtype)[6:], "variant": "kernels", **result})
    if not result["passed"]:
        return
    layer = gpu_layer.Layer(shape, dtype, machine.device)
    calls = {name: gpu_layer.run_of(layer, "forward", name, k) for name in VARIANTS}
    meter, windows, host = machine.energy()
    found = measure(calls, work_of(layer, k), meter, windows, machine.device, host=host)
    about = {key: value for key, value in found.items() if key != "contenders"}
    for name, own in found["contenders"].items():
        emit({"variant": name, "energy": {**about, **own, "ratio": ratio(found, name, "full")}})
