"""The model against transformers' own processor and model, and what regions add against float64."""

import copy
import json
import math
import os
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, make_checkpoint, transformers_processor
from helpers import box, box_mask, refusal, sample, write_json
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import data
import eval as evaluation
import model as models

SETTINGS = data.Settings(num_frames=5, frame_pixels=10_000, region_pixels=22_500, window=0, region_tokens=2)
PICTURE = np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)
# Nine pictures, again and again: so long that position ids tell times apart, which Qwen2.5-VL rounds.
CLIP = np.random.default_rng(1).integers(0, 255, (9, 60, 80, 3), dtype=np.uint8)[np.arange(215) % 9]
FILES = [f"{i % 9}.png" for i in range(len(CLIP))]
# The objects of samples 3, 4 and 5: {frame: x, y, width, height}, in a file perhaps not in order of time.
BOXES = {3: [{3: (5, 5, 30, 25)}], 5: [{0: (50, 40, 30, 25)}]}
BOXES[4] = [{k: (k // 5, k // 8, 30, 25) for k in (160, 0, 52, 107)}, {52: (40, 30, 30, 25)}]
SAMPLES = [
    sample("Say the other thing.", "Never."),
    sample("<image>\nWhat is on the image?", "Noise in the picture.", image="a.png"),
    sample("Describe <video> then.", "More noise.\n\n(Or?)  No.", video=FILES),
    sample("<video>\nWhat is <region>?", "The one.", video=FILES),
    sample("<video>\nIs <region>\n  left of <region>?", "On the left.", video=FILES),
    sample("<image>\nWhat is <region>?", "A box.", image="a.png"),
]
SAMPLES[2]["conversations"] += sample("And the rest?", "The same.")["conversations"]
for number, objects in BOXES.items():
    masks = [{str(k): {"segmentation": box(*xywh)} for k, xywh in boxes.items()} for boxes in objects]
    SAMPLES[number]["annotation"] = masks
QUESTIONS = [(4, 0), (1, 0), (0, 0), (2, 1), (5, 0), (3, 0)]  # (sample, turn) of a batch
ROW = [4, 1, 0, 2, 5, 3]


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """SAMPLES as train.py reads them."""
    folder = tmp_path_factory.mktemp("samples")
    for name, picture in [("a.png", PICTURE), *zip(FILES[:9], CLIP)]:
        Image.fromarray(picture).save(folder / name)
    return data.read_samples(write_json(folder / "data.json", SAMPLES))


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


# Where the family cannot change the result; and where experts cannot.
any_family = pytest.mark.parametrize("checkpoint", ["qwen3_vl"], indirect=True)
dense_families = pytest.mark.parametrize("checkpoint", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"], indirect=True)


@pytest.fixture
def loaded(checkpoint):
    processor = models.load_processor(checkpoint, **asdict(SETTINGS))
    model = models.load_model(checkpoint, processor).eval()
    torch.manual_seed(1)
    for p in model.region_encoder.parameters():  # the last layers' zeros would hide the others
        torch.nn.init.normal_(p, std=0.2)
    return model, processor


def batch_of(samples, processor, numbers):
    dataset = data.ReferringDataset(samples, processor)
    return data.collate([dataset[0, number] for number in numbers], processor)


def batch_of_questions(samples, processor, keys):
    questions = evaluation.Questions(samples, processor)
    return data.collate([questions[key] for key in keys], processor, for_generation=True)


# ---- The same in transformers and float64 ----
class Truth:
    """A model of transformers that none of our code has touched, and what it makes of SAMPLES."""

    def __init__(self, folder, encoder):
        self.family = json.loads((folder / "config.json").read_text())["model_type"]
        self.plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.encoder = copy.deepcopy(encoder).double()
        limits = SETTINGS.num_frames, SETTINGS.frame_pixels, SETTINGS.region_pixels
        self.processor = transformers_processor(folder, self.family, *limits)
        self.images, self.tokenizer = self.processor.image_processor, self.processor.tokenizer
        self.region_token_id = self.tokenizer.convert_tokens_to_ids("<|region_pad|>")

    def inputs(self, number, for_generation=False):
        """What transformers' processor makes of a sample: keyword arguments of the plain model."""
        counts = iter(min(len(boxes), SETTINGS.region_tokens) for boxes in BOXES.get(number, []))
        tokens = "<|vision_start|><|{}_pad|><|vision_end|>"
        # When Qwen3-VL and Qwen3.5 came out (transformers 4.57 and 5.2), no vision tokens stood around all
        # timestamps, where their template now puts them.
        video = tokens.format("video") if self.family == "qwen2_5_vl" else "<|video_pad|>"
        messages = []
        for turn in SAMPLES[number]["conversations"]:
            text = re.sub("<region>", lambda _: "<|region_pad|>" * next(counts), turn["value"])
            text = re.sub(r"\n?<image>\n?", tokens.format("image"), text)
            text = re.sub(r"\n?<video>\n?", video, text)
            messages.append({"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": text})
        messages = messages[:-1] if for_generation else messages
        options = {"tokenize": False, "add_generation_prompt": for_generation, "enable_thinking": False}
        text = self.tokenizer.apply_chat_template(messages, **options)
        if self.family.startswith("qwen3_5"):  # asked without thinking, and trained so in all turns
            text = re.sub(r"(?<=assistant\n)(?!<think>)", "<think>\n\n</think>\n\n", text)
        all_media = {"image": {"images": [PICTURE]}, "video": {"videos": [CLIP]}}
        [media] = [all_media[kind] for kind in all_media if kind in SAMPLES[number]] or [{}]
        return dict(self.processor(text=[text], **media, return_tensors="pt"))

    def labels(self, number, ids):
        """The answers of a sample with their end tokens, found in its token ids; all else is -100."""
        labels, start = torch.full_like(ids, -100), 0
        for turn in SAMPLES[number]["conversations"][1::2]:
            answer = torch.tensor(self.tokenizer.encode(turn["value"] + "<|im_end|>"))
            while not torch.equal(ids[0, start : start + len(answer)], answer):
                start += 1
            labels[0, start : start + len(answer)] = answer
        return labels

    def region_tokens(self, number):
        """README's region tokens (T, D) of a sample in float64, from the cells of one picture at a time."""
        frames, tokens = [PICTURE] if "image" in SAMPLES[number] else CLIP, []
        for boxes in BOXES[number]:
            pooled, code = [], []
            for frame, (x, y, w, h) in sorted(boxes.items()):
                H, W, _ = frames[frame].shape
                still = self.images(frames[frame], return_tensors="pt")
                _, gh, gw = (still["image_grid_thw"][0] // 2).tolist()
                cells = self.plain.model.visual(still["pixel_values"], grid_thw=still["image_grid_thw"])
                mask = np.kron(box_mask(H, W, x, y, w, h), np.ones((gh, gw)))  # each pixel cut into gh x gw
                coverage = torch.tensor(mask.reshape(gh, H, gw, W).mean((1, 3))).flatten()
                pooled.append(coverage @ cells.pooler_output.double() / coverage.sum())
                time = frame / max(len(frames) - 1, 1)
                code.append([(x + w / 2) / W, (y + h / 2) / H, w / W, h / H, time])
            pooled, code = torch.stack(pooled), torch.tensor(code, dtype=torch.float64)
            share = torch.tensor(merged_by_hand(pooled.tolist(), min(len(boxes), SETTINGS.region_tokens)))
            merged, code = share.double() @ pooled, share.double() @ code
            angles = [torch.pi * code[:, [i]] * 2**k for i in range(5) for k in range(4)]
            code = [2 * code - 1, (2 * code - 1) * (2 * code[:, 4:] - 1)]
            code = torch.cat([*code, *map(torch.sin, angles), *map(torch.cos, angles)], dim=1)
            tokens.append(merged + self.encoder.mlp(merged) + self.encoder.position(code))
        return torch.cat(tokens).float()

    def with_regions(self, number):
        """A context in which the plain model reads region tokens in place of their placeholders."""

        def put(module, arguments, embeddings):
            places = arguments[0] == self.region_token_id
            if not places.any():
                return embeddings
            return embeddings.masked_scatter(places[..., None], self.region_tokens(number))

        return self.plain.get_input_embeddings().register_forward_hook(put)


def merged_by_hand(pooled, count):
    """VideoRefer section 3.2.2 in plain Python: joins the most similar neighbours, one pair after another.
    Returns the share that each of an object's rows has in each of its tokens, as lists."""

    def similarity(a, b):  # rounded, so that ties do not depend on the order of a sum
        dot = sum(x * y for x, y in zip(pooled[a], pooled[b]))
        return round(dot / (math.hypot(*pooled[a]) * math.hypot(*pooled[b]) or 1), 9)

    runs = [[i] for i in range(len(pooled))]
    while len(runs) > count:
        similarities = [similarity(one[-1], two[0]) for one, two in zip(runs, runs[1:])]
        i = similarities.index(max(similarities))  # the first of equal ones
        runs[i : i + 2] = [runs[i] + runs[i + 1]]
    return [[1 / len(run) if i in run else 0.0 for i in range(len(pooled))] for run in runs]


def test_a_row_reads_and_learns_as_transformers_does_one_sample_at_a_time(checkpoint, loaded, samples):
    """Token ids, labels, logits, loss and the gradient of every parameter; regions as README has them."""
    model, processor = loaded
    truth = Truth(checkpoint, model.region_encoder)
    dataset, logits, losses = data.ReferringDataset(samples, processor), [], []
    for number in ROW:
        inputs = truth.inputs(number)
        labels = truth.labels(number, inputs["input_ids"])
        encoded = dataset[0, number]
        assert encoded["input_ids"].tolist() == inputs["input_ids"][0].tolist(), number
        assert encoded["labels"].tolist() == labels[0].tolist(), number
        with truth.with_regions(number):
            output = truth.plain(**inputs, labels=labels)
        losses.append(output.loss * (labels != -100).sum())
        logits.append(output.logits.detach())
    torch.stack(losses).sum().backward()

    batch = batch_of(samples, processor, ROW)
    loss = model(batch)
    loss.backward()
    with torch.no_grad():
        # The tower's convolution is computed as a matrix product, which adds up in another order.
        torch.testing.assert_close(model.logits(batch), torch.cat(logits, dim=1), atol=5e-5, rtol=1e-4)
    assert loss.item() == pytest.approx(sum(losses).item(), rel=2e-6)
    expected = {"backbone." + name: p.grad for name, p in truth.plain.named_parameters()}
    expected |= {"region_encoder." + name: p.grad for name, p in truth.encoder.named_parameters()}
    for name, p in model.named_parameters():
        assert (p.grad - expected[name]).norm() < 3e-5 * expected[name].norm(), name


def test_answers_equal_those_of_transformers_generate(checkpoint, loaded, samples):
    """All kinds of questions in one batch, padded on the left, against one question at a time."""
    model, processor = loaded
    truth = Truth(checkpoint, model.region_encoder)
    config, end = model.backbone.config, processor.tokenizer.eos_token_id
    # Random weights may answer with a vision token, from which transformers could not go on.
    barred = torch.tensor([config.image_token_id, config.video_token_id, config.vision_start_token_id])
    model.backbone.lm_head.register_forward_hook(lambda *x: x[-1].index_fill(-1, barred, -torch.inf))
    batch = batch_of_questions(samples, processor, QUESTIONS)
    model.end_token_ids = {end}
    answers = model.generate(batch, max_new_tokens=8)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": end}
    options["suppress_tokens"] = [*barred.tolist(), truth.region_token_id]
    for (number, _), row, found in zip(QUESTIONS, batch["input_ids"], answers):
        inputs = truth.inputs(number, for_generation=True)
        prompt = inputs["input_ids"][0].tolist()
        assert row[-len(prompt) :].tolist() == prompt, number
        with truth.with_regions(number), torch.no_grad():
            expected = truth.plain.generate(**inputs, **options)[0, len(prompt) :].tolist()
        assert found == [token for token in expected if token != end], number
    assert len({tuple(answer) for answer in answers}) > 2


@any_family
def test_end_tokens_end_an_answer_for_good_and_a_region_is_never_one(loaded, samples):
    """By hand, where row b of a batch scores the tokens script[b][k] highest at step k, best first."""
    model, processor = loaded
    end, region = processor.tokenizer.eos_token_id, processor.region_token_id
    script = [[[5], [end], [7]], [[5], [6], [9], [7]], [[end], [6]], [[region, 5], [6], [region, end]], [[5]]]
    expected = [[5], [5, 6], [], [5, 6], [5] * 128]  # by default at most 128 tokens

    class ScriptedHead(torch.nn.Module):
        step = 0

        def forward(self, hidden):
            scores = torch.zeros(len(hidden), len(processor.tokenizer))
            for row, steps in enumerate(script):
                best = steps[min(self.step, len(steps) - 1)]
                scores[row, best] = torch.arange(len(best), 0, -1.0)
            self.step += 1
            return scores

    batch = batch_of_questions(samples, processor, [(0, 0)] * len(script))
    model.end_token_ids = {end, 9}
    for limit, options in [(128, {}), (3, {"max_new_tokens": 3})]:
        model.backbone.lm_head = ScriptedHead()
        found = model.generate(batch, **options)
        assert found == [answer[:limit] for answer in expected]


@any_family
def test_end_tokens_are_those_of_generation_config_tokenizer_and_chat(loaded):
    """Published checkpoints list one or several; against sets written by hand."""
    backbone, processor = loaded[0].backbone, loaded[1]
    end, other = processor.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    table = [("im_end", None, {None}), ("im_end", 7, {7}), ("endoftext", [3, 9], {3, 9, other})]
    for eos, listed, expected in table:
        processor.tokenizer.eos_token, backbone.generation_config.eos_token_id = f"<|{eos}|>", listed
        assert models.ReferringVideoLLM(backbone, processor).end_token_ids == expected | {end}


def test_temporal_merge_equals_a_merge_in_plain_python():
    """With vectors of few cosines, which float32 makes of equal numbers wherever they are equal, for ties."""
    rng = np.random.default_rng(0)
    axes = [scale * row for scale in (-4, -1, 0, 0.5, 1) for row in np.eye(4)]
    for draw in range(200):
        object_frames = rng.integers(1, 12, size=rng.integers(1, 6))
        region_tokens = rng.integers(1, object_frames + 1)
        R, T = sum(object_frames), sum(region_tokens)
        vectors = [rng.normal(size=(R, 4)), rng.choice(axes, R), np.ones((R, 4))]
        pooled = torch.tensor(vectors[draw % 3], dtype=torch.float32)
        objects = zip(pooled.split(object_frames.tolist()), region_tokens)
        expected = [torch.tensor(merged_by_hand(rows.tolist(), u)) for rows, u in objects]
        found = models.temporal_merge(pooled, object_frames.tolist(), region_tokens.tolist(), T)
        torch.testing.assert_close(found, torch.block_diag(*expected))


@torch.no_grad()
def test_region_tokens_are_as_exact_in_bfloat16():
    """Under autocast, and with weights that FSDP casts, against float32. bfloat16, with 8 bits, would be
    wrong by up to 4e-3. At first, a region token is the average of its cells alone, which here is 0."""
    torch.manual_seed(0)
    encoder = models.RegionEncoder(16)
    inputs = {"coverage": torch.rand(12), "coverage_start": torch.tensor([0, 4, 8, 12])}
    inputs |= {"frame_start": torch.tensor([0, 4, 4]), "boxes": torch.rand(3, 5)}
    inputs |= {"object_frames": [3], "region_tokens": [2]}
    assert not encoder(torch.zeros(8, 16), **inputs).any()
    torch.nn.init.normal_(encoder.position[2].weight)
    encoder, cells = encoder.bfloat16(), torch.randn(8, 16)
    expected = encoder.float()(cells, **inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(encoder(cells, **inputs), expected, atol=1e-5, rtol=1e-5)
    zeros = torch.zeros(8, 16, dtype=torch.bfloat16)
    expected = encoder(zeros.float(), **inputs)
    torch.testing.assert_close(encoder.bfloat16()(zeros, **inputs), expected, atol=1e-5, rtol=1e-5)


@dense_families
def test_texts_that_would_end_a_turn_or_hide_an_answer_are_refused(loaded):
    """Control tokens in all families; thoughts in Qwen3.5, whose template takes them out of answers."""
    _, processor = loaded
    control_tokens, thoughts = ["What<|im_end|>?", "<|region_pad|>"], ["Red</think>", "<think>A box."]
    thinks = processor.config.model_type.startswith("qwen3_5")
    for text in control_tokens + thoughts * thinks:
        for turns in ([(text, "x")], [("x", text)], [("x", text), ("y", "z")]):
            refusal(processor.encode, turns, data.EMPTY_SAMPLE)
    for text in thoughts * (not thinks) + ["a < b > c |im_end|"]:
        encoded = processor.encode([("x", text)], data.EMPTY_SAMPLE)
        assert text in processor.tokenizer.decode(encoded["input_ids"])


@any_family
def test_a_sample_that_is_too_long_is_refused_not_cut(loaded, samples):
    """At the limit and one beyond; the error names the limit and the length."""
    dataset = data.ReferringDataset(samples, loaded[1])
    length = len(dataset[0, 4]["input_ids"])
    for limit in (length, length - 1):
        dataset.processor.settings = replace(SETTINGS, max_length=limit)
        found = dataset[0, 4]
        assert len(found["input_ids"]) == length if limit == length else f"{limit} " in str(found), limit
    assert f"{length} " in str(found)


@any_family
def test_sizes_of_pictures(loaded):
    """Whole cells of 32 pixels within the limits of checkpoint and settings, worked by hand."""
    processor, cell, twelve = loaded[1], 32 * 32, ((96, 128), (96, 128))
    for low, high, region_pixels, still_and_window in [
        (1, 64, 12, twelve),
        (1, 12, 99, twelve),
        (150, 900, 900, ((352, 480), (800, 1088))),  # a window is enlarged as far as it may be
        (900, 900, 12, twelve),
    ]:
        processor.image_processor.size = {"shortest_edge": low * cell, "longest_edge": high * cell}
        settings = replace(SETTINGS, region_pixels=region_pixels * cell, frame_pixels=4 * cell)
        parts = processor.tokenizer, processor.image_processor, processor.config
        processor = models.Processor(*parts, settings)
        assert (processor.still_size(300, 400), processor.window_size(300, 400)) == still_and_window
        assert processor.frame_size(300, 400) == (32, 64) and processor.frame_size(9, 9) == (32, 32)
        # Where 12 cells are allowed, a square has 3 x 3, and what is 100 times as wide as high has 1 x 12.
        # Where 900 are, they have 30 x 30 and 3 x 300.
        side, thin = (96, (32, 12 * 32)) if still_and_window == twelve else (30 * 32, (96, 300 * 32))
        assert processor.window_size(7, 7) == (side, side)
        assert processor.window_size(10, 1000) == thin and processor.window_size(1000, 10) == thin[::-1]
    assert processor.still_size(64, 64) == (128, 128) and processor.still_size(10, 2000)
    refusal(processor.still_size, 10, 2001)  # transformers' own limit


def refuse(path):
    """Asserts that loading ends with one line that names the model, and returns it."""
    error = refusal(evaluation.load, path, "cpu")
    assert error.args[1] == f"--model {path}" and "\n" not in str(error)
    return str(error)


@dense_families
def test_a_template_that_writes_other_texts_is_refused(checkpoint, tmp_path):
    """Each changes what some conversation looks like, fails, or is no template; and there may be none."""
    changes = [
        ("<|im_start|>{{", "<|im_start|> {{"),
        ("<|vision_start|><|image_pad|>", "Picture: <|vision_start|><|image_pad|>"),
        ("{% for message in messages %}", "{% for message in messages %}{{ message.content.text.upper() }}"),
        ("{% endfor %}", ""),
    ]
    if "qwen3_5" in str(checkpoint):
        changes += [
            ("{% if enable_thinking is false %}", "{% if false %}"),  # it always thinks
            ("{{ text }}<|im_end|>", "{{ text if loop.last or loop.first }}<|im_end|>"),
        ]
    folder = shutil.copytree(checkpoint, tmp_path / "changed")
    path = folder / "chat_template.jinja"
    template = path.read_text()
    for old, new in changes:
        assert old in template
        path.write_text(template.replace(old, new))
        refuse(folder)
    path.unlink()
    refuse(folder)
    write_json(folder / "chat_template.json", {"chat_template": template})  # as of Qwen2.5-VL
    assert models.load_processor(folder).tokenizer.chat_template == template


def test_a_saved_model_is_the_published_one_and_the_region_encoder(checkpoint, loaded, samples, tmp_path):
    """Weights and their names are those of transformers' file; loaded again, the logits are the same."""
    model, processor = loaded
    model.save_pretrained(tmp_path, processor)
    saved, published = (load_file(folder / "model.safetensors") for folder in (tmp_path, checkpoint))
    assert saved.keys() == published.keys() and all(torch.equal(saved[n], published[n]) for n in saved)
    both = evaluation.load(tmp_path, "cpu"), loaded
    assert torch.equal(*(model.logits(batch_of(samples, processor, ROW)) for model, processor in both))
    model.backbone.save_pretrained = lambda folder, **_: (folder / "model.safetensors").unlink()
    assert "weights" in refusal(model.save_pretrained, tmp_path, processor).args[0]  # none may be lost


@any_family
def test_weights_are_read_and_written_in_float32(loaded, tmp_path):
    """Published ones are bfloat16, and so are those that train.py freezes on a GPU."""
    loaded[0].to(torch.bfloat16).save_pretrained(tmp_path, loaded[1])
    for name in ("model.safetensors", "region_encoder.safetensors"):
        assert {p.dtype for p in load_file(tmp_path / name).values()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    folder = make_checkpoint(tmp_path / "published", "qwen3_vl", spare_rows=0)
    AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    found = evaluation.load(folder, "cpu")[0]
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    # Most have spare rows in their embeddings. Without, there is one more, for the region token.
    rows = [model.backbone.get_input_embeddings().num_embeddings for model in (found, loaded[0])]
    assert rows == [269 + 1, 269 + 8]


@pytest.mark.parametrize("checkpoint", ["qwen3_5"], indirect=True)
def test_weights_that_do_not_fit_are_refused(loaded, tmp_path):
    """In either file one is missing, left over, or of another shape, which the error names."""
    loaded[0].save_pretrained(tmp_path, loaded[1])
    for file in ("model.safetensors", "region_encoder.safetensors"):
        weights = load_file(tmp_path / file)
        name = next(name for name in sorted(weights) if "norm" in name or "mlp.0" in name)
        missing = {n: weight for n, weight in weights.items() if n != name}
        left_over, of_other_shape = weights | {"extra": torch.zeros(3)}, weights | {name: torch.zeros(7)}
        for changed, unfit in [(missing, name), (left_over, "extra"), (of_other_shape, name)]:
            save_file(changed, tmp_path / file, metadata={"format": "pt"})
            assert unfit in refuse(tmp_path)
        # Of published Qwen3.5 there is one for which transformers has no module: it predicts more tokens.
        known = {"mtp.fc.weight": torch.zeros(3)} if file == "model.safetensors" else {}
        save_file(weights | known, tmp_path / file, metadata={"format": "pt"})
        evaluation.load(tmp_path, "cpu")
    (tmp_path / "region_encoder.safetensors").unlink()
    refuse(tmp_path)


@any_family
def test_a_folder_that_is_no_model_is_refused(checkpoint, tmp_path):
    """Names that do not exist, and folders in which a file is missing, cut or of another family."""
    (tmp_path / "empty").mkdir()
    folders = [shutil.copytree(checkpoint, tmp_path / name) for name in "abcd"]
    (folders[0] / "tokenizer.json").unlink()
    (folders[1] / "model.safetensors").unlink()
    os.truncate(folders[2] / "model.safetensors", 1000)
    config = json.loads((checkpoint / "config.json").read_text())
    write_json(folders[3] / "config.json", config | {"model_type": "qwen2_vl"})
    for path in [*folders, tmp_path / "empty", tmp_path / "missing", "Nobody/Nothing", "tiny-model"]:
        refuse(path)


@any_family
def test_settings_that_do_not_fit_are_refused(loaded, tmp_path):
    """None is guessed. (What is saved and inherited is compared in test_train.py.)"""
    loaded[0].save_pretrained(tmp_path, loaded[1])
    saved = asdict(SETTINGS)
    without = {name: value for name, value in saved.items() if name != "window"}
    for unfit in (3, [3], saved | {"u": 4}, without, without | {"windows": 2}):
        write_json(tmp_path / "nanorefer.json", unfit)
        assert "nanorefer.json" in refuse(tmp_path)


@any_family
def test_a_model_on_the_hub_keeps_its_region_encoder_and_settings(loaded, tmp_path, monkeypatch):
    """The values that were saved, read from the cache as it is after a download."""
    model, processor = loaded
    torch.nn.init.constant_(model.region_encoder.position[2].bias, 3)
    model.save_pretrained(tmp_path / "models--me--refer" / "snapshots" / "0123", processor)
    (tmp_path / "models--me--refer" / "refs").mkdir()
    (tmp_path / "models--me--refer" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model, processor = evaluation.load("me/refer", "cpu")
    assert processor.settings == SETTINGS and (model.region_encoder.position[2].bias == 3).all()


def test_the_tiny_model_and_its_tokenizer():
    """Any text comes back from its tokens; words of every prompt are one token; each token has a row."""
    many = ["".join(map(chr, np.random.default_rng(i).integers(97, 123, 9))) for i in range(999)]
    for texts in ([], many):
        processor = models.load_processor("tiny", texts)
        tokenizer, model = processor.tokenizer, models.load_model("tiny", processor)
        for text in ("A red ball.", "naïve 東京 🙂\n\t x", "<|im_start|>user\n<5.4 seconds>"):
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert all(len(tokenizer.encode(word)) == 1 for word in ("user", "assistant", " seconds"))
        embeddings = model.backbone.get_input_embeddings().weight
        assert len(embeddings) == 512 > processor.region_token_id
        assert model.backbone.lm_head.weight is embeddings
    assert tokenizer.vocab_size == 500
