"""Training: one plain loop over torch.distributed.

    python train.py --data data.json                          # the tiny model, from scratch, on this machine
    torchrun --nproc_per_node 8 train.py --data data.json --model Qwen/Qwen3-VL-2B-Instruct --out stage1
    torchrun --nproc_per_node 8 train.py --data data.json --model stage1/final --train region,projector,llm \\
        --fsdp --out stage2

    samples --Order(seed, epoch)--> each rank's share --DataLoader--> micro-batches --backward--> gradients
        of the loss summed over all micro-batches of all ranks, divided once by the step's supervised tokens

It writes OUT/metrics.jsonl (a line for each logged step, and one for each measurement on --val data),
OUT/bad_samples.jsonl (which samples could not be used, and why), OUT/step-NNNNNN (resumable checkpoints, with
--save-every or on SIGTERM) and OUT/final (the model, for eval.py --model OUT/final).

A step sees the same samples and, but for dropout, takes the same gradient whatever the number of ranks and
the size of the micro-batches. Everything random in it is a function of (seed, step, rank) or (seed, epoch,
sample), so that a resumed run continues as if it had never been interrupted.

torchrun passes a SIGTERM on, but kills after 30 s: --shutdown-timeout 1200 gives step and save 20 minutes.
For several machines, give it --nnodes 4 --rdzv_backend c10d --rdzv_endpoint HOST:29500 on each, HOST being
one of them, and an --out that all can write to. Docker needs --ipc=host, because workers hand over batches
in /dev/shm. On GPUs, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True keeps memory whole where rows differ
in length.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model as models

# Bytes of frames that the workers of a rank keep, so that a small data set is decoded only once.
FRAME_CACHE = 128 << 20


def option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """The command line: each field is an option.

    fill_in_defaults replaces None by what the help names or, for the fields of data.Settings, by what was
    saved with --model.
    """

    data: list[str] = option(None, "data files: JSON arrays or JSONL")
    val: list[str] = option(None, "held-out data files, whose loss is measured; a bad sample ends the run")
    val_every: int = option(None, "steps between two measurements (default: one at the start and the end)")
    val_answers: int = option(None, "questions of --val to answer each time, for exact match (default: none)")
    media: str = option(None, "folder that media paths are relative to (default: each data file's own)")
    outside_paths: bool = option(False, "accept media paths that are absolute or leave that folder")
    model: str = option("tiny", "tiny (random weights), or name or folder of a Qwen3.5, Qwen3-VL, Qwen2.5-VL")
    out: str = option("out", "folder for all output; must not hold an earlier run, unless that is resumed")
    train: str = option(
        None, "what learns: region,projector,llm,vision,lora (default: all but lora if tiny, or region)"
    )
    lora_rank: int = option(None, "rank of the adapters that lora adds to the LLM (default: 16)")
    steps: int = option(560, "optimizer steps, unless --epochs is given")
    epochs: float = option(None, "passes over the data, in place of --steps")
    batch_size: int = option(None, "samples per step, over all ranks (default: about 16, all if fewer)")
    micro_batch: int = option(8, "samples per forward pass of a rank at most")
    lr: float = option(
        None, "peak learning rate but for region (default: 1e-3 if tiny, 2e-4 with lora, or 2e-5)"
    )
    region_lr: float = option(None, "peak learning rate of region (default: 3e-3 if tiny, or 1e-3)")
    warmup: int = option(10, "steps of linear warm-up, after which a cosine falls to 0")
    weight_decay: float = option(0.01, "weight decay of matrices; norms and biases have none")
    clip: float = option(1.0, "norm that the gradient is scaled down to; 0: no clipping")
    num_frames: int = option(None, "frames sampled evenly from a video (default: 8)")
    frame_pixels: int = option(None, "pixels of such a frame at most (default: 32*32 if tiny, or 384*384)")
    region_pixels: int = option(None, "the same for images and annotated frames (default: 64*64 or 384*384)")
    window: int = option(
        None, "around an object, encode a square so many times its box; 0: the whole frame (default: 2)"
    )
    region_frames: int = option(None, "annotated frames per object at most, evenly spread (default: 8)")
    region_tokens: int = option(None, "tokens per object at most, similar frames being merged (default: 4)")
    single_frame: float = option(0.25, "share of objects cut to one random frame (the paper mixes the modes)")
    max_length: int = option(None, "tokens per sample at most; a longer one is refused (default: 4096)")
    max_bad: float = option(0.01, "stop when a larger share of the samples than this cannot be used")
    timeout: float = option(120.0, "seconds for reading a media file, which is left out if it takes longer")
    workers: int = option(None, "processes per rank that load data (default: its cores, at most 16)")
    seed: int = option(0, "of the weights, the order and every random choice")
    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    save_every: int = option(None, "steps between two checkpoints OUT/step-NNNNNN (default: only on SIGTERM)")
    keep: int = option(2, "how many checkpoints stay, the latest ones")
    resume: str = option(None, "latest (of --out; starts anew if there is none), or a checkpoint's folder")
    fsdp: bool = option(False, "shard weights, gradients and optimizer over the ranks (FSDP2, not DDP)")
    grad_checkpoint: bool = option(False, "compute layers again in the backward pass rather than store them")
    compile: bool = option(False, "compile the layers (torch.compile): slower at first, then faster")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")


# ---- the order of samples ----


class Order:
    """The batch sampler: for each step, the (epoch, sample index) pairs of this rank's samples.

    All epochs stand in one long row, each shuffled by (seed, epoch). Step s takes the s-th stretch of
    batch_size samples, and each rank an equal part of it. So there is no state to save.
    """

    def __init__(self, num_samples, batch_size, steps, seed, rank, world_size, first_step=0):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.steps = range(first_step, steps)
        self.rank, self.rank_size = rank, batch_size // world_size

    def __iter__(self):
        epoch, shuffled = -1, None
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.rank_size
            keys = []
            for position in range(first, first + self.rank_size):
                if position // self.num_samples != epoch:
                    epoch = position // self.num_samples
                    shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
                keys.append((epoch, int(shuffled[position % self.num_samples])))
            yield keys


def split_into_micro_batches(samples, micro_batch, processor):
    """Returns the batches (data.collate) into which a rank divides its samples of one step.

    Bad samples (DataErrors) keep their places, at the end, so that all ranks make the same number of batches:
    the ranks wait for each other in each forward pass. A batch of bad samples alone holds a single token.
    """
    ordered = sorted(samples, key=lambda sample: isinstance(sample, data.DataError))
    groups = [ordered[start : start + micro_batch] for start in range(0, len(ordered), micro_batch)]
    return [data.collate(group, processor) for group in groups]


def build_loader(config, samples, processor, first_step):
    """Returns a DataLoader that yields a list of micro-batches for each step, from first_step on."""
    order = Order(
        len(samples), config.batch_size, config.steps, config.seed, rank(), world_size(), first_step
    )
    dataset = data.ReferringDataset(
        samples,
        processor,
        single_frame=config.single_frame,
        seed=config.seed,
        cache_bytes=FRAME_CACHE // max(config.workers, 1),
        timeout=config.timeout,
    )
    collate = partial(split_into_micro_batches, micro_batch=config.micro_batch, processor=processor)
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=config.workers,
        collate_fn=collate,
        worker_init_fn=ignore_sigterm,
        pin_memory=config.device == "cuda",
    )


def copy_ahead(steps, device):
    """Yields the micro-batches of each step on the device. Those of the next are copied in the meantime.

    A step must have waited for the device before it asks for the next one: its memory is then free again.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead = None
    for micro_batches in steps:
        with torch.cuda.stream(stream):  # without a stream it does nothing
            copies = [data.to_device(batch, device) for batch in micro_batches]
        if ahead is not None:
            yield ahead
        if stream:
            torch.cuda.current_stream().wait_stream(stream)
        ahead = copies
    if ahead is not None:
        yield ahead


