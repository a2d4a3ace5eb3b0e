"""The recipe for Lightning, with its Trainer if it is installed and with the least of one."""

import importlib.util

import headwise as hw
import pytest
import torch
from headwise.serialization.lightning import GateCallback
from support.architectures import bert

STEPS = 60


class LeastTrainer:
    """The hooks that GateCallback has, in the order of Lightning's fit."""

    def __init__(self, max_steps, callbacks):
        self.callbacks, self.global_step = callbacks, 0
        self.estimated_stepping_batches = max_steps

    def fit(self, module, batches):
        (callback,) = self.callbacks
        optimizer = module.configure_optimizers()
        callback.on_train_start(self, module)
        for index, batch in enumerate(batches):
            if self.global_step == self.estimated_stepping_batches:
                break
            callback.on_train_batch_start(self, module, batch, index)
            optimizer.zero_grad()
            loss = module.training_step(batch, index)
            loss.backward()
            optimizer.step()
            self.global_step += 1
            callback.on_train_batch_end(self, module, loss, batch, index)
        callback.on_train_end(self, module)


class LeastModule(torch.nn.Module):
    def log(self, name, value):
        self.logged[name] = float(value)


def lightning():
    for package in ("lightning.pytorch", "pytorch_lightning"):
        if importlib.util.find_spec(package.partition(".")[0]):
            return pytest.importorskip(package)
    pytest.skip("lightning is not installed")


def least():
    return LeastTrainer, LeastModule


def real():
    package = lightning()

    def trainer(max_steps, callbacks):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        return package.Trainer(
            max_steps=max_steps, callbacks=callbacks, accelerator="cpu", devices=1,
            enable_model_summary=False, **quiet,
        )  # fmt: skip

    return trainer, package.LightningModule


def classifier(base, gate):
    class Classifier(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = hw.convert(bert("BertForSequenceClassification", num_labels=2), gate)
            self.logged, self.seen = {}, []

        def training_step(self, batch, index):
            gates = [own.gate for own in hw.attention_layers(self.model).values() if own.gate]
            self.seen.append(max(float(own.progress) for own in gates))
            return self.model(**batch).loss + hw.penalty(self)

        def log(self, name, value, *args, **kwargs):
            self.logged[name] = float(value)

        def configure_optimizers(self):
            return torch.optim.AdamW(hw.parameter_groups(self, lr=2e-3))

    return Classifier().train()


def batches(number):
    ids = torch.randint(50, (number, 16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": own, "labels": (own[:, 0] < 25).long()} for own in ids]
    return torch.utils.data.DataLoader(data, batch_size=None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [least, real])
def test_gates_are_annealed_and_reach_their_target(way):
    trainer, base = way()
    module = classifier(base, hw.BudgetGate(keep=0.5))
    trainer(STEPS, [GateCallback()]).fit(module, batches(STEPS))
    expected = torch.arange(STEPS) / STEPS
    torch.testing.assert_close(torch.tensor(module.seen), expected, rtol=0, atol=1e-6)
    layers = hw.attention_layers(module.model).values()
    assert all(float(layer.gate.progress) == 1.0 for layer in layers)
    assert abs(module.logged["heads/expected_fraction"] - 0.5) < 0.15


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [least, real])
def test_what_cannot_be_annealed_is_refused(way):
    trainer, base = way()
    with pytest.raises(ValueError, match=r"has no gates: call headwise\.convert"):
        trainer(3, [GateCallback()]).fit(classifier(base, None), batches(3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [least, real])
def test_gates_in_evaluation_mode_are_refused(way):
    trainer, base = way()  # Lightning does not change the mode
    module = classifier(base, hw.BudgetGate(keep=0.5)).eval()
    with pytest.raises(ValueError, match=r"call model\.train\(\) before fit"):
        trainer(3, [GateCallback()]).fit(module, batches(3))


def test_a_trainer_without_an_end_is_refused():
    module = classifier(LeastModule, hw.BudgetGate(keep=0.5))
    with pytest.raises(ValueError, match="give max_steps, or max_epochs .* got inf"):
        LeastTrainer(float("inf"), [GateCallback()]).fit(module, batches(1))


def test_an_early_stop_leaves_gates_as_they_were_trained():
    module = classifier(LeastModule, hw.BudgetGate(keep=0.5))
    LeastTrainer(10, [GateCallback()]).fit(module, batches(6))  # the data end first
    layers = hw.attention_layers(module.model).values()
    assert all(float(layer.gate.progress) == pytest.approx(0.5) for layer in layers)
