"""The model against transformers itself: the same pixels, tokens and logits where there is no region; and
what regions add."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.processing_utils import ProcessorMixin

import data
import eval as evaluation
import model as models

SETTINGS = data.Settings(
    num_frames=5, frame_pixels=100 * 100, region_pixels=150 * 150, window=0, region_frames=8, region_tokens=2
)


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


# For tests that say nothing about the family.
any_family = pytest.mark.parametrize("checkpoint", FAMILIES[:1], indirect=True)


@pytest.fixture
def loaded(checkpoint):
    processor = models.load_processor(checkpoint, **asdict(SETTINGS))
    return models.load_model(checkpoint, processor).eval(), processor


@pytest.fixture
def world(tmp_path):
    """Media, and a data file with each kind of sample: text, image, video, and regions on one frame and on
    several."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 130, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "clip").mkdir()
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)).save(
            tmp_path / "clip" / f"{i}.png"
        )

    def box(x, y):
        return [x, y, x + 30, y, x + 30, y + 25, x, y + 25]

    def talk(*turns):
        return {
            "conversations": [
                {"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)
            ]
        }

    samples = [
        talk("Say the other thing.", "Never."),
        {"image": "a.png"} | talk("<image>\nWhat is on the image?", "Noise in the picture."),
        {"video": "clip"} | talk("Describe <video> then.", "More noise.", "And the rest?", "The same."),
        {"video": "clip", "annotation": [{"3": {"segmentation": box(5, 5)}}]}
        | talk("<video>\nWhat is <region>?", "The one."),
        {
            "video": "clip",
            "annotation": [
                {str(f): {"segmentation": box(f, 2 * f)} for f in (8, 0, 2, 5)},
                {"2": {"segmentation": box(40, 30)}},
            ],
        }
        | talk("<video>\nIs <region> left of <region>?", "On the left."),
        {"image": "a.png", "annotation": [{"0": {"segmentation": box(50, 40)}}]}
        | talk("What is <region>?", "A box."),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(samples))
    return data.read_samples(path), tmp_path


def dataset(world, processor, **options):
    return data.ReferringDataset(world[0], processor, **options)


def batch_of(world, processor, numbers):
    return data.collate([dataset(world, processor)[0, i] for i in numbers], processor)


def question(world, processor, sample, turn):
    return evaluation.Questions(world[0], processor)[sample, turn]


# ---- transformers' own inputs


def theirs(checkpoint, world, number):
    """The inputs that transformers' own classes make for a sample without regions: dict for the plain
    backbone."""
    sample, folder = world[0][number], world[1]
    tokenizer, images = (
        AutoTokenizer.from_pretrained(checkpoint),
        Qwen2VLImageProcessorPil.from_pretrained(checkpoint),
    )
    kind = {1: "image", 2: "video"}.get(number)
    messages = []
    for question, answer in sample.turns:
        before, _, after = question.partition(f"<{kind}>")
        parts = [
            {"type": "text", "text": before},
            {"type": kind},
            {"type": "text", "text": after.removeprefix("\n")},
        ]
        if not after:
            parts = [{"type": "text", "text": question}]
        messages += [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    if "qwen3_5" in str(checkpoint):  # each answer stands behind the prompt that asks for it without thinking
        text = re.sub(r"(<\|im_start\|>assistant\n)(?!<think>)", r"\1<think>\n\n</think>\n\n", text)
    inputs = {}
    namespace = SimpleNamespace(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        all_special_multimodal_tokens=["<|image_pad|>", "<|video_pad|>"],
    )
    replacements = {"images_replacements": [], "videos_replacements": [], "audio_replacements": []}
    if kind == "image":
        size = {"shortest_edge": images.size["shortest_edge"], "longest_edge": SETTINGS.region_pixels}
        inputs = dict(images(Image.open(folder / "a.png"), size=size, return_tensors="pt"))
        cells = int(inputs["image_grid_thw"].prod()) // images.merge_size**2
        replacements["images_replacements"] = ["<|image_pad|>" * cells]
    if kind == "video":
        frames = np.stack([np.asarray(Image.open(folder / "clip" / f"{i}.png")) for i in (0, 2, 4, 6, 8)])
        # Each frame resized and normalised as an image of the same budget; then transformers' own video
        # patches.
        size = {"shortest_edge": (images.patch_size * 2) ** 2, "longest_edge": SETTINGS.frame_pixels}
        singles = images(list(frames), size=size, return_tensors="pt", patch_size=images.patch_size)
        _, gh, gw = singles["image_grid_thw"][0].tolist()
        p, m = images.patch_size, images.merge_size
        pictures = singles["pixel_values"].view(5, gh // m, gw // m, m, m, 3, 2, p, p)[:, :, :, :, :, :, 0]
        pictures = pictures.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(1, 5, 3, gh * p, gw * p)
        patches, *grid = Qwen3VLVideoProcessor.patchify(None, pictures, p, m, 2)
        inputs = {"pixel_values_videos": patches[0], "video_grid_thw": torch.tensor([grid])}
        cells = gh * gw // m**2
        if "qwen3" in str(checkpoint):
            namespace.video_processor = SimpleNamespace(merge_size=m, temporal_patch_size=2)
            namespace.vision_start_token, namespace.vision_end_token = "<|vision_start|>", "<|vision_end|>"
            namespace._calculate_timestamps = partial(Qwen3VLProcessor._calculate_timestamps, None)
            metadata = SimpleNamespace(fps=24.0, frames_indices=[0, 2, 4, 6, 8])
            described = {"video_grid_thw": inputs["video_grid_thw"], "video_metadata": [metadata]}
            replacements["videos_replacements"] = [
                Qwen3VLProcessor.replace_video_token(namespace, described, 0)
            ]
        else:
            replacements["videos_replacements"] = ["<|video_pad|>" * (3 * cells)]
            # transformers' VideoMetadata.sampled_fps: sampled frames / all frames * fps; two frames a step of
            # the grid.
            inputs["second_per_grid_ts"] = torch.tensor([2 / (5 / 9 * 24.0)])
    (text,), _ = ProcessorMixin.get_text_with_replacements(namespace, [text], **replacements)
    # transformers 4.57 and 5.2, when Qwen3-VL and Qwen3.5 were published, had no pair of vision tokens around
    # all timestamps.
    outer_pair = (
        r"<\|vision_start\|>((?:<[\d.]+ seconds><\|vision_start\|>.*?<\|vision_end\|>)+)<\|vision_end\|>"
    )
    text = re.sub(outer_pair, r"\1", text)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return inputs | {
        "input_ids": ids,
        "mm_token_type_ids": (ids == image_id).int() + 2 * (ids == video_id).int(),
    }


@pytest.mark.parametrize("number", [0, 1, 2])
def test_pixels_tokens_and_logits_equal_those_of_transformers(checkpoint, loaded, world, number):
    model, processor = loaded
    batch, expected = batch_of(world, processor, [number]), theirs(checkpoint, world, number)
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    if number == 1:
        assert torch.equal(model._pixels(batch | {"video_patches": []}), expected["pixel_values"])
        assert torch.equal(batch["tower"]["grid_thw"], expected["image_grid_thw"])
    if number == 2:
        assert torch.equal(model._pixels(batch | {"still_patches": []}), expected["pixel_values_videos"])
        assert torch.equal(batch["tower"]["grid_thw"], expected["video_grid_thw"])
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = plain(**expected).logits
        # The tower's convolution is computed as a matrix product, which adds up in another order.
        torch.testing.assert_close(model.logits(batch), logits, atol=2e-5, rtol=1e-5)
        labels = torch.from_numpy(dataset(world, processor)[0, number]["labels"])
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].double(), labels[1:], reduction="sum")
        assert model(batch).item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("indices", [[0, 37, 74, 111, 149], [0, 50, 100, 149], [7]])
def test_timestamps_of_a_longer_video_are_those_of_transformers(tmp_path, indices):
    """The pairs' mean times, an odd last frame paired with itself: far enough apart that one decimal tells
    them from the first."""
    folder = make_checkpoint(tmp_path, "qwen3_vl")
    namespace = SimpleNamespace(
        video_token="<|video_pad|>", vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>"
    )
    namespace.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    namespace._calculate_timestamps = partial(Qwen3VLProcessor._calculate_timestamps, None)
    metadata = SimpleNamespace(fps=29.97, frames_indices=list(indices))
    grid = torch.tensor([[(len(indices) + 1) // 2, 4, 6]])
    expected = Qwen3VLProcessor.replace_video_token(
        namespace, {"video_grid_thw": grid, "video_metadata": [metadata]}, 0
    )
    times = [index / 29.97 for index in indices]
    assert models.Processor.from_pretrained(folder, SETTINGS).video_prompt(times, 6) == expected


def test_a_row_of_all_kinds_equals_its_samples_one_by_one(loaded, world):
    model, processor = loaded
    numbers = [4, 1, 0, 2, 5, 3]
    with torch.no_grad():
        together = model.logits(batch_of(world, processor, numbers))
        alone = [model.logits(batch_of(world, processor, [number])) for number in numbers]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=2e-5, rtol=1e-4)


def test_labels_are_the_answers_and_their_end_tokens(loaded, world):
    _, processor = loaded
    for number, answers in [
        (2, ["More noise.<|im_end|>", "The same.<|im_end|>"]),
        (3, ["The one.<|im_end|>"]),
    ]:
        encoded = dataset(world, processor)[0, number]
        supervised = encoded["labels"] != data.IGNORE_INDEX
        assert (encoded["input_ids"] == encoded["labels"])[supervised].all()
        starts = np.flatnonzero(np.diff(np.concatenate([[0], supervised.astype(int)])) == 1)
        found = [encoded["labels"][s:][np.cumprod(supervised[s:]).astype(bool)] for s in starts]
        assert [processor.tokenizer.decode(run) for run in found] == answers


def test_the_prompt_of_a_question_is_the_beginning_of_the_conversation(loaded, world):
    """What the model sees at evaluation is, token for token, what it was trained to continue."""
    _, processor = loaded
    whole = dataset(world, processor)[0, 2]
    for turn in (0, 1):
        prompt = question(world, processor, 2, turn)["input_ids"]
        assert prompt.tolist() == whole["input_ids"][: len(prompt)].tolist()
        assert whole["labels"][len(prompt)] != data.IGNORE_INDEX == whole["labels"][len(prompt) - 1]


def test_the_prompt_of_a_question_ends_as_the_template_begins_an_answer(loaded, world):
    _, processor = loaded
    tokenizer = processor.tokenizer
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say the other thing."}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
    )
    found = question(world, processor, 0, 0)["input_ids"].tolist()
    assert found == tokenizer.encode(expected, add_special_tokens=False)


def test_a_conversation_is_what_the_template_makes_of_it(loaded):
    """Qwen3.5's strips white space, the others' leave it, as do we: data.py strips all texts."""
    _, processor = loaded
    question, answer = "Say\n  the other thing.\n\nPlease: ", "Never.\n\n(Or?)  No."
    turns = [(question.strip(), answer), ("More?", answer)]
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn)]
    expected = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    if processor.thoughts:  # taken out of all answers but the last
        expected = expected.replace("assistant\nNever", f"assistant\n{processor.thoughts}Never", 1)
    ids, labels = processor.encode(turns, "", [])
    assert ids.tolist() == processor.tokenizer.encode(expected, add_special_tokens=False)
    assert processor.tokenizer.decode(labels[labels != data.IGNORE_INDEX]) == 2 * f"{answer}<|im_end|>"