# ---- model and optimizer ----


def build(config, samples, ckpt_path=None):
    """Returns (model, processor), and fills in the options in config that are None.

    ckpt_path: the checkpoint that is resumed, from which weights, tokenizer and settings then come. Raises
    DataError if there is no such model.
    """
    path = ckpt_path or config.model
    given = {f.name: getattr(config, f.name) for f in fields(data.Settings)}
    texts = data.sample_texts(samples) if path == "tiny" else ()
    processor = models.load_processor(path, texts, **given)
    fill_in_defaults(config, processor, len(samples))
    torch.manual_seed(config.seed)
    model = models.load_model(path, processor)
    if config.lora_rank:
        model.add_lora(config.lora_rank)
    print0(f"model: {path}" + (" (random weights; --model takes a pretrained one)" if path == "tiny" else ""))
    return model, processor


def fill_in_defaults(config, processor, num_samples):
    """Sets the options that are None. Raises SystemExit if the batch does not fit the number of ranks, or for
    an option of a part that does not learn.
    """
    is_tiny = config.model == "tiny"
    if config.train is None:
        config.train = "region,projector,llm,vision" if is_tiny else "region"
    parts = set(config.train.split(","))
    is_used = {"lr": parts != {"region"}, "region_lr": "region" in parts, "lora_rank": "lora" in parts}
    for name in is_used:
        if getattr(config, name) is not None and not is_used[name]:
            expected = f"--{name.replace('_', '-')}: expected a part in --train that uses it"
            raise SystemExit(f"{expected}, found {config.train}")
    if is_tiny:
        defaults = {"lr": 1e-3, "region_lr": 3e-3}
    else:
        defaults = {"lr": 2e-4 if "lora" in parts else 2e-5, "region_lr": 1e-3}
    defaults["lora_rank"] = 16 if "lora" in parts else None
    defaults["workers"] = min(16, cores_per_rank())
    largest_batch = min(16, num_samples)
    defaults["batch_size"] = largest_batch - largest_batch % world_size()
    for name, value in (defaults | asdict(processor.settings)).items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.batch_size < 1 or config.batch_size % world_size():
        expected = f"a multiple of the {world_size()} ranks"
        raise SystemExit(f"--batch-size: expected {expected}, found {config.batch_size}")
    if config.epochs is not None:
        config.steps = math.ceil(config.epochs * num_samples / config.batch_size)
    if config.val_every is None:
        config.val_every = config.steps


