"""The operators of a rehearsal: the CUDA kernels and their launchers on the emulated device of the
tests, where tests/cpp is built; else those of the CPU."""

import importlib

import headwise  # noqa: F401  (registers torch.ops.headwise)
import torch


class OfCpu:
    """torch.ops.headwise, and the operators that only a CUDA device has."""

    def _work_list(self, *arguments):
        pass

    def __getattr__(self, name):
        return getattr(torch.ops.headwise, name)


class Emulated(OfCpu):
    """What a CUDA device runs, by tests/cpp/emulator."""

    def __init__(self, operators, executors):
        self.operators = operators
        self.selected_self_attention = executors.selected_self_attention
        self.selected_attention = executors.selected_attention
        self.select_heads = operators.select_heads
        self._work_list = operators._work_list

    def evaluate_budget_gate(self, *arguments):
        if self.operators.takes_budget_gate(*arguments):
            return self.operators.budget_gate(*arguments)
        return torch.ops.headwise.evaluate_budget_gate(*arguments)


def operators():
    """(the operators, their description)."""
    try:  # tests/python is on the path, as for the oracle
        emulated = importlib.import_module("support.emulator")
    except ImportError as error:
        return OfCpu(), f"CPU operators ({error})"
    if emulated.LIBRARY is None:
        return OfCpu(), "CPU operators (tests/cpp is not built)"
    found = Emulated(torch.ops.headwise_emulated, emulated.EMULATED)
    # The gate calls the operators by itself.
    importlib.import_module("headwise.gates.budget")._ops = found
    return found, f"kernels on an emulated device ({emulated.LIBRARY.parts[-4]})"
