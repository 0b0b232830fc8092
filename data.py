"""Data: from a JSON file with media and masks to one batch of tensors.

    data.json --read_samples--> Sample --ReferringDataset--> encoded sample --collate--> batch
                 (parse, check)        |
                                       |-- read_frames    the video's sampled frames and the annotated ones, decoded once
                                       |-- decode_mask    RLE or polygons -> (H, W), then coverage per cell: (gh, gw)
                                       `-- Processor      chat template, placeholders, token ids, uint8 patches

A *cell* is one visual token of one frame; *coverage* is the share of a cell that lies inside the mask. The model never sees
a mask at pixel resolution: it averages cells, weighted by coverage (model.py, kernels.py).

Every complaint about the user's data is a DataError that names file, sample and field, what was expected and what was found.
Nothing is guessed, cut or swapped. Coordinates are (x, y) in pixels in the data file; arrays are (height, width); frame
indices are 0-based positions in the source video, in order of presentation.
"""

import argparse
import hashlib
import json
import math
import mmap
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import shutil
import textwrap
import threading
import time
import uuid
from bisect import bisect_right
from collections import Counter, OrderedDict
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from einops import rearrange
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps
from pycocotools import mask as coco_mask
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.utils import cached_file

IGNORE_INDEX = -100  # the label of a token that is not supervised (torch's cross_entropy skips it)
REGION_TAG = "<region>"  # what a question writes where an object is meant
REGION_PAD = "<|region_pad|>"  # the placeholder token that the model replaces by a region's features
MEDIA_TAG = re.compile(r"\n?<(?:video|image)>\n?")
ANSWER_MARK = (
    "\ue000"  # stands for an answer while a chat template is rendered: a character of the private use area
)
HALF_CHARACTER = re.compile(
    "[\ud800-\udfff]"
)  # of a surrogate pair: JSON can write it, tokenizers and file systems refuse it
MAX_MASK_AREA = 1 << 26  # pixels; above it, a "size" is a typing error or an attack, not a mask


class DataError(ValueError):
    """A complaint about the user's data: a reason, and the places (file, sample, field) it was found in, outermost first."""

    def __init__(self, reason, *places):
        super().__init__(reason, *places)  # all in args, so that it survives pickling between processes

    def __str__(self):
        return ": ".join((*self.args[1:], self.args[0]))


@contextmanager
def within(*places):
    """Adds places to the front of every DataError that passes."""
    try:
        yield
    except DataError as error:
        raise DataError(error.args[0], *places, *error.args[1:]) from None


def expect(condition, expected, found):
    """Raises a DataError that says what was expected and what was found (shortened) unless condition holds."""
    if not condition:
        raise DataError(f"expected {expected}, found {shorten(found)}")


def shorten(value):
    """-> repr(value), or its beginning."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or a whole number of more than 4300 digits
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def atomic_write(path):
    """Yields a temporary path beside `path`, to write a file or make a folder there; it takes the name `path` once all of it is on
    disk, so that whoever looks finds it whole or not at all. An exception leaves nothing behind; a kill leaves a name in .tmp."""
    path = os.fspath(path)
    temporary = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in [*names, "."]:
                _flush_to_disk(os.path.join(folder, name))
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_to_disk(os.path.dirname(os.path.abspath(path)))
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
        elif os.path.exists(temporary):
            os.remove(temporary)


def _flush_to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ------------------------------------------------------------------------------------------------ samples: parse and check


@dataclass(frozen=True)
class Sample:
    """One checked entry of a data file.

    turns: (question, answer) pairs; the first question holds the media tag once if there is media; the `<region>` tags of
    all questions together are as many as the objects, in the same order.
    objects: per object, frame index -> segmentation (never null). size: the (height, width) that polygons are drawn on, or
    None for the frame's own. place: what names this sample in an error.
    """

    place: tuple[str, str]
    id: object
    media: str | None
    turns: list[tuple[str, str]]
    objects: list[dict[int, object]]
    size: tuple[int, int] | None
    type: str


def read_samples(paths, media=None, outside_paths=False):
    """Data files -> a sequence of Sample, parsed when asked for (structure only; media and masks are read by the dataset).

    paths: one path or several, each a JSON array or JSONL. media: the folder that media paths are relative to (default: each
    file's own folder). outside_paths: also take media paths that are absolute or climb out of that folder.
    Raises DataError here where a file as a whole cannot be read, and on access where a sample is wrong.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = [(os.fspath(path), os.fspath(media) if media else os.path.dirname(path)) for path in paths]
    return Samples(files, outside_paths)


def sample_texts(samples, limit=10_000):
    """The questions and answers of the first samples, from which the tiny model's tokenizer learns its words."""
    for number in range(min(limit, len(samples))):
        with suppress(DataError):  # reported when the sample is read in earnest
            yield from (text for turn in samples[number].turns for text in turn)


class Samples:
    """The sequence that read_samples returns. It holds no sample: each access reads a few bytes of a file, through a memory-mapped
    index that all processes share. Safe to hand to worker processes: each access opens the file anew."""

    def __init__(self, files, outside_paths=False):
        self.files, self.outside_paths = files, outside_paths
        self.indices = [_open_index(path) for path, _ in files]
        self.first = np.cumsum(
            [0] + [len(spans) for _, spans in self.indices]
        )  # the index of each file's first sample

    def __reduce__(
        self,
    ):  # a spawned process opens the index itself: pickled, a memory map would become a copy
        return type(self), (self.files, self.outside_paths)

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i):
        entry, place, media, position = self.read(i)
        with within(*place):
            return parse_sample(self.prepare(entry), place, media, position, self.outside_paths)

    def prepare(self, entry):
        """For files of another format (eval.py): makes an entry of this one's out of a JSON value."""
        return entry

    def read(self, i):
        """Returns the i-th JSON value as its file has it, its place (file, sample name), its media folder and
        its position in the file."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        file_index = int(np.searchsorted(self.first, i, side="right")) - 1
        (path, media), (version, spans) = self.files[file_index], self.indices[file_index]
        position = i - int(self.first[file_index])
        start, end = spans[position].tolist()
        name = f"sample {position}"
        with within(path, name):
            try:
                with open(path, "rb") as file:
                    changed = _version(file) != version
                    file.seek(start)
                    text = file.read(end - start)
            except OSError as error:
                raise DataError(f"expected a readable file, found: {error.strerror}") from None
            if changed:
                raise DataError("expected the file as it was when it was opened, found that it has changed")
            try:
                entry = _parse(text.decode(), parse_constant=_refuse_constant)
            except DataError:
                raise
            except ValueError as error:  # of _refuse_constant, or of int(), which refuses thousands of digits
                raise DataError(f"expected ordinary numbers, found: {error}") from None
        if isinstance(entry, dict) and "id" in entry:
            name += f" (id {shorten(entry['id'])})"
        return entry, (path, name), media, position


def _refuse_constant(name):
    raise ValueError(f"{name}, which JSON does not know")


def _parse(text, **hooks):
    """json.loads, but brackets that are nested too deeply for it are a DataError."""
    try:
        return json.loads(text, **hooks)
    except RecursionError:
        reason = "expected JSON of ordinary depth, found brackets nested too deeply to parse"
        raise DataError(reason) from None


_INDEX_FORMAT = 2  # to be raised when the content of an index file means something else
_CHUNK = 1 << 24  # bytes of a file that are copied into memory at a time
_MAX_SAMPLE = 1 << 28  # bytes; what does not parse within so many is reported as a syntax error

# Strings hide brackets and commas. Possessive quantifiers (*+, ++) never go back, so that a search takes
# linear time and constant memory. A string without an end reaches to the end of the file; json.loads
# complains.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?'
_NEXT_BRACKET = re.compile(rb'(?:[^][{}"]++|' + _STRING + rb")*+([][{}]|\Z)", re.DOTALL)
_STRING_OR_COMMA = re.compile(_STRING + rb"|(,)", re.DOTALL)
_VISIBLE = re.compile(rb"[^ \t\r\n]")  # a character that is not JSON's white space
_ARRAY_END = re.compile(rb"\]?[ \t\r\n]*")
_LINE = re.compile(rb"[^ \t\r\n][^\n]*")  # what there is of a line, if it is not blank
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))  # UTF-8: every byte of a character but its first


def _version(file):
    """What changes when an open file is written to: its size in bytes, and its time of modification in ns."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _open_index(path):
    """Returns (the data file's _version, int64 (samples, 2): where each sample begins and ends, in bytes).

    Finding the samples of a file of gigabytes takes minutes, so the index is saved in the user's cache folder
    (data folders are often read-only). It is memory-mapped, so that all processes of a machine share it. Its
    name tells the version of the data file that it was made for: a file that has changed gets a new index.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:24]
    with within(path):
        try:
            with open(path, "rb") as file:
                size, time_ns = version = _version(file)
                index_path = Path(cache, "nanorefer", f"{name}-{_INDEX_FORMAT}-{size}-{time_ns}.npy")
                # A missing or damaged index is made below. np.asarray: slices of a np.memmap are slow.
                with suppress(OSError, ValueError, EOFError):
                    return version, np.asarray(np.load(index_path, mmap_mode="r"))
                spans = _find_samples(file)
        except OSError as error:
            raise DataError(f"expected a readable file, found: {error.strerror}") from None
    try:
        index_path.parent.mkdir(parents=True, exist_ok=True)
        for outdated in index_path.parent.glob(f"{name}-*.npy"):
            outdated.unlink(missing_ok=True)
        with atomic_write(index_path) as temporary, open(temporary, "wb") as file:
            np.save(file, spans)
    except OSError as error:
        expected = "expected a cache folder that can be written to (set XDG_CACHE_HOME)"
        raise DataError(f"{expected}, found: {error.strerror}", str(index_path)) from None
    return version, spans


def _find_samples(file):
    """Returns int64 (samples, 2): first byte and last byte + 1 of each element of an array or line of JSONL.

    Every sample is parsed, so that a syntax error is reported before training starts, with line and column.
    """
    expect(_version(file)[0] > 0, "at least one sample", "none")  # an empty file cannot be mapped
    # The map is not closed by hand, because an unfinished search still refers to it while an error is raised.
    text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 3 if text[:3] == b"\xef\xbb\xbf" else 0  # skip a byte order mark
    first = _VISIBLE.search(text, start)
    if first and first[0] == b"[":
        spans = _array_spans(text, start, first.end())
    else:
        spans = (line.span() for line in _LINE.finditer(text, start))
    checked = (_check_syntax(text, start, *span) for span in spans)
    index = np.fromiter(checked, np.dtype((np.int64, 2)))
    expect(len(index), "at least one sample", "none")
    return index


def _check_syntax(text, start, begin, end):
    """Returns (begin, end), the span of a sample, or raises DataError unless valid JSON stands there.

    NaN and integers of thousands of digits are left to Samples.read, whose errors name the sample.
    """
    try:
        _parse(text[begin : min(end, begin + _MAX_SAMPLE)].decode(), parse_int=float)
    except UnicodeDecodeError as error:
        raise _syntax_error(text, start, begin + error.start, "not UTF-8") from None
    except json.JSONDecodeError as error:
        byte = begin + len(error.doc[: error.pos].encode())
        raise _syntax_error(text, start, byte, f"not valid JSON: {error.msg}") from None
    return begin, end


def _array_spans(text, start, begin):
    """Yields (first byte, last byte + 1) of what stands between the commas of an array, from begin on."""
    after_bracket, depth, is_empty = begin, 1, True
    for bracket in _NEXT_BRACKET.finditer(text, begin):
        position = bracket.start(1)
        if depth == 1:
            for comma in _STRING_OR_COMMA.finditer(text, after_bracket, position):
                if comma[1]:
                    yield begin, comma.start()
                    begin, is_empty = comma.end(), False
        depth += 1 if bracket[1] in (b"[", b"{") else -1
        after_bracket = bracket.end()
        if depth == 0 or not bracket[1]:
            break
    if not is_empty or _VISIBLE.search(text, begin, position):
        yield begin, position
    end = _ARRAY_END.match(text, position).end()
    if bracket[1] != b"]" or end < len(text):
        raise _syntax_error(text, start, end, "not valid JSON: Expecting ',' or the end of array and file")


def _syntax_error(text, start, byte, reason):
    """Returns a DataError with a byte's line and column, in characters from 1; start: where line 1 begins."""
    line = 1 + sum(1 for _ in re.compile(b"\n").finditer(text, start, byte))
    line_start = max(start, text.rfind(b"\n", start, byte) + 1)
    column = 1
    for position in range(line_start, byte, _CHUNK):
        piece = text[position : min(position + _CHUNK, byte)]
        column += len(piece.translate(None, _CONTINUATION_BYTES))
    return DataError(f"line {line}, column {column}: {reason}")