def choose_parameters(model, config):
    """Freezes what --train does not name. Returns AdamW's parameter groups, each with its "peak_lr".

    As in nanoGPT, weights of two dimensions or more have weight decay, norms and biases have none.
    """
    parts, chosen = model.parameter_groups(), config.train.split(",")
    if not set(chosen) <= set(parts) or len(set(chosen)) < len(chosen):
        raise SystemExit(f"--train: expected names out of {','.join(parts)}, found {config.train}")
    if {"llm", "lora"} <= set(chosen):  # matrices that learn have no use for adapters
        raise SystemExit(f"--train: expected either llm or lora, found {config.train}")

    groups, counts = [], []
    for name, parameters in parts.items():
        if not parameters:  # a model without adapters
            continue
        millions = sum(p.numel() for p in parameters) / 1e6
        counts.append(f"{name} {millions:.2f} M" + ("" if name in chosen else " (frozen)"))
        for p in parameters:
            p.requires_grad_(name in chosen)
        if name in chosen:
            peak_lr = config.region_lr if name == "region" else config.lr
            matrices = [p for p in parameters if p.ndim >= 2]
            vectors = [p for p in parameters if p.ndim < 2]
            groups.append({"params": matrices, "peak_lr": peak_lr, "weight_decay": config.weight_decay})
            groups.append({"params": vectors, "peak_lr": peak_lr, "weight_decay": 0.0})
    print0("parameters: " + ", ".join(counts))
    return groups


def schedule(step, config):
    """Returns the share of the peak learning rate that a step takes: linear warm-up, then a cosine to 0."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, config.steps - config.warmup)))


def backward(model, micro_batches):
    """Adds the gradient of the loss, summed over the supervised tokens of all ranks, to .grad. Returns the
    summed loss of this rank, a float32 scalar tensor.

    A sum does not depend on how it is divided: neither the number of ranks nor the size of the micro-batches
    changes it.
    """
    losses = []
    for micro_step, batch in enumerate(micro_batches):
        # In DDP training we only need to exchange gradients after the last micro-batch. FSDP does so after
        # each, because it is for models whose whole gradient, which it would have to keep, does not fit.
        is_last = micro_step == len(micro_batches) - 1
        skip_exchange = isinstance(model, DistributedDataParallel) and not is_last
        with model.no_sync() if skip_exchange else contextlib.nullcontext():
            loss = model(batch)
            # DDP and FSDP average the gradients of the ranks. We want their sum, hence the world size.
            (loss * world_size()).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def gradient_norm(parameters):
    """Returns the norm of the gradient of all ranks, a scalar tensor."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# ---- the loop ----


