"""Prints what a training step costs, beside the plain loop: `python tests/bench_step.py [--size 2b]`.

Models of the published sizes with random weights learn from random pictures. "ours" is the step of train.py.
"plain" is what most training scripts do: a batch padded on the right, transformers' own `model(**batch).loss`
with sdpa attention, gradient clipping, AdamW. Its regions are pooled in a loop. It has the same parameters.

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
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
for name in ("av", "pycocotools", "peft"):  # for videos, masks and adapters, of which there are none here
    try:
        importlib.import_module(name)
    except ImportError:
        sys.modules[name] = mock.MagicMock()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from torch.utils.benchmark import Timer  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

import data  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402

STEPS = 4  # different steps, each of other samples
# From config.json of Qwen/Qwen3-VL-2B-Instruct and Qwen/Qwen3-VL-8B-Instruct on huggingface.co: hidden size,
# intermediate size, layers, heads; of the tower also the layers for deepstack.
LLM = {"2b": (2048, 6144, 28, 16), "8b": (4096, 12288, 36, 32)}
TOWER = {"2b": (1024, 4096, 24, 16, [5, 11, 17]), "8b": (1152, 4304, 27, 16, [8, 16, 24])}
WORDS = "the a red small person car dog tree walks turns behind before in front of left right slowly then"
QUESTIONS = (
    "Describe what this is about .",
    "<image>\nDescribe the picture .",
    "<video>\nDescribe the video .",
    "<image>\nWhat is <region> ?",
    "<video>\nWhat is <region> doing ?",
    "<video>\nIs <region> left of <region> ?",  # each on 8 frames
)


def published_config(size, tokens):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    llm = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128} | dict(zip(names, LLM[size]))
    rope = {"rope_type": "default", "rope_theta": 5000000, "mrope_interleaved": True}
    llm["rope_parameters"] = rope | {"mrope_section": [24, 20, 20]}
    names = ("hidden_size", "intermediate_size", "depth", "num_heads", "deepstack_visual_indexes")
    tower = {"patch_size": 16, "num_position_embeddings": 2304, "out_hidden_size": LLM[size][0]}
    tower |= dict(zip(names, TOWER[size]))
    return Qwen3VLConfig(text_config=llm, vision_config=tower, tie_word_embeddings=size == "2b", **tokens)


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


def build(size, parts, device):
    """Returns (model, processor) with random weights. What does not learn is frozen, as train.py does it."""
    config, tokenizer, images = models.build_tiny([WORDS] * 9)
    settings = data.Settings()
    if size != "tiny":
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config = published_config(size, {name: getattr(config, name) for name in names})
        half, pixels = [0.5] * 3, {"shortest_edge": 65536, "longest_edge": 16777216}
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


def plain_step(plain, encoder, parameters, optimizer, micro_batches, watch):
    def put_regions(module, args, embeddings):
        if len(batch["where"]):
            rows = plain_regions(plain, encoder, **batch["regions"]).to(embeddings.dtype)
            return embeddings.flatten(0, 1).index_copy(0, batch["where"], rows).view_as(embeddings)

    total = sum(batch["num_tokens"] for batch in micro_batches)
    hook = plain.get_input_embeddings().register_forward_hook(put_regions)
    for batch in micro_batches:
        batch = train.to_device(batch, watch.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=watch.on_gpu):
            loss = plain(**batch["inputs"]).loss
        if loss.requires_grad:  # not so where regions alone learn, and none of these samples has any
            (loss * (batch["num_tokens"] / total)).backward()
    hook.remove()
    watch.mark("vision")
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    take(optimizer, watch)


def take(optimizer, watch):
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    watch.mark("optimizer")


def our_step(model, parameters, optimizer, micro_batches, watch):
    """What train.train does with a step's micro-batches."""
    loss_sum = train.backward(model, [train.to_device(batch, watch.device) for batch in micro_batches])
    watch.mark("vision")
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    loss_sum, norm = torch.stack([loss_sum, norm]).tolist()
    tokens = sum(len(batch["targets"]) for batch in micro_batches)
    torch._foreach_mul_([p.grad for p in parameters], min(1 / tokens, 1 / norm))
    take(optimizer, watch)


