"""Joules of contenders in alternating windows, above the idle power, and proxies beside them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from headwise.apps.bench.timing import quartiles
from headwise.apps.energy.counters import Meter, NotMeasured, first_line

#: Share of the processors that other processes may use: a package's counter includes their energy.
OTHERS = 0.05
LEAST_SECONDS = 10.0


@dataclass(frozen=True)
class Host:
    """Clocks of the machine.

    Attributes:
        now: seconds of a clock that never goes back.
        own: processor seconds of this process, all threads.
        busy: processor seconds of all processes, or None if the system does not count them.
        sleep: waits for so many seconds.
        cores: of the machine.
    """

    now: Callable[[], float] = time.perf_counter
    own: Callable[[], float] = time.process_time
    busy: Callable[[], float | None] = lambda: _busy_seconds()
    sleep: Callable[[float], None] = time.sleep
    cores: int = os.cpu_count() or 1


def _busy_seconds(path: Path = Path("/proc/stat")) -> float | None:
    try:
        first = path.read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq = (int(ticks) for ticks in first[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Work:
    """What one call does, counted and not measured: proxies of energy.

    Attributes:
        macs: multiply-accumulates.
        weight_bytes: of the weights that the call reads, each once per pass.
        cache_bytes: of the cached keys and values that it reads.
    """

    macs: float
    weight_bytes: float
    cache_bytes: float = 0.0


def head_bytes(width: int, head_dim: int, size: int) -> int:
    """Bytes of one head's weights: query, key, value with their biases, and output."""
    return (4 * width + 3) * head_dim * size


@dataclass(frozen=True)
class Windows:
    """How energy is measured.

    Attributes:
        seconds: length of a window, at least 10 for joules.
        rounds: windows of each contender.
        proxy_seconds: length of a window in which no counter can be read.
    """

    seconds: float = LEAST_SECONDS
    rounds: int = 3
    proxy_seconds: float = 0.5


@dataclass(frozen=True)
class _Window:
    seconds: float
    joules: float | None
    calls: int
    processor_seconds: float


def measure(
    runs: Mapping[str, Callable[[], object]],
    work: Mapping[str, Work],
    meter: Meter | NotMeasured,
    windows: Windows,
    device: torch.device,
    *,
    before: Callable[[str], object] | None = None,
    host: Host | None = None,
) -> dict:
    """Energy of one call of each contender, above the power of the idle machine.

    Contenders alternate, one window each per round; an idle window is measured before the first
    round and after the last. Where joules cannot be measured they are None, and ``why`` has a
    sentence.

    Args:
        work: of one call of each contender.
        meter: the counters, or why there are none.
        before: called with the name of each contender before its window.

    Returns:
        ``source`` (the counters), ``why``, ``window_s``, ``rounds``, ``idle_watts`` (before,
        after), ``others`` (the share of the processors that other processes used), and for each of
        the ``contenders`` its ``calls``, ``joules`` (of a call, idle power subtracted: median and
        quartiles over the rounds), ``joules_with_idle``, and ``proxies``: ``processor_seconds``
        and the fields of :class:`Work`.
    """
    host = host or Host()
    measuring = _Measuring(meter, windows, device, host)
    began, busy, own = host.now(), host.busy(), host.own()
    for name, run in runs.items():
        if before is not None:
            before(name)
        run()
    idle = [measuring.idle()]
    found: dict[str, list[_Window]] = {name: [] for name in runs}
    for _ in range(windows.rounds):
        for name, run in runs.items():
            if before is not None:
                before(name)
            found[name].append(measuring.window(run))
    idle.append(measuring.idle())
    others = None
    now_busy = host.busy()
    if busy is not None and now_busy is not None:
        share = (now_busy - busy - (host.own() - own)) / (host.cores * (host.now() - began))
        others = max(0.0, share)
    why = measuring.why
    if why is None and others is not None and others > OTHERS and not measuring.only_gpus:
        why = (
            f"other processes used {others:.0%} of the processors, and the counter includes their "
            "energy"
        )
    watts = None if why else [own.joules / own.seconds for own in idle if own.joules is not None]
    return {
        "source": sorted(measuring.parts) if why is None else None,
        "why": why,
        "window_s": measuring.seconds,
        "rounds": windows.rounds,
        "idle_watts": watts,
        "others": others,
        "contenders": {
            name: _contender(own, work[name], sum(watts) / len(watts) if watts else None)
            for name, own in found.items()
        },
    }


