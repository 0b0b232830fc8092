"""Hostile input: mutated samples, masks and files are read as an independent specification says, or refused.

    python tests/test_fuzz.py --seed 1 --cases 200000   # the test: 10,000, or FUZZ_SEED and FUZZ_CASES
    python tests/test_fuzz.py --seed 1 --case 4711      # what a failure names: one case, its input printed

A case is a function of (seed, number): a valid input, then none to several mutations. The only error that
may come is a DataError. Cases run in a child process, which notes the number of each before it starts, so
that a hang or a segmentation fault, which ends the child, has a name; a new child goes on.
"""

import argparse
import ctypes
import faulthandler
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from fractions import Fraction
from functools import partial
from itertools import groupby

import numpy as np
from pycocotools import mask as coco_mask

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # for the commands above
import data  # noqa: E402

PATIENCE = 20  # seconds that a case may take; the slowest takes a few tenths of one
# Bytes of address space, most of it libraries. What wants more gets a MemoryError, and leaves the machine
# alone.
MEMORY = 32 << 30

# ---- the specification -------------------------------------------------------------------------------------


class Invalid(Exception):
    """What the specification says to an input that must be refused."""


def need(condition):
    if not condition:
        raise Invalid


def is_a(kind, *values):
    return all(type(value) is kind for value in values)  # JSON's true is no number


def spec_sample(entry, place, media, position):
    """What the README's data format makes of a JSON value."""
    need(is_a(dict, entry))
    given = {key: value for key, value in entry.items() if value is not None}  # null is absent, but as an id
    need(
        not {"mask_ids", "masked_video", "timestamps"} & {*given}
    )  # other formats', which change the meaning
    path = turns = size = None
    names = [given[key] for key in ("video", "image") if key in given]
    if names:
        need(len(names) == 1)
        listed = names[0] if is_a(list, names[0]) else names
        paths = tuple(spec_path(path, media) for path in listed)
        need(len(paths) == 1 or len(paths) > 1 and "video" in given and all(map(spec_is_image, paths)))
        path = paths if len(paths) > 1 else paths[0]
    turns = spec_turns(given.get("conversations"), path is not None)
    masks = [(key, given[key]) for key in ("annotation", "masks") if key in given]
    need(len(masks) <= 1 and is_a(list, *(listed for _, listed in masks)))
    is_image = is_a(str, path) and spec_is_image(path)
    need(is_image or "image" not in given)
    objects = [spec_object(frames, key, is_image) for key, listed in masks for frames in listed]
    need(sum(question.count("<region>") for question, _ in turns) == len(objects) and (path or not objects))
    if "height" in given or "width" in given:
        size = given.get("height"), given.get("width")
        need(is_a(int, *size) and min(size) >= 1 and math.prod(size) <= 2**26)
    return data.Sample(place, entry.get("id", position), path, turns, objects, size)


def spec_path(path, media):
    need(is_a(str, path) and path)
    return path if path[0] == "/" else f"{media}/{path}"


def spec_is_image(path):
    stem, _, suffix = path.split("/")[-1].lstrip(".").rpartition(".")
    return stem != "" and suffix.lower() in ("png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff")


def spec_turns(turns, has_media):
    need(is_a(list, turns) and is_a(dict, *turns))
    for turn in turns:
        need(turn.get("from") in ("human", "gpt") and is_a(str, turn.get("value")) and turn["value"].strip())
    order = "".join(turn["from"][0] for turn in turns)
    need(re.fullmatch("g*(hg)+", order))  # answers to nothing are dropped, whatever they say
    texts = [turn["value"].strip() for turn in turns][order.index("h") :]
    media_tags = [text.count("<video>") + text.count("<image>") for text in texts]
    need(
        media_tags[0] <= has_media
        and not any(media_tags[1:])
        and not any("<region>" in answer for answer in texts[1::2])
    )
    texts[0] = "<video>\n" * (has_media - media_tags[0]) + texts[0]
    return list(zip(texts[0::2], texts[1::2]))


