"""Training: one plain loop over torch.distributed.

    python train.py --data data.json                                                # the tiny model, from scratch, on this machine
    torchrun --nproc_per_node 8 train.py --data data.json --model Qwen/Qwen3-VL-2B-Instruct --train region --out stage1
    torchrun --nproc_per_node 8 train.py --data data.json --model stage1/final --train region,projector,llm --fsdp --out stage2
    python train.py --data data.json --bench                                        # how long reading and a step take, and why

    samples --order(seed, epoch)--> each rank's share --DataLoader--> micro-batches --> loss summed over supervised tokens --backward--.
        one step: all micro-batches of all ranks; gradients divided once by the step's number of supervised tokens  <----------------'

Writes OUT/metrics.jsonl (one line a logged step), OUT/bad_samples.jsonl (what could not be used, and why), OUT/step-NNNNNN
(resumable, with --save-every or on SIGTERM) and OUT/final (the model; eval.py --model OUT/final). Whatever the number of ranks
and the size of the micro-batch, the same step sees the same samples and takes the same gradient; and since everything random
in a step is a function of (seed, step) or (seed, epoch, sample), a resumed run goes on as if it had never been interrupted.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import model as models

FRAME_CACHE = (
    128 << 20
)  # bytes of decoded frames that all workers of a rank keep together: a small data set is decoded once


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The command line is made from this: one field, one option. None: chosen by the model, as the help says."""

    data: list[str] = option(None, "data files: JSON arrays or JSONL")
    media: str = option(None, "folder that media paths are relative to (default: each data file's own)")
    outside_paths: bool = option(False, "also take media paths that are absolute or climb out of that folder")
    model: str = option(
        "tiny",
        "tiny (random weights, no download), or a Hugging Face name or folder of a Qwen3-VL or Qwen2.5-VL",
    )
    out: str = option(
        "out", "folder for all that is written; must not hold an earlier run, unless that is resumed"
    )
    train: str = option(
        None,
        "what learns, of region,projector,llm,vision (default: all for tiny, region for a pretrained model)",
    )
    steps: int = option(560, "optimizer steps, unless --epochs is given")
    epochs: float = option(None, "passes over the data, in place of --steps")
    batch_size: int = option(
        None, "samples of one optimizer step, over all ranks (default: 16, or all where there are fewer)"
    )
    micro_batch: int = option(
        8, "samples of one forward pass on one rank at most; those of a step are grouped by length"
    )
    lr: float = option(
        None,
        "peak learning rate of projector, llm and vision (default: 1e-3 for tiny, 2e-5 for a pretrained model)",
    )
    region_lr: float = option(
        None, "peak learning rate of the region encoder (default: 3e-3 for tiny, 1e-3 for a pretrained model)"
    )
    warmup: int = option(10, "steps of linear warm-up; a cosine to 0 follows")
    clip: float = option(1.0, "the gradient is scaled down to this norm")
    num_frames: int = option(None, "frames sampled evenly from a video (default: 8)")
    frame_pixels: int = option(
        None, "pixels of each at most (default: 32*32 for tiny, 384*384 for a pretrained model)"
    )
    region_pixels: int = option(
        None,
        "the same for images and the annotated frames that regions are pooled from (default: 96*96, 384*384)",
    )
    region_frames: int = option(
        None, "annotated frames used of one object at most, evenly spread (default: 8)"
    )
    region_tokens: int = option(
        None, "tokens one object becomes at most: its most alike neighbours in time are joined (default: 4)"
    )
    single_frame: float = option(
        0.25, "share of the objects that are cut to one random annotated frame (the paper mixes both modes)"
    )
    max_length: int = option(
        None, "tokens of a sample at most; a longer one is refused, never cut (default: 4096)"
    )
    max_bad: float = option(0.01, "stop when a larger share of the samples than this cannot be used")
    timeout: float = option(
        120.0, "seconds that a media file may take to be read; one that hangs is left out"
    )
    workers: int = option(2, "processes that load data, on each rank")
    seed: int = option(0, "of the weights, the order and every random choice")
    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    save_every: int = option(
        None, "steps between two checkpoints OUT/step-NNNNNN (default: only when SIGTERM ends the run)"
    )
    keep: int = option(2, "checkpoints that stay: the last ones")
    resume: str = option(
        None, "latest (of --out; from the start where there is none yet), or the folder of a checkpoint"
    )
    fsdp: bool = option(
        False,
        "spread weights, gradients and optimizer state over the ranks (FSDP2) instead of a copy on each (DDP)",
    )
    grad_checkpoint: bool = option(
        False, "keep no activations inside of layers: the backward pass computes each layer again"
    )
    bench: bool = option(
        False, "train nothing: time the data path and the step on this data, beside straightforward ones"
    )
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for f in fields(Config):
        if f.name == "data":
            kind = dict(nargs="+", required=True)
        else:
            kind = dict(action="store_true") if f.type is bool else dict(type=f.type, default=f.default)
        shown = "" if f.default is None or f.default is False else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"] + shown, **kind)
    config = Config(**vars(parser.parse_args(argv)))
    for f in fields(Config):
        least, value = int(f.name not in ("warmup", "workers", "seed")), getattr(config, f.name)
        if f.type is int and value is not None and value < least:
            parser.error(f"--{f.name.replace('_', '-')}: expected a whole number from {least}, found {value}")
    return config


