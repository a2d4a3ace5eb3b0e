"""The task ``speech``: words spoken by a synthesiser, as log-mel spectrograms."""

from __future__ import annotations

import json
import platform
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headwise.apps.tasks import espeak
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.own_models import AST
from headwise.apps.tasks.packages import package_folder
from headwise.apps.tasks.tasks import Task
from headwise.io.printable import quoted

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
_ACCENTS = (
    "en", "en-us", "en-gb-scotland", "en-029", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd",
    "en-us-nyc",
)  # fmt: skip
_SPEAKERS = (
    "f1", "f2", "f3", "f4", "f5", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "Alex", "Alicia",
    "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Hugo", "Jacky", "Lee", "Marco", "Mario",
    "Michael", "Mike", "adam", "anika", "aunty", "belinda", "benjamin", "boris", "caleb", "david",
    "ed", "grandma", "grandpa", "linda",
)  # fmt: skip
#: Clips of each word by each speaker, each with an accent, a speed and a pitch of its own.
_CLIPS = 5

#: A clip: 64 frames, 0.74 s.
_FRAMES, _HOP, _WINDOW = 64, 256, 512
_BANDS, _LOWEST, _HIGHEST = 32, 60.0, 8000.0


def synthesise(what: Sequence[tuple[str, str, int, int]]) -> Iterator[Tensor]:
    """The samples of each (voice, text, words per minute, pitch), float32 in [-1, 1].

    Raises:
        UsageError: the package with espeak-ng is not installed, or does not run here.
    """
    folder = package_folder("espeakng_loader")
    name = {"Windows": "espeak-ng.dll", "Darwin": "libespeak-ng.dylib"}.get(
        platform.system(), "libespeak-ng.so"
    )
    command = [sys.executable, "-I", str(Path(espeak.__file__)), str(folder / name)]
    done = subprocess.run(
        [*command, str(folder / "espeak-ng-data")],
        input=json.dumps(list(what)).encode(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or [""]
        raise UsageError(f"espeak-ng does not run: {quoted(lines[-1])}")
    at = 0
    for _ in what:
        (count,) = struct.unpack_from("<I", done.stdout, at)
        wave = bytearray(done.stdout[at + 4 : at + 4 + 2 * count])
        yield torch.frombuffer(wave, dtype=torch.int16).float() / 32768
        at += 4 + 2 * count


def mel_filters(bands: int, bins: int, rate: float, lowest: float, highest: float) -> Tensor:
    """Triangles on the mel scale (O'Shaughnessy 1987), [bins, bands], for ``bins`` frequencies from
    0 to ``rate`` / 2; each has its peak of 1 where its neighbours begin and end."""

    def mel(hertz: Tensor) -> Tensor:
        return 2595 * torch.log10(1 + hertz / 700)

    ends = mel(torch.tensor([lowest, highest], dtype=torch.float64))
    edges = torch.linspace(ends[0].item(), ends[1].item(), bands + 2, dtype=torch.float64)
    own = mel(torch.linspace(0, rate / 2, bins, dtype=torch.float64))[:, None]  # [bins, 1]
    rising = (own - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - own) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0).float()


def log_mel(waves: Tensor) -> Tensor:
    """Log-mel spectrograms [N, frames, bands] of waves [N, samples], each with mean 0 and variance
    1."""
    window = torch.hann_window(_WINDOW)
    spectrum = torch.stft(
        waves, _WINDOW, _HOP, window=window, center=False, return_complex=True
    )  # [N, bins, frames]
    power = spectrum.abs().square().transpose(1, 2)
    filters = mel_filters(_BANDS, power.size(2), espeak.SAMPLE_RATE, _LOWEST, _HIGHEST)
    logs = (power @ filters + 1e-6).log()
    mean, std = logs.mean((1, 2), keepdim=True), logs.std((1, 2), keepdim=True)
    return (logs - mean) / (std + 1e-6)


def in_noise(wave: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """The wave at a random place of ``samples`` samples of white noise, 10 to 30 dB weaker than it;
    [samples]."""
    wave = wave[:samples]
    room = samples - len(wave)
    start = int(torch.randint(room + 1, (), generator=generator))
    decibels = 10 + 20 * torch.rand((), generator=generator)
    level = wave.square().mean().sqrt() * 10 ** (-decibels / 20)
    found = torch.randn(samples, generator=generator) * level
    found[start : start + len(wave)] += wave
    return found


def speech() -> Task:
    """Twenty words, digits and commands, spoken by espeak-ng's synthetic voices in noise.

    Forty speakers, each with several accents, speeds and pitches; a speaker's clips stay together,
    so that the voices of the test were never heard. No human being speaks.
    """
    words = (*_DIGITS, *_COMMANDS)
    choose = random.Random(0)
    rows = [
        (speaker, word, choose.choice(_ACCENTS), choose.randint(130, 210), choose.randint(20, 80))
        for speaker in _SPEAKERS
        for word in words
        for _ in range(_CLIPS)
    ]
    choose.shuffle(rows)
    spoken = synthesise(
        [(f"{accent}+{who}", word, rate, pitch) for who, word, accent, rate, pitch in rows]
    )
    samples = (_FRAMES - 1) * _HOP + _WINDOW
    generator = torch.Generator().manual_seed(0)
    waves = torch.stack([in_noise(wave, samples, generator) for wave in spoken])
    return Task(
        name="speech",
        title="synthesised words: which of 20",
        inputs=log_mel(waves),
        labels=tuple(words.index(word) for _, word, *_ in rows),
        groups=tuple(speaker for speaker, *_ in rows),
        classes=words,
        example="clip",
        model=AST,
    )