def spec_object(frames, key, is_image):
    if key == "masks" and is_image and (is_a(list, frames) or is_a(dict, frames) and "counts" in frames):
        return {0: frames}  # an image's mask
    need(
        is_a(dict, frames)
        and all(0 < len(index) <= 9 and set(index) <= set("0123456789") for index in frames)
    )
    need(len({int(index) for index in frames}) == len(frames))
    there = {int(index): mask for index, mask in frames.items() if mask is not None}
    if key == "annotation":
        need(is_a(dict, *there.values()))
        there = {
            index: mask["segmentation"]
            for index, mask in there.items()
            if mask.get("segmentation") is not None
        }
    need(there)
    return there


def spec_mask(segmentation, height, width):
    """-> bool (H, W). RLE is decoded here, each polygon by pycocotools, once its numbers are known to be
    harmless."""
    need(segmentation and type(segmentation) in (list, dict))
    if is_a(dict, segmentation):
        size, runs = segmentation.get("size"), segmentation.get("counts")
        need(
            is_a(list, size)
            and len(size) == 2
            and is_a(int, *size)
            and min(size) >= 1
            and math.prod(size) <= 2**26
        )
        runs = spec_runs(runs) if is_a(str, runs) else runs
        need(
            is_a(list, runs)
            and is_a(int, *runs)
            and min(runs, default=0) >= 0
            and sum(runs) == math.prod(size)
        )
        # The frame's shape: scaled to a side of the larger picture, the smaller one is right to a pixel of
        # its own.
        (h, w), (big_h, big_w) = sorted([size, [height, width]], key=math.prod)
        need(abs(w - Fraction(h * big_w, big_h)) <= 1 or abs(h - Fraction(w * big_h, big_w)) <= 1)
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[1], size[0]).T
    polygons = [segmentation] if type(segmentation[0]) in (int, float, bool) else segmentation
    for polygon in polygons:
        need(
            is_a(list, polygon)
            and len(polygon) >= 6
            and len(polygon) % 2 == 0
            and all(type(x) in (int, float) for x in polygon)
        )
        need(
            all(-width <= x <= 2 * width for x in polygon[0::2])
            and all(-height <= y <= 2 * height for y in polygon[1::2])
        )
    return np.any(
        [coco_mask.decode(coco_mask.frPyObjects([polygon], height, width))[:, :, 0] for polygon in polygons],
        axis=0,
    )


def spec_runs(text):
    """COCO's compressed counts: groups of 5 bits, the lowest first, '0'..'O' being the last, in two's
    complement."""
    need(re.fullmatch("([P-o]{0,5}[0-O])*", text))  # at most 30 bits: pycocotools reads more of them wrongly
    runs = []
    for word in re.findall("[P-o]*[0-O]", text):
        bits = "".join(f"{(ord(char) - 48) % 32:05b}" for char in reversed(word))
        runs.append(int(bits, 2) - (int(bits[0]) << len(bits)) + (runs[-2] if len(runs) > 2 else 0))
    return runs


def shares(rows, cells):
    """(L, M) -> float64 (cells, M): means over equal stretches of axis 0, from the integral, linear in each
    pixel."""
    edges, borders = np.linspace(0, len(rows), cells + 1), np.arange(len(rows) + 1)
    below = [np.interp(edges, borders, np.cumsum([0, *column])) for column in rows.T]
    return np.diff(below).T * cells / len(rows)


# ---- inputs, valid at first --------------------------------------------------------------------------------


