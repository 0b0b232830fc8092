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
from bisect import bisect_left, bisect_right
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
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
            [0] + [len(index) - 2 for index in self.indices]
        )  # the number of each file's first sample

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
        """-> the i-th JSON value as the file has it, its place (file, sample name), its media folder, its position in the file."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        number = int(np.searchsorted(self.first, i, side="right")) - 1
        (path, media), position = self.files[number], i - int(self.first[number])
        version, (start, end) = self.indices[number][[0, position + 2]].tolist()
        name = f"sample {position}"
        try:
            with open(path, "rb") as file:
                if _version(file) != version:
                    raise DataError(
                        "expected the file as it was when it was opened, found that it has changed",
                        path,
                        name,
                    )
                file.seek(start)
                entry = _DECODER.decode(file.read(end - start).decode())
        except OSError as error:
            raise DataError(f"expected a readable file, found: {error.strerror}", path, name) from None
        except RecursionError:  # the index was made with more of the stack left
            raise DataError(
                "expected JSON of ordinary depth, found brackets nested too deeply to parse", path, name
            ) from None
        if isinstance(entry, dict) and "id" in entry:
            name += f" (id {shorten(entry['id'])})"
        return entry, (path, name), media, position


def _refuse_constant(name):
    raise DataError(f"expected numbers that JSON knows, found {name}")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
_SPACE = re.compile(r"[ \t\r\n]*")
_INDEX_FORMAT = 1  # to be raised when the rows of an index mean something else
_CHUNK = 1 << 24  # bytes of a file that are held at a time
_MAX_ENTRY = 1 << 28  # bytes; what does not parse within so many is taken for a syntax error


def _version(file):
    """What changes when an open file is written to: its size in bytes, and its time of modification in ns."""
    status = os.fstat(file.fileno())
    return [status.st_size, status.st_mtime_ns]


def _open_index(path):
    """-> memory-mapped int64 (2 + samples, 2): the data file's _version; the number of samples and the format of this index; then where
    each sample begins and ends, in bytes.

    It is kept in the user's cache folder (data folders are often read-only), and made anew when the data file has changed.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    kept = os.path.join(
        cache, "nanorefer", hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:24] + ".index"
    )
    with within(path):
        try:
            with open(path, "rb") as file:
                version = _version(file)
                index = _map_index(kept, version)
                if index is not None:
                    return index
                spans = np.fromiter(chain.from_iterable(_spans(file)), np.int64).reshape(-1, 2)
        except OSError as error:
            raise DataError(f"expected a readable file, found: {error.strerror}") from None
        except RecursionError:
            raise DataError(
                "expected JSON of ordinary depth, found brackets nested too deeply to parse"
            ) from None
        except DataError:
            raise
        except ValueError as error:  # int() refuses thousands of digits
            raise DataError(f"expected ordinary numbers, found: {error}") from None
        expect(len(spans), "at least one sample", "none")
    aside = f"{kept}.{os.getpid()}.{time.time_ns()}"
    try:
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        np.concatenate([[version, [len(spans), _INDEX_FORMAT]], spans]).tofile(aside)
        os.replace(aside, kept)
    except OSError as error:
        raise DataError(
            f"expected a cache folder that can be written to (set XDG_CACHE_HOME), found: {error.strerror}",
            kept,
        ) from None
    index = _map_index(kept, version)
    expect(index is not None, f"{path} to stay as it is while its index is made", "that it has changed")
    return index


def _map_index(kept, version):
    """-> the index, as a plain array that still lies on disk (np.memmap is slow to slice), or None where it has to be made (anew)."""
    try:
        index = np.asarray(np.memmap(kept, np.int64, "r")).reshape(
            -1, 2
        )  # one open, one length: another process may replace it now
    except (OSError, ValueError):  # there is none, or a damaged one
        return None
    return index if index[:2].tolist() == [version, [len(index) - 2, _INDEX_FORMAT]] else None


