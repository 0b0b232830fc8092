"""Data: from a JSON file with media and masks to one batch of tensors.

    data.json --read_samples--> Sample --ReferringDataset--> encoded sample --collate--> batch
                                         |-- open_media     the frames that are needed, decoded once
                                         |-- visible_masks  RLE or polygons -> checked RLE -> mask (H, W)
                                         |-- window         mask (H, W) -> the part of the frame to encode
                                         |-- coverage       mask (H, W) -> cells (gh, gw)
                                         `-- processor      text, placeholders, token ids, patches (model.py)

A *view* is what is encoded as one picture: a whole frame, or a window around an object. A *cell* is one
visual token, and a view is a grid of (gh, gw) cells. *Coverage* is the share of a cell's area that lies
inside the mask. The model never sees a mask at pixel resolution: it averages cells, weighted by coverage.

Coordinates are (x, y) in pixels in the data file; arrays are (height, width). A frame index is a 0-based
position in the source video, in the order in which frames are shown. Every complaint about the user's data is
a DataError, which names file, sample and field, what was expected and what was found.
`python train.py --data data.json --check` reads all samples, and lists what is wrong with them.
"""

import hashlib
import json
import math
import os
import re
import signal
import struct
import threading
from bisect import bisect_right
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate, count
from typing import NamedTuple

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

IGNORE_INDEX = -100  # the label of a token that is not supervised; torch's cross_entropy skips it
REGION_TAG = "<region>"  # what a question in the data file writes for an object
MEDIA_TAG = re.compile(r"\n?<(?:video|image)>\n?")


class DataError(ValueError):
    """A complaint about the user's data. args: the reason, then its places (file, sample, field)."""

    def __str__(self):
        return ": ".join((*self.args[1:], self.args[0]))


@contextmanager
def within(*places):
    """Adds places in front of those of every DataError that passes through."""
    try:
        yield
    except DataError as error:
        raise DataError(error.args[0], *places, *error.args[1:]) from None


def expect(condition, expected, found):
    """Raises a DataError that says what was expected and what was found, unless condition holds."""
    if not condition:
        raise DataError(f"expected {expected}, found {shorten(found)}")


# ---- samples ----
@dataclass(frozen=True)
class Sample:
    """One checked entry of a data file:

    {"id": 0, "video": "videos/a.mp4",             # or "image": "images/a.jpg"; neither: text only
     "conversations": [{"from": "human", "value": "<video>\\nWhat is <region> doing?"},
                       {"from": "gpt", "value": "It runs."}],
     "annotation": [{"36": {"segmentation": ...}}]}  # of each <region> tag: frame index -> RLE or polygons
    """

    place: tuple[str, ...]  # how an error names this sample: file and sample, or the media
    id: object
    media: str | tuple[str, ...] | None  # path of a file or folder, or paths of frames; None: text only
    turns: list[tuple[str, str]]  # (question, answer); the first question holds the media tag
    objects: list[dict[int, object]]  # {frame index: segmentation} for each <region> tag, in order
    size: tuple[int, int] | None  # (height, width) that polygons are drawn on; None: the frame's own


def read_samples(paths, media=None):
    """Returns a sequence of Sample, each parsed when it is accessed (see parse_sample for the checks).

    paths: one or several, each a JSON array or JSONL. media: the folder that media paths are relative to
    (default: each file's own). Raises DataError, here if a file as a whole cannot be read, or on access.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    return Samples([os.fspath(path) for path in paths], media and os.fspath(media))


# ---- masks ----
def decode_mask(segmentation, height, width):
    """Decodes a segmentation, as to_rle takes it, to uint8 (H, W) of 0 and 1. Raises DataError."""
    return coco_mask.decode(to_rle(segmentation, height, width))


def to_rle(segmentation, height, width):
    """Checks COCO RLE (compressed or a list of runs), or one or more polygons. Returns pycocotools' RLE.

    height, width: the frame, in pixels, on which polygons are drawn. RLE may have another resolution of the
    same shape, which the mask then has, too. Everything is checked first, because pycocotools decodes runs
    that fall short of h * w into stale memory, and hangs on a polygon with NaN or 1e30. Raises DataError.
    """
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        expect(isinstance(size, list) and is_size(size), f"size: [height, width], {MAX_PIXELS} at most", size)
        check_same_shape(size, (height, width), "mask")
        runs = rle_runs(counts) if isinstance(counts, str) else counts
        valid = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
        expect(valid, "counts: a string, or a list of run lengths, whole numbers from 0", counts)
        h, w = size
        expect(sum(runs) == h * w, f"run lengths that sum to {h} * {w} = {h * w}", sum(runs))
        return coco_mask.frPyObjects({"size": size, "counts": runs}, h, w)
    expect(isinstance(segmentation, list) and segmentation, "RLE or polygons", segmentation)
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    for polygon in polygons:
        valid = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        valid = valid and all(type(number) in (int, float) for number in polygon)
        expect(valid, "[x1, y1, x2, y2, ...]: numbers of 3 points at least (a box has 4 corners)", polygon)
        for axis, side, numbers in (("x", width, polygon[0::2]), ("y", height, polygon[1::2])):
            least, most = min(numbers), max(numbers)
            inside = all(-EDGE <= number <= side + EDGE for number in numbers)  # False for NaN
            frame = f"the {width}x{height} frame (if it is drawn on another size: give height and width)"
            expect(inside, f"a polygon inside {frame}", f"{axis} from {least} to {most}")
    numbers = [number for polygon in polygons for number in polygon]
    is_share = max(numbers) <= 1 and any(number % 1 for number in numbers)
    expect(not is_share, "polygons in pixels", f"numbers up to {max(numbers)}")
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def window(mask, sides, height, width):
    """The part of a frame around an object: (top, bottom, left, right) in whole pixels, the ends exclusive.

    A square with the centre of the object's box, so many times as long as the box's longer side. It is moved
    to lie inside the frame, and cut where it is longer than the frame. (VideoRefer has no windows: it encodes
    whole frames.) mask: uint8 (H, W), not empty, at any resolution. height, width: the frame's, in pixels.
    """
    top, bottom, left, right = mask_bounds(mask)
    rows, columns = mask.shape
    # The pixels of the frame that the box touches.
    top, bottom = top * height // rows, math.ceil(bottom * height / rows)
    left, right = left * width // columns, math.ceil(right * width / columns)
    side = sides * max(bottom - top, right - left)
    part = []
    for start, end, limit in ((top, bottom, height), (left, right, width)):
        length = min(side, limit)
        first = (start + end - length) // 2  # the square's centre is the box's
        first = min(max(first, 0), limit - length)
        part += [first, first + length]
    return tuple(part)


def coverage(mask, gh, gw, part=None, size=None):
    """The share of each cell that lies inside the mask: uint8 (H, W) of 0 and 1 -> float32 (gh, gw).

    The cells divide the whole picture, or part: (top, bottom, left, right) in pixels of a picture that has
    this size (height, width). The share is exact, whatever the mask's resolution: a pixel that a border cuts
    counts by its parts, so that no object is too small to be seen. (VideoRefer resizes masks bilinearly
    without antialiasing and keeps what is above 0, which loses small objects.)
    """
    height, width = size or mask.shape
    top, bottom, left, right = part or (0, height, 0, width)
    rows = _overlap(gh, top, bottom, height, mask.shape[0])
    columns = _overlap(gw, left, right, width, mask.shape[1])
    area = (bottom - top) * (right - left) * mask.size / (height * width)  # of part, in the mask's pixels
    # The mask's bounding box, outside of which it adds nothing.
    top, bottom, left, right = mask_bounds(mask)
    inside = torch.from_numpy(mask[top:bottom, left:right]).float()
    rows, columns = rows[:, top:bottom], columns[:, left:right]
    pixels = (rows.float() @ inside).double() @ columns.T  # (gh, gw), the pixels of the mask in each cell
    return (pixels * (gh * gw / area)).clip(0, 1).float().numpy()


@lru_cache(maxsize=16)
def _overlap(cells, start, end, side, pixels):
    """float64 (cells, pixels): how much of each pixel of a mask's side lies in each cell.

    side: the frame's length, and pixels: the mask's, along one axis. Equal cells divide the frame from start
    to end.
    """
    i = torch.arange(cells + 1, dtype=torch.float64)[:, None]
    edges = (start * cells + (end - start) * i) * pixels / (cells * side)  # (cells + 1, 1), in pixels
    left = torch.arange(pixels)  # where each pixel begins
    return (torch.minimum(edges[1:], left + 1) - torch.maximum(edges[:-1], left)).clip(min=0)


def mask_bounds(mask):
    """uint8 (H, W) -> its bounding box (top, bottom, left, right) in pixels, the ends being exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return 0, 0, 0, 0
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def mask_box(mask):
    """uint8 (H, W), not empty -> (cx, cy, w, h) of its bounding box, as fractions of the picture's sides."""
    height, width = mask.shape
    top, bottom, left, right = mask_bounds(mask)
    center = (left + right) / 2 / width, (top + bottom) / 2 / height
    return *center, (right - left) / width, (bottom - top) / height


