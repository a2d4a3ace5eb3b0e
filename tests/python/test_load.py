"""headwise refuses, in one sentence, a torch that it was not compiled for, before loading it."""

import sys

import pytest
import torch
from headwise import _build_info, _load


@pytest.mark.parametrize("running", ["2.11.0", "2.11.3", "2.11.1+cpu", "2.11.0a0+git123"])
def test_a_torch_of_the_same_minor_version_is_accepted(running):
    _load.check_torch("2.11.0", running)


@pytest.mark.parametrize("running", ["2.12.0", "2.1.0", "3.11.0", "2.110.0+cu130"])
def test_a_torch_of_another_minor_version_is_refused(running):
    with pytest.raises(ImportError) as refusal:
        _load.check_torch("2.11.0", running)
    assert str(refusal.value) == (
        f"headwise was compiled against torch 2.11.0, but torch {running} is installed: "
        "install torch 2.11.*, or build headwise again in this environment."
    )


def test_the_extension_was_compiled_against_the_torch_that_runs():
    compiled = _load.core.compiled_torch_version
    assert _load.minor_version(compiled) == _load.minor_version(torch.__version__)
    assert _load.minor_version(_build_info.torch_version) == _load.minor_version(compiled)


def test_the_version_is_compared_before_the_extension_is_loaded(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    monkeypatch.setitem(sys.modules, "headwise._C", None)  # importing it would raise another error
    with pytest.raises(ImportError, match=r"but torch 2\.99\.0 is installed"):
        _load.load_core()


def test_a_tree_that_was_not_compiled_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "headwise._build_info", None)
    with pytest.raises(ImportError, match="^headwise has not been compiled: run `make build`"):
        _load.load_core()