def parse_sample(entry, place, media, position, outside_paths=False):
    """One JSON value -> Sample, or DataError. place: (file, sample name); media: folder; position: the id if it has none;
    outside_paths: media may lie outside of that folder."""
    expect(isinstance(entry, dict), "a JSON object", entry)
    path = _media_path(entry, media, outside_paths)
    with within("conversations"):
        turns = _parse_turns(entry.get("conversations"), has_media=path is not None)
    objects = _parse_objects(entry, path is not None and Path(path).suffix.lower() in IMAGE_SUFFIXES)
    tags = sum(question.count(REGION_TAG) for question, _ in turns)
    expect(
        tags == len(objects),
        f"as many {REGION_TAG} tags in the human turns as annotated objects ({len(objects)})",
        tags,
    )
    if objects and path is None:
        raise DataError("expected a video or image for the annotated objects, found neither key")
    size = None
    if entry.get("height") is not None or entry.get("width") is not None:
        size = (entry.get("height"), entry.get("width"))
        valid = all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in size)
        expect(valid and size[0] * size[1] <= MAX_MASK_AREA, "height and width: two positive integers", size)
    kind = "" if entry.get("type") is None else entry["type"]
    expect(isinstance(kind, str), "type: a string", kind)
    return Sample(place, entry.get("id", position), path, turns, objects, size, kind)


def _media_path(entry, media, outside_paths):
    found = {key: entry[key] for key in ("video", "image") if entry.get(key) is not None}
    expect(len(found) <= 1, "a video or an image, not both", found)
    for key, name in found.items():
        if isinstance(name, list) and len(name) == 1:  # the later files write ["a.mp4"]
            name = name[0]
        valid = isinstance(name, str) and name and "\0" not in name and not HALF_CHARACTER.search(name)
        expect(valid, f"{key}: one path", name)
        inside = not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != os.pardir
        expect(inside or outside_paths, f"{key}: a path inside the media folder (or --outside-paths)", name)
        return os.path.join(media, name)
    return None


def _parse_turns(conversations, has_media):
    expect(isinstance(conversations, list) and conversations, "a list of turns", conversations)
    turns = []
    for number, turn in enumerate(conversations):
        with within(f"turn {number}"):
            expect(isinstance(turn, dict), "an object with from and value", turn)
            speaker, value = turn.get("from"), turn.get("value")
            expect(speaker in ("human", "gpt"), "from: human or gpt", speaker)
            expect(isinstance(value, str) and value.strip(), "value: a text that is not empty", value)
            expect(
                not HALF_CHARACTER.search(value), "value: characters, not halves of surrogate pairs", value
            )
            turns.append((speaker, value))
    while turns and turns[0][0] == "gpt":  # an answer to nothing teaches nothing; the media stay
        turns.pop(0)
    expect(
        len(turns) >= 2,
        "a human turn with its gpt answer (without one there is no supervised token)",
        conversations,
    )
    for number, (speaker, value) in enumerate(turns):
        wanted = ("human", "gpt")[number % 2]
        expect(
            speaker == wanted,
            f"human and gpt in turn, {wanted} as turn {number + len(conversations) - len(turns)}",
            speaker,
        )
        if number > 0:
            expect(not MEDIA_TAG.search(value), "a media tag only in the first human turn", value)
        if speaker == "gpt":
            expect(REGION_TAG not in value, f"no {REGION_TAG} in an answer (a model cannot write one)", value)
    expect(len(turns) % 2 == 0, "a gpt answer to the last human turn", turns[-1])
    first = turns[0][1]
    tags = len(MEDIA_TAG.findall(first))
    expect(tags <= 1, "one media tag", first)
    expect(has_media or not tags, "a video or image key for the media tag", first)
    if has_media and not tags:
        turns[0] = ("human", "<video>\n" + first)
    return [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]


def _parse_objects(entry, is_image):
    """The objects' masks under either key: `annotation` {"36": {"segmentation": SEG}} or the later `masks` {"36": SEG}; of images, SEG."""
    keys = [key for key in ("annotation", "masks") if entry.get(key) is not None]
    expect(len(keys) <= 1, "annotation or masks, not both", keys)
    if not keys:
        return []
    with within(keys[0]):
        listed = entry[keys[0]]
        expect(isinstance(listed, list), "a list with one entry an object", listed)
        objects = []
        for number, frames in enumerate(listed):
            with within(f"object {number}"):
                if (
                    keys[0] == "masks"
                    and is_image
                    and (isinstance(frames, list) or isinstance(frames, dict) and "counts" in frames)
                ):
                    frames = {"0": frames}
                expect(isinstance(frames, dict), "frame index -> mask", frames)
                objects.append(_parse_frames(frames, wrapped=keys[0] == "annotation"))
    return objects


def _parse_frames(frames, wrapped):
    parsed = {}
    for key, mask in frames.items():
        with within(f"frame {key[:20]!r}"):
            expect(re.fullmatch(r"[0-9]{1,9}", key), "a frame index: a whole number from 0", key)
            expect(int(key) not in parsed, "each frame once", key)
            if wrapped and mask is not None:
                expect(isinstance(mask, dict), 'an object with "segmentation"', mask)
                mask = mask.get("segmentation")
            parsed[int(key)] = mask
    parsed = {
        frame: mask for frame, mask in parsed.items() if mask is not None
    }  # null or absent: the object is hidden there
    expect(parsed, "a mask on at least one frame", sorted(frames))
    return parsed


# ------------------------------------------------------------------------------------------------ masks


