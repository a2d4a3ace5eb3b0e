"""Speaks with espeak-ng, in a process of its own: its voices carry something over from one word to
the next, so the same list sounds the same only in a fresh process.

Not imported: run with the paths of the library and of its data. Reads JSON from standard input, a
list of [voice, text, words per minute, pitch]; writes for each the number of samples and its 16-bit
samples, both little-endian.
"""

import ctypes
import json
import struct
import sys

# From espeak-ng's speak_lib.h.
_SYNCHRONOUS, _NO_EXIT = 2, 0x8000
_RATE, _PITCH = 1, 3
_UTF8 = 1


def main(library: str, data: str) -> None:
    espeak = ctypes.CDLL(library)
    if espeak.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _NO_EXIT) != SAMPLE_RATE:
        raise SystemExit("espeak-ng cannot be initialised")
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
    samples = bytearray()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def receive(wave, count, events):
        if wave and count > 0:
            samples.extend(ctypes.string_at(wave, 2 * count))
        return 0

    espeak.espeak_SetSynthCallback(receive)
    for voice, text, rate, pitch in json.load(sys.stdin):
        samples.clear()
        if espeak.espeak_SetVoiceByName(voice.encode()):
            raise SystemExit(f"espeak-ng has no voice {voice}")
        espeak.espeak_SetParameter(_RATE, rate, 0)
        espeak.espeak_SetParameter(_PITCH, pitch, 0)
        spoken = text.encode() + b"\0"
        espeak.espeak_Synth(spoken, ctypes.c_size_t(len(spoken)), 0, 0, 0, _UTF8, None, None)
        sys.stdout.buffer.write(struct.pack("<I", len(samples) // 2) + samples)


#: Samples in a second.
SAMPLE_RATE = 22050

if __name__ == "__main__":
    main(*sys.argv[1:])