def _spans(file):
    """Yields (first byte, last byte + 1) of each element of a JSON array, or of each line of a JSONL file.

    The whole file is parsed, so that a syntax error is reported before training starts; but it is never held whole.
    """
    begin = 3 if file.read(3) == b"\xef\xbb\xbf" else 0  # past a byte order mark
    file.seek(begin)
    head = file.read(4096)
    first = len(head) - len(head.lstrip())
    if b"".join(head.split()) == b"[]":
        return iter(())
    return (
        _array_spans(file, begin, begin + first + 1)
        if head[first:].startswith(b"[")
        else _line_spans(file, begin)
    )


def _array_spans(file, begin, byte):
    """A window moves over the file, from byte on: what follows a bracket or comma. Where parsing fails in it, it moves on to there,
    and grows if it stood there before."""
    size, last = _CHUNK, False
    while not last:
        file.seek(byte)
        window = file.read(size)
        text, position = (
            window.decode("latin-1"),
            0,
        )  # a character a byte: positions are bytes, and JSON's own characters the same
        try:
            while not last:
                start = _SPACE.match(text, position).end()
                end = _DECODER.raw_decode(text, start)[1]
                after = _SPACE.match(text, end).end()
                if text[after : after + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, after)
                window[start:end].decode()
                yield byte + start, byte + end
                position, last = after + 1, text[after] == "]"
        except UnicodeDecodeError as error:
            raise _syntax_error(file, begin, byte + start + error.start, "not UTF-8") from None
        except json.JSONDecodeError as error:
            if len(window) < size or size > _MAX_ENTRY:  # there is no more text that could mend it
                raise _syntax_error(file, begin, byte + error.pos, f"not valid JSON: {error.msg}") from None
            size = _CHUNK if position else 2 * size
        byte += position
    file.seek(byte)
    while window := file.read(_CHUNK):
        if window.strip(b" \t\r\n"):
            extra = byte + len(window) - len(window.lstrip(b" \t\r\n"))
            raise _syntax_error(file, begin, extra, "not valid JSON: Extra data after ']'")
        byte += len(window)


def _line_spans(file, begin):
    file.seek(begin)
    byte = begin
    for line in file:
        if line.strip(b" \t\r\n"):
            try:
                text = line.decode()
                _DECODER.decode(text)
            except UnicodeDecodeError as error:
                raise _syntax_error(file, begin, byte + error.start, "not UTF-8") from None
            except json.JSONDecodeError as error:
                at = byte + len(text[: error.pos].encode())
                raise _syntax_error(file, begin, at, f"not valid JSON: {error.msg}") from None
            yield byte, byte + len(line)
        byte += len(line)


def _syntax_error(file, begin, byte, reason):
    """-> DataError that tells a byte's line and column, counted in characters from 1; begin: the byte of the first."""
    line, column = 1, 1
    file.seek(begin)
    while begin < byte:
        chunk = np.frombuffer(file.read(min(_CHUNK, byte - begin)), np.uint8)
        begin += len(chunk)
        breaks = np.flatnonzero(chunk == ord("\n"))
        if len(breaks):
            line, column, chunk = line + len(breaks), 1, chunk[breaks[-1] + 1 :]
        column += np.count_nonzero(chunk & 0xC0 != 0x80)  # all but UTF-8's continuation bytes
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


# ------------------------------------------------------------------------------------------------ media: frames of the source

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
# Demuxers that may open a file. FFmpeg has more: one draws a .txt as a film of its letters, playlists fetch URLs.
VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg"
# The codecs where a packet is one shown frame and a keyframe starts anew. Not VP8: its hidden frames are packets too.
INDEXED_CODECS = {"h264", "hevc", "vp9", "av1"}
UNKNOWN_FPS = (
    24.0  # a folder of images has no clock; 24 is what Qwen3-VL's processor assumes for frames without one
)
REORDER = (
    16  # the most frames that an H.264 or HEVC decoder may hold back to put them in order of presentation
)