def check_segmentation(segmentation):
    """Raises DataError unless segmentation is COCO RLE, compressed or not, or one or more polygons.

    pycocotools decodes an RLE whose runs fall short of h*w into stale memory, without an error, and hangs on a polygon with
    NaN or 1e30, so everything is checked before it is called.
    """
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        valid = isinstance(size, list) and len(size) == 2 and all(type(x) is int and x > 0 for x in size)
        expect(
            valid and size[0] * size[1] <= MAX_MASK_AREA,
            f"size: [height, width] of at most {MAX_MASK_AREA} pixels",
            size,
        )
        expect(isinstance(counts, (str, list)), "counts: a string, or a list of run lengths", counts)
        runs = _rle_runs(counts) if isinstance(counts, str) else counts
        expect(
            all(type(run) is int and run >= 0 for run in runs),
            "counts: run lengths, whole numbers from 0",
            counts,
        )
        total = size[0] * size[1]
        expect(sum(runs) == total, f"run lengths that sum to {size[0]} * {size[1]} = {total}", sum(runs))
        return
    expect(isinstance(segmentation, list) and segmentation, "RLE or polygons", segmentation)
    for polygon in _polygons(segmentation):
        expect(isinstance(polygon, list), "a polygon [x1, y1, x2, y2, ...]", polygon)
        expect(
            len(polygon) >= 6 and len(polygon) % 2 == 0,
            "at least 3 points, an even count of numbers",
            polygon,
        )
        numbers = all(type(x) in (int, float) for x in polygon)
        expect(
            numbers and all(abs(x) < 1e6 for x in polygon), "polygon coordinates in pixels", polygon
        )  # NaN fails as well


def _polygons(segmentation):
    return [segmentation] if isinstance(segmentation[0], (int, float)) else segmentation


def _rle_runs(counts):
    """The run lengths inside a compressed RLE string (COCO's rleFrString).

    A number is little-endian groups of 5 bits, one character each (offset 48; 0x20: more follow; 0x10 in the last: negative);
    from the fourth run on it is the difference to the run two before. Six characters are more than a mask of MAX_MASK_AREA needs;
    with seven, pycocotools shifts bits out of a C int and reads another number.
    """
    runs, value, shift = [], 0, 0
    for char in counts:
        bits = ord(char) - 48
        expect(0 <= bits < 64 and shift < 30, "counts: a compressed RLE string", counts)
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value, shift = 0, 0
    expect(shift == 0, "counts: a compressed RLE string that ends with a whole number", counts)
    return runs


def decode_mask(segmentation, height, width):
    """COCO RLE (compressed or a list of runs), or one or more polygons -> uint8 (H, W) of 0 and 1.

    height, width: the frame, in pixels. Polygons are drawn on it. RLE carries its own size, which may be another resolution
    of the same shape; the mask comes back at that size. Raises DataError for malformed or differently shaped masks.
    """
    check_segmentation(segmentation)
    if isinstance(segmentation, dict):
        h, w = segmentation["size"]
        _same_shape((h, w), (height, width), "mask")
        rle = segmentation
        if isinstance(segmentation["counts"], list):
            rle = coco_mask.frPyObjects(segmentation, h, w)
        return coco_mask.decode(rle)
    polygons = _polygons(segmentation)
    inside = all(-width <= x <= 2 * width for p in polygons for x in p[0::2]) and all(
        -height <= y <= 2 * height for p in polygons for y in p[1::2]
    )
    expect(inside, f"polygon points (x, y) near the {width}x{height} frame", segmentation)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width)))


def _same_shape(size, frame, what):
    """Two (height, width) of one aspect ratio, up to rounding by a pixel of the smaller picture."""
    (h, w), (frame_h, frame_w) = size, frame
    same = abs(w * frame_h - h * frame_w) <= max(h, w, frame_h, frame_w)
    expect(same, f"a {what} of the frame's shape, {frame_w}x{frame_h} (width x height) or scaled", f"{w}x{h}")


def coverage(mask, gh, gw):
    """uint8 (H, W) of 0 and 1 -> float32 (gh, gw): the share of each cell that lies inside the mask, in [0, 1].

    Exact for every H, W, gh, gw: cell borders that cut through a pixel take their share of it. It does not depend on the
    mask's resolution, and an object of one pixel still has a coverage above 0.
    """
    height, width = mask.shape
    inside = (
        _overlap(gh, height) @ torch.from_numpy(mask).double() @ _overlap(gw, width).T
    )  # pixels, (gh, gw)
    return (inside * (gh * gw / (height * width))).clip(0, 1).float().numpy()


@lru_cache(maxsize=16)
def _overlap(cells, pixels):
    """-> float64 (cells, pixels): how much of each pixel of a side lies in each of the equal cells that it is cut into."""
    edges, left = torch.arange(cells + 1, dtype=torch.float64)[:, None] * pixels / cells, torch.arange(pixels)
    return (torch.minimum(edges[1:], left + 1) - torch.maximum(edges[:-1], left)).clip(min=0)


def mask_box(mask):
    """uint8 (H, W), not empty -> (cx, cy, w, h) of its bounding box, as fractions of the picture in [0, 1]."""
    height, width = mask.shape
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, right, top, bottom = xs[0] / width, (xs[-1] + 1) / width, ys[0] / height, (ys[-1] + 1) / height
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


# ---- media: the frames of a video, GIF, image or folder of images -----------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# Demuxers that may open a file. Of FFmpeg's others one draws a .txt as a film of letters; playlists fetch
# URLs.
VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg"
# Here a packet is one shown frame, and decoding can start at a keyframe. VP8 has packets that show nothing.
INDEXED_CODECS = {"h264", "hevc", "vp9", "av1"}
UNKNOWN_FPS = 24.0  # of a folder of images; Qwen3-VL's processor assumes as much for frames without a clock
MAX_REORDER = 16  # frames that an H.264 or HEVC decoder may hold back to put them in order of presentation


@dataclass(frozen=True)
class MediaInfo:
    num_frames: int  # frames that are shown
    fps: float  # frames a second, averaged over the file
    height: int  # pixels, as displayed: a phone's portrait video is higher than wide
    width: int
    is_image: bool
    # Packets that are decoded but not shown, because an edit list cuts them off, as in a clip that was cut
    # without being encoded anew. decord counts them when it seeks, so its frame numbers differ from ours.
    hidden_packets: int = 0


def media_info(path):
    """Returns the MediaInfo of a file or folder: open_media(path).info."""
    return open_media(path).info


def read_frames(path, indices):
    """Returns uint8 (len(indices), H, W, 3) RGB: the frames with these indices, in this order, also repeated."""
    indices = list(indices)
    media = open_media(path)
    pictures = media.read(indices)
    frames = np.empty((len(indices), media.info.height, media.info.width, 3), np.uint8)
    for row, k in enumerate(indices):
        frames[row] = pictures[k]
    return frames


def open_media(path):
    """Returns Video or Images, which have the same members: info, a MediaInfo, and read(indices), the frames.

    Frame k is the k-th shown, counted from 0, at the height and width that it is displayed with. It is never
    another frame than the one asked for: what cannot be had is a DataError. A file is looked through once,
    here, but it does not stay open and no pixels are held, so the object may live in a cache and be used in
    forked or spawned workers.
    """
    path = Path(path)
    found = None
    try:
        if path.is_dir():
            names = [file.name for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]
            names = [name for name in names if not name.startswith(".")]
            if names:
                return Images(path, sorted(names, key=_natural_order), is_image=False)
            found = "none in it"
        elif not path.is_file():
            found = "no such file"
        elif path.stat().st_size == 0:
            found = "an empty one"
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            return Images(path.parent, [path.name], is_image=True)
        else:
            return Video(path)
    except OSError as error:  # a name that is too long, a folder that may not be read
        found = error.strerror
    raise DataError(f"expected a media file or a folder of images, found: {found}", str(path))


def _natural_order(name):
    """Sort key that puts img2 before img10; the name itself decides between img2 and img02."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)], name


def _check_indices(indices, num_frames):
    """Returns the indices as a rising list of int, each once, or raises DataError."""
    for k in indices:
        valid = isinstance(k, (int, np.integer)) and not isinstance(k, bool) and 0 <= k < num_frames
        expect(valid, f"frame numbers from 0 to {num_frames - 1}, it has {num_frames}", k)
    return sorted({int(k) for k in indices})


def _check_size(picture, info):
    height, width, _ = picture.shape
    first = info.height, info.width
    expect((height, width) == first, f"the first frame's height and width {first}", (height, width))


class Images:
    """An image, or a folder of images in natural order: a video without a clock."""

    def __init__(self, folder, names, is_image):
        self.folder, self.names = folder, names
        self.nbytes = 100 * len(names)  # about what they take in memory, for a cache to count
        height, width = _image_size(folder / names[0])
        self.info = MediaInfo(len(names), UNKNOWN_FPS, height, width, is_image)

    def read(self, indices):
        """Returns {frame index: uint8 (H, W, 3) RGB}; raises DataError where an image does not decode."""
        with within(str(self.folder)):
            wanted = _check_indices(indices, len(self.names))
        pictures = {}
        for k in wanted:
            file = self.folder / self.names[k]
            pictures[k] = _load_image(file)
            with within(str(file)):
                _check_size(pictures[k], self.info)
        return pictures


@contextmanager
def _open_image(file):
    """Yields the PIL image, its pixels not yet decoded. What PIL raises on bad files becomes a DataError."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = f"expected an image, found one that does not decode: {error}"
        raise DataError(reason, str(file)) from error


def _image_size(file):
    """Returns the (height, width) that _load_image gives: the header's, unless EXIF turns the image."""
    with _open_image(file) as image:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image.height, image.width
    return _load_image(file).shape[:2]


def _load_image(file):
    """Returns uint8 (H, W, 3) RGB, turned as EXIF says (as Hugging Face's load_image does)."""
    with _open_image(file) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


