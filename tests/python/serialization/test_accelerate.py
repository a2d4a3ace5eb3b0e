"""The recipe for accelerate (docs/convert.md): training, and resuming from a checkpoint."""

import copy

import headwise as hw
import pytest
import torch
from support.architectures import bert

accelerate = pytest.importorskip("accelerate")

STEPS = 8


def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, (STEPS, 16, 8), generator=generator)
    return [{"input_ids": own, "labels": (own[:, 0] < 25).long()} for own in ids]


def train(model, start=0, end=STEPS, resume=None, checkpoint=None):
    """Steps ``start`` to ``end`` of the recipe."""
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(hw.parameter_groups(model, lr=1e-3))
    loader = torch.utils.data.DataLoader(batches()[start:end], batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    own = accelerator.unwrap_model(model)
    if resume is not None:
        accelerator.load_state(resume)
    model.train()
    for step, batch in enumerate(loader, start):
        torch.manual_seed(step)  # dropout and noise, in a resumed run too
        hw.anneal(own, step / STEPS)
        optimizer.zero_grad()
        accelerator.backward(model(**batch).loss + hw.penalty(own))
        optimizer.step()
        if step + 1 == STEPS // 2 and checkpoint is not None:
            accelerator.save_state(checkpoint)
    return own.eval()


def gated():
    torch.manual_seed(0)
    model = bert("BertForSequenceClassification", num_labels=2)
    return hw.convert(model, hw.BudgetGate(keep=0.5))


def test_accelerate_trains_gates_and_resumes(tmp_path):
    model = gated()
    start = copy.deepcopy(model.state_dict())
    whole = train(model, checkpoint=str(tmp_path / "state"))
    assert (tmp_path / "state" / "model.safetensors").is_file()
    moved = [n for n, p in whole.state_dict().items() if not torch.equal(p, start[n])]
    assert any(".gate." in name for name in moved)
    again = train(gated(), start=STEPS // 2, resume=str(tmp_path / "state"))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, msg=name)
    hw.save(whole, tmp_path / "model")
    inputs = {"input_ids": batches()[0]["input_ids"]}
    with torch.no_grad():
        torch.testing.assert_close(
            hw.load(tmp_path / "model")(**inputs).logits, whole(**inputs).logits
        )
