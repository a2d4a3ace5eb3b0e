"""Where gpu_check runs: a CUDA device, or the host, to rehearse.

Everything that needs CUDA is here, so that a rehearsal runs all the rest.
"""

import math
import statistics
import time
from dataclasses import replace

import torch
from headwise.apps.energy.counters import meter_of, open_meter
from headwise.apps.energy.windows import Windows


def first_line(error):
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class Gpu:
    """A CUDA device: events, graphs, memory."""

    rehearsal = False

    def __init__(self, name):
        self.device = torch.device(name)
        self.name = torch.cuda.get_device_name(self.device)
        torch.cuda.set_device(self.device)

    def synchronize(self):
        torch.cuda.synchronize(self.device)

    def milliseconds(self, runs):
        """Of calls one after another, on the device's own clock."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for run in runs:
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def captured(self, run):
        """(the same work as a CUDA graph, None), or (None, why it cannot be captured)."""
        try:
            self.synchronize()
            with torch.cuda.stream(torch.cuda.Stream(self.device)):
                run()
            self.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            return graph.replay, None
        except RuntimeError as error:
            self.synchronize()
            return None, first_line(error)

    def peak_bytes(self, run):
        """The most memory that a call allocates."""
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free_bytes(self):
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def energy(self):
        """The GPU's counter or why there is none, the windows, and the clocks (None: those of this
        machine): with three variants six windows of 10 s, and two idle ones."""
        return meter_of(self.device), Windows(rounds=2), None

    def release(self):
        self.synchronize()
        torch.cuda.empty_cache()


class Host:
    """The host instead: the same calls, and a wall clock that tells nothing about a GPU."""

    rehearsal = True
    device = torch.device("cpu")
    name = "rehearsal on the host"

    def synchronize(self):
        pass

    def milliseconds(self, runs):
        begin = time.perf_counter()
        for run in runs:
            run()
        return 1e3 * (time.perf_counter() - begin)

    def captured(self, run):
        return run, None

    def peak_bytes(self, run):
        run()
        return 1

    def free_bytes(self):
        return 1 << 30

    def energy(self):
        """The made-up machine of the tests, with a counter of a made-up GPU."""
        from support.energy import Gpus, Machine, monitor_of

        machine = Machine()
        create = monitor_of(machine, Gpus([lambda: machine.joules["gpu"]]))

        def now():
            machine.run(5.0, 100.0)
            return machine.seconds

        meter = open_meter(torch.device("cuda", 0), create=create)
        return meter, Windows(rounds=2), replace(machine.host, now=now)

    def release(self):
        pass


class Timer:
    """Milliseconds of a call."""

    def __init__(self, machine, repeats):
        self.machine, self.repeats = machine, repeats

    def times(self, *runs):
        """Several runs alternate, so that none profits from what it left in the cache. Short calls
        are timed many at a time: else most of the time would be the launch."""
        for run in runs:
            run()
            run()
        self.machine.synchronize()
        shortest = self.machine.milliseconds(runs) / len(runs)
        at_once = min(50, math.ceil(1 / max(shortest, 1e-3)))
        times, next_run = [], 0
        for _ in range(max(self.repeats, math.ceil(len(runs) / at_once))):
            turn = [runs[(next_run + n) % len(runs)] for n in range(at_once)]
            next_run += at_once
            times.append(self.machine.milliseconds(turn) / at_once)
        return times

    def __call__(self, *runs):
        return statistics.median(self.times(*runs))

    def replay(self, *runs):
        """The same of CUDA graphs; (milliseconds, None) or (of the launches, why)."""
        graphs = [self.machine.captured(run) for run in runs]
        reasons = [reason for _, reason in graphs if reason]
        if reasons:
            return self(*runs), reasons[0]
        return self(*(graph for graph, _ in graphs)), None


def checked_part(machine, batch, heads, length):
    """(sequences, tokens) of a layer whose oracle takes at most half of the memory: it holds the
    scores of all heads in float64 a dozen times."""
    batch = min(2, batch)
    free = machine.free_bytes() / 2

    def bytes_needed():
        return 12 * 8 * batch * heads * length**2

    while bytes_needed() > free and (batch > 1 or length > 1):
        if batch > 1:
            batch = 1
        else:
            length //= 2
    return batch, length