class Video:
    """A video file or GIF, read with PyAV.

    decord 0.6.0 returns wrong frames without an error: after a seek, in open-GOP H.264/HEVC and in MPEG-4
    AVI; and even forward from 0, in MPEG-TS (it loses the first GOP) and past an edit list (it repeats the
    last frame). It does not open AV1, hangs in workers forked after it was used, and reading forward it pays
    for every frame.

    A frame is known by its pts (presentation time), because the order in which frames are stored is not the
    one in which they are shown, and a seek leads to a time, not to a number. The packets are listed once,
    without decoding: their sorted pts are the times of frame 0, 1, 2, ... To read frame k, decoding starts at
    the last keyframe that is shown at or before k, and goes on until a frame with the pts of k comes out. In
    an open GOP some frames are stored after a keyframe but shown before it, and need the previous GOP to be
    decoded: by this rule they start there. If a seek fails or leads elsewhere, or if the frames that come out
    are not those that the packets announced, everything is decoded from the first packet on.

    path: the file. times: int64 (num_frames,), the pts of each frame, rising; None where the packets do not
    tell them, and frames are decoded from the first packet and counted. keyframes: int64, the frames where
    decoding may start, rising; the first is 0.
    """

    def __init__(self, path):
        self.path = path
        with _ffmpeg_errors(path):
            _check_whole(path)
            self.info, self.times, self.keyframes = _index_video(path)
        self.nbytes = self.keyframes.nbytes + (0 if self.times is None else self.times.nbytes)

    def read(self, indices):
        """Returns {frame index: uint8 (H, W, 3) RGB}; raises DataError unless each of the frames decodes."""
        with _ffmpeg_errors(self.path):
            wanted = _check_indices(indices, self.info.num_frames)
            try:
                pictures = self._decode(wanted, self.keyframes, skip=True)
            except av.error.FFmpegError:  # some files refuse to be sought in
                pictures = {}
            if len(pictures) < len(wanted):
                # A seek led astray, or packets and frames do not match: decode from the first packet.
                pictures = self._decode(wanted, keyframes=[0], skip=False)
            missing = [k for k in wanted if k not in pictures]
            if missing:
                expected = f"expected {self.info.num_frames} frames, one a packet"
                raise DataError(f"{expected}, found that {missing} can't be decoded")
            for k, picture in pictures.items():
                with within(f"frame {k}"):
                    _check_size(picture, self.info)
        return pictures

    def _decode(self, wanted, keyframes, skip):
        """Returns {frame index: uint8 (H, W, 3) RGB}; fewer than the wanted frames if anything is odd.

        skip: leave out H.264 frames that are not wanted and that, by the standard, no other frame refers to
        (most B-frames). Frames without times are counted, so there none may be left out.
        """
        asked, pictures, reformatter = set(wanted), {}, VideoReformatter()
        with _open_video(self.path) as (container, stream):
            skip = skip and self.times is not None and stream.codec.canonical_name == "h264"
            needed = set(self.times[wanted].tolist()) if skip else None
            index_of = {} if self.times is None else {pts: k for k, pts in enumerate(self.times.tolist())}
            for keyframe, group in _plan(wanted, keyframes):
                start = self.times[keyframe] if keyframe else None
                previous = None
                for count, frame in enumerate(_frames_from(container, stream, start, needed)):
                    k = count if self.times is None else index_of.get(frame.pts)
                    is_gap = not skip and previous is not None and k != previous + 1
                    if k is None or is_gap or frame.is_corrupt and k in asked:
                        break  # here packets and frames do not match one to one
                    if k in asked:
                        pictures[k] = _to_rgb(frame, reformatter)
                    if k >= group[-1]:
                        break
                    previous = k
        return pictures


def _plan(wanted, keyframes):
    """Returns [(keyframe to start at, frames to fetch in one go from there)] for rising frame indices."""
    plan, previous = [(0, [])], 0
    for k in wanted:
        keyframe = int(keyframes[bisect_right(keyframes, k) - 1])
        if keyframe > previous + MAX_REORDER:  # if it is nearer, decoding on costs no more than a seek
            plan.append((keyframe, []))
        plan[-1][1].append(k)
        previous = k
    return [(keyframe, group) for keyframe, group in plan if group]


@contextmanager
def _ffmpeg_errors(path):
    """Errors of FFmpeg and of the file system become DataErrors, and every DataError names the file."""
    try:
        with within(str(path)):
            yield
    except (av.error.FFmpegError, OSError) as error:
        expected = "expected a video, found what FFmpeg can't open or decode (damaged, cut off, or no video)"
        raise DataError(f"{expected}: {error.strerror}", str(path)) from error


def _check_whole(path):
    """Raises DataError if a Matroska or WebM file is shorter than its header says: FFmpeg would not mind.

    Such a file is made of EBML elements: an id, a size, and as many bytes. First comes a header, its id of 4
    bytes, and then the Segment, which holds everything else (RFC 8794, RFC 9559).
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head.startswith(b"\x1a\x45\xdf\xa3"):
        return
    position, size = _ebml_size(head, 4)
    position, size = _ebml_size(head, position + size + 4)
    expected, found = position + size, path.stat().st_size
    if found < expected:
        raise DataError(f"expected {expected} bytes, as its header says, found {found}: it is cut off")


def _ebml_size(head, position):
    """Returns where an EBML element's content begins, and its size in bytes, which is stored at position."""
    first_byte = int.from_bytes(head[position : position + 1], "big")
    num_bytes = 9 - first_byte.bit_length()  # the leading zero bits tell
    unknown = (1 << 7 * num_bytes) - 1  # all ones: a live recording, written before its size was known
    size = int.from_bytes(head[position : position + num_bytes], "big") & unknown
    return position + num_bytes, 0 if size == unknown else size


@contextmanager
def _open_video(path):
    """Yields PyAV's container and its first video stream that is no cover art."""
    # "file:" keeps FFmpeg from taking a colon in the name for a protocol.
    with av.open(f"file:{path}", options={"format_whitelist": VIDEO_FORMATS}) as container:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            kinds = [stream.type for stream in container.streams]
            raise DataError(f"expected a video stream, found only {kinds} (or cover art)")
        # A DataLoader runs a process a core, and one thread is the exact, deterministic way.
        streams[0].thread_count = 1
        yield container, streams[0]


def _index_video(path, count_frames=False):
    """Returns (MediaInfo, times, keyframes) of a Video, from its packets alone where they can tell them.

    MP4/MOV and Matroska/WebM store a pts with each packet. For AVI and other containers FFmpeg has to guess
    it, so there all frames are decoded and counted (count_frames). So they are for codecs whose packets may
    show nothing, and where two packets have the same pts or one has none.
    """
    frame_times, keyframe_times, first, hidden_packets = [], [], None, 0
    with _open_video(path) as (container, stream):
        stores_times = container.format.name.startswith(("mov,", "matroska,"))
        if not stores_times or stream.codec.canonical_name not in INDEXED_CODECS:
            count_frames = True
        # The last packet is an empty one: it flushes the decoder.
        for num_packets, packet in enumerate(container.demux(stream)):
            if packet.is_corrupt:
                raise DataError(f"expected whole packets, found packet {num_packets} cut short")
            frames = packet.decode() if count_frames or first is None else []
            first = first or next(iter(frames), None)
            hidden_packets += packet.is_discard
            if count_frames:
                frame_times += [frame.pts for frame in frames]
            elif packet.size and not packet.is_discard:
                frame_times.append(packet.pts)
            if packet.is_keyframe:
                keyframe_times.append(packet.pts)
        # Not compared with the number of frames in the header: an edit list makes the packets fewer.
        indexed = len(stream.index_entries)
        if not count_frames and num_packets < indexed:
            reason = f"expected {indexed} packets, as its index says, found {num_packets}: it is cut off"
            raise DataError(reason)
        fps, time_base = stream.average_rate or UNKNOWN_FPS, stream.time_base
    if first is None:
        raise DataError("expected at least one frame, found none that decodes")
    has_times = None not in frame_times
    if not count_frames and (not has_times or len(set(frame_times)) < len(frame_times)):
        return _index_video(path, count_frames=True)
    if has_times and max(frame_times) > min(frame_times):
        # The rate is measured, because Matroska's header claims a steady one for any video.
        fps = (len(frame_times) - 1) / ((max(frame_times) - min(frame_times)) * time_base)
    lies_down = round(first.rotation / 90) % 2
    height, width = (first.width, first.height) if lies_down else (first.height, first.width)
    info = MediaInfo(len(frame_times), float(fps), height, width, False, hidden_packets)
    if count_frames:
        return info, None, np.zeros(1, np.int64)
    times = np.sort(np.array(frame_times, np.int64))
    keyframes = np.searchsorted(times, [time for time in keyframe_times if time <= times[-1]])
    return info, times, np.union1d(0, keyframes)


def _frames_from(container, stream, time, needed):
    """Yields decoded frames from the keyframe with the pts `time` on; None: from the first packet.

    The container's own index may lead to an earlier keyframe, from which it starts then. It yields nothing
    where that is not safe: the keyframe must be the first frame to come out. In H.264 with intra refresh it
    is not, because such a "keyframe" is where a gradual refresh begins, and frames before its end were seen
    to be grey in places. needed: the pts of the frames that must come (None: all); of the others, those that
    no frame refers to may be missing.
    """
    if time is not None:
        container.seek(int(time), stream=stream)
    packets = container.demux(stream)
    start = next(packets)
    frames = _decode_packets(chain([start], packets), stream, needed)
    if time is not None:
        if not start.is_keyframe or start.pts > time:
            return
        first = next(frames, None)
        if first is None or first.pts != start.pts:
            return
        yield first
    yield from frames


def _decode_packets(packets, stream, needed):
    for packet in packets:
        may_skip = needed is not None and packet.pts not in needed
        stream.codec_context.skip_frame = "NONREF" if may_skip else "DEFAULT"
        yield from packet.decode()