# ------------------------------------------------------------------------------------------------ ranks


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(*args):
    if rank() == 0:
        tqdm.write(" ".join(map(str, args)))


def init_distributed(device):
    """Joins the ranks that torchrun started, if it did; -> this rank's device."""
    if "RANK" in os.environ:
        # Ranks wait for rank 0 while it writes a checkpoint, and for one that reads slow files: longer than the default of 10 minutes.
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


@contextlib.contextmanager
def first_on_this_machine():
    """The other ranks enter when each machine's first is through."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if world_size() > 1 and not first:
        dist.barrier()
    yield
    if world_size() > 1 and first:
        dist.barrier()


def sum_over_ranks(values, device):
    """A list of numbers -> their sums over all ranks, as floats."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


# ------------------------------------------------------------------------------------------------ the order of samples


class Order:
    """For each step of the run, the (epoch, number) keys of this rank's samples.

    All samples of all epochs stand in one long row, each epoch shuffled by (seed, epoch); step s takes the s-th batch_size of them,
    and each rank an equal stretch of those.
    """

    def __init__(self, samples, batch_size, steps, seed, rank, world, start=0):
        self.samples, self.batch_size, self.steps, self.seed = samples, batch_size, range(start, steps), seed
        self.rank, self.share = rank, batch_size // world

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        epoch, shuffled = -1, None
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.share
            keys = []
            for position in range(first, first + self.share):
                if position // self.samples != epoch:
                    epoch = position // self.samples
                    shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.samples)
                keys.append((epoch, int(shuffled[position % self.samples])))
            yield keys


def micro_batches(samples, micro_batch, pad_token_id):
    """A rank's samples of one step -> (its micro-batches, the DataErrors of the samples that had to be left out).

    Samples of like length go together, so that little is padded; the gradient of a step does not depend on it. Every rank makes
    the same number of micro-batches, whatever it left out: ranks that run in step with each other wait for each forward pass.
    """
    errors = [s for s in samples if isinstance(s, data.DataError)]
    usable = sorted(
        (s for s in samples if not isinstance(s, data.DataError)), key=lambda s: len(s["input_ids"])
    )
    groups = [usable[start : start + micro_batch] for start in range(0, len(samples), micro_batch)]
    return [data.collate(group or [data.EMPTY_SAMPLE], pad_token_id) for group in groups], errors


# ------------------------------------------------------------------------------------------------ the run


def build(config, samples, checkpoint=None):
    """-> (model, processor), with the choices of config that are None made by what the model is. checkpoint: take weights,
    tokenizer and settings from this folder."""
    path = checkpoint or config.model
    texts = data.sample_texts(samples) if path == "tiny" else ()
    names = [f.name for f in fields(data.Settings)]
    processor = models.load_processor(path, texts, **{name: getattr(config, name) for name in names})
    if config.model == "tiny":
        defaults = dict(train="region,projector,llm,vision", lr=1e-3, region_lr=3e-3)
    else:
        defaults = dict(train="region", lr=2e-5, region_lr=1e-3)
    for name, value in (defaults | asdict(processor.settings)).items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    torch.manual_seed(config.seed)
    model = models.load_model(path, processor)
    if path == "tiny":
        print0(
            "model: tiny, a Qwen3-VL of random weights (a pretrained one: --model Qwen/Qwen3-VL-2B-Instruct, or a folder)"
        )
    else:
        print0(f"model: {path}")
    return model, processor


