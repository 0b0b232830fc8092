"""Prints what a training step costs, beside the plain loop: `python tests/bench_step.py [--size 2b]`.

Models of the published sizes with random weights learn from noise. "ours" is the step of train.py. "plain" is
what most training scripts do: a batch padded on the right, transformers' own `model(**batch).loss` with sdpa
attention, gradient clipping, AdamW. It knows no regions; "regions" is our step, where each question has one.

The times are medians. Tokens are those of the LLM, without padding. Without a GPU it runs a tiny model.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import box, sample, write_json  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402

STEPS, ROUNDS = 2, 5  # different steps, each of other samples, and how often all of them are measured
BATCH, MICRO_BATCH = 16, 8  # samples of a step, and of a forward pass
WORDS = "the a red small person car dog tree walks turns behind before in front of left right slowly then"


def published_config(tokens):
    """That of Qwen/Qwen3-VL-2B-Instruct on huggingface.co, where it differs from transformers' defaults."""
    rope = {"rope_type": "default", "rope_theta": 5000000, "mrope_interleaved": True}
    llm = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "head_dim": 128}
    llm |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    llm["rope_parameters"] = rope | {"mrope_section": [24, 20, 20]}
    tower = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "out_hidden_size": 2048}
    tower["deepstack_visual_indexes"] = [5, 11, 17]
    return Qwen3VLConfig(text_config=llm, vision_config=tower, tie_word_embeddings=True, **tokens)


def build(size, device):
    """Returns (model, processor) with random weights. What does not learn is frozen, as train.py does it."""
    config, tokenizer, images = models.build_tiny([WORDS] * 9)
    settings = data.Settings()
    if size != "tiny":
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config = published_config({name: getattr(config, name) for name in names})
        half, pixels = [0.5] * 3, {"shortest_edge": 65536, "longest_edge": 16777216}
        images = Qwen2VLImageProcessorPil(size=pixels, image_mean=half, image_std=half, patch_size=16)
        settings = data.Settings(**data.PRETRAINED_PIXELS)
    processor = models.Processor(tokenizer, images, config, settings)
    torch.manual_seed(0)
    with torch.device(device):  # bfloat16, as published weights are, and then as load_model returns them
        backbone = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16).float()
    model = models.ReferringVideoLLM(backbone, processor)
    train.choose_parameters(model, train.Config(train="region,projector,llm", lr=0.0, region_lr=0.0))
    if device.type == "cuda":
        train.halve_frozen(model)
    return model.to(device).train(), processor


def plain_twin(model):
    """Returns a model of transformers as it comes, whose parameters are those of our model's backbone."""
    config = copy.deepcopy(model.backbone.config)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        plain = type(model.backbone)(config)
    for name, module in plain.named_modules():
        ours = model.backbone.get_submodule(name)
        module._parameters, module._buffers = ours._parameters, ours._buffers
    return plain.train()


