"""Shared fixtures."""

from __future__ import annotations

import sys
from pathlib import Path

import headwise as hw
import pytest
import torch

pytest.register_assert_rewrite("support")

from support.compare_fixtures import write_model, write_texts  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Resets the compiler, so that a test does not use up the next one's limit of
    recompilations."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def threads():
    """Sets torch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cuda_routes():
    """Sets what runs attention and products on CUDA devices, for one test."""
    before = hw.set_cuda_routes()
    yield hw.set_cuda_routes
    hw.set_cuda_routes(*before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """The folder of a tiny random BERT classifier of transformers."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_texts(tmp_path_factory) -> Path:
    """A CSV file with a task that the tiny BERT could learn."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.csv")
