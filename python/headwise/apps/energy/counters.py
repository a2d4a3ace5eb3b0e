"""Energy counters of the hardware, read by the package zeus.

A counter that cannot be read gives a sentence in place of a number: nothing is estimated from time
or from a nominal power.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from headwise.io.printable import printable

#: Of Linux; and where zeus looks in a container.
POWERCAP = (
    Path("/sys/class/powercap/intel-rapl"),
    Path("/zeus_sys/class/powercap/intel-rapl"),
)
#: The smallest counters wrap around at 65 kJ: in a shorter window at most once, below 1 kW.
WRAP_SECONDS = 60.0


class NotMeasured(Exception):
    """Why there are no joules: one sentence, without a final stop."""


class Meter:
    """The energy counters of a device and of the processors that drive it.

    Args:
        monitor: a ``zeus.monitor.ZeusMonitor``, or anything with its ``begin_window`` and
            ``end_window``.
        powercap: the folder of the processors' counters, for their names and ranges; None: there
            is none.
    """

    def __init__(self, monitor: Any, powercap: Path | None = None):
        self._monitor = monitor
        self._zones = _zones(powercap) if powercap is not None else {}

    def begin(self) -> None:
        """Begins a window."""
        self._monitor.begin_window("headwise", restart=True)

    def end(self) -> dict[str, float]:
        """Joules of each counter since :meth:`begin`.

        Raises:
            NotMeasured: a counter did not advance, or went back.
        """
        found = self._monitor.end_window("headwise")
        joules = {f"gpu:{i}": own for i, own in (found.gpu_energy or {}).items()}
        for part, own in (("cpu", found.cpu_energy), ("dram", found.dram_energy)):
            for i, value in (own or {}).items():
                if self._zones.get(f"cpu:{i}", ("", None))[0] == "psys":
                    continue  # the whole platform, with the packages that are counted anyway
                limit = self._zones.get(f"{part}:{i}", ("", None))[1]
                if limit and found.time < WRAP_SECONDS:
                    # zeus looks for wrap-arounds at times, and may miss one at either end.
                    value = round(1e6 * value) % limit / 1e6
                joules[f"{part}:{i}"] = value
        joules |= _of_chip(found.soc_energy)
        for part, value in joules.items():
            if value <= 0:
                how = "did not advance" if value == 0 else "went back"
                raise NotMeasured(f"the energy counter {part} {how} in {found.time:.0f} s")
        return joules


def _of_chip(measured: Any) -> dict[str, float]:
    """Joules of a system on a chip: of all of it, else of its parts."""
    names = {
        "total_energy_mj": "soc",  # Jetson
        "cpu_energy_mj": "soc:cpu",
        "gpu_energy_mj": "soc:gpu",
        "cpu_total_mj": "soc:cpu",  # Apple
        "gpu_mj": "soc:gpu",
        "dram_mj": "soc:dram",
    }
    found = {}
    for field, part in names.items():
        value = getattr(measured, field, None)
        if value is not None and "soc" not in found:
            found[part] = value / 1e3
    # The part of a chip that a model does not use may draw nothing at all.
    return {part: joules for part, joules in found.items() if joules or part != "soc:gpu"}


def _zones(powercap: Path) -> dict[str, tuple[str, int | None]]:
    """(name, range in microjoules) of each counter: ``cpu:0``, ``dram:0``, ..."""
    found: dict[str, tuple[str, int | None]] = {}
    for package in powercap.glob("intel-rapl:*"):
        number = package.name.partition(":")[2]
        for folder in (package, *package.glob("intel-rapl:*")):
            name = _line(folder / "name") or ""
            if folder is package or name == "dram":
                limit = _line(folder / "max_energy_range_uj")
                part = "cpu" if folder is package else "dram"
                found[f"{part}:{number}"] = name, int(limit) if limit else None
    return found


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None


def _zeus_monitor() -> Callable[..., Any]:
    try:
        from zeus.monitor import ZeusMonitor
    except ImportError as error:
        if error.name == "zeus":
            raise NotMeasured(
                "the package zeus is missing: pip install 'headwise[energy]'"
            ) from None
        raise NotMeasured(f"the package zeus cannot be imported: {first_line(error)}") from None
    return ZeusMonitor


def open_meter(
    device: torch.device,
    *,
    create: Callable[..., Any] | None = None,
    powercap: Sequence[Path] | None = None,
) -> Meter:
    """The counters of ``device`` and of the processors.

    Args:
        create: makes the monitor; None: ``zeus.monitor.ZeusMonitor``.
        powercap: where the processors' counters may be; None: :data:`POWERCAP`.

    Raises:
        NotMeasured: zeus is missing, or the device's counter cannot be read.
    """
    powercap = POWERCAP if powercap is None else powercap
    create = _zeus_monitor() if create is None else create
    root = next((folder for folder in powercap if folder.is_dir()), None)
    try:
        monitor = create(gpu_indices=[])
        if device.type == "cuda" and not monitor.soc_is_present:
            # The GPU alone: other processes' load is in the counters of the processors.
            index = torch.cuda.current_device() if device.index is None else device.index
            _check_gpu(monitor, index)
            monitor = create(gpu_indices=[index], cpu_indices=[])
        elif not monitor.cpu_indices and not monitor.soc_is_present:
            raise NotMeasured(_why_no_processor(root, powercap))
        meter = Meter(monitor, root)
        meter.begin()  # here zeus starts the process that looks for wrap-arounds
        monitor.end_window("headwise", cancel=True)
    except NotMeasured:
        raise
    except Exception as error:
        raise NotMeasured(f"zeus cannot read the counters: {first_line(error)}") from None
    return meter


def _check_gpu(monitor: Any, index: int) -> None:
    if index >= len(monitor.gpus):
        raise NotMeasured("NVML does not answer, or does not list the GPU")
    # Without a counter zeus would integrate samples of the power.
    if not monitor.gpus.supports_get_total_energy_consumption(index):
        raise NotMeasured(f"GPU {index} has no energy counter (NVIDIA's have since Volta)")


def _why_no_processor(root: Path | None, powercap: Sequence[Path]) -> str:
    if root is None:
        return (
            f"there is no {powercap[0]}: virtual machines and most containers show no energy "
            "counters"
        )
    counters = sorted(root.glob("intel-rapl:*/energy_uj"))
    if not counters:
        return f"{root} lists no processor"
    for counter in counters:
        try:
            counter.read_text(encoding="ascii")
        except PermissionError:
            return f"there is no permission to read {counter} (root has, and zeus's daemon)"
        except OSError as error:
            return f"{counter} cannot be read: {error.strerror}"
    return "zeus found no energy counter of the processor"


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return printable(f"{type(error).__name__}: {lines[0]}", 200)


@functools.cache
def meter_of(device: torch.device) -> Meter | NotMeasured:
    """The counters of :func:`open_meter`, opened once, or why there are none."""
    try:
        return open_meter(device)
    except NotMeasured as why:
        return why