def train(config):
    device = init_distributed(config.device)
    if config.fsdp and not dist.is_initialized():
        raise SystemExit("--fsdp: shards over the ranks that torchrun starts, found none")
    check_out_folder(config)
    ckpt_path, ckpt = read_checkpoint(config)
    first_step = ckpt["done"] if ckpt else 0
    with first_on_this_machine():  # the first rank makes the index of the data files, the others then find it
        samples = data.read_samples(config.data, config.media, config.outside_paths)
        val_samples = data.read_samples(config.val or [], config.media, config.outside_paths)
    check_ranks_agree(first_step, len(samples), len(val_samples))
    model, processor = build(config, samples, ckpt_path)
    if ckpt:
        check_resumable(ckpt, config, len(samples))
    if config.compile:
        compile_layers(model)
    if config.grad_checkpoint:
        recompute_activations(model)
    if config.fsdp:
        shard(model, device)  # before the optimizer is made, because a sharded model has new parameters
    groups = choose_parameters(model, config)
    if device.type == "cuda" and not config.fsdp:  # FSDP cannot mix types
        halve_frozen(model)
    model.to(device).train()
    ddp_model = model
    if world_size() > 1 and not config.fsdp:
        ddp_model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    if ckpt:
        load_optimizer(optimizer, ckpt.pop("optimizer"))
        print0(f"resumed: {ckpt_path}, {first_step} steps done")
    if rank() == 0:
        prepare_out(config.out, first_step)
    if world_size() > 1:
        dist.barrier()
    batches = copy_ahead(build_loader(config, samples, processor, first_step), device)
    bad_samples = BadSamples(config, len(samples))
    held_out = HeldOut(config, val_samples, processor) if config.val else None
    steps = f"{config.steps} steps of {config.batch_size}"
    print0(f"data: {len(samples)} samples; {steps} on {world_size()} x {device.type}")

    sigterms, stop = [], False
    signal.signal(signal.SIGTERM, lambda *_: sigterms.append(True))
    tokens_since_log, samples_since_log, time_of_log = 0, 0, time.time()
    progress = tqdm(
        range(first_step, config.steps), initial=first_step, total=config.steps, disable=rank() > 0
    )
    measured = {}
    for step in progress:
        # Measure on held-out data what the steps before this one have learned.
        if held_out and step % config.val_every == 0:
            started = time.time()
            measured = held_out.measure(model, step)
            time_of_log += time.time() - started

        micro_batches = next(batches)
        # Dropout, if the backbone has any, draws from this.
        torch.manual_seed(config.seed + 1_000_003 * (step * world_size() + rank()))

        # Forward and backward. Then the CPU waits for the GPU, once a step: copy_ahead relies on it.
        loss_sum = backward(ddp_model, micro_batches)
        loss_of_rank, norm_of_sum = torch.stack([loss_sum, gradient_norm(parameters)]).tolist()

        # Sum what the ranks counted. SIGTERMs are among it, so that all ranks stop after the same step.
        errors = [error for batch in micro_batches for error in batch["errors"] if error is not None]
        counts = [
            sum(len(batch["targets"]) for batch in micro_batches),
            sum(batch["num_tokens"] for batch in micro_batches),
            len(errors),
            len(sigterms),
        ]
        supervised_tokens, tokens, num_bad, num_sigterms, loss_sum = sum_over_ranks(
            [*counts, loss_of_rank], device
        )
        stop = num_sigterms > 0
        if num_bad:
            bad_samples.add(errors)

        # From sums to means, clip the gradient, and take one step of the optimizer.
        loss, grad_norm = (x / max(supervised_tokens, 1) for x in (loss_sum, norm_of_sum))
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            ids = [sample_id for batch in micro_batches for sample_id in batch["ids"]]
            found = f"loss {loss}, gradient norm {grad_norm}"
            raise SystemExit(f"stopped at step {step}: {found}; rank {rank()} had samples {ids}")
        scale = 1 / max(supervised_tokens, 1)
        if config.clip and grad_norm > config.clip:
            scale *= config.clip / grad_norm
        torch._foreach_mul_([p.grad for p in parameters], scale)
        share_of_peak = schedule(step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share_of_peak
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Log. lr is the rate that --lr sets, or --region-lr if the region encoder alone learns. The speeds
        # are averages since the previous line.
        tokens_since_log += tokens
        samples_since_log += config.batch_size - num_bad
        if rank() == 0 and (step % config.log_every == 0 or step == config.steps - 1):
            seconds = time.time() - time_of_log
            line = {
                "step": step,
                "epoch": step * config.batch_size / len(samples),
                "loss": loss,
                "lr": share_of_peak * (config.region_lr if config.train == "region" else config.lr),
                "grad_norm": grad_norm,
                "supervised_tokens": int(supervised_tokens),
                "tokens_per_s": tokens_since_log / seconds,
                "samples_per_s": samples_since_log / seconds,
            }
            append_jsonl(os.path.join(config.out, "metrics.jsonl"), line)
            progress.set_postfix({"loss": loss} | measured)
            tokens_since_log, samples_since_log, time_of_log = 0, 0, time.time()

        # Save.
        steps_done = step + 1
        if stop or (config.save_every and steps_done % config.save_every == 0):
            save_checkpoint(model, processor, optimizer, config, len(samples), steps_done)
        if stop:
            break

    final = os.path.join(config.out, "final")
    if stop:
        print0(f"stopped by SIGTERM after {steps_done} steps, which are saved; --resume latest continues")
    else:
        if held_out:
            held_out.measure(model, config.steps)
            held_out.print_best()
        save(model, processor, final)
        print0(f"saved {final}")
    if dist.is_initialized():
        # As the last owner of the process group, DDP would wait for gloo's threads while it holds
        # the GIL, which they need to free the tensors they sent.
        del ddp_model
        dist.barrier()
        dist.destroy_process_group()
    if stop:
        raise SystemExit(128 + signal.SIGTERM)


# ---- A first reading may end here. Below: ranks, held-out data, sharding, files, checkpoints, options. ----


# ---- ranks ----


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def print0(text):
    if rank() == 0:
        tqdm.write(text)


def init_distributed(device):
    """Joins the ranks that torchrun started, if it did. Returns this rank's torch.device. Raises SystemExit
    if there is no such device.
    """
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise SystemExit(f"--device: expected cpu, or cuda where there is one, found {device}")
    if sys.platform == "linux":
        import resource  # Windows has none

        # Each tensor that a worker hands over is an open file, of which often only 1024 are allowed.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # While rank 0 writes a checkpoint, the others may wait longer than the default of 10 minutes.
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            timeout=timedelta(hours=2),
            device_id=torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None,
        )
    return torch.device(device)