def shard(model, device):
    """FSDP2, in place: a rank keeps its share of each weight, and gathers a layer's weights while that computes; those outside of layers
    (embeddings, mergers, region encoder) are gathered throughout a step. All ranks must call the same layers in the same order. Layers
    move to the device one by one, so that it never holds the whole model; but each rank starts from a whole one in CPU memory."""
    precision = MixedPrecisionPolicy()
    if (
        device.type == "cuda"
    ):  # inputs stay as they are (autocast handles them): of the batch, positions in time would suffer
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in [*model.layers(), model]:
        fully_shard(module, mesh=mesh, mp_policy=precision)


def whole(tensor):
    """What shard spread over the ranks -> all of it in rank 0's CPU memory; every rank must call it. Others come back as they are."""
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if rank() == 0 else None


def choose_parameters(model, config):
    """Freezes what --train does not name -> AdamW's parameter groups, each with its peak learning rate."""
    groups, chosen = model.parameter_groups(), config.train.split(",")
    covered = sum(p.numel() for group in groups.values() for p in group)
    assert covered == sum(p.numel() for p in model.parameters()), (
        "the parameter groups must cover the model, each weight once"
    )
    if not set(chosen) <= set(groups) or len(set(chosen)) < len(chosen):
        raise SystemExit(f"--train: expected names out of {','.join(groups)}, found {config.train}")
    model.requires_grad_(False)
    optimized = []
    for name in chosen:
        for p in groups[name]:
            p.requires_grad_(True)
        optimized.append(
            {"params": groups[name], "peak": config.region_lr if name == "region" else config.lr}
        )
    counts = ", ".join(
        f"{name} {sum(p.numel() for p in group) / 1e6:.2f} M{'' if name in chosen else ' (frozen)'}"
        for name, group in groups.items()
    )
    print0(f"parameters: {counts}")
    return optimized


def schedule(step, config):
    """The share of the peak learning rate at a step: linear warm-up, then a cosine to 0."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


class BadSamples:
    """The samples that could not be used: each named once in OUT/bad_samples.jsonl; too many of them end the run."""

    def __init__(self, config, count):
        self.path, self.limit = os.path.join(config.out, "bad_samples.jsonl"), config.max_bad * count
        self.seen = {str(data.DataError(line["reason"], *line["places"])) for line in read_jsonl(self.path)}

    def add(self, errors):
        """errors: those of this rank; every rank must call it, so that all stop together."""
        everyone = [errors]
        if world_size() > 1:
            everyone = [None] * world_size()
            dist.all_gather_object(everyone, errors)
        for error in (error for errors in everyone for error in errors if str(error) not in self.seen):
            self.seen.add(str(error))
            print0(f"left out: {error}")
            if rank() == 0:
                append_jsonl(self.path, {"places": error.args[1:], "reason": error.args[0]})
        if len(self.seen) > self.limit:
            raise SystemExit(
                f"stopped: {len(self.seen)} samples cannot be used, --max-bad allows {self.limit:g}; see {self.path}"
            )


# ------------------------------------------------------------------------------------------------ files


def append_jsonl(path, line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_jsonl(path):
    """-> the lines of a file that append_jsonl wrote, none if it is absent. A last line that a kill cut short is left out."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def write_whole(path, write):
    """write(folder) fills a new folder aside, which takes the name path once it is on disk: it appears whole or not at all."""
    aside = f"{path}.{os.getpid()}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    write(aside)
    for folder, _, names in os.walk(aside):
        for name in [*names, "."]:
            _to_disk(os.path.join(folder, name))
    os.rename(aside, path)
    _to_disk(os.path.dirname(os.path.abspath(path)))


def _to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save(model, processor, path, training=None):
    """Writes the folder path: the model, and what a resumed run needs beside it as training.pt. Every rank must call it."""
    weights = {name: whole(p) for name, p in model.named_parameters()}

    def write(folder):
        model.save_pretrained(folder, asdict(processor.settings), weights)
        processor.save_pretrained(folder)
        if training:
            torch.save(training, os.path.join(folder, "training.pt"))

    if rank() == 0:
        write_whole(path, write)


