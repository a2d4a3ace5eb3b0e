"""headwise.log_heads: what it writes, when, and that it leaves nothing behind."""

import copy
import pickle

import headwise as hw
import pytest
import torch
from support.architectures import ARCHITECTURES

ARCHITECTURE = ARCHITECTURES["BertModel"]


class Writer:
    def __init__(self):
        self.scalars, self.images = [], []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def add_image(self, tag, image, step):
        self.images.append((tag, image, step))

    def named(self, tag):
        return [(value, step) for name, value, step in self.scalars if name == tag]


def build(gate=None):
    torch.manual_seed(0)
    return hw.convert(ARCHITECTURE.build(), gate or hw.BudgetGate(keep=0.5)).train()


def run(model, times=1):
    for _ in range(times):
        ARCHITECTURE.run(model, ARCHITECTURE.inputs())


def test_writes_what_a_trace_of_the_same_forward_says():
    model, writer = build(hw.RandomGate(keep=0.5)), Writer()
    hw.log_heads(writer, model)
    with hw.trace(model) as t:
        run(model)
    use = t.summary()
    assert writer.named("heads/mean") == [(use.mean_heads, 0)]
    assert writer.named("heads/fraction") == [(use.mean_fraction, 0)]
    assert writer.named("heads/std_fraction") == [(use.std_fraction, 0)]
    assert writer.named("heads/jaccard_distance") == [(use.mean_jaccard_distance, 0)]
    for name, selection in t.selections.items():
        assert writer.named(f"heads/fraction/{name}") == [(t.summary(name).mean_fraction, 0)]
        assert writer.named(f"heads/budget/{name}") == [(selection.budget.mean().item(), 0)]
    ((tag, picture, step),) = writer.images
    assert (tag, step) == ("heads/use", 0)
    heads = [layer.num_heads for layer in hw.attention_layers(model).values()]
    assert picture.shape == (1, 8 * len(heads), 8 * max(heads))
    for row, selection in enumerate(t.selections.values()):
        for head in range(heads[row]):
            often = (selection.index == head).any(1).float().mean()
            cell = picture[0, 8 * row : 8 * row + 8, 8 * head : 8 * head + 8]
            torch.testing.assert_close(cell, often.expand(8, 8))


def test_writes_every_few_forwards_of_training_only():
    model, writer = build(), Writer()
    hw.log_heads(writer, model, every=3)
    run(model, 2)
    run(model.eval(), 5)
    run(model.train(), 5)
    assert [step for _, step in writer.named("heads/mean")] == [0, 3, 6]


def test_a_step_of_several_forwards_is_written_once():
    model, writer, step = build(), Writer(), 0
    hw.log_heads(writer, model, lambda: step, every=2, tag="mine")
    for step in range(4):  # noqa: B007 - the callable reads it
        run(model, 2)
    assert [step for _, step in writer.named("mine/mean")] == [0, 2]


def test_between_the_steps_nobody_listens():
    model, writer = build(), Writer()
    log = hw.log_heads(writer, model, every=2)
    run(model)
    assert not any(layer._observers for layer in hw.attention_layers(model).values())
    log.remove()
    run(model, 3)
    assert len(writer.images) == 1
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_an_exception_in_the_forward_detaches():
    model, writer = build(), Writer()

    def fail(*_):
        raise RuntimeError("half-way")

    failure = model.encoder.layer[1].register_forward_hook(fail)
    with hw.log_heads(writer, model, every=1):
        with pytest.raises(RuntimeError, match="half-way"):
            run(model)
        failure.remove()
        assert not any(layer._observers for layer in hw.attention_layers(model).values())
        assert writer.scalars == []
        run(model)
    assert len(writer.named("heads/mean")) == 1


def test_copies_and_pickles_do_not_log():
    model, writer = build(), Writer()
    writer.lock = open(__file__)  # noqa: SIM115 - as a real writer: can be neither copied nor pickled
    hw.log_heads(writer, model, every=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        run(other.train())
    writer.lock.close()
    assert writer.scalars == []
    run(model)
    assert writer.scalars


def test_a_writer_without_pictures_gets_numbers():
    class Numbers:
        count = 0

        def add_scalar(self, tag, value, step):
            assert isinstance(value, float) and value == value
            self.count += 1

    writer = Numbers()
    model = build(hw.FixedGate(heads=[0]))
    hw.log_heads(writer, model)
    run(model)
    assert writer.count >= 4


def test_tensorboard_reads_it_back(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = build()
    with SummaryWriter(tmp_path) as writer, hw.log_heads(writer, model, every=2):
        run(model, 3)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("heads/mean")] == [0, 2]
    assert all(0 <= event.value <= 8 for event in events.Scalars("heads/mean"))
    assert len(events.Images("heads/use")) == 2


def test_refuses():
    model = build()
    with pytest.raises(TypeError, match="^writer must have add_scalar, got NoneType$"):
        hw.log_heads(None, model)
    with pytest.raises(ValueError, match="^every must be positive, got 0$"):
        hw.log_heads(Writer(), model, every=0)
    dense = hw.convert(ARCHITECTURE.build())
    with pytest.raises(ValueError, match=r"^model \(BertModel\) has no layer with a gate to log: "):
        hw.log_heads(Writer(), dense)