@dataclass(frozen=True)
class MediaInfo:
    num_frames: int
    fps: float  # frames a second, averaged over the file
    height: int  # pixels, as displayed: a phone's portrait video is higher than wide
    width: int
    is_image: bool


def media_info(path):
    """-> MediaInfo. Decodes one picture at most where packets tell the frames apart (see read_frames), else all of them."""
    return read_media(path, [])[0]


def read_frames(path, indices):
    """-> uint8 (len(indices), H, W, 3) RGB: the frames with these 0-based numbers, in the order asked, repeats allowed.

    Frame k is the k-th shown, in any video, GIF, folder of images or image; H and W are as displayed. Never another frame
    than the one asked for: DataError if it can't be had. Nothing stays open, so any forked or spawned worker may call it.

    Videos are read with PyAV. decord 0.6.0 returns wrong frames in silence: after a seek, in open-GOP H.264/HEVC and MPEG-4
    AVI; even forward from 0, in MPEG-TS (first GOP lost) and past an edit list (last frame repeated). It refuses AV1, hangs
    in workers forked after it was used, and forward it pays for every frame. PyAV can be exact, at the same speed.
    A frame is known by its pts (presentation time): packets are listed without decoding, and decoding starts at the last
    keyframe with a pts at or before the wanted one. So frames shown before a keyframe but stored after it, which decord gets
    wrong, start from the keyframe before. Where packets have no reliable pts, frames are decoded from 0 and counted.
    """
    indices = list(indices)
    info, pictures = read_media(path, indices)
    frames = np.empty((len(indices), info.height, info.width, 3), np.uint8)
    for row, k in enumerate(indices):
        frames[row] = pictures[k]
    return frames


def read_media(path, indices):
    """-> (MediaInfo, {frame number: uint8 (H, W, 3) RGB}); read_frames without the copy that joins the pictures."""
    path = Path(path)
    try:
        return _read_folder_or_file(path, indices)
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise DataError(
            f"{path}: expected a media file or a folder of images, found: {error.strerror}"
        ) from None


def _read_folder_or_file(path, indices):
    if path.is_dir():
        files = [
            f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")
        ]
        if not files:
            raise DataError(f"{path}: expected a folder of images, found none in it")
        return _read_images(path, sorted(files, key=_natural_order), indices, is_image=False)
    if not path.is_file():
        raise DataError(f"{path}: expected a media file or a folder of images, found no such file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: expected a media file, found an empty one")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _read_images(path, [path], indices, is_image=True)
    return _read_video(path, indices)


def _check_indices(path, indices, num_frames):
    """-> the indices as rising int, each once, or DataError."""
    for k in indices:
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 0 <= k < num_frames:
            raise DataError(
                f"{path}: expected frame numbers from 0 to {num_frames - 1}, it has {num_frames}; found {k!r}"
            )
    return sorted({int(k) for k in indices})


def _natural_order(file):
    """Sort key that puts img2 before img10; the name itself decides between img2 and img02."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", file.name)], file.name


def _read_images(path, files, indices, is_image):
    height, width, _ = _load_image(files[0]).shape
    info = MediaInfo(len(files), UNKNOWN_FPS, height, width, is_image)
    pictures = {k: _load_image(files[k]) for k in _check_indices(path, indices, len(files))}
    return info, _of_one_size(pictures, info, name=lambda k: files[k])


def _load_image(file):
    """-> uint8 (H, W, 3) RGB, turned as EXIF says, like Hugging Face's load_image; an animation gives its first picture."""
    try:
        with Image.open(file) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # what PIL raises on bad files
        raise DataError(f"{file}: expected an image, found one that does not decode: {error}") from error


def _of_one_size(pictures, info, name):
    """-> the pictures, or DataError. name(k) says which picture it was."""
    for k, picture in pictures.items():
        if picture.shape[:2] != (info.height, info.width):
            raise DataError(
                f"{name(k)}: expected the first frame's height and width {info.height, info.width}, found {picture.shape[:2]}"
            )
    return pictures