@pytest.mark.parametrize("text", ["Red</think>", "<think>It is a box.</think>A box."])
def test_thoughts_in_a_text_are_refused_where_the_prompt_ends_with_empty_ones(loaded, text):
    """Qwen3.5's template would take them out of an answer, or put them behind the empty ones."""
    _, processor = loaded
    for turns in ([("What?", text)], [(text, "Red.")], [("What?", text), ("And?", "Red.")]):
        if processor.config.model_type in ("qwen3_5", "qwen3_5_moe"):
            with pytest.raises(
                data.DataError, match="without the tokenizer's control tokens, found '</?think>'"
            ):
                processor.encode(turns, "", [])
        else:
            assert text in processor.tokenizer.decode(processor.encode(turns, "", [])[0])


def refused_template(checkpoint, folder, change):
    """Returns the error of a checkpoint whose chat template is changed, less its beginning."""
    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    path = folder / "chat_template.jinja"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(data.DataError, match=f"^--model {folder}: expected a chat template") as caught:
        models.load_processor(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "old, new, message",
    [
        # As in the thinking variants of Qwen3-VL, thoughts that begin in the prompt do not end there.
        ("{% if enable_thinking is false %}", "{% if false %}", r"assistant\n<think>\n'"),
        ("{{ text }}<|im_end|>", "{{ text }}!<|im_end|>", "B.!<|im_end|>"),
        ("{{ text }}<|im_end|>", "{{ text }}<|endoftext|>", "B.<|endoftext|>"),
        ("{{ text }}<|im_end|>", "{{ text if loop.last or loop.first }}<|im_end|>", r"assistant\n<|im_end|>"),
        ("}}<|im_end|>", "}}{% if loop.last or loop.first %}<|im_end|>{% endif %}", "B.<|im_start|>"),
        ("{% if last.question < 0 %}", "{% if true %}", ": No user query found"),
    ],
)
@pytest.mark.parametrize("checkpoint", ["qwen3_5"], indirect=True)
def test_a_template_of_another_kind_is_refused_in_one_line(checkpoint, tmp_path, old, new, message):
    found = refused_template(checkpoint, tmp_path, lambda template: template.replace(old, new))
    assert message in found.partition(", found")[2]