# ---- encoded samples ----
@dataclass(frozen=True)
class Settings:
    """How media become tokens. Saved beside a trained model, so that evaluation sees what training saw."""

    num_frames: int = 8  # frames sampled evenly from a video
    frame_pixels: int = 32 * 32  # about the most pixels that each of them has after resizing
    region_pixels: int = 64 * 64  # the same for stills: images and annotated frames
    window: int = 2  # side of a window, in lengths of the longer side of the object's box; 0: whole frames
    region_frames: int = 8  # the most annotated frames used of one object, evenly spread
    region_tokens: int = 4  # the most tokens that one object becomes (the paper's u)
    max_length: int = 4096  # the most tokens of a sample; a longer one is an error, never cut


# For a pretrained backbone, in place of the pixels for the tiny model above.
PRETRAINED_PIXELS = {"frame_pixels": 384 * 384, "region_pixels": 384 * 384}

# The fields of an encoded sample, with the values of a text without media. As it stands, with one token and
# no label, it is what a batch holds when all its samples are bad.
EMPTY_SAMPLE = {
    "id": None,
    "input_ids": np.zeros(1, np.int64),  # (L,)
    "labels": np.full(1, IGNORE_INDEX),  # (L,)
    "position_ids": np.zeros((3, 1), np.int64),  # (3, L): time, row and column
    # The media in the prompt.
    "info": None,  # their MediaInfo
    "kind": None,  # "image", "video", or None
    "media_prompt": "",  # the text that stands for them
    "prompt_grid": None,  # (time, rows, columns) in patches
    "seconds_per_pair": 1.0,
    "video_patches": None,  # uint8 (Q, 3 * temporal * patch * patch)
    # Stills: first the image, if it stands in the prompt, then the views of regions.
    "still_patches": [],  # uint8 (P, 3 * patch * patch) of each
    "still_grids": [],  # (rows, columns) of each, in patches
    # Region frames, ordered by object, then time.
    "coverage": [],  # float32 (cells of its still,) of each
    "boxes": [],  # (cx, cy, w, h, t) of each, in [0, 1]
    "region_still": [],  # the index of the still that shows it; regions with the same view share one
    # Objects.
    "object_frames": [],  # how many region frames each of them has
    "region_tokens": [],  # how many placeholder tokens
}


class View(NamedTuple):
    """What is encoded as one picture: a part of a frame, resized."""

    frame: int
    part: tuple  # (top, bottom, left, right) in pixels of the frame, the ends being exclusive
    size: tuple  # (height, width) in pixels that this part is resized to