def make_sample(rng):
    """Every kind: video referring on one frame or many, image referring, image or video understanding,
    text."""
    media, key = rng.choice([None, "video", "video", "image"]), rng.choice(["annotation", "masks"])
    objects = rng.randint(0, 3) if media else 0
    questions = [rng.choice(["What is it?", "Qu'est-ce que c'était? 🐈"]) for _ in range(rng.randint(1, 3))]
    for _ in range(objects):
        questions[rng.randrange(len(questions))] += " <region>"
    entry = {"id": rng.choice([7, "seven"])} if rng.random() < 0.5 else {}
    if media:
        name, tag = (
            rng.choice(["./a b.png", "ü/.a.JPG"] + ["a.mp4", "clips/ü.mp4"] * (media == "video")),
            rng.choice(["", "<video>\n", "<image>", "\n<video>\n"]),
        )
        entry[media] = rng.choice([name, [name]])
        if media == "video" and rng.random() < 0.3:  # a list of frame files
            name, entry["video"] = "", rng.choices(["./a b.png", "ü/.a.JPG"], k=rng.randint(2, 3))
        questions[0] = rng.choice([tag + questions[0], questions[0] + tag])
    greeting = [("gpt", "Hello <region> <video>")] * (rng.random() < 0.1)
    turns = greeting + [turn for question in questions for turn in (("human", question), ("gpt", "A cat."))]
    entry["conversations"] = [{"from": who, "value": text} for who, text in turns]
    if objects or rng.random() < 0.1:
        entry[key] = [make_object(rng, key, media and spec_is_image(name)) for _ in range(objects)]
        if rng.random() < 0.03:
            entry[rng.choice(["mask_ids", "masked_video", "timestamps"])] = rng.choice([[0, 1], None])
    if rng.random() < 0.3:
        entry |= {"height": rng.randint(1, 2000), "width": rng.randint(1, 2000), "type": "what", "note": None}
    return entry


def make_object(rng, key, image):
    if key == "masks" and image and rng.random() < 0.5:
        return make_mask(rng)[0]
    frames = {str(frame): make_mask(rng)[0] for frame in rng.sample(range(100), rng.choice([1, 1, 2, 4]))}
    if key == "annotation":
        frames = {frame: {"segmentation": mask} for frame, mask in frames.items()}
    return frames | rng.choice([{}, {"200": None}]) | ({"201": {}} if key == "annotation" else {})