def _open_video(path):
    # "file:" keeps FFmpeg from taking a colon in the name for a protocol.
    return av.open(f"file:{path}", options={"format_whitelist": VIDEO_FORMATS})


def _video_stream(path, container):
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise DataError(
            f"{path}: expected a video stream, found only {[s.type for s in container.streams]} (or cover art)"
        )
    streams[
        0
    ].thread_count = 1  # a DataLoader runs a process a core; and one thread is the exact, deterministic way
    return streams[0]


def _to_rgb(frame, reformatter):
    """Decoded frame -> uint8 (H, W, 3) RGB, as displayed; pixels that aren't square stay so, as in the masks."""
    rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.rot90(rgb, round(frame.rotation / 90))  # both count counterclockwise


def _read_video(path, indices):
    try:
        _check_whole(path)
        info, times, keyframes = _index_video(path)
        wanted = _check_indices(path, indices, info.num_frames)
        if not wanted:
            return info, {}
        try:
            pictures = _decode(path, times, keyframes, wanted, skip=True)
        except av.error.FFmpegError:  # some files refuse to be sought in
            pictures = {}
        if len(pictures) < len(wanted):  # some lead astray: decode again, all from the first packet
            pictures = _decode(path, times, [0], wanted, skip=False)
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(
            f"{path}: expected a video, found what FFmpeg can't open or decode (damaged, cut off, or no "
            f"video): {error.strerror}"
        ) from error
    missing = [k for k in wanted if k not in pictures]
    if missing:
        raise DataError(
            f"{path}: expected {info.num_frames} frames, one a packet, found that {missing} can't be decoded"
        )
    return info, _of_one_size(pictures, info, name=lambda k: f"{path}, frame {k}")