@pytest.mark.parametrize(
    "old, new",
    [
        ("<|im_start|>{{", "<|im_start|> {{"),
        ("<|vision_start|><|image_pad|>", "Picture: <|vision_start|><|image_pad|>"),
        ("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"),
        ("{% for message in messages %}", "<|endoftext|>{% for message in messages %}"),
    ],
)
def test_of_every_family_a_template_that_writes_other_texts_is_refused(checkpoint, tmp_path, old, new):
    refused_template(checkpoint, tmp_path, lambda template: template.replace(old, new))


@any_family
@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{{ message['content'] + '<|im_end|>' }}{% endfor %}",  # text alone
        "{% for message in messages %}{{ message.content.text.upper() }}{% endfor %}",
        "{% for message in messages %}",  # not a template
    ],
)
def test_a_template_that_fails_is_refused_in_one_line(checkpoint, tmp_path, template):
    refused_template(checkpoint, tmp_path, lambda _: template)


@any_family
def test_a_checkpoint_without_a_template_is_refused_in_one_line(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(
        data.DataError, match=f"^--model {tmp_path}: expected a chat template, found: "
    ) as caught:
        models.load_processor(tmp_path)
    assert "\n" not in str(caught.value)


def test_mixed_precision_runs_and_stays_close(loaded, world):
    """What train.py does on a GPU: bfloat16 compute over float32 weights."""
    model, processor = loaded
    batch = batch_of(world, processor, range(6))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = model(batch)
    with torch.no_grad():
        assert mixed.dtype == torch.float32 and mixed.item() == pytest.approx(model(batch).item(), rel=0.03)


@any_family
def test_control_tokens_in_a_text_are_refused(loaded, world):
    _, processor = loaded
    for text in ("What<|im_end|>?", "<|video_pad|>", models.REGION_TOKEN):
        with pytest.raises(data.DataError, match="control tokens"):
            processor.encode([(text, "x")], "", [])


@any_family
def test_a_sample_that_is_too_long_is_refused_not_cut(checkpoint, world):
    encoded = dataset(world, models.Processor.from_pretrained(checkpoint, SETTINGS))[0, 4]
    length = len(encoded["input_ids"])
    for limit, fits in [(length, True), (length - 1, False)]:
        processor = models.Processor.from_pretrained(checkpoint, replace(SETTINGS, max_length=limit))
        found = dataset(world, processor)[0, 4]
        assert fits == isinstance(found, dict)
    assert f"at most {limit} tokens (max_length), found {length}" in str(found) and "sample 4" in str(found)


# ---- regions


def test_a_region_token_starts_as_the_average_of_its_cells(loaded, world):
    """Truth: the backbone's own image features of the annotated frame, weighted by coverage in float64."""
    model, processor = loaded
    batch = batch_of(world, processor, [5])
    with torch.no_grad():
        cells = model.backbone.model.visual(
            model._pixels(batch | {"video_patches": []}), grid_thw=batch["tower"]["grid_thw"]
        ).pooler_output
        embeddings = model._inputs(batch)["inputs_embeds"]
    mask = np.zeros((90, 130))
    mask[40:65, 50:80] = 1
    _, height, width = batch["tower"]["grid_thw"][0].tolist()
    gh, gw = height // 2, width // 2
    weight = np.kron(mask, np.ones((gh, gw))).reshape(gh, 90, gw, 130).mean(axis=(1, 3)).ravel()
    expected = weight @ cells.double().numpy() / weight.sum()
    found = embeddings[0][batch["input_ids"][0] == processor.region_token_id]
    assert found.shape[0] == 1
    np.testing.assert_allclose(found[0].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("weights_in_bfloat16", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_position_code_is_pinned_to_numbers_worked_by_hand(autocast, weights_in_bfloat16):
    """A saved encoder is useful only as long as its input means the same: (2x - 1), (2x - 1) * (2t - 1), then
    sin and cos of pi * x * (1, 2, 4, 8), for each x of (cx, cy, w, h, t). With 50 columns the two layers
    behind it can be made the identity: far from 0 the GELU between them is one too. Next to 64, numbers in
    bfloat16 would be off by up to 0.25: under autocast, and with the weights in bfloat16 as FSDP has them,
    everything must be computed in float32. It once was not."""
    encoder = models.RegionEncoder(50)
    first, _, last = encoder.position
    torch.nn.init.eye_(first.weight)
    torch.nn.init.eye_(last.weight)
    torch.nn.init.constant_(first.bias, 64.0)
    torch.nn.init.constant_(last.bias, -64.0)
    if weights_in_bfloat16:
        encoder = encoder.to(torch.bfloat16)
    cells = torch.zeros(1, 50, dtype=torch.bfloat16 if autocast or weights_in_bfloat16 else torch.float32)
    box = torch.tensor([[0.5, 0.25, 0.0, 1.0, 0.75]])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = encoder(cells, torch.ones(1), torch.tensor([0, 1]), torch.tensor([0]), box, [1], [1])
    s = 0.5**0.5
    raw = [0, -0.5, -1, 1, 0.5]
    times_t = [0, -0.25, -0.5, 0.5, 0.25]
    sin = [[1, 0, 0, 0], [s, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [s, -1, 0, 0]]
    cos = [[0, -1, 1, 1], [s, 0, -1, 1], [1, 1, 1, 1], [-1, 1, 1, 1], [-s, 0, -1, 1]]
    expected = torch.tensor([raw + times_t + sum(sin, []) + sum(cos, [])], dtype=torch.float32)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0)


@any_family
def test_each_placeholder_gets_its_own_object(loaded, world):
    """Swapping the two objects of a sample swaps their tokens and touches nothing else."""
    model, processor = loaded
    ds = dataset(world, processor)
    sample = ds.samples[4]
    swapped = replace(sample, objects=sample.objects[::-1])
    one, two = (ds.encode(s, np.random.default_rng(0)) for s in (sample, swapped))
    assert one["region_tokens"] == [2, 1] and two["region_tokens"] == [1, 2]
    region = processor.region_token_id
    tokens = {}
    for name, encoded in (("one", one), ("two", two)):
        batch = data.collate([encoded], processor)
        with torch.no_grad():
            tokens[name] = model._inputs(batch)["inputs_embeds"][0][batch["input_ids"][0] == region]
    torch.testing.assert_close(tokens["one"][[2, 0, 1]], tokens["two"])
    assert not torch.allclose(tokens["one"][0], tokens["one"][2])


@any_family
def test_a_faulty_neighbour_never_shifts_regions(loaded, world):
    """In the reference code, too few tags hand the rest of a sample's features to the next sample of the
    batch."""
    model, processor = loaded
    ds = dataset(world, processor)
    broken = replace(ds.samples[4], turns=[("<video>\nIs <region> left?", "Yes.")])
    with pytest.raises(AssertionError, match=r"(\(0, \d+, )3\) placeholders .* for \1[4]\) tokens"):
        encoded = ds.encode(broken, np.random.default_rng(0))
        data.collate([encoded, ds[0, 3]], processor)


def merged_by_hand(pooled, object_frames, region_tokens):
    """VideoRefer section 3.2.2 in plain Python: joins the most similar neighbours, one pair after another.

    Returns the share that each row has in each token, as lists (T, R).
    """

    def similarity(a, b):  # rounded, so that ties do not depend on the order of a sum
        product = sum(x * y for x, y in zip(pooled[a], pooled[b]))
        return round(product / (math.hypot(*pooled[a]) * math.hypot(*pooled[b]) or 1), 9)

    tokens, row = [], 0
    for n, u in zip(object_frames, region_tokens):
        runs = [[i] for i in range(row, row + n)]
        while len(runs) > u:
            pairs = range(len(runs) - 1)
            i = min(pairs, key=lambda i: (-similarity(runs[i][-1], runs[i + 1][0]), i))
            runs[i : i + 2] = [runs[i] + runs[i + 1]]
        tokens += runs
        row += n
    return [[1 / len(run) if i in run else 0.0 for i in range(row)] for run in tokens]


@pytest.mark.parametrize("ties", ["none", "many", "many, of vectors along axes", "all"])
def test_temporal_merge_equals_a_merge_in_plain_python(ties):
    """Vectors of one kind have few cosines, which float32 makes of equal numbers wherever they are equal."""
    rng = np.random.default_rng(0)
    square = [v for v in itertools.product((-1, 0, 1), repeat=4) if math.hypot(*v) == math.hypot(1, 1)]
    axes = [scale * row for scale in (-4, -1, 0, 0.5, 1) for row in np.eye(4)]
    for _ in range(300):
        object_frames = rng.integers(1, 12, size=rng.integers(0, 6)).tolist()
        region_tokens = [int(rng.integers(1, n + 1)) for n in object_frames]
        R = sum(object_frames)
        pooled = {
            "none": rng.normal(size=(R, 4)),
            "many": np.array(square)[rng.integers(0, len(square), R)],
            "many, of vectors along axes": np.array(axes)[rng.integers(0, len(axes), R)],
            "all": np.ones((R, 4)),
        }[ties].astype(np.float32)
        expected = merged_by_hand(pooled.tolist(), object_frames, region_tokens)
        T = sum(region_tokens)
        share = models.temporal_merge(torch.tensor(pooled), object_frames, region_tokens, T)
        assert share.dtype == torch.float32 and share.shape == (T, R)
        np.testing.assert_allclose(share, np.reshape(expected, (T, R)), rtol=1e-6)


def test_the_gradient_of_merged_rows_is_shared_by_the_rows_that_were_joined():
    """Two objects: rows 0 and 1 are alike and joined, row 2 stays; of the other, all three rows become
    one."""
    pooled = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [5, 1], [1, 5], [0, 3]], requires_grad=True)
    merged = models.temporal_merge(pooled, [3, 3], [2, 1], 3) @ pooled
    torch.testing.assert_close(merged, torch.tensor([[1, 0.05], [0, 1], [2, 3]]))
    (merged * torch.tensor([[6.0], [7], [9]])).sum().backward()
    assert pooled.grad[:, 0].tolist() == [3, 3, 7, 3, 3, 3]


@any_family
def test_frames_are_merged_in_order_of_time_whatever_the_order_in_the_file(loaded, world):
    encoded = dataset(world, loaded[1])[0, 4]
    times = [w[4] for w in encoded["boxes"]]
    assert times == [0, 2 / 8, 5 / 8, 1, 2 / 8] and encoded["object_frames"] == [4, 1]


@any_family
def test_single_frame_cut_and_region_frame_cap(checkpoint, world):
    processor = models.Processor.from_pretrained(checkpoint, replace(SETTINGS, region_frames=3))
    assert dataset(world, processor)[0, 4]["object_frames"] == [3, 1]
    always = dataset(world, processor, single_frame=1.0)
    seen = {always[epoch, 4]["boxes"][0][4] for epoch in range(40)}
    assert seen == {0, 2 / 8, 5 / 8, 1}
    half = dataset(world, processor, single_frame=0.5)
    cut = sum(half[epoch, 4]["object_frames"][0] == 1 for epoch in range(200))
    assert 70 < cut < 130
    assert half[3, 4]["boxes"] == half[3, 4]["boxes"]


@any_family
def test_controls_replace_the_masks_and_nothing_else(loaded, world):
    _, processor = loaded
    plain, full, shuffled = (
        evaluation.Questions(world[0], processor, control)[4, 0] for control in ("none", "full", "shuffle")
    )
    assert (
        full["input_ids"].tolist() == plain["input_ids"].tolist()
        and full["region_still"] == plain["region_still"]
    )
    assert all((grid == 1).all() for grid in full["coverage"]) and all(
        w[:4] == (0.5, 0.5, 1, 1) for w in full["boxes"]
    )
    other = dataset(world, processor)[0, 5]["boxes"][0][:4]  # the only object on other media
    assert all(w[:4] == pytest.approx(other) for w in shuffled["boxes"])
    assert [w[4] for w in shuffled["boxes"]] == [w[4] for w in plain["boxes"]]


def test_blind_is_a_conversation_without_media(loaded, world):
    """It equals a data file of the same texts, written by hand, and the media need not exist."""
    _, processor = loaded
    config = processor.config
    special = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    special += [config.vision_end_token_id, processor.region_token_id]
    assert set(special) <= set(batch_of(world, processor, range(6))["input_ids"].unique().tolist())
    texts = [
        ["Say the other thing.", "Never."],
        ["What is on the image?", "Noise in the picture."],
        ["Describe \n then.", "More noise.", "And the rest?", "The same."],
        ["What is the object?", "The one."],
        ["Is the object left of the object?", "On the left."],
        ["What is the object?", "A box."],
    ]
    speakers = ["human", "gpt"] * 2
    entries = []
    for turns in texts:
        turns = [{"from": speaker, "value": text} for speaker, text in zip(speakers, turns)]
        entries.append({"conversations": turns})
    (world[1] / "texts.json").write_text(json.dumps(entries))
    by_hand = data.read_samples(world[1] / "texts.json")
    shutil.rmtree(world[1] / "clip")
    (world[1] / "a.png").unlink()
    assert isinstance(dataset(world, processor)[0, 4], data.DataError)

    blind = evaluation.Questions(world[0], processor, "blind")
    by_hand = evaluation.Questions(by_hand, processor)
    encoded = []
    for key in [*((i, 0) for i in range(len(texts))), (2, 1)]:
        found, expected = blind[key], by_hand[key]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.array_equal(found[name], value), name
        encoded.append(found)
    batch = data.collate(encoded, processor, for_generation=True)
    assert not set(special) & set(batch["input_ids"].unique().tolist())
    assert len(batch["visual_index"]) == len(batch["region_index"]) == len(batch["regions"]["boxes"]) == 0
    assert batch["regions"]["region_tokens"] == []


@any_family
@pytest.mark.parametrize("fault", ["not an object", "a broken mask", "absent media"])
def test_a_wrong_sample_lends_no_masks_and_is_not_blamed_on_the_one_that_is_asked(loaded, world, fault):
    _, processor = loaded
    entries = json.loads((world[1] / "data.json").read_text())
    wrong = {
        "not an object": 3,
        "a broken mask": entries[5] | {"annotation": [{"0": {"segmentation": [1, 2]}}]},
        "absent media": entries[5] | {"image": "absent.png"},
    }[fault]
    path = world[1] / "wrong.json"
    path.write_text(json.dumps([entries[4]] + [wrong] * 9 + [entries[5]]))
    shuffled = evaluation.Questions(data.read_samples(path), processor, "shuffle")
    right = dataset(world, processor)[0, 5]["boxes"][0][:4]
    for shuffled.seed in range(3):
        assert all(box[:4] == pytest.approx(right) for box in shuffled[0, 0]["boxes"])
    path.write_text(json.dumps([entries[4]] + [wrong] * 3))
    error = evaluation.Questions(data.read_samples(path), processor, "shuffle")[0, 0]
    assert "sample 0" in str(error) and "other media to take masks from" in str(error)


# ---- answers, files, gradients


def give_regions_weight(model):
    """The region encoder's last layers start at zero; random ones make every input matter."""
    torch.manual_seed(1)
    for p in model.region_encoder.parameters():
        torch.nn.init.normal_(p, std=0.2)


def test_generate_equals_argmax_step_by_step_without_a_cache(loaded, world):
    model, processor = loaded
    give_regions_weight(model)
    # Random weights may answer with a vision placeholder, which the second way of this test could not feed
    # back without media.
    config = model.backbone.config
    vision_tokens = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    model.backbone.lm_head.register_forward_hook(
        lambda module, inputs, scores: scores.index_fill(-1, torch.tensor(vision_tokens), -torch.inf)
    )
    turns = [(4, 0), (1, 0), (0, 0), (2, 1), (5, 0), (3, 0)]
    questions = [question(world, processor, *turn) for turn in turns]
    end = processor.tokenizer.eos_token_id
    together = model.generate(
        data.collate(questions, processor, for_generation=True), [end], max_new_tokens=12
    )
    for asked, found in zip(questions, together):
        expected = []
        for _ in range(12):
            names = ("input_ids", "kind", "prompt_grid", "seconds_per_pair")
            asked["position_ids"] = processor.positions(*(asked[name] for name in names))
            with torch.no_grad():
                scores = model.logits(data.collate([asked], processor))[0, -1]
            scores[processor.region_token_id] = -torch.inf
            token = int(scores.argmax())
            if token == end:
                break
            expected.append(token)
            for name in ("input_ids", "labels"):
                asked[name] = np.append(asked[name], token)
        assert found == expected
    assert any(together) and len({tuple(answer) for answer in together}) > 1


def test_answers_equal_those_of_generate_of_transformers(checkpoint, loaded, world):
    model, processor = loaded
    config, end = model.backbone.config, processor.tokenizer.eos_token_id
    # Of tokens that neither of the two could go on from, none may be an answer.
    barred = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    model.backbone.lm_head.register_forward_hook(
        lambda module, inputs, scores: scores.index_fill(-1, torch.tensor(barred), -torch.inf)
    )
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    questions = [question(world, processor, *turn) for turn in ((0, 0), (1, 0), (2, 1))]
    together = model.generate(
        data.collate(questions, processor, for_generation=True), [end], max_new_tokens=12
    )
    for number, asked, found in zip(range(3), questions, together):
        inputs = theirs(checkpoint, world, number)
        for name in ("input_ids", "mm_token_type_ids"):  # without the answer
            inputs[name] = inputs[name][:, : len(asked["input_ids"])]
        answer = plain.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=end,
            suppress_tokens=[*barred, processor.region_token_id],
        )[0, len(asked["input_ids"]) :].tolist()
        assert found == (answer[: answer.index(end)] if end in answer else answer)
    assert len({tuple(answer) for answer in together}) > 1