class ReferringDataset(Dataset):
    """Samples as token ids, patches and coverage. Keys are (epoch, sample index) pairs.

    dataset[epoch, i] depends on (seed, epoch, i) alone. A sample that cannot be used comes back as its
    DataError; raised, it would end the worker. (Whether one takes too long depends on the machine.)

    processor: a model.Processor. single_frame: the probability that an object is cut to one random annotated
    frame (the paper trains on a mix of both modes). cache_bytes: memory for decoded frames.
    """

    def __init__(self, samples, processor, single_frame=0.0, seed=0, cache_bytes=64 << 20):
        self.samples, self.processor, self.settings = samples, processor, processor.settings
        self.single_frame, self.seed = single_frame, seed
        self.cache, self.cache_bytes, self.used_bytes = {}, cache_bytes, 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, i = key
        try:
            return self.encode(self.samples[i], np.random.default_rng((self.seed, epoch, i)))
        except DataError as error:
            return error

    def encode(self, sample, rng, for_generation=False):
        """Returns a dict with the fields of EMPTY_SAMPLE. Raises DataError with the sample's place.

        for_generation: stop where the last answer would begin.
        """
        with within(*sample.place), time_limit():
            encoded = EMPTY_SAMPLE | {"id": sample.id}
            if sample.media:
                encoded |= self._encode_media(sample, rng)
            return encoded | self.processor.encode(sample.turns, encoded, for_generation)

    def _encode_media(self, sample, rng):
        """Returns the fields of an encoded sample that show its image or video, and its objects."""
        media, processor = self.media_of(sample), self.processor
        info, depth, patch = media.info, processor.temporal_patch_size, processor.patch_size

        # The regions: where they are in which view.
        objects = self.choose_objects(sample, info, rng)
        views, coverages, boxes = [], [], []
        for masks in objects:
            for frame, mask in masks.items():
                view, cells = self.region_view(frame, mask, info)
                views.append(view)
                coverages.append(cells.ravel())
                boxes.append((*mask_box(mask), frame / max(info.num_frames - 1, 1)))

        # The image, or the frames of the video, that stand in the prompt.
        sampled = evenly(range(info.num_frames), self.settings.num_frames)
        size_of = processor.still_size if info.is_image else processor.frame_size
        size = size_of(info.height, info.width)
        in_prompt = [View(frame, (0, info.height, 0, info.width), size) for frame in sampled]

        stills = in_prompt + views if info.is_image else views
        stills = list(dict.fromkeys(stills))  # each once
        pictures = self._read_pictures(sample.media, media, in_prompt + views)
        encoded = {
            "info": info,
            "kind": "image" if info.is_image else "video",
            "prompt_grid": (math.ceil(len(sampled) / depth), size[0] // patch, size[1] // patch),
            "still_patches": [processor.patches(pictures[view][None], 1) for view in stills],
            "still_grids": [(view.size[0] // patch, view.size[1] // patch) for view in stills],
            "coverage": coverages,
            "boxes": boxes,
            "region_still": [stills.index(view) for view in views],
            "object_frames": [len(masks) for masks in objects],
            "region_tokens": [min(len(masks), self.settings.region_tokens) for masks in objects],
        }
        cells = math.prod(size) // processor.factor**2
        if info.is_image:
            return encoded | {"media_prompt": processor.image_prompt(cells)}
        return encoded | {
            "media_prompt": processor.video_prompt([media.times[frame] for frame in sampled], cells),
            "video_patches": processor.patches(np.stack([pictures[view] for view in in_prompt]), depth),
            # Qwen2.5-VL spaces its position ids by this, as its own processor counts it.
            "seconds_per_pair": depth * info.num_frames / (len(sampled) * info.fps),
        }

    def choose_objects(self, sample, info, rng):
        """Returns the masks used of each object: {frame: uint8 (H, W)} in order of time, none empty."""
        objects = []
        for i, segmentations in enumerate(sample.objects):
            with within(f"object {i}"):
                visible = visible_masks(segmentations, info, sample.size or (info.height, info.width))
            frames = [*visible]
            is_single = rng.random() < self.single_frame
            chosen = [frames[rng.integers(len(frames))]] if is_single else frames
            chosen = evenly(chosen, self.settings.region_frames)
            objects.append({frame: coco_mask.decode(visible[frame]) for frame in chosen})
        return objects

    def region_view(self, frame, mask, info):
        """Returns the View that is encoded for a region frame, and the coverage of its cells (gh, gw)."""
        size, part = (info.height, info.width), (0, info.height, 0, info.width)
        view = View(frame, part, self.processor.still_size(*size))
        if self.settings.window:
            part = top, bottom, left, right = window(mask, self.settings.window, *size)
            view = View(frame, part, self.processor.window_size(bottom - top, right - left))
        gh, gw = (side // self.processor.factor for side in view.size)
        return view, coverage(mask, gh, gw, part, size)

    def media_of(self, sample):
        """Returns the opened media of a sample (see open_media)."""
        media = self.cache.get(sample.media)
        if media is None:
            media = self._keep(sample.media, open_media(sample.media))
        if sample.size is not None:
            check_same_shape(sample.size, (media.info.height, media.info.width), "height and width")
        return media

    def _read_pictures(self, path, media, views):
        """Returns {view: uint8 (*view.size, 3)}. A frame is decoded once for all its views."""
        pictures = {view: self.cache.get((path, view)) for view in views}
        missing = [view for view in pictures if pictures[view] is None]
        frames = media.read({view.frame for view in missing}) if missing else {}
        for view in missing:
            top, bottom, left, right = view.part
            part = Image.fromarray(frames[view.frame][top:bottom, left:right])
            resized = part.resize(view.size[::-1], Image.Resampling.BICUBIC)
            pictures[view] = self._keep((path, view), np.asarray(resized))
        return pictures

    def _keep(self, key, value):
        """Caches opened media and resized frames, so that a small data set is decoded once. When the memory
        is full, all is forgotten: of a large data set in random order, little would be found again.
        """
        self.used_bytes += value.nbytes + 200  # 200: about what the key and the entry weigh
        if self.used_bytes > self.cache_bytes:
            self.cache, self.used_bytes = {}, value.nbytes + 200
        self.cache[key] = value
        return value


def visible_masks(segmentations, info, size):
    """Checks all masks of an object. Returns {frame: RLE} in order of time, without empty ones (hidden)."""
    frames, visible = sorted(segmentations), {}
    most = f"frame indices below {info.num_frames}, the number of frames"
    expect(frames[-1] < info.num_frames, most, frames[-1])
    for frame in frames:
        with within(f"frame {frame}"):
            rle = to_rle(segmentations[frame], *size)
        if coco_mask.area(rle):
            visible[frame] = rle
    expect(visible, "a mask that is not empty on at least one frame", frames)
    return visible


def evenly(items, most):
    """At most so many of the items (a sequence, not empty), evenly spread from the first to the last."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int)]


# ---- batches ----
def collate(samples, processor, for_generation=False):
    """Joins encoded samples to one batch (a dict). Samples that are DataErrors are left out of it.

    A batch to learn from is one row of tokens without padding. For generation the samples are rows, padded on
    the left. Every index is made here, because a GPU that has to ask the CPU for one stands still meanwhile.

    B samples, L tokens in a row, S supervised tokens, P and Q patches, C cells, V visual tokens, T region
    tokens, O objects, R region frames, M cells of all region frames.

        errors           for each of the given samples its DataError or None
        ids              list of B
        input_ids        int64 (1, L), or (B, L) for generation
        position_ids     int64 (3, 1, L) or (3, B, L): time, row and column, as the backbone counts them
        attention        which tokens see each other, as the LLM's keyword arguments
        target_index     int64 (S,), where the next token is supervised (not for generation)
        targets          int64 (S,), these next tokens (not for generation)
        still_patches    uint8 (P, 3 * patch * patch): images that stand in prompts, then views of regions
        video_patches    uint8 (Q, 3 * temporal * patch * patch)
        tower            grids and indices of all these patches, as the vision tower's keyword arguments
        prompt_cells     int64 (V,), the cells of images and videos, which stand in prompts
        visual_index     int64 (V,), the tokens that they take the place of (all rows in one)
        region_index     int64 (T,), the tokens that regions take the place of
        regions          what the region encoder reads beside the cells:
            coverage         float32 (M,), the grids of all region frames, ordered by object, then time
            coverage_start   int64 (R + 1,), where each of these grids begins
            frame_start      int64 (R,), the cell where the still of each region frame begins
            boxes            float32 (R, 5), (cx, cy, w, h, t) of each mask in [0, 1]
            object_frames    list of O ints, how many region frames an object has
            region_tokens    list of O ints, how many placeholder tokens it has; in all T
    """
    errors = [sample if isinstance(sample, DataError) else None for sample in samples]
    samples = [sample for sample in samples if not isinstance(sample, DataError)] or [EMPTY_SAMPLE]
    batch = {"errors": errors, "ids": [sample["id"] for sample in samples]}
    batch |= _join_tokens(samples, processor, for_generation)

    # The tower encodes the images that stand in prompts, then the views of regions, then the videos.
    images = [(row, 0) for row, sample in enumerate(samples) if sample["kind"] == "image"]
    stills = [(row, i) for row, sample in enumerate(samples) for i in range(len(sample["still_patches"]))]
    stills = list(dict.fromkeys(images + stills))  # each once
    videos = [sample for sample in samples if sample["kind"] == "video"]
    patches = [samples[row]["still_patches"][i] for row, i in stills]
    grids = [(1, *samples[row]["still_grids"][i]) for row, i in stills]
    grids += [video["prompt_grid"] for video in videos]
    patches_of_cell = processor.merge_size**2
    if not grids:
        # The tower runs even without media, then for one black cell, because ranks wait for each other.
        patches = [np.zeros((patches_of_cell, 3 * processor.patch_size**2), np.uint8)]
        grids = [(1, processor.merge_size, processor.merge_size)]
    batch["still_patches"] = _concatenate(patches, np.uint8)
    batch["video_patches"] = _concatenate([video["video_patches"] for video in videos], np.uint8)
    batch["tower"] = processor.tower_indices(grids)
    starts = [0, *accumulate(len(still) // patches_of_cell for still in patches)]  # of stills, in cells
    image_cells, video_cells = starts[len(images)], len(batch["video_patches"]) // patches_of_cell
    batch["prompt_cells"] = torch.cat([torch.arange(image_cells), torch.arange(video_cells) + starts[-1]])

    start_of = dict(zip(stills, starts))
    region_stills = [(row, i) for row, sample in enumerate(samples) for i in sample["region_still"]]
    coverages = [cells for sample in samples for cells in sample["coverage"]]
    boxes = [box for sample in samples for box in sample["boxes"]]
    batch["regions"] = {
        "coverage": _concatenate(coverages, np.float32),
        "coverage_start": torch.tensor([0, *accumulate(map(len, coverages))]),
        "frame_start": torch.tensor([start_of[still] for still in region_stills], dtype=torch.long),
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 5),
        "object_frames": [frames for sample in samples for frames in sample["object_frames"]],
        "region_tokens": [tokens for sample in samples for tokens in sample["region_tokens"]],
    }

    # Which tokens, all rows counted in one go, are placeholders of images, of videos, and of regions.
    tokens, config = batch["input_ids"].flatten(), processor.config
    token_ids = config.image_token_id, config.video_token_id, processor.region_token_id
    in_images, in_videos, in_regions = (tokens.eq(token_id).nonzero()[:, 0] for token_id in token_ids)
    found = len(in_images), len(in_videos), len(in_regions)
    expected = image_cells, video_cells, sum(batch["regions"]["region_tokens"])
    assert found == expected, f"{found} placeholders of images, videos and regions for {expected} tokens"
    return batch | {"visual_index": torch.cat([in_images, in_videos]), "region_index": in_regions}


def _join_tokens(samples, processor, for_generation):
    """Returns the part of the batch that is made of tokens: rows that are padded on the left, or one row."""
    ids = [torch.from_numpy(sample["input_ids"]) for sample in samples]
    positions = [torch.from_numpy(sample["position_ids"]) for sample in samples]
    if for_generation:
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        return {
            # Filled up with any id that is no placeholder; the mask hides it.
            "input_ids": pad(ids, padding_value=processor.config.vision_start_token_id),
            "position_ids": pad([row.T for row in positions]).permute(2, 0, 1),
            "attention": {"attention_mask": pad([torch.ones_like(row) for row in ids])},
        }
    lengths = [len(row) for row in ids]
    labels = torch.cat([torch.from_numpy(sample["labels"]) for sample in samples])
    # The token before a supervised one predicts it. A sample never begins with a supervised token.
    target_index = labels[1:].ne(IGNORE_INDEX).nonzero()[:, 0]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "attention": {"cu_seq_lens_q": bounds, "max_length_q": max(lengths), "sample_lengths": lengths},
        "target_index": target_index,
        "targets": labels[target_index + 1],
    }


def _concatenate(arrays, dtype):
    """The arrays, joined along the first axis as one tensor; of length 0 if there are none."""
    return torch.from_numpy(np.concatenate(arrays) if arrays else np.zeros(0, dtype))


# ---- A first reading may end here. What follows makes the above right on real data, and shows it. ----
def sample_texts(samples, limit=10_000):
    """The texts of the first samples, from which the tiny model's tokenizer learns its words."""
    for i in range(min(limit, len(samples))):
        with suppress(DataError):  # it is reported when the sample is used
            for turn in samples[i].turns:
                yield from turn


# ---- the index of a data file ----
INDEX_FORMAT = 3  # to be raised when the content of an index file means something else
CHUNK = 1 << 24  # bytes of a file that are in memory at a time, unless a sample is longer
MAX_SAMPLE = 1 << 28  # bytes; what does not parse within so many is reported as a syntax error


class Samples:
    """What read_samples returns. Each access reads a few bytes, where the index says that the sample is."""

    def __init__(self, paths, media):
        self.paths, self.media = paths, media
        self.versions, self.spans = zip(*map(open_index, paths))
        self.first = [0, *accumulate(map(len, self.spans))]  # the index of each file's first sample

    def __len__(self):
        return self.first[-1]

    def __getitem__(self, i):
        entry, place, media, position = self.read(i)
        with within(*place):
            return parse_sample(entry, place, media, position)

    def read(self, i):
        """Returns the i-th JSON value, place (file, sample name), media folder and position in the file."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        k = bisect_right(self.first, i) - 1
        path, position = self.paths[k], i - self.first[k]
        start, end = self.spans[k][position].tolist()
        name = f"sample {position}"
        with readable("a readable file with ordinary JSON", path, name), open(path, "rb") as file:
            expect(file_version(file) == self.versions[k], "the file as it was when it was opened", "changes")
            file.seek(start)
            entry = json.loads(file.read(end - start), object_pairs_hook=_to_dict)
            json.dumps(entry, ensure_ascii=False).encode()  # raises a ValueError for half a surrogate pair
        if isinstance(entry, dict) and "id" in entry:
            name += f" (id {shorten(entry['id'])})"
        media = os.path.dirname(path) if self.media is None else self.media
        return entry, (path, name), media, position


def _to_dict(pairs):
    """A JSON object as a dict, in which no key may replace an earlier one."""
    entry = dict(pairs)
    expect(len(entry) == len(pairs), "each key once in an object", [key for key, _ in pairs])
    return entry


def file_version(file):
    """What changes when an open file is written to."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def open_index(path):
    """Returns (the data file's version, int64 (samples, 2): where each sample begins and ends, in bytes).

    Finding the samples of a file of gigabytes takes minutes, so the index is saved in the user's cache
    folder, from where all processes map it into memory. Its name depends on the data file's version.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    with readable("a readable file", path), open(path, "rb") as file:
        version = file_version(file)
        key = repr((os.path.realpath(path), version, INDEX_FORMAT)).encode("utf-8", "surrogateescape")
        index = os.path.join(cache, "nanorefer", hashlib.sha256(key).hexdigest()[:24] + ".npy")
        # A missing or damaged index is made below. np.asarray: slices of a np.memmap are slow.
        with suppress(OSError, ValueError, EOFError):
            return version, np.asarray(np.load(index, mmap_mode="r"))
        spans = np.fromiter(_find_samples(file), np.dtype((np.int64, 2)))
    with readable("a cache folder that can be written to (set XDG_CACHE_HOME)", index):
        os.makedirs(os.path.dirname(index), exist_ok=True)
        with open(f"{index}.{os.getpid()}.tmp", "wb") as file:
            np.save(file, spans)
        os.replace(file.name, index)  # another process sees all of it or nothing
    return version, spans


def _find_samples(file):
    """Yields (first byte, last byte + 1) of each element of a JSON array or line of JSONL.

    Every sample is parsed, so that a syntax error is reported before training starts. The parser gets a part
    of the file as Latin-1, where a character is a byte, so its positions are offsets. (What is not UTF-8 is
    an error of its sample, when that is read.)
    """
    # int() would refuse more than 4300 digits by an error of another kind; the values are thrown away.
    decoder = json.JSONDecoder(parse_int=float)
    head = re.match(rb"(?:\xef\xbb\xbf)?\s*(\[?)\s*", file.read(4096))  # UTF-8 may begin with a mark
    # between: the marks that may stand between two values; last: those behind the last one ("": nothing).
    gap, between, last = re.compile(r"[ \t\r]*(\n?)[ \t\r\n]*"), ["\n"], ["\n", ""]
    if head[1]:
        gap, between, last = re.compile(r"[ \t\r\n]*([],]?)[ \t\r\n]*"), [","], ["]"]
    offset, size, line = head.end(), CHUNK, 1 + head[0].count(b"\n")
    while True:
        file.seek(offset)
        text = file.read(size).decode("latin-1")
        is_end, begin = len(text) < size, 0
        expect(offset > head.end() or text[:1] not in ("", "]"), "at least one sample", "none")
        try:
            while True:
                _, end = decoder.raw_decode(text, begin)
                after = gap.match(text, end)
                is_last = after.end() == len(text)
                # Behind a value must come a comma (in JSONL a line break), behind the last one the end.
                is_wrong = after[1] not in (last if is_last else between)
                # The chunk ends behind it, but not the file: 12 may go on as 123.
                is_cut = is_last and not is_end
                if is_wrong or is_cut:  # handled below, as any syntax error is
                    raise json.JSONDecodeError("Expecting the next sample or the end", text, after.end())
                yield offset + begin, offset + end
                if is_last:
                    return
                begin = after.end()
        except json.JSONDecodeError as error:
            if is_end or (begin == 0 and size >= MAX_SAMPLE):
                line += text.count("\n", 0, error.pos)
                place = f"line {line}, byte {offset + error.pos} of the file"
                raise DataError(f"{place}: not valid JSON: {error.msg}") from None
        line += text.count("\n", 0, begin)
        # The chunk may end within this sample: continue with one that begins there, longer if it did before.
        offset, size = offset + begin, CHUNK if begin else 2 * size


# ---- checks of a sample and its masks ----
EDGE = 2  # pixels by which a polygon may reach beyond the frame: COCO's own touch the border
MAX_PIXELS = 1 << 26  # a larger "size" is a typing error or an attack, not a mask
# PIL refuses .heic, of which FFmpeg would show a single tile.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
# Keys of other formats, which say that frames or masks are others than they look like.
UNKNOWN_KEYS = ("mask_ids", "masked_video", "timestamps")


def shorten(value):
    """repr(value), or its beginning."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of more than 4300 digits
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 80 else text[:77] + "..."


def parse_sample(entry, place, media_folder, position):
    """Returns the Sample of one JSON value, whose id is the position if it has none. Raises DataError."""
    expect(isinstance(entry, dict), "a JSON object", entry)
    expect("conversations" in entry, 'a sample with "conversations"', f"the keys {[*entry]}")
    for key in UNKNOWN_KEYS:
        expect(entry.get(key) is None, f"no {key}, a key that is not read and would change the meaning", key)
    media = _parse_media(entry, media_folder)
    with within("conversations"):
        turns = _parse_turns(entry.get("conversations"), has_media=media is not None)
    objects = _parse_objects(entry, media)
    tags = sum(question.count(REGION_TAG) for question, _ in turns)
    expect(tags == len(objects), f"as many {REGION_TAG} tags in questions as objects ({len(objects)})", tags)
    expect(media or not objects, "a video or image for the annotated objects", "neither key")
    size = entry.get("height"), entry.get("width")
    size = None if size == (None, None) else size
    whole = "height and width: whole numbers, whose product is at most"
    expect(size is None or is_size(size), f"{whole} {MAX_PIXELS}", size)
    return Sample(place, entry.get("id", position), media, turns, objects, size)


def _parse_media(entry, media_folder):
    given = {key: entry[key] for key in ("video", "image") if entry.get(key) is not None}
    expect(len(given) <= 1, "a video or an image, not both", given)
    key, value = next(iter(given.items()), ("", None))
    if value is None:
        return None
    names = value if isinstance(value, list) else [value]  # the later published files write ["a.mp4"]
    several = len(names) > 1
    expect(names and (key == "video" or not several), f"{key}: a path (or several frames of a video)", value)
    for name in names:
        expect(isinstance(name, str) and name, f"{key}: one path", name)
        # An image may stand under "video", as in the published example, but not the other way round.
        valid = is_image_path(name) or (key == "video" and not several)
        expect(valid, f"{key}: a file in {' '.join(IMAGE_SUFFIXES)}", name)
    paths = tuple(os.path.join(media_folder, name) for name in names)
    return paths if several else paths[0]


def is_image_path(path):
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def media_name(media):
    """How an error names media: a path, or the first and last of several frame files."""
    if isinstance(media, (list, tuple)) and media:
        return f"{media[0]} to {media[-1]} ({len(media)} frames)"
    return str(media)


def _parse_turns(conversations, has_media):
    """The turns as (question, answer) pairs, stripped. The first question gets a media tag if it has none."""
    expect(isinstance(conversations, list) and conversations, "a list of turns", conversations)
    texts = []  # a question, its answer, and so on
    for i, turn in enumerate(conversations):
        with within(f"turn {i}"):
            expect(isinstance(turn, dict), "an object with from and value", turn)
            speaker, text = turn.get("from"), turn.get("value")
            expect(isinstance(text, str) and text.strip(), "value: a text that is not empty", text)
            if speaker == "gpt" and not texts:
                continue  # an answer without a question teaches nothing
            expected = ("human", "gpt")[len(texts) % 2]
            expect(speaker == expected, f"from: human and gpt in turn, {expected} as turn {i}", speaker)
            expect(not (texts and MEDIA_TAG.search(text)), "a media tag only in the first human turn", text)
            expect(speaker == "human" or REGION_TAG not in text, f"no {REGION_TAG} in an answer", text)
            texts.append(text.strip())
    is_whole = texts and len(texts) % 2 == 0
    expect(is_whole, "human turns, each followed by its gpt answer", conversations[-1])
    tags = len(MEDIA_TAG.findall(texts[0]))
    expect(tags <= 1, "one media tag", texts[0])
    expect(has_media or not tags, "a video or image key for the media tag", texts[0])
    if has_media and not tags:
        texts[0] = "<video>\n" + texts[0]  # either tag stands for the sample's media
    return list(zip(texts[0::2], texts[1::2]))


def _parse_objects(entry, media):
    """The objects' masks: `annotation` [{"36": {"segmentation": SEG}}] or the later `masks` [{"36": SEG}], of
    an image [SEG]. Where the SEG is null or absent, the object is hidden.
    """
    is_image = isinstance(media, str) and is_image_path(media)
    given = {key: entry[key] for key in ("annotation", "masks") if entry.get(key) is not None}
    expect(len(given) <= 1, "annotation or masks, not both", sorted(given))
    name, listed = next(iter(given.items()), ("", []))
    expect(isinstance(listed, list), f"{name}: a list with one entry an object", listed)
    objects = []
    for i, masks in enumerate(listed):
        with within(name, f"object {i}"):
            is_segmentation = isinstance(masks, list) or (isinstance(masks, dict) and "counts" in masks)
            if is_image and name == "masks" and is_segmentation:
                masks = {"0": masks}
            expect(isinstance(masks, dict), "frame index -> mask", masks)
            found = {}
            for key, mask in masks.items():
                with within(f"frame {key[:20]!r}"):
                    # "00010" would be a file's name, often of another frame than number 10.
                    is_position = re.fullmatch("0|[1-9][0-9]{0,8}", key)
                    expect(is_position, "a frame's position (0, 1, 2, ... in order), not its name", key)
                    if name == "annotation" and mask is not None:
                        expect(isinstance(mask, dict), 'an object with "segmentation"', mask)
                        expect("segmentation" in mask or not mask, '"segmentation" (or {}: hidden)', [*mask])
                        mask = mask.get("segmentation")
                    found[int(key)] = mask
            objects.append({frame: mask for frame, mask in found.items() if mask is not None})
            expect(objects[i], "a mask on at least one frame", sorted(found))
    return objects


def rle_runs(counts):
    """The run lengths in a compressed RLE string (COCO's rleFrString), as a list of ints.

    A character holds 5 bits of a number, the lowest first (offset 48; bit 0x20: more characters follow; bit
    0x10 of the last: the number is negative). From the fourth run on, it is the difference to the run two
    before. pycocotools misreads numbers of seven characters.
    """
    bits = np.frombuffer(counts.encode(errors="surrogatepass"), np.uint8).astype(np.int64) - 48
    is_last = bits & 0x20 == 0
    starts = np.flatnonzero(np.append(True, is_last)[:-1])
    lengths = np.diff(starts, append=len(bits))
    valid = ((bits >= 0) & (bits < 64)).all() and is_last[-1:].all() and lengths.max(initial=0) <= 6
    expect(valid, "counts: a compressed RLE string", counts)
    shifts = 5 * (np.arange(len(bits)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((bits & 0x1F) << shifts, starts)
    runs -= (bits[is_last] & 0x10 > 0) * (1 << 5 * lengths)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs.tolist()


def is_size(size):
    """Whether size is a pair of height and width that a mask may have."""
    is_pair = len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    return is_pair and math.prod(size) <= MAX_PIXELS


def check_same_shape(size, frame_size, name):
    """Raises DataError unless two (height, width) have one aspect ratio, up to a pixel of the smaller."""
    (h, w), (frame_h, frame_w) = size, frame_size
    same = abs(w * frame_h - h * frame_w) <= max(h, w, frame_h, frame_w)
    expect(same, f"a {name} of the frame's shape, {frame_w}x{frame_h} (width x height) or scaled", f"{w}x{h}")


# ---- reading files ----
# What libraries raise about files that are missing, broken or of another kind.
FILE_ERRORS = (OSError, ValueError, RecursionError, av.FFmpegError)
FILE_ERRORS += (SyntaxError, struct.error, Image.DecompressionBombError)  # PIL
READ_SECONDS = 240  # for a sample and its media; for drawing outlines, once more


@contextmanager
def readable(expected, *places, errors=FILE_ERRORS):
    """Turns what libraries raise about a file into a DataError of one line. Adds places, as within does."""
    try:
        with within(*places):
            yield
    except (DataError, torch.OutOfMemoryError):  # a ValueError and a RuntimeError, which `errors` may hold
        raise
    except errors as error:
        found = " ".join(str(getattr(error, "strerror", None) or error).split())[:300]
        raise DataError(f"expected {expected}, found: {found}", *places) from error


@contextmanager
def time_limit():
    """Raises DataError if what is done within takes longer than READ_SECONDS.

    A signal interrupts it. Python handles signals in the main thread alone, and once a library's call has
    returned. A call that never returns is left to the DataLoader's timeout (train.read_batches).
    """

    def stop(*_):
        raise DataError(f"expected to be read within {READ_SECONDS} s, found that it was not")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    # Again and again, because a library, or whoever can do without this file, may swallow one.
    signal.setitimer(signal.ITIMER_REAL, READ_SECONDS, READ_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- the inside of a media file ----
# Demuxers that may open a file. FFmpeg's others draw a .txt as a film of letters, or fetch a playlist's URLs.
VIDEO_FORMATS = "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg"
# Here a packet is one shown frame, and decoding can start at a keyframe. VP8 has packets that show nothing.
# Behind each: FFmpeg's filter that lets only parameter sets (SPS, PPS, VPS) pass. drop=1: nothing passes.
SEEKABLE_CODECS = {"h264": "filter_units=pass_types=7-8", "hevc": "filter_units=pass_types=32-34"}
SEEKABLE_CODECS |= {"vp9": "noise=drop=1", "av1": "noise=drop=1"}
UNKNOWN_FPS = 24.0  # of images, and where a file tells no rate; Qwen3-VL's processor assumes the same
MAX_REORDER = 16  # frames that an H.264 or HEVC decoder may hold back to put them in order of presentation
A_VIDEO = "a video that FFmpeg can open and decode"


@dataclass(frozen=True)
class MediaInfo:
    num_frames: int  # frames that are shown
    fps: float  # frames a second, averaged over the file
    height: int  # pixels, as displayed: a phone's portrait video is higher than wide
    width: int
    is_image: bool


def open_media(path):
    """Returns Video or Images, which have the same members: info, a MediaInfo; times, for each frame the
    seconds since the first; and read(indices), which gives {frame index: uint8 (H, W, 3) RGB}.

    path: of a file, or of a folder of images, or a list of paths of images, which keep their order. Frame k
    is the k-th shown, as it is displayed. What cannot be had is a DataError, never another frame.
    """
    if isinstance(path, (list, tuple)):
        expect(path, "at least one frame file", path)
        return Images(path, is_image=False)
    path = os.fspath(path)
    with readable("a media file or a folder of images", path):
        if os.path.isdir(path):
            names = [name for name in os.listdir(path) if is_image_path(name) and not name.startswith(".")]
            expect(names, "images in the folder", "none")
            files = [os.path.join(path, name) for name in sorted(names, key=_natural_order)]
            return Images(files, is_image=False)
        expect(os.path.getsize(path), "a file that is not empty", 0)
    return Images([path], is_image=True) if is_image_path(path) else Video(path)


def _natural_order(name):
    """Sort key that puts img2 before img10; the name itself decides between img2 and img02."""
    parts = re.split(r"([0-9]+)", name)  # texts and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _in_order(indices, info):
    """The indices of frames, rising, each once. Raises DataError if the media have no such frame."""
    for k in indices:
        valid = type(k) is int and 0 <= k < info.num_frames
        expect(valid, f"a frame index from 0 to {info.num_frames - 1}", k)
    return sorted(set(indices))


def _check_size(picture, info, name):
    first, size = (info.height, info.width), picture.shape[:2]
    expect(size == first, f"{name} of the first frame's height and width {first}", size)


# What brings an image of this EXIF orientation upright. (ImageOps.exif_transpose fails on malformed tags.)
T = Image.Transpose
EXIF_TURNS = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
EXIF_TURNS |= {6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}


def _orientation(image):
    """The EXIF orientation of a PIL image, 1 to 8, or None. (PIL turns a TIFF itself.)"""
    return None if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation)


def as_rgb(image):
    """A PIL image as uint8 (H, W, 3). PIL itself clips 16-bit grey at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    expect(image.mode not in ("I", "F"), "a picture of 8 or 16 bits a channel", f"PIL's mode {image.mode}")
    return np.asarray(image.convert("RGB"))


class Images:
    """An image, or the images of a folder or list, in their order: a video without a clock."""

    def __init__(self, files, is_image):
        self.files = [os.fspath(file) for file in files]
        self.nbytes = 150 * len(files)  # about what their paths take in memory, for a cache to count
        self.times = [k / UNKNOWN_FPS for k in range(len(files))]
        with readable("an image that decodes", self.files[0]), Image.open(self.files[0]) as image:
            lies_down = _orientation(image) in (5, 6, 7, 8)
            width, height = reversed(image.size) if lies_down else image.size
        self.info = MediaInfo(len(files), UNKNOWN_FPS, height, width, is_image)

    def read(self, indices):
        with within(media_name(self.files)):
            wanted = _in_order(indices, self.info)
        pictures = {}
        for k in wanted:
            with readable("an image that decodes", self.files[k]), Image.open(self.files[k]) as image:
                turn = EXIF_TURNS.get(_orientation(image))
                pictures[k] = as_rgb(image if turn is None else image.transpose(turn))
                _check_size(pictures[k], self.info, "an image")
        return pictures


class Video:
    """A video file or GIF, read with PyAV.

    Decoding from the first packet and counting the frames that come out is always right. It is slow, so where
    a seek provably leads to the same frames (list_packets), their pts (presentation times) are listed without
    decoding: sorted, they are the times of frame 0, 1, 2, ... To read frame k, decoding starts at the last
    keyframe at or before k, and continues until a frame with the pts of k comes out. If anything about that
    is odd, everything is decoded.

    pts: of each frame, rising; None where frames are counted. keyframes: frames where decoding may start.
    """

    def __init__(self, path):
        self.path = path
        with readable(A_VIDEO, path):
            with open_video(path) as (container, stream):
                rate, time_base = stream.guessed_rate or UNKNOWN_FPS, stream.time_base
                first = next(shown_frames(container, stream), None)
                expect(first, "at least one frame", "none that decodes")
                height, width, _ = as_displayed(first).shape
            with open_video(path) as (container, stream):
                self.pts, self.keyframes = list_packets(container, stream, first)
            times = self.pts
            if self.pts is None:
                with open_video(path) as (container, stream):
                    times = [frame.pts for frame in shown_frames(container, stream)]
        n = len(times)
        self.times = [k / float(rate) for k in range(n)]
        # Times that fall or are missing (joined files) tell nothing. Rising ones tell more than a rate:
        # Matroska's header claims a steady one for any video.
        if n > 1 and None not in times and all(a < b for a, b in zip(times, times[1:])):
            self.times = [float((time - times[0]) * time_base) for time in times]
            rate = (n - 1) / ((times[-1] - times[0]) * time_base)
        self.info = MediaInfo(n, float(rate), height, width, is_image=False)
        self.nbytes = 100 * n  # about what times and pts take

    def read(self, indices):
        with readable(A_VIDEO, self.path):
            wanted, pictures = _in_order(indices, self.info), {}
            if self.pts:
                with suppress(av.FFmpegError):  # some files refuse to be sought in
                    pictures = self._seek(wanted)
            if len(pictures) < len(wanted):
                pictures = self._decode_all(wanted)
            missing = [k for k in wanted if k not in pictures]
            expect(not missing, f"{self.info.num_frames} frames that decode", f"that {missing} do not")
            for k, picture in pictures.items():
                _check_size(picture, self.info, f"frame {k}")
        return pictures

    def _seek(self, wanted):
        """Returns {frame index: picture}; fewer than are wanted if anything is odd."""
        pictures, index, index_of = {}, -1, dict(zip(self.pts, count()))
        with open_video(self.path) as (container, stream):
            needed = {self.pts[k] for k in wanted}
            frames = needed_frames(container, stream, needed)
            for k in wanted:
                keyframe = self.keyframes[bisect_right(self.keyframes, k) - 1]
                has_sought = keyframe > index + MAX_REORDER  # a nearer one is sooner reached by decoding on
                if has_sought:
                    container.seek(self.pts[keyframe], stream=stream)
                    frames = needed_frames(container, stream, needed)
                # Decode up to k. The first frame behind a seek is checked, wherever it is.
                while index < k or has_sought:
                    frame = next(frames, None)
                    index = -1 if frame is None or frame.is_corrupt else index_of.get(frame.pts, -1)
                    # A seek may lead to an earlier keyframe, or (H.264's intra refresh) to other frames.
                    is_elsewhere = index > keyframe or index not in self.keyframes
                    if index < 0 or (has_sought and is_elsewhere):
                        return pictures
                    has_sought = False
                if index == k:
                    pictures[k] = as_displayed(frame)
        return pictures

    def _decode_all(self, wanted):
        pictures, index_of = {}, dict(zip(self.pts or [], count()))
        with open_video(self.path) as (container, stream):
            for number, frame in enumerate(shown_frames(container, stream)):
                k = index_of.get(frame.pts) if self.pts else number
                if k in wanted:
                    pictures[k] = as_displayed(frame)
                if len(pictures) == len(wanted):
                    break
        return pictures


def as_displayed(frame):
    """uint8 (H, W, 3) RGB, turned or mirrored as the file says. Pixels that are not square stay so."""
    picture = frame.to_ndarray(format="rgb24", threads=1)
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix:
        # In rows of three: a player shows the pixel (x, y) at (ax + cy, bx + dy), apart from scale and shift.
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
        x, y = a, d  # negative: to be mirrored
        if abs(b) > abs(a):  # it lies down
            picture, x, y = picture.swapaxes(0, 1), c, b
        picture = picture[:: -1 if y < 0 else 1, :: -1 if x < 0 else 1]
    return np.ascontiguousarray(picture)


@contextmanager
def open_video(path):
    """Yields PyAV's container and its first video stream that is no cover art."""
    # Titles need not be valid UTF-8. PyAV 19 replaces what is not, without being asked.
    options = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    # "file:" keeps FFmpeg from taking a colon in the name for a protocol.
    with av.open(f"file:{path}", options={"format_whitelist": VIDEO_FORMATS}, **options) as container:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        kinds = [stream.type for stream in container.streams]
        expect(streams, "a video stream", f"only {kinds} (or cover art)")
        expect(streams[0].codec_context, "a codec that FFmpeg knows", kinds)
        # PyAV tells what a player cuts off in this text alone, which is empty below level INFO.
        level = av.logging.get_level()
        av.logging.set_level(av.logging.INFO)
        crops = re.findall(r"(?m)^ *(Frame Cropping: .*)", container.dumps_format())
        av.logging.set_level(level)
        expect(not crops, "a video of which a player shows all pixels (no clap, no PixelCrop)", crops)
        # A DataLoader runs a process a core, and one thread is the exact, deterministic way.
        streams[0].thread_count = 1
        yield container, streams[0]


def list_packets(container, stream, first):
    """Returns (pts, keyframes) of a Video in which it is safe to seek, else twice None.

    It is safe if the container stores pts; the file begins with a keyframe, the first frame to be shown; each
    pts occurs once; and parameter sets stand in the header alone, or the same in each keyframe and nowhere
    else (where files were joined, they change). first: the frame that comes out first.
    """
    counted = None, None
    codec, extradata = stream.codec.canonical_name, stream.codec_context.extradata or b""
    if not container.format.name.startswith(("mov,", "matroska,")) or codec not in SEEKABLE_CODECS:
        return counted
    if codec in ("h264", "hevc") and extradata[:1] != b"\1":  # 1: avcC or hvcC. Else there are start codes.
        return counted
    parameter_sets = av.BitStreamFilterContext(SEEKABLE_CODECS[codec], stream)
    all_pts, shown, keyframe_pts, sets_in_keyframes, sets_elsewhere = [], [], [], set(), set()
    for packet in container.demux(stream):
        is_odd = packet.is_corrupt or packet.has_sidedata("new_extradata")
        if is_odd or not (all_pts or packet.is_keyframe):
            return counted
        if packet.size:  # the last packet is empty: it flushes the decoder
            all_pts.append(packet.pts)
            if not packet.is_discard:  # an edit list hides these
                shown.append(packet.pts)
                keyframe_pts += [packet.pts] if packet.is_keyframe else []
            sets = sets_in_keyframes if packet.is_keyframe else sets_elsewhere
            with suppress(av.FFmpegError):  # a damaged packet keeps its place, and does not decode
                sets.add(b"".join(map(bytes, parameter_sets.filter(packet))))
    sets_change = len(sets_in_keyframes) > 1 or any(sets_elsewhere)
    if sets_change or not shown or None in all_pts or len(set(all_pts)) < len(all_pts):
        return counted
    shown.sort()
    if all_pts[0] != min(all_pts) or first.pts != shown[0]:
        return counted
    starts = {shown[0], *keyframe_pts}
    return shown, [k for k, pts in enumerate(shown) if pts in starts]


def shown_frames(container, stream):
    """Yields all frames, as a player shows them: it goes on behind a packet that does not decode."""
    with suppress(av.error.InvalidDataError):  # where a file is cut off
        for packet in container.demux(stream):
            frames = []
            with suppress(av.FFmpegError):
                frames = packet.decode()
            yield from frames


def needed_frames(container, stream, needed):
    """Yields frames; those whose pts are not needed, and to which no other frame refers, may be missing."""
    for packet in container.demux(stream):
        is_needed = packet.pts in needed or stream.codec.canonical_name != "h264"
        stream.codec_context.skip_frame = "DEFAULT" if is_needed else "NONREF"
        yield from packet.decode()


if __name__ == "__main__":
    raise SystemExit("Nothing to run here. To check a data file: python train.py --data FILE --check")