@contextlib.contextmanager
def first_on_this_machine():
    """The first rank of each machine runs the body, and the other ranks run it afterwards."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if world_size() > 1 and not first:
        dist.barrier()
    yield
    if world_size() > 1 and first:
        dist.barrier()


def sum_over_ranks(values, device):
    """values: a list of numbers. Returns their sums over all ranks, as floats."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gather_over_ranks(value):
    """Returns the values of all ranks, on every rank. Every rank must call it."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def any_rank(flag):
    """Returns whether the flag is true on any rank. Every rank must call it."""
    return any(gather_over_ranks(bool(flag)))


def raise_first(errors):
    """Raises the first error of any rank, on every rank. Every rank must call it."""
    for error in sum(gather_over_ranks(errors), []):
        raise error


def shared_out(keys, batch_size):
    """Deals a list of keys out to the ranks. Returns this rank's batches, lists of batch_size keys at most.

    All ranks have as many, though some may be empty: FSDP needs as many forward passes of each rank.
    """
    share = keys[rank() :: world_size()]
    num_batches = math.ceil(len(keys) / world_size() / batch_size)
    return [share[i * batch_size : (i + 1) * batch_size] for i in range(num_batches)]


def check_ranks_agree(first_step, num_samples, num_val_samples):
    """Raises SystemExit if ranks see other files, as on disks of their own: they would wait for ever."""
    starts = gather_over_ranks((first_step, num_samples, num_val_samples))
    if len(set(starts)) > 1:
        expected = "expected the same files on all ranks"
        found = f"(steps done, samples, held-out samples) by rank: {starts}"
        raise SystemExit(f"--data, --val, --out: {expected}, found {found}")


def cores_per_rank():
    """Returns how many of this machine's cores fall to each of its ranks, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def ignore_sigterm(worker_id):
    """Keeps the DataLoader's workers alive on a SIGTERM to all processes, so that the run can still save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class BadSamples:
    """Writes each sample that could not be used to OUT/bad_samples.jsonl, once. Too many end the run."""

    def __init__(self, config, num_samples):
        self.path, self.limit = os.path.join(config.out, "bad_samples.jsonl"), config.max_bad * num_samples
        # A resumed run counts on. Places are (file, sample, ...); what follows can change with the epoch.
        self.seen = {tuple(line["places"][:2]) for line in read_jsonl(self.path)}

    def add(self, errors):
        """errors: the DataErrors of this rank. Every rank must call it, so that all ranks stop together."""
        for error in sum(gather_over_ranks(errors), []):
            reason, *places = error.args
            if tuple(places[:2]) in self.seen:
                continue
            self.seen.add(tuple(places[:2]))
            print0(f"left out: {error}")
            if rank() == 0:
                append_jsonl(self.path, {"places": places, "reason": reason})
        if len(self.seen) > self.limit:
            found = f"{len(self.seen)} samples cannot be used, --max-bad allows {self.limit:g}"
            raise SystemExit(f"stopped: {found}; see {self.path}")


# ---- held-out data ----


def read_batches(dataset, batches_of_keys, device, for_generation=False, workers=0):
    """Yields the batch (data.collate) of each list of dataset's keys, on the device."""
    collate = partial(data.collate, processor=dataset.processor, for_generation=for_generation)
    loader = DataLoader(
        dataset,
        batch_sampler=batches_of_keys,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=ignore_sigterm,
    )
    for batch in tqdm(loader, unit="batch", leave=False, disable=rank() > 0 or len(loader) == 1):
        yield data.to_device(batch, device)


