"""A made-up machine with energy counters: clocks, a sysfs tree, and the monitor that reads it as
zeus's ZeusMonitor does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from headwise.apps.energy.windows import Host


class Machine:
    """A machine whose time passes, and whose counters advance, only by :meth:`run`.

    Args:
        powercap: the folder of counters to write; None: there are none.
        limit: range of the package's counter, in microjoules.
        watts: power of the idle package.
        others: processors that other processes keep busy.
    """

    def __init__(
        self,
        powercap: Path | None = None,
        *,
        start: int = 0,
        limit: int = 262_143_328_850,
        watts: float = 30.0,
        others: float = 0.0,
        cores: int = 4,
    ):
        self.seconds = self.own = 0.0
        self.joules = {"cpu": start / 1e6, "dram": 0.0, "psys": 0.0, "gpu": 0.0}
        self.watts, self.others, self.powercap, self.limit = watts, others, powercap, limit
        self.busy: float | None = 0.0
        self.host = Host(
            now=lambda: self.seconds,
            own=lambda: self.own,
            busy=lambda: None if self.busy is None else self.busy,
            sleep=lambda seconds: self.run(seconds, 0.0, cores=0.0),
            cores=cores,
        )
        if powercap is not None:
            self._write()

    def run(self, seconds: float, watts: float, cores: float = 1.0) -> None:
        """Something takes so long, and so much power above the idle machine's."""
        self.seconds += seconds
        self.own += cores * seconds
        if self.busy is not None:
            self.busy += (cores + self.others) * seconds
        self.joules["cpu"] += (self.watts + watts) * seconds
        self.joules["dram"] += 2.0 * seconds
        self.joules["psys"] += (self.watts + watts + 50) * seconds
        self.joules["gpu"] += (60.0 + watts) * seconds
        if self.powercap is not None:
            self._write()

    def _write(self) -> None:
        package, memory = self.powercap / "intel-rapl:0", "intel-rapl:0:0"
        for folder, name, part, limit in (
            (package, "package-0", "cpu", self.limit),
            (package / memory, "dram", "dram", 65_712_999_613),
            (self.powercap / "intel-rapl:1", "psys", "psys", 262_143_328_850),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            microjoules = round(1e6 * self.joules[part]) % limit
            (folder / "name").write_text(f"{name}\n")
            (folder / "max_energy_range_uj").write_text(f"{limit}\n")
            (folder / "energy_uj").write_text(f"{microjoules}\n")


@dataclass
class Gpus:
    """NVML's list of GPUs; ``joules``: the counter of each, None: it has none."""

    joules: list[Any] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.joules)

    def supports_get_total_energy_consumption(self, index: int) -> bool:
        return self.joules[index] is not None


class Monitor:
    """ZeusMonitor: windows over the counters, without the wrap-arounds that it misses."""

    def __init__(self, machine: Machine, gpus: Gpus, soc: Any, gpu_indices=(), cpu_indices=None):
        self.machine, self.gpus, self.gpu_indices = machine, gpus, list(gpu_indices)
        self.soc_is_present, self._soc = soc is not None, soc
        self.cpu_indices, self._windows, self.asked = [], {}, (gpu_indices, cpu_indices)
        root = machine.powercap
        if root is not None and root.is_dir() and cpu_indices is None:
            try:
                for index in range(len(list(root.glob("intel-rapl:*")))):
                    self._cpu(index)
                    self.cpu_indices.append(index)
            except PermissionError:  # so does zeus
                self.cpu_indices = []

    def _cpu(self, index: int) -> tuple[float, float | None]:
        folder = self.machine.powercap / f"intel-rapl:{index}"
        memory = folder / f"intel-rapl:{index}:0" / "energy_uj"
        own = int((folder / "energy_uj").read_text()) / 1e6
        return own, int(memory.read_text()) / 1e6 if memory.exists() else None

    def _read(self) -> tuple[float, dict, dict, dict]:
        both = {index: self._cpu(index) for index in self.cpu_indices}
        gpu = {index: self.gpus.joules[index]() for index in self.gpu_indices}
        cpu = {index: own for index, (own, _) in both.items()}
        return self.machine.seconds, gpu, cpu, {i: d for i, (_, d) in both.items() if d is not None}

    def begin_window(self, key: str, sync_execution: bool = True, restart: bool = False) -> None:
        if key in self._windows and not restart:
            raise ValueError(f"Measurement window '{key}' already exists")
        self._windows[key] = self._read()

    def end_window(self, key: str, sync_execution: bool = True, cancel: bool = False) -> Any:
        began = self._windows.pop(key)
        time, *parts = (self._read()[0] - began[0], *zip(self._read()[1:], began[1:], strict=True))
        gpu, cpu, dram = ({i: now[i] - then[i] for i in now} for now, then in parts)
        return SimpleNamespace(
            time=time, gpu_energy=gpu, cpu_energy=cpu or None, dram_energy=dram or None,
            soc_energy=self._soc() if self._soc else None,
        )  # fmt: skip


def monitor_of(machine: Machine, gpus: Gpus | None = None, soc: Any = None) -> Any:
    """What makes the monitor, as ``zeus.monitor.ZeusMonitor`` is called."""

    def create(**options: Any) -> Monitor:
        return Monitor(machine, gpus or Gpus(), soc, **options)

    return create
