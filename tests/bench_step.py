"""Prints what a training step costs, beside the plain loop: `python tests/bench_step.py [--size 2b]`.

Models of the published sizes with random weights learn from random pictures. "ours" is the step of train.py.
"plain" is what most training scripts do: a batch padded on the right, transformers' own `model(**batch).loss`
with sdpa attention, gradient clipping, AdamW. Its regions are pooled in a loop. It has the same parameters.

The times are medians. Tokens are those of the LLM, without padding. Without a GPU it runs a tiny model.
"""

import argparse
import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402

STEPS = 4  # different steps, each of other samples
WORDS = "the a red small person car dog tree walks turns behind before in front of left right slowly then"
QUESTIONS = (
    "Describe what this is about .",
    "<image>\nDescribe the picture .",
    "<video>\nDescribe the video .",
    "<image>\nWhat is <region> ?",
    "<video>\nWhat is <region> doing ?",
    "<video>\nIs <region> left of <region> ?",  # each on 8 frames
)


def published_config(tokens):
    """That of Qwen/Qwen3-VL-2B-Instruct on huggingface.co, where it differs from transformers' defaults."""
    rope = {"rope_type": "default", "rope_theta": 5000000, "mrope_interleaved": True}
    llm = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": rope | {"mrope_section": [24, 20, 20]},
    }
    tower = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "depth": 24,
        "deepstack_visual_indexes": [5, 11, 17],
        "out_hidden_size": 2048,
    }
    return Qwen3VLConfig(text_config=llm, vision_config=tower, tie_word_embeddings=True, **tokens)