# ------------------------------------------------------------------------------------------------ checkpoints

# What a resumed run may change: where things lie and how the work is dealt out, but nothing that the losses depend on.
FREE = (
    "media",
    "outside_paths",
    "out",
    "micro_batch",
    "max_bad",
    "timeout",
    "workers",
    "log_every",
    "save_every",
    "keep",
    "resume",
    "device",
)
FREE += ("fsdp", "grad_checkpoint")


def checkpoints(out):
    """{number of finished steps: folder} of a run's whole checkpoints, oldest first."""
    names = [
        name for name in (os.listdir(out) if os.path.isdir(out) else []) if re.fullmatch(r"step-\d+", name)
    ]
    return {int(name[5:]): os.path.join(out, name) for name in sorted(names, key=lambda name: int(name[5:]))}


def save_checkpoint(model, processor, optimizer, config, samples, done):
    """OUT/step-NNNNNN: the model as in OUT/final (eval.py reads it too), and in training.pt what the loop needs to go on. The files do
    not depend on the number of ranks, nor on --fsdp. Every rank must call it."""
    fixed = {name: value for name, value in asdict(config).items() if name not in FREE}
    state = optimizer.state_dict()
    state["state"] = {
        number: {name: whole(value) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    training = {"done": done, "samples": samples, "config": fixed, "optimizer": state}
    save(model, processor, os.path.join(config.out, f"step-{done:06}"), training)
    if rank() > 0:
        return
    for folder in list(checkpoints(config.out).values())[: -config.keep]:
        os.rename(folder, folder + ".tmp")  # a kill amid the deletion leaves nothing that looks whole
        shutil.rmtree(folder + ".tmp")


def read_checkpoint(config):
    """What --resume names -> (folder, its training.pt), or (None, None) to start from the beginning."""
    if config.resume is None:
        if os.path.exists(os.path.join(config.out, "metrics.jsonl")):
            raise SystemExit(
                f"--out {config.out}: holds an earlier run; name another folder, remove it, or --resume latest"
            )
        return None, None
    if os.path.exists(os.path.join(config.out, "final")):
        raise SystemExit(f"--resume: the run in {config.out} is finished, its model is in final")
    found = checkpoints(config.out)
    folder = found[max(found)] if config.resume == "latest" and found else config.resume
    if folder == "latest":
        print0(f"--resume latest: no checkpoint in {config.out} yet; starts from the beginning")
        return None, None
    if not os.path.exists(os.path.join(folder, "training.pt")):
        raise SystemExit(
            f"--resume {folder}: expected the folder of a checkpoint, found no training.pt in it"
        )
    # mmap: the ranks of a machine then share the memory of an optimizer state of which each goes on to keep a share.
    state = torch.load(
        os.path.join(folder, "training.pt"), map_location="cpu", weights_only=True, mmap=config.fsdp
    )
    if max(found, default=0) > state["done"]:
        raise SystemExit(
            f"--out {config.out}: holds later steps than {folder}; name another folder, or remove them"
        )
    return folder, state


def check_resumable(state, config, samples):
    """Refuses a checkpoint of a run with other settings or other data: its losses could not be those of an uninterrupted run."""
    for name, saved in (state["config"] | {"samples": state["samples"]}).items():
        given = samples if name == "samples" else getattr(config, name)
        if given != saved:
            raise SystemExit(
                f"--resume: expected {name} {saved} as in the run that is resumed, found {given}"
            )


def load_optimizer(optimizer, state):
    """state: as save_checkpoint wrote it, the same on all ranks."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in state["state"].items():
        p = parameters[number]
        if isinstance(p, DTensor):  # this rank's share; src_data_rank: cut from its own copy
            share = partial(
                distribute_tensor, device_mesh=p.device_mesh, placements=p.placements, src_data_rank=None
            )
            moments.update({name: share(moments[name]) for name in ("exp_avg", "exp_avg_sq")})
    optimizer.load_state_dict(state)


def tidy(out, done):
    """Readies OUT for a run that goes on after `done` steps: what a killed run left half-written or logged beyond them goes."""
    os.makedirs(out, exist_ok=True)
    for name in os.listdir(out):
        if re.fullmatch(r"(step-\d+|final)(\.\d+)?\.tmp", name):
            shutil.rmtree(os.path.join(out, name))
    for path in (os.path.join(out, name) for name in ("metrics.jsonl", "bad_samples.jsonl")):
        if os.path.exists(path):
            with open(path + ".tmp", "w") as file:
                file.writelines(
                    json.dumps(line) + "\n" for line in read_jsonl(path) if line.get("step", -1) < done
                )
            os.replace(path + ".tmp", path)


# ------------------------------------------------------------------------------------------------ the loop


def backward(model, micro, total, device):
    """Adds the gradient of this rank's micro-batches to .grad: that of the loss summed over all ranks' supervised tokens, of which there
    are `total`, divided by it. -> this rank's summed loss, a scalar on the device. DDP exchanges gradients once, after the last; FSDP
    after each, because the whole gradient, which would have to be kept until then, is what it is there to avoid."""
    loss_sum = torch.zeros((), device=device)
    for number, batch in enumerate(micro):
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        last = number + 1 == len(micro)
        with (
            contextlib.nullcontext()
            if last or not isinstance(model, DistributedDataParallel)
            else model.no_sync()
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(batch)
            # DDP and FSDP average gradients over ranks; the loss is their sum over the step's tokens, hence the world size.
            (loss * world_size() / max(total, 1)).backward()
        loss_sum += loss.detach()
    return loss_sum


def ignore_sigterm(worker):
    """For the loader's processes. torchrun and batch systems send SIGTERM to all processes: if these died of it, so would the run,
    before it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train(config):
    device = init_distributed(config.device)
    if config.fsdp and not dist.is_initialized():
        raise SystemExit(
            "--fsdp: shards over the ranks that torchrun starts, found none; see python train.py --help"
        )
    checkpoint, state = read_checkpoint(config)
    with first_on_this_machine():  # it makes the index of the data files, the others find it
        samples = data.read_samples(config.data, config.media, config.outside_paths)
    model, processor = build(config, samples, checkpoint)
    if config.grad_checkpoint:
        for layer in model.layers():
            layer.forward = partial(
                recomputed, layer.forward, use_reentrant=False
            )  # hooks stay outside: FSDP gathers once for both
    if config.fsdp:
        shard(model, device)  # before the optimizer: a sharded model has other parameters
    optimized = choose_parameters(model, config)
    model.to(device).train()

    most = min(16, len(samples))
    config.batch_size = config.batch_size or most - most % world_size()
    if config.batch_size < 1 or config.batch_size % world_size():
        raise SystemExit(
            f"--batch-size: expected a multiple of the {world_size()} ranks, found {config.batch_size}"
        )
    if config.epochs is not None:
        config.steps = math.ceil(config.epochs * len(samples) / config.batch_size)
    done = state["done"] if state else 0
    order = Order(
        len(samples), config.batch_size, config.steps, config.seed, rank(), world_size(), start=done
    )
    cache = FRAME_CACHE // max(config.workers, 1)
    dataset = data.ReferringDataset(
        samples, processor, config.single_frame, config.seed, cache_bytes=cache, timeout=config.timeout
    )
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=config.workers,
        worker_init_fn=ignore_sigterm,
        collate_fn=partial(
            micro_batches, micro_batch=config.micro_batch, pad_token_id=processor.tokenizer.pad_token_id
        ),
    )
    print0(
        f"data: {len(samples)} samples; {config.steps} steps of {config.batch_size} on {world_size()} x {device.type}"
    )

    wrapped = DistributedDataParallel(model) if world_size() > 1 and not config.fsdp else model
    optimizer = torch.optim.AdamW(optimized, lr=0.0, betas=(0.9, 0.95), fused=True)
    if state:
        check_resumable(state, config, len(samples))
        load_optimizer(optimizer, state.pop("optimizer"))
        print0(f"resumed: {checkpoint}, {done} steps done")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if rank() == 0:
        tidy(config.out, done)
    if world_size() > 1:
        dist.barrier()
    terminated, stop = [], False
    signal.signal(signal.SIGTERM, lambda *_: terminated.append(True))
    bad, batches = BadSamples(config, len(samples)), iter(loader)
    tokens_seen, samples_seen, clock = 0, 0, time.time()
    bar = tqdm(range(done, config.steps), initial=done, total=config.steps, disable=rank() > 0, unit="step")
    for step in bar:
        torch.manual_seed(
            config.seed + 1_000_003 * (step * world_size() + rank())
        )  # for the dropout of a backbone that has it
        micro, errors = next(batches)
        supervised = sum(int((batch["labels"][:, 1:] != data.IGNORE_INDEX).sum()) for batch in micro)
        tokens, slots = (
            sum(int(count(batch["attention_mask"])) for batch in micro) for count in (torch.sum, torch.numel)
        )
        counts = [supervised, tokens, slots, len(errors), len(terminated)]
        total, tokens, slots, bad_count, stop = sum_over_ranks(
            counts, device
        )  # all ranks stop after the same step
        if bad_count:
            bad.add(errors)

        loss_sum = backward(wrapped, micro, total, device)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)  # of all ranks' shares together
        norm = norm.full_tensor() if config.fsdp else norm
        (loss_sum,) = sum_over_ranks([loss_sum.item()], device)
        if not math.isfinite(loss_sum) or not torch.isfinite(norm):
            ids = [i for batch in micro for i in batch["ids"]]
            found = f"loss {loss_sum / max(total, 1)}, gradient norm {norm}"
            raise SystemExit(f"stopped at step {step}: {found}; rank {rank()} had samples {ids}")
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule(step, config)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        tokens_seen, samples_seen = tokens_seen + tokens, samples_seen + config.batch_size - bad_count
        if rank() == 0 and (step % config.log_every == 0 or step + 1 == config.steps):
            elapsed = time.time() - clock
            line = {
                "step": step,
                "epoch": step * config.batch_size / len(samples),
                "loss": loss_sum / max(total, 1),
                "lr": optimizer.param_groups[-1]["lr"],
                "grad_norm": norm.item(),
                "supervised_tokens": int(total),
                "padded_share": 1 - tokens / slots,
                "tokens_per_s": tokens_seen / elapsed,
                "samples_per_s": samples_seen / elapsed,
            }
            append_jsonl(os.path.join(config.out, "metrics.jsonl"), line)
            bar.set_postfix(loss=f"{line['loss']:.4f}")
            tokens_seen, samples_seen, clock = 0, 0, time.time()

        due = config.save_every and (step + 1) % config.save_every == 0
        if stop or due:
            save_checkpoint(model, processor, optimizer, config, len(samples), step + 1)
        if stop:
            print0(f"stopped by SIGTERM after {step + 1} steps, which are saved; --resume latest goes on")
            break
    else:
        save(model, processor, os.path.join(config.out, "final"))
        print0(f"saved {os.path.join(config.out, 'final')}")
    if dist.is_initialized():
        # DDP holds the process group. It has to let go first: as the group's last owner it would wait for gloo's threads
        # while it holds Python's lock, which those threads need to free the tensors of the last collective.
        del wrapped
        dist.barrier()
        dist.destroy_process_group()
    if stop:
        raise SystemExit(128 + signal.SIGTERM)