def _check_whole(path):
    """DataError if a Matroska or WebM file is shorter than its header says: FFmpeg reads a cut one without a complaint."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head.startswith(
        b"\x1a\x45\xdf\xa3"
    ):  # EBML: an id, a size, that many bytes; then the Segment, alike
        return

    def read_size(at):  # a size's leading zero bits tell how many bytes it takes
        num_bytes = 9 - int.from_bytes(head[at : at + 1], "big").bit_length()
        unknown = (1 << 7 * num_bytes) - 1  # all ones: a live recording, written before its size was known
        size = int.from_bytes(head[at : at + num_bytes], "big") & unknown
        return at + num_bytes, 0 if size == unknown else size

    at, size = read_size(4)
    at, size = read_size(at + size + 4)
    if path.stat().st_size < at + size:
        raise DataError(
            f"{path}: expected {at + size} bytes, as its header says, found {path.stat().st_size}: it is cut off"
        )


def _index_video(path, count=False):
    """List a video's frames, from the packets alone where they can tell; `count`: by decoding all of them.

    -> (MediaInfo, times: pts of frame 0, 1, 2, ... or None: count frames as they decode,
        keyframes: numbers of the frames where decoding can start, rising, the first is 0)
    """
    pts, keyframe_pts, first = [], [], None
    with _open_video(path) as container:
        stream = _video_stream(path, container)
        # MP4/MOV and Matroska/WebM store a pts with every packet. For AVI and the rest FFmpeg has to guess.
        count = count or not (
            stream.codec.canonical_name in INDEXED_CODECS
            and container.format.name.startswith(("mov,", "matroska,"))
        )
        for num_packets, packet in enumerate(
            container.demux(stream)
        ):  # the last one is empty: it flushes the decoder
            if packet.is_corrupt:
                raise DataError(f"{path}: expected whole packets, found packet {num_packets} cut short")
            if first is None or count:
                frames = packet.decode()
                first = first or next(iter(frames), None)
            if count:
                pts += [frame.pts for frame in frames]
            elif packet.size and not packet.is_discard:  # an edit list discards what it cuts off
                pts.append(packet.pts)
            if packet.is_keyframe:
                keyframe_pts.append(packet.pts)
        indexed = len(stream.index_entries)  # not the header's nb_frames: edit lists make the packets fewer
        if not count and num_packets < indexed:
            raise DataError(
                f"{path}: expected {indexed} packets, as its index says, found {num_packets}: it is cut off"
            )
        fps, time_base = stream.average_rate or UNKNOWN_FPS, stream.time_base
    if first is None:
        raise DataError(f"{path}: expected at least one frame, found none that decodes")
    if not count and (None in pts or len(set(pts)) < len(pts)):
        return _index_video(path, count=True)
    if None not in pts and max(pts) > min(
        pts
    ):  # measured: Matroska's header claims a steady rate for any video
        fps = (len(pts) - 1) / ((max(pts) - min(pts)) * time_base)
    lies_down = round(first.rotation / 90) % 2
    height, width = (first.width, first.height) if lies_down else (first.height, first.width)
    info = MediaInfo(len(pts), float(fps), height, width, is_image=False)
    if count:
        return info, None, [0]
    times = sorted(pts)
    return info, times, sorted({0} | {bisect_left(times, t) for t in keyframe_pts if t <= times[-1]})


def _decode(path, times, keyframes, wanted, skip):
    """-> {frame number: uint8 (H, W, 3) RGB} of those frames in `wanted` (rising) that decode; fewer if anything is odd.

    skip: leave out H.264 frames that are not wanted and that, by the standard, no other frame refers to (most B-frames).
    """
    runs, previous = [(0, [])], 0  # (keyframe to start at, frames to fetch in one go from there)
    for k in wanted:
        keyframe = keyframes[bisect_right(keyframes, k) - 1]
        if keyframe > previous + REORDER:  # nearer by, decoding on costs no more than starting anew
            runs.append((keyframe, []))
        runs[-1][1].append(k)
        previous = k
    number, asked = {t: k for k, t in enumerate(times or [])}, set(wanted)
    pictures, reformatter = {}, VideoReformatter()
    with _open_video(path) as container:
        stream = _video_stream(path, container)
        skip = skip and times is not None and stream.codec.canonical_name == "h264"
        needed = {times[k] for k in wanted} if skip else None
        for keyframe, group in (run for run in runs if run[1]):
            expected, start = None, times[keyframe] if keyframe else None
            for count, frame in enumerate(_frames_from(container, stream, start, needed)):
                k = number.get(frame.pts) if times else count
                if k is None or expected not in (None, k) and not skip or frame.is_corrupt and k in asked:
                    break  # a gap: here packets and frames do not go together one to one
                if k in asked:
                    pictures[k] = _to_rgb(frame, reformatter)
                if k >= group[-1]:
                    break
                expected = k + 1
    return pictures


def _frames_from(container, stream, time, needed):
    """Yield frames from the keyframe with pts `time` on, or from an earlier one where the container's own index leads there;
    None: from the first packet. Yields nothing where that is not safe. needed: the pts of the frames that must come; of the
    others, those that nothing refers to may be missing. None: all must come.

    The keyframe itself must come out first. H.264 with intra refresh has none: it flags packets where a gradual refresh
    begins, and what FFmpeg puts out before the refresh is over was seen to be grey in places.
    """
    if time is not None:
        container.seek(time, stream=stream)
    packets = container.demux(stream)
    start = next(packets)

    def decode(packet):
        stream.codec_context.skip_frame = "DEFAULT" if needed is None or packet.pts in needed else "NONREF"
        return packet.decode()

    frames = (frame for packet in chain([start], packets) for frame in decode(packet))
    if time is not None:
        if not start.is_keyframe or start.pts > time:
            return
        first = next(frames, None)
        if first is None or first.pts != start.pts:
            return
        yield first
    yield from frames


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