def make_samples(count, sides):
    rng, samples = np.random.default_rng(0), []
    for i in range(count):
        question = QUESTIONS[i % len(QUESTIONS)]
        answer = " ".join(rng.choice(WORDS.split(), rng.integers(10, 120)))
        media, objects = question.partition("\n")[0] if "\n" in question else None, []
        for _ in range(question.count("<region>")):
            frames = [0] if media == "<image>" else rng.choice(240, 8 if "left" in question else 1, False)
            (top, left), mask = (int(rng.integers(side // 2)) for side in sides), np.zeros(sides, np.uint8)
            mask[top : top + sides[0] // 4, left : left + sides[1] // 4] = 1
            objects.append(dict.fromkeys(sorted(map(int, frames)), mask))
        samples.append(data.Sample(("memory", f"sample {i}"), i, media, [(question, answer)], objects, sides))
    return samples


class RandomPictures(data.ReferringDataset):
    def media_of(self, sample):
        is_image = sample.media == "<image>"
        info = data.MediaInfo(1 if is_image else 240, 24.0, *sample.size, is_image)
        picture = np.random.default_rng(sample.id).integers(0, 256, (*sample.size, 3), np.uint8)
        times = [k / info.fps for k in range(info.num_frames)]
        return SimpleNamespace(info=info, times=times, read=lambda frames: dict.fromkeys(frames, picture))

    def choose_objects(self, sample, info, rng):
        return sample.objects


def make_steps(options, processor):
    """Returns STEPS lists of micro-batches, of samples in random order."""
    sides = (180, 320) if options.size == "tiny" else (720, 1280)
    dataset = RandomPictures(make_samples(STEPS * options.batch_size, sides), processor)
    order = train.Order(len(dataset), options.batch_size, STEPS, 0, 0, 1)
    steps = [[*train.micro_batches_of([keys], options.micro_batch)] for keys in order]
    return [[data.collate([dataset[key] for key in keys], processor) for keys in step] for step in steps]


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


def plain_batch(batch, processor):
    """A collated batch as a plain model of transformers reads it, {"inputs": ..., "regions": ...}."""
    ids, config, images = batch["input_ids"][0], processor.config, processor.image_processor
    labels = torch.full_like(ids, data.IGNORE_INDEX)
    labels[batch["target_index"] + 1] = batch["targets"]
    lengths = batch["attention"]["sample_lengths"]
    rows = {"input_ids": (ids, processor.tokenizer.pad_token_id), "labels": (labels, data.IGNORE_INDEX)}
    rows["attention_mask"] = torch.ones_like(ids), 0
    inputs = {name: pad_sequence(x.split(lengths), True, pad) for name, (x, pad) in rows.items()}
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == config.image_token_id) + 2 * (ids == config.video_token_id).int()

    def put(names, patches, grids, repeat=1):
        mean, std = (torch.tensor(x)[:, None] for x in (images.image_mean, images.image_std))
        values = (patches.unflatten(1, (3, -1)).float() / 255 - mean) / std
        return dict(zip(names, (values.repeat(1, 1, repeat).flatten(1), grids))) if len(grids) else {}

    # Images come first, then what is shown of regions, then videos.
    grids, copies = batch["tower"]["grid_thw"], processor.temporal_patch_size
    cells = grids.prod(1) // processor.merge_size**2
    num_images, num_shown, _ = batch["cell_counts"]
    ends = [int((cells.cumsum(0) <= end).sum()) for end in (num_images, num_images + num_shown)]
    of_images, of_shown, of_videos = grids.tensor_split(ends)
    split = num_images * processor.merge_size**2
    stills = batch["still_patches"]
    regions = put(("pixels", "grids"), stills[split:], of_shown, copies) if num_shown else {}
    inputs |= put(("pixel_values", "image_grid_thw"), stills[:split], of_images, copies)
    inputs |= put(("pixel_values_videos", "video_grid_thw"), batch["video_patches"], of_videos)
    regions |= batch["regions"] | {"frame_start": batch["regions"]["frame_start"] - num_images}
    where = (ids == processor.region_token_id).flatten().nonzero()[:, 0]
    return {"inputs": inputs, "where": where, "regions": regions, "num_tokens": len(batch["targets"])}


def plain_regions(plain, encoder, pixels, grids, coverage, coverage_start, frame_start, **places):
    """Returns the region tokens, (T, D): pooled one by one, then merged as ours, as regions of one cell."""
    cells = plain.model.visual(pixels, grid_thw=grids).pooler_output
    bounds, pooled = coverage_start.tolist(), []
    for start, begin, end in zip(frame_start.tolist(), bounds, bounds[1:]):
        weights = coverage[begin:end, None]
        pooled.append((weights * cells[start : start + len(weights)]).sum(0) / weights.sum())
    pooled, numbers = torch.stack(pooled), torch.arange(len(bounds), device=cells.device)
    return encoder(pooled, torch.ones_like(pooled[:, 0]), numbers, numbers[:-1], **places)


def plain_step(plain, encoder, parameters, optimizer, micro_batches):
    def put_regions(module, args, embeddings):
        if len(batch["where"]):
            rows = plain_regions(plain, encoder, **batch["regions"]).to(embeddings.dtype)
            return embeddings.flatten(0, 1).index_copy(0, batch["where"], rows).view_as(embeddings)

    total = sum(batch["num_tokens"] for batch in micro_batches)
    hook = plain.get_input_embeddings().register_forward_hook(put_regions)
    for batch in micro_batches:
        batch = train.to_device(batch, plain.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=plain.device.type == "cuda"):
            loss = plain(**batch["inputs"]).loss
        (loss * (batch["num_tokens"] / total)).backward()
    hook.remove()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def our_step(model, parameters, optimizer, micro_batches):
    """What train.train does with a step's micro-batches."""
    device = model.backbone.device
    loss_sum = train.backward(model, [train.to_device(batch, device) for batch in micro_batches])
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    loss_sum, norm = torch.stack([loss_sum, norm]).tolist()
    tokens = sum(len(batch["targets"]) for batch in micro_batches)
    torch._foreach_mul_([p.grad for p in parameters], min(1 / tokens, 1 / norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measure(step, steps, on_gpu):
    """Returns the milliseconds of a step."""
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for micro_batches in steps:
        step(micro_batches)
    if on_gpu:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / len(steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    add = parser.add_argument
    add("--size", choices=["tiny", "2b"], default="tiny", help="tiny, or a published size (default: tiny)")
    add("--batch-size", type=int, default=16, help="samples of a step (default: 16)")
    add("--micro-batch", type=int, default=8, help="samples of a forward pass (default: 8)")
    add("--rounds", type=int, default=5, help=f"how often the {STEPS} steps are measured (default: 5)")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    model, processor = build(options.size, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    collated = make_steps(options, processor)
    padded = [[plain_batch(batch, processor) for batch in step] for step in collated]
    collated, padded = ([*DataLoader(steps, None, pin_memory=on_gpu)] for steps in (collated, padded))
    tokens = statistics.mean(sum(batch["num_tokens"] for batch in step) for step in collated)
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    print(f"{name}, torch {torch.__version__}")
    print(f"{options.size}: {sum(p.numel() for p in model.parameters()) / 1e6:,.0f} million parameters")
    print(f"a step: {options.batch_size} samples, {tokens:,.0f} tokens")
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    plain = plain_twin(model)
    ways = {
        "ours": (partial(our_step, model, parameters, optimizer), collated),
        "plain": (partial(plain_step, plain, model.region_encoder, parameters, optimizer), padded),
    }
    # Both in turn, once to warm up and then in so many rounds.
    rounds = []
    for _ in range(options.rounds + 1):
        rounds.append({way: measure(step, steps, on_gpu) for way, (step, steps) in ways.items()})
    print(f"{'':11}{'ms':>11}{'tokens/s':>11}")
    times = {way: statistics.median(measured[way] for measured in rounds[1:]) for way in ways}
    for way, ms in times.items():
        print(f"{way:>11}{ms:11.1f}{1000 * tokens / ms:11,.0f}")
    print(f"ours is {times['plain'] / times['ours']:.2f} times as fast")


if __name__ == "__main__":
    main()