@any_family
def test_generate_stops_at_any_end_token(loaded, world):
    """Published checkpoints list several end tokens; only the tokenizer's was heeded."""
    model, processor = loaded
    batch = data.collate([question(world, processor, 0, 0)], processor, for_generation=True)
    free = model.generate(batch, [-1], max_new_tokens=8)[0]
    assert len(free) == 8
    unused = next(token for token in range(1000) if token not in free)
    for end in set(free):
        for ends in ([end], [unused, end], [end, unused]):
            assert model.generate(batch, ends, max_new_tokens=8)[0] == free[: free.index(end)]


@any_family
@pytest.mark.parametrize("listed, others", [(None, []), (7, [7]), ([3, 9], [3, 9])])
def test_end_tokens_are_those_of_tokenizer_and_generation_config(loaded, tmp_path, listed, others):
    model, processor = loaded
    model.backbone.generation_config.eos_token_id = listed
    model.save_pretrained(tmp_path, asdict(processor.settings))
    processor.save_pretrained(tmp_path)
    again = models.load_model(
        tmp_path, processor
    )  # from generation_config.json, as in a published checkpoint
    expected = {processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), *others}
    assert again.end_token_ids(processor.tokenizer) == sorted(expected)


class ScriptedHead(torch.nn.Module):
    """In place of lm_head: at its step k, row b of the batch scores the tokens script[b][k] highest, best
    first."""

    def __init__(self, script, vocab_size):
        super().__init__()
        self.script, self.vocab_size, self.step = script, vocab_size, 0

    def forward(self, hidden):
        scores = torch.zeros(len(hidden), self.vocab_size)
        for row, tokens in enumerate(self.script):
            for place, token in enumerate(tokens[self.step]):
                scores[row, token] = 10.0 - place
        self.step += 1
        return scores


