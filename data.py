"""Data: from a JSON file with media and masks to one batch of tensors.

    data.json --read_samples--> Sample --ReferringDataset--> encoded sample --collate--> batch
                                         |
                                         |-- Video, Images  the frames that are needed, decoded once
                                         |-- decode_mask    RLE or polygons -> mask (H, W)
                                         |-- window         mask (H, W) -> the part of the frame to encode
                                         |-- coverage       mask (H, W) -> cells (gh, gw)
                                         `-- Processor      chat template, placeholders, token ids, patches

A *view* is what is encoded as one picture: a whole frame, or a window around an object. A *cell* is one
visual token, and a view is a grid of (gh, gw) cells. *Coverage* is the share of a cell's area that lies
inside the mask. The model never sees a mask at pixel resolution: it averages cells, weighted by coverage
(model.py, kernels.py).

Coordinates are (x, y) in pixels in the data file; arrays are (height, width). A frame index is a 0-based
position in the source video, in the order in which frames are shown. Every complaint about the user's data is
a DataError, which names file, sample and field, what was expected and what was found.

    python data.py data.json --preview preview.png      # reads all samples, and lists what is wrong with them
"""

import argparse
import codecs
import copy
import hashlib
import json
import math
import os
import re
import shutil
import struct
import textwrap
import threading
import uuid
from bisect import bisect_right
from collections import Counter, OrderedDict, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from itertools import accumulate, chain, cycle
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from einops import rearrange
from jinja2 import TemplateError
from PIL import ExifTags, Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from pycocotools import mask as coco_mask
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.utils import cached_file
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

IGNORE_INDEX = -100  # the label of a token that is not supervised; torch's cross_entropy skips it
REGION_TAG = "<region>"  # what a question in the data file writes for an object
REGION_TOKEN = "<|region_pad|>"  # the placeholder token whose embedding the model replaces by a region token
MEDIA_TAG = re.compile(r"\n?<(?:video|image)>\n?")


class DataError(ValueError):
    """A complaint about the user's data: a reason, and its places (file, sample, field), outermost first."""

    def __init__(self, reason, *places):
        super().__init__(reason, *places)  # everything is in args, so that the error survives pickling

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
    """One checked entry of a data file."""

    place: tuple[str, str]  # (file, sample name): how an error names this sample
    id: object
    # The path of a video, image or folder of frames, or the paths of the frames; None: text only.
    media: str | tuple[str, ...] | None
    # (question, answer) pairs. The first question holds the media tag if there are media.
    turns: list[tuple[str, str]]
    # {frame index: segmentation} for each `<region>` tag of all questions, in order.
    objects: list[dict[int, object]]
    size: tuple[int, int] | None  # (height, width) that polygons are drawn on; None: the frame's own
    type: str  # the row of eval.py's table


def read_samples(paths, media=None, outside_paths=False):
    """Returns a sequence of Sample, each parsed when it is accessed (see parse_sample for the checks).

    paths: one path or several, each a JSON array or JSONL. media: the folder that media paths are relative to
    (default: each file's own folder). outside_paths: also accept media paths that leave that folder.
    Raises DataError here if a file as a whole cannot be read, and on access if a sample is wrong.
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = []
    for path in map(os.fspath, paths):
        files.append((path, os.fspath(media) if media else os.path.dirname(path)))
    return Samples(files, outside_paths)


# ---- masks ----


def decode_mask(segmentation, height, width):
    """Decodes COCO RLE (compressed or a list of runs), or one or more polygons, to uint8 (H, W) of 0 and 1.

    height, width: the frame, in pixels, on which polygons are drawn. RLE carries its own size, which may be
    another resolution of the same shape; the mask comes back at that size. Raises DataError for a malformed
    mask or one of another shape.
    """
    return coco_mask.decode(_to_rle(segmentation, height, width))


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
    return *_stretch(top + bottom, side, height), *_stretch(left + right, side, width)


def _stretch(twice_center, length, limit):
    """(start, end) with this centre and length, moved to lie inside (0, limit), and cut if it is longer."""
    length = min(length, limit)
    start = min(max((twice_center - length) // 2, 0), limit - length)
    return start, start + length


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
    top, bottom, left, right = mask_bounds(mask)
    inside = torch.from_numpy(mask[top:bottom, left:right]).float()  # the rest of the mask adds nothing
    rows, columns = rows[:, top:bottom], columns[:, left:right]
    pixels = (rows.float() @ inside).double() @ columns.T  # (gh, gw), the pixels of the mask in each cell
    return (pixels * (gh * gw / area)).clip(0, 1).float().numpy()


@lru_cache(maxsize=16)
def _overlap(cells, start, end, side, pixels):
    """float64 (cells, pixels): how much of each pixel of a mask's side lies in each cell.

    The mask has so many pixels where the frame has `side`, and equal cells divide those from start to end.
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


# ---- text and tokens ----


@dataclass(frozen=True)
class Settings:
    """How media become tokens. Saved beside a trained model, so that evaluation sees what training saw."""

    num_frames: int = 8  # frames sampled evenly from a video
    frame_pixels: int = 32 * 32  # about the most pixels that each of them has after resizing
    region_pixels: int = 64 * 64  # the same for stills: images and annotated frames
    window: int = 2  # a still shows the square of so many sides of its object's box; 0: the whole frame
    region_frames: int = 8  # the most annotated frames used of one object, evenly spread
    region_tokens: int = 4  # the most tokens that one object becomes (the paper's u)
    max_length: int = 4096  # the most tokens of a sample; a longer one is an error, never cut

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 0 if name == "window" else 1
            valid = type(value) is int and value >= least
            expect(valid, f"--{name.replace('_', '-')}: a whole number from {least}", value)


# The pixels for a pretrained backbone, in place of those for the tiny model above. The other
# settings are the same for both.
PRETRAINED_PIXELS = {"frame_pixels": 384 * 384, "region_pixels": 384 * 384}

# The backbone families. All that differs between them is read from a checkpoint's own files, except that
# Qwen2.5-VL has the time in its position ids; the others write it in front of each pair of frames.
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


