"""Hostile data files and masks: python tests/fuzz.py 100000 1 (how many, and a seed) before a release.

A finding is any error but DataError, a crash, a hang, or a file that json.loads understands otherwise. It
ends the program, and is the last file in the folder that is printed.
"""

import faulthandler
import json
import os
import random
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent.parent))
from helpers import box, rle, sample  # noqa: E402

import data  # noqa: E402

PATIENCE = 30  # seconds that a file may take
HOSTILE = r"""[null, true, 0, -1, 0.5, 67108865, 9223372036854775808, 1e30, NaN, Infinity, [], {}, [[[[[]]]]],
    "", "\u0000", "\ud800", "²", "01", "<region>", "<video>", {"counts": [4], "size": [2, 2]}]"""
HOSTILE = json.loads(HOSTILE) + [9 * 10**4299, "x" * 10**5]


def with_a_change(rng, value):
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key, other = rng.choice(list(value)), rng.choice(["counts", "masks", "01", "9" * 10])
        return value | {rng.choice([key] * 9 + [other]): with_a_change(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.95:
        i = rng.randrange(len(value))
        return value[:i] + [with_a_change(rng, value[i])] * rng.choice([0, 1, 1, 1, 1, 1, 2]) + value[i + 1 :]
    if isinstance(value, str) and value and rng.random() < 0.8:
        i, char = rng.randrange(len(value)), chr(rng.choice([0, 10, 233, *range(47, 113)]))
        return value[:i] + rng.choice(["", char, char + value[i]]) + value[i + 1 :]
    if type(value) is int and rng.random() < 0.8:
        return rng.choice([value + 1, value - 1, -value])
    return rng.choice(HOSTILE)


def make_file(seed, number):
    rng = random.Random(f"{seed}/{number}")
    compressed = rle(np.array([[rng.random() < 0.5 for _ in range(9)] for _ in range(16)]))
    points = [rng.uniform(-9, 18) for _ in range(rng.choice([6, 40, 6000]))]
    mask = rng.choice([compressed, compressed, {"size": [16, 9], "counts": [20, 124]}, points])
    entry = sample("<region> or <region>?", "Yes.", {1: mask}, {3: box(1, 2, 3, 4)}, video="a.mp4")
    for _ in range(rng.choice([1, 1, 2, 4])):
        entry = with_a_change(rng, entry)
    raw = json.dumps([entry, 1]).encode()
    i = rng.randrange(1, len(raw))
    return rng.choice([raw] * 6 + [raw[:i], raw[:i] + bytes([rng.randrange(256)]) + raw[i + 1 :]])


def read_file(path, raw):
    expected, samples = 0, []
    path.write_bytes(raw)
    with suppress(ValueError):
        expected = len(json.loads(raw.decode(), parse_int=float))
    with suppress(data.DataError):
        samples = data.read_samples(path)
    assert len(samples) == expected, f"{len(samples)} samples, by json.loads {expected}"
    with suppress(data.DataError):
        for mask in (samples[0].objects or [{}])[0].values() if samples else ():
            decoded = data.decode_mask(mask, 16, 9)
            assert not decoded.any() or 0 < data.coverage(decoded, 5, 7).max() <= 1


if __name__ == "__main__":
    folder = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    print(folder)
    for number in range(int(sys.argv[1])):
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        path = Path(folder, f"{number}.json")
        read_file(path, make_file(sys.argv[2], number))
        path.unlink()