@torch.no_grad()
def mean_loss(model, dataset, batch_size, workers):
    """Returns the cross-entropy of the right answers: the mean over all supervised tokens of all ranks.

    dataset: a data.ReferringDataset. Raises data.DataError if a sample is bad, on all ranks.
    """
    device = next(model.parameters()).device
    batches_of_keys = shared_out([(0, i) for i in range(len(dataset))], batch_size)
    loss_sum, tokens, errors = 0.0, 0, []
    for batch in read_batches(dataset, batches_of_keys, device, workers=workers):
        loss_sum += model(batch).item()
        tokens += len(batch["targets"])
        errors += filter(None, batch["errors"])
    raise_first(errors)
    loss_sum, tokens = sum_over_ranks([loss_sum, tokens], device)
    return loss_sum / tokens


def generate_replies(model, dataset, batches_of_keys, max_new_tokens=128, workers=0, any_rank=bool):
    """Yields for each key, in order, the model's reply as text, or the DataError of a bad sample.

    dataset: a data.Questions. any_rank: see ReferringVideoLLM.generate.
    """
    tokenizer, device = dataset.processor.tokenizer, next(model.parameters()).device
    end_token_ids = model.end_token_ids(tokenizer)
    for batch in read_batches(dataset, batches_of_keys, device, for_generation=True, workers=workers):
        tokens = []
        if any_rank(not all(batch["errors"])):
            tokens = model.generate(batch, end_token_ids, max_new_tokens, any_rank)
        texts = iter(tokenizer.batch_decode(tokens, skip_special_tokens=True))  # of the usable samples
        for error in batch["errors"]:
            yield error or next(texts).strip()