def _to_rgb(frame, reformatter):
    """Decoded frame -> uint8 (H, W, 3) RGB, as displayed; pixels that aren't square stay so, as in masks."""
    rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(rgb, round(frame.rotation / 90))  # both count counterclockwise


def read_media(path, indices):
    """For callers that have not moved to open_media yet; to be removed with the last of them."""
    media = open_media(path)
    return media.info, media.read(indices)


# ------------------------------------------------------------------------------------------------ pixels, text, tokens


@dataclass(frozen=True)
class Settings:
    """How media become tokens. Saved beside a trained model, so that eval.py sees what training saw."""

    num_frames: int = 8  # frames sampled evenly from a video
    frame_pixels: int = 32 * 32  # at most so many pixels in each of them, after resizing
    region_pixels: int = (
        96 * 96
    )  # the same for stills: images, and the annotated frames that regions are pooled from
    region_frames: int = 8  # annotated frames used of one object, evenly spread
    region_tokens: int = 4  # tokens that one object becomes, at most (the paper's u)
    max_length: int = 4096  # tokens of a sample; a longer one is an error, never cut


# The pixels of a pretrained backbone's pictures, in place of the tiny model's above.
PRETRAINED_PIXELS = {"frame_pixels": 384 * 384, "region_pixels": 384 * 384}

# What the backbone families do differently in the prompt. Everything else is read from the checkpoint's own files.
# timestamps: each pair of frames is announced as "<1.5 seconds>" (Qwen3-VL), or time goes into the position ids (Qwen2.5-VL).
FAMILIES = {"qwen3_vl": {"timestamps": True}, "qwen2_5_vl": {"timestamps": False}}


class Processor:
    """What turns a conversation and frames into a checkpoint's token ids and patches: tokenizer, template, patch geometry.

    It stands in for transformers' AutoProcessor, whose video half needs torchvision, and is tested to give the same result.
    """

    def __init__(self, tokenizer, image_processor, config, settings):
        if config.model_type not in FAMILIES:
            raise ValueError(
                f"expected a backbone of one of the families {sorted(FAMILIES)}, found {config.model_type!r}"
            )
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        self.settings = settings
        self.timestamps = FAMILIES[config.model_type]["timestamps"]
        self.patch_size = config.vision_config.patch_size
        self.temporal_patch_size = config.vision_config.temporal_patch_size
        self.merge_size = config.vision_config.spatial_merge_size
        self.min_pixels = image_processor.size["shortest_edge"]
        self.max_pixels = image_processor.size["longest_edge"]
        self.image_pad, self.video_pad, self.vision_start, self.vision_end = tokenizer.convert_ids_to_tokens(
            [
                config.image_token_id,
                config.video_token_id,
                config.vision_start_token_id,
                config.vision_end_token_id,
            ]
        )
        tokenizer.add_tokens([REGION_PAD], special_tokens=True)  # does nothing where it is known already
        self.region_token_id = tokenizer.convert_tokens_to_ids(REGION_PAD)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control_tokens = re.compile("|".join(map(re.escape, [*special, ANSWER_MARK])))

    @classmethod
    def from_pretrained(cls, path, settings):
        """path: a Hugging Face name, or a folder (also one that save_pretrained wrote)."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        template = cached_file(path, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if template:  # where older checkpoints keep their processor's template, which knows images and videos
            with open(template) as file:
                tokenizer.chat_template = json.load(file)["chat_template"]
        images = Qwen2VLImageProcessorPil.from_pretrained(
            path
        )  # both families'; AutoImageProcessor may ask for torchvision
        return cls(tokenizer, images, AutoConfig.from_pretrained(path), settings)

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def still_size(self, height, width):
        """The (height, width) that an image or annotated frame is resized to, by the family's own rule."""
        limit = min(self.max_pixels, self.settings.region_pixels)
        return self._smart_resize(height, width, min(self.min_pixels, limit), limit)

    def frame_size(self, height, width):
        """The (height, width) that a video's sampled frames are resized to."""
        return self._smart_resize(height, width, self.factor**2, self.settings.frame_pixels)

    @property
    def factor(self):
        """Pixels along the side of a cell."""
        return self.patch_size * self.merge_size

    def _smart_resize(self, height, width, min_pixels, max_pixels):
        expect(
            max(height, width) <= 200 * min(height, width),
            "a picture at most 200 times as long as wide",
            (height, width),
        )
        return smart_resize(height, width, self.factor, min_pixels, max_pixels)

    def still_patches(self, picture):
        """uint8 (H, W, 3) -> uint8 (P, 3 * patch * patch); the model repeats it along the temporal patch."""
        sides = dict(m=self.merge_size, n=self.merge_size, ph=self.patch_size, pw=self.patch_size)
        return rearrange(picture, "(gh m ph) (gw n pw) c -> (gh gw m n) (c ph pw)", **sides)

    def video_patches(self, frames):
        """uint8 (T, H, W, 3) -> uint8 (P, 3 * temporal * patch * patch); an odd last frame is paired with itself."""
        missing = -len(frames) % self.temporal_patch_size
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        sides = dict(
            a=self.temporal_patch_size,
            m=self.merge_size,
            n=self.merge_size,
            ph=self.patch_size,
            pw=self.patch_size,
        )
        return rearrange(frames, "(t a) (gh m ph) (gw n pw) c -> (t gh gw m n) (c a ph pw)", **sides)

    def image_prompt(self, cells):
        """The text that stands for an image of so many cells."""
        return self.image_pad * cells

    def video_prompt(self, indices, fps, cells):
        """The text that stands for a video: indices are the sampled frames, cells the visual tokens of one pair of frames."""
        indices = list(indices) + [indices[-1]] * (-len(indices) % self.temporal_patch_size)
        pairs = range(0, len(indices), self.temporal_patch_size)
        if not self.timestamps:
            return self.video_pad * (cells * len(pairs))
        times = [(indices[i] + indices[i + self.temporal_patch_size - 1]) / 2 / fps for i in pairs]
        return "".join(
            f"<{t:.1f} seconds>{self.vision_start}{self.video_pad * cells}{self.vision_end}" for t in times
        )

    def encode(self, turns, media, media_prompt, region_tokens, for_generation=False):
        """A conversation -> (input_ids, labels): int64 arrays (L,); labels are IGNORE_INDEX but for answers and their end token.

        media: "image", "video" or None. media_prompt: what its placeholder becomes. region_tokens: per `<region>` tag, how many
        placeholder tokens it becomes. for_generation: stop where the last answer would begin.
        """
        for text in (text for turn in turns for text in turn):
            found = self.control_tokens.search(text)
            expect(not found, "text without the tokenizer's control tokens", found and found.group())
        # The template is rendered once, with a mark for each answer: what stands between the marks is the prompt.
        messages = []
        for question, _ in turns:
            messages.append({"role": "user", "content": self._content(question, media)})
            messages.append({"role": "assistant", "content": ANSWER_MARK})
        prompts = self.tokenizer.apply_chat_template(messages, tokenize=False).split(ANSWER_MARK)
        end = self.tokenizer.eos_token
        if len(prompts) != len(turns) + 1 or not all(prompt.startswith(end) for prompt in prompts[1:]):
            raise ValueError(
                f"expected a chat template that shows every answer once and ends it with {end}, found {prompts}"
            )
        if media:
            pad = self.image_pad if media == "image" else self.video_pad
            prompts[0] = prompts[0].replace(pad, media_prompt, 1)
        counts = iter(region_tokens)
        texts = []
        for prompt, (_, answer) in zip(prompts, turns):
            prompt = re.sub(REGION_TAG, lambda _: REGION_PAD * next(counts), prompt.removeprefix(end))
            texts += [prompt, answer + end]
        texts = texts[:-1] if for_generation else [*texts, prompts[-1].removeprefix(end)]
        pieces = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        ids = [token for piece in pieces for token in piece]
        labels = [
            token if number % 2 else IGNORE_INDEX for number, piece in enumerate(pieces) for token in piece
        ]
        limit = self.settings.max_length
        visual = sum(
            ids.count(self.tokenizer.convert_tokens_to_ids(t)) for t in (self.image_pad, self.video_pad)
        )
        if len(ids) > limit:
            raise DataError(
                f"expected at most --max-length {limit} tokens, found {len(ids)} ({visual} of them visual)"
            )
        return np.array(ids), np.array(labels)

    def _content(self, question, media):
        """A question -> the parts of a chat message; the media tag, with the line break beside it, becomes a part."""
        content = []
        for number, text in enumerate(MEDIA_TAG.split(question)):
            content += [{"type": media}] * (number > 0) + [{"type": "text", "text": text}] * (text != "")
        return content


# ------------------------------------------------------------------------------------------------ data set and batches