@any_family
def test_an_answer_ends_at_its_end_token_while_others_of_the_batch_go_on(loaded, world):
    """Slip: a row that had ended was taken up again when the model went on with text behind its end token."""
    model, processor = loaded
    end = processor.tokenizer.eos_token_id
    questions = [question(world, processor, 0, 0)] * 3
    script = [[[5], [end], [7], [8], [9]], [[5], [6], [7], [end], [9]], [[end], [6], [end], [8], [9]]]
    model.backbone.lm_head = ScriptedHead(script, model.backbone.lm_head.out_features)
    answers = model.generate(data.collate(questions, processor, for_generation=True), [end], max_new_tokens=5)
    assert answers == [[5], [5, 6, 7], []]


@any_family
def test_a_region_placeholder_is_never_generated(loaded, world):
    model, processor = loaded
    end, region = processor.tokenizer.eos_token_id, processor.region_token_id
    script = [[[region, 5], [6, region], [region, end]]]
    model.backbone.lm_head = ScriptedHead(script, model.backbone.lm_head.out_features)
    batch = data.collate([question(world, processor, 0, 0)], processor, for_generation=True)
    assert model.generate(batch, [end], max_new_tokens=3) == [[5, 6]]


def test_saved_model_gives_the_same_logits_and_its_backbone_loads_with_transformers_alone(
    checkpoint, loaded, world, tmp_path
):
    model, processor = loaded
    give_regions_weight(model)
    model.save_pretrained(tmp_path / "saved", asdict(processor.settings))
    processor.save_pretrained(tmp_path / "saved")
    again = models.load_processor(tmp_path / "saved")
    assert again.region_token_id == processor.region_token_id
    saved, published = (load_file(f / "model.safetensors") for f in (tmp_path / "saved", checkpoint))
    assert saved.keys() == published.keys() and all(torch.equal(saved[n], published[n]) for n in saved)
    other = models.load_model(tmp_path / "saved", again).eval()
    numbers = range(6)
    with torch.no_grad():
        assert torch.equal(
            other.logits(batch_of(world, again, numbers)), model.logits(batch_of(world, processor, numbers))
        )
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
        ids = batch_of(world, processor, [0])["input_ids"]
        assert torch.equal(plain(input_ids=ids).logits, model.logits(batch_of(world, processor, [0])))