def make_steps(folder, sides, processor, has_regions):
    """Returns STEPS lists of collated micro-batches: questions about a text, an image and a video in turn."""
    rng, (height, width), entries = np.random.default_rng(0), sides, []
    Image.fromarray(rng.integers(0, 256, (*sides, 3), np.uint8)).save(f"{folder}/a.bmp")
    for i in range(STEPS * BATCH):
        media = ({}, {"image": "a.bmp"}, {"video": ["a.bmp"] * 240})[i % 3]
        frames = {0} if "image" in media else {*rng.choice(240, 8).tolist()}
        mask = box(*rng.integers(height // 2, size=2).tolist(), width // 4, height // 4)
        regions = [dict.fromkeys(frames, mask)] if media and has_regions else []
        answer = " ".join(rng.choice(WORDS.split(), rng.integers(10, 120)))
        question = "What is <region> ?" if regions else "What is this ?"
        entries.append(sample(question, answer, *regions, **media))
    dataset = data.ReferringDataset(data.read_samples(write_json(f"{folder}/data.json", entries)), processor)
    order = train.order(len(dataset), BATCH, range(STEPS), 0, 0, 1)
    steps = [[keys[i : i + MICRO_BATCH] for i in range(0, BATCH, MICRO_BATCH)] for keys in order]
    return [[data.collate([dataset[key] for key in keys], processor) for keys in step] for step in steps]


def plain_batch(batch, processor):
    """A collated batch without regions as the keyword arguments of a plain model of transformers."""
    ids, config, images = batch["input_ids"][0], processor.config, processor.image_processor
    labels = torch.full_like(ids, data.IGNORE_INDEX)
    labels[batch["target_index"] + 1] = batch["targets"]
    rows = {"input_ids": (ids, processor.tokenizer.pad_token_id), "labels": (labels, data.IGNORE_INDEX)}
    rows["attention_mask"] = torch.ones_like(ids), 0
    lengths = batch["attention"]["sample_lengths"]
    inputs = {name: pad_sequence(x.split(lengths), True, pad) for name, (x, pad) in rows.items()}
    ids, grids = inputs["input_ids"], batch["tower"]["grid_thw"]
    inputs["mm_token_type_ids"] = (ids == config.image_token_id) + 2 * (ids == config.video_token_id).int()
    mean, std = (torch.tensor(x)[:, None] for x in (images.image_mean, images.image_std))
    for kind, patches, of_kind, copies in (
        ("image", batch["still_patches"], grids[:, 0] == 1, processor.temporal_patch_size),
        ("video", batch["video_patches"], grids[:, 0] > 1, 1),
    ):
        if (ids == getattr(config, f"{kind}_token_id")).any():
            values = (patches.unflatten(1, (3, -1)).float() / 255 - mean) / std
            name = "pixel_values" if kind == "image" else "pixel_values_videos"
            inputs |= {name: values.repeat(1, 1, copies).flatten(1), f"{kind}_grid_thw": grids[of_kind]}
    return {"inputs": inputs, "targets": batch["targets"]}


def plain_backward(plain, micro_batches):
    for batch in micro_batches:
        with torch.autocast("cuda", torch.bfloat16, enabled=plain.device.type == "cuda"):
            loss = plain(**batch["inputs"]).loss
        (loss * len(batch["targets"])).backward()


def run(backward, steps, optimizer):
    """What both do with each step's micro-batches: gradients, clipping, and the optimizer."""
    [group] = optimizer.param_groups
    for micro_batches in steps:
        backward([train.to_device(batch, group["params"][0].device) for batch in micro_batches])
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        tokens = sum(len(batch["targets"]) for batch in micro_batches)
        torch._foreach_mul_(gradients, min(1 / tokens, 1 / norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--size", choices=["tiny", "2b"], default="tiny", help="(default: tiny)")
    size, on_gpu = parser.parse_args().size, torch.cuda.is_available()
    model, processor = build(size, torch.device("cuda" if on_gpu else "cpu"))
    sides = (180, 320) if size == "tiny" else (720, 1280)
    with tempfile.TemporaryDirectory() as folder:
        without = make_steps(folder, sides, processor, has_regions=False)
        regions = make_steps(folder, sides, processor, has_regions=True)
    padded = [[plain_batch(batch, processor) for batch in step] for step in without]
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{name}, torch {torch.__version__}, {weights:,.0f} million weights")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    ours, plain = partial(train.backward, model), partial(plain_backward, plain_twin(model))
    timers = {}
    for way, backward, steps in (
        ("ours", ours, without),
        ("plain", plain, padded),
        ("regions", ours, regions),
    ):
        pinned = [*DataLoader(steps, None, pin_memory=on_gpu)]
        timers[way] = Timer("run()", globals={"run": partial(run, backward, pinned, optimizer)})
    # All in turn, in so many rounds. Before each time that it takes, a Timer warms up.
    rounds = [{way: timer.timeit(1).median for way, timer in timers.items()} for _ in range(ROUNDS)]
    ms = {way: 1000 / STEPS * statistics.median(seconds[way] for seconds in rounds) for way in timers}
    for way, steps in (("ours", without), ("plain", without), ("regions", regions)):
        tokens = sum(batch["input_ids"].numel() for step in steps for batch in step) / STEPS
        print(f"{way:>8}: {ms[way]:8.1f} ms a step of {BATCH} samples, {tokens:,.0f} tokens")
    print(f"ours is {ms['plain'] / ms['ours']:.2f} times as fast as plain")


if __name__ == "__main__":
    main()