# ------------------------------------------------------------------------------------------------ python train.py --bench


@contextlib.contextmanager
def stopwatch(places, now=time.perf_counter):
    """{stage: [(owner, attribute), ...]} -> {stage: seconds}, spent in those functions while the context lasts."""
    seconds = dict.fromkeys(places, 0.0)

    def timed(function, stage):
        def call(*arguments, **named):
            start = now()
            try:
                return function(*arguments, **named)
            finally:
                seconds[stage] += now() - start

        return call

    with contextlib.ExitStack() as stack:
        for stage, functions in places.items():
            for owner, attribute in functions:
                stack.enter_context(
                    mock.patch.object(owner, attribute, timed(getattr(owner, attribute), stage))
                )
        yield seconds


def num_bytes(value):
    """The bytes of all arrays and tensors in nested lists, tuples and dicts."""
    if isinstance(value, (list, tuple, dict)):
        return sum(map(num_bytes, value.values() if isinstance(value, dict) else value))
    return getattr(value, "nbytes", 0)


def straightforward_sample(dataset, sample):
    """A sample of a video read the way VideoRefer's own code reads one, for comparison: decord decodes the sampled frames, then the
    annotated ones; pixels become float32, and masks float32 at the resolution of the video. -> its arrays."""
    import decord  # for this comparison and the tests alone

    processor, settings = dataset.processor, dataset.settings

    def read(choose, size):
        reader = decord.VideoReader(sample.media, num_threads=1)
        frames = choose(len(reader))
        pictures = reader.get_batch(frames).asnumpy()
        height, width = pictures.shape[1:3]
        small = [
            Image.fromarray(picture).resize(size(height, width)[::-1], Image.Resampling.BICUBIC)
            for picture in pictures
        ]
        return (
            frames,
            reader.get_avg_fps(),
            (height, width),
            (np.stack(small).astype(np.float32) / 255 - 0.5) / 0.5,
        )

    annotated = [data.evenly(sorted(masks), settings.region_frames) for masks in sample.objects]
    sampled, fps, size, pictures = read(
        lambda total: data.evenly(range(total), settings.num_frames), processor.frame_size
    )
    video = processor.video_patches(pictures)
    stills = [
        processor.still_patches(picture)
        for picture in read(lambda _: sorted(set().union(*annotated)), processor.still_size)[-1]
    ]
    chosen = [masks[frame] for masks, frames in zip(sample.objects, annotated) for frame in frames]
    masks = [data.decode_mask(mask, *size).astype(np.float32) for mask in chosen]
    prompt = processor.video_prompt(
        sampled, fps, math.prod(processor.frame_size(*size)) // processor.factor**2
    )
    tokens = [data.region_token_count(len(frames), settings.region_tokens) for frames in annotated]
    return video, stills, masks, processor.encode(sample.turns, "video", prompt, tokens)


