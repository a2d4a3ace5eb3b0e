"""A decoder that answers with half of its heads, chosen by the prompt; then without them for good.

A tiny Llama with random weights, so that it runs anywhere; give the folder of a model of the Llama
family to use that one.

python examples/python/decoder.py [FOLDER]
"""

import sys

import headwise as hw
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
else:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
        )
    )
model.eval()
prompts = torch.randint(3, 100, (4, 12))  # [B, L]
answer = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}

dense = model.generate(prompts, **answer)
hw.convert(model)
print(
    "converted, without gates: the same tokens:",
    torch.equal(model.generate(prompts, **answer), dense),
)

# Each prompt chooses half of the groups, and keeps them while it is answered.
hw.convert(model, hw.GroupGate(hw.BudgetGate(budget=0.5)), keep_selection=True)
with hw.trace(model) as trace:
    model.generate(prompts, **answer)
for name, history in trace.history.items():
    print(f"{name}: {history[0].count.tolist()} heads for {len(history)} calls")

# Without the less important half of the groups, for every prompt.
hw.convert(model, lambda name, layer: None)


def loss_fn(model, ids):
    logits = model(ids).logits[:, :-1]  # [B, L - 1, V]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


scores = hw.score_heads(model, [dense], loss_fn, metrics=["michel"])["michel"]
plan = hw.plan(scores, keep=0.5, groups=hw.nn.head_groups(model))
small = hw.prune(model, plan)
for name, layer in hw.attention_layers(small).items():
    print(f"{name}: {layer.num_heads} query heads on {layer.num_key_value_heads} key/value heads")
same = torch.equal(
    small.generate(prompts, **answer), hw.mask(model, plan).generate(prompts, **answer)
)
print("pruned and masked generate the same:", same)
