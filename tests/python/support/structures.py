"""Plans for the models of architectures.py."""

from __future__ import annotations

import json
import random

import headwise as hw


def random_plan(model, seed=0, *, hidden=None, heads=True, neurons=True, blocks=True):
    """Drops about half of everything, with odd scales: a network that keeps no neuron but its bias,
    a block that is scaled and one that is removed."""
    generator = random.Random(seed)
    found = hw.pruning.structure(model)
    if hidden is None:
        hidden = found.hidden_size is not None

    def units(count, least=0):
        kept = sorted(generator.sample(range(count), max(least, generator.randint(0, count))))
        return kept, [round(generator.uniform(0.5, 1.5), 3) for _ in kept]

    gone, scaled = set(), []
    if blocks:
        names = [*found.attention, *found.ffn]
        gone = {generator.choice(list(found.attention))}
        if len(found.ffn) > 1:
            gone.add(list(found.ffn)[-1])
        scaled = [hw.pruning.BlockPlan(name, 0.0) for name in sorted(gone)]
        scaled += [hw.pruning.BlockPlan(name, 1.25) for name in names if name not in gone][:2]
    layers, networks = [], []
    if heads:
        for name, count in found.heads.items():
            kept, scale = units(count) if name not in gone else ([], [])
            layers.append(hw.pruning.LayerPlan(name, count, kept, scale))
    if neurons:
        for position, (name, count) in enumerate(found.neurons.items()):
            kept, scale = ([], []) if name in gone or position == 0 else units(count)
            networks.append(hw.pruning.FfnPlan(name, count, kept, scale))
    dimensions = None
    if hidden:
        dimensions = hw.pruning.HiddenPlan(found.hidden_size, *units(found.hidden_size, least=5))
    return hw.pruning.StructurePlan(hw.HeadPlan(layers), networks, scaled, dimensions)


def make_plan(model, kept, scaled=True):
    """A plan that keeps the heads ``kept`` gives, layer by layer (uneven), with odd scales."""
    layers = []
    for i, (name, layer) in enumerate(hw.attention_layers(model).items()):
        heads = kept[i % len(kept)]
        scale = [1.0 + 0.25 * h if scaled else 1.0 for h in heads]
        entry = {"name": name, "num_heads": layer.num_heads, "heads": heads, "scale": scale}
        layers.append(entry)
    document = {"format": "headwise.plan", "version": 1, "metric": "test", "layers": layers}
    return hw.HeadPlan.from_json(json.dumps({**document, "metadata": {}}))