def bench_data(dataset, runs=24):
    """Prints what a sample costs on its way to a batch, beside the straightforward path: medians over samples and repeats, nothing
    cached. In time of a processor core, whatever the threads: a DataLoader runs one worker a core."""
    import decord

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    some = [dataset.samples[i] for i in data.evenly(range(len(dataset)), 100)]
    videos = data.evenly(
        [s for s in some if s.objects and s.media and not data.media_info(s.media).is_image] or [None], 8
    )
    if videos[0] is None:
        raise SystemExit("--bench: expected samples with regions in a video, found none")
    stages = {
        "open, decode": [
            (data, "read_media"),
            (decord.VideoReader, "__init__"),
            (decord.VideoReader, "get_batch"),
        ],
        "resize": [(Image.Image, "resize")],
        "masks": [(data, "decode_mask"), (data, "coverage"), (data, "mask_box")],
        "patchify": [(data.Processor, "still_patches"), (data.Processor, "video_patches")],
        "tokens": [(data.Processor, "encode")],
    }
    ways = {
        "ours": lambda s: dataset.encode(s, np.random.default_rng(0)),
        "straightforward": lambda s: straightforward_sample(dataset, s),
    }
    found = {way: [] for way in ways}
    for sample in videos * math.ceil(runs / len(videos)):
        for way, read in ways.items():
            dataset.cache = data.FrameCache(0)
            with stopwatch(stages, time.process_time) as seconds:
                start = time.process_time()
                encoded = read(sample)
                total = time.process_time() - start
            found[way].append([1000 * s for s in seconds.values()] + [1000 * total, num_bytes(encoded) / 1e6])
    torch.set_num_threads(threads)
    medians = {way: np.median(rows, axis=0) for way, rows in found.items()}
    print(
        f"\ndata path of a sample: median of {len(found['ours'])} runs over {len(videos)} samples, on one core"
    )
    rows = zip([*(f"{stage}, ms" for stage in stages), "all, ms", "handed over, MB"], *medians.values())
    print_table(rows)