def make_mask(rng):
    """-> (segmentation, height, width of a frame). About one in three is a little wrong; mutations change
    more."""
    h, w, k = rng.randint(1, 24), rng.randint(1, 24), rng.choice([2, 3, 7])
    other = rng.choice(
        [(h * k, w * k), (h * k + 1, w * k - 1), (-(-h // k), -(-w // k)), (w, h), (720, 1280)]
    )
    height, width = rng.choice([(h, w), (h, w), other])
    if rng.random() < 0.5:
        low, high = rng.choice(
            [(0, 1)] * 6 + [(-1, 2), (-1.01, 2.01)]
        )  # as far outside as is allowed, and a little further
        kind, count = rng.choice([float, int, lambda x: round(x, 1)]), rng.choice([1, 1, 2, 3])
        points = [rng.choice([3, 4, 6, 20] * 10 + [2, 3000]) for _ in range(count)]
        polygons = [
            [kind(rng.uniform(low, high) * side) for _ in range(n) for side in (width, height)]
            for n in points
        ]
        return rng.choice([polygons, polygons[0], polygons[0][:2] * 3]), height, width
    share = rng.choice([0.1, 0.5, 0.9])
    pixels = [rng.random() < share for _ in range(h * w)]
    pixels = rng.choice([pixels, sorted(pixels), [pixels[0]] * h * w])
    runs = [0] * pixels[0] + [len(list(group)) for _, group in groupby(pixels)]
    for _ in range(
        rng.choice([0, 0, 1, 2])
    ):  # the same in other words, other runs of the same sum, another sum
        i, j, amount = (
            rng.randrange(len(runs)),
            rng.randrange(len(runs)),
            rng.choice([1, 2, 1000, 2**26, 2**31, 2**32]),
        )
        amount = rng.choice([amount, min(amount, max(0, runs[i]))])
        runs[i] -= amount
        change = rng.choice(["split", "split", "move", "lose"])
        runs[i + 1 : i + 1] = [0, amount] if change == "split" else []
        runs[j] += amount if change == "move" else 0
    return (
        {"size": [h, w], "counts": rng.choice([runs, compress(runs, rng.choice([0, 0, 0, 1, 4, 6]))])},
        height,
        width,
    )


def compress(runs, longer):
    """COCO's compressed counts, each number `longer` characters longer than need be: read alike up to a
    limit."""
    text = ""
    for number, run in enumerate(runs):
        value = run - (runs[number - 2] if number > 2 else 0)
        length = max(value, ~value).bit_length() // 5 + 1 + longer
        text += "".join(chr(48 + (value >> 5 * i & 31) + 32 * (i < length - 1)) for i in range(length))
    return text


# ---- mutations ---------------------------------------------------------------------------------------------

NUMBERS = [
    0,
    -1,
    1,
    2,
    3.0,
    -0.0,
    0.5,
    1e6,
    1e30,
    2**26 + 1,
    2**31,
    2**63,
    9 * 10**4299,
    math.nan,
    math.inf,
    -math.inf,
    True,
    False,
]
TAGS = [
    "<region>",
    "<region>",
    "<region>",
    "<video>",
    "<video>\n",
    "<image>",
    "<regi",
    "<|im_end|>",
    "<|region_pad|>",
    "\ue000",
]
TEXTS = TAGS + [
    "",
    " ",
    "\u2003",
    "\0",
    "\ud800",
    "\udc80",
    "x" * 100_000,
    "human",
    "gpt",
    "user",
    "/etc/a",
    "../a",
    "a/../b",
    "a/../../b",
]
FRAMES = ["01", "00", "-1", "1.5", "１", "²", "1\n", " 1", "", "9" * 9, "9" * 10, "0" * 5000, "1e3", "36"]
KEYS = [
    "counts",
    "size",
    "segmentation",
    "id",
    "type",
    "video",
    "image",
    "masks",
    "mask_ids",
    "timestamps",
    "annotation",
    "height",
    "width",
    "from",
    "value",
]


def hostile(rng):
    kind = rng.choice([NUMBERS, NUMBERS, TEXTS, TEXTS, [None, [], {}, {"counts": [4], "size": [2, 2]}], None])
    if kind:
        return deepcopy(rng.choice(kind))
    nest, width = [], rng.choice([2, 9])
    for depth in range(rng.choice([2, 50, 900, 5000])):
        nest = {"0": nest} if depth % width == 0 else [nest]
    return nest


def mutate(rng, value):
    """-> value with one change somewhere inside, mostly made in place."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    frames = [key for key in keys if str(key).isdigit() and isinstance(value, dict)]
    if keys and rng.random() < (0.5 if frames else 0.75):  # further down
        key = rng.choice(keys)
        value[key] = mutate(rng, value[key])
    elif rng.random() < 0.25:
        return (
            hostile(rng)
            if rng.random() < 0.6
            else rng.choice([[value], {"segmentation": value}, shown(value)])
        )
    elif isinstance(value, str):
        i, char = (
            rng.randrange(len(value) + 1),
            chr(rng.choice([0, 10, 47, rng.randrange(48, 112), 112, 0xE9, 0xDC80])),
        )
        put, tag = rng.choice([*TEXTS, char, char, char]), rng.choice(TAGS)
        cut = [value[:i], value[:i] + value[i + 1 :], value.replace(tag, "", 1)]
        return rng.choice(
            [
                *cut,
                value[:i] + char + value[i + 1 :],
                value[:i] + put + value[i:],
                value[:i] + tag + value[i:],
                value + put,
            ]
        )
    elif isinstance(value, list):
        i, put = rng.randrange(len(value) + 1), rng.choice([[hostile(rng)], value, value[:2]])
        return rng.choice(
            [
                value[:i] + value[i + 1 :],
                value[:i] + value[max(0, i - 1) :],
                value[:i] + put + value[i:],
                value[::-1],
            ]
        )
    elif isinstance(value, dict):
        moved = value.pop(rng.choice(list(value)), None) if value and rng.random() < 0.7 else hostile(rng)
        if rng.random() < 0.7:
            value[rng.choice(FRAMES + ["0" + key for key in frames] if frames else KEYS)] = moved
    elif type(value) in (int, float):
        return rng.choice(
            [value + 1, value - 1, -value, value * 3, value + 0.5 if abs(value) < 2**50 else 0, bool(value)]
        )
    return value


def mutated(rng, value):
    for _ in range(rng.choice([0, 0, 1, 1, 1, 2, 4])):
        value = mutate(rng, value)
    return value


def shown(value):
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} nested too deeply, or a number too long, to be printed"
    return text if len(text) < 3000 else f"{text[:3000]}... ({len(text)} characters)"


# ---- cases: -> was it accepted? ----------------------------------------------------------------------------


def agree(specification, function, *arguments, longest=1000):
    """-> (expected, found), both None where both refuse."""
    expected = found = error = None
    try:
        expected = specification(*arguments)
    except Invalid:
        pass
    try:
        found = function(*arguments)
    except data.DataError as refusal:
        error = str(refusal)
    assert (expected is None) == (found is None), (
        f"refused, but valid: {error}"[:300] if error else f"accepted, but invalid: {shown(found)}"
    )
    if error is not None:
        assert re.search("expected .*found|not valid JSON|UTF-8", error), (
            f"the error does not tell: {error[:300]}"
        )
        assert error.isprintable() and len(error) < longest, (
            f"the error is not one line that can be printed: {error[:300]!r}"
        )
    return expected, found


def parts(sample):
    """A sample's fields as a list, whose equality takes an object to equal itself, NaN too: in both samples
    of a case, ids and masks are the same objects."""
    return sample and list(vars(sample).values())


def sample_case(rng, folder, show):
    entry = show(mutated(rng, make_sample(rng)))
    expected, found = agree(spec_sample, data.parse_sample, entry, ("file", "sample 5"), "media", 5)
    assert parts(found) == parts(expected), (found, expected)
    return found is not None


def mask_case(rng, folder, show):
    segmentation, height, width = make_mask(rng)
    expected, found = agree(spec_mask, data.decode_mask, *show((mutated(rng, segmentation), height, width)))
    if found is None:
        return False
    assert found.dtype == np.uint8 and found.shape == expected.shape, (
        found.dtype,
        found.shape,
        expected.shape,
    )
    assert np.array_equal(found, expected), (
        f"(y, x) that differ: {np.argwhere(found != expected)[:5].tolist()}"
    )
    (h, w), gh, gw = found.shape, rng.randint(1, 40), rng.randint(1, 40)
    if found.size < 10_000:
        share = data.coverage(found, gh, gw)
        np.testing.assert_allclose(share, shares(shares(found, gh).T, gw).T, atol=1e-5)
        assert (
            share.min() >= 0
            and share.max() <= 1
            and math.isclose(share.mean(dtype=float) * found.size, found.sum(), rel_tol=1e-5)
        )
    if found.any():
        (top, left), (bottom, right) = np.argwhere(found).min(axis=0), np.argwhere(found).max(axis=0) + 1
        box = (left + right) / 2 / w, (top + bottom) / 2 / h, (right - left) / w, (bottom - top) / h
        np.testing.assert_allclose(data.mask_box(found), box)
    return True


# Stands for a sample with a number that int() does not take, with a key twice, or with half a character.
BAD_VALUE = object()


def spec_file(path):
    """-> the values in a JSON array or else in a row, by JSON's own decoder, BAD_VALUE being one of them."""
    with open(path, "rb") as file:
        raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
        if text.lstrip(" \t\r\n").startswith("["):
            values = spec_array(text, text.index("[") + 1)
        else:
            values, position = [], 0
            while text[position:].strip(" \t\r\n"):
                value, position = spec_value(text, position, None)
                values.append(value)
    except (ValueError, RecursionError):
        need(False)
    need(values)
    return values


def spec_array(text, position):
    values, mark = [], ","
    while mark == ",":
        value, position = spec_value(text, position, ",]")
        values.append(value)
        mark = text[position]
        position += 1
    need(text[position:].strip(" \t\r\n") == "")
    return values


def spec_value(text, position, ends):
    """-> a value or BAD_VALUE, and where the text goes on: with one of the ends, or (None) on a new line."""
    bad = []

    def to_dict(pairs):
        keys = [key for key, _ in pairs]
        bad.extend(key for key in keys if keys.count(key) > 1)
        bad.extend(filter(has_half, keys))
        return dict(pairs)

    decoder = json.JSONDecoder(
        object_pairs_hook=to_dict,
        parse_int=lambda digits: int(digits) if len(digits.lstrip("-")) <= 4300 else bad.append(digits),
    )
    start = re.compile(r"[ \t\r\n]*").match(text, position).end()
    value, end = decoder.raw_decode(text, start)
    gap = re.compile(r"[ \t\r\n]*").match(text, end)
    end = gap.end()
    need(text[end : end + 1] in [*ends] if ends else end == len(text) or "\n" in gap[0])
    return BAD_VALUE if bad or has_half(value) else value, end


def has_half(value):
    """Whether half a surrogate pair, which JSON can write and a file cannot hold, is in a value's texts."""
    found = [value]  # grows: the value may be nested too deeply for a recursion
    for part in found:
        found += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
    return any("\ud800" <= char <= "\udfff" for part in found if isinstance(part, str) for char in part)


def spec_entry(value, folder, position):
    need(value is not BAD_VALUE)
    return spec_sample(value, None, folder, position)


def file_case(rng, folder, show):
    """Samples through JSON text, whose bytes change as well."""
    entries = [
        make_sample(rng) if rng.random() < 0.5 else mutated(rng, make_sample(rng))
        for _ in range(rng.randint(1, 3))
    ]
    ascii_only, pattern = rng.random() < 0.5, rng.choice(["[%s]", " [\n%s]\n", "%s"])
    try:
        text = pattern % (", " if "[" in pattern else "\n").join(
            json.dumps(entry, ensure_ascii=ascii_only) for entry in entries
        )
    except (RecursionError, ValueError):  # a nest, or more digits than Python writes
        text = "[" * 5000
    if rng.random() < 0.05:
        text = text.replace("7", "7" * rng.choice([4000, 5000]), 1)  # of which 5000 are more than int() takes
    raw = text.encode(errors="surrogatepass")
    for _ in range(rng.choice([0, 0, 0, 1, 2])):
        i, byte = rng.randrange(len(raw)), bytes([rng.randrange(256)])
        twice = raw.replace(b'"id":', b'"id": 1, "id":', 1)
        raw = rng.choice(
            [
                raw[:i] + byte + raw[i + 1 :],
                raw[:i] + raw[i + 9 :],
                raw[: i + 1],
                b"\xef\xbb\xbf" + raw,
                twice,
            ]
        )
    path = os.path.join(
        folder, f"{rng.getrandbits(64)}.json"
    )  # a new name a case: an index that is kept is not for another
    with open(path, "wb") as file:
        file.write(show(raw))
    values, samples = agree(spec_file, data.read_samples, path)
    if samples is None:
        return False
    assert len(samples) == len(values)
    right = 0
    for number, value in enumerate(values):
        specification = partial(spec_entry, value, folder)
        # Its place is compared with itself. Its error has the whole id.
        expected, found = agree(specification, samples.__getitem__, number, longest=10**7)
        assert parts(found) == parts(expected and replace(expected, place=found.place)), (found, expected)
        right += found is not None
    return right == len(values)


def run_case(seed, number, folder, show=lambda value: value):
    rng = random.Random(f"{seed}/{number}")
    case = rng.choice([sample_case] * 11 + [mask_case] * 8 + [file_case])
    return case.__name__, case(rng, folder, show)


# ---- processes ---------------------------------------------------------------------------------------------


def child(seed, first, last, folder):
    """Prints a line of JSON for each failure, then one with the counts. If it dies, the file `now` names the
    case."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts, failures, now = Counter(), 0, os.open(os.path.join(folder, "now"), os.O_WRONLY | os.O_CREAT)
    for number in range(first, last):
        os.pwrite(now, b"%20d" % number, 0)
        faulthandler.dump_traceback_later(
            PATIENCE, exit=True
        )  # a thread that needs no help from the interpreter
        try:
            name, accepted = run_case(seed, number, folder)
            counts[f"{name} {'accepted' if accepted else 'refused'}"] += 1
        except Exception as error:  # whatever it is, it is what we are looking for
            print(json.dumps([number, f"{type(error).__name__}: {str(error)[:400]}"]), flush=True)
            failures += 1
        if failures == 10:
            break
    faulthandler.cancel_dump_traceback_later()
    print(json.dumps(counts))


def fuzz(seed, cases, start="child"):
    """-> (Counter of what was accepted and refused, failures as text), from as many child processes as it
    takes."""
    counts, failures, first = Counter(), [], 0
    environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}
    while first < cases and len(failures) < 10:
        with tempfile.TemporaryDirectory() as folder:
            code = f"import test_fuzz; test_fuzz.{start}({seed}, {first}, {cases}, {folder!r})"
            command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "-c", code]
            done = subprocess.run(
                command, env=environment | {"XDG_CACHE_HOME": folder}, capture_output=True, text=True
            )
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            failures += [line for line in lines if isinstance(line, list)]
            if done.returncode == 0:
                counts.update(lines[-1])
                break
            with open(
                os.path.join(folder, "now")
            ) as now:  # where it is missing, no case began, and the error is here
                first = int(now.read()) + 1
            failures.append(
                [first - 1, f"its process ended, exit status {done.returncode}: {done.stderr[:600]}"]
            )
    return counts, [
        f"python tests/test_fuzz.py --seed {seed} --case {number}: {reason}" for number, reason in failures
    ]


def test_hostile_samples_masks_and_files():
    counts, failures = fuzz(int(os.environ.get("FUZZ_SEED", 0)), int(os.environ.get("FUZZ_CASES", 10_000)))
    assert not failures, "\n".join(failures)
    for case in ("sample_case", "mask_case", "file_case"):  # mutations spoil neither everything nor nothing
        accepted, refused = counts[f"{case} accepted"], counts[f"{case} refused"]
        assert min(accepted, refused) >= 0.15 * (accepted + refused), (case, accepted, refused)


def sabotaged(*arguments):
    """A child whose cases 1, 2 and 4 hang in C code, raise, and read from address 0."""
    global PATIENCE, run_case
    faults = {1: lambda: re.match("(a*)*b", "a" * 99), 2: lambda: {}["gone"], 4: lambda: ctypes.string_at(0)}
    PATIENCE, run_case = 1, lambda seed, number, folder: ("case", faults.get(number, bool)())
    child(*arguments)


def test_a_hang_an_exception_and_a_crash_are_named():
    _, failures = fuzz(3, 6, start="sabotaged")
    reasons = {1: "exit status 1: Timeout", 2: "KeyError: 'gone'", 4: "exit status -11: .*Segmentation fault"}
    for (case, reason), failure in zip(reasons.items(), failures, strict=True):
        assert re.match(rf"python tests/test_fuzz.py --seed 3 --case {case}: .*{reason}", failure), failure


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("--seed", 0), ("--cases", 10_000), ("--case", None)):
        parser.add_argument(name, type=int, default=default)
    options = parser.parse_args()
    if options.case is not None:
        faulthandler.enable()
        with tempfile.TemporaryDirectory() as folder:
            print(
                run_case(
                    options.seed, options.case, folder, lambda value: print(shown(value), flush=True) or value
                )
            )
        return 0
    counts, failures = fuzz(options.seed, options.cases)
    print(*(f"{name}: {count}" for name, count in sorted(counts.items())), *failures, sep="\n")
    return bool(failures)


if __name__ == "__main__":
    raise SystemExit(main())
