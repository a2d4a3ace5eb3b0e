"""Energy by counters, on a made-up machine: a sysfs tree, NVML's GPUs, chips, and none at all."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from headwise.apps.cli import main
from headwise.apps.compare.measure import model_work
from headwise.apps.energy import counters, windows
from headwise.apps.energy.counters import Meter, NotMeasured, open_meter
from headwise.apps.energy.windows import Windows, Work, measure, ratio, text
from headwise.apps.tasks.examples import TextExamples
from hypothesis import given, settings
from hypothesis import strategies as st
from support.energy import Gpus, Machine, Monitor, monitor_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def tree(tmp_path) -> Path:
    return tmp_path / "intel-rapl"


def meter_of(machine: Machine, device=CPU, **options) -> Meter:
    powercap = () if machine.powercap is None else (machine.powercap,)
    return open_meter(device, create=monitor_of(machine, **options), powercap=powercap)


def measured(machine: Machine, meter, rounds: int = 3, **contenders: tuple[float, float]) -> dict:
    """Energy of contenders that take (seconds, watts above idle) per call."""
    runs = {name: (lambda own=own: machine.run(*own)) for name, own in contenders.items()}
    work = {name: Work(100.0, 8.0, 2.0) for name in runs}
    return measure(runs, work, meter, Windows(10.0, rounds), CPU, host=machine.host)


def test_joules_are_those_above_the_idle_power(tree):
    machine = Machine(tree)
    found = measured(machine, meter_of(machine), dense=(0.5, 50.0), model=(0.375, 30.0))
    assert found["why"] is None and found["source"] == ["cpu:0", "dram:0"]
    assert found["idle_watts"] == pytest.approx([32.0, 32.0])  # package and memory
    assert found["window_s"] == 10.0 and found["rounds"] == 3
    dense, model = found["contenders"]["dense"], found["contenders"]["model"]
    assert dense["calls"] == [20] * 3 and model["calls"] == [27] * 3  # whole calls
    assert dense["joules"]["median"] == pytest.approx(25.0)
    assert dense["joules_with_idle"]["median"] == pytest.approx(41.0)
    assert model["joules"]["low"] == model["joules"]["high"] == pytest.approx(11.25)
    assert model["proxies"] == {
        "processor_seconds": pytest.approx(0.375), "macs": 100.0, "weight_bytes": 8.0,
        "cache_bytes": 2.0,
    }  # fmt: skip
    over = ratio(found, "model", "dense")
    assert over["joules"]["median"] == pytest.approx(0.45)
    assert over["processor_seconds"] == pytest.approx(0.75) and over["bytes"] == 1.0
    lines = text(found, "dense")
    assert lines[1].startswith("model: 11.2 J per call, 0.45 of dense; proxies: 0.375 processor")
    assert lines[-1] == (
        "energy of cpu:0, dram:0 above the idle power: 32.0 and 32.0 W, before and after"
    )


def test_contenders_alternate_between_two_idle_windows(tree):
    machine, order = Machine(tree), []
    meter, runs = meter_of(machine), {}
    for name in ("a", "b"):
        runs[name] = lambda name=name: (order.append(name), machine.run(6.0, 5.0))
    idle = machine.host.sleep
    host = windows.Host(**{**vars(machine.host), "sleep": lambda s: (order.append(s), idle(s))})
    work = {name: Work(1.0, 1.0) for name in runs}
    measure(runs, work, meter, Windows(10.0, 2), CPU, before=lambda n: order.append(n + "?"),
            host=host)  # fmt: skip
    turn = ["a?", "a", "a", "b?", "b", "b"]
    assert order == ["a?", "a", "b?", "b", 10.0, *turn, *turn, 10.0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 65_532_610_986), st.floats(0.1, 900.0))
def test_a_counter_that_wraps_around_loses_nothing(tmp_path_factory, start, watts):
    """Wherever it begins; zeus reports a negative number for a wrap-around that it misses."""
    machine = Machine(tmp_path_factory.mktemp("sys"), start=start, limit=65_532_610_987, watts=0.0)
    meter = meter_of(machine)
    meter.begin()
    machine.run(10.0, watts)
    assert meter.end()["cpu:0"] == pytest.approx(10 * watts, abs=1e-5)


def test_the_wrap_around_that_zeus_misses_is_a_negative_number(tree):
    """And one that it notices a window too late is a whole range too much: both become right."""
    machine = Machine(tree, start=65_000_000_000, limit=65_532_610_987)
    monitor = monitor_of(machine)(gpu_indices=[])
    meter = Meter(monitor, tree)
    monitor.begin_window("raw")
    meter.begin()
    machine.run(20.0, 20.0)
    assert monitor.end_window("raw").cpu_energy[0] < 0
    assert meter.end()["cpu:0"] == pytest.approx(1000.0)

    class Late(Monitor):
        def _cpu(self, index):
            own, memory = super()._cpu(index)
            return own + (65_532.610987 if machine.seconds > 20 else 0), memory

    meter = Meter(Late(machine, Gpus(), None), tree)
    meter.begin()
    machine.run(20.0, 20.0)
    assert meter.end()["cpu:0"] == pytest.approx(1000.0)


def test_the_counter_of_the_platform_is_not_added_to_the_packages(tree):
    machine = Machine(tree)
    meter = meter_of(machine)
    meter.begin()
    machine.run(10.0, 0.0)
    assert meter.end() == {"cpu:0": pytest.approx(300.0), "dram:0": pytest.approx(20.0)}


def test_without_counters_of_processors_the_reason_names_the_folder(tree):
    with pytest.raises(NotMeasured) as why:
        open_meter(CPU, create=monitor_of(Machine()), powercap=(tree, tree / "other"))
    assert str(why.value) == (
        f"there is no {tree}: virtual machines and most containers show no energy counters"
    )
    tree.mkdir()
    with pytest.raises(NotMeasured, match="lists no processor"):
        open_meter(CPU, create=monitor_of(Machine()), powercap=(tree,))


def test_without_permission_the_reason_names_the_file(tree, monkeypatch):
    """By a reader that refuses: the tests may run as root, whom no mode keeps from reading."""
    machine = Machine(tree)
    read = Path.read_text

    def refuse(path, *arguments, **options):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(NotMeasured) as why:
        meter_of(machine)
    assert str(why.value) == (
        f"there is no permission to read {tree}/intel-rapl:0/energy_uj "
        "(root has, and zeus's daemon)"
    )


def test_counters_that_fail_later_leave_the_proxies_and_a_reason(tree):
    machine = Machine(tree)
    meter = meter_of(machine)

    def run() -> None:
        machine.run(1.0, 5.0)
        (tree / "intel-rapl:0" / "energy_uj").write_text("nonsense")

    work = {"dense": Work(1.0, 1.0)}
    found = measure({"dense": run}, work, meter, Windows(10.0, 1), CPU, host=machine.host)
    assert found["why"].startswith("zeus cannot read the counters: ValueError: invalid literal")
    assert found["contenders"]["dense"]["joules"] is None
    assert found["contenders"]["dense"]["proxies"]["processor_seconds"] == 1.0
    assert text(found, "dense")[-1] == f"energy was not measured: {found['why']}"


def test_a_counter_that_does_not_advance_is_no_measurement(tree):
    """Some virtual machines show the files, and zeros in them."""
    machine = Machine(tree)
    machine.run = lambda *own, **more: Machine.run(machine, own[0], -machine.watts, **more)
    found = measured(machine, meter_of(machine), dense=(1.0, 0.0))
    assert found["why"] == "the energy counter cpu:0 did not advance in 10 s"
    assert found["source"] is None and found["idle_watts"] is None


@pytest.mark.parametrize(("others", "why"), [(0.1, False), (1.0, True)])
def test_a_package_that_other_processes_use_is_not_attributed(tree, others, why):
    machine = Machine(tree, others=others)
    found = measured(machine, meter_of(machine), dense=(1.0, 10.0))
    assert found["others"] == pytest.approx(others / 4)
    assert (found["why"] is not None) == why
    if why:
        assert found["why"].startswith("other processes used 25% of the processors")
        assert found["contenders"]["dense"]["joules"] is None


def test_a_system_that_does_not_count_other_processes(tree):
    machine = Machine(tree, others=2.0)
    machine.busy = None
    found = measured(machine, meter_of(machine), dense=(1.0, 10.0))
    assert found["others"] is None and found["why"] is None


def test_energy_within_the_noise_of_the_idle_power_has_no_ratio(tree):
    machine = Machine(tree)
    found = measured(machine, meter_of(machine), dense=(1.0, -1.0), model=(1.0, 5.0))
    assert found["contenders"]["dense"]["joules"]["median"] < 0
    assert ratio(found, "model", "dense")["joules"] is None


def test_a_gpu_is_measured_by_its_own_counter_alone(tree):
    machine = Machine(tree, others=3.0)  # which are none of the GPU's
    gpus = Gpus([lambda: 0.0, lambda: machine.joules["gpu"]])
    meter = meter_of(machine, torch.device("cuda", 1), gpus=gpus)
    assert meter._monitor.asked == ([1], [])
    found = measured(machine, meter, dense=(0.5, 200.0), model=(0.5, 50.0))
    assert found["source"] == ["gpu:1"] and found["why"] is None
    assert found["idle_watts"] == pytest.approx([60.0, 60.0])
    assert found["contenders"]["dense"]["joules"]["median"] == pytest.approx(100.0)
    assert ratio(found, "model", "dense")["joules"]["median"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("gpus", "why"),
    [
        (Gpus(), "NVML does not answer, or does not list the GPU"),
        (Gpus([None]), "GPU 0 has no energy counter (NVIDIA's have since Volta)"),
        (
            SimpleNamespace(__len__=None),
            "zeus cannot read the counters: TypeError: object of type 'types.SimpleNamespace' "
            "has no len()",
        ),
    ],
)
def test_a_gpu_without_a_counter_has_a_reason(tree, gpus, why):
    with pytest.raises(NotMeasured) as found:
        meter_of(Machine(tree), CUDA, gpus=gpus)
    assert str(found.value) == why


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"total_energy_mj": 9e3, "cpu_energy_mj": 4e3, "gpu_energy_mj": 1e3}, {"soc": 9.0}),
        (
            {"cpu_total_mj": 4e3, "gpu_mj": 0, "dram_mj": 500.0, "efficiency_cores_mj": [1, 2]},
            {"soc:cpu": 4.0, "soc:dram": 0.5},
        ),
        ({"cpu_total_mj": 4e3, "gpu_mj": 10.0, "dram_mj": None}, {"soc:cpu": 4.0, "soc:gpu": 0.01}),
    ],
)
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_system_on_a_chip_is_counted_once(fields, parts, device):
    machine = Machine()
    meter = meter_of(machine, device, soc=lambda: SimpleNamespace(**fields))
    meter.begin()
    machine.run(10.0, 1.0)
    assert meter.end() == pytest.approx(parts)


def import_of_zeus(monkeypatch, error: ImportError | None, monitor=None) -> None:
    """``from zeus.monitor import ZeusMonitor`` raises the error, or finds the monitor."""

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "zeus":
                raise error

    for name in [name for name in sys.modules if name.partition(".")[0] == "zeus"]:
        monkeypatch.delitem(sys.modules, name)
    if error is not None:
        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
        return
    module = ModuleType("zeus.monitor")
    module.ZeusMonitor = monitor
    monkeypatch.setitem(sys.modules, "zeus", ModuleType("zeus"))
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)


@pytest.mark.skipif(find_spec("zeus") is None, reason="the package zeus is not installed")
def test_zeus_itself_reads_a_made_up_tree(tree, monkeypatch):
    """The monitor above does what zeus's does; its process that looks for wrap-arounds is left out,
    so that it misses one."""
    from zeus.device import cpu
    from zeus.device.cpu import rapl

    class Tracker:
        def __init__(self, path, limit):
            pass

        def get_num_wraparounds(self):
            return 0

    machine = Machine(tree, start=65_000_000_000, limit=65_532_610_987)
    monkeypatch.setattr(rapl, "RaplWraparoundTracker", Tracker)
    monkeypatch.setattr(rapl, "RAPL_DIR", str(tree))
    monkeypatch.setattr(cpu, "_cpus", None)
    rapl.rapl_is_available.cache_clear()
    try:
        meter = open_meter(CPU, powercap=(tree,))
        found = measured(machine, meter, dense=(0.5, 50.0))
    finally:
        rapl.rapl_is_available.cache_clear()
    assert found["source"] == ["cpu:0", "dram:0"] and found["why"] is None
    assert found["contenders"]["dense"]["joules"]["median"] == pytest.approx(25.0)


MISSING = ModuleNotFoundError("No module named 'zeus'", name="zeus")


def test_without_zeus_the_reason_says_how_to_install_it(monkeypatch):
    import_of_zeus(monkeypatch, MISSING)
    with pytest.raises(NotMeasured) as why:
        open_meter(CPU)
    assert str(why.value) == "the package zeus is missing: pip install 'headwise[energy]'"
    assert "zeus" not in sys.modules
    import_of_zeus(monkeypatch, ImportError("Unofficial pynvml package detected!\nMore."))
    with pytest.raises(NotMeasured) as why:
        open_meter(CPU)
    assert str(why.value) == (
        "the package zeus cannot be imported: ImportError: Unofficial pynvml package detected!"
    )


def test_processor_seconds_of_the_system(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 4000 50 6 7 8 9 10\ncpu0 1 2\n")
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    assert windows._busy_seconds(stat) == pytest.approx(1.63)
    assert windows._busy_seconds(tmp_path / "none") is None


# ---- What a call does ----


def test_work_of_models_counts_heads_and_the_weights_that_are_read(tiny_model):
    import headwise as hw
    from headwise.apps.bench.model import dynamic_model, static_model
    from headwise.apps.tasks.models import load_classifier

    dense = load_classifier(tiny_model, 2).eval()
    ids = torch.tensor([[2, 6, 11, 7, 3], [2, 8, 3, 0, 0]])
    inputs = [{"input_ids": ids, "attention_mask": (ids != 0).long()}]
    converted = hw.convert(load_classifier(tiny_model, 2)).eval()
    layers = {name: own.num_heads for name, own in hw.attention_layers(converted).items()}

    def work(model) -> Work:
        return model_work(model, dense.config, layers, inputs, TextExamples.positions_of)

    pruned = static_model(hw.convert(load_classifier(tiny_model, 2)), 0.5)
    gated = dynamic_model(hw.convert(load_classifier(tiny_model, 2)), 0.5)
    embeddings = sum(p.numel() for p in dense.bert.embeddings.parameters() if p.shape != (32,))
    weights = 4 * (sum(p.numel() for p in dense.parameters()) - embeddings)
    heads = 2 * 4 * (4 * 32 * 8 + 3 * 8) * 4
    assert work(dense).weight_bytes == weights == work(converted).weight_bytes
    assert work(dense).macs == work(converted).macs
    assert work(pruned).weight_bytes == weights - heads // 2
    attention = sum(4 * n * 32 * 8 + 2 * n * n * 8 for n in (5, 3)) * 8
    assert work(dense).macs - work(pruned).macs == attention / 2
    # Two texts of two heads in each layer: between two and four of them are read.
    gates = 4 * sum(p.numel() for n, p in gated.named_parameters() if ".gate." in n)
    with hw.trace(gated) as trace:
        gated(**inputs[0])
    read = [own.index[:, :2].unique().numel() for own in trace.selections.values()]
    assert work(gated).weight_bytes == weights + gates - heads * (8 - sum(read)) // 8
    assert work(gated).macs > work(pruned).macs


# ---- The command line ----


def use(monkeypatch, machine: Machine) -> None:
    """The command line on a made-up machine: every reading of its clock takes 2 s."""

    def now() -> float:
        machine.run(2.0, 8.0)
        return machine.seconds

    host = windows.Host(**{**vars(machine.host), "now": now, "busy": lambda: None})
    monkeypatch.setattr(windows, "Host", lambda: host)
    counters.meter_of.cache_clear()


@pytest.fixture
def machine(tree, monkeypatch):
    found = Machine(tree)
    use(monkeypatch, found)
    monkeypatch.setattr(counters, "POWERCAP", (tree,))
    import_of_zeus(monkeypatch, None, monitor_of(found))
    yield found
    counters.meter_of.cache_clear()


@pytest.fixture
def bare(monkeypatch):
    """A machine without zeus."""
    use(monkeypatch, Machine())
    import_of_zeus(monkeypatch, MISSING)
    yield
    counters.meter_of.cache_clear()


def bench(tmp_path, *arguments) -> list[dict]:
    path = tmp_path / "bench.json"
    command = ["bench", *map(str, arguments), "--energy", "--dtype", "float32", "--threads", "1"]
    command += ["--rounds", "1", "--energy-rounds", "2", "--json", str(path)]
    assert main(command) == 0
    found = json.loads(path.read_text())
    assert found["settings"]["energy"]["rounds"] == 2
    return found["results"]


def test_bench_measures_layers_and_models(machine, tmp_path, tiny_model, tiny_texts, capsys):
    results = bench(
        tmp_path, "layer", "train", "model", "--shapes", "3,8,16,4", "--fractions", "0.5", "1",
        "--no-memory", "--no-mixed", "--model", tiny_model, "--data", tiny_texts, "--text",
        "review", "--label", "mood", "--batch-size", "4", "--max-length", "16",
    )  # fmt: skip
    names = ["headwise", "k heads", "dense"], ["headwise", "dense"]
    expected = [*names, *names, ["headwise", "pruned", "dense"]]
    energy = [result["energy"] for result in results]
    assert [list(own["contenders"]) for own in energy] == expected
    for own in energy:
        assert own["why"] is None and own["source"] == ["cpu:0", "dram:0"]
        assert all(each["joules"]["median"] > 0 for each in own["contenders"].values())
    forward, _, training, *_ = (
        {name: each["proxies"] for name, each in own["contenders"].items()} for own in energy
    )
    head = 4 * 8 * 16 * 4 + 2 * 8 * 8 * 4
    assert forward["k heads"]["macs"] == 3 * 2 * head
    assert forward["headwise"]["macs"] == 3 * (2 * head + 4 * 16)  # the relevance of its gate
    assert forward["dense"]["weight_bytes"] == 4 * (4 * 16 * 16 + 4 * 16)
    assert training["dense"]["macs"] == 3 * forward["dense"]["macs"]
    assert training["dense"]["weight_bytes"] == 2 * forward["dense"]["weight_bytes"]
    printed = capsys.readouterr().out
    assert printed.count("above the idle power: ") == len(results)
    assert "1.00 of dense; proxies: " in printed


def test_bench_without_zeus_has_proxies_and_the_reason(bare, tmp_path, capsys):
    (result,) = bench(
        tmp_path, "layer", "--shapes", "2,8,16,4", "--fractions", "0.5", "--no-memory", "--no-mixed"
    )
    energy = result["energy"]
    assert energy["why"] == "the package zeus is missing: pip install 'headwise[energy]'"
    assert energy["source"] is None and energy["idle_watts"] is None
    assert all(each["joules"] is None for each in energy["contenders"].values())
    assert all(each["proxies"]["macs"] > 0 for each in energy["contenders"].values())
    printed = capsys.readouterr().out
    assert "headwise: energy not measured; proxies: " in printed
    assert f"energy was not measured: {energy['why']}\n" in printed


def compare(tmp_path, tiny_model, tiny_texts) -> tuple[dict, dict]:
    """results.json, and the table of the page."""
    out = tmp_path / "out"
    command = ["compare", "--model", tiny_model, "--data", tiny_texts, "--text", "review"]
    command += ["--label", "mood", "--group", "film", "--out", out, "--quick", "--steps", 2]
    command += ["--dense-steps", 4, "--methods", "random-posthoc", "budget-gate", "--energy"]
    assert main([str(one) for one in command]) == 0
    page = (out / "index.html").read_text()
    data = page.split('<script type="application/json" id="data">', 1)[1].split("</script>", 1)[0]
    shown = json.loads(data)["compared"]["tables"]
    (table,) = [own for own in shown if "energy" in [name for name, *_ in own["columns"]]]
    return json.loads((out / "results.json").read_text()), table


def test_compare_has_columns_of_energy(machine, tmp_path, tiny_model, tiny_texts, capsys):
    results, table = compare(tmp_path, tiny_model, tiny_texts)
    for run in results["runs"]:
        own = run["energy"]
        assert own["why"] is None and list(own["contenders"]) == ["dense", "model"]
        assert own["ratio"]["joules"]["median"] == pytest.approx(1.0)  # as the machine is made
    dense, pruned, gated = (entry["energy"] for entry in results["summary"])
    assert dense["joules"]["ratio"] == pytest.approx(1.0) and dense["joules_per_input"] > 0
    assert dense["macs"] == dense["bytes"] == 1.0
    assert 0 < pruned["macs"] < 1 and 0 < gated["macs"] < 1 and 0 < pruned["bytes"] < 1
    names = [name for name, *_ in table["columns"]]
    assert names[-4:] == ["energy", "processor", "MACs", "bytes"]
    assert [row[names.index("energy")][:2] for row in table["rows"]] == ["1 ", "1.", "1."]
    assert all("proxy" in meaning for _, meaning, *_ in table["columns"][-3:])
    printed = capsys.readouterr().out
    assert "Energy is that of cpu:0, dram:0 above the idle power, 40.0 W in the" in printed
    assert "energy: joules above the idle power, dense = 1" in printed
    assert results["settings"]["energy"] == {"seconds": 10.0, "rounds": 3, "proxy_seconds": 0.5}


def test_compare_without_zeus_says_not_measured(bare, tmp_path, tiny_model, tiny_texts, capsys):
    results, table = compare(tmp_path, tiny_model, tiny_texts)
    column = [name for name, *_ in table["columns"]].index("energy")
    assert {row[column] for row in table["rows"]} == {"not measured"}
    (found,) = [said for said in results["findings"] if said.startswith("Energy")]
    assert found == (
        "Energy was not measured: the package zeus is missing: pip install 'headwise[energy]'."
    )
    assert all(entry["energy"]["joules"] is None for entry in results["summary"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--energy", "--energy-seconds", "9"], "must be between 10 and 3600 seconds, got 9"),
        (["--energy", "--energy-seconds", "nan"], "must be between 10 and 3600 seconds, got nan"),
        (["--energy", "--energy-seconds", "ten"], "expected a number, got 'ten'"),
        (["--energy", "--energy-rounds", "0"], "must be positive, got 0"),
        (["--energy-rounds", "4"], "--energy-rounds needs --energy"),
        (["--energy-seconds", "20"], "--energy-seconds needs --energy"),
    ],
)
@pytest.mark.parametrize("command", [["bench", "layer"], ["compare"]])
def test_bad_use(capsys, tmp_path, monkeypatch, command, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.strip().endswith(complaint) and "Traceback" not in error