def evenly(items, count):
    """-> at most `count` of the items (a sequence, not empty), evenly spread: the first and, if there is more than one, the last too."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def region_token_count(num_frames, limit):
    """How many tokens an object with so many usable frames becomes: the one rule for placeholders and features alike."""
    return min(num_frames, limit)


class ReferringDataset(torch.utils.data.Dataset):
    """Samples as encoded conversations with their patches and regions. Keys are (epoch, number) pairs.

    dataset[epoch, i] is a function of (seed, epoch, i) alone, whatever the worker or the number of ranks (but for the files that
    hang a decoder, which is a matter of time). A sample that cannot
    be used comes back as its DataError, not raised, because an exception would end the worker: the caller decides.
    control: "none"; "full" replaces every mask by the whole frame; "shuffle" by the masks of another sample's object.
    timeout: seconds that a media file may take to be read.
    """

    def __init__(
        self,
        samples,
        processor,
        single_frame=0.0,
        seed=0,
        control="none",
        cache_bytes=64 << 20,
        timeout=120.0,
    ):
        self.samples, self.processor, self.settings = samples, processor, processor.settings
        self.single_frame, self.seed, self.control, self.timeout = single_frame, seed, control, timeout
        self.cache, self.hung = FrameCache(cache_bytes), set()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, number = key
        try:
            sample = self.samples[number]
            rng = np.random.default_rng((self.seed, epoch, number))
            with within(*sample.place):
                return self.encode(sample, rng)
        except DataError as error:
            return error

    def question(self, number, turn):
        """What a model is asked in one turn of a sample: the conversation up to there, its answer left out (eval.py)."""
        sample = self.samples[number]
        turns = sample.turns[: turn + 1]
        objects = sample.objects[: sum(question.count(REGION_TAG) for question, _ in turns)]
        with within(*sample.place):
            return self.encode(
                replace(sample, turns=turns, objects=objects),
                np.random.default_rng((self.seed, number)),
                True,
            )

    def encode(self, sample, rng, for_generation=False):
        """Sample -> dict of arrays, those that collate joins."""
        info = kind = prompt = None
        if sample.media is not None:
            info = self._info(sample)
            kind = "image" if info.is_image else "video"
        objects = [self._masks(sample, number, info, rng) for number in range(len(sample.objects))]
        if self.control != "none":
            objects = [self._replace(masks, sample, rng) for masks in objects]
        encoded = {"id": sample.id, "type": sample.type, "kind": kind, **_NO_MEDIA}
        if kind is not None:
            prompt = self._add_media(
                encoded, sample, info, sorted({frame for masks in objects for frame in masks})
            )
        frames = [
            (number, frame) for number, masks in enumerate(objects) for frame in masks
        ]  # in order of time, see _masks
        grid = [side // self.processor.merge_size for side in encoded["still_grid"]]
        tokens = [region_token_count(len(masks), self.settings.region_tokens) for masks in objects]
        input_ids, labels = self.processor.encode(sample.turns, kind, prompt, tokens, for_generation)
        return encoded | {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": np.ones_like(input_ids),
            "coverage": [coverage(objects[number][frame], *grid).ravel() for number, frame in frames],
            "boxes": [
                (*mask_box(objects[number][frame]), frame / max(info.num_frames - 1, 1))
                for number, frame in frames
            ],
            "region_still": [encoded["still_frames"].index(frame) for _, frame in frames],
            "object_frames": [len(masks) for masks in objects],
            "region_tokens": tokens,
        }

    def _info(self, sample):
        info = self.cache.get(sample.media) or self.cache.put(
            sample.media, self._in_time(media_info, sample.media)
        )
        if sample.size is not None:
            _same_shape(sample.size, (info.height, info.width), "height and width")
        return info

    def _add_media(self, encoded, sample, info, annotated):
        """Adds patches and their grids to `encoded` and returns the text that stands for the media in the prompt."""
        processor = self.processor
        size, patch, pair = (info.height, info.width), processor.patch_size, processor.temporal_patch_size
        stills, sampled = annotated, []
        if info.is_image:
            stills = [0]  # the image itself is the one still, with or without regions
        else:
            sampled = evenly(range(info.num_frames), self.settings.num_frames)
        still_size, frame_size = processor.still_size(*size), processor.frame_size(*size)
        wanted = [(frame, still_size) for frame in stills] + [(frame, frame_size) for frame in sampled]
        pictures = self._pictures(sample.media, wanted)
        encoded["still_frames"] = stills
        encoded["still_patches"] = [processor.still_patches(picture) for picture in pictures[: len(stills)]]
        encoded["still_grid"] = tuple(side // patch for side in still_size)
        if info.is_image:
            return processor.image_prompt(math.prod(encoded["still_grid"]) // processor.merge_size**2)
        encoded["video_patches"] = processor.video_patches(np.stack(pictures[len(stills) :]))
        encoded["video_grid"] = (
            math.ceil(len(sampled) / pair),
            frame_size[0] // patch,
            frame_size[1] // patch,
        )
        # Qwen2.5-VL spaces its position ids by the seconds between pairs, as its own processor counts them.
        encoded["seconds_per_pair"] = pair * info.num_frames / (len(sampled) * info.fps)
        cells = math.prod(encoded["video_grid"][1:]) // processor.merge_size**2
        return processor.video_prompt(sampled, info.fps, cells)

    def _masks(self, sample, number, info, rng):
        """The masks used of one object: {frame: uint8 (H, W)}, none empty, at most region_frames, evenly spread in time."""
        height, width = sample.size or (info.height, info.width)
        segmentations = sample.objects[number]

        def decode(frames):
            masks = {}
            for frame in frames:
                with within(f"object {number}", f"frame {frame}"):
                    expect(
                        frame < info.num_frames,
                        f"a frame index below {info.num_frames}, the frames there are",
                        frame,
                    )
                    masks[frame] = decode_mask(segmentations[frame], height, width)
            return masks

        def choose(frames):
            if (
                rng.random() < self.single_frame
            ):  # the paper trains on a mix of single-frame and multi-frame regions
                return [frames[rng.integers(len(frames))]]
            return evenly(frames, self.settings.region_frames)

        masks = decode(choose(sorted(segmentations)))
        if not all(
            mask.any() for mask in masks.values()
        ):  # an empty mask: hidden there; choose among the frames that are left
            usable = {frame: mask for frame, mask in decode(sorted(segmentations)).items() if mask.any()}
            with within(f"object {number}"):
                expect(usable, "a mask that is not empty on at least one frame", sorted(segmentations))
            masks = {frame: usable[frame] for frame in choose(sorted(usable))}
        return masks

    def _replace(self, masks, sample, rng):
        """The control: the same frames with the whole picture for a mask, or with the masks of a random object on other media."""
        if self.control == "full":
            return {frame: np.ones((1, 1), dtype=np.uint8) for frame in masks}
        for number in rng.permutation(len(self.samples)).tolist():
            other = self.samples[number]
            if other.objects and other.media != sample.media:
                with suppress(
                    DataError
                ):  # its own, reported when it is asked about itself; the next one serves as well
                    found = self._masks(other, int(rng.integers(len(other.objects))), self._info(other), rng)
                    others = [found[frame] for frame in sorted(found)]
                    return {frame: others[i % len(others)] for i, frame in enumerate(sorted(masks))}
        raise DataError(
            "expected a sample with regions on other media to take masks from (--control shuffle), found none"
        )

    def _pictures(self, path, wanted):
        """[(frame, (height, width))] -> list of uint8 (height, width, 3); what the cache lacks is decoded in one pass."""
        pictures = {key: self.cache.get((path, key)) for key in wanted}
        missing = [key for key, picture in pictures.items() if picture is None]
        frames = self._in_time(read_media, path, [frame for frame, _ in missing])[1] if missing else {}
        for frame, (height, width) in missing:
            picture = Image.fromarray(frames[frame]).resize((width, height), Image.Resampling.BICUBIC)
            pictures[frame, (height, width)] = self.cache.put(
                (path, (frame, (height, width))), np.asarray(picture)
            )
        return [pictures[key] for key in wanted]

    def _in_time(self, read, path, *arguments):
        """read(path, *arguments), or DataError when it takes longer than the timeout. A thread that hangs in a decoder cannot be
        ended: it is left behind, and so is the file, which is never tried again."""
        done = queue.SimpleQueue()

        def work():
            try:
                done.put((read(path, *arguments), None))
            except Exception as error:
                done.put((None, error))

        try:
            if path in self.hung:
                raise queue.Empty
            threading.Thread(target=work, daemon=True).start()
            result, error = done.get(timeout=self.timeout)
        except queue.Empty:
            self.hung.add(path)
            raise DataError(
                f"{path}: expected to be read within {self.timeout:g} s (--timeout), found that it was not"
            ) from None
        if error is not None:
            raise error
        return result


_NO_MEDIA = {"still_frames": [], "still_patches": [], "still_grid": (0, 0), "video_patches": None}

# What a rank computes on when none of its samples can be used: one token, nothing supervised.
EMPTY_SAMPLE = {
    "id": None,
    "type": "",
    "kind": None,
    **_NO_MEDIA,
    "input_ids": np.zeros(1, int),
    "labels": np.full(1, IGNORE_INDEX),
}
EMPTY_SAMPLE |= {"attention_mask": np.ones(1, int)} | {
    name: [] for name in ("coverage", "boxes", "region_still")
}
EMPTY_SAMPLE |= {"object_frames": [], "region_tokens": []}


class FrameCache:
    """The most recently used resized frames of one worker, so that a small data set is decoded once and not every epoch."""

    def __init__(self, limit):
        self.limit, self.used, self.entries = limit, 0, OrderedDict()  # bytes, bytes, key -> value

    def get(self, key):
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key, value):
        """Keeps value (an array, or something small), dropping the least recently used; returns it."""
        self.entries[key] = value
        self.used += self._size(value)
        while self.used > self.limit:
            self.used -= self._size(self.entries.popitem(last=False)[1])
        return value

    @staticmethod
    def _size(value):
        return getattr(value, "nbytes", 0) + 200  # about what a key and a small value weigh


def collate(samples, pad_token_id, pad_left=False):
    """Encoded samples, some of which may be DataErrors -> one batch (dict) of those that could be used.
    B samples, L tokens, S stills, R region frames, O objects, M cells of all regions.

       input_ids, attention_mask, labels: int64 (B, L), padded on the right (left for generation).
       still_patches: uint8 (P, 3 * patch * patch), still_grid_thw: int64 (S, 3) in patches: the images that stand in prompts
       (prompt_images of them) first, then the annotated frames. video_patches: uint8 (Q, 3 * temporal * patch * patch),
       video_grid_thw: int64 (V, 3), seconds_per_pair: float32 (V,).
       coverage: float32 (M,), the grids of all region frames one after another; coverage_start: int64 (R + 1,), where each begins;
       region_still: int64 (R,), its still; boxes: float32 (R, 5), (cx, cy, w, h, t) of its mask in [0, 1]; region frames are
       ordered by object, then time. object_frames, region_tokens: int64 (O,), region frames and placeholder tokens per object.
       ids, types: lists. errors: for each of the given samples its DataError or None. supervised_tokens: int. Media that no sample of the batch has give tensors of length 0.
    """
    errors = [sample if isinstance(sample, DataError) else None for sample in samples]
    samples = [sample for sample in samples if not isinstance(sample, DataError)] or [EMPTY_SAMPLE]
    length = max(len(s["input_ids"]) for s in samples)

    def pad(name, value):
        rows = np.full((len(samples), length), value)
        for row, s in zip(rows, samples):
            size = len(s[name])
            row[length - size if pad_left else 0 :][:size] = s[name]
        return torch.from_numpy(rows)

    first_still, prompt_images, stills, grids = {}, 0, [], []
    for b in sorted(
        range(len(samples)), key=lambda b: samples[b]["kind"] != "image"
    ):  # stable: prompt images come first
        first_still[b] = len(stills)
        prompt_images += samples[b]["kind"] == "image"
        stills += samples[b]["still_patches"]
        grids += [(1, *samples[b]["still_grid"])] * len(samples[b]["still_patches"])
    videos = [s for s in samples if s["video_patches"] is not None]
    weights = [grid for s in samples for grid in s["coverage"]]

    def join(arrays, dtype):
        return torch.from_numpy(
            np.concatenate([np.zeros((0, *arrays[0].shape[1:]) if arrays else 0, dtype=dtype), *arrays])
        )

    def table(rows, dtype, *width):
        return torch.tensor(rows, dtype=dtype).view(-1, *width)

    labels = pad("labels", IGNORE_INDEX)
    return {
        "errors": errors,
        "supervised_tokens": int((labels[:, 1:] != IGNORE_INDEX).sum()),
        "ids": [s["id"] for s in samples],
        "types": [s["type"] for s in samples],
        "input_ids": pad("input_ids", pad_token_id),
        "labels": labels,
        "attention_mask": pad("attention_mask", 0),
        "still_patches": join(stills, np.uint8),
        "still_grid_thw": table(grids, torch.long, 3),
        "prompt_images": prompt_images,
        "video_patches": join([s["video_patches"] for s in videos], np.uint8),
        "video_grid_thw": table([s["video_grid"] for s in videos], torch.long, 3),
        "seconds_per_pair": table([s["seconds_per_pair"] for s in videos], torch.float32),
        "coverage": join(weights, np.float32),
        "coverage_start": torch.tensor(np.cumsum([0] + [len(w) for w in weights])),
        "region_still": table(
            [first_still[b] + i for b, s in enumerate(samples) for i in s["region_still"]], torch.long
        ),
        "boxes": table([box for s in samples for box in s["boxes"]], torch.float32, 5),
        "object_frames": table([n for s in samples for n in s["object_frames"]], torch.long),
        "region_tokens": table([n for s in samples for n in s["region_tokens"]], torch.long),
    }


def to_device(batch, device):
    """The same batch with its tensors on the device."""
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


# ------------------------------------------------------------------------------------------------ pictures of regions

COLOURS = np.array(
    [
        (255, 80, 60),
        (60, 200, 90),
        (70, 130, 255),
        (255, 200, 40),
        (220, 80, 230),
        (40, 210, 220),
        (255, 140, 190),
    ]
)


def draw_regions(picture, masks, numbers=None):
    """-> a copy of picture, uint8 (H, W, 3), with objects drawn in: a translucent fill, the contour, and the object's number.

    masks: one an object, uint8 (h, w) at any resolution of the picture's shape; None: not on this frame. An object's colour goes
    by its place in the list. numbers: what is written beside each, by default 1, 2, ...: the n-th `<region>` of the conversation.
    No pixel outside a mask changes, but under the numbers.
    """
    picture, labels = picture.copy(), []
    height, width, _ = picture.shape
    line = max(
        1, round(max(height, width) / 300)
    )  # pixels; the contour is the mask's own edge, drawn to the inside
    for place, mask in enumerate(masks):
        if mask is None or not mask.any():
            continue
        share = coverage(mask, height, width)
        inside = share >= min(
            0.5, share.max()
        )  # where the picture is smaller than the mask, thin objects stay visible
        core = np.pad(inside, 1)
        for _ in range(line):
            core[1:-1, 1:-1] &= core[:-2, 1:-1] & core[2:, 1:-1] & core[1:-1, :-2] & core[1:-1, 2:]
        colour = COLOURS[place % len(COLOURS)]
        picture[inside] = 0.65 * picture[inside] + 0.35 * colour
        picture[inside & ~core[1:-1, 1:-1]] = colour
        labels.append(
            (np.argwhere(inside), str(numbers[place] if numbers else place + 1), tuple(colour.tolist()))
        )
    image = Image.fromarray(picture)
    draw, size = ImageDraw.Draw(image), max(12, min(height, width) // 16)
    for points, text, colour in labels:
        (top, left), (bottom, _) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        corner = (
            ((left, top), "lb") if top > size else ((left, min(bottom + 1, height - size)), "lt")
        )  # above it, or else below
        draw.text(
            corner[0],
            text,
            anchor=corner[1],
            fill=colour,
            font=ImageFont.load_default(size),
            stroke_width=2,
            stroke_fill="black",
        )
    return np.array(image)


def save_picture(image, path):
    """Writes a PIL image as PNG: whole or not at all."""
    with open(path + ".tmp", "wb") as file:
        image.save(file, "PNG", optimize=True)
    os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------------------------ python data.py FILE: is it right?


def mask_form(segmentation):
    """The name of the form that a checked segmentation has."""
    if isinstance(segmentation, dict):
        return "compressed RLE" if isinstance(segmentation["counts"], str) else "uncompressed RLE"
    return (
        "several polygons" if isinstance(segmentation[0], list) and len(segmentation) > 1 else "one polygon"
    )


def spread(counter):
    """Counter of numbers -> its minimum, median and maximum, as text."""
    values, total = sorted(counter), sum(counter.values())
    middle = next(v for v, seen in zip(values, accumulate(counter[v] for v in values)) if 2 * seen >= total)
    return f"min {values[0]}, median {middle}, max {values[-1]}"


def _read_for_ever(dataset, connection):
    """A Reader's process: numbers of samples come in, what training would make of them goes out, in few numbers."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process().sentinel
    while connection in multiprocessing.connection.wait([connection, parent]):
        number = connection.recv()
        encoded = dataset[0, number]
        if not isinstance(encoded, DataError):
            sample = dataset.samples[number]
            info = sample.media and dataset._info(sample)
            media = info and (
                "image" if info.is_image else "video",
                info.num_frames,
                f"{info.width}x{info.height}",
            )
            encoded = len(encoded["input_ids"]), media
        connection.send(encoded)