class Processor:
    """Turns a conversation and its frames into a checkpoint's token ids and patches.

    It stands in for transformers' AutoProcessor, whose video half needs torchvision.
    """

    def __init__(self, tokenizer, image_processor, config, settings):
        family = config.model_type
        expect(family in FAMILIES, f"a model of one of the families {list(FAMILIES)}", family)
        self.tokenizer, self.image_processor, self.config = tokenizer, image_processor, config
        self.settings = settings
        self.timestamps = family != "qwen2_5_vl"
        self.patch_size = config.vision_config.patch_size
        self.temporal_patch_size = config.vision_config.temporal_patch_size
        self.merge_size = config.vision_config.spatial_merge_size
        self.factor = self.patch_size * self.merge_size  # pixels along the side of a cell
        # Limits of a still's area, read from the settings once. Despite their names, both edges are areas.
        self.max_pixels = min(image_processor.size["longest_edge"], settings.region_pixels)
        self.min_pixels = min(image_processor.size["shortest_edge"], self.max_pixels)
        ids = [config.image_token_id, config.video_token_id]
        ids += [config.vision_start_token_id, config.vision_end_token_id]
        tokens = tokenizer.convert_ids_to_tokens(ids)
        # Where its file is missing, transformers makes an empty tokenizer for some families.
        expect(None not in tokens, f"a tokenizer that knows the ids {ids} of config.json", tokens)
        self.image_pad, self.video_pad, self.vision_start, self.vision_end = tokens
        tokenizer.add_tokens([REGION_TOKEN], special_tokens=True)  # does nothing if the tokenizer knows it
        self.region_token_id = tokenizer.convert_tokens_to_ids(REGION_TOKEN)
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.control_tokens = re.compile("|".join(map(re.escape, special)))
        # The backbone without layers, and without memory for weights, because it knows how positions count.
        config = copy.deepcopy(config)
        config.text_config.num_hidden_layers = config.vision_config.depth = 0
        with torch.device("meta"):
            self.empty_backbone = AutoModel.from_config(config)
        self._read_chat_template()

    @classmethod
    def from_pretrained(cls, path, settings):
        """path: a Hugging Face name, or a folder (also one that save_pretrained wrote)."""
        config = AutoConfig.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # Older checkpoints keep the chat template for images and videos in a separate file.
        template = find_file(path, "chat_template.json")
        if template:
            with open(template) as file:
                tokenizer.chat_template = json.load(file)["chat_template"]
        # All families use this class; AutoImageProcessor may choose one that needs torchvision.
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        return cls(tokenizer, image_processor, config, settings)

    def save_pretrained(self, folder):
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def still_size(self, height, width):
        """The (height, width) that a whole image or frame is resized to, by the family's own rule."""
        return self._smart_resize(height, width, self.min_pixels, self.max_pixels)

    def window_size(self, height, width):
        """The (height, width) that a window is resized to: as large as a still may be.

        That is what the families' own rule gives to large pictures, but for its rounding: where a square of
        96 x 96 pixels fits exactly, it gives 80 x 80 to some.
        """
        rows = math.isqrt(self.max_pixels * height // (width * self.factor**2))
        columns = math.isqrt(self.max_pixels * width // (height * self.factor**2))
        return max(1, rows) * self.factor, max(1, columns) * self.factor

    def frame_size(self, height, width):
        """The (height, width) that a video's sampled frames are resized to."""
        return self._smart_resize(height, width, self.factor**2, self.settings.frame_pixels)

    def _smart_resize(self, height, width, min_pixels, max_pixels):
        # Beyond this ratio, transformers' smart_resize raises a plain ValueError.
        fits = max(height, width) <= 200 * min(height, width)
        expect(fits, "a picture at most 200 times as long as wide", (height, width))
        return smart_resize(height, width, self.factor, min_pixels, max_pixels)

    def still_patches(self, picture):
        """uint8 (H, W, 3) -> uint8 (P, 3 * patch * patch). The model repeats it along the temporal patch."""
        return self._patches(picture[None], 1)

    def video_patches(self, frames):
        """uint8 (T, H, W, 3) -> uint8 (P, 3 * temporal * patch * patch), an odd last frame being repeated."""
        missing = -len(frames) % self.temporal_patch_size
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        return self._patches(frames, self.temporal_patch_size)

    def _patches(self, frames, temporal_patch_size):
        """The patches of a cell stand side by side, as the vision tower's patch merger expects them."""
        sizes = dict(a=temporal_patch_size, m=self.merge_size, n=self.merge_size)
        pattern = "(t a) (gh m ph) (gw n pw) c -> (t gh gw m n) (c a ph pw)"
        return rearrange(frames, pattern, ph=self.patch_size, pw=self.patch_size, **sizes)

    def image_prompt(self, cells):
        """The text that stands for an image of this many cells."""
        return self.vision_start + self.image_pad * cells + self.vision_end

    def video_prompt(self, frames, fps, cells):
        """The text that stands for a video.

        frames: indices of the sampled frames. cells: how many one pair of frames has. With timestamps,
        vision_start and vision_end enclose each pair of frames but not the whole video, as in transformers
        4.57 and 5.2, when Qwen3-VL and Qwen3.5 were published (5.10 encloses the whole video, too).
        """
        pair = self.temporal_patch_size
        # Of each pair; an odd last frame is its own partner.
        firsts, lasts = frames[::pair], [*frames[pair - 1 :: pair], frames[-1]]
        if not self.timestamps:
            return self.vision_start + self.video_pad * (cells * len(firsts)) + self.vision_end
        text = ""
        for first, last in zip(firsts, lasts):
            seconds = (first + last) / 2 / fps
            text += f"<{seconds:.1f} seconds>{self.vision_start}{self.video_pad * cells}{self.vision_end}"
        return text

    def encode(self, turns, media, media_prompt, region_tokens, for_generation=False):
        """Encodes a conversation as (input_ids, labels), int64 (L,) each.

        labels are IGNORE_INDEX except for the answers and their end tokens. media: "image", "video" or None.
        media_prompt: the text that stands for it. region_tokens: for each `<region>` tag, how many
        placeholder tokens it becomes. for_generation: stop where the last answer would begin.
        """
        for text in chain.from_iterable(turns):
            found = self.control_tokens.search(text)
            expect(not found, "text without the tokenizer's control tokens", found and found.group())
        texts = self._render(turns, media)
        if media:
            pad = self.image_pad if media == "image" else self.video_pad
            placeholder = self.vision_start + pad + self.vision_end
            expect(placeholder in texts[0], f"a chat template with {placeholder} for media", texts[0])
            texts[0] = texts[0].replace(placeholder, media_prompt, 1)
        if for_generation:
            texts = texts[:-2]
        token_counts = iter(region_tokens)
        input_ids, labels = [], []
        for i, text in enumerate(texts):
            is_answer = i % 2 == 1
            if not is_answer:
                text = re.sub(REGION_TAG, lambda tag: REGION_TOKEN * next(token_counts), text)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            input_ids += ids
            labels += ids if is_answer else [IGNORE_INDEX] * len(ids)
        if len(input_ids) > self.settings.max_length:
            visual = sum(map(input_ids.count, (self.config.image_token_id, self.config.video_token_id)))
            expected = f"expected at most {self.settings.max_length} tokens (max_length)"
            raise DataError(f"{expected}, found {len(input_ids)} ({visual} of them visual)")
        return np.array(input_ids), np.array(labels)

    def _read_chat_template(self):
        """Finds out what stands between a question and its answer: when the answer is to be generated
        (generation_prompt), and when it is there and another question follows (answer_header).

        A template that cannot be used is an error here, not of each sample.
        """
        turns = [("question", "answer")] * 2
        question, answer, *_ = self._messages(turns, None)
        shown = self._apply_template([question])
        asked = self._apply_template([question], add_generation_prompt=True)
        followed = self._apply_template([question, answer, question])
        self.generation_prompt = asked.removeprefix(shown)
        self.answer_header, _, _ = followed.removeprefix(shown).partition("answer")
        valid = asked.startswith(shown) and self.answer_header
        expect(valid, "a chat template that adds the beginning of an answer to a question", asked)
        self._render(turns, None)

    def _render(self, turns, media):
        """Returns a conversation as the chat template writes it, in pieces: a prompt and an answer (with its
        end token) for each turn, and at last what stands behind the last answer.

        Each prompt is the one that generation begins from, without thinking. Qwen3.5's ends with an empty
        <think> block, which its template takes out again when another question follows. Here it stays, as in
        trl's template for training Qwen3.5, so that training shows each turn as it is asked.
        """
        end = self.tokenizer.eos_token
        shown = self._apply_template(self._messages(turns, media))
        # The last answer stands behind the prompt that generation begins from. Let it look like the others.
        before, found_prompt, last = shown.rpartition(self.generation_prompt)
        answer = shorten(turns[-1][1])
        expect(
            found_prompt,
            f"a chat template that puts the answer {answer} behind its prompt, then {end}",
            shown,
        )
        rest = before + self.answer_header + last
        pieces = []
        for _, answer in turns:
            prompt, _, rest = rest.partition(self.answer_header)
            written, found_end, rest = rest.partition(end)
            is_kept = found_end and written.strip() == answer.strip()
            expected = f"a chat template that keeps each answer, and puts the answer {shorten(answer)} behind"
            expect(is_kept, f"{expected} its prompt, then {end}", written)
            pieces += [prompt + self.generation_prompt, written + end]
        return [*pieces, rest]

    def _messages(self, turns, media):
        """A conversation as chat messages. The media tag becomes a part of one, without its line breaks."""
        messages = []
        for question, answer in turns:
            parts = []
            for i, text in enumerate(MEDIA_TAG.split(question)):
                if i > 0:
                    parts.append({"type": media})
                if text:
                    parts.append({"type": "text", "text": text})
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": answer})
        return messages

    def _apply_template(self, messages, **options):
        options |= {"tokenize": False, "enable_thinking": False}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TemplateError as error:
            raise DataError(f"expected a chat that the template accepts, found: {error}") from None

    def positions(self, input_ids, kind, prompt_grid, seconds_per_pair):
        """The position ids of a sample's tokens, int64 (3, L): time, row and column, as the backbone counts.

        prompt_grid: (time, rows, columns) of the image or video in the prompt, in patches.
        """
        ids = torch.from_numpy(input_ids)[None]
        is_image, is_video = ids == self.config.image_token_id, ids == self.config.video_token_id
        positions, _ = self.empty_backbone.get_rope_index(
            ids,
            mm_token_type_ids=is_image.int() + 2 * is_video.int(),
            image_grid_thw=torch.tensor([prompt_grid]) if kind == "image" else None,
            video_grid_thw=torch.tensor([prompt_grid]) if kind == "video" else None,
            second_per_grid_ts=torch.tensor([seconds_per_pair]),  # where the prompt has no timestamps
        )
        return positions[:, 0].numpy()


# ---- encoded samples ----

# The fields of an encoded sample. With these values it is what a batch holds if none of its samples can be
# used: one token, and nothing to learn. A sample of text has the same for media and regions.
EMPTY_SAMPLE = {
    "id": None,
    "input_ids": np.zeros(1, np.int64),  # (L,)
    "labels": np.full(1, IGNORE_INDEX),  # (L,)
    "position_ids": np.zeros((3, 1), np.int64),  # (3, L): time, row and column
    # The image or video that stands in the prompt.
    "kind": None,  # "image", "video", or None
    "media_prompt": "",  # the text that stands for it
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

    @classmethod
    def whole(cls, frame, info, size):
        return cls(frame, (0, info.height, 0, info.width), size)


class ReferringDataset(Dataset):
    """Samples as token ids, patches and coverage. Keys are (epoch, sample index) pairs.

    dataset[epoch, i] depends on (seed, epoch, i) alone, except after time-outs, which depend on load. A
    sample that cannot be used comes back as its DataError. Raised, it would end the worker.

    single_frame: the probability that an object is cut to one random annotated frame (the paper trains on a
    mix of both modes). control: "none", or what eval.py compares with: other masks ("full", "box", "shuffle";
    see replace_masks), or text alone ("blind"; see without_media). cache_bytes: memory for decoded frames.
    timeout: seconds allowed for opening a media file, and again for reading frames from it.
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
        self.single_frame, self.seed, self.control = single_frame, seed, control
        self.cache, self.reader = FrameCache(cache_bytes), TimedReader(timeout)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        epoch, i = key
        try:
            return self.encode(self.samples[i], np.random.default_rng((self.seed, epoch, i)))
        except DataError as error:
            return error

    def question(self, i, turn_index):
        """Encodes sample i up to the question of one turn, without its answer, as eval.py asks it."""
        sample = self.samples[i]
        turns = sample.turns[: turn_index + 1]
        num_regions = sum(question.count(REGION_TAG) for question, _ in turns)
        sample = replace(sample, turns=turns, objects=sample.objects[:num_regions])
        return self.encode(sample, np.random.default_rng((self.seed, i)), for_generation=True)

    def encode(self, sample, rng, for_generation=False):
        """Returns a dict with the fields of EMPTY_SAMPLE. Raises DataError with the sample's place."""
        if self.control == "blind":
            sample = without_media(sample)
        with within(*sample.place):
            encoded = EMPTY_SAMPLE | {"id": sample.id}
            if sample.media:
                media = self.media_of(sample)
                objects = [self.choose_masks(sample, i, media.info, rng) for i in range(len(sample.objects))]
                if self.control != "none":
                    objects = [replace_masks(self, masks, sample, rng) for masks in objects]
                views, regions = self._encode_regions(objects, media.info)
                encoded |= regions | self._encode_media(sample.media, media, views)
            encoded["input_ids"], encoded["labels"] = self.processor.encode(
                sample.turns,
                encoded["kind"],
                encoded["media_prompt"],
                encoded["region_tokens"],
                for_generation,
            )
            encoded["position_ids"] = self.processor.positions(
                encoded["input_ids"], encoded["kind"], encoded["prompt_grid"], encoded["seconds_per_pair"]
            )
        return encoded

    def media_of(self, sample):
        media = self.cache.get(sample.media)
        if media is None:
            media = self.cache.put(sample.media, self.reader.run(sample.media, open_media, sample.media))
        if sample.size is not None:
            _check_same_shape(sample.size, (media.info.height, media.info.width), "height and width")
        return media

    def choose_masks(self, sample, object_index, info, rng):
        """The masks chosen of one object: {frame: uint8 (H, W)} in order of time, none of them empty.

        An empty mask says that the object is hidden there. If one is found, all masks are decoded, and frames
        are chosen anew among those where it is visible.
        """
        segmentations, size = sample.objects[object_index], sample.size or (info.height, info.width)
        is_single = rng.random() < self.single_frame
        with within(f"object {object_index}"):
            frames = self._choose_frames(sorted(segmentations), is_single, rng)
            masks = _decode_masks(segmentations, frames, size, info)
            if all(mask.any() for mask in masks.values()):
                return masks
            masks = _decode_masks(segmentations, sorted(segmentations), size, info)
            visible = [frame for frame, mask in masks.items() if mask.any()]
            expect(visible, "a mask that is not empty on at least one frame", sorted(segmentations))
            return {frame: masks[frame] for frame in self._choose_frames(visible, is_single, rng)}

    def _choose_frames(self, frames, is_single, rng):
        if is_single:
            return [frames[rng.integers(len(frames))]]
        return evenly(frames, self.settings.region_frames)

    def region_view(self, frame, mask, info):
        """Returns the View that is encoded for a region frame, and the coverage of its cells (gh, gw)."""
        processor, size = self.processor, (info.height, info.width)
        if self.settings.window:
            part = top, bottom, left, right = window(mask, self.settings.window, *size)
            view = View(frame, part, processor.window_size(bottom - top, right - left))
        else:
            view = View.whole(frame, info, processor.still_size(*size))
        gh, gw = (side // processor.factor for side in view.size)
        return view, coverage(mask, gh, gw, view.part, size)

    def _encode_regions(self, objects, info):
        """Returns the View of each region frame, and the fields of the encoded sample that say where in their
        views the objects lie. objects: {frame: mask} of each.
        """
        views, coverages, boxes = [], [], []
        for masks in objects:
            for frame, mask in masks.items():
                view, cells = self.region_view(frame, mask, info)
                views.append(view)
                coverages.append(cells.ravel())
                boxes.append((*mask_box(mask), frame / max(info.num_frames - 1, 1)))
        return views, {
            "coverage": coverages,
            "boxes": boxes,
            "object_frames": [len(masks) for masks in objects],
            "region_tokens": [min(len(masks), self.settings.region_tokens) for masks in objects],
        }

    def _encode_media(self, path, media, views):
        """Returns the fields of the encoded sample that show its media: the image or video in the prompt, and
        these views of regions.
        """
        info, processor = media.info, self.processor
        patch, pair = processor.patch_size, processor.temporal_patch_size
        if info.is_image:
            sampled, size = [0], processor.still_size(info.height, info.width)
        else:
            sampled = evenly(range(info.num_frames), self.settings.num_frames)
            size = processor.frame_size(info.height, info.width)
        in_prompt = [View.whole(frame, info, size) for frame in sampled]
        stills = list(dict.fromkeys(in_prompt + views if info.is_image else views))  # each once
        pictures = self._read_pictures(path, media, in_prompt + views)
        encoded = {
            "prompt_grid": (math.ceil(len(sampled) / pair), size[0] // patch, size[1] // patch),
            "still_patches": [processor.still_patches(pictures[view]) for view in stills],
            "still_grids": [(view.size[0] // patch, view.size[1] // patch) for view in stills],
            "region_still": [stills.index(view) for view in views],
        }
        cells = math.prod(size) // processor.factor**2
        if info.is_image:
            return encoded | {"kind": "image", "media_prompt": processor.image_prompt(cells)}
        return encoded | {
            "kind": "video",
            "media_prompt": processor.video_prompt(sampled, info.fps, cells),
            "video_patches": processor.video_patches(np.stack([pictures[view] for view in in_prompt])),
            # Qwen2.5-VL spaces its position ids by this, as its own processor counts it.
            "seconds_per_pair": pair * info.num_frames / (len(sampled) * info.fps),
        }

    def _read_pictures(self, path, media, views):
        """Returns {view: uint8 (*view.size, 3)}.

        A frame that is needed for views that the cache lacks is decoded once, however many these are.
        """
        pictures = {view: self.cache.get((path, view)) for view in views}
        missing = [view for view in pictures if pictures[view] is None]
        frames = {}
        if missing:
            frames = self.reader.run(path, media.read, sorted({view.frame for view in missing}))
        for view in missing:
            top, bottom, left, right = view.part
            part = Image.fromarray(frames[view.frame][top:bottom, left:right])
            resized = part.resize(view.size[::-1], Image.Resampling.BICUBIC)
            pictures[view] = self.cache.put((path, view), np.asarray(resized))
        return pictures


class Questions(ReferringDataset):
    """The samples, encoded up to one of their answers. A key is (sample index, turn index)."""

    def __getitem__(self, key):
        try:
            return self.question(*key)
        except DataError as error:
            return error


def evenly(items, count):
    """At most count of the items (a sequence, not empty), evenly spread from the first to the last."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


# ---- batches ----


def collate(samples, processor, for_generation=False):
    """Joins encoded samples to one batch (a dict). Samples that are DataErrors are left out of it.

    A batch to learn from is one row of tokens: the samples stand one after another, nothing is padded, and
    attention stays within each sample. For generation the samples are rows, padded on the left. Every index
    that the model needs is made here, because a GPU that first has to tell the CPU how many placeholders or
    cells there are stands still until the CPU has answered.

    B samples, L tokens in a row (of which training has one), S supervised tokens, P and Q patches, C cells, V
    visual tokens, T region tokens, O objects, R region frames, M cells of all region frames. Where the batch
    has none of something, its tensor has length 0. attention, tower and regions are dicts.

        errors           for each of the given samples its DataError or None
        ids              list of B
        num_tokens       int, without padding
        input_ids        int64 (1, L), or (B, L) for generation
        position_ids     int64 (3, 1, L) or (3, B, L): time, row and column, as the backbone counts them
        next_position    int64 (B, 1), the position of the token that comes after each sample
        attention        which tokens see each other, as the LLM's keyword arguments
        target_index     int64 (S,), where the next token is supervised; not for generation
        targets          int64 (S,), these next tokens; not for generation
        still_patches    uint8 (P, 3 * patch * patch): images that stand in prompts, then views of regions
        video_patches    uint8 (Q, 3 * temporal * patch * patch)
        tower            grids and indices of all these patches, as the vision tower's keyword arguments
        cell_counts      [int, int, int], the cells of images in prompts, views of regions, videos; sum C
        visual_index     int64 (V,), the tokens that images and videos take the place of (all rows in one)
        region_index     int64 (T,), the tokens that regions take the place of
        regions          what the region encoder reads beside the cells:
            coverage             float32 (M,), the grids of all region frames, ordered by object, then time
            coverage_start       int64 (R + 1,), where each of these grids begins
            frame_start          int64 (R,), the cell where the still of each region frame begins
            boxes                float32 (R, 5), (cx, cy, w, h, t) of each mask in [0, 1]
            object_frames        int64 (O,), how many region frames an object has
            region_tokens        int64 (O,), how many placeholder tokens it has
            num_region_tokens    int, T, the sum of region_tokens
    """
    errors = [sample if isinstance(sample, DataError) else None for sample in samples]
    samples = [sample for sample in samples if not isinstance(sample, DataError)] or [EMPTY_SAMPLE]
    batch = {"errors": errors, "ids": [sample["id"] for sample in samples]}
    batch |= _join_tokens(samples, processor, for_generation)
    media, still_start = _join_media(samples, processor)
    batch |= media
    batch["regions"] = _join_regions(samples, still_start)

    images, _, videos = batch["cell_counts"]
    input_ids, config = batch["input_ids"], processor.config
    image_index = _placeholders(input_ids, config.image_token_id, images, "image")
    video_index = _placeholders(input_ids, config.video_token_id, videos, "video")
    batch["visual_index"] = torch.cat([image_index, video_index])
    num_region_tokens = batch["regions"]["num_region_tokens"]
    batch["region_index"] = _placeholders(input_ids, processor.region_token_id, num_region_tokens, "region")
    return batch


def _placeholders(input_ids, token_id, count, name):
    """Returns int64 (count,): which tokens, all rows counted in one go, are this placeholder."""
    index = input_ids.flatten().eq(token_id).nonzero()[:, 0]
    assert len(index) == count, f"{len(index)} {name} placeholders for {count} rows"
    return index


def _join_tokens(samples, processor, for_generation):
    """Returns the part of the batch that is made of tokens: rows that are padded on the left, or one row."""
    ids = [torch.from_numpy(sample["input_ids"]) for sample in samples]
    positions = [torch.from_numpy(sample["position_ids"]) for sample in samples]
    lengths = [len(row) for row in ids]
    joined = {
        "num_tokens": sum(lengths),
        "next_position": torch.tensor([[row.max() + 1] for row in positions]),
    }
    if for_generation:
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        joined["input_ids"] = pad(ids, padding_value=processor.tokenizer.pad_token_id)
        joined["position_ids"] = pad([row.T for row in positions]).permute(2, 0, 1)
        joined["attention"] = {"attention_mask": pad([torch.ones_like(row) for row in ids])}
        return joined
    labels = torch.cat([torch.from_numpy(sample["labels"]) for sample in samples])
    # The token before a supervised one predicts it. A sample never begins with a supervised token.
    target_index = labels[1:].ne(IGNORE_INDEX).nonzero()[:, 0]
    joined["input_ids"] = torch.cat(ids)[None]
    joined["position_ids"] = torch.cat(positions, dim=1)[:, None]
    joined["attention"] = {
        "cu_seq_lens_q": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_length_q": max(lengths),
        "sample_lengths": lengths,
    }
    return joined | {"target_index": target_index, "targets": labels[target_index + 1]}


def _join_media(samples, processor):
    """Returns (part of the batch, {(row, still): the cell where it begins})."""
    cell = processor.merge_size**2  # patches
    # (row, still): first the images that stand in prompts, then the views of regions.
    images = [(row, 0) for row, sample in enumerate(samples) if sample["kind"] == "image"]
    views = []
    for row, sample in enumerate(samples):
        first_view = 1 if sample["kind"] == "image" else 0
        views += [(row, i) for i in range(first_view, len(sample["still_patches"]))]
    stills, grids, still_start, num_cells = [], [], {}, 0
    for row, i in images + views:
        stills.append(samples[row]["still_patches"][i])
        grids.append((1, *samples[row]["still_grids"][i]))
        still_start[row, i] = num_cells
        num_cells += len(stills[-1]) // cell
    image_cells = sum(map(len, stills[: len(images)])) // cell
    videos = [sample for sample in samples if sample["kind"] == "video"]
    grids += [video["prompt_grid"] for video in videos]
    video_patches = _concatenate([video["video_patches"] for video in videos], np.uint8)
    if not grids:
        # The tower runs even without media, then for one black cell: in training the ranks wait for each
        # other's gradients of every parameter, and under FSDP also for its weights.
        stills = [np.zeros((cell, 3 * processor.patch_size**2), np.uint8)]
        grids, num_cells = [(1, processor.merge_size, processor.merge_size)], 1
    media = {
        "still_patches": _concatenate(stills, np.uint8),
        "video_patches": video_patches,
        "tower": _tower_indices(processor, grids),
        "cell_counts": [image_cells, num_cells - image_cells, len(video_patches) // cell],
    }
    return media, still_start


def _join_regions(samples, still_start):
    """Returns the part of the batch that the region encoder reads."""
    coverages, frame_start, boxes, object_frames, region_tokens = [], [], [], [], []
    for row, sample in enumerate(samples):
        coverages += sample["coverage"]
        frame_start += [still_start[row, i] for i in sample["region_still"]]
        boxes += sample["boxes"]
        object_frames += sample["object_frames"]
        region_tokens += sample["region_tokens"]
    return {
        "coverage": _concatenate(coverages, np.float32),
        "coverage_start": torch.tensor([0, *accumulate(map(len, coverages))]),
        "frame_start": torch.tensor(frame_start, dtype=torch.long),
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 5),
        "object_frames": torch.tensor(object_frames, dtype=torch.long),
        "region_tokens": torch.tensor(region_tokens, dtype=torch.long),
        "num_region_tokens": sum(region_tokens),
    }


def _concatenate(arrays, dtype):
    """The arrays, joined along the first axis as one tensor; of length 0 if there are none."""
    return torch.from_numpy(np.concatenate(arrays) if arrays else np.zeros(0, dtype))


# ---- A first reading may end here. What follows makes the above right on real data, and shows it. ----


# ---- checks of a sample and its masks ----

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell one; tokenizers and file systems refuse it
MAX_MASK_PIXELS = 1 << 26  # a larger "size" is a typing error or an attack, not a mask
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def shorten(value):
    """repr(value), or its beginning."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply, or an integer of more than 4300 digits
        text = f"a {type(value).__name__} too large to print"
    return text if len(text) <= 80 else text[:77] + "..."


def parse_sample(entry, place, media_folder, position, outside_paths=False):
    """Checks one JSON value and returns its Sample, or raises DataError.

    place: (file, sample name). position: the sample's id if the entry has no "id".
    """
    expect(isinstance(entry, dict), "a JSON object", entry)
    media = _parse_media(entry, media_folder, outside_paths)
    with within("conversations"):
        turns = _parse_turns(entry.get("conversations"), has_media=media is not None)
    objects = _parse_objects(entry, media)
    tags = sum(question.count(REGION_TAG) for question, _ in turns)
    expected_tags = f"as many {REGION_TAG} tags in the human turns as annotated objects ({len(objects)})"
    expect(tags == len(objects), expected_tags, tags)
    if objects and media is None:
        raise DataError("expected a video or image for the annotated objects, found neither key")
    size = entry.get("height"), entry.get("width")
    if size == (None, None):
        size = None
    else:
        expected = f"height and width: positive integers, of at most {MAX_MASK_PIXELS} pixels"
        expect(_is_size(size), expected, size)
    question_type = "" if entry.get("type") is None else entry["type"]
    expect(isinstance(question_type, str), "type: a string", question_type)
    return Sample(place, entry.get("id", position), media, turns, objects, size, question_type)


def _parse_media(entry, media_folder, outside_paths):
    given = {key: entry[key] for key in ("video", "image") if entry.get(key) is not None}
    expect(len(given) <= 1, "a video or an image, not both", given)
    if not given:
        return None
    ((key, name),) = given.items()
    names = name if isinstance(name, list) else [name]  # the later published files write ["a.mp4"]
    is_one = len(names) == 1
    expected = "video: one path, or a list of frame files" if key == "video" else "image: one path"
    expect(is_one or (names and key == "video"), expected, name)
    # An image may stand under "video", as in the published format's own example, but not the other way round.
    must_be_image = key == "image" or not is_one
    for name in names:
        valid = isinstance(name, str) and name and "\0" not in name and not LONE_SURROGATE.search(name)
        expect(valid, f"{key}: one path", name)
        valid = _is_image_path(name) or not must_be_image
        expect(valid, f"{key}: a file in {' '.join(sorted(IMAGE_SUFFIXES))}", name)
        inside = not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] != os.pardir
        expect(inside or outside_paths, f"{key}: a path inside the media folder (or --outside-paths)", name)
    paths = [os.path.join(media_folder, name) for name in names]
    return paths[0] if is_one else tuple(paths)


def _is_image_path(path):
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def media_name(media):
    """How an error names media: a path, or the first and last of several frame files."""
    if isinstance(media, (list, tuple)) and media:
        return f"{media[0]} to {media[-1]} ({len(media)} frames)"
    return str(media)


def _parse_turns(conversations, has_media):
    """The turns as (question, answer) pairs; the first question gets a media tag if it has none."""
    expect(isinstance(conversations, list) and conversations, "a list of turns", conversations)
    questions, answers = [], []
    for i, turn in enumerate(conversations):
        with within(f"turn {i}"):
            expect(isinstance(turn, dict), "an object with from and value", turn)
            speaker, value = turn.get("from"), turn.get("value")
            expect(speaker in ("human", "gpt"), "from: human or gpt", speaker)
            expect(isinstance(value, str) and value.strip(), "value: a text that is not empty", value)
            expect(not LONE_SURROGATE.search(value), "value: no halves of surrogate pairs", value)
            if speaker == "gpt" and not questions:
                continue  # an answer without a question teaches nothing
            expected = "gpt" if len(questions) > len(answers) else "human"
            expect(speaker == expected, f"human and gpt in turn, {expected} as turn {i}", speaker)
            allowed = not questions or not MEDIA_TAG.search(value)
            expect(allowed, "a media tag only in the first human turn", value)
            if speaker == "human":
                questions.append(value)
            else:
                expect(REGION_TAG not in value, f"no {REGION_TAG} in an answer", value)
                answers.append(value)
    valid = answers and len(questions) == len(answers)
    expect(valid, "human turns, each followed by its gpt answer", conversations[-1])
    tags = len(MEDIA_TAG.findall(questions[0]))
    expect(tags <= 1, "one media tag", questions[0])
    expect(has_media or not tags, "a video or image key for the media tag", questions[0])
    if has_media and not tags:
        questions[0] = "<video>\n" + questions[0]
    return list(zip(questions, answers))


def _parse_objects(entry, media):
    """The objects' masks: `annotation` [{"36": {"segmentation": SEG}}] or the later `masks` [{"36": SEG}].

    In an image, an object under `masks` may also be its SEG itself. Beside a list of frame files, `mask_ids`
    may give the frame index of each mask of all objects, in order, as in RynnEC's files: the keys are names.
    """
    is_image = isinstance(media, str) and _is_image_path(media)
    mask_ids = entry.get("mask_ids") if isinstance(media, tuple) else None
    valid = mask_ids is None or (isinstance(mask_ids, list) and all(type(frame) is int for frame in mask_ids))
    expect(valid, "mask_ids: a list of frame indices", mask_ids)
    keys = [key for key in ("annotation", "masks") if entry.get(key) is not None]
    expect(len(keys) <= 1, "annotation or masks, not both", keys)
    if not keys:
        return []
    with within(keys[0]):
        listed = entry[keys[0]]
        expect(isinstance(listed, list), "a list with one entry an object", listed)
        objects, numbers = [], iter(mask_ids or [])
        for i, masks in enumerate(listed):
            with within(f"object {i}"):
                is_segmentation = isinstance(masks, list) or (isinstance(masks, dict) and "counts" in masks)
                if is_image and keys[0] == "masks" and is_segmentation:
                    masks = {"0": masks}
                expect(isinstance(masks, dict), "frame index -> mask", masks)
                frames = list(masks) if mask_ids is None else [str(next(numbers, None)) for _ in masks]
                masks = zip(frames, masks.values())
                objects.append(_parse_masks(masks, has_segmentation_key=keys[0] == "annotation"))
        if mask_ids is not None:
            count = sum(map(len, listed))
            expect(len(mask_ids) == count, f"mask_ids: one for each of the {count} masks", len(mask_ids))
    return objects


def _parse_masks(masks, has_segmentation_key):
    """("36", mask) pairs -> {36: segmentation} of one object, hidden where the mask is null or absent."""
    found = {}  # also the frames on which it is hidden
    for key, mask in masks:
        with within(f"frame {key[:20]!r}"):
            expect(re.fullmatch(r"[0-9]{1,9}", key), "a frame index: a whole number from 0", key)
            expect(int(key) not in found, "each frame once", key)
            if has_segmentation_key and mask is not None:
                expect(isinstance(mask, dict), 'an object with "segmentation"', mask)
                mask = mask.get("segmentation")
            found[int(key)] = mask
    visible = {frame: mask for frame, mask in found.items() if mask is not None}
    expect(visible, "a mask on at least one frame", sorted(found))
    return visible


def _decode_masks(segmentations, frames, size, info):
    """{frame: segmentation} -> {frame: uint8 (H, W)} for these frames. size: (height, width) of polygons."""
    masks = {}
    for frame in frames:
        with within(f"frame {frame}"):
            in_video = frame < info.num_frames
            expect(in_video, f"a frame index below {info.num_frames}, the number of frames", frame)
            masks[frame] = decode_mask(segmentations[frame], *size)
    return masks


def mask_share(segmentation, height, width):
    """The share of the picture that a segmentation covers, in [0, 1]; arguments and errors of decode_mask."""
    rle = _to_rle(segmentation, height, width)
    return int(coco_mask.area(rle)) / math.prod(rle["size"])


def _to_rle(segmentation, height, width):
    check_segmentation(segmentation)
    if isinstance(segmentation, dict):
        size = segmentation["size"]
        _check_same_shape(size, (height, width), "mask")
        if isinstance(segmentation["counts"], list):
            return coco_mask.frPyObjects(segmentation, *size)
        return segmentation
    polygons = _as_polygons(segmentation)
    for polygon in polygons:
        x, y = polygon[0::2], polygon[1::2]
        near = -width <= min(x) and max(x) <= 2 * width and -height <= min(y) and max(y) <= 2 * height
        expect(near, f"polygon points (x, y) near the {width}x{height} frame", polygon)
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def check_segmentation(segmentation):
    """Returns the name of the segmentation's form; DataError unless it is COCO RLE or one or more polygons.

    pycocotools decodes an RLE whose runs fall short of h * w into stale memory, without an error, and hangs
    on a polygon with NaN or 1e30. So everything is checked before it is called.
    """
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        valid = isinstance(size, list) and _is_size(size)
        expect(valid, f"size: [height, width] of at most {MAX_MASK_PIXELS} pixels", size)
        expect(isinstance(counts, (str, list)), "counts: a string, or a list of run lengths", counts)
        runs = _rle_runs(counts) if isinstance(counts, str) else counts
        valid = all(type(run) is int and run >= 0 for run in runs)
        expect(valid, "counts: run lengths, whole numbers from 0", counts)
        height, width = size
        expected = f"run lengths that sum to {height} * {width} = {height * width}"
        expect(sum(runs) == height * width, expected, sum(runs))
        return "compressed RLE" if isinstance(counts, str) else "uncompressed RLE"
    expect(isinstance(segmentation, list) and segmentation, "RLE or polygons", segmentation)
    polygons = _as_polygons(segmentation)
    for polygon in polygons:
        expect(isinstance(polygon, list), "a polygon [x1, y1, x2, y2, ...]", polygon)
        is_even = len(polygon) >= 6 and len(polygon) % 2 == 0
        expect(is_even, "at least 3 points, an even count of numbers", polygon)
        numbers = all(type(x) in (int, float) for x in polygon)
        # The comparison is also False for NaN.
        expect(numbers and all(abs(x) < 1e6 for x in polygon), "polygon coordinates in pixels", polygon)
    return "one polygon" if len(polygons) == 1 else "several polygons"


def _is_size(size):
    """Whether size is a pair of height and width that a mask may have."""
    is_pair = len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    return is_pair and math.prod(size) <= MAX_MASK_PIXELS


def _as_polygons(segmentation):
    """One polygon as a list of one; several as they are."""
    return [segmentation] if isinstance(segmentation[0], (int, float)) else segmentation


def _rle_runs(counts):
    """The run lengths in a compressed RLE string (COCO's rleFrString).

    A number is a sequence of characters, each of which holds 5 bits, the lowest first (offset 48; bit 0x20:
    more characters follow; bit 0x10 of the last: the number is negative). From the fourth run on, it is the
    difference to the run two before. Six characters are more than a mask of MAX_MASK_PIXELS needs; with
    seven, pycocotools shifts bits out of a C int and reads another number.
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


def _check_same_shape(size, frame_size, name):
    """Raises DataError unless two (height, width) have one aspect ratio, up to a pixel of the smaller."""
    (h, w), (frame_h, frame_w) = size, frame_size
    same = abs(w * frame_h - h * frame_w) <= max(h, w, frame_h, frame_w)
    expect(same, f"a {name} of the frame's shape, {frame_w}x{frame_h} (width x height) or scaled", f"{w}x{h}")


# ---- indices for the vision tower ----


def _tower_indices(processor, grids):
    """What the vision tower looks up for its patches, as its keyword arguments.

    grids: (time, rows, columns) in patches of each still and video. Left to itself, the tower makes the same
    in each forward pass, on the GPU, and waits for it.
    """
    tower, grids = processor.empty_backbone.visual, torch.tensor(grids)
    bounds = get_vision_cu_seqlens(grids)
    indices = {
        "grid_thw": grids,
        "position_ids": get_vision_position_ids(grids, processor.merge_size),
        "cu_seqlens": bounds,  # attention stays within a frame
        "max_seqlen": int(bounds.diff().max()),
    }
    if hasattr(tower, "window_size"):  # Qwen2.5-VL: in most layers it stays within a window of a frame
        windows, bounds = get_vision_window_index(
            grids, processor.merge_size, tower.window_size, processor.patch_size
        )
        indices |= {"window_index": windows, "cu_window_seqlens": bounds}
        indices["max_window_seqlen"] = int(bounds.diff().max())
    else:  # learned positions, which are interpolated to the size of the grid
        rows, weights = get_vision_interpolation_indices_and_weights(
            grids,
            tower.num_grid_per_side,
            tower.interpolation_mode,
            tower.interpolation_align_corners,
            processor.merge_size,
        )
        indices |= {"interp_indices": rows, "interp_weights": weights}
    return indices


# ---- controls of eval.py ----


def replace_masks(dataset, masks, sample, rng):
    """The masks {frame: uint8 (H, W)} of an object as dataset.control has them, on the same frames: the whole
    frame ("full"), the bounding box ("box"), or the masks of a random object on other media ("shuffle").
    """
    if dataset.control == "full":
        return {frame: np.ones((1, 1), np.uint8) for frame in masks}
    if dataset.control == "box":
        return {frame: fill_box(mask) for frame, mask in masks.items()}
    for i in rng.permutation(len(dataset)).tolist():
        with suppress(DataError):  # a sample that is wrong cannot lend its masks; it has its own report
            donor = dataset.samples[i]
            if not donor.objects or _files_of(donor.media) & _files_of(sample.media):
                continue
            object_index = int(rng.integers(len(donor.objects)))
            donor_masks = dataset.choose_masks(donor, object_index, dataset.media_of(donor).info, rng)
            return dict(zip(masks, cycle(donor_masks.values())))
    raise DataError("expected a sample with regions on other media to take masks from, found none")


def _files_of(media):
    """The normalised paths of a sample's media, as a set: media that share a frame file are the same."""
    return {os.path.normpath(path) for path in ([media] if isinstance(media, str) else media)}


def fill_box(mask):
    """uint8 (H, W) -> the same with its whole bounding box inside."""
    top, bottom, left, right = mask_bounds(mask)
    filled = np.zeros_like(mask)
    filled[top:bottom, left:right] = 1
    return filled


def without_media(sample):
    """The same conversation as text alone, as control="blind" asks it.

    The media tag is removed with its line breaks, and each `<region>` becomes the words "the object".
    """
    turns = []
    for question, answer in sample.turns:
        text = "\n".join(filter(None, MEDIA_TAG.split(question)))
        turns.append((text.replace(REGION_TAG, "the object"), answer))
    return replace(sample, media=None, turns=turns, objects=[])


# ---- reading and writing ----


@contextmanager
def os_errors(expected):
    """Turns an OSError into a DataError that says what was expected."""
    try:
        yield
    except OSError as error:
        raise DataError(f"expected {expected}, found: {error.strerror}") from None


def find_file(model, name):
    """Returns the path of a file that not every model has, or None. model: Hugging Face name or folder."""
    return cached_file(model, name, _raise_exceptions_for_missing_entries=False)


class FrameCache:
    """The most recently used media and resized frames of one worker: a small data set is decoded once."""

    def __init__(self, limit):
        self.limit, self.used = limit, 0  # bytes
        self.entries = OrderedDict()  # the least recently used come first

    def get(self, key):
        if key in self.entries:
            self.entries.move_to_end(key)
        return self.entries.get(key)

    def put(self, key, value):
        """Adds a value that has nbytes, and drops the least recently used ones. Returns the value."""
        self.entries[key] = value
        self.used += value.nbytes + 200  # 200: about what the key and the entry weigh
        while self.used > self.limit:
            _, dropped = self.entries.popitem(last=False)
            self.used -= dropped.nbytes + 200
        return value


class TimedReader:
    """Runs functions that read a media file, for at most timeout seconds each.

    A thread that hangs in a decoder cannot be ended. It is left behind, and its file is never tried again.
    """

    def __init__(self, timeout):
        self.timeout, self.hung_paths = timeout, set()

    def run(self, path, function, *arguments):
        """Returns function(*arguments), or raises what it raises; DataError if it takes too long."""
        outcome = []
        thread = threading.Thread(target=self._work, args=(outcome, function, arguments), daemon=True)
        if path not in self.hung_paths:
            thread.start()
            thread.join(self.timeout)
        if not outcome:
            self.hung_paths.add(path)
            expected = f"expected to be read within {self.timeout:g} s"
            raise DataError(f"{expected}, found that it was not", media_name(path))
        value, error = outcome[0]
        if error is not None:
            raise error
        return value

    @staticmethod
    def _work(outcome, function, arguments):
        try:
            outcome.append((function(*arguments), None))
        except Exception as error:  # any error: it is raised again by the thread that waits
            outcome.append((None, error))


@contextmanager
def atomic_write(path):
    """Yields a temporary path beside path, at which the caller writes a file or makes a folder.

    It is renamed to path once all of it is on disk, so that path appears whole or not at all. An exception
    leaves nothing behind; a kill leaves the temporary path, whose name ends in .tmp.
    """
    path = os.path.abspath(path)  # also without a slash at its end
    temporary = f"{path}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):  # of a file, this yields nothing
            for name in names:
                _flush_to_disk(os.path.join(folder, name))
            _flush_to_disk(folder)
        _flush_to_disk(temporary)
        os.replace(temporary, path)
        _flush_to_disk(os.path.dirname(path))
    finally:
        if os.path.isdir(temporary):
            shutil.rmtree(temporary)
        elif os.path.exists(temporary):
            os.remove(temporary)


def _flush_to_disk(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def to_device(batch, device):
    """The same batch with its tensors on the device. From pinned memory, the copy runs by itself."""
    moved = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            value = to_device(value, device)
        moved[name] = value.to(device, non_blocking=True) if torch.is_tensor(value) else value
    return moved


def sample_texts(samples, limit=10_000):
    """The texts of the first samples, from which the tiny model's tokenizer learns its words."""
    for i in range(min(limit, len(samples))):
        with suppress(DataError):  # it is reported when the sample is used
            for turn in samples[i].turns:
                yield from turn


# ---- the index of a data file ----

FILE_CHANGED = "expected the file as it was when it was opened, found that it has changed"
TOO_DEEP = "expected JSON of ordinary depth, found brackets nested too deeply to parse"


class Samples:
    """The sequence that read_samples returns. It holds no samples, so it may be handed to worker processes.

    Each access opens a file and reads the few bytes where the index says that the sample is.
    """

    def __init__(self, files, outside_paths=False, versions=None):
        self.files, self.outside_paths = files, outside_paths  # files: (path, media folder) of each
        self.indices = [_open_index(path) for path, _ in files]
        self.versions = [version for version, _ in self.indices]
        for (path, _), version, expected in zip(files, self.versions, versions or self.versions):
            if version != expected:  # it changed before a spawned process opened it
                raise DataError(FILE_CHANGED, path)
        # The index of each file's first sample.
        self.first = np.cumsum([0] + [len(spans) for _, spans in self.indices])

    def __reduce__(self):
        # A spawned process opens the index itself, because a pickled memory map would become a copy.
        return type(self), (self.files, self.outside_paths, self.versions)

    def __len__(self):
        return int(self.first[-1])

    def __getitem__(self, i):
        entry, place, media, position = self.read(i)
        with within(*place):
            return parse_sample(entry, place, media, position, self.outside_paths)

    def read(self, i):
        """Returns the i-th JSON value, place (file, sample name), media folder and position in the file."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        file_index = int(np.searchsorted(self.first, i, side="right")) - 1
        (path, media), (version, spans) = self.files[file_index], self.indices[file_index]
        position = i - int(self.first[file_index])
        start, end = spans[position].tolist()
        name = f"sample {position}"
        with within(path, name):
            with os_errors("a readable file"), open(path, "rb") as file:
                if _version(file) != version:
                    raise DataError(FILE_CHANGED)
                file.seek(start)
                text = file.read(end - start)
            try:
                entry = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_to_dict)
            except RecursionError:  # the index was made where the stack was less deep
                raise DataError(TOO_DEEP) from None
            except ValueError as error:  # of these functions, or of int(), which refuses thousands of digits
                raise DataError(f"expected ordinary JSON, found: {error}") from None
        if isinstance(entry, dict) and "id" in entry:
            name += f" (id {shorten(entry['id'])})"
        return entry, (path, name), media, position


def _refuse_constant(name):
    raise ValueError(f"{name}, which JSON does not know")


def _to_dict(pairs):
    """A JSON object as a dict, in which no key may replace an earlier one."""
    entry = {}
    for key, value in pairs:
        if key in entry:
            raise ValueError(f"the key {shorten(key)} twice in an object")
        entry[key] = value
    return entry


_INDEX_FORMAT = 2  # to be raised when the content of an index file means something else
_WINDOW = 1 << 24  # bytes of a file that are in memory at a time, unless a sample is longer
_MAX_SAMPLE = 1 << 28  # bytes; what does not parse within so many is reported as a syntax error
# Odd numbers and keys are left to Samples.read, whose errors name the sample.
_DECODER = json.JSONDecoder(parse_int=float)


def _version(file):
    """What changes when an open file is written to: its size in bytes, and its time of modification in ns."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _open_index(path):
    """Returns (the data file's _version, int64 (samples, 2): where each sample begins and ends, in bytes).

    Finding the samples of a file of gigabytes takes minutes, so the index is saved in the user's cache folder
    (data folders are often read-only). It is memory-mapped, so that all processes of a machine share it. Its
    name tells the version of the data file that it was made for: a file that has changed gets a new index.
    Old ones stay, because another machine that shares the folder may still have them mapped.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:24]
    with within(path), os_errors("a readable file"), open(path, "rb") as file:
        size, time_ns = version = _version(file)
        index_path = Path(cache, "nanorefer", f"{name}-{_INDEX_FORMAT}-{size}-{time_ns}.npy")
        # A missing or damaged index is made below. np.asarray: slices of a np.memmap are slow.
        with suppress(OSError, ValueError, EOFError):
            return version, np.asarray(np.load(index_path, mmap_mode="r"))
        spans = np.fromiter(_find_samples(file), np.dtype((np.int64, 2)))
    with within(str(index_path)), os_errors("a cache folder that can be written to (set XDG_CACHE_HOME)"):
        index_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(index_path) as temporary, open(temporary, "wb") as file:
            np.save(file, spans)
    return version, spans


def _find_samples(file):
    """Yields (first byte, last byte + 1) of each element of a JSON array or line of JSONL.

    Every sample is parsed, so that a syntax error is reported before training starts, with line and column.
    The parser gets a part of the file as Latin-1, where a character is a byte, so its positions are offsets.
    """
    file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
    first = _next_visible(file)
    # A value, some white space, and one of the marks: those between two values, or those that may come last.
    gap, between, last = re.compile(r"[ \t\r]*(\n?)[ \t\r\n]*"), ["\n"], ["\n", ""]
    if first == b"[":
        gap, between, last = re.compile(r"[ \t\r\n]*([],]?)[ \t\r\n]*"), [","], ["]"]
        first = _next_visible(file)
    if first in (b"", b"]"):
        raise DataError("expected at least one sample, found none")
    offset, size = file.tell() - 1, _WINDOW
    while True:
        file.seek(offset)
        window = file.read(size)
        text, is_rest, begin = window.decode("latin-1"), len(window) < size, 0
        try:
            while True:
                _, end = _DECODER.raw_decode(text, begin)
                window[begin:end].decode()
                after = gap.match(text, end)
                is_last = after.end() == len(text)
                if after[1] not in (last if is_last else between) or (is_last and not is_rest):
                    raise json.JSONDecodeError("Expecting the next sample or the end", text, after.end())
                yield offset + begin, offset + end
                if is_last:
                    return
                begin = after.end()
        except RecursionError:
            raise DataError(TOO_DEEP) from None
        except UnicodeDecodeError as error:
            raise _syntax_error(file, offset + begin + error.start, "not UTF-8") from None
        except json.JSONDecodeError as error:
            if is_rest or (begin == 0 and size >= _MAX_SAMPLE):
                raise _syntax_error(file, offset + error.pos, f"not valid JSON: {error.msg}") from None
        # The window may end within this sample: continue with one that begins there, longer if it did before.
        offset, size = offset + begin, _WINDOW if begin else 2 * size


def _next_visible(file):
    """Reads up to the next byte that is not white space, and returns it; b"" at the end of the file."""
    byte = file.read(1)
    while byte and byte in b" \t\r\n":
        byte = file.read(1)
    return byte


def _syntax_error(file, offset, reason):
    """Returns a DataError with the line and column, in characters from 1, of a byte of the file."""
    line = column = 1
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    for begin in range(0, offset, _WINDOW):
        file.seek(begin)
        text = decoder.decode(file.read(min(_WINDOW, offset - begin)))
        line += text.count("\n")
        column = len(text) - text.rfind("\n") if "\n" in text else column + len(text)
    return DataError(f"line {line}, column {column}: {reason}")


# ---- the inside of a media file ----

# Demuxers that may open a file. FFmpeg's others draw a .txt as a film of letters, or fetch a playlist's URLs.
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
    # Packets that are decoded but not shown, because an edit list cuts them off. decord counts them when it
    # seeks, so its frame numbers differ from ours.
    hidden_packets: int = 0


def media_info(path):
    """Returns the MediaInfo of a file, folder or list of frame files: open_media(path).info."""
    return open_media(path).info


def open_media(path):
    """Returns Video or Images, which have the same members: info, a MediaInfo, and read(indices), the frames.

    Frame k is the k-th shown, counted from 0, at the height and width that it is displayed with. It is never
    another frame than the one asked for: what cannot be had is a DataError. The file does not stay open and
    no pixels are held, so the object may live in a cache and be used in forked or spawned workers.
    path: of a file, or of a folder of images, or a list of paths of images, which keep their order.
    """
    if isinstance(path, (list, tuple)):
        expect(path, "at least one frame file", path)
        return Images(path, path, is_image=False)
    path = Path(path)
    try:
        if path.is_dir():
            names = [name for name in os.listdir(path) if _is_image_path(name) and not name.startswith(".")]
            if names:
                names.sort(key=_natural_order)
                return Images(path, [os.path.join(path, name) for name in names], is_image=False)
            found = "none in it"
        elif not path.is_file():
            found = "no such file"
        elif path.stat().st_size == 0:
            found = "an empty one"
        elif _is_image_path(path):
            return Images(path, [path], is_image=True)
        else:
            return Video(path)
    except OSError as error:  # a name that is too long, a folder that may not be read
        found = error.strerror
    raise DataError(f"expected a media file or a folder of images, found: {found}", str(path))


def _natural_order(name):
    """Sort key that puts img2 before img10; the name itself decides between img2 and img02."""
    parts = re.split(r"([0-9]+)", name)  # texts and numbers in turn
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _check_indices(indices, num_frames):
    """Returns the indices as a rising list of int, each once, or raises DataError."""
    for k in indices:
        valid = isinstance(k, (int, np.integer)) and not isinstance(k, bool) and 0 <= k < num_frames
        expect(valid, f"a frame index from 0 to {num_frames - 1}", k)
    return sorted({int(k) for k in indices})


def _check_size(picture, info):
    height, width, _ = picture.shape
    first = info.height, info.width
    expect((height, width) == first, f"the first frame's height and width {first}", (height, width))


class Images:
    """An image, or the images of a folder or list, in their order: a video without a clock."""

    def __init__(self, media, files, is_image):
        self.media, self.files = media, files
        self.nbytes = 150 * len(files)  # about what their paths take in memory, for a cache to count
        first = Path(files[0])
        with _open_image(first) as image:
            height, width = image.height, image.width
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        if is_turned:
            height, width, _ = _load_image(first).shape
        self.info = MediaInfo(len(files), UNKNOWN_FPS, height, width, is_image)

    def read(self, indices):
        """Returns {frame index: uint8 (H, W, 3) RGB}; raises DataError where an image does not decode."""
        with within(media_name(self.media)):
            wanted = _check_indices(indices, len(self.files))
        pictures = {}
        for k in wanted:
            file = Path(self.files[k])
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
    except FileNotFoundError:
        raise DataError("expected an image, found no such file", str(file)) from None
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        reason = f"expected an image, found one that does not decode: {error}"
        raise DataError(reason, str(file)) from error


def _load_image(file):
    """Returns uint8 (H, W, 3) RGB, turned as EXIF says (as Hugging Face's load_image does)."""
    with _open_image(file) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


class Video:
    """A video file or GIF, read with PyAV.

    Frames are found by their pts (presentation time), because they are not stored in the order in which they
    are shown, and a seek leads to a time, not to a number. The packets are listed once, without decoding:
    their sorted pts are the times of frame 0, 1, 2, ... To read frame k, decoding starts at the last keyframe
    that is shown at or before k, and continues until a frame with the pts of k comes out. Whenever that is
    odd (a seek fails or leads elsewhere, other frames come out than the packets announced), everything is
    decoded from the first packet on. (decord 0.6.0 returns wrong frames without an error after many a seek.)

    times: int64 (num_frames,), the pts of each frame, rising; None where the packets do not tell them, so
    that frames are counted. keyframes: int64, the frames where decoding may start, rising; the first is 0.
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

        skip: leave out H.264 frames that are not wanted and that no other frame refers to (most B-frames).
        Where frames are counted, none may be left out.
        """
        pictures = {}
        with _open_video(self.path) as (container, stream):
            skip = skip and self.times is not None and stream.codec.canonical_name == "h264"
            needed = set(self.times[wanted].tolist()) if skip else None
            index_of = {} if self.times is None else {pts: k for k, pts in enumerate(self.times.tolist())}
            frames, index, is_damaged = _frames_from(container, stream, None, needed), -1, False
            for k in wanted:
                keyframe = int(keyframes[bisect_right(keyframes, k) - 1])
                if keyframe > index + MAX_REORDER:  # if it is nearer, decoding on costs no more than a seek
                    frames = _frames_from(container, stream, self.times[keyframe], needed)
                    index, is_damaged = -1, False
                for frame in frames:
                    previous = index
                    index = previous + 1 if self.times is None else index_of.get(frame.pts)
                    is_gap = not skip and previous >= 0 and index != previous + 1
                    # FFmpeg does not flag the frames that are predicted from a damaged one.
                    is_damaged = frame.is_corrupt or (is_damaged and not frame.key_frame)
                    if index is None or is_gap:
                        return pictures  # packets and frames do not match one to one
                    if index >= k:
                        break
                if index != k or is_damaged:
                    return pictures
                # As displayed (both count counterclockwise); pixels that aren't square stay so, as in masks.
                picture = frame.to_ndarray(format="rgb24", threads=1)
                pictures[k] = np.rot90(picture, round(frame.rotation / 90))
        return pictures


@contextmanager
def _ffmpeg_errors(path):
    """Errors of FFmpeg and of the file system become DataErrors, and every DataError names the file."""
    try:
        with within(str(path)):
            yield
    except (av.error.FFmpegError, OSError) as error:
        found = "found what FFmpeg can't open or decode"
        raise DataError(f"expected a video, {found}: {error.strerror}", str(path)) from error


def _check_whole(path):
    """Raises DataError if a Matroska or WebM file is shorter than its header says: FFmpeg would not mind.

    It consists of two EBML elements, a header and the Segment: an id of 4 bytes, a size, and as many bytes
    (RFC 8794, RFC 9559).
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head.startswith(b"\x1a\x45\xdf\xa3"):
        return
    end = 0
    for _ in range(2):
        start = end + 4  # of the size, whose leading zero bits tell how many bytes it has
        num_bytes = 9 - int.from_bytes(head[start : start + 1], "big").bit_length()
        unknown = (1 << 7 * num_bytes) - 1  # all ones: a live recording, written before its size was known
        size = int.from_bytes(head[start : start + num_bytes], "big") & unknown
        end = start + num_bytes + (0 if size == unknown else size)
    found = path.stat().st_size
    if found < end:
        raise DataError(f"expected {end} bytes, as its header says, found {found}: it is cut off")


@contextmanager
def _open_video(path):
    """Yields PyAV's container and its first video stream that is no cover art."""
    # "file:" keeps FFmpeg from taking a colon in the name for a protocol. Titles need not be valid UTF-8.
    options = {"format_whitelist": VIDEO_FORMATS}
    with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & cover]
        if not streams:
            kinds = [stream.type for stream in container.streams]
            raise DataError(f"expected a video stream, found only {kinds} (or cover art)")
        # A DataLoader runs a process a core, and one thread is the exact, deterministic way.
        streams[0].thread_count = 1
        yield container, streams[0]


def _index_video(path, count_frames=False):
    """Returns (MediaInfo, times, keyframes) of a Video.

    count_frames: all frames are decoded and counted, because the packets do not tell their times: in AVI and
    other containers FFmpeg has to guess the pts, packets of some codecs show nothing, and a pts may be
    missing or there twice.
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
            raise DataError(f"expected {indexed} packets, as its index says, found {num_packets}: cut off")
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
    unless the keyframe is the first frame to come out: in H.264 with intra refresh, a "keyframe" is where a
    gradual refresh begins, and frames before its end were seen to be grey in places. needed: the pts of the
    frames that must come (None: all); of the others, those that no frame refers to may be missing.
    """
    if time is not None:
        container.seek(int(time), stream=stream)
    first_pts = None
    for packet in container.demux(stream):
        if time is not None and first_pts is None:
            if not packet.is_keyframe or packet.pts > time:
                return
            first_pts = packet.pts
        may_skip = needed is not None and packet.pts not in needed
        stream.codec_context.skip_frame = "NONREF" if may_skip else "DEFAULT"
        for frame in packet.decode():
            if time is not None and frame.pts != first_pts:
                return
            time = None  # the first frame is right, and so are those that follow
            yield frame


# ---- the preview ----

COLOURS = [(255, 80, 60), (60, 200, 90), (70, 130, 255), (255, 200, 40), (220, 80, 230), (40, 210, 220)]
PANEL_HEIGHT, TEXT_WIDTH, LINE_HEIGHT = 192, 414, 17  # pixels


def preview(dataset, sample_indices, frames_shown=3, panel_height=PANEL_HEIGHT):
    """Returns a PIL image with a row for each of the samples.

    It shows some annotated frames with the objects outlined, below each frame its views with their cells, as
    bright as they are covered, and the conversation, its `<region>` tags numbered as the outlines are.
    """
    rows = []
    for i in sample_indices:
        sample = dataset.samples[i]
        with within(*sample.place):
            panels = _draw_frames(dataset, sample, frames_shown, panel_height) if sample.media else []
            rows.append(_join([*panels, _draw_conversation(sample)], across=True, gap=6))
        rows.append(Image.new("RGB", (1, LINE_HEIGHT), "white"))  # some space
    return _join(rows)


def _join(images, across=False, gap=0):
    """Returns PIL images below each other, or across the page, on white, with a gap in front of each."""
    widths, heights = zip(*(image.size for image in images))
    size = (max(widths), sum(heights) + gap * len(images))
    if across:
        size = (sum(widths) + gap * len(images), max(heights))
    sheet, position = Image.new("RGB", size, "white"), gap
    for image in images:
        sheet.paste(image, (position, 0) if across else (0, position))
        position += gap + (image.width if across else image.height)
    return sheet


def _draw_frames(dataset, sample, frames_shown, panel_height):
    """Returns a PIL image for each frame: the frame, and below it what is encoded of it."""
    media, rng = dataset.media_of(sample), np.random.default_rng(0)
    info = media.info
    objects = [dataset.choose_masks(sample, i, info, rng) for i in range(len(sample.objects))]
    frames = evenly(sorted(set(chain.from_iterable(objects))) or [0], frames_shown)
    width = max(1, round(panel_height * info.width / info.height))
    panels = []
    for frame, picture in dataset.reader.run(sample.media, media.read, frames).items():
        title = Image.new("RGB", (width, LINE_HEIGHT), "white")
        ImageDraw.Draw(title).text((0, 2), f"frame {frame}", fill="black", font=ImageFont.load_default(12))
        picture, masks = Image.fromarray(picture), [masks.get(frame) for masks in objects]
        small = np.asarray(picture.resize((width, panel_height), Image.Resampling.BICUBIC))
        panel = [title, Image.fromarray(draw_regions(small, masks))]
        shown = {}  # View -> its objects' indices, and their coverage
        for i, mask in enumerate(masks):
            if mask is not None:
                view, cells = dataset.region_view(frame, mask, info)
                indices, others = shown.get(view, ([], 0))
                shown[view] = [*indices, i], np.maximum(others, cells)
        if shown:
            panel.append(_draw_views(picture, shown, width, panel_height))
        panels.append(_join(panel))
    return panels


def _draw_views(picture, shown, panel_width, panel_height):
    """Returns the views of a frame, {View: (indices of its objects, their coverage)}, as a PIL image of one
    or two columns, as wide as a panel.
    """
    columns = min(len(shown), 2)
    gap = 4 * (columns - 1)  # pixels
    width = (panel_width - gap) // columns
    tiles = []
    for (_, (top, bottom, left, right), _), (indices, cells) in shown.items():
        tile = ImageOps.contain(picture.crop((left, top, right, bottom)), (width, panel_height))
        light = Image.fromarray(np.float32(0.15 + 0.85 * cells)).resize(tile.size, Image.Resampling.NEAREST)
        tile = Image.fromarray(np.uint8(np.asarray(tile) * np.asarray(light)[:, :, None]))
        if columns > 1:
            _write_numbers(tile, (2, 2), "lt", indices, 12)
        tiles.append(tile)
    height = max(tile.height for tile in tiles) + gap
    sheet = Image.new("RGB", (panel_width, height * math.ceil(len(tiles) / columns)), "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        sheet.paste(tile, ((width + gap) * column, height * row + gap))
    return sheet


def draw_regions(picture, masks):
    """Returns a copy of picture, uint8 (H, W, 3), with objects outlined and numbered, and the rest dimmed.

    The pixels of the objects themselves stay as they are, because a question may be about their colour.
    masks: one for each object, uint8 (h, w) at any resolution of the picture's shape, or None if it is not on
    this frame. An object that is asked about several times has one contour and all its numbers.
    """
    height, width, _ = picture.shape
    outlined = []  # pairs of where an object is, bool (H, W), and its indices
    for i, mask in enumerate(masks):
        if mask is None or not mask.any():
            continue
        share = coverage(mask, height, width)
        # Where the picture is smaller than the mask, an object may cover less than half of every pixel.
        inside = share >= min(0.5, share.max())
        for other, indices in outlined:
            if (inside & other).sum() > 0.8 * (inside | other).sum():  # the same object, asked about again
                indices.append(i)
                break
        else:
            outlined.append((inside, [i]))
    objects = np.any([inside for inside, _ in outlined] or [np.ones((height, width), bool)], axis=0)
    drawn = np.where(objects[:, :, None], picture, picture // 2)
    for inside, indices in outlined:
        contour_width = max(1, round(max(height, width) / 300))  # pixels, outside of the object
        grown = Image.fromarray(np.uint8(inside)).filter(ImageFilter.MaxFilter(2 * contour_width + 1))
        drawn[(np.asarray(grown) > 0) & ~objects] = COLOURS[indices[0] % len(COLOURS)]
    image, size = Image.fromarray(drawn), max(12, min(height, width) // 16)
    for inside, indices in outlined:
        top, bottom, left, _ = mask_bounds(inside)
        # Above the object if there is room, else below it.
        y, anchor = (top, "lb") if top > size else (min(bottom + 1, height - size), "lt")
        _write_numbers(image, (left, y), anchor, indices, size)
    return np.asarray(image)


def _write_numbers(image, position, anchor, indices, size):
    """Writes the numbers of objects, in the colour of the first."""
    text, font = ",".join(str(i + 1) for i in indices), ImageFont.load_default(size)
    style = dict(fill=COLOURS[indices[0] % len(COLOURS)], stroke_width=2, stroke_fill="black")
    ImageDraw.Draw(image).text(position, text, anchor=anchor, font=font, **style)


def _draw_conversation(sample):
    lines = [": ".join(map(str, sample.place)), media_name(sample.media or "text only"), ""]
    numbers = iter(range(1, len(sample.objects) + 1))
    for question, answer in sample.turns:
        question = re.sub(REGION_TAG, lambda tag: f"<region {next(numbers)}>", question)
        for text in (f"Q: {question}", f"A: {answer}"):
            lines += textwrap.wrap(" ".join(text.split()), 60)
    image = Image.new("RGB", (TEXT_WIDTH, LINE_HEIGHT * (len(lines) + 1)), "white")
    style = dict(fill="black", font=ImageFont.load_default(12), spacing=LINE_HEIGHT - 12)
    ImageDraw.Draw(image).text((6, LINE_HEIGHT), "\n".join(lines), **style)
    return image


def save_picture(image, path):
    """Writes a PIL image as a PNG file."""
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG", optimize=True)


# ---- python data.py FILE ----


class CheckedDataset(ReferringDataset):
    """Reads each sample as training would, and all its masks. Keys are sample indices.

    Returns what is to be counted, (statistic, value) pairs, or the sample's DataError.
    """

    def __init__(self, samples, processor, structure_only, timeout):
        super().__init__(samples, processor, timeout=timeout, cache_bytes=1 << 20)
        self.structure_only = structure_only

    def __getitem__(self, i):
        try:
            return self.facts(self.samples[i])
        except DataError as error:
            return error

    def facts(self, sample):
        facts, kind, info = [], "media" if sample.media else None, None
        with within(*sample.place):
            if kind and not self.structure_only:
                info = self.media_of(sample).info
                facts.append(("sizes", f"{info.width}x{info.height}"))
                if not info.is_image:
                    facts.append(("frames per video", info.num_frames))
                if info.hidden_packets:
                    facts.append(("edit lists", sample.media))
            # All masks are checked, because training chooses among them at random.
            for i, segmentations in enumerate(sample.objects):
                facts.append(("frames per object", len(segmentations)))
                with within(f"object {i}"):
                    for frame, segmentation in segmentations.items():
                        with within(f"frame {frame}"):
                            facts.append(("mask forms", check_segmentation(segmentation)))
                    if info:
                        size = sample.size or (info.height, info.width)
                        _decode_masks(segmentations, sorted(segmentations), size, info)
        if not self.structure_only:
            encoded = self.encode(sample, np.random.default_rng(0))
            facts.append(("tokens", len(encoded["input_ids"])))
            facts.append(("stills", len(encoded["still_patches"])))
            kind = encoded["kind"]
        most_frames = max(map(len, sample.objects), default=0)
        regions = ("no regions", "regions on one frame", "regions on several frames")[min(most_frames, 2)]
        facts.append(("kinds", f"{kind}, {regions}" if kind else "text only"))
        return facts


class Findings:
    """What a check found: which samples are usable, statistics, and problems, grouped by reason."""

    def __init__(self):
        self.usable = []  # of each sample
        self.statistics = defaultdict(Counter)  # name -> how often each value occurs
        self.problems = Counter()  # how often each kind of problem occurs
        self.examples = defaultdict(list)  # kind of problem -> the first three errors

    def add(self, found, problems_file):
        """Adds what CheckedDataset returned for the next sample."""
        self.usable.append(not isinstance(found, DataError))
        if self.usable[-1]:
            for name, value in found:
                self.statistics[name][value] += 1
            return
        reason, *places = found.args
        kind = re.sub("[0-9]+", "#", reason.split(", found")[0])  # problems that are alike up to numbers
        self.problems[kind] += 1
        if self.problems[kind] <= 3:
            self.examples[kind].append(found)
        problems_file.write(json.dumps({"places": places, "reason": reason}) + "\n")

    def report(self):
        print(f"{len(self.usable)} samples, {sum(self.usable)} of them right")
        print(f"{self.statistics['frames per object'].total()} objects")
        clips = list(self.statistics.pop("edit lists", []))
        for name, counter in sorted(self.statistics.items()):
            if any(isinstance(value, str) for value in counter):
                shown = [f"{value} {count}" for value, count in counter.most_common(8)]
                if len(counter) > 8:
                    shown.append(f"{len(counter) - 8} more")
                print(f"{name}: {'; '.join(shown)}")
            elif counter:
                values, counts = list(counter), list(counter.values())
                spread = np.quantile(values, [0, 0.5, 1], weights=counts, method="inverted_cdf")
                print("{}: min {}, median {}, max {}".format(name, *spread))
        if clips:
            print(
                f"{len(clips)} videos, such as {clips[0]}, were cut by an edit list: they hold frames that "
                "are not shown, which we do not count, and decord does. Check masks made with it."
            )
        for kind, count in self.problems.most_common():
            print(f"\n{count} x {self.examples[kind][0].args[0]}")
            for error in self.examples[kind]:
                print("    " + ": ".join(error.args[1:]))
            if count > 3:
                print(f"    and {count - 3} more")


def check(dataset, workers, problems_path=None):
    """Reads all samples. Returns Findings.

    problems_path: a file that gets one JSON line for each problem, as soon as it is found. If a sample
    crashes the worker that reads it, each of the samples that the workers had in hand becomes a problem, and
    the check continues behind them.
    """
    findings, num_samples = Findings(), len(dataset)
    progress = tqdm(total=num_samples, unit="sample", leave=False, mininterval=0.5)
    with open(problems_path or os.devnull, "w", buffering=1) as file, progress:
        while len(findings.usable) < num_samples:
            rest = range(len(findings.usable), num_samples)
            try:
                for found in DataLoader(dataset, batch_size=None, sampler=rest, num_workers=workers):
                    findings.add(found, file)
                    progress.update()
            except RuntimeError as crash:  # it can come at any moment, by a signal that a worker has died
                if not str(crash).startswith("DataLoader worker"):
                    raise
                reason = f"expected to be read, found that its process ended: {crash}"
                in_hand = range(len(findings.usable), num_samples)[: 2 * workers]  # two a worker at most
                for _ in in_hand:
                    place = f"one of {in_hand[0]} to {in_hand[-1]}"
                    findings.add(DataError(reason, "samples", place), file)
                    progress.update()
    return findings


def main(argv=None):
    parser = argparse.ArgumentParser(description="Reads data as training would. Exit status 1: problems.")
    add = parser.add_argument
    add("files", nargs="+", help="data files: JSON arrays or JSONL")
    add("--media", help="folder that media paths are relative to (default: each data file's own)")
    add("--outside-paths", action="store_true", help="also accept media paths that leave that folder")
    add("--structure-only", action="store_true", help="do not open media")
    add("--problems", metavar="JSONL", help="write every problem to this file")
    add("--preview", metavar="PNG", help="draw some of the samples that are right")
    add("--workers", type=int, default=2, help="processes that read (default: 2)")
    add("--timeout", type=float, default=120, help="seconds to read a media file in (default: 120)")
    add("--model", default="tiny", help="whose tokens are counted: as for train.py (default: tiny)")
    for field in fields(Settings):
        add("--" + field.name.replace("_", "-"), type=int, help="as for train.py")
    options = parser.parse_args(argv)
    expect(options.workers >= 0, "--workers: a number from 0", options.workers)
    expect(options.timeout > 0, "--timeout: a number above 0", options.timeout)
    if options.preview:
        expect(not options.structure_only, "--preview without --structure-only, since it opens media", "both")
        folder = os.path.dirname(os.path.abspath(options.preview))
        expect(os.path.isdir(folder), "--preview: a file in a folder that exists", options.preview)

    import model  # not at the top, because everything else in this module does without it

    samples = read_samples(options.files, options.media, options.outside_paths)
    settings = {field.name: getattr(options, field.name) for field in fields(Settings)}
    processor = model.load_processor(options.model, sample_texts(samples), **settings)
    dataset = CheckedDataset(samples, processor, options.structure_only, options.timeout)
    findings = check(dataset, options.workers, options.problems)
    findings.report()
    usable = np.flatnonzero(findings.usable).tolist()
    if options.preview and usable:
        candidates = evenly(usable, 200)
        with_objects = [i for i in candidates if samples[i].objects]
        save_picture(preview(dataset, evenly(with_objects or candidates, 5)), options.preview)
    return int(not all(findings.usable))


if __name__ == "__main__":
    import data  # under its own name, so that model.py and this file mean the same DataError

    try:
        raise SystemExit(data.main())
    except (data.DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