class Stopwatch:
    """Divides the time on the device into parts: what lies between two marks belongs to the later one. The
    forward pass that reaches the LLM, and the backward pass that leaves it, make a mark, too.
    """

    def __init__(self, device, llm):
        self.device, self.on_gpu, self.marks = device, device.type == "cuda", []
        llm.register_forward_pre_hook(self.before_llm, with_kwargs=True)

    def before_llm(self, module, args, kwargs):
        self.mark("vision")
        if kwargs["inputs_embeds"].requires_grad:
            kwargs["inputs_embeds"].register_hook(lambda grad: self.mark("LLM"))

    def mark(self, part):
        moment = time.perf_counter()
        if self.on_gpu:
            moment = torch.cuda.Event(enable_timing=True)  # the GPU notes the time when it gets there
            moment.record()
        self.marks.append((part, moment))

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def measure(self, step, steps):
        """Returns {part: milliseconds of a step}, and the most bytes that were allocated."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.marks = []
        self.mark("start")
        for micro_batches in steps:
            step(micro_batches, self)
        self.synchronize()
        parts = dict.fromkeys(("vision", "LLM", "optimizer"), 0.0)
        for (_, before), (part, after) in zip(self.marks, self.marks[1:]):
            ms = before.elapsed_time(after) if self.on_gpu else 1000 * (after - before)
            parts[part] += ms / len(steps)
        return parts, torch.cuda.max_memory_allocated() if self.on_gpu else 0


def profile_step(step, micro_batches, watch, trace):
    """Returns the share of a step's time in which the GPU had nothing to do. trace: a file for all of it."""
    # To watch the CPU slows it down, which would make the GPU wait.
    activities = [ProfilerActivity.CUDA] * watch.on_gpu + [ProfilerActivity.CPU] * (trace is not None)
    watch.synchronize()
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        step(micro_batches, watch)
        watch.synchronize()
        seconds = time.perf_counter() - start
    if trace:
        profiler.export_chrome_trace(trace)
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.time_range.elapsed_us() for e in events if not e.is_user_annotation)  # all in one stream
    return 1 - busy / (1e6 * seconds)


def parse():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--size", choices=["tiny", *LLM], default="tiny", help="tiny, or a published size (default: tiny)")
    add("--train", default="region,projector,llm", help="what learns: region,projector,llm,vision")
    add("--batch-size", type=int, default=16, help="samples of a step (default: 16)")
    add("--micro-batch", type=int, default=8, help="samples of a forward pass (default: 8)")
    add("--grad-checkpoint", action="store_true", help="compute layers again in the backward pass")
    add("--compile", action="store_true", help="compile the layers of our model")
    add("--profile", metavar="FILE", help="write a trace of one of our steps, for perfetto.dev")
    add("--rounds", type=int, default=5, help=f"how often the {STEPS} steps are measured (default: 5)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    return parser.parse_args()


def main():
    options = parse()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    model, processor = build(options.size, options.train, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    collated = make_steps(options, processor)
    padded = [[plain_batch(batch, processor) for batch in step] for step in collated]
    collated, padded = ([*DataLoader(steps, None, pin_memory=on_gpu)] for steps in (collated, padded))
    n, dtype = (8192, torch.bfloat16) if on_gpu else (1024, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    speed = 2 * n**3 / timer.blocked_autorange().median  # operations a second
    # Causal attention counts in full. Of the ways in which a CPU computes it, the counter knows one alone.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        train.backward(model, [train.to_device(batch, device) for batch in collated[0]])
    model.zero_grad(set_to_none=True)
    operations = counter.get_total_flops()
    plain = plain_twin(model)
    if options.grad_checkpoint:
        plain.gradient_checkpointing_enable()
    for layer in model.layers():
        if options.grad_checkpoint:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        if options.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    tokens = statistics.mean(sum(batch["num_tokens"] for batch in step) for step in collated)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads of a CPU"
    print(f"{name}, torch {torch.__version__}, a matrix product of {speed / 1e12:.2f} TFLOP/s")
    print(f"{options.size}: {millions:,.0f} million parameters")
    print(f"a step: {options.batch_size} samples, {tokens:,.0f} tokens, {operations / 1e12:,.2f} TFLOP")
    columns = ("ms", "samples/s", "tokens/s", "MFU", "memory", "vision", "LLM", "optimizer", "waiting")
    print("".join(f"{cell:>11}" for cell in ("", *columns)))

    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    our_watch = Stopwatch(device, model.backbone.model.language_model)
    our_way = partial(our_step, model, parameters, optimizer)
    plain_watch = Stopwatch(device, plain.model.language_model)
    plain_way = partial(plain_step, plain, model.region_encoder, parameters, optimizer)
    ways = {"ours": (our_way, collated, our_watch), "plain": (plain_way, padded, plain_watch)}
    # Both in turn, once to warm up and then in so many rounds.
    rounds = []
    for _ in range(options.rounds + 1):
        rounds.append({way: watch.measure(step, steps) for way, (step, steps, watch) in ways.items()})
    rounds = rounds[1:]
    totals = {}
    for way, (step, steps, watch) in ways.items():
        parts = [statistics.median(r[way][0][part] for r in rounds) for part in rounds[0][way][0]]
        memory = max(r[way][1] for r in rounds)
        trace = options.profile if way == "ours" else None
        waiting = profile_step(step, steps[0], watch, trace) if on_gpu or trace else None
        total = totals[way] = sum(parts)
        cells = [way, f"{total:.1f}", f"{1000 * options.batch_size / total:.1f}"]
        cells += [f"{1000 * tokens / total:,.0f}", f"{1000 * operations / total / speed:.0%}"]
        cells += [f"{memory / 1e9:.1f} GB" if on_gpu else "-", *(f"{part / total:.0%}" for part in parts)]
        print("".join(f"{cell:>11}" for cell in [*cells, f"{waiting:.0%}" if on_gpu else "-"]))
    print(f"ours is {totals['plain'] / totals['ours']:.2f} times as fast")


if __name__ == "__main__":
    main()