@any_family
@pytest.mark.parametrize(
    "file, change, message",
    [
        ("model.safetensors", "missing", "missing_keys.*norm"),
        ("model.safetensors", "left over", "unexpected_keys.*extra"),
        ("model.safetensors", "shape", "mismatched_keys.*norm"),
        ("region_encoder.safetensors", "missing", "[Mm]issing.*mlp.0"),
        ("region_encoder.safetensors", "left over", "[Uu]nexpected.*extra"),
        ("region_encoder.safetensors", "shape", "mismatch.*mlp.0"),
    ],
)
def test_loading_is_strict(loaded, tmp_path, file, change, message):
    model, processor = loaded
    model.save_pretrained(tmp_path, {})
    processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / file)
    name = next(n for n in sorted(weights) if "norm" in n or "mlp.0" in n)
    if change == "left over":
        weights["extra.weight"] = torch.zeros(3)
    elif change == "shape":
        weights[name] = torch.zeros(7)
    else:
        del weights[name]
    save_file(weights, tmp_path / file, metadata={"format": "pt"})
    with pytest.raises(data.DataError, match=message) as caught:
        models.load_model(tmp_path, processor)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checkpoint", ["qwen3_5", "qwen3_5_moe"], indirect=True)
def test_weights_that_transformers_leaves_out_are_not_left_over(checkpoint, tmp_path):
    """Published Qwen3.5 have a head for predicting several tokens, for which transformers has no module."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors") | {"mtp.fc.weight": torch.zeros(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    models.load_model(tmp_path, models.load_processor(tmp_path))


@any_family
def test_a_saved_folder_without_its_region_weights_is_refused(loaded, tmp_path):
    """Otherwise a trained model would come back with a region encoder that adds nothing."""
    model, processor = loaded
    model.save_pretrained(tmp_path, {})
    processor.save_pretrained(tmp_path)
    (tmp_path / "region_encoder.safetensors").unlink()
    with pytest.raises(data.DataError, match="region_encoder.safetensors"):
        models.load_model(tmp_path, processor)


def test_a_model_that_does_not_exist_is_named_in_one_line(checkpoint, tmp_path):
    """It ended in a traceback of 40 lines."""
    (tmp_path / "empty").mkdir()
    without_tokenizer, without_weights, cut_short = (tmp_path / name for name in ("a", "b", "c"))
    for folder in (without_tokenizer, without_weights, cut_short):
        shutil.copytree(checkpoint, folder)
    (without_tokenizer / "tokenizer.json").unlink()
    (without_weights / "model.safetensors").unlink()
    with open(cut_short / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    paths = ["Nobody/Nothing", "tiny-model", "out/final", str(tmp_path / "missing"), str(tmp_path / "empty")]
    for path in [*paths, str(without_tokenizer), str(without_weights), str(cut_short)]:
        with pytest.raises(data.DataError) as caught:
            models.load_model(path, models.load_processor(path))
        message = str(caught.value)
        assert message.startswith(f"--model {path}: expected ") and "\n" not in message and len(message) < 600
        # transformers 5.23 had made an empty tokenizer for Qwen3.5.
        if path != str(without_tokenizer) or "a tokenizer that knows the ids" not in message:
            assert all(word in message for word in ('"tiny"', "a Hugging Face name", "config.json"))
        if path.endswith("empty"):
            assert "config.json" in message.partition("found: ")[2]


@any_family
def test_settings_come_from_the_folder_unless_given(loaded, tmp_path):
    """Stage 2 of a training once dropped the settings of stage 1, without a word."""
    model, processor = loaded
    model.save_pretrained(tmp_path, asdict(processor.settings))
    processor.save_pretrained(tmp_path)
    assert models.load_processor(tmp_path).settings == SETTINGS
    changed = models.load_processor(tmp_path, num_frames=3, region_tokens=None)
    assert changed.settings == replace(SETTINGS, num_frames=3)
    (tmp_path / "nanorefer.json").unlink()
    plain = models.load_processor(tmp_path, num_frames=3).settings
    assert plain == data.Settings(num_frames=3, **data.PRETRAINED_PIXELS)
    assert models.load_processor("tiny", ["word"], num_frames=3).settings == data.Settings(num_frames=3)


@any_family
def test_a_model_on_the_hub_keeps_its_region_encoder_and_settings(loaded, tmp_path):
    """Both were looked for in folders alone: a new region encoder took the place of the trained one."""
    model, processor = loaded
    folder = tmp_path / "models--me--refer" / "snapshots" / "0123"
    with torch.no_grad():
        model.region_encoder.position[2].bias.fill_(3)
    model.save_pretrained(folder, asdict(processor.settings))
    processor.save_pretrained(folder)
    (tmp_path / "models--me--refer" / "refs").mkdir()
    (tmp_path / "models--me--refer" / "refs" / "main").write_text("0123")
    program = """