class HeldOut:
    """The data of --val, and --val-answers of its questions, evenly spread over it."""

    def __init__(self, config, samples, processor):
        reading = {"cache_bytes": FRAME_CACHE // max(config.workers, 1), "timeout": config.timeout}
        self.samples = data.ReferringDataset(samples, processor, **reading)
        self.questions = data.Questions(samples, processor, **reading)
        self.answers = {}  # {key of a question: the right answer}
        if config.val_answers:
            for i, sample in enumerate(samples):
                self.answers |= {(i, turn): answer.strip() for turn, (_, answer) in enumerate(sample.turns)}
            self.answers = dict(data.evenly(list(self.answers.items()), config.val_answers))
        self.batch_size, self.workers = config.micro_batch, config.workers
        self.log = os.path.join(config.out, "metrics.jsonl")

    def measure(self, model, step):
        """Prints, logs and returns {"val_loss": per supervised token, "val_exact": share of answers that are
        right to the letter, if any are asked for}. Every rank must call it.

        Training does not notice, because the random numbers of a step begin at a seed of its own.
        """
        model.eval()
        # A compiled layer has a few variants at most, and they are for training.
        with torch.compiler.set_stance("force_eager"):
            found = {"val_loss": mean_loss(model, self.samples, self.batch_size, self.workers)}
            if self.answers:
                found["val_exact"] = self._exact_match(model)
        model.train()
        if isinstance(model, FSDPModule):
            model.reshard()  # after a forward pass, it keeps weights for a backward pass
        print0(f"after {step} steps: " + ", ".join(f"{name} {found[name]:.4f}" for name in found))
        if rank() == 0:
            append_jsonl(self.log, {"step": step} | found)
        return found

    def _exact_match(self, model):
        batches = shared_out(list(self.answers), self.batch_size)
        # Ranks that share the weights (FSDP) must all generate until the last of them has ended.
        together = any_rank if isinstance(model, FSDPModule) else bool
        generated = generate_replies(model, self.questions, batches, workers=self.workers, any_rank=together)
        replies = list(generated)  # to the end, because a last batch may be empty on this rank alone
        raise_first([reply for reply in replies if isinstance(reply, data.DataError)])
        right = sum(reply == self.answers[key] for key, reply in zip(chain(*batches), replies))
        return sum(gather_over_ranks(right)) / len(self.answers)

    def print_best(self):
        """Names the step with the lowest loss, also among those before the run was resumed."""
        if rank() == 0:
            lines = [line for line in read_jsonl(self.log) if "val_loss" in line]
            best = min(lines, key=lambda line: line["val_loss"])
            print0(f"lowest val_loss: {best['val_loss']:.4f}, after {best['step']} steps")


# ---- large models ----


def recompute_activations(model):
    """--grad-checkpoint: each layer stores its input alone, and runs a second time in the backward pass.

    Only forward is replaced, so that hooks stay outside: FSDP then gathers a layer's weights once for both.
    """
    for layer in model.layers():
        layer.forward = partial(torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model):
    """--compile: fuses what a layer does between its matrix products, for any length of a row.

    Experts that learn are then computed one by one.
    """
    for layer in model.layers():
        layer.forward = torch.compile(layer.forward, dynamic=True)


def halve_frozen(model):
    """Keeps frozen weights in bfloat16 where it holds them exactly, as it does those of published models.

    Embeddings that grew by a row for the placeholder stay in float32, because that row is random.
    """
    for p in model.parameters():
        if not p.requires_grad and torch.equal(p.bfloat16().float(), p):
            p.data = p.data.bfloat16()


def shard(model, device):
    """--fsdp: shards the model in place (FSDP2). All ranks must then run the same layers in the same order.

    A rank keeps its share of each weight. The weights of a layer are gathered while it computes, those
    outside of layers (embeddings, mergers, region encoder) throughout a step. Layers move to the device one
    by one, so that it never holds the whole model.

    In CPU memory each rank loads a whole model first, 4 bytes a weight: 256 GB for 8 billion weights on the 8
    GPUs of a machine. Saving gathers 12 bytes a trained weight there, on rank 0. Gradients are exchanged
    after each micro-batch: few large ones, with --grad-checkpoint, mean little traffic.
    """
    # The inputs are not cast, because autocast handles them, and positions in time need float32.
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if device.type == "cuda" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    mesh = init_device_mesh(device.type, (world_size(),))
    for module in [*model.layers(), model]:
        fully_shard(module, mesh=mesh, mp_policy=precision)
    register_fsdp_forward_method(model, "generate")


def gather_to_rank0(tensor):
    """Returns a sharded tensor whole, on the CPU of rank 0; None on the others. Every rank must call it."""
    if not isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.full_tensor()
    return tensor.cpu() if rank() == 0 else None


# ---- files ----


def append_jsonl(path, line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_jsonl(path):
    """Returns the lines of a file that append_jsonl wrote, or none if there is no such file.

    A last line that a kill cut short is left out.
    """
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def write_jsonl(path, lines):
    """Replaces a file. A kill leaves the old lines or the new ones, and none that is cut short."""
    with data.atomic_write(path) as temporary, open(temporary, "w") as file:
        for line in lines:
            file.write(json.dumps(line) + "\n")


def prepare_out(out, first_step):
    """Removes from OUT what a killed run left unfinished, or logged for steps that will be done again."""
    os.makedirs(out, exist_ok=True)
    for name in os.listdir(out):
        path = os.path.join(out, name)
        if re.fullmatch(r"(step-\d+|final)(\.\w+)?\.tmp", name):
            shutil.rmtree(path)
        elif re.fullmatch(r"(metrics|bad_samples)\.jsonl\.\w+\.tmp", name):
            os.remove(path)
    for name in ("metrics.jsonl", "bad_samples.jsonl"):
        path = os.path.join(out, name)
        if not os.path.exists(path):
            continue
        if first_step == 0:  # the user may have repaired the samples that an earlier run found bad
            os.remove(path)
        else:
            write_jsonl(path, [line for line in read_jsonl(path) if line.get("step", -1) < first_step])


def save(model, processor, path, training=None):
    """Writes the model, and `training` as training.pt if given, to a folder. Every rank must call it.

    Adapters are merged unless the run is to go on: it could not continue from merged weights bit for bit.
    """
    weights = {name: gather_to_rank0(p) for name, p in model.named_parameters()}
    if rank() > 0:
        return
    with data.atomic_write(path) as folder:
        os.makedirs(folder)
        model.save_pretrained(folder, asdict(processor.settings), weights, merge=training is None)
        processor.save_pretrained(folder)
        if training:
            torch.save(training, os.path.join(folder, "training.pt"))


# ---- checkpoints ----

# The options that a resumed run may change. The metrics depend on all the others.
MAY_CHANGE = "media outside_paths out resume keep save_every log_every val_every max_bad timeout".split()
MAY_CHANGE += "workers micro_batch device fsdp grad_checkpoint compile".split()


def checkpoints(out):
    """Returns {number of finished steps: folder} of the checkpoints in OUT, oldest first."""
    names = os.listdir(out) if os.path.isdir(out) else []
    steps = sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{6,}", name))
    return {step: os.path.join(out, f"step-{step:06}") for step in steps}


def save_checkpoint(model, processor, optimizer, config, num_samples, steps_done):
    """Writes OUT/step-NNNNNN: the model (adapters apart), and in training.pt what the loop needs to continue.

    The files do not depend on the number of ranks, nor on --fsdp. Every rank must call it.
    """
    state = optimizer.state_dict()
    moments = {}
    for i, tensors in state["state"].items():
        moments[i] = {name: gather_to_rank0(tensor) for name, tensor in tensors.items()}
    training = {
        "done": steps_done,
        "samples": num_samples,
        "config": {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE},
        "optimizer": state | {"state": moments},
    }
    save(model, processor, os.path.join(config.out, f"step-{steps_done:06}"), training)
    if rank() > 0:
        return
    for folder in list(checkpoints(config.out).values())[: -config.keep]:
        # It is renamed first, so that a kill during the deletion leaves nothing that looks whole.
        os.rename(folder, folder + ".tmp")
        shutil.rmtree(folder + ".tmp")


def check_out_folder(config):
    """Raises SystemExit if OUT holds a run that is not resumed, or one that is finished."""
    is_finished = os.path.exists(os.path.join(config.out, "final"))
    has_begun = checkpoints(config.out) or os.path.exists(os.path.join(config.out, "metrics.jsonl"))
    if config.resume is None and (has_begun or is_finished):
        remedy = "name another folder, or remove it" + ("" if is_finished else ", or --resume latest")
        raise SystemExit(f"--out {config.out}: holds an earlier run; {remedy}")
    if config.resume and is_finished:
        raise SystemExit(f"--resume: the run in {config.out} is finished, its model is in final")


def read_checkpoint(config):
    """Returns the checkpoint that --resume names as (folder, contents of training.pt), or (None, None).

    Raises SystemExit if the folder holds no checkpoint, or if OUT holds steps that do not lead to it.
    """
    if config.resume is None:
        return None, None
    folder, found = config.resume, checkpoints(config.out)
    if folder == "latest":
        if not found:
            print0(f"--resume latest: no checkpoint in {config.out} yet; starts from the beginning")
            return None, None
        folder = found[max(found)]
    path = os.path.join(folder, "training.pt")
    if not os.path.exists(path):
        raise SystemExit(
            f"--resume {folder}: expected the folder of a checkpoint, found no training.pt in it"
        )
    # With mmap, the ranks of a machine share the memory that the optimizer state is read into.
    ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    in_use = os.path.exists(os.path.join(config.out, "metrics.jsonl"))
    if in_use and not os.path.samefile(config.out, os.path.join(folder, os.pardir)):
        raise SystemExit(f"--out {config.out}: holds another run than that of {folder}; name another folder")
    if max(found, default=0) > ckpt["done"]:
        raise SystemExit(f"--out {config.out}: holds later steps than {folder}; name another folder")
    if config.batch_size is None:  # its default depends on the number of ranks, which may now be another
        config.batch_size = ckpt["config"]["batch_size"]
    return folder, ckpt


def check_resumable(ckpt, config, num_samples):
    """Raises SystemExit on other settings or data: losses would not be those of an uninterrupted run."""
    given = asdict(config) | {"samples": num_samples}
    saved = ckpt["config"] | {"samples": ckpt["samples"]}
    for name, value in given.items():
        if name not in MAY_CHANGE and value != saved.get(name):
            expected = f"expected {name} {saved.get(name)} as in the run that is resumed"
            raise SystemExit(f"--resume: {expected}, found {value}")


def load_optimizer(optimizer, state):
    """state: as save_checkpoint wrote it, the same on all ranks; a sharded parameter takes its part of it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, moments in state["state"].items():
        p = parameters[i]
        if isinstance(p, DTensor):
            for name in ("exp_avg", "exp_avg_sq"):
                # Each rank cuts its part from its own copy, hence no rank is the source.
                moments[name] = distribute_tensor(
                    moments[name], p.device_mesh, p.placements, src_data_rank=None
                )
    optimizer.load_state_dict(state)


# ---- command line ----


def parse(argv=None):
    """Returns the Config of a command line, or exits with a message on a wrong option."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for f in fields(Config):
        if f.type == list[str]:
            arguments = {"nargs": "+", "required": f.name == "data"}
        elif f.type is bool:
            arguments = {"action": "store_true"}
        else:
            arguments = {"type": f.type, "default": f.default}
        shown = "" if f.default is None or f.default is False else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"] + shown, **arguments)
    config = Config(**vars(parser.parse_args(argv)))

    for f in fields(Config):
        value, name = getattr(config, f.name), f.name.replace("_", "-")
        if f.type not in (int, float) or value is None:
            continue
        least = 0 if f.type is float or name in ("warmup", "workers", "seed", "window") else 1
        if not least <= value < math.inf:  # also true for NaN
            kind = "whole number" if f.type is int else "number"
            parser.error(f"--{name}: expected a {kind} from {least}, found {value}")
        if name in ("single-frame", "max-bad") and value > 1:
            parser.error(f"--{name}: expected a number from 0 to 1, found {value}")
    if config.timeout == 0:
        parser.error(f"--timeout: expected a number above 0, found {config.timeout}")
    if (config.val_every or config.val_answers) and not config.val:
        parser.error("--val-every, --val-answers: need --val")
    return config


def main():
    try:
        train(parse())
    except (data.DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