def straightforward_batches(samples, pad_token_id):
    """As micro_batches: the samples of a step in one batch, padded to the longest."""
    return [data.collate([s for s in samples if not isinstance(s, data.DataError)], pad_token_id)], []


def straightforward_backward(model, micro, total, device):
    """As backward, the way `model(**batch, labels=labels).loss` in transformers makes it: logits in float32 at every position."""
    (batch,) = micro
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model.logits(batch).float()
    F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=data.IGNORE_INDEX
    ).backward()


def bench_step(model, optimized, dataset, config, device, turns=5, steps=6):
    """Prints what a step costs, beside the straightforward one: both read the same samples, each with workers of its own, in turns of
    some steps; medians over all steps but the first of each turn. The learning rate is 0."""
    cuda = device.type == "cuda"
    parameters = [p for group in optimized for p in group["params"]]
    ways = {
        "ours": (micro_batches, backward, True),
        "straightforward": (straightforward_batches, straightforward_backward, None),
    }
    loaders, found = {}, {way: [] for way in ways}
    for way, (collate, _, _) in ways.items():
        settings = {"pad_token_id": dataset.processor.tokenizer.pad_token_id}
        settings |= {"micro_batch": config.micro_batch} if way == "ours" else {}
        order = Order(len(dataset), config.batch_size, turns * steps, config.seed, rank=0, world=1)
        loader = DataLoader(
            dataset, batch_sampler=order, num_workers=config.workers, collate_fn=partial(collate, **settings)
        )
        loaders[way] = iter(loader)

    def now():
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for way in list(ways) * turns:
        _, run_backward, fused = ways[way]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=fused)
        stages = {
            "vision, ms": [(model.backbone.model.visual, "forward")],
            "LLM, ms": [(model.backbone.model.language_model, "forward")],
            "backward, ms": [(torch.Tensor, "backward")],
            "optimizer, ms": [(torch.nn.utils, "clip_grad_norm_"), (optimizer, "step")],
        }
        for step in range(steps):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = now()
            micro, _ = next(loaders[way])
            waited = now() - start
            total = sum(int((batch["labels"][:, 1:] != data.IGNORE_INDEX).sum()) for batch in micro)
            tokens, slots = (
                sum(int(count(batch["attention_mask"])) for batch in micro)
                for count in (torch.sum, torch.numel)
            )
            with (
                stopwatch(stages, now) as seconds,
                FlopCounterMode(display=False) if step == 0 else contextlib.nullcontext() as counter,
            ):
                run_backward(model, micro, total, device)
                torch.nn.utils.clip_grad_norm_(parameters, config.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            elapsed = now() - start
            if step == 0:
                flops = counter.get_total_flops() / slots  # of a token, padding and recomputing included
                continue
            peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else float("nan")
            row = [1000 * second for second in (waited, *seconds.values(), elapsed)]
            found[way].append(
                [*row, 100 * (1 - tokens / slots), tokens / elapsed, flops * slots / elapsed / 1e12, peak]
            )
    print(f"\nstep of {config.batch_size} samples on {device.type}: median of {turns * (steps - 1)} steps")
    names = ["wait for data, ms", *stages, "all, ms", "padded, %", "tokens/s", "TFLOP/s", "peak memory, GB"]
    print_table(zip(names, *(np.median(rows, axis=0) for rows in found.values())))


def bench(config):
    """--bench: everything but training, on one process."""
    if config.fsdp or config.grad_checkpoint or "RANK" in os.environ:
        raise SystemExit("--bench: one process; not with torchrun, --fsdp or --grad-checkpoint")
    device = init_distributed(config.device)
    samples = data.read_samples(config.data, config.media, config.outside_paths)
    model, processor = build(config, samples)
    optimized = choose_parameters(model, config)
    model.to(device).train()
    config.batch_size = config.batch_size or min(16, len(samples))
    dataset = data.ReferringDataset(
        samples, processor, config.single_frame, config.seed, timeout=config.timeout
    )
    bench_data(dataset)
    bench_step(model, optimized, dataset, config, device)


def print_table(rows):
    """rows: (what, ours, the straightforward way's). Gain: how many times less of it ours takes, or of a rate, more."""
    print(f"{'':>18}{'ours':>18}{'straightforward':>18}{'gain':>8}")
    for name, ours, straightforward in rows:
        if math.isfinite(ours):  # no peak memory on a CPU
            gain = ours / straightforward if name.endswith("/s") else straightforward / max(ours, 1e-9)
            print(f"{name:>18}{ours:18.2f}{straightforward:18.2f}{gain:8.2f}")


if __name__ == "__main__":
    try:
        config = parse()
        bench(config) if config.bench else train(config)
    except data.DataError as error:
        raise SystemExit(f"data error: {error}") from None