import dataclasses, json, model
processor = model.load_processor("me/refer")
bias = model.load_model("me/refer", processor).region_encoder.position[2].bias
print(json.dumps([dataclasses.asdict(processor.settings), bias.min().item()]))
"""
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path)}  # as it is after a download
    top = Path(models.__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=top, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == [asdict(SETTINGS), 3.0]


@any_family
@pytest.mark.parametrize(
    "change", [[3], {"u": 4}, {"window": None}, {"window": None, "windows": 2}, "not JSON"]
)
def test_settings_that_are_unknown_or_missing_are_refused_in_one_line(loaded, tmp_path, change):
    """They ended in a traceback of Settings' TypeError. What a model saved before there were windows lacked
    became the default, another one than it was trained with.
    """
    model, processor = loaded
    model.save_pretrained(tmp_path, asdict(processor.settings))
    processor.save_pretrained(tmp_path)
    saved = change
    if isinstance(change, dict):
        changed = asdict(processor.settings) | change
        saved = {name: value for name, value in changed.items() if value is not None}
    (tmp_path / "nanorefer.json").write_text(change if change == "not JSON" else json.dumps(saved))
    with pytest.raises(data.DataError, match=f"^--model {tmp_path}: expected ") as caught:
        models.load_processor(tmp_path)
    assert "\n" not in str(caught.value)
    if change != "not JSON":
        names = ", ".join(sorted(asdict(SETTINGS)))
        assert f"nanorefer.json with the settings {names}, found {data.shorten(saved)}" in str(caught.value)


@any_family
def test_no_memory_is_not_reported_as_a_broken_model(checkpoint, monkeypatch):
    def from_pretrained(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    processor = models.load_processor(checkpoint)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    with pytest.raises(torch.OutOfMemoryError):
        models.load_model(checkpoint, processor)


@any_family
def test_the_settings_are_saved_beside_the_weights(loaded, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path, asdict(processor.settings))
    saved = json.loads((tmp_path / "nanorefer.json").read_text())
    assert saved["frame_pixels"] == 10000 and saved["region_pixels"] == 22500 and saved["num_frames"] == 5
    assert data.Settings(**saved) == SETTINGS


def test_embeddings_grow_only_where_the_tokenizer_leaves_no_row(tmp_path):
    for spare, rows in [(8, 0), (0, 1)]:
        folder = make_checkpoint(tmp_path / str(spare), "qwen3_vl", spare_rows=spare)
        before = AutoModelForImageTextToText.from_pretrained(folder).get_input_embeddings().num_embeddings
        model = models.load_model(folder, models.load_processor(folder))
        assert model.backbone.get_input_embeddings().num_embeddings == before + rows
        assert model.backbone.lm_head.out_features == before + rows


def test_parameter_groups_hold_every_parameter_once(loaded):
    model, _ = loaded
    groups = model.parameter_groups()
    ids = [id(p) for group in groups.values() for p in group]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("merger" in names[id(p)] for p in groups["projector"])
    assert not any("merger" in names[id(p)] for name in ("vision", "llm", "region") for p in groups[name])


def test_layers_are_what_transformers_never_splits_over_devices(loaded):
    """FSDP gathers, and checkpointing recomputes, one of them at a time."""
    model, _ = loaded
    names = model.backbone._no_split_modules
    expected = [module for module in model.backbone.modules() if type(module).__name__ in names]
    assert len(expected) == 3 + 3 and set(model.layers()) == set(expected)


@pytest.mark.parametrize("numbers", [[0], [1], [2], [3], []])
def test_every_parameter_gets_a_gradient_from_every_kind_of_batch(loaded, world, numbers):
    """Without it, DistributedDataParallel waits for ever when one rank's batch has no region or no media."""
    model, processor = loaded
    model.train()
    ds = dataset(world, processor)
    samples = [ds[0, i] for i in numbers] or [data.EMPTY_SAMPLE]
    loss = model(data.collate(samples, processor))
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == [] and torch.isfinite(loss)


@pytest.mark.parametrize("checkpoint", ["qwen3_vl_moe", "qwen3_5_moe"], indirect=True)
def test_every_expert_learns(loaded, world):
    """The weights of all experts of a layer are one parameter: gradients of zero would not be None."""
    model, processor = loaded
    model.train()(batch_of(world, processor, range(6))).backward()
    experts = [p.grad for name, p in model.named_parameters() if ".experts." in name]
    assert len(experts) == 2 * 3 and all(grad.flatten(1).any(1).all() for grad in experts)


@any_family
def test_an_unknown_family_is_refused(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "qwen2_vl"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="qwen2_5_vl.*qwen3_vl.*qwen2_vl"):
        models.Processor.from_pretrained(tmp_path, SETTINGS)