class _Measuring:
    """Windows one after another, and the first reason why they have no joules."""

    def __init__(self, meter: Meter | NotMeasured, windows: Windows, device, host: Host):
        self.why = str(meter) if isinstance(meter, NotMeasured) else None
        self._meter = None if isinstance(meter, NotMeasured) else meter
        self.seconds = windows.proxy_seconds if self.why else windows.seconds
        self._cuda, self._device, self._host = device.type == "cuda", device, host
        self.parts: set[str] = set()

    @property
    def only_gpus(self) -> bool:
        return all(part.startswith("gpu") for part in self.parts)

    def idle(self) -> _Window:
        if self.why:  # no power to measure
            return _Window(0.0, None, 0, 0.0)
        return self._window(lambda: self._host.sleep(self.seconds))

    def window(self, run: Callable[[], object]) -> _Window:
        return self._window(run)

    def _window(self, run: Callable[[], object]) -> _Window:
        host, calls, joules = self._host, 0, None
        self._read(lambda meter: meter.begin())
        began, own = host.now(), host.own()
        while calls == 0 or host.now() - began < self.seconds:
            run()
            if self._cuda:
                torch.cuda.synchronize(self._device)
            calls += 1
        seconds, own = host.now() - began, host.own() - own
        parts = self._read(lambda meter: meter.end())
        if parts is not None:
            self.parts |= parts.keys()
            joules = sum(parts.values())
        return _Window(seconds, joules, calls, own)

    def _read(self, use: Callable[[Meter], Any]) -> Any:
        if self._meter is None or self.why:
            return None
        try:
            return use(self._meter)
        except NotMeasured as error:
            self.why = str(error)
        except Exception as error:  # of a driver, through zeus
            self.why = f"zeus cannot read the counters: {first_line(error)}"
        return None


def _contender(windows: Sequence[_Window], work: Work, idle_watts: float | None) -> dict:
    joules, whole = None, None
    if idle_watts is not None:
        each = [(w.joules or 0.0, w.seconds, w.calls) for w in windows]
        whole = quartiles([own / calls for own, _, calls in each])
        net = [(own - idle_watts * seconds) / calls for own, seconds, calls in each]
        joules = {**quartiles(net), "rounds": net}
    processor = sum(w.processor_seconds for w in windows) / sum(w.calls for w in windows)
    return {
        "calls": [w.calls for w in windows],
        "joules": joules,
        "joules_with_idle": whole,
        "proxies": {"processor_seconds": processor, **asdict(work)},
    }


#: Of a ratio; bytes are those of weights and caches together.
PROXIES = ("processor_seconds", "macs", "bytes")


def ratio(found: dict, name: str, base: str) -> dict:
    """``name`` over ``base``, of a result of :func:`measure`: ``joules`` (the median of the
    rounds' ratios, and quartiles; None if not measured) and each of :data:`PROXIES` (None over
    0)."""
    own, other = found["contenders"][name], found["contenders"][base]
    joules = None
    if own["joules"] is not None:
        pairs = list(zip(own["joules"]["rounds"], other["joules"]["rounds"], strict=True))
        # At the noise of the idle power there is nothing to divide.
        if all(value > 0 for pair in pairs for value in pair):
            joules = quartiles([a / b for a, b in pairs])
    ours, theirs = _proxies(own), _proxies(other)
    proxies = {key: ours[key] / theirs[key] if theirs[key] else None for key in PROXIES}
    return {"joules": joules, **proxies}


def _proxies(contender: dict) -> dict[str, float]:
    found = contender["proxies"]
    return {**found, "bytes": found["weight_bytes"] + found["cache_bytes"]}


def text(found: dict, base: str) -> list[str]:
    """A result of :func:`measure` as lines: each contender, and relative to ``base``."""
    lines = []
    for name, own in found["contenders"].items():
        ratios = ratio(found, name, base)
        joules = "energy not measured"
        if own["joules"] is not None:
            joules = f"{own['joules']['median']:.3g} J per call"
            if ratios["joules"] is not None:
                joules += f", {ratios['joules']['median']:.2f} of {base}"
        own = _proxies(own)
        lines.append(
            f"{name}: {joules}; proxies: {own['processor_seconds']:.3g} processor seconds, "
            f"{own['macs']:.3g} MACs, {own['bytes']:.3g} bytes of weights and caches"
        )
    if found["why"] is None:
        watts = " and ".join(f"{own:.1f}" for own in found["idle_watts"])
        lines.append(
            f"energy of {', '.join(found['source'])} above the idle power: {watts} W, before and "
            "after"
        )
    else:
        lines.append(f"energy was not measured: {found['why']}")
    return lines
