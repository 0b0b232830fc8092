"""Prints what a training step costs, beside the plain loop: `python tests/bench_step.py [--size 2b]`.

It needs no data, no checkpoint and no network: models of the published sizes with random weights learn from
random pictures, encoded as data.py encodes samples. "ours" is the step of train.py. "plain" is what most
training scripts do: a batch padded on the right, an attention mask, `model(**batch, labels=labels).loss` of
transformers with its sdpa attention, gradient clipping, AdamW. Its regions are pooled and merged in loops, as
in VideoRefer's code, and it has the very parameters of the other. Both learn the same from the same samples
(tests/test_train.py compares their gradients).

    tokens/s   of the LLM, without padding
    MFU        the operations that a step needs, over those that a large matrix product makes in the same
               time. They are counted in our step, where nothing is padded, and without recomputation
    vision     the share of the time that goes into the vision tower and the regions, forward and backward
    LLM        ... into the LLM and the loss
    optimizer  ... into clipping and the optimizer
    waiting    of all this, the share in which the GPU had nothing to do, from a profile of one more step

Without a GPU it runs a tiny model, for half a minute.
"""

import argparse
import copy
import importlib
import os
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest import mock

here = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(here))
for name in ("av", "pycocotools", "peft"):  # for videos, masks and adapters, of which there are none here
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = mock.MagicMock()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402

STEPS = 4  # different steps, each of other samples

