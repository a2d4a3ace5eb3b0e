"""The declared ranges, the lock files and the versions that the code names agree with each other;
an untested transformers gives one warning."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import headwise as hw
import pytest
import torch
from headwise.convert import versions
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

ROOT = Path(__file__).resolve().parents[3]
REQUIREMENTS = ROOT / "requirements"
PYPROJECT = (ROOT / "python/pyproject.toml").read_text(encoding="utf-8")
LOCKS = sorted(REQUIREMENTS.glob("*.txt"))


def array(name: str) -> list[Requirement]:
    """The requirements of ``name = [...]`` in pyproject.toml, but for those of headwise itself."""
    (text,) = re.findall(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.MULTILINE | re.DOTALL)
    found = [Requirement(item) for item in re.findall(r'"([^"]+)"', text)]
    return [requirement for requirement in found if requirement.name != "headwise"]


def declared() -> list[Requirement]:
    names = ("dependencies", "transformers", "compare", "explain", "energy")
    return [requirement for name in names for requirement in array(name)]


def inputs(name: str) -> list[Requirement]:
    lines = (REQUIREMENTS / f"{name}.in").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked(path: Path) -> list[tuple[Requirement, list[str]]]:
    """Each package of a lock file, pinned, with its hashes."""
    text = re.sub(r"(?m)^ *#.*\n", "", path.read_text(encoding="utf-8")).replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        requirement, *hashes = line.split("--hash=")
        found.append((Requirement(requirement.strip()), [each.strip() for each in hashes]))
    return found


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_package_of_a_lock_file_is_pinned_and_has_hashes(path):
    packages = locked(path)
    assert packages
    for requirement, hashes in packages:
        assert re.fullmatch(r"==[\w.!+]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_file_names_no_package_index(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(index-url|find-links|trusted-host|https?://)", text)


@pytest.mark.parametrize("name", ["run", "build", "dev", "docs", "data", "data-sources"])
def test_a_lock_file_holds_what_its_input_asks_for(name):
    wanted = inputs(name) + (declared() if name == "run" else [])
    packages = locked(REQUIREMENTS / f"{name}.txt")
    for requirement in wanted:
        own = [each for each, _ in packages if each.name.lower() == requirement.name.lower()]
        assert own, f"{requirement} is not in {name}.txt: run `make locks`"
        for each in own:
            (version,) = (item.version for item in each.specifier)
            assert version in requirement.specifier, f"{requirement}: run `make locks`"


def test_lock_files_agree_on_the_packages_that_several_of_them_hold():
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        environment = {
            "python_version": python,
            "python_full_version": f"{python}.0",
            "sys_platform": "linux",
            "platform_machine": "x86_64",
        }
        chosen: dict[str, str] = {}
        for name in ("run", "build", "dev", "docs"):
            for requirement, _ in locked(REQUIREMENTS / f"{name}.txt"):
                marker = requirement.marker or Marker("python_version > '3'")
                if marker.evaluate(environment):
                    version = str(requirement.specifier)
                    assert chosen.setdefault(requirement.name, version) == version, requirement


def test_the_tools_of_the_build_are_those_that_pyproject_asks_for():
    ours = {requirement.name: requirement.specifier for requirement in inputs("build")}
    for requirement in array("requires"):
        assert ours[requirement.name] == requirement.specifier


def test_the_versions_that_convert_knows_are_those_declared_and_locked():
    (ours,) = (each for each in declared() if each.name == "transformers")
    assert f">={versions.OLDEST}" in str(ours.specifier).split(",")
    pins = [
        Version(str(requirement.specifier).removeprefix("=="))
        for requirement, _ in locked(REQUIREMENTS / "run.txt")
        if requirement.name == "transformers"
    ]
    newest = max(pins)
    assert f"{newest.major}.{newest.minor}" == versions.NEWEST


@pytest.fixture
def bert(monkeypatch):
    """Builds a BERT and pretends that the installed transformers has another version."""
    transformers = pytest.importorskip("transformers")
    versions.check_version.cache_clear()
    config = transformers.BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )

    def build(version: str) -> nn.Module:
        model = transformers.BertModel(config).eval()  # first: this import replaces the module
        monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
        return model

    yield build
    versions.check_version.cache_clear()


def caught(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        hw.convert(model)
    return [str(warning.message) for warning in found]


def test_an_untested_transformers_gives_one_warning_that_names_both_versions(bert):
    (text,) = caught(bert("5.99.1"))
    assert text == (
        f"transformers 5.99.1 is newer than {versions.NEWEST}, the newest that headwise was tested "
        "with: compare the converted model with the original on your own inputs"
    )
    assert caught(bert("5.99.1")) == []


@pytest.mark.parametrize("version", ["5.0.0", "5.24.3", "5.24.0.dev0", "5.0.0rc1"])
def test_a_tested_transformers_gives_no_warning(bert, version):
    assert caught(bert(version)) == []


def test_a_transformers_before_5_is_refused(bert):
    model = bert("4.57.6")
    with pytest.raises(RuntimeError) as refusal:
        hw.convert(model)
    assert str(refusal.value) == (
        "headwise converts models of transformers 5.0 or newer, got transformers 4.57.6"
    )
    assert type(model.encoder.layer[0].attention).__name__ == "BertAttention"


def test_models_without_transformers_give_no_warning(monkeypatch, bert):
    bert("5.99.0")
    assert caught(torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)) == []


def test_what_is_made_for_one_torch_is_declared():
    """Of what others require, uv takes the newest at both ends of the ranges. torchvision's newest
    requires a newer torch than the oldest that we support."""
    names = {requirement.name for path in LOCKS for requirement, _ in locked(path)}
    made_for_one_torch = {"torchvision", "torchaudio", "torchtext", "torchdata"} & names
    assert made_for_one_torch <= {requirement.name for requirement in inputs("dev")}