class Reader:
    """A process that reads samples one at a time, and that can be killed when one of them hangs it."""

    def __init__(self, dataset):
        self.connection, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_read_for_ever, args=(dataset, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that its death is the end of the file here
        self.number = self.deadline = None

    def give(self, number, timeout):
        self.connection.send(number)
        self.number, self.deadline = number, time.monotonic() + timeout


def read_all(dataset, numbers, workers, timeout):
    """Yields (number, (tokens, (kind, frames, size) or None) or DataError) for each sample, read the way training reads it.

    A sample that takes longer than timeout seconds, or that ends its process, is a DataError as well; another process goes on.
    """
    waiting, readers = iter(numbers), [Reader(dataset) for _ in range(workers)]
    while True:
        for reader in readers:
            if reader.number is None and (number := next(waiting, None)) is not None:
                if not reader.process.is_alive():
                    readers[readers.index(reader)] = reader = Reader(dataset)
                reader.give(number, timeout)
        busy = [reader for reader in readers if reader.number is not None]
        if not busy:
            break
        patience = min(reader.deadline for reader in busy) - time.monotonic()
        ready = multiprocessing.connection.wait([reader.connection for reader in busy], max(0, patience))
        for reader in busy:
            number, place = reader.number, dataset.samples[reader.number].place
            reader.number = None
            try:
                if reader.connection in ready:
                    found = reader.connection.recv()
                elif time.monotonic() >= reader.deadline:
                    reader.process.kill()
                    readers[readers.index(reader)] = Reader(dataset)
                    found = DataError(
                        f"expected to be read within {timeout:g} s (--timeout), found that it was not", *place
                    )
                else:
                    reader.number = number
                    continue
            except EOFError:
                reader.process.join()
                readers[readers.index(reader)] = Reader(dataset)
                found = DataError(
                    f"expected to be read, found that its process died (exit code {reader.process.exitcode})",
                    *place,
                )
            yield number, found
    for reader in readers:
        reader.process.kill()


class Findings:
    """What a check found, in numbers that do not grow with the data, and its problems, grouped by reason."""

    def __init__(self, problems_file):
        self.counts = {
            name: Counter()
            for name in ("kinds", "mask forms", "frames per object", "frames per video", "sizes", "tokens")
        }
        self.groups, self.problems, self.file = {}, 0, problems_file

    def add_problem(self, error):
        self.problems += 1
        reason = error.args[0]
        # Alike up to numbers, file names and what was found in their place.
        group = re.sub(r"\S*/\S*|\d+", "#", ": ".join((*error.args[3:], reason.split(", found")[0])))
        first = self.groups.setdefault(group, [0, reason, []])
        first[0] += 1
        first[2] += [": ".join(error.args[2:])] * (len(first[2]) < 3)
        if self.file:
            self.file.write(json.dumps({"places": error.args[1:], "reason": reason}) + "\n")

    def add_sample(self, sample, media):
        """media: (kind, frames, size), None for text, "media" where files are not opened."""
        frames = max((len(masks) for masks in sample.objects), default=0)
        regions = ("no regions", "regions on one frame", "regions on several frames")[min(frames, 2)]
        kind = media[0] if isinstance(media, tuple) else media
        self.counts["kinds"][f"{kind}, {regions}" if kind else "text only"] += 1
        self.counts["frames per object"].update(len(masks) for masks in sample.objects)
        self.counts["mask forms"].update(mask_form(m) for masks in sample.objects for m in masks.values())
        if isinstance(media, tuple):
            self.counts["sizes"][media[2]] += 1
            self.counts["frames per video"].update([media[1]] if kind == "video" else [])

    def report(self, samples):
        print(f"{samples} samples, {samples - self.problems} of them right")
        print(f"{sum(self.counts['frames per object'].values())} objects")
        for name, counter in self.counts.items():
            if counter and name in ("kinds", "mask forms", "sizes"):
                most = counter.most_common(8)
                rest = [f"{len(counter) - 8} more"] if len(counter) > 8 else []
                print(f"{name}: " + "; ".join([f"{key} {count}" for key, count in most] + rest))
            elif counter:
                print(f"{name}: {spread(counter)}")
        for count, reason, first in sorted(self.groups.values(), key=lambda group: -group[0]):
            print(f"\n{count} x {reason}")
            print(
                "".join(f"    {place}\n" for place in first)
                + f"    and {count - len(first)} more" * (count > len(first)),
                end="\n",
            )


def check_masks(sample):
    """DataError unless every mask is well formed; training itself reads those frames alone that it chooses."""
    for number, masks in enumerate(sample.objects):
        for frame, segmentation in masks.items():
            with within(*sample.place, f"object {number}", f"frame {frame}"):
                check_segmentation(segmentation)


def check(samples, dataset, options):
    """Structure first, then, unless options say no, media and masks -> (Findings, which samples are right: bool (samples,))."""
    right = np.zeros(len(samples), bool)
    aside = options.problems and f"{options.problems}.tmp"
    with open(aside, "w") if aside else nullcontext() as file:
        findings = Findings(file)
        for number in tqdm(range(len(samples)), desc="structure", leave=False, mininterval=0.5):
            try:
                sample = samples[number]
                check_masks(sample)
            except DataError as error:
                findings.add_problem(error)
                continue
            right[number] = True
            if options.structure_only:
                findings.add_sample(sample, sample.media and "media")
        if not options.structure_only:
            every = read_all(dataset, map(int, np.flatnonzero(right)), options.workers, options.timeout)
            for number, found in tqdm(every, total=int(right.sum()), desc="media and masks", leave=False):
                if isinstance(found, DataError):
                    findings.add_problem(found)
                    right[number] = False
                    continue
                findings.add_sample(samples[number], found[1])
                findings.counts["tokens"][found[0]] += 1
    if aside:
        os.replace(aside, options.problems)
    return findings, right


# ------------------------------------------------------------------------------------------------ a picture of some samples

PANEL, TEXT_WIDTH, LINE = (
    192,
    420,
    17,
)  # pixels: the height of a frame, the width of the conversation, the height of its lines


def preview(dataset, sample_indices, frames_shown=3, panel_height=PANEL):
    """-> PIL image: a row a sample. Frames with the masks drawn in, below each its cells, as bright as they are covered; beside them
    the conversation, its `<region>` tags numbered as the objects in the picture are."""
    rows = [
        _preview_row(dataset, dataset.samples[int(i)], frames_shown, panel_height) for i in sample_indices
    ]
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for row, top in zip(rows, accumulate([row.height for row in rows], initial=0)):
        sheet.paste(row, (0, top))
    return sheet


def _preview_row(dataset, sample, frames_shown, panel_height):
    info = sample.media and dataset._info(sample)
    objects = [
        dataset._masks(sample, number, info, np.random.default_rng(0))
        for number in range(len(sample.objects))
    ]
    frames = sorted({frame for masks in objects for frame in masks}) or ([0] if info else [])
    frames = evenly(frames, frames_shown) if frames else []
    panels = []
    for frame, picture in zip(frames, read_frames(sample.media, frames) if frames else []):
        masks = [masks.get(frame) for masks in objects]
        boxes = [mask is not None and mask_box(mask) for mask in masks]
        tags = [str(number) for number in range(1, len(masks) + 1)]
        for number, box in enumerate(
            boxes
        ):  # an object that is asked about again gets one contour and all its numbers
            again = [
                other
                for other in range(number)
                if masks[other] is not None and box and np.allclose(box, boxes[other], atol=0.03)
            ]
            if again:
                tags[again[0]] += f",{tags[number]}"
                masks[number] = None
        width = max(1, round(panel_height * info.width / info.height))
        cell = dataset.processor.patch_size * dataset.processor.merge_size
        grid = [side // cell for side in dataset.processor.still_size(*picture.shape[:2])]
        cells = sum(
            (coverage(mask, *grid) for mask in masks if mask is not None), np.zeros(grid, np.float32)
        ).clip(0, 1)
        shade = np.asarray(
            Image.fromarray(np.uint8(255 * cells)).resize((width, panel_height), Image.Resampling.NEAREST)
        )[:, :, None]
        small = np.asarray(Image.fromarray(picture).resize((width, panel_height), Image.Resampling.BICUBIC))
        pair = np.concatenate(
            [draw_regions(small, masks, tags), np.uint8(small * (0.15 + 0.85 * (shade / 255)))]
        )
        panels.append((f"frame {frame}", Image.fromarray(pair)))
    numbers = iter(range(1, len(sample.objects) + 1))
    lines = [": ".join(map(str, sample.place)), sample.media or "text only", ""]
    for question, answer in sample.turns:
        question = re.sub(REGION_TAG, lambda tag: f"<region {next(numbers)}>", question)
        for who, text in (("Q", question), ("A", answer)):
            lines += textwrap.wrap(f"{who}: {' '.join(text.split())}", TEXT_WIDTH // 7)
    height = max(2 * panel_height if panels else 0, LINE * len(lines)) + 2 * LINE
    row = Image.new("RGB", (sum(p.width + 6 for _, p in panels) + TEXT_WIDTH, height), "white")
    pen, left = ImageDraw.Draw(row), 6
    for name, panel in panels:
        pen.text((left, 2), name, fill="black", font=ImageFont.load_default(12))
        row.paste(panel, (left, LINE))
        left += panel.width + 6
    pen.text(
        (left + 6, LINE), "\n".join(lines), fill="black", font=ImageFont.load_default(12), spacing=LINE - 12
    )
    return row


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Checks data files the way training reads them. Exit status 1: there are problems."
    )
    add = parser.add_argument
    add("files", nargs="+", help="data files: JSON arrays or JSONL")
    add("--media", help="folder that media paths are relative to (default: each data file's own)")
    add(
        "--outside-paths",
        action="store_true",
        help="also take media paths that are absolute or climb out of that folder",
    )
    add("--structure-only", action="store_true", help="do not open media, do not decode masks")
    add("--problems", metavar="JSONL", help="write every problem to this file")
    add("--preview", metavar="PNG", help="draw some of the samples that are right")
    add("--workers", type=int, default=2, help="processes that read (default: 2)")
    add("--timeout", type=float, default=60, help="seconds that reading one sample may take (default: 60)")
    add(
        "--model",
        default="tiny",
        help="whose tokens are counted: tiny, or a name or folder as for train.py (default: tiny)",
    )
    for field in fields(Settings):
        add("--" + field.name.replace("_", "-"), type=int, help="as for train.py")
    options = parser.parse_args(argv)

    import model  # here, because data stands alone but for this

    samples = read_samples(options.files, options.media, options.outside_paths)
    settings = {f.name: getattr(options, f.name) for f in fields(Settings)}
    processor = model.load_processor(options.model, sample_texts(samples), **settings)
    dataset = ReferringDataset(samples, processor, timeout=None)  # its process is killed instead
    findings, right = check(samples, dataset, options)
    findings.report(len(samples))
    if options.preview and right.any():
        candidates = evenly(np.flatnonzero(right), 200)
        with_objects = [i for i in candidates if samples[int(i)].objects]
        save_picture(preview(dataset, evenly(with_objects or candidates, 5)), options.preview)
    return 1 if findings.problems else 0


if __name__ == "__main__":
    import data  # under its own name, so that model.py and this file mean the same DataError

    try:
        raise SystemExit(data.main())
    except data.DataError as error:
        raise SystemExit(f"data error: {error}") from None