# From config.json of Qwen/Qwen3-VL-2B-Instruct and Qwen/Qwen3-VL-8B-Instruct on huggingface.co; the rest is
# as transformers has it by default.
SIZES = {
    "2b": {
        "text_config": {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2048,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tie_word_embeddings": True,
    },
    "8b": {
        "text_config": {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
        },
        "vision_config": {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        "tie_word_embeddings": False,
    },
}
SHARED = {
    "text_config": {
        "vocab_size": 151936,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000000,
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
        },
    },
    "vision_config": {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304},
}

# ---- samples ----

WORDS = (
    "the a red small person car dog tree walks turns behind before in front of left right slowly then and it"
)
QUESTIONS = {
    "text": "Describe what this is about .",
    "image": "<image>\nDescribe the picture .",
    "video": "<video>\nDescribe the video .",
    "image region": "<image>\nWhat is <region> ?",
    "video region": "<video>\nWhat is <region> doing ?",
    "video regions": "<video>\nIs <region> left of <region> ?",
}


def make_samples(count, sides):
    """Returns data.Samples of all kinds. Each object is a box, {frame: (top, bottom, left, right)}."""
    rng, samples = np.random.default_rng(0), []
    for i in range(count):
        kind, question = list(QUESTIONS.items())[i % len(QUESTIONS)]
        answer = " ".join(rng.choice(WORDS.split(), rng.integers(10, 120)))
        objects = []
        for _ in range(question.count("<region>")):
            frames = [0] if "image" in kind else rng.choice(240, 8 if kind == "video regions" else 1, False)
            top, left = (int(rng.integers(side // 2)) for side in sides)
            objects.append(
                dict.fromkeys(map(int, frames), (top, top + sides[0] // 4, left, left + sides[1] // 4))
            )
        media = None if kind == "text" else f"{i}.{'png' if 'image' in kind else 'mp4'}"
        samples.append(data.Sample(("memory", f"sample {i}"), i, media, [(question, answer)], objects, sides))
    return samples


class RandomPictures(data.ReferringDataset):
    """Samples whose media are noise, and whose masks are boxes."""

    def media_of(self, sample):
        is_image = sample.media.endswith("png")
        info = data.MediaInfo(1 if is_image else 240, 24.0, *sample.size, is_image)
        times = [k / info.fps for k in range(info.num_frames)]
        return SimpleNamespace(info=info, times=times, read=lambda frames: self.read(sample, frames))

    def read(self, sample, frames):
        picture = np.random.default_rng(sample.id).integers(0, 256, (*sample.size, 3), np.uint8)
        return dict.fromkeys(frames, picture)

    def choose_objects(self, sample, info, rng):
        objects = []
        for boxes in sample.objects:
            objects.append({frame: np.zeros(sample.size, np.uint8) for frame in sorted(boxes)})
            for frame, (top, bottom, left, right) in boxes.items():
                objects[-1][frame][top:bottom, left:right] = 1
        return objects


def encode_steps(options, processor):
    """Returns STEPS lists of micro-batches of encoded samples, in random order."""
    sides = (180, 320) if options.size == "tiny" else (720, 1280)
    dataset = RandomPictures(make_samples(STEPS * options.batch_size, sides), processor)
    order = np.random.default_rng(1).permutation(len(dataset)).tolist()
    encoded = [dataset[0, i] for i in order]
    micro_batches = []
    for start in range(0, len(encoded), options.batch_size):
        step = encoded[start : start + options.batch_size]
        micro_batches.append(
            [step[i : i + options.micro_batch] for i in range(0, len(step), options.micro_batch)]
        )
    return micro_batches


# ---- models ----


def published_config(size):
    """Returns the keyword arguments of Qwen3VLConfig for a published size."""
    parts = {name: SIZES[size][name] | SHARED[name] for name in SHARED}
    return parts | {"tie_word_embeddings": SIZES[size]["tie_word_embeddings"]}


def build(size, parts, device):
    """Returns (model, processor) with random weights. What does not learn is frozen, as train.py does it."""
    config, tokenizer, images = models.build_tiny([WORDS] * 9)
    settings = data.Settings()
    if size != "tiny":
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        tokens = {name: getattr(config, name) for name in names}
        config = Qwen3VLConfig(**published_config(size), **tokens)
        half = [0.5, 0.5, 0.5]
        pixels = {"shortest_edge": 65536, "longest_edge": 16777216}
        images = Qwen2VLImageProcessorPil(size=pixels, image_mean=half, image_std=half, patch_size=16)
        settings = data.Settings(**data.PRETRAINED_PIXELS)
    processor = models.Processor(tokenizer, images, config, settings)
    torch.manual_seed(0)
    with torch.device(device):  # bfloat16, as published weights are, and then as load_model returns them
        backbone = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16).float()
    model = models.ReferringVideoLLM(backbone, processor)
    train.choose_parameters(model, train.Config(train=parts, lr=0.0, region_lr=0.0))
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


# ---- the plain loop ----


def plain_batch(samples, processor):
    """The arguments of a plain model of transformers for encoded samples, and what their regions need."""
    pad, config = processor.tokenizer.pad_token_id, processor.config
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(name, value):
        rows = [np.pad(s[name], (0, longest - len(s[name])), constant_values=value) for s in samples]
        return torch.from_numpy(np.stack(rows))

    def pixels(patches, repeat):
        mean, std = (np.array(x, np.float32)[:, None] for x in (images.image_mean, images.image_std))
        values = (
            np.concatenate(patches).reshape(sum(map(len, patches)), 3, -1) / np.float32(255) - mean
        ) / std
        return torch.from_numpy(np.tile(values, repeat).reshape(len(values), -1))

    images, copies = processor.image_processor, processor.temporal_patch_size
    ids = padded("input_ids", pad)
    kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    inputs = {"input_ids": ids, "labels": padded("labels", data.IGNORE_INDEX), "mm_token_type_ids": kinds}
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    inputs["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    with_image = [sample for sample in samples if sample["kind"] == "image"]
    if with_image:
        inputs["pixel_values"] = pixels([sample["still_patches"][0] for sample in with_image], copies)
        inputs["image_grid_thw"] = torch.tensor([sample["prompt_grid"] for sample in with_image])
    with_video = [sample for sample in samples if sample["kind"] == "video"]
    if with_video:
        inputs["pixel_values_videos"] = pixels([sample["video_patches"] for sample in with_video], 1)
        inputs["video_grid_thw"] = torch.tensor([sample["prompt_grid"] for sample in with_video])

    regions = {"is_region": ids == processor.region_token_id, "frames": [], "objects": []}
    stills, grids = [], []
    for sample in samples:
        if not sample["object_frames"]:
            continue
        for weights, still, box in zip(sample["coverage"], sample["region_still"], sample["boxes"]):
            regions["frames"].append((len(stills) + still, torch.from_numpy(weights), torch.tensor(box)))
        regions["objects"] += zip(sample["object_frames"], sample["region_tokens"])
        stills += sample["still_patches"]
        grids += [(1, *grid) for grid in sample["still_grids"]]
    if regions["frames"]:
        regions["pixels"], regions["grids"] = pixels(stills, copies), torch.tensor(grids)
    return {"inputs": inputs, "regions": regions}


def plain_regions(plain, encoder, regions):
    """Returns the region tokens, (T, D)."""
    cells = plain.model.visual(regions["pixels"], grid_thw=regions["grids"]).pooler_output
    cells = cells.split(
        (regions["grids"].prod(1) // plain.config.vision_config.spatial_merge_size**2).tolist()
    )
    pooled = [(w[:, None] * cells[i]).sum(0) / w.sum() for i, w, _ in regions["frames"]]
    boxes = [box for _, _, box in regions["frames"]]
    tokens, token_boxes, start = [], [], 0
    for count, keep in regions["objects"]:
        rows, places = torch.stack(pooled[start : start + count]), torch.stack(boxes[start : start + count])
        start += count
        similarity = F.cosine_similarity(rows[:-1], rows[1:], dim=-1)
        joined = similarity.argsort(descending=True, stable=True)[: count - keep].tolist()
        runs = [[0]]
        for i in range(1, count):
            if i - 1 in joined:
                runs[-1].append(i)
            else:
                runs.append([i])
        tokens += [rows[run].mean(0) for run in runs]
        token_boxes += [places[run].mean(0) for run in runs]
    tokens = torch.stack(tokens)
    return tokens + encoder.mlp(tokens) + encoder._position(torch.stack(token_boxes))


def plain_backward(plain, encoder, micro_batches, device):
    """The gradient of the mean loss of a step, as `model(**batch, labels=labels).loss` makes it."""
    counts = [int((batch["inputs"]["labels"][:, 1:] != data.IGNORE_INDEX).sum()) for batch in micro_batches]
    for batch, count in zip(micro_batches, counts):
        batch = tree_map(partial(to_device, device), batch)
        regions = batch["regions"]

        def put_regions(module, args, embeddings, regions=regions):
            if not regions["frames"]:
                return embeddings
            rows = plain_regions(plain, encoder, regions).to(embeddings.dtype)
            embeddings = embeddings.clone()
            embeddings[regions["is_region"]] = rows
            return embeddings

        half = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
        with half, plain.get_input_embeddings().register_forward_hook(put_regions):
            loss = plain(**batch["inputs"]).loss
        if loss.requires_grad:  # not so where regions alone learn, and none of these samples has any
            (loss * (count / sum(counts))).backward()


def to_device(device, value):
    return value.to(device, non_blocking=True) if torch.is_tensor(value) else value


def plain_step(plain, encoder, parameters, optimizer, micro_batches, watch):
    plain_backward(plain, encoder, micro_batches, watch.device)
    watch.mark("vision")
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    watch.mark("optimizer")


# ---- our step ----


def on_device(steps, device):
    for micro_batches in steps:
        yield [train.to_device(batch, device) for batch in micro_batches]


def our_step(model, parameters, optimizer, micro_batches, watch):
    """What train.train does with a step's micro-batches."""
    loss_sum = train.backward(model, micro_batches)
    watch.mark("vision")
    loss_sum, norm = torch.stack(
        [loss_sum, torch.nn.utils.get_total_norm([p.grad for p in parameters])]
    ).tolist()
    tokens = sum(len(batch["targets"]) for batch in micro_batches)
    for p in parameters:
        p.grad *= min(1 / tokens, 1 / norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    watch.mark("optimizer")


# ---- time ----


class Stopwatch:
    """Divides the time on the device into parts: what lies between two marks belongs to the later one.

    A step is marked when its forward pass reaches the LLM and its backward pass leaves it, which watch_llm
    does, then at the end of the backward pass and of the step.
    """

    def __init__(self, device):
        self.device, self.marks = device, []

    def mark(self, part):
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)  # the GPU notes the time when it gets there
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((part, moment))

    def watch_llm(self, llm):
        def before_forward(module, args, kwargs):
            self.mark("vision")
            if kwargs["inputs_embeds"].requires_grad:
                kwargs["inputs_embeds"].register_hook(lambda grad: self.mark("LLM"))

        return llm.register_forward_pre_hook(before_forward, with_kwargs=True)

    def milliseconds(self):
        """Returns {part: milliseconds}, and forgets all marks."""
        synchronize(self.device)
        parts = {"vision": 0.0, "LLM": 0.0, "optimizer": 0.0}
        for (_, before), (part, after) in zip(self.marks, self.marks[1:]):
            if self.device.type == "cuda":
                parts[part] += before.elapsed_time(after)
            else:
                parts[part] += 1000 * (after - before)
        self.marks.clear()
        return parts


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(ways, rounds, device):
    """Runs all steps in both ways in turn, once to warm up and then in so many rounds.

    ways: {name: (step, steps, llm)}. Returns {name: {part: milliseconds of a step, a median}}, and
    {name: bytes, at most}.
    """
    watch = Stopwatch(device)
    found, memory = {name: [] for name in ways}, dict.fromkeys(ways, 0)
    for _ in range(rounds + 1):
        for name, (step, steps, llm) in ways.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with watch.watch_llm(llm):
                watch.mark("start")
                for micro_batches in steps():
                    step(micro_batches, watch)
            found[name].append(watch.milliseconds())
            if device.type == "cuda":
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated())
    medians = {}
    for name, measured in found.items():
        medians[name] = {
            part: statistics.median(one[part] for one in measured[1:]) / STEPS for part in measured[0]
        }
    return medians, memory


def profile_step(step, steps, device, trace=None):
    """Returns the share of a step's time in which the GPU had nothing to do. trace: a file for all of it."""
    on_gpu = device.type == "cuda"
    # To watch the CPU slows it down, which would make the GPU wait.
    activities = [ProfilerActivity.CUDA] * on_gpu + [ProfilerActivity.CPU] * (trace is not None)
    micro_batches = next(iter(steps()))
    synchronize(device)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        step(micro_batches, Stopwatch(device))
        synchronize(device)
        seconds = time.perf_counter() - start
    if trace:
        profiler.export_chrome_trace(trace)
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    times = [(e.time_range.start, e.time_range.end) for e in events if not e.is_user_annotation]
    return 1 - covered(times) / (1e6 * seconds)


def covered(intervals):
    """Returns the length of what (start, end) pairs cover, which may overlap."""
    length, covered_until = 0, -float("inf")
    for start, end in sorted(intervals):
        length += max(0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return length


def needed_operations(model, micro_batches):
    """Returns the floating point operations of a step's matrix products. Causal attention counts in full."""
    # Of the ways in which a CPU computes attention, the counter knows the plainest alone.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        train.backward(model, micro_batches)
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def matrix_product_speed(device):
    """Returns the floating point operations that a large matrix product makes in a second."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, seconds = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(20):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(seconds)


# ---- command line ----


def parse(arguments):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--size", choices=["tiny", *SIZES], default="tiny", help="tiny, or a published size (default: tiny)")
    add("--train", default="region,projector,llm", help="what learns: region,projector,llm,vision")
    add("--batch-size", type=int, default=16, help="samples of a step (default: 16)")
    add("--micro-batch", type=int, default=8, help="samples of a forward pass (default: 8)")
    add("--grad-checkpoint", action="store_true", help="compute layers again in the backward pass")
    add("--compile", action="store_true", help="compile the layers of our model")
    add("--profile", metavar="FILE", help="write a trace of one of our steps, for perfetto.dev")
    add("--rounds", type=int, default=5, help=f"how often the {STEPS} steps are measured (default: 5)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    return parser.parse_args(arguments)


def print_row(*cells):
    print("".join(f"{cell:>11}" for cell in cells))


def main(arguments=None):
    options = parse(arguments)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    model, processor = build(options.size, options.train, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    encoded = encode_steps(options, processor)
    collated = [[data.collate(samples, processor) for samples in step] for step in encoded]
    padded = [[plain_batch(samples, processor) for samples in step] for step in encoded]
    collated, padded = ([*DataLoader(steps, None, pin_memory=on_gpu)] for steps in (collated, padded))

    speed = matrix_product_speed(device)
    operations = needed_operations(model, next(on_device(collated, device)))
    plain = plain_twin(model)
    if options.grad_checkpoint:
        for layer in model.layers():
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        plain.gradient_checkpointing_enable()
    if options.compile:
        for layer in model.layers():
            layer.forward = torch.compile(layer.forward, dynamic=True)

    tokens = statistics.mean(sum(batch["num_tokens"] for batch in step) for step in collated)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    print(f"{name}, torch {torch.__version__}, a matrix product of {speed / 1e12:.2f} TFLOP/s")
    print(f"{options.size}: {millions:,.0f} million parameters")
    print(f"a step: {options.batch_size} samples, {tokens:,.0f} tokens, {operations / 1e12:,.2f} TFLOP")
    columns = ("ms", "samples/s", "tokens/s", "MFU", "memory", "vision", "LLM", "optimizer", "waiting")
    print_row("", *columns)

    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    our_way = partial(our_step, model, parameters, optimizer)
    plain_way = partial(plain_step, plain, model.region_encoder, parameters, optimizer)
    ways = {
        "ours": (our_way, partial(on_device, collated, device), model.backbone.model.language_model),
        "plain": (plain_way, lambda: padded, plain.model.language_model),
    }
    medians, memory = measure(ways, options.rounds, device)
    for way, (step, steps, _) in ways.items():
        trace = options.profile if way == "ours" else None
        waiting = profile_step(step, steps, device, trace) if on_gpu or trace else None
        total = sum(medians[way].values())
        per_second = 1000 / total
        print_row(
            way,
            f"{total:.1f}",
            f"{options.batch_size * per_second:.1f}",
            f"{tokens * per_second:,.0f}",
            f"{operations * per_second / speed:.0%}",
            f"{memory[way] / 1e9:.1f} GB" if on_gpu else "-",
            *(f"{part / total:.0%}" for part in medians[way].values()),
            f"{waiting:.0%}" if on_gpu else "-",
        )
    ratio = sum(medians["plain"].values()) / sum(medians["ours"].values())
    print(f"ours is {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
